"""Models trained beside the zoo (controls, a world without themes, other seeds), probed as notebook 01 probes the zoo.

``python -m samantics.controls DIR ...`` probes every trained model of those folders (as ``python -m
samantics.training --out DIR`` leaves them) and writes their rows into ``assets/zoo/controls.csv``, their training
curves into ``control_curves.csv``. The weights of controls are not shipped: their hashes, recipes and results are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from samantics import zoo
from samantics.classification import ClassificationData, scale_data
from samantics.encoders import Encoder, zoo_encoder
from samantics.errors import StudyError
from samantics.files import atomic_path
from samantics.probing import Encoded, probe, row
from samantics.provenance import Run, start_run
from samantics.store import encode_images

TABLE = zoo.ASSETS / "controls.csv"
CURVES = zoo.ASSETS / "control_curves.csv"
ARCHITECTURES = {name: name for name in zoo.NAMES} | {
    "supervised": "sam",
    "sam_from_dinov2": "sam",
    "simclr": "dinov2",
}
TRAINED = ["model", "theme_strength", "seed", "images"]  # which training; images: all that it saw
KEYS = [*TRAINED, "labels"]
SHOWN = {"images": "seen", "held_out_loss": "objective", "probe_top1": "probe_top1", "knn_top1": "knn_top1"}


def control_encoder(name: str, folder: Path) -> Encoder:
    """The trained model ``folder/<name>.safetensors``, verified against its card.

    Raises:
        StudyError: no such model; its file or card is missing, damaged or of another architecture.
    """
    if name not in ARCHITECTURES:
        raise StudyError(f"{folder / name}.json is of no model that is known: choose from {', '.join(ARCHITECTURES)}")
    sha256 = zoo.verify(name, folder)
    architecture = ARCHITECTURES[name]
    return zoo_encoder(architecture, zoo.filled(architecture, folder / f"{name}.safetensors"), sha256[:16])


def control_rows(run: Run, data: ClassificationData, name: str, folder: Path) -> list[dict[str, Any]]:
    """Linear probes of one model's headline features, a row for each label level, with what its card says."""
    encoder, card = control_encoder(name, folder), zoo.card(name, folder)
    stores = {
        split: encode_images(encoder, images, [encoder.headline], data.hashes[split], folder=run.cache / "features")
        for split, images in data.splits.items()
    }
    encoded = Encoded(encoder.name, encoder.headline, encoder.layers, stores)
    recipe = {key: card["recipe"][key] for key in ("theme_strength", "seed", "images")}
    rows = []
    for task in data.tasks.values():
        found = row(encoded, task, "linear", probe(encoded, task, seeds=run.scale.probing.probe_seeds))
        figures = {key: found[key] for key in ("labels", "top1", "top1_low", "top1_high", "seeds")}
        rows.append({"model": name, **recipe, **figures, "sha256": card["sha256"], "machine": card["machine"]})
    return rows


def control_curve(name: str, folder: Path) -> pd.DataFrame:
    """How one model learned: :data:`TRAINED`, pictures ``seen`` so far, ``objective`` (the loss on pictures never
    trained on), ``probe_top1, knn_top1`` (percent, drawing level)."""
    recipe = zoo.card(name, folder)["recipe"]
    curve = pd.read_csv(folder / f"{name}.csv")[list(SHOWN)].rename(columns=SHOWN)
    return curve.assign(model=name, **{key: recipe[key] for key in TRAINED[1:]})[[*TRAINED, *SHOWN.values()]]


def control_table() -> pd.DataFrame:
    """What :func:`main` has written: rows of :data:`KEYS`, ``top1, top1_low, top1_high`` (percent), ``seeds`` of the
    probe, ``sha256``, ``machine``; empty where nothing was measured."""
    return pd.read_csv(TABLE) if TABLE.is_file() else pd.DataFrame(columns=[*KEYS, "top1", "top1_low", "top1_high"])


def control_curves() -> pd.DataFrame:
    """The curves that :func:`main` has written, columns of :func:`control_curve`; empty where there are none."""
    return pd.read_csv(CURVES) if CURVES.is_file() else pd.DataFrame(columns=[*TRAINED, *SHOWN.values()])


def other_zoos(table: pd.DataFrame) -> pd.DataFrame:
    """The rows (of either table) of models trained as those of the zoo were, but for another seed."""
    recipes = pd.DataFrame([{"model": name, **zoo.card(name)["recipe"]} for name in zoo.NAMES])
    alike = table.merge(recipes[TRAINED], on=["model", "theme_strength", "images"], suffixes=("", "_of_the_zoo"))
    return alike[alike["seed"] != alike["seed_of_the_zoo"]].drop(columns="seed_of_the_zoo")


def _enter(path: Path, rows: pd.DataFrame, keys: list[str]) -> None:
    """Add rows to a table, each in place of an earlier one with the same keys."""
    known = [pd.read_csv(path)] if path.is_file() else []
    table = pd.concat([*known, rows]).drop_duplicates(keys, keep="last").sort_values(keys)
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def main(words: Sequence[str] | None = None) -> None:
    """Probe the models of the folders named and enter them into the tables."""
    parser = argparse.ArgumentParser(prog="python -m samantics.controls", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    folders: list[Path] = parser.parse_args(words).folders
    run = start_run("pocket", "controls")
    try:
        data, rows, curves = scale_data(run), [], []
        for folder in folders:
            for card in sorted(folder.glob("*.json")):
                rows += control_rows(run, data, card.stem, folder)
                curves.append(control_curve(card.stem, folder))
        if not rows:
            raise StudyError(f"{folders[0]} holds no model's card: train one with python -m samantics.training")
        _enter(TABLE, pd.DataFrame(rows), KEYS)
        _enter(CURVES, pd.concat(curves), [*TRAINED, "seen"])
    except StudyError as error:
        raise SystemExit(f"error: {error}") from error
    print(pd.DataFrame(rows).drop(columns=["sha256", "machine"]).round(1).to_string(index=False))


if __name__ == "__main__":
    main()
