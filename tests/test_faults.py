"""What is kept comes back; after a kill, a full disk or a cut file the next run goes on, or one line names the file."""

import dataclasses
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from boxes import box_dataset, box_object
from refusals import refused
from samantics.cache import Checkpoint, atomic_path, hash_file, kept, remove_leftovers
from samantics.data import coco
from samantics.data.coco_files import load_coco, write_coco
from samantics.errors import StudyError
from samantics.models import pocket, weights
from samantics.models.encoder import load_encoder
from samantics.models.weights import WeightFile, read_weights, weight_file
from samantics.probing.features import FeatureStore
from samantics.run import start_run
from samantics.training_free.proposals import ProposalSettings, get_proposals
from stub_encoder import MEAN, store_of

POINTS = ProposalSettings(2, predicted_iou=0.0, stability=0.0)


def encode(folder: Path) -> FeatureStore:
    """Features of 40 images, known beforehand, in shards of 8."""
    return store_of(np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32), folder, shard_rows=8)


def scenes(folder: Path) -> coco.CocoDataset:
    """Three pictures of noise with an object each."""
    if not folder.exists():
        folder.mkdir(parents=True)
        data = box_dataset(range(3), 1, [box_object(n + 1, n, 1, (5, 5, 25, 25)) for n in range(3)])
        for record in data.images.values():
            Image.effect_noise((record.width, record.height), 90).save(folder / record.file)
        write_coco(folder / "x.json", [*data.images.values()], data.categories, data.instances)
    return load_coco(folder / "x.json", folder)


def propose(folder: Path) -> Any:
    """Mask proposals of the scenes beside the folder."""
    return get_proposals(load_encoder("sam", "zoo_random"), scenes(folder.with_name("scenes")), POINTS, folder)


def draw(folder: Path) -> None:
    """Two figures with their tables."""
    run = dataclasses.replace(start_run("pocket", "99_test"), figures=folder)
    for number in range(2):
        figure = plt.figure(figsize=(8, 1 + number))
        run.save(figure, pd.DataFrame({"x": np.arange(5) * number / 3}), f"99_{number}", "Lines.")
        plt.close(figure)


def in_a_fork(work: Callable[[], Any]) -> int:
    """Do the work in a process of its own; the signal that ended it, or its exit code."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    end = os.waitpid(child, 0)[1]
    return os.WTERMSIG(end) if os.WIFSIGNALED(end) else os.waitstatus_to_exitcode(end)


def killed_before_naming(work: Callable[[], Any], number: int) -> int:
    """Kill the work when it has written that many files and is about to give the last one its name."""
    rename, files = os.replace, iter([True] * (number - 1))

    def patched() -> None:
        os.replace = lambda *names: rename(*names) if next(files, False) else os.kill(os.getpid(), signal.SIGKILL)
        work()

    return in_a_fork(patched)


def contents(folder: Path) -> dict[str, bytes]:
    """What lies below a folder, without locks and without origins, which hold the time of day."""
    paths = [path for path in folder.rglob("[!.]*.*") if path.suffix != ".lock" and not path.match("99_*.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("work", [encode, propose, draw])
def test_a_killed_work_ends_like_an_undisturbed_one(work: Callable[[Path], Any], number: int, places: Path) -> None:
    """`kill -9` at the worst moment, between writing a file and naming it."""
    work(places / "whole")
    whole, folder = contents(places / "whole"), places / "killed"
    assert killed_before_naming(lambda: work(folder), number) == signal.SIGKILL
    left = {
        path: path.stat().st_ino for path in folder.rglob("*.*") if re.fullmatch(r"shard_.*npz|\d\.json", path.name)
    }
    assert contents(folder).items() <= whole.items(), "what has its name is whole"
    work(folder)
    assert contents(folder) == whole
    assert {path: path.stat().st_ino for path in left} == left, "finished shards and proposals are not written again"
    assert not list(folder.rglob(".*")), "what was half-written is cleared away when it is written again"


WAYS: dict[str, Callable[[Path], object]] = {
    "a.npy": lambda path: np.save(path, np.zeros(10_000)),
    "a.pt": lambda path: torch.save({"a": torch.zeros(10_000)}, path),
    "a.csv": lambda path: pd.DataFrame(np.zeros(10_000)).to_csv(path),
    "a.json": lambda path: path.write_text("x" * 40_000),
    "a.png": lambda path: plt.imsave(path, np.random.default_rng(0).random((100, 100, 3))),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_full_disk_is_told_in_one_line_whoever_writes(name: str, tmp_path: Path) -> None:
    """A limit on the size of files stands in: NumPy, torch and others then raise what does not say why."""
    path = tmp_path / name
    path.write_bytes(b"as it was")

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        says = f"^no space left while writing {path}: free some space and run again$"
        with pytest.raises(StudyError, match=says), atomic_path(path) as temporary:
            WAYS[name](temporary)

    assert in_a_fork(write) == 0
    assert path.read_bytes() == b"as it was" and list(tmp_path.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_named_before_the_network_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(weights, "download", lambda *_: pytest.fail("asked the network"))
    wanted = WeightFile("sam.pth", "http://127.0.0.1:9/", "", 1, "none")
    refused("cannot write .*: make it writable or set SAMANTICS_CACHE", weight_file, wanted)


def test_a_file_that_cannot_be_read_is_named_before_it_is_hashed(tmp_path: Path) -> None:
    """A folder stands in for a file without permission, which root may read."""
    refused(f"{tmp_path} cannot be read .*: make it readable", hash_file, tmp_path)


def test_files_being_written_are_known_by_their_lock_and_not_by_their_age(tmp_path: Path) -> None:
    left, path = tmp_path / ".a.npy.x7a8b9c0.npy", tmp_path / "a.npy"
    mine = [tmp_path / ".a.npy", tmp_path / ".hidden.json", tmp_path / "b.npy.x7a8b9c0.npy"]
    for file in (left, *mine):
        file.write_bytes(b"mine")
    with atomic_path(path) as temporary:
        assert not left.exists(), "what a killed process wrote of the same file"
        np.save(temporary, np.arange(3))
        os.utime(temporary, (0, 0))
        left.write_bytes(b"of a killed process")
        remove_leftovers(tmp_path)
        with atomic_path(path) as other:
            np.save(other, np.arange(2))
        assert temporary.exists() and not left.exists()
    assert len(np.load(path)) == 3 and {*tmp_path.iterdir()} == {path, *mine}


# ------------------------------------------------------------------------------------------------------- cut files


def features(folder: Path) -> Any:
    return np.asarray(encode(folder / "features").column(MEAN)).tolist()


def proposals(folder: Path) -> Any:
    return [(p.rles, p.boxes.tolist()) for p in propose(folder / "proposals").values()]


KEPT: dict[str, tuple[str, Callable[[Path], Any]]] = {  # a file that a run keeps, and what is read of it, for ==
    "shard": ("features/**/shard_*3.npz", features),
    "key": ("features/**/key.json", features),
    "proposals": ("proposals/*/1.json", proposals),
    "annotations": ("scenes/x.json", lambda folder: scenes(folder / "scenes")),
    "checkpoint": ("model.ckpt", lambda folder: str(Checkpoint(folder / "model.ckpt", {"seed": 0}).load())),
    "kept.json": ("kept.json", lambda folder: kept(folder / "kept.json", lambda: [1, 2])),
    "kept.npz": ("kept.npz", lambda folder: str(kept(folder / "kept.npz", lambda: {"a": np.arange(9)}))),
    "card": ("clip.json", lambda folder: pocket.card("clip", folder)),
    "zoo weights": ("clip.safetensors", lambda folder: str(pocket.load("clip", folder))),
    "safetensors": ("dinov2.safetensors", lambda folder: str(read_weights(folder / "dinov2.safetensors", ""))),
    "pickled weights": ("sam.pth", lambda folder: str(read_weights(folder / "sam.pth", ""))),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of those files that reading does not make."""
    folder = tmp_path_factory.mktemp("stored")
    model = torch.nn.Linear(5, 5).state_dict()
    Checkpoint(folder / "model.ckpt", {"seed": 0}).save({"step": 9, "model": model})
    for ending in ("safetensors", "json"):
        shutil.copy(pocket.ASSETS / f"clip.{ending}", folder)
    save_file({"weight": torch.arange(50.0)}, folder / "dinov2.safetensors")
    torch.save({"weight": torch.arange(50.0)}, folder / "sam.pth")
    return folder


@pytest.mark.parametrize("kind", KEPT)
def test_a_file_cut_at_any_byte_gives_the_right_result_or_is_named(kind: str, stored: Path) -> None:
    place, read = KEPT[kind]
    expected = read(stored)
    (path,) = stored.glob(place)
    whole = path.read_bytes()

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, len(whole) - 1))
    def cut(at: int) -> None:
        path.write_bytes(whole[:at])
        found, message = None, ""
        try:
            found = read(stored)
        except StudyError as error:
            message = str(error)
        assert found == expected or (str(path) in message and "\n" not in message)

    try:
        cut()
    finally:
        path.write_bytes(whole)
    assert read(stored) == expected


# ------------------------------------------------------------------------------------------- what is kept

VALUES: dict[str, Any] = {
    ".csv": pd.DataFrame({"name": ["", "None", "a,b"], "ap": [1 / 3, np.nan, 2.0], "count": [1, 2, 3]}),
    ".json": [{"a": 1, "b": None}],
    ".npz": {"x": np.arange(3) / 7, "y": np.array([True, False, True])},
}


@pytest.mark.parametrize("ending", VALUES)
def test_what_is_kept_comes_back_and_is_made_once(tmp_path: Path, ending: str) -> None:
    path, made = tmp_path / f"deep/value{ending}", []
    first = kept(path, lambda: made.append(1) or VALUES[ending])
    again = kept(path, lambda: made.append(1) or VALUES[ending])
    assert len(made) == 1
    for found in (first, again):
        pd.testing.assert_frame_equal(pd.DataFrame(found), pd.DataFrame(VALUES[ending]), check_exact=True)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no lock and nothing half-written stays"


def _ask(path: Path) -> Any:
    return kept(path, lambda: time.sleep(0.3) or [os.getpid()])


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2) as pool:
        first, second = pool.map(_ask, [tmp_path / "value.json"] * 2)
    assert first == second
