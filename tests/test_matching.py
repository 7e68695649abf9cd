"""Pooling against an explicit loop, the memory bank's corner cases, matching and merging against closed forms."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from samantics.data import coco
from samantics.data.coco import Rle, box_iou
from samantics.errors import StudyError
from samantics.models.encoder import load_encoder
from samantics.models.preprocessing import Preprocessing
from samantics.mojiworld.rendered import write_scenes
from samantics.mojiworld.world import STREAMS, World
from samantics.training_free import mask_features, matching
from samantics.training_free.matching import MemoryBank
from samantics.training_free.proposals import Proposals


def box_masks(boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> NDArray[np.bool_]:
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def proposals_of(boxes: list[tuple[int, int, int, int]], size: tuple[int, int] = (60, 60), **more: Any) -> Proposals:
    masks, count = box_masks(boxes, size), len(boxes)
    quality = np.array(more.get("quality", np.linspace(0.9, 0.8, count)))
    rles = tuple(coco.rles_of(masks)) if count else ()
    return Proposals(size, rles, np.array(boxes, float).reshape(-1, 4), quality, np.ones(count))


def test_pooling_is_the_mean_of_the_bilinearly_resized_map() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(5, 4, 4)).astype(np.float32)
    masks = rng.random((6, 48, 64)) < 0.3
    geometry = Preprocessing(32, "squash").geometry(64, 48)
    weights = mask_features.token_weights(masks, geometry, (4, 4))
    assert np.allclose(weights.sum(1), 1, atol=1e-5)
    full = F.interpolate(torch.from_numpy(tokens)[None], (48, 64), mode="bilinear", align_corners=False)[0].numpy()
    expected = np.array([full[:, mask].mean(1) for mask in masks])
    assert np.allclose(weights @ tokens.reshape(5, -1).T, expected, atol=1e-5)


def test_pooling_of_padding_odd_sizes_and_tiny_masks() -> None:
    geometry = Preprocessing(64, "pad").geometry(64, 32)  # the lower half of the input is padding
    weights = mask_features.token_weights(box_masks([(0, 0, 64, 32)], (32, 64)), geometry, (4, 4)).reshape(4, 4)
    assert weights[:2].sum() > 0.9 and weights[3].sum() == 0
    for size in ((1, 1), (50, 10_000)):
        geometry = Preprocessing(32, "squash").geometry(size[1], size[0])
        assert np.allclose(mask_features.token_weights(np.ones((1, *size), bool), geometry, (2, 2)), 0.25, atol=1e-3)
    geometry = Preprocessing(518, "squash").geometry(518, 518)
    weights = mask_features.token_weights(box_masks([(50, 40, 51, 41)], (518, 518)), geometry, (37, 37)).reshape(37, 37)
    assert np.isfinite(weights).all() and weights.sum() == pytest.approx(1)
    assert np.unravel_index(weights.argmax(), weights.shape) == (40 * 37 // 518, 50 * 37 // 518)
    with pytest.raises(StudyError, match="a mask to pool over is empty"):
        mask_features.token_weights(np.zeros((1, 518, 518), bool), geometry, (37, 37))


def reference(number: int, category: int) -> coco.Instance:
    return coco.Instance(number, 1, category, (0, 0, 1, 1), 1.0, {"size": [1, 1], "counts": ""})


def test_unequal_shots_and_empty_classes() -> None:
    references = {3: [reference(1, 3), reference(2, 3)], 5: [reference(3, 5)], 9: []}
    features = {1: np.array([1.0, 0.0]), 2: np.array([0.0, 1.0]), 3: np.array([-1.0, 0.0])}
    bank = matching.remember(references, {n: f.astype(np.float32) for n, f in features.items()})
    assert bank.category_ids == (3, 5)
    assert np.allclose(bank.prototypes, [[0.5**0.5, 0.5**0.5], [-1, 0]])
    assert np.isfinite(bank.prototypes).all()
    opposite = matching.remember({1: [reference(1, 1), reference(3, 1)]}, features)
    assert np.array_equal(opposite.prototypes, [[0, 0]])  # and not NaN
    with pytest.raises(StudyError, match="no category has a reference"):
        matching.remember({9: []}, {})


def small_bank() -> MemoryBank:
    features = np.array([[1, 0, 0], [0, 1, 0], [0, 0.6, 0.8]], np.float32)
    return MemoryBank((10, 20), features, np.array([0, 1, 1]), mask_features.unit(np.array([[1, 0, 0], [0, 0.8, 0.4]])))


def test_scores() -> None:
    """Each rule on features like the first class's, like a reference of the second, and unlike both."""
    bank, features = small_bank(), mask_features.unit(np.array([[1.0, 0.2, 0], [0, 0.6, 0.8], [-1, 0, 0]]))
    found = {scoring: matching.class_scores(bank, features, scoring) for scoring in matching.SCORINGS}
    for scores in found.values():
        assert scores.shape == (3, 2) and (scores >= 0).all() and (scores <= 1 + 1e-6).all()
        assert scores[:2].argmax(1).tolist() == [0, 1]
    cosines = features @ bank.prototypes.T
    assert found["nearest"][1, 1] == pytest.approx(1) and np.allclose(found["prototype"], cosines.clip(0))


def test_centred_scores_do_not_see_a_direction_that_all_features_share() -> None:
    bank, shared = small_bank(), np.array([0, 0, 50.0])
    features = mask_features.unit(np.array([[1.0, 0.2, 0], [0, 0.6, 0.8]]) + shared)
    drowned = dataclasses.replace(bank, prototypes=mask_features.unit(bank.prototypes + shared))
    plain, centred = (matching.class_scores(drowned, features, scoring) for scoring in ("prototype", "centred"))
    assert np.ptp(plain) < 0.01
    assert (centred[[0, 1], [0, 1]] > 0.5).all() and (centred[[0, 1], [1, 0]] == 0).all()


def test_match_takes_the_best_class_and_thins_out_per_class() -> None:
    boxes = [(0, 0, 20, 20), (1, 1, 21, 21), (0, 0, 20, 21), (30, 30, 50, 50)]
    features = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]], np.float32)
    found = matching.match(7, proposals_of(boxes, quality=[0.7, 0.9, 0.8, 0.6]), features, small_bank())
    assert [(r["category_id"], r["bbox"]) for r in found if r["category_id"] == 10] == [
        (10, [1, 1, 20, 20]),  # better predicted IoU than its neighbour
        (10, [30, 30, 20, 20]),
    ]
    assert sum(r["category_id"] == 20 for r in found) == 1  # another class does not suppress it
    assert [r["score"] for r in found] == sorted((r["score"] for r in found), reverse=True)
    assert all(r["image_id"] == 7 for r in found)


def test_nms_keeps_what_a_plain_loop_keeps() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 60, (80, 2))
    boxes = [
        (int(x), int(y), int(x + w), int(y + h))
        for (x, y), (w, h) in zip(corners, rng.integers(5, 40, (80, 2)), strict=True)
    ]
    quality = (rng.permutation(80) + 1) / 80
    proposals = proposals_of(boxes, (100, 100), quality=quality.tolist())
    classes = rng.integers(0, 3, 80)
    found = matching.ranked(1, proposals, np.zeros((80, 1), np.float32), classes, quality)
    kept: list[int] = []
    for row in np.argsort(-quality):
        iou = box_iou(np.array([boxes[row]], float), [boxes[k] for k in kept if classes[k] == classes[row]])
        if iou.max(initial=0) <= 0.5:
            kept.append(int(row))
    expected = {(int(classes[k]), float(quality[k])) for k in kept}
    assert 10 < len(expected) < 80
    assert {(r["category_id"], r["score"]) for r in found} == expected


def test_merging_by_hand() -> None:
    """A part wholly inside a better mask, one half inside, and the same of another class."""
    rles = coco.rles_of(box_masks([(0, 0, 40, 40), (10, 10, 20, 20), (30, 0, 50, 40), (10, 10, 20, 20)], (60, 60)))
    features = mask_features.unit(np.array([[1.0, 0], [0.6, 0.8], [1, 0], [1, 0]]))
    categories, scores = np.array([1, 1, 1, 2]), np.array([0.9, 0.8, 0.7, 0.6])

    def merged(name: str) -> list[float]:
        return matching.merged_scores(rles, features, categories, scores, name).tolist()

    assert merged("none") == scores.tolist()
    assert merged("hard") == pytest.approx([0.9, 0, 0.7, 0.6])  # half inside is not more than half
    assert merged("soft") == pytest.approx([0.9, 0, 0.7 * 0.5**0.5, 0.6])
    assert merged("semantic_soft") == pytest.approx([0.9, 0.8 * 0.4**0.5, 0.7 * 0.5**0.5, 0.6])


def test_nothing_found_and_unknown_settings() -> None:
    none = np.zeros((0, 3), np.float32)
    assert matching.match(1, proposals_of([]), none, small_bank()) == []
    with pytest.raises(StudyError, match="merging is 'firm': choose from none, hard"):
        matching.merged_scores([], none, np.empty(0, int), np.empty(0), "firm")
    with pytest.raises(StudyError, match="scoring is 'best': choose from prototype"):
        matching.class_scores(small_bank(), none, "best")


def test_a_cut_out_is_alone_on_grey_in_a_square() -> None:
    """Also at the image's edge, and for a mask that is no rectangle."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    masks = box_masks([(40, 0, 50, 4), (5, 5, 25, 15)], (30, 50))
    masks[1, 5:10, 5:15] = False
    for mask, cut in zip(masks, mask_features.cut_outs(Image.fromarray(pixels), masks), strict=True):
        alone = np.asarray(cut).reshape(-1, 3)
        object_pixels = alone[(alone != mask_features.GREY).any(1)]
        assert cut.width == cut.height and max(np.ptp(np.nonzero(mask), axis=1)) < cut.width <= 1.1 * 20 + 4
        np.testing.assert_array_equal(object_pixels, pixels[mask])  # in the order of the rows: none moved, none lost
    with pytest.raises(StudyError, match="a mask to pool over is empty"):
        mask_features.cut_outs(Image.fromarray(pixels), np.zeros((1, 30, 50), bool))


def test_features_of_cut_outs_are_the_encoder_s_own(tmp_path: Path) -> None:
    dataset = coco.load_coco(*write_scenes(World(64, seed=1), STREAMS["targets"], 2, tmp_path))
    masks: dict[int, list[Rle]] = {1: [i.rle for i in dataset.by_image[1]], 2: []}
    encoder = load_encoder("clip", "zoo_random")
    found = mask_features.encode_masks({"clip": encoder}, dataset, masks, tmp_path / "files", "cut_out")
    cut = mask_features.cut_outs(coco.read_image(dataset, 1), np.array([coco.mask_of(rle) for rle in masks[1]]))
    expected = encoder.encode(encoder.inputs(cut))["final"].cls
    assert expected is not None and len(found.of("clip", 2)) == 0
    np.testing.assert_allclose(found.of("clip", 1), mask_features.unit(expected.numpy()), atol=1e-5)


def test_encoders_side_by_side_give_what_each_gives_alone(tmp_path: Path) -> None:
    dataset = coco.load_coco(*write_scenes(World(64, seed=1), STREAMS["targets"], 4, tmp_path))
    masks: dict[int, list[Rle]] = {n: [i.rle for i in dataset.by_image[n]] for n in dataset.images}
    encoders = {name: load_encoder(name, "zoo_random") for name in ("clip", "sam", "dinov2")}
    together = mask_features.encode_masks(encoders, dataset, masks, tmp_path / "together")
    for name, encoder in encoders.items():
        alone = mask_features.encode_masks({name: encoder}, dataset, masks, tmp_path / name)
        for n in masks:
            np.testing.assert_allclose(together.of(name, n), alone.of(name, n), atol=1e-5)


def test_features_are_kept_by_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run encodes nothing, one that was killed only what is missing; other masks have other features."""
    dataset = coco.load_coco(*write_scenes(World(64, seed=1), STREAMS["targets"], 3, tmp_path))
    masks: dict[int, list[Rle]] = {n: [i.rle for i in dataset.by_image[n]] for n in dataset.images}
    masks[min(masks)] = []
    encoders = {name: load_encoder(name, "zoo_random") for name in ("sam", "dinov2")}
    maps = mock.Mock(wraps=mask_features.dense_maps)
    monkeypatch.setattr(mask_features, "dense_maps", maps)
    monkeypatch.setattr(mask_features, "PIXELS_AT_ONCE", 1)  # one image at a time

    def pooled(encodings: int) -> dict[tuple[str, int], NDArray[np.float32]]:
        maps.reset_mock()
        found = mask_features.encode_masks(encoders, dataset, masks, tmp_path / "files")
        assert maps.call_count == encodings
        return {(name, n): found.of(name, n) for name in encoders for n in masks}

    first = pooled(6)
    assert [len(first["sam", n]) for n in masks] == [len(rles) for rles in masks.values()]
    again = pooled(0)
    assert all(np.array_equal(again[key], values) for key, values in first.items())  # the same files
    next((tmp_path / "files").iterdir()).unlink()
    again = pooled(2)
    for key, values in first.items():
        np.testing.assert_allclose(again[key], values, atol=1e-5)  # unit vectors, summed again
    masks[max(masks)] = masks[max(masks)][::-1]
    np.testing.assert_allclose(pooled(2)["sam", max(masks)], first["sam", max(masks)][::-1], atol=1e-5)
    for path in (tmp_path / "files").iterdir():
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StudyError, match="npz is damaged: delete it, and it is computed again"):
        pooled(0)
