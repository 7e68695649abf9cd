"""Probes against scikit-learn, autograd and brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from samantics.errors import StudyError
from samantics.probing import linear as probe
from samantics.probing.features import FeatureStore, encode_images
from stub_encoder import LookUp

CLASSES = 12
Data = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]


@pytest.fixture(scope="module")
def data() -> Data:
    """Overlapping Gaussian classes with features of very different scales, as raw encoder features have."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(CLASSES, 24))
    scales = 10.0 ** rng.uniform(-3, 2, 24)

    def draw(count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        labels = rng.permutation(np.repeat(np.arange(CLASSES), count))
        return ((means[labels] + 1.5 * rng.normal(size=(len(labels), 24))) * scales).astype(np.float32), labels

    return *draw(40), *draw(60)


def test_linear_probe_is_as_good_as_the_best_logistic_regression(data: Data) -> None:
    x, y, test_x, test_y = data
    result = probe.linear_probe(x, y, test_x, test_y, CLASSES)
    mean, std = x.mean(0), x.std(0)
    models = (LogisticRegression(C=c, max_iter=500) for c in (0.003, 0.01, 0.1, 1))
    reference = max(m.fit((x - mean) / std, y).score((test_x - mean) / std, test_y) for m in models)
    assert result.top1.shape == result.top5.shape == result.predictions.shape == (3, len(test_y))
    assert abs(result.top1.mean() - reference) < 0.02  # reference is about 0.85, its standard error 0.013
    assert (result.top1 <= result.top5).all()
    assert np.array_equal(result.top1, result.predictions == test_y)
    assert set(result.learning_rates) <= set(probe.RATES)
    assert all(result.converged)


def test_linear_probe_is_repeatable_and_seeds_differ(data: Data) -> None:
    first, second = (probe.linear_probe(*data, CLASSES, seeds=(0, 1), epochs=4, max_epochs=4) for _ in range(2))
    assert (first.predictions == second.predictions).mean() > 0.99
    assert not np.array_equal(first.predictions[0], first.predictions[1])


def test_heads_side_by_side_are_the_heads_one_by_one(data: Data) -> None:
    x, y, _, _ = data
    settings = probe._Settings(CLASSES, True, 32, torch.device("cpu"))
    use = np.ones(len(y), bool)
    together = probe._train(x, y, use, (0.01, 0.1, 1.0), 3, 0, settings)
    for number, rate in enumerate((0.01, 0.1, 1.0)):
        alone = probe._train(x, y, use, (rate,), 3, 0, settings)
        assert torch.allclose(together.weights[:, number], alone.weights[:, 0], atol=1e-5)


def test_gradient_is_autograds(data: Data) -> None:
    x, y, _, _ = data
    weights = torch.randn(25, 2, CLASSES, requires_grad=True)
    heads = probe._Heads(weights, torch.zeros(24), torch.ones(24))
    prepared, labels = heads.prepare(torch.from_numpy(x[:50])), torch.from_numpy(y[:50])
    logits = heads.logits(prepared)
    loss = torch.stack([torch.nn.functional.cross_entropy(logits[:, head], labels) for head in range(2)]).sum()
    (expected,) = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        assert torch.allclose(probe._gradient(heads, prepared, labels), expected, atol=1e-4)


def test_selection_never_sees_the_test_images(data: Data) -> None:
    x, y, test_x, test_y = data
    honest = probe.linear_probe(x, y, test_x, test_y, CLASSES, seeds=(0,), epochs=4, max_epochs=4)
    shuffled = probe.linear_probe(x, y, test_x[::-1], test_y * 0, CLASSES, seeds=(0,), epochs=4, max_epochs=4)
    assert honest.learning_rates == shuffled.learning_rates
    assert (honest.predictions == shuffled.predictions[:, ::-1]).mean() > 0.99


def test_held_out_rows() -> None:
    labels = np.repeat(np.arange(5), 20)
    held = probe.held_out_rows(labels, 0)
    assert np.bincount(labels[held]).tolist() == [4] * 5
    groups = np.arange(100) // 4
    held = probe.held_out_rows(labels, 0, groups)
    assert held.reshape(-1, 4).all(1).sum() == 5  # whole groups, one of the five of every class
    assert held.sum() == 20
    few = probe.held_out_rows(np.array([0, 1, 1]), 0)
    assert few.sum() == 1
    assert not few[0]
    with pytest.raises(StudyError, match="give one learning rate"):
        probe.held_out_rows(np.arange(3), 0)


def test_one_learning_rate_needs_no_held_out_part(data: Data) -> None:
    x, y, test_x, test_y = data
    rows = probe.few_shot_rows(y, 1, seed=0)
    result = probe.linear_probe(x[rows], y[rows], test_x, test_y, CLASSES, seeds=(0,), rates=(0.1,), max_epochs=20)
    assert result.top1.mean() > 3 / CLASSES
    assert result.learning_rates == (0.1,)


def test_constant_features_do_not_become_nan(data: Data) -> None:
    x, y, test_x, test_y = data
    x, test_x = (np.column_stack([part, np.full(len(part), 7.3, np.float32)]) for part in (x, test_x))
    wild = test_x.copy()
    wild[:, -1] = 1e6  # it never varied in train, so it says nothing
    result = probe.linear_probe(x, y, test_x, test_y, CLASSES, seeds=(0,), epochs=4, max_epochs=4)
    again = probe.linear_probe(x, y, wild, test_y, CLASSES, seeds=(0,), epochs=4, max_epochs=4)
    assert (result.predictions == again.predictions).mean() > 0.99


def test_few_shot_rows(data: Data) -> None:
    labels = data[1]
    rows = probe.few_shot_rows(labels, 4, seed=1)
    assert np.bincount(labels[rows]).tolist() == [4] * CLASSES
    assert not np.array_equal(rows, probe.few_shot_rows(labels, 4, seed=2))
    with pytest.raises(StudyError, match="fewer shots"):
        probe.few_shot_rows(labels, 41, seed=0)


def test_plain_knn_is_sklearns(data: Data) -> None:
    x, y, test_x, test_y = data
    x, test_x = x[:, :8], test_x[:, :8]
    for k, result in probe.knn_probe(x, y, test_x, test_y, CLASSES, ks=(1, 5, 10, 50), temperature=None).items():
        model = KNeighborsClassifier(k, metric="cosine").fit(x, y)
        shares = model.predict_proba(test_x)
        clear = np.diff(np.sort(shares, axis=1)[:, -2:])[:, 0] > 0  # where votes are equal we take the nearer class
        assert clear.mean() > 0.6
        assert (result.predictions[0] == model.predict(test_x))[clear].mean() > 0.99


def test_weighted_knn_is_dinov2s(data: Data) -> None:
    x, y, test_x, test_y = data
    results = probe.knn_probe(x, y, test_x, test_y, CLASSES, ks=(10, 200))
    unit, test_unit = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (x, test_x))
    cosines = test_unit.astype(np.float64) @ unit.T
    for k, result in results.items():
        votes = np.zeros((len(test_y), CLASSES))
        for row, order in enumerate(np.argsort(-cosines, axis=1)[:, :k]):
            np.add.at(votes[row], y[order], np.exp(cosines[row, order] / 0.07))
        assert (votes.argmax(1) == result.predictions[0]).mean() > 0.995
        top5 = (np.argsort(-votes, axis=1)[:, :5] == test_y[:, None]).any(1)
        assert abs(top5.mean() - result.top5.mean()) < 0.01


def test_paper_probe_is_an_ordinary_training_loop(data: Data) -> None:
    x, y, test_x, test_y = data
    ran = probe.paper_probe(x / 100, y, test_x / 100, test_y, CLASSES, epochs=12)
    assert ran.curve.shape == (12,)
    assert ran.chosen == int(ran.curve.argmax())
    assert ran.result.top1.mean() == ran.curve.max()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = torch.nn.Linear(24, CLASSES)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = rng.permutation(len(y))
        for start in range(0, len(y), 128):
            rows = order[start : start + 128]
            loss = torch.nn.functional.cross_entropy(head(torch.from_numpy(x[rows] / 100)), torch.from_numpy(y[rows]))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimiser.step()
    accuracy = (head(torch.from_numpy(test_x / 100)).argmax(1).numpy() == test_y).mean()
    assert abs(accuracy - ran.curve[2]) < 0.02  # the same but for 16-bit rounding


def test_bad_input(data: Data) -> None:
    x, y, test_x, test_y = data
    with pytest.raises(StudyError, match="two or more"):
        probe.linear_probe(x, y * 0, test_x, test_y * 0, 1)
    with pytest.raises(StudyError, match="one class"):
        probe.linear_probe(x, y * 0, test_x, test_y, CLASSES)
    with pytest.raises(StudyError, match="labels of the images that were kept"):
        probe.linear_probe(x, y[:-1], test_x, test_y, CLASSES)
    with pytest.raises(StudyError, match="test labels reach"):
        probe.linear_probe(x, y, test_x, test_y + 1, CLASSES)
    with pytest.raises(StudyError, match="not all finite"):
        probe.knn_probe(np.where(x > 0, x, np.nan), y, test_x, test_y, CLASSES)
    with pytest.raises(StudyError, match="smaller k"):
        probe.knn_probe(x, y, test_x, test_y, CLASSES, ks=(10, 10_000))
    with pytest.raises(StudyError, match="no test images"):
        probe.knn_probe(x, y, test_x[:0], test_y[:0], CLASSES)


def test_streamed_features_give_what_arrays_give(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, test_x, test_y = data
    x, test_x = x / np.abs(x).max(0), test_x / np.abs(x).max(0)
    columns = [stored(tmp_path / name, part).column(("final", "mean")) for name, part in (("a", x), ("b", test_x))]
    halves = [part.astype(np.float16).astype(np.float32) for part in (x, test_x)]
    small = probe.linear_probe(columns[0], y, columns[1], test_y, CLASSES, seeds=(0,))  # read once, then as arrays
    in_memory = probe.linear_probe(halves[0], y, halves[1], test_y, CLASSES, seeds=(0,))
    assert (small.predictions == in_memory.predictions).mean() > 0.99
    monkeypatch.setattr(probe, "CHUNK_BYTES", 4 * 24 * 150)
    streamed = probe.knn_probe(columns[0], y, columns[1], test_y, CLASSES, ks=(10,))[10]
    in_memory = probe.knn_probe(halves[0], y, halves[1], test_y, CLASSES, ks=(10,))[10]
    assert (streamed.predictions == in_memory.predictions).mean() > 0.99
    streamed = probe.linear_probe(columns[0], y, columns[1], test_y, CLASSES, seeds=(0,))
    in_memory = probe.linear_probe(halves[0], y, halves[1], test_y, CLASSES, seeds=(0,))
    assert abs(streamed.top1.mean() - in_memory.top1.mean()) < 0.02  # another order of the images


def stored(folder: Path, x: NDArray[np.float32]) -> FeatureStore:
    """A store of given vectors, made by an encoder that looks them up."""
    encoder = LookUp(x)
    return encode_images(encoder.encoder, encoder.images, [("final", "mean")], "data", folder=folder, shard_rows=100)
