"""Features of masks by a frozen encoder: the mean of the image's map under the mask, or the mask cut out alone.

The first is the paper's. The map is thought of as resized bilinearly to the image; the mean over a mask is then a
weighted sum of tokens, so it is computed from the mask's weight on each token, without resizing any map. A mask smaller
than a token still weighs on its nearest tokens: no reference vanishes and nothing becomes NaN.
"""

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samantics.cache import cache_dir, hash_value, kept, reading
from samantics.data.coco import CocoDataset, Instance, Mask, Rle, mask_of, read_image, shown
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


def cut_out(image: Image.Image, mask: Mask) -> Image.Image:
    """What a mask `(height, width)` covers, alone on grey, in a square a little larger than its box."""
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
    half = max(bottom - top, right - left) / 2 * (1 + MARGIN) + 1
    corner = math.floor((left + right + 1) / 2 - half), math.floor((top + bottom + 1) / 2 - half)
    alone = Image.fromarray(np.where(mask[..., None], np.asarray(image), np.array(GREY, np.uint8)))
    canvas = Image.new("RGB", (math.ceil(2 * half),) * 2, GREY)
    canvas.paste(alone, (-corner[0], -corner[1]))
    return canvas


@functools.lru_cache(16)  # what several encoders need of the images of a batch is computed once
def _weights(counts: tuple[str, ...], geometry: Geometry, grid: tuple[int, int]) -> NDArray[np.float32]:
    """`token_weights` of masks by run lengths, a few at a time: all at once, a photograph's may not fit memory."""
    rles = [{"size": [geometry.height, geometry.width], "counts": its} for its in counts]
    some = max(1, MASK_PIXELS_AT_ONCE // (geometry.width * geometry.height))
    masks = (np.array([mask_of(rle) for rle in rles[i : i + some]]) for i in range(0, len(rles), some))
    none = np.empty((0, grid[0] * grid[1]), np.float32)
    return np.concatenate([none, *(token_weights(chunk, geometry, grid) for chunk in masks)])


Masked = tuple[Image.Image, Sequence[Rle]]  # an image and its masks


def _in_map(encoder: Encoder, batch: Sequence[Masked]) -> list[NDArray[Any]]:
    """The paper's way: the image is encoded whole, and a mask's feature is the mean of the map under it."""
    maps, geometry = dense_maps(encoder, [image for image, _ in batch]), uncropped(encoder).preprocess.geometry
    found = []
    for (image, rles), its in zip(batch, maps, strict=True):
        weights = _weights(tuple(rle["counts"] for rle in rles), geometry(*image.size), its.shape[1:])
        found.append(weights @ its.reshape(len(its), -1).T)
    return found


def _cut_out(encoder: Encoder, batch: Sequence[Masked]) -> list[NDArray[Any]]:
    """Every mask is an image of its own, read as the encoder's authors read images (class token or mean)."""
    cut = [cut_out(image, mask_of(rle)) for image, rles in batch for rle in rles]
    some = encoder.images_at_once
    inputs = (encoder.inputs(cut[i : i + some]) for i in range(0, len(cut), some))
    found = [encoder.pooled(pixels, [encoder.headline])[encoder.headline].cpu().numpy() for pixels in inputs]
    ends = np.cumsum([len(rles) for _, rles in batch])[:-1]
    return np.split(np.concatenate(found), ends) if found else [np.empty((0, 0))] * len(batch)


VIEWS: Mapping[str, Callable[[Encoder, Sequence[Masked]], list[NDArray[Any]]]] = {"map": _in_map, "cut_out": _cut_out}


@dataclasses.dataclass(frozen=True)
class MaskFeatures:
    """Features of masks by image id, in files: those of all masks of COCO's images would fill the memory."""

    places: Mapping[int, Path]

    def of(self, source: str, image_id: int) -> Features:
        """`(N, C)` features of unit length of an image's masks, by one encoder."""
        path = self.places[image_id]
        with reading(path), np.load(path) as arrays:  # of which this one alone is read
            return arrays[f"{source}/{image_id}"]


def encode_masks(
    encoders: Mapping[str, Encoder], dataset: CocoDataset, masks: Mapping[int, Sequence[Rle]],
    folder: Path | None = None, view: str = "map",
) -> MaskFeatures:  # fmt: skip
    """Features of masks (by image id) by all encoders, in a view of `VIEWS`; a rerun finds them in `folder`'s files."""
    key = [FORMAT, {name: encoder.key for name, encoder in encoders.items()}, dataset.hash, view]
    # an encoder serves one thread at a time: two at once would read each other's features
    threads = len(encoders) > 1 and all(encoder.device.type == "cpu" for encoder in encoders.values())

    def features(some: Sequence[int]) -> dict[str, Features]:
        batch = [(read_image(dataset, image_id), masks[image_id]) for image_id in some]
        jobs = [(encoder, batch) for encoder in encoders.values()]
        found = on_all_cores(VIEWS[view], jobs) if threads and len(batch) > 1 else itertools.starmap(VIEWS[view], jobs)
        named = zip(encoders, found, strict=True)
        return {f"{name}/{n}": unit(of) for name, its in named for n, of in zip(some, its, strict=True)}

    side = max(encoder.image_size for encoder in encoders.values())
    batch = max(1, min(16, PIXELS_AT_ONCE // side**2))  # names the files: not `images_at_once`, which asks the GPU
    places, bar = dict[int, Path](), shown(dataset, masks, "features of masks")
    while some := list(itertools.islice(bar, batch)):
        counts = [(image_id, [rle["counts"] for rle in masks[image_id]]) for image_id in some]
        path = (folder or cache_dir() / "mask_features") / f"{hash_value([*key, counts])}.npz"
        if not path.is_file():  # else nothing is read yet
            kept(path, functools.partial(features, some))
        places |= dict.fromkeys(some, path)
    return MaskFeatures(places)


def reference_features(
    encoders: Mapping[str, Encoder], dataset: CocoDataset, instances: Sequence[Instance],
    folder: Path | None = None, view: str = "map",
) -> dict[str, dict[int, Features]]:  # fmt: skip
    """`(C,)` feature of each instance, by encoder and instance id (see `encode_masks`)."""
    by_image = defaultdict[int, list[Instance]](list)
    for instance in instances:
        by_image[instance.image_id].append(instance)
    masks = {image_id: [instance.rle for instance in found] for image_id, found in by_image.items()}
    features = encode_masks(encoders, dataset, masks, folder, view)
    of_instances = {name: dict[int, Features]() for name in encoders}
    for (image_id, found), name in itertools.product(by_image.items(), encoders):
        ids = [instance.id for instance in found]
        of_instances[name] |= zip(ids, features.of(name, image_id), strict=True)
    return of_instances
