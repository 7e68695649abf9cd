"""Settings of the pocket scale that were chosen on scenes by the validation artist: no target has a say.

Each function writes the table that `scales.py` reads. Run it again when the zoo changes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from samantics.cache import atomic_path
from samantics.data.coco import CocoDataset
from samantics.data.detection import load_data, scenes
from samantics.data.references import choose_references
from samantics.incontext.evaluation import COMPARED
from samantics.incontext.study import load_study, sam_data, with_settings
from samantics.metrics.coco_ap import evaluate
from samantics.models.encoder import load_encoder
from samantics.run import start_run
from samantics.scales import FILTERS, NAMING
from samantics.training_free.mask_features import encode_masks, reference_features
from samantics.training_free.matching import MERGINGS, SCORINGS, match, remember
from samantics.training_free.oracles import covered, recall
from samantics.training_free.proposals import Proposals, ProposalSettings, get_proposals, surviving

WEIGHTS = (0.0, 1.0, 3.0)  # of naming
TRIED = {"predicted_iou": (0.4, 0.6, 0.8), "stability": (0.0, 0.3, 0.6), "box_nms": (0.3, 0.5, 0.7)}
SOURCES = ("clip", "dinov2")  # that a claim may be judged with: what suits one of them alone is not chosen
SCENES = 100


def choose_naming(scale: str = "pocket") -> pd.DataFrame:
    """Tune the in-context model with each of `WEIGHTS`, and ask validation scenes.

    Returns:
        Columns `naming, right, wrong, difference, low, high`: box AP50 of base classes with right and wrong references.
    """
    rows = []
    for weight in WEIGHTS:
        run = with_settings(start_run(scale, "02_in_context"), naming=weight)
        study, asked = load_study(run), scenes(run, "choice scenes", run.scale.pipeline.target_scenes)
        model, _ = study.tuned()
        found = dataclasses.replace(study, targets=sam_data(run, study.encoder, asked)).compare(model)
        right, wrong = (np.mean([e.metrics["AP50"] or 0.0 for e in found.evaluations(way, "base")]) for way in COMPARED)
        rows.append([weight, right, wrong, *found.effect("base")[:3]])
    return _written(NAMING, pd.DataFrame(rows, columns=["naming", "right", "wrong", "difference", "low", "high"]))


def choose_filters(seed: int = 0) -> pd.DataFrame:
    """Try all filters of proposals, then with the best all ways of matching.

    Returns:
        Columns `predicted_iou, stability, box_nms, merging, scoring`; mask `AP`, the mean over `SOURCES`;
        `proposals` of an image; their `recall`, percent. First the filters, best first, then the ways of matching.
    """
    run = start_run("pocket", "03_training_free", seed)
    settings, data, targets = run.scale.pipeline, load_data(run), scenes(run, "choice scenes", SCENES)
    sam, *sources = (load_encoder(name, run.scale.weights, run.device, seed) for name in ("sam", *SOURCES))
    everything = ProposalSettings(settings.points_per_side, min(TRIED["predicted_iou"]), stability=0, box_nms=1)
    found, models = get_proposals(sam, targets, everything), dict(zip(SOURCES, sources, strict=True))
    features = encode_masks(models, targets, {n: one.rles for n, one in found.items()})
    references = choose_references(data.references, settings.shots, seed, data.rule)
    known = reference_features(models, data.references, [i for group in references.values() for i in group])
    banks = {source: remember(references, known[source]) for source in SOURCES}

    def tried(filters: tuple[float, ...], merging: str = "none", scoring: str = "prototype") -> list[Any]:
        limits = ProposalSettings(settings.points_per_side, filters[0], filters[1], box_nms=filters[2])
        measured = _measured(targets, found, limits, banks, features, scoring, merging)
        return [*filters, merging, scoring, *measured]

    columns = [*TRIED, "merging", "scoring", "AP", "proposals", "recall"]
    filters = pd.DataFrame([tried(one) for one in itertools.product(*TRIED.values())], columns=columns)
    filters = filters.sort_values("AP", ascending=False, kind="stable")
    best = tuple(filters[list(TRIED)].iloc[0])
    others = [tried(best, *rules) for rules in itertools.product(MERGINGS, SCORINGS)][1:]
    return _written(FILTERS, pd.concat([filters, pd.DataFrame(others, columns=columns)]))


def _measured(
    targets: CocoDataset, found: Mapping[int, Proposals], limits: ProposalSettings, banks: Mapping[str, Any],
    features: Any, scoring: str, merging: str,
) -> tuple[float, float, float]:  # fmt: skip
    """Mask AP, proposals of an image, and recall of what these limits leave."""
    rows = {n: surviving(one, limits) for n, one in found.items()}
    left, ap = {n: found[n].select(chosen) for n, chosen in rows.items()}, []
    for source, bank in banks.items():
        its = [(n, one, features.of(source, n)[rows[n]], bank, scoring, merging) for n, one in left.items()]
        results = [result for one in its for result in match(*one)]
        ap.append(evaluate(targets, results).metrics["AP"] or 0.0)
    masks = float(np.mean([len(one) for one in left.values()]))
    return float(np.mean(ap)), masks, recall(covered(targets, left)).value


def _written(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    return table
