"""The linear probe: how much of a class can one linear layer read off frozen features?

`linear_probe` is the sound version, `paper_probe` the paper's. Features are arrays in memory or a `Column` of a store,
which is streamed: memory does not grow with it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from samantics.errors import StudyError
from samantics.probing.features import Column

Features = NDArray[Any] | Column  # (N, C)
Labels = NDArray[Any]  # (N,) integers from 0
Data = tuple[Features, Labels, Features, Labels, int]  # what every probe takes first: train, test, number of classes

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT = 0.2
EPOCHS = 15  # of the first training
BATCH = 128  # the paper's, too
MOMENTUM = 0.9  # as DINOv2's linear evaluation
CHUNK_BYTES = 192 << 20  # float32 features in memory at a time


class ProbeResult(NamedTuple):
    """The answers of a probe for every test image."""

    predictions: NDArray[np.int64]  # (seeds, n) the best class
    top1: NDArray[np.bool_]  # (seeds, n) is it the true one?
    top5: NDArray[np.bool_]  # (seeds, n) is the true one among the best five?


def scored(ranked: NDArray[np.int64], labels: Labels) -> ProbeResult:
    """The result of the `(seeds, n, 5)` best classes of every test image, best first."""
    right = ranked == labels[:, None]
    return ProbeResult(ranked[..., 0], right[..., 0], right.any(-1))


def linear_probe(
    train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, classes: int,
    seeds: Sequence[int] = (0, 1, 2), rates: Sequence[float] = RATES, standardise: bool = True,
    groups: Labels | None = None, max_epochs: int = 120,
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
        max_epochs: of the last training, at most.

    Raises:
        StudyError: labels that do not fit the features, features that are not finite, or too few images of every class
            to hold some out.
    """
    train_x, test_x = checked(train_x, train_y, classes, "train"), checked(test_x, test_y, classes, "test")
    everything, ranked = np.ones(len(train_y), bool), []
    for seed in seeds:
        rate, epochs = rates[0], max_epochs
        if len(rates) > 1:
            held = held_out_rows(train_y, seed, groups)
            rate, epochs = chosen_settings(train_x, train_y, held, rates, max_epochs, seed, classes, standardise)
        layer = train_heads(train_x, train_y, everything, (rate,), epochs, seed, classes, standardise)
        ranked.append(best_five(layer.scores, test_x, 512)[:, 0])
    return scored(np.stack(ranked), test_y)


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


def chosen_settings(
    x: Features, y: Labels, held: NDArray[np.bool_], rates: Sequence[float], max_epochs: int, seed: int, classes: int,
    standardise: bool,
) -> tuple[float, int]:  # fmt: skip
    """Learning rate and epochs that are best on the `held` rows, trained until more epochs stop helping there."""
    epochs, highest = min(EPOCHS, max_epochs), -1.0
    chosen = rates[0], epochs
    while True:
        layers = train_heads(x, y, ~held, rates, epochs, seed, classes, standardise)
        accuracy = (best_five(layers.scores, x, 512, held)[:, :, 0] == y[held][:, None]).mean(axis=0)
        winner = int(accuracy.argmax())
        error = np.sqrt(accuracy[winner] * (1 - accuracy[winner]) / held.sum())
        gain = accuracy[winner] - highest
        if gain > 0:
            chosen, highest = (rates[winner], epochs), accuracy[winner]
        if gain <= error / 2 or 2 * epochs > max_epochs:
            return chosen
        rates, epochs = rates[max(0, winner - 1) : winner + 2], 2 * epochs


def paper_probe(
    train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, classes: int, epochs: int = 10
) -> list[ProbeResult]:
    """The protocol of the paper's code on stored features, which are the same in every epoch: answers after each one.

    Adam without weight decay, gradients clipped, halved rate after five epochs without a better loss on the reported
    split, 16-bit mixed precision (bfloat16), features as they are.
    """
    train_x, test_x = checked(train_x, train_y, classes, "train"), checked(test_x, test_y, classes, "test")
    layer, generator = nn.Linear(train_x.shape[1], classes), torch.Generator().manual_seed(0)
    for parameter in (layer.weight, layer.bias):  # as usual, but not from the global generator: probes train in threads
        nn.init.uniform_(parameter, -(train_x.shape[1] ** -0.5), train_x.shape[1] ** -0.5, generator=generator)
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=5)
    labels, test_labels = (torch.from_numpy(part.astype(np.int64)) for part in (train_y, test_y))
    rng, course = np.random.default_rng(0), []
    for _ in range(epochs):
        with tiny_numbers_as_zero():
            for rows, vectors in batches(train_x, BATCH, rng=rng):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(layer(vectors), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
                optimiser.step()
        ranked, total = np.empty((len(test_y), min(5, classes)), np.int64), 0.0
        for rows, vectors in batches(test_x, 4096):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                logits = layer(vectors).float()
            total += float(F.cross_entropy(logits, test_labels[rows], reduction="sum"))
            ranked[rows] = logits.topk(ranked.shape[1]).indices.numpy()
        schedule.step(total / len(test_y))
        course.append(scored(ranked[None], test_y))
    return course


# ----------------------------------------------------------------------------------- many layers trained side by side


class Heads(NamedTuple):
    """`R` linear layers side by side: `(C + 1, R, K)` weights, the bias last; a feature becomes (x - mean) * scale."""

    weights: Tensor
    mean: Tensor
    scale: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """`(n, R, K)` logits of `(n, C)` features."""
        return self.logits(self.prepare(x))

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
                # the speed becomes MOMENTUM * speed + the mean gradient
                speed.flatten(1).addmm_(prepared.T, excess, beta=MOMENTUM, alpha=1 / len(rows))
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
    """The features, if they and the labels belong together; read at once where they fit into one chunk."""
    if x.shape[0] != len(y):
        raise StudyError(f"{x.shape[0]} {which} features but {len(y)} labels: take those of the images that were kept")
    if int(np.min(y)) < 0 or int(np.max(y)) >= classes:
        raise StudyError(f"{which} labels reach from {np.min(y)} to {np.max(y)}, but there are {classes} classes")
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
    mixed = (lambda rows: rows) if rng is None else rng.permutation
    blocks: Iterable[Any] = [(np.arange(x.shape[0]), x)]  # rows with their features
    if isinstance(x, Column):
        shards = mixed(np.arange(len(x.store.members)))
        together = max(1, CHUNK_BYTES // (4 * x.shape[1]) // x.store.shard_rows)
        chunks = np.split(shards, range(together, len(shards), together))
        blocks = (tuple(map(np.concatenate, zip(*map(x.block, chunk), strict=True))) for chunk in chunks)
    for rows, vectors in blocks:
        used = mixed(np.arange(len(rows)) if use is None else np.flatnonzero(use[rows]))
        for start in range(0, len(used), size):
            chosen = used[start : start + size]
            yield rows[chosen], torch.from_numpy(vectors[chosen]).float()


@torch.no_grad()
def best_five(
    scores: Callable[[Tensor], Tensor], x: Features, size: int, use: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """`(n, ..., 5)` classes with the highest `scores` `(b, ..., K)` of every row in `use`, best first."""
    rows, best = [], []
    for numbers, vectors in batches(x, size, use):
        of_classes = scores(vectors)
        rows.append(numbers)
        best.append(of_classes.topk(min(5, of_classes.shape[-1])).indices.numpy())
    return np.concatenate(best)[np.argsort(np.concatenate(rows))]
