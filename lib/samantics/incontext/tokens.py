"""What SAM gives the in-context model: maps of images, mask tokens of boxes and what lies in them, live or kept.

Boxes are `(x0, y0, x1, y1)` in pixels of SAM's input: the image's long side fills the square, the rest is padding.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from segment_anything.modeling import Sam
from torch import Tensor
from torchvision.ops import roi_align
from tqdm.auto import tqdm

from samantics.cache import atomic_path, hash_value, kept, reading
from samantics.data.coco import CocoDataset, read_image
from samantics.errors import StudyError
from samantics.models.encoder import Encoder
from samantics.models.preprocessing import Preprocessing
from samantics.models.registry import capture
from samantics.scales import InContextSettings

FORMAT = 4  # of what is cached; raised when the same settings would give other numbers

Rows = NDArray[np.int64]  # (B,) positions of images in a data set


class SamMaps(NamedTuple):
    """SAM's maps of a batch of images."""

    trunk: Tensor  # (B, L, C, h, w): the outputs of L trunk blocks
    neck: Tensor  # (B, D, h, w): the input of the mask decoder
    inside: Tensor  # (B, h, w) bool, False for tokens of padding


# source(rows, mirrored=None): float32 maps of images, or of their mirror images where the (B,) bools `mirrored` say so
MapSource = Callable[..., SamMaps]


def trunk_blocks(sam: Sam, count: int) -> list[int]:
    """Positions of `count` trunk blocks, evenly spread, the last one included (SAM ViT-B, 4: 2, 5, 8, 11)."""
    depth = len(sam.image_encoder.blocks)
    return [math.ceil(depth * (step + 1) / count) - 1 for step in range(count)]


@torch.no_grad()
def sam_maps(sam: Sam, images: Sequence[Image.Image], count: int) -> SamMaps:
    """SAM's maps of RGB images, from one forward pass of its encoder; `count` trunk maps, see `trunk_blocks`."""
    prepare = Preprocessing(sam.image_encoder.img_size, "pad")
    blocks = {str(block): sam.image_encoder.blocks[block] for block in trunk_blocks(sam, count)}
    with capture(blocks) as outputs:
        neck = sam.image_encoder(torch.stack([prepare(image) for image in images]).to(sam.device))
    trunk = torch.stack([outputs[name].permute(0, 3, 1, 2) for name in blocks], dim=1)
    inside = torch.zeros(len(images), *neck.shape[-2:], dtype=torch.bool, device=sam.device)
    token = prepare.size / neck.shape[-1]
    for mask, image in zip(inside, images, strict=True):
        _, _, right, bottom = prepare.geometry(image.width, image.height).seen
        mask[: math.ceil(bottom / token), : math.ceil(right / token)] = True
    return SamMaps(trunk, neck, inside)


def mask_tokens(sam: Sam, neck: Tensor, boxes: Tensor) -> Tensor:
    """`(R, T, D)` mask tokens as they leave the mask decoder's two-way transformer; SAM has T = 4.

    Args:
        neck: `(R, D, h, w)`, see `SamMaps`; one image and box per row.
        boxes: `(R, 4)` prompts `(x0, y0, x1, y1)` in pixels of SAM's input.
    """
    decoder = sam.mask_decoder
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(len(boxes), -1, -1)
    positions = sam.prompt_encoder.get_dense_pe().expand(len(boxes), -1, -1, -1)
    hidden, _ = decoder.transformer(neck + dense, positions, torch.cat([output, sparse], dim=1))
    return hidden[:, 1 : 1 + decoder.num_mask_tokens]


@torch.no_grad()
def box_masks(sam: Sam, neck: Tensor, boxes: Tensor, width: int, height: int) -> NDArray[np.bool_]:
    """`(K, height, width)` SAM's single mask for each box of one image.

    Args:
        neck: `(1, D, h, w)` of the image.
        boxes: `(K, 4)` prompts `(x0, y0, x1, y1)` in pixels of SAM's input.
        width, height: of the image itself, pixels.
    """
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    positions = sam.prompt_encoder.get_dense_pe()
    logits, _ = sam.mask_decoder(neck, positions, sparse, dense, multimask_output=False)
    new_width, new_height = Preprocessing(sam.image_encoder.img_size, "pad").resized(width, height)
    masks = sam.postprocess_masks(logits, (new_height, new_width), (height, width))[:, 0] > sam.mask_threshold
    return masks.numpy(force=True)


class Objects(NamedTuple):
    """All R objects of a data set as arrays, in the order of `dataset.instances`."""

    image: Rows  # position of its image in `dataset.images`
    boxes: NDArray[np.float32]  # (R, 4), in SAM's input frame
    categories: NDArray[np.int64]  # COCO category ids
    crowd: NDArray[np.bool_]  # True for groups
    large: NDArray[np.bool_]  # True for what may be a reference: no groups, nothing smaller than the settings say
    right: NDArray[np.float32]  # where its image ends and the padding begins, in SAM's input frame

    def among(self, images: Rows, rows: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Of the objects in `rows`: the place of each one's image among `images` (ascending), and its box."""
        places = torch.from_numpy(np.searchsorted(images, self.image[rows]))
        return places.to(device), torch.from_numpy(self.boxes[rows]).to(device)


class SamData(NamedTuple):
    """One data set as SAM sees it."""

    dataset: CocoDataset
    maps: MapSource
    objects: Objects
    tokens: NDArray[np.float16]  # (R, T, D) mask tokens of the objects
    contents: NDArray[np.float16]  # (R, L * C) means of SAM's trunk maps over their boxes; for naming alone


def input_scales(dataset: CocoDataset, input_size: int) -> NDArray[np.float64]:
    """`(N, 4)` factors that take boxes in pixels of each image to SAM's input frame."""
    prepare = Preprocessing(input_size, "pad")
    frames = [prepare.geometry(record.width, record.height) for record in dataset.images.values()]
    return np.array([[frame.scale_x, frame.scale_y] * 2 for frame in frames])


def object_arrays(dataset: CocoDataset, input_size: int, min_area: float = 0) -> Objects:
    """The objects of a data set for a SAM whose input is `input_size` pixels; `min_area` of references, pixels."""
    row = {image_id: number for number, image_id in enumerate(dataset.images)}
    image = np.array([row[i.image_id] for i in dataset.instances], np.int64)
    boxes, scales = np.array([i.box for i in dataset.instances]).reshape(-1, 4), input_scales(dataset, input_size)
    widths = np.array([record.width for record in dataset.images.values()]) * scales[:, 0]
    return Objects(
        image=image,
        boxes=(boxes * scales[image]).astype(np.float32),
        categories=np.array([i.category_id for i in dataset.instances], np.int64),
        crowd=np.array([i.crowd for i in dataset.instances], bool),
        large=np.array([not i.crowd and i.area >= min_area for i in dataset.instances], bool),
        right=widths[image].astype(np.float32),
    )


def live_maps(
    sam: Sam, dataset: CocoDataset, count: int, rows: Rows, mirrored: NDArray[np.bool_] | None = None
) -> SamMaps:
    """See `MapSource`: encoded whenever they are asked for."""
    image_ids = list(dataset.images)
    images = [read_image(dataset, image_ids[row]) for row in rows]
    if mirrored is not None:
        images = [ImageOps.mirror(i) if turned else i for i, turned in zip(images, mirrored, strict=True)]
    return sam_maps(sam, images, count)


def stored_maps(sam: Sam, dataset: CocoDataset, trunk_maps: int, weights_hash: str, folder: Path) -> MapSource:
    """SAM's maps of all images, kept on disk as float16; encoded now if they are not there."""
    count, key = len(dataset.images), hash_value(["maps 1", dataset.hash, weights_hash, trunk_blocks(sam, trunk_maps)])
    paths = [folder / f"{key}_{part}.npy" for part in SamMaps._fields]
    if not all(path.is_file() for path in paths):
        arrays: dict[Path, NDArray[Any]] = {}
        for rows in tqdm(np.split(np.arange(count), range(32, count, 32)), desc="SAM encodes", unit="batch"):
            for path, values in zip(paths, live_maps(sam, dataset, trunk_maps, rows), strict=True):
                kind = bool if values.dtype == torch.bool else np.float16
                arrays.setdefault(path, np.empty((count, *values.shape[1:]), kind))[rows] = values.numpy(force=True)
        for path, array in arrays.items():
            with atomic_path(path) as temporary:
                np.save(temporary, array)
    stored = []
    for path in paths:
        with reading(path):
            stored.append(np.load(path, mmap_mode="r"))

    def read(rows: Rows, mirrored: NDArray[np.bool_] | None = None) -> SamMaps:
        if mirrored is not None and mirrored.any():
            raise StudyError("stored maps have no mirror images: set flip to 0 or store_features to False in scales.py")
        trunk, neck, inside = (torch.from_numpy(part[rows]).to(sam.device) for part in stored)
        return SamMaps(trunk.float(), neck.float(), inside)

    return read


def box_means(maps: Tensor, image: Tensor, boxes: Tensor) -> Tensor:
    """`(N, C)` mean of `(B, C, h, w)` maps over `(N, 4)` boxes, shares of the map's side, of images `(N,)`."""
    rows = torch.cat([image[:, None].to(boxes), boxes], dim=1)
    means = roi_align(maps, rows, output_size=1, spatial_scale=maps.shape[-1], sampling_ratio=3, aligned=True)
    return means[:, :, 0, 0]


def sam_data(encoder: Encoder, dataset: CocoDataset, settings: InContextSettings, folder: Path) -> SamData:
    """A data set as SAM sees it; what the folder does not have of it is computed now."""
    sam, side, count = encoder.model, encoder.image_size, settings.trunk_maps
    maps: MapSource = functools.partial(live_maps, sam, dataset, count)
    if settings.store_features:
        maps = stored_maps(sam, dataset, count, encoder.weights_hash, folder)
    objects = object_arrays(dataset, side, settings.min_reference_area)

    def compute() -> dict[str, NDArray[np.float16]]:
        """Mask tokens and contents of every object's own box."""
        images, parts = np.unique(objects.image), []
        for some in tqdm(np.split(images, range(16, len(images), 16)), desc="mask tokens", unit="batch"):
            seen, rows = maps(some), np.flatnonzero(np.isin(objects.image, some))
            image, boxes = objects.among(some, rows, sam.device)
            trunk = seen.trunk.flatten(1, 2)[:, : None if settings.naming else 0]
            found = mask_tokens(sam, seen.neck[image], boxes), box_means(trunk, image, boxes / side)
            parts.append((rows, *(one.half().numpy(force=True) for one in found)))
        rows, tokens, contents = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.argsort(rows)
        return {"tokens": tokens[order], "contents": contents[order]}

    key = hash_value([FORMAT, dataset.hash, encoder.weights_hash, count, *([] if settings.naming else ["tokens"])])
    found = kept(folder / f"tokens_{key}.npz", compute)
    return SamData(dataset, maps, objects, found["tokens"], found["contents"])
