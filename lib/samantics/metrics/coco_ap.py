"""AP and AR as COCOeval defines them, with intervals over images. All figures are percent.

Predictions are a list of dictionaries in COCO's result format: `image_id, category_id, score` with `segmentation`
(run lengths), `bbox` (x, y, width, height) or both: what is evaluated here can be saved as JSON and loaded elsewhere.
"""

import contextlib
import copy
import dataclasses
import functools
import io
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samantics.data.coco import CocoDataset, annotation
from samantics.errors import StudyError
from samantics.metrics.intervals import Difference, Interval, difference_of, with_others

Result = dict[str, Any]
IOU_TYPES = ("bbox", "segm")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
MOST = 100  # predictions of a category that an image keeps; more where an image shows more objects
Terms = Sequence[tuple[int, Sequence["Evaluation"]]]  # signs and evaluations, see `ap_difference_by_seeds`
Curve = tuple[NDArray[np.intp], NDArray[np.intp]]  # `images` and `hits` of `_weighted_ap`


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation."""

    coco: COCOeval

    @functools.cached_property
    def metrics(self) -> dict[str, float | None]:
        """Percent for each of `METRICS`, None where no object can be measured: COCOeval's summary for any limit."""
        precision, recall = self.coco.eval["precision"], self.coco.eval["recall"]  # (T, R, K, areas, limits), without R
        values = [precision[..., 0, -1], precision[0, ..., 0, -1], precision[5, ..., 0, -1]]
        values += [precision[..., area : area + 1, -1] for area in (1, 2, 3)]  # nothing where sizes were not asked for
        values += [recall[..., 0, limit] for limit in (0, 1, 2)]
        measured = [table[table > -1] for table in values]
        means = [float(np.mean(table)) * 100 if table.size else None for table in measured]
        return dict(zip(METRICS, means, strict=True))

    def of(self, category_ids: Collection[int]) -> "Evaluation":
        """The same for some of its categories, without what only the matching needed: a tenth of the memory."""
        whole, part = self.coco, COCOeval(iouType=self.coco.params.iouType)
        rows = [whole.params.catIds.index(category) for category in sorted(category_ids)]
        images, areas = len(whole.params.imgIds), len(whole.params.areaRng)
        part.params = copy.copy(whole.params)
        part.params.catIds, part.params.areaRng = [whole.params.catIds[row] for row in rows], whole.params.areaRng[:1]
        part.evalImgs = [one for row in rows for one in whole.evalImgs[row * areas * images :][:images]]
        part.eval = {name: whole.eval[name][..., rows, :, :] for name in ("precision", "recall")}
        return Evaluation(part)


def evaluate(dataset: CocoDataset, results: Sequence[Result], iou_type: str = "segm", sizes: bool = True) -> Evaluation:
    """AP and AR of predictions by pycocotools' COCOeval; `iou_type` is `bbox` or `segm`.

    All images count, also those without annotations or predictions. Each image keeps its 100 best-scored predictions
    per category, or as many as it shows objects of one category, if that is more (also in `AR100`). Of objects that
    have a box and no mask, mask AP ignores what falls on them. Without `sizes`, which take most of the time, APs, APm
    and APl are None. StudyError where a prediction cannot be measured (its image, mask, box or score).
    """
    for result in results:
        _check(dataset, result)
    counts = Counter((i.image_id, i.category_id) for i in dataset.instances)
    objects = [  # under ids of their own: COCOeval takes an object of id 0 for one that is never found
        annotation(i) | {"id": number, "iscrowd": int(i.crowd or (i.box_only and iou_type == "segm"))}
        for number, i in enumerate(dataset.instances, start=1)
    ]
    images = [{"id": r.id, "width": r.width, "height": r.height} for r in dataset.images.values()]
    categories = [{"id": number, "name": name} for number, name in dataset.categories.items()]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        truth = COCO()
        truth.dataset = {"images": images, "categories": categories, "annotations": objects}
        truth.createIndex()
        shape = "bbox" if iou_type == "bbox" else "segmentation"  # given both, loadRes takes a mask's area from its box
        found = [{name: one[name] for name in ("image_id", "category_id", "score", shape)} for one in results]
        coco = COCOeval(truth, truth.loadRes(found) if found else COCO(), iou_type)
        coco.params.areaRng = coco.params.areaRng if sizes else coco.params.areaRng[:1]
        coco.params.maxDets = [1, 10, max([MOST, *counts.values()])]
        coco.evaluate()
        coco.accumulate()
    return Evaluation(coco)


def _check(dataset: CocoDataset, result: Result) -> None:
    """StudyError where a prediction cannot be measured."""
    image, what = dataset.images.get(result["image_id"]), f"a prediction of image {result['image_id']} has"
    if image is None:
        raise StudyError(f"{what} no place: {dataset.path} does not list the image: predict its images")
    if not np.isfinite(result["score"]):
        raise StudyError(f"{what} the score {result['score']}: scores must be finite")
    box, sides = result.get("bbox", (0, 0, 0, 0)), [image.height, image.width]
    if len(box) != 4 or not np.isfinite(box).all() or min(box[2:]) < 0:
        raise StudyError(f"{what} the box {list(box)}: give finite x, y, width, height")
    size = list(result["segmentation"]["size"]) if "segmentation" in result else sides
    if size != sides:
        wanted = f"(height x width), the image has {sides[0]}x{sides[1]}: predict at the image's size"
        raise StudyError(f"{what} a mask of {size[0]}x{size[1]} {wanted}")


def perfect_results(dataset: CocoDataset) -> list[Result]:
    """The annotations given as predictions: they must score AP 100, else the evaluation is at fault."""
    return [annotation(instance) | {"score": 1.0} for instance in dataset.instances if not instance.crowd]


def ap_interval(evaluations: Sequence[Evaluation], samples: int = 1000) -> Interval:
    """Mean AP of evaluations of the same images (with other references, say), percent, and its interval over images."""
    found = ap_difference([(1, evaluations)], samples=samples)
    if np.isnan(found.value):
        raise StudyError("no AP: the targets have no annotated object of these categories (crowds do not count)")
    return Interval(*np.clip(found[:3], 0, 100).tolist())


def ap_difference(terms: Terms, iou: float | None = None, samples: int = 1000) -> Difference:
    """`ap_difference_by_seeds` without `others`."""
    return _resampled(terms, iou, samples)(list(range(len(terms[0][1]))), 0)


def ap_difference_by_seeds(terms: Terms, iou: float | None = None, samples: int = 1000) -> Difference:
    """A paired difference of APs in points: the sum over terms of their sign times their mean AP.

    Predictions are matched to objects once; each resample only weighs the images by how often they were drawn and
    accumulates again. The same images are drawn for all terms and evaluations, because their difficulty is shared, and
    of a term's evaluations the same ones for all terms (the k-th of each is made with the k-th draw of references).

    The envelope that AP takes over its precisions makes it larger on fewer different images, and a resample has but
    63 % of them: quantiles of resampled APs lie too high. So their spread is laid around the value of all images.

    Args:
        terms: `[(1, more), (-1, less)]`, or four terms for a difference of differences; each with equally many
            evaluations, all of the same images (their categories may differ).
        iou: AP at this threshold alone; None: the mean over COCO's.
        samples: resamples.

    Returns:
        The difference, and in `others` what it is under other seeds; NaN where a term has no object to measure on.
    """
    return with_others(_resampled(terms, iou, samples), list(range(len(terms[0][1]))))


def _resampled(terms: Terms, iou: float | None, samples: int) -> Callable[[list[int], int], Difference]:
    """The difference over some of the runs under a seed of the bootstrap, as `with_others` asks for it."""
    images = len(terms[0][1][0].coco.params.imgIds)

    @functools.cache
    def signed_ap(seed: int) -> tuple[NDArray[np.float64], np.random.Generator]:
        """`(1 + samples, runs)` difference on all images and on those drawn; what draws the runs."""
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(images, np.full(images, 1 / images), size=samples)
        weights = np.concatenate([np.ones((1, images)), drawn]).astype(np.float32)
        signed = [sign * np.stack([_resampled_ap(run, weights, iou) for run in runs]) for sign, runs in terms]
        return np.sum(signed, axis=0).T, rng

    def difference(runs: list[int], seed: int) -> Difference:
        signed, rng = signed_ap(seed)
        shares = copy.deepcopy(rng).multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=samples) / len(runs)
        value, drawn = signed[0, runs].mean(), (signed[1:, runs] * shares).sum(1)
        if np.isnan(value):
            return Difference(np.nan, np.nan, np.nan, 1.0)
        drawn = drawn[~np.isnan(drawn)]
        return difference_of(float(value), drawn + value - drawn.mean())

    return difference


def _resampled_ap(
    evaluation: Evaluation, weights: NDArray[np.float32], iou: float | None = None
) -> NDArray[np.float64]:
    """`(S,)` AP in percent for `(S, images)` weights; NaN where no object was drawn."""
    thresholds = evaluation.coco.params.iouThrs
    chosen = range(len(thresholds)) if iou is None else [int(np.abs(thresholds - iou).argmin())]
    total, present = np.zeros(len(weights)), np.zeros(len(weights))
    for category in range(len(evaluation.coco.params.catIds)):
        objects, curves = _curves(evaluation.coco, category)
        count, some = weights @ objects, {t: (curves[t][0].tobytes(), curves[t][1].tobytes()) for t in chosen}
        different = {key: curves[t] for t, key in some.items()}  # good masks are right at many thresholds alike
        by_curve = {key: _weighted_ap(*curve, weights, count) for key, curve in different.items()}
        ap = np.mean([by_curve[key] for key in some.values()], axis=0)
        total += np.where(count > 0, ap, 0)
        present += count > 0
    with np.errstate(invalid="ignore"):
        return 100 * total / np.where(present > 0, present, np.nan)


def _weighted_ap(
    images: NDArray[np.intp], hits: NDArray[np.intp], weights: NDArray[np.float32], objects: NDArray[np.float32]
) -> NDArray[np.float64]:
    """`(S,)` interpolated AP at 101 recalls, each image counted `weights[s, image]` times.

    `images`: `(D,)` image of each prediction that counts, best-scored first; `hits`: `(H,)` positions in it of the true
    positives; `objects`: `(S,)` drawn objects. Precision is only read at true positives: between them it falls, so the
    envelope never looks there.
    """
    if not hits.size:
        return np.zeros(len(weights))
    drawn = np.cumsum(weights[:, images], axis=1, dtype=np.float64)[:, hits]
    found = np.cumsum(weights[:, images[hits]], axis=1, dtype=np.float64)
    precision = found / np.maximum(drawn, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = found / np.maximum(objects, 1)[:, None]
    reached = np.floor(recall * 100 + 1e-9) + 1  # how many of the recalls 0, 0.01, ..., 1 are at or below it
    return (envelope * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / 101


def _curves(coco: COCOeval, category: int) -> tuple[NDArray[np.float32], list[Curve]]:
    """`(images,)` objects of one category (all sizes); by IoU threshold the curve."""
    images = len(coco.params.imgIds)
    start = category * len(coco.params.areaRng) * images  # evalImgs: categories, area ranges ("all" first), images
    found = [(i, e) for i, e in enumerate(coco.evalImgs[start : start + images]) if e is not None]
    objects = np.zeros(images, np.float32)
    for i, entry in found:
        objects[i] = np.count_nonzero(entry["gtIgnore"] == 0)
    if not found:
        return objects, [(np.empty(0, np.intp), np.empty(0, np.intp))] * len(coco.params.iouThrs)
    order = np.argsort(-np.concatenate([e["dtScores"] for _, e in found]), kind="mergesort")
    owner = np.repeat([i for i, _ in found], [len(e["dtScores"]) for _, e in found])[order]
    matched = np.concatenate([e["dtMatches"] for _, e in found], axis=1)[:, order] > 0
    counts = ~np.concatenate([e["dtIgnore"] for _, e in found], axis=1)[:, order].astype(bool)
    return objects, [(owner[c], np.flatnonzero(m[c])) for m, c in zip(matched, counts, strict=True)]
