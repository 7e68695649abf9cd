"""The feature store: right rows, resumed after a kill, never stale, safe with several runs at once."""

import dataclasses
import errno
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from refusals import refused
from samantics import cli
from samantics.models.encoder import Encoder
from samantics.models.preprocessing import Preprocessing
from samantics.models.registry import ENCODERS, LayerOutput
from samantics.probing import features
from samantics.probing.features import FeatureStore, encode_images
from stub_encoder import MEAN, LookUp, Unreadable
from test_folders import class_folders


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "SHARD_ROWS", 16)


@pytest.fixture
def stub() -> LookUp:
    return LookUp(np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32))


def encode(stub: LookUp, folder: Path, **options: Any) -> FeatureStore:
    options = {"readouts": [MEAN], "data_hash": "data", "batch_size": 5, **options}
    given = options.pop("encoder", stub.encoder), options.pop("images", stub.images)
    return encode_images(*given, folder=folder, **options)


def halves(stub: LookUp) -> NDArray[np.float32]:
    return stub.table.numpy().astype(np.float16).astype(np.float32)


def test_features_are_the_images_own_in_order(stub: LookUp, tmp_path: Path) -> None:
    made = encode(stub, tmp_path, readouts=[("early", "mean"), MEAN])
    assert np.allclose(np.asarray(made.column(MEAN)), halves(stub), rtol=1e-3)
    assert np.allclose(np.asarray(made.column(("early", "mean"))), 2 * halves(stub), rtol=1e-3)
    assert made.kept.tolist() == list(range(50)) and stub.calls == 50
    again = encode(stub, tmp_path, readouts=[MEAN, ("early", "mean")])  # in any order
    assert np.array_equal(np.asarray(again.column(MEAN)), np.asarray(made.column(MEAN)))
    assert stub.calls == 50, "a second call encodes nothing"
    refused("encode them too", lambda: np.asarray(made.column(("early", "cls"))))
    refused("no pooling", encode, stub, tmp_path, readouts=[MEAN, ("final", "max")])


def test_another_encoder_data_or_preprocessing_is_another_store(stub: LookUp, tmp_path: Path) -> None:
    first = encode(stub, tmp_path)
    folders = {first.folder, encode(stub, tmp_path, data_hash="other").folder}
    for change in (
        {"weights_hash": "1"},
        {"preprocess": dataclasses.replace(stub.encoder.preprocess, bicubic=True)},
        {"half": True},
    ):
        folders.add(encode(stub, tmp_path, encoder=dataclasses.replace(stub.encoder, **change)).folder)
    assert len(folders) == 5


def test_damage_is_found_and_mended_by_deleting_the_shard(stub: LookUp, tmp_path: Path) -> None:
    made = encode(stub, tmp_path)
    shard = sorted(made.folder.glob("*.npz"))[1]
    whole = shard.read_bytes()
    for damaged in (whole[:-30], whole[:180] + bytes([whole[180] ^ 1]) + whole[181:], b""):
        shard.write_bytes(damaged)
        refused(f"{shard.name} is damaged: delete it", lambda: np.asarray(encode(stub, tmp_path).column(MEAN)))
    shard.unlink()
    stub.calls = 0
    assert np.allclose(np.asarray(encode(stub, tmp_path).column(MEAN)), halves(stub), rtol=1e-3)
    assert stub.calls == 16


def test_unreadable_images_are_skipped_up_to_the_limit_and_listed(stub: LookUp, tmp_path: Path) -> None:
    images = Unreadable(stub.images)
    for count, share, limit in ((4, 0.01, 3), (7, 0.12, 6), (50, 0.99, 49)):
        images.bad = tuple(range(count))  # whole batches of them
        message = rf"\d+ of 50 images are unreadable, over the limit of {limit} .*: \d+\.png"
        refused(message, encode, stub, tmp_path / f"{count}", images=images, max_unreadable=share)
    images.bad = Unreadable.bad
    made = encode(stub, tmp_path, images=images)  # three are a few, whatever share of 50
    assert sorted(made.skipped) == [3, 20, 21] and "20.png" in made.skipped[20]
    column, rows = made.column(MEAN), np.array([11, 2, 40])
    assert np.allclose(np.asarray(column), halves(stub)[made.kept], rtol=1e-3)
    assert np.array_equal(column.take(rows), np.asarray(column)[rows])
    narrow = column @ np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
    assert column.shape == (47, 6) and narrow.shape == (47, 2)
    np.testing.assert_allclose(np.asarray(narrow), np.asarray(column) @ narrow.projection, rtol=1e-5)


def test_object_masks_pool_the_object_and_padding_is_left_out(tmp_path: Path) -> None:
    """A stub whose dense map is the picture itself: its mean colour is 0.5, of its object 1."""
    own = {"blocks": lambda _model: [], "forward": lambda _model, pixels: {"final": LayerOutput(pixels)}}
    architecture = dataclasses.replace(ENCODERS["random"], **own)
    image, mask = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)
    image[:, :4], mask[:, 1:3] = 255, 1
    for fit, shown in (("squash", image), ("crop", image), ("pad", image), ("pad", image[:5]), ("crop", image[:5])):
        preprocess = Preprocessing(8, fit, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        encoder = Encoder("stub", "0", torch.nn.Identity(), preprocess, architecture, torch.device("cpu"))
        given = encoder, [shown]
        made = encode_images(*given, [MEAN], f"{len(shown)}", folder=tmp_path)
        assert np.allclose(np.asarray(made.column(MEAN)), 0.5, atol=0.05), (fit, shown.shape)
        if len(shown) < 8:
            given = *given, [("final", "object")], "narrow", [mask[:5]], tmp_path
            refused("stub's input is cut or padded of image 0: encode it without masks", encode_images, *given)
            continue
        made = encode_images(*given, [("final", "object")], "masks", [mask], tmp_path)
        assert np.allclose(np.asarray(made.column(("final", "object"))), 1, atol=0.05), fit


def main_on_one_thread(options: list[str]) -> int:
    torch.set_num_threads(1)  # threads do not survive a fork
    return cli.main(options)


def test_two_processes_of_torchrun_make_what_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path / "photos", "ab", 6)
    options = ["extract", str(tmp_path / "photos"), "--encoder", "dinov2", "--weights", "zoo_random"]
    options += ["--layers", "block_02:mean", "--layers", "final:cls", "--batch-size", "2", "--workers", "1"]
    monkeypatch.setattr(features, "SHARD_ROWS", 4)
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
    monkeypatch.setattr(tempfile, "mkstemp", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    refused("cannot write", encode, stub, tmp_path)
