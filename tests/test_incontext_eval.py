"""Detections, controls, AP rows and fates: against cases whose answer is known."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from samantics.data.coco import CocoDataset, load_coco, mask_of
from samantics.errors import StudyError
from samantics.incontext import evaluation
from samantics.incontext.evaluation import COMPARED, CORNERS, VARIANTS, Answers
from samantics.incontext.model import build_model
from samantics.incontext.tokens import SamData, box_masks, live_maps, object_arrays
from samantics.incontext.training import Split, split_categories
from samantics.models import pocket
from samantics.mojiworld.rendered import write_scenes
from samantics.mojiworld.world import STREAMS, World
from samantics.scales import POCKET_INCONTEXT, POCKET_NOVEL

torch.set_num_threads(1)
SIZE, DIM = pocket.DEFAULT.image_size, pocket.DEFAULT.dim
SAM = pocket.build("sam")
TINY = dataclasses.replace(
    POCKET_INCONTEXT,
    dim=32, heads=2, ffn_width=32, decoder_layers=2, queries=9, fuser_width=32, trunk_maps=2, top=4, min_score=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    folder = tmp_path_factory.mktemp("scenes")
    return load_coco(*write_scenes(World(SIZE), STREAMS["targets"], 8, folder))


@pytest.fixture(scope="module")
def split(scenes: CocoDataset) -> Split:
    return split_categories(scenes, POCKET_NOVEL)


@pytest.fixture(scope="module")
def data(scenes: CocoDataset) -> SamData:
    maps, objects = functools.partial(live_maps, SAM, scenes, TINY.trunk_maps), object_arrays(scenes, SIZE)
    return SamData(scenes, maps, objects, np.zeros((0, 4, DIM), np.float16), np.zeros((0, 1), np.float16))


def perfect(scenes: CocoDataset, split: Split) -> Answers:
    """Every object found by its own class in two draws, also with random embeddings."""
    objects = object_arrays(scenes, 2 * SIZE)
    questions = evaluation.questions_of(scenes, split, VARIANTS, [(1, 0), (1, 1)])
    asked = questions.assign(question=questions.index, meant=np.array(split.all)[questions["embedding"] % 80])
    table = pd.DataFrame(objects.boxes / (2 * SIZE), columns=CORNERS).assign(score=np.float32(1), image=objects.image)
    table = table.assign(meant=objects.categories).merge(asked, on=["image", "meant"])
    return Answers(scenes, split, 2 * SIZE, questions, table[["question", "score", *CORNERS]])


# -------------------------------------------------------------------------------------------------------- variants


def test_questions_of_each_variant(scenes: CocoDataset, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "ASKED_ALL", 3)
    shown, every, classes = evaluation.shown_classes(scenes, split), np.array(split.all), len(split.all)
    assert shown.sum() == len({(i.image_id, i.category_id) for i in scenes.instances})
    questions = evaluation.questions_of(scenes, split, VARIANTS, [(1, 0), (5, 0), (5, 1)])
    parts = {name: part.reset_index() for name, part in questions.groupby(["variant", "shots", "seed"])}
    assert len(parts) == 3 + 1 + 2 + 1 and len(parts["all_classes", 5, 0]) == 3 * classes
    oracle, wrong, noise = parts["class_oracle", 5, 1], parts["wrong_reference", 5, 1], parts["random_reference", 5, 0]
    assert len(oracle) == shown.sum() and oracle[["image", "category"]].equals(wrong[["image", "category"]])
    assert (every[oracle["embedding"] - 2 * classes] == oracle["category"]).all()
    assert (noise["embedding"] - oracle["embedding"] == 2 * classes).all()
    assert not shown[wrong["image"], wrong["embedding"] - 2 * classes].any()
    assert np.array_equal(
        *(np.isin(ids, split.base) for ids in (every[wrong["embedding"] % classes], wrong["category"]))
    )
    with pytest.raises(StudyError, match="shows every category"):
        evaluation.wrong_classes(np.ones((1, 3), bool), Split((1, 2), (3,)), 0)


def test_perfect_answers_score_100_and_follow_their_questions(scenes: CocoDataset, split: Split, data: SamData) -> None:
    answers = perfect(scenes, split)
    table = pd.concat([answers.ap(answers.artists, samples=20), answers.mask_ap(SAM, data, samples=20)])
    assert len(table) == (len(VARIANTS) + 2 * len(COMPARED) + 1) * 2
    boxes = table[table["iou_type"] == "bbox"].set_index(["variant", "artists", "split"])["AP"]
    assert answers.effect("base").value == pytest.approx(100) and answers.effect("base", "novel").value == 0
    for variant in ("class_oracle", "all_classes", "random_reference"):
        assert boxes[variant].to_numpy() == pytest.approx(100)
    # nothing was found by the wrong references, as no image shows their class
    assert boxes["wrong_reference"].to_numpy() == pytest.approx(0)
    assert list(table.columns) == [
        "variant", "split", "shots", "artists", "iou_type", "AP", "AP50", "AP75", "AR100", "low", "high", "seeds",
    ]  # fmt: skip
    assert not table.isna().to_numpy().any()


def test_only_objects_by_one_split_of_artists_count(scenes: CocoDataset) -> None:
    kept = evaluation.by_artists(scenes, "test")
    assert [i.crowd for i in kept.instances] == [i.split == "train" for i in scenes.instances]
    assert {i.split for i in scenes.instances} == {"train", "test"}


def test_results_are_in_pixels_of_the_image(scenes: CocoDataset, split: Split) -> None:
    results = perfect(scenes, split).results("class_oracle", (1, 1))
    found = sorted((r["image_id"], r["category_id"], *np.round(r["bbox"], 2)) for r in results)
    boxes = [(i.image_id, i.category_id, i.box) for i in scenes.instances]
    assert found == sorted((n, c, *np.round([x0, y0, x1 - x0, y1 - y0], 2)) for n, c, (x0, y0, x1, y1) in boxes)
    weak = [{**r, "score": 0.4} for r in results]
    target = scenes.instances[0]
    best = evaluation.best_detections(scenes, [*results, *weak], target)
    assert best and all(r["score"] == 1 and r["iou"] == pytest.approx(1, abs=1e-3) for r in best)
    assert evaluation.best_detections(scenes, [], target) == []


# ------------------------------------------------------------------------------------------------------- detecting


def test_detect_keeps_the_best_of_the_models_output(data: SamData) -> None:
    model = build_model(TINY, SAM, 5, 0).eval()
    embeddings = torch.randn(3, TINY.dim, generator=torch.Generator().manual_seed(0)) * 5
    questions = pd.DataFrame({"image": [5, 2, 2, 2], "embedding": [1, 0, 1, 2]})
    found = evaluation.detect(model, data, embeddings, questions, TINY)
    assert found["question"].nunique() == 4
    with torch.no_grad():
        image = data.maps(np.array([5]))
        output = model.decode(model.encode(image), embeddings[None, 1:2])
    scores, best = output.logits[-1, 0, 0], found[found["question"] == 0]
    np.testing.assert_allclose(best["score"], scores.sigmoid().sort(descending=True)[0][:4], rtol=1e-4)
    x, y, width, height = output.boxes[-1, 0, 0, scores.argmax()].tolist()
    corners = np.clip([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 0, 1)
    np.testing.assert_allclose(best[CORNERS].iloc[0].astype(float), corners, rtol=1e-3, atol=1e-4)
    assert len(evaluation.detect(model, data, embeddings, questions, dataclasses.replace(TINY, min_score=1.0))) == 0


def test_masks_are_sams_for_the_boxes(scenes: CocoDataset, split: Split, data: SamData) -> None:
    results = perfect(scenes, split).results("class_oracle", (1, 0))
    for result in evaluation.with_masks(SAM, data, results)[::9]:
        box = torch.tensor([evaluation.corners(result)]).round().float()
        neck = data.maps(np.array([list(scenes.images).index(result["image_id"])])).neck
        assert (mask_of(result["segmentation"]) == box_masks(SAM, neck, box, SIZE, SIZE)[0]).mean() > 0.999


def test_embeddings_of_averaged_tokens_and_matching_noise() -> None:
    model = build_model(TINY, SAM, 5, 0).eval()
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
    bbox = [x0 + shift, y0 + shift, x1 - x0, y1 - y0]
    return {"image_id": instance.image_id, "category_id": category, "score": score, "bbox": bbox}


def test_fates_by_the_rule(scenes: CocoDataset, split: Split) -> None:
    first = scenes.instances[0]
    base = next(c for c in split.base if c != first.category_id)
    novel = next(c for c in split.novel if c != first.category_id)
    own = _result(scenes, first.category_id, 0.9)
    cases: list[tuple[list[dict[str, Any]], str]] = [
        ([], "missed"),
        ([_result(scenes, first.category_id, 0.9, shift=150)], "missed"),
        ([own], "found"),
        ([own, _result(scenes, base, 0.95)], "confused with base"),
        ([own, _result(scenes, base, 0.85)], "found"),
        ([_result(scenes, novel, 0.1)], "confused with novel"),
    ]
    for results, fate in cases:
        assert evaluation.fates(scenes, split, results).iloc[0]["fate"] == fate
    everything = evaluation.fates(scenes, split, [])
    assert len(everything) == len(scenes.instances)
    shares = evaluation.fate_shares(everything)
    assert (shares.loc[shares["fate"] == "missed", "share"] == 100).all()
    assert "base, test artists" in set(shares["group"])
