"""Many pictures of MojiWorld: rendered once by all cores and kept in the cache, or written as COCO JSON."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_tools
from tqdm.auto import tqdm

from samantics.cache import alone, atomic_path, cache_dir, hash_value, reading
from samantics.data.coco import CocoDataset, ImageRecord, Instance, rles_of
from samantics.data.coco_files import load_written, write_coco
from samantics.errors import StudyError
from samantics.mojiworld import catalogue as tables
from samantics.mojiworld.world import KINDS, MAX_OBJECTS, RGB, Picture, Stream, World, class_names, picture

CHUNK = 128  # pictures that a process renders at a time


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
    """The pictures of a stream at these indices, in the order given.

    Args:
        world: what the pictures are made of.
        stream: of `STREAMS`, or one's own.
        indices: which of its pictures.
    """
    return _stacked([picture(world, stream, index) for index in indices])


def _stacked(pictures: Sequence[Picture]) -> Pictures:
    drawings = np.full((len(pictures), MAX_OBJECTS), -1, np.int16)
    for row, one in zip(drawings, pictures, strict=True):
        row[: len(one.drawings)] = one.drawings
    images, instances = (np.stack([getattr(one, name) for one in pictures]) for name in ("image", "instances"))
    return Pictures(images, instances, drawings, np.array([KINDS.index(one.kind) for one in pictures], np.uint8))


def stored_pictures(world: World, stream: Stream, count: int) -> Pictures:
    """Pictures 0 to `count - 1` of a stream, rendered once by all cores, then kept.

    Args:
        world: what the pictures are made of.
        stream: of `STREAMS`, or one's own.
        count: how many.

    Raises:
        StudyError: the drawings are not installed; the cache is damaged or cannot be written; a count below 1.
    """
    if count < 1:
        raise StudyError(f"{count} pictures were asked for: choose 1 or more")
    folder = cache_dir() / "mojiworld" / _name(world, stream, count)
    paths = [folder / f"{field.name}.npy" for field in dataclasses.fields(Pictures)]
    with alone(folder), ExitStack() as stack:  # which closes the first file last: where that one is, all are
        if not paths[0].is_file():
            files = [stack.enter_context(open(stack.enter_context(atomic_path(path)), "wb")) for path in paths]
            for one in _rendered(world, stream, count):
                for file, values in zip(files, vars(_stacked([one])).values(), strict=True):
                    if not file.tell():
                        header = np.lib.format.header_data_from_array_1_0(values)
                        np.lib.format.write_array_header_1_0(file, header | {"shape": (count, *values.shape[1:])})
                    file.write(values)
    with reading(folder):
        return Pictures(*(np.load(path, mmap_mode="r") for path in paths))


def write_scenes(world: World, stream: Stream, count: int, folder: Path) -> CocoDataset:
    """Pictures of a stream as PNG files with COCO JSON, written once, into a folder of their own in `folder`."""
    home = folder / _name(world, stream, count)
    path, images, instances = home / "instances.json", list[ImageRecord](), list[Instance]()
    with alone(home):
        if not path.is_file():
            with atomic_path(path) as temporary:  # appears when the images are there
                for number, one in enumerate(_rendered(world, stream, count)):
                    images.append(ImageRecord(number + 1, f"{number:05d}.png", *one.instances.shape))
                    Image.fromarray(one.image).save(home / images[-1].file, compress_level=1)
                    instances += _objects(one, number + 1, len(instances))
                shown = class_names(stream.classes)
                categories = {number: name for number, name in enumerate(tables.classes(), start=1) if name in shown}
                write_coco(temporary, images, categories, instances)
    return load_written(path)


def _objects(one: Picture, image_id: int, before: int) -> list[Instance]:
    """The objects of a picture; their ids follow those of so many `before`."""
    table, label, found = tables.catalogue(), tables.class_of_drawing(), []
    rles = rles_of(one.instances == np.arange(1, len(one.drawings) + 1)[:, None, None])
    for number, (row, rle) in enumerate(zip(one.drawings, rles, strict=True), start=before + 1):
        x, y, width, height = mask_tools.toBbox(rle).tolist()
        shape = (x, y, x + width, y + height), float(mask_tools.area(rle)), rle
        who = {"artist": table["artist"][row], "split": table["split"][row]}
        found.append(Instance(number, image_id, int(label[row]) + 1, *shape, **who))
    return found


def _name(world: World, stream: Stream, count: int) -> str:
    words = stream.name.replace(" ", "-").replace("/", "-")
    return f"{words}_{world.hash}_{hash_value(dataclasses.asdict(stream))}_{count}"


def _rendered(world: World, stream: Stream, count: int) -> Iterator[Picture]:
    """Pictures 0 to `count - 1`, by all cores."""
    tables.sprites()  # rasterised once, before the workers start and each would
    workers = min(len(os.sched_getaffinity(0)), -(-count // CHUNK))
    with ProcessPoolExecutor(workers) as pool:
        spread = functools.partial(pool.map, chunksize=CHUNK) if workers > 1 else map
        made = spread(functools.partial(picture, world, stream), range(count))
        yield from tqdm(made, "rendering MojiWorld", count, unit="picture", leave=False)
