"""Figures of images: grids, instances, maps over an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from samantics.plots.style import COLOURS, ink, label

LETTER = 0.062  # inches of a name's letter, about


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
    pixels: NDArray[np.uint8] = picture.permute(1, 2, 0).numpy()
    return pixels


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
