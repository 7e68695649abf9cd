"""The instance-data door: COCO JSON with its images, read with checks, and MojiWorld's scenes written in it.

Inside the code boxes are ``(x0, y0, x1, y1)`` in pixels; only the JSON files hold COCO's ``x, y, width, height``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_tools
from tqdm.auto import tqdm

from samantics.cache import atomic_path, hash_value, write_json
from samantics.data import first_world as mojiworld
from samantics.data.folders import MAX_PIXELS, open_image, printable, writable
from samantics.errors import StudyError

LONGEST_OUTLINE = 1e6  # pixels, and the farthest from the origin: pycocotools walks it in steps of a fifth
LARGEST_ID = 2**63 - 1

Mask = NDArray[np.bool_]
Box = tuple[float, float, float, float]
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
    """One annotated object.

    Attributes:
        box: ``(x0, y0, x1, y1)`` pixels, inside the image.
        area: pixels of the mask, as the file says it (COCO's area ranges are decided by it).
        crowd: the mask stands for a group; evaluation ignores what falls on it and it is never a reference.
        drawing, held_out: MojiWorld only: which drawing it shows, and whether that drawing never carries a label.
    """

    id: int
    image_id: int
    category_id: int
    box: Box
    area: float
    rle: Rle = dataclasses.field(hash=False, repr=False)
    crowd: bool = False
    drawing: str | None = None
    held_out: bool = False


@dataclasses.dataclass(frozen=True)
class CocoDataset:
    """Checked instance data.

    Attributes:
        path: the JSON file.
        folder: of its images.
        images, categories: by id; categories are names.
        instances: in the file's order.
        annotated: False where the file has no annotations at all: then nothing can be measured on it.
        notes: one line for each fault that was mended in reading (an empty mask left out, a polygon cut at the frame).
    """

    path: Path
    folder: Path
    images: dict[int, ImageRecord]
    categories: dict[int, str]
    instances: tuple[Instance, ...]
    annotated: bool
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def by_image(self) -> dict[int, tuple[Instance, ...]]:
        """The instances of every image; an empty tuple where an image shows none."""
        found: dict[int, list[Instance]] = {image_id: [] for image_id in self.images}
        for instance in self.instances:
            found[instance.image_id].append(instance)
        return {image_id: tuple(instances) for image_id, instances in found.items()}

    @functools.cached_property
    def by_category(self) -> dict[int, tuple[Instance, ...]]:
        """The instances of every category."""
        found: dict[int, list[Instance]] = {category_id: [] for category_id in self.categories}
        for instance in self.instances:
            found[instance.category_id].append(instance)
        return {category_id: tuple(instances) for category_id, instances in found.items()}

    @functools.cached_property
    def hash(self) -> str:
        """Identifies images (by name, size and length of file) and annotations: stored results carry it."""
        files = [(dataclasses.astuple(r), (self.folder / r.file).stat().st_size) for r in self.images.values()]
        instances = [(i.id, i.image_id, i.category_id, i.box, i.area, i.rle["counts"]) for i in self.instances]
        return hash_value([files, sorted(self.categories.items()), instances])


# -------------------------------------------------------------------------------------------------------- reading


def load_coco(annotations: Path | str, images: Path | str) -> CocoDataset:
    """Read and check a COCO JSON file and the folder of its images (or of sub-folders with them).

    Crowds are kept and marked. Masks that are empty once cut at the frame are left out, with a line in ``notes``.
    A file without ``annotations`` is good: its images can be predicted, not measured.

    Raises:
        StudyError: the file is missing or not JSON; an entry lacks a field or has a wrong one; two entries share an
            id; an annotation names an unknown image or category; an image file is missing.
    """
    path, folder = Path(annotations), Path(images)
    content = _read_json(path)
    records = {
        r["id"]: _image_record(path, r)
        for r in _entries(path, content, "images", ("id", "file_name", "width", "height"))
    }
    if not records:
        raise StudyError(f"{path} lists no images: choose a COCO file with some")
    records = _located(path, folder, records)
    categories = {c["id"]: writable(str(c["name"])) for c in _entries(path, content, "categories", ("id", "name"))}
    notes: list[str] = []
    fields = ("id", "image_id", "category_id", "segmentation")
    instances = [
        _instance(path, entry, records, categories, notes) for entry in _entries(path, content, "annotations", fields)
    ]
    kept = tuple(instance for instance in instances if instance is not None)
    return CocoDataset(path, folder, records, categories, kept, bool(content.get("annotations")), tuple(notes))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())  # of bytes it knows UTF-8, 16 and 32, with and without a mark
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path} is not valid JSON ({error}): repair or export it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise StudyError(f'{path} is not COCO instance data (no list "images"): export it in COCO format')
    return content


def _entries(path: Path, content: dict[str, Any], key: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The entries under ``key`` (none where it is missing), each with all ``fields`` and an integer id of its own."""
    entries = content.get(key) or []
    what = {"images": "image", "categories": "category", "annotations": "annotation"}[key]
    if not isinstance(entries, list):
        raise StudyError(f'{path}: "{key}" is not a list: export it in COCO format')
    for position, entry in enumerate(entries):
        lacking = [f for f in fields if not isinstance(entry, dict) or entry.get(f) is None]
        if lacking:
            name = (
                f"{what} {entry['id']}"
                if isinstance(entry, dict) and "id" in entry
                else f"{what} at position {position}"
            )
            raise StudyError(f"{path}: {name} has no {lacking[0]}: add it or remove the {what}")
        wrong = [f for f in fields if f.endswith("id") and not _is_id(entry[f])]
        if wrong:
            raise StudyError(
                f"{path}: {what} {entry['id']!r}: {wrong[0]} is {entry[wrong[0]]!r}, not an integer of 64 bits: "
                "correct it"
            )
    repeated = [number for number, count in Counter(entry["id"] for entry in entries).items() if count > 1]
    if repeated:
        raise StudyError(
            f"{path}: {what} id {repeated[0]} occurs more than once ({len(repeated)} such): make the ids unique"
        )
    return entries


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_ID


def _image_record(path: Path, entry: dict[str, Any]) -> ImageRecord:
    width, height = entry["width"], entry["height"]
    if not all(_is_id(side) and side > 0 for side in (width, height)):
        raise StudyError(
            f"{path}: image {entry['id']} has size {width}x{height}: give width and height in whole pixels"
        )
    if width * height > MAX_PIXELS:  # beyond 32 bits pycocotools miscounts
        raise StudyError(f"{path}: image {entry['id']} has {width}x{height} pixels, over 100 million: shrink it")
    name = PurePosixPath(str(entry["file_name"]).replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or "\0" in str(name):
        raise StudyError(
            f"{path}: image {entry['id']} has the file name {str(name)!r}, which leads out of the images' folder: "
            "give names within it"
        )
    return ImageRecord(entry["id"], str(name), width, height)


def _located(path: Path, folder: Path, records: dict[int, ImageRecord]) -> dict[int, ImageRecord]:
    """The records, with the sub-folder in ``file`` where an image lies in one (``train2017``, ``val2017``)."""
    # os.path: a name that is too long for a file is no file
    missing = [record for record in records.values() if not os.path.isfile(folder / record.file)]
    if not missing:
        return records
    places: dict[str, list[Path]] = {}
    for place in sorted(folder.rglob("*")):
        if place.is_file():  # no folder, no pipe, no broken link
            places.setdefault(place.name, []).append(place)
    found = {record.id: places.get(Path(record.file).name, []) for record in missing}
    twice = next((number for number, hits in found.items() if len(hits) > 1), None)
    if twice is not None:
        hits = found[twice]
        raise StudyError(
            f"image {twice} of {path} could be {hits[0]} or {hits[1]}: give the folder that holds the right one"
        )
    missing = [record for record in missing if not found[record.id]]
    if missing:
        raise StudyError(
            f"{printable(folder / missing[0].file)} is missing (image {missing[0].id} of {path}; {len(missing)} of "
            f"{len(records)} are): add the files or give their folder"
        )
    moved = {n: dataclasses.replace(records[n], file=str(hits[0].relative_to(folder))) for n, hits in found.items()}
    return {**records, **moved}


def _instance(
    path: Path, entry: dict[str, Any], images: dict[int, ImageRecord], categories: dict[int, str], notes: list[str]
) -> Instance | None:
    """One checked instance, or None (with a note) where nothing of its mask lies in the image."""
    number = entry["id"]
    if entry["image_id"] not in images:
        raise StudyError(
            f"{path}: annotation {number} is of image {entry['image_id']}, which is not listed: correct it"
        )
    if entry["category_id"] not in categories:
        raise StudyError(
            f"{path}: annotation {number} is of category {entry['category_id']}, which is not listed: correct it"
        )
    image = images[entry["image_id"]]
    rle, outside = _rle(path, number, entry["segmentation"], image)
    area = float(mask_tools.area(rle))
    if area == 0:
        notes.append(f"{path.name}: annotation {number} left out: no pixel of its mask lies in image {image.id}")
        return None
    if outside:
        notes.append(f"{path.name}: annotation {number} reaches outside image {image.id}: cut at the frame")
    crowd = entry.get("iscrowd")
    if crowd not in (0, 1, None):
        raise StudyError(f"{path}: annotation {number}: iscrowd is {crowd!r}, not 0 or 1: correct it")
    said = entry.get("area", 0)
    if outside or not _is_number(said) or not 0 < said <= image.width * image.height:
        said = area
    return Instance(
        id=number,
        image_id=image.id,
        category_id=entry["category_id"],
        box=_box(entry.get("bbox"), rle, image),
        area=float(said),
        rle=rle,
        crowd=bool(crowd),
        drawing=entry.get("drawing"),
        held_out=bool(entry.get("held_out", False)),
    )


def _rle(path: Path, number: int, segmentation: Any, image: ImageRecord) -> tuple[Rle, bool]:
    """Run lengths of a polygon list or of run lengths, and whether a polygon reaches outside the image."""
    size = [image.height, image.width]
    outside = False
    try:
        if isinstance(segmentation, dict):
            if list(segmentation["size"]) != size:
                raise ValueError(f"its size is {segmentation['size']}, the image's is {size}")
            counts = segmentation["counts"]
            runs = counts if isinstance(counts, list) else _run_lengths(counts)
            if not all(isinstance(run, int) for run in runs):
                raise ValueError("its run lengths are not all integers")
            if min(runs, default=0) < 0 or sum(runs) != image.height * image.width:
                raise ValueError("its run lengths do not fill the image")  # decoding them would read foreign memory
            rle = mask_tools.frPyObjects({"size": size, "counts": runs}, *size)
        else:
            polygons = [np.asarray(polygon, np.float64) for polygon in segmentation]
            if not polygons or any(
                p.ndim != 1 or p.size < 6 or p.size % 2 or not np.isfinite(p).all() for p in polygons
            ):
                raise ValueError("a polygon needs three or more x, y pairs")
            if max(_outline(p) for p in polygons) > LONGEST_OUTLINE:
                raise ValueError("a polygon has over a million pixels of outline or lies as far away")
            # a pixel beyond the frame is the rounding of annotation tools, not a fault worth a line
            outside = any(
                (p < -1).any() or (p[::2] > image.width + 1).any() or (p[1::2] > image.height + 1).any()
                for p in polygons
            )
            rle = mask_tools.merge(mask_tools.frPyObjects([p.tolist() for p in polygons], *size))
    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise StudyError(
            f"{path}: annotation {number} has no usable segmentation ({error}): correct or remove it"
        ) from error
    counts = rle["counts"]
    return {"size": size, "counts": counts.decode() if isinstance(counts, bytes) else counts}, outside


def _outline(polygon: NDArray[np.float64]) -> float:
    """Pixels of the way from the origin along all points ``x, y, x, y, ...``."""
    points = polygon.clip(-1e9, 1e9).reshape(-1, 2)
    return float(np.abs(points[1:] - points[:-1]).sum() + np.abs(points[0]).sum())


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


def _box(said: Any, rle: Rle, image: ImageRecord) -> Box:
    """The file's box cut at the frame; the mask's own where the file's is missing, empty or no four numbers."""
    for candidate in (said, mask_tools.toBbox(rle).tolist()):
        if isinstance(candidate, list) and len(candidate) == 4 and all(_is_number(value) for value in candidate):
            x, y, width, height = (float(v) for v in candidate)
            x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + width, image.width), min(y + height, image.height)
            if x1 > x0 and y1 > y0:
                return x0, y0, x1, y1
    raise AssertionError("a mask with pixels has a box")


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a pixel can have: no NaN, no infinity, no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def read_image(dataset: CocoDataset, image_id: int) -> Image.Image:
    """An image of the data set, RGB.

    Raises:
        StudyError: the file is broken, or its size is not the one that the JSON gives.
    """
    record = dataset.images[image_id]
    image = open_image(dataset.folder / record.file)
    if image.size != (record.width, record.height):
        raise StudyError(
            f"{dataset.folder / record.file} has {image.width}x{image.height} pixels, but {dataset.path} says "
            f"{record.width}x{record.height} (image {image_id}): correct the entry"
        )
    return image


def mask_of(rle: Rle) -> Mask:
    """``(height, width)`` mask of run lengths."""
    return np.asarray(mask_tools.decode(rle), dtype=bool)


def rles_of(masks: NDArray[np.bool_]) -> list[Rle]:
    """Run lengths of ``(N, height, width)`` masks, JSON-able."""
    columns = np.asfortranarray(np.moveaxis(masks, 0, -1), dtype=np.uint8)  # pycocotools wants (h, w, N), column-major
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in mask_tools.encode(columns)]


def matched_categories(references: CocoDataset, targets: CocoDataset) -> tuple[dict[int, str], tuple[str, ...]]:
    """Categories of both files by id, and a note for each that only one of them has annotations of.

    Raises:
        StudyError: one id stands for two names.
    """
    clash = [
        c
        for c in references.categories.keys() & targets.categories.keys()
        if references.categories[c] != targets.categories[c]
    ]
    if clash:
        c = min(clash)
        raise StudyError(
            f"category {c} is {references.categories[c]!r} in {references.path} and {targets.categories[c]!r} in "
            f"{targets.path}: use one list of categories in both"
        )
    names = dict(sorted({**targets.categories, **references.categories}.items()))
    shown = [{instance.category_id for instance in dataset.instances} for dataset in (references, targets)]
    notes = [
        *(
            f"category {c} ({names[c]}) has no reference: all its objects count as missed"
            for c in sorted(shown[1] - shown[0])
        ),
        *(
            f"category {c} ({names[c]}) shows in the references only: no AP of its own"
            for c in sorted(shown[0] - shown[1])
        ),
    ]
    return names, tuple(notes) if targets.annotated else ()


# ----------------------------------------------------------------------------------------------------- references


@dataclasses.dataclass(frozen=True)
class ReferenceRule:
    """Which instances may serve as references; the paper's values (study, section 5), in pixels of a COCO photograph.

    Attributes:
        min_area: pixels, exclusive.
        max_share: of the image's area, exclusive.
        max_aspect: of the image, long side to short.
        inset: pixels that the box keeps from the frame.
        max_overlap: box IoU with any other box of the image.
    """

    min_area: float = 32.0**2
    max_share: float = 0.5
    max_aspect: float = 5.0
    inset: float = 10.0
    max_overlap: float = 0.35


def eligible_references(dataset: CocoDataset, rule: ReferenceRule) -> list[Instance]:
    """The instances that the rule admits, in the file's order. Never a crowd, never a held-out drawing."""
    return [
        instance
        for image_id, instances in dataset.by_image.items()
        for instance in instances
        if _admitted(instance, instances, dataset.images[image_id], rule)
    ]


def _admitted(instance: Instance, neighbours: Sequence[Instance], image: ImageRecord, rule: ReferenceRule) -> bool:
    x0, y0, x1, y1 = instance.box
    inside = min(x0, y0, image.width - x1, image.height - y1) >= rule.inset
    sized = rule.min_area < instance.area < rule.max_share * image.width * image.height
    shaped = max(image.width, image.height) <= rule.max_aspect * min(image.width, image.height)
    if instance.crowd or instance.held_out or not (inside and sized and shaped):
        return False
    others = [neighbour.box for neighbour in neighbours if neighbour.id != instance.id]
    return not others or float(box_iou([instance.box], others).max()) <= rule.max_overlap


def choose_references(
    dataset: CocoDataset, shots: int, seed: int = 0, rule: ReferenceRule | None = None
) -> dict[int, tuple[Instance, ...]]:
    """Up to ``shots`` references for every category that has any, those of one category from distinct images.

    Seeded, and nested: the references of fewer shots are the first ones of more shots. A category may have fewer than
    ``shots``; one with none is not in the result.

    Raises:
        StudyError: ``shots`` is not positive, or no category has any reference.
    """
    if shots < 1:
        raise StudyError(f"shots is {shots}: choose 1 or more")
    pools: dict[int, list[Instance]] = {}
    for instance in eligible_references(dataset, rule or ReferenceRule()):
        pools.setdefault(instance.category_id, []).append(instance)
    if not pools:
        raise StudyError(
            f"{dataset.path}: no instance can be a reference by {rule or ReferenceRule()}: add some or relax the rule"
        )
    return {c: _draw(pools[c], shots, [seed, c % 2**64]) for c in sorted(pools)}  # ids may be negative, seeds not


def _draw(pool: Sequence[Instance], shots: int, seed: list[int]) -> tuple[Instance, ...]:
    chosen: dict[int, Instance] = {}
    for position in np.random.default_rng(seed).permutation(len(pool)):
        chosen.setdefault(pool[position].image_id, pool[position])
    return tuple(chosen.values())[:shots]


def box_iou(
    first: Sequence[Box] | NDArray[np.floating[Any]], second: Sequence[Box] | NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """``(N, M)`` IoU of ``(N, 4)`` and ``(M, 4)`` boxes ``(x0, y0, x1, y1)``; 0 where both are empty."""
    a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (first, second))
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = sides.clip(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(-1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


# -------------------------------------------------------------------------------------------------------- writing


def write_coco(
    path: Path,
    images: Sequence[ImageRecord],
    categories: dict[int, str],
    instances: Sequence[Instance],
    info: dict[str, Any],
) -> None:
    """Write instance data as COCO JSON, atomically (the images are the caller's)."""
    annotations = [
        {
            "id": i.id,
            "image_id": i.image_id,
            "category_id": i.category_id,
            "bbox": [i.box[0], i.box[1], i.box[2] - i.box[0], i.box[3] - i.box[1]],
            "area": i.area,
            "iscrowd": int(i.crowd),
            "segmentation": i.rle,
            **({} if i.drawing is None else {"drawing": i.drawing, "held_out": i.held_out}),
        }
        for i in instances
    ]
    entries = [{"id": r.id, "file_name": r.file, "width": r.width, "height": r.height} for r in images]
    names = [{"id": number, "name": name} for number, name in categories.items()]
    write_json(path, {"info": info, "images": entries, "annotations": annotations, "categories": names})


def write_mojiworld(
    world: mojiworld.World, stream: str, count: int, folder: Path | str, held_out_share: float | None = 0.0
) -> CocoDataset:
    """``count`` MojiWorld scenes as PNG files and COCO JSON in a sub-folder of ``folder``, written once and reused.

    Killed halfway it goes on where it stopped: every file appears whole. Categories have the ids 1, 2, ... in the
    order of :func:`mojiworld.categories`; annotations carry their ``drawing`` and whether it is ``held_out``.
    """
    key = hash_value([world.hash, stream, count, held_out_share])
    home = Path(folder) / f"{stream}_{count}_{key}"
    path = home / "instances.json"
    if not path.is_file():
        make = functools.partial(_write_scene, world, stream, held_out_share, home)
        mojiworld.sprites()  # rasterised once, before the workers start and each would
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            done = pool.map(make, range(count), chunksize=32) if count > 64 else map(make, range(count))
            scenes = list(tqdm(done, total=count, desc="rendering scenes", unit="scene", leave=False))
        records = [record for record, _ in scenes]
        found = [instance for _, instances in scenes for instance in instances]
        instances = [dataclasses.replace(instance, id=number) for number, instance in enumerate(found, start=1)]
        names = dict(enumerate(mojiworld.categories(), start=1))
        info = {"description": "MojiWorld scenes; drawings: OpenMoji, CC BY-SA 4.0", "stream": stream, "hash": key}
        write_coco(path, records, names, instances, info)
    return load_coco(path, home)


def _write_scene(
    world: mojiworld.World, stream: str, held_out_share: float | None, home: Path, index: int
) -> tuple[ImageRecord, list[Instance]]:
    """One scene's PNG file, if it is not there yet, and what it shows (ids within the scene)."""
    picture = mojiworld.scene(world, stream, index, held_out_share)
    record = ImageRecord(index + 1, f"{index:05d}.png", picture.image.shape[1], picture.image.shape[0])
    if not (home / record.file).is_file():
        with atomic_path(home / record.file) as temporary:
            Image.fromarray(picture.image).save(temporary, format="PNG", compress_level=1)
    return record, _scene_instances(picture, record.id)


def _scene_instances(picture: mojiworld.Picture, image_id: int) -> list[Instance]:
    masks = picture.instances[None] == np.arange(1, len(picture.drawings) + 1)[:, None, None]
    rows = mojiworld.catalogue().iloc[list(picture.drawings)]
    return [
        Instance(
            id=position,
            image_id=image_id,
            category_id=int(mojiworld.category_of_drawing()[drawing]) + 1,
            box=_box(None, rle, ImageRecord(image_id, "", *picture.instances.shape[::-1])),
            area=float(masks[position].sum()),
            rle=rle,
            drawing=str(rows["drawing"].iloc[position]),
            held_out=bool(mojiworld.held_out()[drawing]),
        )
        for position, (drawing, rle) in enumerate(zip(picture.drawings, rles_of(masks), strict=True))
    ]
