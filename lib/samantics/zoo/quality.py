"""Is each model of the pocket zoo good at its own job? Asked with drawings of artists that none has learned from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional
from torchvision.ops import masks_to_boxes

from samantics.cache import atomic_path, cache_dir, hash_value, kept
from samantics.metrics.intervals import paired_difference
from samantics.models import pocket
from samantics.models.encoder import Encoder, load_encoder, zoo_encoder
from samantics.mojiworld import captions, catalogue
from samantics.mojiworld.rendered import Pictures, stored_pictures
from samantics.mojiworld.world import STREAMS, Stream, World, visible_drawings
from samantics.probing.knn import knn_probe
from samantics.probing.linear import linear_probe
from samantics.probing.zero_shot import class_texts, zero_shot_probe
from samantics.training_free.mask_features import token_weights, unit
from samantics.zoo.contract import batches, pooled
from samantics.zoo.masks import Sam2Objective, SamObjective
from samantics.zoo.objectives import entry

Measures = dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]  # outcome of every item, and the item's cluster
COLUMNS = ["encoder", "measure", "value", "low", "high", "aim"]
ENCODERS = (*pocket.NAMES, "random")
SHIPPED = pocket.ASSETS / "quality.csv"
SHOTS = 10  # references of a class, as in the pipeline
AIMS = {  # written down before the zoo was trained
    **{(name, "iou_click"): 0.82 for name in ("sam", "sam2")},
    **{(name, "iou_box"): 0.88 for name in ("sam", "sam2")},
    **{(name, "iou_ceiling"): 0.92 for name in ("sam", "sam2")},
    ("clip", "zero_shot"): 40.0,
    ("clip", "mask_name"): 30.0,
    ("dinov2", "linear"): 20.0,
    ("dinov2", "mask_name"): 20.0,
}
THREE_TIMES = {("dinov2", "linear"): "sam", ("dinov2", "mask_name"): "random"}  # and whose value it exceeds so


@dataclasses.dataclass(frozen=True)
class Split:
    """Whose drawings are asked for, in pictures of one object, in scenes of all classes, in scenes of the 80."""

    artists: str
    pictures: Stream
    scenes: Stream
    instances: Stream


SPLITS = {  # `test` to report, `choice` (the validation artist) to choose between recipes
    "test": Split("test", STREAMS["test"], Stream("test scenes", "test", ("scene",)), STREAMS["targets"]),
    "choice": Split(
        "validation", STREAMS["choice"], Stream("choice captions", "choice", ("scene",)), STREAMS["choice scenes"]
    ),
}


def quality_table(encoders: Mapping[str, Encoder], split: str = "test", share: float = 1.0) -> pd.DataFrame:
    """What pocket models, by zoo name, do with the drawings of unseen artists, on a share of the pictures.

    Returns:
        `encoder, measure, value, low, high, aim`: IoU as a share, all else in percent, with 95 % intervals that draw
        whole scenes or classes. `aim` is empty where none was set.
    """
    own: dict[str, Callable[[Encoder, Split, float], Measures]] = {"sam": masks, "sam2": masks, "clip": words}
    rows = []
    for name, encoder in encoders.items():
        for measure in (own.get(encoder.name), class_probes, mask_names):
            found = measure(encoder, SPLITS[split], share) if measure else {}
            for key, (values, clusters) in found.items():
                rows.append([name, key, *paired_difference(values, np.zeros(len(values)), clusters)[:3]])
    return with_aims(pd.DataFrame(rows, columns=COLUMNS[:-1]))


def with_aims(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its column `aim`; where an aim is three times another model's value, that value counts too."""
    value = table.set_index(["encoder", "measure"])["value"]
    aims = dict(AIMS)
    for (name, measure), other in THREE_TIMES.items():
        aims[name, measure] = max(AIMS[name, measure], 3 * value.get((other, measure), 0.0))
    return table.assign(aim=[aims.get(key, np.nan) for key in value.index])


def pictures_of(encoder: Encoder, stream: Stream, share: float, count: int = 0) -> Pictures:
    """A share of so many pictures of a stream, of the encoder's size; by default each drawing in both kinds."""
    count = count or 2 * sum(map(len, visible_drawings(stream.role)))
    return stored_pictures(World(encoder.image_size), stream, round(share * count))


# ----------------------------------------------------------------------------------------------- classes of pictures


def class_probes(encoder: Encoder, split: Split, share: float) -> Measures:
    """Class by 20 neighbours and by a linear probe (percent), from two labelled pictures of every training drawing."""
    known, asked = (pictures_of(encoder, stream, share) for stream in (STREAMS["labels"], split.pictures))
    artist = pd.factorize(catalogue.catalogue()["artist"])[0][known.drawings[:, 0]]  # held out to choose settings
    features = (pooled(encoder, part.images).cpu().numpy() for part in (known, asked))
    data = (next(features), known.labels, next(features), asked.labels, len(catalogue.classes()))
    found = {"knn20": knn_probe(*data, k=20), "linear": linear_probe(*data, seeds=(0,), groups=artist)}
    return {measure: (100.0 * probe.top1[0], asked.labels) for measure, probe in found.items()}


def mask_names(encoder: Encoder, split: Split, share: float) -> Measures:
    """Class of 80 of the object under a true mask, by the nearest prototype, as in the pipeline (percent)."""
    label, artist = catalogue.class_of_drawing(), catalogue.catalogue()["split"].to_numpy(str)
    known = pictures_of(encoder, STREAMS["references"], share, 600)
    labels = label[known.drawings[known.drawings >= 0]]
    features = pd.DataFrame(object_features(encoder, known)).groupby(labels).head(SHOTS)
    prototypes = features.groupby(labels[features.index]).mean()
    asked = pictures_of(encoder, split.instances, share, 300)
    drawings, scene = asked.drawings[asked.drawings >= 0], np.nonzero(asked.drawings >= 0)[0]
    shown = (artist[drawings] == split.artists) & np.isin(label[drawings], prototypes.index)
    scores = object_features(encoder, asked)[shown] @ unit(prototypes.to_numpy()).T
    named = prototypes.index.to_numpy()[scores.argmax(1)]
    return {"mask_name": (100.0 * (named == label[drawings[shown]]), scene[shown])}


def object_features(encoder: Encoder, scenes: Pictures) -> NDArray[np.float32]:
    """`(objects, C)` unit vectors: the mean of the encoder's map inside each true mask."""
    maps = np.concatenate([encoder.encode(pixels)["final"].dense.cpu().numpy() for pixels in batches(scenes.images)])
    geometry = encoder.preprocess.geometry(encoder.image_size, encoder.image_size)
    weights = [token_weights(object_masks(field), geometry, maps.shape[2:]) for field in scenes.instances]
    of_scenes = zip(weights, maps, strict=True)
    return unit(np.concatenate([weight @ dense.reshape(len(dense), -1).T for weight, dense in of_scenes]))


# ------------------------------------------------------------------------------------------------------------- masks


@torch.no_grad()
def masks(encoder: Encoder, split: Split, share: float) -> Measures:
    """IoU of every object of unseen scenes: the best of three masks of a click at its centre, the mask of its box.

    Beside them `iou_ceiling`, what the decoder's cells allow: the IoU of the true mask, averaged to them.
    """
    sam = (SamObjective if encoder.name == "sam" else Sam2Objective)(model=encoder.model).eval()
    scenes, found = pictures_of(encoder, split.scenes, share, 150), []
    for field, pixels in zip(scenes.instances, batches(scenes.images, 1), strict=True):
        true = object_masks(field)
        image = tuple(level.expand(len(true), -1, -1, -1) for level in sam.embed(pixels.to(encoder.device)))
        points = torch.from_numpy(np.stack([centre_of(mask) for mask in true])).to(image[0])[:, None]
        clicked, _ = sam.decode(image, *sam.prompt(points, torch.ones(len(true), 1).to(points)))
        boxed, _ = sam.decode(image, *sam.prompt(boxes=masks_to_boxes(torch.from_numpy(true)).to(points)))
        logits = (clicked[:, 1:], boxed[:, :1], coarse_masks(true, boxed.shape[-1]))
        found.append([iou_with(each.cpu(), true).max(1) for each in logits])
    scene = np.repeat(np.arange(len(found)), [len(iou[0]) for iou in found])
    columns = zip(("iou_click", "iou_box", "iou_ceiling"), np.concatenate(found, axis=1), strict=True)
    return {measure: (iou, scene) for measure, iou in columns}


def object_masks(field: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """`(N, S, S)` bool: the visible pixels of each object of a picture, from its `instances`."""
    return field == np.arange(1, field.max() + 1)[:, None, None]


def centre_of(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """x, y of the pixel farthest from the mask's border: SAM's own evaluation clicks there (its section 7.1)."""
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return np.array(np.unravel_index(depth.argmax(), mask.shape)[::-1])


def coarse_masks(true: NDArray[np.bool_], side: int) -> Tensor:
    """`(B, 1, side, side)` logits of `(B, S, S)` masks: positive where more than half of a cell is covered."""
    return functional.adaptive_avg_pool2d(torch.from_numpy(true).float()[:, None], side) - 0.5


def iou_with(logits: Tensor, true: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`(B, M)` IoU of M masks (logits of any resolution) with each of `(B, H, W)` true ones, at full resolution."""
    found = functional.interpolate(logits, true.shape[1:], mode="bilinear", align_corners=False).numpy() > 0
    overlap = (found & true[:, None]).sum((2, 3))
    return overlap / (found | true[:, None]).sum((2, 3)).clip(min=1)


# ------------------------------------------------------------------------------------------------------------- words


def words(encoder: Encoder, split: Split, share: float) -> Measures:
    """Class by prompt, and whose caption is nearest to a scene (percent)."""
    pictures, scenes = pictures_of(encoder, split.pictures, share), pictures_of(encoder, split.scenes, share, 600)
    rng = np.random.default_rng(0)
    own = [[captions.caption(rng, drawings)] for drawings in scenes.drawings.tolist()]
    asked = {
        "zero_shot": (pictures, pictures.labels, captions.class_prompts()),
        "retrieval": (scenes, np.arange(len(scenes)), own),
    }
    found = {}
    for measure, (shown, labels, texts) in asked.items():
        vectors = pooled(encoder, shown.images).cpu().numpy()
        right = zero_shot_probe(vectors, labels, class_texts(encoder, texts)).top1[0]
        found[measure] = (100.0 * right, labels)
    return found


# -------------------------------------------------------------------------------------------------- the shipped zoo


def zoo_quality(names: Sequence[str] = ENCODERS) -> pd.DataFrame:
    """`quality_table` of the shipped zoo on test artists, read from where it was measured before with these weights.

    The table lies beside the weights, as the model cards do; models that it does not know are measured (a minute or
    two each) and kept in the cache.
    """
    shipped = pd.read_csv(SHIPPED) if SHIPPED.is_file() else pd.DataFrame(columns=["encoder", "weights"])
    parts = []
    for name in names:
        encoder = load_encoder(name)
        known = shipped[(shipped["encoder"] == name) & (shipped["weights"] == encoder.weights_hash)]
        if known.empty:
            path = cache_dir() / "quality" / f"{name}_{hash_value([encoder.key, World(encoder.image_size).hash])}.csv"
            known = kept(path, functools.partial(quality_table, {name: encoder}))
        parts.append(known.reindex(columns=COLUMNS[:-1]))
    return with_aims(pd.concat(parts, ignore_index=True))


def write_quality() -> pd.DataFrame:
    """Measure the shipped zoo and write the table beside its weights: `python -m samantics quality`."""
    table = zoo_quality()
    weights = table["encoder"].map({name: load_encoder(name).weights_hash for name in ENCODERS})
    with atomic_path(SHIPPED) as temporary:
        table.assign(weights=weights).to_csv(temporary, index=False, float_format="%.5g")
    return table


def choice_table(names: Sequence[str], folder: Path = pocket.ASSETS) -> pd.DataFrame:
    """`quality_table` of trainings that lie in a folder, on the validation artist: recipes are chosen by it."""
    encoders = {}
    for name in names:
        architecture = entry(name).architecture
        model = pocket.filled(architecture, folder / f"{name}.safetensors")
        encoders[name] = zoo_encoder(architecture, model, pocket.card(name, folder)["sha256"][:16])
    return quality_table(encoders, "choice")
