"""Features on disk: every image is encoded once, for all layers and poolings, and read many times.

A store belongs to one encoder, weight file, preprocessing and data set; change any of them and it is another store. Its
rows lie in a random order, so that a reader who takes shard after shard sees the classes mixed. Shards appear whole or
not at all, so a killed run resumes where it was, and a shard is written by whoever holds its lock: several runs, or the
processes of `torchrun` on any number of nodes, share the work through the folder alone.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from samantics.cache import atomic_path, cache_dir, hash_value, reading, remove_leftovers, write_json
from samantics.data.folders import Images
from samantics.errors import StudyError
from samantics.models.encoder import Encoder
from samantics.models.preprocessing import Geometry
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
    dims: dict[Readout, int]  # width of the vectors of each (layer, pooling)
    skipped: dict[int, str]  # row -> reason, of images that could not be read; no feature is returned for them

    @functools.cached_property
    def kept(self) -> NDArray[np.int64]:
        """`(N,)` rows that have features: select labels with it (`labels[store.kept]`)."""
        return np.setdiff1d(np.arange(self.rows), list(self.skipped))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def column(self, readout: Readout) -> Column:
        """The features of one (layer, pooling), to be read block by block.

        Raises:
            StudyError: the store lacks that layer and pooling.
        """
        if readout not in self.dims:
            have = ", ".join(":".join(pair) for pair in self.dims)
            raise StudyError(f"{self.folder} has no {':'.join(readout)} features, only {have}: encode them too")
        return Column(self, readout)


@dataclasses.dataclass(frozen=True)
class Column:
    """One (layer, pooling) of a store, read shard by shard, so that memory does not grow with the number of images."""

    store: FeatureStore
    readout: Readout
    projection: NDArray[np.float32] | None = None  # `(C, D)` matrix that every vector is multiplied by, if any

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, C)`, as the array of all blocks together would have."""
        width = self.store.dims[self.readout] if self.projection is None else self.projection.shape[1]
        return len(self.store.kept), width

    def __len__(self) -> int:
        return len(self.store.kept)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All of it at once: `np.asarray(column)`."""
        return self.take(np.arange(len(self))).astype(dtype or np.float32, copy=False)

    def block(self, shard: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Positions `(n,)` among the kept rows and features `(n, C)` of one shard: some images at random.

        Raises:
            StudyError: the shard is damaged.
        """
        store, rows = self.store, _shard_rows(self.store.rows, self.store.shard_rows, shard)
        with reading(_shard_path(store.folder, shard)), np.load(_shard_path(store.folder, shard)) as arrays:
            vectors = arrays[":".join(self.readout)]
            if vectors.shape != (len(rows), store.dims[self.readout]) or vectors.dtype != np.float16:
                raise ValueError("another table")
        if self.projection is not None:
            vectors = vectors.astype(np.float32) @ self.projection
        readable = ~np.isin(rows, list(store.skipped))
        return np.searchsorted(store.kept, rows[readable]), vectors[readable]

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """`(n, C)` features at these positions among the kept rows; raises as `block`."""
        found = np.empty((len(positions), self.shape[1]), np.float32)
        place = np.full(len(self), -1)
        place[positions] = np.arange(len(positions))
        for shard in range(self.store.shards):
            members, vectors = self.block(shard)
            chosen = place[members] >= 0
            found[place[members[chosen]]] = vectors[chosen]
        return found


@functools.lru_cache(maxsize=4)
def _order(rows: int) -> NDArray[np.int64]:
    """`(rows,)` the images in the order in which they are stored."""
    return np.random.default_rng(0).permutation(rows)


def _shard_rows(rows: int, shard_rows: int, shard: int) -> NDArray[np.int64]:
    """The images of a shard."""
    return _order(rows)[shard * shard_rows : (shard + 1) * shard_rows]


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:05d}.npz"


# ------------------------------------------------------------------------------------------------------- encoding


def encode_images(
    encoder: Encoder, images: Images, readouts: Sequence[Readout], data_hash: str, masks: Images | None = None,
    folder: Path | None = None, batch_size: int | None = None, workers: int = 2, max_unreadable: float = 0.01,
    shard_rows: int = SHARD_ROWS,
) -> FeatureStore:  # fmt: skip
    """The features of all images for every (layer, pooling): from disk where they are, encoded where they are not.

    Args:
        encoder: of `load_encoder`.
        images: PIL RGB images or `(H, W, 3)` uint8 arrays, by index.
        readouts: pairs of layer and pooling, all computed in one pass.
        data_hash: identifies the images in their order (and the masks): `World.hash`, `ImageFolder.hash` ...
        masks: `(H, W)` object masks in the images' own pixels, for the pooling `object`.
        folder: parent of the stores; default `features` in the cache folder.
        batch_size: images at once; default: by the size of the encoder's input and, on a GPU, its memory.
        workers: threads that decode and resize.
        max_unreadable: images that may be unreadable, which are skipped and listed in the store: below 1 a share of
            all, but at least `FEW`; from 1 on a count; 0 for none.
        shard_rows: images in a file.

    Raises:
        StudyError: unknown layer or pooling, too many unreadable images, a damaged shard, no space left.
            What was encoded stays and is used by the next run.
    """
    readouts = list(dict.fromkeys(readouts))
    encoder.check(readouts)
    if not len(images):
        raise StudyError("there are no images to encode: check the data folder")
    key = [FORMAT, encoder.key, data_hash, len(images), shard_rows]
    place = (folder or cache_dir() / "features") / f"{encoder.name}_{hash_value(key)}" / hash_value(sorted(readouts))
    batch_size = batch_size or encoder.images_at_once
    job = _Job(encoder, images, masks, readouts, place, shard_rows, batch_size, max_unreadable)
    if pending := [shard for shard in _own_first(job.shards) if not job.path(shard).exists()]:
        remove_leftovers(place)
        write_json(place / "key.json", key)
        _encode_shards(job, pending, workers)
    return _opened(job)


def _opened(job: _Job) -> FeatureStore:
    """The complete store of a job."""
    dims, skipped = dict[Readout, int](), dict[int, str]()
    for shard in range(job.shards):
        with reading(job.path(shard)), np.load(job.path(shard)) as arrays:
            skipped |= dict(zip(arrays["skipped"].tolist(), arrays["reasons"].tolist(), strict=True))
            if not shard:
                dims = {readout: arrays[":".join(readout)].shape[1] for readout in job.readouts}
    job.check_readable(list(skipped.values()))
    return FeatureStore(job.folder, len(job.images), job.shard_rows, dims, skipped)


@dataclasses.dataclass(frozen=True)
class _Job:
    encoder: Encoder
    images: Images
    masks: Images | None
    readouts: Sequence[Readout]
    folder: Path
    shard_rows: int
    batch_size: int
    max_unreadable: float

    @property
    def shards(self) -> int:
        return -(-len(self.images) // self.shard_rows)

    def path(self, shard: int) -> Path:
        return _shard_path(self.folder, shard)

    def rows(self, shard: int) -> list[int]:
        return _shard_rows(len(self.images), self.shard_rows, shard).tolist()

    def check_readable(self, reasons: Sequence[str]) -> None:
        limit, count = self.max_unreadable, len(self.images)
        allowed = limit if limit >= 1 or limit == 0 else max(FEW, int(limit * count))
        if len(reasons) > min(allowed, count - 1):
            of, limit_is = f"{len(reasons)} of {count} images", f"the limit of {allowed:.0f} (max_unreadable)"
            raise StudyError(f"{of} are unreadable, over {limit_is}: {reasons[0]}")


def _own_first(shards: int) -> list[int]:
    """All shards, those of this process of `torchrun` first."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return sorted(range(shards), key=lambda shard: ((shard - rank) % world, shard))


def _encode_shards(job: _Job, pending: Sequence[int], workers: int) -> None:
    """Encode what nobody else is encoding, then wait for (or take over) what others had begun."""
    reasons: list[str] = []
    done = len(job.images) - sum(len(job.rows(shard)) for shard in pending)
    bar = tqdm(total=len(job.images), initial=done, unit="image", desc=job.encoder.name, mininterval=0.2, leave=False)
    with ThreadPoolExecutor(workers) as pool, bar:
        for patience in (0.0, -1.0):  # seconds to wait for a lock; -1 is for ever
            left = []
            for shard in pending:
                try:
                    with FileLock(job.path(shard).with_suffix(".lock"), timeout=patience):
                        if not job.path(shard).exists():
                            reasons += _encode_shard(job, shard, pool, bar)
                            job.check_readable(reasons)
                        else:
                            bar.update(len(job.rows(shard)))
                except Timeout:
                    left.append(shard)
            pending = left


def _encode_shard(job: _Job, shard: int, pool: ThreadPoolExecutor, bar: tqdm[Any]) -> list[str]:
    """Encode and write one shard; returns why some of its images were unreadable."""
    rows, parts, faults = job.rows(shard), [], list[str]()
    for inputs in _prefetched(job, rows, pool):
        parts.append(_encode_batch(job, inputs))
        faults += [item.fault for item in inputs]
        bar.update(len(inputs))
    features = {":".join(readout): np.concatenate([part[readout] for part in parts]) for readout in job.readouts}
    for name, block in features.items():
        if not np.isfinite(block).all():
            raise StudyError(f"{job.encoder.name}'s {name} features overflow 16 bits: leave that layer out")
    skipped = {row: fault for row, fault in zip(rows, faults, strict=True) if fault}
    notes = {"skipped": np.array(list(skipped), np.int64), "reasons": np.array(list(skipped.values()), str)}
    with atomic_path(job.path(shard)) as temporary:
        np.savez(temporary, allow_pickle=False, **features, **notes)
    return list(skipped.values())


@dataclasses.dataclass(frozen=True)
class _Input:
    """`(3, S, S)` of an image (`Preprocessing.square`), `(S, S)` bool of its object and itself; or its fault."""

    pixels: Tensor
    mask: Tensor
    seen: Tensor
    fault: str = ""


def _prefetched(job: _Job, rows: list[int], pool: ThreadPoolExecutor) -> Iterator[list[_Input]]:
    """The inputs of batch after batch, decoded `PREFETCH` batches ahead."""
    ahead: list[Iterator[_Input]] = []
    for start in range(0, len(rows), job.batch_size):
        ahead.append(pool.map(functools.partial(_input, job), rows[start : start + job.batch_size]))
        if len(ahead) > PREFETCH:
            yield list(ahead.pop(0))
    yield from map(list, ahead)


def _input(job: _Job, row: int) -> _Input:
    size = job.encoder.image_size
    whole = torch.ones(size, size, dtype=torch.bool)
    try:
        image = job.images[row]
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        pixels = job.encoder.preprocess.square(image)
    except StudyError as error:
        return _Input(job.encoder.preprocess.square(Image.new("RGB", (size, size))), whole, whole, str(error))
    geometry = job.encoder.preprocess.geometry(image.width, image.height)
    left, top, right, bottom = geometry.seen
    seen = torch.zeros_like(whole)
    seen[top:bottom, left:right] = True
    return _Input(pixels, whole if job.masks is None else _mask_in_input(np.asarray(job.masks[row]), geometry), seen)


def _mask_in_input(mask: NDArray[Any], geometry: Geometry) -> Tensor:
    """`(S, S)` bool in the input's frame of an `(H, W)` mask in the image's pixels (nearest pixel)."""
    if mask.shape != (geometry.height, geometry.width):
        size = f"{geometry.height}x{geometry.width}"
        raise StudyError(f"a mask of shape {mask.shape} cannot belong to an image of {size}: give masks in its pixels")
    x, y = geometry.scale_x, geometry.scale_y
    back = (1 / x, 0, -geometry.left / x, 0, 1 / y, -geometry.top / y)  # from a pixel of the input to the image's
    taken = Image.fromarray((mask > 0).astype(np.uint8)).transform((geometry.size,) * 2, Image.Transform.AFFINE, back)
    return torch.from_numpy(np.array(taken) > 0)


def _encode_batch(job: _Job, inputs: list[_Input]) -> dict[Readout, NDArray[np.float16]]:
    """`(B, C)` of every readout; unreadable rows are zero."""
    pixels, masks, seen = (torch.stack([getattr(item, name) for item in inputs]) for name in ("pixels", "mask", "seen"))
    objects = None if job.masks is None else masks.to(job.encoder.device)
    shown = None if seen.all() else seen.to(job.encoder.device)
    vectors = job.encoder.pooled(job.encoder.normalised(pixels, seen), job.readouts, objects, shown)
    readable = torch.tensor([not item.fault for item in inputs])[:, None]
    # torch halves many times faster than NumPy; what overflows is told once the shard is complete
    return {pair: torch.where(readable, part.cpu(), 0).half().numpy() for pair, part in vectors.items()}
