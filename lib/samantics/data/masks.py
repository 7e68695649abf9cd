"""Masks as COCO's run lengths: of pixels, of boxes, and of what JSON files hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_tools

LONGEST_OUTLINE = 1e6  # pixels, and the farthest from the origin: pycocotools walks it in steps of a fifth
OUTSIDE = "reach outside the image: cut at the frame"
STRAY = "a polygon of fewer than three points beside others: dropped"

Mask = NDArray[np.bool_]
Rle = dict[str, Any]  # COCO's compressed run lengths: {"size": [height, width], "counts": text}


def mask_of(rle: Rle) -> Mask:
    """`(height, width)` mask of run lengths."""
    return np.asarray(mask_tools.decode(rle), dtype=bool)


def rles_of(masks: NDArray[np.bool_]) -> list[Rle]:
    """Run lengths of `(N, height, width)` masks, JSON-able."""
    columns = np.asfortranarray(np.moveaxis(masks, 0, -1), dtype=np.uint8)  # pycocotools wants (h, w, N), column-major
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in mask_tools.encode(columns)]


def box_rle(box: tuple[float, float, float, float], height: int, width: int) -> Rle:
    """Run lengths of all pixels that a box `(x0, y0, x1, y1)` touches."""
    mask = np.zeros((1, height, width), bool)
    mask[0, math.floor(box[1]) : math.ceil(box[3]), math.floor(box[0]) : math.ceil(box[2])] = True
    return rles_of(mask)[0]


def parsed_rle(segmentation: Any, height: int, width: int) -> tuple[Rle, list[str]]:
    """Run lengths of what JSON holds, a list of polygons, one polygon or run lengths; and what was mended.

    Raises:
        ValueError: it is none of these, or would take endless time or foreign memory to draw.
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
    counts = rle["counts"]
    return {"size": size, "counts": counts.decode() if isinstance(counts, bytes) else counts}, mended


def is_pixel(value: Any) -> bool:
    """Whether a value of JSON is a number that a pixel can have: no NaN, no infinity, no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


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
    if max(_outline(p) for p in whole) > LONGEST_OUTLINE:
        raise ValueError("a polygon has over a million pixels of outline or lies as far away")
    # a pixel beyond the frame is the rounding of annotation tools, not a fault worth a line
    outside = any(p.min() < -1 or p[::2].max() > width + 1 or p[1::2].max() > height + 1 for p in whole)
    return whole, [OUTSIDE] * outside + [STRAY] * (len(whole) < len(polygons))


def _outline(polygon: NDArray[np.float64]) -> float:
    """Pixels of the way from the origin along all points `x, y, x, y, ...`."""
    points = polygon.clip(-1e9, 1e9).reshape(-1, 2)
    return float(np.abs(points[1:] - points[:-1]).sum() + np.abs(points[0]).sum())
