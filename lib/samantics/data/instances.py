"""Annotated objects: images, instances and their boxes, which are `(x0, y0, x1, y1)` in pixels.

Only JSON and pycocotools hold COCO's `x, y, width, height`; `xywh` and `clipped` go between the two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from tqdm import tqdm  # as text, also in notebooks: what runs them passes it on to its terminal

from samantics.cache import hash_value
from samantics.data.folders import counted, image_size, is_turned, listing, open_image, printable
from samantics.data.masks import Rle, is_pixel
from samantics.errors import StudyError
from samantics.run import available_cores

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One image of the data: its id, file name below the image folder, and size in pixels."""

    id: int
    file: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Instance:
    """One annotated object; `artist` and `split` (`train`, `validation`, `test`) say who drew it, in MojiWorld only."""

    id: int
    image_id: int
    category_id: int
    box: Box  # inside the image
    area: float  # pixels of the mask, as the file says it (COCO's area ranges are decided by it)
    rle: Rle = dataclasses.field(hash=False, repr=False)  # the mask; the whole box where `box_only`
    crowd: bool = False  # stands for a group: evaluation ignores what falls on it, and it is never a reference
    artist: str = ""
    split: str = ""
    box_only: bool = False  # the file has a box and no mask; as a reference it needs a mask made from the box


@dataclasses.dataclass(frozen=True)
class CocoDataset:
    """Checked instance data."""

    path: Path  # the JSON file
    folder: Path  # of its images
    images: dict[int, ImageRecord]  # by id
    categories: dict[int, str]  # names by id
    instances: tuple[Instance, ...]  # in the file's order
    annotated: bool  # False where the file has no annotations at all: then nothing can be measured on it
    notes: tuple[str, ...] = ()  # a line for each kind of fault that was mended or left out in reading, with a count

    @functools.cached_property
    def by_image(self) -> dict[int, tuple[Instance, ...]]:
        """The instances of every image; an empty tuple where an image shows none."""
        found: dict[int, list[Instance]] = {image_id: [] for image_id in self.images}
        for instance in self.instances:
            found[instance.image_id].append(instance)
        return {image_id: tuple(instances) for image_id, instances in found.items()}

    def first(self, count: int) -> CocoDataset:
        """The first so many images, with their objects."""
        return self.only({*list(self.images)[:count]})

    def only(self, image_ids: Collection[int], *notes: str) -> CocoDataset:
        """These images, with their objects; further notes."""
        images = {image_id: record for image_id, record in self.images.items() if image_id in image_ids}
        instances = tuple(instance for instance in self.instances if instance.image_id in images)
        return dataclasses.replace(self, images=images, instances=instances, notes=(*self.notes, *notes))

    @property
    def has_masks(self) -> bool:
        """Whether mask AP can be measured: some object has a mask (box AP needs boxes only)."""
        return any(not (instance.box_only or instance.crowd) for instance in self.instances)

    @functools.cached_property
    def hash(self) -> str:
        """Identifies images (by name, size and length of file) and annotations: stored results carry it."""
        files = [(dataclasses.astuple(r), (self.folder / r.file).stat().st_size) for r in self.images.values()]
        instances = [(i.id, i.image_id, i.category_id, i.box, i.area, i.rle["counts"]) for i in self.instances]
        boxes = [i.id for i in self.instances if i.box_only]
        return hash_value([files, sorted(self.categories.items()), instances, *([boxes] if boxes else [])])


# --------------------------------------------------------------------------------------------------------- images


def read_image(dataset: CocoDataset, image_id: int) -> Image.Image:
    """An image of the data set, RGB, turned as its masks are.

    A photo that EXIF turns is taken as it is shown, or as it is stored where only that has the size of the JSON.

    Raises:
        StudyError: the file is broken, or its size is not the one that the JSON gives.
    """
    record = dataset.images[image_id]
    path = dataset.folder / record.file
    image = open_image(path, (record.width, record.height))
    if image.size != (record.width, record.height):
        sizes = f"{image.width}x{image.height} pixels, but {dataset.path} says {record.width}x{record.height}"
        raise StudyError(f"{printable(path)} has {sizes} (image {image_id}): correct the entry")
    return image


def shown(dataset: CocoDataset, image_ids: Iterable[int], what: str) -> Iterator[int]:
    """The ids one after the other, with a bar that counts the images and names the one at work."""
    with tqdm(list(image_ids), what, unit="image", mininterval=0.2, leave=False) as bar:
        for image_id in bar:
            bar.set_postfix_str(printable(dataset.images[image_id].file))
            yield image_id


def check_images(dataset: CocoDataset, skip_bad_images: bool = False) -> CocoDataset:
    """Open every image once, so that a bad one is found before hours of work and not after.

    Args:
        dataset: the data.
        skip_bad_images: leave out images that are damaged or have another size than the JSON says, with a note.

    Returns:
        The data without what was left out, with further notes (images left out, photos that EXIF turns).

    Raises:
        StudyError: an image is bad (the first is named), or all are.
    """

    def looked_at(image_id: int) -> tuple[str, str]:
        """What is wrong with an image; on which form of it masks lie, where EXIF turns it."""
        record = dataset.images[image_id]
        path = dataset.folder / record.file
        try:
            read_image(dataset, image_id)
            as_shown = image_size(path) == (record.width, record.height)
            return "", ("shown" if as_shown else "stored") if is_turned(path) else ""
        except StudyError as error:
            return str(error), ""

    with ThreadPoolExecutor(available_cores()) as pool:
        found = dict(zip(dataset.images, pool.map(looked_at, dataset.images), strict=True))
    bad = [image_id for image_id, (fault, _) in found.items() if fault]
    if bad and (not skip_bad_images or len(bad) == len(found)):
        counts = f"{len(bad)} of {len(found)} images are bad; --skip-bad-images leaves them out"
        raise StudyError(f"{found[bad[0]][0]} ({counts})")
    lines = [f"{counted(len(bad), 'image')} ({listing(bad)}): damaged or of another size: left out"] * bool(bad)
    for way in ("shown", "stored"):
        photos = [dataset.images[image_id].file for image_id, (_, its) in found.items() if its == way]
        words = f"turned by EXIF: masks are taken to lie on the photo as it is {way}"
        lines += [f"{counted(len(photos), 'photo')} ({listing(photos)}): {words}"] * bool(photos)
    return dataset.only(found.keys() - set(bad), *(f"{dataset.path.name}: {line}" for line in lines))


# --------------------------------------------------------------------------------------------------------- boxes


def xywh(box: Box) -> list[float]:
    """COCO's form of a box: `x, y, width, height`."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def clipped(bbox: Any, image: ImageRecord) -> Box | None:
    """COCO's `x, y, width, height` as a box cut at the frame; None where it is no four numbers or empty."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(is_pixel(value) for value in bbox):
        return None
    x, y, width, height = (float(value) for value in bbox)
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + width, image.width), min(y + height, image.height)
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def box_iou(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """`(N, M)` IoU of `(N, 4)` and `(M, 4)` boxes `(x0, y0, x1, y1)`; 0 where both are empty."""
    a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (first, second))
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = sides.clip(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(-1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def annotation(instance: Instance) -> dict[str, Any]:
    """An object as COCO's JSON and pycocotools have it."""
    ids = {"id": instance.id, "image_id": instance.image_id, "category_id": instance.category_id}
    shape = {"bbox": xywh(instance.box), "area": instance.area, "segmentation": instance.rle}
    return {**ids, **shape, "iscrowd": int(instance.crowd)}
