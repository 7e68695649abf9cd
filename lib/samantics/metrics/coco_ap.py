"""AP and AR as COCOeval defines them, with intervals over images. All figures are percent.

Predictions are a list of dictionaries in COCO's result format: ``image_id, category_id, score`` with ``segmentation``
(run lengths), ``bbox`` (x, y, width, height) or both: what is evaluated here can be saved and loaded elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samantics.cache import write_json
from samantics.data.coco import CocoDataset
from samantics.errors import StudyError
from samantics.metrics.intervals import Interval

Result = dict[str, Any]
IOU_TYPES = ("bbox", "segm")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation.

    Attributes:
        metrics: percent for each of :data:`METRICS`; None where no object can be measured (COCOeval's -1).
        category_ids: the categories that were asked for.
        coco: the evaluated COCOeval, for :func:`ap_interval` and whoever needs more.
    """

    metrics: dict[str, float | None]
    category_ids: tuple[int, ...]
    coco: COCOeval = dataclasses.field(repr=False)

    @property
    def ap(self) -> float:
        """AP in percent; 0 where nothing could be measured would hide that, so this raises.

        Raises:
            StudyError: the data has no object of these categories.
        """
        value = self.metrics["AP"]
        if value is None:
            raise StudyError("no AP: the targets have no annotated object of the categories evaluated")
        return value

    @property
    def ap_by_category(self) -> dict[int, float]:
        """AP in percent of each category that has objects."""
        precision = self.coco.eval["precision"][:, :, :, 0, -1]
        return {
            c: float(precision[:, :, k].mean()) * 100
            for k, c in enumerate(self.category_ids)
            if (precision[:, :, k] > -1).any()
        }


def evaluate(
    dataset: CocoDataset,
    results: Sequence[Result],
    iou_type: str = "segm",
    category_ids: Collection[int] | None = None,
    class_agnostic: bool = False,
) -> Evaluation:
    """Compare predictions with a data set's annotations by pycocotools' COCOeval.

    All images count, also those without annotations or predictions. Each image keeps its 100 best-scored predictions
    per category.

    Args:
        iou_type: ``bbox`` or ``segm``.
        category_ids: only these categories (their objects and predictions); None for all.
        class_agnostic: treat all these categories as one.

    Raises:
        StudyError: unknown ``iou_type`` or category; a prediction of an image that the data does not have, with a mask
            of another size, or with a score or box that is not finite.
    """
    if iou_type not in IOU_TYPES:
        raise StudyError(f"iou_type is {iou_type!r}: choose from {', '.join(IOU_TYPES)}")
    chosen = tuple(sorted(dataset.categories if category_ids is None else category_ids))
    _check(dataset, results, chosen)
    label = {c: chosen[0] if class_agnostic else c for c in chosen}
    categories = tuple(sorted(set(label.values())))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        coco = COCOeval(_annotations(dataset, label), _predictions(dataset, results, label, iou_type), iou_type)
        coco.params.catIds = list(categories)
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    values = [None if v < 0 else float(v) * 100 for v in coco.stats[: len(METRICS)]]
    return Evaluation(dict(zip(METRICS, values, strict=True)), categories, coco)


def _check(dataset: CocoDataset, results: Sequence[Result], category_ids: tuple[int, ...]) -> None:
    unknown = sorted(set(category_ids) - dataset.categories.keys())
    if unknown:
        raise StudyError(f"{dataset.path} has no category {unknown[0]}: choose from {sorted(dataset.categories)}")
    for result in results:
        if result["image_id"] not in dataset.images:
            raise StudyError(
                f"a prediction is of image {result['image_id']}, which {dataset.path} does not list: predict its images"
            )
        if not np.isfinite(result["score"]):
            raise StudyError(
                f"a prediction of image {result['image_id']} has the score {result['score']}: scores must be finite"
            )
        box, image = result.get("bbox", (0, 0, 0, 0)), dataset.images[result["image_id"]]
        if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) < 0:
            raise StudyError(
                f"a prediction of image {image.id} has the box {list(box)}: give finite x, y, width, height"
            )
        size = result["segmentation"]["size"] if "segmentation" in result else [image.height, image.width]
        if list(size) != [image.height, image.width]:
            raise StudyError(
                f"a prediction of image {image.id} has a mask of {size[0]}x{size[1]} (height x width), the image has "
                f"{image.height}x{image.width}: predict at the image's size"
            )


def _annotations(dataset: CocoDataset, label: dict[int, int]) -> COCO:
    entries = [
        {
            "id": number,  # not the file's own: COCOeval takes an object of id 0 for one that is never found
            "image_id": i.image_id,
            "category_id": label[i.category_id],
            "bbox": [i.box[0], i.box[1], i.box[2] - i.box[0], i.box[3] - i.box[1]],
            "area": i.area,
            "iscrowd": int(i.crowd),
            "segmentation": i.rle,
        }
        for number, i in enumerate(dataset.instances, start=1)
        if i.category_id in label
    ]
    return _coco(dataset, entries, label)


def _predictions(dataset: CocoDataset, results: Sequence[Result], label: dict[int, int], iou_type: str) -> COCO:
    """As ``COCO.loadRes`` does it; but that cannot load an empty list, and takes a mask's area from its box."""
    kept = [result for result in results if result["category_id"] in label]
    entries = []
    for number, result in enumerate(kept, start=1):
        shape = {"bbox": result["bbox"]} if iou_type == "bbox" else {"segmentation": result["segmentation"]}
        area = result["bbox"][2] * result["bbox"][3] if iou_type == "bbox" else mask_tools.area(result["segmentation"])
        head = {"id": number, "image_id": result["image_id"], "category_id": label[result["category_id"]]}
        entries.append({**head, **shape, "area": float(area), "iscrowd": 0, "score": float(result["score"])})
    return _coco(dataset, entries, label)


def _coco(dataset: CocoDataset, annotations: list[dict[str, Any]], label: dict[int, int]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": r.id, "width": r.width, "height": r.height} for r in dataset.images.values()],
        "annotations": annotations,
        "categories": [{"id": c, "name": dataset.categories[c]} for c in sorted(set(label.values()))],
    }
    coco.createIndex()
    return coco


# ------------------------------------------------------------------------------------------------------ intervals


@dataclasses.dataclass(frozen=True)
class _Curve:
    """What one category's AP at one IoU threshold is made of, predictions best-scored first.

    Attributes:
        images: ``(D,)`` position of each prediction's image, for the predictions that count (ignored ones left out).
        hits: ``(H,)`` positions in ``images`` of the true positives.
    """

    images: NDArray[np.intp]
    hits: NDArray[np.intp]


def ap_interval(
    evaluations: Evaluation | Sequence[Evaluation], samples: int = 1000, seed: int = 0, iou: float | None = None
) -> Interval:
    """AP in percent with its 95 % bootstrap interval over images, centred on it.

    The envelope that AP takes over its precisions makes it larger on fewer different images, and a resample has but
    63 % of them: quantiles of resampled APs lie too high. So their spread is laid around the AP of all images.

    Predictions are matched to objects once; each resample only weighs the images by how often they were drawn and
    accumulates again. Several evaluations of the same images (other references, say) are drawn together: the same
    images for all of them, because their difficulty is shared, and the evaluations themselves with replacement.

    Args:
        iou: AP at this IoU alone (0.5 for AP50); None for COCO's mean over 0.5 to 0.95.

    Raises:
        StudyError: there is no object to measure on.
    """
    runs = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    rng = np.random.default_rng(seed)
    weights = _image_weights(rng, len(runs[0].coco.params.imgIds), samples)
    picks = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=samples)
    values = np.concatenate([_resampled_ap(run, np.ones_like(weights[:1]), iou) for run in runs])
    if np.isnan(values).any():
        raise StudyError("no AP: the targets have no annotated object of the categories evaluated")
    resampled = np.stack([_resampled_ap(run, weights, iou) for run in runs], axis=1)
    drawn = (resampled * picks).sum(1) / len(runs)
    value, low, high = _centred(float(values.mean()), drawn)
    return Interval(value, max(low, 0.0), min(high, 100.0))


def ap_gain(
    before: Evaluation, after: Evaluation, samples: int = 1000, seed: int = 0, iou: float | None = None
) -> Interval:
    """AP of ``after`` minus AP of ``before``, the same images drawn for both; else as :func:`ap_interval`.

    Without any object there is no AP, and the gain is 0.
    """
    weights = _image_weights(np.random.default_rng(seed), len(before.coco.params.imgIds), samples)
    every = np.concatenate([np.ones_like(weights[:1]), weights])
    gain = np.nan_to_num(_resampled_ap(after, every, iou) - _resampled_ap(before, every, iou))
    return _centred(float(gain[0]), gain[1:])


def _image_weights(rng: np.random.Generator, images: int, samples: int) -> NDArray[np.float32]:
    """``(samples, images)`` how often each image is drawn."""
    return rng.multinomial(images, np.full(images, 1 / images), size=samples).astype(np.float32)


def _centred(value: float, drawn: NDArray[np.float64]) -> Interval:
    """The spread of resampled values, laid around the value itself."""
    low, high = np.nanquantile(drawn, [0.025, 0.975]) - np.nanmean(drawn) + value
    return Interval(value, float(low), float(high))


def _resampled_ap(evaluation: Evaluation, weights: NDArray[np.float32], iou: float | None) -> NDArray[np.float64]:
    """``(S,)`` AP in percent for ``(S, images)`` weights; NaN where no object was drawn."""
    thresholds = evaluation.coco.params.iouThrs
    chosen = range(len(thresholds)) if iou is None else [int(np.abs(thresholds - iou).argmin())]
    total, present = np.zeros(len(weights)), np.zeros(len(weights))
    for category in range(len(evaluation.category_ids)):
        objects, curves = _curves(evaluation.coco, category)
        count = weights @ objects
        ap = np.mean([_weighted_ap(curves[t], weights, count) for t in chosen], axis=0)
        total += np.where(count > 0, ap, 0)
        present += count > 0
    with np.errstate(invalid="ignore"):
        return 100 * total / np.where(present > 0, present, np.nan)


def _weighted_ap(curve: _Curve, weights: NDArray[np.float32], objects: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(S,)`` interpolated AP at 101 recalls, each image counted ``weights[s, image]`` times.

    Precision is only read at true positives: between them it falls, so the envelope never looks there.
    """
    if not curve.hits.size:
        return np.zeros(len(weights))
    drawn = np.cumsum(weights[:, curve.images], axis=1, dtype=np.float64)[:, curve.hits]
    found = np.cumsum(weights[:, curve.images[curve.hits]], axis=1, dtype=np.float64)
    precision = found / np.maximum(drawn, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = found / np.maximum(objects, 1)[:, None]
    reached = np.floor(recall * 100 + 1e-9) + 1  # how many of the recalls 0, 0.01, ..., 1 are at or below it
    return (envelope * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / 101


def _curves(coco: COCOeval, category: int) -> tuple[NDArray[np.float32], list[_Curve]]:
    """``(images,)`` objects per image of one category (all sizes), and its curve at every IoU threshold."""
    images = len(coco.params.imgIds)
    start = (
        category * len(coco.params.areaRng) * images
    )  # evalImgs: categories, then area ranges ("all" first), then images
    found = [(i, e) for i, e in enumerate(coco.evalImgs[start : start + images]) if e is not None]
    objects = np.zeros(images, np.float32)
    for i, entry in found:
        objects[i] = np.count_nonzero(entry["gtIgnore"] == 0)
    if not found:
        return objects, [_Curve(np.empty(0, np.intp), np.empty(0, np.intp))] * len(coco.params.iouThrs)
    order = np.argsort(-np.concatenate([e["dtScores"] for _, e in found]), kind="mergesort")
    owner = np.repeat([i for i, _ in found], [len(e["dtScores"]) for _, e in found])[order]
    matched = np.concatenate([e["dtMatches"] for _, e in found], axis=1)[:, order] > 0
    counts = ~np.concatenate([e["dtIgnore"] for _, e in found], axis=1)[:, order].astype(bool)
    return objects, [_Curve(owner[c], np.flatnonzero(m[c])) for m, c in zip(matched, counts, strict=True)]


# ---------------------------------------------------------------------------------------------------------- files


def perfect_results(dataset: CocoDataset) -> list[Result]:
    """The annotations given as predictions: they must score AP 100, else the evaluation is at fault."""
    return [
        {
            "image_id": i.image_id,
            "category_id": i.category_id,
            "bbox": [i.box[0], i.box[1], i.box[2] - i.box[0], i.box[3] - i.box[1]],
            "segmentation": i.rle,
            "score": 1.0,
        }
        for i in dataset.instances
        if not i.crowd
    ]


def write_results(results: Sequence[Result], path: Path) -> None:
    """Save predictions as a COCO result file, which ``pycocotools``' ``COCO.loadRes`` reads."""
    write_json(path, list(results))
