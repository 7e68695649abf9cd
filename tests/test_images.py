"""Images: every kind of file ends as the same RGB picture, or in a line that says what is wrong with it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samantics.data import folders as images
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


def test_plain_rgb_is_kept(tmp_path: Path) -> None:
    assert np.array_equal(np.asarray(images.open_image(save(tmp_path / "a.png", Image.fromarray(RAMP)))), RAMP)


def test_grey_rgba_and_palette_are_what_pillow_makes_of_them(tmp_path: Path) -> None:
    original = Image.fromarray(RAMP)
    for mode in ("L", "LA", "RGBA", "P", "1"):
        converted = original.convert(mode)
        opened = images.open_image(save(tmp_path / f"{mode}.png", converted))
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), np.asarray(converted.convert("RGB"))), mode


def test_cmyk(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.fromarray(RAMP).convert("CMYK"), quality=95)
    with Image.open(path) as raw:
        assert raw.mode == "CMYK"
        assert np.array_equal(np.asarray(images.open_image(path)), np.asarray(raw.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    opened = np.asarray(images.open_image(save(tmp_path / "a.png", Image.fromarray(values))))
    assert np.array_equal(opened, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    upright = Image.fromarray(RAMP)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    path = save(tmp_path / "a.png", upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert np.array_equal(np.asarray(images.open_image(path)), RAMP)


def test_unreadable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    empty = tmp_path / "empty.png"
    empty.touch()
    for path in (text, cut, empty, tmp_path / "missing.png", tmp_path):
        with pytest.raises(StudyError, match=path.name):
            images.open_image(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(StudyError, match="shrink"):
        images.open_image(save(tmp_path / "large.png", Image.fromarray(RAMP)))


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(StudyError, match="8 or 16 bits"):
        images.open_image(path)


def test_folder_with_train_and_val(folder: Path) -> None:
    train, val = images.image_folders(folder)
    assert train.classes == val.classes == ("cat", "dog", "emu")
    assert (len(train), len(val)) == (18, 6)
    assert [path.parent.name for path in val.paths] == [val.classes[label] for label in val.labels]
    assert train[0].size == (16, 12)


def test_seeded_split_of_one_folder(folder: Path) -> None:
    train, val = images.image_folders(folder / "train", seed=1, val_share=1 / 3)
    again = images.image_folders(folder / "train", seed=1, val_share=1 / 3)
    other = images.image_folders(folder / "train", seed=2, val_share=1 / 3)
    assert train.paths == again[0].paths
    assert train.paths != other[0].paths
    assert not set(train.paths) & set(val.paths)
    assert np.bincount(train.labels).tolist() == [4, 4, 4]
    assert np.bincount(val.labels).tolist() == [2, 2, 2]


def test_hash_changes_with_the_files(folder: Path) -> None:
    train, val = images.image_folders(folder)
    assert train.hash == images.image_folders(folder)[0].hash != val.hash
    save(train.paths[0], Image.fromarray(RAMP))
    assert images.image_folders(folder)[0].hash != train.hash


def test_bad_folders(folder: Path) -> None:
    with pytest.raises(StudyError, match="not a folder"):
        images.image_folders(folder / "nowhere")
    (folder / "val" / "fox").mkdir()
    with pytest.raises(StudyError, match=r"val/fox has no images"):
        images.image_folders(folder)
    save(folder / "val" / "fox" / "0.png", Image.fromarray(RAMP))
    with pytest.raises(StudyError, match=r"'fox' is not in .*train"):
        images.image_folders(folder)
    with pytest.raises(StudyError, match="two or more"):
        images.image_folders(folder / "train" / "cat")
    save(folder / "single" / "a" / "0.png", Image.fromarray(RAMP))
    save(folder / "single" / "b" / "0.png", Image.fromarray(RAMP))
    with pytest.raises(StudyError, match="single image"):
        images.image_folders(folder / "single")
    (folder / "half" / "train").mkdir(parents=True)
    with pytest.raises(StudyError, match="no val/"):
        images.image_folders(folder / "half")


def test_imagenette_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    monkeypatch.setattr(datasets.Imagenette, "_ARCHIVES", {"320px": ("http://127.0.0.1:9/imagenette.tgz", "0")})
    with pytest.raises(StudyError, match=r"unpack http://127\.0\.0\.1:9/imagenette\.tgz into"):
        images.imagenette(tmp_path)


def test_imagenette_that_is_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).rename(tmp_path / "data" / split)
    (tmp_path / "data").rename(tmp_path / "imagenette2-320")
    assert [len(part) for part in images.imagenette(tmp_path)] == [18, 6]


def test_class_names() -> None:
    assert images.class_names(["b", "a"]) == ("b", "a")
    assert images.class_names(["n01440764", "n03888257"]) == ("tench", "parachute")
    thousand = images.class_names([f"n{number:08d}" for number in range(1000)])
    assert (thousand[0], thousand[1], thousand[999]) == ("tench", "goldfish", "toilet paper")
