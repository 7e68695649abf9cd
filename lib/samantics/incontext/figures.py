"""The pictures of notebook 02."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from samantics.data.coco import Instance, box_iou, mask_of, read_image
from samantics.errors import StudyError
from samantics.incontext.evaluation import FATES, VARIANTS
from samantics.incontext.study import MAIN_MAP, InContextStudy
from samantics.metrics.coco_ap import Result
from samantics.plots import COLOURS, headline

VARIANT_LABELS = {
    "class_oracle": "class oracle",
    "all_classes": "all classes asked",
    "wrong_reference": "wrong reference",
    "random_reference": "random embedding",
}
STAGE_LABELS = {
    "before": "before the MLP",
    "after": "after the MLP",
    "maps": "SAM's map, on the object",
    "dinov2": "DINOv2's map, on the object",
}
METRIC_LABELS = {"silhouette": "silhouette", "knn": "kNN accuracy", "nmi": "NMI of k-means", "linear": "linear probe"}
FATE_COLOURS = ("#009E73", "#56B4E9", "#E69F00", "#CC79A7", "#D9D9D9")
STAGE_COLOURS = {"before": "#8A8A8A", "after": COLOURS["sam"], "maps": "#F2B48C", "dinov2": COLOURS["dinov2"]}


def show_image(axes: Axes, study: InContextStudy, image_id: int, title: str = "", part: str = "targets") -> None:
    """An image of one of the study's data sets."""
    axes.imshow(np.asarray(read_image(getattr(study, part).dataset, image_id)), interpolation="bilinear")
    axes.set_title(title, fontsize=10, fontweight="normal", loc="center")
    axes.axis("off")


def draw_box(axes: Axes, box: Sequence[float], colour: str, text: str = "", dashed: bool = False) -> None:
    """A box ``(x0, y0, x1, y1)`` with a word above it."""
    x0, y0, x1, y1 = box
    style = (0, (3, 2)) if dashed else "solid"
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="white", linewidth=3.4))
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2, linestyle=style))
    if text:
        label = {"facecolor": colour, "edgecolor": "none", "pad": 1.2}
        axes.text(x0, max(y0 - 2, 3), text, color="white", fontsize=8, va="bottom", bbox=label, clip_on=False)


def draw_mask(axes: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    """A see-through mask."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    axes.imshow(np.dstack([np.full(mask.shape, v) for v in (red, green, blue)] + [mask * 0.45]))


def corners(result: Result) -> tuple[float, float, float, float]:
    """A result's box as ``(x0, y0, x1, y1)``."""
    x, y, width, height = result["bbox"]
    return x, y, x + width, y + height


# ----------------------------------------------------------------------------------------------------- references


def reference_figure(study: InContextStudy, count: int = 6) -> tuple[Figure, pd.DataFrame]:
    """The first reference of some base (upper row) and novel (lower row) categories, spread over the list."""
    rows = study.references_of(1, 0)[:, 0]
    fig, grid = plt.subplots(2, count, figsize=(11, 4.3))
    table = []
    for axes_row, (name, ids) in zip(grid, (("base", study.split.base), ("novel", study.split.novel)), strict=True):
        chosen = [ids[i] for i in np.linspace(0, len(ids) - 1, count).round().astype(int)]
        for axes, category in zip(axes_row, chosen, strict=True):
            instance = study.references.dataset.instances[rows[study.split.all.index(category)]]
            label = study.references.dataset.categories[category]
            show_image(axes, study, instance.image_id, label, "references")
            draw_box(axes, instance.box, COLOURS[name])
            table.append({"split": name, "category": label, "image": instance.image_id, "drawing": instance.drawing})
    for axes, name in zip(grid[:, 0], ("base", "novel"), strict=True):
        axes.text(-0.08, 0.5, name, transform=axes.transAxes, rotation=90, va="center", ha="right", fontsize=12)
    headline(fig, "A reference is an image with one box")
    return fig, pd.DataFrame(table)


def answer_figure(study: InContextStudy, count: int = 4) -> tuple[Figure, pd.DataFrame]:
    """Reference and answer for the first target images, each asked for its largest object's class.

    Half of them base, half novel; up to four boxes with at least half the best score are drawn, with SAM's masks. An
    answer meets an object if their boxes' IoU is at least 0.5.
    """
    picked = _largest(study, "base", count // 2) + _largest(study, "novel", count - count // 2)
    rows = study.references_of(1, 0)[:, 0]
    trial = study.trial(1)
    results = trial.results("class_oracle", study.targets.dataset, study.split, study.encoder.image_size)
    fig, grid = plt.subplots(2, count, figsize=(2.6 * count, 5.6))
    table = []
    for (above, below), target in zip(grid.T, picked, strict=True):
        name = "base" if target.category_id in study.split.base else "novel"
        reference = study.references.dataset.instances[rows[study.split.all.index(target.category_id)]]
        label = study.targets.dataset.categories[target.category_id]
        show_image(above, study, reference.image_id, f"reference ({name})\n{label}", "references")
        draw_box(above, reference.box, COLOURS[name])
        mine = [r for r in results if (r["image_id"], r["category_id"]) == (target.image_id, target.category_id)]
        best = max((r["score"] for r in mine), default=0.0)
        kept = sorted((r for r in mine if r["score"] >= best / 2), key=lambda r: -r["score"])[:4]
        show_image(below, study, target.image_id, f"answer: {len(kept)} found")
        _draw_answers(below, study, target, kept)
        asked = [o.box for o in study.targets.dataset.by_image[target.image_id] if o.category_id == target.category_id]
        overlap = box_iou([corners(r) for r in kept], asked).max(1)
        table += [
            {"split": name, "category": label, "image": target.image_id, "score": r["score"], "iou": iou}
            for r, iou in zip(kept, overlap, strict=True)
        ]
    shown = pd.DataFrame(table, columns=["split", "category", "image", "score", "iou"])
    right = (shown["iou"] >= 0.5).sum()
    headline(fig, f"{right} of {len(shown)} answers (solid) meet an object asked for (dashed)")
    return fig, shown


def _draw_answers(axes: Axes, study: InContextStudy, target: Instance, kept: Sequence[Result]) -> None:
    for other in study.targets.dataset.by_image[target.image_id]:
        if other.category_id == target.category_id:
            draw_box(axes, other.box, "#222222", dashed=True)
    for result in kept:
        draw_mask(axes, mask_of(result["segmentation"]), COLOURS["sam"])
        draw_box(axes, corners(result), COLOURS["sam"], f"{result['score']:.2f}")


def _largest(study: InContextStudy, name: str, count: int) -> list[Instance]:
    """The largest object of each of the first images whose largest object is of that split; classes differ."""
    chosen: dict[int, Instance] = {}
    for objects in study.targets.dataset.by_image.values():
        largest = max((o for o in objects if not o.crowd), key=lambda o: o.area, default=None)
        if largest is not None and (largest.category_id in study.split.base) == (name == "base"):
            chosen.setdefault(largest.category_id, largest)
    return list(chosen.values())[:count]


# -------------------------------------------------------------------------------------------------------- numbers


def curve_figure(curve: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """The loss and its three terms over training steps; a running mean over five records."""
    fig, grid = plt.subplots(1, 4, figsize=(11, 2.8))
    titles = {"loss": "whole loss", "loss_ce": "class (focal)", "loss_bbox": "box (L1)", "loss_giou": "box (GIoU)"}
    for axes, (name, title) in zip(grid, titles.items(), strict=True):
        axes.plot(curve["step"], curve[name], color="#BBBBBB", linewidth=1)
        axes.plot(curve["step"], _smooth(curve[name]), color=COLOURS["sam"])
        axes.set(title=title, xlabel="step", ylim=(0, None))
    loss = _smooth(curve["loss"])
    late = 100 * (loss.iloc[-1] / loss.iloc[int(0.8 * len(loss))] - 1)
    headline(
        fig, f"The loss went from {loss.iloc[0]:.1f} to {loss.iloc[-1]:.1f}; its last fifth changed it by {late:+.0f} %"
    )
    return fig, curve


def _smooth(loss: pd.Series) -> pd.Series:
    return loss.rolling(5, min_periods=1).mean()


def ap_figure(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Box AP with 95 % intervals: the four variants side by side, for base and novel categories, over shots."""
    boxes = table[table["iou_type"] == "bbox"]
    shots = sorted(boxes["shots"].unique())
    fig, grid = plt.subplots(1, len(VARIANTS), figsize=(11, 3.6), sharey=True)
    for axes, variant in zip(grid, VARIANTS, strict=True):
        for name, shift in (("base", -0.08), ("novel", 0.08)):
            rows = boxes[(boxes["variant"] == variant) & (boxes["split"] == name)].sort_values("shots")
            spread = np.abs(rows[["low", "high"]].to_numpy().T - rows["AP"].to_numpy())
            places = np.arange(len(shots)) + shift
            axes.errorbar(places, rows["AP"], yerr=spread, color=COLOURS[name], marker="o", markersize=5)
            if variant == VARIANTS[0]:
                axes.annotate(name, (places[-1], rows["AP"].iloc[-1]), (6, 0), textcoords="offset points",
                              color=COLOURS[name], va="center", fontweight="bold")  # fmt: skip
        axes.set(title=VARIANT_LABELS[variant], xlabel="shots", xticks=np.arange(len(shots)), xticklabels=shots)
        axes.set_xlim(-0.4, len(shots) - 0.3)
    grid[0].set(ylabel="box AP (%)", ylim=(0, None))
    last = boxes[(boxes["shots"] == shots[-1]) & (boxes["split"] == "base")].set_index("variant")["AP"]
    right, wrong = last["class_oracle"], last["wrong_reference"]
    headline(fig, f"Base categories: box AP {right:.1f} with {shots[-1]} right references, {wrong:.1f} with wrong ones")
    return fig, boxes


def control_figure(ap: pd.DataFrame, control: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Box AP at most shots: asked with the right, the wrong and no reference; SAM's maps beside maps with the class.

    Args:
        ap, control: of :attr:`InContextStudy.ap` and :attr:`InContextStudy.control`.
    """
    table = pd.concat([ap.assign(maps="SAM's"), control.assign(maps="class planted")])
    table = table[(table["iou_type"] == "bbox") & (table["shots"] == ap["shots"].max())]
    variants = ("class_oracle", "wrong_reference", "random_reference")
    planted = table[table["maps"] == "class planted"].set_index(["variant", "split"])
    fig, grid = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    for axes, (maps, rows) in zip(grid, table.groupby("maps", sort=False), strict=True):
        rows = rows.set_index(["variant", "split"])
        for name, shift in (("base", -0.2), ("novel", 0.2)):
            mine = rows.loc[[(variant, name) for variant in variants]]
            span = np.abs(mine[["low", "high"]].to_numpy().T - mine["AP"].to_numpy())
            places = np.arange(len(variants)) + shift
            axes.bar(
                places, mine["AP"], width=0.38, color=COLOURS[name], yerr=span, error_kw={"elinewidth": 1.2}, label=name
            )
        axes.set(title=f"maps: {maps}", xticks=range(len(variants)))
        axes.set_xticklabels(["right\nreference", "wrong\nreference", "random\nembedding"])
        axes.grid(visible=False, axis="x")
    grid[0].set_ylabel("box AP (%)")
    grid[1].legend()
    right, wrong = (planted.loc[(variant, "base"), "AP"] for variant in variants[:2])
    headline(
        fig,
        f"Where the class can be read in the maps, wrong references cost base AP {right - wrong:.1f} of {right:.1f}",
    )
    return fig, table


def control_sentences(table: pd.DataFrame) -> list[str]:
    """For each kind of map and split, box AP with the right reference and what a wrong one leaves of it."""
    said = []
    for (maps, name), rows in table.groupby(["maps", "split"], sort=False):
        ap = rows.set_index("variant")["AP"]
        right, wrong = ap["class_oracle"], ap["wrong_reference"]
        said.append(
            f"maps: {maps}; {name} categories: box AP {right:.1f} with right references, {wrong:.1f} with wrong"
        )
    return said


def separability_figure(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Four numbers before and after the MLP and of two maps on the objects; dashed: the values of shuffled labels."""
    fig, grid = plt.subplots(1, 4, figsize=(11, 3.6))
    for axes, (metric, title) in zip(grid, METRIC_LABELS.items(), strict=True):
        for group, name in enumerate(("base", "novel")):
            for place, stage in enumerate(STAGE_LABELS):
                row = table[(table["metric"] == metric) & (table["split"] == name) & (table["stage"] == stage)].iloc[0]
                x, colour = group * 5 + place, STAGE_COLOURS[stage]
                axes.bar(x, row["value"], color=colour, width=0.9)
                axes.vlines(x, row["low"], row["high"], color="#222222", linewidth=1.5)
                axes.hlines(row["shuffled"], x - 0.45, x + 0.45, color="#222222", linestyle=(0, (2, 1)), linewidth=1.5)
        axes.set(title=title, xticks=[1.5, 6.5], xticklabels=["base", "novel"])
        axes.axhline(0, color="#444444", linewidth=0.8)
    handles: list[Any] = [Rectangle((0, 0), 1, 1, color=STAGE_COLOURS[stage]) for stage in STAGE_LABELS]
    handles.append(Line2D([], [], color="#222222", linestyle=(0, (2, 1)), linewidth=1.5))
    fig.legend(handles, [*STAGE_LABELS.values(), "shuffled labels"], loc="outside lower center", ncols=5, fontsize=9)
    knn = 100 * table[(table["metric"] == "knn") & (table["split"] == "base")].set_index("stage")["value"]
    stages = (
        f"{knn['before']:.0f} % before the MLP, {knn['after']:.0f} % behind it, {knn['dinov2']:.0f} % in DINOv2's map"
    )
    headline(fig, f"Base categories by nearest neighbours: {stages}")
    return fig, table


# ---------------------------------------------------------------------------------------------------------- t-SNE


HUES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#222222")  # Okabe and Ito's
BASE_MARKERS, NOVEL_MARKERS = ("o", "s", "D", "v", "P"), ("^", "X", "<", "p")


def category_style(study: InContextStudy) -> dict[int, tuple[str, str]]:
    """A hue and a marker for each category: no eye tells more than a few hues apart."""
    styles = {}
    for ids, markers in ((study.split.base, BASE_MARKERS), (study.split.novel, NOVEL_MARKERS)):
        for place, category in enumerate(ids):
            styles[category] = HUES[place % len(HUES)], markers[place // len(HUES) % len(markers)]
    return styles


def tsne_figure(study: InContextStudy) -> tuple[Figure, pd.DataFrame]:
    """Reference objects before (left) and after (right) the MLP, base (upper) and novel (lower) categories apart."""
    maps = study.maps
    main = maps[(maps["perplexity"] == MAIN_MAP[0]) & (maps["seed"] == MAIN_MAP[1])]
    fig, grid = plt.subplots(2, 2, figsize=(10, 9.3))
    names, styles = study.references.dataset.categories, category_style(study)
    knn = study.separability.query("metric == 'knn'").set_index(["stage", "split"])
    for column, stage in enumerate(("before", "after")):
        for axes, split in zip(grid[:, column], ("base", "novel"), strict=True):
            rows = main[main["stage"] == stage]
            axes.scatter(rows["x"], rows["y"], s=5, color="#DDDDDD", linewidths=0)
            for category, group in rows[rows["split"] == split].groupby("category_id"):
                hue, marker = styles[category]
                axes.scatter(
                    group["x"], group["y"], s=17, color=hue, marker=marker, linewidths=0, label=names[category]
                )
            found, chance = 100 * knn.loc[(stage, split), ["value", "shuffled"]]
            title = f"{split}, {STAGE_LABELS[stage]}: kNN {found:.0f} %\n(labels shuffled: {chance:.0f} %)"
            axes.set(title=title, xticks=[], yticks=[])
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
    for axes in grid[:, 1]:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9, handletextpad=0.2, markerscale=1.6)
    gain = 100 * (knn["value"] - knn["shuffled"]).xs("base", level="split")
    text = ", ".join(f"{gain[stage]:+.0f} points {STAGE_LABELS[stage]}" for stage in ("before", "after"))
    headline(fig, f"Base categories, kNN over shuffled labels: {text}")
    return fig, main.assign(category=main["category_id"].map(names))


def tsne_appendix(study: InContextStudy) -> tuple[Figure, pd.DataFrame]:
    """The same points under other perplexities and seeds: what is not in all of them is not in the data."""
    settings = study.maps[["perplexity", "seed"]].drop_duplicates().to_numpy().tolist()
    fig, grid = plt.subplots(2, len(settings), figsize=(3.3 * len(settings), 7.2))
    styles = category_style(study)
    for axes_row, stage in zip(grid, ("before", "after"), strict=True):
        for axes, (perplexity, seed) in zip(axes_row, settings, strict=True):
            maps = study.maps
            rows = maps[(maps["stage"] == stage) & (maps["perplexity"] == perplexity) & (maps["seed"] == seed)]
            for category, group in rows.groupby("category_id"):
                hue, marker = styles[category]
                axes.scatter(group["x"], group["y"], s=8, color=hue, marker=marker, linewidths=0)
            axes.set(title=f"{STAGE_LABELS[stage]}\nperplexity {perplexity}, seed {seed}", xticks=[], yticks=[])
            axes.title.set_fontsize(10)
            axes.grid(visible=False)
    headline(fig, "What is not in all of these maps is not in the data")
    return fig, study.maps


# -------------------------------------------------------------------------------------------------------- failures


def fate_table(fates: pd.DataFrame) -> pd.DataFrame:
    """Share of each fate in percent, for base objects of train drawings, of held-out ones, and for novel ones.

    Columns ``group, objects, fate, share, duplicates`` (share of objects found more than once).
    """
    kind = pd.Series("novel categories", index=fates.index)
    base = fates["split"] == "base"
    kind[base] = "base categories"
    if fates["held_out"].any():
        kind[base] += np.where(fates["held_out"][base], ", held-out drawings", ", train drawings")
    rows = []
    for name, group in fates.groupby(kind):
        shares = group["fate"].value_counts(normalize=True)
        head = {"group": name, "objects": len(group), "duplicates": 100 * group["duplicate"].mean()}
        rows += [{**head, "fate": fate, "share": 100 * shares.get(fate, 0.0)} for fate in FATES]
    return pd.DataFrame(rows)


def fate_figure(fates: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """What became of the objects when all classes were asked for, in percent of each group."""
    table = fate_table(fates)
    groups = list(dict.fromkeys(table["group"]))[::-1]
    fig, axes = plt.subplots(figsize=(10, 0.75 * len(groups) + 1.4))
    left = np.zeros(len(groups))
    for fate, colour in zip(FATES, FATE_COLOURS, strict=True):
        shares = table[table["fate"] == fate].set_index("group")["share"][groups].to_numpy()
        axes.barh(groups, shares, left=left, color=colour, label=fate)
        for place, (start, share) in enumerate(zip(left, shares, strict=True)):
            if share >= 4:
                axes.text(start + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=10)
        left += shares
    axes.set(xlim=(0, 100), xlabel="share of the objects (%)")
    axes.grid(visible=False)
    fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(FATES), fontsize=9)
    novel = table[table["group"] == "novel categories"].set_index("fate")["share"]
    headline(fig, f"All classes asked for: of the novel objects, {novel.max():.0f} % are {novel.idxmax()}" if len(novel)
             else "What became of every object when all classes were asked for")  # fmt: skip
    return fig, table


GALLERY = ("missed", "confused with base", "bad mask", "duplicate")


def gallery_rows(fates: pd.DataFrame, per_kind: int = 4) -> pd.DataFrame:
    """Of the novel objects with each fault, the largest: ``per_kind`` of each kind, from different images."""
    novel = fates[fates["split"] == "novel"].sort_values(["area", "instance"], ascending=[False, True])
    parts = []
    for kind in GALLERY:
        mine = novel[novel["duplicate"] if kind == "duplicate" else novel["fate"] == kind]
        parts.append(mine.drop_duplicates("image_id").head(per_kind).assign(kind=kind))
    return pd.concat(parts, ignore_index=True)


def gallery_figure(study: InContextStudy, per_kind: int = 4) -> tuple[Figure, pd.DataFrame]:
    """Failures on novel categories, chosen by :func:`gallery_rows`: the object dashed, what decided its fate solid."""
    rows = gallery_rows(study.fates, per_kind)
    names = study.targets.dataset.categories
    kinds = [kind for kind in GALLERY if (rows["kind"] == kind).any()]
    if not kinds:
        raise StudyError("no novel object of the targets was missed or confused: there is no failure to draw")
    fig, grid = plt.subplots(len(kinds), per_kind, figsize=(2.5 * per_kind, 2.75 * len(kinds)), squeeze=False)
    by_id = {instance.id: instance for instance in study.targets.dataset.instances}
    for axes_row, kind in zip(grid, kinds, strict=True):
        mine = [{str(k): v for k, v in r.items()} for r in rows[rows["kind"] == kind].to_dict("records")]
        for axes in axes_row[len(mine) :]:
            axes.axis("off")
        axes_row[0].text(
            -0.05, 0.5, kind, transform=axes_row[0].transAxes, rotation=90, va="center", ha="right", fontsize=11
        ).set_in_layout(False)  # or the first column becomes narrower than the others
        for axes, row in zip(axes_row, mine, strict=False):
            instance = by_id[row["instance"]]
            show_image(axes, study, row["image_id"], f"is {names[row['category_id']]}")
            draw_box(axes, instance.box, "#222222", dashed=True)
            for result in _shown_detections(study, row, kind):
                if kind == "bad mask":
                    draw_mask(axes, mask_of(result["segmentation"]), COLOURS["sam"])
                said = "" if kind in ("bad mask", "duplicate") else names[result["category_id"]] + " "
                draw_box(axes, corners(result), COLOURS["sam"], f"{said}{result['score']:.2f}")
    fig.set_layout_engine("constrained", rect=(0.03, 0, 0.97, 1))
    novel = study.fates[study.fates["split"] == "novel"]
    shares = [f"{100 * (novel['fate'] == k).mean():.0f} % are {k}" for k in kinds if k != "duplicate"]
    headline(fig, f"Of {len(novel)} novel objects {', '.join(shares)}: the largest")
    columns = ["kind", "instance", "image_id", "category_id", "area", "score"]
    return fig, rows[columns].assign(category=rows["category_id"].map(names))


def _shown_detections(study: InContextStudy, row: dict[str, Any], kind: str) -> list[Result]:
    """The detection that decided; for a duplicate the two best of the object's own class in its image."""
    if kind != "duplicate":
        return [study.answers[row["decided_by"]]] if row["decided_by"] >= 0 else []
    mine = [r for r in study.answers if (r["image_id"], r["category_id"]) == (row["image_id"], row["category_id"])]
    return sorted(mine, key=lambda r: -r["score"])[:2]


# ------------------------------------------------------------------------------------------------------- the idea


def idea_figure(study: InContextStudy) -> tuple[Figure, pd.DataFrame]:
    """The token's way through the model, with the shapes of this run."""
    table = shape_table(study)
    rows = study.references_of(1, 0)[:, 0]
    target = _largest(study, "base", 1)[0]
    reference = study.references.dataset.instances[rows[study.split.all.index(target.category_id)]]
    fig = plt.figure(figsize=(11, 4.6))
    fig.set_layout_engine("none")  # not at once: saving for a notebook would fall back to the style's
    for place, box in ((0.01, 0.56), (0.01, 0.06)):
        axes = fig.add_axes((place, box, 0.16, 0.38))
        is_reference = box > 0.5
        shown = reference if is_reference else target
        show_image(
            axes,
            study,
            shown.image_id,
            "reference" if is_reference else "target",
            "references" if is_reference else "targets",
        )
        if is_reference:
            draw_box(axes, reference.box, COLOURS["base"])
    canvas = fig.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(0, 1), ylim=(0, 1))
    canvas.axis("off")
    said = dict(zip(table["step"], table["shape"], strict=True))
    for (x, y), text, colour in _steps(said):
        frame = {"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "#555555"}
        canvas.text(x, y, text, ha="center", va="center", fontsize=9.5, bbox=frame)
    arrow = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.4}
    for start, end in ARROWS:
        canvas.annotate("", end, start, arrowprops=arrow)
    fig.suptitle("Blue is SAM and frozen; orange is trained", fontweight="bold", x=0.24, y=0.985, ha="left")
    return fig, table


FROZEN, TRAINED = "#DCE9F5", "#FBE3CF"
ARROWS = (
    ((0.175, 0.75), (0.225, 0.75)), ((0.365, 0.75), (0.425, 0.75)), ((0.565, 0.75), (0.615, 0.75)),
    ((0.175, 0.25), (0.225, 0.25)), ((0.365, 0.25), (0.605, 0.25)), ((0.69, 0.64), (0.69, 0.345)),
    ((0.775, 0.25), (0.845, 0.25)), ((0.92, 0.355), (0.92, 0.63)),
)  # fmt: skip


def _steps(said: dict[str, str]) -> list[tuple[tuple[float, float], str, str]]:
    return [
        ((0.295, 0.75), f"SAM: encoder,\nprompt encoder,\ntwo-way transformer\n{said['neck']}", FROZEN),
        ((0.495, 0.75), f"mask tokens\nof the box\n{said['mask tokens']}", FROZEN),
        ((0.69, 0.75), f"fuser MLP\n= class embedding\n{said['class embedding']}", TRAINED),
        ((0.295, 0.25), f"SAM: encoder\ntrunk maps\n{said['trunk maps']}", FROZEN),
        ((0.69, 0.25), f"deformable DETR\nqueries + embedding\n{said['queries']}", TRAINED),
        ((0.915, 0.25), f"boxes + score\n'same class?'\n{said['boxes']}", TRAINED),
        ((0.915, 0.75), f"SAM: mask decoder\nmasks\n{said['masks']}", FROZEN),
    ]


def shape_table(study: InContextStudy) -> pd.DataFrame:
    """``step, shape, values`` of everything between one reference box and the masks of one target image."""
    settings, tokens = study.settings, study.tokens("references")
    maps = study.targets.source.read(np.array([0]))
    record = next(iter(study.targets.dataset.images.values()))
    shapes = {
        "trunk maps": tuple(maps.trunk.shape[1:]),
        "neck": tuple(maps.neck.shape[1:]),
        "mask tokens": tokens.shape[1:],
        "class embedding": (settings.dim,),
        "queries": (settings.queries, settings.dim),
        "boxes": (settings.queries, 4),
        "masks": (settings.queries, record.height, record.width),
    }
    rows = [(step, "×".join(str(side) for side in shape), int(np.prod(shape))) for step, shape in shapes.items()]
    return pd.DataFrame(rows, columns=["step", "shape", "values"])


# --------------------------------------------------------------------------------------- what a run shows, in words


def ap_sentences(table: pd.DataFrame) -> list[str]:
    """The comparisons that claim C2 rests on, from :attr:`InContextStudy.ap`, at most shots."""
    most = table[(table["shots"] == table["shots"].max()) & (table["iou_type"] == "bbox")]
    rows = {(r["variant"], r["split"]): r for r in most.to_dict("records")}
    said = []
    for name in ("base", "novel"):
        found = rows["class_oracle", name]
        text = f"{name}: box AP {found['AP']:.1f} [{found['low']:.1f}, {found['high']:.1f}], AP50 {found['AP50']:.1f}"
        for control in ("wrong_reference", "random_reference"):
            other = rows[control, name]
            apart = found["low"] > other["high"] or other["low"] > found["high"]
            gap = "intervals apart" if apart else "intervals overlap: no difference shown"
            text += f"; {VARIANT_LABELS[control]} {other['AP']:.1f} ({gap})"
        said.append(text)
    base, novel = (
        rows["class_oracle", name]["AP"] - rows["random_reference", name]["AP"] for name in ("base", "novel")
    )
    said.append(f"what the reference adds to the random embedding, box AP: base {base:+.1f}, novel {novel:+.1f}")
    fair, oracle = rows["all_classes", "base"]["AP"], rows["class_oracle", "base"]["AP"]
    said.append(f"the class oracle is worth {oracle - fair:.1f} points of box AP on base ({fair:.1f} without it)")
    return said


def separability_sentences(table: pd.DataFrame) -> list[str]:
    """For each split, kNN accuracy before and after the MLP, and of SAM's and DINOv2's maps."""
    knn = table[table["metric"] == "knn"].set_index(["split", "stage"])
    said = []
    for name in ("base", "novel"):
        parts = []
        for stage, label in STAGE_LABELS.items():
            row = knn.loc[(name, stage)]
            parts.append(
                f"{label} {100 * row['value']:.0f} % [{100 * row['low']:.0f}, {100 * row['high']:.0f}] "
                f"(shuffled {100 * row['shuffled']:.0f})"
            )
        said.append(f"{name} categories, kNN accuracy: " + ", ".join(parts))
    return said


def fate_sentences(fates: pd.DataFrame) -> list[str]:
    """Found, confused and missed in each group of objects."""
    said = []
    for name, group in fate_table(fates).groupby("group"):
        shares = group.set_index("fate")["share"]
        confused = shares["confused with base"] + shares["confused with novel"]
        said.append(
            f"{name} ({group['objects'].iloc[0]} objects): {shares['found']:.0f} % found, {confused:.0f} % taken for "
            f"another class, {shares['missed']:.0f} % missed, {group['duplicates'].iloc[0]:.0f} % found twice or more"
        )
    return said
