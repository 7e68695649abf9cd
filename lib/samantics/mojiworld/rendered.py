"""Many pictures of MojiWorld: rendered once by all cores and kept in the cache, or written as COCO JSON."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_tools
from tqdm.auto import tqdm

from samantics.cache import cache_dir, hash_value, reading, write_json
from samantics.errors import StudyError
from samantics.mojiworld import catalogue as tables
from samantics.mojiworld.places import PLACES
from samantics.mojiworld.world import KINDS, MAX_OBJECTS, PARTS, RGB, Picture, Stream, World, picture

CHUNK = 128  # pictures that a process renders at a time
NO_PLACE = 255


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Many pictures as arrays.

    Attributes:
        images: `(N, S, S, 3)` uint8, RGB.
        instances: `(N, S, S)` uint8, as in `Picture`.
        drawings: `(N, MAX_OBJECTS)` int16 catalogue rows, -1 where there is no object; the first is the anchor.
        kinds: `(N,)` uint8 positions in `KINDS`.
        places: `(N,)` uint8 positions in `PLACES`; 255 in a studio.
    """

    images: RGB
    instances: NDArray[np.uint8]
    drawings: NDArray[np.int16]
    kinds: NDArray[np.uint8]
    places: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> NDArray[np.int64]:
        """`(N,)` class label of each picture's first object."""
        return tables.class_of_drawing()[self.drawings[:, 0]]


FIELDS = tuple(field.name for field in dataclasses.fields(Pictures))


def render(world: World, stream: Stream, indices: Iterable[int]) -> Pictures:
    """The pictures of a stream at these indices, in the order given."""
    return _stack([picture(world, stream, index) for index in indices])


def stored_pictures(world: World, stream: Stream, count: int, workers: int = 0) -> Pictures:
    """Pictures 0 to `count - 1` of a stream, rendered once and memory-mapped from the cache folder.

    Args:
        world: what the pictures are made of.
        stream: which pictures.
        count: how many, 1 or more.
        workers: processes that render; 0 means all cores.

    Returns:
        The pictures; their arrays are read-only maps of files.

    Raises:
        StudyError: the drawings are not installed; the cache is damaged; a count below 1.
    """
    _check(count)
    name = "_".join([stream.name.replace(" ", "-").replace("/", "-"), world.hash, _hash(stream), str(count)])
    folder = cache_dir() / "mojiworld" / name
    with _made_once(folder) as unfinished:
        if unfinished:
            first = _stack([picture(world, stream, 0)])
            for part in FIELDS:
                sample = getattr(first, part)
                np.lib.format.open_memmap(unfinished / f"{part}.npy", "w+", sample.dtype, (count, *sample.shape[1:]))
            _by_all_cores(functools.partial(_fill, unfinished, world, stream), count, workers)
    with reading(folder):
        return Pictures(*(np.load(folder / f"{part}.npy", mmap_mode="r") for part in FIELDS))


def _check(count: int) -> None:
    if count < 1:
        raise StudyError(f"{count} pictures were asked for: choose 1 or more")


def _hash(stream: Stream) -> str:
    return hash_value(dataclasses.asdict(stream))


@contextmanager
def _made_once(folder: Path) -> Iterator[Path | None]:
    """Yield a folder to fill, which appears under its name when all is there; None where it is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # who comes second waits, and finds the pictures
        if folder.exists():
            yield None
            return
        tables.sprites()  # rasterised once, before the workers start and each would
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        unfinished.mkdir()
        try:
            yield unfinished
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _by_all_cores(work: Any, count: int, workers: int) -> list[Any]:
    """What `work(span)` returns for all spans of `CHUNK` indices up to `count`, in order."""
    spans = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    workers = min(workers or len(os.sched_getaffinity(0)), len(spans))
    shown = functools.partial(tqdm, total=len(spans), desc="rendering MojiWorld", unit=f"{CHUNK} pictures", leave=False)
    if workers == 1:
        return list(shown(map(work, spans)))
    with ProcessPoolExecutor(workers) as pool:
        return list(shown(pool.map(work, spans)))


def _fill(folder: Path, world: World, stream: Stream, span: range) -> None:
    pictures = render(world, stream, span)
    for part in FIELDS:
        array = np.load(folder / f"{part}.npy", mmap_mode="r+")
        array[span.start : span.stop] = getattr(pictures, part)
        array.flush()


def _stack(pictures: Sequence[Picture]) -> Pictures:
    drawings = np.full((len(pictures), MAX_OBJECTS), -1, np.int16)
    for row, one in zip(drawings, pictures, strict=True):
        row[: len(one.drawings)] = one.drawings
    places = list(PLACES)
    return Pictures(
        np.stack([one.image for one in pictures]),
        np.stack([one.instances for one in pictures]),
        drawings,
        np.array([KINDS.index(one.kind) for one in pictures], np.uint8),
        np.array([places.index(one.place) if one.place else NO_PLACE for one in pictures], np.uint8),
    )


# ------------------------------------------------------------------------------------------------------- COCO JSON


def write_scenes(world: World, stream: Stream, count: int, folder: Path | str, workers: int = 0) -> tuple[Path, Path]:
    """Write pictures of a stream as PNG files with COCO JSON.

    Every annotation also names its `class`, `superclass`, `artist`, the artist's `split` and the `icon`;
    every category its `supercategory` and `part` (`base`, `novel`, or empty outside the instance data).

    Args:
        world: what the pictures are made of.
        stream: which pictures; its `classes` are the categories.
        count: how many.
        folder: a folder of this world and stream is made in it, once.
        workers: processes that render; 0 means all cores.

    Returns:
        The paths of the JSON file and of the folder of images.

    Raises:
        StudyError: the drawings are not installed; a count below 1.
    """
    _check(count)
    home = Path(folder) / f"{stream.name.replace(' ', '-')}_{world.hash}_{_hash(stream)}_{count}"
    with _made_once(home) as unfinished:
        if unfinished:
            (unfinished / "images").mkdir()
            work = functools.partial(_write_span, unfinished / "images", world, stream)
            found = [entry for span in _by_all_cores(work, count, workers) for entry in span]
            annotations = [annotation for _, its in found for annotation in its]
            for number, annotation in enumerate(annotations, start=1):
                annotation["id"] = number
            content = {"images": [image for image, _ in found], "annotations": annotations}
            write_json(unfinished / "annotations.json", {**content, "categories": categories(stream)})
    return home / "annotations.json", home / "images"


def categories(stream: Stream) -> list[dict[str, Any]]:
    """COCO's categories of a stream: `id` (class label + 1), `name`, `supercategory`, `part`."""
    part_of = dict(tables.instance_classes()[["class", "part"]].itertuples(index=False, name=None))
    wanted = PARTS.get(stream.classes, ("base", "novel", ""))
    return [
        {"id": label + 1, "name": name, "supercategory": tables.superclasses()[above], "part": part_of.get(name, "")}
        for label, (name, above) in enumerate(zip(tables.classes(), tables.superclass_of_class(), strict=True))
        if part_of.get(name, "") in wanted
    ]


def _write_span(home: Path, world: World, stream: Stream, span: range) -> list[tuple[dict[str, Any], list[Any]]]:
    """PNG files of some pictures, with COCO's entries for them (ids of annotations are given later)."""
    entries = []
    for index in span:
        one = picture(world, stream, index)
        name = f"{index:06d}.png"
        Image.fromarray(one.image).save(home / name, compress_level=1)
        image = {"id": index + 1, "file_name": name, "width": world.image_size, "height": world.image_size}
        entries.append((image | {"place": one.place}, _annotations(one, index + 1)))
    return entries


def _annotations(one: Picture, image_id: int) -> list[dict[str, Any]]:
    table = tables.catalogue()
    found = []
    for number, drawing in enumerate(one.drawings, start=1):
        row = table.iloc[drawing]
        rle = mask_tools.encode(np.asfortranarray(one.instances == number))
        found.append(
            {
                "image_id": image_id,
                "category_id": int(tables.class_of_drawing()[drawing]) + 1,
                "bbox": [float(v) for v in mask_tools.toBbox(rle)],
                "area": float(mask_tools.area(rle)),
                "iscrowd": 0,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                **{key: str(row[key]) for key in ("class", "superclass", "artist", "split", "icon")},
            }
        )
    return found
