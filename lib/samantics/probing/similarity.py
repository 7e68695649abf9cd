"""Do two models call the same pictures alike? Mutual nearest neighbours (Huh et al. 2024, arXiv 2405.07987).

Of the ten pictures that lie nearest to a picture in one space, which share is among its ten nearest in another? The
other space may be a model's, or something that the world knows of its pictures: colours, silhouettes, classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from samantics.data.classification import ClassificationData, Task
from samantics.data.folders import Images
from samantics.metrics.intervals import bootstrap_mean
from samantics.mojiworld.floors import colour_histograms

K = 10


def nearest(vectors: NDArray[Any], k: int = K) -> NDArray[np.bool_]:
    """`(N, N)` True where a picture is among the `k` nearest (cosine) of the row's; never itself."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    near = np.zeros(cosines.shape, bool)
    np.put_along_axis(near, np.argpartition(-cosines, k, axis=1)[:, :k], True, axis=1)
    return near


def same(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """`(N, N)` True for other pictures of the same label."""
    return (labels[:, None] == labels[None, :]) & ~np.eye(len(labels), dtype=bool)


def mutual_knn(near: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`(N,)` share of each picture's neighbours that the other relation knows too."""
    shares: NDArray[np.float64] = (near & other).sum(1) / near.sum(1)
    return shares


def null(near: NDArray[np.bool_], other: NDArray[np.bool_], draws: int = 99, seed: int = 0) -> NDArray[np.float64]:
    """`(draws,)` mean shares with the other relation's pictures permuted: what two spaces share that share nothing."""
    rng = np.random.default_rng(seed)
    rows, columns = np.nonzero(near)
    orders = (rng.permutation(len(near)) for _ in range(draws))
    return np.array([other[order[rows], order[columns]].mean() for order in orders])


def similarity_table(spaces: Mapping[str, NDArray[np.bool_]], known: Mapping[str, NDArray[np.bool_]]) -> pd.DataFrame:
    """Models' `nearest` (`spaces`) against each other's and against what else is `known` of the pictures, in percent.

    Columns: `encoder, other, value, low, high` (95 %, over pictures), `null` and `null_high` (mean and 97.5 % of
    permutations) and `p`, the share of permutations that reach the value.
    """
    rows = []
    for name, near in spaces.items():
        for other, relation in {**spaces, **known}.items():
            if other == name:
                continue
            interval, by_chance = bootstrap_mean(100 * mutual_knn(near, relation)), 100 * null(near, relation)
            p = (1 + (by_chance >= interval.value).sum()) / (1 + len(by_chance))
            floor = {"null": by_chance.mean(), "null_high": np.quantile(by_chance, 0.975), "p": p}
            rows.append({"encoder": name, "other": other, **interval._asdict(), **floor})
    return pd.DataFrame(rows)


def silhouettes(masks: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """`(N, 256)` shape of every picture's object: its mask cut to its box, at 16x16, less its mean."""
    small = []
    for mask in (np.asarray(one) > 0 for one in masks):
        ys, xs = np.nonzero(mask)
        cut = Image.fromarray(mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.float32))
        small.append(np.asarray(cut.resize((16, 16), Image.Resampling.BOX)).ravel())
    return np.stack(small) - np.mean(small, axis=1, keepdims=True)


def squares(images: Images, rows: NDArray[np.int64], side: int = 96) -> NDArray[np.uint8]:
    """`(n, side, side, 3)` RGB of the images in `rows`, squashed, whatever their size."""
    found = (Image.fromarray(np.asarray(images[int(row)])).resize((side, side)) for row in rows)
    return np.stack([np.asarray(image) for image in found])


def known_relations(data: ClassificationData, task: Task, rows: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """What is known of a task's test `rows` without any model: which are alike in colour, shape, superclass, class.

    Shape only where the data has masks, superclass only where it is another than the class.
    """
    labels = task.test.labels[rows]
    known = {"colour": nearest(colour_histograms(squares(data.splits[task.test.split], rows)))}
    if data.masks:
        known["shape"] = nearest(silhouettes([data.masks[task.test.split][int(row)] for row in rows]))
    if task.families != task.classes:
        known["superclass"] = same(np.array(task.families)[labels])
    return known | {"class": same(labels)}
