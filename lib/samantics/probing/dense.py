"""The dense pair: what one linear readout of every token knows of *what* is there, and of *where* it ends.

Two questions with the same head, the same tokens and exact masks, on scenes: the class of every pixel (which meaning
should win) and the boundaries of objects (which mask training should win).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from samantics.metrics.intervals import bootstrap_statistic
from samantics.models.encoder import Encoder
from samantics.mojiworld import catalogue
from samantics.mojiworld.rendered import Pictures, stored_pictures
from samantics.mojiworld.world import STREAMS, World
from samantics.run import on_all_cores

GRID = 12  # tokens along a side, for every encoder
CELLS = 4  # along a token's side: a boundary is looked for in each
BINS = 200  # of boundary scores, for average precision
EPOCHS, BATCH, RATE = 15, 512, 3e-3


class Scenes(NamedTuple):
    """Scenes with what every pixel shows."""

    images: NDArray[np.uint8]  # (N, S, S, 3) RGB
    labels: dict[str, NDArray[np.int64]]  # (N, S, S) by level (class, superclass): 0 is background
    edges: NDArray[np.bool_]  # (N, 48, 48): does the outline of an object's visible part pass the cell?


def scenes(world: World, stream: str, count: int) -> Scenes:
    """Scenes of the instance classes: `references` to learn from, `targets` to be asked."""
    pictures = stored_pictures(world, STREAMS[stream], count)
    number = 1 + pd.Index(catalogue.instance_classes()["class"]).get_indexer(catalogue.classes())  # 0: none of them
    labels = {
        "class": _painted(pictures, number[catalogue.class_of_drawing()]),
        "superclass": _painted(pictures, catalogue.superclass_of_drawing() + 1),
    }
    return Scenes(np.asarray(pictures.images), labels, outlines(np.asarray(pictures.instances), GRID * CELLS))


def _painted(pictures: Pictures, label_of_drawing: NDArray[np.int64]) -> NDArray[np.int64]:
    """`(N, S, S)` the label of what each pixel shows, 0 for the ground."""
    table = np.where(pictures.drawings >= 0, label_of_drawing[pictures.drawings], 0)
    table = np.concatenate([np.zeros((len(table), 1), np.int64), table], axis=1)
    painted = np.take_along_axis(table, pictures.instances.reshape(len(table), -1).astype(int), 1)
    return painted.reshape(pictures.instances.shape)


def outlines(instances: NDArray[np.uint8], cells: int) -> NDArray[np.bool_]:
    """`(N, cells, cells)` bool: does a cell hold neighbouring pixels of different objects (or ground)?"""
    edge = np.zeros(instances.shape, bool)
    edge[:, :, :-1] |= instances[:, :, :-1] != instances[:, :, 1:]
    edge[:, :-1] |= instances[:, :-1] != instances[:, 1:]
    side = instances.shape[1] // cells
    return edge.reshape(len(edge), cells, side, cells, side).max((2, 4))


@torch.no_grad()
def token_maps(encoder: Encoder, images: NDArray[np.uint8]) -> Tensor:
    """`(N, 144, C)` tokens of the last layer, averaged or interpolated to a grid of 12x12."""
    maps = []
    for start in range(0, len(images), 32):
        pixels = encoder.inputs([Image.fromarray(image) for image in images[start : start + 32]])
        dense = encoder.encode(pixels)["final"].dense
        if dense.shape[-1] < GRID:
            dense = F.interpolate(dense, (GRID, GRID), mode="bilinear", align_corners=False)
        maps.append(F.adaptive_avg_pool2d(dense, GRID).flatten(2).mT.cpu())
    return torch.cat(maps)


def shares(labels: NDArray[np.int64], count: int) -> Tensor:
    """`(N * 144, count)` share of each label among a token's pixels."""
    size, side = len(labels), labels.shape[1] // GRID
    token = np.arange(size * GRID**2).reshape(size, GRID, 1, GRID, 1)
    codes = token * count + labels.reshape(size, GRID, side, GRID, side)
    counted = np.bincount(codes.ravel(), minlength=size * GRID**2 * count).reshape(-1, count)
    return torch.from_numpy((counted / side**2).astype(np.float32))


def cells(edges: NDArray[np.bool_]) -> Tensor:
    """`(N * 144, 16)` of `(N, 48, 48)`: the cells of each token."""
    parts = edges.reshape(len(edges), GRID, CELLS, GRID, CELLS).transpose(0, 1, 3, 2, 4)
    return torch.from_numpy(parts.reshape(-1, CELLS**2).astype(np.float32))


def linear_readouts(tokens: Tensor, labels: Sequence[Tensor], edges: Tensor, asked: Tensor) -> tuple[Tensor, ...]:
    """One linear layer for each question, on standardised tokens, by Adam with cosine decay; alike for all encoders.

    Of `(M, C)` tokens they learn `labels`, at each level `(M, K)` shares of K labels in a token, and `(M, 16)` `edges`:
    does an outline pass each cell? Returned are the layers' logits for the `(..., C)` tokens that are `asked`.
    """
    mean, std = tokens.mean(0), tokens.std(0).clamp(min=1e-6)
    inputs, widths = (tokens - mean) / std, [part.shape[1] for part in (*labels, edges)]
    layer = nn.utils.skip_init(nn.Linear, tokens.shape[1], sum(widths))
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimiser = torch.optim.Adam(layer.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs), generator=generator).split(BATCH):
            *of_labels, of_edges = layer(inputs[batch]).split(widths, 1)
            loss = F.binary_cross_entropy_with_logits(of_edges, edges[batch])
            for logits, shares_of in zip(of_labels, labels, strict=True):
                loss = loss + F.cross_entropy(logits, shares_of[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    with torch.no_grad():
        return tuple(layer((asked - mean) / std).split(widths, -1))


def overlaps(logits: Tensor, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """`(N, 2, K)` intersection and union, pixels, of every label in every scene; logits `(N, 144, K)`."""
    count, found = logits.shape[-1], []
    for its, true in zip(logits, labels, strict=True):
        coarse = its.T.unflatten(1, (GRID, GRID))[None]
        called = F.interpolate(coarse, true.shape, mode="bilinear", align_corners=False)[0].argmax(0).numpy()
        right = np.bincount(true[true == called], minlength=count)
        seen, said = (np.bincount(of.ravel(), minlength=count) for of in (true, called))
        found.append(np.stack([right, seen + said - right]))
    return np.stack(found).astype(float)


def mean_iou(counts: NDArray[np.float64]) -> float:
    """Percent, over the labels but the ground (0) that any scene shows or names; `(N, 2, K)` of `overlaps`."""
    right, union = counts.sum(0)[:, 1:]
    return float(100 * (right[union > 0] / union[union > 0]).mean())


def score_counts(logits: Tensor, truth: Tensor) -> NDArray[np.float64]:
    """`(N, 2, BINS)` cells without and with a boundary at each score, highest first; logits `(N, 144, 16)`."""
    bins = BINS - 1 - (logits.sigmoid() * BINS).long().clamp(max=BINS - 1)
    codes = bins.flatten(1) + BINS * truth.view_as(logits).long().flatten(1)
    return np.stack([np.bincount(row, minlength=2 * BINS).reshape(2, BINS) for row in codes.numpy()]).astype(float)


def average_precision(counts: NDArray[np.float64]) -> float:
    """Percent: precision averaged over recall, over all cells; `(N, 2, BINS)` of `score_counts`."""
    wrong, right = counts.sum(0)
    precision = np.cumsum(right) / np.maximum(np.cumsum(right + wrong), 1)
    return float(100 * (precision * right).sum() / right.sum())


def dense_rows(encoder: Encoder, train: Scenes, test: Scenes) -> list[dict[str, Any]]:
    """Both questions for one encoder: `encoder, task, metric, value, low, high, seeds`; 95 % over scenes."""
    counts = {level: 1 + int(max(part.labels[level].max() for part in (train, test))) for level in train.labels}
    targets = [shares(train.labels[level], count) for level, count in counts.items()]
    inputs, asked = (token_maps(encoder, part.images) for part in (train, test))
    *of_labels, of_edges = linear_readouts(inputs.flatten(0, 1), targets, cells(train.edges), asked)

    def row(task: str, metric: str, statistic: Callable[[Any], float], found: NDArray[np.float64]) -> dict[str, Any]:
        interval = bootstrap_statistic(lambda scenes: statistic(found[scenes]), len(found))
        return {"encoder": encoder.name, "task": task, "metric": metric, **interval._asdict(), "seeds": 1}

    rows = [
        row("semantic", f"mIoU, {level}", mean_iou, overlaps(logits, test.labels[level]))
        for level, logits in zip(train.labels, of_labels, strict=True)
    ]
    scores = score_counts(of_edges, cells(test.edges))
    return [*rows, row("boundary", "average precision", average_precision, scores)]


def dense_table(encoders: Sequence[Encoder], train: Scenes, test: Scenes) -> pd.DataFrame:
    """`dense_rows` of all encoders."""
    found = on_all_cores(dense_rows, [(encoder, train, test) for encoder in encoders])
    return pd.DataFrame(itertools.chain(*found))
