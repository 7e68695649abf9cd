"""Notebook 03's way from data to AP: proposals, a memory bank of references, matching, tables."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from samantics.cache import hash_value, reading, write_json
from samantics.data import first_world as mojiworld
from samantics.data.coco import (
    CocoDataset,
    Instance,
    ReferenceRule,
    choose_references,
    load_coco,
    matched_categories,
    read_image,
    write_mojiworld,
)
from samantics.errors import StudyError
from samantics.metrics.coco_ap import IOU_TYPES, METRICS, Result, ap_interval, evaluate, perfect_results
from samantics.models.encoder import Encoder, load_encoder
from samantics.run import Run, own_data
from samantics.training_free import diagnosis
from samantics.training_free.matching import (
    Features,
    KeptFeatures,
    MatchSettings,
    MemoryBank,
    match,
    pooled_features,
    reference_features,
    remember,
)
from samantics.training_free.proposals import Proposals, ProposalSettings, get_proposals, propose

FORMAT = 1  # of cached tables; raised when the same settings would give other numbers
SOURCES = ("dinov2", "clip", "sam2", "sam", "random")
PROPOSERS = ("sam", "sam2", "truth")


# ----------------------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class Data:
    """Reference and target images.

    Attributes:
        rule: which instances may be references.
        names: category names by id.
        notes: one line for each thing the reader should know of the files.
    """

    references: CocoDataset
    targets: CocoDataset
    rule: ReferenceRule
    names: dict[int, str]
    notes: tuple[str, ...]


def load_data(run: Run, references: str = "", targets: str = "", images: str = "") -> Data:
    """The user's own COCO files where given, else MojiWorld scenes at pocket scale.

    Raises:
        StudyError: only some of the three are given; none are, at a scale that has no data of its own; bad files.
    """
    settings = run.scale.pipeline
    rule = ReferenceRule(min_area=settings.min_reference_area, inset=settings.reference_inset)
    given = {"references": references, "targets": targets, "images": images}
    if any(given.values()):
        lacking = [name for name, value in given.items() if not value]
        if lacking:
            raise StudyError(f"own data needs --references, --targets and --images: --{lacking[0]} is missing")
        datasets = load_coco(references, images), load_coco(targets, images)
        rule = ReferenceRule()  # a photograph's pixels, at every scale
    elif settings.target_scenes:
        world, folder = mojiworld.World(seed=run.seed), run.cache / "scenes"
        datasets = (
            write_mojiworld(world, "references", settings.reference_scenes, folder, held_out_share=0.0),
            write_mojiworld(world, "targets", settings.target_scenes, folder, held_out_share=0.5),
        )
    else:
        raise StudyError(f"scale {run.scale.name} needs COCO files: give --references, --targets and --images")
    names, notes = matched_categories(*datasets)
    run.record("reference_data", datasets[0].hash)
    run.record("target_data", datasets[1].hash)
    return Data(*datasets, rule, names, (*datasets[0].notes, *datasets[1].notes, *notes))


def load_models(run: Run, weights: str = "") -> dict[str, Encoder]:
    """The five sources of meaning; ``sam`` and ``sam2`` also propose. ``weights``: others than the scale's."""
    chosen = weights or run.scale.weights
    size = run.scale.pipeline.semantic_size if chosen != "zoo" else 0
    models = {
        name: load_encoder(name, chosen, run.device, run.seed, image_size=size or None if name == "dinov2" else None)
        for name in SOURCES
    }
    for name, model in models.items():
        run.record(f"weights_{name}", model.weights_hash)
    return models


# ---------------------------------------------------------------------------------------------------- the pipeline


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Everything of a run that is computed once and used by many tables.

    Attributes:
        models: by name.
        proposal_settings: of the headline rows.
    """

    run: Run
    data: Data
    models: dict[str, Encoder]
    proposal_settings: ProposalSettings

    @property
    def feature_files(self) -> Path:
        """Folder of the features of masks."""
        return self.run.cache / "mask_features"

    @functools.cached_property
    def references(self) -> dict[int, dict[int, tuple[Instance, ...]]]:
        """By seed, then category: the headline's references, of which fewer shots take the first."""
        settings = self.run.scale.pipeline
        most = max(settings.shots, *settings.shot_curve)
        seeds = range(settings.reference_seeds)
        return {seed: choose_references(self.data.references, most, seed, self.data.rule) for seed in seeds}

    @functools.cached_property
    def reference_features(self) -> dict[str, dict[int, Features]]:
        """``(C,)`` features by source and instance id, of the references of all seeds."""
        groups = [group for chosen in self.references.values() for group in chosen.values()]
        instances = {i.id: i for group in groups for i in group}
        return reference_features(self.models, self.data.references, list(instances.values()), self.feature_files)

    @functools.cache  # noqa: B019 - one pipeline lives as long as its notebook
    def proposals(self, proposer: str) -> dict[int, Proposals]:
        """Proposals of every target by ``sam`` or ``sam2``; ``truth`` gives the annotated masks."""
        if proposer == "truth":
            return diagnosis.true_masks(self.data.targets)
        root = self.run.cache / "proposals"
        return get_proposals(self.models[proposer], self.data.targets, self.proposal_settings, root)

    @functools.cached_property
    def all_features(self) -> dict[str, KeptFeatures]:
        """Features of the masks of all :data:`PROPOSERS`, one after another: an image is encoded once for all."""
        found = [self.proposals(proposer) for proposer in PROPOSERS]
        rles = {n: [rle for proposals in found for rle in proposals[n].rles] for n in self.data.targets.images}
        return pooled_features(self.models, self.data.targets, rles, self.feature_files)

    def features(self, proposer: str) -> dict[str, KeptFeatures]:
        """``(N, C)`` features of those proposals, by source and image."""
        earlier = PROPOSERS[: PROPOSERS.index(proposer)]
        rows = {}
        for image_id, mine in self.proposals(proposer).items():
            start = sum(len(self.proposals(other)[image_id]) for other in earlier)
            rows[image_id] = slice(start, start + len(mine))
        return {source: dataclasses.replace(kept, rows=rows) for source, kept in self.all_features.items()}

    def bank(self, source: str, shots: int, seed: int = 0) -> MemoryBank:
        """The memory bank of one source, seed and number of shots."""
        chosen = {category: group[:shots] for category, group in self.references[seed].items()}
        return remember(chosen, self.reference_features[source])

    def predict(self, variant: Variant, seed: int = 0) -> list[Result]:
        """Classified instances of all targets, as COCO results."""
        bank = self.bank(variant.source, variant.shots, seed)
        found, features = self.proposals(variant.proposals), self.features(variant.proposals)[variant.source]
        return [r for n, p in found.items() for r in match(n, p, features[n], bank, variant.settings)]

    @staticmethod
    def as_result(instance: Instance) -> Result:
        """An annotated object in the form of a result."""
        x0, y0, x1, y1 = instance.box
        head = {"image_id": instance.image_id, "category_id": instance.category_id, "score": 1.0}
        return {**head, "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": instance.rle}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table: where masks and meaning come from.

    Attributes:
        proposals: ``sam``, ``sam2`` or ``truth`` (the annotated masks).
        source: of meaning, a model's name.
        scoring, merging: see :class:`MatchSettings`.
        shots: references per class.
    """

    proposals: str = "sam"
    source: str = "dinov2"
    merging: str = "none"
    shots: int = 10
    scoring: str = "prototype"

    @property
    def settings(self) -> MatchSettings:
        """The settings of its matching; annotated masks are all kept."""
        whole = 1.0 if self.proposals == "truth" else 0.5
        return MatchSettings(scoring=self.scoring, merging=self.merging, nms=whole)


def start(run: Run, references: str = "", targets: str = "", images: str = "", weights: str = "") -> Pipeline:
    """A pipeline on the user's data or, without any, the scale's own.

    Raises:
        StudyError: see :func:`load_data`; or a model's weights are missing.
    """
    data = load_data(run, references, targets, images)
    if references:
        run = own_data(run)
    settings = run.scale.pipeline
    proposal_settings = ProposalSettings(
        settings.points_per_side, settings.predicted_iou, settings.stability, box_nms=settings.box_nms
    )
    return Pipeline(run, data, load_models(run, weights), proposal_settings)


# --------------------------------------------------------------------------------------------------------- tables


def ap_table(pipeline: Pipeline, variants: Iterable[Variant], iou_types: Sequence[str] = IOU_TYPES) -> pd.DataFrame:
    """One row per variant and IoU type: means over seeds of references, and the 95 % interval of AP.

    Columns: ``proposals, source, merging, shots, iou_type``, COCO's nine figures, ``low, high, seeds`` and
    ``scoring``. Rows are kept in the run's cache, by everything they depend on.
    """
    rows = [row for variant in variants for row in _cached(pipeline, variant, iou_types)]
    return pd.DataFrame(rows)


def _cached(pipeline: Pipeline, variant: Variant, iou_types: Sequence[str]) -> list[dict[str, Any]]:
    path = pipeline.run.cache / "pipeline" / f"{_key(pipeline, variant, iou_types)}.json"
    if path.is_file():
        with reading(path):
            rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return rows
    runs = [pipeline.predict(variant, seed) for seed in pipeline.references]
    labels = {name: getattr(variant, name) for name in ("proposals", "source", "merging", "shots")}
    rows = [
        labels | ap_row(pipeline.data.targets, runs, iou_type) | {"scoring": variant.scoring} for iou_type in iou_types
    ]
    write_json(path, rows)
    return rows


def _key(pipeline: Pipeline, variant: Variant, iou_types: Sequence[str]) -> str:
    data, proposer = pipeline.data, pipeline.models.get(variant.proposals)
    return hash_value(
        [
            FORMAT,
            [data.references.hash, data.targets.hash, dataclasses.asdict(data.rule)],
            [proposer and proposer.key, dataclasses.asdict(pipeline.proposal_settings)],
            [pipeline.models[variant.source].key, dataclasses.asdict(variant), list(iou_types)],
            pipeline.run.scale.pipeline.reference_seeds,
        ]
    )


def ap_row(targets: CocoDataset, runs: Sequence[Sequence[Result]], iou_type: str) -> dict[str, Any]:
    """COCO's nine figures, averaged over runs (None where no object has that size), and AP's interval."""
    evaluations = [evaluate(targets, results, iou_type) for results in runs]
    interval = ap_interval(evaluations)
    columns = {name: [evaluation.metrics[name] for evaluation in evaluations] for name in METRICS}
    means = {name: _mean(values) for name, values in columns.items()}
    return {"iou_type": iou_type, **means, "low": interval.low, "high": interval.high, "seeds": len(runs)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def truth_rows(pipeline: Pipeline) -> pd.DataFrame:
    """The annotations given as predictions: the evaluation is sound where they score AP 100."""
    targets = pipeline.data.targets
    labels = {"proposals": "truth", "source": "truth", "merging": "none", "shots": 0}
    rows = [labels | ap_row(targets, [perfect_results(targets)], t) | {"scoring": "none"} for t in IOU_TYPES]
    return pd.DataFrame(rows)


def oracle_table(pipeline: Pipeline, variant: Variant) -> pd.DataFrame:
    """``oracle, iou_type, AP, AR100, low, high``: what remains when one difficulty after the other is taken away.

    ``low`` and ``high`` bound AP. ``recall_ceiling`` has no AP (proposals have no classes): its AR100 is the recall of
    all proposals, not only the best hundred, and the interval bounds that.
    """
    targets, seeds = pipeline.data.targets, pipeline.references
    found = pipeline.proposals(variant.proposals)
    true_masks = dataclasses.replace(variant, proposals="truth")
    outcomes = {
        "none": [pipeline.predict(variant, seed) for seed in seeds],
        "true_masks": [pipeline.predict(true_masks, seed) for seed in seeds],
        "true_classes": [diagnosis.with_true_classes(targets, found, variant.settings)],
        "best_mask": [diagnosis.best_masks(targets, found)],
        "truth": [perfect_results(targets)],
    }
    columns = ["oracle", "iou_type", "AP", "AR100", "low", "high"]
    rows = [{"oracle": name} | ap_row(targets, runs, t) for name, runs in outcomes.items() for t in IOU_TYPES]
    return pd.concat([pd.DataFrame(rows)[columns], pd.DataFrame(_ceiling(targets, found), columns=columns)])


def _ceiling(targets: CocoDataset, found: Mapping[int, Proposals]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for iou_type in IOU_TYPES:
        best = diagnosis.covered(targets, found, iou_type)
        low, high = diagnosis.recall_interval(best)
        rows.append(("recall_ceiling", iou_type, None, diagnosis.recall(best["iou"].to_numpy()), low, high))
    return rows


SIZES = ((0, 0.01), (0.01, 0.03), (0.03, 0.06), (0.06, 0.12), (0.12, 1.0))  # share of the image


def size_table(pipeline: Pipeline, proposer: str = "sam") -> pd.DataFrame:
    """``size, objects, recall, low, high``: recall of the proposals by an object's share of the image."""
    best = diagnosis.covered(pipeline.data.targets, pipeline.proposals(proposer))
    rows = []
    for least, most in SIZES:
        chosen = best[(best["share"] >= least) & (best["share"] < most)]
        if len(chosen):
            low, high = diagnosis.recall_interval(chosen)
            name = f"{100 * least:.0f}–{100 * most:.0f} %"
            rows.append((name, len(chosen), diagnosis.recall(chosen["iou"].to_numpy()), low, high))
    return pd.DataFrame(rows, columns=["size", "objects", "recall", "low", "high"])


def top_results(pipeline: Pipeline, results: Sequence[Result], judged: Sequence[diagnosis.Verdict]) -> pd.DataFrame:
    """``image_id, kind, result`` of each image's best-scored results, as many as it has objects."""
    rows = []
    for image_id in pipeline.data.targets.images:
        count = len(diagnosis.objects_of(pipeline.data.targets, image_id))
        mine = [(r, v) for r, v in zip(results, judged, strict=True) if r["image_id"] == image_id]
        mine.sort(key=lambda pair: -pair[0]["score"])
        rows += [{"image_id": image_id, "kind": v.kind, "result": r} for r, v in mine[:count]]
    return pd.DataFrame(rows, columns=["image_id", "kind", "result"])


def ranked_images(pipeline: Pipeline, found: pd.DataFrame, least: int = 3) -> pd.DataFrame:
    """``image_id, objects, right, share``, best first: images of at least ``least`` objects by the share found right.

    An image with G objects is judged by its G best-scored results, so neither many nor few predictions help. Ties go
    to the lower id. Where no image has ``least`` objects, those with the most are ranked.
    """
    rows = []
    for image_id in pipeline.data.targets.images:
        count = len(diagnosis.objects_of(pipeline.data.targets, image_id))
        right = int((found.loc[found["image_id"] == image_id, "kind"] == "correct").sum())
        rows.append((image_id, count, right, right / max(1, count)))
    table = pd.DataFrame(rows, columns=["image_id", "objects", "right", "share"])
    return table[table["objects"] >= min(least, table["objects"].max())].sort_values(
        ["share", "image_id"], ascending=[False, True]
    )


def confusions(pipeline: Pipeline, variant: Variant) -> pd.DataFrame:
    """``true, predicted, count`` of confident wrong names, most frequent first: class errors of each image's best."""
    results = pipeline.predict(variant)
    found = top_results(pipeline, results, diagnosis.verdicts(pipeline.data.targets, results))
    rows = []
    for result in found.loc[found["kind"] == "class", "result"]:
        iou = diagnosis.overlaps(pipeline.data.targets, result["image_id"], [result["segmentation"]])[0]
        truth = diagnosis.objects_of(pipeline.data.targets, result["image_id"])[int(iou.argmax())]
        rows.append((pipeline.data.names[truth.category_id], pipeline.data.names[result["category_id"]]))
    pairs = pd.DataFrame(rows, columns=["true", "predicted"])
    return pairs.value_counts().reset_index(name="count")


def grid_table(pipeline: Pipeline, source: str = "dinov2") -> pd.DataFrame:
    """``points_per_side, seconds, proposals, recall, AP, low, high`` (masks) on the first targets, by grid density.

    Seconds are those of proposing, encoding included, per image, over five images.
    """
    settings, targets = pipeline.run.scale.pipeline, _first_images(pipeline)
    banks = [pipeline.bank(source, settings.shots, seed) for seed in pipeline.references]
    rows = []
    for per_side in settings.grids:
        sparse = dataclasses.replace(pipeline.proposal_settings, points_per_side=per_side)
        found = get_proposals(pipeline.models["sam"], targets, sparse, pipeline.run.cache / "proposals")
        rles = {image_id: p.rles for image_id, p in found.items()}
        features = pooled_features({source: pipeline.models[source]}, targets, rles, pipeline.feature_files)[source]
        runs = [[r for n, p in found.items() for r in match(n, p, features[n], bank)] for bank in banks]
        row = ap_row(targets, runs, "segm")
        rows.append(
            {
                "points_per_side": per_side,
                "seconds": _seconds(pipeline, sparse, list(targets.images)[:5]),
                "proposals": np.mean([len(p) for p in found.values()]),
                "recall": diagnosis.recall(diagnosis.covered(targets, found)["iou"].to_numpy()),
                **{name: row[name] for name in ("AP", "low", "high")},
            }
        )
    return pd.DataFrame(rows)


def _first_images(pipeline: Pipeline) -> CocoDataset:
    """The targets on which grid densities are compared."""
    whole = pipeline.data.targets
    images = dict(list(whole.images.items())[: pipeline.run.scale.pipeline.grid_images])
    return dataclasses.replace(
        whole, images=images, instances=tuple(i for i in whole.instances if i.image_id in images)
    )


def _seconds(pipeline: Pipeline, settings: ProposalSettings, image_ids: Sequence[int]) -> float:
    images = [read_image(pipeline.data.targets, image_id) for image_id in image_ids]
    started = time.perf_counter()
    for image in images:
        propose(pipeline.models["sam"].model, image, settings)
    return (time.perf_counter() - started) / len(images)
