"""COCO JSON: read and checked with the folder of its images, and written.

A fault of one annotation costs that annotation, and a note counts it; a fault of the whole file is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

from pycocotools import mask as mask_tools
from pydantic import BaseModel, Field, ValidationError

from samantics.cache import write_json
from samantics.data.folders import MAX_PIXELS, counted, image_size, listing, printable, short, visible_files, writable
from samantics.data.instances import (
    Box,
    CocoDataset,
    ImageRecord,
    Instance,
    annotation,
    box_iou,
    check_images,
    clipped,
    read_image,
    shown,
    xywh,
)
from samantics.data.masks import OUTSIDE, Mask, Rle, box_rle, is_pixel, mask_of, parsed_rle, rles_of
from samantics.data.per_image import as_coco, is_per_image
from samantics.errors import StudyError

__all__ = [  # what works on COCO data imports it from here, wherever it is made
    "Box", "CocoDataset", "ImageRecord", "Instance", "Mask", "Rle", "annotation", "box_iou", "check_images",
    "load_coco", "mask_of", "read_image", "rles_of", "shown", "write_coco", "xywh",
]  # fmt: skip

LARGEST_ID = 2**63 - 1
OTHER_FORMATS = {"segments_info": "panoptic", "_via_settings": "VIA's"}

Notes = dict[tuple[str, str], list[Any]]  # what of, what is the matter -> the ids
Id = Annotated[int, Field(strict=True, ge=-LARGEST_ID, le=LARGEST_ID)]
Side = Annotated[int, Field(strict=True, gt=0)]


class Listed(BaseModel):
    """An entry with an id."""

    id: Id


class ImageEntry(Listed):
    """An entry of `images`; the size may be missing, and the name where there is an address."""

    file_name: str | None = None
    coco_url: str | None = None
    width: Side | None = None
    height: Side | None = None


class CategoryEntry(Listed):
    """An entry of `categories`."""

    name: Any


Entry = TypeVar("Entry", bound=Listed)


class AnnotationEntry(BaseModel):
    """An entry of `annotations`; mask, box and area are checked where they are used."""

    image_id: Id
    category_id: Id
    segmentation: Any = None
    bbox: Any = None
    area: Any = None
    iscrowd: bool | None = None
    artist: str = ""
    split: str = ""


# -------------------------------------------------------------------------------------------------------- reading


def load_coco(annotations: Path | str, images: Path | str, skip_bad_images: bool = False) -> CocoDataset:
    """Read and check a COCO JSON file and the folder of its images.

    Image files are looked for by their names in the folder, then by their base names in it and its sub-folders;
    nothing outside it is opened. A file without `annotations` is good: it can be predicted on, not measured.

    Args:
        annotations: the JSON file; or labelme's or SA-1B's, which are one for each image, or the folder of those.
        images: the folder.
        skip_bad_images: leave out images whose file is missing or has no readable size, with a note.

    Raises:
        StudyError: the file is missing or not COCO JSON; an image or category lacks a field or has a wrong one; two
            share an id; an image file is missing; no annotation is usable.
    """
    path, folder = Path(annotations), Path(images)
    notes: Notes = defaultdict(list)
    content = _content(path, folder, notes)
    if not folder.is_dir():
        raise StudyError(f"{printable(folder)} is not a folder: give the folder of the images of {path}")
    entries = _entries(path, content, "image", "images", ImageEntry)
    records = _records(path, folder, entries, notes, skip_bad_images)
    named = _entries(path, content, "category", "categories", CategoryEntry)
    categories = {entry.id: writable(str(entry.name)) for entry in named}
    listed = content.get("annotations") or []
    if not isinstance(listed, list):
        raise StudyError(f'{path}: "annotations" is not a list: export it in COCO format')
    left_out = {entry.id for entry in entries} - records.keys()
    instances = _instances(path, listed, records, left_out, categories, notes)
    lines = [f"{counted(len(ids), what)} ({listing(ids)}): {why}" for (what, why), ids in notes.items()]
    boxes = sum(instance.box_only for instance in instances)
    if boxes:
        what = f"{boxes} of {len(instances)} objects have a box and no mask"
        lines.append(f"{what}: as references SAM makes their masks, as targets they count for box AP only")
    if instances and all(instance.crowd for instance in instances):
        lines.append(only_crowds(instances))
    lines = [f"{path.name}: {line}" for line in lines]
    return CocoDataset(path, folder, records, categories, instances, bool(listed), tuple(lines))


def only_crowds(instances: Sequence[Instance]) -> str:
    """What to say of data that holds nothing but crowds."""
    return (
        f"all {len(instances)} objects are marked as crowds (iscrowd), which can be neither references nor measured: "
        "set iscrowd to 0 where a mask shows one object"
    )


def per_image_files(folder: Path) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """What is in a folder's labelme and SA-1B files; the names of its other JSON files."""
    paths = [path for path in visible_files(folder) if path.suffix.lower() == ".json" and path.is_file()]
    found = dict[Path, dict[str, Any]]()
    for path in paths:
        with contextlib.suppress(StudyError):  # what cannot be read is none of them
            content = _read_json(path)
            found |= {path: content} if is_per_image(content) else {}
    return found, [path.name for path in paths if path not in found]


def _content(path: Path, folder: Path, notes: Notes) -> dict[str, Any]:
    """What a COCO file holds, or would hold if one stood in the place of a file for each image."""
    if path.is_dir():
        files, others = per_image_files(path)
        if not files:
            raise StudyError(f"{printable(path)} has no labelme or SA-1B files: give them, or a COCO JSON file")
        notes.update({("file", "neither labelme's nor SA-1B's: left out"): others} if others else {})
        return as_coco(files, folder)
    content = _read_json(path)
    if is_per_image(content):
        return as_coco({path: content}, folder)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        known = [OTHER_FORMATS[key] for key in content if key in OTHER_FORMATS] if isinstance(content, dict) else []
        why = f"it is in {known[0]} format" if known else 'no list "images"'
        raise StudyError(f"{path} is not COCO instance data ({why}): export it in COCO format")
    if not content["images"]:
        raise StudyError(f"{path} lists no images: choose a COCO file with some")
    return content


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())  # of bytes it knows UTF-8, 16 and 32, with and without a mark
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path} is not valid JSON ({error}): repair or export it again") from error


def _entries(path: Path, content: dict[str, Any], what: str, key: str, model: type[Entry]) -> list[Entry]:
    """The checked entries under `key` (none where it is missing), each with an id of its own."""
    listed = content.get(key) or []
    if not isinstance(listed, list):
        raise StudyError(f'{path}: "{key}" is not a list: export it in COCO format')
    found: dict[int, Entry] = {}
    for position, raw in enumerate(listed, start=1):
        try:
            entry = model.model_validate(raw)
        except ValidationError as error:
            name = short(raw["id"]) if isinstance(raw, dict) and "id" in raw else f"number {position} of the list"
            raise StudyError(f"{path}: {what} {name}: {_reason(error)}: correct or remove it") from error
        if found.setdefault(entry.id, entry) is not entry:
            raise StudyError(f"{path}: {what} id {entry.id} occurs more than once: make the ids unique")
    return list(found.values())


def _reason(error: ValidationError) -> str:
    """What is wrong with an entry: `no name`; `width is -3 (should be greater than 0)`."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = first["loc"][0] if first["loc"] else "the entry"
    if first["type"] == "missing":
        return f"no {field}"
    return f"{field} is {short(first['input'])} ({first['msg'].removeprefix('Input ')})"


# --------------------------------------------------------------------------------------------------------- images


def _records(
    path: Path, folder: Path, entries: Sequence[ImageEntry], notes: Notes, skip: bool
) -> dict[int, ImageRecord]:
    files, faults = _located(path, folder, entries, notes)
    records = {}
    for entry in [entry for entry in entries if entry.id in files]:
        try:
            width, height = entry.width, entry.height
            if width is None or height is None:
                width, height = image_size(folder / files[entry.id])
                notes["image", "no width and height: read from the image files"].append(entry.id)
            if width * height > MAX_PIXELS:  # beyond 32 bits pycocotools miscounts
                raise StudyError(f"{path}: image {entry.id} has {width}x{height} pixels, over 100 million: shrink it")
            records[entry.id] = ImageRecord(entry.id, files[entry.id], width, height)
        except StudyError as error:
            faults[entry.id] = str(error)
    if faults and not (skip and records):
        number, fault = next(iter(faults.items()))
        raise StudyError(f"{fault} (image {number} of {path}; {len(faults)} of {len(entries)} are missing or bad)")
    if faults:
        notes["image", "missing or bad: left out"] += faults
    return records


def _located(
    path: Path, folder: Path, entries: Sequence[ImageEntry], notes: Notes
) -> tuple[dict[int, str], dict[int, str]]:
    """By image id: the file below the folder, or what is wrong."""
    names = {entry.id: _file_name(entry) for entry in entries}
    # os.path: a name that is too long for a file is no file
    files = {n: name for n, name in names.items() if _is_inside(name) and os.path.isfile(folder / name)}
    lost, faults = [number for number in names if number not in files], {}
    places: dict[str, list[str]] = defaultdict(list)
    for place in filter(Path.is_file, visible_files(folder) if lost else ()):  # no pipe, no broken link
        places[_base(place.name)].append(str(place.relative_to(folder)))
    owner = {file: number for number, file in files.items()}
    for number in lost:
        hits = places[_base(names[number])]
        if len(hits) > 1:
            where = " or ".join(printable(folder / hit) for hit in hits[:2])
            raise StudyError(f"image {number} of {path} could be {where}: give the folder that holds the right one")
        if not hits:
            lacking = printable(folder / (_base(names[number]) or "?"))
            faults[number] = f"{lacking} is missing: add it or give its folder"
            continue
        if owner.setdefault(hits[0], number) != number:
            both, file = f"images {owner[hits[0]]} and {number} of {path}", printable(folder / hits[0])
            raise StudyError(f"{both} would both be {file}: give the folder that holds all files")
        files[number] = hits[0]
        if not _is_inside(names[number]):
            notes["image", "a path out of their folder: found by the file's name"].append(number)
    return files, faults


def _file_name(entry: ImageEntry) -> str:
    """The name, with slashes; of an address its last part (nothing is fetched)."""
    address = unquote((entry.coco_url or "").split("?")[0]).rsplit("/", 1)[-1]
    return (entry.file_name or address).replace("\\", "/")


def _base(name: str) -> str:
    """A file's own name, with accents written in one way."""
    return unicodedata.normalize("NFC", PurePosixPath(name).name)


def _is_inside(name: str) -> bool:
    """Whether a name stays below the folder that it is joined to."""
    pure = PurePosixPath(name)
    return bool(name) and not pure.is_absolute() and ".." not in pure.parts and "\0" not in name


# ---------------------------------------------------------------------------------------------------- annotations


def _instances(
    path: Path,
    listed: Sequence[Any],
    images: Mapping[int, ImageRecord],
    left_out: set[int],
    categories: Mapping[int, str],
    notes: Notes,
) -> tuple[Instance, ...]:
    """The usable annotations; what was left out or mended is noted."""
    ids: list[Any] = [raw.get("id") if isinstance(raw, dict) else None for raw in listed]
    good = all(type(number) is int and abs(number) <= LARGEST_ID for number in ids) and len({*ids}) == len(ids)
    if not good:
        notes["annotation", "ids that are missing, twice or no integers: numbered from 1"] += ids
        ids = list(range(1, len(ids) + 1))
    found, fault = [], ""
    for number, raw in zip(ids, listed, strict=True):
        try:
            entry = AnnotationEntry.model_validate(raw)
            if entry.image_id in left_out:
                continue
            if entry.image_id not in images or entry.category_id not in categories:
                what = "category" if entry.image_id in images else "image"
                raise ValueError(f"{what} {getattr(entry, f'{what}_id')} is not listed")
            instance, mended = _instance(entry, number, images[entry.image_id])
        except ValueError as error:  # of pydantic, too
            why = _reason(error) if isinstance(error, ValidationError) else str(error)
            fault = fault or f"annotation {number}: {why}"
            notes["annotation", f"{why}: left out"].append(number)
        else:
            found.append(instance)
            for what in mended:
                notes["annotation", what].append(number)
    if fault and not found:
        raise StudyError(f"{path}: {fault}: correct or remove it (none of {len(listed)} annotations is usable)")
    return tuple(found)


def _instance(entry: AnnotationEntry, number: int, image: ImageRecord) -> tuple[Instance, list[str]]:
    """One object and what was mended in it; a ValueError says why it cannot be used."""
    box = clipped(entry.bbox, image)
    mended: list[str] = []
    box_only = not entry.segmentation or entry.segmentation == [[]]
    if box_only:
        if box is None:
            raise ValueError("no mask and no usable box")
        rle, area = box_rle(box, image.height, image.width), (box[2] - box[0]) * (box[3] - box[1])
    else:
        rle, mended = parsed_rle(entry.segmentation, image.height, image.width)
        area = float(mask_tools.area(rle))
        box = box or clipped(mask_tools.toBbox(rle).tolist(), image)
        if area == 0 or box is None:
            raise ValueError("no pixel of the mask lies in the image")
    if is_pixel(entry.area) and OUTSIDE not in mended and 0 < entry.area <= image.width * image.height:
        area = float(entry.area)
    marks = (bool(entry.iscrowd), entry.artist, entry.split, box_only)
    return Instance(number, image.id, entry.category_id, box, area, rle, *marks), mended


# -------------------------------------------------------------------------------------------------------- writing


def write_coco(
    path: Path, images: Sequence[ImageRecord], categories: dict[int, str], instances: Sequence[Instance]
) -> None:
    """Write instance data as COCO JSON, atomically (the images are the caller's)."""
    annotations = [
        annotation(i)
        | ({"segmentation": []} if i.box_only else {})
        | ({"artist": i.artist, "split": i.split} if i.artist else {})
        for i in instances
    ]
    entries = [{"id": r.id, "file_name": r.file, "width": r.width, "height": r.height} for r in images]
    names = [{"id": number, "name": name} for number, name in categories.items()]
    write_json(path, {"images": entries, "annotations": annotations, "categories": names})
