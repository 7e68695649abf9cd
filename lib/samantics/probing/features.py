"""Features on disk: every image is encoded once, for all layers and poolings, and read many times.

A store belongs to one encoder, weight file, preprocessing and data set; change any of them and it is another store. Its
rows lie in a random order, so that a reader who takes shard after shard sees the classes mixed. Shards appear whole or
not at all, so a killed run resumes where it was, and a shard is written by whoever holds its lock: several runs, or the
processes of `torchrun` on any number of nodes, share the work through the folder alone.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from samantics.cache import atomic_path, cache_dir, hash_value, reading, write_json
from samantics.data.folders import Images
from samantics.errors import StudyError
from samantics.models.encoder import Encoder
from samantics.models.registry import Readout

FEW = 3  # unreadable images that a data set of any size may have
FORMAT = 2  # of the shards; raised when they change
SHARD_ROWS = 1024
PREFETCH = 2  # batches decoded ahead


# -------------------------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """Features of `rows` images, some of which may have been unreadable.

    A shard is an `.npz` of float16 tables, one for each (layer, pooling): its zip holds their checksums.
    """

    folder: Path  # where the shards lie
    rows: int  # images that were to be encoded
    shard_rows: int  # images in a shard (fewer in the last)

    def path(self, shard: int) -> Path:
        """A shard's file."""
        return self.folder / f"shard_{shard:05d}.npz"

    @functools.cached_property
    def members(self) -> list[NDArray[np.int64]]:
        """The images of each shard: in a random order."""
        order = np.random.default_rng(0).permutation(self.rows)
        return np.split(order, range(self.shard_rows, self.rows, self.shard_rows))

    @functools.cached_property
    def dims(self) -> dict[Readout, int]:
        """Width of the vectors of each (layer, pooling)."""
        with reading(self.path(0)), np.load(self.path(0)) as arrays:
            parts = {name: name.partition(":") for name in arrays.files if ":" in name}
            return {(layer, pooling): arrays[name].shape[1] for name, (layer, _, pooling) in parts.items()}

    @functools.cached_property
    def skipped(self) -> dict[int, str]:
        """Row -> reason, of images that could not be read; no feature is returned for them."""
        found = dict[int, str]()
        for shard in range(len(self.members)):
            with reading(self.path(shard)), np.load(self.path(shard)) as arrays:
                found |= dict(zip(arrays["skipped"].tolist(), arrays["reasons"].tolist(), strict=True))
        return found

    @functools.cached_property
    def kept(self) -> NDArray[np.int64]:
        """`(N,)` rows that have features: select labels with it (`labels[store.kept]`)."""
        return np.setdiff1d(np.arange(self.rows), list(self.skipped))

    def column(self, readout: Readout) -> "Column":
        """The features of one (layer, pooling), to be read block by block; StudyError where the store lacks them."""
        if readout not in self.dims:
            have = ", ".join(":".join(pair) for pair in self.dims)
            raise StudyError(f"{self.folder} has no {':'.join(readout)} features, only {have}: encode them too")
        return Column(self, readout)


@dataclasses.dataclass(frozen=True)
class Column:
    """One (layer, pooling) of a store, read shard by shard, so that memory does not grow with the number of images."""

    store: FeatureStore
    readout: Readout
    projection: NDArray[np.float32] | None = None  # `(C, D)` of `column @ matrix`: multiplies what is read

    def __matmul__(self, matrix: NDArray[np.float32]) -> "Column":
        return dataclasses.replace(self, projection=matrix)

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, C)`, as the array of all blocks together would have."""
        width = self.store.dims[self.readout] if self.projection is None else self.projection.shape[1]
        return len(self.store.kept), width

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All of it at once: `np.asarray(column)`."""
        return self.take(np.arange(self.shape[0])).astype(dtype or np.float32, copy=False)

    def block(self, shard: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Positions `(n,)` among the kept rows and features `(n, C)` of one shard: some images at random."""
        store, rows = self.store, self.store.members[shard]
        with reading(store.path(shard)), np.load(store.path(shard)) as arrays:
            vectors = arrays[":".join(self.readout)]
            if vectors.shape != (len(rows), store.dims[self.readout]) or vectors.dtype != np.float16:
                raise ValueError("another table")
        if self.projection is not None:
            vectors = vectors.astype(np.float32) @ self.projection
        readable = ~np.isin(rows, list(store.skipped))
        return np.searchsorted(store.kept, rows[readable]), vectors[readable]

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """`(n, C)` features at these positions among the kept rows."""
        found = np.empty((len(positions), self.shape[1]), np.float32)
        place = np.full(self.shape[0], -1)
        place[positions] = np.arange(len(positions))
        for shard in range(len(self.store.members)):
            members, vectors = self.block(shard)
            chosen = place[members] >= 0
            found[place[members[chosen]]] = vectors[chosen]
        return found


# ------------------------------------------------------------------------------------------------------- encoding


@dataclasses.dataclass(frozen=True)
class _Job:
    store: FeatureStore
    encoder: Encoder
    images: Images
    masks: Images | None
    readouts: Sequence[Readout]
    batch_size: int
    max_unreadable: float

    def check_readable(self, reasons: Sequence[str]) -> None:
        count, limit = self.store.rows, max(FEW, int(self.max_unreadable * self.store.rows))
        if len(reasons) > min(limit, count - 1):
            of_all = f"{len(reasons)} of {count} images are unreadable"
            raise StudyError(f"{of_all}, over the limit of {limit} (max_unreadable): {reasons[0]}")


def encode_images(
    encoder: Encoder, images: Images, readouts: Sequence[Readout], data_hash: str, masks: Images | None = None,
    folder: Path | None = None, batch_size: int | None = None, workers: int = 2, max_unreadable: float = 0.01,
) -> FeatureStore:  # fmt: skip
    """The features of all images for every (layer, pooling): from disk where they are, encoded where they are not.

    `data_hash` identifies images and masks in their order; masks, all of one size, are for the pooling `object`, where
    the encoder's input is the whole image: none cut off, none padded.
    Unreadable images are skipped and listed, up to a share of all, or `FEW`. StudyError if there are more, or no space
    is left: what was encoded stays and is used by the next run.
    """
    readouts = list(dict.fromkeys(readouts))
    encoder.check(readouts)
    key = [FORMAT, encoder.key, data_hash, len(images), SHARD_ROWS]
    place = (folder or cache_dir() / "features") / f"{encoder.name}_{hash_value(key)}" / hash_value(sorted(readouts))
    store = FeatureStore(place, len(images), SHARD_ROWS)
    job = _Job(store, encoder, images, masks, readouts, batch_size or encoder.images_at_once, max_unreadable)
    if pending := [shard for shard in range(len(store.members)) if not store.path(shard).exists()]:
        write_json(place / "key.json", key)
        _encode_shards(job, pending, workers)
    job.check_readable(list(store.skipped.values()))
    return store


def _encode_shards(job: _Job, pending: Sequence[int], workers: int) -> None:
    """Encode what nobody else is encoding, then wait for (or take over) what others had begun."""
    store, reasons = job.store, list[str]()
    to_do = sum(len(store.members[shard]) for shard in pending)
    bar = tqdm(total=to_do, unit="image", desc=job.encoder.name, mininterval=0.2, leave=False)
    with ThreadPoolExecutor(workers) as pool, bar:
        for patience in (0.0, -1.0):  # seconds to wait for a lock; -1 is for ever
            left = []
            for shard in pending:
                try:
                    with FileLock(store.path(shard).with_suffix(".lock"), timeout=patience):
                        if not store.path(shard).exists():
                            reasons += _encode_shard(job, shard, pool, bar)
                            job.check_readable(reasons)
                        else:
                            bar.update(len(store.members[shard]))
                except Timeout:
                    left.append(shard)
            pending = left


def _encode_shard(job: _Job, shard: int, pool: ThreadPoolExecutor, bar: "tqdm[Any]") -> list[str]:
    """Encode and write one shard; returns why some of its images were unreadable."""
    parts, skipped = [], dict[int, str]()
    for inputs in _prefetched(job, job.store.members[shard].tolist(), pool):
        parts.append(_encode_batch(job, inputs))
        skipped |= {item.row: item.fault for item in inputs if item.fault}
        bar.update(len(inputs))
    features = {":".join(readout): np.concatenate([part[readout] for part in parts]) for readout in job.readouts}
    for name, block in features.items():
        if not np.isfinite(block).all():
            raise StudyError(f"{job.encoder.name}'s {name} features overflow 16 bits: leave that layer out")
    notes = {"skipped": np.array(list(skipped), np.int64), "reasons": np.array(list(skipped.values()), str)}
    with atomic_path(job.store.path(shard)) as temporary:
        np.savez(temporary, allow_pickle=False, **features, **notes)
    return list(skipped.values())


class _Input(NamedTuple):
    row: int
    pixels: Tensor  # (3, S, S) of `Preprocessing.square`
    seen: Tensor  # (S, S) bool: where they show the image
    fault: str = ""  # why it could not be read


def _prefetched(job: _Job, rows: list[int], pool: ThreadPoolExecutor) -> Iterator[list[_Input]]:
    """The inputs of batch after batch, decoded `PREFETCH` batches ahead."""
    ahead: list[Iterator[_Input]] = []
    for start in range(0, len(rows), job.batch_size):
        ahead.append(pool.map(functools.partial(_input, job), rows[start : start + job.batch_size]))
        if len(ahead) > PREFETCH:
            yield list(ahead.pop(0))
    yield from map(list, ahead)


def _input(job: _Job, row: int) -> _Input:
    size, preprocess = job.encoder.image_size, job.encoder.preprocess
    seen = torch.zeros(size, size, dtype=torch.bool)
    try:
        image = Image.fromarray(np.asarray(job.images[row]))
        pixels = preprocess.square(image)
    except StudyError as error:
        return _Input(row, preprocess.square(Image.new("RGB", (size, size))), ~seen, str(error))
    geometry = preprocess.geometry(image.width, image.height)
    left, top, right, bottom = geometry.seen
    if job.masks is not None and (geometry.left, geometry.top, right, bottom) != (0, 0, size, size):
        raise StudyError(f"{job.encoder.name}'s input is cut or padded of image {row}: encode it without masks")
    seen[top:bottom, left:right] = True
    return _Input(row, pixels, seen)


def _encode_batch(job: _Job, inputs: list[_Input]) -> dict[Readout, NDArray[np.float16]]:
    """`(B, C)` of every readout; unreadable rows are zero."""
    pixels, seen = torch.stack([item.pixels for item in inputs]), torch.stack([item.seen for item in inputs])
    objects, shown = None, None if seen.all() else seen
    if job.masks is not None:
        objects = torch.from_numpy(np.stack([np.asarray(job.masks[item.row]) for item in inputs]) > 0)
    vectors = job.encoder.pooled(job.encoder.normalised(pixels, seen), job.readouts, objects, shown)
    readable = torch.tensor([not item.fault for item in inputs])[:, None]
    # torch halves many times faster than NumPy; what overflows is told once the shard is complete
    return {pair: torch.where(readable, part.cpu(), 0).half().numpy() for pair, part in vectors.items()}
