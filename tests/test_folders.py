"""Images and class folders: every kind of file ends as the same RGB picture, left out with a note, or in one line."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from samantics.data import folders
from samantics.errors import StudyError

RAMP = np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog", "emu"):
            for number in range(count):
                pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                save(tmp_path / split / name / f"{number}.png", Image.fromarray(pixels))
    return tmp_path


@pytest.mark.parametrize("bits", folders.DEPTHS)
def test_grey_of_many_bits_is_scaled_to_what_it_uses(bits: int, tmp_path: Path, recwarn: Any) -> None:
    most = 2**bits - 1
    values = np.linspace(0, most, 256).round().astype(np.uint16).reshape(16, 16)
    opened = np.asarray(folders.open_image(save(tmp_path / "a.png", Image.fromarray(values))))
    assert np.array_equal(opened, np.repeat((values / most * 255).round().astype(np.uint8)[..., None], 3, axis=2))
    notes = [str(note.message) for note in recwarn if note.category is folders.StudyNote]
    assert notes == ([] if bits == 16 else [f"16-bit pictures in {tmp_path} hold {bits}-bit values: stretched"])


@pytest.mark.parametrize("orientation", [*range(10), 65535])
def test_exif_turns_as_asked_for(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(RAMP), exif=exif)
    with Image.open(path) as raw:
        shown = np.asarray(ImageOps.exif_transpose(raw))
    size = shown.shape[1::-1]
    assert folders.image_size(path) == size and folders.is_turned(path) == (1 < orientation < 9)
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


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_that_pillow_reads(ending: str, folder: Path) -> None:
    save(folder / "train" / "cat" / f"new.{ending}", Image.fromarray(RAMP), format=FORMATS[ending])
    train, _ = folders.image_folders(folder)
    assert len(train) == 19 and not train.notes
    assert all(train[row].size in {(16, 12), (40, 30)} for row in range(19))


def test_a_format_that_pillow_was_built_without_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(Image.registered_extensions(), ".avif")
    for name in ("x.avif", "y.AVIF", "notes.txt"):
        (folder / "train" / "cat" / name).touch()
    train, _ = folders.image_folders(folder)
    assert len(train) == 18
    assert train.notes == (f"{folder}/train: 3 files left out, no image of a class: 2 .avif, 1 .txt",)


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


def test_flat_validation_images_are_refused_with_the_layout(folder: Path) -> None:
    for path in sorted((folder / "val").rglob("*.png")):
        path.rename(folder / "val" / f"{path.parent.name}{path.name}")
    for name in ("cat", "dog", "emu"):
        (folder / "val" / name).rmdir()
    with pytest.raises(StudyError, match=r"val has 0 class folders: put its images into val/cat/, val/dog/ .*train"):
        folders.image_folders(folder)


def test_folder_with_train_and_val(folder: Path) -> None:
    (folder / "test").mkdir()
    train, val = folders.image_folders(folder)
    assert train.notes == (f"{folder}: not used beside train/ and val/: 'test'",)
    assert train.classes == val.classes == ("cat", "dog", "emu") and (len(train), len(val)) == (18, 6)
    assert [path.parent.name for path in val.paths] == [val.classes[label] for label in val.labels]
    assert train[0].size == (16, 12) and train.hash == folders.image_folders(folder)[0].hash != val.hash
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
    ],
)
def test_bad_folders(name: str, says: str, folder: Path) -> None:
    for part in ("empty", "odd"):
        shutil.copytree(folder / "train", folder / part / "train")
        shutil.copytree(folder / "val", folder / part / "val")
        (folder / part / "val" / "fox").mkdir()
    for place in ("odd/val/fox", "single/a", "single/b", "half/train"):
        save(folder / place / "0.png", Image.fromarray(RAMP))
    with pytest.raises(StudyError, match=says):
        folders.image_folders(folder / name)
