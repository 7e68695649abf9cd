import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from samantics import plots

TABLE = pd.DataFrame(
    {
        "encoder": ["sam", "clip"] * 4,
        "level": ["view"] * 4 + ["artist"] * 4,
        "part": ["base", "base", "novel", "novel"] * 2,
        "depth": [0.0, 0.0, 1.0, 1.0] * 2,
        "top1": [1.0, 20.0, 3.0, 40.0, 5.0, 60.0, 7.0, 80.0],
    }
).assign(low=lambda t: t["top1"] - 0.5, high=lambda t: t["top1"] + 2, chance=4.0)

ENDS = {"low": "low", "high": "high"}

# Machado, Oliveira and Fernandes 2009: how people without one kind of cone see linear RGB
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
)
PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)


@pytest.mark.parametrize("vision", [np.eye(3), DEUTERANOPIA, PROTANOPIA], ids=["full", "deuteranopia", "protanopia"])
def test_the_main_models_can_be_told_apart(vision: np.ndarray) -> None:
    names = ("sam", "sam2", "clip", "dinov2", "random")
    seen = {name: _lab(vision @ _linear(to_rgb(plots.COLOURS[name]))) for name in names}
    for first, second in itertools.combinations(names, 2):
        assert np.linalg.norm(seen[first] - seen[second]) > 15, (first, second)


def test_bars_stand_where_the_table_says_and_whiskers_end_at_the_interval() -> None:
    figure = plots.bars(TABLE, "encoder", "top1", hue="part", panel="level", ylabel="%", floor="chance", **ENDS)
    for axis, (_, rows) in zip(figure.axes, TABLE.groupby("level", sort=False), strict=True):
        heights = sorted(bar.get_height() for bar in axis.patches if bar.get_width() > 0 and bar.get_height() > 0)
        np.testing.assert_allclose(heights, sorted(rows["top1"]))
        ends = np.sort(
            [y for c in axis.containers if hasattr(c, "lines") for s in c.lines[2][0].get_segments() for _, y in s]
        )
        np.testing.assert_allclose(ends, np.sort([*rows["low"], *rows["high"]]))
        assert {text.get_text() for text in axis.texts} == {f"{value:.1f}" for value in rows["top1"]}
    plt.close(figure)


def test_lines_pass_through_the_table_in_the_models_colours() -> None:
    figure = plots.lines(TABLE, "depth", "top1", hue="encoder", panel="level", xlabel="depth", ylabel="%", **ENDS)
    for axis, (_, rows) in zip(figure.axes, TABLE.groupby("level", sort=False), strict=True):
        drawn = {line.get_color(): line.get_ydata() for line in axis.lines}
        for name, curve in rows.groupby("encoder"):
            np.testing.assert_allclose(drawn[plots.COLOURS[name]], curve["top1"])
    plt.close(figure)


def test_a_grid_shows_rows_of_different_length_and_instances_with_their_words() -> None:
    image = np.full((8, 8, 3), 200, np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[2:5, 3:6] = True
    figure = plots.image_grid({"sam": [image, image], "clip": [image]}, {"sam": ["a", "b"]})
    assert [axis.get_title(loc="center") for axis in figure.axes] == ["a", "b", "", ""]
    plots.show_instances(figure.axes[0], image, masks=[mask], boxes=[(3, 2, 6, 5)], names=["owl"])
    shown = figure.axes[0].images[-1].get_array()
    assert (np.any(shown != image, axis=2) == mask).all(), "the tint covers the mask and nothing else"
    assert figure.axes[0].texts[-1].get_text() == "owl"
    plt.close(figure)


def _linear(rgb: tuple[float, float, float]) -> np.ndarray:
    values = np.array(rgb)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear.clip(0, 1)
    f = np.cbrt((xyz / [0.9505, 1.0, 1.089]).clip(1e-4))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
