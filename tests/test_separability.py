"""Numbers of class structure: known answers, brute force, and chance for shuffled labels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import pdist
from sklearn.metrics import normalized_mutual_info_score, silhouette_score
from sklearn.model_selection import GroupKFold

from samantics.errors import StudyError
from samantics.incontext.separability import (
    METRICS,
    class_structure,
    knn_predictions,
    linear_predictions,
    nmi,
    separability,
    tsne_maps,
)

RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(4), 30)
GROUPS = np.arange(120) // 2
APART = np.eye(16)[LABELS] * 8 + RNG.normal(size=(120, 16))
MIXED = RNG.normal(size=(120, 16))


def test_classes_that_are_apart_score_high_and_mixed_ones_as_shuffled() -> None:
    apart = separability(APART, LABELS, GROUPS).set_index("metric")
    mixed = separability(MIXED, LABELS, GROUPS).set_index("metric")
    assert tuple(apart.index) == METRICS
    assert (apart["value"] > [0.5, 0.99, 0.99, 0.99]).all()
    assert (apart["shuffled"] < [0.05, 0.45, 0.15, 0.45]).all()
    assert (abs(mixed["value"] - mixed["shuffled"]) < [0.05, 0.15, 0.1, 0.15]).all()
    for table in (apart, mixed):
        assert (table["low"] <= table["value"]).all()
        assert (table["value"] <= table["high"]).all()
        assert np.isfinite(table.to_numpy()).all()
    assert apart.loc["silhouette", "value"] == pytest.approx(silhouette_score(APART, LABELS, metric="cosine"), abs=1e-6)


def test_nmi_against_scikit_learn() -> None:
    mixed = np.where(RNG.random(120) < 0.5, LABELS, RNG.integers(0, 7, 120))
    for clusters in (mixed, LABELS * 3, np.zeros(120, int)):
        assert nmi(LABELS, clusters) == pytest.approx(normalized_mutual_info_score(LABELS, clusters))


def test_neighbours_against_brute_force() -> None:
    directions = MIXED / np.linalg.norm(MIXED, axis=1, keepdims=True)
    predicted = knn_predictions(directions, LABELS, GROUPS, neighbours=3)
    for point in range(0, 120, 7):
        others = [other for other in range(120) if GROUPS[other] != GROUPS[point]]
        nearest = sorted(others, key=lambda other: -float(directions[point] @ directions[other]))[:3]
        votes = np.zeros(4)
        for other in nearest:
            votes[LABELS[other]] += max(0.0, float(directions[point] @ directions[other]))
        assert predicted[point] == votes.argmax()


def test_linear_predictions_are_those_of_the_normal_equations() -> None:
    predicted = linear_predictions(MIXED, LABELS, GROUPS)
    targets = np.where(LABELS[:, None] == np.arange(4), 1.0, -1.0)
    for train, test in GroupKFold(5).split(MIXED, LABELS, GROUPS):
        mean, deviation = MIXED[train].mean(0), MIXED[train].std(0)
        x, wanted = (MIXED[train] - mean) / deviation, targets[train] - targets[train].mean(0)
        weights = np.linalg.solve(x.T @ x + len(train) * np.eye(x.shape[1]), x.T @ wanted)
        scores = (MIXED[test] - mean) / deviation @ weights + targets[train].mean(0)
        assert (predicted[test] == scores.argmax(1)).mean() > 0.95


def test_a_group_never_recognises_its_own_members() -> None:
    # each pair of a group is alike and like nothing else, so remembering would be right every time
    pairs = np.repeat(RNG.normal(size=(60, 16)), 2, axis=0)
    labels = RNG.permutation(np.repeat(np.arange(4), 15)).repeat(2)
    directions = pairs / np.linalg.norm(pairs, axis=1, keepdims=True)
    assert (knn_predictions(directions, labels, np.arange(120), neighbours=1) == labels).mean() > 0.99
    assert (knn_predictions(directions, labels, GROUPS) == labels).mean() < 0.5
    assert (linear_predictions(directions, labels, GROUPS) == labels).mean() < 0.5


def test_tables_of_spaces_and_tsne_maps() -> None:
    points = pd.DataFrame({"category_id": LABELS, "group": GROUPS, "split": np.where(LABELS < 2, "base", "novel")})
    table = class_structure({"apart": APART, "mixed": MIXED}, points).set_index(["stage", "split", "metric"])
    assert len(table) == 2 * 2 * len(METRICS)
    alone = separability(MIXED[LABELS < 2], LABELS[LABELS < 2], GROUPS[LABELS < 2]).set_index("metric")
    assert table.loc[("mixed", "base", "linear"), "value"] == pytest.approx(alone.loc["linear", "value"])
    maps = tsne_maps({"apart": APART}, points, [(20, 1), (20, 2)])
    assert list(maps.columns) == ["stage", "perplexity", "seed", "x", "y", "category_id", "split"]
    first, other = (maps.loc[maps["seed"] == seed, ["x", "y"]].to_numpy() for seed in (1, 2))
    assert silhouette_score(first, LABELS) > 0.5 and not np.allclose(first, other)
    again = tsne_maps({"apart": APART}, points, [(20, 1)])[["x", "y"]]  # alike; rounding grows in its many steps
    assert np.corrcoef(pdist(first), pdist(again))[0, 1] > 0.9
    with pytest.raises(StudyError, match="perplexity"):
        tsne_maps({"apart": APART[:20]}, points[:20], [(20, 0)])


@pytest.mark.parametrize(
    ("points", "labels", "groups", "message"),
    [
        (MIXED, np.zeros(120, int), GROUPS, "two classes"),
        (MIXED, np.where(np.arange(120) == 5, 9, LABELS), GROUPS, "two classes"),
        (MIXED, LABELS, np.zeros(120, int), "groups"),
        (np.full((120, 4), np.nan), LABELS, GROUPS, "not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    points: np.ndarray, labels: np.ndarray, groups: np.ndarray, message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        separability(points, labels, groups)
