"""Settings of the pocket scale that were chosen on scenes by the validation artist: no target has a say.

Each function writes the table that `scales.py` reads. Run it again when the zoo changes.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from samantics.cache import write_text
from samantics.data.detection import load_data, scenes
from samantics.data.references import choose_references
from samantics.incontext.evaluation import COMPARED, FOR_ARMS
from samantics.incontext.study import load_study, with_settings
from samantics.incontext.tokens import sam_data
from samantics.metrics.coco_ap import ap_difference, evaluate
from samantics.models.encoder import load_encoder
from samantics.run import start_run
from samantics.scales import FILTERS, NAMING
from samantics.training_free.diagnosis import recall
from samantics.training_free.mask_features import encode_masks, reference_features
from samantics.training_free.matching import MERGINGS, SCORINGS, match, remember
from samantics.training_free.proposals import ProposalSettings, get_proposals, surviving

WEIGHTS = (0.0, 1.0, 3.0)  # of naming
TRIED = {"predicted_iou": (0.4, 0.6, 0.8), "stability": (0.0, 0.3, 0.6), "box_nms": (0.3, 0.5, 0.7)}
SOURCES = ("clip", "dinov2")  # that a claim may be judged with: what suits one of them alone is not chosen
SCENES = 100


def choose_naming() -> pd.DataFrame:
    """Tune the in-context model with each of `WEIGHTS`: box AP50 of base classes, right and wrong references."""
    rows = []
    for weight in WEIGHTS:
        run = with_settings(start_run("pocket", "02_in_context"), naming=weight)
        study, asked = load_study(run), scenes(run, "choice scenes", run.scale.pipeline.target_scenes)
        model, _ = study.tuned()
        targets = sam_data(study.encoder, asked, study.settings, study.folder)
        found = dataclasses.replace(study, targets=targets).ask(model, FOR_ARMS)
        right, wrong = (np.mean([e.metrics["AP50"] or 0.0 for e in found.evaluations(way, "base")]) for way in COMPARED)
        rows.append([weight, right, wrong, *ap_difference(found.terms()["base"], iou=0.5)[:3]])
    return _written(NAMING, pd.DataFrame(rows, columns=["naming", "right", "wrong", "difference", "low", "high"]))


def choose_filters() -> pd.DataFrame:
    """Try all filters of proposals, best first, then with the best all ways of matching: mask AP, mean over `SOURCES`.

    Beside it the proposals of an image and their recall, percent.
    """
    run = start_run("pocket", "03_training_free")
    settings, data, targets = run.scale.pipeline, load_data(run), scenes(run, "choice scenes", SCENES)
    sam, *sources = (load_encoder(name, run.scale.weights, run.device) for name in ("sam", *SOURCES))
    everything = ProposalSettings(settings.points_per_side, min(TRIED["predicted_iou"]), stability=0, box_nms=1)
    found, models = get_proposals(sam, targets, everything), dict(zip(SOURCES, sources, strict=True))
    features = encode_masks(models, targets, {n: one.rles for n, one in found.items()})
    references = choose_references(data.references, settings.shots, run.seed, data.rule)
    known = reference_features(models, data.references, [i for group in references.values() for i in group])
    banks = {source: remember(references, known[source]) for source in SOURCES}

    def tried(filters: tuple[float, ...], merging: str = "none", scoring: str = "prototype") -> list[Any]:
        limits = ProposalSettings(settings.points_per_side, filters[0], filters[1], box_nms=filters[2])
        rows = {n: surviving(one, limits) for n, one in found.items()}
        left, aps = {n: found[n].select(chosen) for n, chosen in rows.items()}, []
        for source, bank in banks.items():
            its = [(n, one, features.of(source, n)[rows[n]], bank, scoring, merging) for n, one in left.items()]
            results = [result for one in its for result in match(*one)]
            aps.append(evaluate(targets, results).metrics["AP"] or 0.0)
        masks = np.mean([len(one) for one in left.values()])
        return [*filters, merging, scoring, np.mean(aps), masks, recall(targets, left).value]

    columns = [*TRIED, "merging", "scoring", "AP", "proposals", "recall"]
    filters = pd.DataFrame([tried(one) for one in itertools.product(*TRIED.values())], columns=columns)
    filters = filters.sort_values("AP", ascending=False, kind="stable")
    best = tuple(filters[list(TRIED)].iloc[0])
    others = [tried(best, *rules) for rules in itertools.product(MERGINGS, SCORINGS)][1:]
    return _written(FILTERS, pd.concat([filters, pd.DataFrame(others, columns=columns)]))


def _written(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    write_text(path, table.to_csv(index=False, float_format="%.6g"))
    return table
