"""Annotations that come as one JSON file for each image, labelme's and SA-1B's, as the content of one COCO file."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samantics.data.masks import Rle, rles_of

UNNAMED = "SA-1B object"  # the one category of its masks, which have no names
CORNERS = 64  # of the polygon that stands for a circle


def is_per_image(content: Any) -> bool:
    """Whether a JSON file's content is labelme's or SA-1B's."""
    if not isinstance(content, dict) or "images" in content:
        return False
    return isinstance(content.get("shapes"), list) or isinstance(content.get("image"), dict)


def as_coco(files: Mapping[Path, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The files' images and objects, numbered from 1 in their order; `folder` is that of the images.

    labelme: polygons are masks, those of one label and `group_id` are one object; circles are polygons; bitmaps are
    masks; rectangles are boxes; points and lines are left to be refused. SA-1B: every mask is of one category.
    """
    images, objects = [], []
    for number, (path, content) in enumerate(files.items(), 1):
        if "shapes" in content:
            sides = [content.get("imageWidth"), content.get("imageHeight")]
            found = _labelled(content["shapes"], sides)
            name = content.get("imagePath") or path.stem
        else:
            sides, found = [content["image"].get(side) for side in ("width", "height")], _unnamed(content)
            name = content["image"].get("file_name") or path.stem
        width, height = (side if type(side) is int and side > 0 else None for side in sides)  # else the file says it
        beside = path.parent / str(name).replace("\\", "/")
        name = str(beside.relative_to(folder)) if beside.is_relative_to(folder) else str(name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        objects += [{**one, "image_id": number} for one in found]
    ids = {name: number for number, name in enumerate(sorted({o["category"] for o in objects}), 1)}
    annotations = [{**o, "id": n, "category_id": ids[o["category"]]} for n, o in enumerate(objects, 1)]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _unnamed(content: dict[str, Any]) -> list[dict[str, Any]]:
    """SA-1B's masks as objects of one category."""
    found = content.get("annotations")
    return [{**one, "category": UNNAMED} for one in (found if isinstance(found, list) else []) if isinstance(one, dict)]


def _labelled(shapes: list[Any], sides: list[Any]) -> list[dict[str, Any]]:
    """labelme's shapes as objects; one that cannot be an object has neither mask nor box."""
    found: dict[Any, dict[str, Any]] = {}
    for place, shape in enumerate(shapes):
        shape = shape if isinstance(shape, dict) else {}
        label, group = str(shape.get("label")), shape.get("group_id")
        kind, points = shape.get("shape_type") or "polygon", _points(shape.get("points"))
        one: dict[str, Any] = {"category": label}
        if kind == "circle" and len(points) == 2:
            turns = np.linspace(0, 2 * math.pi, CORNERS, endpoint=False)
            points = points[0] + math.dist(*points) * np.stack([np.cos(turns), np.sin(turns)], 1)
        if kind in ("polygon", "circle") and len(points) > 2:
            one["segmentation"] = [points.ravel().tolist()]
        elif kind in ("rectangle", "mask") and len(points) > 1:
            one["bbox"] = [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]
            if kind == "mask" and (rle := _bitmap(shape.get("mask"), points[0], sides)):
                one["segmentation"] = rle
        together = (label, str(group)) if group is not None and isinstance(one.get("segmentation"), list) else place
        if found.setdefault(together, one) is not one:
            found[together]["segmentation"] += one["segmentation"]
    return list(found.values())


def _bitmap(text: Any, corner: np.ndarray[Any, Any], sides: list[Any]) -> Rle | None:
    """Run lengths of labelme's bitmap, a PNG in base64 whose first pixel lies at `corner`; None where it is none."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text))) as bitmap:
            (left, top), (width, height) = corner.astype(int), bitmap.size
            whole = np.zeros((1, sides[1], sides[0]), bool)
            if left < 0 or top < 0 or left + width > sides[0] or top + height > sides[1]:
                return None
            whole[0, top : top + height, left : left + width] = np.asarray(bitmap.convert("L")) > 0
    except (MemoryError, OSError, OverflowError, TypeError, ValueError):
        return None
    return rles_of(whole)[0]


def _points(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`(N, 2)` x, y; none where they are no pairs of numbers."""
    try:
        return np.asarray(values, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        return np.empty((0, 2))
