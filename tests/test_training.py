"""Training of the zoo, its curves and what it is measured by: after a kill, in closed forms, with planted answers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from refusals import refused
from samantics.models import pocket
from samantics.models.encoder import Encoder, load_encoder
from samantics.mojiworld import catalogue
from samantics.mojiworld.rendered import render
from samantics.mojiworld.world import STREAMS, World
from samantics.zoo import quality, training
from samantics.zoo.contract import Batch, batches
from samantics.zoo.objectives import OBJECTIVES, build_objective

RECIPE = training.Recipe(images=16, pool=12, batch=4, probe_points=2, checkpoint_every=1)
CONFIG = dataclasses.replace(pocket.DEFAULT, image_size=64)


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
    monkeypatch.undo()
    assert (tmp_path / "killed" / "clip.ckpt").exists()
    training.train("clip", RECIPE, tmp_path / "killed", data)
    whole, resumed = (load_file(tmp_path / run / "clip.safetensors") for run in ("whole", "killed"))
    torch.testing.assert_close(resumed, whole, atol=5e-3, rtol=0)  # the optimisers scale rounding up
    assert not (tmp_path / "killed" / "clip.ckpt").exists()


def test_models_train_after_their_parents_and_load_again(tmp_path: Path, data) -> None:
    recipe = dataclasses.replace(RECIPE, images=4, pool=4)
    for name in ("mae", "sam", "hiera", "sam2", "supervised"):
        training.train(name, recipe, tmp_path, data)
        card = pocket.card(name, tmp_path)
        assert (card["architecture"]["image_size"], card["world"]["image_size"]) == (64, 64)
        model = pocket.build(OBJECTIVES[name].architecture, CONFIG)
        model.load_state_dict(load_file(tmp_path / f"{name}.safetensors"))


def test_unknown_names_and_a_child_without_its_parent_are_refused(tmp_path, monkeypatch, data) -> None:
    monkeypatch.delattr(training, "training_data")  # no picture is rendered
    unknown, alone = (
        "no objective is called 'sam9': choose from mae, ",
        r"sam starts from .*mae\.safetensors is missing",
    )
    refused(unknown, training.train_models, ["mae", "sam9"], RECIPE, tmp_path)
    refused(alone, training.train_models, ["clip", "sam"], RECIPE, tmp_path)
    training.export("clip", RECIPE, pocket.DEFAULT, tmp_path, build_objective("clip"), [{"seconds": 0.0}])
    (tmp_path / "clip.safetensors").rename(tmp_path / "mae.safetensors")
    refused(r"mae\.safetensors is no mae of these sizes", training.train, "sam", RECIPE, tmp_path, data)


def test_probes_learn_from_training_artists_and_are_tested_on_the_validation_artist(monkeypatch) -> None:
    monkeypatch.setattr(training, "stored_pictures", lambda world, stream, *_: stream.role)
    data = training.training_data(RECIPE)
    assert vars(data) == {"pool": "pretraining", "held_out": "pretraining", "labelled": "labels", "choice": "choice"}


def test_every_epoch_visits_every_picture_once_and_the_rate_rises_and_falls_to_nothing() -> None:
    rows = np.concatenate([training.rows_of_step(RECIPE, 12, step) for step in range(6)])
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12)) and (rows[:12] != rows[12:]).any()
    recipe = training.Recipe(images=256_000, batch=256)
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert max(rates) == pytest.approx(recipe.learning_rate, rel=0.02)
    assert np.argmax(rates) == pytest.approx(recipe.warmup * recipe.steps, abs=2)
    assert rates[-1] < 1e-3 * recipe.learning_rate
    assert {0, recipe.steps} <= recipe.probe_steps()


def test_pictures_grow_to_their_own_size_and_tables_of_embeddings_are_left_to_adamw(monkeypatch, data) -> None:
    sides: list[int] = []
    recipe = dataclasses.replace(RECIPE, small=32, growth=0.5)
    objective = build_objective("clip", CONFIG).train()
    own, optimisers = objective.forward, training.make_optimisers(objective, recipe)
    monkeypatch.setattr(objective, "forward", lambda b, p: (sides.append(b.side), own(b, p))[1])
    for step in range(recipe.steps):
        training.take_step(objective, optimisers, data.pool, recipe, step)
    assert sides == [32, 32, 64, 64]
    of = {id(p): name for name, p in objective.named_parameters() if p.requires_grad}
    muon, adamw = ([of[id(p)] for group in each.param_groups for p in group["params"]] for each in optimisers)
    assert "model.token_embedding.weight" in adamw and "model.visual.proj" in muon
    assert sorted([*muon, *adamw]) == sorted(of.values())


def test_shipped_numbers_have_five_bits_and_stay_when_rounded_again() -> None:
    tiny = torch.finfo(torch.float16).smallest_normal
    value = torch.cat([torch.randn(1000), tiny * torch.randn(1000), torch.tensor([0.0, 1.0, -0.5])]).half()
    found = training.shortened(value.float())
    assert ((found - value).abs() <= value.abs() * 2**-5).all() and found.dtype == torch.float16
    assert torch.equal(training.shortened(found), found) and torch.equal(found[-3:], value[-3:])
    mantissa, _ = torch.frexp(found.double())
    assert torch.equal(32 * mantissa, (32 * mantissa).round())
    assert torch.equal(training.shortened(value[:1000].float()), value[:1000])  # few numbers keep all their bits


def test_mirroring_moves_images_and_masks_alike(data) -> None:
    torch.manual_seed(0)
    batch = training.batch_of(data.pool, np.arange(12))
    for row in range(12):
        own = torch.from_numpy(data.pool.images[row]).permute(2, 0, 1), torch.from_numpy(data.pool.instances[row])
        found, mirrored = (batch.images[row], batch.instances[row]), [part.flip(-1) for part in own]
        assert any(all(map(torch.equal, found, expected)) for expected in (own, mirrored))


def test_curves_probe_what_would_be_shipped_and_leave_the_training_as_it_was(data) -> None:
    torch.manual_seed(0)
    objective = build_objective("clip", CONFIG).train()
    objective(training.batch_of(data.pool, np.arange(12)), 0.0)  # statistics that the shipped model holds
    found = training.measured("clip", objective, data, 0.0)
    assert objective.training and all(p.requires_grad for p in objective.model.visual.parameters())
    with torch.no_grad():
        known, asked = (objective.shipped().encode_image(next(batches(x.images))) for x in (data.labelled, data.choice))
    labels = [torch.from_numpy(part.labels) for part in (data.labelled, data.choice)]
    assert found.items() >= training.probe_scores(known, labels[0], asked, labels[1]).items()


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
    sam2 = build_objective("sam2", CONFIG).train()
    optimisers = training.make_optimisers(sam2, recipe)
    for step in range(20):
        training.take_step(sam2, optimisers, data.pool, recipe, step)
    with torch.no_grad():
        image = sam2.embed(training.batch_of(data.pool, np.arange(12)).pixels)[0]
    assert image.std() < 5 * sam2.model.sam_prompt_encoder.get_dense_pe().std()  # 8 at the full rate, 120 at the end


def write_training(folder: Path, name: str, seed: int, probe: list[float]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"sha256": "", "recipe": {"seed": seed}}))
    steps = [{"step": n, "images": 100 * n, "seconds": n, "probe_top1": value} for n, value in enumerate(probe)]
    pd.DataFrame(steps).assign(knn_top1=1.0, held_out_loss=2.0).to_csv(folder / f"{name}.csv", index=False)


def test_curves_of_all_seeds_are_read_and_their_last_third_judged(tmp_path: Path) -> None:
    own, one, two = (tmp_path / name for name in ("own", "seed_1", "seed_2"))
    write_training(own, "sam", 0, [0, 4, 7, 8])
    write_training(one, "sam", 1, [0, 4, 9, 11])
    write_training(own, "clip", 0, [0, 10, 20, 40])
    found = quality.learning_curves([own, one])
    assert set(zip(found["encoder"], found["seed"], strict=True)) == {("sam", 0), ("sam", 1), ("clip", 0)}
    rest = quality.last_third(found).set_index("encoder")
    assert rest.loc["sam", "probe_change"] == pytest.approx(1.5)
    assert rest.loc["sam", "noise"] == pytest.approx(2 * 2.1213, rel=1e-3)  # standard deviation of 8 and 11
    assert rest.loc["clip", "probe_change"] == pytest.approx(20)
    assert rest["converged"].to_dict() == {"sam": True, "clip": False}
    (noise,) = quality.seed_noise(found).to_dict("records")
    assert (noise["encoder"], noise["images"], noise["seeds"]) == ("sam", 300, 2)
    assert noise["probe_top1_mean"] == 9.5 and noise["knn_top1_std"] == 0
    for seed, folder in ((1, one), (2, two)):  # shorter ones tell the noise of the long one
        write_training(folder, "clip", seed, [0, 6 + 2 * seed])
    rest = quality.last_third(quality.learning_curves([own, one, two])).set_index("encoder")
    assert rest.loc["clip", "probe_change"] == 20 and rest.loc["clip", "noise"] == pytest.approx(2 * 2**0.5)


def test_a_step_on_smaller_pictures_costs_less() -> None:
    images, drawings = torch.zeros(2, 3, 96, 96, dtype=torch.uint8), torch.tensor([[0, -1, -1, -1, -1, -1]] * 2)
    full, small = (quality.gigaflops("supervised", Batch(images, images[:, 0], drawings, side)) for side in (96, 64))
    least = 3 * 2 * 12**2 * 12 * pocket.DEFAULT.depth * pocket.DEFAULT.width**2 / 1e9  # of 12x12 tokens, matrices alone
    assert least < full < 2 * least and 0.35 < small / full < 0.5


def test_the_centre_is_the_pixel_farthest_from_the_border() -> None:
    mask, corner = np.zeros((2, 20, 30), bool)
    mask[2:13, 5:26] = corner[0, 29] = True
    x, y = quality.centre_of(mask)
    assert y == 7 and 10 <= x <= 20 and quality.centre_of(corner).tolist() == [29, 0]


def test_iou_equals_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, 3, 10, 10)))
    masks = rng.random((2, 10, 10)) > 0.5
    found = quality.iou_with(logits, masks)
    for i, m in np.ndindex(2, 3):
        hard = logits[i, m].numpy() > 0
        assert found[i, m] == pytest.approx((hard & masks[i]).sum() / (hard | masks[i]).sum())


def test_an_untrained_zoo_is_measured_as_bad(places: Path) -> None:
    rows = [quality.quality_rows(load_encoder(name, "zoo_random"), share=0.02) for name in ("sam", "clip")]
    table = pd.concat(rows).set_index(["encoder", "measure"])
    value = table["value"]
    assert set(value["sam"].index) == {"iou_click", "iou_box", "iou_ceiling", "knn20", "linear", "mask_name"}
    assert set(value["clip"].index) == {"zero_shot", "retrieval", "knn20", "linear", "mask_name"}
    assert value["sam", "iou_box"] < 0.6 < 0.9 < value["sam", "iou_ceiling"] <= 1
    assert value["clip", "zero_shot"] < 25
    assert table["low"].le(value).all() and value.le(table["high"]).all()


def test_an_encoder_that_has_the_masks_name_in_its_map_names_it(places: Path, monkeypatch) -> None:
    """The map is painted with the object's own class, from the pictures' exact masks."""
    label, split = catalogue.class_of_drawing(), catalogue.catalogue()["split"].to_numpy()
    codes, asked = np.random.default_rng(0).normal(size=(len(catalogue.classes()), 64)), []

    def planted(_: object, scenes) -> np.ndarray:
        asked[:] = scenes.drawings[scenes.drawings >= 0]
        return codes[label[asked]]

    monkeypatch.setattr(quality, "object_features", planted)
    right, scene = quality.mask_names(load_encoder("sam", "zoo_random"), share=0.05)["mask_name"]
    assert (right == 100).all() and len(right) == len(scene) and scene.max() < 15
    assert 0 < len(right) <= (split[asked] == "test").sum() < len(asked)  # what training artists drew does not count


def test_the_zoo_is_measured_with_its_weights_and_aims_and_other_weights_are_refused(places, monkeypatch) -> None:
    mask_names = {("random", "mask_name"): 2.0, ("dinov2", "mask_name"): 5.0}
    found = {("sam", "linear"): 9.0, ("dinov2", "linear"): 21.0, **mask_names}

    def measured(encoder: Encoder) -> pd.DataFrame:
        rows = [(name, measure, value, 0, 0) for (name, measure), value in found.items() if name == encoder.name]
        columns = ["encoder", "measure", "value", "low", "high"]
        return pd.DataFrame(rows or [(encoder.name, "knn20", 1, 0, 0)], columns=columns)

    monkeypatch.setattr(quality, "SHIPPED", places / "quality.csv")
    monkeypatch.setattr(quality, "quality_rows", measured)
    quality.write_quality()
    table = quality.zoo_quality().set_index(["encoder", "measure"])
    assert [table.loc[key, "aim"] for key in list(found)[1::2]] == [27, 20] and table["aim"].count() == 2
    places.joinpath("quality.csv").write_text((places / "quality.csv").read_text().replace("sam2,knn20", "sam,knn20"))
    refused("does not fit the weights of sam: run python -m samantics quality", quality.zoo_quality)
