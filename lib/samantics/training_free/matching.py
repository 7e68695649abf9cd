"""Training-free classification of proposals: features of a frozen encoder against a few references per class.

A feature is the mean, over a mask, of the encoder's map resized bilinearly to the image. That mean is a weighted sum of
tokens, so it is computed from the mask's weight on each token, without resizing any map. A mask smaller than a token
still weighs on its nearest tokens: no reference vanishes and nothing becomes NaN.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_tools
from safetensors import safe_open
from scipy.special import softmax
from torch import Tensor
from torchvision.ops import batched_nms
from tqdm.auto import tqdm

from samantics.cache import cache_dir, hash_value, kept, reading, remove_leftovers
from samantics.data.coco import CocoDataset, Instance, Rle, mask_of, read_image, xywh
from samantics.errors import StudyError
from samantics.metrics.coco_ap import Result
from samantics.models.encoder import PIXELS_AT_ONCE, Encoder
from samantics.models.preprocessing import Geometry
from samantics.training_free.proposals import Proposals

Features = NDArray[np.float32]  # (N, C)
FORMAT = 1  # of the files of features
MASK_PIXELS_AT_ONCE = 2**24
TEMPERATURE = 0.05  # of the softmax over classes


def unit(vectors: NDArray[Any]) -> Features:
    """`(..., C)` vectors scaled to length 1; a zero vector stays zero instead of becoming NaN."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros(vectors.shape, np.float32), where=lengths > 0).astype(np.float32)


def resizing(geometry: Geometry, grid: tuple[int, int]) -> tuple[Features, Features]:
    """`(height, h)` and `(width, w)`: how much each token of a map weighs in each row and column of the image."""
    rows = _interpolation(geometry.height, geometry.scale_y, geometry.top, geometry.size, grid[0])
    return rows, _interpolation(geometry.width, geometry.scale_x, geometry.left, geometry.size, grid[1])


def token_weights(masks: NDArray[np.bool_], geometry: Geometry, grid: tuple[int, int]) -> NDArray[np.float32]:
    """`(M, h * w)`: the share of each token of a `grid` `(h, w)` in the mean over `(M, height, width)` masks.

    Raises:
        StudyError: a mask is empty.
    """
    if not masks.any((1, 2)).all():
        raise StudyError("a mask to pool over is empty: leave out objects without visible pixels")
    rows, columns = resizing(geometry, grid)
    weights = rows.T @ (masks.astype(np.float32) @ columns)
    return (weights / masks.sum((1, 2), dtype=np.float32)[:, None, None]).reshape(len(masks), grid[0] * grid[1])


def _interpolation(pixels: int, scale: float, offset: float, size: int, tokens: int) -> NDArray[np.float32]:
    """`(pixels, tokens)` bilinear weights along one side, token centres half a token from the edge."""
    at = (((np.arange(pixels) + 0.5) * scale + offset) * tokens / size - 0.5).clip(0, tokens - 1)
    below = np.minimum(at.astype(int), max(tokens - 2, 0))
    matrix = np.zeros((pixels, tokens), np.float32)
    np.add.at(matrix, (np.arange(pixels), below), 1 - (at - below))
    np.add.at(matrix, (np.arange(pixels), np.minimum(below + 1, tokens - 1)), at - below)
    return matrix


def uncropped(encoder: Encoder) -> Encoder:
    """The encoder with inputs that show the whole image: where it would cut a centre out, it squeezes instead."""
    if encoder.preprocess.fit != "crop":
        return encoder
    return dataclasses.replace(encoder, preprocess=dataclasses.replace(encoder.preprocess, fit="squash", short=0))


def dense_maps(encoder: Encoder, images: Sequence[Image.Image]) -> NDArray[np.float32]:
    """`(B, C, h, w)` final features of images, each seen whole (see `uncropped`)."""
    return encoder.encode(uncropped(encoder).inputs(images))["final"].dense.cpu().numpy()


@dataclasses.dataclass(frozen=True)
class MaskFeatures:
    """Features of masks by image id, in files: those of all masks of COCO's images would fill the memory."""

    places: Mapping[int, Path]

    def of(self, source: str, image_id: int) -> Features:
        """`(N, C)` features of unit length of an image's masks, by one encoder."""
        path = self.places[image_id]
        with reading(path), safe_open(path, "numpy") as file:
            found: Features = file.get_tensor(f"{source}/{image_id}")
        return found


def pooled_features(
    encoders: Mapping[str, Encoder],
    dataset: CocoDataset,
    masks: Mapping[int, Sequence[Rle]],
    folder: Path | None = None,
) -> MaskFeatures:
    """Features of the masks of each image by all encoders; a rerun finds them in the files of `folder`.

    Raises:
        StudyError: an image cannot be read, a mask is empty, or no space is left. What was encoded stays.
    """
    folder = folder or cache_dir() / "mask_features"
    remove_leftovers(folder)
    ids, places = list(masks), dict[int, Path]()
    key = [FORMAT, {name: encoder.key for name, encoder in encoders.items()}, dataset.hash]
    batch = max(1, PIXELS_AT_ONCE // max(encoder.image_size for encoder in encoders.values()) ** 2)
    for start in tqdm(range(0, len(ids), batch), desc="features of masks", mininterval=1, leave=False):
        chosen = {image_id: masks[image_id] for image_id in ids[start : start + batch]}
        counts = [(image_id, [rle["counts"] for rle in rles]) for image_id, rles in chosen.items()]
        path = folder / f"{hash_value([*key, counts])}.safetensors"
        if not path.is_file():  # else nothing is read yet
            kept(path, functools.partial(_pooled, encoders, dataset, chosen))
        places |= dict.fromkeys(chosen, path)
    return MaskFeatures(places)


def _pooled(
    encoders: Mapping[str, Encoder], dataset: CocoDataset, masks: Mapping[int, Sequence[Rle]]
) -> dict[str, Tensor]:
    """Features of the masks of a few images, named as `MaskFeatures` looks them up."""
    images = {image_id: read_image(dataset, image_id) for image_id in masks}
    maps = {name: dense_maps(encoder, list(images.values())) for name, encoder in encoders.items()}
    pooled: dict[str, Tensor] = {}
    for row, (image_id, image) in enumerate(images.items()):
        weights = functools.cache(functools.partial(_weights, masks[image_id]))  # shared by encoders of one geometry
        for name, encoder in encoders.items():
            channels, *grid = maps[name].shape[1:]
            seen = weights(uncropped(encoder).preprocess.geometry(*image.size), tuple(grid))
            pooled[f"{name}/{image_id}"] = torch.from_numpy(unit(seen @ maps[name][row].reshape(channels, -1).T))
    return pooled


def _weights(rles: Sequence[Rle], geometry: Geometry, grid: tuple[int, int]) -> NDArray[np.float32]:
    """`token_weights` of run lengths, a few masks at a time: all at once, a photograph's may not fit memory."""
    some = max(1, MASK_PIXELS_AT_ONCE // (geometry.width * geometry.height))
    chunks = (np.array([mask_of(rle) for rle in rles[i : i + some]]) for i in range(0, len(rles), some))
    none = np.empty((0, grid[0] * grid[1]), np.float32)
    return np.concatenate([none, *(token_weights(chunk, geometry, grid) for chunk in chunks)])


def reference_features(
    encoders: Mapping[str, Encoder], dataset: CocoDataset, instances: Sequence[Instance], folder: Path | None = None
) -> dict[str, dict[int, Features]]:
    """`(C,)` feature of each instance, by encoder and instance id (see `pooled_features`)."""
    by_image: dict[int, list[Instance]] = {}
    for instance in instances:
        by_image.setdefault(instance.image_id, []).append(instance)
    rles = {image_id: [i.rle for i in found] for image_id, found in by_image.items()}
    features = pooled_features(encoders, dataset, rles, folder)
    ids = [instance.id for found in by_image.values() for instance in found]
    return {
        name: dict(zip(ids, (vector for n in by_image for vector in features.of(name, n)), strict=True))
        for name in encoders
    }


@dataclasses.dataclass(frozen=True)
class MemoryBank:
    """What is remembered of the references. Classes may have different numbers of them, at least one each."""

    category_ids: tuple[int, ...]  # the K classes
    features: Features  # (R, C), one unit vector per reference
    labels: NDArray[np.int64]  # (R,), position of its class in category_ids
    prototypes: Features  # (K, C), the mean of each class's features, of unit length


def remember(references: Mapping[int, Sequence[Instance]], features: Mapping[int, Features]) -> MemoryBank:
    """The memory bank of references (by category), given their features `(C,)` by instance id.

    Raises:
        StudyError: no category has a reference.
    """
    chosen = {category: instances for category, instances in references.items() if instances}
    if not chosen:
        raise StudyError("no category has a reference: give annotated reference images")
    labels = np.repeat(np.arange(len(chosen)), [len(instances) for instances in chosen.values()])
    stacked = np.stack([features[i.id] for instances in chosen.values() for i in instances])
    prototypes = np.stack([stacked[labels == label].mean(0) for label in range(len(chosen))])
    return MemoryBank(tuple(chosen), stacked, labels, unit(prototypes))


def _nearest(bank: MemoryBank, features: Features) -> Features:
    cosines = features @ bank.features.T
    return np.stack([cosines[:, bank.labels == label].max(1) for label in range(len(bank.category_ids))], axis=1)


def _centred(bank: MemoryBank, features: Features) -> Features:
    mean = bank.prototypes.mean(0)
    return unit(features - mean) @ unit(bank.prototypes - mean).T


SCORINGS: Mapping[str, Callable[[MemoryBank, Features], Features]] = {
    "prototype": lambda bank, features: features @ bank.prototypes.T,  # cosine to the mean of the class
    "nearest": _nearest,  # cosine to the class's nearest reference
    "softmax": lambda bank, features: softmax(features @ bank.prototypes.T / TEMPERATURE, axis=1),  # over classes
    "centred": _centred,  # cosine to the prototype, both less the mean of all prototypes
}
# What a mask's score is multiplied by, from the largest share of it inside a better mask of its class.
MERGINGS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[Any]]] = {
    "none": np.ones_like,
    "hard": lambda most: most <= 0.5,
    "soft": lambda most: np.sqrt((1 - most).clip(min=0)),
    "semantic_soft": lambda most: np.sqrt((1 - most).clip(min=0)),
}


def _chosen(rules: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in rules:
        raise StudyError(f"{what} is {name!r}: choose from {', '.join(rules)}")
    return rules[name]


def class_scores(bank: MemoryBank, features: Features, scoring: str = "prototype") -> Features:
    """`(N, K)` scores, 0-1, of `(N, C)` unit features for every class of the bank, by a rule of `SCORINGS`.

    Raises:
        StudyError: no such scoring.
    """
    scores: Features = _chosen(SCORINGS, scoring, "scoring")(bank, features).clip(min=0)
    return scores


def merged_scores(
    rles: Sequence[Rle], features: Features, categories: NDArray[np.int64], scores: NDArray[Any], merging: str
) -> NDArray[np.float64]:
    """Scores `(N,)` after merging, for masks ranked best first; 0 marks a mask that is dropped.

    With IoS_ij = |M_i and M_j| / |M_i| the share of mask i inside a better-ranked mask j of its class:

    - `none`: as they are;
    - `hard`: dropped where the largest IoS exceeds one half;
    - `soft`: times sqrt(1 - largest IoS);
    - `semantic_soft`: the same with IoS_ij times max(0, f_i . f_j): a part that looks unlike the whole is kept
      (arXiv 2507.02798).

    Raises:
        StudyError: no such merging.
    """
    factor, final = _chosen(MERGINGS, merging, "merging"), scores.astype(np.float64)
    if merging == "none":
        return final  # without asking which mask lies in which
    for category in np.unique(categories):
        rows = np.flatnonzero(categories == category)
        chosen = [rles[row] for row in rows.tolist()]
        inside = np.tril(np.asarray(mask_tools.iou(chosen, chosen, [1] * len(chosen))), -1)  # "crowd": divides by |M_i|
        if merging == "semantic_soft":
            inside = inside * (features[rows] @ features[rows].T).clip(0, 1)
        final[rows] *= factor(inside.max(1))
    return final


def match(
    image_id: int,
    proposals: Proposals,
    features: Features,
    bank: MemoryBank,
    scoring: str = "prototype",
    merging: str = "none",
    nms: float = 0.5,
) -> list[Result]:
    """The classified, ranked instances of one image as COCO results; none where there are no proposals.

    Args:
        image_id: of the image.
        proposals: N masks.
        features: `(N, C)` of the proposals, of unit length.
        bank: what is remembered of the references.
        scoring, merging: names of `SCORINGS` and `MERGINGS`.
        nms: within a class, of two boxes with a higher IoU the one with the better predicted IoU stays.
    """
    scores = class_scores(bank, features, scoring) if len(features) else np.empty((0, len(bank.category_ids)))
    categories = np.array(bank.category_ids)[scores.argmax(1)]
    return ranked(image_id, proposals, features, categories, scores.max(1), merging, nms)


def ranked(
    image_id: int,
    proposals: Proposals,
    features: Features,
    categories: NDArray[np.int64],
    scores: NDArray[Any],
    merging: str = "none",
    nms: float = 0.5,
) -> list[Result]:
    """COCO results of proposals with categories and scores `(N,)`, the best 100 after per-class NMS and merging."""
    boxes, *others = (torch.as_tensor(v) for v in (proposals.boxes, proposals.predicted_iou, categories))
    alone = batched_nms(boxes, *others, nms).numpy()
    alone = alone[np.argsort(-scores[alone], kind="stable")]
    found, categories = proposals.select(alone), categories[alone]
    final = merged_scores(found.rles, features[alone], categories, scores[alone], merging)
    order = [row for row in np.argsort(-final, kind="stable").tolist() if final[row] > 0][:100]
    return [result_of(image_id, int(categories[row]), found.rles[row], found.boxes[row], final[row]) for row in order]


def result_of(image_id: int, category_id: int, rle: Rle, box: NDArray[np.float64], score: float) -> Result:
    """One entry of a COCO result file; `box` is x0, y0, x1, y1."""
    place = {"image_id": image_id, "category_id": category_id, "bbox": xywh(tuple(box.tolist()))}
    return {**place, "segmentation": rle, "score": float(score)}
