"""Proposals against the packages' generators, pooling against a loop, matching and merging against closed forms."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_tools
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling.image_encoder import Attention
from torch.nn import functional as F

from boxes import box_masks, box_proposals
from refusals import refused
from samantics.data import coco
from samantics.data.coco import CocoDataset, Rle, box_iou
from samantics.models import pocket
from samantics.models.encoder import load_encoder
from samantics.models.preprocessing import Preprocessing
from samantics.mojiworld.rendered import write_scenes
from samantics.mojiworld.world import STREAMS, World, picture
from samantics.training_free import decoder, matching
from samantics.training_free import mask_features as features_of
from samantics.training_free.decoder import sam2_predictor
from samantics.training_free.mask_features import encode_masks, token_weights, unit
from samantics.training_free.matching import MemoryBank
from samantics.training_free.proposals import ProposalSettings, propose, surviving


def test_pooling_is_the_mean_of_the_bilinearly_resized_map() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(5, 4, 4)).astype(np.float32)
    masks = rng.random((6, 48, 64)) < 0.3
    weights = token_weights(masks, Preprocessing(32, "squash").geometry(64, 48), (4, 4))
    assert np.allclose(weights.sum(1), 1, atol=1e-5)
    full = F.interpolate(torch.from_numpy(tokens)[None], (48, 64), mode="bilinear", align_corners=False)[0].numpy()
    expected = np.array([full[:, mask].mean(1) for mask in masks])
    assert np.allclose(weights @ tokens.reshape(5, -1).T, expected, atol=1e-5)


def test_pooling_of_padding_and_tiny_masks() -> None:
    geometry = Preprocessing(64, "pad").geometry(64, 32)  # the lower half of the input is padding
    weights = token_weights(np.ones((1, 32, 64), bool), geometry, (4, 4)).reshape(4, 4)
    assert weights[:2].sum() > 0.9 and weights[3].sum() == 0
    geometry = Preprocessing(518, "squash").geometry(518, 518)
    weights = token_weights(box_masks([(50, 40, 51, 41)], (518, 518)), geometry, (37, 37)).reshape(37, 37)
    assert np.isfinite(weights).all() and weights.sum() == pytest.approx(1)
    assert np.unravel_index(weights.argmax(), weights.shape) == (40 * 37 // 518, 50 * 37 // 518)
    refused("a mask to pool over is empty", token_weights, np.zeros((1, 518, 518), bool), geometry, (37, 37))


def test_unequal_shots_and_empty_classes() -> None:
    known = {n: coco.Instance(n, 1, 1, (0, 0, 1, 1), 1.0, {"size": [1, 1], "counts": ""}) for n in (1, 2, 3)}
    vectors = {1: [1.0, 0.0], 2: [0.0, 1.0], 3: [-1.0, 0.0]}
    features = {n: np.array(vector, np.float32) for n, vector in vectors.items()}
    bank = matching.remember({3: [known[1], known[2]], 5: [known[3]], 9: []}, features)
    assert bank.category_ids == (3, 5)
    assert np.allclose(bank.prototypes, [[0.5**0.5, 0.5**0.5], [-1, 0]])
    opposite = matching.remember({1: [known[1], known[3]]}, features)
    assert np.array_equal(opposite.prototypes, [[0, 0]])  # and not NaN
    refused("no category has a reference", matching.remember, {9: []}, {})


def small_bank() -> MemoryBank:
    features = np.array([[1, 0, 0], [0, 1, 0], [0, 0.6, 0.8]], np.float32)
    return MemoryBank((10, 20), features, np.array([0, 1, 1]), unit(np.array([[1, 0, 0], [0, 0.8, 0.4]])))


def test_scores() -> None:
    """Each rule on features like the first class's, like a reference of the second, and unlike both."""
    bank, features = small_bank(), unit(np.array([[1.0, 0.2, 0], [0, 0.6, 0.8], [-1, 0, 0]]))
    found = {scoring: matching.class_scores(bank, features, scoring) for scoring in matching.SCORINGS}
    for scores in found.values():
        assert scores.shape == (3, 2) and (scores >= 0).all() and (scores <= 1 + 1e-6).all()
        assert scores[:2].argmax(1).tolist() == [0, 1]
    cosines = features @ bank.prototypes.T
    assert found["nearest"][1, 1] == pytest.approx(1) and np.allclose(found["prototype"], cosines.clip(0))
    shared = np.array([0, 0, 50.0])  # a direction of all features, which centred scores do not see
    features = unit(np.array([[1.0, 0.2, 0], [0, 0.6, 0.8]]) + shared)
    drowned = dataclasses.replace(bank, prototypes=unit(bank.prototypes + shared))
    plain, centred = (matching.class_scores(drowned, features, scoring) for scoring in ("prototype", "centred"))
    assert np.ptp(plain) < 0.01
    assert (centred[[0, 1], [0, 1]] > 0.5).all() and (centred[[0, 1], [1, 0]] == 0).all()


def test_nms_keeps_what_a_plain_loop_keeps() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 60, (80, 2))
    boxes = np.concatenate([corners, corners + rng.integers(5, 40, (80, 2))], axis=1)
    quality, classes = (rng.permutation(80) + 1) / 80, rng.integers(0, 3, 80)
    proposals = box_proposals(boxes.tolist(), quality.tolist(), 100)
    found = matching.ranked(1, proposals, np.zeros((80, 1), np.float32), classes, quality)
    kept: list[int] = []
    for row in np.argsort(-quality):
        iou = box_iou(boxes[[row]], boxes[[k for k in kept if classes[k] == classes[row]]])
        if iou.max(initial=0) <= 0.5:
            kept.append(int(row))
    assert 10 < len(kept) < 80
    assert [(r["category_id"], r["score"]) for r in found] == [(int(classes[k]), float(quality[k])) for k in kept]
    assert [r["bbox"] for r in found] == [coco.xywh(boxes[k]) for k in kept] and {r["image_id"] for r in found} == {1}
    assert matching.match(1, box_proposals([]), np.zeros((0, 3), np.float32), small_bank()) == []


def test_merging_by_hand() -> None:
    """A part wholly inside a better mask, one half inside, and the same of another class."""
    rles = coco.rles_of(box_masks([(0, 0, 40, 40), (10, 10, 20, 20), (30, 0, 50, 40), (10, 10, 20, 20)]))
    features = unit(np.array([[1.0, 0], [0.6, 0.8], [1, 0], [1, 0]]))
    categories, scores = np.array([1, 1, 1, 2]), np.array([0.9, 0.8, 0.7, 0.6])

    def merged(name: str) -> list[float]:
        return matching.merged_scores(rles, features, categories, scores, name).tolist()

    assert merged("none") == scores.tolist()
    assert merged("hard") == pytest.approx([0.9, 0, 0.7, 0.6])  # half inside is not more than half
    assert merged("soft") == pytest.approx([0.9, 0, 0.7 * 0.5**0.5, 0.6])
    assert merged("semantic_soft") == pytest.approx([0.9, 0.8 * 0.4**0.5, 0.7 * 0.5**0.5, 0.6])
    refused("merging is 'firm': choose from none, hard", merged, "firm")
    refused("scoring is 'best': choose from prototype", matching.class_scores, small_bank(), features, "best")


def test_a_cut_out_is_alone_on_grey_in_a_square() -> None:
    """Also at the image's edge, and for a mask that is no rectangle."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    masks = box_masks([(40, 0, 50, 4), (5, 5, 25, 15)], (30, 50))
    masks[1, 5:10, 5:15] = False
    for mask in masks:
        cut = features_of.cut_out(Image.fromarray(pixels), mask)
        alone = np.asarray(cut).reshape(-1, 3)
        object_pixels = alone[(alone != features_of.GREY).any(1)]
        assert cut.width == cut.height and max(np.ptp(np.nonzero(mask), axis=1)) < cut.width <= 1.1 * 20 + 4
        np.testing.assert_array_equal(object_pixels, pixels[mask])  # in the order of the rows: none moved, none lost


@pytest.fixture
def scenes(tmp_path: Path) -> tuple[CocoDataset, dict[int, list[Rle]]]:
    """Four, and the masks of their objects but those of the first."""
    dataset = write_scenes(World(64, seed=1), STREAMS["targets"], 4, tmp_path)
    return dataset, {n: [i.rle for i in dataset.by_image[n]] if n > 1 else [] for n in dataset.images}


def test_features_of_cut_outs_are_the_encoder_s_own(tmp_path: Path, scenes: Any) -> None:
    dataset, masks = scenes
    encoder, image = load_encoder("clip", "zoo_random"), coco.read_image(dataset, 2)
    found = encode_masks({"clip": encoder}, dataset, masks, tmp_path / "files", "cut_out")
    cut = [features_of.cut_out(image, coco.mask_of(rle)) for rle in masks[2]]
    expected = encoder.encode(encoder.inputs(cut))["final"].cls
    assert expected is not None and len(found.of("clip", 1)) == 0
    np.testing.assert_allclose(found.of("clip", 2), unit(expected.numpy()), atol=1e-5)


def test_features_are_kept_by_image(tmp_path: Path, scenes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run encodes nothing, one that was killed only what is missing; other masks have other features."""
    dataset, masks = scenes
    encoders = {name: load_encoder(name, "zoo_random") for name in ("sam", "dinov2")}
    maps = mock.Mock(wraps=features_of.dense_maps)
    monkeypatch.setattr(features_of, "dense_maps", maps)
    monkeypatch.setattr(features_of, "PIXELS_AT_ONCE", 1)  # one image at a time

    def pooled(encodings: int) -> dict[tuple[str, int], NDArray[np.float32]]:
        maps.reset_mock()
        found = encode_masks(encoders, dataset, masks, tmp_path / "files")
        assert maps.call_count == encodings
        return {(name, n): found.of(name, n) for name in encoders for n in masks}

    first = pooled(8)
    assert [len(first["sam", n]) for n in masks] == [len(rles) for rles in masks.values()]
    again = pooled(0)
    assert all(np.array_equal(again[key], values) for key, values in first.items())  # the same files
    next((tmp_path / "files").iterdir()).unlink()
    again = pooled(2)
    for key, values in first.items():
        np.testing.assert_allclose(again[key], values, atol=1e-5)  # unit vectors, summed again
    masks[4] = masks[4][::-1]
    np.testing.assert_allclose(pooled(2)["sam", 4], first["sam", 4][::-1], atol=1e-5)
    for path in (tmp_path / "files").iterdir():
        path.write_bytes(path.read_bytes()[:-8])
    refused("npz is damaged: delete it, and it is computed again", pooled, 0)


def decisive(name: str) -> Any:
    """An untrained pocket model whose masks differ between points, so that few suppress each other.

    Untrained, all masks of an image are much the same. Larger kernels and prompts make the point matter.
    """
    model = pocket.build(name, seed=1)
    masks = model.mask_decoder if name == "sam" else model.sam_mask_decoder
    prompts = model.prompt_encoder if name == "sam" else model.sam_prompt_encoder
    with torch.no_grad():
        for head in masks.output_hypernetworks_mlps:
            head.layers[-1].weight *= 60
        masks.iou_prediction_head.layers[-1].bias += 0.5  # the packages take a threshold below 0 for none
        for embedding in prompts.point_embeddings:
            embedding.weight *= 10
        for layer in masks.transformer.layers:
            layer.cross_attn_token_to_image.q_proj.weight *= 6
            layer.cross_attn_image_to_token.q_proj.weight *= 6
    return model


@pytest.mark.parametrize("name", ["sam", "sam2"])
@pytest.mark.parametrize(("size", "box_nms"), [((192, 192), 0.7), ((150, 100), 1.0)])
def test_same_masks_as_the_package(name: str, size: tuple[int, int], box_nms: float) -> None:
    model = decisive(name)
    image = Image.fromarray(picture(World(128, seed=2), STREAMS["targets"], 0).image).resize(size)
    everything = propose(model, image, ProposalSettings(8, 0.0, 0.0, stability_offset=0.5, box_nms=1.0))
    middle = float(np.median(everything.predicted_iou))
    stable = float(np.quantile(everything.stability[everything.predicted_iou > middle], 0.6))
    settings = ProposalSettings(8, middle, stable, stability_offset=0.5, box_nms=box_nms)
    names = ("points_per_side", "pred_iou_thresh", "stability_score_thresh", "stability_score_offset", "box_nms_thresh")
    options = dict(zip(names, dataclasses.astuple(settings), strict=True)) | {"output_mode": "coco_rle"}
    package = {"sam": SamAutomaticMaskGenerator, "sam2": SAM2AutomaticMaskGenerator}[name](model, **options)
    if name == "sam2":
        package.predictor = sam2_predictor(model)
    ours, theirs = propose(model, image, settings), package.generate(np.asarray(image))
    assert ours.rles == everything.select(surviving(everything, settings)).rles  # filters afterwards, filters at once
    assert len(theirs) >= (10 if box_nms == 1 else 1)
    assert abs(len(ours) - len(theirs)) <= 0.01 * len(theirs)
    iou = mask_tools.iou([t["segmentation"] for t in theirs], list(ours.rles), [0] * len(ours))
    assert iou.max(0).min() >= 0.99 and iou.max(1).min() >= 0.99
    matched = iou.argmax(1)
    assert np.allclose(ours.predicted_iou[matched], [t["predicted_iou"] for t in theirs], atol=1e-5)
    assert np.allclose(ours.stability[matched], [t["stability_score"] for t in theirs], atol=1e-3)
    boxes = np.array([t["bbox"] for t in theirs])  # theirs end at the last pixel, ours after it
    assert np.allclose(ours.boxes[matched, 2:] - ours.boxes[matched, :2] - 1, boxes[:, 2:])
    assert np.allclose(ours.masks.sum((1, 2))[matched], [t["area"] for t in theirs], rtol=0.01)


def test_attention_in_parts_is_the_package_s(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = Attention(32, 2, use_rel_pos=True, input_size=(6, 5)), torch.randn(3, 6, 5, 32)
    for positions in (attention.rel_pos_h, attention.rel_pos_w):  # nothing until trained
        torch.nn.init.normal_(positions)
    for at_once in (64, 2000, 10**6):  # parts of rows, of heads, and one part
        monkeypatch.setattr(decoder, "LOGITS_AT_ONCE", at_once)
        assert torch.allclose(decoder._attended(attention, x), attention(x), atol=1e-6)


def test_no_proposal_and_no_decoder() -> None:
    image = Image.new("RGB", (40, 30))
    found = propose(pocket.build("sam"), image, ProposalSettings(2, predicted_iou=99))
    assert len(found) == 0 and found.masks.shape == (0, 30, 40) and found.boxes.shape == (0, 4)
    settings, narrow = ProposalSettings(), Image.new("RGB", (10_000, 2))
    refused("Dinov2Model has no mask decoder", propose, pocket.build("dinov2"), image, settings)
    refused("too narrow for SAM", propose, pocket.build("sam"), narrow, settings)
