"""Errors by kind in the way of TIDE (arXiv 2008.08115), and images ranked by what was found right in them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from samantics.data.coco import CocoDataset, Instance
from samantics.metrics.coco_ap import Result, ap_difference, evaluate
from samantics.metrics.intervals import bootstrap_statistic
from samantics.training_free.oracles import FOREGROUND, overlaps
from samantics.training_free.proposals import objects_of

BACKGROUND = 0.1  # IoU, as TIDE sets it
KINDS = ("class", "location", "both", "duplicate", "background", "missed")


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
