"""The pocket zoo as an experiment of its own: how its models learned, and at what cost (appendix notebook A1)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from samantics import mojiworld, zoo
from samantics.errors import StudyError
from samantics.figures import COLOURS, LABELS
from samantics.objectives import Batch, SelfDistillation, build_objective

CURVES = ["encoder", "seed", "images", "objective", "probe_top1", "knn_top1"]
LAST_PART = 1 / 3  # of the training; where the objective changes little in it, it has flattened


def training_curves(names: Sequence[str] = zoo.NAMES, folder: Path = zoo.ASSETS) -> pd.DataFrame:
    """What the training of the zoo wrote down: :data:`CURVES`, a row for each measuring point.

    ``objective`` is the loss on pictures never trained on; ``probe_top1`` and ``knn_top1``: percent at drawing level.

    Raises:
        StudyError: a model has no curve or no card.
    """
    parts = []
    for name in names:
        path = folder / f"{name}.csv"
        if not path.is_file():
            raise StudyError(f"{path} is missing: restore it with git checkout")
        table = pd.read_csv(path).rename(columns={"held_out_loss": "objective"})
        parts.append(table.assign(encoder=name, seed=zoo.card(name, folder)["recipe"]["seed"])[CURVES])
    return pd.concat(parts, ignore_index=True)


def second_stage(name: str, curve: pd.DataFrame) -> pd.Series:
    """Which rows of a model's curve lie in the second of two objectives (DINOv2's; the others have but one)."""
    objective = build_objective(name)
    warmup = objective.warmup if isinstance(objective, SelfDistillation) else 0.0
    return curve["images"] >= (warmup or 2.0) * curve["images"].max()


def rest_table(curves: pd.DataFrame) -> pd.DataFrame:
    """``encoder, objective_change, probe_change``: what the last third of the training still changed.

    Counted from the measuring point nearest to its begin, of DINOv2 in the second objective only. The objective in
    percent of its value at the end, the probe in points.
    """
    rows = []
    for name, curve in curves.groupby("encoder", sort=False):
        stage = second_stage(str(name), curve)
        kept = curve[stage] if stage.any() else curve
        begins = (1 - LAST_PART) * curve["images"].max()
        first, final = kept.loc[(kept["images"] - begins).abs().idxmin()], kept.iloc[-1]
        change = 100 * (final["objective"] - first["objective"]) / abs(final["objective"])
        rows.append((name, change, final["probe_top1"] - first["probe_top1"]))
    return pd.DataFrame(rows, columns=["encoder", "objective_change", "probe_change"])


def training_flops(name: str, pictures: int = 4) -> float:
    """Floating-point operations of one picture's training step, forward and backward, as PyTorch counts them."""
    objective = build_objective(name).train()
    scenes = mojiworld.render(lambda index: mojiworld.pretraining_picture(mojiworld.World(), index), range(pictures))
    parts = (scenes.images.transpose(0, 3, 1, 2).copy(), scenes.instances, scenes.drawings.astype(np.int64))
    batch = Batch(*map(torch.from_numpy, parts))
    warmup = objective.warmup if isinstance(objective, SelfDistillation) else 1.0
    total = 0.0
    for progress, share in ((0.0, warmup), (1.0, 1 - warmup)):
        if share:
            with FlopCounterMode(display=False) as counter:
                objective(batch, progress)[0].backward()
            total += share * counter.get_total_flops() / pictures
    return total


def curves_figure(curves: pd.DataFrame, flops: dict[str, float]) -> Figure:
    """Objective (relative to its start), linear probe and kNN against images seen, and the probe against compute."""
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.4))
    for name, curve in curves.groupby("encoder", sort=False):
        colour = COLOURS[str(name)]
        late = second_stage(str(name), curve)
        for stage in (~late, late):
            mine = curve[stage]
            if len(mine):
                axes[0].plot(mine["images"] / 1000, mine["objective"] / mine["objective"].iloc[0], "o-", ms=3, c=colour)
        axes[1].plot(curve["images"] / 1000, curve["probe_top1"], "o-", ms=3, color=colour, label=LABELS[str(name)])
        axes[2].plot(curve["images"] / 1000, curve["knn_top1"], "o-", ms=3, color=colour)
        axes[3].plot(curve["images"] * flops[str(name)] / 1e15, curve["probe_top1"], "o-", ms=3, color=colour)
    axes[0].set(title="objective, unseen\npictures", xlabel="thousand images", ylabel="loss / loss at the start")
    axes[1].set(title="linear probe,\ndrawing", xlabel="thousand images", ylabel="top-1 (%)")
    axes[2].set(title="nearest neighbours,\ndrawing", xlabel="thousand images", ylabel="top-1 (%)")
    axes[3].set(title="linear probe,\nby compute", xlabel="PFLOP of training", ylabel="top-1 (%)")
    for axis in axes:
        axis.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=len(curves["encoder"].unique()))
    return figure


# ------------------------------------------------------------------------------------------------------- ablations

ABLATION = ["encoder", "factor", "setting", "labels", "top1", "low", "high", "seeds"]


def ablation_table(figures: Path) -> pd.DataFrame:
    """One factor at a time, from the tables of notebook 01: :data:`ABLATION`, linear probes, percent.

    ``training`` (SAM's architecture untrained against trained), ``layer`` (the last trunk block against the output)
    and ``pooling`` (mean over the image against mean over the object).

    Raises:
        StudyError: notebook 01 was not run at this scale.
    """
    probes, layers, pooling = (_read(figures / f"01_{name}.csv") for name in ("probe_accuracy", "layers", "pooling"))
    linear = probes[(probes["probe"] == "linear") & probes["encoder"].isin(["sam", "random"])]
    setting = linear["encoder"].map({"random": "untrained", "sam": "trained"})
    rows = _rows(linear.assign(encoder="sam").sort_index(ascending=False), "training", setting)
    for _, mine in layers[layers["encoder"].isin(["sam", "sam2"])].groupby(["encoder", "labels"], sort=False):
        rows += _rows(mine.iloc[-2:], "layer", pd.Series(["last trunk block", "neck"], mine.index[-2:]))
    kept = pooling[pooling["pooling"].isin(["mean", "object"])]
    rows += _rows(kept, "pooling", kept["pooling"])
    return pd.DataFrame(rows, columns=ABLATION)


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise StudyError(f"{path} is missing: run notebook 01 first (./run_all.sh --only 01)")
    return pd.read_csv(path)


def _rows(table: pd.DataFrame, factor: str, setting: pd.Series) -> list[tuple[object, ...]]:
    columns = ["encoder", "labels", "top1", "top1_low", "top1_high", "seeds"]
    found = table[columns].assign(setting=setting).to_dict("records")
    return [
        (r["encoder"], factor, r["setting"], r["labels"], r["top1"], r["top1_low"], r["top1_high"], r["seeds"])
        for r in found
    ]


def ablation_figure(table: pd.DataFrame) -> Figure:
    """A row for each label level, a panel for each factor: both settings of every encoder, with 95 % intervals."""
    factors, levels = (list(dict.fromkeys(table[name])) for name in ("factor", "labels"))
    ratios = [1 + table.loc[table["factor"] == factor, "encoder"].nunique() for factor in factors]
    size = (11, 3.3 * len(levels))
    figure, axes = plt.subplots(
        len(levels), len(factors), figsize=size, sharey="row", width_ratios=ratios, squeeze=False
    )
    for axis, (level, factor) in zip(axes.flat, itertools.product(levels, factors), strict=True):
        mine = table[(table["factor"] == factor) & (table["labels"] == level)]
        settings = list(dict.fromkeys(mine["setting"]))
        names = list(dict.fromkeys(mine["encoder"]))
        for row in mine.to_dict("records"):
            which = settings.index(row["setting"])
            place = names.index(row["encoder"]) + 0.38 * which - 0.19
            span = np.abs([[row["top1"] - row["low"]], [row["high"] - row["top1"]]])
            axis.bar(place, row["top1"], 0.36, color=COLOURS[row["encoder"]], alpha=1.0 if which else 0.45)
            axis.errorbar(place, row["top1"], span, color="#222222", linewidth=1)
        axis.set_xticks(range(len(names)), [LABELS[name] for name in names])
        axis.set_title(f"{factor}:\n{settings[0]} (pale)\n{settings[1]}", fontsize=10)
        axis.grid(axis="x", visible=False)
    for axis, level in zip(axes[:, 0], levels, strict=True):
        axis.set_ylabel(f"{level}, top-1 (%)")
    figure.suptitle("One factor at a time: what does it change?", x=0.01, ha="left", fontweight="bold")
    return figure
