"""Where the points are lost before and after naming: oracles, proposals that are wholes or parts, parts of the data."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pycocotools import mask as mask_tools

from samantics.data.coco import CocoDataset, Rle, read_image
from samantics.metrics.coco_ap import Result, ap_difference, ap_interval, evaluate, perfect_results
from samantics.metrics.intervals import Interval, bootstrap_statistic
from samantics.training_free.mask_features import encode_masks
from samantics.training_free.matching import match, ranked, result_of
from samantics.training_free.pipeline import Pipeline, Variant, ap_row, ap_table, kept_result
from samantics.training_free.proposals import Proposals, ProposalSettings, get_proposals, objects_of, propose, surviving

THRESHOLDS = np.linspace(0.5, 0.95, 10)
FOREGROUND = 0.5  # IoU of a mask with the object that it stands for
INSIDE = 0.8  # of a part's pixels lie in its object


def overlaps(dataset: CocoDataset, image_id: int, rles: Sequence[Rle]) -> NDArray[np.float64]:
    """`(N, G)` mask IoU of `rles` with the image's objects."""
    objects = [instance.rle for instance in objects_of(dataset, image_id)]
    if not objects or not rles:
        return np.zeros((len(rles), len(objects)))
    return np.asarray(mask_tools.iou(list(rles), objects, [0] * len(objects)))


def oracle_table(pipeline: Pipeline, variant: Variant) -> pd.DataFrame:
    """`oracle, iou_type, AP, AR100, low, high` of masks: what remains when one difficulty is taken away.

    `low` and `high` bound AP. `recall_ceiling` has no AP (proposals have no classes): its AR100 is the recall of all
    proposals, not only the best hundred, and the interval bounds that.
    """
    targets, columns = pipeline.data.targets, ["oracle", "iou_type", "AP", "AR100", "low", "high"]
    predicted = ap_table(pipeline, [variant, dataclasses.replace(variant, proposals="truth")], ["segm"])

    def annotated() -> pd.DataFrame:
        found = pipeline.proposals(variant.proposals)
        outcomes = {
            "true_classes": with_true_classes(targets, found),
            "best_mask": best_masks(targets, found),
            "truth": perfect_results(targets),
        }
        rows = [{"oracle": name} | ap_row(targets, [results], "segm") for name, results in outcomes.items()]
        ceiling, low, high = recall(covered(targets, found))
        rows.append({"oracle": "recall_ceiling", "iou_type": "segm", "AR100": ceiling, "low": low, "high": high})
        return pd.DataFrame(rows)[columns]

    rest = kept_result(pipeline, [variant], ["oracles"], annotated, "csv")
    return pd.concat([predicted.assign(oracle=["none", "true_masks"])[columns], rest], ignore_index=True)


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


def covered(dataset: CocoDataset, proposals: Mapping[int, Proposals]) -> pd.DataFrame:
    """One row per object: `image_id` and mask `iou` of its best proposal."""
    rows = [(n, best) for n, found in proposals.items() for best in overlaps(dataset, n, found.rles).max(0, initial=0)]
    return pd.DataFrame(rows, columns=["image_id", "iou"])


def recall(objects: pd.DataFrame) -> Interval:
    """Percent of the objects of `covered` that a proposal covers, mean over COCO's thresholds, interval over images.

    No naming of these proposals finds more objects. COCO's AR averages over classes instead.
    """
    hits = pd.Series((objects["iou"].to_numpy(float)[:, None] >= THRESHOLDS).mean(1))
    per_image = hits.groupby(objects["image_id"].to_numpy()).agg(["sum", "count"]).to_numpy()

    def statistic(rows: NDArray[np.int64]) -> float:
        found, count = per_image[rows].sum(0)
        return float(found / count)

    return bootstrap_statistic(statistic, len(per_image)).times(100)


# ---------------------------------------------------------------------------------- proposals, and parts of the data


def proposal_table(pipeline: Pipeline, settings: Mapping[str, ProposalSettings], source: str) -> pd.DataFrame:
    """One row per setting of the proposals, on the first targets: what it finds, and what that is worth.

    Columns: `setting`; `seconds` of proposing, encoding included, per image, over five images; `proposals` per image,
    of which `wholes` (IoU with an object of one half or more), `parts` (not whole, and four fifths inside one object)
    and `others`; `recall`; mask `AP, low, high`, named by `source`. A later run keeps all, the seconds too.
    """
    scale, cache = pipeline.run.scale.pipeline, pipeline.run.cache
    targets, sam = pipeline.data.targets.first(scale.grid_images), pipeline.models["sam"]

    def row(name: str, setting: ProposalSettings) -> list[Any]:
        alike = [asdict(other) for other in settings.values() if other.points_per_side == setting.points_per_side]
        lowest = {limit: min(one[limit] for one in alike) for limit in ("predicted_iou", "stability")}
        # one set of masks for a grid, of which the filters of each setting leave some
        loosest = dataclasses.replace(setting, **lowest, box_nms=max(one["box_nms"] for one in alike))
        every = get_proposals(sam, targets, loosest, cache / "proposals")
        masks = {n: p.rles for n, p in every.items()}
        features = encode_masks({source: pipeline.models[source]}, targets, masks, cache / "mask_features")
        left = {n: surviving(p, setting) for n, p in every.items()}
        found = {n: p.select(left[n]) for n, p in every.items()}
        seen = {n: features.of(source, n)[rows] for n, rows in left.items()}
        banks = [pipeline.bank(source, scale.shots, seed) for seed in pipeline.references]
        runs = [[r for n, p in found.items() for r in match(n, p, seen[n], bank)] for bank in banks]
        ap = ap_interval([evaluate(targets, results, sizes=False) for results in runs])
        kinds = np.sum([proposal_kinds(targets, n, p.rles) for n, p in found.items()], axis=0) / len(found)
        timed = [read_image(targets, image_id) for image_id in list(targets.images)[:5]]
        started = time.perf_counter()
        for image in timed:
            propose(sam.model, image, setting)
        seconds = (time.perf_counter() - started) / len(timed)
        return [name, seconds, kinds.sum(), *kinds, recall(covered(targets, found)).value, *ap]

    def table() -> pd.DataFrame:
        columns = ["setting", "seconds", "proposals", "wholes", "parts", "others", "recall", "AP", "low", "high"]
        return pd.DataFrame([row(*one) for one in settings.items()], columns=columns)

    what = ["proposals", {name: asdict(setting) for name, setting in settings.items()}, len(targets.images)]
    return kept_result(pipeline, [Variant(source=source, shots=scale.shots)], what, table, "csv")


def proposal_kinds(dataset: CocoDataset, image_id: int, rles: Sequence[Rle]) -> NDArray[np.int64]:
    """How many masks are whole objects, parts of one, and neither: `(3,)`."""
    objects = [instance.rle for instance in objects_of(dataset, image_id)]
    whole = overlaps(dataset, image_id, rles).max(1, initial=0) >= FOREGROUND
    inside = np.zeros(len(rles), bool)
    if objects and rles:  # as if the objects were crowds: pycocotools then divides by the mask's own area
        inside = np.asarray(mask_tools.iou(list(rles), objects, [1] * len(objects))).max(1) >= INSIDE
    part = inside & ~whole
    return np.array([whole.sum(), part.sum(), (~whole & ~part).sum()])


def subset_table(pipeline: Pipeline, variants: Iterable[Variant]) -> pd.DataFrame:
    """`source, subset, AP, low, high`: mask AP on base and novel classes, and on the objects of each split of artists.

    All classes compete for every name. A training-free method has seen none of them: base and novel are 02's. Subsets
    that the data do not have are left out. Rows `a minus b` are paired differences of two subsets.
    """
    parts = subsets(pipeline)

    def rows(variant: Variant) -> pd.DataFrame:
        runs = [pipeline.predict(variant, seed) for seed in pipeline.references]
        found = {
            name: [evaluate(dataset, results, "segm", categories, sizes=False) for results in runs]
            for name, (dataset, categories) in parts.items()
        }
        table = [(variant.source, name, *ap_interval(evaluations)) for name, evaluations in found.items()]
        for more, less in (("base", "novel"), ("train artists", "test artists")):
            if more in found and less in found:
                difference = ap_difference([(1, found[more]), (-1, found[less])])
                table.append((variant.source, f"{more} minus {less}", *difference[:3]))
        return pd.DataFrame(table, columns=["source", "subset", "AP", "low", "high"])

    what = ["subsets", {name: categories for name, (_, categories) in parts.items()}]
    found = [kept_result(pipeline, [v], what, functools.partial(rows, v), "csv") for v in variants]
    return pd.concat(found, ignore_index=True)


def subsets(pipeline: Pipeline) -> dict[str, tuple[CocoDataset, list[int]]]:
    """Targets and categories of each subset: all but its objects are ignored in the evaluation, as crowds are."""
    targets, names = pipeline.data.targets, pipeline.run.scale.incontext.novel
    shown = {i.category_id for i in targets.instances if not i.crowd}
    novel = [category for category in targets.categories if targets.categories[category] in names]
    base = [category for category in targets.categories if category not in novel]
    found = {"base": (targets, base), "novel": (targets, novel)}
    for split in sorted({i.split for i in targets.instances if i.split}):
        own = tuple(i if i.split == split else dataclasses.replace(i, crowd=True) for i in targets.instances)
        found[f"{split} artists"] = (dataclasses.replace(targets, instances=own), list(targets.categories))
    return {name: (data, chosen) for name, (data, chosen) in found.items() if shown & set(chosen)}


# --------------------------------------------------------------------------------------- beside the in-context model

HEAD_TO_HEAD = ["method", "split", "AP", "low", "high", "tuning_seconds", "image_seconds", "images"]


def head_to_head(pipeline: Pipeline, variants: Mapping[str, Variant]) -> pd.DataFrame:
    """Box AP of notebook 02's models and of training-free variants (by method), on base and on novel classes.

    All are asked for all classes on the same targets, the first that 02 asked so, with one draw of references;
    intervals are over images. Columns `HEAD_TO_HEAD`. Without results of 02 on these data only the variants' rows.
    """
    known, whole, parts = in_context_rows(pipeline), pipeline.data.targets, subsets(pipeline)
    targets = whole.first(int(known["images"].max())) if len(known) else whole

    def rows(method: str, variant: Variant) -> pd.DataFrame:
        results = [r for r in pipeline.predict(variant) if r["image_id"] in targets.images]
        seconds, table = image_seconds(pipeline, variant), []
        for split in parts.keys() & {"base", "novel"}:
            found = evaluate(targets, results, "bbox", parts[split][1], sizes=False)
            table.append((method, split, *ap_interval([found]), 0.0, seconds, len(targets.images)))
        return pd.DataFrame(sorted(table), columns=HEAD_TO_HEAD)

    what = ["head to head", targets.hash]
    found = [kept_result(pipeline, [v], [*what, m], functools.partial(rows, m, v), "csv") for m, v in variants.items()]
    return pd.concat([known, *found] if len(known) else found, ignore_index=True)


def in_context_rows(pipeline: Pipeline) -> pd.DataFrame:
    """Box AP that notebook 02 saved of the same targets (all classes, the most shots), as `HEAD_TO_HEAD`."""
    ap, cost = (pipeline.run.figures / f"{name}.csv" for name in ("02_icl_ap", "02_cost"))
    if not (ap.is_file() and cost.is_file()):
        return pd.DataFrame(columns=HEAD_TO_HEAD)
    if json.loads(ap.with_suffix(".json").read_text())["recorded"]["target_data"] != pipeline.run.facts["target_data"]:
        return pd.DataFrame(columns=HEAD_TO_HEAD)
    table = pd.read_csv(ap).query("variant == 'all_classes' and iou_type == 'bbox' and artists == 'all'")
    table = table[table["shots"] == table["shots"].max()].merge(pd.read_csv(cost), on="arm")
    return table.assign(method="in context, " + table["arm"])[HEAD_TO_HEAD]


def image_seconds(pipeline: Pipeline, variant: Variant) -> float:
    """Seconds from an image to named instances, SAM's encoding included: the mean over five images."""
    models, bank = pipeline.models, pipeline.bank(variant.source, variant.shots, view=variant.view)
    few, encoders = pipeline.data.targets.first(5), {variant.source: models[variant.source]}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for n in few.images:
            found = propose(models[variant.proposals].model, read_image(few, n), pipeline.proposal_settings)
            features = encode_masks(encoders, few, {n: found.rles}, Path(folder), variant.view)
            match(n, found, features.of(variant.source, n), bank, variant.scoring, variant.merging)
        return (time.perf_counter() - started) / len(few.images)
