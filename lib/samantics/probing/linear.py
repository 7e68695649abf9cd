"""Probes: how much of a class can be read off frozen features, by one linear layer or by nearest neighbours.

:func:`linear_probe` is the sound version (learning rate and epochs chosen on a held-out part of train, trained until
more epochs do not help); :func:`paper_probe` is the paper's protocol as its code has it, weaknesses and all. Features
are arrays in memory or a `features.Column` of a store, which is streamed: memory does not grow with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from samantics.errors import StudyError
from samantics.probing.features import Column

Features = NDArray[Any] | Column  # (N, C)
Labels = NDArray[Any]  # (N,) integers from 0

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT = 0.2
MOMENTUM = 0.9  # as DINOv2's linear evaluation
CHUNK_BYTES = 96 << 20  # float32 features in memory at a time


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """What a probe said of every test image.

    Attributes:
        predictions: ``(seeds, n)`` int64, the best class.
        top1, top5: ``(seeds, n)`` bool, whether the true class is the best, is among the best five.
        learning_rates: chosen, for each seed (empty for kNN).
        epochs: trained, for each seed.
        held_out: accuracy on the held-out part of train for each seed, which chose the rate; NaN without choice.
        converged: for each seed, whether more epochs had stopped to help.
    """

    predictions: NDArray[np.int64]
    top1: NDArray[np.bool_]
    top5: NDArray[np.bool_]
    learning_rates: tuple[float, ...] = ()
    epochs: tuple[int, ...] = ()
    held_out: tuple[float, ...] = ()
    converged: tuple[bool, ...] = ()


# --------------------------------------------------------------------------------------------------- linear probe


def linear_probe(
    train_x: Features,
    train_y: Labels,
    test_x: Features,
    test_y: Labels,
    classes: int,
    seeds: Sequence[int] = (0, 1, 2),
    rates: Sequence[float] = RATES,
    standardise: bool = True,
    groups: Labels | None = None,
    epochs: int = 15,
    max_epochs: int = 120,
    batch_size: int = 128,
    device: str = "cpu",
) -> ProbeResult:
    """A linear classifier by SGD with momentum and cosine decay, all its choices made on a held-out part of train.

    All learning rates are trained side by side in one pass over the features. Then the best and its neighbours are
    trained twice as long, and again, until that no longer helps on the held-out part (by half a standard error); at
    last one head is trained on all of train with what was chosen. Test data are looked at once, by that head.

    Args:
        train_x, test_x: ``(N, C)`` features.
        train_y, test_y: ``(N,)`` class labels from 0.
        classes: number of classes.
        seeds: one probe each: of the held-out part and of the order of the images.
        rates: learning rates in rising order; with a single one nothing is held out or chosen.
        standardise: bring every feature to mean 0 and standard deviation 1 (of train).
        groups: ``(N,)`` what is held out together (the drawings, where test images show other drawings).
        epochs, max_epochs: of the first and at most of the last training.

    Raises:
        StudyError: one class only, labels that do not fit the features, features that are not finite, or too few images
            of every class to hold some out.
    """
    _check(train_x, train_y, classes, "train")
    _check(test_x, test_y, classes, "test")
    train_x, test_x = _in_memory_if_small(train_x), _in_memory_if_small(test_x)
    settings = _Settings(classes, standardise, batch_size, torch.device(device))
    runs = []
    for seed in seeds:
        rate, best_epochs, held, converged = rates[0], max_epochs, float("nan"), False
        if len(rates) > 1:
            held_rows = held_out_rows(train_y, seed, groups)
            rate, best_epochs, held, converged = _choose(
                train_x, train_y, held_rows, rates, epochs, max_epochs, seed, settings
            )
        head = _train(train_x, train_y, np.ones(len(train_y), bool), (rate,), best_epochs, seed, settings)
        ranked = _rank(head, test_x, settings)
        runs.append((ranked, rate, best_epochs, held, converged))
    return _result([run[0] for run in runs], test_y, *(tuple(run[i] for run in runs) for i in range(1, 5)))


def held_out_rows(labels: Labels, seed: int, groups: Labels | None = None) -> NDArray[np.bool_]:
    """``(N,)`` True for about a fifth of every class (of its groups, where given): at least one, and never all.

    Raises:
        StudyError: no class has two images (groups) to choose from.
    """
    rng = np.random.default_rng(seed)
    units = np.arange(len(labels)) if groups is None else groups
    held: list[Any] = []
    for label in np.unique(labels):
        members = rng.permutation(np.unique(units[labels == label]))
        held += members[: min(len(members) - 1, max(1, round(HELD_OUT * len(members))))].tolist()
    if not held:
        raise StudyError(
            "no class has two images (or groups) in train, so none can be held out: give one learning rate"
        )
    return np.isin(units, held)


def _choose(
    x: Features,
    y: Labels,
    held: NDArray[np.bool_],
    rates: Sequence[float],
    epochs: int,
    max_epochs: int,
    seed: int,
    settings: _Settings,
) -> tuple[float, int, float, bool]:
    """Learning rate, epochs, held-out accuracy, and whether more epochs had stopped to help."""
    best = (rates[0], epochs, -1.0)
    while True:
        heads = _train(x, y, ~held, rates, epochs, seed, settings)
        accuracy = _accuracies(heads, x, y, held, settings)
        winner = int(accuracy.argmax())
        error = float(np.sqrt(accuracy[winner] * (1 - accuracy[winner]) / held.sum()))
        gain = accuracy[winner] - best[2]
        if gain > 0:
            best = (rates[winner], epochs, float(accuracy[winner]))
        if gain <= error / 2:
            return *best, True
        if 2 * epochs > max_epochs:
            return *best, False
        rates = rates[max(0, winner - 1) : winner + 2]
        epochs *= 2


@dataclasses.dataclass(frozen=True)
class _Settings:
    classes: int
    standardise: bool
    batch_size: int
    device: torch.device


@dataclasses.dataclass(frozen=True)
class _Heads:
    """``R`` linear layers side by side, and how features are prepared for them.

    Attributes:
        weights: ``(C + 1, R, K)``, the bias last.
        mean, scale: ``(C,)``; a feature becomes ``(x - mean) * scale``.
    """

    weights: Tensor
    mean: Tensor
    scale: Tensor

    def prepare(self, x: Tensor) -> Tensor:
        """``(n, C + 1)``."""
        return torch.cat([(x - self.mean) * self.scale, x.new_ones(len(x), 1)], dim=1)

    def logits(self, prepared: Tensor) -> Tensor:
        """``(n, R, K)``."""
        return (prepared @ self.weights.flatten(1)).unflatten(1, self.weights.shape[1:])


def _train(
    x: Features,
    y: Labels,
    use: NDArray[np.bool_],
    rates: Sequence[float],
    epochs: int,
    seed: int,
    settings: _Settings,
) -> _Heads:
    """One head for each learning rate, all from zero and from the same batches of the rows in ``use``."""
    device = settings.device
    mean, scale = _moments(x, use) if settings.standardise else (np.zeros(x.shape[1]), np.ones(x.shape[1]))
    weights = torch.zeros(x.shape[1] + 1, len(rates), settings.classes, device=device)
    heads = _Heads(weights, _tensor(mean, device), _tensor(scale, device))
    speed = torch.zeros_like(weights)
    rate = torch.tensor(list(rates), device=device)[:, None]
    steps, step = epochs * max(1, int(use.sum()) / settings.batch_size), 0
    rng = np.random.default_rng(seed)
    with _no_denormals():
        for _ in range(epochs):
            for rows, vectors in _chunks(x, use, rng, device):
                prepared, labels = heads.prepare(vectors), torch.from_numpy(y[rows].astype(np.int64)).to(device)
                for start in range(0, len(rows), settings.batch_size):
                    batch = slice(start, start + settings.batch_size)
                    gradient = _gradient(heads, prepared[batch], labels[batch])
                    decay = 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps)))
                    speed.mul_(MOMENTUM).add_(gradient)
                    weights.sub_(speed * (rate * decay))
                    step += 1
    return heads


@contextlib.contextmanager
def _no_denormals() -> Iterator[None]:
    """Numbers next to nothing count as nothing (in this thread): a head that is sure of its classes is full of them,
    and a CPU multiplies them many times more slowly (nine times, measured on the pocket zoo's features)."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _gradient(heads: _Heads, prepared: Tensor, labels: Tensor) -> Tensor:
    """``(C + 1, R, K)`` of the mean cross-entropy, written out: (softmax - one-hot), as autograd would give."""
    excess = heads.logits(prepared).softmax(dim=2)
    where = labels[:, None, None].expand(-1, excess.shape[1], 1)
    excess.scatter_add_(2, where, excess.new_full(where.shape, -1.0))
    return (prepared.T @ excess.flatten(1)).view_as(heads.weights) / len(prepared)


def _accuracies(heads: _Heads, x: Features, y: Labels, use: NDArray[np.bool_], settings: _Settings) -> NDArray[Any]:
    """``(R,)`` top-1 of every head on the rows in ``use``."""
    right = np.zeros(heads.weights.shape[1])
    for rows, vectors in _chunks(x, use, None, settings.device):
        for part, labels in zip(vectors.split(512), np.split(y[rows], range(512, len(rows), 512)), strict=True):
            guesses = heads.logits(heads.prepare(part)).argmax(2).cpu().numpy()
            right += (guesses == labels[:, None]).sum(0)
    return right / use.sum()


def _rank(heads: _Heads, x: Features, settings: _Settings) -> NDArray[np.int64]:
    """``(n, 5)`` best classes of the first head, best first (fewer columns where there are fewer classes)."""
    ranked = np.empty((len(x), min(5, settings.classes)), np.int64)
    for rows, vectors in _chunks(x, np.ones(len(x), bool), None, settings.device):
        for part, where in zip(vectors.split(4096), np.split(rows, range(4096, len(rows), 4096)), strict=True):
            ranked[where] = heads.logits(heads.prepare(part))[:, 0].topk(ranked.shape[1]).indices.cpu().numpy()
    return ranked


def _result(ranked: Sequence[NDArray[np.int64]], labels: Labels, *choices: tuple[Any, ...]) -> ProbeResult:
    right = np.stack(ranked) == labels[None, :, None]
    return ProbeResult(np.stack(ranked)[:, :, 0], right[:, :, 0], right.any(axis=2), *choices)


# ---------------------------------------------------------------------------------------------- reading features


def _in_memory_if_small(x: Features) -> Features:
    """What fits into one chunk is read once; larger columns are streamed in every epoch."""
    small = isinstance(x, Column) and 4 * x.shape[0] * x.shape[1] <= CHUNK_BYTES
    return x.store.read(x.wanted) if isinstance(x, Column) and small else x


def _chunks(
    x: Features, use: NDArray[np.bool_], rng: np.random.Generator | None, device: torch.device
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Rows in ``use`` with their float32 features, some at a time: in random order with ``rng``, else as they lie."""
    most = max(1, CHUNK_BYTES // (4 * x.shape[1]))
    if isinstance(x, Column):
        yield from _column_chunks(x, use, rng, device, most)
        return
    rows = np.flatnonzero(use) if rng is None else rng.permutation(np.flatnonzero(use))
    for start in range(0, len(rows), most):
        part = rows[start : start + most]
        yield part, _tensor(x[part], device)


def _column_chunks(
    x: Column, use: NDArray[np.bool_], rng: np.random.Generator | None, device: torch.device, most: int
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """The same from a store; shards are a random part of the images each, and are mixed some at a time."""
    shards = np.arange(x.store.shards) if rng is None else rng.permutation(x.store.shards)
    together = max(1, most // x.store.shard_rows)
    for start in range(0, len(shards), together):
        blocks = [x.block(int(shard)) for shard in shards[start : start + together]]
        rows = np.concatenate([block[0] for block in blocks])
        wanted = np.flatnonzero(use[rows]) if rng is None else rng.permutation(np.flatnonzero(use[rows]))
        vectors = np.concatenate([block[1] for block in blocks])[wanted]
        del blocks
        if len(wanted):
            yield rows[wanted], _tensor(vectors, device)


def _tensor(values: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, torch.float32)


def _moments(x: Features, use: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """``(C,)`` mean and 1 / standard deviation of the rows in ``use``; a constant feature gets scale 0."""
    count, total, squares, shift = 0, np.zeros(x.shape[1]), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for _, vectors in _chunks(x, use, None, torch.device("cpu")):
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


def _check(x: Features, y: Labels, classes: int, which: str) -> None:
    """Refuse features and labels that cannot belong together.

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
    if isinstance(x, np.ndarray) and not np.isfinite(x).all():
        raise StudyError(f"{which} features are not all finite: encode the images again")


def few_shot_rows(labels: Labels, shots: int, seed: int) -> NDArray[np.int64]:
    """``(classes * shots,)`` rows: ``shots`` random ones of every class.

    Raises:
        StudyError: a class has fewer.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < shots:
            raise StudyError(f"class {label} has {len(members)} train images, {shots} are wanted: take fewer shots")
        rows.append(rng.choice(members, shots, replace=False))
    return np.sort(np.concatenate(rows))


# ------------------------------------------------------------------------------------------------------------ kNN


def knn_probe(
    train_x: Features,
    train_y: Labels,
    test_x: Features,
    test_y: Labels,
    classes: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float | None = 0.07,
    device: str = "cpu",
) -> dict[int, ProbeResult]:
    """Nearest neighbours by cosine, for every ``k``; there is nothing to train, so one seed.

    Args:
        temperature: votes weigh ``exp(cosine / temperature)``, as DINOv2's; None: one vote each, ties to the nearer.

    Raises:
        StudyError: as :func:`linear_probe`; fewer train images than the largest ``k``.
    """
    _check(train_x, train_y, classes, "train")
    _check(test_x, test_y, classes, "test")
    if max(ks) > len(train_y):
        raise StudyError(f"k is {max(ks)}, but there are {len(train_y)} train images: choose a smaller k")
    train_x, test_x = _in_memory_if_small(train_x), _in_memory_if_small(test_x)
    everywhere, target = np.ones(len(test_y), bool), torch.device(device)
    ranked = {k: np.empty((len(test_y), min(5, classes)), np.int64) for k in ks}
    for rows, vectors in _chunks(test_x, everywhere, None, target):
        near, cosines = _neighbours(train_x, vectors, max(ks), target)
        labels = torch.from_numpy(train_y.astype(np.int64))[near]
        for k in ks:
            ranked[k][rows] = _vote(labels[:, :k], cosines[:, :k], classes, temperature, ranked[k].shape[1])
    return {k: _result([ranked[k]], test_y) for k in ks}


def _neighbours(train_x: Features, queries: Tensor, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows ``(n, k)`` of the nearest train features and their cosines, nearest first."""
    queries = nn.functional.normalize(queries, dim=1)
    rows = torch.zeros(len(queries), 0, dtype=torch.int64)
    cosines = torch.zeros(len(queries), 0)
    for chunk, vectors in _chunks(train_x, np.ones(len(train_x), bool), None, device):
        vectors = nn.functional.normalize(vectors, dim=1)
        for start in range(0, len(chunk), 8192):
            part = slice(start, start + 8192)
            found = torch.cat([cosines, (queries @ vectors[part].T).cpu()], dim=1)
            numbers = torch.from_numpy(chunk[part]).expand(len(queries), -1)
            cosines, order = found.topk(min(k, found.shape[1]), dim=1)
            rows = torch.cat([rows, numbers], dim=1).gather(1, order)
    return rows, cosines


def _vote(labels: Tensor, cosines: Tensor, classes: int, temperature: float | None, best: int) -> NDArray[np.int64]:
    """``(n, best)`` classes with the most votes."""
    # a plain vote counts 1 and a trifle for nearness, which decides between equal counts only
    weights = 1 + 1e-5 * cosines if temperature is None else (cosines / temperature).softmax(dim=1)
    votes = torch.zeros(len(labels), classes, dtype=torch.float64).scatter_add_(1, labels, weights.double())
    return votes.topk(best, dim=1).indices.numpy()


# ----------------------------------------------------------------------------------------------- the paper's probe


@dataclasses.dataclass(frozen=True)
class PaperProbe:
    """The paper's probe, and its course.

    Attributes:
        curve: ``(epochs,)`` top-1 on the reported split after each epoch.
        chosen: the epoch (from 0) whose model is reported: the best on that same split, as the paper chose it.
        result: of the chosen epoch.
        last: of the last epoch, chosen without a look at the reported split.
    """

    curve: NDArray[np.float64]
    chosen: int
    result: ProbeResult
    last: ProbeResult


def paper_probe(
    train_x: Features,
    train_y: Labels,
    test_x: Features,
    test_y: Labels,
    classes: int,
    seed: int = 0,
    epochs: int = 10,
    batch_size: int = 128,
    device: str = "cpu",
) -> PaperProbe:
    """The protocol of the paper's code on stored features: the inputs of its linear layer are the same in every epoch.

    Adam at 1e-3 without weight decay, batches of 128, gradients clipped to norm 1, halved rate after five epochs
    without a better loss on the reported split, 16-bit mixed precision (float16 with loss scaling on a GPU, bfloat16 on
    a CPU); features as they are; the best of ten epochs on the reported split.

    Raises:
        StudyError: as :func:`linear_probe`.
    """
    _check(train_x, train_y, classes, "train")
    _check(test_x, test_y, classes, "test")
    train_x, test_x = _in_memory_if_small(train_x), _in_memory_if_small(test_x)
    target = torch.device(device)
    head = _fresh_layer(train_x.shape[1], classes, seed).to(target)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=5)
    scaler = torch.amp.GradScaler(enabled=target.type == "cuda")
    rng, course = np.random.default_rng(seed), []
    for _ in range(epochs):
        _paper_epoch(head, optimiser, scaler, train_x, train_y, rng, batch_size)
        ranked, loss = _paper_scores(head, test_x, test_y, classes)
        schedule.step(loss)
        course.append(_result([ranked], test_y, (optimiser.param_groups[0]["lr"],), (epochs,)))
    curve = np.array([result.top1.mean() for result in course])
    return PaperProbe(curve, int(curve.argmax()), course[int(curve.argmax())], course[-1])


def _fresh_layer(width: int, classes: int, seed: int) -> nn.Linear:
    """`nn.Linear` with its usual start, drawn from a generator of its own: probes may train side by side."""
    layer, generator = nn.Linear(width, classes), torch.Generator().manual_seed(seed)
    for parameter in (layer.weight, layer.bias):
        nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
    return layer


def _mixed(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16)


def _paper_epoch(
    head: nn.Linear,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    x: Features,
    y: Labels,
    rng: np.random.Generator,
    batch_size: int,
) -> None:
    device = head.weight.device
    for rows, vectors in _chunks(x, np.ones(len(y), bool), rng, device):
        labels = torch.from_numpy(y[rows].astype(np.int64)).to(device)
        for inputs, truth in zip(vectors.split(batch_size), labels.split(batch_size), strict=True):
            with _mixed(device):
                loss = nn.functional.cross_entropy(head(inputs), truth)
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            scaler.step(optimiser)
            scaler.update()


@torch.no_grad()
def _paper_scores(head: nn.Linear, x: Features, y: Labels, classes: int) -> tuple[NDArray[np.int64], float]:
    """``(n, 5)`` best classes and the mean loss on the reported split."""
    device = head.weight.device
    ranked, loss = np.empty((len(y), min(5, classes)), np.int64), 0.0
    for rows, vectors in _chunks(x, np.ones(len(y), bool), None, device):
        labels = torch.from_numpy(y[rows].astype(np.int64)).to(device)
        places = torch.from_numpy(rows)
        for inputs, truth, where in zip(vectors.split(4096), labels.split(4096), places.split(4096), strict=True):
            with _mixed(device):
                logits = head(inputs).float()
            loss += float(nn.functional.cross_entropy(logits, truth, reduction="sum"))
            ranked[where.numpy()] = logits.topk(ranked.shape[1]).indices.cpu().numpy()
    return ranked, loss / len(y)
