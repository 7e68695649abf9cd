"""Notebook 05 on small data of other people's making, and the files that it lets them take away."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_tools

from refusals import refused
from samantics.cache import PROJECT
from samantics.data import coco
from samantics.data.coco import CocoDataset
from samantics.data.coco_files import load_coco, write_coco
from samantics.metrics.coco_ap import Result
from samantics.mojiworld.rendered import write_scenes
from samantics.mojiworld.world import Stream, World, picture, visible_drawings
from samantics.run import Run
from samantics.training_free import pipeline as pipelines
from samantics.training_free import your_data
from samantics.training_free.pipeline import Variant

WORLD = World(96, seed=3)


def reader_files(folder: Path, targets: str = "masks") -> dict[str, str]:
    """A reader's COCO files: images in sub-folders; targets with `masks`, `boxes`, `none` or as a `folder`."""
    files = {"images": str(folder)}
    for name, count in (("references", 24), ("targets", 3)):
        scenes = write_scenes(WORLD, Stream(name, name, ("scene",), "novel"), count, folder)
        records = [dataclasses.replace(r, file=f"{scenes.folder.name}/{r.file}") for r in scenes.images.values()]
        instances = [dataclasses.replace(i, box_only=targets == "boxes") for i in scenes.instances]
        path = folder / f"{name}.json"
        write_coco(path, records, scenes.categories, [] if (name, targets) == ("targets", "none") else instances)
        files[name] = str(scenes.folder if (name, targets) == ("targets", "folder") else path)
    return files


@pytest.mark.parametrize("targets", ["masks", "none", "folder", "boxes"])
def test_targets_of_every_kind_are_predicted(targets: str, tmp_path: Path, pocket_run: Run) -> None:
    """And SAM makes the masks of references that are boxes."""
    settings = dataclasses.replace(
        pocket_run.scale.pipeline, sources=("dinov2", "sam"), points_per_side=2, predicted_iou=0.0, stability=0.0,
        reference_seeds=1,
    )  # fmt: skip
    run = dataclasses.replace(pocket_run, scale=dataclasses.replace(pocket_run.scale, pipeline=settings))
    own = pipelines.start(run, **reader_files(tmp_path, targets), weights="zoo_random", proposers=("sam",))
    assert own.data.targets.annotated == (targets in ("masks", "boxes")) and len(own.data.targets.images) == 3
    assert own.data.targets.has_masks == (targets == "masks")
    results = own.predict(Variant(shots=2))
    assert {r["image_id"] for r in results} == set(own.data.targets.images)
    assert {r["category_id"] for r in results} <= own.data.names.keys()
    given = {i.id: i.rle for i in own.data.references.instances}
    changed = [i.rle != given[i.id] for group in own.references[0].values() for i in group]
    assert any(changed) == (targets == "boxes")  # not all: an untrained SAM may find nothing in some


def test_inputs(pocket_run: Run, tmp_path: Path) -> None:
    none = {"references": "", "targets": "", "images": ""}
    run, folder, files = your_data.inputs(pocket_run, "", none)
    assert run.figures == pocket_run.figures and len(list(Path(folder).glob("*/*.png"))) == 48
    assert len(load_coco(files["targets"], files["images"]).images) == 8
    old = pocket_run.figures / "own_data" / "05_ap.csv"
    old.parent.mkdir(parents=True)
    old.touch()
    run, folder, files = your_data.inputs(pocket_run, str(tmp_path), none, "official", shots=3)
    assert not old.exists()
    says = r"05_ap\.csv lies in a folder that a run on own data empties: copy it"
    refused(says, your_data.inputs, pocket_run, "", none | {"references": str(old)})
    assert run.figures.name == "own_data" and folder == str(tmp_path) and not files
    assert run.scale.weights == "official" and run.scale.pipeline.shots == 3


RECTANGLE, L = np.zeros((2, 20, 30), bool)
RECTANGLE[2:12, 3:13] = True
L[5:18, 5:9] = L[14:18, 5:25] = True


def test_polygons_are_the_mask() -> None:
    for mask in (RECTANGLE, L, np.ones((20, 30), bool)):
        rles = mask_tools.frPyObjects(your_data.polygons(mask), *mask.shape)
        assert (mask_tools.decode(mask_tools.merge(rles)).astype(bool) == mask).mean() > 0.98  # corners are cut
    assert your_data.polygons(np.zeros((5, 5), bool)) == []


def test_export(tmp_path: Path) -> None:
    """Two images that differ in their ending only; a rectangle and, below it, an L of another class in the first."""
    (tmp_path / "a").mkdir()
    records = {n: coco.ImageRecord(n, f"a/x.{end}", 30, 20) for n, end in ((1, "png"), (2, "jpg"))}
    for record in records.values():
        Image.new("RGB", (30, 20), (9, 9, 9)).save(tmp_path / record.file)
    dataset = CocoDataset(Path("x.json"), tmp_path, records, {5: "L", 8: "box"}, (), annotated=False)
    results: list[Result] = []
    for category, score, rle in zip((5, 8), (0.5, 0.9), coco.rles_of(np.stack([L, RECTANGLE])), strict=True):
        place = {"image_id": 1, "category_id": category, "bbox": mask_tools.toBbox(rle).tolist()}
        results.append({**place, "segmentation": rle, "score": score})
    home = tmp_path / "out"
    home.mkdir()
    (home / "old.txt").touch()
    best = your_data.top_results(results)
    assert best == results[::-1] and your_data.top_results(results, 0.6, most=1) == [results[1]]
    made = [str(path.relative_to(home)) for path in your_data.export(best, dataset, dataset.categories, home)]
    endings = {"label_maps": "png", "overlays": "png", "yolo": "txt"}
    images = [f"{kind}/a/x_{n}.{end}" for kind, end in endings.items() for n in (1, 2)]
    assert made == sorted(["classes.txt", "instances.json", "results.json", *images])
    labels = np.asarray(Image.open(home / "label_maps" / "a" / "x_1.png"))
    assert ((labels == 2) == RECTANGLE).all() and ((labels == 1) == (L & ~RECTANGLE)).all()
    label, *shares = (home / "yolo" / "a" / "x_1.txt").read_text().splitlines()[0].split()
    assert label == "1" and [float(v) for v in shares] == pytest.approx([8 / 30, 7 / 20, 1 / 3, 1 / 2], abs=1e-5)
    assert (home / "yolo" / "a" / "x_2.txt").read_text() == "" and (home / "classes.txt").read_text() == "L\nbox\n"
    assert json.loads((home / "results.json").read_text()) == best
    again = load_coco(home / "instances.json", tmp_path)
    assert [i.category_id for i in again.instances] == [8, 5]
    overlay = np.asarray(Image.open(home / "overlays" / "a" / "x_1.png"))
    assert (overlay[RECTANGLE] != 9).any() and (overlay[19] == 9).all()


def test_no_two_images_share_the_name_of_their_files() -> None:
    files = dict(enumerate(("a/x.png", "a/x.jpg", "a/x_1.png", "x.png", "a/x_1_1.png"), start=1))
    records = {n: coco.ImageRecord(n, file, 30, 20) for n, file in files.items()}
    stems = your_data._stems(CocoDataset(Path("x.json"), Path(), records, {}, (), annotated=False))
    assert len(set(stems.values())) == 5 and (stems[2], stems[4]) == ("a/x_2", "x")


def test_notebook_on_two_classes_of_five_and_boxes_only(
    tmp_path: Path, pocket_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The notebook's cells, one after the other: the smallest folder, and targets that only box AP can measure."""
    stream = Stream("own folder", "labels", ("object",))
    for label, drawing in (("first", 0), ("second", visible_drawings("labels")[0][400])):
        (tmp_path / "folder" / label).mkdir(parents=True)
        for number in range(5):
            one = picture(WORLD, stream, number, int(drawing))
            Image.fromarray(one.image).save(tmp_path / "folder" / label / f"{number}.png")
        (tmp_path / "folder" / label / "damaged.png").write_bytes(b"no picture")
    own: dict[str, Any] = {"data": str(tmp_path / "folder"), "shots": 2}
    own |= reader_files(tmp_path / "coco", "boxes")
    monkeypatch.setattr(plt, "show", lambda: None)
    cells = json.loads((PROJECT / "notebooks" / "05_your_data.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            names |= own if "parameters" in cell["metadata"].get("tags", ()) else {}
    plt.close("all")
    made = {path.name for path in (pocket_run.figures / "own_data").glob("*.csv")}
    assert made == {"05_probes.csv", "05_instances.csv", "05_ap.csv"}
    assert set(names["ap"]["iou_type"]) == {"bbox"} and names["ap"]["AP"].between(0, 100).all()
    assert names["probes"]["n_test"].le(2).all()
    assert capsys.readouterr().out.count("damaged.png cannot be read as an image") == 2
