"""Trained controls are probed as the zoo is, and entered in place of their earlier rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from samantics.cache import hash_file, write_json
from samantics.data import first_world as mojiworld
from samantics.data.classification import ClassificationData, Part, Task
from samantics.errors import StudyError
from samantics.metrics.intervals import bootstrap_mean
from samantics.models import pocket
from samantics.probing.linear import linear_probe
from samantics.run import Run
from samantics.zoo import controls
from samantics.zoo.quality import pixels_of

VIEWS, DRAWINGS = 6, 10


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


@pytest.fixture
def tables(data: ClassificationData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Where the tables are entered, in place of the shipped ones; probes see few pictures."""
    paths = {name: tmp_path / f"{name}.csv" for name in ("TABLE", "CURVES", "QUALITY")}
    for name, path in paths.items():
        monkeypatch.setattr(controls, name, path)
    monkeypatch.setattr(controls, "probed_data", lambda _run, _image_size: data)
    return paths


def test_a_control_is_probed_like_its_architecture(data: ClassificationData, pocket_run: Run, tmp_path: Path) -> None:
    trained(tmp_path / "out", "supervised")
    row = controls.control_rows(pocket_run, data, "supervised", tmp_path / "out").iloc[0]
    model, task = controls.control_model("supervised", tmp_path / "out"), data.tasks["drawing"]
    with torch.inference_mode():
        maps = model.image_encoder(pixels_of(data.splits["all"]))
    vectors = maps.mean((2, 3)).numpy().astype(np.float16).astype(np.float32)
    (train_x, train_y), (test_x, test_y) = [(vectors[part.rows], part.labels) for part in (task.train, task.test)]
    top1 = linear_probe(train_x, train_y, test_x, test_y, DRAWINGS, seeds=(0, 1, 2)).top1
    expected = bootstrap_mean(100.0 * top1)
    near = pytest.approx([expected.value, expected.low], abs=5)  # kernels' rounding may turn one of twenty images
    assert row[["top1", "top1_low"]].tolist() == near
    assert row[["model", "theme_strength", "images", "seeds"]].tolist() == ["supervised", 0.8, 640, 3]


def test_rows_take_the_place_of_earlier_ones(pocket_run: Run, tables: dict[str, Path], tmp_path: Path) -> None:
    trained(tmp_path / "one", "sam", theme_strength=0.0)
    trained(tmp_path / "two", "sam_from_dinov2")
    controls.enter_controls([tmp_path / "one", tmp_path / "two"])
    first, curves = pd.read_csv(tables["TABLE"]), pd.read_csv(tables["CURVES"])
    assert first["model"].tolist() == ["sam", "sam_from_dinov2"]
    assert curves.columns.tolist() == [*controls.TRAINED, "seen", "objective", "probe_top1", "knn_top1"]
    lines = [[640, 0, 3.0], [640, 640, 2.0]]
    expected = [[name, *line] for name in ("sam", "sam_from_dinov2") for line in lines]
    assert curves[["model", "images", "seen", "objective"]].values.tolist() == expected
    controls.enter_controls([tmp_path / "one"])
    pd.testing.assert_frame_equal(pd.read_csv(tables["TABLE"]), first, check_dtype=False, rtol=0.2)
    pd.testing.assert_frame_equal(pd.read_csv(tables["CURVES"]), curves)


def test_models_of_the_zoos_kinds_are_measured_on_pictures_of_their_size(
    pocket_run: Run, tables: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = []

    def measured(models: dict[str, Any], scenes: int, views: int, world: mojiworld.World) -> pd.DataFrame:
        sides.append((world.image_size, models["sam"].image_encoder.img_size))
        row = {"encoder": "sam", "measure": "IoU (%), box", "value": 70.0, "low": 60.0, "high": 80.0, "n": 9}
        return pd.DataFrame([row])

    monkeypatch.setattr(controls, "quality_table", measured)
    trained(tmp_path / "large", "sam", image_size=256)
    trained(tmp_path / "small", "sam")
    trained(tmp_path / "themeless", "sam", theme_strength=0.0)
    controls.enter_controls([tmp_path / name for name in ("large", "small", "themeless")])
    assert sides == [(256, 256), (128, 128)]
    assert pd.read_csv(tables["QUALITY"])[["image_size", "value"]].values.tolist() == [[128, 70.0], [256, 70.0]]
    assert pd.read_csv(tables["TABLE"])["image_size"].tolist() == [128, 128, 256]


def test_other_zoos_differ_from_ours_in_the_seed_alone() -> None:
    ours = controls.training_of("sam")
    changes = [{}, {"seed": 1}, {"seed": 1, "theme_strength": 0.0}, {"seed": 1, "images": 640}]
    changes += [{"seed": 1, "image_size": 256}, {"seed": 1, "model": "supervised"}]
    found = controls.other_zoos(pd.DataFrame([ours | change for change in changes]).assign(top1=range(6)))
    assert found[["model", "seed", "top1"]].values.tolist() == [["sam", 1, 1]]


def test_refusals(tmp_path: Path, pocket_run: Run) -> None:
    with pytest.raises(StudyError, match="no objective is called 'other'"):
        controls.control_model("other", tmp_path)
    with pytest.raises(StudyError, match="holds no model's card"):
        controls.enter_controls([tmp_path])
    with pytest.raises(StudyError, match=r"clip\.csv is missing"):
        controls.control_curve("clip", tmp_path)
    path = trained(tmp_path / "out", "simclr")
    with pytest.raises(StudyError, match="does not fit the pocket dinov2"):
        controls.control_model("simclr", tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StudyError, match="is damaged"):
        controls.control_model("simclr", tmp_path / "out")
