"""Where notebook 03 loses its points: errors by kind, oracles, proposals, parts of the data; 02's models beside it.

Errors are those of TIDE (arXiv 2008.08115). `results` are predictions in COCO's form, `judged` is the table that
`verdicts` makes of them, `best` the part of it that `best_results` leaves.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_tools

from samantics.data.coco import CocoDataset, Instance, Rle, read_image
from samantics.metrics.coco_ap import Result, ap_difference, ap_interval, evaluate, perfect_results
from samantics.metrics.intervals import Interval, bootstrap_statistic
from samantics.training_free.mask_features import VIEWS, encode_masks, unit
from samantics.training_free.matching import match, ranked, result_of
from samantics.training_free.pipeline import Pipeline, Variant, ap_row, ap_table, kept_result
from samantics.training_free.proposals import Proposals, ProposalSettings, get_proposals, objects_of, propose, surviving

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU of a result with an object that it stands for, and is near to
INSIDE = 0.8  # of a part's pixels lie in its object
KINDS = ("class", "location", "both", "duplicate", "background", "missed")
HEAD_TO_HEAD = ["method", "split", "AP", "low", "high", "tuning_seconds", "image_seconds", "images"]


def overlaps(dataset: CocoDataset, image_id: int, rles: Sequence[Rle], inside: bool = False) -> NDArray[np.float64]:
    """`(N, G)` mask IoU of `rles` with the image's objects; `inside`: how much of each mask lies in each object."""
    objects = [instance.rle for instance in objects_of(dataset, image_id)]
    if not objects or not rles:
        return np.zeros((len(rles), len(objects)))
    # inside what it takes for crowds, pycocotools divides by the mask's own area
    return np.asarray(mask_tools.iou(list(rles), objects, [int(inside)] * len(objects)))


# ------------------------------------------------------------------------------------------------- errors by kind


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


def error_table(dataset: CocoDataset, results: Sequence[Result], judged: pd.DataFrame) -> pd.DataFrame:
    """Errors by kind: `kind, count, share, share_low, share_high, gain, gain_low, gain_high`.

    `share` is percent of all errors, `gain` the AP50 (masks) won by mending the kind; both with 95 % intervals over
    images. A wrong class or place is put right unless its object is found already (then the result is removed);
    results of the other kinds are removed; missed objects (neither found nor near to being) are taken out of the
    annotations.
    """
    base, near = evaluate(dataset, results, "segm"), set(judged["object"].dropna())
    missed = {i for i in dataset.instances if not i.crowd and i not in near}
    without = dataclasses.replace(dataset, instances=tuple(i for i in dataset.instances if i not in missed))
    found = [*zip(judged["kind"], judged["image_id"], strict=True), *(("missed", i.image_id) for i in missed)]
    table = pd.DataFrame(found, columns=["kind", "image"]).value_counts().unstack(fill_value=0)
    counts = table.reindex(index=list(KINDS), columns=list(dataset.images), fill_value=0).to_numpy()
    total, rows = counts.sum(0), []
    for kind, its in zip(KINDS, counts, strict=True):
        mended = evaluate(without, results) if kind == "missed" else evaluate(dataset, _mended(results, judged, kind))
        share = bootstrap_statistic(functools.partial(_share, its, total), len(total)).times(100)
        gain = ap_difference([(1, [mended]), (-1, [base])], iou=0.5)[:3]
        rows.append((kind, int(its.sum()), *share, *np.nan_to_num(gain)))
    columns = ["kind", "count", "share", "share_low", "share_high", "gain", "gain_low", "gain_high"]
    return pd.DataFrame(rows, columns=columns)


def _share(some: NDArray[np.int64], every: NDArray[np.int64], images: NDArray[np.int64]) -> float:
    """What share some errors have of every error in these images, 0 where there is none; counts by image, `(N,)`."""
    return some[images].sum() / max(1, every[images].sum())


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


# -------------------------------------------------------------------------------------------------------- oracles


def oracle_table(pipeline: Pipeline, variant: Variant) -> pd.DataFrame:
    """`oracle, iou_type, AP, AR100, low, high` of masks: what remains when one difficulty is taken away.

    `low` and `high` bound AP. `recall_ceiling` has no AP (proposals have no classes): its AR100 is the recall of all
    proposals, not only the best hundred, and the interval bounds that.
    """
    targets, columns = pipeline.data.targets, ["oracle", "iou_type", "AP", "AR100", "low", "high"]
    predicted = ap_table(pipeline, [variant, dataclasses.replace(variant, proposals="truth")], ["segm"])

    def annotated() -> pd.DataFrame:
        found = pipeline.proposals(variant.proposals)
        outcomes = with_true_classes(targets, found), best_masks(targets, found), perfect_results(targets)
        rows = [ap_row(targets, [results], "segm") for results in outcomes]
        ceiling, low, high = recall(targets, found)
        rows.append({"iou_type": "segm", "AR100": ceiling, "low": low, "high": high})
        return pd.DataFrame(rows).assign(oracle=["true_classes", "best_mask", "truth", "recall_ceiling"])[columns]

    rest = kept_result(pipeline, [variant], ["oracles"], annotated, "csv")
    return pd.concat([predicted.assign(oracle=["none", "true_masks"])[columns], rest], ignore_index=True)


def with_true_classes(dataset: CocoDataset, proposals: Mapping[int, Proposals]) -> list[Result]:
    """Predicted masks, each with the class of the object that it covers best, and its predicted IoU as score.

    What covers no object (IoU 0.5) is dropped.
    """
    results: list[Result] = []
    for image_id, found in proposals.items():
        iou, objects = overlaps(dataset, image_id, found.rles), objects_of(dataset, image_id)
        rows = np.flatnonzero(iou.max(1, initial=0) >= FOREGROUND)
        named = np.array([objects[iou[row].argmax()].category_id for row in rows], int)
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
                results.append(result_of(image_id, instance.category_id, found, row, values[row]))
    return results


def recall(dataset: CocoDataset, proposals: Mapping[int, Proposals]) -> Interval:
    """Percent of the objects that a proposal covers, mean over COCO's thresholds, interval over images.

    No naming of these proposals finds more objects. COCO's AR averages over classes instead.
    """
    rows = [(n, best) for n, found in proposals.items() for best in overlaps(dataset, n, found.rles).max(0, initial=0)]
    objects = pd.DataFrame(rows, columns=["image", "iou"])
    hits = pd.Series((objects["iou"].to_numpy(float)[:, None] >= THRESHOLDS).mean(1))
    per_image = hits.groupby(objects["image"].to_numpy()).agg(["sum", "count"]).to_numpy()
    return bootstrap_statistic(lambda drawn: np.divide(*per_image[drawn].sum(0)), len(per_image)).times(100)


# ------------------------------------------------------------------------------------------------------ proposals


def proposal_table(pipeline: Pipeline, settings: Mapping[str, ProposalSettings], source: str) -> pd.DataFrame:
    """One row per setting of the proposals, on the first targets: what it finds, and what that is worth.

    Columns: `setting`; `seconds` of proposing, encoding included, per image, over five images; `proposals` per image,
    of which `wholes` (IoU with an object of one half or more), `parts` (not whole, and four fifths inside one object)
    and `others`; `recall`; mask `AP, low, high`, named by `source`. A later run keeps all, the seconds too.
    """
    scale, cache, model = pipeline.run.scale.pipeline, pipeline.run.cache, pipeline.models[source]
    targets, sam = pipeline.data.targets.first(scale.grid_images), pipeline.models["sam"]
    columns = ["setting", "seconds", "proposals", "wholes", "parts", "others", "recall", "AP", "low", "high"]

    def row(name: str, setting: ProposalSettings) -> list[Any]:
        alike = [other for other in settings.values() if other.points_per_side == setting.points_per_side]
        loosest = dataclasses.replace(  # one set of masks for a grid, of which the filters of each setting leave some
            setting, predicted_iou=min(other.predicted_iou for other in alike),
            stability=min(other.stability for other in alike), box_nms=max(other.box_nms for other in alike),
        )  # fmt: skip
        every = get_proposals(sam, targets, loosest, cache / "proposals")
        masks = {n: p.rles for n, p in every.items()}
        features = encode_masks({source: model}, targets, masks, cache / "mask_features")
        left = {n: surviving(p, setting) for n, p in every.items()}
        found = {n: p.select(left[n]) for n, p in every.items()}
        seen = {n: features.of(source, n)[rows] for n, rows in left.items()}
        banks = [pipeline.bank(source, scale.shots, seed) for seed in pipeline.references]
        runs = [[r for n, p in found.items() for r in match(n, p, seen[n], bank)] for bank in banks]
        ap = ap_interval([evaluate(targets, results, sizes=False) for results in runs])
        kinds = np.sum([proposal_kinds(targets, n, p.rles) for n, p in found.items()], axis=0) / len(found)
        seconds = seconds_of(lambda image: propose(sam.model, image, setting), targets)
        return [name, seconds, kinds.sum(), *kinds, recall(targets, found).value, *ap]

    def table() -> pd.DataFrame:
        return pd.DataFrame([row(*one) for one in settings.items()], columns=columns)

    what = ["proposals", {name: dataclasses.asdict(one) for name, one in settings.items()}, len(targets.images)]
    return kept_result(pipeline, [Variant(source=source, shots=scale.shots)], what, table, "csv")


def seconds_of(work: Callable[[Image.Image], Any], dataset: CocoDataset) -> float:
    """How long some work on an image takes: the mean over the first five, which are read before."""
    images = [read_image(dataset, image_id) for image_id in list(dataset.images)[:5]]
    started = time.perf_counter()
    for image in images:
        work(image)
    return (time.perf_counter() - started) / len(images)


def proposal_kinds(dataset: CocoDataset, image_id: int, rles: Sequence[Rle]) -> NDArray[np.int64]:
    """How many masks are whole objects, parts of one, and neither: `(3,)`."""
    whole = overlaps(dataset, image_id, rles).max(1, initial=0) >= FOREGROUND
    part = (overlaps(dataset, image_id, rles, inside=True).max(1, initial=0) >= INSIDE) & ~whole
    return np.array([whole.sum(), part.sum(), (~whole & ~part).sum()])


# ---------------------------------------------------------------- parts of the data, and notebook 02's models beside


def subset_table(pipeline: Pipeline, variants: Iterable[Variant]) -> pd.DataFrame:
    """`source, subset, AP, low, high`: mask AP on base and novel classes, and on the objects of each split of artists.

    All classes compete for every name. A training-free method has seen none of them: base and novel are 02's. Subsets
    that the data do not have are left out. Rows `a minus b` are paired differences of two subsets.
    """
    parts = subsets(pipeline)

    def rows(variant: Variant) -> pd.DataFrame:
        runs = pipeline.runs(variant)
        found = {n: [evaluate(data, run, sizes=False).of(its) for run in runs] for n, (data, its) in parts.items()}
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
        found[f"{split} artists"] = (targets.by_artists(split), list(targets.categories))
    return {name: (data, chosen) for name, (data, chosen) in found.items() if shown & set(chosen)}


def head_to_head(pipeline: Pipeline, variants: Mapping[str, Variant]) -> pd.DataFrame:
    """Box AP of notebook 02's models and of training-free variants (by method), on base and on novel classes.

    All are asked for all classes on the same targets, the first that 02 asked so, with one draw of references;
    intervals are over images. Without results of 02 on these data only the variants' rows. Their masks are `sam`'s or
    `sam2`'s: annotated ones have no cost.

    Columns `HEAD_TO_HEAD`: `image_seconds` are from an image to named instances (02's: from its file).
    """
    known, whole, parts = in_context_rows(pipeline), pipeline.data.targets, subsets(pipeline)
    targets = whole.first(int(known["images"].max())) if len(known) else whole

    def rows(method: str, variant: Variant) -> pd.DataFrame:
        proposer, source = (pipeline.models[name] for name in (variant.proposals, variant.source))
        bank = pipeline.bank(variant.source, variant.shots, view=variant.view)

        def named(image: Image.Image) -> None:
            found = propose(proposer.model, image, pipeline.proposal_settings)
            features = unit(VIEWS[variant.view](source, [(image, found.rles)])[0])
            match(0, found, features, bank, variant.scoring, variant.merging)

        cost = (0.0, seconds_of(named, whole), len(targets.images))
        results = [r for r in pipeline.predict(variant) if r["image_id"] in targets.images]
        every = evaluate(targets, results, "bbox", sizes=False)
        found = {n: every.of(parts[n][1]) for n in parts if n in ("base", "novel")}
        return pd.DataFrame([(method, n, *ap_interval([f]), *cost) for n, f in found.items()], columns=HEAD_TO_HEAD)

    what = ["head to head", targets.hash]
    found = [kept_result(pipeline, [v], [*what, m], functools.partial(rows, m, v), "csv") for m, v in variants.items()]
    return pd.concat([known, *found] if len(known) else found, ignore_index=True)


def in_context_rows(pipeline: Pipeline) -> pd.DataFrame:
    """Box AP that notebook 02 saved of the same targets (all classes, the most shots), as `HEAD_TO_HEAD`."""
    ap, cost = (pipeline.run.figures / f"{name}.csv" for name in ("02_icl_ap", "02_cost"))
    origin = json.loads(ap.with_suffix(".json").read_text()) if ap.is_file() and cost.is_file() else None
    if not origin or origin["recorded"]["target_data"] != pipeline.run.facts["target_data"]:
        return pd.DataFrame(columns=HEAD_TO_HEAD)
    table = pd.read_csv(ap).query("variant == 'all_classes' and iou_type == 'bbox' and artists == 'all'")
    table = table[table["shots"] == table["shots"].max()].merge(pd.read_csv(cost), on="arm")
    return table.assign(method="in context, " + table["arm"])[HEAD_TO_HEAD]
