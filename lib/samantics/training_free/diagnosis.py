"""Where the points are lost: oracles that take one difficulty away at a time, and errors by kind in the way of TIDE."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pycocotools import mask as mask_tools

from samantics.data.coco import CocoDataset, Instance, Rle, box_iou
from samantics.metrics.coco_ap import Result, ap_gain, evaluate
from samantics.metrics.intervals import bootstrap_statistic
from samantics.training_free.matching import MatchSettings, ranked, result_of
from samantics.training_free.proposals import Proposals

THRESHOLDS = np.linspace(0.5, 0.95, 10)
FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU, as TIDE sets them (arXiv 2008.08115)
KINDS = ("class", "location", "both", "duplicate", "background", "missed")


def objects_of(dataset: CocoDataset, image_id: int) -> list[Instance]:
    """The objects of an image that count: no crowds."""
    return [instance for instance in dataset.by_image[image_id] if not instance.crowd]


# -------------------------------------------------------------------------------------------------------- oracles


def true_masks(dataset: CocoDataset) -> dict[int, Proposals]:
    """The annotated masks as proposals of perfect quality."""
    return {image_id: _as_proposals(dataset, image_id) for image_id in dataset.images}


def _as_proposals(dataset: CocoDataset, image_id: int) -> Proposals:
    objects, record = objects_of(dataset, image_id), dataset.images[image_id]
    boxes = np.array([instance.box for instance in objects], np.float64).reshape(-1, 4)
    ones = np.ones(len(objects))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    rles = tuple(instance.rle for instance in objects)
    return Proposals((record.height, record.width), rles, boxes, ones, ones, centres)


def overlaps(dataset: CocoDataset, image_id: int, rles: Sequence[Rle]) -> NDArray[np.float64]:
    """``(N, G)`` mask IoU of ``rles`` with the image's objects."""
    objects = [instance.rle for instance in objects_of(dataset, image_id)]
    if not objects or not rles:
        return np.zeros((len(rles), len(objects)))
    return np.asarray(mask_tools.iou(list(rles), objects, [0] * len(objects)))


def with_true_classes(
    dataset: CocoDataset, proposals: Mapping[int, Proposals], settings: MatchSettings | None = None
) -> list[Result]:
    """Predicted masks named by the annotation: the class of the object a mask covers best (IoU at least one half).

    Masks that cover none are dropped, and the score is the predicted IoU: what is left are location and duplicates.
    """
    settings = dataclasses.replace(settings or MatchSettings(), merging="none")
    results: list[Result] = []
    for image_id, found in proposals.items():
        iou = overlaps(dataset, image_id, found.rles)
        rows = np.flatnonzero(iou.max(1, initial=0) >= FOREGROUND)
        classes = np.array([instance.category_id for instance in objects_of(dataset, image_id)], int)
        named = classes[iou[rows].argmax(1)] if len(rows) else np.empty(0, int)
        scores = found.predicted_iou[rows].clip(min=1e-6)  # a predicted IoU may be below zero, a score may not
        results += ranked(image_id, found.select(rows), np.zeros((len(rows), 1), np.float32), named, scores, settings)
    return results


def best_masks(dataset: CocoDataset, proposals: Mapping[int, Proposals]) -> list[Result]:
    """For every object the proposal that covers it best, with its class and the IoU as score: perfect selection."""
    results = []
    for image_id, found in proposals.items():
        iou = overlaps(dataset, image_id, found.rles)
        for column, instance in enumerate(objects_of(dataset, image_id)):
            row = int(iou[:, column].argmax()) if len(found) else -1
            if row >= 0 and iou[row, column] > 0:
                box = found.boxes[row]
                results.append(result_of(image_id, instance.category_id, found.rles[row], box, iou[row, column]))
    return results


def covered(dataset: CocoDataset, proposals: Mapping[int, Proposals], iou_type: str = "segm") -> pd.DataFrame:
    """One row per object: ``image_id, id, category_id, area, share`` (of the image), ``iou`` of its best proposal."""
    rows = []
    for image_id, found in proposals.items():
        boxes = [instance.box for instance in objects_of(dataset, image_id)]
        iou = overlaps(dataset, image_id, found.rles) if iou_type == "segm" else box_iou(found.boxes, boxes)
        best = iou.max(0, initial=0)
        record = dataset.images[image_id]
        for instance, iou in zip(objects_of(dataset, image_id), best, strict=True):
            share = instance.area / (record.width * record.height)
            rows.append((image_id, instance.id, instance.category_id, instance.area, share, float(iou)))
    return pd.DataFrame(rows, columns=["image_id", "id", "category_id", "area", "share", "iou"])


def recall(iou: NDArray[np.float64]) -> float:
    """Percent of objects that a proposal covers, averaged over COCO's thresholds: the ceiling of AR."""
    return 100 * float((np.asarray(iou)[:, None] >= THRESHOLDS).mean())


def recall_interval(objects: pd.DataFrame) -> tuple[float, float]:
    """95 % interval of :func:`recall`, in percent, over the images of :func:`covered`'s table."""
    hits = (objects["iou"].to_numpy()[:, None] >= THRESHOLDS).mean(1)
    per_image = (
        pd.DataFrame({"image": objects["image_id"], "hits": hits}).groupby("image")["hits"].agg(["sum", "count"])
    )
    sums, counts = per_image["sum"].to_numpy(), per_image["count"].to_numpy()

    def statistic(rows: NDArray[np.int64]) -> float:
        return float(sums[rows].sum() / counts[rows].sum())

    interval = bootstrap_statistic(statistic, len(per_image)).times(100)
    return interval.low, interval.high


# ----------------------------------------------------------------------------------------------------------- TIDE


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one detection is at IoU 0.5.

    Attributes:
        kind: ``correct`` or one of :data:`KINDS` but ``missed``.
        object: the object it found or, for a class or location error, was near to; None otherwise.
    """

    kind: str
    object: Instance | None


def verdicts(dataset: CocoDataset, results: Sequence[Result]) -> list[Verdict]:
    """A verdict on every result. As COCO does, better-scored results take their objects first.

    class: covers an object of another class (IoU >= 0.5); location: near one of its class (0.1 to 0.5); both: near
    one of another class; duplicate: covers one of its class that is taken; background: covers nothing (IoU < 0.1).
    """
    rows: dict[int, list[int]] = {image_id: [] for image_id in dataset.images}
    for row, result in enumerate(results):
        rows[result["image_id"]].append(row)
    found: dict[int, Verdict] = {}
    for image_id, chosen in rows.items():
        chosen.sort(key=lambda row: -results[row]["score"])
        iou = overlaps(dataset, image_id, [results[row]["segmentation"] for row in chosen])
        objects = objects_of(dataset, image_id)
        taken: set[int] = set()
        for position, row in enumerate(chosen):
            found[row] = _verdict(iou[position], objects, results[row]["category_id"], taken)
            if found[row].kind == "correct":
                taken.add(_object(found[row]).id)
    return [found[row] for row in range(len(results))]


def _verdict(iou: NDArray[np.float64], objects: Sequence[Instance], category: int, taken: set[int]) -> Verdict:
    """``iou``: ``(G,)`` with the image's objects."""
    same = np.array([instance.category_id == category for instance in objects], bool)
    free = np.array([instance.id not in taken for instance in objects], bool)

    def best(allowed: NDArray[np.bool_]) -> tuple[float, int]:
        values = np.where(allowed, iou, -1.0)
        return (float(values.max()), int(values.argmax())) if len(values) else (-1.0, -1)

    for kind, allowed, least in (
        ("correct", same & free, FOREGROUND),
        ("duplicate", same & ~free, FOREGROUND),
        ("class", ~same, FOREGROUND),
        ("location", same, BACKGROUND),
        ("both", ~same, BACKGROUND),
    ):
        value, row = best(allowed)
        if value >= least:
            return Verdict(kind, objects[row] if kind in ("correct", "class", "location") else None)
    return Verdict("background", None)


def _object(verdict: Verdict) -> Instance:
    assert verdict.object is not None
    return verdict.object


def error_table(dataset: CocoDataset, results: Sequence[Result], judged: Sequence[Verdict]) -> pd.DataFrame:
    """Errors by kind: ``kind, count, share, share_low, share_high, gain, gain_low, gain_high``.

    ``share`` is percent of all errors, ``gain`` the AP50 (masks) won by mending the kind; both with 95 % intervals over
    images. A wrong class or place is put right unless its object is found already (then the result is removed);
    results of the other kinds are removed; missed objects (neither found nor near to being) are taken out of the
    annotations.
    """
    base = evaluate(dataset, results, "segm")
    missed = missed_objects(dataset, judged)
    without = dataclasses.replace(dataset, instances=tuple(i for i in dataset.instances if i not in missed))
    place = {image_id: number for number, image_id in enumerate(dataset.images)}
    counts = np.zeros((len(KINDS), len(place)), int)
    for result, verdict in zip(results, judged, strict=True):
        if verdict.kind in KINDS:
            counts[KINDS.index(verdict.kind), place[result["image_id"]]] += 1
    for instance in missed:
        counts[KINDS.index("missed"), place[instance.image_id]] += 1
    rows = []
    for number, kind in enumerate(KINDS):
        mended = evaluate(without, results) if kind == "missed" else evaluate(dataset, _mended(results, judged, kind))
        gain = ap_gain(base, mended, iou=0.5)
        share = bootstrap_statistic(functools.partial(_share, counts, number), len(place)).times(100)
        rows.append((kind, int(counts[number].sum()), *share, *gain))
    columns = ["kind", "count", "share", "share_low", "share_high", "gain", "gain_low", "gain_high"]
    return pd.DataFrame(rows, columns=columns)


def _share(counts: NDArray[np.int64], row: int, images: NDArray[np.int64]) -> float:
    """Of all that is counted in these images (columns), the share of one row; 0 where nothing is."""
    return float(counts[row, images].sum() / max(1, counts[:, images].sum()))


def missed_objects(dataset: CocoDataset, judged: Sequence[Verdict]) -> set[Instance]:
    """Objects that no result found, nor would have with another class or place."""
    near = {verdict.object.id for verdict in judged if verdict.object is not None}
    return {i for i in dataset.instances if not i.crowd and i.id not in near}


def _mended(results: Sequence[Result], judged: Sequence[Verdict], kind: str) -> list[Result]:
    """The results with all errors of one kind put right or removed."""
    taken = {_object(verdict).id for verdict in judged if verdict.kind == "correct"}
    mended = []
    for result, verdict in sorted(zip(results, judged, strict=True), key=lambda pair: -pair[0]["score"]):
        if verdict.kind != kind:
            mended.append(result)
        elif verdict.object is not None and verdict.object.id not in taken:
            taken.add(verdict.object.id)
            truth = verdict.object
            change = {"category_id": truth.category_id} if kind == "class" else {"segmentation": truth.rle}
            mended.append({**result, **change})
    return mended
