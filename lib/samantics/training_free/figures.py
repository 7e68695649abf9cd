"""The pictures of notebook 03. Each function draws one table or one image of ``pipeline``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from samantics.data.coco import Box, CocoDataset, Instance, Mask, mask_of, read_image
from samantics.metrics.coco_ap import Result
from samantics.plots import COLOURS, LABELS, headline
from samantics.training_free.pipeline import Pipeline
from samantics.training_free.proposals import Proposals

PAPER = {"bbox": 13.3, "segm": 11.3}  # AP on COCO val2017, 80 classes (arXiv 2411.15288)
HIT, NEAR, MISS = "#009E73", "#E69F00", "#D55E00"
OUTLINE = "#00E5FF"
STEPS = {
    "none": "the pipeline",
    "true_masks": "true masks,\nits classes",
    "true_classes": "its masks,\ntrue classes",
    "best_mask": "its best mask\nper object",
    "recall_ceiling": "recall of all\nproposals",
    "truth": "the annotation",
}


# ----------------------------------------------------------------------------------------------------- one image


def show_image(axis: Axes, image: Image.Image, title: str = "") -> None:
    """An image without axes."""
    axis.imshow(image, interpolation="bilinear")
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def outline(axis: Axes, mask: Mask, colour: str, width: float = 1.5) -> None:
    """The edge of a mask, drawn between pixels, in black and ``colour`` so that it shows on any image."""
    padded = np.pad(mask, 1).astype(float)
    y, x = (np.arange(side) - 1.0 for side in padded.shape)
    axis.contour(x, y, padded, levels=[0.5], colors="black", linewidths=width + 1)
    axis.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=width)


def label(axis: Axes, box: Box | NDArray[np.float64], text: str, colour: str) -> None:
    """A name at a box's upper left corner."""
    style = {"facecolor": colour, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
    axis.text(box[0], max(box[1], 4), text, fontsize=7, color="white", bbox=style, va="bottom", clip_on=True)


def show_instances(
    axis: Axes, pipeline: Pipeline, image_id: int, results: Sequence[Result], colours: Sequence[str], title: str
) -> None:
    """An image with the outlines and names of some instances."""
    show_image(axis, read_image(pipeline.data.targets, image_id), title)
    for result, colour in zip(results, colours, strict=True):
        x, y, width, height = result["bbox"]
        outline(axis, mask_of(result["segmentation"]), colour)
        label(axis, (x, y, x + width, y + height), pipeline.data.names[result["category_id"]], colour)


def coloured_masks(proposals: Proposals, seed: int = 0) -> NDArray[np.float64]:
    """``(height, width, 4)`` picture of all masks, large ones below, each in a colour of its own."""
    canvas = np.zeros((*proposals.size, 4))
    masks = proposals.masks
    rng = np.random.default_rng(seed)
    for row in np.argsort(-masks.sum((1, 2)), kind="stable"):
        canvas[masks[row]] = (*rng.uniform(0.1, 1, 3), 0.6)
    return canvas


def references_figure(pipeline: Pipeline, seed: int = 0) -> Figure:
    """The first reference of every category, cut out of its image with a margin, its mask outlined."""
    chosen = pipeline.references[seed]
    columns = 8
    lines = -(-len(chosen) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(10, 1.75 * lines), squeeze=False)
    for axis in axes.ravel():
        axis.axis("off")
    for axis, (category, group) in zip(axes.ravel(), chosen.items(), strict=False):
        title = "\n".join(textwrap.wrap(f"{pipeline.data.names[category]} ({len(group)})", 15))
        show_reference(axis, pipeline.data.references, group[0], title)
    headline(figure, "One reference of each class; in brackets how many there are")
    return figure


def show_reference(axis: Axes, dataset: CocoDataset, instance: Instance, title: str) -> None:
    """One reference, cut out with a margin."""
    x0, y0, x1, y1 = instance.box
    margin = 0.4 * max(x1 - x0, y1 - y0)
    show_image(axis, read_image(dataset, instance.image_id), title)
    outline(axis, mask_of(instance.rle), OUTLINE)
    axis.set_xlim(x0 - margin, x1 + margin)
    axis.set_ylim(y1 + margin, y0 - margin)
    axis.title.set_fontsize(7)


def step_figure(pipeline: Pipeline, image_id: int, scores: NDArray[np.float32], results: Sequence[Result]) -> Figure:
    """One image's way: the image, all proposals, each proposal's best score, the instances that remain."""
    image, proposals = read_image(pipeline.data.targets, image_id), pipeline.proposals("sam")[image_id]
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.1))
    show_image(axes[0], image, "1 the image")
    show_image(axes[1], image, f"2 {len(proposals)} proposals, no names")
    axes[1].imshow(coloured_masks(proposals))
    best = np.zeros(proposals.size)
    for mask, score in zip(proposals.masks, scores.max(1, initial=0), strict=True):
        best[mask] = np.maximum(best[mask], score)
    show_image(axes[2], image, "3 likeness to the nearest class")
    drawn = axes[2].imshow(best, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes[2], shrink=0.7)
    show_instances(axes[3], pipeline, image_id, results, [HIT] * len(results), f"4 the best {len(results)} instances")
    names = ", ".join(dict.fromkeys(pipeline.data.names[result["category_id"]] for result in results)) or "nothing"
    headline(figure, f"Of {len(proposals)} proposals the best {len(results)} are called: {names}")
    return figure


def gallery_figure(pipeline: Pipeline, order: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Three best and three worst images: annotated objects above, best predictions below, an image a column.

    Args:
        order: of :func:`pipeline.ranked_images`.
        found: of :func:`pipeline.top_results`.
    """
    image_ids = pd.concat([order.head(3), order.tail(3)])["image_id"].unique().tolist()
    figure, axes = plt.subplots(2, len(image_ids), figsize=(2.3 * len(image_ids), 4.9), squeeze=False)
    colour_of = {"correct": HIT, "class": NEAR, "location": NEAR}
    for column, image_id in enumerate(image_ids):
        truth = [pipeline.as_result(instance) for instance in pipeline.data.targets.by_image[image_id]]
        show_instances(axes[0, column], pipeline, image_id, truth, ["#444444"] * len(truth), f"image {image_id}: truth")
        rows = found[found["image_id"] == image_id]
        colours = [colour_of.get(kind, MISS) for kind in rows["kind"]]
        right = int((rows["kind"] == "correct").sum())
        title = f"predicted: {right} of {len(truth)} right"
        show_instances(axes[1, column], pipeline, image_id, list(rows["result"]), colours, title)
    none = int((order["right"] == 0).sum())
    colours_mean = "green: right, orange: half right, red: wrong"
    headline(figure, f"In {none} of {len(order)} images no object is right; the best and the worst ({colours_mean})")
    return figure


def predictions_figure(
    pipeline: Pipeline, image_ids: Sequence[int], results: Sequence[Result], best: int = 8
) -> Figure:
    """The best-scored instances of some images."""
    figure, axes = plt.subplots(1, len(image_ids), figsize=(3.2 * len(image_ids), 3.2), squeeze=False)
    for axis, image_id in zip(axes[0], image_ids, strict=True):
        chosen = [result for result in results if result["image_id"] == image_id][:best]
        show_instances(axis, pipeline, image_id, chosen, [OUTLINE] * len(chosen), f"image {image_id}")
    return figure


# --------------------------------------------------------------------------------------------------------- tables


def _bars(axis: Axes, rows: pd.DataFrame, names: Sequence[str], colours: Sequence[str]) -> None:
    """Horizontal bars of AP with intervals and figures; the first row on top."""
    places = np.arange(len(rows))[::-1]
    value, low, high = (rows[name].to_numpy(float) for name in ("AP", "low", "high"))
    axis.barh(places, value, color=list(colours), height=0.7)
    errors = np.clip([value - low, high - value], 0, None)
    axis.errorbar(value, places, xerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    for place, number, end in zip(places, value, high, strict=True):
        axis.text(max(end, number), place, f"  {number:.1f}", va="center", fontsize=9)
    axis.set_yticks(places, names)
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, max(float(np.nanmax(high)), 0.1) * 1.2)


def sources_figure(table: pd.DataFrame, with_paper: bool) -> Figure:
    """Box and mask AP by source of meaning; the paper's figures (other data) in a panel of their own.

    Args:
        with_paper: whether the paper's figures are worth a place beside these.
    """
    figure, axes = plt.subplots(1, 3 if with_paper else 2, figsize=(10, 3.4), sharex=False)
    for axis, iou_type, name in zip(axes, ("segm", "bbox"), ("mask", "box"), strict=False):
        rows = table[table["iou_type"] == iou_type].sort_values("AP", ascending=False, kind="stable")
        _bars(axis, rows, [LABELS[s] for s in rows["source"]], [COLOURS[s] for s in rows["source"]])
        axis.set_title(f"{name} AP by source of meaning", fontsize=10)
        axis.set_xlabel("AP (%)")
    if with_paper:
        rows = pd.DataFrame({"AP": PAPER.values(), "low": PAPER.values(), "high": PAPER.values()})
        _bars(axes[2], rows, ["box AP", "mask AP"], [COLOURS["dinov2"]] * 2)
        axes[2].set_title("the paper (COCO)", fontsize=10)
        axes[2].set_xlabel("AP (%), other data and classes")
    rows = table[table["iou_type"] == "segm"].set_index("source")
    best, floor = rows["AP"].idxmax(), rows.loc["random"]
    headline(
        figure,
        f"Masks named by {LABELS[best]}: AP {_interval(rows.loc[best])}; by an untrained encoder: {_interval(floor)}",
    )
    return figure


def _interval(row: pd.Series) -> str:
    return f"{row['AP']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"


def merging_figure(table: pd.DataFrame) -> Figure:
    """Mask AP by merging."""
    figure, axis = plt.subplots(figsize=(8, 2.8))
    rows = table[table["iou_type"] == "segm"]
    _bars(axis, rows, [str(name).replace("_", " ") for name in rows["merging"]], [COLOURS["dinov2"]] * len(rows))
    plain, best = rows[rows["merging"] == "none"].iloc[0], rows.sort_values("AP", kind="stable").iloc[-1]
    name = str(best["merging"]).replace("_", " ")
    headline(figure, f"Mask AP without merging {_interval(plain)}, at best {_interval(best)} ({name})")
    axis.set_xlabel("AP (%)")
    return figure


def oracle_figure(table: pd.DataFrame) -> Figure:
    """Mask AP (bars) as difficulties are taken away; the recall ceiling as what it is, a recall."""
    rows = table[table["iou_type"] == "segm"].set_index("oracle").loc[list(STEPS)].reset_index()
    figure, axis = plt.subplots(figsize=(9, 3.9))
    value = rows["AP"].fillna(rows["AR100"]).to_numpy(float)
    colours = ["#B3B3B3" if name in ("recall_ceiling", "truth") else COLOURS["dinov2"] for name in rows["oracle"]]
    axis.bar(range(len(rows)), value, color=colours, width=0.7)
    errors = np.clip([value - rows["low"], rows["high"] - value], 0, None)
    axis.errorbar(range(len(rows)), value, yerr=errors, fmt="none", ecolor="black", elinewidth=1)
    for place, (number, high) in enumerate(zip(value, rows["high"], strict=True)):
        axis.text(place, max(number, high) + 1.5, f"{number:.1f}", ha="center", fontsize=9)
    axis.set_xticks(range(len(rows)), [STEPS[name] for name in rows["oracle"]], fontsize=9)
    axis.set_ylim(0, 112)
    axis.grid(axis="x", visible=False)
    axis.set_ylabel("mask AP (%); recall for the fifth")
    ap = rows.set_index("oracle")["AP"]
    gains = f"true masks {ap['true_masks']:.1f}, with true classes {ap['true_classes']:.1f}"
    axis.set_title(f"What each difficulty costs: mask AP {ap['none']:.1f}, with {gains}")
    return figure


def error_figure(table: pd.DataFrame) -> Figure:
    """Share of each kind of error, and the AP50 that mending it would win."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    places = np.arange(len(table))[::-1]
    panels = (
        ("share", "share of all errors (%)", "#B3B3B3"),
        ("gain", "mask AP50 won by mending it", COLOURS["dinov2"]),
    )
    for axis, (column, words, colour) in zip(axes, panels, strict=True):
        value, low, high = (table[name].to_numpy(float) for name in (column, f"{column}_low", f"{column}_high"))
        axis.barh(places, value, color=colour, height=0.7)
        errors = np.clip([value - low, high - value], 0, None)
        axis.errorbar(value, places, xerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        for place, number, end in zip(places, value, np.maximum(value, high), strict=True):
            axis.text(max(end, 0), place, f"  {number:.1f}", va="center", fontsize=9)
        axis.set_yticks(places, table["kind"])
        axis.set_xlabel(words)
        axis.grid(axis="y", visible=False)
        axis.set_xlim(min(0.0, float(low.min())), max(1.0, float(high.max())) * 1.25)
    most, dearest = (table.loc[table[column].idxmax()] for column in ("share", "gain"))
    headline(
        figure,
        f"Most errors are of kind “{most['kind']}” ({most['share']:.0f} %); "
        f"mending “{dearest['kind']}” wins most ({dearest['gain']:.1f} points)",
    )
    return figure


def shots_figure(table: pd.DataFrame) -> Figure:
    """Mask AP against references per class, one line per source, with intervals."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for source, rows in table[table["iou_type"] == "segm"].groupby("source", sort=False):
        rows = rows.sort_values("shots")
        axis.plot(rows["shots"], rows["AP"], "o-", color=COLOURS[str(source)])
        axis.fill_between(rows["shots"], rows["low"], rows["high"], color=COLOURS[str(source)], alpha=0.12, linewidth=0)
        last = rows.iloc[-1]
        axis.annotate(
            LABELS[str(source)], (last["shots"], last["AP"]), (6, 0), textcoords="offset points", va="center",
            color=COLOURS[str(source)],
        )  # fmt: skip
    shots = sorted(table["shots"].unique())
    axis.set_xscale("log")
    axis.set_xticks(shots, [str(number) for number in shots])
    axis.minorticks_off()
    axis.set_xlim(shots[0] * 0.9, shots[-1] * 1.4)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("references per class")
    axis.set_ylabel("mask AP (%)")
    best = (
        table[(table["iou_type"] == "segm") & (table["shots"] == shots[-1])].sort_values("AP", kind="stable").iloc[-1]
    )
    axis.set_title(f"{shots[-1]} references per class: mask AP {_interval(best)} at best ({LABELS[best['source']]})")
    return figure


def grid_figure(table: pd.DataFrame) -> Figure:
    """Recall of the proposals, and mask AP, against the seconds they take."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    axes[0].plot(table["seconds"], table["recall"], "s--", color="#5A5A5A")
    errors = np.clip([table["AP"] - table["low"], table["high"] - table["AP"]], 0, None)
    axes[1].errorbar(table["seconds"], table["AP"], yerr=errors, fmt="o-", color=COLOURS["dinov2"])
    for axis, words in zip(axes, ("recall of the proposals (%)", "mask AP (%)"), strict=True):
        for row in table.to_dict("records"):  # along the upper edge: off lines and bars
            place = (row["seconds"], 0.98)
            text = f"{row['points_per_side']}²"
            axis.annotate(text, place, xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=9)
        axis.set(xlabel="seconds per image for the proposals", title=words)
        axis.margins(x=0.15)
        axis.set_ylim(0, 1.2 * axis.dataLim.ymax or 1)  # all may be 0
    (first, last), points = (table.iloc[0], table.iloc[-1]), table["points_per_side"]
    recall = f"recall {first['recall']:.0f} to {last['recall']:.0f} %"
    headline(
        figure,
        f"From {points.iloc[0]}² to {points.iloc[-1]}² points: {recall}, mask AP {first['AP']:.1f} to {last['AP']:.1f}",
    )
    return figure


def size_figure(table: pd.DataFrame) -> Figure:
    """Recall of the proposals by size of object."""
    figure, axis = plt.subplots(figsize=(7, 3.4))
    axis.bar(range(len(table)), table["recall"], color="#3B4A63", width=0.7)
    errors = np.clip([table["recall"] - table["low"], table["high"] - table["recall"]], 0, None)
    axis.errorbar(range(len(table)), table["recall"], yerr=errors, fmt="none", ecolor="black", elinewidth=1)
    for place, (recall, high, count) in enumerate(zip(table["recall"], table["high"], table["objects"], strict=True)):
        axis.text(place, max(recall, high) + 2, f"{recall:.0f}\n(n = {count})", ha="center", fontsize=8)
    axis.set_xticks(range(len(table)), table["size"])
    axis.set_ylim(0, 125)
    axis.set_yticks(range(0, 101, 20))
    axis.set_xlabel("object's share of the image")
    axis.set_ylabel("recall (%), IoU 0.5 to 0.95")
    found = table["recall"].to_numpy()
    axis.set_title(f"Proposals find {found[0]:.0f} % of the smallest objects, {found[-1]:.0f} % of the largest")
    return figure


def likeness_figure(image: Image.Image, point: tuple[float, float], maps: Mapping[str, NDArray[np.float32]]) -> Figure:
    """Cosine likeness of every place to one clicked point, by model.

    Args:
        point: x, y in pixels.
        maps: by model, ``(height, width)``.
    """
    figure, axes = plt.subplots(1, len(maps) + 1, figsize=(2.4 * (len(maps) + 1), 2.8))
    show_image(axes[0], image, "the clicked patch")
    for axis, (name, values) in zip(axes[1:], maps.items(), strict=True):
        axis.imshow(values, cmap="magma")  # a scale for each: models differ in how alike all places are to them
        axis.set_title(f"{LABELS[name]}: {values.min():.2f} (dark) to 1", fontsize=9, color=COLOURS[name])
        axis.axis("off")
    typical = ", ".join(f"{LABELS[name]} {np.median(values):.2f}" for name, values in maps.items())
    headline(figure, f"Cosine of the clicked patch with half of the image: above {typical}")
    for axis in axes:
        axis.plot(*point, "+", color="black", markersize=13, markeredgewidth=4)
        axis.plot(*point, "+", color=OUTLINE, markersize=12, markeredgewidth=2)
    return figure


def click_figure(
    image: Image.Image,
    point: tuple[float, float],
    masks: NDArray[np.bool_],
    predicted_iou: NDArray[np.float32],
    classes: Sequence[tuple[str, float]],
) -> Figure:
    """SAM's masks at a point, each with the IoU that SAM predicts and the name and score of its best class."""
    figure, axes = plt.subplots(1, len(masks), figsize=(3.2 * len(masks), 3.4), squeeze=False)
    for axis, mask, iou, (name, score) in zip(axes[0], masks, predicted_iou, classes, strict=True):
        show_image(axis, image, f"predicted IoU {iou:.2f}\n{name} ({score:.2f})")
        if mask.any():
            outline(axis, mask, OUTLINE)
        axis.plot(*point, "*", color="white", markeredgecolor="black", markersize=13)
    names = ", ".join(dict.fromkeys(name for name, _ in classes))
    headline(figure, f"One click, {len(masks)} masks, taken for: {names}")
    return figure
