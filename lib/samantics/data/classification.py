"""What is classified in notebook 01: the images of a scale, and the ways to label and split them.

MojiWorld has two label levels on the same images: the *drawing*, of which train and test show different views, and the
*category*, of which train and test show different drawings. An image folder (Imagenette, ImageNet, one's own) has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samantics.cache import cache_dir
from samantics.data import first_world as mojiworld
from samantics.data.fetch import imagenette
from samantics.data.folders import ImageFolder, Images, class_names, image_folders, writable
from samantics.errors import StudyError
from samantics.run import Run


@dataclasses.dataclass(frozen=True)
class Part:
    """The images that a task trains or tests on."""

    split: str  # name of the split that they belong to
    labels: NDArray[np.int64]  # (N,), one for each of them
    rows: NDArray[np.int64] | None = None  # (N,) which images of the split; None: all, in order (features can stream)


@dataclasses.dataclass(frozen=True)
class Task:
    """One way to label the images.

    Attributes:
        name: `drawing`, `category` or `class`.
        classes: names of the labels.
        train, test: the images of each.
        groups: `(N,)` of the train images: what is held out together when a probe chooses its settings.
    """

    name: str
    classes: tuple[str, ...]
    train: Part
    test: Part
    groups: NDArray[np.int64] | None = None

    @property
    def chance(self) -> float:
        """Top-1 of a guess, percent."""
        return 100 / len(self.classes)


@dataclasses.dataclass(frozen=True)
class ClassificationData:
    """Images and their tasks.

    Attributes:
        name: of the data, for titles.
        splits: images by split name.
        hashes: identifies each split.
        tasks: by name.
        masks: `(N, H, W)` bool-like object masks of each split, for object pooling; empty where there are none.
        notes: what the reader should know of the files.
    """

    name: str
    splits: Mapping[str, Images]
    hashes: Mapping[str, str]
    tasks: Mapping[str, Task]
    masks: Mapping[str, Images]
    notes: tuple[str, ...] = ()


def scale_data(run: Run, folder: Path | str = "") -> ClassificationData:
    """The images of a run's scale: MojiWorld at `pocket`, else the image folder named (or downloaded, at `lite`).

    Raises:
        StudyError: `paper` without a folder; a folder that cannot be used.
    """
    settings = run.scale.probing
    if folder:
        return folder_data(writable(Path(folder).name), image_folders(folder, run.seed))
    if run.scale.name == "pocket":
        return mojiworld_data(mojiworld.World(), settings.views, settings.test_views)
    if run.scale.name == "lite":
        return folder_data("Imagenette", imagenette(cache_dir() / "datasets"))
    raise StudyError("the scale paper needs ImageNet-1k: name its folder (train/ and val/ inside) with --data DIR")


def mojiworld_data(world: mojiworld.World, views: int, test_views: int) -> ClassificationData:
    """`views` object-centric images of every drawing.

    Drawing level: the last `test_views` views of every drawing are the test images. Category level: all views of the
    held-out drawings are the test images, all views of the train drawings the train images.
    """
    pictures = mojiworld.classification_pictures(world, views)
    drawing = np.repeat(np.arange(len(mojiworld.catalogue())), views)
    is_test_view = np.tile(np.arange(views) >= views - test_views, len(mojiworld.catalogue()))
    category = mojiworld.category_of_drawing()[drawing]
    is_held_out = mojiworld.held_out()[drawing]
    names = tuple(mojiworld.catalogue()["drawing"])
    of_category = _part(category, ~is_held_out), _part(category, is_held_out)
    tasks = {
        "drawing": Task("drawing", names, _part(drawing, ~is_test_view), _part(drawing, is_test_view)),
        "category": Task("category", mojiworld.categories(), *of_category, groups=drawing[~is_held_out]),
    }
    hashes = {"all": f"{world.hash}:{views}"}
    return ClassificationData("MojiWorld", {"all": pictures.images}, hashes, tasks, {"all": pictures.instances})


def _part(labels: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Part:
    return Part("all", labels[chosen], np.flatnonzero(chosen))


def folder_data(name: str, folders: tuple[ImageFolder, ImageFolder]) -> ClassificationData:
    """Train and validation images of an image folder."""
    train, val = folders
    task = Task("class", class_names(train.classes), Part("train", train.labels), Part("val", val.labels))
    splits, hashes = {"train": train, "val": val}, {"train": train.hash, "val": val.hash}
    notes = tuple(dict.fromkeys([*train.notes, *val.notes]))
    return ClassificationData(name, splits, hashes, {"class": task}, masks={}, notes=notes)
