"""A clock that jumps by a day, to and fro: no result depends on the time of day or on the age of files."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import works
from processes import told

import study
from notebooks import write_notebook
from samantics.cache import atomic_path, remove_leftovers
from samantics.models.encoder import load_encoder
from samantics.training_free.proposals import compute_proposals, proposals_folder
from samantics.zoo import training
from stub_encoder import MEAN

DAY = 24 * 3600.0


@pytest.fixture(autouse=True)
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day is a day ahead, then a day behind, then right, and so on."""
    right, jumps = time.time, itertools.cycle((DAY, -DAY, 0.0))
    monkeypatch.setattr(time, "time", lambda: right() + next(jumps))


def ages(folder: Path) -> Iterator[None]:
    """Turn by turn, every file in a folder is of tomorrow, of yesterday, and of 1970."""
    for when in (time.time() + 2 * DAY, time.time() - 2 * DAY, 0.0):
        for path in folder.rglob("*"):
            os.utime(path, (when, when))
        yield


def test_features_and_proposals_stay_valid(tmp_path: Path) -> None:
    log = tmp_path / "log"
    written = works.encode(tmp_path / "features", log).read(MEAN)
    dataset = works.scenes(tmp_path / "scenes", 2)
    encoder = load_encoder("sam", "zoo_random")
    compute_proposals(encoder, dataset, works.POINTS, tmp_path / "proposals")
    folder = proposals_folder(encoder, dataset, works.POINTS, tmp_path / "proposals")
    inodes = {path: path.stat().st_ino for path in folder.iterdir()}
    for _ in ages(tmp_path):
        assert (works.encode(tmp_path / "features", log).read(MEAN) == written).all()
        assert compute_proposals(encoder, dataset, works.POINTS, tmp_path / "proposals") == folder
    assert told(log) == works.ROWS
    assert {path: path.stat().st_ino for path in folder.iterdir()} == inodes


def test_training_goes_on_from_a_checkpoint_of_any_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = training._State(tmp_path / "clip.ckpt", "recipe")
    module = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(module.parameters())
    state.step = 7
    state.save(module, optimiser)
    for _ in ages(tmp_path):
        again = training._State(state.path, "recipe")
        again.restore(module, optimiser)
        assert again.step == 7


def test_the_study_counts_figures_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = tmp_path / "figures" / "pocket"
    draws = f"from pathlib import Path\nPath({str(figures)!r}, '00_new.png').write_bytes(b'picture')"
    write_notebook(tmp_path / "notebooks", "00_draws", draws)
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAMANTICS_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setattr(study, "NOTEBOOKS", tmp_path / "notebooks")
    figures.mkdir(parents=True)
    (figures / "00_old.png").write_bytes(b"picture")
    os.utime(figures / "00_old.png", (time.time() + 2 * DAY,) * 2)
    for _ in range(2):  # begun while the clock is a day ahead, and again while it is not
        (outcome,) = study.run_study("pocket")
        assert outcome.figures == 1 and not outcome.error
        assert 0 < outcome.seconds < 60


def test_files_being_written_are_known_by_their_lock_and_not_by_their_age(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.npy") as temporary:
        np.save(temporary, np.arange(3))
        for _ in ages(tmp_path):
            remove_leftovers(tmp_path)
            assert temporary.exists()
    left = tmp_path / temporary.name
    left.write_bytes(b"half")
    mine = [tmp_path / ".a.npy", tmp_path / ".hidden.json", tmp_path / "b.npy.x7a8b9c0.npy"]
    for path in mine:
        path.write_bytes(b"mine")
    remove_leftovers(tmp_path)
    assert not left.exists() and all(path.exists() for path in mine) and (np.load(tmp_path / "a.npy") == range(3)).all()
