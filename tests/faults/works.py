"""The study's long works on a tiny scale: what runs, what it leaves, and what a kill may cost."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from processes import tell
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import study
from notebooks import write_notebook
from samantics import cli
from samantics.cache import Checkpoint
from samantics.data import downloads
from samantics.data import first_world as mojiworld
from samantics.data.coco import CocoDataset, load_coco
from samantics.data.first_world import write_mojiworld
from samantics.incontext import training as incontext
from samantics.incontext.model import build_model
from samantics.incontext.tokens import object_arrays, object_tokens, stored_maps
from samantics.models import pocket, weights
from samantics.models.encoder import load_encoder
from samantics.probing.features import FeatureStore, encode_images
from samantics.run import start_run
from samantics.scales import POCKET_INCONTEXT
from samantics.training_free import proposals
from samantics.zoo import training
from stub_encoder import MEAN, LookUp

Results = dict[str, Any]  # arrays, or what is compared by ==, by the name of their file


def nothing(_inputs: Path) -> None: ...


@dataclasses.dataclass(frozen=True)
class Work:
    """A work that can be killed at any moment.

    Attributes:
        run: ``(inputs, results, log)``, folders and a file that each unit of work is told to.
        read: its results in a folder, as far as they are there.
        lost: units that are done again after a kill, at most.
        pieces: pattern of the files that are never written again once they are there.
        prepare: fills the folder of inputs.
        kills: how it is killed, see ``kill_again_and_again``.
        disk: kilobytes that hold a part of its results.
    """

    run: Callable[[Path, Path, Path], Any]
    read: Callable[[Path], Results]
    lost: int
    pieces: str = ""
    prepare: Callable[[Path], Any] = nothing
    kills: dict[str, Any] = dataclasses.field(default_factory=lambda: {"kills": 4})
    disk: int = 0


def assert_same(found: Results, expected: Results) -> None:
    """The same results: arrays but for rounding, which differs from one process to another."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(found[name], value, atol=2e-3, rtol=1e-3, err_msg=name)
        else:
            assert found[name] == value, name


# ------------------------------------------------------------------------------------------- extraction, proposals

ROWS, SHARD_ROWS = 160, 8
POINTS = proposals.ProposalSettings(3, predicted_iou=0.0, stability=0.0)


class SlowImages(list[Any]):
    """Images that take a moment to read, each reading told."""

    log: Path | None = None

    def __getitem__(self, index: Any) -> Any:
        if self.log is not None:
            tell(self.log)
            time.sleep(0.003)
        return super().__getitem__(index)


def encode(folder: Path, log: Path | None = None, data: str = "data") -> FeatureStore:
    """Features of :data:`ROWS` images, known beforehand."""
    known = LookUp(np.random.default_rng(0).normal(size=(ROWS, 6)).astype(np.float32))
    images = SlowImages(known.images)
    images.log = log
    options = {"folder": folder, "shard_rows": SHARD_ROWS, "batch_size": 4, "workers": 1}
    return encode_images(known.encoder, images, [MEAN], data, **options)


def shards(folder: Path) -> Results:
    return {path.name: np.load(path) for path in folder.rglob("shard_*.npy") if path.with_suffix(".json").exists()}


def scenes(folder: Path, count: int = 10) -> CocoDataset:
    """Small scenes with annotations; read where they are there."""
    found = sorted(folder.rglob("*.json"))
    if found:
        return load_coco(found[0], next(path.parent for path in sorted(folder.rglob("*.png"))))
    return write_mojiworld(mojiworld.World(image_size=96, seed=1), "test", count, folder)


def propose(inputs: Path, results: Path, log: Path) -> None:
    read = proposals.read_image

    def read_image(*arguments: Any) -> Any:
        tell(log)
        return read(*arguments)

    with mock.patch.object(proposals, "read_image", read_image):
        proposals.get_proposals(load_encoder("sam", "zoo_random"), scenes(inputs), POINTS, results)


def proposed(folder: Path) -> Results:
    found = {path.name: json.loads(path.read_text()) for path in folder.rglob("[0-9]*.json")}
    return {name: np.array(content["predicted_iou"]) for name, content in found.items()}


# --------------------------------------------------------------------------------------------------------- training

RECIPE = training.Recipe(images=16, pool=12, batch=2, probe_points=1, checkpoint_every=2)
SAVE_EVERY = 3
TINY = dataclasses.replace(
    POCKET_INCONTEXT,
    dim=32, heads=2, ffn_width=32, decoder_layers=2, queries=9, fuser_width=32, trunk_maps=2, batch=4, epochs=3,
)  # fmt: skip


@contextlib.contextmanager
def steps_told(log: Path) -> Iterator[None]:
    """Each step of AdamW is told."""
    hook = register_optimizer_step_pre_hook(lambda one, *_: tell(log) if isinstance(one, torch.optim.AdamW) else None)
    try:
        yield
    finally:
        hook.remove()


def train_zoo(_inputs: Path, results: Path, log: Path) -> None:
    """The pocket CLIP by :data:`RECIPE`."""
    make = functools.partial(mojiworld.pretraining_picture, mojiworld.World(), stream="training test")
    seen = mojiworld.render(make, range(12))
    data = training.TrainingData(seen, seen, seen, np.arange(12) >= 10)
    with steps_told(log):
        training.train("clip", RECIPE, results, data)


def zoo_model(folder: Path) -> Results:
    if not (folder / "clip.json").exists():
        return {}
    curve = pd.read_csv(folder / "clip.csv").drop(columns="seconds").to_numpy(float)
    tensors = {name: value.float().numpy() for name, value in load_file(folder / "clip.safetensors").items()}
    assert pocket.verify("clip", folder)
    return tensors | {"curve": curve[:, :2], "files": sorted(path.name for path in folder.iterdir())}


def batch_sampler(inputs: Path) -> incontext.BatchSampler:
    """What in-context training needs, computed by the first call and read by the others."""
    dataset, sam = scenes(inputs, 16), pocket.build("sam").requires_grad_(False)
    objects = object_arrays(dataset, pocket.DEFAULT.image_size)
    maps = stored_maps(sam, dataset, TINY.trunk_maps, "random", inputs.with_name("maps"))
    tokens = object_tokens(sam, maps, objects, inputs.with_name("tokens"))
    common = [c for c in dataset.categories if len(np.unique(objects.image[objects.categories == c])) > 2]
    return incontext.BatchSampler(maps, objects, tokens, tuple(common[:-1]), pocket.DEFAULT.image_size, TINY)


def train_in_context(inputs: Path, results: Path, log: Path) -> None:
    """In-context training with a checkpoint every :data:`SAVE_EVERY` steps."""
    sampler = batch_sampler(inputs)
    with mock.patch.multiple(incontext, SAVE_EVERY=SAVE_EVERY, RECORD_EVERY=1), steps_told(log):
        model = build_model(TINY, pocket.build("sam"), 0)
        incontext.train(model, sampler, Checkpoint(results / "model.pt", {"seed": 0}))


def in_context_model(folder: Path) -> Results:
    state = torch.load(folder / "model.pt", weights_only=True)
    return {name: value.numpy() for name, value in state["model"].items()} | {"step": state["step"]}


# ----------------------------------------------------------------------------------------------- figures, notebooks

FIGURES = 4
CELL = """\
import os, time
from pathlib import Path
with open({log!r}, "ab") as file:
    file.write(b".")
Path({log!r} + ".pid").write_text(str(os.getpid()))
time.sleep(0.1)
print({number})"""


def places(folder: Path) -> Any:
    return mock.patch.dict(os.environ, SAMANTICS_FIGURES=str(folder), SAMANTICS_CACHE=f"{folder}_cache")


def draw(_inputs: Path, results: Path, log: Path) -> None:
    """Some figures with their tables."""
    with places(results):
        run = start_run("pocket", "99_test", 0)
    for number in range(FIGURES):
        tell(log)
        figure, axes = plt.subplots(figsize=(8, 1))
        axes.plot(np.arange(5) * number)
        run.save(figure, pd.DataFrame({"x": np.arange(5) * number / 3}), f"99_{number}", "Lines.")
        plt.close(figure)


def drawn(folder: Path) -> Results:
    records = {path.name: json.loads(path.read_text())["caption"] for path in folder.rglob("99_*.json")}
    return records | {path.name: path.read_bytes() for path in folder.rglob("99_*") if path.suffix in (".png", ".csv")}


def run_notebooks(inputs: Path, results: Path, log: Path) -> None:
    """The study, of two notebooks."""
    for name in ("00_first", "01_second"):
        write_notebook(inputs, name, *(CELL.format(log=str(log), number=number) for number in range(4)))
    with places(results), mock.patch.object(study, "NOTEBOOKS", inputs):
        outcomes = study.run_study("pocket")
    assert not any(outcome.error for outcome in outcomes), outcomes


def executed(folder: Path) -> Results:
    """Notebooks and pages, but for where the log lies."""
    logs = [str(folder.parent / name) for name in ("once", "log")]
    texts = {path.name: path.read_text() for path in folder.glob("pocket/notebooks/[0-9]*")}
    return {name: text.replace(logs[0], "").replace(logs[1], "") for name, text in texts.items()}


def run_command(inputs: Path) -> None:
    """``./run_all.sh`` on the notebooks of a folder: its exit code is the process's."""
    study.NOTEBOOKS = inputs
    os._exit(cli.main(["run"]))


WORKS = {
    "features": Work(
        lambda _inputs, results, log: encode(results, log), shards, SHARD_ROWS, "shard_*.json",
        kills={"kills": 8, "units": 9, "seconds": 0.05}, disk=100,
    ),
    "proposals": Work(propose, proposed, 1, "[0-9]*.json", scenes, {"kills": 5, "units": 2, "seconds": 0.05}, 20),
    "zoo training": Work(train_zoo, zoo_model, RECIPE.checkpoint_every, disk=45_000),
    "in-context training": Work(train_in_context, in_context_model, SAVE_EVERY, prepare=batch_sampler, disk=1500),
    "figures": Work(draw, drawn, FIGURES, disk=60),
    "notebooks": Work(run_notebooks, executed, 8, kills={"kills": 2, "units": 8, "files": 2}, disk=40),
}  # fmt: skip


def run(name: str, inputs: Path, results: Path, log: Path) -> None:
    """A work by its name, as another process can be told."""
    WORKS[name].run(inputs, results, log)


# --------------------------------------------------------------------------------------------------------- download

PIECE = 1 << 14


def fetch(known: weights.WeightFile, place: Path) -> None:
    """Download a file, unless it is there."""
    downloads.WAIT = 0.01
    if not place.exists():
        weights.download(known, place)
