"""COCO files, and labelme's and SA-1B's: what is read, mended or left out with a note, refused and in which words."""

import base64
import io
import json
import os
import re
import unicodedata
import unittest.mock
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_tools

from refusals import refused
from samantics.data import coco
from samantics.data.coco import _run_lengths, box_rle
from samantics.data.coco_files import load_coco, write_coco
from samantics.data.detection import load_data
from samantics.data.references import ReferenceRule, choose_references
from samantics.metrics.coco_ap import IOU_TYPES, ap_interval, evaluate, perfect_results
from samantics.run import Run

SQUARE = [10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]


def content() -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": 100, "height": 80}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "segmentation": [SQUARE], "bbox": [10, 10, 40, 40], "area": 1600}
        ],
    }


def load(folder: Path, data: Any, **options: Any) -> coco.CocoDataset:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (100, 80)).save(folder / "a.png")
    text = data if isinstance(data, (str, bytes)) else json.dumps(data)
    (folder / "x.json").write_bytes(text.encode() if isinstance(text, str) else text)
    return load_coco(folder / "x.json", folder, **options)


def changed(key: str, **fields: Any) -> dict[str, Any]:
    """The good file with fields of its one image, category or annotation changed; ``...`` takes one out."""
    data = content()
    entry = data[key][0] | fields
    return {**data, key: [{name: value for name, value in entry.items() if value is not ...}]}


ODD_FILES = ("pipe.png", "folder.png", "loop.png")
RUNS = {"size": [80, 100]}
NAN, INF = float("nan"), float("inf")


def shaped(segmentation: Any, **fields: Any) -> dict[str, Any]:
    return changed("annotations", segmentation=segmentation, **fields)


REFUSED: list[tuple[str, Any]] = [  # words of the line, what the file holds
    ("not valid JSON", '{"images": ['),
    ("not valid JSON (maximum recursion", "[" * 100_000),
    ("not valid JSON (Extra data", '{"images": []}\n{"images": []}'),
    ("not valid JSON", '{"images": [%s]}' % ("9" * 5000)),
    ("not valid JSON ('utf-8'", json.dumps(content()).replace("cat", "chât").encode("latin-1")),
    ("not valid JSON", json.dumps(content()).encode("utf-16")[:-1]),
    ("not COCO instance data", []),
    ("not COCO instance data", NAN),
    ('no list "images"', {"images": {"a.png": {}}}),
    ("lists no images", {**content(), "images": []}),
    ("image id 7 occurs more than once", {**content(), "images": content()["images"] * 2}),
    ("category id 3 occurs more than once", {**content(), "categories": content()["categories"] * 2}),
    ("category 3: no name", changed("categories", name=...)),
    ("category [3]: id is [3] (should be a valid integer", changed("categories", id=[3])),
    ("image 7.0: id is 7.0 (should be a valid integer", changed("images", id=7.0)),
    ("image True: id is True (should be a valid integer", changed("images", id=True)),
    ("(should be less than", changed("images", id=2**80)),
    ("image 7: width is 0 (should be greater than 0)", changed("images", width=0)),
    ("image 7: width is '100' (should be a valid integer", changed("images", width="100")),
    ("its entry says 131072x131072 (image 7", changed("images", width=2**17, height=2**17)),
    ("x.json would be ", {**content(), "images": [{"id": n, "file_name": f"/{n}/a.png"} for n in (7, 8)]}),
    ("b.png is missing: add it or give its folder (image 7", changed("images", file_name="b.png")),
    ("file_name is 5 (should be a valid string", changed("images", file_name=5)),
    *(
        ("is missing", changed("images", file_name=name))
        for name in ("", "..", "a" * 500, "\ud800", "a.png\0.txt", "/etc/hostname", *ODD_FILES)
    ),
    ("annotation 1: image 8 is not listed", changed("annotations", image_id=8)),
    ("annotation 1: category 4 is not listed", changed("annotations", category_id=4)),
    ("annotation 1: no image_id", changed("annotations", image_id=...)),
    ("annotation 1: iscrowd is 2 (should be a valid boolean", changed("annotations", iscrowd=2)),
    ("annotation 1: no mask and no usable box", shaped([], bbox=[10, 10, 0, 0])),
    *(
        ("annotation 1: no usable segmentation (a polygon needs three or more x, y pairs", shaped([polygon]))
        for polygon in ([1, 2, 3, 4], SQUARE[:7], [1, 2, NAN, 9, 9, 9], [1, 2, INF, 9, 9, 9], [[1, 2], [3, 4], [5, 6]])
    ),
    *(("annotation 1: no usable segm", shaped(odd)) for odd in ("a mask", [list("abcdef")], [[10**400, *SQUARE[1:]]])),
    *(
        ("a million pixels of outline or lies as far", shaped([polygon]))
        for polygon in ([1e308, -1e308] * 3, [1e7 + n for n in SQUARE], [0, 0, 1e5, 1e5] * 100)
    ),
    ("(its size is [5, 5]", shaped({"size": [5, 5], "counts": [25]})),
    ("no usable segm", shaped({"counts": [8000]})),
    ("(its run lengths do not fill", shaped({**RUNS, "counts": [10]})),
    ("(its run lengths do not fill", shaped({**RUNS, "counts": [-9, 8009]})),
    ("(its run lengths are not all integers", shaped({**RUNS, "counts": [0.5] * 16_000})),
    ("(its run lengths break off", shaped({**RUNS, "counts": "o"})),
    ("(its run lengths are too large", shaped({**RUNS, "counts": "o" * 10**6})),
    *(("no usable segm", shaped({**RUNS, "counts": counts})) for counts in ({"a": 8000}, None, "\0é~ 0")),
]


@pytest.mark.parametrize(("words", "data"), REFUSED, ids=[f"{n} {words[:40]}" for n, (words, _) in enumerate(REFUSED)])
def test_faults_are_named_in_one_line(tmp_path: Path, words: str, data: Any) -> None:
    for name, make in zip(ODD_FILES, (os.mkfifo, os.mkdir, lambda p: p.symlink_to(p)), strict=True):
        make(tmp_path / name)
    assert str(tmp_path) in refused(re.escape(words), load, tmp_path, data)


def test_json_of_other_programs_is_read(tmp_path: Path) -> None:
    more = json.dumps({**content(), "info": {"rate": NAN, "note": "chât"}, "licenses": None}, ensure_ascii=False)
    read = [load(tmp_path, more.encode(code)).hash for code in ("utf-8-sig", "utf-16", "utf-16-le", "utf-32")]
    assert {*read} == {load(tmp_path, content()).hash}


BOXES = (
    [NAN, 10, 40, 40], [10, 10, INF, 40], [-INF, 10, INF, 40], [50, 50, -40, -40], [10, 10, 0, 0], [900, 900, 40, 40],
    [10, 10, 40], [10**400, 10, 40, 40], ["10", 10, 40, 40], [True, True, True, True], "box", {}, None,
)  # fmt: skip


def test_an_odd_box_or_area_gives_way_to_the_masks_own(tmp_path: Path) -> None:
    areas = (NAN, INF, -1, 0, 1e9, 10**400, "1600", True, None)
    for fields in (*({"bbox": box} for box in BOXES), *({"area": area} for area in areas)):
        (instance,) = load(tmp_path, changed("annotations", **fields)).instances
        assert instance.box == (10, 10, 50, 50) and instance.area == 1600, fields


def test_ids_below_and_of_zero_count_like_others(tmp_path: Path) -> None:
    """pycocotools alone takes an object of id 0 for one that nobody found."""
    data, lowest = content(), -(2**63) + 1
    data["images"][0]["id"], data["categories"][0]["id"] = -7, lowest
    data["annotations"][0] |= {"id": 0, "image_id": -7, "category_id": lowest}
    dataset = load(tmp_path, data)
    for iou_type in IOU_TYPES:
        found = evaluate(dataset, perfect_results(dataset), iou_type)
        assert found.metrics["AP"] == pytest.approx(ap_interval([found], 10).value) == pytest.approx(100)
    assert [i.id for i in choose_references(dataset, 1, rule=ReferenceRule(inset=1))[lowest]] == [0]


def test_missing_json_and_folders(tmp_path: Path) -> None:
    load(tmp_path, content())
    (tmp_path / "empty").mkdir()
    for file, images, says in (
        ("no.json", "", r"no\.json cannot be read"),
        ("x.json", "nowhere", "nowhere is not a folder"),
        ("empty", "", "empty has no images and no labelme or SA-1B files: give a COCO JSON file"),
    ):
        refused(says, load_coco, tmp_path / file, tmp_path / images)


def test_a_folder_of_images_is_data_without_annotations(tmp_path: Path, pocket_run: Run) -> None:
    load(tmp_path / "images", content())
    dataset = load_coco(tmp_path / "images", "")
    assert [record.file for record in dataset.images.values()] == ["a.png"] and not dataset.annotated
    assert dataset.notes == ("images: 1 file ('x.json'): no image that can be read: left out",)
    refused("images has no annotations, which references need", load_data, pocket_run, *[str(tmp_path / "images")] * 3)


def test_single_faults_cost_one_annotation_each(tmp_path: Path) -> None:
    data = content()
    base = data["annotations"][0]
    runs = {"size": [80, 100], "counts": [0, 160, 80 * 100 - 160]}
    beyond = {"segmentation": [[80, 60, 140, 60, 140, 120, 80, 120]], "bbox": [80, 60, 60, 60], "area": 3600}
    data["annotations"] += [
        {**base, "id": 2, "segmentation": [[200, 10, 250, 10, 250, 60]]},
        {**base, "id": 3, **beyond},
        {**base, "id": 4, "segmentation": runs, "iscrowd": 1, "bbox": [0, 0, 0, 0]},
        {**base, "id": 5, "segmentation": [[20, 20, 20, 20, 20, 20]], "area": 0, "bbox": [20, 20, 0, 0]},
        {**base, "id": 6, "image_id": 8},
        {**base, "id": 7, "segmentation": [], "bbox": [0, 0, 0, 0]},
        {**base, "id": 8, "segmentation": [SQUARE, [1, 2, 3, 4]]},
        {**base, "id": 9, "segmentation": SQUARE},
    ]
    dataset = load(tmp_path, data)
    kept = {instance.id: instance for instance in dataset.instances}
    assert set(kept) == {1, 3, 4, 8, 9}
    mask = coco.mask_of(kept[1].rle)
    assert mask.shape == (80, 100) and mask[10:50, 10:50].all() and mask.sum() == kept[1].area == 1600
    assert kept[1].box == (10, 10, 50, 50) and coco.xywh(kept[1].box) == [10, 10, 40, 40] and dataset.has_masks
    assert kept[3].box == (80, 60, 100, 80) and kept[3].area == 400
    assert kept[4].crowd and kept[4].box == (0, 0, 2, 80)
    assert kept[8].rle == kept[9].rle == kept[1].rle
    assert dataset.notes == (
        "x.json: 2 annotations (2, 5): no pixel of the mask lies in the image: left out",
        "x.json: 1 annotation (3): reach outside the image: cut at the frame",
        "x.json: 1 annotation (6): image 8 is not listed: left out",
        "x.json: 1 annotation (7): no mask and no usable box: left out",
        "x.json: 1 annotation (8): a polygon of fewer than three points beside others: dropped",
    )


def test_odd_annotation_ids_are_numbered(tmp_path: Path) -> None:
    for ids in ((1, 1), ("1", "b"), (None, 1), (2**80, 1)):
        annotations = [{**content()["annotations"][0], "id": number} for number in ids]
        dataset = load(tmp_path, {**content(), "annotations": ["no annotation", *annotations]})
        assert [i.id for i in dataset.instances] == [2, 3] and "numbered from 1" in dataset.notes[0]


def test_boxes_without_masks_and_crowds_only_are_noted(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"area": ..., "bbox": [10.5, 10, 40, 40]}
    for segmentation in (..., None, [], [[]]):
        dataset = load(tmp_path, shaped(segmentation, **fields))
        (instance,) = dataset.instances
        assert instance.box_only and not dataset.has_masks and instance.area == 1600
        assert coco.mask_of(instance.rle).sum() == 41 * 40 and coco.mask_of(instance.rle)[10:50, 10:51].all()
        assert "1 object (1): a box and no mask" in dataset.notes[0]
    write_coco(tmp_path / "x.json", [*dataset.images.values()], dataset.categories, dataset.instances)
    assert load_coco(tmp_path / "x.json", tmp_path).instances == dataset.instances
    assert load(tmp_path, shaped(box_rle(instance.box, 80, 100), **fields)).hash != dataset.hash
    assert not load(tmp_path, changed("annotations", iscrowd="0")).instances[0].crowd
    assert "all 1 objects are marked as crowds" in load(tmp_path, changed("annotations", iscrowd=1)).notes[0]


@pytest.mark.parametrize(
    "name",
    [r"..\..\up\a.png", "/data/set/a.png", r"C:\x\a.png", r"\\server\a.png", "x/../../a.png", "val2017/a.png",
     "https://x.org/1/a.png"],
)  # fmt: skip
def test_foreign_paths_are_found_by_name_inside_the_folder(name: str, tmp_path: Path) -> None:
    images = tmp_path / "images" / "deep"
    images.mkdir(parents=True)
    (tmp_path / "images" / "@eaDir").mkdir()
    for place in (images, tmp_path, tmp_path / "images" / "@eaDir"):
        Image.new("RGB", (100, 80), (9, 8, 7) if place == images else (0, 0, 0)).save(place / "a.png")
    field = {"file_name": ..., "coco_url": name} if name.startswith("http") else {"file_name": name}
    (tmp_path / "x.json").write_text(json.dumps(changed("images", **field)))
    dataset = load_coco(tmp_path / "x.json", tmp_path / "images")
    assert coco.read_image(dataset, 7).getpixel((0, 0)) == (9, 8, 7)
    assert len(dataset.notes) == (name[:3] not in ("val", "htt", "C:\\"))
    (images / "twice").mkdir()
    Image.new("RGB", (100, 80)).save(images / "twice" / "a.png")
    says = r"image 7 of .* could be .*a\.png or .*a\.png: give the folder"
    refused(says, load_coco, tmp_path / "x.json", tmp_path / "images")


def test_sizes_are_read_and_accents_found(tmp_path: Path) -> None:
    Image.new("RGB", (100, 80)).save(tmp_path / unicodedata.normalize("NFD", "Café.png"))
    named = {"file_name": unicodedata.normalize("NFC", "Café.png")}
    dataset = load(tmp_path, changed("images", width=..., height=None, **named))
    assert (dataset.images[7].width, dataset.images[7].height) == (100, 80)
    assert dataset.notes == ("x.json: 1 image (7): no width and height: read from the image files",)


def test_bad_images_are_found_before_the_work_or_left_out(tmp_path: Path) -> None:
    """Four images: good, missing, cut short, and of another size; an object on each."""
    data = content()
    data["images"] = [{"id": n, "file_name": f"{n}.png", "width": 100, "height": 80} for n in range(4)]
    data["annotations"] = [{**data["annotations"][0], "id": n + 1, "image_id": n} for n in range(4)]
    for number, size in ((0, (100, 80)), (2, (100, 80)), (3, (50, 50))):
        Image.effect_noise(size, 90).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:2000])
    for number, says in ((1, "is missing: "), (2, "cannot be read "), (3, r"has 50x50 .* says 100x80 \(image 3\)")):
        few = {**data, "images": [data["images"][n] for n in (0, number)], "annotations": []}
        says = rf"{number}\.png {says}.*1 of 2 images of .* missing or bad; .*05 --skip"
        refused(says, load, tmp_path, few)
    dataset = load(tmp_path, data, skip_bad_images=True)
    assert list(dataset.images) == [0] and [i.id for i in dataset.instances] == [1]
    assert dataset.notes == ("x.json: 3 images (1, 2, 3): missing, damaged or of another size: left out",)
    few["images"] = few["images"][1:]
    refused(r"3\.png has .*1 of 1 images of .* are missing or bad\)", load, tmp_path, few, skip_bad_images=True)
    (folder := tmp_path / "plain").mkdir()  # without annotations
    for number in (0, 2):
        (tmp_path / f"{number}.png").rename(folder / f"{number}.png")
    refused(r"2\.png cannot be read .*--skip-bad-images leaves them out", load_coco, folder, folder)
    assert len(load_coco(folder, folder, skip_bad_images=True).images) == 1


def test_masks_on_photos_that_exif_turns(tmp_path: Path) -> None:
    (exif := Image.Exif())[0x0112] = 6
    Image.effect_noise((100, 80), 90).save(tmp_path / "b.jpg", exif=exif)
    words = "x.json: 1 photo ('b.jpg'): turned by EXIF: masks are taken to lie on the photo as it is"
    for size, way in (((100, 80), "stored"), ((80, 100), "shown")):
        dataset = load(tmp_path, changed("images", width=size[0], height=size[1], file_name="b.jpg"))
        assert coco.read_image(dataset, 7).size == size and dataset.notes == (f"{words} {way}",)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=400), st.integers(1, 20))
def test_run_lengths_decode_pycocotools_text(bits: list[bool], width: int) -> None:
    mask = np.zeros((-(-len(bits) // width), width), bool)
    mask.ravel()[: len(bits)] = bits
    (rle,) = coco.rles_of(mask[None])
    runs = _run_lengths(rle["counts"])
    assert sum(runs) == mask.size and sum(runs[1::2]) == mask.sum()
    assert np.array_equal(coco.mask_of(rle), mask)


def test_box_iou_against_pycocotools() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 50, (2, 12, 2))
    boxes = np.concatenate([corners.min(0), corners.max(0)], axis=1)
    as_coco = np.array([coco.xywh(tuple(box)) for box in boxes])
    assert np.allclose(coco.box_iou(boxes[:5], boxes[5:]), mask_tools.iou(as_coco[:5], as_coco[5:], [0] * 7))
    assert coco.box_iou([(1, 1, 1, 1)], [(1, 1, 1, 1)]) == 0


# ------------------------------------------------------------------------------------------- a file for each image


POINTS = [SQUARE[n : n + 2] for n in range(0, 8, 2)]
SHAPES: list[Any] = [
    {"label": "cat", "points": POINTS},
    {"label": "dog", "points": [[60, 60], [50, 40]], "shape_type": "rectangle"},
    {"label": "dog", "points": [[50, 40], [60, 40]], "shape_type": "circle"},
    {"label": "cat", "points": POINTS, "group_id": 1, "shape_type": "polygon"},
    {"label": "cat", "points": [[60, 10], [70, 10], [70, 20]], "group_id": 1, "shape_type": "polygon"},
    {"label": "cat", "points": POINTS[:2], "shape_type": "line"},
    {"label": "cat", "points": "odd"},
    "odd",
]


def per_image(folder: Path, *contents: Any) -> Path:
    """Files of their own, each beside its image, in a folder; the image's name leads to another computer."""
    for number, one in enumerate(contents):
        place = folder / f"part{number}"
        place.mkdir(parents=True)
        Image.new("RGB", (100, 80)).save(place / "a.png")
        (place / "a.json").write_text(json.dumps(one))
    return folder


def test_labelme(tmp_path: Path) -> None:
    one = {"version": "5", "imagePath": "a.png", "imageWidth": 100, "imageHeight": 80, "imageData": None}
    path = per_image(tmp_path, {**one, "shapes": SHAPES}, {**one, "imageWidth": "odd", "shapes": SHAPES[:1]})
    (tmp_path / "notes.json").write_text("{")
    dataset = load_coco(path, path)
    assert [r.file for r in dataset.images.values()] == ["part0/a.png", "part1/a.png"]
    cat, dog, circle, both, other = dataset.instances
    assert [dataset.categories[i.category_id] for i in dataset.instances] == ["cat", "dog", "dog", "cat", "cat"]
    assert cat.box == (10, 10, 50, 50) and cat.area == 1600 and cat.rle == other.rle
    assert dog.box_only and dog.box == (50, 40, 60, 60) and 300 < circle.area < 320
    assert both.box == (10, 10, 70, 50) and 1640 < both.area < 1660
    assert sum("left out" in note for note in dataset.notes) == 2 and "1 file ('notes.json')" in dataset.notes[0]
    alone = load_coco(path / "part1" / "a.json", path / "part1")
    assert [i.rle for i in alone.instances] == [cat.rle]
    bitmap, texts = np.zeros((20, 30), bool), ["odd"]
    bitmap[5:, 10:] = True
    for kind in ("PNG", "EPS"):  # Pillow would start Ghostscript to read the other
        Image.fromarray(bitmap).convert("L").save(file := io.BytesIO(), kind)
        texts.append(base64.b64encode(file.getvalue()).decode())
    shape = {"label": "cat", "points": [[40, 30], [70, 50]], "shape_type": "mask"}
    path = per_image(tmp_path / "bitmaps", {**one, "shapes": [{**shape, "mask": text} for text in texts]})
    with unittest.mock.patch("PIL.EpsImagePlugin.Ghostscript", side_effect=AssertionError) as started:
        odd, mask, program = load_coco(path, path).instances
    assert (coco.mask_of(mask.rle)[30:50, 40:70] == bitmap).all() and mask.area == 300
    assert odd.box_only and program.box_only and not started.called


def test_sa1b(tmp_path: Path, pocket_run: Run) -> None:
    image = {"image_id": 5, "file_name": "a.png", "width": 100, "height": 80}
    masks = [{"id": 9, "segmentation": {"size": [80, 100], "counts": [800, 900, 6300]}, "predicted_iou": 0.9}, 3]
    path = per_image(tmp_path / "sa1b", {"image": image, "annotations": masks})
    (one,) = load_coco(path, path).instances
    assert one.area == 900
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    (tmp_path / "x.json").write_text(json.dumps(content()))
    given = {"references": str(tmp_path / "x.json"), "targets": str(path), "images": str(tmp_path)}
    data = load_data(pocket_run, **given, target_images=str(path), min_area=1600)
    assert data.rule.min_area == 1600
    assert len(data.targets.images) == 1 and not data.targets.annotated and data.names == {3: "cat"}
    assert "a.json" not in str(data.notes) and "masks have no names: the targets are not measured" in str(data.notes)
