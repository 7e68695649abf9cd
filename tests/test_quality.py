"""What the zoo is measured by, against closed forms and plain loops, and on an untrained zoo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from samantics.models import pocket
from samantics.models.encoder import load_encoder, zoo_encoder
from samantics.mojiworld import catalogue
from samantics.zoo import quality


def test_the_centre_is_the_pixel_farthest_from_the_border() -> None:
    mask = np.zeros((20, 30), bool)
    mask[2:13, 5:26] = True
    x, y = quality.centre_of(mask)
    assert y == 7 and 10 <= x <= 20
    mask[:] = False
    mask[0, 29] = True  # one pixel in a corner
    assert quality.centre_of(mask).tolist() == [29, 0]


def test_iou_equals_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, 3, 10, 10)))
    masks = rng.random((2, 10, 10)) > 0.5
    found = quality.iou_with(logits, masks)
    for i in range(2):
        for m in range(3):
            hard = logits[i, m].numpy() > 0
            assert found[i, m] == pytest.approx((hard & masks[i]).sum() / (hard | masks[i]).sum())


def test_coarse_masks_keep_what_fills_cells_and_lose_what_is_smaller() -> None:
    masks = np.zeros((3, 32, 32), bool)
    masks[0, :, :16] = True  # half of the image: cell by cell
    masks[1, 5, 5] = True  # one pixel of a cell of 16
    masks[2, 8:12, 8:11] = True  # three quarters of a cell
    coarse = quality.coarse_masks(masks, 8)
    covered = masks.reshape(3, 8, 4, 8, 4).mean((2, 4))
    np.testing.assert_allclose(coarse.numpy()[:, 0], covered - 0.5, atol=1e-6)
    np.testing.assert_allclose(quality.iou_with(coarse[:2], masks[:2])[:, 0], [1, 0])


@pytest.mark.parametrize("split", quality.SPLITS)
def test_only_unseen_artists_are_asked_for(split: str) -> None:
    named = quality.SPLITS[split]
    for stream in (named.pictures, named.scenes, named.instances):
        stream.require("choice" if split == "choice" else "targets" if stream.name == "targets" else "test")
    assert named.artists in catalogue.catalogue()["split"].to_numpy()


def test_an_untrained_zoo_is_measured_as_bad(places: Path) -> None:
    untrained = {name: load_encoder(name, "zoo_random") for name in ("sam", "clip")}
    table = quality.quality_table(untrained, "choice", share=0.02)
    assert list(table) == quality.COLUMNS
    value = table.set_index(["encoder", "measure"])["value"]
    assert {"iou_click", "iou_box", "iou_ceiling"} <= set(value["sam"].index)
    assert {"zero_shot", "retrieval"} <= set(value["clip"].index)
    assert all({"knn20", "linear", "mask_name"} <= set(value[name].index) for name in untrained)
    assert value["sam", "iou_box"] < 0.6 < 0.9 < value["sam", "iou_ceiling"] <= 1
    assert value["clip", "zero_shot"] < 25
    assert table["low"].le(table["value"]).all() and table["value"].le(table["high"]).all()


def test_an_encoder_that_has_the_masks_name_in_its_map_names_it(places: Path, monkeypatch) -> None:
    """The map is painted with the object's own class, from the pictures' exact masks."""
    label = catalogue.class_of_drawing()
    codes = np.random.default_rng(0).normal(size=(len(catalogue.classes()), 64))

    def planted(_: object, scenes) -> np.ndarray:
        return codes[label[scenes.drawings[scenes.drawings >= 0]]]

    monkeypatch.setattr(quality, "object_features", planted)
    encoder = zoo_encoder("sam", pocket.build("sam"), "")
    right, scene = quality.mask_names(encoder, quality.SPLITS["choice"], share=0.05)["mask_name"]
    assert (right == 100).all() and len(right) == len(scene) and scene.max() < 15


def test_an_aim_that_is_three_times_another_models_value_follows_it() -> None:
    rows = [
        ("sam", "linear", 9.0),
        ("dinov2", "linear", 21.0),
        ("random", "mask_name", 2.0),
        ("dinov2", "mask_name", 5.0),
    ]
    table = quality.with_aims(pd.DataFrame(rows, columns=["encoder", "measure", "value"]))
    assert table["aim"].fillna(0).tolist() == [0, 27, 0, 20]


def test_the_shipped_table_is_read_where_its_weights_are_the_zoos_and_measured_elsewhere(places, monkeypatch) -> None:
    own = load_encoder("random").weights_hash
    rows = [("random", "knn20", 1.0, 0.5, 1.5, np.nan, own), ("sam", "knn20", 9.0, 8.0, 10.0, np.nan, "of old weights")]
    pd.DataFrame(rows, columns=[*quality.COLUMNS, "weights"]).to_csv(places / "quality.csv", index=False)
    monkeypatch.setattr(quality, "SHIPPED", places / "quality.csv")
    monkeypatch.setattr(quality, "load_encoder", lambda name: load_encoder(name, "zoo_random"))
    anew = pd.DataFrame([("sam", "knn20", 2.0, 1.0, 3.0, np.nan)], columns=quality.COLUMNS)
    monkeypatch.setattr(quality, "quality_table", lambda encoders: anew)
    assert quality.zoo_quality(["random", "sam"])["value"].tolist() == [1, 2]
