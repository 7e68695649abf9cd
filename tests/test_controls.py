"""Trained controls are probed as the zoo is, and entered in place of their earlier rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from samantics.cache import hash_file, write_json
from samantics.data import first_world as mojiworld
from samantics.data.classification import ClassificationData, Part, Task
from samantics.errors import StudyError
from samantics.metrics.intervals import Interval, across_trainings, bootstrap_mean
from samantics.models import pocket
from samantics.models.encoder import zoo_encoder
from samantics.probing.linear import linear_probe
from samantics.run import Run
from samantics.zoo import controls

VIEWS, DRAWINGS = 6, 10
QUALITY = ["encoder", "measure", "value", "low", "high", "n"]


def trained(folder: Path, name: str, theme_strength: float = 0.8, image_size: int = 128) -> Path:
    """A file and card as the training leaves them; the weights are SAM's, untrained."""
    model = pocket.build("sam", dataclasses.replace(pocket.DEFAULT, image_size=image_size))
    path = folder / f"{name}.safetensors"
    folder.mkdir(exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, path)
    recipe = {"theme_strength": theme_strength, "seed": 0, "images": 640}
    card = {"sha256": hash_file(path), "recipe": recipe, "architecture": {"image_size": image_size}, "machine": "none"}
    write_json(folder / f"{name}.json", card)
    curve = {"step": [0, 10], "images": [0, 640], "held_out_loss": [3.0, 2.0], "probe_top1": [1, 2], "knn_top1": [1, 3]}
    pd.DataFrame(curve).to_csv(folder / f"{name}.csv", index=False)
    return path


@pytest.fixture
def data() -> ClassificationData:
    world = mojiworld.World()
    views = mojiworld.render(lambda i: mojiworld.object_picture(world, "controls", i, i // VIEWS), range(60))
    labels, test = np.arange(60) // VIEWS, np.arange(60) % VIEWS > 3
    parts = [Part("all", labels[chosen], np.flatnonzero(chosen)) for chosen in (~test, test)]
    task = Task("drawing", tuple(map(str, range(DRAWINGS))), *parts)
    return ClassificationData("views", {"all": views.images}, {"all": "views"}, {"drawing": task}, {})


def test_a_control_is_probed_like_its_architecture(data: ClassificationData, pocket_run: Run, tmp_path: Path) -> None:
    trained(tmp_path / "out", "supervised")
    (row,) = controls.control_rows(pocket_run, data, "supervised", tmp_path / "out")
    encoder = zoo_encoder("sam", controls.control_model("supervised", tmp_path / "out"), "")
    task = data.tasks["drawing"]
    with torch.inference_mode():
        pixels = encoder.inputs([Image.fromarray(image) for image in data.splits["all"]])
        vectors = encoder.pooled(pixels, [("final", "mean")])["final", "mean"].numpy().astype(np.float16)
    parts = [(vectors[part.rows].astype(np.float32), part.labels) for part in (task.train, task.test)]
    expected = bootstrap_mean(100.0 * linear_probe(*parts[0], *parts[1], DRAWINGS, seeds=(0, 1, 2)).top1)
    assert (row["top1"], row["top1_low"], row["seeds"]) == pytest.approx((expected.value, expected.low, 3), abs=5)
    assert (row["model"], row["theme_strength"], row["images"]) == ("supervised", 0.8, 640)


def test_rows_take_the_place_of_earlier_ones(
    data: ClassificationData, pocket_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "TABLE", tmp_path / "controls.csv")
    monkeypatch.setattr(controls, "CURVES", tmp_path / "control_curves.csv")
    monkeypatch.setattr(controls, "probed_data", lambda _run, _image_size: data)
    assert controls.control_table().empty and controls.control_curves().empty
    trained(tmp_path / "one", "sam", theme_strength=0.0)
    trained(tmp_path / "two", "sam_from_dinov2")
    controls.enter_controls([tmp_path / "one", tmp_path / "two"])
    first = controls.control_table()
    assert first["model"].tolist() == ["sam", "sam_from_dinov2"]
    curves = controls.control_curves()
    assert curves.columns.tolist() == [*controls.TRAINED, "seen", "objective", "probe_top1", "knn_top1"]
    assert curves[["model", "images", "seen", "objective"]].values.tolist() == [
        ["sam", 640, 0, 3.0],
        ["sam", 640, 640, 2.0],
        ["sam_from_dinov2", 640, 0, 3.0],
        ["sam_from_dinov2", 640, 640, 2.0],
    ]
    controls.enter_controls([tmp_path / "one"])
    pd.testing.assert_frame_equal(controls.control_table(), first, check_dtype=False, rtol=0.2)
    pd.testing.assert_frame_equal(controls.control_curves(), curves, check_dtype=False)


def test_models_of_the_zoos_kinds_are_measured_at_their_trades_on_pictures_of_their_size(
    data: ClassificationData, pocket_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in ("TABLE", "CURVES", "QUALITY"):
        monkeypatch.setattr(controls, table, tmp_path / f"{table}.csv")
    sides = []

    def measured(models: dict[str, Any], scenes: int, views: int, world: mojiworld.World) -> pd.DataFrame:
        sides.append((world.image_size, models["sam"].image_encoder.img_size))
        return pd.DataFrame([("sam", "IoU (%), box", 70.0, 60.0, 80.0, 9)], columns=QUALITY)

    monkeypatch.setattr(controls, "probed_data", lambda _run, _image_size: data)
    monkeypatch.setattr(controls, "quality_table", measured)
    trained(tmp_path / "large", "sam", image_size=256)
    trained(tmp_path / "small", "sam")
    trained(tmp_path / "themeless", "sam", theme_strength=0.0)
    controls.enter_controls([tmp_path / name for name in ("large", "small", "themeless")])
    assert sides == [(256, 256), (128, 128)]
    assert controls.control_quality()[["image_size", "value"]].values.tolist() == [[128, 70.0], [256, 70.0]]
    assert controls.control_table()["image_size"].tolist() == [128, 128, 256]


def test_trainings_that_differ_in_the_seed_become_one_row() -> None:
    same = {"model": "sam", "theme_strength": 0.8, "images": 640, "image_size": 128, "labels": "drawing", "seeds": 3}
    found = [Interval(10.0, 9.0, 12.0), Interval(14.0, 13.0, 16.0)]
    rows = [same | {"seed": n, "top1": t, "top1_low": low, "top1_high": high} for n, (t, low, high) in enumerate(found)]
    other = rows[0] | {"images": 1280, "top1": 99.0, "top1_low": 98.0, "top1_high": 99.5}
    table = controls.over_seeds(pd.DataFrame([*rows, other]))
    value, low, high = across_trainings(found)
    assert table[["images", "trainings", "top1"]].values.tolist() == [[640, 2, value], [1280, 1, 99.0]]
    assert table.iloc[0][["top1_low", "top1_high"]].tolist() == [max(low, 0.0), high]
    assert low < 0  # of two trainings the interval leaves the percents


def test_other_zoos_differ_from_ours_in_the_seed_alone() -> None:
    ours = controls.training_of("sam")
    rows = [
        {"model": model, **{key: ours[key] for key in controls.TRAINED[1:]} | change}
        for model, change in (
            ("sam", {}),
            ("sam", {"seed": 1}),
            ("sam", {"seed": 1, "theme_strength": 0.0}),
            ("sam", {"seed": 1, "images": 640}),
            ("sam", {"seed": 1, "image_size": 256}),
            ("supervised", {"seed": 1}),
        )
    ]
    found = controls.other_zoos(pd.DataFrame(rows).assign(top1=range(6)))
    assert found[["model", "seed", "top1"]].values.tolist() == [["sam", 1, 1]]


def test_refusals(tmp_path: Path, pocket_run: Run) -> None:
    with pytest.raises(StudyError, match="no model that is known"):
        controls.control_model("other", tmp_path)
    with pytest.raises(StudyError, match="holds no model's card"):
        controls.enter_controls([tmp_path])
    path = trained(tmp_path / "out", "simclr")
    with pytest.raises(StudyError, match="does not fit the pocket dinov2"):
        controls.control_model("simclr", tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StudyError, match="is damaged"):
        controls.control_model("simclr", tmp_path / "out")
