"""Ablation lines: each changes what it says and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from samantics.models.encoder import load_encoder
from samantics.models.preprocessing import OPENAI
from samantics.probing import linear as probe
from samantics.probing import protocol as ablation
from stub_encoder import MEAN, LookUp

torch.set_num_threads(1)
CLASSES = 5


@pytest.fixture(scope="module")
def features() -> tuple[ablation.Features, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(CLASSES, 16))
    labels = [np.repeat(np.arange(CLASSES), count) for count in (30, 40)]
    good = [(means[y] + rng.normal(size=(len(y), 16))).astype(np.float32) for y in labels]
    weak = [(x + 3 * rng.normal(size=x.shape)).astype(np.float32) for x in good]
    return {("final", "cls"): (good[0], good[1]), ("final", "mean"): (weak[0], weak[1])}, labels[0], labels[1]


def test_protocol_lines(features: tuple[ablation.Features, np.ndarray, np.ndarray]) -> None:
    table, train_y, test_y = features
    lines = ablation.protocol_lines(table, ("final", "cls"), train_y, test_y, CLASSES, seeds=(0, 1), long=30)
    accuracy = {line.question: line.result.top1.mean() for line in lines}
    assert all(line.result.top1.shape == (2, len(test_y)) and line.dim == 16 for line in lines)
    assert accuracy["selection on the reported split"] <= accuracy["the paper's protocol"]
    assert accuracy["under-training"] > accuracy["selection on the reported split"] + 0.1
    train_x, test_x = table["final", "cls"]
    direct = probe.paper_probe(train_x, train_y, test_x, test_y, CLASSES, seed=1)
    assert (lines[0].result.predictions[1] == direct.result.predictions[0]).mean() > 0.98
    assert lines[1].result.top1[1].mean() == pytest.approx(direct.curve[-1], abs=0.02)


def test_feature_lines(features: tuple[ablation.Features, np.ndarray, np.ndarray]) -> None:
    table, train_y, test_y = features
    lines = ablation.feature_lines(table, ("final", "cls"), train_y, test_y, CLASSES, width=8, seeds=(0, 1))
    assert [(line.question, line.dim) for line in lines] == [("headline", 16), ("pooling", 16), ("unequal widths", 8)]
    headline, weak, narrow = (line.result.top1.mean() for line in lines)
    assert headline > narrow > 1 / CLASSES
    assert headline > weak
    assert len(lines[2].result.learning_rates) == 2


def test_random_projection_keeps_distances_on_average() -> None:
    x = np.random.default_rng(0).normal(size=(50, 300)).astype(np.float32)
    shorter = x @ ablation.random_projection(300, 200, seed=0)
    ratio = np.linalg.norm(shorter, axis=1) / np.linalg.norm(x, axis=1)
    assert abs(ratio.mean() - 1) < 0.05
    assert not np.array_equal(ablation.random_projection(4, 2, 0), ablation.random_projection(4, 2, 1))


def test_input_variants_change_one_thing_each() -> None:
    encoder = load_encoder("clip", "zoo_random")
    variants = ablation.input_variants(encoder)
    assert list(variants) == ["own", "other statistics", "aspect kept"]
    assert (variants["other statistics"].preprocess.mean, variants["other statistics"].preprocess.std) == OPENAI
    changed = [
        {key for key, value in dataclasses.asdict(v.preprocess).items() if value != getattr(encoder.preprocess, key)}
        for v in variants.values()
    ]
    assert changed == [set(), {"mean", "std"}, {"fit"}]
    square = Image.new("RGB", (encoder.image_size, encoder.image_size), (9, 99, 199))
    torch.testing.assert_close(variants["own"].preprocess(square), variants["aspect kept"].preprocess(square))
    stub = LookUp(np.zeros((2, 2), np.float32)).encoder
    assert "other statistics" in ablation.input_variants(stub)
    assert stub.headline == MEAN
