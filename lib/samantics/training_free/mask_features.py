"""Features of masks by a frozen encoder: the mean of the image's map under the mask, or the mask cut out alone.

The first is the paper's. The map is thought of as resized bilinearly to the image; the mean over a mask is then a
weighted sum of tokens, so it is computed from the mask's weight on each token, without resizing any map. A mask smaller
than a token still weighs on its nearest tokens: no reference vanishes and nothing becomes NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samantics.cache import cache_dir, hash_value, kept, reading, remove_leftovers
from samantics.data.coco import CocoDataset, Instance, Rle, mask_of, read_image, shown
from samantics.errors import StudyError
from samantics.models.encoder import PIXELS_AT_ONCE, Encoder
from samantics.models.preprocessing import Geometry
from samantics.run import on_all_cores

Features = NDArray[np.float32]  # (N, C)
FORMAT = 2  # of the files of features
MASK_PIXELS_AT_ONCE = 2**24
GREY = (124, 116, 104)  # ImageNet's mean, which every preprocessing of the study takes to about 0
MARGIN = 0.1  # of a cut-out, beyond the box


def unit(vectors: NDArray[Any]) -> Features:
    """`(..., C)` vectors scaled to length 1; a zero vector stays zero instead of becoming NaN."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros(vectors.shape, np.float32), where=lengths > 0).astype(np.float32)


def resizing(geometry: Geometry, grid: tuple[int, int]) -> tuple[Features, Features]:
    """`(height, h)` and `(width, w)`: how much each token of a map weighs in each row and column of the image."""
    rows = _interpolation(geometry.height, geometry.scale_y, geometry.top, geometry.size, grid[0])
    return rows, _interpolation(geometry.width, geometry.scale_x, geometry.left, geometry.size, grid[1])


def token_weights(masks: NDArray[np.bool_], geometry: Geometry, grid: tuple[int, int]) -> NDArray[np.float32]:
    """`(M, h * w)`: the share of each token of a `grid` `(h, w)` in the mean over `(M, height, width)` masks."""
    _check_seen(masks)
    rows, columns = resizing(geometry, grid)
    weights = rows.T @ (masks.astype(np.float32) @ columns)
    return (weights / masks.sum((1, 2), dtype=np.float32)[:, None, None]).reshape(len(masks), grid[0] * grid[1])


def _check_seen(masks: NDArray[np.bool_]) -> None:
    if not masks.any((1, 2)).all():
        raise StudyError("a mask to pool over is empty: leave out objects without visible pixels")


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


def cut_outs(image: Image.Image, masks: NDArray[np.bool_]) -> list[Image.Image]:
    """What each of `(N, height, width)` masks covers, alone on grey, in a square a little larger than its box."""
    _check_seen(masks)
    pixels, cut = np.asarray(image), []
    for mask in masks:
        (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
        half = max(bottom - top, right - left) / 2 * (1 + MARGIN) + 1
        middle = (left + right + 1) / 2, (top + bottom + 1) / 2
        alone = Image.fromarray(np.where(mask[..., None], pixels, np.array(GREY, np.uint8)))
        square = (math.floor(middle[0] - half), math.floor(middle[1] - half))
        canvas = Image.new("RGB", (math.ceil(2 * half),) * 2, GREY)
        canvas.paste(alone, (-square[0], -square[1]))
        cut.append(canvas)
    return cut


@dataclasses.dataclass(frozen=True, eq=False)
class _Masked:
    """An image and its masks; what several encoders need of them is computed once."""

    image: Image.Image
    rles: Sequence[Rle]

    @functools.cache  # noqa: B019 - lives as long as its batch
    def weights(self, geometry: Geometry, grid: tuple[int, int]) -> NDArray[np.float32]:
        """`token_weights` of all masks, a few at a time: all at once, a photograph's may not fit memory."""
        some = max(1, MASK_PIXELS_AT_ONCE // (geometry.width * geometry.height))
        chunks = (self.rles[i : i + some] for i in range(0, len(self.rles), some))
        none = np.empty((0, grid[0] * grid[1]), np.float32)
        masks = (np.array([mask_of(rle) for rle in chunk]) for chunk in chunks)
        return np.concatenate([none, *(token_weights(chunk, geometry, grid) for chunk in masks)])


def _batch(side: int) -> int:
    """Images of that side that are encoded at once: on a CPU small ones are a third slower in hundreds."""
    return max(1, min(16, PIXELS_AT_ONCE // side**2))


def _in_map(encoder: Encoder, batch: Sequence[_Masked]) -> list[NDArray[Any]]:
    """The paper's way: the image is encoded whole, and a mask's feature is the mean of the map under it."""
    maps, geometry = dense_maps(encoder, [one.image for one in batch]), uncropped(encoder).preprocess.geometry
    grid = (maps.shape[2], maps.shape[3])
    flat = maps.reshape(len(maps), maps.shape[1], -1)
    return [one.weights(geometry(*one.image.size), grid) @ its.T for one, its in zip(batch, flat, strict=True)]


def _cut_out(encoder: Encoder, batch: Sequence[_Masked]) -> list[NDArray[Any]]:
    """Every mask is an image of its own, read as the encoder's authors read images (class token or mean)."""
    cut = [alone for one in batch for rle in one.rles for alone in cut_outs(one.image, mask_of(rle)[None])]
    some = _batch(encoder.image_size)
    inputs = (encoder.inputs(cut[i : i + some]) for i in range(0, len(cut), some))
    found = [encoder.pooled(pixels, [encoder.headline])[encoder.headline].cpu().numpy() for pixels in inputs]
    ends = np.cumsum([len(one.rles) for one in batch])[:-1]
    return np.split(np.concatenate(found), ends) if found else [np.empty((0, 0))] * len(batch)


VIEWS: Mapping[str, Callable[[Encoder, Sequence[_Masked]], list[NDArray[Any]]]] = {"map": _in_map, "cut_out": _cut_out}


@dataclasses.dataclass(frozen=True)
class MaskFeatures:
    """Features of masks by image id, in files: those of all masks of COCO's images would fill the memory."""

    places: Mapping[int, Path]

    def of(self, source: str, image_id: int) -> Features:
        """`(N, C)` features of unit length of an image's masks, by one encoder."""
        path = self.places[image_id]
        with reading(path), np.load(path) as arrays:  # of which this one alone is read
            found: Features = arrays[f"{source}/{image_id}"]
        return found


def encode_masks(
    encoders: Mapping[str, Encoder],
    dataset: CocoDataset,
    masks: Mapping[int, Sequence[Rle]],
    folder: Path | None = None,
    view: str = "map",
) -> MaskFeatures:
    """Features of masks (by image id) by all encoders, in a view of `VIEWS`; a rerun finds them in `folder`'s files."""
    folder = folder or cache_dir() / "mask_features"
    remove_leftovers(folder)
    places = dict[int, Path]()
    key = [FORMAT, {name: encoder.key for name, encoder in encoders.items()}, dataset.hash, view]
    batch = _batch(max(encoder.image_size for encoder in encoders.values()))
    read = functools.partial(_read, encoders, dataset, VIEWS[view])
    bar = shown(dataset, masks, "features of masks")
    while some := list(itertools.islice(bar, batch)):
        chosen = {image_id: masks[image_id] for image_id in some}
        counts = [(image_id, [rle["counts"] for rle in rles]) for image_id, rles in chosen.items()]
        path = folder / f"{hash_value([*key, counts])}.npz"
        if not path.is_file():  # else nothing is read yet
            kept(path, functools.partial(read, chosen))
        places |= dict.fromkeys(chosen, path)
    return MaskFeatures(places)


def _read(
    encoders: Mapping[str, Encoder],
    dataset: CocoDataset,
    view: Callable[[Encoder, Sequence[_Masked]], list[NDArray[Any]]],
    masks: Mapping[int, Sequence[Rle]],
) -> dict[str, Features]:
    """Features of the masks of a few images, named as `MaskFeatures` looks them up."""
    batch = [_Masked(read_image(dataset, image_id), rles) for image_id, rles in masks.items()]
    jobs = [(encoder, batch) for encoder in encoders.values()]
    # an encoder serves one thread at a time: two at once would read each other's features
    side_by_side = len(batch) > 1 and len(jobs) > 1 and all(encoder.device.type == "cpu" for encoder, _ in jobs)
    found = on_all_cores(view, jobs) if side_by_side else itertools.starmap(view, jobs)
    return {
        f"{name}/{image_id}": unit(features)
        for name, its in zip(encoders, found, strict=True)
        for image_id, features in zip(masks, its, strict=True)
    }


def reference_features(
    encoders: Mapping[str, Encoder],
    dataset: CocoDataset,
    instances: Sequence[Instance],
    folder: Path | None = None,
    view: str = "map",
) -> dict[str, dict[int, Features]]:
    """`(C,)` feature of each instance, by encoder and instance id (see `encode_masks`)."""
    by_image: dict[int, list[Instance]] = {}
    for instance in instances:
        by_image.setdefault(instance.image_id, []).append(instance)
    rles = {image_id: [i.rle for i in found] for image_id, found in by_image.items()}
    features = encode_masks(encoders, dataset, rles, folder, view)
    ids = [instance.id for found in by_image.values() for instance in found]
    return {
        name: dict(zip(ids, (vector for n in by_image for vector in features.of(name, n)), strict=True))
        for name in encoders
    }
