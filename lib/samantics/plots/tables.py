"""Figures of tables: bars, dots, curves, shares, matrices, maps of points.

A primitive takes a table that was computed before, the names of its columns, and gives a figure. None computes a
result: intervals are columns of the table. `figure.axes` lets a cell add a line of its own. In all of them `hue` is the
column that decides colours (models keep theirs), `panel` the column of the panels (None: one), `low` and `high` are the
columns of an interval's ends, in the units of the value, and `size` is that of a panel, inches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from samantics.plots.style import COLOURS, colours, ink, label


def _panels(
    table: pd.DataFrame, panel: str | None, size: tuple[float, float], share: bool = True
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with one panel for each value of a column, side by side, and the rows that each shows."""
    parts = [("", table)] if panel is None else list(table.groupby(panel, sort=False))
    sizes: Any = {"figsize": (size[0] * len(parts), size[1]), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(parts), sharey=share, squeeze=False, **sizes)
    for axis, (name, _) in zip(axes[0], parts, strict=True):
        axis.set_title(label(name))
    return figure, [(axis, rows) for axis, (_, rows) in zip(axes[0], parts, strict=True)]


def _span(rows: pd.DataFrame, value: str, low: str | None, high: str | None) -> NDArray[np.float64] | None:
    """`(2, n)` distances from a value to the ends of its interval; None without an interval."""
    if low is None or high is None:
        return None
    ends = rows[[low, high]].to_numpy(float).T
    return np.abs(ends - rows[value].to_numpy(float))


def _legend(axis: Axes, palette: Mapping[Any, str]) -> None:
    """A legend of coloured squares outside the panel, at its right."""
    handles = [Rectangle((0, 0), 1, 1, color=colour, label=label(name)) for name, colour in palette.items()]
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)


def _groups(
    rows: pd.DataFrame, key: str, names: Sequence[Any], hue: str | None, hues: Sequence[Any], width: float
) -> Iterator[tuple[pd.DataFrame, NDArray[np.float64]]]:
    """The rows of each hue (all, without one), and where they stand along the axis of names, side by side."""
    for place, name in enumerate(hues if hue else [None]):
        chosen = rows if name is None else rows[rows[hue] == name]
        middles = np.array([names.index(value) for value in chosen[key]], float)
        yield chosen, middles + (place - (len(hues) - 1) / 2 if hue else 0) * width


def bars(
    table: pd.DataFrame, x: str, y: str, *, hue: str | None = None, panel: str | None = None, low: str | None = None,
    high: str | None = None, ylabel: str = "", floor: str | None = None, size: tuple[float, float] = (4.2, 4.0),
) -> Figure:  # fmt: skip
    """Bars with their intervals and their values written above.

    Args:
        x, y: columns of the bars' names and heights; with `hue`, bars of one name stand side by side.
        ylabel: what is measured, with its unit.
        floor: column of a level to compare with (chance, a shuffled label), a dotted line over each bar.
    """
    figure, parts = _panels(table, panel, size)
    palette = colours(table[hue or x])
    width = 0.8 / (len(palette) if hue else 1)
    for axis, rows in parts:
        names = list(dict.fromkeys(rows[x]))
        sns.barplot(
            rows, x=x, y=y, hue=hue or x, order=names, hue_order=list(palette) if hue else names, palette=palette,
            ax=axis, errorbar=None, width=0.8, legend=False, saturation=1,
        )  # fmt: skip
        for chosen, at in _groups(rows, x, names, hue, list(palette), width):
            span = _span(chosen, y, low, high)
            axis.errorbar(at, chosen[y], span, fmt="none", ecolor="black", elinewidth=1.3, capsize=3, zorder=4)
            tops = chosen[y].to_numpy(float) + (0 if span is None else np.nan_to_num(span[1]))
            for spot, top, value in zip(at, tops.clip(min=0), chosen[y], strict=True):
                number = axis.annotate(
                    f"{value:.1f}", (spot, top), (0, 3), textcoords="offset points", ha="center", size=8.5
                )
                number.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # read over a line
            if floor is not None:
                axis.hlines(chosen[floor], at - width / 2, at + width / 2, colors="black", linestyles=":", zorder=5)
        axis.set(xlabel="", ylabel="")
        _name_ticks(axis, [label(name) for name in names], size[0] / len(names))
        axis.grid(axis="x", visible=False)
        axis.margins(y=0.12)
    parts[0][0].set_ylabel(ylabel or y)
    if hue:
        _legend(parts[-1][0], palette)
    return figure


def _name_ticks(axis: Axes, words: Sequence[str], room: float) -> None:
    """Names under the bars, aslant where one is longer than `room` (inches)."""
    axis.set_xticks(range(len(words)), words)
    longest = 0.1 * max(len(line) for word in words for line in word.split("\n"))  # inches, about
    if longest > 0.85 * room:
        plt.setp(axis.get_xticklabels(), rotation=30, ha="right")


def dots(
    table: pd.DataFrame, x: str, y: str, *, hue: str | None = None, panel: str | None = None, low: str | None = None,
    high: str | None = None, xlabel: str = "", size: tuple[float, float] | None = None,
) -> Figure:  # fmt: skip
    """Horizontal dots with their intervals, for comparisons of many things.

    Args:
        x, y: columns of the values and of the rows' names, drawn from top to bottom in the table's order.
        xlabel: what is measured, with its unit.
    """
    names = list(dict.fromkeys(table[y]))
    figure, parts = _panels(table, panel, size or (5.5, 0.3 * len(names) + 1.2))
    palette = colours(table[hue]) if hue else {name: COLOURS.get(str(name), "black") for name in names}
    for axis, rows in parts:
        apart = 0.6 * bool(rows[y].duplicated().any())  # only where dots share a row
        for chosen, at in _groups(rows, y, names, hue, list(palette), apart / max(1, len(palette))):
            for spot, (_, line) in zip(at, chosen.iterrows(), strict=True):
                span, colour = _span(line.to_frame().T, x, low, high), palette[line[hue or y]]
                axis.errorbar(line[x], spot, xerr=span, fmt="o", color=colour, ms=4.5, lw=1.3, capsize=0)
        axis.set_yticks(range(len(names)), [label(name) for name in names])
        axis.set(xlabel=xlabel or x, ylim=(len(names) - 0.4, -0.6))
    if hue:
        _legend(parts[-1][0], palette)
    return figure


def lines(
    table: pd.DataFrame, x: str, y: str, *, hue: str, panel: str | None = None, low: str | None = None,
    high: str | None = None, xlabel: str = "", ylabel: str = "", logx: bool = False,
    size: tuple[float, float] = (5.2, 4.0),
) -> Figure:  # fmt: skip
    """Curves, one for each value of `hue`, with their intervals as bands and their names at their ends.

    Args:
        x, y: columns of numbers.
        xlabel, ylabel: what is measured, with units.
        logx: a logarithmic axis whose ticks are the values of `x` themselves.
    """
    figure, parts = _panels(table, panel, size, share=False)
    palette = colours(table[hue])
    for axis, rows in parts:
        ends = []
        for name, curve in rows.groupby(hue, sort=False):
            axis.plot(curve[x], curve[y], "o-", color=palette[name], markersize=4)
            if low is not None and high is not None:
                span = [curve[low].astype(float), curve[high].astype(float)]
                axis.fill_between(curve[x], *span, color=palette[name], alpha=0.18, lw=0)
            ends.append((float(curve[y].iloc[-1]), float(curve[x].iloc[-1]), name))
        axis.set(xlabel=xlabel or x)
        if logx:
            axis.set_xscale("log", base=2)
            ticks = sorted(set(rows[x]))
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        end_labels(axis, ends, palette)
    parts[0][0].set_ylabel(ylabel or y)
    return figure


def end_labels(axis: Axes, ends: Sequence[tuple[float, float, Any]], palette: Mapping[Any, str]) -> None:
    """Names at the ends of curves `(y, x, name)`, moved apart where they would cover each other."""
    bottom, top = axis.get_ylim()
    lowest = -np.inf
    for value, _, name in sorted(ends, key=lambda end: end[0]):
        lowest = max(value, lowest + 0.06 * (top - bottom))
        axis.annotate(
            label(name), (1.0, lowest), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            color=palette[name], va="center", fontweight="bold", fontsize=10, annotation_clip=False,
        )  # fmt: skip


def stacked(
    table: pd.DataFrame, y: str, x: str, *, hue: str, palette: Mapping[Any, str] | None = None, xlabel: str = "",
    size: tuple[float, float] | None = None,
) -> Figure:  # fmt: skip
    """Horizontal bars of shares: one for each name of `y`, in it a part for each value of `hue`, as long as `x`.

    Parts of at least a tenth of the longest bar carry their number.
    """
    wide = table.pivot_table(index=y, columns=hue, values=x, sort=False, aggfunc="sum").fillna(0)
    shades = palette or colours(wide.columns)
    figure, axis = plt.subplots(figsize=size or (8, 0.5 * len(wide) + 1.6), layout="constrained")
    left, longest = np.zeros(len(wide)), float(wide.sum(axis=1).max())
    for name in wide.columns:
        values = wide[name].to_numpy(float)
        drawn = axis.barh(range(len(wide)), values, left=left, color=shades[name], label=label(name), height=0.7)
        texts = [f"{value:.0f}" if value >= 0.1 * longest else "" for value in values]
        axis.bar_label(drawn, texts, label_type="center", fontsize=9, color=ink(shades[name]))
        left += values
    axis.set_yticks(range(len(wide)), [label(name) for name in wide.index])
    axis.invert_yaxis()
    axis.set_xlabel(xlabel or x)
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(5, len(wide.columns)), fontsize=9)
    return figure


def heatmaps(
    matrices: Mapping[str, pd.DataFrame], *, xlabel: str = "", ylabel: str = "", unit: str = "", numbers: bool = False,
    size: tuple[float, float] = (3.4, 4.4),
) -> Figure:  # fmt: skip
    """Matrices side by side on one colour scale, as seaborn draws them; row names at the first, one colour bar.

    Args:
        matrices: by panel title; all with the same rows; NaN stays blank.
        unit: written at the colour bar.
        numbers: write every value into its cell.
    """
    figure, axes = plt.subplots(
        1, len(matrices), figsize=(size[0] * len(matrices) + 0.8, size[1]), squeeze=False, layout="constrained"
    )
    low = min(0.0, *(float(np.nanmin(matrix)) for matrix in matrices.values()))
    high = max(float(np.nanmax(matrix)) for matrix in matrices.values())
    for place, (axis, (name, matrix)) in enumerate(zip(axes[0], matrices.items(), strict=True)):
        sns.heatmap(
            matrix, ax=axis, vmin=low, vmax=high, cmap="viridis", cbar=False, annot=numbers, fmt=".1f",
            yticklabels=place == 0, xticklabels=True,
        )  # fmt: skip
        axis.set(xlabel=xlabel, ylabel=ylabel if place == 0 else "")
        axis.set_title(label(name), color=COLOURS.get(name, "black"))
        axis.tick_params(labelsize=8, length=0)
        axis.grid(visible=False)
    figure.colorbar(axes[0][-1].collections[0], ax=list(axes[0]), label=unit, fraction=0.04, pad=0.02)
    return figure


def scatter(table: pd.DataFrame, x: str, y: str, *, hue: str, panel: str, palette: Mapping[Any, str]) -> Figure:
    """Points of maps (t-SNE) in the colours of one column; a panel for each value of another. No units, no numbers."""
    figure, parts = _panels(table, panel, (4.4, 4.4), share=False)
    for axis, rows in parts:
        sns.scatterplot(rows, x=x, y=y, hue=hue, palette=dict(palette), ax=axis, s=22, linewidth=0.2, legend=False)
        axis.set(xticks=[], yticks=[], xlabel="", ylabel="")
        axis.grid(visible=False)
    return figure
