"""A full disk: one line that says so, nothing half-written, and with more space the work goes on where it was."""

from __future__ import annotations

import dataclasses
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
from disks import enlarge, small_disk
from processes import finish, hidden, told
from safetensors.torch import load_file
from servers import serve

import study
from notebooks import write_notebook
from samantics import cli
from samantics.cache import Checkpoint, atomic_path
from samantics.errors import StudyError
from samantics.models import pocket
from samantics.models.weights import WeightFile, download
from samantics.plots import save_figure
from samantics.run import Run
from samantics.zoo import training
from stub_encoder import MEAN


def full(path: Path | str) -> Any:
    """What must be raised: a full disk, told with the file's name."""
    return pytest.raises(StudyError, match=rf"^no space left while writing .*{re.escape(str(path))}: free some space")


def fill(folder: Path) -> Path:
    """Take all space that is left."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return filler
    raise AssertionError


def test_feature_extraction_goes_on_with_the_next_shard(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with small_disk(tmp_path / "disk", 300) as disk:
        with full(".npy"):
            works.encode(disk, log, width=4000)
        done = {path: path.stat().st_ino for path in disk.rglob("shard_*.json")}
        assert 2 < len(done) < works.ROWS / works.SHARD_ROWS and not hidden(disk)
        enlarge(disk, 3000)
        assert (works.encode(disk, log, width=4000).read(MEAN) == works.encode(tmp_path, width=4000).read(MEAN)).all()
        assert {path: path.stat().st_ino for path in done} == done
        assert told(log) == works.ROWS + works.SHARD_ROWS


def test_figures_stay_as_they_were(tmp_path: Path, pocket_run: Run) -> None:
    def draw(height: float) -> None:
        fig, axes = plt.subplots(figsize=(8, height))
        axes.imshow(np.random.default_rng(0).random((40, 80)), aspect="auto")
        save_figure(run, fig, pd.DataFrame({"height": [height]}), "99_noise", "Noise.")
        plt.close(fig)

    with small_disk(tmp_path / "disk", 2000) as disk:
        run = dataclasses.replace(pocket_run, figures=disk)
        draw(1.0)
        before = {path: path.read_bytes() for path in disk.iterdir()}
        filler = fill(disk)
        with full(disk / "99_noise.png"):
            draw(2.0)
        assert {path: path.read_bytes() for path in disk.iterdir() if path != filler} == before
        filler.unlink()
        draw(2.0)
        assert pd.read_csv(disk / "99_noise.csv")["height"].tolist() == [2.0] and not hidden(disk)


def test_zoo_training_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = works.pictures()
    data = training.DeviceData(seen, torch.device("cpu"))
    probing = training.ProbeData(seen.images, seen.drawings[:, 0].astype(np.int64), np.arange(12) >= 10)
    monkeypatch.setattr(training, "probe_scores", lambda *_: {"probe_top1": 0.0, "knn_top1": 0.0})  # tested elsewhere
    recipe = dataclasses.replace(works.RECIPE, images=8, checkpoint_every=2)
    undisturbed = training.train("clip", recipe, tmp_path, data, data, probing)
    with small_disk(tmp_path / "disk", 120_000) as disk:
        filler = fill(disk)
        with full(disk / "clip.ckpt"):
            training.train("clip", recipe, disk, data, data, probing)
        filler.unlink()
        save = training._State.save

        def save_and_fill(*arguments: Any) -> None:
            save(*arguments)
            if arguments[0].step == recipe.steps:
                fill(disk)

        with monkeypatch.context() as patch:  # no space for the trained model beside its last checkpoint
            patch.setattr(training._State, "save", save_and_fill)
            with full(disk / "clip.safetensors"):
                training.train("clip", recipe, disk, data, data, probing)
        filler.unlink()
        assert sorted(path.name for path in disk.iterdir()) == ["clip.ckpt"]
        with monkeypatch.context() as patch:
            patch.setattr(training, "_step", None)  # no step is taken again
            training.train("clip", recipe, disk, data, data, probing)
        assert pocket.verify("clip", disk) == pocket.verify("clip", tmp_path)
        weights = load_file(disk / "clip.safetensors")
        assert all(torch.equal(weights[key], value.half()) for key, value in undisturbed.shipped().state_dict().items())


def test_the_checkpoint_in_context_stays_as_it_was(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 300) as disk:
        checkpoint = Checkpoint(disk / "model.pt", {"seed": 0})
        checkpoint.save({"step": 1})
        with full(disk / "model.pt"):
            checkpoint.save({"step": 2, "model": torch.zeros(100_000)})
        state = checkpoint.load(torch.device("cpu"))
        assert state is not None and state["step"] == 1
        assert [path.name for path in disk.iterdir()] == ["model.pt"]


def test_a_download_goes_on_with_the_missing_part(tmp_path: Path) -> None:
    content = hashlib.shake_256(b"weights").digest(900_000)
    with small_disk(tmp_path / "disk", 500) as disk, serve(content) as server:
        known = WeightFile("file.bin", server.url, hashlib.sha256(content).hexdigest(), 1, "none")
        with full(disk / "file.bin.part"):
            download(known, disk / "file.bin")
        assert server.starts == [0]  # a full disk is no fault of the network: not tried again
        part = (disk / "file.bin.part").stat().st_size
        enlarge(disk, 2000)
        download(known, disk / "file.bin")
        assert server.starts == [0, part] and part >= 400_000
        assert (disk / "file.bin").read_bytes() == content


def test_the_study_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(tmp_path / "notebooks", "00_prints", "print('word\\n' * 100_000)")
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "NOTEBOOKS", tmp_path / "notebooks")
    with small_disk(tmp_path / "figures", 200) as disk:
        monkeypatch.setenv("SAMANTICS_FIGURES", str(disk))
        assert cli.main(["run"]) == 1
        path = disk / "pocket" / "notebooks" / "00_prints.ipynb"
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: no space left while writing {path}")
        assert not [path for path in disk.rglob("*") if path.is_file()]


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
        with full(folder / name), atomic_path(folder / name) as temporary:
            write(temporary)


def test_a_limit_on_the_size_of_files_is_told_whoever_writes(tmp_path: Path) -> None:
    """As a quota is: also where NumPy, torch and others raise something of their own that does not say why."""
    (tmp_path / "folder").mkdir()
    finish(write_over_the_limit, tmp_path / "folder", log=tmp_path / "log")
    assert not list((tmp_path / "folder").iterdir())
