"""A clock that jumps by a day, to and fro: no result depends on the time of day or on the age of files."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import works
from processes import tell, told

import study
from notebooks import write_notebook
from samantics.cache import atomic_path, remove_leftovers

DAY = 24 * 3600.0
BREAKS = (3, 6, 8)  # units after which a work is interrupted


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


@pytest.mark.parametrize("name", ["features", "proposals", "zoo training", "in-context training"])
def test_a_work_goes_on_from_files_of_any_age(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, inputs, log = works.WORKS[name], tmp_path / "inputs", tmp_path / "log"
    work.prepare(inputs)

    def breaks(place: Path) -> None:
        tell(place)
        if told(place) in BREAKS:
            raise KeyboardInterrupt

    monkeypatch.setattr(works, "tell", breaks)
    for _ in ages(tmp_path):
        try:
            work.run(inputs, tmp_path / "results", log)
        except KeyboardInterrupt:
            continue
    monkeypatch.setattr(works, "tell", tell)
    work.run(inputs, tmp_path / "results", log)
    done = told(log)
    work.run(inputs, tmp_path / "whole", tmp_path / "once")
    assert done <= told(tmp_path / "once") + len(BREAKS) * work.lost
    works.assert_same(work.read(tmp_path / "results"), work.read(tmp_path / "whole"))


def test_the_study_counts_figures_and_seconds(own_notebooks: Path) -> None:
    figures = own_notebooks.parent / "figures" / "pocket"
    draws = f"from pathlib import Path\nPath({str(figures)!r}, '00_new.png').write_bytes(b'picture')"
    write_notebook(own_notebooks, "00_draws", draws)
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
