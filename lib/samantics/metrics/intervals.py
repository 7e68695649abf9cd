"""How far a number could be off: percentile bootstrap (Efron and Tibshirani 1993, chapter 13)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

COVERAGE = 0.95
OTHER_SEEDS = 3  # of the bootstrap, under which a difference is computed again


class Interval(NamedTuple):
    """A value with its 95 % interval. Prints as `73.9 [72.1, 75.6]`; `format(interval, ".3f")` sets the digits."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".1f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self)

    def times(self, factor: float) -> "Interval":
        """The interval in other units: `times(100)` turns a share into percent."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


def bootstrap_mean(values: ArrayLike, seed: int = 0, samples: int = 1000) -> Interval:
    """Mean and 95 % interval, resampling test images, and seeds as well when there are several.

    Args:
        values: `(n,)` one finite number per test image, or `(seeds, n)` for the same images under several seeds: an
            image drawn is then drawn for all seeds at once, because its difficulty is shared between them.
        seed: of the resampling.
        samples: resamples.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.size == 0 or not np.isfinite(table).all():
        raise ValueError("bootstrap_mean needs at least one value, all finite")
    return _interval(float(table.mean()), _resampled_means(table, np.ones(table.shape[1]), seed, samples))


def bootstrap_statistic(statistic: Callable[[NDArray[np.int64]], float], size: int, samples: int = 1000) -> Interval:
    """Any statistic of positions in `range(size)` and its 95 % interval, for what is no mean over images (NMI, say)."""
    rng = np.random.default_rng(0)
    drawn = np.array([statistic(rng.integers(size, size=size)) for _ in range(samples)])
    return _interval(float(statistic(np.arange(size))), drawn)


class Difference(NamedTuple):
    """A paired difference with its 95 % interval, and how likely so large a one would be if there were none.

    `others` holds value, low and high under other seeds, by name: other seeds of the bootstrap, and each seed of
    references or probes left out. A verdict must survive them all.
    """

    value: float
    low: float
    high: float
    p: float  # two-sided, of the bootstrap; never below 1 / (resamples + 1)
    others: dict[str, list[float]] | None = None


def paired_difference(
    more: ArrayLike, less: ArrayLike, clusters: ArrayLike | None = None, seed: int = 0, samples: int = 2000
) -> Difference:
    """Mean of `more - less` where both answered the same items: items and seeds are resampled together.

    Args:
        more, less: `(items,)` or `(seeds, items)` finite outcomes, in the same order of items and seeds.
        clusters: `(items,)` what items belong to (a class, a scene): whole clusters are drawn, because items of one
            are alike; None: every item for itself.
        seed: of the resampling.
        samples: resamples.

    Raises:
        ValueError: shapes differ, nothing is given, or a number is not finite.
    """
    first, second = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (more, less))
    if first.shape != second.shape or first.size == 0 or not np.isfinite(first - second).all():
        raise ValueError("paired_difference needs two arrays of one shape, with at least one value, all finite")
    codes = np.arange(first.shape[1]) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums, sizes = np.stack([np.bincount(codes, row) for row in first - second]), np.bincount(codes)

    def resampled(rows: list[int], start: int) -> Difference:
        value = float(sums[rows].mean(0).sum() / first.shape[1])
        return difference_of(value, _resampled_means(sums[rows], sizes, start, samples))

    return with_others(resampled, list(range(len(sums))), seed)


def with_others(resampled: Callable[[list[int], int], Difference], runs: list[int], seed: int = 0) -> Difference:
    """A difference over all runs, with its `others`; `resampled` takes runs and the bootstrap's seed."""
    others = {f"bootstrap {other}": resampled(runs, other) for other in range(seed + 1, seed + 1 + OTHER_SEEDS)}
    if len(runs) > 1:
        others |= {f"without seed {left}": resampled([run for run in runs if run != left], seed) for left in runs}
    return resampled(runs, seed)._replace(others={name: list(found[:3]) for name, found in others.items()})


def difference_of(value: float, drawn: NDArray[np.float64]) -> Difference:
    """The difference whose resamples these are."""
    tail = 1 + min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Difference(*_interval(value, drawn), min(1.0, 2 * tail / (len(drawn) + 1)))


def _resampled_means(sums: NDArray[Any], sizes: NDArray[Any], seed: int, samples: int) -> NDArray[np.float64]:
    """`(samples,)` means of resampled clusters and seeds; `sums`: `(seeds, clusters)`, `sizes`: `(clusters,)` items."""
    rng, means, (seeds, clusters) = np.random.default_rng(seed), np.empty(samples), sums.shape
    for sample in range(samples):
        weights = np.bincount(rng.integers(clusters, size=clusters), minlength=clusters)  # how often each is drawn
        by_seed = sums @ weights / (sizes @ weights)
        means[sample] = by_seed @ np.bincount(rng.integers(seeds, size=seeds), minlength=seeds) / seeds
    return means


def _interval(value: float, drawn: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(value, float(low), float(high))
