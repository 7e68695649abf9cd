"""Do two models call the same pictures alike? Mutual nearest neighbours (Huh et al. 2024, arXiv 2405.07987).

Of the ten pictures that lie nearest to a picture in one space, which share is among its ten nearest in another? The
other space may be a model's, or something that the world knows of its pictures: colours, silhouettes, classes.
Instruments that have learned nothing (`INSTRUMENTS`) are the floors that every number on MojiWorld stands beside.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from samantics.data.classification import ClassificationData, Task
from samantics.data.folders import Images
from samantics.metrics.intervals import bootstrap_mean
from samantics.mojiworld.world import RGB

K, DRAWS = 10, 99  # neighbours; permutations


def nearest(vectors: NDArray[Any]) -> NDArray[np.bool_]:
    """`(N, N)` True where a picture is among the `K` nearest (cosine) of the row's; never itself."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    near, k = np.zeros(cosines.shape, bool), min(K, len(unit) - 1)
    np.put_along_axis(near, np.argpartition(-cosines, k, axis=1)[:, :k], True, axis=1)
    return near


def same(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """`(N, N)` True for other pictures of the same label."""
    return (labels[:, None] == labels[None, :]) & ~np.eye(len(labels), dtype=bool)


def mutual_knn(near: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`(N,)` share of each picture's neighbours that the other relation knows too."""
    return (near & other).sum(1) / near.sum(1)


def null(near: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`(DRAWS,)` mean shares with the other relation's pictures permuted: what two spaces share that share nothing."""
    rng, (rows, columns) = np.random.default_rng(0), np.nonzero(near)
    orders = (rng.permutation(len(near)) for _ in range(DRAWS))
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


# what has learned nothing: `(N, S, S, 3)` pictures to vectors


def small_pixels(images: RGB) -> NDArray[np.float32]:
    """`(N, 768)` of length 1: the pictures at 16x16 pixels, less their mean colour."""
    small = [np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BOX), np.float32) for i in images]
    return _unit((np.stack(small) - np.mean(small, (1, 2), keepdims=True)).reshape(len(images), -1))


def colour_histograms(images: RGB) -> NDArray[np.float32]:
    """`(N, 216)` of length 1: square roots of the shares of 6x6x6 colours, so that cosines are Hellinger's."""
    codes = [((image // 43) * np.array([36, 6, 1], np.uint8)).sum(-1, dtype=np.uint8).ravel() for image in images]
    return _unit(np.sqrt(np.stack([np.bincount(code, minlength=216) for code in codes])))


@torch.no_grad()
def untrained_features(images: RGB) -> NDArray[np.float32]:
    """`(N, 128)` of length 1: the mean of the pictures after four random convolutions of stride 2."""
    generator, layers = torch.Generator().manual_seed(0), []
    for channels, width in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layer = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        layers += [layer, nn.GroupNorm(1, width), nn.GELU()]
    network, parts = nn.Sequential(*layers), np.array_split(images, -(-len(images) // 128))
    maps = [network((torch.tensor(part).permute(0, 3, 1, 2).float() - 128) / 64) for part in parts]
    return _unit(torch.cat(maps).mean((2, 3)).numpy())


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-8)).astype(np.float32)


INSTRUMENTS = {"pixels": small_pixels, "colour histogram": colour_histograms, "untrained network": untrained_features}


def silhouettes(masks: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """`(N, 256)` shape of every picture's object: its mask cut to its box, at 16x16, less its mean."""
    small = []
    for mask in (np.asarray(one) > 0 for one in masks):
        ys, xs = np.nonzero(mask)
        cut = Image.fromarray(mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.float32))
        small.append(np.asarray(cut.resize((16, 16), Image.Resampling.BOX)).ravel())
    return np.stack(small) - np.mean(small, axis=1, keepdims=True)


def squares(images: Images, rows: NDArray[np.int64]) -> RGB:
    """`(n, 96, 96, 3)` RGB of the images in `rows`, squashed, whatever their size."""
    return np.stack([np.asarray(Image.fromarray(np.asarray(images[int(row)])).resize((96, 96))) for row in rows])


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
