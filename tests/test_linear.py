"""The linear probe against scikit-learn, PyTorch's own loop and autograd; streamed against in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from samantics.errors import StudyError
from samantics.probing import linear
from samantics.probing.linear import held_out_rows, linear_probe
from stub_encoder import CLASSES, MEAN, Data, overlapping_classes, stored


@pytest.fixture(scope="module")
def data() -> Data:
    return overlapping_classes()


def test_linear_probe_is_as_good_as_the_best_logistic_regression(data: Data) -> None:
    x, y, test_x, test_y = data
    result = linear_probe(x, y, test_x, test_y, CLASSES)
    mean, std = x.mean(0), x.std(0)
    models = (LogisticRegression(C=c, max_iter=500) for c in (0.003, 0.01, 0.1, 1))
    reference = max(m.fit((x - mean) / std, y).score((test_x - mean) / std, test_y) for m in models)
    assert result.top1.shape == result.top5.shape == result.predictions.shape == (3, len(test_y))
    assert abs(result.top1.mean() - reference) < 0.02  # reference is about 0.85, its standard error 0.013
    assert (result.top1 <= result.top5).all()
    assert np.array_equal(result.top1, result.predictions == test_y)
    assert set(result.learning_rates) <= set(linear.RATES)
    assert result.converged.all() and (result.held_out > 0.7).all()


@pytest.mark.parametrize("standardise", [True, False])
def test_one_rate_is_an_ordinary_training_loop(standardise: bool, data: Data) -> None:
    """`nn.Linear`, cross-entropy and SGD, as notebook 01 writes them, on the same batches."""
    x, y, test_x, test_y = data
    scale = x.std(0) if standardise else np.full(24, 100, np.float32)
    x, test_x = ((part - standardise * x.mean(0)) / scale for part in (x, test_x))
    epochs, steps = 6, 6 * len(y) / 128
    options = {"seeds": (3,), "rates": (0.1,), "max_epochs": epochs, "standardise": standardise}
    result = linear_probe(x, y, test_x, test_y, CLASSES, **options)
    layer = torch.nn.Linear(24, CLASSES)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 * (1 + np.cos(np.pi * step / steps)))
    rng = np.random.default_rng(3)
    for _ in range(epochs):
        for rows in torch.from_numpy(rng.permutation(len(y))).split(128):
            loss = F.cross_entropy(layer(torch.from_numpy(x)[rows]), torch.from_numpy(y)[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    # torch's momentum takes a step's rate after the momentum, as ours does; rounding alone is left
    assert (layer(torch.from_numpy(test_x)).argmax(1).numpy() == result.predictions[0]).mean() > 0.99
    assert result.learning_rates.tolist() == [0.1] and np.isnan(result.held_out).all()


def test_layers_side_by_side_are_the_layers_one_by_one_and_their_gradient_is_autograds(data: Data) -> None:
    x, y, _, _ = data
    use = np.ones(len(y), bool)
    together = linear.train_heads(x, y, use, (0.01, 0.1, 1.0), 3, 0, CLASSES, True)
    for number, rate in enumerate((0.01, 0.1, 1.0)):
        alone = linear.train_heads(x, y, use, (rate,), 3, 0, CLASSES, True)
        assert torch.allclose(together.weights[:, number], alone.weights[:, 0], atol=1e-5)
    weights = torch.randn(25, 2, CLASSES, requires_grad=True)
    heads = linear.Heads(weights, torch.zeros(24), torch.ones(24))
    prepared, labels = heads.prepare(torch.from_numpy(x[:50])), torch.from_numpy(y[:50])
    logits = heads.logits(prepared)
    loss = torch.stack([F.cross_entropy(logits[:, head], labels) for head in range(2)]).sum()
    (expected,) = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        gradient = prepared.T @ heads.excess(prepared, labels).flatten(1) / len(labels)
        assert torch.allclose(gradient.view_as(weights), expected, atol=1e-4)


def test_choices_never_see_the_test_images_and_seeds_differ(data: Data) -> None:
    x, y, test_x, test_y = data
    short = {"seeds": (0, 1), "epochs": 4, "max_epochs": 4}
    honest = linear_probe(x, y, test_x, test_y, CLASSES, **short)
    shuffled = linear_probe(x, y, test_x[::-1], test_y * 0, CLASSES, **short)
    assert honest.learning_rates.tolist() == shuffled.learning_rates.tolist()
    assert (honest.predictions == shuffled.predictions[:, ::-1]).mean() > 0.999
    assert (honest.predictions[0] == honest.predictions[1]).mean() < 0.999


def test_held_out_rows() -> None:
    labels = np.repeat(np.arange(5), 20)
    assert np.bincount(labels[held_out_rows(labels, 0)]).tolist() == [4] * 5
    held = held_out_rows(labels, 0, np.arange(100) // 4)
    assert held.reshape(-1, 4).all(1).sum() == 5  # whole groups, one of the five of every class
    assert held.sum() == 20
    assert held_out_rows(np.array([0, 1, 1]), 0).tolist() in ([False, True, False], [False, False, True])
    with pytest.raises(StudyError, match="give one learning rate"):
        held_out_rows(np.arange(3), 0)


def test_bad_input(data: Data) -> None:
    x, y, test_x, test_y = data
    for arguments, message in (
        ((x, y * 0, test_x, test_y * 0, 1), "two or more"),
        ((x, y * 0, test_x, test_y, CLASSES), "one class"),
        ((x, y[:-1], test_x, test_y, CLASSES), "labels of the images that were kept"),
        ((x, y, test_x, test_y + 1, CLASSES), "test labels reach"),
    ):
        with pytest.raises(StudyError, match=message):
            linear_probe(*arguments)


def test_streamed_features_give_what_arrays_give(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, test_x, test_y = data
    x, test_x = x / np.abs(x).max(0), test_x / np.abs(x).max(0)
    columns = [stored(tmp_path / name, part).column(MEAN) for name, part in (("a", x), ("b", test_x))]
    halves = [part.astype(np.float16).astype(np.float32) for part in (x, test_x)]
    whole = linear_probe(halves[0], y, halves[1], test_y, CLASSES, seeds=(0,))
    small = linear_probe(columns[0], y, columns[1], test_y, CLASSES, seeds=(0,))  # read once, then as arrays
    assert (small.predictions == whole.predictions).mean() > 0.999
    monkeypatch.setattr(linear, "CHUNK_BYTES", 4 * 24 * 150)
    streamed = linear_probe(columns[0], y, columns[1], test_y, CLASSES, seeds=(0,))
    assert abs(streamed.top1.mean() - whole.top1.mean()) < 0.02  # another order of the images
    rows = np.concatenate([rows for rows, _ in linear.batches(columns[0], 64, y > 3, np.random.default_rng(0))])
    assert sorted(rows) == np.flatnonzero(y > 3).tolist() and (np.diff(rows) < 0).mean() > 0.3
