"""AP and AR against a brute-force count, bounds, and the bootstrap against COCOeval itself."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samantics.data import coco
from samantics.data.masks import box_rle
from samantics.errors import StudyError
from samantics.metrics import coco_ap as evaluation


def random_data(seed: int, images: int = 6, categories: int = 3) -> tuple[coco.CocoDataset, list[evaluation.Result]]:
    """Boxes on small images, and predictions that are shifted copies, wrong labels and noise. Scores are distinct."""
    rng = np.random.default_rng(seed)
    instances: list[coco.Instance] = []
    results: list[evaluation.Result] = []
    for image_id in range(1, images + 1):
        for _ in range(rng.integers(0, 5)):
            box = random_box(rng)
            category = int(rng.integers(1, categories + 1))
            instances.append(instance(len(instances) + 1, image_id, category, box))
            for _ in range(rng.integers(0, 4)):
                moved = shifted(rng, box)
                label = category if rng.random() < 0.8 else int(rng.integers(1, categories + 1))
                results.append(prediction(rng, image_id, label, moved))
        results.append(prediction(rng, image_id, int(rng.integers(1, categories + 1)), random_box(rng)))
    return dataset_of(range(1, images + 1), categories, instances), results


def dataset_of(images: Iterable[int], categories: int, instances: list[coco.Instance]) -> coco.CocoDataset:
    records = {n: coco.ImageRecord(n, f"{n}.png", 64, 64) for n in images}
    names = {n: f"c{n}" for n in range(1, categories + 1)}
    return coco.CocoDataset(Path("x.json"), Path(), records, names, tuple(instances), annotated=True)


def random_box(rng: np.random.Generator) -> coco.Box:
    x0, y0 = (int(v) for v in rng.integers(0, 40, 2))
    width, height = (int(v) for v in rng.integers(6, 24, 2))
    return x0, y0, x0 + width, y0 + height


def shifted(rng: np.random.Generator, box: coco.Box) -> coco.Box:
    x0, y0, x1, y1 = (round(v) for v in np.array(box) + rng.integers(-3, 4, 4))
    x0, y0 = max(x0, 0), max(y0, 0)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def instance(number: int, image_id: int, category_id: int, box: coco.Box) -> coco.Instance:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return coco.Instance(number, image_id, category_id, box, float(area), box_rle(box, 64, 64))


def prediction(rng: np.random.Generator, image_id: int, category_id: int, box: coco.Box) -> evaluation.Result:
    head = {"image_id": image_id, "category_id": category_id, "score": float(rng.random())}
    return {**head, "bbox": [float(side) for side in coco.xywh(box)], "segmentation": box_rle(box, 64, 64)}


def brute_force_ap(
    dataset: coco.CocoDataset, results: list[dict[str, Any]], category: int, threshold: float
) -> float | None:
    """AP by its definition: greedy matching in score order, precision at 101 recalls, mean. None without objects."""
    objects = [i for i in dataset.instances if i.category_id == category]
    if not objects:
        return None
    ranked = sorted((r for r in results if r["category_id"] == category), key=lambda r: -r["score"])
    taken: set[int] = set()
    hits = []
    for result in ranked:
        x, y, w, h = result["bbox"]
        best, found = threshold, None
        for one in objects:
            overlap = coco.box_iou([(x, y, x + w, y + h)], [one.box])[0, 0]
            if one.image_id == result["image_id"] and one.id not in taken and overlap >= best:
                best, found = overlap, one.id
        hits.append(found is not None)
        taken |= {found} if found is not None else set()
    recalls = np.cumsum(hits) / len(objects)
    precisions = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(np.mean([max(precisions[recalls >= t], default=0) for t in np.linspace(0, 1, 101)]))


@pytest.mark.parametrize("seed", range(8))
def test_ap_against_brute_force(seed: int) -> None:
    dataset, results = random_data(seed)
    found = evaluation.evaluate(dataset, results, "bbox")
    for metric, thresholds in (("AP", np.linspace(0.5, 0.95, 10)), ("AP50", [0.5]), ("AP75", [0.75])):
        values = [brute_force_ap(dataset, results, c, t) for c in dataset.categories for t in thresholds]
        assert found.metrics[metric] == pytest.approx(100 * np.mean([v for v in values if v is not None]))


@pytest.mark.parametrize("iou_type", evaluation.IOU_TYPES)
def test_truth_scores_100_and_nothing_scores_0(iou_type: str) -> None:
    dataset, _ = random_data(0)
    perfect = evaluation.evaluate(dataset, evaluation.perfect_results(dataset), iou_type)
    assert perfect.metrics["AP"] == pytest.approx(100) and perfect.metrics["AR100"] == pytest.approx(100)
    assert perfect.metrics["APl"] is None  # no object of that size: nothing measured is not zero
    assert evaluation.evaluate(dataset, [], iou_type).metrics["AP"] == 0


def test_metrics_are_cocoevals_own_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluation.evaluate(*random_data(1), "segm")
    assert capsys.readouterr().out == ""
    with contextlib.redirect_stdout(io.StringIO()):
        found.coco.summarize()
    own = [None if value < 0 else 100 * value for value in found.coco.stats[:9]]
    assert list(found.metrics.values()) == own


def test_some_categories_of_an_evaluation_are_evaluated_as_alone() -> None:
    dataset, results = random_data(3)
    alone, part = (evaluation.evaluate(dataset, results, "bbox", [1, 3]), evaluation.evaluate(dataset, results, "bbox"))
    assert part.of([1, 3]).metrics == alone.metrics
    assert evaluation.ap_interval([part.of([1, 3])], samples=20) == evaluation.ap_interval([alone], samples=20)
    quick = evaluation.evaluate(dataset, results, "bbox", [1, 3], sizes=False).metrics
    assert quick == alone.metrics | dict.fromkeys(("APs", "APm", "APl"))


@pytest.mark.parametrize("iou_type", evaluation.IOU_TYPES)
def test_more_than_100_objects_in_an_image(iou_type: str) -> None:
    boxes = [(4.0 * (n % 16), 4.0 * (n // 16), 4.0 * (n % 16) + 3, 4.0 * (n // 16) + 3) for n in range(150)]
    dataset = dataset_of([1], 1, [instance(n, 1, 1, box) for n, box in enumerate(boxes, start=1)])
    found = evaluation.evaluate(dataset, evaluation.perfect_results(dataset), iou_type)
    assert found.metrics["AP"] == found.metrics["AR100"] == pytest.approx(100)
    assert evaluation.ap_interval([found], samples=10).value == pytest.approx(100)


def test_boxes_without_masks_count_for_box_ap_only() -> None:
    dataset, results = random_data(0)
    boxes = dataclasses.replace(
        dataset, instances=tuple(dataclasses.replace(i, box_only=True) for i in dataset.instances)
    )
    by_box = [evaluation.evaluate(data, results, "bbox").metrics for data in (dataset, boxes)]
    assert by_box[0] == by_box[1] and evaluation.evaluate(boxes, results, "segm").metrics["AP"] is None
    half = dataclasses.replace(dataset, instances=(*dataset.instances[:4], *boxes.instances[4:]))
    perfect = evaluation.evaluate(half, evaluation.perfect_results(half), "segm")
    assert perfect.metrics["AP"] == pytest.approx(100)  # the others are ignored, and so is what falls on them


@pytest.mark.parametrize("seed", range(4))
def test_bootstrap_accumulates_as_cocoeval(seed: int) -> None:
    """Every image drawn once gives COCOeval's AP; an image drawn twice counts as two images."""
    dataset, results = random_data(seed)
    found = evaluation.evaluate(dataset, results, "segm")
    assert evaluation.ap_interval([found], samples=20).value == pytest.approx(found.metrics["AP"])
    nothing = evaluation.evaluate(dataset, [], "segm")
    gain = evaluation.ap_difference([(1, [found]), (-1, [nothing])], 0.5, samples=20)
    assert gain.value == pytest.approx(found.metrics["AP50"])
    weights = np.array([[2, 0, 1, 3, 0, 0]], np.float32)
    assert evaluation._resampled_ap(found, weights)[0] == pytest.approx(ap_of_copies(dataset, results, weights[0]))


def ap_of_copies(dataset: coco.CocoDataset, results: list[evaluation.Result], counts: Any) -> float | None:
    images, instances, copies = [], [], []
    for image_id, count in zip(dataset.images, counts, strict=True):
        for copy in range(int(count)):
            new = image_id + 100 * copy
            images.append(new)
            instances += [instance(i.id + 1000 * copy, new, i.category_id, i.box) for i in dataset.by_image[image_id]]
            copies += [{**r, "image_id": new} for r in results if r["image_id"] == image_id]
    return evaluation.evaluate(dataset_of(images, len(dataset.categories), instances), copies, "segm").metrics["AP"]


def test_differences_are_paired() -> None:
    """Of one thing with itself nothing is left; a part and the rest add up to the whole, image by image."""
    dataset, results = random_data(3, images=40)
    every, some = (evaluation.evaluate(dataset, chosen, "segm") for chosen in (results, results[::2]))
    assert evaluation.ap_difference([(1, [every, some]), (-1, [every, some])], samples=50)[:3] == (0, 0, 0)
    plain = evaluation.ap_difference([(1, [every]), (-1, [some])], samples=300)
    assert plain.value == pytest.approx((every.metrics["AP"] or 0) - (some.metrics["AP"] or 0))
    apart = [evaluation.ap_interval([found], samples=300) for found in (every, some)]
    assert plain.high - plain.low < sum(found.high - found.low for found in apart)
    twice = evaluation.ap_difference([(1, [every]), (-1, [some]), (1, [every]), (-1, [some])], samples=300)
    assert twice[:3] == pytest.approx([2 * value for value in plain[:3]])
    assert twice.p == plain.p


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({"image_id": 99}, {}, "image 99"),
        ({"score": float("nan")}, {}, "score nan"),
        ({"score": float("inf")}, {}, "score inf"),
        *(({"bbox": [10, 10, *sides]}, {}, "the box") for sides in ((float("nan"), 40), (-40, 40), (40,))),
        ({"segmentation": {"size": [8, 10], "counts": "0P2"}}, {}, "mask of 8x10 .*has 64x64"),
        ({}, {"iou_type": "mask"}, "iou_type is 'mask'"),
        ({}, {"category_ids": [9]}, "no category 9"),
    ],
)
def test_bad_predictions_are_refused(change: dict[str, Any], options: dict[str, Any], says: str) -> None:
    dataset, results = random_data(0)
    with pytest.raises(StudyError, match=says):
        evaluation.evaluate(dataset, [{**results[0], **change}], **options)
