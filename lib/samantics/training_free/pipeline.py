"""Notebook 03's way from data to AP: proposals, a memory bank of references, matching, one row per variant."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from samantics.cache import hash_value, kept
from samantics.data import first_world as mojiworld
from samantics.data.coco import CocoDataset, ImageRecord, Instance, check_images, load_coco
from samantics.data.fetch import coco_subset
from samantics.data.first_world import write_mojiworld
from samantics.data.folders import image_size, readable_endings, visible_files
from samantics.data.references import ReferenceRule, choose_references, matched_categories, shared_images
from samantics.errors import StudyError
from samantics.metrics.coco_ap import IOU_TYPES, METRICS, Result, ap_interval, evaluate, perfect_results
from samantics.models.encoder import Encoder, load_encoder, within_reach
from samantics.run import Run
from samantics.training_free.matching import (
    Features,
    MaskFeatures,
    MemoryBank,
    match,
    pooled_features,
    reference_features,
    remember,
)
from samantics.training_free.proposals import (
    Proposals,
    ProposalSettings,
    get_proposals,
    masks_from_boxes,
    true_masks,
)

FORMAT = 1  # of cached tables; raised when the same settings would give other numbers
PROPOSERS = ("sam", "sam2", "truth")


@dataclasses.dataclass(frozen=True)
class Data:
    """Reference and target images."""

    references: CocoDataset
    targets: CocoDataset
    rule: ReferenceRule  # which instances may be references
    names: dict[int, str]  # of categories, by id
    notes: tuple[str, ...]  # a line for each thing the reader should know of the files


def load_data(
    run: Run, references: str = "", targets: str = "", images: str = "", skip_bad_images: bool = False
) -> Data:
    """The COCO files where given (the targets may be a folder of images), else the scale's own data.

    At `pocket` that is MojiWorld scenes, at `lite` images of COCO val2017, which are fetched.

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
        asked = unannotated(Path(targets)) if Path(targets).is_dir() else load_coco(targets, images, skip_bad_images)
        found = (load_coco(references, images, skip_bad_images), asked)
        datasets = check_images(found[0], skip_bad_images), check_images(found[1], skip_bad_images)
        rule = ReferenceRule(relative=True)  # a photograph's pixels, at every scale
    elif settings.target_scenes:
        world, folder = mojiworld.World(seed=run.seed), run.cache / "scenes"
        datasets = (
            write_mojiworld(world, "references", settings.reference_scenes, folder, held_out_share=0.0),
            write_mojiworld(world, "targets", settings.target_scenes, folder, held_out_share=0.5),
        )
    elif run.scale.coco:
        datasets = coco_subset(run.scale.coco, rule)
    else:
        raise StudyError(f"scale {run.scale.name} needs COCO files: give --references, --targets and --images")
    matched, names, notes = matched_categories(*datasets)
    every_note = (*matched.notes, *datasets[1].notes, *notes, *shared_images(matched, datasets[1]))
    run.record("reference_data", matched.hash)
    run.record("target_data", datasets[1].hash)
    return Data(matched, datasets[1], rule, names, every_note)


def unannotated(folder: Path) -> CocoDataset:
    """The images of a folder and its sub-folders, as targets that can be predicted and not measured.

    Raises:
        StudyError: there is none, or one cannot be read.
    """
    paths = [path for path in visible_files(folder) if path.suffix.lower() in readable_endings()]
    if not paths:
        raise StudyError(f"{folder} has no images: name a folder with some, or a COCO file")
    sizes = [image_size(path) for path in paths]
    records = [
        ImageRecord(n, str(p.relative_to(folder)), *s) for n, (p, s) in enumerate(zip(paths, sizes, strict=True), 1)
    ]
    return CocoDataset(folder, folder, {record.id: record for record in records}, {}, (), annotated=False)


def load_models(run: Run, weights: str = "") -> dict[str, Encoder]:
    """The scale's sources of meaning; `sam` and `sam2` also propose. `weights`: others than the scale's."""
    chosen = weights or run.scale.weights
    size = run.scale.pipeline.semantic_size if chosen != "zoo" else 0
    models = {
        name: load_encoder(name, chosen, run.device, run.seed, image_size=size or None if name == "dinov2" else None)
        for name in within_reach(run.scale.pipeline.sources, chosen)
    }
    for name, model in models.items():
        run.record(f"weights_{name}", model.weights_hash)
    return models


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table: where masks and meaning come from.

    Attributes:
        proposals: `sam`, `sam2` or `truth` (the annotated masks, all of which are kept).
        source: of meaning, a model's name.
        merging, scoring: names of `matching.MERGINGS` and `matching.SCORINGS`.
        shots: references per class.
    """

    proposals: str = "sam"
    source: str = "dinov2"
    merging: str = "none"
    shots: int = 10
    scoring: str = "prototype"


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Everything of a run that is computed once and used by many tables."""

    run: Run
    data: Data
    models: dict[str, Encoder]
    proposal_settings: ProposalSettings  # of the headline rows
    proposers: tuple[str, ...] = PROPOSERS  # whose masks get features

    @functools.cached_property
    def references(self) -> dict[int, dict[int, tuple[Instance, ...]]]:
        """By seed, then category: the headline's references, of which fewer shots take the first.

        Where the file has a box and no mask, SAM makes the mask.
        """
        settings = self.run.scale.pipeline
        most = max(settings.shots, *settings.shot_curve)
        seeds, dataset = range(settings.reference_seeds), self.data.references
        chosen = {seed: choose_references(dataset, most, seed, self.data.rule) for seed in seeds}
        every = {i.id: i for groups in chosen.values() for group in groups.values() for i in group}
        masked = masks_from_boxes(self.models["sam"].model, dataset, [i for i in every.values() if i.box_only])
        every |= {instance.id: instance for instance in masked}
        return {
            seed: {category: tuple(every[i.id] for i in group) for category, group in groups.items()}
            for seed, groups in chosen.items()
        }

    @functools.cached_property
    def reference_features(self) -> dict[str, dict[int, Features]]:
        """`(C,)` features by source and instance id, of the references of all seeds."""
        groups = [group for chosen in self.references.values() for group in chosen.values()]
        instances = list({i.id: i for group in groups for i in group}.values())
        return reference_features(self.models, self.data.references, instances, self.run.cache / "mask_features")

    def bank(self, source: str, shots: int, seed: int = 0) -> MemoryBank:
        """The memory bank of one source, seed and number of shots."""
        chosen = {category: group[:shots] for category, group in self.references[seed].items()}
        return remember(chosen, self.reference_features[source])

    @functools.cache  # noqa: B019 - one pipeline lives as long as its notebook
    def proposals(self, proposer: str) -> dict[int, Proposals]:
        """Proposals of every target by `sam` or `sam2`; `truth` gives the annotated masks."""
        if proposer == "truth":
            return true_masks(self.data.targets)
        root = self.run.cache / "proposals"
        return get_proposals(self.models[proposer], self.data.targets, self.proposal_settings, root)

    @functools.cached_property
    def all_features(self) -> MaskFeatures:
        """Features of the masks of all proposers, one after another: an image is encoded once for all."""
        found = [self.proposals(proposer) for proposer in self.proposers]
        rles = {n: [rle for proposals in found for rle in proposals[n].rles] for n in self.data.targets.images}
        return pooled_features(self.models, self.data.targets, rles, self.run.cache / "mask_features")

    def features(self, proposer: str, source: str, image_id: int) -> Features:
        """`(N, C)` features of unit length of one image's proposals, by one source."""
        counts = [len(self.proposals(name)[image_id]) for name in self.proposers]
        place = self.proposers.index(proposer)
        return self.all_features.of(source, image_id)[sum(counts[:place]) : sum(counts[: place + 1])]

    def predict(self, variant: Variant, seed: int = 0) -> list[Result]:
        """Classified instances of all targets, as COCO results."""
        bank, nms = self.bank(variant.source, variant.shots, seed), 1.0 if variant.proposals == "truth" else 0.5
        results = []
        for image_id, found in self.proposals(variant.proposals).items():
            features = self.features(variant.proposals, variant.source, image_id)
            results += match(image_id, found, features, bank, variant.scoring, variant.merging, nms)
        return results


def start(
    run: Run,
    references: str = "",
    targets: str = "",
    images: str = "",
    weights: str = "",
    proposers: Sequence[str] = PROPOSERS,
    skip_bad_images: bool = False,
) -> Pipeline:
    """A pipeline on these files or, without any, on the scale's own data.

    Args:
        run: its scale sets grid, thresholds and shots.
        references, targets: COCO JSON; the targets may be a folder of images.
        images: the folder of the images that the files name.
        weights: of the encoders, others than the scale's.
        proposers: whose masks are classified, a part of `PROPOSERS`.
        skip_bad_images: leave out images that are missing, damaged or of another size than their entry says.

    Raises:
        StudyError: see `load_data`; or a model's weights are missing.
    """
    settings = run.scale.pipeline
    data = load_data(run, references, targets, images, skip_bad_images)
    limits = ProposalSettings(
        settings.points_per_side, settings.predicted_iou, settings.stability, box_nms=settings.box_nms
    )
    return Pipeline(run, data, load_models(run, weights), limits, tuple(proposers))


def ap_table(pipeline: Pipeline, variants: Iterable[Variant], iou_types: Sequence[str] = IOU_TYPES) -> pd.DataFrame:
    """One row per variant and IoU type: means over seeds of references, and the 95 % interval of AP.

    Columns: `proposals, source, merging, shots, iou_type`, COCO's nine figures, `low, high, seeds` and `scoring`. Rows
    are kept in the run's cache, by everything they depend on.
    """
    rows = []
    for variant in variants:
        path = pipeline.run.cache / "pipeline" / f"{_key(pipeline, variant, iou_types)}.json"
        rows += kept(path, functools.partial(_ap_rows, pipeline, variant, iou_types))
    return pd.DataFrame(rows)


def _ap_rows(pipeline: Pipeline, variant: Variant, iou_types: Sequence[str]) -> list[dict[str, Any]]:
    runs = [pipeline.predict(variant, seed) for seed in pipeline.references]
    labels = dataclasses.asdict(variant)
    scoring = {"scoring": labels.pop("scoring")}
    return [labels | ap_row(pipeline.data.targets, runs, iou_type) | scoring for iou_type in iou_types]


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
    columns = {name: [e.metrics[name] for e in evaluations] for name in METRICS}
    known = {name: [value for value in values if value is not None] for name, values in columns.items()}
    means = {name: float(np.mean(values)) if values else None for name, values in known.items()}
    return {"iou_type": iou_type, **means, "low": interval.low, "high": interval.high, "seeds": len(runs)}


def truth_rows(pipeline: Pipeline) -> pd.DataFrame:
    """The annotations given as predictions: the evaluation is sound where they score AP 100."""
    targets = pipeline.data.targets
    labels = {"proposals": "truth", "source": "truth", "merging": "none", "shots": 0}
    rows = [labels | ap_row(targets, [perfect_results(targets)], t) | {"scoring": "none"} for t in IOU_TYPES]
    return pd.DataFrame(rows)
