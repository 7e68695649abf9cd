"""Models trained beside the zoo (controls, a world without themes, other seeds, longer, on larger pictures).

``python -m samantics controls DIR ...`` probes every trained model of those folders (as ``python -m samantics train
--out DIR`` leaves them) as notebook 01 probes the zoo, and writes their rows into
``assets/zoo/controls.csv``, their training curves into ``control_curves.csv``; models of the zoo's kinds and world are
measured at their own trades, too: ``control_quality.csv``. The weights of controls are not shipped: their hashes,
recipes and results are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from samantics.cache import atomic_path
from samantics.data import first_world as mojiworld
from samantics.data.classification import ClassificationData, mojiworld_data
from samantics.errors import StudyError
from samantics.metrics.intervals import Interval, across_trainings
from samantics.models import pocket
from samantics.models.encoder import zoo_encoder
from samantics.probing.features import encode_images
from samantics.probing.tables import Encoded, probe, row
from samantics.run import Run, start_run
from samantics.zoo.quality import quality_table

TABLE = pocket.ASSETS / "controls.csv"
CURVES = pocket.ASSETS / "control_curves.csv"
QUALITY = pocket.ASSETS / "control_quality.csv"
ARCHITECTURES = {name: name for name in pocket.NAMES} | {
    "supervised": "sam",
    "sam_from_dinov2": "sam",
    "simclr": "dinov2",
}
TRAINED = ["model", "theme_strength", "seed", "images", "image_size"]  # which training; images: all that it saw
KEYS = [*TRAINED, "labels"]
SHOWN = {"images": "seen", "held_out_loss": "objective", "probe_top1": "probe_top1", "knn_top1": "knn_top1"}


def training_of(name: str, folder: Path = pocket.ASSETS) -> dict[str, Any]:
    """Which training a model's card tells of: :data:`TRAINED`."""
    card = pocket.card(name, folder)
    recipe = {key: card["recipe"][key] for key in ("theme_strength", "seed", "images")}
    return {"model": name, **recipe, "image_size": card["architecture"]["image_size"]}


def control_model(name: str, folder: Path) -> nn.Module:
    """The trained model ``folder/<name>.safetensors``, verified against its card.

    Raises:
        StudyError: no such model; its file or card is missing, damaged or of another architecture.
    """
    if name not in ARCHITECTURES:
        raise StudyError(f"{folder / name}.json is of no model that is known: choose from {', '.join(ARCHITECTURES)}")
    pocket.verify(name, folder)
    config = dataclasses.replace(pocket.DEFAULT, image_size=training_of(name, folder)["image_size"])
    return pocket.filled(ARCHITECTURES[name], folder / f"{name}.safetensors", config)


def control_rows(run: Run, data: ClassificationData, name: str, folder: Path) -> list[dict[str, Any]]:
    """Linear probes of one model's headline features, a row for each label level, with what its card says."""
    card, training = pocket.card(name, folder), training_of(name, folder)
    size, sha256 = training["image_size"], card["sha256"]
    encoder = zoo_encoder(ARCHITECTURES[name], control_model(name, folder), sha256[:16], size)
    stores = {
        split: encode_images(encoder, images, [encoder.headline], data.hashes[split], folder=run.cache / "features")
        for split, images in data.splits.items()
    }
    encoded = Encoded(encoder.name, encoder.headline, encoder.layers, stores)
    rows = []
    for task in data.tasks.values():
        found = row(encoded, task, "linear", probe(encoded, task, seeds=run.scale.probing.probe_seeds))
        figures = {key: found[key] for key in ("labels", "top1", "top1_low", "top1_high", "seeds")}
        rows.append({**training, **figures, "sha256": sha256, "machine": card["machine"]})
    return rows


def control_curve(name: str, folder: Path) -> pd.DataFrame:
    """How one model learned: :data:`TRAINED`, pictures ``seen`` so far, ``objective`` (the loss on pictures never
    trained on), ``probe_top1, knn_top1`` (percent, drawing level)."""
    curve = pd.read_csv(folder / f"{name}.csv")[list(SHOWN)].rename(columns=SHOWN)
    return curve.assign(**training_of(name, folder))[[*TRAINED, *SHOWN.values()]]


def quality_rows(name: str, folder: Path) -> pd.DataFrame:
    """What :func:`quality.quality_table` measures of one trained model of the zoo's kinds, with :data:`TRAINED`.

    On as many pictures as notebook 00 measures the zoo on.
    """
    training = training_of(name, folder)
    world, model = mojiworld.World(training["image_size"]), control_model(name, folder)
    table = quality_table({name: model}, scenes=50, views=2, world=world).drop(columns="encoder")
    return table.assign(**training)[[*TRAINED, *table]]


def control_table() -> pd.DataFrame:
    """What :func:`main` has written: rows of :data:`KEYS`, ``top1, top1_low, top1_high`` (percent), ``seeds`` of the
    probe, ``sha256``, ``machine``; empty where nothing was measured."""
    return pd.read_csv(TABLE) if TABLE.is_file() else pd.DataFrame(columns=[*KEYS, "top1", "top1_low", "top1_high"])


def control_curves() -> pd.DataFrame:
    """The curves that :func:`main` has written, columns of :func:`control_curve`; empty where there are none."""
    return pd.read_csv(CURVES) if CURVES.is_file() else pd.DataFrame(columns=[*TRAINED, *SHOWN.values()])


def control_quality() -> pd.DataFrame:
    """The measurements that :func:`main` has written, columns of :func:`quality_rows`; empty where there are none."""
    columns = [*TRAINED, "measure", "value", "low", "high", "n"]
    return pd.read_csv(QUALITY) if QUALITY.is_file() else pd.DataFrame(columns=columns)


def other_zoos(table: pd.DataFrame) -> pd.DataFrame:
    """The rows (of any table) of models trained as those of the zoo were, but for another seed."""
    recipes = pd.DataFrame([training_of(name) for name in pocket.NAMES])
    same = [key for key in TRAINED if key != "seed"]
    alike = table.merge(recipes, on=same, suffixes=("", "_of_the_zoo"))
    return alike[alike["seed"] != alike["seed_of_the_zoo"]].drop(columns="seed_of_the_zoo")


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of :func:`control_table` that differ in the seed alone as one: their mean, with the noise of training.

    Columns ``top1, top1_low, top1_high`` (percent), ``trainings``, and ``seeds`` of the probe.
    """
    columns, rows = ["top1", "top1_low", "top1_high"], []
    same = [key for key in KEYS if key != "seed"]
    for values, alike in table.groupby(same, sort=False):
        mean = across_trainings([Interval(*one) for one in alike[columns].to_numpy(float)]).within(0, 100)
        found = dict(zip(columns, mean, strict=True))
        rows.append(
            dict(zip(same, values, strict=True)) | found | {"trainings": len(alike), "seeds": alike["seeds"].min()}
        )
    return pd.DataFrame(rows, columns=[*same, *columns, "trainings", "seeds"])


def _enter(path: Path, rows: pd.DataFrame, keys: list[str]) -> None:
    """Add rows to a table, each in place of an earlier one with the same keys."""
    known = [pd.read_csv(path)] if path.is_file() else []
    table = pd.concat([*known, rows]).drop_duplicates(keys, keep="last").sort_values(keys)
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def probed_data(run: Run, image_size: int) -> ClassificationData:
    """What notebook 01 probes at the scale ``pocket``, in pictures of that size."""
    settings = run.scale.probing
    return mojiworld_data(mojiworld.World(image_size), settings.views, settings.test_views)


def enter_controls(folders: Sequence[Path]) -> pd.DataFrame:
    """Probe the models of these folders and enter them into the shipped tables; their rows.

    Raises:
        StudyError: no model there.
    """
    run, entered = start_run("pocket", "controls"), []
    for card in [path for folder in folders for path in sorted(folder.glob("*.json"))]:
        name, folder = card.stem, card.parent
        training = training_of(name, folder)
        rows = control_rows(run, probed_data(run, training["image_size"]), name, folder)
        _enter(CURVES, control_curve(name, folder), [*TRAINED, "seen"])
        if name in pocket.NAMES and training["theme_strength"] == mojiworld.World().theme_strength:
            _enter(QUALITY, quality_rows(name, folder), [*TRAINED, "measure"])
        _enter(TABLE, pd.DataFrame(rows), KEYS)
        entered += rows
    if not entered:
        raise StudyError(f"{folders[0]} holds no model's card: train one with python -m samantics train")
    return pd.DataFrame(entered).drop(columns=["sha256", "machine"]).round(1)
