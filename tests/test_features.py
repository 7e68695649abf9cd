"""The feature store: right rows, resumed after a kill, never stale, safe with several runs at once."""

from __future__ import annotations

import dataclasses
import errno
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from samantics import cli
from samantics.errors import StudyError
from samantics.models.encoder import Encoder
from samantics.models.preprocessing import Preprocessing
from samantics.models.registry import Architecture, LayerOutput
from samantics.probing.features import FeatureStore, encode_images
from stub_encoder import MEAN, LookUp


@pytest.fixture
def stub() -> LookUp:
    return LookUp(np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32))


def encode(stub: LookUp, folder: Path, **options: Any) -> FeatureStore:
    options = {"readouts": [MEAN], "data_hash": "data", "shard_rows": 16, "batch_size": 5, **options}
    return encode_images(stub.encoder, options.pop("images", stub.images), folder=folder, **options)


def halves(stub: LookUp) -> NDArray[np.float32]:
    return stub.table.numpy().astype(np.float16).astype(np.float32)


def test_features_are_the_images_own_in_order(stub: LookUp, tmp_path: Path) -> None:
    made = encode(stub, tmp_path, readouts=[("early", "mean"), MEAN])
    assert np.allclose(np.asarray(made.column(MEAN)), halves(stub), rtol=1e-3)
    assert np.allclose(np.asarray(made.column(("early", "mean"))), 2 * halves(stub), rtol=1e-3)
    assert made.kept.tolist() == list(range(50)) and stub.calls == 50
    again = encode(stub, tmp_path, readouts=[MEAN, ("early", "mean")])  # in any order
    assert np.array_equal(np.asarray(again.column(MEAN)), np.asarray(made.column(MEAN))) and stub.calls == 50, (
        "a second call encodes nothing"
    )
    with pytest.raises(StudyError, match="encode them too"):
        np.asarray(made.column(("early", "cls")))


def test_some_rows_and_projected_ones_are_those_of_the_whole(stub: LookUp, tmp_path: Path) -> None:
    column, rows = encode(stub, tmp_path, images=Unreadable(stub.images), max_unreadable=0.06).column(MEAN), [11, 2, 40]
    assert np.allclose(column.take(np.array(rows)), np.delete(halves(stub), Unreadable.bad, axis=0)[rows], rtol=1e-3)
    matrix = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
    narrow = dataclasses.replace(column, projection=matrix)
    assert narrow.shape == (47, 2)
    np.testing.assert_allclose(narrow.take(np.array(rows)), column.take(np.array(rows)) @ matrix, rtol=1e-5)


def test_another_encoder_data_or_preprocessing_is_another_store(stub: LookUp, tmp_path: Path) -> None:
    first = encode(stub, tmp_path)
    folders = {first.folder, encode(stub, tmp_path, data_hash="other").folder}
    for change in (
        {"weights_hash": "1"},
        {"preprocess": dataclasses.replace(stub.encoder.preprocess, bicubic=True)},
        {"half": True},
    ):
        encoder = dataclasses.replace(stub.encoder, **change)
        folders.add(encode_images(encoder, stub.images, [MEAN], "data", folder=tmp_path, shard_rows=16).folder)
    assert len(folders) == 5


def test_damage_is_found_and_mended_by_deleting_the_shard(stub: LookUp, tmp_path: Path) -> None:
    made = encode(stub, tmp_path)
    shard = sorted(made.folder.glob("*.npz"))[1]
    whole = shard.read_bytes()
    for damaged in (whole[:-30], whole[:180] + bytes([whole[180] ^ 1]) + whole[181:], b""):
        shard.write_bytes(damaged)
        with pytest.raises(StudyError, match=rf"{shard.name} is damaged: delete it"):
            np.asarray(encode(stub, tmp_path).column(MEAN))
    shard.unlink()
    stub.calls = 0
    assert np.allclose(np.asarray(encode(stub, tmp_path).column(MEAN)), halves(stub), rtol=1e-3)
    assert stub.calls == 16


class Unreadable(list[Any]):
    bad: tuple[int, ...] = (3, 20, 21)

    def __getitem__(self, index: Any) -> Any:
        if index in self.bad:
            raise StudyError(f"{index}.png cannot be read as an image: replace or remove it")
        return super().__getitem__(index)


def test_unreadable_images_are_skipped_up_to_the_limit_and_listed(stub: LookUp, tmp_path: Path) -> None:
    images = Unreadable(stub.images)
    for limit in (2, 0):
        with pytest.raises(StudyError, match=rf"of 50 images are unreadable, over the limit of {limit} .*: \d+\.png"):
            encode(stub, tmp_path, images=images, max_unreadable=limit)
    images.bad = tuple(range(50))  # whole batches of them
    with pytest.raises(StudyError, match="50 of 50"):
        encode(stub, tmp_path / "all", images=images, max_unreadable=0.99, shard_rows=50)
    images.bad = Unreadable.bad
    made = encode(stub, tmp_path, images=images)  # three are a few, whatever share of 50
    assert sorted(made.skipped) == [3, 20, 21]
    assert "20.png" in made.skipped[20]
    assert np.allclose(np.asarray(made.column(MEAN)), halves(stub)[made.kept], rtol=1e-3)
    assert len(made.kept) == made.column(MEAN).shape[0] == 47


def test_refused_before_any_work(stub: LookUp, tmp_path: Path) -> None:
    for wanted, message in (
        ([("late", "mean")], "no layer 'late'"),
        ([("final", "max")], "no pooling"),
        ([("final", "cls")], "no class token"),
    ):
        with pytest.raises(StudyError, match=message):
            encode(stub, tmp_path, readouts=wanted)
    with pytest.raises(StudyError, match="no images"):
        encode(stub, tmp_path, images=[])
    assert stub.calls == 0
    for masks, message in ((None, "needs masks"), ([np.ones((5, 4))] * 50, "cannot belong")):
        with pytest.raises(StudyError, match=message):
            encode(stub, tmp_path, readouts=[("final", "object")], masks=masks)


def test_object_masks_pool_the_object(tmp_path: Path) -> None:
    """A stub whose dense map is the picture itself: pooled over the mask it is the object's mean colour."""
    architecture = Architecture(
        blocks=lambda _model: [],
        forward=lambda _model, pixels: {"final": LayerOutput(pixels)},
        read=lambda _model, output: output,
        headline=MEAN,
        cls_in="none",
    )
    for fit in ("squash", "pad", "crop"):
        preprocess = Preprocessing(8, fit, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        encoder = Encoder("stub", "0", torch.nn.Identity(), preprocess, architecture, torch.device("cpu"))
        image = np.zeros((8, 16, 3), np.uint8)
        image[:, :8] = 255
        mask = np.zeros((8, 16), np.uint8)
        mask[:, 5:7] = 1
        made = encode_images(
            encoder, [image], [MEAN, ("final", "object")], "data", masks=[mask], folder=tmp_path, shard_rows=1
        )
        assert np.allclose(np.asarray(made.column(("final", "object"))), 1, atol=0.05), fit
        assert np.allclose(np.asarray(made.column(MEAN)), 0.5, atol=0.05), fit  # padding is left out of the mean


def main_on_one_thread(options: list[str]) -> int:
    torch.set_num_threads(1)  # threads do not survive a fork
    return cli.main(options)


def test_two_processes_of_torchrun_make_what_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for number in range(6):
            path = tmp_path / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    options = ["--encoder", "dinov2", "--weights", "zoo_random", "--layers", "block_02:mean"]
    options += ["--layers", "final:cls", "--batch-size", "2", "--workers", "1", "--shard-rows", "4"]
    options = ["extract", str(tmp_path / "photos"), *options]
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "one"))
    assert cli.main(options) == 0
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "two"))
    # what the command torchrun starts, but with workers forked from this process: they need not import torch again
    config = LaunchConfig(1, 1, 2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    assert elastic_launch(config, main_on_one_thread)(options) == {0: 0, 1: 0}
    shards = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.npz"))
    assert len(shards) == 4
    for shard in shards:
        one, two = (np.load(tmp_path / name / shard) for name in ("one", "two"))
        for column in one.files[:2]:
            np.testing.assert_allclose(one[column], two[column], atol=2e-3)


def test_unwritable_folder(stub: LookUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(StudyError, match="cannot write"):
        encode(stub, tmp_path)
