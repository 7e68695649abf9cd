"""The dense pair: exact targets, metrics against scikit-learn, and a readout that finds what was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, jaccard_score

from samantics.errors import StudyError
from samantics.models.encoder import load_encoder
from samantics.mojiworld import catalogue
from samantics.mojiworld.world import STREAMS, World, picture
from samantics.probing import dense


@pytest.fixture(scope="module")
def shown() -> dense.Scenes:
    patch = pytest.MonkeyPatch()
    from samantics.mojiworld.rendered import render

    patch.setattr(dense, "stored_pictures", lambda world, stream, count: render(world, stream, range(count)))
    found = dense.scenes(World(96), "targets", 4)
    patch.undo()
    return found


def test_every_pixel_has_the_class_of_its_object(shown: dense.Scenes) -> None:
    known = catalogue.instance_classes()["class"].tolist()
    for index in range(4):
        one = picture(World(96), STREAMS["targets"], index)
        for number, drawing in enumerate(one.drawings, start=1):
            where = one.instances == number
            row = catalogue.catalogue().iloc[drawing]
            assert (shown.labels["class"][index][where] == known.index(row["class"]) + 1).all()
            assert (shown.labels["superclass"][index][where] - 1 == catalogue.superclass_of_drawing()[drawing]).all()
        assert (shown.labels["class"][index][one.instances == 0] == 0).all()


def test_outlines_and_shares_are_counted_in_the_right_tokens() -> None:
    field = np.zeros((1, 96, 96), np.uint8)
    field[0, :10, :20] = 1
    edges = dense.outlines(field, 48)
    assert edges[0, :5, 9].all() and edges[0, 4, :10].all() and edges.sum() == 5 + 10 - 1
    targets = dense.shares(field.astype(np.int64), 2).reshape(12, 12, 2)
    assert targets[0, 0, 1] == 1 and targets[1, 0, 1] == 0.25 and targets[0, 2, 1] == 0.5 and targets[5, 5, 0] == 1
    assert (targets.sum(-1) == 1).all()
    asked = dense.cells(edges).reshape(12, 12, 4, 4)
    assert np.array_equal(asked[0, 2], edges[0, :4, 8:12]) and np.array_equal(asked[1, 0], edges[0, 4:8, :4])


def test_metrics_are_sklearns() -> None:
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.random((3, 144, 16)) < 0.2)
    logits = torch.from_numpy(rng.normal(size=(3, 144, 16))) + truth
    found = dense.average_precision(dense.score_counts(logits, truth.reshape(-1, 16)))
    reference = average_precision_score(truth.ravel().numpy(), logits.ravel().numpy())
    assert found == pytest.approx(100 * reference, abs=0.5)  # scores in 200 steps
    labels = rng.integers(0, 4, (3, 12, 12)).repeat(8, 1).repeat(8, 2)
    called = rng.integers(0, 4, (3, 144))
    counts = dense.overlaps(torch.eye(4)[torch.from_numpy(called)], labels[:, ::8, ::8])
    reference = jaccard_score(labels[:, ::8, ::8].ravel(), called.ravel(), average=None)[1:].mean()
    assert dense.mean_iou(counts) == pytest.approx(100 * reference)


def test_a_planted_label_is_read_and_noise_is_not() -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    labels = rng.integers(0, 3, (60, 12, 12)).repeat(8, 1).repeat(8, 2)
    targets = dense.shares(labels, 3)  # 8,640 tokens
    edges = (torch.rand(8640, 16, generator=generator) < 0.3).float()
    for signal, low, high in ((5.0, 90, 100), (0.0, 0, 60)):
        tokens = torch.randn(8640, 30, generator=generator)
        tokens[:, :3] += signal * targets
        tokens[:, 3:19] += signal * edges
        *of_labels, of_edges = dense.linear_readouts(tokens[:7000], [targets[:7000]], edges[:7000], tokens[7000:])
        assert low <= 100 * (of_labels[0].argmax(1) == targets[7000:].argmax(1)).float().mean() <= high
        assert low <= 100 * ((of_edges > 0) == edges[7000:].bool()).float().mean() <= max(high, 75)


def test_rows_of_an_encoder_and_a_stream_that_must_not_teach(shown: dense.Scenes) -> None:
    rows = dense.dense_rows(load_encoder("sam2", "zoo_random"), shown, shown)
    assert [row["task"] for row in rows] == ["semantic", "semantic", "boundary"]
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 100 for row in rows[2:])
    with pytest.raises(StudyError, match="must not serve"):
        dense.scenes(World(96), "test", 1)
