"""Features on disk: every image is encoded once, for all wanted layers and poolings, and read many times.

A store belongs to one encoder, weight file, preprocessing and data set; change any of them and it is another store. Its
rows lie in a random order, so that a reader who takes shard after shard sees the classes mixed. Shards appear whole or
not at all, so a killed run resumes where it was, and a shard is written by whoever holds its lock: several runs, or the
processes of ``torchrun`` on any number of nodes, share the work through the folder alone.

    python -m samantics extract FOLDER --encoder sam --weights official --layers final:mean
    torchrun --nproc-per-node 8 -m samantics extract FOLDER --encoder sam ...      # one process per GPU
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from samantics.cache import atomic_path, cache_dir, hash_value, remove_leftovers, write_json
from samantics.errors import StudyError
from samantics.models.architectures import Readout
from samantics.models.encoder import PIXELS_AT_ONCE, Encoder
from samantics.models.preprocessing import Geometry

FORMAT = 1  # of the files below; a store of another format is refused
SHARD_ROWS = 1024
PREFETCH = 2  # batches decoded ahead
FEW = 3  # unreadable images that a data set of any size may have


class Images(Protocol):
    """Anything with a length whose items are RGB pictures: PIL images or ``(H, W, 3)`` uint8 arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


# -------------------------------------------------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """Features of ``rows`` images, some of which may have been unreadable.

    Attributes:
        folder: where the shards lie.
        rows: number of images that were to be encoded.
        shard_rows: images in a shard (fewer in the last).
        dims: width of the vectors of each (layer, pooling).
        skipped: row -> reason, of the images that could not be read; no feature is returned for them.
    """

    folder: Path
    rows: int
    shard_rows: int
    dims: dict[Readout, int]
    skipped: dict[int, str]

    @functools.cached_property
    def kept(self) -> NDArray[np.int64]:
        """``(N,)`` rows that have features: select labels with it (``labels[store.kept]``)."""
        return np.setdiff1d(np.arange(self.rows), list(self.skipped))

    def read(self, wanted: Readout) -> NDArray[np.float32]:
        """``(N, C)`` float32 features of the kept rows, all in memory, in the order of the images.

        Raises:
            StudyError: the store lacks that layer and pooling, or a shard is damaged.
        """
        column = self.column(wanted)
        out = np.empty(column.shape, np.float32)
        for shard in range(self.shards):
            positions, vectors = column.block(shard)
            out[positions] = vectors
        return out

    def column(self, wanted: Readout) -> Column:
        """The same, to be read block by block.

        Raises:
            StudyError: the store lacks that layer and pooling.
        """
        if wanted not in self.dims:
            have = ", ".join(":".join(pair) for pair in self.dims)
            raise StudyError(f"{self.folder} has no {':'.join(wanted)} features, only {have}: encode them too")
        return Column(self, wanted)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)


@dataclasses.dataclass(frozen=True)
class Column:
    """One (layer, pooling) of a store, read shard by shard, so that memory does not grow with the number of images."""

    store: FeatureStore
    wanted: Readout

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, C)``, as the array of all blocks together would have."""
        return len(self.store.kept), self.store.dims[self.wanted]

    def __len__(self) -> int:
        return len(self.store.kept)

    def block(self, shard: int) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
        """Positions ``(n,)`` among the kept rows and features ``(n, C)``, float16, of one shard: some images at random.

        Raises:
            StudyError: the shard is damaged.
        """
        rows = _shard_rows(self.store.rows, self.store.shard_rows, shard)
        vectors = _read_block(self.store.folder, shard, self.wanted)
        if self.store.skipped:
            readable = ~np.isin(rows, list(self.store.skipped))
            rows, vectors = rows[readable], vectors[readable]
        return np.searchsorted(self.store.kept, rows), vectors


@functools.lru_cache(maxsize=4)
def _order(rows: int) -> NDArray[np.int64]:
    """``(rows,)`` the images in the order in which they are stored."""
    return np.random.default_rng(0).permutation(rows)


def _shard_rows(rows: int, shard_rows: int, shard: int) -> NDArray[np.int64]:
    """The images of a shard."""
    return _order(rows)[shard * shard_rows : (shard + 1) * shard_rows]


def _read_block(folder: Path, shard: int, wanted: Readout) -> NDArray[np.float16]:
    """One column of one shard, its checksum verified; only its own pages are read."""
    path, note = _shard_path(folder, shard), _read_note(folder, shard)
    start = 0
    for name, dim, checksum in note["columns"]:
        stop = start + note["rows"] * dim
        if name == ":".join(wanted):
            try:
                values = np.array(np.load(path, mmap_mode="r")[start:stop])  # a copy: the map is closed again
                rows = values.reshape(note["rows"], dim)
            except (OSError, ValueError, EOFError) as error:
                raise StudyError(f"{path} is damaged: delete it and run again, which redoes this shard only") from error
            if zlib.crc32(rows.data) != checksum:
                raise StudyError(f"{path} is damaged: delete it and run again, which redoes this shard only")
            return rows
        start = stop
    raise StudyError(f"{path} has no {':'.join(wanted)} features: delete {folder} and run again")


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:05d}.npy"


def _note_path(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:05d}.json"


def _read_note(folder: Path, shard: int) -> dict[str, Any]:
    """What is known of a finished shard: format, rows, columns with widths and checksums, skipped rows."""
    path = _note_path(folder, shard)
    try:
        note = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{path} is missing or damaged: delete it and run again, which redoes this shard only"
        ) from error
    if note.get("format") != FORMAT:
        raise StudyError(f"{folder} is a store of another version: delete that folder and run again")
    return note


# ------------------------------------------------------------------------------------------------------- encoding


def encode_images(
    encoder: Encoder,
    images: Images,
    wanted: Sequence[Readout],
    data_hash: str,
    masks: Images | None = None,
    folder: Path | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    max_unreadable: float = 0.01,
    shard_rows: int = SHARD_ROWS,
) -> FeatureStore:
    """The features of all images for every (layer, pooling): from disk where they are, encoded where they are not.

    Args:
        images: PIL RGB images or ``(H, W, 3)`` uint8 arrays, by index.
        wanted: pairs of layer and pooling, all computed in one pass.
        data_hash: identifies the images in their order (and the masks): ``World.hash``, ``ImageFolder.hash`` ...
        masks: ``(H, W)`` object masks in the images' own pixels, for the pooling ``object``.
        folder: parent of the stores; default ``features`` in the cache folder.
        batch_size: images at once; default: 32, or fewer where the encoder's input is large.
        workers: threads that decode and resize.
        max_unreadable: images that may be unreadable, which are skipped and listed in the store: below 1 a share of
            all, but at least `FEW`; from 1 on a count; 0 for none.

    Raises:
        StudyError: unknown layer or pooling, too many unreadable images, a store of another version, no space left.
            What was encoded stays and is used by the next run.
    """
    wanted = list(dict.fromkeys(wanted))
    encoder.check(wanted)
    if not len(images):
        raise StudyError("there are no images to encode: check the data folder")
    key = {"encoder": encoder.key, "data": data_hash, "images": len(images), "shard_rows": shard_rows}
    parent = (folder or cache_dir() / "features") / f"{encoder.name}_{hash_value(key)}"
    place = _covering(parent, wanted) or parent / hash_value(sorted(wanted))
    batch_size = batch_size or max(1, min(32, PIXELS_AT_ONCE // encoder.image_size**2))
    job = _Job(encoder, images, masks, tuple(wanted), place, shard_rows, batch_size, workers)
    pending = [shard for shard in _own_first(job.shards) if not _is_done(place, shard)]
    if pending:
        remove_leftovers(place)
        write_json(place / "key.json", {"format": FORMAT, **key, "wanted": [":".join(pair) for pair in wanted]})
        _encode_shards(job, pending, max_unreadable)
    return _open(place, len(images), shard_rows, max_unreadable)


def _covering(parent: Path, wanted: Sequence[Readout]) -> Path | None:
    """A store of the same encoder and data that has all that is wanted, and perhaps more."""
    for path in sorted(parent.glob("*/key.json")):
        try:
            key = json.loads(path.read_text(encoding="utf-8"))
            if {":".join(pair) for pair in wanted} <= set(key["wanted"]) and _is_done(path.parent, 0):
                return path.parent
        except (OSError, ValueError, KeyError):
            continue  # being written, or not ours
    return None


def _open(folder: Path, rows: int, shard_rows: int, max_unreadable: float) -> FeatureStore:
    notes = [_read_note(folder, shard) for shard in range(-(-rows // shard_rows))]
    skipped = {int(row): str(reason) for note in notes for row, reason in note["skipped"].items()}
    _check_readable(list(skipped.values()), rows, max_unreadable)
    dims = {(name.split(":")[0], name.split(":")[1]): int(dim) for name, dim, _ in notes[0]["columns"]}
    return FeatureStore(folder, rows, shard_rows, dims, skipped)


def _check_readable(reasons: Sequence[str], rows: int, limit: float) -> None:
    allowed = limit if limit >= 1 or limit == 0 else max(FEW, limit * rows)
    if len(reasons) > allowed or len(reasons) == rows:
        counts = f"{len(reasons)} of {rows} images are unreadable, over the limit of {int(allowed)} (max_unreadable)"
        raise StudyError(f"{counts}: {reasons[0]}")


def _is_done(folder: Path, shard: int) -> bool:
    return (
        _shard_path(folder, shard).exists() and _note_path(folder, shard).exists() and bool(_read_note(folder, shard))
    )


def _own_first(shards: int) -> list[int]:
    """All shards, those of this process first: under ``torchrun`` each process begins with its own share."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return sorted(range(shards), key=lambda shard: ((shard - rank) % world, shard))


@dataclasses.dataclass(frozen=True)
class _Job:
    encoder: Encoder
    images: Images
    masks: Images | None
    wanted: tuple[Readout, ...]
    folder: Path
    shard_rows: int
    batch_size: int
    workers: int

    @property
    def shards(self) -> int:
        return -(-len(self.images) // self.shard_rows)

    def rows(self, shard: int) -> list[int]:
        return _shard_rows(len(self.images), self.shard_rows, shard).tolist()


def _encode_shards(job: _Job, pending: Sequence[int], max_unreadable: float) -> None:
    """Encode what nobody else is encoding, then wait for (or take over) what others had begun."""
    reasons: list[str] = []
    with ThreadPoolExecutor(job.workers) as pool, tqdm(total=len(job.images), unit="image", disable=None) as bar:
        bar.set_description(job.encoder.name)
        bar.update(len(job.images) - sum(len(job.rows(shard)) for shard in pending))
        for patience in (0.0, -1.0):  # seconds to wait for a lock; -1 is for ever
            left = []
            for shard in pending:
                try:
                    with FileLock(job.folder / f"shard_{shard:05d}.lock", timeout=patience):
                        if not _is_done(job.folder, shard):
                            reasons += _encode_shard(job, shard, pool)
                            _check_readable(reasons, len(job.images), max_unreadable)
                    bar.update(len(job.rows(shard)))
                except Timeout:
                    left.append(shard)
            pending = left


def _encode_shard(job: _Job, shard: int, pool: ThreadPoolExecutor) -> list[str]:
    """Encode and write one shard; returns why some of its images were unreadable."""
    rows = job.rows(shard)
    features: dict[Readout, NDArray[np.float16]] = {}
    skipped: dict[int, str] = {}
    start = 0
    for batch, inputs in _prefetched(job, rows, pool):
        skipped |= {row: item for row, item in zip(batch, inputs, strict=True) if isinstance(item, str)}
        for wanted, vectors in _encode_batch(job, inputs).items():
            block = features.setdefault(wanted, np.empty((len(rows), vectors.shape[1]), np.float16))
            with np.errstate(over="ignore"):  # told below, as an error
                block[start : start + len(batch)] = vectors
        start += len(batch)
    for wanted, block in features.items():
        if not np.isfinite(block).all():
            raise StudyError(f"{job.encoder.name}'s {':'.join(wanted)} features overflow 16 bits: leave that layer out")
    with atomic_path(_shard_path(job.folder, shard)) as temporary:
        np.save(temporary, np.concatenate([features[wanted].ravel() for wanted in job.wanted]))
    columns = [
        [":".join(wanted), features[wanted].shape[1], zlib.crc32(features[wanted].data)] for wanted in job.wanted
    ]
    note = {"format": FORMAT, "rows": len(rows), "columns": columns, "skipped": skipped}
    write_json(_note_path(job.folder, shard), note)
    return list(skipped.values())


@dataclasses.dataclass(frozen=True)
class _Input:
    pixels: Tensor
    mask: Tensor | None
    seen: Tensor | None


def _prefetched(job: _Job, rows: list[int], pool: ThreadPoolExecutor) -> Iterator[tuple[list[int], list[_Input | str]]]:
    """Batches of rows with their inputs (or the reason why there is none), decoded ``PREFETCH`` batches ahead."""
    batches = [rows[start : start + job.batch_size] for start in range(0, len(rows), job.batch_size)]
    futures: list[list[Future[_Input | str]]] = []
    for number, batch in enumerate(batches):
        for ahead in batches[len(futures) : number + 1 + PREFETCH]:
            futures.append([pool.submit(_input, job, row) for row in ahead])
        inputs = [future.result() for future in futures[number]]
        futures[number] = []  # its pixels can go
        yield batch, inputs


def _input(job: _Job, row: int) -> _Input | str:
    """Input of one image, or the reason why it cannot be read."""
    try:
        image = job.images[row]
    except StudyError as error:
        return str(error)
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    geometry = job.encoder.preprocess.geometry(image.width, image.height)
    mask = None if job.masks is None else mask_in_input(np.asarray(job.masks[row]), geometry)
    left, top, right, bottom = geometry.seen
    seen = None
    if (right - left, bottom - top) != (geometry.size, geometry.size):
        seen = torch.zeros(geometry.size, geometry.size, dtype=torch.bool)
        seen[top:bottom, left:right] = True
    return _Input(job.encoder.preprocess(image), mask, seen)


def mask_in_input(mask: NDArray[Any], geometry: Geometry) -> Tensor:
    """``(S, S)`` bool mask in the input's frame of an ``(H, W)`` mask in the image's pixels (nearest pixel).

    Raises:
        StudyError: the mask has another size than the image.
    """
    if mask.shape != (geometry.height, geometry.width):
        raise StudyError(
            f"a mask of shape {mask.shape} cannot belong to an image of {geometry.height}x{geometry.width}"
        )
    centres = np.arange(geometry.size) + 0.5
    columns = np.floor((centres - geometry.left) / geometry.scale_x).astype(int)
    rows = np.floor((centres - geometry.top) / geometry.scale_y).astype(int)
    inside = (rows < geometry.height)[:, None] & (columns < geometry.width)[None, :]
    taken = mask[rows.clip(0, geometry.height - 1)][:, columns.clip(0, geometry.width - 1)]
    return torch.from_numpy((taken > 0) & inside)


def _encode_batch(job: _Job, inputs: list[_Input | str]) -> dict[Readout, NDArray[np.float32]]:
    """``(B, C)`` of every wanted pair; rows without an input are zero."""
    there = [number for number, item in enumerate(inputs) if isinstance(item, _Input)]
    items = [item for item in inputs if isinstance(item, _Input)]
    size = job.encoder.image_size
    pixels = torch.stack([item.pixels for item in items]) if items else torch.zeros(1, 3, size, size)
    masks = seen = None
    if any(pooling == "object" for _, pooling in job.wanted):
        masks = (
            torch.stack([item.mask for item in items if item.mask is not None]) if items else torch.ones(1, size, size)
        )
    if any(item.seen is not None for item in items):
        whole = torch.ones(size, size, dtype=torch.bool)
        seen = torch.stack([whole if item.seen is None else item.seen for item in items])
    device = job.encoder.device
    vectors = job.encoder.pooled(
        pixels, job.wanted, None if masks is None else masks.to(device), None if seen is None else seen.to(device)
    )
    out = {}
    for wanted, values in vectors.items():
        out[wanted] = np.zeros((len(inputs), values.shape[1]), np.float32)
        out[wanted][there] = values[: len(there)].cpu().numpy()
    return out
