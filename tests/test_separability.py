"""Numbers of class structure: known answers, brute force, and chance for shuffled labels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import normalized_mutual_info_score, silhouette_score

from samantics.errors import StudyError
from samantics.incontext import separability

RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(6), 20)
APART = np.eye(16)[LABELS] * 8 + RNG.normal(size=(120, 16))
MIXED = RNG.normal(size=(120, 16))
POINTS = pd.DataFrame({"category_id": LABELS, "split": np.where(LABELS < 4, "base", "novel"), "artists": "test"})
SETS = separability.class_sets([0, 1, 2, 3], [4, 5])


def test_nmi_against_scikit_learn() -> None:
    mixed = np.where(RNG.random(120) < 0.5, LABELS, RNG.integers(0, 7, 120))
    for clusters in (mixed, LABELS * 3, np.zeros(120, int)):
        assert separability.nmi(LABELS, clusters) == pytest.approx(normalized_mutual_info_score(LABELS, clusters))


def test_neighbours_against_brute_force() -> None:
    references, points = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (APART, MIXED))
    predicted = separability.knn_predictions(APART, LABELS, MIXED)
    for point in range(0, 120, 7):
        cosines = references @ points[point]
        nearest = np.argsort(-cosines)[: separability.NEIGHBOURS]
        votes = np.array([cosines[nearest][LABELS[nearest] == c].sum() for c in range(6)])
        assert votes[predicted[point]] == pytest.approx(votes[np.unique(LABELS[nearest])].max())


def test_linear_predictions_are_those_of_the_normal_equations() -> None:
    points = RNG.normal(size=(50, 16))
    mean, deviation = MIXED.mean(0), MIXED.std(0)
    x, targets = (MIXED - mean) / deviation, np.where(LABELS[:, None] == np.arange(6), 1.0, -1.0)
    weights = np.linalg.solve(x.T @ x + len(x) * np.eye(16), x.T @ (targets - targets.mean(0)))
    scores = (points - mean) / deviation @ weights + targets.mean(0)
    assert (separability.linear_predictions(MIXED, LABELS, points) == scores.argmax(1)).mean() > 0.95


def test_base_classes_come_in_sets_of_as_many_as_are_novel() -> None:
    assert SETS == [(4, 5), (0, 2), (1, 3)]
    assert [len(one) for one in separability.class_sets(range(60), range(60, 80))] == [20, 20, 20, 20]
    assert separability.class_sets([1, 2], [3, 4, 5]) == [(3, 4, 5), (1, 2)]


def test_classes_that_are_apart_are_recognised_and_mixed_ones_as_shuffled() -> None:
    again = np.eye(16)[LABELS] * 8 + RNG.normal(size=(120, 16))
    spaces = {"after": (APART, again), "before": (MIXED, again)}
    outcomes = separability.recognised(spaces, POINTS, POINTS, SETS)
    assert len(outcomes) == 2 * 2 * 120 and set(outcomes["point"]) == set(range(120))
    table = separability.summary(outcomes, spaces).set_index(["stage", "split", "metric"])
    assert len(table) == 2 * 2 * 4
    for side in ("base", "novel"):
        for probe in ("knn", "linear"):
            good, mixed = table.loc[("after", side, probe)], table.loc[("before", side, probe)]
            assert good["value"] > 0.99 and good["low"] <= good["value"] <= good["high"]
            assert mixed["value"] < 0.9 and abs(good["shuffled"] - 0.5) < 0.3
        assert table.loc[("after", side, "silhouette"), "value"] > 0.5
    base = LABELS < 4
    expected = silhouette_score(again[base], LABELS[base], metric="cosine")
    assert table.loc[("after", "base", "silhouette"), "value"] == pytest.approx(expected, abs=1e-6)
    gains = separability.class_gains(outcomes, "knn", "base")
    assert list(gains.index) == [0, 1, 2, 3] and gains.mean() > 10


def test_tsne_keeps_classes_together() -> None:
    placed = separability.tsne_map(APART, perplexity=20)
    assert placed.shape == (120, 2) and silhouette_score(placed, LABELS) > 0.5
    with pytest.raises(StudyError, match="perplexity"):
        separability.tsne_map(APART[:20], perplexity=20)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(StudyError, match="not finite"):
        separability.recognised({"x": (np.full((120, 4), np.nan), MIXED)}, POINTS, POINTS, SETS)
    with pytest.raises(StudyError, match="two classes"):
        separability.recognised({"x": (MIXED, MIXED)}, POINTS, POINTS, [(4,)])
