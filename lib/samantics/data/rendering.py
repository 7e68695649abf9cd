"""Many pictures: rendered once by all cores, kept as arrays in the cache folder, read as memory maps."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm.auto import tqdm

from samantics.cache import cache_dir, reading

MAX_OBJECTS = 6  # of a picture
CHUNK = 128  # pictures that a process renders at a time
PARTS = ("images", "instances", "drawings")

RGB = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Picture:
    """One rendered image and what it shows.

    Attributes:
        image: `(S, S, 3)` uint8, RGB.
        instances: `(S, S)` uint8; 0 is background, `i + 1` marks the visible pixels of object `i`.
        drawings: for each object its row in `catalogue()`.
    """

    image: RGB
    instances: NDArray[np.uint8]
    drawings: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Many pictures as arrays.

    Attributes:
        images: `(N, S, S, 3)` uint8, RGB.
        instances: `(N, S, S)` uint8, as in `Picture`.
        drawings: `(N, MAX_OBJECTS)` int16 catalogue rows, -1 where there is no object.
    """

    images: RGB
    instances: NDArray[np.uint8]
    drawings: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.images)


def render(make: Callable[[int], Picture], indices: Sequence[int]) -> Pictures:
    """The pictures `make(index)` for every index, in the order given."""
    pictures = [make(index) for index in indices]
    drawings = np.full((len(pictures), MAX_OBJECTS), -1, np.int16)
    for row, picture in zip(drawings, pictures, strict=True):
        row[: len(picture.drawings)] = picture.drawings
    return Pictures(np.stack([p.image for p in pictures]), np.stack([p.instances for p in pictures]), drawings)


def stored_pictures(make: Callable[[int], Picture], count: int, name: str, workers: int = 0) -> Pictures:
    """Pictures 0 to `count - 1` of `make`, rendered once by all cores, memory-mapped from the cache folder.

    Args:
        make: a picture by its index; picklable (a `functools.partial` of a function of this module).
        name: identifies `make` and all that its pictures depend on (the world's hash).
        workers: processes that render; 0 means all cores.
    """
    folder = cache_dir() / "mojiworld" / f"{name}_{count}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # who comes second waits, and finds the pictures
            if not folder.exists():
                _render_into(folder, make, count, workers)
    with reading(folder):
        return Pictures(*(np.load(folder / f"{part}.npy", mmap_mode="r") for part in PARTS))


def _render_into(folder: Path, make: Callable[[int], Picture], count: int, workers: int) -> None:
    """Fill a folder, which appears when all is there."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir()
    try:
        first = render(make, [0])
        for part in PARTS:
            sample = getattr(first, part)
            np.lib.format.open_memmap(unfinished / f"{part}.npy", "w+", sample.dtype, (count, *sample.shape[1:]))
        spans = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            done = pool.map(functools.partial(_fill, unfinished, make), spans)
            list(tqdm(done, total=len(spans), desc="rendering MojiWorld", unit=f"{CHUNK} pictures", leave=False))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(folder: Path, make: Callable[[int], Picture], span: tuple[int, int]) -> None:
    pictures = render(make, range(*span))
    for part in PARTS:
        array = np.load(folder / f"{part}.npy", mmap_mode="r+")
        array[span[0] : span[1]] = getattr(pictures, part)
        array.flush()
