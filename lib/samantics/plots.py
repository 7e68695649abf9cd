"""How results look and where they go: one palette and style, and every picture beside its numbers and its origin."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from samantics.cache import atomic_path, write_json
from samantics.run import Run, provenance

PIXELS_WIDE = 1400
HEAVY = 400_000  # bytes; a larger picture (of many photographs) is kept in 256 colours
NUMBERS = "%.6g"  # of a table's floats: more digits than any result has, few enough that reruns give equal bytes

# Okabe and Ito's colour-blind safe hues, SAM's family warm and the semantic models cool; a model keeps its colour.
COLOURS = {
    "sam": "#D55E00",
    "sam2": "#E69F00",
    "clip": "#0072B2",
    "dinov2": "#009E73",
    "random": "#B3B3B3",
    "chance": "#5A5A5A",
    "simclr": "#5D4A9C",
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
    "mae": "MAE",
    "hiera": "Hiera",
    "sam3": "SAM 3",
    "dinov3": "DINOv3",
    "siglip2": "SigLIP 2",
    "base": "base",
    "novel": "novel",
}


def style() -> None:
    """Set matplotlib's defaults for the whole study: readable when a figure is shown 800 pixels wide."""
    mpl.rcParams.update(
        {
            "figure.figsize": (8.0, 4.5),
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "font.size": 11,
            "axes.titlesize": 12,
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
    """Write the message of a figure of several panels above them."""
    figure.suptitle(text, fontweight="bold", fontsize=12, x=0.01, ha="left")


def save_figure(run: Run, fig: Figure, table: pd.DataFrame, name: str, caption: str) -> Path:
    """Write a picture (``.png``, 1400 pixels wide), the very numbers it shows (``.csv``) and their origin (``.json``).

    Args:
        name: file name without ending, beginning with the notebook's number: ``01_probe_accuracy``.
        caption: one or two sentences that say what is shown, also to somebody who cannot see the picture.

    Returns:
        Path of the picture.

    Raises:
        StudyError: the folder cannot be written or the disk is full.
    """
    path = run.figures / f"{name}.png"
    with atomic_path(path) as temporary:
        fig.savefig(temporary, dpi=PIXELS_WIDE / fig.get_figwidth(), metadata={"Software": None})
        if temporary.stat().st_size > HEAVY:
            with Image.open(temporary) as drawn:
                few = few_colours(drawn)
            few.save(temporary, optimize=True)
    save_table(run, table, name, caption)
    return path


def few_colours(picture: Image.Image) -> Image.Image:
    """A picture in 256 colours: a third of its size as a file."""
    return picture.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG)


def save_table(run: Run, table: pd.DataFrame, name: str, caption: str = "") -> Path:
    """Write a table (``.csv``, without the index) and its origin (``.json``).

    Raises:
        StudyError: the folder cannot be written or the disk is full.
    """
    path = run.figures / f"{name}.csv"
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format=NUMBERS)
    write_json(path.with_suffix(".json"), {"name": name, "caption": caption} | provenance(run))
    return path
