"""Files cut at any byte, as a disk or a copy that fails leaves them: the right result, or an error that names them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import works
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from samantics.cache import Checkpoint
from samantics.data import coco
from samantics.errors import StudyError
from samantics.models import pocket, weights
from samantics.models.encoder import load_encoder
from samantics.training_free.proposals import compute_proposals, get_proposals
from samantics.zoo import training
from stub_encoder import MEAN


@dataclasses.dataclass(frozen=True)
class Kept:
    """A file that a run keeps, and what is read from it (in a form that ``==`` compares)."""

    path: Path
    read: Callable[[], Any]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    folder = tmp_path_factory.mktemp("kept")
    features = works.encode(folder / "features")
    dataset = works.scenes(folder / "scenes", 3)
    encoder = load_encoder("sam", "zoo_random")
    proposed = compute_proposals(encoder, dataset, works.POINTS, folder / "proposals")

    def read_features() -> Any:
        return works.encode(folder / "features").read(MEAN).tolist()

    def read_proposals() -> Any:
        found = get_proposals(encoder, dataset, works.POINTS, folder / "proposals")
        return [(p.size, p.rles, p.boxes.tolist(), p.predicted_iou.tolist(), p.points.tolist()) for p in found.values()]

    def read_training() -> Any:
        module = torch.nn.Linear(5, 5)
        state = training._State(folder / "clip.ckpt", "recipe")
        state.restore(module, torch.optim.AdamW(module.parameters()))
        return state.step, module.weight.tolist()

    module = torch.nn.Linear(5, 5)
    state = training._State(folder / "clip.ckpt", "recipe")
    state.step = 7
    state.save(module, torch.optim.AdamW(module.parameters()))
    checkpoint = Checkpoint(folder / "model.pt", {"seed": 0})
    checkpoint.save({"step": 9, "model": module.state_dict()})
    for ending in ("safetensors", "json"):
        shutil.copy(pocket.ASSETS / f"clip.{ending}", folder)
    save_file({"weight": torch.arange(50.0)}, folder / "dinov2.safetensors")
    torch.save({"weight": torch.arange(50.0)}, folder / "sam.pth")
    shard = sorted(features.folder.glob("shard_*.npy"))[3]
    return {
        "shard": Kept(shard, read_features),
        "note": Kept(shard.with_suffix(".json"), read_features),
        "key": Kept(features.folder / "key.json", read_features),
        "proposals": Kept(sorted(proposed.iterdir())[1], read_proposals),
        "annotations": Kept(dataset.path, lambda: coco.load_coco(dataset.path, dataset.folder)),
        "zoo checkpoint": Kept(folder / "clip.ckpt", read_training),
        "in-context checkpoint": Kept(
            checkpoint.path, lambda: str(checkpoint.load(torch.device("cpu"))),
        ),
        "card": Kept(folder / "clip.json", lambda: pocket.card("clip", folder)),
        "zoo weights": Kept(folder / "clip.safetensors", lambda: pocket.verify("clip", folder)),
        "safetensors": Kept(
            folder / "dinov2.safetensors", lambda: str(weights.read_weights(folder / "dinov2.safetensors", ""))
        ),
        "pickled weights": Kept(folder / "sam.pth", lambda: str(weights.read_weights(folder / "sam.pth", ""))),
    }  # fmt: skip


KINDS = (
    "shard", "note", "key", "proposals", "annotations", "zoo checkpoint", "in-context checkpoint", "card",
    "zoo weights", "safetensors", "pickled weights",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_at_any_byte_gives_the_right_result_or_is_named(kind: str, kept: dict[str, Kept]) -> None:
    file = kept[kind]
    whole, expected = file.path.read_bytes(), file.read()

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, len(whole) - 1))
    def cut(at: int) -> None:
        file.path.write_bytes(whole[:at])
        found, message = None, ""
        try:
            found = file.read()
        except StudyError as error:
            message = str(error)
        assert found == expected or (str(file.path) in message and "\n" not in message)

    try:
        cut()
    finally:
        file.path.write_bytes(whole)
    assert file.read() == expected
