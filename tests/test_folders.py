"""Images and class folders: every kind of file ends as the same RGB picture, left out with a note, or in one line;
and what is classified: whose drawings train and test show, which pictures, a folder as one task.
"""

import dataclasses
import io
import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from refusals import refused
from samantics.data import classification, folders
from samantics.mojiworld import catalogue, rendered
from samantics.mojiworld.world import World, visible_drawings
from samantics.scales import get_scale

RAMP = np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def class_folders(folder: Path, classes: Iterable[str], count: int) -> None:
    """Pictures of noise, 16 x 12."""
    for number, name in itertools.product(range(count), classes):
        save(folder / name / f"{number}.png", Image.effect_noise((16, 12), 90).convert("RGB"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    class_folders(tmp_path / "train", ("cat", "dog", "emu"), 6)
    class_folders(tmp_path / "val", ("cat", "dog", "emu"), 2)
    return tmp_path


@pytest.mark.parametrize("bits", folders.DEPTHS)
def test_grey_of_many_bits_is_scaled_to_what_it_uses(bits: int, tmp_path: Path, recwarn: Any) -> None:
    most = 2**bits - 1
    values = np.linspace(0, most, 256).round().astype(np.uint16).reshape(16, 16)
    opened = np.asarray(folders.open_image(save(tmp_path / "a.png", Image.fromarray(values))))
    assert np.array_equal(opened, np.repeat((values / most * 255).round().astype(np.uint8)[..., None], 3, axis=2))
    notes = [str(note.message) for note in recwarn if "16-bit" in str(note.message)]
    assert notes == ([] if bits == 16 else [f"16-bit pictures in {tmp_path} hold {bits}-bit values: stretched"])


@pytest.mark.parametrize("orientation", [*range(10), 65535])
def test_exif_turns_as_asked_for(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(RAMP), exif=exif)
    with Image.open(path) as raw:
        shown = np.asarray(ImageOps.exif_transpose(raw))
    size = shown.shape[1::-1]
    assert folders.image_head(path) == (size, 1 < orientation < 9)
    for wanted in (None, size, (7, 7)):
        assert np.array_equal(np.asarray(folders.open_image(path, wanted)), shown)
    stored = RAMP if size != (40, 30) else shown  # where both fit, as it is shown
    assert np.array_equal(np.asarray(folders.open_image(path, (40, 30))), stored)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = Image.fromarray(RAMP)
JPEG, PALETTE = encoded(PICTURE, "JPEG"), PICTURE.quantize(8)
ODD_AND_GOOD = {
    "a JPEG named .png": (JPEG, Image.open(io.BytesIO(JPEG))),
    "the first frame": (encoded(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]), PALETTE),
    "a palette with transparent colours": (encoded(PALETTE, "PNG", transparency=b"\0\x80\xff"), PALETTE),
    "EXIF of noise": (encoded(PICTURE, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(range(40))), PICTURE),
    "a colour profile of noise": (encoded(PICTURE, "PNG", icc_profile=bytes(range(200))), PICTURE),
}


@pytest.mark.parametrize("what", ODD_AND_GOOD)
def test_odd_image_files_that_are_good(what: str, tmp_path: Path) -> None:
    data, expected = ODD_AND_GOOD[what]
    path = tmp_path / ("a" * 251 + ".png")  # 255 bytes, all that a name may have
    path.write_bytes(data)
    assert np.array_equal(np.asarray(folders.open_image(path)), np.asarray(expected.convert("RGB")))


FORMATS = {"jfif": "JPEG", "JPG": "JPEG", "avif": "AVIF", "jp2": "JPEG2000", "qoi": "QOI", "tga": "TGA", "pgm": "PPM"}


def test_formats_that_pillow_reads_and_one_that_it_was_built_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ending, kind in FORMATS.items():
        save(folder / "train" / "cat" / f"new.{ending}", Image.fromarray(RAMP), format=kind)
    train, _ = folders.image_folders(folder)
    assert len(train) == 18 + len(FORMATS) and not train.notes
    assert all(train[row].size in {(16, 12), (40, 30)} for row in range(len(train)))
    monkeypatch.delitem(Image.registered_extensions(), ".avif")
    for name in ("x.AVIF", "notes.txt"):
        (folder / "train" / "cat" / name).touch()
    few, _ = folders.image_folders(folder)
    assert len(few) == len(train) - 1
    assert few.notes == (f"{folder}/train: files left out, no image of a class: 2 .avif, 1 .txt",)


TOOLS = (".ipynb_checkpoints/0.png", "@eaDir/0.png/THUMB.jpg", "__MACOSX/._0.jpg", ".git/a.png", "Thumbs.db", ".a.png")


def test_what_tools_leave_is_no_class_and_no_image(folder: Path) -> None:
    before = [part.paths for part in folders.image_folders(folder)]
    for place in (folder, folder / "train", folder / "train" / "cat"):
        for name in TOOLS:
            save(place / name, Image.fromarray(RAMP), format="PNG")
    parts = folders.image_folders(folder)
    assert [part.paths for part in parts] == before and not parts[0].notes


@pytest.mark.parametrize(
    ("train", "val"), [("Train", "Test"), ("training", "VALID"), ("TRAIN", "Validation"), ("train", "dev")]
)
@pytest.mark.parametrize("wrapper", ["", "archive-1.0"])
def test_splits_of_other_names_and_in_a_wrapper(train: str, val: str, wrapper: str, folder: Path) -> None:
    home = folder / "home"
    (home / wrapper).mkdir(parents=True)
    (folder / "train").rename(home / wrapper / train)
    (folder / "val").rename(home / wrapper / val)
    parts = folders.image_folders(home)
    assert [len(part) for part in parts] == [18, 6] and parts[0].classes == ("cat", "dog", "emu")


def test_folder_with_train_and_val(folder: Path) -> None:
    (folder / "test").mkdir()
    train, val = folders.image_folders(folder)
    assert train.notes == (f"{folder}: 1 folder ('test'): not used beside train/ and val/",)
    assert train.classes == val.classes == ("cat", "dog", "emu") and (len(train), len(val)) == (18, 6)
    assert [path.parent.name for path in val.paths] == [val.classes[label] for label in val.labels]
    assert train[0].size == (16, 12) and train.hash == folders.image_folders(folder)[0].hash != val.hash
    assert dataclasses.replace(train, labels=train.labels[::-1]).hash != train.hash  # the same files of other classes
    save(train.paths[0], Image.fromarray(RAMP))
    assert folders.image_folders(folder)[0].hash != train.hash


def test_seeded_split_of_one_folder(folder: Path) -> None:
    train, val = folders.image_folders(folder / "train", seed=1)
    again, other = (folders.image_folders(folder / "train", seed=seed)[0] for seed in (1, 2))
    assert train.paths == again.paths != other.paths and not set(train.paths) & set(val.paths)
    assert np.bincount(train.labels).tolist() == [5, 5, 5] and np.bincount(val.labels).tolist() == [1, 1, 1]


def test_class_names() -> None:
    assert folders.class_names(["b", "a"]) == ("b", "a")
    assert folders.class_names(["n01440764", "n03888257"]) == ("tench", "parachute")
    thousand = folders.class_names([f"n{number:08d}" for number in range(1000)])
    assert (thousand[0], thousand[1], thousand[999]) == ("tench", "goldfish", "toilet paper")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "not a folder"),
        ("train/cat", "two or more"),
        ("empty", r"empty/val/fox has no images"),
        ("odd", r"'fox' is not in .*train"),
        ("single", "single image"),
        ("half", "no val/"),
        ("flat", r"val has 0 class folders: put its images into val/cat/, val/dog/ \.\.\. as in .*train"),
    ],
)
def test_bad_folders_are_refused_with_what_is_lacking(name: str, says: str, folder: Path) -> None:
    for part in ("empty", "odd", "flat"):
        shutil.copytree(folder / "train", folder / part / "train")
        shutil.copytree(folder / ("train/cat" if part == "flat" else "val"), folder / part / "val")
    for part in ("empty", "odd"):
        (folder / part / "val" / "fox").mkdir()
    for place in ("odd/val/fox", "single/a", "single/b", "half/train"):
        save(folder / place / "0.png", Image.fromarray(RAMP))
    refused(says, folders.image_folders, folder / name)


@pytest.fixture
def rows(monkeypatch) -> dict[str, np.ndarray]:
    """The drawing of every picture of a stream; the pictures themselves are left blank."""
    shown = {}

    def blank(_world, stream, count) -> rendered.Pictures:
        own = np.concatenate(visible_drawings(stream.role, stream.classes))
        shown[stream.name] = own[np.arange(count) % len(own)]
        turn = sum(np.divmod(np.arange(count), len(own)))
        return rendered.Pictures(
            np.zeros((count, 1, 1, 3), np.uint8), np.ones((count, 1, 1), np.uint8),
            shown[stream.name][:, None].astype(np.int16), (turn % 2).astype(np.uint8),
        )  # fmt: skip

    monkeypatch.setattr(classification, "stored_pictures", blank)
    return shown


def test_no_probe_learns_from_a_test_artist_and_settings_are_chosen_on_artists(rows) -> None:
    tasks = classification.mojiworld_data(World(96), 2, 1, 3).tasks
    table = catalogue.catalogue()
    assert list(tasks) == ["view", "artist"] and tasks["view"].train is tasks["artist"].train
    for name, split in (("labels", "train"), ("views", "train"), ("test", "test")):
        assert set(table["split"][rows[name]]) == {split}
    artist = table["artist"][rows["labels"]].to_numpy()
    groups = tasks["artist"].groups
    assert groups is not None and len(set(groups)) == len(set(zip(groups, artist, strict=True))) == 6
    for task, stream in (("view", "views"), ("artist", "test")):
        part = tasks[task].test
        assert [tasks[task].classes[label] for label in part.labels[:99]] == list(table["class"][rows[stream][:99]])


def test_every_drawing_is_shown_in_a_studio_and_in_a_place_or_some_classes_only(rows) -> None:
    data = classification.mojiworld_data(World(96), 0.25, 0.25, 0.25)  # less than one picture of a drawing
    assert len(set(data.hashes.values())) == 3  # features of one stream are not another's
    for task in data.tasks.values():
        assert len(task.classes) == len(task.families) == len(task.prompts) == 116
        assert set(task.train.labels) == set(task.test.labels) == set(range(116))
    data = classification.mojiworld_data(World(96), 2, 1, 2)
    for part, stream in ((data.tasks["view"].train, "labels"), (data.tasks["artist"].test, "test")):
        assert part.kinds is not None and set(part.kinds) == {"studio", "object"}
        assert len(set(zip(rows[stream], part.kinds, strict=True))) == len(part.labels)
        assert len(data.splits[part.split]) == len(data.masks[part.split]) == len(part.labels)


def test_some_of_the_views_and_some_of_the_classes(rows) -> None:
    whole, third = (classification.mojiworld_data(World(96), 2, 1, 2, view_step=step) for step in (1, 3))
    asked, few = (data.tasks["view"].test for data in (whole, third))
    assert (few.labels == asked.labels[::3]).all() and set(few.kinds) == {"studio", "object"}
    assert third.hashes["views"] != whole.hashes["views"] and third.hashes["test"] == whole.hashes["test"]
    eighth = classification.some_classes(whole, 8, 1)
    (task,), every = eighth.tasks.values(), whole.tasks["artist"]
    assert task.classes == every.classes[::8] and set(task.train.labels) == set(range(len(task.classes)))
    for mine, its in ((task.train, every.train), (task.test, every.test)):
        named = [every.classes[label] for label in its.labels if label % 8 == 0]
        assert [task.classes[label] for label in mine.labels] == named and len(eighth.splits[mine.split]) == len(named)


def test_the_paper_scale_asks_for_its_folder(pocket_run) -> None:
    run = dataclasses.replace(pocket_run, scale=get_scale("paper"))
    refused("--data DIR", classification.scale_data, run)


def test_a_folder_of_ones_own_is_one_task(folder: Path, pocket_run) -> None:
    found = classification.scale_data(pocket_run, folder / "train")
    task = found.tasks["class"]
    assert found.name == "train" and task.classes == ("cat", "dog", "emu") and task.test.kinds is None
    assert len(task.train.labels) + len(task.test.labels) == 18 and task.chance == pytest.approx(100 / 3)
