"""One palette and one style for all figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

# Okabe and Ito's colour-blind safe hues, SAM's family warm and the semantic models cool; a model keeps its colour.
COLOURS = {
    "sam": "#D55E00",
    "sam2": "#E69F00",
    "clip": "#0072B2",
    "dinov2": "#009E73",
    "random": "#B3B3B3",
    "chance": "#5A5A5A",
    "simclr": "#5D4A9C",
    "supervised": "#222222",
    "mae": "#CC79A7",
    "hiera": "#8C5A2B",
    "sam3": "#8B1A1A",
    "dinov3": "#0B5A43",
    "siglip2": "#56B4E9",
    "base": "#3B4A63",
    "novel": "#CC79A7",
}
LABELS = {
    "sam": "SAM",
    "sam2": "SAM 2",
    "clip": "CLIP",
    "dinov2": "DINOv2",
    "random": "random",
    "chance": "chance",
    "simclr": "SimCLR",
    "supervised": "supervised",
    "mae": "MAE",
    "hiera": "Hiera",
    "sam3": "SAM 3",
    "dinov3": "DINOv3",
    "siglip2": "SigLIP 2",
    "base": "base",
    "novel": "novel",
}
CYCLE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#222222", "#8C5A2B")  # for all other hues


def style() -> None:
    """Set matplotlib's defaults for the whole study: readable when a figure is shown 800 pixels wide."""
    mpl.rcParams.update(
        {
            "figure.figsize": (8.0, 4.5),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.color": "#E6E6E6",
            "image.interpolation": "nearest",
            "legend.frameon": False,
            "lines.linewidth": 2.0,
            "errorbar.capsize": 3.0,
            "svg.hashsalt": "samantics",
            "text.parse_math": False,  # a class of the user's may have a dollar in its name
        }
    )


def headline(figure: Figure, text: str) -> None:
    """Write the message of a figure above its panels."""
    figure.suptitle(text, fontweight="bold", fontsize=12, x=0.01, ha="left")


def label(name: Any) -> str:
    """How a model or a part is written in a figure; other names as they are."""
    return LABELS.get(str(name), str(name))


def colours(names: Iterable[Any]) -> dict[Any, str]:
    """A colour for every name: a model's own, the others in the order of `CYCLE`."""
    free = iter(CYCLE * 8)
    return {name: COLOURS.get(str(name)) or next(free) for name in dict.fromkeys(names)}


def ink(colour: str) -> str:
    """Black or white, whichever is read better on a colour (relative luminance, ITU-R BT.709)."""
    return "black" if np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) > 0.4 else "white"
