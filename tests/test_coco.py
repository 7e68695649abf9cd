"""The COCO door: what is read, what is refused and in which words, MojiWorld scenes, the choice of references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_tools

from samantics.data import coco
from samantics.data import first_world as mojiworld
from samantics.errors import StudyError

SQUARE = [10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]


def content() -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": 100, "height": 80}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "segmentation": [SQUARE], "bbox": [10, 10, 40, 40], "area": 1600}
        ],
    }


def load(folder: Path, data: Any) -> coco.CocoDataset:
    Image.new("RGB", (100, 80)).save(folder / "a.png")
    (folder / "x.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return coco.load_coco(folder / "x.json", folder)


def test_reads_instances(tmp_path: Path) -> None:
    dataset = load(tmp_path, content())
    (instance,) = dataset.instances
    assert instance.box == (10, 10, 50, 50)
    assert instance.area == 1600
    mask = coco.mask_of(instance.rle)
    assert mask.shape == (80, 100)
    assert mask[10:50, 10:50].all() and mask.sum() == 1600
    assert coco.read_image(dataset, 7).size == (100, 80)


def broken(change: str) -> Any:
    data = content()
    (annotation,), (image,), (category,) = data["annotations"], data["images"], data["categories"]
    match change:
        case "json":
            return '{"images": ['
        case "list":
            return []
        case "no images":
            data["images"] = []
        case "missing file":
            image["file_name"] = "b.png"
        case "twice an annotation":
            data["annotations"] *= 2
        case "twice an image":
            data["images"] *= 2
        case "twice a category":
            data["categories"].append({"id": 3, "name": "dog"})
        case "unknown image":
            annotation["image_id"] = 8
        case "unknown category":
            annotation["category_id"] = 4
        case "no segmentation":
            del annotation["segmentation"]
        case "short polygon":
            annotation["segmentation"] = [[1, 2, 3, 4]]
        case "other size":
            annotation["segmentation"] = {"size": [5, 5], "counts": [25]}
        case "short runs":
            annotation["segmentation"] = {"size": [80, 100], "counts": [10]}
        case "broken runs":
            annotation["segmentation"] = {"size": [80, 100], "counts": "zzz"}
        case "no size":
            image["width"] = 0
        case "text id":
            annotation["id"] = "one"
        case "no name":
            del category["name"]
        case "way out":
            image["file_name"] = "../a.png"
        case "whole path":
            image["file_name"] = "/etc/hostname"
        case "no number":
            annotation["segmentation"] = [[1, 2, float("nan"), 9, 9, 9]]
        case "endless":
            annotation["segmentation"] = [[1, 2, float("inf"), 9, 9, 9]]
    return data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("json", "not valid JSON"),
        ("list", "not COCO instance data"),
        ("no images", "lists no images"),
        ("missing file", "b.png is missing (image 7"),
        ("twice an annotation", "annotation id 1 occurs more than once"),
        ("twice an image", "image id 7 occurs more than once"),
        ("twice a category", "category id 3 occurs more than once"),
        ("unknown image", "annotation 1 is of image 8"),
        ("unknown category", "annotation 1 is of category 4"),
        ("no segmentation", "annotation 1 has no segmentation"),
        ("short polygon", "annotation 1 has no usable segmentation"),
        ("other size", "annotation 1 has no usable segmentation (its size is [5, 5]"),
        ("short runs", "annotation 1 has no usable segmentation (its run lengths do not fill"),
        ("broken runs", "annotation 1 has no usable segmentation"),
        ("no size", "image 7 has size 0x80"),
        ("text id", "'one', not an integer"),
        ("no name", "category 3 has no name"),
        ("way out", "'../a.png', which leads out of the images' folder"),
        ("whole path", "'/etc/hostname', which leads out of the images' folder"),
        ("no number", "annotation 1 has no usable segmentation"),
        ("endless", "annotation 1 has no usable segmentation"),
    ],
)
def test_faults_are_named(tmp_path: Path, change: str, words: str) -> None:
    with pytest.raises(StudyError) as caught:
        load(tmp_path, broken(change))
    message = str(caught.value)
    assert words in message
    assert str(tmp_path) in message and "\n" not in message


def test_missing_json_and_wrong_image_size(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no\.json cannot be read"):
        coco.load_coco(tmp_path / "no.json", tmp_path)
    data = content()
    data["images"][0]["width"] = 101
    data["annotations"][0]["segmentation"] = [SQUARE]
    with pytest.raises(StudyError, match=r"a\.png has 100x80 pixels, but .* says 101x80 \(image 7\)"):
        coco.read_image(load(tmp_path, data), 7)


def test_crowds_empty_masks_and_polygons_beyond_the_frame(tmp_path: Path) -> None:
    data = content()
    base = data["annotations"][0]
    runs = {"size": [80, 100], "counts": [0, 160, 80 * 100 - 160]}
    data["annotations"] += [
        {**base, "id": 2, "segmentation": [[200, 10, 250, 10, 250, 60]]},
        {
            **base,
            "id": 3,
            "segmentation": [[80, 60, 140, 60, 140, 120, 80, 120]],
            "bbox": [80, 60, 60, 60],
            "area": 3600,
        },
        {**base, "id": 4, "segmentation": runs, "iscrowd": 1, "bbox": [0, 0, 0, 0]},
        {**base, "id": 5, "segmentation": [[20, 20, 20, 20, 20, 20]], "area": 0, "bbox": [20, 20, 0, 0]},
    ]
    dataset = load(tmp_path, data)
    kept = {instance.id: instance for instance in dataset.instances}
    assert set(kept) == {1, 3, 4}
    assert kept[3].box == (80, 60, 100, 80) and kept[3].area == 400
    assert kept[4].crowd and kept[4].box == (0, 0, 2, 80)
    assert [n.split(": ")[1].split()[1] for n in dataset.notes] == ["2", "3", "5"]


def test_targets_without_annotations(tmp_path: Path) -> None:
    dataset = load(tmp_path, {"images": content()["images"]})
    assert not dataset.annotated and dataset.by_image == {7: ()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=400), st.integers(1, 20))
def test_run_lengths_decode_pycocotools_text(bits: list[bool], width: int) -> None:
    mask = np.zeros((-(-len(bits) // width), width), bool)
    mask.ravel()[: len(bits)] = bits
    (rle,) = coco.rles_of(mask[None])
    runs = coco._run_lengths(rle["counts"])
    assert sum(runs) == mask.size and sum(runs[1::2]) == mask.sum()
    assert np.array_equal(coco.mask_of(rle), mask)


def test_category_in_one_file_only(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "t").mkdir()
    references, targets = content(), content()
    references["categories"].append({"id": 4, "name": "dog"})
    references["annotations"][0]["category_id"] = 4
    names, notes = coco.matched_categories(load(tmp_path / "r", references), load(tmp_path / "t", targets))
    assert names == {3: "cat", 4: "dog"}
    assert (
        notes[0].startswith("category 3 (cat) has no reference")
        and notes[1] == "category 4 (dog) shows in the references only: no AP of its own"
    )
    targets["categories"][0]["name"] = "bird"
    with pytest.raises(StudyError, match=r"category 3 is 'cat' in .* and 'bird' in"):
        coco.matched_categories(load(tmp_path / "r", references), load(tmp_path / "t", targets))


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
        box_instance(8, 7, (20, 20, 80, 80), held_out=True),
        box_instance(9, 8, (20, 20, 80, 80)),  # image too long
    )
    dataset = coco.CocoDataset(Path("x.json"), Path(), images, {1: "cat"}, instances, annotated=True)
    assert coco.eligible_references(dataset, coco.ReferenceRule()) == [good]


def test_references_are_nested_seeded_and_from_distinct_images() -> None:
    images = {n: coco.ImageRecord(n, f"{n}.png", 300, 200) for n in range(1, 6)}
    boxes = [(20, 20, 80, 80), (120, 20, 180, 80), (220, 20, 280, 80)]
    instances = tuple(box_instance(10 * n + k, n, box) for n in images for k, box in enumerate(boxes))
    dataset = coco.CocoDataset(Path("x.json"), Path(), images, {1: "cat", 2: "dog"}, instances, annotated=True)
    many = coco.choose_references(dataset, 10, seed=3)
    assert set(many) == {1}
    assert len(many[1]) == 5 and len({i.image_id for i in many[1]}) == 5
    assert coco.choose_references(dataset, 2, seed=3)[1] == many[1][:2]
    assert len({coco.choose_references(dataset, 5, seed=s)[1] for s in range(5)}) > 1
    with pytest.raises(StudyError, match="no instance can be a reference"):
        coco.choose_references(dataset, 1, rule=coco.ReferenceRule(min_area=1e6))


def test_box_iou_against_pycocotools() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 50, (2, 12, 2))
    boxes = np.concatenate([corners.min(0), corners.max(0)], axis=1)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    assert np.allclose(coco.box_iou(boxes[:5], boxes[5:]), mask_tools.iou(xywh[:5], xywh[5:], [0] * 7))
    assert coco.box_iou([(1, 1, 1, 1)], [(1, 1, 1, 1)]) == 0


def test_mojiworld_scenes_as_coco(tmp_path: Path) -> None:
    world = mojiworld.World(image_size=96, seed=5)
    dataset = coco.write_mojiworld(world, "test", 4, tmp_path, held_out_share=0.5)
    assert len(dataset.images) == 4 and not dataset.notes
    assert tuple(dataset.categories.values()) == mojiworld.categories() and min(dataset.categories) == 1
    for index, image_id in enumerate(dataset.images):
        picture = mojiworld.scene(world, "test", index, 0.5)
        assert np.array_equal(np.asarray(coco.read_image(dataset, image_id)), picture.image)
        for position, instance in enumerate(dataset.by_image[image_id]):
            assert np.array_equal(coco.mask_of(instance.rle), picture.instances == position + 1)
            row = picture.drawings[position]
            assert instance.drawing == mojiworld.catalogue()["drawing"][row]
            assert instance.held_out == mojiworld.held_out()[row]
            assert dataset.categories[instance.category_id] == mojiworld.catalogue()["category"][row]
    before = {p: p.stat().st_mtime_ns for p in dataset.folder.iterdir()}
    again = coco.write_mojiworld(world, "test", 4, tmp_path, held_out_share=0.5)
    assert again.hash == dataset.hash and {p: p.stat().st_mtime_ns for p in dataset.folder.iterdir()} == before
    dataset.path.unlink()  # as if killed before the end: finished images stay
    assert coco.write_mojiworld(world, "test", 4, tmp_path, held_out_share=0.5).hash == dataset.hash
    assert not any(i.held_out for i in coco.write_mojiworld(world, "train", 4, tmp_path, held_out_share=0).instances)
