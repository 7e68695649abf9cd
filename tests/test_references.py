"""References: the rule, the draw, and two COCO files that name or number things differently."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samantics.data import coco
from samantics.data.references import ReferenceRule, choose_references, eligible, matched_categories, shared_images
from samantics.errors import StudyError
from test_coco import content, load


def two_files(tmp_path: Path, references: Any, targets: Any) -> tuple[coco.CocoDataset, coco.CocoDataset]:
    for side in "rt":
        (tmp_path / side).mkdir(exist_ok=True)
    return load(tmp_path / "r", references), load(tmp_path / "t", targets)


def with_names(categories: dict[int, str], used: int) -> dict[str, Any]:
    data = content()
    data["categories"] = [{"id": number, "name": name} for number, name in categories.items()]
    data["annotations"][0]["category_id"] = used
    return data


def test_category_in_one_file_only(tmp_path: Path) -> None:
    both = two_files(tmp_path, with_names({3: "cat", 4: "dog"}, 4), content())
    references, names, notes = matched_categories(*both)
    assert references is both[0] and names == {3: "cat", 4: "dog"}
    assert notes[0].startswith("category 3 (cat) has no reference")
    assert notes[1] == "category 4 (dog) shows in the references only: no AP of its own"


@pytest.mark.parametrize(
    ("references", "targets", "names"),
    [
        ({1: "cat", 2: "dog"}, {11: "cat", 12: "dog"}, {11: "cat", 12: "dog"}),
        ({1: "cat", 2: "dog"}, {0: "cat", 1: "dog"}, {0: "cat", 1: "dog"}),
        ({1: "cat", 2: "dog", 5: "emu"}, {1: "Dog ", 2: "Cat"}, {1: "Dog", 2: "Cat", 8: "emu"}),
        ({1: "dog", 2: "fox"}, {1: "cat", 2: "dog"}, {1: "cat", 2: "dog", 4: "fox"}),
    ],
)
def test_categories_are_matched_by_name(references: Any, targets: Any, names: Any, tmp_path: Path) -> None:
    used = next(number for number, name in references.items() if name == "dog")
    both = two_files(tmp_path, with_names(references, used), with_names(targets, max(targets)))
    matched, found, notes = matched_categories(*both)
    assert found == names and notes[0] == "the two files number their categories differently: matched by name"
    assert found[matched.instances[0].category_id].lower() == "dog"


def test_categories_that_cannot_be_matched(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="share no category name"):
        matched_categories(*two_files(tmp_path, with_names({3: "cat"}, 3), with_names({3: "bird"}, 3)))
    twice = with_names({1: "cat", 2: "Cat"}, 1)
    with pytest.raises(StudyError, match=r"r/x\.json has two categories called 'cat'"):
        matched_categories(*two_files(tmp_path, twice, with_names({3: "cat"}, 3)))


def test_images_on_both_sides_are_warned_of(tmp_path: Path) -> None:
    both = two_files(tmp_path, content(), content())  # two copies of one picture
    for pair in (both, (both[0], both[0])):
        assert shared_images(*pair)[0].startswith("1 of 1 target images ('a.png') are among the references")
    (tmp_path / "t" / "a.png").write_bytes((tmp_path / "t" / "a.png").read_bytes()[:-1] + b"x")
    assert shared_images(*both) == ()


def box_instance(number: int, image_id: int, box: tuple[int, int, int, int], **more: Any) -> coco.Instance:
    mask = np.zeros((200, 300), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    (rle,) = coco.rles_of(mask[None])
    return coco.Instance(number, image_id, 1, box, float(mask.sum()), rle, **more)


def test_reference_rule() -> None:
    images = {n: coco.ImageRecord(n, f"{n}.png", 300, 200) for n in range(1, 9)}
    images[8] = coco.ImageRecord(8, "8.png", 1300, 200)
    good = box_instance(1, 1, (20, 20, 80, 80))
    instances = (
        good,
        box_instance(2, 2, (20, 20, 52, 52)),  # area 32 x 32: not above
        box_instance(3, 3, (12, 12, 288, 188)),  # more than half of the image
        box_instance(4, 4, (9, 20, 80, 80)),  # too near the frame
        box_instance(5, 5, (20, 20, 80, 80)),  # overlaps the next
        box_instance(6, 5, (20, 20, 80, 60)),
        box_instance(7, 6, (20, 20, 80, 80), crowd=True),
        box_instance(8, 7, (20, 20, 80, 80), split="test"),
        box_instance(9, 8, (20, 20, 80, 80)),  # image too long
    )
    dataset = coco.CocoDataset(Path("x.json"), Path(), images, {1: "cat"}, instances, annotated=True)
    assert eligible(dataset, ReferenceRule()) == [good]


def test_references_are_nested_seeded_and_from_distinct_images() -> None:
    images = {n: coco.ImageRecord(n, f"{n}.png", 300, 200) for n in range(1, 6)}
    boxes = [(20, 20, 80, 80), (120, 20, 180, 80), (220, 20, 280, 80)]
    instances = tuple(box_instance(10 * n + k, n, box) for n in images for k, box in enumerate(boxes))
    dataset = coco.CocoDataset(Path("x.json"), Path(), images, {1: "cat", 2: "dog"}, instances, annotated=True)
    many = choose_references(dataset, 10, seed=3)
    assert set(many) == {1}
    assert len(many[1]) == 5 and len({i.image_id for i in many[1]}) == 5
    assert choose_references(dataset, 2, seed=3)[1] == many[1][:2]
    assert len({choose_references(dataset, 5, seed=s)[1] for s in range(5)}) > 1
    with pytest.raises(StudyError, match="no instance can be a reference"):
        choose_references(dataset, 1, rule=ReferenceRule(min_area=1e6))


def test_a_relative_rule_asks_less_of_small_images() -> None:
    images = {1: coco.ImageRecord(1, "1.png", 300, 200)}
    small = box_instance(1, 1, (6, 6, 36, 36))
    dataset = coco.CocoDataset(Path("x.json"), Path(), images, {1: "cat"}, (small,), annotated=True)
    assert eligible(dataset, ReferenceRule(relative=True)) == [small]
    with pytest.raises(StudyError, match=r"x\.json: no instance can be a reference: 1 too small \(min_area\): add"):
        eligible(dataset, ReferenceRule())
    crowd = dataclasses.replace(dataset, instances=(dataclasses.replace(small, crowd=True),))
    with pytest.raises(StudyError, match="all 1 objects are marked as crowds"):
        eligible(crowd, ReferenceRule())
