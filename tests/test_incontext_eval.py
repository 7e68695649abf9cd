"""Detections, controls, AP rows and fates: against cases whose answer is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from samantics.data import first_world as mojiworld
from samantics.data.coco import CocoDataset, mask_of
from samantics.data.first_world import write_mojiworld
from samantics.errors import StudyError
from samantics.incontext.evaluation import (
    VARIANTS,
    Found,
    Trial,
    ap_table,
    class_embeddings,
    coco_results,
    fates,
    find,
    load_trials,
    masks_of,
    questions,
    random_embeddings,
    run_trials,
    save_trials,
    shown,
    wrong_classes,
)
from samantics.incontext.model import Split, build_model, split_categories
from samantics.incontext.tokens import LiveFeatures, box_masks, objects_of
from samantics.models import pocket
from samantics.scales import POCKET_INCONTEXT, POCKET_NOVEL

torch.set_num_threads(1)
SIZE, DIM = pocket.DEFAULT.image_size, pocket.DEFAULT.dim
TINY = dataclasses.replace(
    POCKET_INCONTEXT,
    dim=32, heads=2, ffn_width=32, decoder_layers=2, queries=9, fuser_width=32, trunk_maps=2, top=4, min_score=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return write_mojiworld(mojiworld.World(), "test", 8, tmp_path_factory.mktemp("scenes"), 0.5)


@pytest.fixture(scope="module")
def split(scenes: CocoDataset) -> Split:
    return split_categories(scenes, POCKET_NOVEL)


def perfect(scenes: CocoDataset, split: Split) -> tuple[Found, list[str]]:
    """Every object found by its own class, with its own mask."""
    objects = objects_of(scenes, 2 * SIZE)
    asked = np.searchsorted(split.all, objects.categories)
    found = Found(objects.image, asked, np.ones(len(asked), np.float32), objects.boxes)
    return found, [i.rle["counts"] for i in scenes.instances]


# -------------------------------------------------------------------------------------------------------- variants


def test_questions_of_each_variant(scenes: CocoDataset, split: Split) -> None:
    present = shown(scenes, split)
    assert present.sum() == len({(i.image_id, i.category_id) for i in scenes.instances})
    oracle = questions("class_oracle", present, split, 0)
    assert len(oracle) == present.sum()
    assert (np.array(split.all)[oracle["asked"]] == oracle["category"]).all()
    assert len(questions("all_classes", present, split, 0)) == present.size
    wrong = questions("wrong_reference", present, split, 0)
    assert wrong[["image", "category"]].equals(oracle[["image", "category"]])
    assert not present[wrong["image"], wrong["asked"]].any()
    base = np.isin(split.all, split.base)
    assert (base[wrong["asked"]] == np.isin(wrong["category"], split.base)).all()
    with pytest.raises(StudyError, match="no variant"):
        questions("lucky_guess", present, split, 0)


def test_an_image_of_every_class_has_no_wrong_reference() -> None:
    with pytest.raises(StudyError, match="shows every category"):
        wrong_classes(np.ones((1, 3), bool), Split((1, 2), (3,)), 0)


def test_perfect_answers_score_100_and_follow_their_questions(scenes: CocoDataset, split: Split) -> None:
    found, masks = perfect(scenes, split)
    table = ap_table(
        scenes, split, 2 * SIZE, [Trial(1, seed, found, masks, found, masks) for seed in (0, 1)], samples=20
    )
    assert len(table) == len(VARIANTS) * 2 * 1 * 2
    scores = table.set_index(["variant", "split", "iou_type"])["AP"]
    for variant in ("class_oracle", "all_classes", "random_reference"):
        assert scores[variant].to_numpy() == pytest.approx(100)
    # nothing was found by the wrong references, as no image shows their class
    assert scores["wrong_reference"].to_numpy() == pytest.approx(0)
    assert list(table.columns) == [
        "variant", "split", "shots", "iou_type", "AP", "AP50", "AP75", "AR100", "low", "high", "seeds",
    ]  # fmt: skip
    assert not table.isna().to_numpy().any()


def test_results_are_in_pixels_of_the_image(scenes: CocoDataset, split: Split) -> None:
    found, masks = perfect(scenes, split)
    asked = questions("class_oracle", shown(scenes, split), split, 0)
    results = sorted(coco_results(scenes, 2 * SIZE, found, masks, asked), key=lambda r: r["segmentation"]["counts"])
    for result, instance in zip(results, sorted(scenes.instances, key=lambda i: i.rle["counts"]), strict=True):
        x0, y0, x1, y1 = instance.box
        assert result["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)
        assert (result["image_id"], result["category_id"]) == (instance.image_id, instance.category_id)


# ------------------------------------------------------------------------------------------------------- detecting


def test_find_keeps_the_best_of_what_the_model_says(scenes: CocoDataset) -> None:
    sam = pocket.build("sam")
    model = build_model(TINY, sam, 0).eval()
    source = LiveFeatures(sam, scenes, TINY.trunk_maps)
    embeddings = torch.randn(3, TINY.dim, generator=torch.Generator().manual_seed(0)) * 5
    asked = np.zeros((8, 3), bool)
    asked[2, :] = asked[5, 1] = True
    found = find(model, source, embeddings, asked, SIZE, top=4, min_score=0.0, pairs=2)
    assert sorted(set(zip(found.image.tolist(), found.asked.tolist(), strict=True))) == [(2, 0), (2, 1), (2, 2), (5, 1)]
    with torch.no_grad():
        said = model.detect(source.read(np.array([5])), embeddings[1:2], torch.tensor([0]))
    mine = found.image == 5
    np.testing.assert_allclose(found.scores[mine], said.logits[-1, 0].sigmoid().sort(descending=True)[0][:4], rtol=1e-5)
    best = said.boxes[-1, 0, said.logits[-1, 0].argmax()] * SIZE
    x, y, width, height = best.tolist()
    corners = np.clip([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 0, SIZE)
    np.testing.assert_allclose(found.boxes[mine][0], corners, rtol=1e-4, atol=1e-3)
    assert len(find(model, source, embeddings, asked, SIZE, top=4, min_score=1.0)) == 0


def test_masks_are_those_of_the_detections_boxes(scenes: CocoDataset) -> None:
    sam = pocket.build("sam")
    source = LiveFeatures(sam, scenes, 2)
    boxes = np.array([[10, 10, 90, 90], [10.3, 9.8, 90.2, 90], [30, 60, 100, 120]], np.float32)
    found = Found(np.array([1, 1, 4]), np.array([0, 2, 1]), np.ones(3, np.float32), boxes)
    masks = masks_of(sam, source, scenes, found)
    assert masks[0] == masks[1]
    alone = box_masks(sam, source.read(np.array([4])).neck, torch.tensor([[30.0, 60.0, 100.0, 120.0]]), SIZE, SIZE)[0]
    decoded = mask_of({"size": [SIZE, SIZE], "counts": masks[2]})
    assert alone.any()
    assert (decoded == alone).mean() > 0.999, (decoded != alone).mean()


def test_trials_are_one_for_each_draw_and_survive_the_disk(scenes: CocoDataset, split: Split, tmp_path: Path) -> None:
    sam = pocket.build("sam")
    model = build_model(TINY, sam, 0).eval()
    source = LiveFeatures(sam, scenes, TINY.trunk_maps)
    draws = {(1, 0): torch.randn(22, TINY.dim), (5, 2): torch.randn(22, TINY.dim)}
    trials = run_trials(model, sam, (scenes, source), draws, split, TINY)
    assert [(t.shots, t.seed) for t in trials] == list(draws)
    alone = find(model, source, draws[5, 2], np.ones((8, 22), bool), SIZE, TINY.top, TINY.min_score)
    np.testing.assert_allclose(trials[1].found.scores, alone.scores, atol=1e-5)
    assert sorted(trials[1].found.asked) == sorted(alone.asked)
    asked = {(i, a) for i, a in zip(trials[0].noise.image.tolist(), trials[0].noise.asked.tolist(), strict=True)}
    assert asked == set(map(tuple, np.argwhere(shown(scenes, split)).tolist()))
    save_trials(trials, tmp_path / "trials.npz")
    for before, after in zip(trials, load_trials(tmp_path / "trials.npz"), strict=True):
        assert before.found_masks == after.found_masks
        assert before.noise_masks == after.noise_masks
        np.testing.assert_array_equal(before.noise.boxes, after.noise.boxes)


def test_embeddings_of_averaged_tokens_and_matching_noise() -> None:
    model = build_model(TINY, pocket.build("sam"), 0).eval()
    tokens = np.random.default_rng(0).normal(size=(6, 4, DIM)).astype(np.float16)
    embeddings = class_embeddings(model, tokens, np.array([[0, 1], [2, 5]]))
    averaged = torch.from_numpy(tokens[[2, 5]].astype(np.float32).mean(0, keepdims=True))
    torch.testing.assert_close(embeddings[1:], model.fuser(averaged))
    noise = random_embeddings(embeddings, 4000, seed=0)
    torch.testing.assert_close(noise.mean(0), embeddings.mean(0), atol=0.02, rtol=0.1)
    torch.testing.assert_close(noise.std(0), embeddings.std(0), atol=0.02, rtol=0.1)


# ----------------------------------------------------------------------------------------------------------- fates


def _result(scenes: CocoDataset, position: int, category: int, score: float, shift: float = 0) -> dict[str, Any]:
    instance = scenes.instances[position]
    x0, y0, x1, y1 = instance.box
    box = [x0 + shift, y0 + shift, x1 - x0, y1 - y0]
    return {
        "image_id": instance.image_id,
        "category_id": category,
        "score": score,
        "bbox": box,
        "segmentation": instance.rle,
    }


def test_fates_by_the_rule(scenes: CocoDataset, split: Split) -> None:
    first = scenes.instances[0]
    base = next(c for c in split.base if c != first.category_id)
    novel = next(c for c in split.novel if c != first.category_id)
    own = _result(scenes, 0, first.category_id, 0.9)
    empty = {**own, "segmentation": {"size": [SIZE, SIZE], "counts": scenes.instances[1].rle["counts"]}}
    cases: list[tuple[list[dict[str, Any]], str, bool]] = [
        ([], "missed", False),
        ([_result(scenes, 0, first.category_id, 0.9, shift=150)], "missed", False),
        ([own], "found", False),
        ([empty], "bad mask", False),
        ([own, _result(scenes, 0, base, 0.95)], "confused with base", False),
        ([own, _result(scenes, 0, base, 0.85)], "found", False),
        ([_result(scenes, 0, novel, 0.1)], "confused with novel", False),
        ([own, _result(scenes, 0, first.category_id, 0.5, shift=1)], "found", True),
        ([own, _result(scenes, 0, first.category_id, 0.4, shift=1)], "found", False),
    ]
    for results, fate, duplicate in cases:
        row = fates(scenes, split, results).iloc[0]
        assert (row["fate"], row["duplicate"]) == (fate, duplicate)
    everything = fates(scenes, split, [])
    assert len(everything) == len(scenes.instances)
    assert isinstance(everything, pd.DataFrame)
    assert set(everything["split"]) == {"base", "novel"}
