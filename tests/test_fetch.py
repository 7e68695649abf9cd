"""What `lite` fetches: from a local server with tiny files in the official formats, and with a server's faults."""

import collections
import dataclasses
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

import study
from refusals import refused
from samantics.cache import cache_dir
from samantics.data import detection, downloads
from samantics.data.classification import imagenette, scale_data
from samantics.data.detection import chosen_images, coco_subset, load_data
from samantics.data.folders import image_folders
from samantics.data.references import ReferenceRule, eligible
from samantics.run import start_run
from samantics.scales import CocoSubset
from servers import Server, cut, status
from test_folders import encoded

SUBSET = CocoSubset(targets=8, references=3)
RULE = ReferenceRule()
COCO_ZIP, TGZ = "/annotations/annotations_trainval2017.zip", "/fast-ai-imageclas/imagenette2-320.tgz"


def jpeg(size: tuple[int, int] = (160, 120)) -> bytes:
    return encoded(Image.effect_noise(size, 90), "JPEG")


def instances() -> dict[str, Any]:
    """Thirty images; 1 shows in all, 2 in every third, 3 in two, 4 never large enough, 5 as crowds only."""
    images = [{"id": n, "file_name": f"{n:012}.jpg", "width": 160, "height": 120, "license": 1} for n in range(1, 31)]
    boxes = {1: [15, 15, 40, 40], 2: [70, 15, 40, 40], 3: [15, 65, 40, 40], 4: [100, 65, 10, 10], 5: [60, 65, 36, 40]}
    shows = {1: range(1, 31), 2: range(1, 31, 3), 3: (5, 6), 4: range(1, 31), 5: range(1, 31)}
    annotations: list[dict[str, Any]] = []
    for category, (x, y, w, h) in boxes.items():
        outline: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if category == 5:
            outline = {"size": [120, 160], "counts": [160 * 60, 160, 160 * 120 - 160 * 61]}
        shape = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(category == 5), "segmentation": outline}
        for number in shows[category]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": category, **shape})
    categories = [{"id": n, "name": f"thing {n}", "supercategory": "thing"} for n in boxes]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="session")
def official() -> dict[str, bytes]:
    with zipfile.ZipFile(zipped := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations/instances_train2017.json", "{}")
        archive.writestr("annotations/instances_val2017.json", json.dumps(instances()))
        archive.writestr("annotations/noise", np.random.default_rng(0).bytes(100_000))
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w:gz") as tar:
        for place in ("train/{}/0", "train/{}/1", "train/{}/2", "val/{}/0", "val/{}/1"):
            for label in ("n01440764", "n03888257"):
                info = tarfile.TarInfo(f"imagenette2-320/{place.format(label)}.JPEG")
                info.size = len(content := jpeg())
                tar.addfile(info, io.BytesIO(content))
    images = {f"/val2017/{n:012}.jpg": jpeg() for n in range(1, 31)}
    return {COCO_ZIP: zipped.getvalue(), TGZ: packed.getvalue(), **images}


@pytest.fixture
def source(places: Path, monkeypatch: pytest.MonkeyPatch, official: dict[str, bytes]) -> Iterator[Server]:
    """A server with tiny official files, whose hashes are the known ones."""
    md5 = hashlib.md5(official[TGZ]).hexdigest()
    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", {"320px": (f"https://s3.amazonaws.com{TGZ}", md5)})
    monkeypatch.setattr(detection, "ANNOTATIONS_MD5", hashlib.md5(official[COCO_ZIP]).hexdigest())
    monkeypatch.setattr(downloads, "WAIT", 0.01)
    with Server(official) as server:
        monkeypatch.setenv("SAMANTICS_MIRROR", server.address + "/")
        yield server


def folder() -> Path:
    return cache_dir() / "datasets" / "coco_val2017"


def test_targets_are_any_images_and_references_others_with_enough_of_each_class() -> None:
    content = instances()
    chosen = chosen_images(content, SUBSET, RULE)
    targets, references = (chosen[part] for part in ("targets", "references"))
    assert len(targets) == 8 and not targets & references
    shown = {c: {a["image_id"] for a in content["annotations"] if a["category_id"] == c} for c in (1, 2, 3)}
    for numbers in shown.values():  # three of each where the others have three, else all
        assert len(references & numbers) >= min(3, len(numbers - targets))
    assert shown[3] - targets <= references
    assert len(references) <= 3 + len(shown[3] - targets)  # the rare classes' images serve the others
    assert chosen_images(content, SUBSET, RULE) == chosen  # the same every time, in any order of the file
    assert chosen_images(content | {"images": content["images"][::-1]}, SUBSET, RULE) == chosen
    assert chosen_images(content, CocoSubset(8, 3, seed=1), RULE) != chosen


def test_the_subset_is_official_data_and_no_more_than_is_needed(source: Server) -> None:
    references, targets = coco_subset(SUBSET, RULE)
    chosen = chosen_images(instances(), SUBSET, RULE)
    assert {*targets.images} == chosen["targets"] and {*references.images} == chosen["references"]
    assert references.categories == targets.categories == {n: f"thing {n}" for n in range(1, 6)}
    assert len(targets.instances) == sum(a["image_id"] in targets.images for a in instances()["annotations"])
    assert {i.category_id for i in eligible(references, RULE)} <= {1, 2, 3}
    numbers = [*chosen["targets"], *chosen["references"]]
    assert sorted(p.name for p in (folder() / "images").iterdir()) == sorted(f"{n:012}.jpg" for n in numbers)
    assert not list((folder() / "incoming").iterdir())
    assert {p.suffix for p in folder().iterdir() if p.is_file()} == {".json"}  # the archive of all has gone
    assert max(collections.Counter(source.asked).values()) == 1
    states, before = {p: p.stat().st_mtime_ns for p in folder().rglob("*") if p.is_file()}, list(source.asked)
    source.files = {}
    coco_subset(SUBSET, RULE)  # nothing is fetched twice
    assert source.asked == before and states == {p: p.stat().st_mtime_ns for p in states}


def test_what_broke_off_is_resumed(source: Server) -> None:
    image = f"/val2017/{min(chosen_images(instances(), SUBSET, RULE)['targets']):012}.jpg"
    source.answers = {COCO_ZIP: [cut(60_000)], image: [cut(5_000)], TGZ: [cut(9_000)]}
    coco_subset(SUBSET, RULE)
    for _ in range(2):  # fetched once
        assert [len(part) for part in image_folders(imagenette(cache_dir() / "datasets"))] == [6, 4]
    assert {path: source.starts(path) for path in source.answers} == {
        COCO_ZIP: [0, 60_000], image: [0, 5_000], TGZ: [0, 9_000]
    }  # fmt: skip


def test_the_next_run_goes_on_where_one_was_stopped(source: Server) -> None:
    chosen = chosen_images(instances(), SUBSET, RULE)
    last = f"/val2017/{max(chosen['targets']):012}.jpg"
    source.answers = {last: [status(500)] * downloads.TRIES}
    says = "cannot download .*jpg .*500.*put it at .*coco_val2017/images/0"
    assert "incoming" not in refused(says, coco_subset, SUBSET, RULE)
    done = {path.name for path in (folder() / "images").iterdir()}
    before = len(source.asked)
    coco_subset(SUBSET, RULE)
    again = {path.split("/")[-1] for path, _ in source.asked[before:]}
    assert not again & done and last.split("/")[-1] in again and COCO_ZIP.split("/")[-1] not in again


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("archive", "annotations_trainval2017.zip sent another file .MD5 .*: run again, or put it at"),
        ("image", "sent another file .MD5 .*: run again, or put it at .*/images/"),
        ("cut image", "cannot be read as an image .*: replace or remove it"),
        ("other size", r"is an image of \(80, 60\) pixels and not of \(160, 120\): put the official one into"),
        ("gone", "answers 404: fetch .* elsewhere and put it at .*/images/"),
    ],
)
def test_another_file_is_refused(source: Server, what: str, says: str) -> None:
    image = f"/val2017/{min(chosen_images(instances(), SUBSET, RULE)['targets']):012}.jpg"
    if what == "archive":
        source.files[COCO_ZIP] = source.files[COCO_ZIP][:-1] + b"x"
    elif what == "image":
        source.etags[image] = "0" * 32
    elif what == "gone":
        del source.files[image]
    else:
        source.files[image] = jpeg()[:3000] if what == "cut image" else jpeg((80, 60))
        source.etags[image] = "no MD5"
    refused(says, coco_subset, SUBSET, RULE)
    assert not (folder() / "images" / image.split("/")[-1]).exists()
    assert what != "archive" or not list(folder().rglob("*.zip*"))


def test_files_that_are_there_are_used_if_they_are_the_right_ones(source: Server, official: dict[str, bytes]) -> None:
    archive = folder() / "annotations_trainval2017.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"another")
    refused(r"annotations_trainval2017.zip is not .*: delete it to download it again", coco_subset, SUBSET, RULE)
    archive.write_bytes(official[COCO_ZIP])
    coco_subset(SUBSET, RULE)
    assert not source.starts(COCO_ZIP)
    next(folder().glob("targets_*.json")).write_text("{")
    refused(r"targets_.*json is damaged: delete it", coco_subset, SUBSET, RULE)


def test_no_network_is_one_line_with_a_cure(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "WAIT", 0.01)
    monkeypatch.setenv("SAMANTICS_MIRROR", "http://127.0.0.1:9")
    for fetched in ((coco_subset, SUBSET, RULE), (imagenette, cache_dir() / "datasets")):
        refused("cannot download .*: go online, or fetch http://127.* put", *fetched)
    monkeypatch.setenv("SAMANTICS_MIRROR", "file:///etc")
    refused("SAMANTICS_MIRROR is 'file:///etc', which is no address", coco_subset, SUBSET, RULE)


def test_lite_takes_what_it_fetches(source: Server) -> None:
    run = start_run("lite", "99_test")
    assert run.scale.coco == CocoSubset(targets=500, references=20)
    run = dataclasses.replace(run, scale=dataclasses.replace(run.scale, coco=SUBSET))
    assert scale_data(run).tasks["class"].classes == ("tench", "parachute")
    data = load_data(run)
    assert len(data.targets.images) == 8 and not any("among the references" in note for note in data.notes)
    assert {"reference_data", "target_data"} <= run.facts.keys()


def test_paper_tells_its_plan_and_names_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[tuple[str, ...], dict[str, str], str]] = [
        (("01", "03"), {}, "--data DIR .* and --references FILE"),
        (("02",), {"data": "x"}, "needs --references FILE"),
        (("01", "04"), {}, "needs --data DIR"),
    ]
    for numbers, given, lacking in asked:
        says = f"scale paper .*{lacking}.*: name them, or choose --scale lite"
        refused(says, study.prepare, "paper", numbers, given)
        told = capsys.readouterr().out
        assert "MB to fetch" in told and "hours on one H100 (estimated)" in told
