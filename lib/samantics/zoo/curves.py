"""How the zoo's models learned: curves against pictures seen and against compute, and whether they have converged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch.utils.flop_counter import FlopCounterMode

from samantics.errors import StudyError
from samantics.models import pocket
from samantics.mojiworld.world import STREAMS, visible_drawings
from samantics.zoo.contract import Batch
from samantics.zoo.objectives import OBJECTIVES, build_objective

COLUMNS = ["encoder", "seed", "images", "seconds", "objective", "probe_top1", "knn_top1"]
LAST_PART = 1 / 3  # of the training: where it changes the probe by no more than noise, the training has converged


def choices() -> pd.DataFrame:
    """The log by which recipes were chosen: `choice,setting,pictures,probe_top1,knn_top1,loss` (validation artist)."""
    return pd.read_csv(pocket.ASSETS / "choices.csv")


def trained_folders() -> list[Path]:
    """Where curves and cards lie: the zoo's own, and trainings from other seeds (their weights do not ship)."""
    return [pocket.ASSETS, *sorted(pocket.ASSETS.glob("seed_*"))]


def learning_curves(folders: Sequence[Path] = ()) -> pd.DataFrame:
    """What trainings wrote down (of these folders; by default the shipped ones), a row for each point of measurement.

    Returns:
        `encoder, seed, images` (seen so far), `seconds`, `objective` (the loss on pictures never trained on),
        `probe_top1, knn_top1` (percent of the validation artist's drawings whose class is named).

    Raises:
        StudyError: no folder holds a curve, or one lacks its card.
    """
    parts = []
    for folder in folders or trained_folders():
        for name in [name for name in OBJECTIVES if (folder / f"{name}.csv").is_file()]:
            seed = pocket.card(name, folder)["recipe"]["seed"]
            curve = pd.read_csv(folder / f"{name}.csv").rename(columns={"held_out_loss": "objective"})
            parts.append(curve.assign(encoder=name, seed=seed)[COLUMNS])
    if not parts:
        raise StudyError(f"{pocket.ASSETS} holds no curve: restore it with git checkout")
    return pd.concat(parts, ignore_index=True)


def gigaflops(name: str, batch: Batch) -> float:
    """Operations (in thousand millions) of one training step, forward and backward, for one picture."""
    with FlopCounterMode(display=False) as counter:
        build_objective(name).train()(batch, 0.5)[0].backward()
    return counter.get_total_flops() / len(batch.images) / 1e9


def last_third(curves: pd.DataFrame) -> pd.DataFrame:
    """What the last third of each training still changed, given its `learning_curves`: has it converged?

    Returns:
        `encoder, probe_change` (points, counted from the measuring point nearest to the third's begin, mean over
        seeds), `noise` (two standard deviations of the final probe over seeds, or where there is one seed two standard
        errors of the drawings that it was tested on), `converged` (the change is within the noise).
    """
    drawings, rows = sum(map(len, visible_drawings(STREAMS["choice"].role))), []
    for name, runs in curves.groupby("encoder", sort=False):
        changes, ends = [], []
        for _, curve in runs.groupby("seed"):
            begins = (1 - LAST_PART) * curve["images"].max()
            ends.append(float(curve["probe_top1"].iloc[-1]))
            changes.append(ends[-1] - float(curve.loc[(curve["images"] - begins).abs().idxmin(), "probe_top1"]))
        mean = float(np.mean(ends))
        noise = 2 * float(np.std(ends, ddof=1) if len(ends) > 1 else np.sqrt(mean * (100 - mean) / drawings))
        rows.append((name, float(np.mean(changes)), noise, bool(abs(np.mean(changes)) <= noise)))
    return pd.DataFrame(rows, columns=["encoder", "probe_change", "noise", "converged"])
