"""Where the points are lost: oracles that take one difficulty away at a time, and errors by kind in the way of TIDE."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pycocotools import mask as mask_tools

from samantics.data.coco import CocoDataset, Instance, Rle, box_iou, read_image
from samantics.metrics.coco_ap import IOU_TYPES, Result, ap_difference, evaluate, perfect_results
from samantics.metrics.intervals import Interval, bootstrap_statistic
from samantics.training_free.matching import match, pooled_features, ranked, result_of
from samantics.training_free.pipeline import Pipeline, Variant, ap_row
from samantics.training_free.proposals import Proposals, get_proposals, objects_of, propose

THRESHOLDS = np.linspace(0.5, 0.95, 10)
FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU, as TIDE sets them (arXiv 2008.08115)
KINDS = ("class", "location", "both", "duplicate", "background", "missed")
SIZES = (0, 0.01, 0.03, 0.06, 0.12, 1.0)  # ends of the ranges, shares of the image


def overlaps(dataset: CocoDataset, image_id: int, rles: Sequence[Rle]) -> NDArray[np.float64]:
    """`(N, G)` mask IoU of `rles` with the image's objects."""
    objects = [instance.rle for instance in objects_of(dataset, image_id)]
    if not objects or not rles:
        return np.zeros((len(rles), len(objects)))
    return np.asarray(mask_tools.iou(list(rles), objects, [0] * len(objects)))


# -------------------------------------------------------------------------------------------------------- oracles


def oracle_table(pipeline: Pipeline, variant: Variant) -> pd.DataFrame:
    """`oracle, iou_type, AP, AR100, low, high`: what remains when one difficulty after the other is taken away.

    `low` and `high` bound AP. `recall_ceiling` has no AP (proposals have no classes): its AR100 is the recall of all
    proposals, not only the best hundred, and the interval bounds that.
    """
    targets, seeds = pipeline.data.targets, pipeline.references
    found = pipeline.proposals(variant.proposals)
    true_masks = dataclasses.replace(variant, proposals="truth")
    outcomes = {
        "none": [pipeline.predict(variant, seed) for seed in seeds],
        "true_masks": [pipeline.predict(true_masks, seed) for seed in seeds],
        "true_classes": [with_true_classes(targets, found)],
        "best_mask": [best_masks(targets, found)],
        "truth": [perfect_results(targets)],
    }
    rows = [{"oracle": name} | ap_row(targets, runs, t) for name, runs in outcomes.items() for t in IOU_TYPES]
    for iou_type in IOU_TYPES:
        ceiling, low, high = recall(covered(targets, found, iou_type))
        rows.append({"oracle": "recall_ceiling", "iou_type": iou_type, "AR100": ceiling, "low": low, "high": high})
    return pd.DataFrame(rows)[["oracle", "iou_type", "AP", "AR100", "low", "high"]]


def with_true_classes(dataset: CocoDataset, proposals: Mapping[int, Proposals]) -> list[Result]:
    """Predicted masks named by the annotation: the class of the object a mask covers best (IoU at least one half).

    Masks that cover none are dropped, and the score is the predicted IoU: what is left are location and duplicates.
    """
    results: list[Result] = []
    for image_id, found in proposals.items():
        iou = overlaps(dataset, image_id, found.rles)
        rows = np.flatnonzero(iou.max(1, initial=0) >= FOREGROUND)
        classes = np.array([instance.category_id for instance in objects_of(dataset, image_id)], int)
        named = classes[iou[rows].argmax(1)] if len(rows) else np.empty(0, int)
        scores = found.predicted_iou[rows].clip(min=1e-6)  # a predicted IoU may be below zero, a score may not
        results += ranked(image_id, found.select(rows), np.zeros((len(rows), 1), np.float32), named, scores)
    return results


def best_masks(dataset: CocoDataset, proposals: Mapping[int, Proposals]) -> list[Result]:
    """For every object the proposal that covers it best, with its class and the IoU as score: perfect selection."""
    results = []
    for image_id, found in proposals.items():
        iou = overlaps(dataset, image_id, found.rles)
        for instance, values in zip(objects_of(dataset, image_id), iou.T, strict=True):
            if values.max(initial=0) > 0:
                row = int(values.argmax())
                results.append(
                    result_of(image_id, instance.category_id, found.rles[row], found.boxes[row], values[row])
                )
    return results


def covered(dataset: CocoDataset, proposals: Mapping[int, Proposals], iou_type: str = "segm") -> pd.DataFrame:
    """One row per object: `image_id, share` (of the image) and `iou` of its best proposal."""
    rows = []
    for image_id, found in proposals.items():
        objects, record = objects_of(dataset, image_id), dataset.images[image_id]
        boxes = [instance.box for instance in objects]
        iou = overlaps(dataset, image_id, found.rles) if iou_type == "segm" else box_iou(found.boxes, boxes)
        pixels = record.width * record.height
        rows += [(image_id, i.area / pixels, best) for i, best in zip(objects, iou.max(0, initial=0), strict=True)]
    return pd.DataFrame(rows, columns=["image_id", "share", "iou"])


def recall(objects: pd.DataFrame) -> Interval:
    """Percent of the objects of `covered` that a proposal covers, mean over COCO's thresholds, interval over images.

    It is the ceiling of AR.
    """
    hits = pd.Series((objects["iou"].to_numpy(float)[:, None] >= THRESHOLDS).mean(1))
    per_image = hits.groupby(objects["image_id"].to_numpy()).agg(["sum", "count"]).to_numpy()

    def statistic(rows: NDArray[np.int64]) -> float:
        found, count = per_image[rows].sum(0)
        return float(found / count)

    return bootstrap_statistic(statistic, len(per_image)).times(100)


def size_table(pipeline: Pipeline, proposer: str = "sam") -> pd.DataFrame:
    """`size, objects, recall, low, high`: recall of the proposals by an object's share of the image."""
    best = covered(pipeline.data.targets, pipeline.proposals(proposer))
    names = [f"{100 * least:.0f}–{100 * most:.0f} %" for least, most in itertools.pairwise(SIZES)]
    best["size"] = pd.cut(best["share"], list(SIZES), right=False, labels=names)
    rows = [(size, len(chosen), *recall(chosen)) for size, chosen in best.groupby("size", observed=True)]
    return pd.DataFrame(rows, columns=["size", "objects", "recall", "low", "high"])


def grid_table(pipeline: Pipeline, source: str = "dinov2") -> pd.DataFrame:
    """`points_per_side, seconds, proposals, recall, AP, low, high` (masks) on the first targets, by grid density.

    Seconds are those of proposing, encoding included, per image, over five images.
    """
    settings, whole = pipeline.run.scale.pipeline, pipeline.data.targets
    images = dict(list(whole.images.items())[: settings.grid_images])
    instances = tuple(i for i in whole.instances if i.image_id in images)
    targets = dataclasses.replace(whole, images=images, instances=instances)
    sam, encoder = pipeline.models["sam"], {source: pipeline.models[source]}
    banks = [pipeline.bank(source, settings.shots, seed) for seed in pipeline.references]
    timed, rows = [read_image(whole, image_id) for image_id in list(images)[:5]], []
    for per_side in settings.grids:
        sparse = dataclasses.replace(pipeline.proposal_settings, points_per_side=per_side)
        found = get_proposals(sam, targets, sparse, pipeline.run.cache / "proposals")
        masks = {image_id: p.rles for image_id, p in found.items()}
        features = pooled_features(encoder, targets, masks, pipeline.run.cache / "mask_features")
        runs = [[r for n, p in found.items() for r in match(n, p, features.of(source, n), b)] for b in banks]
        row = ap_row(targets, runs, "segm")
        started = time.perf_counter()
        for image in timed:
            propose(sam.model, image, sparse)
        seconds = (time.perf_counter() - started) / len(timed)
        count, ceiling = np.mean([len(p) for p in found.values()]), recall(covered(targets, found)).value
        rows.append((per_side, seconds, count, ceiling, row["AP"], row["low"], row["high"]))
    return pd.DataFrame(rows, columns=["points_per_side", "seconds", "proposals", "recall", "AP", "low", "high"])


# ----------------------------------------------------------------------------------------------------------- TIDE


def verdicts(dataset: CocoDataset, results: Sequence[Result]) -> pd.DataFrame:
    """What each result is at IoU 0.5: `image_id, category_id, score, kind, object`, in the order of the results.

    `kind` is one of correct; class: covers an object of another class (IoU >= 0.5); location: near one of its class
    (0.1 to 0.5); both: near one of another class; duplicate: covers one of its class that is taken; background: covers
    nothing (IoU < 0.1). `object` is the annotated one that it found or, of a class or location error, was near to, else
    None. As COCO does, better-scored results take their objects first.
    """
    table = pd.DataFrame(results, columns=["image_id", "category_id", "score"])
    found: dict[int, tuple[str, Instance | None]] = {}
    for image_id, rows in table.sort_values("score", ascending=False, kind="stable").groupby("image_id"):
        objects = objects_of(dataset, int(str(image_id)))
        iou = overlaps(dataset, int(str(image_id)), [results[row]["segmentation"] for row in rows.index])
        classes = np.array([instance.category_id for instance in objects], int)
        free = np.ones(len(objects), bool)
        for values, row, category in zip(iou, rows.index, rows["category_id"], strict=True):
            kind, place = _verdict(values, classes == category, free)
            found[row] = (kind, objects[place] if kind in ("correct", "class", "location") else None)
            if kind == "correct":
                free[place] = False
    judged = pd.DataFrame([found[row] for row in table.index], columns=["kind", "object"], dtype=object)
    return table.join(judged)


def _verdict(iou: NDArray[np.float64], same: NDArray[np.bool_], free: NDArray[np.bool_]) -> tuple[str, int]:
    """Kind and place of the object. All arguments are `(G,)`: IoU, whether of the class, whether not yet found."""
    for kind, allowed, least in (
        ("correct", same & free, FOREGROUND),
        ("duplicate", same & ~free, FOREGROUND),
        ("class", ~same, FOREGROUND),
        ("location", same, BACKGROUND),
        ("both", ~same, BACKGROUND),
    ):
        values = np.where(allowed, iou, -1.0)
        if values.max(initial=-1.0) >= least:
            return kind, int(values.argmax())
    return "background", -1


def missed_objects(dataset: CocoDataset, judged: pd.DataFrame) -> set[Instance]:
    """Objects that no result found, nor would have with another class or place."""
    near = set(judged["object"].dropna())
    return {i for i in dataset.instances if not i.crowd and i not in near}


def error_table(dataset: CocoDataset, results: Sequence[Result], judged: pd.DataFrame) -> pd.DataFrame:
    """Errors by kind: `kind, count, share, share_low, share_high, gain, gain_low, gain_high`.

    `share` is percent of all errors, `gain` the AP50 (masks) won by mending the kind; both with 95 % intervals over
    images. A wrong class or place is put right unless its object is found already (then the result is removed);
    results of the other kinds are removed; missed objects (neither found nor near to being) are taken out of the
    annotations.
    """
    base = evaluate(dataset, results, "segm")
    missed = missed_objects(dataset, judged)
    without = dataclasses.replace(dataset, instances=tuple(i for i in dataset.instances if i not in missed))
    found = [*zip(judged["kind"], judged["image_id"], strict=True), *(("missed", i.image_id) for i in missed)]
    table = pd.DataFrame(found, columns=["kind", "image"]).value_counts().unstack(fill_value=0)
    counts = table.reindex(index=list(KINDS), columns=list(dataset.images), fill_value=0).to_numpy()
    rows = []
    for number, kind in enumerate(KINDS):
        mended = evaluate(without, results) if kind == "missed" else evaluate(dataset, _mended(results, judged, kind))
        share = bootstrap_statistic(functools.partial(_share, counts, number), counts.shape[1]).times(100)
        gain = ap_difference([(1, [mended]), (-1, [base])], iou=0.5)[:3]
        rows.append((kind, int(counts[number].sum()), *share, *np.nan_to_num(gain)))
    columns = ["kind", "count", "share", "share_low", "share_high", "gain", "gain_low", "gain_high"]
    return pd.DataFrame(rows, columns=columns)


def _share(counts: NDArray[np.int64], row: int, images: NDArray[np.int64]) -> float:
    """Of all that is counted in these images (columns), the share of one row; 0 where nothing is."""
    return float(counts[row, images].sum() / max(1, counts[:, images].sum()))


def _mended(results: Sequence[Result], judged: pd.DataFrame, kind: str) -> list[Result]:
    """The results with all errors of one kind put right or removed."""
    taken = set(judged.loc[judged["kind"] == "correct", "object"])
    mended = []
    for row in judged.sort_values("score", ascending=False, kind="stable").itertuples():
        result, truth = results[row.Index], row.object
        if row.kind != kind:
            mended.append(result)
        elif truth is not None and truth not in taken:
            taken.add(truth)
            change = {"category_id": truth.category_id} if kind == "class" else {"segmentation": truth.rle}
            mended.append({**result, **change})
    return mended


def best_results(dataset: CocoDataset, judged: pd.DataFrame) -> pd.DataFrame:
    """The rows of `verdicts` of each image's best-scored results, as many as it has objects."""
    order = judged.sort_values(["image_id", "score"], ascending=[True, False], kind="stable")
    counts = order["image_id"].map({image_id: len(objects_of(dataset, image_id)) for image_id in dataset.images})
    return order[order.groupby("image_id").cumcount() < counts]


def ranked_images(dataset: CocoDataset, best: pd.DataFrame, least: int = 3) -> pd.DataFrame:
    """`image_id, objects, right, share`, best first: images of at least `least` objects by the share found right.

    An image with G objects is judged by its G best-scored results (`best_results`), so neither many nor few predictions
    help. Ties go to the lower id. Where no image has `least` objects, those with the most are ranked.
    """
    right = best[best["kind"] == "correct"].groupby("image_id").size()
    table = pd.DataFrame({"image_id": list(dataset.images)})
    table["objects"] = [len(objects_of(dataset, image_id)) for image_id in dataset.images]
    table["right"] = table["image_id"].map(right).fillna(0).astype(int)
    table["share"] = table["right"] / table["objects"].clip(lower=1)
    enough = table[table["objects"] >= min(least, table["objects"].max())]
    return enough.sort_values(["share", "image_id"], ascending=[False, True])


def confusions(best: pd.DataFrame, names: Mapping[int, str]) -> pd.DataFrame:
    """`true, predicted, count` of confident wrong names, most frequent first: class errors among `best_results`."""
    wrong = best[best["kind"] == "class"]
    pairs = {"true": [names[i.category_id] for i in wrong["object"]], "predicted": wrong["category_id"].map(names)}
    return pd.DataFrame(pairs).value_counts().reset_index(name="count")
