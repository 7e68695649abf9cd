"""Detections, controls, AP rows, fates and numbers of class structure: known answers, brute force, the packages'."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score, silhouette_score

from refusals import refused
from samantics.data.coco import CocoDataset, mask_of, xywh
from samantics.incontext import evaluation, separability
from samantics.incontext.evaluation import COMPARED, CORNERS, VARIANTS, Answers
from samantics.incontext.tokens import SamData, box_masks, object_arrays, sam_data
from samantics.incontext.training import Split, split_categories
from samantics.mojiworld.rendered import write_scenes
from samantics.mojiworld.world import STREAMS, World
from samantics.scales import POCKET_NOVEL
from test_incontext import DIM, ENCODER, SAM, SIZE, TINY, untrained


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return write_scenes(World(SIZE), STREAMS["targets"], 8, tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def split(scenes: CocoDataset) -> Split:
    return split_categories(scenes, POCKET_NOVEL)


@pytest.fixture(scope="module")
def data(scenes: CocoDataset, tmp_path_factory: pytest.TempPathFactory) -> SamData:
    return sam_data(ENCODER, scenes, TINY, tmp_path_factory.mktemp("maps"))


@pytest.fixture(scope="module")
def perfect(scenes: CocoDataset, split: Split) -> Answers:
    """Every object found by its own class in two draws, also with random embeddings."""
    objects = object_arrays(scenes, 2 * SIZE)
    questions = evaluation.questions_of(scenes, split, VARIANTS, [(1, 0), (1, 1)])
    asked = questions.assign(question=questions.index, meant=np.array(split.all)[questions["embedding"] % 80])
    table = pd.DataFrame(objects.boxes / (2 * SIZE), columns=CORNERS).assign(score=np.float32(1), image=objects.image)
    table = table.assign(meant=objects.categories).merge(asked, on=["image", "meant"])
    return Answers(scenes, split, 2 * SIZE, questions, table[["question", "score", *CORNERS]])


def test_questions_of_each_variant(scenes: CocoDataset, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "ASKED_ALL", 3)
    every, classes = np.array(split.all), len(split.all)
    shown = np.array([np.isin(split.all, [i.category_id for i in found]) for found in scenes.by_image.values()])
    questions = evaluation.questions_of(scenes, split, VARIANTS, [(1, 0), (5, 0), (5, 1)])
    parts = {name: part.reset_index() for name, part in questions.groupby(["variant", "shots", "seed"])}
    assert len(parts) == 3 + 1 + 2 + 1 and len(parts["all_classes", 5, 0]) == 3 * classes
    oracle, wrong, noise = parts["class_oracle", 5, 1], parts["wrong_reference", 5, 1], parts["random_reference", 5, 0]
    assert len(oracle) == shown.sum() and oracle[["image", "category"]].equals(wrong[["image", "category"]])
    assert (every[oracle["embedding"] - 2 * classes] == oracle["category"]).all()
    assert (noise["embedding"] - oracle["embedding"] == 2 * classes).all()
    assert not shown[wrong["image"], wrong["embedding"] - 2 * classes].any()
    for_wrong = every[wrong["embedding"] % classes]
    assert np.array_equal(*(np.isin(ids, split.base) for ids in (for_wrong, wrong["category"])))


def test_perfect_answers_score_100_and_follow_their_questions(perfect: Answers, data: SamData) -> None:
    table = pd.concat([perfect.ap(perfect.artists), perfect.mask_ap(SAM, data)])
    assert len(table) == (len(VARIANTS) + 2 * len(COMPARED) + 1) * 2
    boxes = table[table["iou_type"] == "bbox"].set_index(["variant", "artists", "split"])["AP"]
    effects = perfect.effects().set_index(["artists", "split"])["value"]
    assert effects["all", "base"] == pytest.approx(100) and effects["all", "base - novel"] == 0
    assert len(effects) == 3 * 3 and len(evaluation.arm_effects({"one": perfect, "other": perfect})) == 3 * 3
    for variant in ("class_oracle", "all_classes", "random_reference"):
        assert boxes[variant].to_numpy() == pytest.approx(100)
    # nothing was found by the wrong references, as no image shows their class
    assert boxes["wrong_reference"].to_numpy() == pytest.approx(0)
    columns = "variant split shots artists iou_type AP AP50 AP75 AR100 low high seeds"
    assert " ".join(table.columns) == columns
    assert not table.isna().to_numpy().any()
    by_test_artists = perfect.dataset.by_artists("test").instances  # the others are ignored
    assert [i.crowd for i in by_test_artists] == [i.split == "train" for i in perfect.dataset.instances]


def test_results_are_in_pixels_of_the_image(scenes: CocoDataset, perfect: Answers) -> None:
    results = perfect.results("class_oracle", (1, 1))
    found = sorted((r["image_id"], r["category_id"], *np.round(r["bbox"], 2)) for r in results)
    boxes = [(i.image_id, i.category_id, i.box) for i in scenes.instances]
    assert found == sorted((n, c, *np.round([x0, y0, x1 - x0, y1 - y0], 2)) for n, c, (x0, y0, x1, y1) in boxes)
    weak = [{**r, "score": 0.4} for r in results]
    target = scenes.instances[0]
    best = evaluation.best_detections(scenes, [*results, *weak], target)
    assert best and all(r["score"] == 1 and r["iou"] == pytest.approx(1, abs=1e-3) for r in best)
    assert evaluation.best_detections(scenes, [], target) == []


def test_detect_keeps_the_best_of_the_models_output(data: SamData) -> None:
    model = untrained().eval()
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


def test_masks_are_sams_for_the_boxes(scenes: CocoDataset, perfect: Answers, data: SamData) -> None:
    for result in evaluation.with_masks(SAM, data, perfect.results("class_oracle", (1, 0)))[::9]:
        box = torch.tensor([evaluation.corners(result)]).round().float()
        neck = data.maps(np.array([list(scenes.images).index(result["image_id"])])).neck
        assert (mask_of(result["segmentation"]) == box_masks(SAM, neck, box, SIZE, SIZE)[0]).mean() > 0.999


def test_embeddings_of_averaged_tokens_and_matching_noise() -> None:
    model = untrained().eval()
    tokens = np.random.default_rng(0).normal(size=(6, 4, DIM)).astype(np.float16)
    embeddings = evaluation.class_embeddings(model, tokens, np.array([[0, 1], [2, 5]]))
    averaged = torch.from_numpy(tokens[[2, 5]].astype(np.float32).mean(0, keepdims=True))
    torch.testing.assert_close(embeddings[1:], model.fuser(averaged))
    noise = evaluation.random_embeddings(embeddings, 4000, seed=0)
    torch.testing.assert_close(noise.mean(0), embeddings.mean(0), atol=0.02, rtol=0.1)
    torch.testing.assert_close(noise.std(0), embeddings.std(0), atol=0.02, rtol=0.1)


def test_fates_by_the_rule(scenes: CocoDataset, split: Split) -> None:
    first = scenes.instances[0]
    base, novel = (next(c for c in side if c != first.category_id) for side in split[:2])
    right = {"image_id": first.image_id, "category_id": first.category_id, "score": 0.9, "bbox": xywh(first.box)}
    x, y, width, height = right["bbox"]
    cases: list[tuple[list[dict[str, Any]], str]] = [
        ([], "missed"),
        ([right | {"bbox": [x + 150, y + 150, width, height]}], "missed"),
        ([right], "found"),
        ([right, right | {"category_id": base, "score": 0.95}], "confused with base"),
        ([right, right | {"category_id": base, "score": 0.85}], "found"),
        ([right | {"category_id": novel, "score": 0.1}], "confused with novel"),
    ]
    for results, fate in cases:
        assert evaluation.fates(scenes, split, results).iloc[0]["fate"] == fate
    everything = evaluation.fates(scenes, split, [])
    assert len(everything) == len(scenes.instances)
    shares = evaluation.fate_shares(everything)
    assert (shares.loc[shares["fate"] == "missed", "share"] == 100).all()
    assert "base, test artists" in set(shares["group"])


RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(6), 20)
APART = np.eye(16)[LABELS] * 8 + RNG.normal(size=(120, 16))
MIXED = RNG.normal(size=(120, 16))
POINTS = pd.DataFrame({"category_id": LABELS, "split": np.where(LABELS < 4, "base", "novel"), "artists": "test"})
SETS = separability.class_sets([0, 1, 2, 3], [4, 5])


def test_nmi_against_scikit_learn() -> None:
    mixed = np.where(RNG.random(120) < 0.5, LABELS, RNG.integers(0, 7, 120))
    for clusters in (mixed, LABELS * 3, np.zeros(120, int)):
        assert separability.nmi(LABELS, clusters) == pytest.approx(normalized_mutual_info_score(LABELS, clusters))


def test_neighbours_against_brute_force() -> None:
    references, points = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (APART, MIXED))
    predicted = separability.knn_predictions(APART, LABELS, MIXED)
    for point in range(0, 120, 7):
        cosines = references @ points[point]
        nearest = np.argsort(-cosines)[: separability.NEIGHBOURS]
        votes = np.array([cosines[nearest][LABELS[nearest] == c].sum() for c in range(6)])
        assert votes[predicted[point]] == pytest.approx(votes[np.unique(LABELS[nearest])].max())


def test_linear_predictions_are_those_of_the_normal_equations() -> None:
    points = RNG.normal(size=(50, 16))
    mean, deviation = MIXED.mean(0), MIXED.std(0)
    x, targets = (MIXED - mean) / deviation, np.where(LABELS[:, None] == np.arange(6), 1.0, -1.0)
    weights = np.linalg.solve(x.T @ x + len(x) * np.eye(16), x.T @ (targets - targets.mean(0)))
    scores = (points - mean) / deviation @ weights + targets.mean(0)
    assert (separability.linear_predictions(MIXED, LABELS, points) == scores.argmax(1)).mean() > 0.95


def test_base_classes_come_in_sets_of_as_many_as_are_novel() -> None:
    assert SETS == [(4, 5), (0, 2), (1, 3)]
    assert [len(one) for one in separability.class_sets(range(60), range(60, 80))] == [20, 20, 20, 20]
    assert separability.class_sets([1, 2], [3, 4, 5]) == [(3, 4, 5), (1, 2)]


def test_classes_that_are_apart_are_recognised_and_mixed_ones_as_shuffled() -> None:
    again = np.eye(16)[LABELS] * 8 + RNG.normal(size=(120, 16))
    spaces = {"after": (APART, again), "before": (MIXED, again)}
    outcomes = separability.recognised(spaces, POINTS, POINTS, SETS)
    assert len(outcomes) == 2 * 2 * 120 and set(outcomes["point"]) == set(range(120))
    table = separability.summary(outcomes, spaces).set_index(["stage", "split", "metric"])
    assert len(table) == 2 * 2 * 4
    for side in ("base", "novel"):
        for probe in ("knn", "linear"):
            good, mixed = table.loc[("after", side, probe)], table.loc[("before", side, probe)]
            assert good["value"] > 0.99 and good["low"] <= good["value"] <= good["high"]
            assert mixed["value"] < 0.9 and abs(good["shuffled"] - 0.5) < 0.3
        assert table.loc[("after", side, "silhouette"), "value"] > 0.5
    base = LABELS < 4
    expected = silhouette_score(again[base], LABELS[base], metric="cosine")
    assert table.loc[("after", "base", "silhouette"), "value"] == pytest.approx(expected, abs=1e-6)
    gains = separability.class_gains(outcomes, "knn", "base")
    assert list(gains.index) == [0, 1, 2, 3] and gains.mean() > 10


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):  # scikit-learn's own
        separability.recognised({"x": (np.full((120, 4), np.nan), MIXED)}, POINTS, POINTS, SETS)
    refused("two classes", separability.recognised, {"x": (MIXED, MIXED)}, POINTS, POINTS, [(4,)])
    refused("more than 30 objects, not 20", separability.tsne_map, APART[:20])
