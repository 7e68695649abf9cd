"""The pocket zoo as an experiment of its own: how its models learned, and at what cost (appendix notebook A1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch.utils.flop_counter import FlopCounterMode

from samantics.data import first_world as mojiworld
from samantics.errors import StudyError
from samantics.models import pocket
from samantics.plots import COLOURS, LABELS, headline
from samantics.zoo.controls import TRAINED, control_curve, other_zoos, over_seeds, training_of
from samantics.zoo.objectives import Batch, SelfDistillation, build_objective

CURVES = ["encoder", "seed", "images", "objective", "probe_top1", "knn_top1"]
LAST_PART = 1 / 3  # of the training; where the objective changes little in it, it has flattened


def training_curves(names: Sequence[str] = pocket.NAMES, folder: Path = pocket.ASSETS) -> pd.DataFrame:
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
        parts.append(control_curve(name, folder))
    return _shown(pd.concat(parts, ignore_index=True))


def zoo_curves(others: pd.DataFrame) -> pd.DataFrame:
    """:func:`training_curves` of the zoo, and of zoos trained from other seeds.

    Args:
        others: :func:`controls.other_zoos` of their curves.
    """
    return pd.concat([training_curves(), _shown(others)], ignore_index=True)


def _shown(curves: pd.DataFrame) -> pd.DataFrame:
    """Rows of :func:`controls.control_curve` under the names of the figure's table."""
    return curves.drop(columns="images").rename(columns={"model": "encoder", "seen": "images"})[CURVES]


def second_stage(name: str, curve: pd.DataFrame) -> pd.Series:
    """Which rows of a model's curve lie in the second of two objectives (DINOv2's; the others have but one)."""
    objective = build_objective(name)
    warmup = objective.warmup if isinstance(objective, SelfDistillation) else 0.0
    return curve["images"] >= (warmup or 2.0) * curve["images"].max()


def rest_table(curves: pd.DataFrame) -> pd.DataFrame:
    """``encoder, objective_change, probe_change``: what the last third of the training still changed.

    Counted from the measuring point nearest to its begin, of DINOv2 in the second objective only. The objective in
    percent of its value at the end, the probe in points; of models trained from several seeds the mean.
    """
    rows = []
    for (name, _), curve in curves.groupby(["encoder", "seed"], sort=False):
        stage = second_stage(str(name), curve)
        kept = curve[stage] if stage.any() else curve
        begins = (1 - LAST_PART) * curve["images"].max()
        first, final = kept.loc[(kept["images"] - begins).abs().idxmin()], kept.iloc[-1]
        change = 100 * (final["objective"] - first["objective"]) / abs(final["objective"])
        rows.append((name, change, final["probe_top1"] - first["probe_top1"]))
    table = pd.DataFrame(rows, columns=["encoder", "objective_change", "probe_change"])
    return table.groupby("encoder", sort=False).mean().reset_index()


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
    """Objective (relative to its start), linear probe and kNN against images seen, and the probe against compute.

    A line for each training: models trained from several seeds have several of one colour.
    """
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.8))
    for (name, _), curve in curves.groupby(["encoder", "seed"], sort=False):
        colour = COLOURS[str(name)]
        late = second_stage(str(name), curve)
        for stage in (~late, late):
            mine = curve[stage]
            if len(mine):
                axes[0].plot(mine["images"] / 1000, mine["objective"] / mine["objective"].iloc[0], "o-", ms=3, c=colour)
        axes[1].plot(curve["images"] / 1000, curve["probe_top1"], "o-", ms=3, color=colour)
        axes[2].plot(curve["images"] / 1000, curve["knn_top1"], "o-", ms=3, color=colour)
        axes[3].plot(curve["images"] * flops[str(name)] / 1e15, curve["probe_top1"], "o-", ms=3, color=colour)
    axes[0].set(title="objective, unseen\npictures", xlabel="thousand images", ylabel="loss / loss at the start")
    axes[1].set(title="linear probe,\ndrawing", xlabel="thousand images", ylabel="top-1 (%)")
    axes[2].set(title="nearest neighbours,\ndrawing", xlabel="thousand images", ylabel="top-1 (%)")
    axes[3].set(title="linear probe,\nby compute", xlabel="PFLOP of training", ylabel="top-1 (%)")
    for axis in axes:
        axis.set_ylim(bottom=0)
    shown = curves["encoder"].unique()
    marks = [Line2D([], [], marker="o", ms=3, color=COLOURS[name], label=LABELS[name]) for name in shown]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(shown))
    rest = rest_table(curves)
    spans = [f"{rest[column].abs().min():.1f} to {rest[column].abs().max():.1f}" for column in rest.columns[1:]]
    headline(figure, f"The last third of training changed objectives by {spans[0]} %, probes by {spans[1]} points")
    return figure


def longer_curves(controls: pd.DataFrame) -> pd.DataFrame:
    """The zoo's own curves and those of its models trained on more pictures: :data:`CURVES` and ``in_all``, the
    pictures of the whole schedule.

    Args:
        controls: :func:`controls.control_curves`.
    """
    shipped = [control_curve(name, pocket.ASSETS) for name in pocket.NAMES]
    parts = shipped + [_longest(controls, name) for name in pocket.NAMES]
    curves = pd.concat(parts, ignore_index=True)
    return _shown(curves).assign(in_all=curves["images"])


def longer_figure(curves: pd.DataFrame) -> Figure:
    """Linear probe and objective against images seen: the zoo's schedule (dashed) and longer ones (solid).

    DINOv2 changes its objective on the way: its line is broken there.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    gained = []
    for name, mine in curves.groupby("encoder", sort=False):
        colour = COLOURS[str(name)]
        schedules = [one for _, one in mine.groupby("in_all")]
        for curve, style in zip(schedules, ("--", "-"), strict=False):
            axes[0].plot(curve["images"] / 1000, curve["probe_top1"], style, marker="o", ms=3, color=colour)
            late = second_stage(str(name), curve)
            for stage in (curve[~late], curve[late]):
                axes[1].plot(stage["images"] / 1000, stage["objective"], style, marker="o", ms=3, color=colour)
        if len(schedules) > 1:
            change = schedules[-1]["probe_top1"].iloc[-1] - schedules[0]["probe_top1"].iloc[-1]
            gained.append(f"{LABELS[str(name)]} {change:+.0f}")
    axes[0].set(title="linear probe, drawing", xlabel="thousand images", ylabel="top-1 (%)", ylim=(0, 100))
    axes[1].set(title="objective, unseen pictures", xlabel="thousand images", ylabel="loss", yscale="log")
    axes[1].set_yticks(losses := [0.5, 1, 2, 5, 10], [f"{loss:g}" for loss in losses])
    axes[1].minorticks_off()
    shown = list(dict.fromkeys(curves["encoder"]))
    marks = [Line2D([], [], color=COLOURS[name], label=LABELS[name]) for name in shown]
    marks += [
        Line2D([], [], color="#444444", ls=style, label=label) for style, label in (("--", "shipped"), ("-", "longer"))
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))
    headline(figure, f"Longer training moves the linear probe: {', '.join(gained) or 'not measured'} (points)")
    return figure


def aims_elsewhere(aims: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """The aims of the zoo, and the same measures of its models trained otherwise.

    Args:
        aims: :func:`findings.zoo_aims`.
        quality: :func:`controls.control_quality`.

    Returns:
        ``encoder, measure, aim, training, trainings, value, lowest, highest``; ``training`` is ``shipped``,
        ``other seeds``, ``more pictures`` or ``more tokens``, and ``value`` their mean.
    """
    rows = []
    for aim in aims.to_dict("records"):
        name = aim["encoder"]
        measured = quality[quality["measure"] == aim["measure"]]
        values = {
            "shipped": pd.Series([aim["value"]]),
            "other seeds": other_zoos(measured[measured["model"] == name])["value"],
            "more pictures": _longest(measured, name)["value"],
            "more tokens": _finer(measured, name)["value"],
        }
        for kind, found in values.items():
            if len(found):
                spread = {"trainings": len(found), "value": found.mean(), "lowest": found.min(), "highest": found.max()}
                rows.append({key: aim[key] for key in ("encoder", "measure", "aim")} | {"training": kind, **spread})
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------- ablations

ABLATION = ["encoder", "factor", "setting", "labels", "top1", "low", "high", "seeds"]
CONTROLS = {  # a trained control: the encoder that it is compared with, the factor, that encoder's setting and its own
    "supervised": ("sam", "objective", "masks", "names of drawings"),
    "sam_from_dinov2": ("sam", "start", "from nothing", "from DINOv2's trunk"),
    "simclr": ("dinov2", "last quarter", "self-distillation", "contrastive"),
}
RECIPE = [key for key in TRAINED if key not in ("model", "seed")]


def ablation_table(figures: Path, controls: pd.DataFrame) -> pd.DataFrame:
    """One factor at a time: :data:`ABLATION`, linear probes, percent; two settings of each factor and encoder.

    From the tables of notebook 01 ``training`` (SAM's architecture untrained against trained), ``layer`` (the last
    trunk block against the output) and ``pooling`` (mean over the image against mean over the object). From trained
    controls (:func:`controls.control_table`) :data:`CONTROLS`, and ``world``, ``pictures`` and ``tokens``: the zoo's
    own models, trained without themes, on more pictures, and on larger ones. They differ from the zoo in nothing else
    but the seed, and stand against its rows in ``01_zoos``; both hold the noise of training where there are several.

    Raises:
        StudyError: notebook 01 was not run at this scale.
    """
    linear, layers, pooling = (_read(figures / f"01_{name}.csv") for name in ("zoos", "layers", "pooling"))
    rows = _rows(linear[linear["encoder"] == "random"].assign(encoder="sam"), "training", "untrained")
    rows += _rows(linear[linear["encoder"] == "sam"], "training", "trained")
    for encoder, factor, setting, other, found in _trained(over_seeds(controls)):
        if len(found):
            rows += _rows(linear[linear["encoder"] == encoder], factor, setting)
            rows += _rows(found.assign(encoder=encoder), factor, other)
    for _, mine in layers[layers["encoder"].isin(["sam", "sam2"])].groupby(["encoder", "labels"], sort=False):
        rows += _rows(mine.iloc[-2:-1], "layer", "last trunk block") + _rows(mine.iloc[-1:], "layer", "neck")
    for setting, name in (("mean", "image"), ("object", "object")):
        rows += _rows(pooling[pooling["pooling"] == setting], "pooling", name)
    return pd.DataFrame(rows, columns=ABLATION)


def _trained(controls: pd.DataFrame) -> Iterator[tuple[str, str, str, str, pd.DataFrame]]:
    """Encoder, factor, its setting, the other one, and the rows of the controls that have it (none: not trained)."""
    for model, (encoder, factor, setting, other) in CONTROLS.items():
        yield encoder, factor, setting, other, _unlike_the_zoo(controls, model, encoder, None)
    for name in pocket.NAMES:
        yield name, "world", "themes", "no themes", _unlike_the_zoo(controls, name, name, "theme_strength")
    for name in pocket.NAMES:
        usual, longest = training_of(name)["images"], _longest(controls, name)
        yield name, "pictures", f"{usual:,}", f"{longest['images'].max():,.0f}", longest
    grid = pocket.DEFAULT.grid
    for name in pocket.NAMES:
        yield name, "tokens", f"{grid} x {grid}", f"{2 * grid} x {2 * grid}", _finer(controls, name)


def _longest(controls: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows of the longest training of one of the zoo's models, on more pictures than the zoo's; none where none is."""
    more = _unlike_the_zoo(controls, name, name, "images")
    more = more[more["images"] > training_of(name)["images"]]
    return more[more["images"] == more["images"].max()]


def _finer(controls: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows of one of the zoo's models trained on pictures of twice the side, with tokens of the same size."""
    larger = _unlike_the_zoo(controls, name, name, "image_size")
    return larger[larger["image_size"] == 2 * pocket.DEFAULT.image_size]


def _unlike_the_zoo(controls: pd.DataFrame, model: str, encoder: str, factor: str | None) -> pd.DataFrame:
    """Rows of ``model`` whose recipe is that of the zoo's ``encoder``, but for one factor (None: the very same)."""
    usual, mine = training_of(encoder), controls[controls["model"] == model]
    for key in RECIPE:
        mine = mine[(mine[key] == usual[key]) != (key == factor)]
    return mine


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise StudyError(f"{path} is missing: run notebook 01 first (./run_all.sh --only 01)")
    return pd.read_csv(path)


def _rows(table: pd.DataFrame, factor: str, setting: str) -> list[tuple[object, ...]]:
    columns = ["labels", "top1", "top1_low", "top1_high", "seeds"]
    return [(r["encoder"], factor, setting, *(r[name] for name in columns)) for r in table.to_dict("records")]


def ablation_pairs(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """``(factor, encoder, rows)`` of every comparison, its first setting's rows before its second's."""
    found = table.groupby(["factor", "encoder"], sort=False)
    return [(str(factor), str(encoder), rows) for (factor, encoder), rows in found if rows["setting"].nunique() == 2]


def ablation_figure(table: pd.DataFrame) -> Figure:
    """A line for each comparison, a panel for each label level: both settings with their 95 % intervals."""
    pairs, levels = ablation_pairs(table), list(dict.fromkeys(table["labels"]))
    figure, axes = plt.subplots(1, len(levels), figsize=(11, 1.6 + 0.42 * len(pairs)), sharey=True, squeeze=False)
    names = []
    for line, (factor, encoder, rows) in enumerate(pairs):
        settings = list(dict.fromkeys(rows["setting"]))
        names.append(f"{factor}, {LABELS[encoder]}:\n{settings[0]} → {settings[1]}")
        for axis, level in zip(axes[0], levels, strict=True):
            mine = rows[rows["labels"] == level]
            axis.plot(mine["top1"], [line] * len(mine), color="#C8C8C8", linewidth=3, zorder=1)
            for row in mine.to_dict("records"):
                second = row["setting"] == settings[1]
                span = np.abs([[row["top1"] - row["low"]], [row["high"] - row["top1"]]])
                place, fill = line + (0.12 if second else -0.12), COLOURS[encoder] if second else "white"
                axis.errorbar(row["top1"], place, xerr=span, fmt="o", ms=6, color=COLOURS[encoder], mfc=fill, lw=1.2)
    for axis, level in zip(axes[0], levels, strict=True):
        axis.set(title=level, xlabel="linear probe, top-1 (%); open: first, filled: second", xlim=(0, None))
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0, 0].invert_yaxis()
    moved = [
        f"{factor} ({LABELS[encoder]})" for factor, encoder, rows in pairs if apart(rows[rows["labels"] == levels[-1]])
    ]
    headline(
        figure,
        f"What moves the {levels[-1]} level: {', '.join(moved) or 'nothing'}; {len(pairs) - len(moved)} not apart",
    )
    return figure


def apart(pair: pd.DataFrame) -> bool:
    """Whether the intervals of two rows do not overlap."""
    return bool(pair["low"].max() > pair["high"].min())
