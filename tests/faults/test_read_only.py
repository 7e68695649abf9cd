"""Folders that cannot be written: one line that names the file; what lies there is read all the same."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import works
from disks import read_only

import study
from notebooks import write_notebook
from samantics import cli
from samantics.errors import StudyError
from samantics.models import weights
from samantics.models.weights import WeightFile, weight_file
from samantics.plots import save_figure
from samantics.probing.features import encode_images
from samantics.run import Run
from stub_encoder import MEAN


def test_a_figure_is_refused_and_the_old_one_stays(pocket_run: Run) -> None:
    def draw(number: int) -> None:
        fig, axes = plt.subplots(figsize=(8, 1))
        axes.plot([number, 1, 2])
        try:
            save_figure(pocket_run, fig, pd.DataFrame({"x": [number]}), "99_line", "A line.")
        finally:
            plt.close(fig)

    draw(1)
    before = {path: path.read_bytes() for path in pocket_run.figures.iterdir()}
    path = re.escape(str(pocket_run.figures / "99_line.png"))
    with read_only(pocket_run.figures), pytest.raises(StudyError, match=f"^cannot write {path}: make its folder"):
        draw(2)
    assert {path: path.read_bytes() for path in pocket_run.figures.iterdir()} == before


def test_the_study_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(tmp_path / "notebooks", "00_prints", "print(1)")
    monkeypatch.setattr(study, "NOTEBOOKS", tmp_path / "notebooks")
    for variable in ("FIGURES", "CACHE"):
        monkeypatch.setenv("SAMANTICS_FIGURES", str(tmp_path / "figures"))
        monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv(f"SAMANTICS_{variable}", str(tmp_path / "shut"))
        with read_only(tmp_path / "shut"):
            assert cli.main(["run"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and str(tmp_path / "shut") in line


def test_features_are_read_and_new_ones_refused(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    written = works.encode(folder).read(MEAN)
    with read_only(folder):
        assert (works.encode(folder).read(MEAN) == written).all()
        known = works.stub(6)
        with pytest.raises(StudyError, match=r"^cannot write .*key\.json: make its folder writable"):
            encode_images(known.encoder, known.images, [MEAN], "other data", folder=folder)


def test_weights_are_refused_before_the_network_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "download", lambda *_: pytest.fail("asked the network"))
    for folder in (tmp_path / "cache" / "weights", tmp_path / "cache"):
        with (
            read_only(folder),
            pytest.raises(StudyError, match=rf"^cannot write {re.escape(str(tmp_path / 'cache' / 'weights'))}"),
        ):
            weight_file(WeightFile("sam.pth", "http://127.0.0.1:9/", "", 1, "none"))
