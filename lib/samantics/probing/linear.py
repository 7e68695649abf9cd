"""The linear probe: how much of a class can one linear layer read off frozen features?

`linear_probe` is the sound version: learning rate and epochs are chosen on a held-out part of train, and training goes
on until more epochs do not help. `protocol.paper_probe` is the paper's. Features are arrays in memory or a `Column` of
a store, which is streamed: memory does not grow with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samantics.errors import StudyError
from samantics.probing.features import Column

Features = NDArray[Any] | Column  # (N, C)
Labels = NDArray[Any]  # (N,) integers from 0

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT = 0.2
BATCH = 128
MOMENTUM = 0.9  # as DINOv2's linear evaluation
CHUNK_BYTES = 192 << 20  # float32 features in memory at a time


class ProbeResult(NamedTuple):
    """The answers of a probe for every test image, and how it was trained; what was not chosen is NaN."""

    predictions: NDArray[np.int64]  # (seeds, n) the best class
    top1: NDArray[np.bool_]  # (seeds, n) is it the true one?
    top5: NDArray[np.bool_]  # (seeds, n) is the true one among the best five?
    learning_rates: NDArray[Any]  # (seeds,) as chosen
    epochs: NDArray[Any]  # (seeds,)
    held_out: NDArray[Any]  # (seeds,) accuracy on the held-out part of train, which chose them
    converged: NDArray[Any]  # (seeds,) had more epochs stopped helping?


def scored(ranked: NDArray[np.int64], labels: Labels, choice: Sequence[float] = (np.nan,) * 4) -> ProbeResult:
    """The result of one seed, from the `(n, 5)` best classes of every test image (best first) and what was chosen."""
    right = ranked == labels[:, None]
    return ProbeResult(ranked[None, :, 0], right[None, :, 0], right.any(1)[None], *(np.array([one]) for one in choice))


def joined(results: Sequence[ProbeResult]) -> ProbeResult:
    """Probes of one seed each as one result of many seeds."""
    return ProbeResult(*(np.concatenate(parts) for parts in zip(*results, strict=True)))


def linear_probe(
    train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, classes: int,
    seeds: Sequence[int] = (0, 1, 2), rates: Sequence[float] = RATES, standardise: bool = True,
    groups: Labels | None = None, epochs: int = 15, max_epochs: int = 120,
) -> ProbeResult:  # fmt: skip
    """A linear classifier by SGD with momentum and cosine decay, all its choices made on a held-out part of train.

    All learning rates are trained side by side in one pass over the features. Then the best and its neighbours are
    trained twice as long, and again, until that no longer helps on the held-out part (by half a standard error). Last,
    one layer is trained on all of train with what was chosen. Test data are looked at once, by that layer.

    Args:
        train_x, test_x: `(N, C)` features.
        train_y, test_y: `(N,)` class labels from 0.
        classes: number of classes.
        seeds: one probe each: of the held-out part and of the order of the images.
        rates: learning rates in rising order; with a single one nothing is held out or chosen.
        standardise: bring every feature to mean 0 and standard deviation 1 (of train).
        groups: `(N,)` what is held out together (an artist, where test images are by other artists).
        epochs, max_epochs: of the first and at most of the last training.

    Raises:
        StudyError: one class only, labels that do not fit the features, features that are not finite, or too few images
            of every class to hold some out.
    """
    train_x, test_x = checked(train_x, train_y, classes, "train"), checked(test_x, test_y, classes, "test")
    everything, results = np.ones(len(train_y), bool), []
    for seed in seeds:
        choice: tuple[float, int, float, bool] = (rates[0], max_epochs, np.nan, False)
        if len(rates) > 1:
            held = held_out_rows(train_y, seed, groups)
            choice = _choose(train_x, train_y, held, rates, epochs, max_epochs, seed, classes, standardise)
        layer = train_heads(train_x, train_y, everything, choice[:1], choice[1], seed, classes, standardise)
        results.append(scored(layer.ranked(test_x)[:, 0], test_y, choice))
    return joined(results)


def held_out_rows(labels: Labels, seed: int, groups: Labels | None = None) -> NDArray[np.bool_]:
    """`(N,)` True for about a fifth of every class, or of all groups where given: at least one, and never all."""
    rng = np.random.default_rng(seed)
    units = np.arange(len(labels)) if groups is None else groups
    held: list[Any] = []
    for members in [units[labels == label] for label in np.unique(labels)] if groups is None else [np.unique(units)]:
        held += rng.permutation(members)[: min(len(members) - 1, max(1, round(HELD_OUT * len(members))))].tolist()
    if not held:
        raise StudyError("no class has two train images (or groups), so none can be held out: give one learning rate")
    return np.isin(units, held)


def few_shot_rows(labels: Labels, shots: int, seed: int) -> NDArray[np.int64]:
    """`(classes * shots,)` rows: `shots` random ones of every class, which must have as many."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(np.concatenate([rng.choice(rows, shots, replace=False) for rows in members]))


def _choose(
    x: Features, y: Labels, held: NDArray[np.bool_], rates: Sequence[float], epochs: int, max_epochs: int, seed: int,
    classes: int, standardise: bool,
) -> tuple[float, int, float, bool]:  # fmt: skip
    """Learning rate, epochs, held-out accuracy, and whether more epochs had stopped helping."""
    best = (rates[0], epochs, -1.0)
    while True:
        layers = train_heads(x, y, ~held, rates, epochs, seed, classes, standardise)
        accuracy = (layers.ranked(x, held)[:, :, 0] == y[held][:, None]).mean(axis=0)
        winner = int(accuracy.argmax())
        error = float(np.sqrt(accuracy[winner] * (1 - accuracy[winner]) / held.sum()))
        gain = accuracy[winner] - best[2]
        if gain > 0:
            best = (rates[winner], epochs, float(accuracy[winner]))
        if gain <= error / 2 or 2 * epochs > max_epochs:
            return *best, bool(gain <= error / 2)
        rates = rates[max(0, winner - 1) : winner + 2]
        epochs *= 2


# ----------------------------------------------------------------------------------- many layers trained side by side


class Heads(NamedTuple):
    """`R` linear layers side by side: `(C + 1, R, K)` weights, the bias last; a feature becomes (x - mean) * scale."""

    weights: Tensor
    mean: Tensor
    scale: Tensor

    def prepare(self, x: Tensor) -> Tensor:
        """`(n, C + 1)`."""
        return torch.cat([(x - self.mean) * self.scale, x.new_ones(len(x), 1)], dim=1)

    def logits(self, prepared: Tensor) -> Tensor:
        """`(n, R, K)`."""
        return (prepared @ self.weights.flatten(1)).unflatten(1, self.weights.shape[1:])

    def excess(self, prepared: Tensor, labels: Tensor) -> Tensor:
        """`(n, R, K)` softmax minus one-hot: the cross-entropy's gradient at the logits, as autograd would give."""
        excess = self.logits(prepared).softmax(dim=2)
        where = labels[:, None, None].expand(-1, excess.shape[1], 1)
        return excess.scatter_add_(2, where, excess.new_full(where.shape, -1.0))

    def ranked(self, x: Features, use: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """`(n, R, 5)` best classes of every layer for the rows in `use`, best first (fewer of fewer classes)."""
        best = np.empty((len(x), self.weights.shape[1], min(5, self.weights.shape[2])), np.int32)
        for rows, vectors in batches(x, 512, use):
            best[rows] = self.logits(self.prepare(vectors)).topk(best.shape[2]).indices.numpy()
        return (best if use is None else best[use]).astype(np.int64)


def train_heads(
    x: Features, y: Labels, use: NDArray[np.bool_], rates: Sequence[float], epochs: int, seed: int, classes: int,
    standardise: bool,
) -> Heads:  # fmt: skip
    """One layer for each learning rate, all from zero and from the same batches of the rows in `use`."""
    mean, scale = _moments(x, use) if standardise else (np.zeros(x.shape[1]), np.ones(x.shape[1]))
    weights = torch.zeros(x.shape[1] + 1, len(rates), classes)
    heads = Heads(weights, torch.from_numpy(mean).float(), torch.from_numpy(scale).float())
    speed, rate = torch.zeros_like(weights), torch.tensor(list(rates))[:, None]
    steps, step = epochs * max(1, int(use.sum()) / BATCH), 0
    rng, labels = np.random.default_rng(seed), torch.from_numpy(y.astype(np.int64))
    with tiny_numbers_as_zero():
        for _ in range(epochs):
            for rows, vectors in batches(x, BATCH, use, rng):
                decay = 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps)))
                prepared = heads.prepare(vectors)
                excess = heads.excess(prepared, labels[rows]).flatten(1)
                speed.flatten(1).addmm_(
                    prepared.T, excess, beta=MOMENTUM, alpha=1 / len(rows)
                )  # plus the mean gradient
                weights.addcmul_(speed, rate * decay, value=-1)
                step += 1
    return heads


@contextlib.contextmanager
def tiny_numbers_as_zero() -> Iterator[None]:
    """In this thread numbers below 1e-38 count as 0: a layer that is sure of its classes is full of them.

    A CPU multiplies them many times more slowly (nine times, measured on the pocket zoo's features).
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _moments(x: Features, use: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """`(C,)` mean and 1 / standard deviation of the rows in `use`; a constant feature gets scale 0."""
    count, total, squares, shift = 0, np.zeros(x.shape[1]), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for _, vectors in batches(x, 65536, use):
        if not count:
            shift = vectors[0].double().numpy()  # keeps the squares small: nothing is lost to cancellation
        part = vectors.numpy() - shift
        count += len(part)
        total += part.sum(0, dtype=np.float64)
        squares += np.square(part, dtype=np.float64).sum(0)
    mean = total / count
    spread = np.sqrt(np.maximum(squares / count - mean**2, 0))
    scale = np.divide(1, spread, out=np.zeros_like(spread), where=spread > 1e-7 * (np.abs(mean + shift) + 1e-30))
    return mean + shift, scale


# --------------------------------------------------------------------------------- features and labels of every probe


def checked(x: Features, y: Labels, classes: int, which: str) -> Features:
    """The features, if they and the labels belong together; read at once where they fit into one chunk.

    Raises:
        StudyError: says what is wrong with which part.
    """
    if classes < 2:
        raise StudyError(f"there is {classes} class: a probe needs two or more")
    if len(x) != len(y):
        raise StudyError(f"{len(x)} {which} features but {len(y)} labels: take the labels of the images that were kept")
    if not len(y):
        raise StudyError(f"there are no {which} images: check the data folder")
    if int(np.min(y)) < 0 or int(np.max(y)) >= classes:
        raise StudyError(f"{which} labels reach from {np.min(y)} to {np.max(y)}, but there are {classes} classes")
    if which == "train" and len(np.unique(y)) < 2:
        raise StudyError("all train images are of one class: a probe needs two or more")
    if isinstance(x, Column):  # what the store holds is finite
        return np.asarray(x) if 4 * x.shape[0] * x.shape[1] <= CHUNK_BYTES else x
    if not np.isfinite(x).all():
        raise StudyError(f"{which} features are not all finite: encode the images again")
    return x


def batches(
    x: Features, size: int, use: NDArray[np.bool_] | None = None, rng: np.random.Generator | None = None
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Rows in `use` with their float32 features, at most `size` at a time: in random order with `rng`.

    Of a store some shards are read at a time: each is a random part of the images.
    """
    use = np.ones(len(x), bool) if use is None else use
    mixed = (lambda rows: rows) if rng is None else rng.permutation
    if not isinstance(x, Column):
        rows = mixed(np.flatnonzero(use))
        for start in range(0, len(rows), size):
            yield rows[start : start + size], torch.from_numpy(x[rows[start : start + size]]).float()
        return
    shards = mixed(np.arange(x.store.shards))
    together = max(1, CHUNK_BYTES // (4 * x.shape[1]) // x.store.shard_rows)
    for first in range(0, len(shards), together):
        blocks = [x.block(int(shard)) for shard in shards[first : first + together]]
        rows = np.concatenate([block[0] for block in blocks])
        used = mixed(np.flatnonzero(use[rows]))
        rows, vectors = rows[used], np.concatenate([block[1] for block in blocks])[used]
        del blocks
        for start in range(0, len(rows), size):
            yield rows[start : start + size], torch.from_numpy(vectors[start : start + size]).float()
