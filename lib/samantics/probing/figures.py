"""The pictures of notebook 01. Each function draws one table of ``probing``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from samantics.data.classification import Task
from samantics.metrics.claims import PAPER_PROBE
from samantics.plots import COLOURS, LABELS, headline
from samantics.probing.features import Images

PAPER = pd.DataFrame(
    [(name, *accuracies) for name, accuracies in PAPER_PROBE.items()], columns=["encoder", "top1", "top5"]
)
LEVELS = {
    "drawing": "which drawing? (unseen views)",
    "category": "which category? (unseen drawings)",
    "class": "which class?",
}


def accuracy_figure(table: pd.DataFrame, tasks: Mapping[str, Task], world: str) -> Figure:
    """Top-1 (bar, with interval) and top-5 (pale) of the linear probe, kNN (mark); a panel a level, then the paper's.

    Args:
        table: of :func:`probing.headline`.
        world: name of the data, for the panels' titles.
    """
    figure, axes = plt.subplots(1, len(tasks) + 1, figsize=(4 * (len(tasks) + 1), 4.2), sharey=True)
    for axis, task in zip(axes, tasks.values(), strict=False):
        chosen = table[table["labels"] == task.name]
        _bars(axis, chosen[chosen["probe"] == "linear"])
        nearest = chosen[chosen["probe"] == "knn"]
        axis.plot(range(len(nearest)), nearest["top1"], "D", color="black", markersize=4, zorder=4, label="kNN top-1")
        axis.axhline(task.chance, color=COLOURS["chance"], linestyle=":", linewidth=1.5, label="chance")
        axis.set_title(f"{world}: {LEVELS[task.name]}\n{len(task.classes)} classes", fontsize=10)
    _bars(axes[-1], PAPER)
    axes[-1].set_title("the paper: ImageNet-1k (other data)\n1000 classes", fontsize=10)
    axes[0].set_ylabel("accuracy (%)")
    axes[0].set_ylim(0, 100)
    axes[0].legend(loc="upper left", fontsize=9)
    level = next(iter(tasks))
    headline(
        figure, f"Linear probe, {level}. {ranking(table[(table['labels'] == level) & (table['probe'] == 'linear')])}"
    )
    return figure


def ranking(rows: pd.DataFrame) -> str:
    """Encoders with their top-1, best first: one row for each."""
    ranked = rows.sort_values("top1", ascending=False)
    return ", ".join(f"{LABELS[row.encoder]}: {row.top1:.0f}" for row in ranked.itertuples()) + " % right"


def _bars(axis: Axes, rows: pd.DataFrame) -> None:
    for place, line in enumerate(rows.to_dict("records")):
        colour = COLOURS[line["encoder"]]
        axis.bar(place, line["top5"], color=colour, alpha=0.25, width=0.7, label="top-5" if place == 0 else None)
        axis.bar(place, line["top1"], color=colour, width=0.7, zorder=2, label="top-1" if place == 0 else None)
        if "top1_low" in line:
            span = [[line["top1"] - line["top1_low"]], [line["top1_high"] - line["top1"]]]
            axis.errorbar(place, line["top1"], span, color="black", linewidth=1.5, zorder=4)
        axis.text(place, line["top1"] + 4, f"{line['top1']:.1f}", ha="center", fontsize=9, zorder=5,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})  # fmt: skip
    axis.set_xticks(range(len(rows)), [LABELS[name] for name in rows["encoder"]])
    axis.grid(axis="x", visible=False)


def zoos_figure(rows: pd.DataFrame, table: pd.DataFrame, others: pd.DataFrame) -> Figure:
    """A mark for each training of each encoder, the shipped one's filled, beside their mean with its 95 % interval.

    Args:
        rows: of :func:`probing.zoo_rows`, from ``table`` and ``others``.
    """
    levels = list(dict.fromkeys(rows["labels"]))
    figure, axes = plt.subplots(1, len(levels), figsize=(5.2 * len(levels), 3.8), squeeze=False)
    for axis, level in zip(axes[0], levels, strict=True):
        mine = rows[rows["labels"] == level]
        for place, line in enumerate(mine.to_dict("records")):
            colour = COLOURS[line["encoder"]]
            span = [[line["top1"] - line["top1_low"]], [line["top1_high"] - line["top1"]]]
            axis.errorbar(place - 0.12, line["top1"], span, fmt="_", ms=14, color=colour, linewidth=2)
            shipped = table.query("encoder == @line['encoder'] and labels == @level and probe == 'linear'")["top1"]
            again = others.query("model == @line['encoder'] and labels == @level")["top1"]
            axis.plot([place + 0.15] * len(again), again, "o", ms=7, color=colour, mfc="white")
            axis.plot([place + 0.15] * len(shipped), shipped, "o", ms=7, color=colour)
        axis.set_xticks(range(len(mine)), [LABELS[name] for name in mine["encoder"]])
        axis.set(title=LEVELS[level], xlim=(-0.5, len(mine) - 0.5), ylim=(0, None))
        axis.grid(axis="x", visible=False)
    axes[0][0].set_ylabel("linear probe, top-1 (%)")
    marks = (("|", None, "mean, 95 %"), ("o", None, "shipped"), ("o", "white", "trained from another seed"))
    handles = [Line2D([], [], ls="", marker=m, ms=8, color="#444444", mfc=fill, label=text) for m, fill, text in marks]
    axes[0][0].legend(handles=handles, loc="upper left", fontsize=9)
    apart = rows["highest"] - rows["lowest"]
    text = f"Trained again from other seeds, a model's linear probe moves by up to {apart.max():.1f} points"
    headline(figure, text if len(others) else "Each model was trained once: intervals without the noise of training")
    return figure


def layer_figure(table: pd.DataFrame) -> Figure:
    """Top-1 against depth, a panel for each label level and a line for each encoder; bands are 95 % intervals."""
    levels = list(dict.fromkeys(table["labels"]))
    figure, axes = plt.subplots(1, len(levels), figsize=(5.2 * len(levels), 4.2), squeeze=False)
    for axis, level in zip(axes[0], levels, strict=True):
        ends = []
        for name, rows in table[table["labels"] == level].groupby("encoder", sort=False):
            axis.plot(rows["depth"], rows["top1"], "o-", color=COLOURS[name], markersize=4)
            axis.fill_between(rows["depth"], rows["top1_low"], rows["top1_high"], color=COLOURS[name], alpha=0.18, lw=0)
            ends.append((float(rows["top1"].iloc[-1]), str(name)))
        axis.set_ylim(bottom=0)
        _end_labels(axis, ends, 1.02)
        axis.set(xlabel="depth of the layer (0 = input, 1 = output)", title=LEVELS[level])
        axis.set_xlim(0, 1.25)
        axis.set_xticks(np.linspace(0, 1, 6))
    axes[0][0].set_ylabel("top-1 of a linear probe (%)")
    lost = [
        f"{LABELS[str(name)]}: {rows['top1'].max() - rows['top1'].iloc[-1]:.1f}"
        for name, rows in table[table["labels"] == levels[0]].groupby("encoder", sort=False)
    ]
    headline(figure, f"Points lost after the best layer ({levels[0]}): {', '.join(lost)}")
    return figure


def _end_labels(axis: Axes, ends: Sequence[tuple[float, str]], x: float) -> None:
    """Names at the ends of lines, moved apart where they would cover each other."""
    gap = 0.055 * max(axis.get_ylim()[1], max(value for value, _ in ends))
    lowest = -np.inf
    for value, name in sorted(ends):
        lowest = max(value, lowest + gap)
        axis.text(x, lowest, LABELS[name], color=COLOURS[name], va="center", fontweight="bold", fontsize=10)


def few_shot_figure(table: pd.DataFrame, tasks: Mapping[str, Task]) -> Figure:
    """Top-1 against images per class (log axis), a panel for each label level."""
    levels = list(dict.fromkeys(table["labels"]))
    figure, axes = plt.subplots(1, len(levels), figsize=(4.6 * len(levels), 4.2), squeeze=False)
    for axis, level in zip(axes[0], levels, strict=True):
        for name, rows in table[table["labels"] == level].groupby("encoder", sort=False):
            span = np.abs(rows[["top1_low", "top1_high"]].to_numpy().T - rows["top1"].to_numpy())
            axis.errorbar(rows["shots"], rows["top1"], span, fmt="o-", color=COLOURS[name], label=LABELS[name], ms=4)
        axis.axhline(tasks[level].chance, color=COLOURS["chance"], linestyle=":", linewidth=1.5)
        axis.set_xscale("log", base=2)
        shots = sorted(set(table.loc[table["labels"] == level, "shots"]))
        axis.set_xticks(shots, [str(count) for count in shots])
        axis.minorticks_off()
        axis.set(xlabel="train images per class", title=LEVELS[level])
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("top-1 of a linear probe (%)")
    axes[0][0].legend(fontsize=9)
    fewest = table[(table["labels"] == levels[0]) & (table["shots"] == table["shots"].min())]
    headline(figure, f"{fewest['shots'].iloc[0]} image per {levels[0]}. {ranking(fewest)}")
    return figure


def class_figure(table: pd.DataFrame, level: str, most: int = 24) -> Figure:
    """Top-1 of each class, classes sorted by the best encoder's; dots with intervals, a colour for each encoder.

    Args:
        level: what the classes are ("category").
    """
    order = table.groupby("class")["top1"].max().sort_values().index[-most:]
    figure, axis = plt.subplots(figsize=(8, 0.28 * len(order) + 1.4))
    names = list(dict.fromkeys(table["encoder"]))
    for offset, name in zip(np.linspace(0.28, -0.28, len(names)), names, strict=True):
        rows = table[table["encoder"] == name].set_index("class").loc[order]
        span = np.abs(rows[["top1_low", "top1_high"]].to_numpy().T - rows["top1"].to_numpy())
        axis.errorbar(
            rows["top1"], np.arange(len(order)) + offset, xerr=span, fmt="o", color=COLOURS[name], ms=4, lw=1,
            capsize=0, label=LABELS[name],
        )  # fmt: skip
    axis.set_yticks(range(len(order)), order)
    axis.set(xlabel="top-1 of a linear probe (%)", xlim=(0, 1.05 * table["top1_high"].max()))
    axis.legend(fontsize=9, loc="lower right")
    wins = table.loc[table.groupby("class")["top1"].idxmax(), "encoder"].value_counts()
    best = ", ".join(f"{LABELS[str(name)]}: {count}" for name, count in wins.items())
    headline(figure, f"Best per {level}, of {wins.sum()}. {best}")
    return figure


def confusion_figure(matrices: Mapping[str, pd.DataFrame], level: str) -> Figure:
    """Confusion matrices side by side: rows are true classes, columns what they are called, shares in percent.

    Args:
        level: of the labels, ``drawing`` or ``category``.
    """
    figure, axes = plt.subplots(1, len(matrices), figsize=(3.1 * len(matrices) + 0.6, 4.7), squeeze=False)
    most = max(float(matrix.to_numpy().max()) for matrix in matrices.values())
    right = {name: float(np.diag(matrix).mean()) for name, matrix in matrices.items()}
    for place, (axis, (name, matrix)) in enumerate(zip(axes[0], matrices.items(), strict=True)):
        axis.imshow(matrix, vmin=0, vmax=most, cmap="viridis")
        axis.set_title(f"{LABELS[name]}: {right[name]:.0f} % right", color=COLOURS[name], fontsize=10)
        axis.set_xticks(range(len(matrix)), matrix.columns, rotation=90, fontsize=7)
        axis.set_yticks(range(len(matrix)), matrix.index if place == 0 else [], fontsize=7)
        axis.grid(visible=False)
        axis.set_xlabel("called")
    axes[0][0].set_ylabel(f"true {level}")
    figure.colorbar(axes[0][-1].images[0], ax=axes[0][-1], label="share of the row (%)", fraction=0.05, pad=0.03)
    best, worst = max(right, key=right.__getitem__), min(right, key=right.__getitem__)
    headline(
        figure,
        f"The mean {level} is called by its name in {right[best]:.0f} % of its images by {LABELS[best]}, "
        f"in {right[worst]:.0f} % by {LABELS[worst]}",
    )
    return figure


def samples_figure(rows: Mapping[str, tuple[Sequence[int], Sequence[str], Images]], title: str) -> Figure:
    """Rows of images with a word over each.

    Args:
        rows: by row name (an encoder's, or a word): positions, a text for each, and the images they are positions in.
    """
    columns = max(1, *(len(chosen) for chosen, _, _ in rows.values()))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.25 * columns + 0.5, 1.6 * len(rows) + 0.3), squeeze=False
    )
    for line, (name, (chosen, texts, images)) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, index, text in zip(line, chosen, texts, strict=False):
            axis.imshow(np.asarray(images[int(index)]))
            axis.set_title(text, fontsize=8, fontweight="normal", loc="center")
        line[0].text(-0.08, 0.5, LABELS.get(name, name), transform=line[0].transAxes, rotation=90, va="center",
                     ha="right", color=COLOURS.get(name, "black"), fontweight="bold")  # fmt: skip
    headline(figure, title)
    return figure


def top_confusions(matrix: pd.DataFrame, count: int = 5) -> pd.DataFrame:
    """The pairs of classes that are mixed up most: true class, what it is called, share in percent."""
    off: NDArray[Any] = matrix.to_numpy().copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(off, axis=None)[::-1][:count]
    true, called = np.unravel_index(order, off.shape)
    return pd.DataFrame({"true": matrix.index[true], "called": matrix.columns[called], "share": off[true, called]})
