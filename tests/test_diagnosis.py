"""Oracles and errors by kind on a scene small enough to judge by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samantics.data import coco
from samantics.metrics.coco_ap import Result, evaluate
from samantics.training_free import diagnosis, oracles
from samantics.training_free.proposals import Proposals, objects_of, true_masks

BOXES = [(0, 0, 20, 20), (30, 0, 50, 20), (0, 30, 20, 50), (40, 40, 58, 58)]


def rle(box: tuple[int, int, int, int]) -> coco.Rle:
    mask = np.zeros((60, 60), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return coco.rles_of(mask[None])[0]


def instance(number: int, box: tuple[int, int, int, int], category: int, **more: Any) -> coco.Instance:
    return coco.Instance(number, 1, category, box, float((box[2] - box[0]) * (box[3] - box[1])), rle(box), **more)


def scene() -> coco.CocoDataset:
    """Four objects of classes 1, 1, 2, 2 and an image without any."""
    objects = tuple(instance(n + 1, box, 1 + n // 2) for n, box in enumerate(BOXES))
    images = {n: coco.ImageRecord(n, f"{n}.png", 60, 60) for n in (1, 2)}
    return coco.CocoDataset(Path("x.json"), Path(), images, {1: "cat", 2: "dog"}, objects, annotated=True)


def result(box: tuple[int, int, int, int], category: int, score: float, image_id: int = 1) -> Result:
    xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    return {"image_id": image_id, "category_id": category, "bbox": xywh, "segmentation": rle(box), "score": score}


RESULTS = [
    result(BOXES[0], 1, 0.9),
    result((1, 0, 21, 20), 1, 0.8),  # the same object again
    result(BOXES[1], 2, 0.7),  # wrong class
    result((0, 40, 20, 60), 2, 0.6),  # a third of the object
    result((0, 42, 20, 60), 1, 0.5),  # as badly placed, and wrong
    result((22, 22, 28, 28), 1, 0.4),
    result((0, 0, 9, 9), 1, 0.3, image_id=2),
]


def test_verdicts() -> None:
    found = diagnosis.verdicts(scene(), RESULTS)
    kinds = ["correct", "duplicate", "class", "location", "both", "background", "background"]
    assert found["kind"].tolist() == kinds
    assert [None if o is None else o.id for o in found["object"]] == [1, None, 2, 3, None, None, None]
    assert {i.id for i in diagnosis.missed_objects(scene(), found)} == {4}

    better = diagnosis.verdicts(scene(), [result(BOXES[0], 1, 0.1), result((1, 0, 21, 20), 1, 0.8)])
    assert better["kind"].tolist() == ["duplicate", "correct"]  # better-scored results take the object
    crowd = instance(9, (0, 0, 60, 60), 1, crowd=True)
    crowded = dataclasses.replace(scene(), instances=(*scene().instances, crowd))
    assert len(objects_of(crowded, 1)) == 4
    assert crowd not in diagnosis.missed_objects(crowded, diagnosis.verdicts(crowded, []))


def test_error_table() -> None:
    dataset = scene()
    table = diagnosis.error_table(dataset, RESULTS, diagnosis.verdicts(dataset, RESULTS)).set_index("kind")
    assert table["count"].to_dict() == dict(zip(diagnosis.KINDS, (1, 1, 1, 1, 2, 1), strict=True))
    assert table["share"].sum() == pytest.approx(100)
    base = evaluate(dataset, RESULTS, "segm").metrics["AP50"] or 0.0
    mended = [*RESULTS[:2], {**RESULTS[2], "category_id": 1}, *RESULTS[3:]]
    assert table.loc["class", "gain"] == pytest.approx((evaluate(dataset, mended, "segm").metrics["AP50"] or 0) - base)
    assert (table["gain"] >= -1e-9).all()

    truth = [result(box, 1 + n // 2, 1.0) for n, box in enumerate(BOXES)]
    none = diagnosis.error_table(dataset, truth, diagnosis.verdicts(dataset, truth))
    assert none["count"].sum() == 0 and np.allclose(none["gain"], 0)
    everything = diagnosis.error_table(dataset, [], diagnosis.verdicts(dataset, []))
    assert everything.set_index("kind")["count"].to_dict()["missed"] == 4


def proposals(boxes: list[tuple[int, int, int, int]]) -> Proposals:
    count, rles = len(boxes), tuple(rle(box) for box in boxes)
    return Proposals(
        (60, 60), rles, np.array(boxes, float).reshape(-1, 4), np.linspace(0.9, -0.1, count), np.ones(count)
    )


def test_oracles() -> None:
    dataset = scene()
    found = {1: proposals([*BOXES[:3], (40, 40, 58, 52), (5, 5, 15, 15)]), 2: proposals([])}
    named = oracles.with_true_classes(dataset, found)
    assert [r["category_id"] for r in named] == [1, 1, 2, 2]  # the part of an object below IoU 0.5 is dropped
    assert all(r["score"] > 0 for r in named)
    best = oracles.best_masks(dataset, found)
    assert evaluate(dataset, best, "segm").metrics["AP50"] == pytest.approx(100)
    true = true_masks(dataset)
    assert len(true[1]) == 4 and len(true[2]) == 0
    assert evaluate(dataset, oracles.best_masks(dataset, true), "segm").metrics["AP"] == pytest.approx(100)


def test_recall_ceiling() -> None:
    dataset = scene()
    covered = oracles.covered(dataset, {1: proposals([*BOXES[:2], (40, 40, 58, 52)]), 2: proposals([])})
    assert covered["iou"].tolist() == pytest.approx([1, 1, 0, 12 / 18])
    recall = oracles.recall(covered)
    assert recall.value == pytest.approx(100 * (1 + 1 + 0 + 0.4) / 4)
    assert recall.low <= 60 <= recall.high


def test_wholes_parts_and_others() -> None:
    """An object, three fifths of one (still the object), a fifth of one, half beside one, and the whole image."""
    masks = [BOXES[0], (30, 0, 50, 12), (0, 30, 20, 34), (10, 0, 30, 20), (0, 0, 60, 60)]
    assert oracles.proposal_kinds(scene(), 1, [rle(box) for box in masks]).tolist() == [2, 1, 2]
    assert oracles.proposal_kinds(scene(), 1, []).tolist() == [0, 0, 0]
    assert oracles.proposal_kinds(scene(), 2, [rle(BOXES[0])]).tolist() == [0, 0, 1]


def test_best_results_and_order_of_images() -> None:
    """Image 1 has four objects, so its four best-scored results count; image 2 has none."""
    dataset = scene()
    best = diagnosis.best_results(dataset, diagnosis.verdicts(dataset, RESULTS[::-1]))
    assert best["kind"].tolist() == ["correct", "duplicate", "class", "location"]
    assert best.index.tolist() == [6, 5, 4, 3]
    order = diagnosis.ranked_images(dataset, best)
    assert order.to_numpy().tolist() == [[1, 4, 1, 0.25]]
    assert len(diagnosis.ranked_images(dataset, best, least=99)) == 1  # those with the most objects stand for them
    assert diagnosis.confusions(best, dataset.categories).to_numpy().tolist() == [["cat", "dog", 1]]
