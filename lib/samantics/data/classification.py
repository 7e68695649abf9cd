"""What is classified in notebook 01: the pictures of a scale, and which of them a probe is trained and tested on.

MojiWorld's probes learn from train artists' drawings: does the class show in *other views* of these (`view`), and in
drawings by *other artists* (`artist`: the headline, as validation photographs are to ImageNet)?
"""

import dataclasses
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from samantics.cache import alone, cache_dir
from samantics.data.downloads import archive
from samantics.data.folders import Images, class_names, image_folders
from samantics.errors import StudyError, writable
from samantics.mojiworld import captions, catalogue
from samantics.mojiworld.rendered import Pictures, stored_pictures
from samantics.mojiworld.world import KINDS, STREAMS, World, visible_drawings
from samantics.run import Run


@dataclasses.dataclass(frozen=True)
class Part:
    """The images that a task trains or tests on: a whole split."""

    split: str  # its name
    labels: NDArray[np.int64]  # (N,) class labels from 0
    kinds: NDArray[np.str_] | None = None  # (N,) `studio` or `object`; None where there is but one kind of picture


@dataclasses.dataclass(frozen=True)
class Task:
    """One question that is asked of an encoder's features."""

    name: str  # `view`, `artist` or `class`
    classes: tuple[str, ...]  # names of the labels
    train: Part
    test: Part
    families: tuple[str, ...]  # of every class the name of its superclass (or its own)
    prompts: tuple[tuple[str, ...], ...] = ()  # of every class, for CLIP; empty where it does not know its words
    groups: NDArray[np.int64] | None = None  # (N,) of train: what is held out together when a probe chooses settings

    @property
    def chance(self) -> float:
        """Top-1 of a guess, percent."""
        return 100 / len(self.classes)


@dataclasses.dataclass(frozen=True)
class ClassificationData:
    """Images and their tasks."""

    name: str  # of the data, for titles
    splits: Mapping[str, Images]  # images by split name
    hashes: Mapping[str, str]  # identifies each split
    tasks: Mapping[str, Task]  # by name, the headline last
    masks: Mapping[str, Images]  # (N, H, W) bool-like object masks of each split; empty where there are none
    notes: tuple[str, ...] = ()  # what the reader should know of the files
    max_unreadable: float = 0.01  # images that may be damaged, see `encode_images`


def scale_data(run: Run, folder: Path | str = "", skip_bad_images: bool = False) -> ClassificationData:
    """The images of a run's scale: MojiWorld at `pocket`, else the image folder named (or downloaded, at `lite`).

    Args:
        run: of the notebook.
        folder: of images, a sub-folder for each class; "" for the scale's own.
        skip_bad_images: leave out all damaged images when the folder is encoded, not a few (three, or a hundredth).

    Returns:
        Images by split, and what is asked of them.

    Raises:
        StudyError: `paper` without a folder; a folder that cannot be used.
    """
    zoo, settings = run.scale.weights == "zoo", run.scale.probing
    if not folder and zoo:
        counts = settings.labels, settings.views, settings.test
        return mojiworld_data(World(settings.image_size), *counts, settings.view_step)
    if not folder and run.scale.name != "lite":
        raise StudyError("the scale paper needs ImageNet-1k: name its folder (train/ and val/ inside) with --data DIR")
    name = writable(Path(folder).name) if folder else "Imagenette"
    train, val = image_folders(folder or imagenette(cache_dir() / "datasets"), run.seed)
    names = class_names(train.classes)
    prompts = tuple((f"a photo of a {one}",) for one in names) if not zoo else ()  # the zoo's CLIP has other words
    task = Task("class", names, Part("train", train.labels), Part("val", val.labels), names, prompts)
    splits, hashes = {"train": train, "val": val}, {"train": train.hash, "val": val.hash}
    notes = tuple(dict.fromkeys([*train.notes, *val.notes]))
    limit = 0.9 if skip_bad_images else ClassificationData.max_unreadable
    return ClassificationData(name, splits, hashes, {"class": task}, {}, notes, limit)


def mojiworld_data(world: World, labels: float, views: float, test: float, view_step: int = 1) -> ClassificationData:
    """Pictures of one object each: of every drawing that the streams `labels`, `views` and `test` show, so many.

    Below 1: this share of the classes only. Of the other views, every `view_step`-th is asked.
    """
    counts = {"labels": labels, "views": views, "test": test}
    found = {name: _pictures(world, name, count) for name, count in counts.items()}
    found["views"] = Pictures(*(part[::view_step] for part in vars(found["views"]).values()))
    part = {name: Part(name, its.labels, np.array(KINDS)[its.kinds]) for name, its in found.items()}
    artist = pd.factorize(catalogue.catalogue()["artist"])[0][found["labels"].drawings[:, 0]]
    known = 1 + int(found["labels"].labels.max())
    names, prompts = catalogue.classes()[:known], captions.class_prompts()[:known]
    families = catalogue.superclass_of_class()[:known]
    tasks = {
        task: Task(task, names, part["labels"], part[asked], families, prompts, artist)
        for task, asked in (("view", "views"), ("artist", "test"))
    }
    hashes = {name: f"{world.hash}:{name}:{count}" for name, count in counts.items()}
    hashes["views"] += f":{view_step}"
    images, masks = ({name: vars(its)[what] for name, its in found.items()} for what in ("images", "instances"))
    return ClassificationData("MojiWorld", images, hashes, tasks, masks)


def some_classes(data: ClassificationData, step: int, width: int) -> ClassificationData:
    """The headline's images of every `step`-th class, cut to their middle `width` columns, and its task."""
    task = list(data.tasks.values())[-1]
    known, splits, hashes, parts = np.arange(0, len(task.classes), step), {}, {}, {}
    for part in (task.train, task.test):
        rows, images = np.flatnonzero(np.isin(part.labels, known)), np.asarray(data.splits[part.split])
        left = (images.shape[2] - width) // 2
        splits[part.split] = images[rows, :, left : left + width]
        hashes[part.split] = f"{data.hashes[part.split]}:{step}:{width}"
        parts[part.split] = Part(part.split, np.searchsorted(known, part.labels[rows]))
    names = tuple(np.array(task.classes)[known])
    few = Task(task.name, names, parts[task.train.split], parts[task.test.split], names)
    return ClassificationData(data.name, splits, hashes, {task.name: few}, masks={})


def _pictures(world: World, name: str, count: float) -> Pictures:
    """`count` pictures of every drawing that the stream shows."""
    stream = STREAMS[name]
    rows = np.concatenate(visible_drawings(stream.role, stream.classes))
    shown = catalogue.class_of_drawing()[rows] < count * len(catalogue.classes())  # in the order of classes
    return stored_pictures(world, stream, round(max(1, count) * int(shown.sum())))


def imagenette(root: Path) -> Path:
    """The folder of Imagenette (320 px): ten classes of ImageNet, fetched and verified once."""
    from torchvision.datasets import Imagenette

    folder = root / "imagenette2-320"
    with alone(folder):
        if not folder.is_dir():
            source, md5 = Imagenette._ARCHIVES["320px"]
            packed = archive(source, md5, folder.parent)
            try:
                # pooch's own unpacking would leave half of it when killed
                with tempfile.TemporaryDirectory(prefix=".imagenette.", dir=root) as unpacked:
                    shutil.unpack_archive(packed, unpacked, filter="data")
                    os.replace(Path(unpacked) / folder.name, folder)
            except (OSError, ValueError, EOFError, tarfile.TarError) as error:
                raise StudyError(f"cannot unpack {packed} ({error}): unpack {source} into {root} yourself") from error
    return folder
