"""Models trained beside the zoo: controls, other seeds, a world without themes, more pictures, more tokens.

Their weights are not shipped; their hashes, recipes and results are, in `assets/zoo/control*.csv`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from samantics.cache import atomic_path
from samantics.data import first_world as mojiworld
from samantics.data.classification import ClassificationData, mojiworld_data
from samantics.errors import StudyError
from samantics.metrics.intervals import bootstrap_mean
from samantics.models import pocket
from samantics.models.encoder import zoo_encoder
from samantics.probing.features import encode_images
from samantics.probing.linear import linear_probe
from samantics.run import Run, start_run
from samantics.zoo.objectives import entry
from samantics.zoo.quality import quality_table

TABLE = pocket.ASSETS / "controls.csv"
CURVES = pocket.ASSETS / "control_curves.csv"
QUALITY = pocket.ASSETS / "control_quality.csv"
TRAINED = ["model", "theme_strength", "seed", "images", "image_size"]  # which training; images: all that it saw
CHANGED = {"theme_strength": "no themes", "images": "more pictures", "image_size": "more tokens"}
CONTROLS = {  # a trained control: the encoder that it is compared with, the factor, that encoder's setting and its own
    "supervised": ("sam", "objective", "masks", "names of drawings"),
    "sam_from_dinov2": ("sam", "start", "from nothing", "from DINOv2's trunk"),
    "simclr": ("dinov2", "last quarter", "self-distillation", "contrastive"),
}
SHOWN = {"images": "seen", "held_out_loss": "objective", "probe_top1": "probe_top1", "knn_top1": "knn_top1"}


def training_of(name: str, folder: Path = pocket.ASSETS) -> dict[str, Any]:
    """Which training a model's card tells of: `TRAINED`."""
    card = pocket.card(name, folder)
    recipe = {key: card["recipe"][key] for key in ("theme_strength", "seed", "images")}
    return {"model": name, **recipe, "image_size": card["architecture"]["image_size"]}


def with_training(table: pd.DataFrame) -> pd.DataFrame:
    """Say how each model was trained beside the zoo's own, and leave out what differs from it in several things.

    Args:
        table: any with the columns `TRAINED`.

    Returns:
        Its rows with a column `training`: `shipped`, `other seeds`, `no themes`, `more pictures` (the longest
        training of each model), `more tokens` or `control` (one of `CONTROLS`).
    """
    zoo = {name: training_of(name) for name in pocket.NAMES}

    def kind(row: dict[str, Any]) -> str:
        usual = zoo[CONTROLS[row["model"]][0] if row["model"] in CONTROLS else row["model"]]
        changed = [key for key in CHANGED if row[key] != usual[key]]
        if row["model"] in CONTROLS:
            return "" if changed else "control"
        if not changed:
            return "shipped" if row["seed"] == usual["seed"] else "other seeds"
        less = changed[0] != "theme_strength" and row[changed[0]] < usual[changed[0]]
        return "" if len(changed) > 1 or less else CHANGED[changed[0]]

    known = table.assign(training=[kind(row) for row in table[TRAINED].to_dict("records")])
    most = known.groupby(["model", "training"])["images"].transform("max")
    shorter = (known["training"] == "more pictures") & (known["images"] < most)
    return known[(known["training"] != "") & ~shorter]


def other_zoos(table: pd.DataFrame) -> pd.DataFrame:
    """The rows (of any table with `TRAINED`) of models trained as those of the zoo were, but for another seed."""
    known = with_training(table)
    return known[known["training"] == "other seeds"].drop(columns="training")


def control_table() -> pd.DataFrame:
    """The probes of all controls: `TRAINED`, `labels`, `top1` (percent) with its interval, `seeds`, their origin."""
    return pd.read_csv(TABLE)


# ----------------------------------------------------------------------------------------------- entering a training


def control_model(name: str, folder: Path) -> nn.Module:
    """The trained model `folder/<name>.safetensors`, verified against its card.

    Raises:
        StudyError: no such model; its file or card is missing, damaged or of another architecture.
    """
    architecture = entry(name).architecture
    pocket.verify(name, folder)
    config = dataclasses.replace(pocket.DEFAULT, image_size=training_of(name, folder)["image_size"])
    return pocket.filled(architecture, folder / f"{name}.safetensors", config)


def control_rows(run: Run, data: ClassificationData, name: str, folder: Path) -> pd.DataFrame:
    """Linear probes of one model's headline features, a row for each label level, with what its card says."""
    card, training = pocket.card(name, folder), training_of(name, folder)
    model, seeds = control_model(name, folder), run.scale.probing.probe_seeds
    encoder = zoo_encoder(entry(name).architecture, model, card["sha256"][:16], training["image_size"])
    images, key = data.splits["all"], data.hashes["all"]
    store = encode_images(encoder, images, [encoder.headline], key, folder=run.cache / "features")
    vectors, rows = store.read(encoder.headline).astype(np.float32), []
    for task in data.tasks.values():
        train_x, test_x = vectors[task.train.rows], vectors[task.test.rows]
        train_y, test_y, classes = task.train.labels, task.test.labels, len(task.classes)
        found = linear_probe(train_x, train_y, test_x, test_y, classes, seeds=range(seeds), groups=task.groups)
        top1 = dict(zip(("top1", "top1_low", "top1_high"), bootstrap_mean(100.0 * found.top1), strict=True))
        origin = {"seeds": seeds, "sha256": card["sha256"], "machine": card["machine"]}
        rows.append(training | {"labels": task.name} | top1 | origin)
    return pd.DataFrame(rows)


def control_curve(name: str, folder: Path = pocket.ASSETS) -> pd.DataFrame:
    """How one model learned: `TRAINED`, pictures `seen` so far, `objective` (the loss on pictures never trained
    on), `probe_top1, knn_top1` (percent, drawing level).

    Raises:
        StudyError: it has no curve or no card.
    """
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise StudyError(f"{path} is missing: restore it with git checkout")
    curve = pd.read_csv(path)[list(SHOWN)].rename(columns=SHOWN)
    return curve.assign(**training_of(name, folder))[[*TRAINED, *SHOWN.values()]]


def quality_rows(name: str, folder: Path) -> pd.DataFrame:
    """What `quality_table` measures of one trained model, with `TRAINED`, on as many pictures as notebook 00 does."""
    training = training_of(name, folder)
    world, model = mojiworld.World(training["image_size"]), control_model(name, folder)
    table = quality_table({name: model}, scenes=50, views=2, world=world).drop(columns="encoder")
    return table.assign(**training)[[*TRAINED, *table]]


def enter(path: Path, rows: pd.DataFrame, keys: list[str]) -> None:
    """Add rows to a table, each in place of an earlier one with the same keys."""
    known = [pd.read_csv(path)] if path.is_file() else []
    table = pd.concat([*known, rows]).drop_duplicates(keys, keep="last").sort_values(keys)
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def probed_data(run: Run, image_size: int) -> ClassificationData:
    """What notebook 01 probes at the scale `pocket`, in pictures of that size."""
    settings = run.scale.probing
    return mojiworld_data(mojiworld.World(image_size), settings.views, settings.test_views)


def enter_controls(folders: Sequence[Path]) -> pd.DataFrame:
    """Probe every trained model of those folders as notebook 01 probes the zoo; enter probes, curves and quality.

    Quality is measured of the zoo's own kinds and world. This is `python -m samantics controls`.

    Raises:
        StudyError: no model's card in the folders; a model that cannot be read.
    """
    run, entered = start_run("pocket", "controls"), []
    for card in [path for folder in folders for path in sorted(folder.glob("*.json"))]:
        name, folder, training = card.stem, card.parent, training_of(card.stem, card.parent)
        rows = control_rows(run, probed_data(run, training["image_size"]), name, folder)
        enter(CURVES, control_curve(name, folder), [*TRAINED, "seen"])
        if name in pocket.NAMES and training["theme_strength"] == mojiworld.World().theme_strength:
            enter(QUALITY, quality_rows(name, folder), [*TRAINED, "measure"])
        enter(TABLE, rows, [*TRAINED, "labels"])
        entered.append(rows)
    if not entered:
        raise StudyError(f"{folders[0]} holds no model's card: train one with python -m samantics train")
    return pd.concat(entered).drop(columns=["sha256", "machine"]).round(1)
