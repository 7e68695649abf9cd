"""Many pictures of MojiWorld: rendered once by all cores and kept in the cache, or written as COCO JSON."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_tools
from tqdm.auto import tqdm

from samantics.cache import alone, cache_dir, hash_value, reading, write_json
from samantics.errors import StudyError
from samantics.mojiworld import catalogue as tables
from samantics.mojiworld.world import KINDS, MAX_OBJECTS, PARTS, RGB, Stream, World, picture

CHUNK = 128  # pictures that a process renders at a time
Entry = tuple[dict[str, Any], list[dict[str, Any]]]  # COCO's image and its annotations


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Many pictures as arrays."""

    images: RGB  # (N, S, S, 3) uint8
    instances: NDArray[np.uint8]  # (N, S, S), as in `Picture`
    drawings: NDArray[np.int16]  # (N, MAX_OBJECTS) catalogue rows, -1 where there is no object; the first is the anchor
    kinds: NDArray[np.uint8]  # (N,) positions in `KINDS`

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> NDArray[np.int64]:
        """`(N,)` class label of each picture's first object."""
        return tables.class_of_drawing()[self.drawings[:, 0]]


def render(world: World, stream: Stream, indices: Iterable[int]) -> Pictures:
    """The pictures of a stream at these indices, in the order given."""
    pictures = [picture(world, stream, index) for index in indices]
    drawings = np.full((len(pictures), MAX_OBJECTS), -1, np.int16)
    for row, one in zip(drawings, pictures, strict=True):
        row[: len(one.drawings)] = one.drawings
    return Pictures(
        np.stack([one.image for one in pictures]),
        np.stack([one.instances for one in pictures]),
        drawings,
        np.array([KINDS.index(one.kind) for one in pictures], np.uint8),
    )


def stored_pictures(world: World, stream: Stream, count: int) -> Pictures:
    """Pictures 0 to `count - 1` of a stream, rendered once by all cores, then kept.

    Raises:
        StudyError: the drawings are not installed; the cache is damaged; a count below 1.
    """
    folder = cache_dir() / "mojiworld" / _name(world, stream, count)
    with _made_once(folder, count) as unfinished:
        if unfinished:
            for part, sample in vars(render(world, stream, [0])).items():
                np.lib.format.open_memmap(unfinished / f"{part}.npy", "w+", sample.dtype, (count, *sample.shape[1:]))
            _by_all_cores(functools.partial(_fill, unfinished, world, stream), count)
    with reading(folder):
        return Pictures(*(np.load(folder / f"{f.name}.npy", mmap_mode="r") for f in dataclasses.fields(Pictures)))


def _name(world: World, stream: Stream, count: int) -> str:
    words = stream.name.replace(" ", "-").replace("/", "-")
    return f"{words}_{world.hash}_{hash_value(dataclasses.asdict(stream))}_{count}"


def _fill(folder: Path, world: World, stream: Stream, span: range) -> None:
    for part, values in vars(render(world, stream, span)).items():
        array = np.load(folder / f"{part}.npy", mmap_mode="r+")
        array[span.start : span.stop] = values
        array.flush()


@contextmanager
def _made_once(folder: Path, count: int) -> Iterator[Path | None]:
    """Yield a folder to fill, which appears under its name when all is there; None where it is there already."""
    if count < 1:
        raise StudyError(f"{count} pictures were asked for: choose 1 or more")
    with nullcontext() if folder.exists() else alone(folder):  # who comes second waits, and finds it
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


def _by_all_cores(work: Callable[[range], Any], count: int) -> list[Any]:
    """What `work(span)` returns for all spans of `CHUNK` indices up to `count`, in order."""
    spans = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    workers = min(len(os.sched_getaffinity(0)), len(spans))
    shown = functools.partial(tqdm, total=len(spans), desc="rendering MojiWorld", unit=f"{CHUNK} pictures", leave=False)
    if workers == 1:
        return list(shown(map(work, spans)))
    with ProcessPoolExecutor(workers) as pool:
        return list(shown(pool.map(work, spans)))


# ------------------------------------------------------------------------------------------------------- COCO JSON


def write_scenes(world: World, stream: Stream, count: int, folder: Path | str) -> tuple[Path, Path]:
    """Write pictures of a stream as PNG files with COCO JSON, into a folder of their own in `folder`, once.

    Every annotation also names its `class`, `superclass`, `artist`, the artist's `split` and the `icon`;
    every category its `supercategory` and `part` (`base`, `novel`, or empty outside the instance data).
    Returns the paths of the JSON file and of the folder of images.
    """
    home = Path(folder) / _name(world, stream, count)
    with _made_once(home, count) as unfinished:
        if unfinished:
            spans = _by_all_cores(functools.partial(_write_span, unfinished, world, stream), count)
            images, objects = zip(*(entry for span in spans for entry in span), strict=True)
            annotations = [{"id": n, **one} for n, one in enumerate([one for its in objects for one in its], start=1)]
            content = {"images": images, "annotations": annotations, "categories": categories(stream)}
            write_json(unfinished / "instances.json", content)
    return home / "instances.json", home


def categories(stream: Stream) -> list[dict[str, Any]]:
    """COCO's categories of a stream: `id` (class label + 1), `name`, `supercategory`, `part`."""
    part_of = dict(tables.instance_classes()[["class", "part"]].itertuples(index=False, name=None))
    wanted = PARTS.get(stream.classes, ("base", "novel", ""))
    return [
        {"id": label + 1, "name": name, "supercategory": tables.superclasses()[above], "part": part_of.get(name, "")}
        for label, (name, above) in enumerate(zip(tables.classes(), tables.superclass_of_class(), strict=True))
        if part_of.get(name, "") in wanted
    ]


def _write_span(home: Path, world: World, stream: Stream, span: range) -> list[Entry]:
    """PNG files of some pictures, with COCO's entries for them (ids of annotations are given later)."""
    entries, table = [], tables.catalogue()[["class", "superclass", "artist", "split", "icon"]].astype(str)
    for index in span:
        one, side, annotations = picture(world, stream, index), world.image_size, []
        image = {"id": index + 1, "file_name": f"{index:05d}.png", "width": side, "height": side, "place": one.place}
        Image.fromarray(one.image).save(home / f"{index:05d}.png", compress_level=1)
        for number, drawing in enumerate(one.drawings, start=1):
            rle = mask_tools.encode(np.asfortranarray(one.instances == number))
            shape = {"bbox": [float(v) for v in mask_tools.toBbox(rle)], "area": float(mask_tools.area(rle))}
            outline = {"size": rle["size"], "counts": rle["counts"].decode()}
            ids = {"image_id": index + 1, "category_id": int(tables.class_of_drawing()[drawing]) + 1, "iscrowd": 0}
            annotations.append({**ids, **shape, "segmentation": outline, **table.iloc[drawing].to_dict()})
        entries.append((image, annotations))
    return entries
