"""Notebook 03's way from data to AP: proposals, a memory bank of references, matching, one row per variant."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from samantics.cache import hash_value, kept
from samantics.data.coco import CocoDataset, Instance
from samantics.data.detection import Data, load_data
from samantics.data.references import ReferenceRule, choose_references
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
        settings, dataset = self.run.scale.pipeline, self.data.references
        most = max(settings.shots, *settings.shot_curve)
        chosen = [choose_references(dataset, most, seed, self.data.rule) for seed in range(settings.reference_seeds)]
        every = {i.id: i for groups in chosen for group in groups.values() for i in group}
        masked = masks_from_boxes(self.models["sam"].model, dataset, [i for i in every.values() if i.box_only])
        every |= {instance.id: instance for instance in masked}
        return {
            seed: {category: tuple(every[i.id] for i in group) for category, group in groups.items()}
            for seed, groups in enumerate(chosen)
        }

    @functools.cached_property
    def reference_features(self) -> dict[str, dict[int, Features]]:
        """`(C,)` features by source and instance id, of the references of all seeds."""
        every = {i.id: i for groups in self.references.values() for group in groups.values() for i in group}
        folder = self.run.cache / "mask_features"
        return reference_features(self.models, self.data.references, list(every.values()), folder)

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
    min_area: float = ReferenceRule.min_area,
) -> Pipeline:
    """A pipeline on these files or, without any, on the scale's own data.

    Args:
        run: its scale sets sources, grid, thresholds and shots.
        references, targets, images, skip_bad_images, min_area: see `load_data`.
        weights: of the encoders, others than the scale's.
        proposers: whose masks are classified, a part of `PROPOSERS`.

    Raises:
        StudyError: see `load_data`; or a model's weights are missing.
    """
    settings, chosen = run.scale.pipeline, weights or run.scale.weights
    data = load_data(run, references, targets, images, skip_bad_images, min_area)
    size = None if chosen == "zoo" else settings.semantic_size or None
    models = {
        name: load_encoder(name, chosen, run.device, run.seed, image_size=size if name == "dinov2" else None)
        for name in within_reach(settings.sources, chosen)
    }
    for name, model in models.items():
        run.record(f"weights_{name}", model.weights_hash)
    limits = ProposalSettings(
        settings.points_per_side, settings.predicted_iou, settings.stability, box_nms=settings.box_nms
    )
    return Pipeline(run, data, models, limits, tuple(proposers))


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
    means = pd.DataFrame([e.metrics for e in evaluations], columns=METRICS).astype(float).mean()
    interval = ap_interval(evaluations)
    metrics = means.astype(object).where(means.notna(), None).to_dict()
    return {"iou_type": iou_type, **metrics, "low": interval.low, "high": interval.high, "seeds": len(runs)}


def truth_rows(pipeline: Pipeline) -> pd.DataFrame:
    """The annotations given as predictions: the evaluation is sound where they score AP 100."""
    targets = pipeline.data.targets
    labels = {"proposals": "truth", "source": "truth", "merging": "none", "shots": 0}
    rows = [labels | ap_row(targets, [perfect_results(targets)], t) | {"scoring": "none"} for t in IOU_TYPES]
    return pd.DataFrame(rows)
