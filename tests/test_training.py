"""Training of the zoo: a killed run ends like an undisturbed one, and refuses what is not its own."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from samantics.cache import Checkpoint
from samantics.data import first_world as mojiworld
from samantics.errors import StudyError
from samantics.models import pocket
from samantics.zoo import objectives, training

RECIPE = training.Recipe(images=16, pool=12, batch=4, probe_points=2, checkpoint_every=1)


def training_data(image_size: int, count: int = 12) -> training.TrainingData:
    make = functools.partial(mojiworld.pretraining_picture, mojiworld.World(image_size), stream="training test")
    pictures = mojiworld.render(make, range(count))
    return training.TrainingData(pictures, pictures, pictures, np.arange(count) >= count - 2)


@pytest.fixture(scope="module")
def data() -> training.TrainingData:
    return training_data(128)


def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path, monkeypatch, data) -> None:
    training.train("clip", RECIPE, tmp_path / "whole", data)
    step = training.take_step

    def dies(*arguments) -> None:
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(training, "take_step", dies)
    with pytest.raises(KeyboardInterrupt):
        training.train("clip", RECIPE, tmp_path / "killed", data)
    monkeypatch.setattr(training, "take_step", step)
    assert (tmp_path / "killed" / "clip.ckpt").exists()
    training.train("clip", RECIPE, tmp_path / "killed", data)
    whole, resumed = (load_file(tmp_path / run / "clip.safetensors") for run in ("whole", "killed"))
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, atol=2e-3, rtol=0)  # AdamW scales rounding up
    assert not (tmp_path / "killed" / "clip.ckpt").exists()
    pocket.load("clip", tmp_path / "killed")


def test_a_checkpoint_of_another_recipe_or_a_damaged_one_is_refused(tmp_path, monkeypatch, data) -> None:
    save = Checkpoint.save

    def save_and_die(*arguments) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        training.train("clip", RECIPE, tmp_path, data)
    with pytest.raises(StudyError, match=r"clip\.ckpt was trained with another seed \(0, now 1\)"):
        training.train("clip", dataclasses.replace(RECIPE, seed=1), tmp_path, data)
    (tmp_path / "clip.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(StudyError, match=r"clip\.ckpt is damaged"):
        training.train("clip", RECIPE, tmp_path, data)


@pytest.mark.parametrize("name", pocket.NAMES)
def test_the_number_of_tokens_follows_from_the_size_of_the_pictures(tmp_path, name) -> None:
    recipe = dataclasses.replace(RECIPE, images=4, pool=4)
    training.train(name, recipe, tmp_path, training_data(64))
    card = pocket.card(name, tmp_path)
    assert (card["architecture"]["image_size"], card["world"]["image_size"]) == (64, 64)
    pocket.filled(name, tmp_path / f"{name}.safetensors", dataclasses.replace(pocket.DEFAULT, image_size=64))


def test_refusals_come_before_any_picture_is_rendered(tmp_path, data) -> None:
    with pytest.raises(StudyError, match="is 100: choose a multiple of 16"):
        training.train_models(["sam2"], RECIPE, tmp_path, image_size=100)
    with pytest.raises(StudyError, match="128 pixels: name another folder with --out"):
        training.train_models(["sam2"], RECIPE, image_size=256)
    with pytest.raises(StudyError, match="starts from a trained dinov2: name its file with --start-from"):
        training.train("sam_from_dinov2", RECIPE, tmp_path, data)
    with pytest.raises(StudyError, match="no objective is called 'sam9': choose from sam, "):
        training.train_models(["sam", "sam9"], RECIPE, tmp_path)


def test_every_epoch_visits_every_picture_once_in_its_own_order() -> None:
    rows = np.concatenate([training.rows_of_step(RECIPE, 12, step) for step in range(6)])
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
    torch.manual_seed(0)
    batch = training.batch_of(data.pool, np.arange(12))
    for row in range(12):
        image = torch.from_numpy(data.pool.images[row]).permute(2, 0, 1)
        instances = torch.from_numpy(data.pool.instances[row])
        same = torch.equal(batch.images[row], image) and torch.equal(batch.instances[row], instances)
        flipped = torch.equal(batch.images[row], image.flip(2)) and torch.equal(batch.instances[row], instances.flip(1))
        assert same or flipped


def test_curves_probe_what_would_be_shipped_and_leave_the_training_as_it_was(data) -> None:
    torch.manual_seed(0)
    objective = objectives.build_objective("clip").train()
    objective(training.batch_of(data.pool, np.arange(12)), 0.0)  # statistics that the shipped model holds
    vectors = training.probe_vectors("clip", objective, data.pool.images[:3])
    pixels = training.normalised(torch.from_numpy(data.pool.images[:3]).permute(0, 3, 1, 2))
    with torch.no_grad():
        expected = objective.shipped().encode_image(pixels)
    torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=1e-4)
    assert objective.training and all(p.requires_grad for p in objective.model.visual.parameters())


def test_sam_can_begin_with_the_trunk_of_a_dinov2(tmp_path) -> None:
    dinov2 = pocket.build("dinov2", seed=1)
    with torch.no_grad():
        for layer in dinov2.encoder.layer:
            layer.layer_scale1.lambda1.fill_(0.5)
    path = tmp_path / "dinov2.safetensors"
    save_file({key: value.contiguous() for key, value in dinov2.state_dict().items()}, path)
    sam = training.untrained("sam_from_dinov2", pocket.DEFAULT, path).model.eval()
    x = torch.randn(1, pocket.DEFAULT.grid, pocket.DEFAULT.grid, pocket.DEFAULT.width)
    with torch.no_grad():  # a block without a class token: both see the same tokens
        expected = dinov2.encoder.layer[0](x.flatten(1, 2))
        expected = expected[0] if isinstance(expected, tuple) else expected
        found = sam.image_encoder.blocks[0](x).flatten(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
