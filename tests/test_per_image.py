"""labelme's and SA-1B's files, one for each image: what comes of each shape, and how they go with COCO files."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samantics.data import coco
from samantics.data.detection import load_data
from samantics.errors import StudyError
from samantics.run import Run
from test_coco import SQUARE, content

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
    dataset = coco.load_coco(path, path)
    assert [r.file for r in dataset.images.values()] == ["part0/a.png", "part1/a.png"]
    cat, dog, circle, both, other = dataset.instances
    assert [dataset.categories[i.category_id] for i in dataset.instances] == ["cat", "dog", "dog", "cat", "cat"]
    assert cat.box == (10, 10, 50, 50) and cat.area == 1600 and cat.rle == other.rle
    assert dog.box_only and dog.box == (50, 40, 60, 60) and 300 < circle.area < 320
    assert both.box == (10, 10, 70, 50) and 1640 < both.area < 1660
    assert sum("left out" in note for note in dataset.notes) == 2 and "1 file ('notes.json')" in dataset.notes[0]
    alone = coco.load_coco(path / "part1" / "a.json", path / "part1")
    assert [i.rle for i in alone.instances] == [cat.rle]
    bitmap, text = np.zeros((20, 30), bool), io.BytesIO()
    bitmap[5:, 10:] = True
    Image.fromarray(bitmap).save(text, "PNG")
    shape = {"label": "cat", "points": [[40, 30], [70, 50]], "shape_type": "mask"}
    shapes = [{**shape, "mask": base64.b64encode(text.getvalue()).decode()}, {**shape, "mask": "odd"}]
    path = per_image(tmp_path / "bitmaps", {**one, "shapes": shapes})
    mask, box = coco.load_coco(path, path).instances
    assert (coco.mask_of(mask.rle)[30:50, 40:70] == bitmap).all() and mask.area == 300 and box.box_only
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match="empty has no labelme or SA-1B files: give them, or a COCO JSON file"):
        coco.load_coco(tmp_path / "empty", path)


def test_sa1b(tmp_path: Path, pocket_run: Run) -> None:
    image = {"image_id": 5, "file_name": "a.png", "width": 100, "height": 80}
    masks = [{"id": 9, "segmentation": {"size": [80, 100], "counts": [800, 900, 6300]}, "predicted_iou": 0.9}, 3]
    path = per_image(tmp_path / "sa1b", {"image": image, "annotations": masks})
    (one,) = coco.load_coco(path, path).instances
    assert one.area == 900
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    (tmp_path / "x.json").write_text(json.dumps(content()))
    data = load_data(pocket_run, str(tmp_path / "x.json"), str(path), str(tmp_path), target_images=str(path))
    assert len(data.targets.images) == 1 and not data.targets.annotated and data.names == {3: "cat"}
    assert "a.json" not in str(data.notes) and "masks have no names: the targets are not measured" in str(data.notes)
