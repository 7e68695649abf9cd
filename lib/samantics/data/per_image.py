"""Annotations that come as one JSON file for each image, labelme's and SA-1B's, as the content of one COCO file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

UNNAMED = "SA-1B object"  # the one category of its masks, which have no names
CORNERS = 64  # of the polygon that stands for a circle


def is_per_image(content: Any) -> bool:
    """Whether a JSON file's content is labelme's or SA-1B's."""
    if not isinstance(content, dict) or "images" in content:
        return False
    return isinstance(content.get("shapes"), list) or isinstance(content.get("image"), dict)


def as_coco(files: Mapping[Path, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The files' images and objects, numbered from 1 in their order; `folder` is that of the images.

    labelme: polygons are masks, those of one label and `group_id` are one object; circles are polygons; rectangles and
    labelme's own masks are boxes; points and lines are left to be refused. SA-1B: every mask is of one category.
    """
    images, objects = [], []
    for number, (path, content) in enumerate(files.items(), 1):
        if "shapes" in content:
            sides, found = [content.get("imageWidth"), content.get("imageHeight")], _labelled(content["shapes"])
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


def _labelled(shapes: list[Any]) -> list[dict[str, Any]]:
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
        together = place if group is None or "segmentation" not in one else (label, str(group))
        if found.setdefault(together, one) is not one:
            found[together]["segmentation"] += one["segmentation"]
    return list(found.values())


def _points(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`(N, 2)` x, y; none where they are no pairs of numbers."""
    try:
        return np.asarray(values, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        return np.empty((0, 2))
