"""The study's long works on a tiny scale, as functions that a process of its own can run; each tells its units."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from processes import tell

import study
from samantics import cli
from samantics.cache import Checkpoint
from samantics.data import first_world as mojiworld
from samantics.data.coco import CocoDataset
from samantics.data.first_world import Pictures, write_mojiworld
from samantics.incontext import training as incontext
from samantics.incontext.model import build_model
from samantics.incontext.tokens import SamMaps, object_tokens, objects_of, stored_maps
from samantics.models import pocket, weights
from samantics.models.encoder import load_encoder
from samantics.plots import save_figure
from samantics.probing.features import FeatureStore, encode_images
from samantics.run import start_run
from samantics.scales import POCKET_INCONTEXT
from samantics.training_free.proposals import ProposalSettings, compute_proposals
from samantics.zoo import training
from stub_encoder import MEAN, LookUp

# ------------------------------------------------------------------------------------------------------- extraction

ROWS, SHARD_ROWS = 160, 8


class SlowImages(list[Any]):
    """Images that take a moment to read, each reading told."""

    log: Path | None = None

    def __getitem__(self, index: Any) -> Any:
        if self.log is not None:
            tell(self.log)
            time.sleep(0.003)
        return super().__getitem__(index)


def stub(width: int) -> LookUp:
    """An encoder with known features of that width for :data:`ROWS` images."""
    return LookUp(np.random.default_rng(0).normal(size=(ROWS, width)).astype(np.float32))


def encode(folder: Path, log: Path | None = None, width: int = 6) -> FeatureStore:
    """Features of all images in ``folder``; each image told that is read."""
    known = stub(width)
    images = SlowImages(known.images)
    images.log = log
    return encode_images(
        known.encoder, images, [MEAN], "data", folder=folder, shard_rows=SHARD_ROWS, batch_size=4, workers=1
    )


# -------------------------------------------------------------------------------------------------------- proposals

POINTS = ProposalSettings(3, predicted_iou=0.0, stability=0.0)


def scenes(folder: Path, count: int = 10) -> CocoDataset:
    """Small scenes with annotations."""
    return write_mojiworld(mojiworld.World(image_size=96, seed=1), "test", count, folder)


def propose(dataset: CocoDataset, folder: Path, log: Path) -> Path:
    """Proposals of every scene, each scene told."""
    from samantics.training_free import proposals

    read = proposals.read_image

    def read_image(*arguments: Any) -> Any:
        tell(log)
        return read(*arguments)

    proposals.read_image = read_image
    return compute_proposals(load_encoder("sam", "zoo_random"), dataset, POINTS, folder)


# ---------------------------------------------------------------------------------------------------------- training

RECIPE = training.Recipe(images=16, pool=12, batch=2, probe_points=1, checkpoint_every=2)


def pictures() -> Pictures:
    """A few pictures to train on."""
    make = functools.partial(mojiworld.pretraining_picture, mojiworld.World(), stream="training test")
    return mojiworld.render(make, range(12))


def train_zoo(seen: Pictures, folder: Path, log: Path) -> None:
    """The pocket CLIP by :data:`RECIPE`, each step told."""
    step = training._step

    def told_step(*arguments: Any) -> None:
        tell(log)
        step(*arguments)

    training._step = told_step
    data = training.DeviceData(seen, torch.device("cpu"))
    probing = training.ProbeData(seen.images, seen.drawings[:, 0].astype(np.int64), np.arange(12) >= 10)
    training.train("clip", RECIPE, folder, data, data, probing)


# ------------------------------------------------------------------------------------------------------- in context

SAVE_EVERY = 3
TINY = dataclasses.replace(
    POCKET_INCONTEXT,
    dim=32, heads=2, ffn_width=32, decoder_layers=2, queries=9, fuser_width=32, trunk_maps=2, batch=4, epochs=3,
)  # fmt: skip


def batch_sampler(dataset: CocoDataset, folder: Path) -> incontext.BatchSampler:
    """What in-context training needs, computed by the first call and read by the others."""
    sam = pocket.build("sam").requires_grad_(False)
    objects = objects_of(dataset, pocket.DEFAULT.image_size)
    maps = stored_maps(sam, dataset, TINY.trunk_maps, "random", folder)
    tokens = object_tokens(sam, maps, objects, folder / "tokens")
    common = [c for c in dataset.categories if len(np.unique(objects.image[objects.categories == c])) > 2]
    return incontext.BatchSampler(maps, objects, tokens, tuple(common[:-1]), pocket.DEFAULT.image_size, TINY)


def train_in_context(dataset: CocoDataset, prepared: Path, checkpoint: Path, log: Path) -> None:
    """In-context training with a checkpoint every :data:`SAVE_EVERY` steps, each step told."""
    incontext.SAVE_EVERY, incontext.RECORD_EVERY = SAVE_EVERY, 1
    sampler = batch_sampler(dataset, prepared)

    def told_maps(rows: np.ndarray, mirrored: np.ndarray | None = None) -> SamMaps:
        tell(log)
        return sampler.maps(rows, mirrored)

    model = build_model(TINY, pocket.build("sam"), 0)
    incontext.train(model, dataclasses.replace(sampler, maps=told_maps), Checkpoint(checkpoint, {"seed": 0}))


# ----------------------------------------------------------------------------------------------- figures, notebooks

FIGURES = 4


def draw(log: Path) -> None:
    """Some figures with their tables in the scale's folder, each told."""
    run = start_run("pocket", "99_test", 0)
    for number in range(FIGURES):
        tell(log)
        fig, axes = plt.subplots(figsize=(8, 1))
        axes.plot(np.arange(5) * number)
        save_figure(run, fig, pd.DataFrame({"x": np.arange(5) * number / 3}), f"99_{number}", "Lines.")
        plt.close(fig)


def run_notebooks(folder: Path) -> None:
    """The study, of the notebooks of a folder; ends the process with an error where one of them fails."""
    study.NOTEBOOKS = folder
    outcomes = study.run_study("pocket")
    assert not any(outcome.error for outcome in outcomes), outcomes


def run_command(folder: Path) -> None:
    """``./run_all.sh`` on the notebooks of a folder: its exit code is the process's."""
    study.NOTEBOOKS = folder
    os._exit(cli.main(["run"]))


# --------------------------------------------------------------------------------------------------------- download


PIECE = 1 << 14


def fetch(known: weights.WeightFile, place: Path) -> None:
    """Download a file, unless it is there."""
    weights.WAIT = 0.01
    if not place.exists():
        weights.download(known, place)
