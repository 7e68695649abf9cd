"""How results look: one palette, one style, and the primitives that every figure of the notebooks is drawn with.

A primitive of tables takes a table that was computed before, the names of its columns, and gives a figure. None
computes a result: intervals are columns of the table. `figure.axes` lets a cell add a line of its own. In all of them
`hue` is the column that decides colours (models keep theirs), `panel` the column of the panels (None: one), `low` and
`high` are the columns of an interval's ends, in the units of the value, and `size` is that of a panel, inches.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from textwrap import fill
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

# Okabe and Ito's colour-blind safe hues, SAM's family warm and the semantic models cool; a model keeps its colour.
NAMED = {
    "sam": ("SAM", "#D55E00"), "sam2": ("SAM 2", "#E69F00"), "clip": ("CLIP", "#0072B2"),
    "dinov2": ("DINOv2", "#009E73"), "random": ("random", "#B3B3B3"), "chance": ("chance", "#5A5A5A"),
    "supervised": ("supervised", "#222222"), "sam_scratch": ("SAM from scratch", "#A65628"),
    "mae": ("MAE", "#CC79A7"), "hiera": ("Hiera", "#8C5A2B"), "sam3": ("SAM 3", "#8B1A1A"),
    "dinov3": ("DINOv3", "#0B5A43"), "siglip2": ("SigLIP 2", "#56B4E9"),
    "base": ("base", "#3B4A63"), "novel": ("novel", "#CC79A7"),
    "supported": ("supported", "#009E73"), "not supported": ("not supported", "#D55E00"),
    "undecided": ("undecided", "#5A5A5A"), "not testable": ("not testable", "#A9A9A9"),
}  # fmt: skip
LABELS = {name: label for name, (label, _) in NAMED.items()}
COLOURS = {name: colour for name, (_, colour) in NAMED.items()}
CYCLE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#222222", "#8C5A2B")  # for all other hues
LETTER = 0.062  # inches of a letter at an instance, about


def style() -> None:
    """Set matplotlib's defaults for the whole study: readable when a figure is shown 800 pixels wide."""
    mpl.rc("figure", figsize=(8.0, 4.5), facecolor="white")
    mpl.rc("figure.constrained_layout", use=True)
    mpl.rc("font", size=11)
    mpl.rc("axes", titlesize=11, titleweight="bold", titlelocation="left", axisbelow=True, grid=True)
    mpl.rc("axes.spines", top=False, right=False)
    mpl.rc("grid", color="#E6E6E6")
    mpl.rc("image", interpolation="nearest")
    mpl.rc("legend", frameon=False)
    mpl.rc("lines", linewidth=2.0)
    mpl.rc("errorbar", capsize=3.0)
    mpl.rc("text", parse_math=False)  # a class of the user's may have a dollar in its name


def headline(figure: Figure, text: str) -> None:
    """Write the message of a figure above its panels, on as many lines as its width asks for."""
    lines = fill(text, int(figure.get_figwidth() / 0.105))  # inches of a letter
    figure.suptitle(lines, fontweight="bold", fontsize=12, x=0.01, ha="left")


def label(name: Any) -> str:
    """How a model or a part is written in a figure; other names as they are."""
    return LABELS.get(str(name), str(name))


def colours(names: Iterable[Any]) -> dict[Any, str]:
    """A colour for every name: a model's own, the others in the order of `CYCLE`."""
    free = cycle(CYCLE)
    return {name: COLOURS.get(str(name)) or next(free) for name in dict.fromkeys(names)}


def ink(colour: str) -> str:
    """Black or white, whichever is read better on a colour (relative luminance, ITU-R BT.709)."""
    return "black" if np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) > 0.4 else "white"


# --------------------------------------------------------------------------------------------------------- images


def image_grid(
    rows: Mapping[str, Sequence[Any]], titles: Mapping[str, Sequence[str]] | None = None, *, size: float = 1.35,
    draw: Callable[[Axes, Any], None] | None = None,
) -> Figure:  # fmt: skip
    """A row of pictures for each name, with a word over each; `figure.axes` are in reading order.

    Args:
        rows: pictures by row name, of any number: `(H, W, 3)` arrays, PIL images, or whatever `draw` takes.
        titles: a word for each picture, by row name.
        size: of a picture, inches.
        draw: draws one entry on its axes; by default the entry is shown as an image.
    """
    columns = max(1, *(len(entries) for entries in rows.values()))
    figure, axes = plt.subplots(
        len(rows), columns, squeeze=False, layout="constrained",
        figsize=(size * columns + 0.5, (size + (0.3 if titles else 0.1)) * len(rows) + 0.3),
    )  # fmt: skip
    for line, (name, entries) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, entry in zip(line, entries, strict=False):
            draw(axis, entry) if draw else axis.imshow(np.asarray(entry))
        for axis, text in zip(line, (titles or {}).get(name, ()), strict=False):
            axis.set_title(text, fontsize=8, fontweight="normal", loc="center")
        line[0].text(
            -0.08, 0.5, label(name), transform=line[0].transAxes, rotation=90, va="center", ha="right",
            color=COLOURS.get(name, "black"), fontweight="bold",
        )  # fmt: skip
    return figure


def show_instances(
    axis: Axes, image: Any, *, masks: Sequence[NDArray[np.bool_]] = (), boxes: Sequence[Sequence[float]] = (),
    names: Sequence[str] = (), shades: Sequence[str] = ("#00E5FF",), dashed: bool = False, tint: float = 0.45,
) -> None:  # fmt: skip
    """An image with instances on it: masks tinted and outlined, boxes, and a word at each.

    Args:
        image: `(H, W, 3)` uint8 or a PIL image, RGB.
        masks: `(H, W)` bool each.
        boxes: `(x0, y0, x1, y1)` each, pixels.
        names: a word for each instance, at its box or else its mask.
        shades: colours, one for each instance; the last one goes on for the rest.
        dashed: dash boxes and outlines, as for the truth beside predictions.
        tint: opacity of the masks; 0 leaves the outline only.
    """
    shade = [shades[min(place, len(shades) - 1)] for place in range(max(len(masks), len(boxes)))]
    pixels = tinted(image, masks if tint > 0 else (), shade, tint)
    axis.imshow(pixels)
    axis.set_axis_off()
    pattern = "--" if dashed else "-"
    for mask, colour in zip(masks, shade, strict=False):
        places = (np.arange(-1, side + 1) for side in (mask.shape[1], mask.shape[0]))  # padded: closed at the frame
        axis.contour(*places, np.pad(mask, 1).astype(float), [0.5], colors=[colour], linewidths=1.3, linestyles=pattern)
    for (x0, y0, x1, y1), colour in zip(boxes, shade, strict=False):
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=colour, lw=1.6, ls=pattern))
    for place, name in enumerate(names):
        x, y = boxes[place][:2] if len(boxes) else np.argwhere(masks[place]).min(0, initial=10**6)[::-1]
        side = "bottom" if y > pixels.shape[0] / 12 else "top"  # a name above the frame would be cut off
        ends = x / pixels.shape[1] + LETTER * len(name) * axis.figure.dpi / axis.bbox.width  # share of the width
        x, end = (x, "left") if ends < 1 else (pixels.shape[1] - 0.5, "right")
        axis.text(
            x, y, name, fontsize=7.5, color=ink(shade[place]), va=side, ha=end, clip_on=True,
            bbox={"facecolor": shade[place], "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )  # fmt: skip
    axis.set(xlim=(-0.5, pixels.shape[1] - 0.5), ylim=(pixels.shape[0] - 0.5, -0.5))  # boxes may leave the image


def tinted(image: Any, masks: Sequence[NDArray[np.bool_]], shades: Sequence[str], opacity: float) -> NDArray[np.uint8]:
    """`(H, W, 3)`: an image under masks of one colour each, laid on one by one, the first on top."""
    from torchvision.utils import draw_segmentation_masks  # a second to import: not where no mask is drawn

    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for mask, shade in list(zip(masks, shades, strict=False))[::-1]:
        picture = draw_segmentation_masks(picture, torch.from_numpy(np.asarray(mask)), alpha=opacity, colors=shade)
    return picture.permute(1, 2, 0).numpy()


def heat(
    axis: Axes, image: Any, values: NDArray[Any], *, title: str = "", limits: tuple[float, float] | None = None
) -> None:
    """A map `(h, w)` of any resolution over an image, bright where it is high; without `limits` on its own scale."""
    pixels = np.asarray(image)
    extent = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
    low, high = limits or (None, None)
    axis.imshow(pixels)
    axis.imshow(values, cmap="inferno", alpha=0.7, extent=extent, interpolation="bilinear", vmin=low, vmax=high)
    axis.set_axis_off()
    axis.set_title(title, fontsize=9)


# --------------------------------------------------------------------------------------------------------- tables


def _panels(
    table: pd.DataFrame, panel: str | None, size: tuple[float, float], share: bool = True
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with one panel for each value of a column, side by side, and the rows that each shows."""
    parts = [("", table)] if panel is None else list(table.groupby(panel, sort=False))
    whole = (size[0] * len(parts), size[1])
    figure, axes = plt.subplots(1, len(parts), figsize=whole, sharey=share, squeeze=False, layout="constrained")
    for axis, (name, _) in zip(axes[0], parts, strict=True):
        axis.set_title(label(name))
    return figure, [(axis, rows) for axis, (_, rows) in zip(axes[0], parts, strict=True)]


def _groups(
    rows: pd.DataFrame, key: str, names: Sequence[Any], hue: str | None, hues: Sequence[Any], width: float
) -> Iterator[tuple[pd.DataFrame, NDArray[np.float64]]]:
    """The rows of each hue (all, without one), and where they stand along the axis of names, side by side."""
    for place, name in enumerate(hues if hue else [None]):
        chosen = rows if name is None else rows[rows[hue] == name]
        middles = np.array([names.index(value) for value in chosen[key]], float)
        yield chosen, middles + (place - (len(hues) - 1) / 2 if hue else 0) * width


def _span(rows: pd.DataFrame, value: str, low: str | None, high: str | None) -> NDArray[np.float64]:
    """`(2, n)` distances from a value to the ends of its interval; 0 without one."""
    return np.abs(rows[[low or value, high or value]].to_numpy(float).T - rows[value].to_numpy(float))


def _legend(axis: Axes, palette: Mapping[Any, str]) -> None:
    """A legend of coloured squares outside the panel, at its right."""
    handles = [Rectangle((0, 0), 1, 1, color=colour, label=label(name)) for name, colour in palette.items()]
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)


def bars(
    table: pd.DataFrame, x: str, y: str, *, low: str, high: str, ylabel: str, hue: str | None = None,
    panel: str | None = None, floor: str | None = None, size: tuple[float, float] = (4.2, 4.0),
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
            tops = (chosen[y].to_numpy(float) + np.nan_to_num(span[1])).clip(min=0)
            for place, value in zip(zip(at, tops, strict=True), chosen[y], strict=True):
                number = axis.annotate(f"{value:.1f}", place, (0, 3), textcoords="offset points", ha="center", size=8.5)
                number.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # read over a line
            if floor is not None:
                axis.hlines(chosen[floor], at - width / 2, at + width / 2, colors="black", linestyles=":", zorder=5)
        axis.set(xlabel="", ylabel="")
        _name_ticks(axis, [label(name) for name in names], size[0] / len(names))
        axis.grid(axis="x", visible=False)
        axis.margins(y=0.12)
    parts[0][0].set_ylabel(ylabel)
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
        apart = 0.6 * bool(rows[y].duplicated().any()) / max(1, len(palette))  # only where dots share a row
        for chosen, at in _groups(rows, y, names, hue, list(palette), apart):
            spans = _span(chosen, x, low, high).T[:, :, None]
            for value, name, spot, span in zip(chosen[x], chosen[hue or y], at, spans, strict=True):
                axis.errorbar(value, spot, xerr=span, fmt="o", color=palette[name], ms=4.5, lw=1.3, capsize=0)
        axis.set_yticks(range(len(names)), [label(name) for name in names])
        axis.set(xlabel=xlabel or x, ylim=(len(names) - 0.4, -0.6))
    if hue:
        _legend(parts[-1][0], palette)
    return figure


def lines(
    table: pd.DataFrame, x: str, y: str, *, hue: str, low: str, high: str, xlabel: str, ylabel: str,
    panel: str | None = None, logx: bool = False, size: tuple[float, float] = (5.2, 4.0),
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
        ends = {}
        for name, curve in rows.groupby(hue, sort=False):
            axis.plot(curve[x], curve[y], "o-", color=palette[name], markersize=4)
            span = [curve[low].astype(float), curve[high].astype(float)]
            axis.fill_between(curve[x], *span, color=palette[name], alpha=0.18, lw=0)
            ends[name] = float(curve[y].iloc[-1])
        axis.set(xlabel=xlabel)
        if logx:
            axis.set_xscale("log", base=2)
            ticks = sorted(set(rows[x]))
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        end_labels(axis, ends, palette)
    parts[0][0].set_ylabel(ylabel)
    return figure


def end_labels(axis: Axes, ends: Mapping[Any, float], palette: Mapping[Any, str]) -> None:
    """Names of curves beside their last values, moved apart where they would cover each other."""
    bottom, top = axis.get_ylim()
    lowest = -np.inf
    for name, value in sorted(ends.items(), key=lambda end: end[1]):
        lowest = max(value, lowest + 0.06 * (top - bottom))
        axis.annotate(
            label(name), (1.0, lowest), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            color=palette[name], va="center", fontweight="bold", fontsize=10, annotation_clip=False,
        )  # fmt: skip


def stacked(
    table: pd.DataFrame, y: str, x: str, *, hue: str, xlabel: str, palette: Mapping[Any, str] | None = None,
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
    axis.set_xlabel(xlabel)
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(5, len(wide.columns)), fontsize=9)
    return figure


def heatmaps(
    matrices: Mapping[str, pd.DataFrame], *, unit: str, xlabel: str = "", ylabel: str = "", numbers: bool = False,
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
