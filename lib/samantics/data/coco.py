"""Annotated objects: data sets of images and instances, their boxes `(x0, y0, x1, y1)` in pixels, and their masks.

Only JSON and pycocotools hold COCO's `x, y, width, height`; `xywh` makes it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from pycocotools import mask as mask_tools
from tqdm import tqdm  # as text, also in notebooks: what runs them passes it on to its terminal

from samantics.cache import hash_value
from samantics.data.folders import open_image
from samantics.errors import StudyError, printable

LONGEST_OUTLINE = 1e6  # pixels, and the farthest from the origin: pycocotools walks it in steps of a fifth
OUTSIDE = "reach outside the image: cut at the frame"
STRAY = "a polygon of fewer than three points beside others: dropped"

Box = tuple[float, float, float, float]
Mask = NDArray[np.bool_]
Rle = dict[str, Any]  # COCO's compressed run lengths: {"size": [height, width], "counts": text}


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

    def first(self, count: int) -> Self:
        """The first so many images, with their objects."""
        images = dict(itertools.islice(self.images.items(), count))
        instances = tuple(instance for instance in self.instances if instance.image_id in images)
        return dataclasses.replace(self, images=images, instances=instances)

    def by_artists(self, split: str) -> Self:
        """The data with the objects by artists of another split as crowds: what falls on them is ignored."""
        instances = tuple(i if i.split == split else dataclasses.replace(i, crowd=True) for i in self.instances)
        return dataclasses.replace(self, instances=instances)

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


def read_image(dataset: CocoDataset, image_id: int) -> Image.Image:
    """An image of the data set, RGB, turned as its masks are.

    A photo that EXIF turns is taken as it is shown, or as it is stored where only that has the size of the JSON.

    Args:
        dataset: the data.
        image_id: a key of its `images`.

    Returns:
        The image.

    Raises:
        StudyError: the file is broken, or its size is not the one that the JSON gives.
    """
    return open_record(dataset.folder, dataset.images[image_id])


def open_record(folder: Path, record: ImageRecord) -> Image.Image:
    """The image of a record, see `read_image`."""
    path, size = folder / record.file, (record.width, record.height)
    image = open_image(path, size)
    if image.size != size:
        sizes = "{}x{} pixels, but its entry says {}x{}".format(*image.size, *size)
        raise StudyError(f"{printable(path)} has {sizes} (image {record.id}): correct the entry")
    return image


def shown(dataset: CocoDataset, image_ids: Iterable[int], what: str) -> Iterator[int]:
    """The ids one after the other, with a bar that counts the images and names the one at work."""
    with tqdm(list(image_ids), what, unit="image", mininterval=0.2, leave=False) as bar:
        for image_id in bar:
            bar.set_postfix_str(printable(dataset.images[image_id].file))
            yield image_id


def xywh(box: Box) -> list[float]:
    """COCO's form of a box: `x, y, width, height`."""
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def box_iou(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """IoU of boxes with boxes; 0 where both are empty.

    Args:
        first, second: `(N, 4)` and `(M, 4)` boxes `(x0, y0, x1, y1)`.

    Returns:
        `(N, M)` values from 0 to 1.
    """
    from torchvision.ops import box_iou as iou  # a second to import: not before boxes are compared

    a, b = (torch.from_numpy(np.array(boxes, np.float64).reshape(-1, 4)) for boxes in (first, second))
    return iou(a, b).nan_to_num().numpy()


def annotation(instance: Instance) -> dict[str, Any]:
    """An object as COCO's JSON and pycocotools have it."""
    ids = {"id": instance.id, "image_id": instance.image_id, "category_id": instance.category_id}
    shape = {"bbox": xywh(instance.box), "area": instance.area, "segmentation": instance.rle}
    return {**ids, **shape, "iscrowd": int(instance.crowd)}


def mask_of(rle: Rle) -> Mask:
    """The mask that COCO's run lengths hold, `(height, width)`."""
    return np.asarray(mask_tools.decode(rle), dtype=bool)


def rles_of(masks: NDArray[np.bool_]) -> list[Rle]:
    """Run lengths of `(N, height, width)` masks, JSON-able."""
    columns = np.asfortranarray(np.moveaxis(masks, 0, -1), dtype=np.uint8)  # pycocotools wants (h, w, N), column-major
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in mask_tools.encode(columns)]


def clipped(bbox: Any, image: ImageRecord) -> Box | None:
    """COCO's `x, y, width, height` as a box cut at the frame; None where it is no four numbers or empty."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(is_pixel(value) for value in bbox):
        return None
    x, y, width, height = (float(value) for value in bbox)
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + width, image.width), min(y + height, image.height)
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def is_pixel(value: Any) -> bool:
    """Whether a value of JSON is a number that a pixel can have: no NaN, no infinity, no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def box_rle(box: Box, height: int, width: int) -> Rle:
    """Run lengths of all pixels that a box touches."""
    mask = np.zeros((1, height, width), bool)
    mask[0, math.floor(box[1]) : math.ceil(box[3]), math.floor(box[0]) : math.ceil(box[2])] = True
    return rles_of(mask)[0]


def parsed_rle(segmentation: Any, height: int, width: int) -> tuple[Rle, list[str]]:
    """Run lengths of what JSON holds, a list of polygons, one polygon or run lengths; and what was mended.

    A ValueError says that it is none of these, or would take endless time or foreign memory to draw.
    """
    size = [height, width]
    mended: list[str] = []
    try:
        if isinstance(segmentation, dict):
            rle = mask_tools.frPyObjects({"size": size, "counts": _runs(segmentation, size)}, *size)
        else:
            polygons, mended = _polygons(segmentation, height, width)
            rle = mask_tools.merge(mask_tools.frPyObjects([p.tolist() for p in polygons], *size))
    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"no usable segmentation ({error})") from error
    return {"size": size, "counts": rle["counts"].decode()}, mended


def _runs(segmentation: dict[str, Any], size: list[int]) -> list[int]:
    if list(segmentation["size"]) != size:
        raise ValueError(f"its size is {segmentation['size']}, the image's is {size}")
    counts = segmentation["counts"]
    runs = counts if isinstance(counts, list) else _run_lengths(counts)
    if not all(isinstance(run, int) for run in runs):
        raise ValueError("its run lengths are not all integers")
    if min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
        raise ValueError("its run lengths do not fill the image")  # decoding them would read foreign memory
    return runs


def _run_lengths(counts: str) -> list[int]:
    """The numbers in COCO's compressed text: five bits a character, from the third on as differences."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("its run lengths are too large")
        if bits & 32:
            continue
        value -= (bits & 16) << (shift - 4)
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("its run lengths break off")
    return runs


def _polygons(segmentation: Any, height: int, width: int) -> tuple[list[NDArray[np.float64]], list[str]]:
    flat = isinstance(segmentation, list) and is_pixel(segmentation[0])
    polygons = [np.asarray(polygon, np.float64) for polygon in ([segmentation] if flat else segmentation)]
    whole = [p for p in polygons if p.ndim != 1 or p.size >= 6]
    if not whole or any(p.ndim != 1 or p.size % 2 or not np.isfinite(p).all() for p in whole):
        raise ValueError("a polygon needs three or more x, y pairs")
    points = [np.insert(p.clip(-1e9, 1e9), 0, [0, 0]).reshape(-1, 2) for p in whole]
    if max(float(np.abs(np.diff(p, axis=0)).sum()) for p in points) > LONGEST_OUTLINE:  # of the way from the origin
        raise ValueError("a polygon has over a million pixels of outline or lies as far away")
    # a pixel beyond the frame is the rounding of annotation tools, not a fault worth a line
    outside = any(p.min() < -1 or p[::2].max() > width + 1 or p[1::2].max() > height + 1 for p in whole)
    return whole, [OUTSIDE] * outside + [STRAY] * (len(whole) < len(polygons))
