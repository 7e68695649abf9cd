"""The filters of the pocket scale's proposals, chosen on scenes by the validation artist: no target has a say."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from samantics.cache import atomic_path
from samantics.data.detection import load_data, scenes
from samantics.data.references import choose_references
from samantics.metrics.coco_ap import evaluate
from samantics.models.encoder import load_encoder
from samantics.run import start_run
from samantics.scales import FILTERS
from samantics.training_free.mask_features import encode_masks, reference_features
from samantics.training_free.matching import MERGINGS, SCORINGS, match, remember
from samantics.training_free.oracles import covered, recall
from samantics.training_free.proposals import ProposalSettings, get_proposals, surviving

TRIED = {"predicted_iou": (0.4, 0.6, 0.8), "stability": (0.0, 0.3, 0.6), "box_nms": (0.3, 0.5, 0.7)}
SOURCES = ("clip", "dinov2")  # that a claim may be judged with: what suits one of them alone is not chosen
SCENES = 100


def choose_filters(seed: int = 0) -> pd.DataFrame:
    """Try all filters, then with the best all ways of matching; write the table that the scale reads.

    Returns:
        Columns `predicted_iou, stability, box_nms, merging, scoring`; mask `AP`, the mean over `SOURCES`;
        `proposals` of an image; their `recall`, percent. First the filters, best first, then the ways of matching.
    """
    run = start_run("pocket", "03_training_free", seed)
    settings, data, targets = run.scale.pipeline, load_data(run), scenes(run, "choice scenes", SCENES)
    sam, *sources = (load_encoder(name, run.scale.weights, run.device, seed) for name in ("sam", *SOURCES))
    everything = ProposalSettings(settings.points_per_side, min(TRIED["predicted_iou"]), stability=0, box_nms=1)
    found, models = get_proposals(sam, targets, everything), dict(zip(SOURCES, sources, strict=True))
    encoded = encode_masks(models, targets, {n: one.rles for n, one in found.items()})
    features = {(source, n): encoded.of(source, n) for source in SOURCES for n in found}
    references = choose_references(data.references, settings.shots, seed, data.rule)
    known = reference_features(models, data.references, [i for group in references.values() for i in group])
    banks = {source: remember(references, known[source]) for source in SOURCES}

    @functools.cache
    def kept(chosen: tuple[float, ...]) -> dict[int, NDArray[np.int64]]:
        limits = ProposalSettings(settings.points_per_side, chosen[0], chosen[1], box_nms=chosen[2])
        return {n: surviving(one, limits) for n, one in found.items()}

    def measured(chosen: tuple[float, ...], merging: str = "none", scoring: str = "prototype") -> list[object]:
        left, ap = {n: found[n].select(rows) for n, rows in kept(chosen).items()}, []
        for source, bank in banks.items():
            its = [(n, one, features[source, n][kept(chosen)[n]], bank, scoring, merging) for n, one in left.items()]
            results = [result for one in its for result in match(*one)]
            ap.append(evaluate(targets, results).metrics["AP"] or 0.0)
        masks = np.mean([len(one) for one in left.values()])
        return [*chosen, merging, scoring, np.mean(ap), masks, recall(covered(targets, left)).value]

    columns = [*TRIED, "merging", "scoring", "AP", "proposals", "recall"]
    filters = pd.DataFrame([measured(one) for one in itertools.product(*TRIED.values())], columns=columns)
    filters = filters.sort_values("AP", ascending=False, kind="stable")
    best = tuple(filters[list(TRIED)].iloc[0])
    others = [measured(best, *rules) for rules in itertools.product(MERGINGS, SCORINGS)][1:]
    table = pd.concat([filters, pd.DataFrame(others, columns=columns)])
    with atomic_path(FILTERS) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    return table
