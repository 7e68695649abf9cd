"""Training of the zoo: a killed run ends like an undisturbed one, and refuses what is not its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samantics.errors import StudyError
from samantics.models import pocket
from samantics.mojiworld.rendered import render
from samantics.mojiworld.world import STREAMS, World
from samantics.zoo import training
from samantics.zoo.contract import batches, pooled
from samantics.zoo.objectives import OBJECTIVES, build_objective

RECIPE = training.Recipe(images=16, pool=12, batch=4, probe_points=2, checkpoint_every=1)


@pytest.fixture(scope="module")
def data() -> training.TrainingData:
    world = World(64)
    parts = [render(world, STREAMS[name], range(12)) for name in ("pretraining", "held out", "labels", "choice")]
    return training.TrainingData(*parts)


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
        torch.testing.assert_close(resumed[key], value, atol=5e-3, rtol=0)  # the optimisers scale rounding up
    assert not (tmp_path / "killed" / "clip.ckpt").exists()


def test_models_train_after_their_parents_and_load_again(tmp_path: Path, data) -> None:
    recipe = dataclasses.replace(RECIPE, images=4, pool=4)
    for name in ("mae", "sam", "hiera", "sam2", "supervised"):
        training.train(name, recipe, tmp_path, data)
        card = pocket.card(name, tmp_path)
        assert (card["architecture"]["image_size"], card["world"]["image_size"]) == (64, 64)
        config = dataclasses.replace(pocket.DEFAULT, image_size=64)
        pocket.filled(OBJECTIVES[name].architecture, tmp_path / f"{name}.safetensors", config)


def test_refusals_come_before_any_picture_is_rendered(tmp_path, data) -> None:
    with pytest.raises(StudyError, match="no objective is called 'sam9': choose from mae, "):
        training.train_models(["sam", "sam9"], RECIPE, tmp_path)


def test_a_child_without_its_parent_is_refused(tmp_path, data) -> None:
    with pytest.raises(StudyError, match=r"sam starts from a trained mae, and .*mae\.safetensors is missing"):
        training.train("sam", RECIPE, tmp_path, data)
    training.export("clip", RECIPE, pocket.DEFAULT, tmp_path, build_objective("clip"), [{"seconds": 0.0}])
    (tmp_path / "clip.safetensors").rename(tmp_path / "mae.safetensors")
    with pytest.raises(StudyError, match=r"mae\.safetensors is no mae of these sizes"):
        training.train("sam", RECIPE, tmp_path, data)


def test_probes_learn_from_training_artists_and_are_tested_on_the_validation_artist(monkeypatch) -> None:
    monkeypatch.setattr(training, "stored_pictures", lambda world, stream, *_: stream.role)
    data = training.training_data(RECIPE)
    assert vars(data) == {"pool": "pretraining", "held_out": "pretraining", "labelled": "labels", "choice": "choice"}


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


def test_pictures_grow_to_their_own_size(monkeypatch, data) -> None:
    sides: list[int] = []
    recipe = dataclasses.replace(RECIPE, small=32, growth=0.5)
    objective = build_objective("clip", dataclasses.replace(pocket.DEFAULT, image_size=64)).train()
    own, optimisers = objective.forward, training.make_optimisers(objective, recipe)
    monkeypatch.setattr(objective, "forward", lambda b, p: (sides.append(b.side), own(b, p))[1])
    for step in range(recipe.steps):
        training.take_step(objective, optimisers, data.pool, recipe, step)
    assert sides == [32, 32, 64, 64]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rounded_numbers_have_five_bits_and_stay_when_rounded_again(dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    value = torch.cat([torch.randn(1000), tiny * torch.randn(1000), torch.tensor([0.0, 1.0, -0.5])]).to(dtype)
    found = training.rounded(value)
    assert ((found - value).abs() <= value.abs() * 2**-5).all() and found.dtype == dtype
    assert torch.equal(training.rounded(found), found) and torch.equal(found[-3:], value[-3:])
    mantissa, _ = torch.frexp(found.double())
    assert torch.equal(32 * mantissa, (32 * mantissa).round())


def test_tables_of_embeddings_are_left_to_adamw() -> None:
    objective = build_objective("clip")
    muon, adamw = training.make_optimisers(objective, RECIPE)
    of = {id(p): name for name, p in objective.named_parameters()}
    ours, theirs = ([of[id(p)] for g in each.param_groups for p in g["params"]] for each in (muon, adamw))
    assert "model.token_embedding.weight" in theirs and "model.visual.proj" in ours
    assert sorted([*ours, *theirs]) == sorted(n for n, p in objective.named_parameters() if p.requires_grad)


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
    objective = build_objective("clip", dataclasses.replace(pocket.DEFAULT, image_size=64)).train()
    objective(training.batch_of(data.pool, np.arange(12)), 0.0)  # statistics that the shipped model holds
    vectors = pooled(training.shipped_encoder("clip", objective), data.pool.images[:3])
    pixels = next(batches(data.pool.images[:3]))
    with torch.no_grad():
        expected = objective.shipped().encode_image(pixels)
    torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=1e-4)
    assert objective.training and all(p.requires_grad for p in objective.model.visual.parameters())


def test_the_curves_probes_read_a_class_that_is_there_and_none_that_is_not() -> None:
    torch.manual_seed(0)
    labels = torch.arange(60) % 6
    codes, noise = torch.randn(6, 32)[labels], torch.randn(60, 32)
    found = training.probe_scores(codes + 0.1 * noise, labels, codes + 0.1 * noise.flip(0), labels)
    assert found == {"probe_top1": 100.0, "knn_top1": 100.0}
    assert max(training.probe_scores(noise, labels, noise.flip(1), labels).values()) < 50


def test_the_map_of_sam2_stays_of_a_size_with_the_positions_that_are_added_to_it(data) -> None:
    torch.manual_seed(0)
    recipe = dataclasses.replace(RECIPE, images=160, warmup=0.2)
    sam2 = build_objective("sam2", dataclasses.replace(pocket.DEFAULT, image_size=64)).train()
    optimisers = training.make_optimisers(sam2, recipe)
    for step in range(20):
        training.take_step(sam2, optimisers, data.pool, recipe, step)
    with torch.no_grad():
        image = sam2.embed(training.batch_of(data.pool, np.arange(12)).pixels)[0]
    assert image.std() < 5 * sam2.model.sam_prompt_encoder.get_dense_pe().std()  # 8 at the full rate, 120 at the end
