"""Annotations that come as one JSON file for each image, labelme's and SA-1B's, as the content of one COCO file."""

import base64
import contextlib
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samantics.data.coco import Rle, rles_of
from samantics.data.folders import MAX_PIXELS

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
        if isinstance(content.get("shapes"), list):
            *sides, name = (content.get(key) for key in ("imageWidth", "imageHeight", "imagePath"))
            found = _labelled(content["shapes"], sides)
        else:
            *sides, name = (content["image"].get(key) for key in ("width", "height", "file_name"))
            masks: Any = content.get("annotations")
            masks = masks if isinstance(masks, list) else []
            found = [{**one, "category": UNNAMED} for one in masks if isinstance(one, dict)]
        width, height = (side if type(side) is int and side > 0 else None for side in sides)  # else the file says it
        name = str(name or path.stem).replace("\\", "/")
        place = path.parent / name
        name = str(place.relative_to(folder)) if place.is_relative_to(folder) else name
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        objects += [{**one, "image_id": number} for one in found]
    ids = {name: number for number, name in enumerate(sorted({o["category"] for o in objects}), 1)}
    annotations = [{**o, "id": n, "category_id": ids[o["category"]]} for n, o in enumerate(objects, 1)]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _labelled(shapes: list[Any], sides: list[Any]) -> list[dict[str, Any]]:
    """labelme's shapes as objects; one that cannot be an object has neither mask nor box."""
    found: dict[Any, dict[str, Any]] = {}
    for place, shape in enumerate(shapes):
        shape = shape if isinstance(shape, dict) else {}
        label, group = str(shape.get("label")), shape.get("group_id")
        kind, points = shape.get("shape_type") or "polygon", np.empty((0, 2))
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # no pairs of numbers
            points = np.asarray(shape.get("points"), np.float64).reshape(-1, 2)
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
    with contextlib.suppress(Exception):  # damaged pictures make Pillow raise nearly every kind
        bitmap = np.asarray(Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]).convert("L")) > 0
        (left, top), (height, width) = corner.astype(int), bitmap.shape
        inside = 0 <= left <= sides[0] - width and 0 <= top <= sides[1] - height
        if inside and sides[0] * sides[1] <= MAX_PIXELS:
            whole = np.zeros((1, sides[1], sides[0]), bool)
            whole[0, top : top + height, left : left + width] = bitmap
            return rles_of(whole)[0]
    return None
