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

from samantics import mojiworld
from samantics.images import class_names, image_folders
from samantics.store import Images


@dataclasses.dataclass(frozen=True)
class Part:
    """The images that a task trains or tests on.

    Attributes:
        split: name of the split that they belong to.
        labels: ``(N,)`` int64, one for each of them.
        rows: ``(N,)`` which images of the split; None: all of them, in order (then features can be streamed).
    """

    split: str
    labels: NDArray[np.int64]
    rows: NDArray[np.int64] | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """One way to label the images.

    Attributes:
        name: ``drawing``, ``category`` or ``class``.
        classes: names of the labels.
        train, test: the images of each.
        groups: ``(N,)`` of the train images: what is held out together when a probe chooses its settings.
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
        splits: images by split name.
        hashes: identifies each split.
        tasks: by name.
        masks: ``(N, H, W)`` bool-like object masks of each split, for object pooling; empty where there are none.
    """

    splits: Mapping[str, Images]
    hashes: Mapping[str, str]
    tasks: Mapping[str, Task]
    masks: Mapping[str, Images]


def mojiworld_data(world: mojiworld.World, views: int, test_views: int) -> ClassificationData:
    """``views`` object-centric images of every drawing.

    Drawing level: the last ``test_views`` views of every drawing are the test images. Category level: all views of the
    held-out drawings are the test images, all views of the train drawings the train images.
    """
    pictures = mojiworld.classification_pictures(world, views)
    drawing = np.repeat(np.arange(len(mojiworld.catalogue())), views)
    is_test_view = np.tile(np.arange(views) >= views - test_views, len(mojiworld.catalogue()))
    category = mojiworld.category_of_drawing()[drawing]
    is_held_out = mojiworld.held_out()[drawing]
    names = tuple(mojiworld.catalogue()["drawing"])
    tasks = {
        "drawing": Task("drawing", names, _part(drawing, ~is_test_view), _part(drawing, is_test_view)),
        "category": Task(
            "category",
            mojiworld.categories(),
            _part(category, ~is_held_out),
            _part(category, is_held_out),
            groups=drawing[~is_held_out],
        ),
    }
    data_hash = f"{world.hash}:{views}"
    return ClassificationData({"all": pictures.images}, {"all": data_hash}, tasks, {"all": pictures.instances})


def _part(labels: NDArray[np.int64], chosen: NDArray[np.bool_]) -> Part:
    return Part("all", labels[chosen], np.flatnonzero(chosen))


def folder_data(root: Path | str, seed: int = 0) -> ClassificationData:
    """An image folder: a sub-folder for each class, with ``train/`` and ``val/`` above them or a seeded split.

    Raises:
        StudyError: as :func:`samantics.images.image_folders`.
    """
    train, val = image_folders(root, seed)
    task = Task("class", class_names(train.classes), Part("train", train.labels), Part("val", val.labels))
    return ClassificationData(
        {"train": train, "val": val}, {"train": train.hash, "val": val.hash}, {"class": task}, masks={}
    )
