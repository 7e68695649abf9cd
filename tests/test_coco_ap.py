"""AP and AR against a brute-force count, bounds, and the bootstrap against COCOeval itself."""

import contextlib
import dataclasses
import io
from typing import Any

import numpy as np
import pytest

from boxes import box_dataset, box_object, box_result
from refusals import refused
from samantics.data import coco
from samantics.metrics import coco_ap
from samantics.metrics.coco_ap import IOU_TYPES, ap_difference, ap_interval, evaluate, perfect_results


def random_data(seed: int, images: int = 6, categories: int = 3) -> tuple[coco.CocoDataset, list[coco_ap.Result]]:
    """Boxes on small images, and predictions that are shifted copies, wrong labels and noise. Scores are distinct."""
    rng = np.random.default_rng(seed)
    instances: list[coco.Instance] = []
    results: list[coco_ap.Result] = []

    def random_box() -> list[int]:
        (x, y), (width, height) = rng.integers(0, 40, 2).tolist(), rng.integers(7, 24, 2).tolist()
        return [x, y, x + width, y + height]

    def predict(image_id: int, category: int, box: list[int]) -> None:
        results.append(box_result(image_id, category, box, float(rng.random())))

    for image_id in range(1, images + 1):
        for _ in range(rng.integers(0, 5)):
            box, category = random_box(), int(rng.integers(1, categories + 1))
            instances.append(box_object(len(instances) + 1, image_id, category, box))
            for _ in range(rng.integers(0, 4)):
                label = category if rng.random() < 0.8 else int(rng.integers(1, categories + 1))
                predict(image_id, label, (np.array(box) + rng.integers(-3, 4, 4)).clip(0).tolist())
        predict(image_id, int(rng.integers(1, categories + 1)), random_box())
    return box_dataset(range(1, images + 1), categories, instances), results


def brute_force_ap(
    dataset: coco.CocoDataset, results: list[dict[str, Any]], category: int, threshold: float
) -> float | None:
    """AP by its definition: greedy matching in score order, precision at 101 recalls, mean. None without objects."""
    objects = [i for i in dataset.instances if i.category_id == category]
    if not objects:
        return None
    taken: set[int] = set()
    hits = []
    for result in sorted((r for r in results if r["category_id"] == category), key=lambda r: -r["score"]):
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
    found = evaluate(dataset, results, "bbox")
    for metric, thresholds in (("AP", np.linspace(0.5, 0.95, 10)), ("AP50", [0.5]), ("AP75", [0.75])):
        values = [brute_force_ap(dataset, results, c, t) for c in dataset.categories for t in thresholds]
        assert found.metrics[metric] == pytest.approx(100 * np.mean([v for v in values if v is not None]))


@pytest.mark.parametrize("iou_type", IOU_TYPES)
def test_truth_scores_100_and_nothing_scores_0(iou_type: str) -> None:
    dataset, _ = random_data(0)
    perfect = evaluate(dataset, perfect_results(dataset), iou_type)
    assert perfect.metrics["AP"] == pytest.approx(100) and perfect.metrics["AR100"] == pytest.approx(100)
    assert perfect.metrics["APl"] is None  # no object of that size: nothing measured is not zero
    assert evaluate(dataset, [], iou_type).metrics["AP"] == 0
    boxes = [(x, y, x + 3, y + 3) for x in range(0, 60, 4) for y in range(0, 40, 4)]  # 150 in one image
    many = box_dataset([1], 1, [box_object(n, 1, 1, box) for n, box in enumerate(boxes, start=1)])
    found = evaluate(many, perfect_results(many), iou_type)
    assert found.metrics["AP"] == found.metrics["AR100"] == pytest.approx(100)
    assert ap_interval([found], samples=10).value == pytest.approx(100)


def test_metrics_are_cocoevals_own_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(*random_data(1), "segm")
    assert capsys.readouterr().out == ""
    with contextlib.redirect_stdout(io.StringIO()):
        found.coco.summarize()
    assert list(found.metrics.values()) == [None if value < 0 else 100 * value for value in found.coco.stats[:9]]


def test_some_categories_of_an_evaluation_are_evaluated_as_alone() -> None:
    dataset, results = random_data(3)
    part, without_sizes = (evaluate(dataset, results, "bbox", sizes).of([1, 3]) for sizes in (True, False))
    instances = tuple(i for i in dataset.instances if i.category_id != 2)
    data = dataclasses.replace(dataset, categories={1: "c1", 3: "c3"}, instances=instances)
    alone = evaluate(data, [r for r in results if r["category_id"] != 2], "bbox")
    assert part.metrics == alone.metrics
    assert without_sizes.metrics == alone.metrics | dict.fromkeys(("APs", "APm", "APl"))
    assert ap_interval([part], samples=20) == ap_interval([alone], samples=20)


def test_boxes_without_masks_count_for_box_ap_only() -> None:
    dataset, results = random_data(0)
    boxes = tuple(dataclasses.replace(i, box_only=True) for i in dataset.instances)
    only = dataclasses.replace(dataset, instances=boxes)
    assert evaluate(dataset, results, "bbox").metrics == evaluate(only, results, "bbox").metrics
    assert evaluate(only, results, "segm").metrics["AP"] is None
    half = dataclasses.replace(dataset, instances=(*dataset.instances[:4], *boxes[4:]))
    perfect = evaluate(half, perfect_results(half), "segm")
    assert perfect.metrics["AP"] == pytest.approx(100)  # the others are ignored, and so is what falls on them


@pytest.mark.parametrize("seed", range(4))
def test_bootstrap_accumulates_as_cocoeval(seed: int) -> None:
    """Every image drawn once gives COCOeval's AP; an image drawn twice counts as two images."""
    dataset, results = random_data(seed)
    found, nothing = (evaluate(dataset, predicted, "segm") for predicted in (results, []))
    assert ap_interval([found], samples=20).value == pytest.approx(found.metrics["AP"])
    gain = ap_difference([(1, [found]), (-1, [nothing])], 0.5, samples=20)
    assert gain.value == pytest.approx(found.metrics["AP50"])
    images, instances, copies, drawn = [], [], [], [2, 0, 1, 3, 0, 0]
    for image_id, new in ((n, n + 100 * copy) for n in dataset.images for copy in range(drawn[n - 1])):
        images.append(new)
        instances += [box_object(i.id + 10 * new, new, i.category_id, i.box) for i in dataset.by_image[image_id]]
        copies += [{**r, "image_id": new} for r in results if r["image_id"] == image_id]
    expected = evaluate(box_dataset(images, 3, instances), copies, "segm").metrics["AP"]
    assert coco_ap._resampled_ap(found, np.array([drawn], np.float32))[0] == pytest.approx(expected)


def test_differences_are_paired() -> None:
    """Of one thing with itself nothing is left; a part and the rest add up to the whole, image by image."""
    dataset, results = random_data(3, images=40)
    every, some = (evaluate(dataset, chosen, "segm") for chosen in (results, results[::2]))
    assert ap_difference([(1, [every, some]), (-1, [every, some])], samples=50)[:3] == (0, 0, 0)
    plain = ap_difference([(1, [every]), (-1, [some])], samples=300)
    difference = every.metrics["AP"] - some.metrics["AP"]
    assert plain.value == pytest.approx(difference, abs=0.01)  # COCOeval's rounding misses recalls such as 21 / 30
    apart = [ap_interval([found], samples=300) for found in (every, some)]
    assert plain.high - plain.low < sum(found.high - found.low for found in apart)
    twice = ap_difference([(1, [every]), (-1, [some]), (1, [every]), (-1, [some])], samples=300)
    assert twice[:3] == pytest.approx([2 * value for value in plain[:3]])
    assert twice.p == plain.p


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_id": 99}, "image 99"),
        ({"score": float("nan")}, "score nan"),
        ({"score": float("inf")}, "score inf"),
        *(({"bbox": [10, 10, *sides]}, "the box") for sides in ((float("nan"), 40), (-40, 40), (40,))),
        ({"segmentation": {"size": [8, 10], "counts": "0P2"}}, "mask of 8x10 .*has 64x64"),
    ],
)
def test_bad_predictions_are_refused(change: dict[str, Any], says: str) -> None:
    dataset, results = random_data(0)
    refused(says, evaluate, dataset, [{**results[0], **change}])
