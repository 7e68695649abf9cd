"""The nearest-neighbour probe: the most similar train images vote on the class; there is nothing to train."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from samantics.errors import StudyError
from samantics.probing.linear import Features, Labels, ProbeResult, batches, checked, scored

TEMPERATURE = 0.07  # votes weigh exp(cosine / temperature), as DINOv2's


def knn_probe(
    train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, classes: int, k: int = 10
) -> ProbeResult:
    """The `k` nearest neighbours by cosine vote on the class, nearer ones with more weight.

    Args:
        train_x, test_x: `(N, C)` features.
        train_y, test_y: `(N,)` class labels from 0.
        classes: number of classes.
        k: neighbours that vote.

    Raises:
        StudyError: as `linear_probe`; fewer train images than `k`.
    """
    train_x, test_x = checked(train_x, train_y, classes, "train"), checked(test_x, test_y, classes, "test")
    if k > len(train_y):
        raise StudyError(f"k is {k}, but there are {len(train_y)} train images: choose a smaller k")
    ranked = np.empty((len(test_y), min(5, classes)), np.int64)
    for rows, vectors in batches(test_x, 16384):
        near, cosines = _neighbours(train_x, normalize(vectors, dim=1), k)
        labels, weights = torch.from_numpy(train_y.astype(np.int64))[near], (cosines / TEMPERATURE).softmax(dim=1)
        votes = torch.zeros(len(labels), classes, dtype=torch.float64).scatter_add_(1, labels, weights.double())
        ranked[rows] = votes.topk(ranked.shape[1], dim=1).indices.numpy()
    return scored(ranked, test_y)


def _neighbours(train_x: Features, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows `(n, k)` of the nearest train features and their cosines, nearest first."""
    rows, cosines = torch.zeros(len(queries), 0, dtype=torch.int64), torch.zeros(len(queries), 0)
    for numbers, vectors in batches(train_x, 8192):
        found = torch.cat([cosines, queries @ normalize(vectors, dim=1).T], dim=1)
        cosines, order = found.topk(min(k, found.shape[1]), dim=1)
        rows = torch.cat([rows, torch.from_numpy(numbers).expand(len(queries), -1)], dim=1).gather(1, order)
    return rows, cosines
