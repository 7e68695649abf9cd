"""How difficult is MojiWorld before any model has learned? Floors that every later number stands beside.

Three instruments that know nothing of classes: nearest neighbours of small pictures, of colour histograms, and of the
features of an untrained network. They answer the questions that the models will be asked: which class does a picture
show (the same drawings in another view, or other artists' drawings), and which class is the object under a true mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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

Vectors = NDArray[np.float32]
Instrument = Callable[[RGB], Vectors]  # (N, S, S, 3) uint8 pictures -> (N, C) vectors of length 1
CROP = 64  # pixels of an object cut from its scene
SHOTS = 10  # references of a class
GREY = 128
LEVELS = {"view": "views", "artist": "test"}  # level of probing -> stream


def small_pixels(images: RGB) -> Vectors:
    """`(N, 768)`: the pictures at 16x16 pixels, less their mean colour."""
    small = np.stack(
        [np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BOX), np.float32) for i in images]
    )
    return _unit((small - small.mean((1, 2), keepdims=True)).reshape(len(images), -1))


def colour_histograms(images: RGB) -> Vectors:
    """`(N, 216)`: square roots of the shares of 6x6x6 colours, so that cosines are Hellinger's."""
    steps = np.array([36, 6, 1], np.uint8)
    codes = [((image // 43) * steps).sum(-1, dtype=np.uint8).ravel() for image in images]
    return _unit(np.sqrt(np.stack([np.bincount(code, minlength=216) for code in codes])))


def untrained_network(seed: int = 0) -> nn.Module:
    """Four random convolutions of stride 2: pictures `(N, 3, S, S)` to maps `(N, 128, S/16, S/16)`."""
    generator, layers = torch.Generator().manual_seed(seed), []
    for channels, width in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layer = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        nn.init.kaiming_normal_(layer.weight, generator=generator)
        layers += [layer, nn.GroupNorm(1, width), nn.GELU()]
    return nn.Sequential(*layers).eval()


@torch.no_grad()
def network_maps(network: nn.Module, images: RGB) -> Tensor:
    """`(N, C, h, w)` maps of pictures."""
    parts = [torch.from_numpy(np.ascontiguousarray(part)) for part in np.array_split(images, -(-len(images) // 128))]
    return torch.cat([network((part.permute(0, 3, 1, 2).float() - GREY) / 64) for part in parts])


def instruments(seed: int = 0) -> Mapping[str, Instrument]:
    """The three instruments by name; `seed` is the network's."""
    network = untrained_network(seed)
    return {
        "pixels": small_pixels,
        "colour histogram": colour_histograms,
        "untrained network": lambda images: _unit(network_maps(network, images).mean((2, 3)).numpy()),
    }


def _unit(vectors: NDArray[np.floating]) -> Vectors:
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-8)).astype(np.float32)


def difficulty(world: World, views: int = 1, scenes: int = 600, seed: int = 0) -> pd.DataFrame:
    """The difficulty table.

    Args:
        world: whose pictures are asked.
        views: labelled pictures of each train drawing, and pictures of each drawing that is asked for.
        scenes: scenes of references, and as many of targets; 300 or more give every class its references.
        seed: of the untrained network.

    Returns:
        One row each: `question` (class of a picture, class of an object), `asked` (whose drawings), `shown` (by
        what), `instrument`, `accuracy` with `low` and `high` (95 % Wilson), all percent, `n`, `chance`.

    Raises:
        StudyError: too few scenes; the drawings are not installed.
    """
    return pd.DataFrame([*_picture_rows(world, views, seed), *_object_rows(world, scenes, seed)])


def _picture_rows(world: World, views: int, seed: int) -> list[dict[str, object]]:
    """Every picture is named by its nearest neighbour among the labelled ones."""
    asked = {level: _views(world, name, views) for level, name in LEVELS.items()}
    labelled = _views(world, "labels", views)
    rows = []
    kinds = {"studio and object pictures": (0, 1), "studio pictures": (0,), "object pictures": (1,)}
    for instrument, vectors_of in instruments(seed).items():
        bank = vectors_of(labelled.images)
        for level, pictures in asked.items():
            right = labelled.labels[(vectors_of(pictures.images) @ bank.T).argmax(1)] == pictures.labels
            for shown, its in kinds.items():
                chosen = right[np.isin(pictures.kinds, its)]
                rows.append(_row("class of a picture", level, shown, instrument, chosen, len(tables.classes())))
    return rows


def _views(world: World, name: str, views: int) -> Pictures:
    """Every drawing that a balanced stream shows, `views` times."""
    stream = STREAMS[name]
    return render(world, stream, range(views * sum(map(len, visible_drawings(stream.role, stream.classes)))))


def _object_rows(world: World, scenes: int, seed: int) -> list[dict[str, object]]:
    """Every object under its true mask is named by the nearest of 80 prototypes, each the mean of 10 references."""
    known, asked = (render(world, STREAMS[name], range(scenes)) for name in ("references", "targets"))
    known_labels, _ = _objects(known)
    labels, splits = _objects(asked)
    first = pd.Series(known_labels).groupby(known_labels).cumcount().to_numpy() < SHOTS
    classes, counts = np.unique(known_labels[first], return_counts=True)
    if len(classes) < len(tables.instance_classes()) or counts.min() < SHOTS:
        raise StudyError(f"{scenes} scenes do not hold {SHOTS} references of every class: choose more")
    rows, targets = [], object_vectors(asked, seed)
    for (shown, instrument), references in object_vectors(known, seed).items():
        prototypes = _unit(np.stack([references[first & (known_labels == label)].mean(0) for label in classes]))
        right = classes[(targets[shown, instrument] @ prototypes.T).argmax(1)] == labels
        for split in ("train", "test"):
            level = f"{split} artists"
            rows.append(_row("class of an object", level, shown, instrument, right[splits == split], len(classes)))
    return rows


def _objects(scenes: Pictures) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
    """`(N,)` class label and split of the artist of every object, scene by scene."""
    rows = scenes.drawings[scenes.drawings >= 0]
    return tables.class_of_drawing()[rows], tables.catalogue()["split"].to_numpy(dtype=str)[rows]


def object_vectors(scenes: Pictures, seed: int = 0) -> dict[tuple[str, str], Vectors]:
    """`(N, C)` vectors of every object, by what is shown of it and by instrument.

    An object is shown as its *box* (with its surroundings), as its *cut-out* on grey, or as the *map inside the mask*:
    the mean of the scene's map over its cells, weighted by the share of each that is the object's.
    """
    crops = {"box": object_crops(scenes, cut_out=False), "cut-out": object_crops(scenes, cut_out=True)}
    vectors = {(shown, name): f(images) for shown, images in crops.items() for name, f in instruments(seed).items()}
    maps, inside = network_maps(untrained_network(seed), scenes.images), []
    for number, field in enumerate(scenes.instances):
        masks = (
            torch.from_numpy(field)[None]
            == torch.arange(1, int((scenes.drawings[number] >= 0).sum()) + 1)[:, None, None]
        )
        weights = nn.functional.adaptive_avg_pool2d(masks.float(), (maps.shape[2], maps.shape[3]))
        inside.append(torch.einsum("nhw,chw->nc", weights, maps[number]))
    return vectors | {("map inside the mask", "untrained network"): _unit(torch.cat(inside).numpy())}


def object_crops(scenes: Pictures, cut_out: bool) -> RGB:
    """`(N, 64, 64, 3)`: the square around every object's visible pixels; all else grey where it is cut out."""
    crops = []
    for image, field, drawings in zip(scenes.images, scenes.instances, scenes.drawings, strict=True):
        for number in range(1, int((drawings >= 0).sum()) + 1):
            ys, xs = np.nonzero(field == number)
            half = 0.55 * (max(np.ptp(ys), np.ptp(xs)) + 1)
            y, x = (ys.min() + ys.max() + 1) / 2, (xs.min() + xs.max() + 1) / 2
            shown = np.where((field == number)[..., None], image, GREY).astype(np.uint8) if cut_out else image
            padded = Image.fromarray(np.pad(shown, ((64, 64), (64, 64), (0, 0)), constant_values=GREY))
            box = (x - half + 64, y - half + 64, x + half + 64, y + half + 64)
            crops.append(np.asarray(padded.resize((CROP, CROP), Image.Resampling.BILINEAR, box)))
    return np.stack(crops)


def _row(
    question: str, asked: str, shown: str, instrument: str, right: NDArray[np.bool_], classes: int
) -> dict[str, object]:
    hits, count = int(right.sum()), len(right)
    interval = binomtest(hits, count).proportion_ci(method="wilson")
    return {
        "question": question,
        "asked": asked,
        "shown": shown,
        "instrument": instrument,
        "accuracy": 100 * hits / count,
        "low": 100 * interval.low,
        "high": 100 * interval.high,
        "n": count,
        "chance": 100 / classes,
    }
