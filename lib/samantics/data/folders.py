"""Images of the user: one safe way to open a file, and folders with a sub-folder for each class."""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from samantics.cache import hash_value
from samantics.errors import StudyError, noted, printable, writable

MAX_PIXELS = 100_000_000  # a larger picture is a mistake or a decompression bomb
FORMATS = (  # what Pillow reads of still pictures; left out is what has it run programs (EPS, WMF)
    "JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "ICO", "PCX", "PSD", "QOI", "SGI",
    "TGA", "DDS", "CUR", "ICNS", "SUN", "DCX", "XBM", "XPM",
)  # fmt: skip
VAL_SHARE = 0.2  # of the images of a folder without splits
SPLITS = (("train", "training"), ("val", "valid", "validation", "dev", "test", "testing"))
TOOLS = {  # names of what tools and systems leave in folders, in small letters; hidden files are left out as well
    "@eadir", "@recycle", "#recycle", "$recycle.bin", "__macosx", "__pycache__", "lost+found", "thumbs.db",
    "desktop.ini", "system volume information",
}  # fmt: skip
ORIENTATION = 0x0112  # the EXIF tag
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners put into 16


class Images(Protocol):
    """Anything with a length whose items are RGB pictures: PIL images or `(H, W, 3)` uint8 arrays."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


def open_image(path: Path | str, size: tuple[int, int] | None = None) -> Image.Image:
    """The picture as RGB, turned as its EXIF says; with a `size` (of annotations) that only fits as stored: not turned.

    CMYK, palettes and grey become RGB as Pillow converts them; an alpha channel is dropped, as the encoders' own
    packages do; grey of 10 to 16 bits is scaled to 8 (Pillow alone would clip it to white), with a warning
    where fewer than 16 are used; an animation is its first frame. StudyError: missing, no image, damaged, too large.
    """
    with _opened(path) as image:
        shown = ImageOps.exif_transpose(image)
        image = image if image.size == size != shown.size else shown
        if image.mode.startswith("I"):  # 16-bit grey, also in 32-bit containers
            values = np.asarray(image).astype(np.float64).clip(0, 65535)
            bits = next(depth for depth in DEPTHS if values.max() < 2**depth)
            if bits < 16 and values.any():  # one line for all pictures of a folder
                where = printable(Path(path).parent)
                warnings.warn(f"16-bit pictures in {where} hold {bits}-bit values: stretched", stacklevel=3)
            image = Image.fromarray((values / (2**bits - 1) * 255).round().astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating point pixels; save it with 8 or 16 bits")
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


def readable(images: Images, rows: Iterable[int]) -> dict[int, Any]:
    """Some pictures, without damaged ones.

    Args:
        images: pictures.
        rows: which of them.

    Returns:
        The pictures by row.
    """
    found = dict[int, Any]()
    for row in map(int, rows):
        with contextlib.suppress(StudyError):
            found[row] = images[row]
    return found


def image_head(path: Path | str) -> tuple[tuple[int, int], bool]:
    """Width and height of the picture as it is shown, and whether EXIF turns it for that; raises as `open_image`."""
    with _opened(path) as image:
        orientation = image.getexif().get(ORIENTATION)
        return image.size[::-1] if orientation in range(5, 9) else image.size, orientation in range(2, 9)


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """An image file of a format that is safe to open; whatever goes wrong with it is said in one line."""
    name = printable(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise StudyError(f"{name} is a folder, pipe or device and not an image file: remove it")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise StudyError(f"{name} has {image.width}x{image.height} pixels, over 100 million: shrink it")
            yield image
    except StudyError:
        raise
    except FileNotFoundError as error:
        raise StudyError(f"{name} does not exist: check the path") from error
    except Image.DecompressionBombError as error:
        raise StudyError(f"{name} has far over 100 million pixels: shrink it") from error
    except Exception as error:  # damaged files make Pillow raise nearly every kind
        known = error.strerror if isinstance(error, OSError) else None  # without the path, which is named already
        reason = known or (str(error) or type(error).__name__).splitlines()[0].replace(repr(str(path)), "it")
        raise StudyError(f"{name} cannot be read as an image ({reason}): replace or remove it") from error


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """One split of a folder of images; `folder[i]` opens image `i`."""

    paths: tuple[Path, ...]  # of the images, sorted
    labels: NDArray[np.int64]  # (N,) positions in `classes`
    classes: tuple[str, ...]  # names of the sub-folders, sorted
    notes: tuple[str, ...] = ()  # a line for each kind of file that was left out

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return open_image(self.paths[index])

    @functools.cached_property
    def hash(self) -> str:
        """Identifies the files by class, name, size and time of change (reading ImageNet takes an hour)."""
        stats = [p.stat(follow_symlinks=p.exists()) for p in self.paths]  # a link may lead nowhere
        files = zip(self.labels, self.paths, stats, strict=True)
        return hash_value([[self.classes[label], p.name, s.st_size, s.st_mtime_ns] for label, p, s in files])


def visible_files(folder: Path) -> Iterator[Path]:
    """All files below a folder but what tools and systems keep there (hidden ones, thumbnails, `__MACOSX`)."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if is_visible(name))
        yield from (Path(place, name) for name in sorted(files) if is_visible(name))


def is_visible(name: str) -> bool:
    """Whether a file or folder is the user's own and not that of a tool or system."""
    return not name.startswith(".") and name.lower() not in TOOLS


def readable_endings() -> frozenset[str]:
    """Endings of the image files that this Pillow can read."""
    kinds = {*FORMATS, "MPO"}  # what cameras write and Pillow opens as JPEG
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in kinds)


def image_folders(root: Path | str, seed: int = 0) -> tuple[ImageFolder, ImageFolder]:
    """Train and validation images of a folder: its `train/` and `val/`, else a seeded split of every class.

    The two splits may have any case and the usual other names (`SPLITS`), and may lie in one common folder.
    """
    root = Path(root)
    folders = _folders(root)
    named = {folder.name.lower(): folder for folder in folders}
    train_root, val_root = (next((named[name] for name in names if name in named), None) for names in SPLITS)
    if len(folders) == 1 and not train_root and len(_folders(folders[0])) > 1:
        return image_folders(folders[0], seed)  # a folder around all, as archives have
    if not train_root and not val_root:
        return _split(_read_folder(root), seed)
    if not train_root or not val_root:
        there, lacking = ("train", "val") if train_root else ("val", "train")
        raise StudyError(f"{root} has a {there}/ folder but no {lacking}/: add it, or name the folder of the classes")
    train, val = _read_folder(train_root), _read_folder(val_root, like=train_root)
    odd = sorted(set(train.classes) ^ set(val.classes))
    if odd:
        where = val_root if odd[0] in train.classes else train_root
        what = f"{odd[0]!r} is not in {where} ({len(odd)} such in all): make the sub-folders agree"
        raise StudyError(f"{train_root} and {val_root} have different classes: {what}")
    others = [folder.name for folder in folders if folder not in (train_root, val_root)]
    lines = noted("folder", others, f"not used beside {train_root.name}/ and {val_root.name}/")
    return dataclasses.replace(train, notes=(*train.notes, *(f"{root}: {line}" for line in lines))), val


def _folders(root: Path) -> list[Path]:
    """The sub-folders without those of tools, sorted; the folder must be there."""
    if not root.is_dir():
        raise StudyError(f"{printable(root)} is not a folder: name one that has a sub-folder for each class")
    return sorted(root / entry.name for entry in os.scandir(root) if entry.is_dir() and is_visible(entry.name))


def _read_folder(root: Path, like: Path | None = None) -> ImageFolder:
    """All images of the classes' sub-folders, also those deeper; `like` shows what the sub-folders should be."""
    folders = _folders(root)
    if len(folders) < 2:
        shape = ", ".join(f"{root.name}/{folder.name}/" for folder in _folders(like)[:2]) if like else ""
        cure = f"put its images into {shape} ... as in {like}" if like else "classification needs two or more"
        raise StudyError(f"{printable(root)} has {len(folders)} class folders: {cure}")
    paths, labels = list[Path](), list[int]()
    others = Counter(entry.suffix.lower() for entry in root.iterdir() if entry.is_file() and is_visible(entry.name))
    readable = readable_endings()
    for label, folder in enumerate(folders):
        found = sorted(visible_files(folder))
        images = [path for path in found if path.suffix.lower() in readable]
        if not images:
            raise StudyError(f"{printable(folder)} has no images: fill it or remove the folder")
        paths += images
        labels += [label] * len(images)
        others += Counter(path.suffix.lower() for path in found if path.suffix.lower() not in readable)
    ends = ", ".join(f"{count} {writable(end)}" for end, count in others.most_common())
    notes = (f"{printable(root)}: files left out, no image of a class: {ends}",) if others else ()
    return ImageFolder(tuple(paths), np.array(labels, np.int64), tuple(folder.name for folder in folders), notes)


def _split(folder: ImageFolder, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """At least one image of every class on either side."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(folder), bool)
    for label, name in enumerate(folder.classes):
        members = rng.permutation(np.flatnonzero(folder.labels == label))
        if len(members) < 2:
            raise StudyError(f"class {name!r} has a single image: a split needs two or more")
        held_out[members[: min(len(members) - 1, max(1, round(VAL_SHARE * len(members))))]] = True
    train, val = (
        dataclasses.replace(folder, paths=tuple(itertools.compress(folder.paths, part)), labels=folder.labels[part])
        for part in (~held_out, held_out)
    )
    return train, val


def class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """What to call the classes in figures: ImageNet's WordNet ids in English, others as they are."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return tuple(writable(name) for name in classes)
    if len(classes) == 1000:
        from open_clip import IMAGENET_CLASSNAMES  # heavy to import, and needed here only

        return tuple(IMAGENET_CLASSNAMES)
    from torchvision.datasets import Imagenette

    return tuple(Imagenette._WNID_TO_CLASS.get(name, (name,))[0] for name in classes)
