"""How well classes keep apart in a space of features: four numbers, each against the same number for shuffled labels.

A point is one object. Points of one *group* show the same thing (another rendering of the drawing, another object of
the photograph): a group never serves to recognise its own members, else a number would reward remembering.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import entr
from sklearn.cluster import KMeans
from sklearn.linear_model import RidgeClassifier
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from tqdm.auto import tqdm

from samantics.errors import StudyError
from samantics.metrics.intervals import Interval, bootstrap_mean, bootstrap_statistic

METRICS = ("silhouette", "knn", "nmi", "linear")
NEIGHBOURS = 5
FOLDS = 5
SHUFFLES = 5

Points = NDArray[np.floating]
Labels = NDArray[np.int64]


def separability(points: Points, labels: Labels, groups: Labels, seed: int = 0) -> pd.DataFrame:
    """Four numbers of `(n, d)` points with `(n,)` labels and groups.

    - `silhouette`: mean cosine silhouette, -1 to 1 (Rousseeuw 1987).
    - `knn`: share of points whose 5 nearest by cosine, of other groups, vote for their class.
    - `nmi`: normalised mutual information of labels and as many k-means clusters of the directions, 0 to 1.
    - `linear`: share of points that a ridge classifier names right, in 5-fold cross-validation over groups.

    Returns:
        Columns `metric, value, low, high, shuffled`: low and high are the 95 % bootstrap interval over points,
        `shuffled` is the mean for five shuffles of the labels.

    Raises:
        StudyError: too few classes, points of a class or groups; a number that is not finite.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.min() < 2:
        raise StudyError("separability needs two classes or more with two objects each: add objects")
    if len(np.unique(groups)) < FOLDS:
        raise StudyError(f"separability needs {FOLDS} groups or more: add drawings or images")
    if not np.isfinite(points).all():
        raise StudyError("separability was given features that are not finite: compute them again with --fresh")
    directions = normalize(np.asarray(points, np.float64))
    clusters = KMeans(len(classes), n_init=4, random_state=seed).fit_predict(directions)
    rng = np.random.default_rng(seed)
    shuffles = [rng.permutation(labels) for _ in range(SHUFFLES)]
    rows = []
    for metric in METRICS:
        found = _measured(metric, directions, clusters, labels, groups, seed)
        floors = [_measured(metric, directions, clusters, s, groups, seed, samples=1).value for s in shuffles]
        rows.append({"metric": metric, **found._asdict(), "shuffled": float(np.mean(floors))})
    return pd.DataFrame(rows)


def _measured(
    metric: str, directions: Points, clusters: Labels, labels: Labels, groups: Labels, seed: int, samples: int = 1000
) -> Interval:
    if metric == "nmi":
        found = bootstrap_statistic(lambda rows: nmi(labels[rows], clusters[rows]), len(labels), seed, samples)
        shift = found.value - (found.low + found.high) / 2  # repeated points make NMI, and it alone, larger
        return Interval(found.value, max(0.0, found.low + shift), min(1.0, found.high + shift))
    if metric == "silhouette":
        return bootstrap_mean(silhouette_samples(directions, labels, metric="cosine"), seed, samples)
    predictions = knn_predictions if metric == "knn" else linear_predictions
    return bootstrap_mean(predictions(directions, labels, groups) == labels, seed, samples)


def nmi(labels: Labels, clusters: Labels) -> float:
    """Normalised mutual information (arithmetic mean), 0 to 1; thirty times as fast as scikit-learn's."""
    _, rows = np.unique(labels, return_inverse=True)
    _, columns = np.unique(clusters, return_inverse=True)
    shape = (rows.max() + 1, columns.max() + 1)
    joint = np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape) / len(labels)
    single, both = entr(joint.sum(0)).sum() + entr(joint.sum(1)).sum(), entr(joint).sum()
    return float(2 * (single - both) / single) if single > 0 else 1.0


def knn_predictions(directions: Points, labels: Labels, groups: Labels, neighbours: int = NEIGHBOURS) -> Labels:
    """`(n,)` class with the largest summed cosine among each point's nearest neighbours of other groups."""
    cosines = directions @ directions.T
    cosines[groups[:, None] == groups[None, :]] = -np.inf
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :neighbours]
    weight = np.take_along_axis(cosines, nearest, axis=1).clip(min=0)  # a group may leave fewer neighbours than asked
    classes = np.unique(labels)
    votes = np.stack([(weight * (labels[nearest] == c)).sum(axis=1) for c in classes], axis=1)
    return classes[votes.argmax(axis=1)]


def linear_predictions(points: Points, labels: Labels, groups: Labels) -> Labels:
    """`(n,)` class of each point by ridge regression onto classes, fitted to the folds without its group."""
    predicted = np.empty_like(labels)
    for train, test in GroupKFold(FOLDS).split(points, labels, groups):
        model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=len(train)))
        predicted[test] = model.fit(points[train], labels[train]).predict(points[test])
    return predicted


def class_structure(spaces: Mapping[str, Points], points: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`separability` of base and of novel points in each space: `stage, split, metric, value, low, high, shuffled`.

    `spaces` are `(n, d)` features by stage, of n `points` with `category_id`, `group` and `split`.
    """
    tables = []
    for (stage, features), (name, part) in itertools.product(spaces.items(), points.groupby("split")):
        groups = pd.factorize(part["group"])[0]
        table = separability(features[part.index], part["category_id"].to_numpy(), groups, seed)
        tables.append(pd.DataFrame({"stage": stage, "split": name}, table.index).join(table))
    return pd.concat(tables, ignore_index=True)


def tsne_maps(spaces: Mapping[str, Points], points: pd.DataFrame, settings: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """t-SNE by cosine distance (van der Maaten and Hinton 2008) of each space at each (perplexity, seed).

    Columns `stage, perplexity, seed, x, y, category_id, split`; arguments as in `class_structure`.
    """
    parts = []
    for (stage, features), (perplexity, seed) in tqdm([*itertools.product(spaces.items(), settings)], desc="t-SNE"):
        if perplexity >= len(points):
            raise StudyError(f"t-SNE of {len(points)} points needs a perplexity below that, not {perplexity}: lower it")
        tsne = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed)
        placed = tsne.fit_transform(np.asarray(features, np.float32))
        head = {"stage": stage, "perplexity": perplexity, "seed": seed, "x": placed[:, 0], "y": placed[:, 1]}
        parts.append(pd.DataFrame(head).join(points[["category_id", "split"]]))
    return pd.concat(parts, ignore_index=True)
