"""Files cut at any byte, as a disk or a copy that fails leaves them: the right result, or an error that names them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import works
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from samantics import cache
from samantics.data import coco
from samantics.errors import StudyError
from samantics.models import pocket, weights
from samantics.models.encoder import load_encoder
from samantics.training_free.proposals import get_proposals, proposals_folder
from stub_encoder import MEAN

Kept = dict[str, tuple[Path, Callable[[], Any]]]  # a file that a run keeps, and what is read from it, for ==
KINDS = (
    "shard", "note", "key", "proposals", "annotations", "checkpoint", "kept.json", "kept.npz", "kept.safetensors",
    "card", "zoo weights", "safetensors", "pickled weights",
)  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("kept")
    store = works.encode(folder / "features")
    dataset, encoder = works.scenes(folder / "scenes", 3), load_encoder("sam", "zoo_random")
    proposed = proposals_folder(encoder, dataset, works.POINTS, folder / "proposals")
    get_proposals(encoder, dataset, works.POINTS, folder / "proposals")
    checkpoint = cache.Checkpoint(folder / "model.ckpt", {"seed": 0})
    checkpoint.save({"step": 9, "model": torch.nn.Linear(5, 5).state_dict()})
    for ending in ("safetensors", "json"):
        shutil.copy(pocket.ASSETS / f"clip.{ending}", folder)
    save_file({"weight": torch.arange(50.0)}, folder / "dinov2.safetensors")
    torch.save({"weight": torch.arange(50.0)}, folder / "sam.pth")
    shard = sorted(store.folder.glob("shard_*.npy"))[3]

    def features() -> Any:
        return works.encode(folder / "features").read(MEAN).tolist()

    def found() -> Any:
        proposals = get_proposals(encoder, dataset, works.POINTS, folder / "proposals")
        return [(p.size, p.rles, p.boxes.tolist(), p.predicted_iou.tolist()) for p in proposals.values()]

    files: Kept = {
        "shard": (shard, features),
        "note": (shard.with_suffix(".json"), features),
        "key": (store.folder / "key.json", features),
        "proposals": (sorted(proposed.iterdir())[1], found),
        "annotations": (dataset.path, lambda: coco.load_coco(dataset.path, dataset.folder)),
        "checkpoint": (checkpoint.path, lambda: str(checkpoint.load())),
        "card": (folder / "clip.json", lambda: pocket.card("clip", folder)),
        "zoo weights": (folder / "clip.safetensors", lambda: pocket.verify("clip", folder)),
    }
    for name, file in (("safetensors", "dinov2.safetensors"), ("pickled weights", "sam.pth")):
        files[name] = folder / file, lambda file=file: str(weights.read_weights(folder / file, ""))
    values = {"kept.json": [1, 2], "kept.npz": {"a": np.arange(9)}, "kept.safetensors": {"a": torch.arange(9.0)}}
    for name, value in values.items():
        files[name] = folder / name, lambda name=name, value=value: str(cache.kept(folder / name, lambda: value))
        files[name][1]()
    return files


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_at_any_byte_gives_the_right_result_or_is_named(kind: str, kept: Kept) -> None:
    path, read = kept[kind]
    whole, expected = path.read_bytes(), read()

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
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
