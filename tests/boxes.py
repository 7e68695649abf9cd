"""Objects whose masks are boxes, data sets and predictions of them, and proposals."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samantics.data.coco import CocoDataset, ImageRecord, Instance, box_rle, rles_of, xywh
from samantics.metrics.coco_ap import Result
from samantics.training_free.proposals import Proposals

Box = Sequence[int]  # x0, y0, x1, y1
SIZE = (64, 64)  # of the images: height, width


def box_masks(boxes: Sequence[Box], size: tuple[int, int] = SIZE) -> NDArray[np.bool_]:
    """`(N, *size)`."""
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def box_object(
    number: int, image_id: int, category_id: int, box: Box, size: tuple[int, int] = SIZE, **more: Any
) -> Instance:
    area = float((box[2] - box[0]) * (box[3] - box[1]))
    return Instance(number, image_id, category_id, tuple(box), area, box_rle(box, *size), **more)


def box_dataset(
    images: Iterable[int], categories: int, objects: Iterable[Instance], size: tuple[int, int] = SIZE
) -> CocoDataset:
    """With categories 1, 2, ... called c1, c2, ..."""
    records = {n: ImageRecord(n, f"{n}.png", size[1], size[0]) for n in images}
    names = {n: f"c{n}" for n in range(1, categories + 1)}
    return CocoDataset(Path("x.json"), Path(), records, names, tuple(objects), annotated=True)


def box_result(image_id: int, category_id: int, box: Box, score: float) -> Result:
    place = {"image_id": image_id, "category_id": category_id, "bbox": [float(v) for v in xywh(box)]}
    return {**place, "segmentation": box_rle(box, *SIZE), "score": score}


def box_proposals(boxes: Sequence[Box], quality: Sequence[float] = (), side: int = SIZE[0]) -> Proposals:
    """Of a predicted IoU that falls from 0.9 to -0.1, if none is given."""
    predicted = np.array(quality or np.linspace(0.9, -0.1, len(boxes)))
    rles = tuple(rles_of(box_masks(boxes, (side, side))))
    return Proposals((side, side), rles, np.array(boxes, float).reshape(-1, 4), predicted, np.ones(len(boxes)))
