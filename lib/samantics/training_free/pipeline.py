"""Notebook 03's way from data to AP: proposals, a memory bank of references, matching, one row per variant."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from samantics.cache import hash_value, kept
from samantics.data.coco import CocoDataset, Instance
from samantics.data.detection import Data, load_data
from samantics.data.references import ReferenceRule, choose_references
from samantics.metrics.coco_ap import IOU_TYPES, METRICS, Result, ap_difference_by_seeds, ap_interval, evaluate
from samantics.metrics.intervals import Difference
from samantics.models.encoder import Encoder, load_encoder, within_reach
from samantics.run import Run
from samantics.training_free.mask_features import Features, MaskFeatures, encode_masks, reference_features
from samantics.training_free.matching import MemoryBank, match, remember
from samantics.training_free.proposals import Proposals, ProposalSettings, get_proposals, masks_from_boxes, true_masks

FORMAT = 3  # of cached tables; raised when the same settings would give other numbers
PROPOSERS = ("sam", "sam2", "truth")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table: where masks and meaning come from."""

    proposals: str = "sam"  # `sam`, `sam2` or `truth` (the annotated masks, all of which are kept)
    source: str = "dinov2"  # of meaning, a model's name
    merging: str = "none"  # of `matching.MERGINGS`
    shots: int = 10  # references per class
    scoring: str = "prototype"  # of `matching.SCORINGS`
    view: str = "map"  # of `mask_features.VIEWS`: how the source sees a mask


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
        """By seed, then category, as many as the most shots ask for; fewer shots take the first.

        Where the file has a box and no mask, SAM makes the mask.
        """
        settings, dataset, rule = self.run.scale.pipeline, self.data.references, self.data.rule
        most, seeds = max(settings.shots, *settings.shot_curve), range(settings.reference_seeds)
        chosen = {seed: choose_references(dataset, most, seed, rule) for seed in seeds}
        every = {i.id: i for groups in chosen.values() for group in groups.values() for i in group}
        masked = masks_from_boxes(self.models["sam"].model, dataset, [i for i in every.values() if i.box_only])
        every |= {instance.id: instance for instance in masked}
        return {
            seed: {category: tuple(every[i.id] for i in group) for category, group in groups.items()}
            for seed, groups in chosen.items()
        }

    def bank(self, source: str, shots: int, seed: int = 0, view: str = "map") -> MemoryBank:
        """The memory bank of one source, seed and number of shots."""
        chosen = {category: group[:shots] for category, group in self.references[seed].items()}
        return remember(chosen, self._of_references(self._together(source, view), view)[source])

    @functools.cache  # noqa: B019 - one pipeline lives as long as its notebook
    def proposals(self, proposer: str) -> dict[int, Proposals]:
        """Proposals of every target by `sam` or `sam2`; `truth` gives the annotated masks."""
        targets, folder = self.data.targets, self.run.cache / "proposals"
        if proposer == "truth":
            return true_masks(targets)
        return get_proposals(self.models[proposer], targets, self.proposal_settings, folder)

    def features(self, proposer: str, source: str, image_id: int, view: str = "map") -> Features:
        """`(N, C)` features of unit length of one image's proposals, by one source."""
        proposers = self.proposers if view == "map" else (proposer,)
        counts = [len(self.proposals(name)[image_id]) for name in proposers]
        place = proposers.index(proposer)
        found = self._of_targets(proposers, self._together(source, view), view).of(source, image_id)
        return found[sum(counts[:place]) : sum(counts[: place + 1])]

    def _together(self, source: str, view: str) -> tuple[str, ...]:
        """The sources that are encoded at once: a whole image is read for all; cut-outs take too long for that."""
        return tuple(self.models) if view == "map" else (source,)

    @functools.cache  # noqa: B019
    def _of_references(self, sources: tuple[str, ...], view: str) -> dict[str, dict[int, Features]]:
        every = {i.id: i for groups in self.references.values() for group in groups.values() for i in group}
        models, folder = {name: self.models[name] for name in sources}, self.run.cache / "mask_features"
        return reference_features(models, self.data.references, list(every.values()), folder, view)

    @functools.cache  # noqa: B019
    def _of_targets(self, proposers: tuple[str, ...], sources: tuple[str, ...], view: str) -> MaskFeatures:
        """Features of the masks of these proposers, one after another."""
        found = [self.proposals(proposer) for proposer in proposers]
        rles = {n: [rle for proposals in found for rle in proposals[n].rles] for n in self.data.targets.images}
        models, folder = {name: self.models[name] for name in sources}, self.run.cache / "mask_features"
        return encode_masks(models, self.data.targets, rles, folder, view)

    def predict(self, variant: Variant, seed: int = 0) -> list[Result]:
        """Classified instances of all targets, as COCO results."""
        proposer, source, view = variant.proposals, variant.source, variant.view
        bank, nms = self.bank(source, variant.shots, seed, view), 1.0 if proposer == "truth" else 0.5
        results = []
        for image_id, found in self.proposals(proposer).items():
            features = self.features(proposer, source, image_id, view)
            results += match(image_id, found, features, bank, variant.scoring, variant.merging, nms)
        return results

    def runs(self, variant: Variant) -> list[list[Result]]:
        """`predict` with each draw of references."""
        return [self.predict(variant, seed) for seed in self.references]


def start(
    run: Run, references: str = "", targets: str = "", images: str = "", weights: str = "",
    proposers: Sequence[str] = PROPOSERS, skip_bad_images: bool = False, min_area: float = ReferenceRule.min_area,
    target_images: str = "",
) -> Pipeline:  # fmt: skip
    """A pipeline on these files or, without any, on the scale's own data.

    Args:
        run: its scale sets sources, grid, thresholds and shots.
        references, targets, images, skip_bad_images, min_area, target_images: see `load_data`.
        weights: of the encoders, others than the scale's.
        proposers: whose masks are classified, a part of `PROPOSERS`.

    Raises:
        StudyError: see `load_data`; or a model's weights are missing.
    """
    settings, chosen = run.scale.pipeline, weights or run.scale.weights
    data = load_data(run, references, targets, images, skip_bad_images, min_area, target_images)
    if settings.targets and not targets:
        data = dataclasses.replace(data, targets=data.targets.first(settings.targets))
    names = within_reach(settings.sources, chosen)
    models = {name: load_encoder(name, chosen, run.device, run.seed) for name in names}
    if settings.semantic_size and chosen != "zoo" and "dinov2" in models:
        larger = dataclasses.replace(models["dinov2"].preprocess, size=settings.semantic_size, short=0)
        models["dinov2"] = dataclasses.replace(models["dinov2"], preprocess=larger)
    for name, model in models.items():
        run.record(f"weights_{name}", model.weights_hash)
    limits = {name: getattr(settings, name) for name in ("points_per_side", "predicted_iou", "stability", "box_nms")}
    return Pipeline(run, data, models, ProposalSettings(**limits), tuple(proposers))


def ap_table(pipeline: Pipeline, variants: Iterable[Variant], iou_types: Sequence[str] = IOU_TYPES) -> pd.DataFrame:
    """One row per variant and IoU type: means over seeds of references, and the 95 % interval of AP.

    Columns: `proposals, source, merging, shots, iou_type`, COCO's nine figures, `low, high, seeds`, `scoring` and
    `view`. Rows are kept in the run's cache, by everything they depend on.
    """

    def rows(variant: Variant) -> list[dict[str, Any]]:
        runs, head = pipeline.runs(variant), dataclasses.asdict(variant)
        tail = {name: head.pop(name) for name in ("scoring", "view")}
        return [head | ap_row(pipeline.data.targets, runs, iou_type) | tail for iou_type in iou_types]

    found = [kept_result(pipeline, [v], list(iou_types), functools.partial(rows, v)) for v in variants]
    return pd.DataFrame([row for rows in found for row in rows])


def mask_ap_difference(pipeline: Pipeline, more: Variant, less: Variant) -> Difference:
    """Mask AP of one variant minus that of another, paired over images and seeds of references, in points."""

    def difference() -> Difference:
        every = ([evaluate(pipeline.data.targets, run, sizes=False) for run in pipeline.runs(v)] for v in (more, less))
        return ap_difference_by_seeds(list(zip((1, -1), every, strict=True)))

    return Difference(*kept_result(pipeline, [more, less], ["difference"], difference))


def kept_result(
    pipeline: Pipeline, variants: Sequence[Variant], what: list[Any], make: Callable[[], Any], ending: str = "json"
) -> Any:
    """What `make` returns, from the run's cache where all that it depends on is as it was (`what`: its name, ...)."""
    data, models = pipeline.data, pipeline.models
    names = sorted({name for v in variants for name in (v.source, v.proposals) if name in models})
    files = [data.references.hash, data.targets.hash, dataclasses.asdict(data.rule)]
    settings = [dataclasses.asdict(pipeline.proposal_settings), pipeline.run.scale.pipeline.reference_seeds]
    asked = [{name: models[name].key for name in names}, [dataclasses.asdict(v) for v in variants], what]
    return kept(pipeline.run.cache / "pipeline" / f"{hash_value([FORMAT, files, settings, asked])}.{ending}", make)


def ap_row(targets: CocoDataset, runs: Sequence[Sequence[Result]], iou_type: str) -> dict[str, Any]:
    """COCO's nine figures, averaged over runs (None where no object has that size), and AP's interval."""
    evaluations = [evaluate(targets, results, iou_type) for results in runs]
    means = pd.DataFrame([e.metrics for e in evaluations], columns=METRICS).astype(float).mean()
    metrics = means.astype(object).where(means.notna(), None).to_dict()
    _, low, high = ap_interval(evaluations)
    return {"iou_type": iou_type, **metrics, "low": low, "high": high, "seeds": len(runs)}
