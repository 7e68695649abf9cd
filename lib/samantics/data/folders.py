"""Images of the user: one safe way to open a file, and folders with one sub-folder for each class."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import stat
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from samantics.cache import hash_value
from samantics.errors import StudyError

MAX_PIXELS = 100_000_000  # a larger picture is a mistake or a decompression bomb
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")  # Pillow has EPS run a program
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}


def open_image(path: Path | str) -> Image.Image:
    """The picture as RGB, turned as its EXIF says.

    CMYK, palettes and grey become RGB as Pillow converts them; an alpha channel is dropped, as the encoders' own
    packages do; 16-bit grey is scaled to 8 bits (Pillow alone would clip it to white); an animation is its first frame.

    Raises:
        StudyError: missing, not a file, not an image, damaged, cut short, or of more than ``MAX_PIXELS`` pixels.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise StudyError(f"{printable(path)} is a folder, pipe or device and not an image file: remove it")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height}"
                raise StudyError(f"{printable(path)} has {size} pixels, over 100 million: shrink it")
            return _as_rgb(ImageOps.exif_transpose(image))
    except StudyError:
        raise
    except FileNotFoundError as error:
        raise StudyError(f"{printable(path)} does not exist: check the path") from error
    except Image.DecompressionBombError as error:
        raise StudyError(f"{printable(path)} has far over 100 million pixels: shrink it") from error
    except Exception as error:  # damaged files make Pillow raise nearly every kind
        known = error.strerror if isinstance(error, OSError) else None  # without the path, which is named already
        reason = known or (str(error) or type(error).__name__).splitlines()[0].replace(repr(str(path)), "it")
        raise StudyError(f"{printable(path)} cannot be read as an image ({reason}): replace or remove it") from error


def printable(path: Path | str) -> str:
    """A path for a message: in quotes and escaped where it has line breaks, control characters or odd bytes."""
    return str(path) if str(path).isprintable() else repr(str(path))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, also in 32-bit containers
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating point pixels; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


# -------------------------------------------------------------------------------------------------------- folders


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """One split of a folder of images; ``folder[i]`` opens image ``i``.

    Attributes:
        paths: of the images, sorted.
        labels: ``(N,)`` int64, positions in ``classes``.
        classes: names of the sub-folders, sorted.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return open_image(self.paths[index])

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> ImageFolder:
        """The images at these positions, in that order."""
        return ImageFolder(tuple(self.paths[i] for i in indices), self.labels[list(indices)], self.classes)

    @functools.cached_property
    def hash(self) -> str:
        """Identifies the files by class, name, size and time of change (reading ImageNet takes an hour)."""
        stats = [_stat(path) for path in self.paths]
        return hash_value(
            [[p.parent.name, p.name, s.st_size, s.st_mtime_ns] for p, s in zip(self.paths, stats, strict=True)]
        )


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError:  # a link that leads nowhere
        return path.lstat()


def image_folders(root: Path | str, seed: int = 0, val_share: float = 0.2) -> tuple[ImageFolder, ImageFolder]:
    """Train and validation images of a folder: its ``train/`` and ``val/``, else a seeded split of every class.

    Raises:
        StudyError: no such folder, one class only, a class without images, other classes in val than in train.
    """
    root = Path(root)
    folders = {split: _first_folder(root, names) for split, names in SPLITS.items()}
    train_root, val_root = folders["train"], folders["val"]
    if train_root is not None and val_root is not None:
        train, val = read_folder(train_root), read_folder(val_root)
        _check_same_classes(train_root, train, val_root, val)
        return train, val
    if train_root is not None or val_root is not None:
        there, lacking = ("train", "val") if train_root is not None else ("val", "train")
        raise StudyError(f"{root} has a {there}/ folder but no {lacking}/: add it, or name the folder of the classes")
    return _split(read_folder(root), seed, val_share)


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def read_folder(root: Path | str) -> ImageFolder:
    """All images of a folder that has a sub-folder for each class (images may lie deeper).

    Raises:
        StudyError: no such folder, fewer than two classes, a class without images.
    """
    root = Path(root)
    if not root.is_dir():
        raise StudyError(f"{root} is not a folder: name one that has a sub-folder for each class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise StudyError(f"{root} has {len(classes)} class folders: classification needs two or more")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = (root / name).rglob("[!.]*")
        found = sorted(path for path in files if path.suffix.lower() in SUFFIXES and not path.is_dir())
        if not found:
            raise StudyError(f"{printable(root / name)} has no images: fill it or remove the folder")
        paths += found
        labels += [label] * len(found)
    return ImageFolder(tuple(paths), np.array(labels, np.int64), tuple(classes))


def _check_same_classes(train_root: Path, train: ImageFolder, val_root: Path, val: ImageFolder) -> None:
    odd = sorted(set(train.classes) ^ set(val.classes))
    if odd:
        where = val_root if odd[0] in train.classes else train_root
        raise StudyError(
            f"{train_root} and {val_root} have different classes: {odd[0]!r} is not in {where}"
            f" ({len(odd)} such in all): make the sub-folders agree"
        )


def _split(folder: ImageFolder, seed: int, val_share: float) -> tuple[ImageFolder, ImageFolder]:
    """At least one image of every class on either side."""
    rng = np.random.default_rng(seed)
    train: list[int] = []
    val: list[int] = []
    for label, name in enumerate(folder.classes):
        members = rng.permutation(np.flatnonzero(folder.labels == label))
        if len(members) < 2:
            raise StudyError(f"class {name!r} has a single image: a split needs two or more")
        cut = min(len(members) - 1, max(1, round(val_share * len(members))))
        val += sorted(members[:cut].tolist())
        train += sorted(members[cut:].tolist())
    return folder.subset(train), folder.subset(val)


def imagenette(root: Path | str) -> tuple[ImageFolder, ImageFolder]:
    """Train and validation images of Imagenette (320 px): ten classes of ImageNet, fetched and verified by torchvision.

    Raises:
        StudyError: it is not in ``root`` and cannot be downloaded, or what came is not it.
    """
    from torchvision.datasets import Imagenette
    from torchvision.datasets.utils import download_url

    folder = Path(root) / "imagenette2-320"
    if not folder.is_dir():
        source, md5 = Imagenette._ARCHIVES["320px"]
        try:
            download_url(source, root, md5=md5)
            # torchvision would let an archive write outside the folder, and leave half of it when killed
            with (
                tarfile.open(Path(root) / Path(source).name) as archive,
                tempfile.TemporaryDirectory(prefix=".imagenette.", dir=root) as unpacked,
            ):
                archive.extractall(unpacked, filter="data")
                os.replace(Path(unpacked) / folder.name, folder)
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
            raise StudyError(f"cannot fetch Imagenette ({error}): unpack {source} into {root} yourself") from error
    return image_folders(folder)


# --------------------------------------------------------------------------------------------------- class names


def class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """What to call the classes in figures: WordNet ids of ImageNet by their English names, others as they are.

    The thousand ids are known by their order; of a part of them (Imagenette) those that torchvision names.
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return tuple(writable(name) for name in classes)
    if len(classes) == 1000:
        from open_clip import IMAGENET_CLASSNAMES  # heavy to import, and needed here only

        return tuple(IMAGENET_CLASSNAMES)
    from torchvision.datasets import Imagenette

    return tuple(Imagenette._WNID_TO_CLASS.get(name, (name,))[0] for name in classes)


def writable(name: str) -> str:
    """A name as tables and pictures can hold it: one line of proper Unicode; folders may be named by any bytes."""
    return " ".join(name.encode("utf-8", "replace").decode().split()) or "(blank)"
