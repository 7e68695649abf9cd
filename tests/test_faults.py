"""A run that is killed, a full disk, a file that is cut: the next run goes on, or one line names the file."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
from collections.abc import Callable
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

from samantics.cache import Checkpoint, atomic_path, kept, remove_leftovers, write_json
from samantics.data import coco
from samantics.errors import StudyError
from samantics.models import pocket, weights
from samantics.models.encoder import load_encoder
from samantics.models.weights import WeightFile, weight_file
from samantics.probing.features import FeatureStore, encode_images
from samantics.run import start_run
from samantics.training_free.proposals import ProposalSettings, get_proposals, proposals_folder
from stub_encoder import MEAN, LookUp

POINTS = ProposalSettings(2, predicted_iou=0.0, stability=0.0)


def encode(folder: Path) -> FeatureStore:
    """Features of 40 images, known beforehand, in shards of 8."""
    known = LookUp(np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))
    return encode_images(known.encoder, known.images, [MEAN], "data", folder=folder, shard_rows=8, workers=1)


def scenes(folder: Path) -> coco.CocoDataset:
    """Three pictures of noise with an object each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        Image.effect_noise((40, 30), 90).save(folder / f"{number}.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(3)]
    shape = {"segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]], "bbox": [5, 5, 20, 20], "area": 400}
    objects = [{"id": n + 1, "image_id": n, "category_id": 1, **shape} for n in range(3)]
    whole = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]}
    write_json(folder / "x.json", whole)
    return coco.load_coco(folder / "x.json", folder)


def propose(folder: Path) -> Any:
    """Mask proposals of the scenes beside the folder."""
    path = folder.with_name("scenes") / "x.json"
    dataset = coco.load_coco(path, path.parent) if path.is_file() else scenes(path.parent)
    return get_proposals(load_encoder("sam", "zoo_random"), dataset, POINTS, folder)


def draw(folder: Path) -> None:
    """Two figures with their tables."""
    run = dataclasses.replace(start_run("pocket", "99_test"), figures=folder)
    for number in range(2):
        figure, axes = plt.subplots(figsize=(8, 1))
        axes.plot(np.arange(5) * number)
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
    rename, files = os.replace, iter(range(1, 1000))

    def replace(source: Any, target: Any) -> None:
        if next(files) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    def patched() -> None:
        os.replace = replace
        work()

    return in_a_fork(patched)


def contents(folder: Path) -> dict[str, Any]:
    """What lies below a folder, without locks and without origins, which hold the time of day."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("[!.]*.*")):
        name = str(path.relative_to(folder))
        found[name] = {n: a.tolist() for n, a in np.load(path).items()} if path.suffix == ".npz" else path.read_bytes()
    others = [name for name in found if name.endswith(".lock") or (name.startswith("99_") and name.endswith(".json"))]
    return {name: value for name, value in found.items() if name not in others}


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("work", [encode, propose, draw])
def test_a_killed_work_ends_like_an_undisturbed_one(work: Callable[[Path], Any], number: int, places: Path) -> None:
    """`kill -9` at the worst moment, between writing a file and naming it."""
    work(places / "whole")
    whole, folder = contents(places / "whole"), places / "killed"
    assert killed_before_naming(lambda: work(folder), number) == signal.SIGKILL
    left = {path: path.stat().st_ino for path in folder.rglob("shard_*.npz")}
    there = contents(folder)
    assert there.items() <= whole.items(), "what has its name is whole"
    work(folder)
    assert contents(folder) == whole
    assert {path: path.stat().st_ino for path in left} == left, "finished shards are not written again"
    remove_leftovers(folder, "**/.*")  # with which the study's next run begins
    assert not list(folder.rglob(".*"))


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
    with pytest.raises(StudyError, match=r"cannot write .*: make it writable or set SAMANTICS_CACHE"):
        weight_file(WeightFile("sam.pth", "http://127.0.0.1:9/", "", 1, "none"))


def test_files_being_written_are_known_by_their_lock_and_not_by_their_age(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.npy") as temporary:
        np.save(temporary, np.arange(3))
        os.utime(temporary, (0, 0))
        remove_leftovers(tmp_path)
        assert temporary.exists()
    left = tmp_path / temporary.name
    mine = [tmp_path / ".a.npy", tmp_path / ".hidden.json", tmp_path / "b.npy.x7a8b9c0.npy"]
    for path in (left, *mine):
        path.write_bytes(b"mine")
    remove_leftovers(tmp_path)
    assert not left.exists() and all(path.exists() for path in mine)


# ------------------------------------------------------------------------------------------------------- cut files

KINDS = (
    "shard", "key", "proposals", "annotations", "checkpoint", "kept.json", "kept.npz",
    "card", "zoo weights", "safetensors", "pickled weights",
)  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """A file that a run keeps, and what is read from it, for ==."""
    folder = tmp_path_factory.mktemp("stored")
    store, dataset = encode(folder / "features"), scenes(folder / "scenes")
    propose(folder / "proposals")
    proposed = proposals_folder(load_encoder("sam", "zoo_random"), dataset, POINTS, folder / "proposals")
    checkpoint = Checkpoint(folder / "model.ckpt", {"seed": 0})
    checkpoint.save({"step": 9, "model": torch.nn.Linear(5, 5).state_dict()})
    for ending in ("safetensors", "json"):
        shutil.copy(pocket.ASSETS / f"clip.{ending}", folder)
    save_file({"weight": torch.arange(50.0)}, folder / "dinov2.safetensors")
    torch.save({"weight": torch.arange(50.0)}, folder / "sam.pth")
    shard = sorted(store.folder.glob("shard_*.npz"))[3]

    def features() -> Any:
        return np.asarray(encode(folder / "features").column(MEAN)).tolist()

    files: dict[str, tuple[Path, Callable[[], Any]]] = {
        "shard": (shard, features),
        "key": (store.folder / "key.json", features),
        "proposals": (
            sorted(proposed.iterdir())[1],
            lambda: [(p.rles, p.boxes.tolist()) for p in propose(folder / "proposals").values()],
        ),
        "annotations": (dataset.path, lambda: coco.load_coco(dataset.path, dataset.folder)),
        "checkpoint": (checkpoint.path, lambda: str(checkpoint.load())),
        "card": (folder / "clip.json", lambda: pocket.card("clip", folder)),
        "zoo weights": (folder / "clip.safetensors", lambda: pocket.verify("clip", folder)),
    }
    for name, file in (("safetensors", "dinov2.safetensors"), ("pickled weights", "sam.pth")):
        files[name] = folder / file, lambda file=file: str(weights.read_weights(folder / file, ""))
    values = {"kept.json": [1, 2], "kept.npz": {"a": np.arange(9)}}
    for name, value in values.items():
        files[name] = folder / name, lambda name=name, value=value: str(kept(folder / name, lambda: value))
    return files


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_at_any_byte_gives_the_right_result_or_is_named(kind: str, stored: Any) -> None:
    path, read = stored[kind]
    expected, whole = read(), path.read_bytes()

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, len(whole) - 1))
    def cut(at: int) -> None:
        path.write_bytes(whole[:at])
        found, message = None, ""
        try:
            found = read()
        except StudyError as error:
            message = str(error)
        assert found == expected or (str(path) in message and "\n" not in message)

    try:
        cut()
    finally:
        path.write_bytes(whole)
    assert read() == expected
