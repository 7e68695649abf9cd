"""How the zoo's models learned, and what one changed factor does to them: the tables of appendix A1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from samantics.errors import StudyError
from samantics.metrics.intervals import Interval, across_trainings
from samantics.models import pocket
from samantics.zoo import controls
from samantics.zoo.objectives import build_objective

CURVES = ["encoder", "seed", "images", "objective", "probe_top1", "knn_top1", "in_all", "training"]
LAST_PART = 1 / 3  # of the training; where the objective changes little in it, it has converged
FACTORS: dict[
    str, tuple[str, Callable[[Any], str]]
] = {  # of `controls.CHANGED`: its name, and how its settings are written
    "theme_strength": ("world", lambda strength: "themes" if strength else "no themes"),
    "images": ("pictures", lambda images: f"{images:,}"),
    "image_size": ("tokens", lambda side: f"{side // pocket.DEFAULT.patch_size} x {side // pocket.DEFAULT.patch_size}"),
}
ABLATION = ["encoder", "factor", "setting", "labels", "top1", "low", "high", "seeds"]


def zoo_curves() -> pd.DataFrame:
    """What trainings wrote down, a row for each measuring point: of the zoo, of other seeds, of longer ones ...

    Returns:
        `encoder, seed, images` (seen so far), `objective` (the loss on pictures never trained on), `probe_top1`,
        `knn_top1` (percent, drawing level), `in_all` (pictures of the whole schedule), `training`.

    Raises:
        StudyError: a model has no curve or no card.
    """
    own = [controls.control_curve(name) for name in pocket.NAMES]
    table = controls.with_training(pd.concat([*own, pd.read_csv(controls.CURVES)], ignore_index=True))
    names = {"model": "encoder", "seen": "images", "images": "in_all"}
    return table.rename(columns=names)[CURVES]


def in_second_objective(curve: pd.DataFrame) -> pd.Series:
    """Which rows of one training's curve lie in the second of two objectives (DINOv2's; the others have but one)."""
    changes_at = build_objective(curve["encoder"].iloc[0]).changes_at
    return (curve["images"] >= changes_at * curve["images"].max()) & (changes_at < 1)


def last_third(curves: pd.DataFrame) -> pd.DataFrame:
    """What the last third of each model's training still changed: has it converged?

    Args:
        curves: of `zoo_curves`.

    Returns:
        `encoder, objective_change` (percent of its value at the end), `probe_change` (points), counted from the
        measuring point nearest to the third's begin, of DINOv2 in the second objective only; the mean over seeds.
    """
    rows = []
    for (name, _), curve in curves.groupby(["encoder", "seed"], sort=False):
        late = in_second_objective(curve)
        part = curve[late] if late.any() else curve
        begins = (1 - LAST_PART) * curve["images"].max()
        first, final = part.loc[(part["images"] - begins).abs().idxmin()], part.iloc[-1]
        change = 100 * (final["objective"] - first["objective"]) / abs(final["objective"])
        rows.append((name, change, final["probe_top1"] - first["probe_top1"]))
    table = pd.DataFrame(rows, columns=["encoder", "objective_change", "probe_change"])
    return table.groupby("encoder", sort=False).mean().reset_index()


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Probes of trainings that differ in the seed alone as one row: their mean, with the noise of training.

    Args:
        table: rows of `controls.csv` with the column of `with_training`.

    Returns:
        The columns that they share, `top1, top1_low, top1_high` (percent), `trainings`, and `seeds` of the probe.
    """
    columns, rows = ["top1", "top1_low", "top1_high"], []
    same = [key for key in (*controls.TRAINED, "training", "labels") if key != "seed"]
    for values, alike in table.groupby(same, sort=False):
        mean = across_trainings([Interval(*one) for one in alike[columns].to_numpy(float)]).within(0, 100)
        counts = {"trainings": len(alike), "seeds": alike["seeds"].min()}
        rows.append(dict(zip(same, values, strict=True)) | dict(zip(columns, mean, strict=True)) | counts)
    return pd.DataFrame(rows, columns=[*same, *columns, "trainings", "seeds"])


def ablation_table(figures: Path, trained: pd.DataFrame) -> pd.DataFrame:
    """Linear probes with one factor changed at a time: two settings of each factor and encoder.

    From the tables of notebook 01 `training` (SAM's architecture untrained against trained), `layer` (the last trunk
    block against the output) and `pooling` (mean over the image against mean over the object). From trained models
    `controls.CONTROLS` and `controls.CHANGED`, against the zoo's rows in `01_zoos`; both hold the noise of training.

    Args:
        figures: folder of the tables of notebook 01.
        trained: `controls.csv`.

    Returns:
        `encoder, factor, setting, labels, top1, low, high` (percent), `seeds` of the probe.

    Raises:
        StudyError: notebook 01 was not run at this scale.
    """
    zoo, layers, pooling = (_read(figures / f"01_{name}.csv") for name in ("zoos", "layers", "pooling"))
    rows_of = dict(list(zoo.groupby("encoder")))
    parts = [("training", "untrained", "sam", rows_of["random"]), ("training", "trained", "sam", rows_of["sam"])]
    for factor, encoder, usual, other, rows in _trained_pairs(over_seeds(controls.with_training(trained))):
        parts += [(factor, usual, encoder, rows_of[encoder]), (factor, other, encoder, rows)]
    for (encoder, _), rows in layers[layers["encoder"].isin(["sam", "sam2"])].groupby(["encoder", "labels"]):
        parts += [("layer", "last trunk block", encoder, rows.iloc[-2:-1]), ("layer", "neck", encoder, rows.iloc[-1:])]
    for (encoder, kind), rows in pooling[pooling["pooling"] != "cls"].groupby(["encoder", "pooling"], sort=False):
        parts.append(("pooling", {"mean": "image"}.get(kind, kind), encoder, rows))
    tables = [rows.assign(factor=factor, setting=setting, encoder=name) for factor, setting, name, rows in parts]
    names = {"top1_low": "low", "top1_high": "high"}
    return pd.concat(tables, ignore_index=True).rename(columns=names)[ABLATION]


def _trained_pairs(others: pd.DataFrame) -> Iterator[tuple[str, str, str, str, pd.DataFrame]]:
    """Factor, encoder, its usual setting, the other one, and the rows of `over_seeds` that were trained with it."""
    for model, (encoder, factor, usual, other) in controls.CONTROLS.items():
        if len(rows := others[others["model"] == model]):
            yield factor, encoder, usual, other, rows
    for column, kind in controls.CHANGED.items():
        for name in pocket.NAMES:
            if len(rows := others[(others["model"] == name) & (others["training"] == kind)]):
                settings = [controls.training_of(name)[column], rows[column].iloc[0]]
                yield FACTORS[column][0], name, *(FACTORS[column][1](value) for value in settings), rows


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise StudyError(f"{path} is missing: run notebook 01 first (./run_all.sh --only 01)")
    return pd.read_csv(path)
