from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from samantics import plots as figures
from samantics.data import first_world as mojiworld
from samantics.errors import StudyError
from samantics.plots import save_figure
from samantics.run import Run, available_cores, git_revision
from samantics.zoo import start as start_figures

TABLE = pd.DataFrame({"encoder": ["sam", "clip"], "top1": [11.06, 73.92], "third": [1 / 3, np.float32(0.1)]})

# Machado, Oliveira and Fernandes 2009: how people without one kind of cone see linear RGB
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
)
PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)


def test_figure_leaves_picture_numbers_and_origin(pocket_run: Run) -> None:
    figures.style()
    fig, axes = plt.subplots()
    axes.bar(TABLE["encoder"], TABLE["top1"])
    pocket_run.record("weights", {"sam": "abc"})
    path = save_figure(pocket_run, fig, TABLE, "99_bars", "Bars of accuracy.")
    plt.close(fig)
    assert path == pocket_run.figures / "99_bars.png"
    with Image.open(path) as picture:
        assert picture.width == figures.PIXELS_WIDE
    pd.testing.assert_frame_equal(pd.read_csv(path.with_suffix(".csv")), TABLE, rtol=1e-5)
    origin = json.loads(path.with_suffix(".json").read_text())
    assert origin["caption"] == "Bars of accuracy." and origin["recorded"] == {"weights": {"sam": "abc"}}
    assert (origin["scale"], origin["seed"], origin["notebook"]) == ("pocket", 3, "99_test")
    assert origin["packages"]["segment-anything"] == "1.0" and origin["machine"]["cores"] == 1


def test_rerun_gives_equal_bytes(pocket_run: Run) -> None:
    def written() -> tuple[bytes, bytes]:
        fig, axes = plt.subplots()
        axes.plot(TABLE["top1"])
        path = save_figure(pocket_run, fig, TABLE, "99_line", "A line.")
        plt.close(fig)
        return path.read_bytes(), path.with_suffix(".csv").read_bytes()

    assert written() == written()


def test_recording_two_values_under_one_name_is_refused(pocket_run: Run) -> None:
    pocket_run.record("data", "abc")
    pocket_run.record("data", "abc")
    with pytest.raises(StudyError, match="recorded 'data' as 'abc' and now as 'def'"):
        pocket_run.record("data", "def")


def test_cores_follow_the_thread_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert available_cores() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "not a number")
    assert available_cores() >= 1


def test_git_revision_tells_changed_sources(tmp_path: Path) -> None:
    assert git_revision(tmp_path) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=Test", "-c", "user.email=test@example.org"]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "module.py").write_text("one = 1\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    clean = git_revision(tmp_path)
    assert len(clean) == 40
    (tmp_path / "lib" / "module.py").write_text("one = 2\n")
    assert git_revision(tmp_path) == f"{clean}+changes"


@pytest.mark.parametrize("vision", [np.eye(3), DEUTERANOPIA, PROTANOPIA], ids=["full", "deuteranopia", "protanopia"])
def test_the_main_models_can_be_told_apart(vision: np.ndarray) -> None:
    names = ("sam", "sam2", "clip", "dinov2", "random")
    seen = {name: _lab(vision @ _linear(to_rgb(figures.COLOURS[name]))) for name in names}
    for first, second in itertools.combinations(names, 2):
        assert np.linalg.norm(seen[first] - seen[second]) > 15, (first, second)


def test_every_colour_has_a_label() -> None:
    assert figures.COLOURS.keys() == figures.LABELS.keys()


def _linear(rgb: tuple[float, float, float]) -> np.ndarray:
    values = np.array(rgb)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear.clip(0, 1)
    f = np.cbrt((xyz / [0.9505, 1.0, 1.089]).clip(1e-4))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_a_map_is_averaged_on_the_object_and_off_it_but_not_on_its_border() -> None:
    instances = np.zeros((8, 8), np.uint8)
    instances[:3, :4] = 1  # a token of 4 x 4 pixels, three quarters of it
    instances[3:, 7] = 1  # touches two more, a little
    picture = mojiworld.Picture(np.zeros((8, 8, 3), np.uint8), instances, (0,))
    maps = {"a": np.array([[0.9, 0.1], [0.3, 0.7]]), "b": np.array([[1.0, 0.0], [0.5, 0.0]])}
    assert start_figures.on_and_off(picture, maps) == {"a": (0.9, 0.3), "b": (1.0, 0.5)}


def test_variance_between_kinds_is_all_or_nothing_where_it_should_be() -> None:
    rng = np.random.default_rng(0)
    means = rng.random((2, 1, 1, 1, 3))
    own = rng.random((1, 3, 1, 1, 3))
    shape = (2, 3, 4, 4, 3)
    assert start_figures.between_kinds(np.broadcast_to(means, shape).reshape(6, 4, 4, 3), 2) == pytest.approx(100)
    assert start_figures.between_kinds(np.broadcast_to(own, shape).reshape(6, 4, 4, 3), 2) == pytest.approx(0)
