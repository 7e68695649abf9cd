"""COCO JSON: read and checked with the folder of its images, and written.

A fault of one annotation costs that annotation, and a note counts it; a fault of the whole file is refused.
"""

import contextlib
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

from pycocotools import mask as mask_tools
from pydantic import BaseModel, Field, ValidationError

from samantics.cache import reading, write_json
from samantics.data import coco
from samantics.data.coco import CocoDataset, ImageRecord, Instance
from samantics.data.folders import image_head, readable_endings, visible_files
from samantics.data.per_image import as_coco, is_per_image
from samantics.errors import StudyError, noted, printable, short, writable
from samantics.run import available_cores

BOX_ONLY = "a box and no mask: as references SAM makes their masks, as targets they count for box AP only"
LARGEST_ID = 2**63 - 1

Notes = dict[tuple[str, str], list[Any]]  # what of, what is the matter -> the ids
Id = Annotated[int, Field(strict=True, ge=-LARGEST_ID, le=LARGEST_ID)]
Side = Annotated[int, Field(strict=True, gt=0)]
Model = TypeVar("Model", bound=BaseModel)


class ImageEntry(BaseModel):
    """An entry of `images`; the size may be missing, and the name where there is an address."""

    id: Id
    file_name: str | None = None
    coco_url: str | None = None
    width: Side | None = None
    height: Side | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height, where both are given."""
        return (self.width, self.height) if self.width and self.height else None


class CategoryEntry(BaseModel):
    """An entry of `categories`."""

    id: Id
    name: Any


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

    It may also be labelme's or SA-1B's file, which are one for each image, a folder of those, or one of images alone.
    Image files are looked for by their names in the folder, then by their base names in it and its sub-folders;
    nothing outside it is opened. Without annotations it can be predicted on, not measured.
    """
    path = Path(annotations)
    notes: Notes = defaultdict(list)
    content, folder = _folder_content(path, Path(images), notes) if path.is_dir() else _content(path, Path(images))
    if not folder.is_dir():
        raise StudyError(f"{printable(folder)} is not a folder: give the folder of the images of {path}")
    entries = _entries(path, "image", content["images"], ImageEntry)
    records = _records(path, folder, entries, notes, skip_bad_images)
    return _dataset(path, folder, content, records, notes)


def load_written(path: Path) -> CocoDataset:
    """What the study itself wrote by `write_coco`, with its images beside the file: these are not opened here."""
    with reading(path.parent):
        content = json.loads(path.read_bytes())
        records = {e["id"]: ImageRecord(e["id"], e["file_name"], e["width"], e["height"]) for e in content["images"]}
        for record in records.values():
            (path.parent / record.file).stat()  # is it there?
        return _dataset(path, path.parent, content, records, defaultdict(list))


def _dataset(
    path: Path, folder: Path, content: dict[str, Any], records: Mapping[int, ImageRecord | None], notes: Notes
) -> CocoDataset:
    """The images of a COCO file's content (None: left out), with its categories and objects."""
    named, listed = content.get("categories") or [], content.get("annotations") or []
    categories = {n: writable(str(e.name)) for n, e in _entries(path, "category", named, CategoryEntry).items()}
    instances = _instances(path, listed, records, categories, notes)
    lines = [line for (what, why), which in notes.items() for line in noted(what, which, why)]
    lines = [f"{path.name}: {line}" for line in (*lines, only_crowds(instances)) if line]
    found = {number: record for number, record in records.items() if record}
    return CocoDataset(path, folder, found, categories, instances, bool(listed), tuple(lines))


def only_crowds(instances: Sequence[Instance]) -> str:
    """What to say of data that holds nothing but crowds, else nothing."""
    if not instances or not all(instance.crowd for instance in instances):
        return ""
    return (
        f"all {len(instances)} objects are marked as crowds (iscrowd), which can be neither references nor measured: "
        "set iscrowd to 0 where a mask shows one object"
    )


def _folder_content(path: Path, folder: Path, notes: Notes) -> tuple[dict[str, Any], Path]:
    """What COCO JSON would hold in the place of a folder's labelme or SA-1B files, else of its images; their folder."""
    there, files = list(visible_files(path)), dict[Path, Any]()
    written = [file for file in there if file.suffix.lower() == ".json" and file.is_file()]
    for file in written:
        with contextlib.suppress(StudyError):
            content = _read_json(file)
            if is_per_image(content):
                files[file] = content
    if files:
        notes["file", "neither labelme's nor SA-1B's: left out"] += [file.name for file in written if file not in files]
        return as_coco(files, folder), folder
    endings = readable_endings()
    names = [str(file.relative_to(path)) for file in there if file.suffix.lower() in endings]
    if not names:
        raise StudyError(f"{printable(path)} has no images and no labelme or SA-1B files: give a COCO JSON file")
    others = [file.name for file in there if file.suffix.lower() not in endings]
    notes["file", "no image that can be read: left out"] += others
    return {"images": [{"id": number, "file_name": name} for number, name in enumerate(names, 1)]}, path


def _content(path: Path, folder: Path) -> tuple[dict[str, Any], Path]:
    """What a COCO file holds, or would hold in the place of one labelme or SA-1B file; the folder of its images."""
    content = _read_json(path)
    if is_per_image(content):
        return as_coco({path: content}, folder), folder
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise StudyError(f'{path} is not COCO instance data (no list "images"): export it in COCO format')
    if not content["images"]:
        raise StudyError(f"{path} lists no images: choose a COCO file with some")
    for key in ("categories", "annotations"):
        if not isinstance(content.get(key) or [], list):
            raise StudyError(f'{path}: "{key}" is not a list: export it in COCO format')
    return content, folder


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())  # of bytes it knows UTF-8, 16 and 32, with and without a mark
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path} is not valid JSON ({error}): repair or export it again") from error


def _entries(path: Path, what: str, listed: Sequence[Any], model: type[Model]) -> dict[int, Model]:
    """The checked entries by their ids."""
    found: dict[int, Model] = {}
    for position, raw in enumerate(listed, start=1):
        try:
            entry = _checked(raw, model)
        except ValueError as error:
            name = short(raw["id"]) if isinstance(raw, dict) and "id" in raw else f"number {position} of the list"
            raise StudyError(f"{path}: {what} {name}: {error}: correct or remove it") from error
        if found.setdefault(raw["id"], entry) is not entry:
            raise StudyError(f"{path}: {what} id {raw['id']} occurs more than once: make the ids unique")
    return found


def _checked(raw: Any, model: type[Model]) -> Model:
    """The entry, or a ValueError in our words: `no name`; `width is -3 (should be greater than 0)`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    field = first["loc"][0] if first["loc"] else "the entry"
    is_what = f"{field} is {short(first['input'])} ({first['msg'].removeprefix('Input ')})"
    raise ValueError(f"no {field}" if first["type"] == "missing" else is_what)


# --------------------------------------------------------------------------------------------------------- images


def _records(
    path: Path, folder: Path, entries: Mapping[int, ImageEntry], notes: Notes, skip_bad_images: bool
) -> dict[int, ImageRecord | None]:
    """By id; None for what is left out. Every image is opened, so that a bad one is found before hours of work."""
    files, faults = _located(path, folder, entries, notes)
    records: dict[int, ImageRecord | None] = dict.fromkeys(entries)

    def looked_at(number: int) -> tuple[ImageRecord | None, str]:
        """The record, and what to note of a photo that EXIF turns; or None and what is wrong."""
        try:
            size, turned = image_head(folder / files[number])
            record = ImageRecord(number, files[number], *(entries[number].size or size))
            coco.open_record(folder, record)
        except StudyError as error:
            return None, str(error)
        way = "shown" if (record.width, record.height) == size else "stored"
        return record, f"turned by EXIF: masks are taken to lie on the photo as it is {way}" * turned

    with ThreadPoolExecutor(available_cores()) as pool:
        looks = list(zip(files, pool.map(looked_at, files), strict=True))
    for number, (record, what) in looks:
        if record is None:
            faults[number] = what
            continue
        records[number] = record
        if what:
            notes["photo", what].append(record.file)
        if not entries[number].size and path.is_file():  # a folder cannot say it
            notes["image", "no width and height: read from the image files"].append(number)
    if faults and not (skip_bad_images and len(faults) < len(entries)):
        cure = "" if skip_bad_images else "; in notebook 05 --skip-bad-images leaves them out"
        counts = f"{len(faults)} of {len(entries)} images of {path} are missing or bad{cure}"
        raise StudyError(f"{next(iter(faults.values()))} ({counts})")
    notes["image", "missing, damaged or of another size: left out"] += faults
    return records


def _located(
    path: Path, folder: Path, entries: Mapping[int, ImageEntry], notes: Notes
) -> tuple[dict[int, str], dict[int, str]]:
    """By image id: the file below the folder, or what is wrong."""
    names = {number: _file_name(entry) for number, entry in entries.items()}
    # os.path: a name that is too long for a file is no file
    files = {n: name for n, name in names.items() if not _leads_out(name) and os.path.isfile(folder / name)}
    places: dict[str, list[str]] = defaultdict(list)
    for place in filter(Path.is_file, visible_files(folder) if len(files) < len(names) else ()):  # no pipe or dead link
        places[_base(place.name)].append(str(place.relative_to(folder)))
    taken, faults = set(files.values()), dict[int, str]()
    for number in [number for number in names if number not in files]:
        image, hits = f"image {number} of {path}", places[_base(names[number])]
        if not hits:
            lacking = printable(folder / (_base(names[number]) or "?"))
            faults[number] = f"{lacking} is missing: add it or give its folder ({image})"
        elif len(hits) > 1:
            where = " or ".join(printable(folder / hit) for hit in hits[:2])
            faults[number] = f"{image} could be {where}: give the folder that holds the right one"
        elif hits[0] in taken:
            file = printable(folder / hits[0])
            faults[number] = f"{image} would be {file}, as another is: give the folder of all files"
        else:
            taken.add(hits[0])
            files[number] = hits[0]
            if _leads_out(names[number]):
                notes["image", "a path out of their folder: found by the file's name"].append(number)
    return files, faults


def _file_name(entry: ImageEntry) -> str:
    """The name, with slashes; of an address its last part (nothing is fetched)."""
    address = unquote((entry.coco_url or "").split("?")[0]).rsplit("/", 1)[-1]
    return (entry.file_name or address).replace("\\", "/")


def _base(name: str) -> str:
    """A file's own name, with accents written in one way."""
    return unicodedata.normalize("NFC", PurePosixPath(name).name)


def _leads_out(name: str) -> bool:
    """Whether a name leads out of the folder that it is joined to."""
    return name.startswith("/") or ".." in name.split("/")


# ---------------------------------------------------------------------------------------------------- annotations


def _instances(
    path: Path, listed: Sequence[Any], images: Mapping[int, ImageRecord | None], categories: Mapping[int, str],
    notes: Notes,
) -> tuple[Instance, ...]:  # fmt: skip
    """The usable annotations; what was left out or mended is noted."""
    ids: list[Any] = [raw.get("id") if isinstance(raw, dict) else None for raw in listed]
    good = all(type(number) is int and abs(number) <= LARGEST_ID for number in ids) and len({*ids}) == len(ids)
    if not good:
        notes["annotation", "ids that are missing, twice or no integers: numbered from 1"] += ids
        ids = list(range(1, len(ids) + 1))
    found, fault = [], ""
    for number, raw in zip(ids, listed, strict=True):
        try:
            entry = _checked(raw, AnnotationEntry)
            if entry.image_id not in images:
                raise ValueError(f"image {entry.image_id} is not listed")
            if entry.category_id not in categories:
                raise ValueError(f"category {entry.category_id} is not listed")
            image = images[entry.image_id]
            if image is None:
                continue
            instance, mended = _instance(entry, number, image)
        except ValueError as error:
            fault = fault or f"annotation {number}: {error}"
            notes["annotation", f"{error}: left out"].append(number)
            continue
        found.append(instance)
        for what in mended:
            notes["annotation", what].append(number)
    if fault and not found:
        raise StudyError(f"{path}: {fault}: correct or remove it (none of {len(listed)} annotations is usable)")
    notes["object", BOX_ONLY] += [instance.id for instance in found if instance.box_only]
    return tuple(found)


def _instance(entry: AnnotationEntry, number: int, image: ImageRecord) -> tuple[Instance, list[str]]:
    """One object and what was mended in it; a ValueError says why it cannot be used."""
    box = coco.clipped(entry.bbox, image)
    mended: list[str] = []
    box_only = not entry.segmentation or entry.segmentation == [[]]
    if box_only:
        if box is None:
            raise ValueError("no mask and no usable box")
        rle, area = coco.box_rle(box, image.height, image.width), (box[2] - box[0]) * (box[3] - box[1])
    else:
        rle, mended = coco.parsed_rle(entry.segmentation, image.height, image.width)
        area = float(mask_tools.area(rle))
        box = box or coco.clipped(mask_tools.toBbox(rle).tolist(), image)
        if area == 0 or box is None:
            raise ValueError("no pixel of the mask lies in the image")
    if coco.is_pixel(entry.area) and coco.OUTSIDE not in mended and 0 < entry.area <= image.width * image.height:
        area = float(entry.area)
    marks = (bool(entry.iscrowd), entry.artist, entry.split, box_only)
    return Instance(number, image.id, entry.category_id, box, area, rle, *marks), mended


# -------------------------------------------------------------------------------------------------------- writing


def write_coco(
    path: Path, images: Sequence[ImageRecord], categories: dict[int, str], instances: Sequence[Instance]
) -> None:
    """Write instance data as COCO JSON, atomically (the images are the caller's)."""
    annotations = [
        coco.annotation(i)
        | ({"segmentation": []} if i.box_only else {})
        | ({"artist": i.artist, "split": i.split} if i.artist else {})
        for i in instances
    ]
    write_json(path, coco_entries(images, categories) | {"annotations": annotations})


def coco_entries(images: Iterable[ImageRecord], categories: Mapping[int, str]) -> dict[str, Any]:
    """Images and categories as COCO's JSON lists them."""
    entries = [{"id": r.id, "file_name": r.file, "width": r.width, "height": r.height} for r in images]
    return {"images": entries, "categories": [{"id": number, "name": name} for number, name in categories.items()]}
