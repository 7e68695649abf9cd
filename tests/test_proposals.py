"""Proposals against the packages' own automatic mask generators: the same masks, also for odd images; the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_tools
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam
from segment_anything.utils.amg import build_point_grid

from samantics.data.coco import load_coco
from samantics.errors import StudyError
from samantics.models import pocket
from samantics.models.encoder import load_encoder
from samantics.mojiworld.rendered import write_scenes
from samantics.mojiworld.world import STREAMS, World, picture
from samantics.training_free.decoder import PointDecoder, encode_image, sam2_predictor
from samantics.training_free.proposals import (
    ProposalSettings,
    get_proposals,
    point_grid,
    proposals_folder,
    propose,
    surviving,
)


def decisive(name: str) -> Any:
    """An untrained pocket model whose masks differ between points, so that few suppress each other.

    Untrained, all masks of an image are much the same. Larger kernels and prompts make the point matter.
    """
    model = pocket.build(name, seed=1)
    decoder = model.mask_decoder if name == "sam" else model.sam_mask_decoder
    prompts = model.prompt_encoder if name == "sam" else model.sam_prompt_encoder
    with torch.no_grad():
        for head in decoder.output_hypernetworks_mlps:
            head.layers[-1].weight *= 60
        decoder.iou_prediction_head.layers[-1].bias += 0.5  # the packages take a threshold below 0 for none
        for embedding in prompts.point_embeddings:
            embedding.weight *= 10
        for layer in decoder.transformer.layers:
            layer.cross_attn_token_to_image.q_proj.weight *= 6
            layer.cross_attn_image_to_token.q_proj.weight *= 6
    return model


def package_masks(model: Any, image: Image.Image, settings: ProposalSettings) -> list[dict[str, Any]]:
    options = {
        "points_per_side": settings.points_per_side,
        "pred_iou_thresh": settings.predicted_iou,
        "stability_score_thresh": settings.stability,
        "stability_score_offset": settings.stability_offset,
        "box_nms_thresh": settings.box_nms,
        "output_mode": "coco_rle",
    }
    if isinstance(model, Sam):
        return SamAutomaticMaskGenerator(model, **options).generate(np.asarray(image))
    generator = SAM2AutomaticMaskGenerator(model, **options)
    generator.predictor = sam2_predictor(model)
    return generator.generate(np.asarray(image))


@pytest.mark.parametrize("name", ["sam", "sam2"])
@pytest.mark.parametrize(("size", "box_nms"), [((192, 192), 0.7), ((150, 100), 1.0)])
def test_same_masks_as_the_package(name: str, size: tuple[int, int], box_nms: float) -> None:
    model = decisive(name)
    image = Image.fromarray(picture(World(128, seed=2), STREAMS["targets"], 0).image).resize(size)
    everything = propose(model, image, ProposalSettings(8, 0.0, 0.0, stability_offset=0.5, box_nms=1.0))
    middle = float(np.median(everything.predicted_iou))
    stable = float(np.quantile(everything.stability[everything.predicted_iou > middle], 0.6))
    settings = ProposalSettings(8, middle, stable, stability_offset=0.5, box_nms=box_nms)
    ours, theirs = propose(model, image, settings), package_masks(model, image, settings)
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


def test_filters_afterwards_are_filters_at_once() -> None:
    model, image = decisive("sam"), Image.fromarray(picture(World(96, seed=2), STREAMS["targets"], 0).image)
    every = propose(model, image, ProposalSettings(8, 0.0, 0.0, box_nms=1.0))
    settings = ProposalSettings(
        8, float(np.median(every.predicted_iou)), float(np.median(every.stability)), box_nms=0.6
    )
    ours, afterwards = propose(model, image, settings), every.select(surviving(every, settings))
    assert 0 < len(ours) < len(every) and ours.rles == afterwards.rles


def test_decoder_gives_the_package_logits() -> None:
    assert np.allclose(point_grid(7, (30, 50)), build_point_grid(7) * (50, 30))
    model, image = decisive("sam"), np.random.default_rng(0).integers(0, 255, (70, 110, 3), dtype=np.uint8)
    predictor = SamPredictor(model)
    predictor.set_image(image)
    points = np.array([[3.0, 4.0], [60.0, 50.0], [109.0, 0.0]])
    decoder = PointDecoder(encode_image(model, Image.fromarray(image)))
    decoded = decoder.decode(points)
    low = decoder.low_logits(decoded, torch.ones(3, 3, dtype=torch.bool))
    at = torch.as_tensor(predictor.transform.apply_coords(points, (70, 110)))[:, None]
    full, iou, theirs = predictor.predict_torch(at, torch.ones(3, 1, dtype=torch.int), return_logits=True)
    assert torch.allclose(decoded.predicted_iou, iou, atol=1e-5)
    assert torch.allclose(low, theirs.flatten(0, 1), atol=1e-3)
    assert torch.allclose(decoder.image.full_logits(low), full.flatten(0, 1), atol=1e-3)


@pytest.mark.parametrize("name", ["sam", "sam2"])
@pytest.mark.parametrize("size", [(1, 1), (8_000, 50), (50, 8_000)])
def test_odd_images(name: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 30, 30))
    found = propose(decisive(name), image, ProposalSettings(2, predicted_iou=0.0, stability=0.0))
    assert found.size == size[::-1] and found.masks.shape == (len(found), size[1], size[0])
    assert np.isfinite(found.boxes).all() and np.isfinite(found.stability).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_no_proposal_and_no_decoder() -> None:
    image = Image.new("RGB", (40, 30))
    found = propose(pocket.build("sam"), image, ProposalSettings(2, predicted_iou=99))
    assert len(found) == 0 and found.masks.shape == (0, 30, 40) and found.boxes.shape == (0, 4)
    with pytest.raises(StudyError, match="Dinov2Model has no mask decoder"):
        propose(pocket.build("dinov2"), image)
    with pytest.raises(StudyError, match="too narrow for SAM"):
        propose(pocket.build("sam"), Image.new("RGB", (10_000, 2)))
    with pytest.raises(StudyError, match="points_per_side is 0"):
        ProposalSettings(0)


def test_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes share the images; a broken image stops at itself; a rerun makes what is missing; damage is named."""
    dataset = load_coco(*write_scenes(World(96, seed=1), STREAMS["targets"], 3, tmp_path / "scenes"))
    encoder, settings = load_encoder("sam", "zoo_random"), ProposalSettings(2, predicted_iou=0.0, stability=0.0)
    folder = proposals_folder(encoder, dataset, settings, tmp_path)
    assert proposals_folder(encoder, dataset, ProposalSettings(3), tmp_path) != folder
    picture = dataset.folder / "00002.png"
    kept = picture.read_bytes()
    picture.write_bytes(b"no picture" + bytes(len(kept) - 10))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StudyError, match=r"00002\.png cannot be read"):
        get_proposals(encoder, dataset, settings, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["1.json"]
    picture.write_bytes(kept)
    stored = (folder / "1.json").stat().st_mtime_ns
    for rank, ids in (("0", [1, 3]), ("1", [2])):
        monkeypatch.setenv("RANK", rank)
        assert list(get_proposals(encoder, dataset, settings, tmp_path)) == ids
    assert len(list(folder.iterdir())) == 3 and (folder / "1.json").stat().st_mtime_ns == stored
    (folder / "2.json").write_text('{"size": [96')
    with pytest.raises(StudyError, match=r"2\.json is damaged: delete it"):
        get_proposals(encoder, dataset, settings, tmp_path)
