"""How difficult is MojiWorld before any model has learned? Floors that every later number stands beside.

Three instruments that know nothing of classes: nearest neighbours of small pictures, of colour histograms, and of the
features of an untrained network. They answer the questions that the models will be asked: which class does a picture
show (the same drawings in another view, or other artists' drawings), and which class is the object under a true mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor, nn

from samantics.errors import StudyError
from samantics.mojiworld import catalogue as tables
from samantics.mojiworld.rendered import Pictures, render
from samantics.mojiworld.world import RGB, STREAMS, World, visible_drawings

Vectors = NDArray[np.float32]  # (N, C), of length 1
Answers = tuple[str, str, str, str, NDArray[np.bool_]]  # question, asked, shown, instrument; whether each is right
CROP = 64  # pixels of an object cut from its scene
SHOTS = 10  # references of a class
SCENE_CLASSES = 80
GREY = 128
KINDS = {"studio and object pictures": (0, 1), "studio pictures": (0,), "object pictures": (1,)}


def small_pixels(images: RGB) -> Vectors:
    """`(N, 768)`: the pictures at 16x16 pixels, less their mean colour."""
    small = [np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BOX), np.float32) for i in images]
    return _unit((np.stack(small) - np.mean(small, (1, 2), keepdims=True)).reshape(len(images), -1))


def colour_histograms(images: RGB) -> Vectors:
    """`(N, 216)`: square roots of the shares of 6x6x6 colours, so that cosines are Hellinger's."""
    steps = np.array([36, 6, 1], np.uint8)
    codes = [((image // 43) * steps).sum(-1, dtype=np.uint8).ravel() for image in images]
    return _unit(np.sqrt(np.stack([np.bincount(code, minlength=216) for code in codes])))


@torch.no_grad()
def untrained_maps(images: RGB) -> Tensor:
    """`(N, 128, S/16, S/16)`: the pictures after four random convolutions of stride 2."""
    generator, layers = torch.Generator().manual_seed(0), []
    for channels, width in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layer = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        layers += [layer, nn.GroupNorm(1, width), nn.GELU()]
    network, parts = nn.Sequential(*layers), np.array_split(images, -(-len(images) // 128))
    return torch.cat([network((torch.tensor(part).permute(0, 3, 1, 2).float() - GREY) / 64) for part in parts])


INSTRUMENTS = {
    "pixels": small_pixels,
    "colour histogram": colour_histograms,
    "untrained network": lambda images: _unit(untrained_maps(images).mean((2, 3)).numpy()),
}


def _unit(vectors: NDArray[np.floating]) -> Vectors:
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-8)).astype(np.float32)


def difficulty(world: World, scenes: int = 600) -> pd.DataFrame:
    """The difficulty table of a world, from as many scenes of references and of targets.

    Returns:
        One row each: `question` (class of a picture, class of an object), `asked` (whose drawings), `shown` (by
        what), `instrument`, `accuracy` with `low` and `high` (95 % Wilson), all percent, `n`, `chance`.

    Raises:
        StudyError: too few scenes to give every class its references; the drawings are not installed.
    """
    rows = []
    for classes, answers in ((len(tables.classes()), _pictures(world)), (SCENE_CLASSES, _objects(world, scenes))):
        for *names, right in answers:
            hits, count = int(right.sum()), len(right)
            low, high = binomtest(hits, count).proportion_ci(method="wilson")
            rows.append([*names, 100 * hits / count, 100 * low, 100 * high, count, 100 / classes])
    columns = "question asked shown instrument accuracy low high n chance"
    return pd.DataFrame(rows, columns=columns.split())


def _pictures(world: World) -> Iterator[Answers]:
    """Every drawing's picture is named by its nearest neighbour among the labelled ones."""
    streams = [STREAMS[name] for name in ("labels", "views", "test")]
    counts = [sum(map(len, visible_drawings(stream.role, stream.classes))) for stream in streams]
    labelled, *asked = (render(world, stream, range(count)) for stream, count in zip(streams, counts, strict=True))
    for instrument, vectors_of in INSTRUMENTS.items():
        bank = vectors_of(labelled.images)
        for level, pictures in zip(("view", "artist"), asked, strict=True):
            right = labelled.labels[(vectors_of(pictures.images) @ bank.T).argmax(1)] == pictures.labels
            for shown, its in KINDS.items():
                yield "class of a picture", level, shown, instrument, right[np.isin(pictures.kinds, its)]


def _objects(world: World, scenes: int) -> Iterator[Answers]:
    """Every object under its true mask is named by the nearest of 80 prototypes, each the mean of 10 references."""
    known, asked = (render(world, STREAMS[name], range(scenes)) for name in ("references", "targets"))
    known_rows, rows = (pictures.drawings[pictures.drawings >= 0] for pictures in (known, asked))
    known_labels, labels = tables.class_of_drawing()[known_rows], tables.class_of_drawing()[rows]
    first = pd.Series(known_labels).groupby(known_labels).cumcount().to_numpy() < SHOTS
    classes, counts = np.unique(known_labels[first], return_counts=True)
    if len(classes) < SCENE_CLASSES or counts.min() < SHOTS:
        raise StudyError(f"{scenes} scenes do not hold {SHOTS} references of every class: choose more")
    targets, splits = object_vectors(asked), tables.catalogue()["split"].to_numpy(dtype=str)[rows]
    for (shown, instrument), references in object_vectors(known).items():
        prototypes = _unit(np.stack([references[first & (known_labels == label)].mean(0) for label in classes]))
        right = classes[(targets[shown, instrument] @ prototypes.T).argmax(1)] == labels
        for split in ("train", "test"):
            yield "class of an object", f"{split} artists", shown, instrument, right[splits == split]


def object_vectors(scenes: Pictures) -> dict[tuple[str, str], Vectors]:
    """`(N, C)` vectors of every object, by what is shown of it and by instrument.

    An object is shown as its *box* (with its surroundings), as its *cut-out* on grey, or as the *map inside the mask*:
    the mean of the scene's map over its cells, weighted by the share of each that is the object's.
    """
    vectors: dict[tuple[str, str], Vectors] = {}
    for shown in ("box", "cut-out"):
        crops = object_crops(scenes, cut_out=shown == "cut-out")
        vectors |= {(shown, name): vectors_of(crops) for name, vectors_of in INSTRUMENTS.items()}
    inside = []
    for dense, masks in zip(untrained_maps(scenes.images), _masks(scenes), strict=True):
        weights = nn.functional.adaptive_avg_pool2d(torch.from_numpy(masks).float(), dense.shape[1:])
        inside.append(torch.einsum("nhw,chw->nc", weights, dense))
    return vectors | {("map inside the mask", "untrained network"): _unit(torch.cat(inside).numpy())}


def object_crops(scenes: Pictures, cut_out: bool) -> RGB:
    """`(N, 64, 64, 3)`: the square around every object's visible pixels; all else grey where it is cut out."""
    crops = []
    for image, masks in zip(scenes.images, _masks(scenes), strict=True):
        for mask in masks:
            ys, xs = np.nonzero(mask)
            half = 0.55 * (max(np.ptp(ys), np.ptp(xs)) + 1)
            y, x = CROP + (ys.min() + ys.max() + 1) / 2, CROP + (xs.min() + xs.max() + 1) / 2
            shown = np.where(mask[..., None] | (not cut_out), image, np.uint8(GREY))
            padded = Image.fromarray(np.pad(shown, ((CROP, CROP), (CROP, CROP), (0, 0)), constant_values=GREY))
            box = (x - half, y - half, x + half, y + half)
            crops.append(np.asarray(padded.resize((CROP, CROP), Image.Resampling.BILINEAR, box)))
    return np.stack(crops)


def _masks(scenes: Pictures) -> list[NDArray[np.bool_]]:
    """`(n, S, S)` for each scene, one mask an object."""
    return [field == np.arange(1, field.max() + 1)[:, None, None] for field in scenes.instances]
