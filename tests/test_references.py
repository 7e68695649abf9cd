"""References: the rule, the draw, and two COCO files that name or number things differently."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from boxes import Box, box_dataset, box_object
from refusals import refused
from samantics.data import coco
from samantics.data.references import ReferenceRule, choose_references, eligible, matched_categories, shared_images
from test_coco import content, load

SIZE = (200, 300)


def two_files(tmp_path: Path, references: Any, targets: Any) -> tuple[coco.CocoDataset, coco.CocoDataset]:
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
    cat, bird, twice = with_names({3: "cat"}, 3), with_names({3: "bird"}, 3), with_names({1: "cat", 2: "Cat"}, 1)
    refused("share no category name", matched_categories, *two_files(tmp_path, cat, bird))
    refused(r"r/x\.json has two categories called 'cat'", matched_categories, *two_files(tmp_path, twice, cat))


def test_images_on_both_sides_are_warned_of(tmp_path: Path) -> None:
    both = two_files(tmp_path, content(), content())  # two copies of one picture
    for pair in (both, (both[0], both[0])):
        assert shared_images(*pair)[0].startswith("1 of 1 target images ('a.png') are among the references")
    (tmp_path / "t" / "a.png").write_bytes((tmp_path / "t" / "a.png").read_bytes()[:-1] + b"x")
    assert shared_images(*both) == ()


def box_instance(number: int, image_id: int, box: Box, **more: Any) -> coco.Instance:
    return box_object(number, image_id, 1, box, SIZE, **more)


def dataset_of(images: int, *instances: coco.Instance) -> coco.CocoDataset:
    return box_dataset(range(1, images + 1), 1, instances, SIZE)


def test_reference_rule() -> None:
    good = box_instance(1, 1, (20, 20, 80, 80))
    dataset = dataset_of(
        8,
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
    long = dataset.images | {8: coco.ImageRecord(8, "8.png", 1300, 200)}
    assert eligible(dataclasses.replace(dataset, images=long), ReferenceRule()) == [good]


def test_references_are_nested_seeded_and_from_distinct_images() -> None:
    boxes = [(20, 20, 80, 80), (120, 20, 180, 80), (220, 20, 280, 80)]
    dataset = dataset_of(5, *(box_instance(10 * n + k, n, box) for n in range(1, 6) for k, box in enumerate(boxes)))
    many = choose_references(dataset, 10, seed=3)
    assert set(many) == {1}
    assert len(many[1]) == 5 and len({i.image_id for i in many[1]}) == 5
    assert choose_references(dataset, 2, seed=3)[1] == many[1][:2]
    assert len({choose_references(dataset, 5, seed=s)[1] for s in range(5)}) > 1


def test_a_relative_rule_asks_less_of_small_images_and_says_what_is_lacking() -> None:
    small = box_instance(1, 1, (6, 6, 36, 36))
    dataset = dataset_of(1, small)
    assert eligible(dataset, ReferenceRule(relative=True)) == [small]
    refused(r"x\.json: no instance can be a reference: 1 too small \(min_area\)", eligible, dataset, ReferenceRule())
    crowd = dataclasses.replace(dataset, instances=(dataclasses.replace(small, crowd=True),))
    refused("all 1 objects are marked as crowds", eligible, crowd, ReferenceRule())
