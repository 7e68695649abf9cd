"""Training of the zoo: a killed run ends like an undisturbed one, and refuses what is not its own."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from samantics.data import first_world as mojiworld
from samantics.errors import StudyError
from samantics.models import pocket
from samantics.zoo import training

RECIPE = training.Recipe(images=16, pool=12, batch=4, probe_points=2, checkpoint_every=1)


@pytest.fixture(scope="module")
def data():
    make = functools.partial(mojiworld.pretraining_picture, mojiworld.World(), stream="training test")
    pictures = mojiworld.render(make, range(12))
    on_cpu = training.DeviceData(pictures, torch.device("cpu"))
    test = np.arange(12) >= 10
    return on_cpu, training.ProbeData(pictures.images, pictures.drawings[:, 0].astype(np.int64), test)


def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path, monkeypatch, data) -> None:
    pictures, probing = data
    training.train("clip", RECIPE, tmp_path / "whole", pictures, pictures, probing)
    step = training._step

    def dies(objective, optimiser, source, recipe, number) -> None:
        if number == 2:
            raise KeyboardInterrupt
        step(objective, optimiser, source, recipe, number)

    monkeypatch.setattr(training, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        training.train("clip", RECIPE, tmp_path / "killed", pictures, pictures, probing)
    monkeypatch.setattr(training, "_step", step)
    assert (tmp_path / "killed" / "clip.ckpt").exists()
    training.train("clip", RECIPE, tmp_path / "killed", pictures, pictures, probing)
    whole, resumed = (load_file(tmp_path / run / "clip.safetensors") for run in ("whole", "killed"))
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, atol=2e-3, rtol=0)  # AdamW scales rounding up
    assert not (tmp_path / "killed" / "clip.ckpt").exists()
    assert pocket.verify("clip", tmp_path / "killed")
    pocket.load("clip", tmp_path / "killed")


def test_a_checkpoint_of_another_recipe_or_a_damaged_one_is_refused(tmp_path, monkeypatch, data) -> None:
    pictures, probing = data

    def dies(*_arguments) -> None:
        raise KeyboardInterrupt

    save = training._State.save
    monkeypatch.setattr(training._State, "save", lambda *arguments: (save(*arguments), dies()))
    with pytest.raises(KeyboardInterrupt):
        training.train("clip", RECIPE, tmp_path, pictures, pictures, probing)
    with pytest.raises(StudyError, match=r"clip\.ckpt is of another recipe"):
        training.train("clip", dataclasses.replace(RECIPE, seed=1), tmp_path, pictures, pictures, probing)
    (tmp_path / "clip.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(StudyError, match=r"clip\.ckpt is damaged"):
        training.train("clip", RECIPE, tmp_path, pictures, pictures, probing)


@pytest.mark.parametrize("name", pocket.NAMES)
def test_the_number_of_tokens_follows_from_the_size_of_the_pictures(tmp_path, name) -> None:
    world = mojiworld.World(image_size=64)
    pictures = mojiworld.render(functools.partial(mojiworld.pretraining_picture, world), range(4))
    recipe = dataclasses.replace(RECIPE, images=4, pool=4)
    data = training.DeviceData(pictures, torch.device("cpu"))
    probing = training.ProbeData(np.tile(pictures.images, (3, 1, 1, 1)), np.arange(12), np.arange(12) >= 11)
    training.train(name, recipe, tmp_path, data, data, probing)
    card = pocket.card(name, tmp_path)
    assert (card["architecture"]["image_size"], card["world"]["image_size"]) == (64, 64)
    pocket.filled(name, tmp_path / f"{name}.safetensors", dataclasses.replace(pocket.DEFAULT, image_size=64))


def test_pictures_that_tokens_do_not_divide_are_refused_before_any_is_rendered() -> None:
    with pytest.raises(StudyError, match="is 100: choose a multiple of 16"):
        training.prepared_data(RECIPE, torch.device("cpu"), image_size=100)


def test_other_pictures_do_not_overwrite_the_zoo() -> None:
    with pytest.raises(StudyError, match="128 pixels: name another folder with --out"):
        training.train_models(["sam2"], RECIPE, image_size=256)


def test_every_epoch_visits_every_picture_once_in_its_own_order() -> None:
    rows = np.concatenate([training._rows(RECIPE, 12, step) for step in range(6)])
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12))
    assert (rows[:12] != rows[12:]).any()


def test_the_rate_rises_and_falls_to_nothing() -> None:
    recipe = training.Recipe(images=256_000, batch=256)
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert max(rates) == pytest.approx(recipe.learning_rate, rel=0.02)
    assert np.argmax(rates) == pytest.approx(recipe.warmup * recipe.steps, abs=2)
    assert rates[-1] < 1e-3 * recipe.learning_rate
    assert {0, recipe.steps} <= recipe.probe_steps()


def test_mirroring_moves_images_and_masks_alike(data) -> None:
    pictures, _ = data
    torch.manual_seed(0)
    batch = pictures.batch(np.arange(12))
    for row in range(12):
        image = torch.from_numpy(pictures.pictures.images[row]).permute(2, 0, 1)
        instances = torch.from_numpy(pictures.pictures.instances[row])
        same = torch.equal(batch.images[row], image) and torch.equal(batch.instances[row], instances)
        flipped = torch.equal(batch.images[row], image.flip(2)) and torch.equal(batch.instances[row], instances.flip(1))
        assert same or flipped


def test_sam_can_begin_with_the_trunk_of_a_dinov2(tmp_path) -> None:
    dinov2, sam = pocket.build("dinov2", seed=1), pocket.build("sam")
    with torch.no_grad():
        for layer in dinov2.encoder.layer:
            layer.layer_scale1.lambda1.fill_(0.5)
    path = tmp_path / "dinov2.safetensors"
    save_file({key: value.contiguous() for key, value in dinov2.state_dict().items()}, path)
    training.copy_trunk(path, sam)
    x = torch.randn(1, pocket.DEFAULT.grid, pocket.DEFAULT.grid, pocket.DEFAULT.width)
    with torch.no_grad():  # a block without a class token: both see the same tokens
        expected = dinov2.encoder.layer[0](x.flatten(1, 2))
        expected = expected[0] if isinstance(expected, tuple) else expected
        found = sam.image_encoder.blocks[0](x).flatten(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
