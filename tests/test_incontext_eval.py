"""Detections, controls, AP rows and fates: against cases whose answer is known."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from samantics.data import first_world as mojiworld
from samantics.data.coco import CocoDataset, mask_of
from samantics.data.first_world import write_mojiworld
from samantics.errors import StudyError
from samantics.incontext import evaluation
from samantics.incontext.evaluation import CORNERS, VARIANTS, DrawDetections
from samantics.incontext.model import build_model
from samantics.incontext.tokens import box_masks, live_maps, object_arrays
from samantics.incontext.training import Split, split_categories
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


def perfect(scenes: CocoDataset, split: Split) -> DrawDetections:
    """Every object found by its own class, with its own mask, in two draws, also with random embeddings."""
    objects, draws = object_arrays(scenes, 2 * SIZE), ((1, 0), (1, 1))
    table = pd.DataFrame(objects.boxes, columns=CORNERS).assign(score=np.float32(1), image=objects.image)
    table["mask"] = [i.rle["counts"] for i in scenes.instances]
    classes = np.searchsorted(split.all, objects.categories)
    blocks = [table.assign(embedding=classes + number * len(split.all)) for number in range(2 * len(draws))]
    return DrawDetections(scenes, split, 2 * SIZE, draws, pd.concat(blocks, ignore_index=True))


# -------------------------------------------------------------------------------------------------------- variants


def test_pairs_of_each_variant(scenes: CocoDataset, split: Split) -> None:
    shown = evaluation.shown_classes(scenes, split)
    assert shown.sum() == len({(i.image_id, i.category_id) for i in scenes.instances})
    oracle = evaluation.asked_pairs("class_oracle", shown, split, 0)
    assert len(oracle) == shown.sum()
    assert (np.array(split.all)[oracle["embedding"]] == oracle["category"]).all()
    assert len(evaluation.asked_pairs("all_classes", shown, split, 0)) == shown.size
    wrong = evaluation.asked_pairs("wrong_reference", shown, split, 0)
    assert wrong[["image", "category"]].equals(oracle[["image", "category"]])
    assert not shown[wrong["image"], wrong["embedding"]].any()
    base = np.isin(split.all, split.base)
    assert (base[wrong["embedding"]] == np.isin(wrong["category"], split.base)).all()
    with pytest.raises(StudyError, match="shows every category"):
        evaluation.wrong_classes(np.ones((1, 3), bool), Split((1, 2), (3,)), 0)


def test_perfect_answers_score_100_and_follow_their_questions(scenes: CocoDataset, split: Split) -> None:
    table = perfect(scenes, split).ap(samples=20)
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
    results = perfect(scenes, split).results("class_oracle", (1, 1))
    in_order = sorted(results, key=lambda r: r["segmentation"]["counts"])
    for result, instance in zip(in_order, sorted(scenes.instances, key=lambda i: i.rle["counts"]), strict=True):
        x0, y0, x1, y1 = instance.box
        assert result["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)
        assert (result["image_id"], result["category_id"]) == (instance.image_id, instance.category_id)
    weak = [{**r, "score": 0.4} for r in results]
    target = scenes.instances[0]
    best = evaluation.best_detections(scenes, [*results, *weak], target)
    assert best and all(r["score"] == 1 and r["iou"] == pytest.approx(1, abs=1e-3) for r in best)
    assert evaluation.best_detections(scenes, [], target) == []


# ------------------------------------------------------------------------------------------------------- detecting


def test_detect_keeps_the_best_of_the_models_output(scenes: CocoDataset) -> None:
    sam = pocket.build("sam")
    model = build_model(TINY, sam, 0).eval()
    maps = functools.partial(live_maps, sam, scenes, TINY.trunk_maps)
    embeddings = torch.randn(3, TINY.dim, generator=torch.Generator().manual_seed(0)) * 5
    asked = np.zeros((8, 3), bool)
    asked[2, :] = asked[5, 1] = True
    found = evaluation.detect(model, sam, scenes, maps, embeddings, asked, TINY)
    assert sorted(set(zip(found["image"], found["embedding"], strict=True))) == [(2, 0), (2, 1), (2, 2), (5, 1)]
    with torch.no_grad():
        image = maps(np.array([5]))
        output = model.decode(model.encode(image), embeddings[1:2], torch.tensor([0]))
    best = found[found["image"] == 5]
    np.testing.assert_allclose(best["score"], output.logits[-1, 0].sigmoid().sort(descending=True)[0][:4], rtol=1e-5)
    x, y, width, height = (output.boxes[-1, 0, output.logits[-1, 0].argmax()] * SIZE).tolist()
    corners = np.clip([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 0, SIZE)
    np.testing.assert_allclose(best[CORNERS].iloc[0].astype(float), corners, rtol=1e-4, atol=1e-3)
    alone = box_masks(sam, image.neck, torch.from_numpy(best[CORNERS].to_numpy().round()), SIZE, SIZE)
    masks = np.stack([mask_of({"size": [SIZE, SIZE], "counts": text}) for text in best["mask"]])
    assert (masks == alone).mean() > 0.999
    strict = dataclasses.replace(TINY, min_score=1.0)
    assert len(evaluation.detect(model, sam, scenes, maps, embeddings, asked, strict)) == 0


def test_draws_are_numbered_one_after_another_and_noise_behind_them(scenes: CocoDataset, split: Split) -> None:
    sam = pocket.build("sam")
    model, classes = build_model(TINY, sam, 0).eval(), len(split.all)
    maps = functools.partial(live_maps, sam, scenes, TINY.trunk_maps)
    draws = {(1, 0): torch.randn(classes, TINY.dim), (5, 2): torch.randn(classes, TINY.dim)}
    found = evaluation.detect_draws(model, sam, scenes, maps, draws, split, TINY)
    second = found[found["embedding"] // classes == 1].reset_index(drop=True)
    alone = evaluation.detect(model, sam, scenes, maps, draws[5, 2], np.ones((8, classes), bool), TINY)
    np.testing.assert_allclose(second["score"], alone["score"], atol=1e-5)
    assert sorted(second["embedding"] - classes) == sorted(alone["embedding"])
    noise = found[found["embedding"] // classes == 2]
    asked = set(zip(noise["image"], noise["embedding"] - 2 * classes, strict=True))
    assert asked == set(map(tuple, np.argwhere(evaluation.shown_classes(scenes, split)).tolist()))


def test_embeddings_of_averaged_tokens_and_matching_noise() -> None:
    model = build_model(TINY, pocket.build("sam"), 0).eval()
    tokens = np.random.default_rng(0).normal(size=(6, 4, DIM)).astype(np.float16)
    embeddings = evaluation.class_embeddings(model, tokens, np.array([[0, 1], [2, 5]]))
    averaged = torch.from_numpy(tokens[[2, 5]].astype(np.float32).mean(0, keepdims=True))
    torch.testing.assert_close(embeddings[1:], model.fuser(averaged))
    noise = evaluation.random_embeddings(embeddings, 4000, seed=0)
    torch.testing.assert_close(noise.mean(0), embeddings.mean(0), atol=0.02, rtol=0.1)
    torch.testing.assert_close(noise.std(0), embeddings.std(0), atol=0.02, rtol=0.1)


# ----------------------------------------------------------------------------------------------------------- fates


def _result(scenes: CocoDataset, category: int, score: float, shift: float = 0) -> dict[str, Any]:
    """A detection of the first object."""
    instance = scenes.instances[0]
    x0, y0, x1, y1 = instance.box
    head = {"image_id": instance.image_id, "category_id": category, "score": score, "segmentation": instance.rle}
    return {**head, "bbox": [x0 + shift, y0 + shift, x1 - x0, y1 - y0]}


def test_fates_by_the_rule(scenes: CocoDataset, split: Split) -> None:
    first = scenes.instances[0]
    base = next(c for c in split.base if c != first.category_id)
    novel = next(c for c in split.novel if c != first.category_id)
    own = _result(scenes, first.category_id, 0.9)
    empty = {**own, "segmentation": {"size": [SIZE, SIZE], "counts": scenes.instances[1].rle["counts"]}}
    cases: list[tuple[list[dict[str, Any]], str, bool]] = [
        ([], "missed", False),
        ([_result(scenes, first.category_id, 0.9, shift=150)], "missed", False),
        ([own], "found", False),
        ([empty], "bad mask", False),
        ([own, _result(scenes, base, 0.95)], "confused with base", False),
        ([own, _result(scenes, base, 0.85)], "found", False),
        ([_result(scenes, novel, 0.1)], "confused with novel", False),
        ([own, _result(scenes, first.category_id, 0.5, shift=1)], "found", True),
        ([own, _result(scenes, first.category_id, 0.4, shift=1)], "found", False),
    ]
    for results, fate, duplicate in cases:
        row = evaluation.fates(scenes, split, results).iloc[0]
        assert (row["fate"], row["duplicate"]) == (fate, duplicate)
    everything = evaluation.fates(scenes, split, [])
    assert len(everything) == len(scenes.instances)
    shares = evaluation.fate_shares(everything)
    assert (shares.loc[shares["fate"] == "missed", "share"] == 100).all()
    assert sorted(set(shares["group"])) == [
        "base categories, held-out drawings", "base categories, train drawings", "novel categories",
    ]  # fmt: skip
