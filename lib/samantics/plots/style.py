"""One palette and one style for all figures."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

# Okabe and Ito's colour-blind safe hues, SAM's family warm and the semantic models cool; a model keeps its colour.
NAMED = {
    "sam": ("SAM", "#D55E00"), "sam2": ("SAM 2", "#E69F00"), "clip": ("CLIP", "#0072B2"),
    "dinov2": ("DINOv2", "#009E73"), "random": ("random", "#B3B3B3"), "chance": ("chance", "#5A5A5A"),
    "supervised": ("supervised", "#222222"), "sam_scratch": ("SAM from scratch", "#A65628"),
    "mae": ("MAE", "#CC79A7"), "hiera": ("Hiera", "#8C5A2B"), "sam3": ("SAM 3", "#8B1A1A"),
    "dinov3": ("DINOv3", "#0B5A43"), "simclr": ("SimCLR", "#5D4A9C"), "siglip2": ("SigLIP 2", "#56B4E9"),
    "base": ("base", "#3B4A63"), "novel": ("novel", "#CC79A7"),
    "supported": ("supported", "#009E73"), "not supported": ("not supported", "#D55E00"),
    "undecided": ("undecided", "#5A5A5A"), "not testable": ("not testable", "#A9A9A9"),
}  # fmt: skip
LABELS = {name: label for name, (label, _) in NAMED.items()}
COLOURS = {name: colour for name, (_, colour) in NAMED.items()}
CYCLE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#222222", "#8C5A2B")  # for all other hues


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
    free = iter(CYCLE * 8)
    return {name: COLOURS.get(str(name)) or next(free) for name in dict.fromkeys(names)}


def ink(colour: str) -> str:
    """Black or white, whichever is read better on a colour (relative luminance, ITU-R BT.709)."""
    return "black" if np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) > 0.4 else "white"
