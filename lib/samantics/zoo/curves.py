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


def seed_noise(curves: pd.DataFrame) -> pd.DataFrame:
    """How far trainings end apart that differ in their seed alone, given their `learning_curves`.

    Returns:
        For each model that was trained repeatedly at one length: `encoder, images, seeds`, then mean and standard
        deviation over seeds of `probe_top1`, `knn_top1` and `objective` at the end.
    """
    ends = curves.loc[curves.groupby(["encoder", "seed"], sort=False)["images"].idxmax()]
    same = ends.groupby(["encoder", "images"], sort=False)
    table = same[COLUMNS[-3:]].agg(["mean", "std"])
    table.columns = ["_".join(names) for names in table.columns]
    table.insert(0, "seeds", same.size())
    return table[table["seeds"] > 1].reset_index()


def last_third(curves: pd.DataFrame) -> pd.DataFrame:
    """What the last third of each model's longest training still changed, given `learning_curves`: has it converged?

    Returns:
        `encoder, probe_change` (points, counted from the measuring point nearest to the third's begin, mean over
        seeds), `noise` (two standard deviations of the final probe over seeds, or where there is one seed two standard
        errors of the drawings that it was tested on), `converged` (the change is within the noise).
    """
    drawings, rows = sum(map(len, visible_drawings(STREAMS["choice"].role))), []
    spread = seed_noise(curves).groupby("encoder")["probe_top1_std"].max()
    for name, runs in curves.groupby("encoder", sort=False):
        length = runs["images"].max()
        longest = runs.groupby("seed").filter(lambda run, length=length: run["images"].max() == length)
        begins = (longest["images"] - (1 - LAST_PART) * length).abs().groupby(longest["seed"]).idxmin()
        end = float(longest.loc[longest["images"] == length, "probe_top1"].mean())
        change = end - float(longest.loc[begins, "probe_top1"].mean())
        noise = 2 * (spread[name] if name in spread else float(np.sqrt(end * (100 - end) / drawings)))
        rows.append((name, change, noise, abs(change) <= noise))
    return pd.DataFrame(rows, columns=["encoder", "probe_change", "noise", "converged"])
