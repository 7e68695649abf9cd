"""A full or read-only disk: one line that names the file, nothing half-written; with space the work goes on."""

from __future__ import annotations

import hashlib
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import works
from disks import enlarge, read_only, small_disk
from processes import finish, hidden, told
from servers import serve

from notebooks import write_notebook
from samantics import cli
from samantics.cache import atomic_path
from samantics.errors import StudyError
from samantics.models import weights
from samantics.models.weights import WeightFile, download, weight_file


def refused(says: str, path: Path | str) -> Any:
    """What must be raised: one line with the file's name."""
    return pytest.raises(
        StudyError, match=rf"^{says} [^\n]*{re.escape(str(path))}[^\n]*: (free some space|make )[^\n]*$"
    )


@pytest.mark.parametrize("name", works.WORKS)
def test_a_work_on_a_full_disk_goes_on_when_there_is_space(name: str, tmp_path: Path) -> None:
    work, inputs, log = works.WORKS[name], tmp_path / "inputs", tmp_path / "log"
    work.prepare(inputs)
    work.run(inputs, tmp_path / "whole", tmp_path / "once")
    with small_disk(tmp_path / "disk", work.disk) as disk:
        with refused("no space left while writing", disk):
            work.run(inputs, disk, log)
        assert not hidden(disk) and any(path.is_file() for path in disk.rglob("*"))
        pieces = {path: path.stat().st_ino for path in disk.rglob(work.pieces or "none")}
        enlarge(disk, 10 * work.disk)
        work.run(inputs, disk, log)
        works.assert_same(work.read(disk), work.read(tmp_path / "whole"))
        assert {path: path.stat().st_ino for path in pieces} == pieces
    assert told(log) <= told(tmp_path / "once") + work.lost


@pytest.mark.parametrize("name", works.WORKS)
def test_a_read_only_folder_is_read_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    work, inputs, log = works.WORKS[name], tmp_path / "inputs", tmp_path / "log"
    work.prepare(inputs)
    with read_only(tmp_path / "empty"), refused("cannot write", tmp_path / "empty"):
        work.run(inputs, tmp_path / "empty", log)
    work.run(inputs, tmp_path / "whole", log)
    before, once = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*")}, told(log)
    with read_only(tmp_path / "whole"):
        if name in ("features", "proposals"):
            work.run(inputs, tmp_path / "whole", log)
            assert told(log) == once
        elif name != "in-context training":  # a finished one is read
            with refused("cannot write", tmp_path / "whole"):
                work.run(inputs, tmp_path / "whole", log)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").rglob("*")} == before


@pytest.mark.parametrize("fault", ["full figures", "read-only figures", "read-only cache"])
def test_the_study_ends_with_one_line(
    fault: str, own_notebooks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(own_notebooks, "00_prints", "print('word\\n' * 100_000)")
    folder, (kind, place) = own_notebooks.parent / "shut", fault.split()
    monkeypatch.setenv(f"SAMANTICS_{place.upper()}", str(folder))
    with small_disk(folder, 200) if kind == "full" else read_only(folder):
        assert cli.main(["run"]) == 1
        assert not [path for path in folder.rglob("*") if path.is_file()]
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and str(folder) in line


def test_a_download_goes_on_with_the_missing_part(tmp_path: Path) -> None:
    content = hashlib.shake_256(b"weights").digest(900_000)
    with small_disk(tmp_path / "disk", 500) as disk, serve(content) as server:
        known = WeightFile("file.bin", server.url, hashlib.sha256(content).hexdigest(), 1, "none")
        with refused("no space left while writing", disk / "file.bin.part"):
            download(known, disk / "file.bin")
        assert server.starts == [0]  # a full disk is no fault of the network: not tried again
        part = (disk / "file.bin.part").stat().st_size
        enlarge(disk, 2000)
        download(known, disk / "file.bin")
        assert server.starts == [0, part] and part >= 400_000
        assert (disk / "file.bin").read_bytes() == content


def test_weights_are_refused_before_the_network_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "download", lambda *_: pytest.fail("asked the network"))
    for folder in (tmp_path / "cache" / "weights", tmp_path / "cache"):
        with read_only(folder), refused("cannot write", tmp_path / "cache" / "weights"):
            weight_file(WeightFile("sam.pth", "http://127.0.0.1:9/", "", 1, "none"))


WAYS: dict[str, Callable[[Path], object]] = {
    "a.npy": lambda path: np.save(path, np.zeros(10_000)),
    "a.pt": lambda path: torch.save({"a": torch.zeros(10_000)}, path),
    "a.csv": lambda path: pd.DataFrame(np.zeros(10_000)).to_csv(path),
    "a.json": lambda path: path.write_text("x" * 40_000),
    "a.png": lambda path: plt.imsave(path, np.random.default_rng(0).random((100, 100, 3))),
}


def write_over_the_limit(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    for name, write in WAYS.items():
        with refused("no space left while writing", folder / name), atomic_path(folder / name) as temporary:
            write(temporary)


def test_a_limit_on_the_size_of_files_is_told_whoever_writes(tmp_path: Path) -> None:
    """As a quota is: also where NumPy, torch and others raise something of their own that does not say why."""
    (tmp_path / "folder").mkdir()
    finish(write_over_the_limit, tmp_path / "folder", log=tmp_path / "log")
    assert not list((tmp_path / "folder").iterdir())
