"""SAM's maps and mask tokens for the in-context model: computed once, kept, and read again.

Everything happens in SAM's input frame: the image's long side fills the square input, the rest is padding. Boxes are
``(x0, y0, x1, y1)`` in its pixels, unless said otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import ImageOps
from segment_anything.modeling import Sam
from torch import Tensor
from tqdm.auto import tqdm

from samantics.cache import atomic_path, hash_value, reading
from samantics.data.coco import CocoDataset, read_image
from samantics.errors import StudyError
from samantics.models.architectures import capture
from samantics.models.preprocessing import Preprocessing

SHARD = 512  # images whose mask tokens are one file


# ------------------------------------------------------------------------------------------------- the frozen SAM


class SamMaps(NamedTuple):
    """What SAM's encoder says of a batch of images.

    Attributes:
        trunk: ``(B, L, C, h, w)``, the outputs of L trunk blocks.
        neck: ``(B, D, h, w)``, what the mask decoder reads.
        inside: ``(B, h, w)`` bool, False for tokens of padding.
    """

    trunk: Tensor
    neck: Tensor
    inside: Tensor


def preprocessing_of(sam: Sam) -> Preprocessing:
    """SAM's own way from a picture to its input: long side to the input's, padded to a square."""
    return Preprocessing(sam.image_encoder.img_size, "pad")


def trunk_blocks(sam: Sam, count: int) -> list[int]:
    """Positions of ``count`` trunk blocks, evenly spread, the last one included (SAM ViT-B, 4: 2, 5, 8, 11)."""
    depth = len(sam.image_encoder.blocks)
    return [math.ceil(depth * (step + 1) / count) - 1 for step in range(count)]


@torch.no_grad()
def encode_images(
    sam: Sam, dataset: CocoDataset, image_ids: Sequence[int], count: int, mirrored: NDArray[np.bool_] | None = None
) -> SamMaps:
    """SAM's maps of some images, from one forward of its encoder.

    Args:
        count: of trunk maps, see :func:`trunk_blocks`.
        mirrored: ``(B,)`` which images are mirrored left to right first; None for none.
    """
    prepare = preprocessing_of(sam)
    pictures = [read_image(dataset, image_id) for image_id in image_ids]
    if mirrored is not None:
        pictures = [ImageOps.mirror(p) if turned else p for p, turned in zip(pictures, mirrored, strict=True)]
    pixels = torch.stack([prepare(picture) for picture in pictures]).to(sam.device)
    chosen = {str(block): sam.image_encoder.blocks[block] for block in trunk_blocks(sam, count)}
    with capture(chosen) as captured:
        neck = sam.image_encoder(pixels)
    trunk = torch.stack([captured[name].permute(0, 3, 1, 2) for name in chosen], dim=1)
    inside = torch.zeros(len(pixels), *neck.shape[-2:], dtype=torch.bool, device=sam.device)
    for seen, image_id in zip(inside, image_ids, strict=True):
        record = dataset.images[image_id]
        _, _, right, bottom = prepare.geometry(record.width, record.height).seen
        token = prepare.size / seen.shape[0]
        seen[: math.ceil(bottom / token), : math.ceil(right / token)] = True
    return SamMaps(trunk, neck, inside)


@torch.no_grad()
def mask_tokens(sam: Sam, neck: Tensor, boxes: Tensor) -> Tensor:
    """``(R, T, D)`` mask tokens as they leave the mask decoder's two-way transformer, one image and box per row.

    Args:
        neck: ``(R, D, h, w)``.
        boxes: ``(R, 4)`` prompts.

    Raises:
        StudyError: a box is empty or outside the input.
    """
    side = sam.image_encoder.img_size
    good = (boxes[:, 2:] > boxes[:, :2]).all(1) & (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < side).all(1)
    if not good.all():
        box = [round(v, 1) for v in boxes[~good][0].tolist()]
        raise StudyError(
            f"the reference box {box} is empty or outside SAM's {side}-pixel input: correct its annotation"
        )
    decoder = sam.mask_decoder
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(len(boxes), -1, -1)
    positions = sam.prompt_encoder.get_dense_pe().expand(len(boxes), -1, -1, -1)
    hidden, _ = decoder.transformer(neck + dense, positions, torch.cat([output, sparse], dim=1))
    return hidden[:, 1 : 1 + decoder.num_mask_tokens]


@torch.no_grad()
def box_masks(sam: Sam, neck: Tensor, boxes: Tensor, width: int, height: int) -> NDArray[np.bool_]:
    """``(K, height, width)`` masks of an image for ``(K, 4)`` boxes, SAM's single-mask output for each.

    Args:
        neck: ``(1, D, h, w)`` of the image.
        width, height: of the image itself, pixels.
    """
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    logits, _ = sam.mask_decoder(
        image_embeddings=neck,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    new_width, new_height = preprocessing_of(sam).resized(width, height)
    masks: NDArray[np.bool_] = (
        sam.postprocess_masks(logits, (new_height, new_width), (height, width))[:, 0] > sam.mask_threshold
    ).numpy(force=True)
    return masks


# ------------------------------------------------------------------------------------------- objects and features


@dataclasses.dataclass(frozen=True)
class Objects:
    """All objects of a data set as arrays, in SAM's input frame. Rows of images follow ``dataset.images``.

    Attributes:
        image: ``(R,)`` row of its image.
        boxes: ``(R, 4)`` float32.
        categories: ``(R,)`` COCO category ids.
        crowd: ``(R,)`` True for groups.
        area: ``(R,)`` of its mask, pixels of the image itself.
        right: ``(R,)`` where its image ends and the padding begins.
    """

    image: NDArray[np.int64]
    boxes: NDArray[np.float32]
    categories: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    area: NDArray[np.float64]
    right: NDArray[np.float32]


def input_scales(dataset: CocoDataset, input_size: int) -> NDArray[np.float64]:
    """``(N, 4)`` factors that take boxes in pixels of each image to SAM's input frame."""
    prepare = Preprocessing(input_size, "pad")
    frames = [prepare.geometry(record.width, record.height) for record in dataset.images.values()]
    return np.array([[frame.scale_x, frame.scale_y] * 2 for frame in frames])


def objects_of(dataset: CocoDataset, input_size: int) -> Objects:
    """The objects of a data set for a SAM whose input is ``input_size`` pixels."""
    row = {image_id: number for number, image_id in enumerate(dataset.images)}
    image = np.array([row[i.image_id] for i in dataset.instances], np.int64)
    boxes = np.array([i.box for i in dataset.instances]).reshape(-1, 4)
    scales = input_scales(dataset, input_size)
    widths = np.array([record.width for record in dataset.images.values()]) * scales[:, 0]
    return Objects(
        image=image,
        boxes=(boxes * scales[image]).astype(np.float32),
        categories=np.array([i.category_id for i in dataset.instances], np.int64),
        crowd=np.array([i.crowd for i in dataset.instances], bool),
        area=np.array([i.area for i in dataset.instances], np.float64),
        right=widths[image].astype(np.float32),
    )


class FeatureSource(Protocol):
    """Where SAM's maps of a data set's images come from."""

    def read(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_] | None = None) -> SamMaps:
        """The maps of some images, float32; of those that are ``mirrored``, of their mirror images."""


@dataclasses.dataclass(frozen=True)
class LiveFeatures:
    """SAM's maps, encoded whenever they are asked for: nothing is stored."""

    sam: Sam
    dataset: CocoDataset
    count: int

    def read(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_] | None = None) -> SamMaps:
        """See :class:`FeatureSource`."""
        image_ids = list(self.dataset.images)
        return encode_images(self.sam, self.dataset, [image_ids[row] for row in rows], self.count, mirrored)


@dataclasses.dataclass(frozen=True)
class StoredFeatures:
    """SAM's maps, encoded once and kept on disk as float16.

    Attributes:
        trunk: ``(N, L, C, h, w)`` memory map.
        neck: ``(N, D, h, w)`` memory map.
        inside: ``(N, h, w)``.
    """

    trunk: NDArray[np.float16]
    neck: NDArray[np.float16]
    inside: NDArray[np.bool_]
    device: torch.device

    def read(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_] | None = None) -> SamMaps:
        """See :class:`FeatureSource`. Mirror images are not stored.

        Raises:
            StudyError: one is asked for.
        """
        if mirrored is not None and mirrored.any():
            raise StudyError("stored features have no mirror images: set flip to 0 or store_features to False")
        trunk, neck, inside = (
            torch.from_numpy(part[rows]).to(self.device) for part in (self.trunk, self.neck, self.inside)
        )
        return SamMaps(trunk.float(), neck.float(), inside)


@dataclasses.dataclass(frozen=True)
class PlantedFeatures:
    """A positive control: another source's maps with the code of its class written over every object.

    A model that cannot learn from these cannot use a reference at all; one that can, and learns nothing from SAM's own
    maps, did not find the class there.

    Attributes:
        source: of the maps.
        objects: of the same images.
        input_size: side of SAM's input, pixels.
        codes: ``(K, C)`` by category id; added in units of the maps' standard deviation.
    """

    source: FeatureSource
    objects: Objects
    input_size: int
    codes: Tensor

    def read(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_] | None = None) -> SamMaps:
        """See :class:`FeatureSource`."""
        maps = self.source.read(rows, mirrored)
        trunk, codes = maps.trunk.clone(), self.codes.to(maps.trunk) * maps.trunk.std()
        grid = trunk.shape[-1]
        tokens = np.round(self.objects.boxes * grid / self.input_size).astype(int)
        tokens[:, :2] = tokens[:, :2].clip(0, grid - 1)  # an object smaller than a token has one all the same
        for position, row in enumerate(rows):
            for number in np.flatnonzero(self.objects.image == row):
                x0, y0, x1, y1 = tokens[number]
                place = np.s_[position, :, :, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
                trunk[place] += codes[self.objects.categories[number], :, None, None]
        return maps._replace(trunk=trunk)


def class_codes(categories: Sequence[int], width: int, seed: int) -> Tensor:
    """``(K, width)`` a random code for each category id."""
    return torch.randn(max(categories) + 1, width, generator=torch.Generator().manual_seed(seed))


def planted_tokens(tokens: NDArray[np.float16], objects: Objects, codes: Tensor) -> NDArray[np.float16]:
    """``(R, T, D)`` mask tokens with the code ``(K, D)`` of each object's class added, as :class:`PlantedFeatures`."""
    strength = float(tokens.astype(np.float32).std())
    planted = tokens + strength * codes.numpy()[objects.categories][:, None]
    return planted.astype(np.float16)


def stored_features(
    sam: Sam, dataset: CocoDataset, count: int, weights_hash: str, folder: Path, batch: int = 32
) -> StoredFeatures:
    """SAM's maps of all images of a data set: read from ``folder``, else encoded and written there first."""
    key = hash_value(["maps 1", dataset.hash, weights_hash, trunk_blocks(sam, count)])
    paths = {part: folder / f"{key}_{part}.npy" for part in SamMaps._fields}
    if not all(path.is_file() for path in paths.values()):
        live = LiveFeatures(sam, dataset, count)
        starts = range(0, len(dataset.images), batch)
        parts: dict[str, Any] = {}
        for start in tqdm(starts, desc="SAM encodes", unit="batch"):
            rows = np.arange(start, min(start + batch, len(dataset.images)))
            for part, values in zip(SamMaps._fields, live.read(rows), strict=True):
                if part not in parts:
                    kind = np.dtype(bool if part == "inside" else np.float16)
                    parts[part] = np.empty((len(dataset.images), *values.shape[1:]), kind)
                parts[part][rows] = values.numpy(force=True)
        for part, values in parts.items():
            with atomic_path(paths[part]) as temporary:
                np.save(temporary, values)
    loaded = {}
    for part, path in paths.items():
        with reading(path):
            loaded[part] = np.load(path, mmap_mode="r")
    return StoredFeatures(loaded["trunk"], loaded["neck"], loaded["inside"], sam.device)


def reference_tokens(
    sam: Sam, source: FeatureSource, objects: Objects, folder: Path, batch: int = 16
) -> NDArray[np.float16]:
    """``(R, T, D)`` mask tokens of every object's own box: read from ``folder``, else computed and written there.

    A file holds the objects of :data:`SHARD` images, so a killed run goes on where it was; under ``torchrun`` the
    processes share the files out.
    """
    spans = [(start, start + SHARD) for start in range(0, int(objects.image.max(initial=-1)) + 1, SHARD)]
    paths = [folder / f"{start:07d}.npy" for start, _ in spans]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    missing = [number for number in range(rank, len(spans), world) if not paths[number].is_file()]
    for number in tqdm(missing, desc="mask tokens", unit=f"{SHARD} images", disable=rank > 0):
        tokens = _tokens_of_span(sam, source, objects, spans[number], batch)
        with atomic_path(paths[number]) as temporary:
            np.save(temporary, tokens)
    if world > 1:
        dist.barrier()
    decoder = sam.mask_decoder
    found = np.zeros((len(objects.image), decoder.num_mask_tokens, decoder.transformer_dim), np.float16)
    for (start, end), path in zip(spans, paths, strict=True):
        with reading(path):
            found[(objects.image >= start) & (objects.image < end)] = np.load(path)
    return found


def _tokens_of_span(
    sam: Sam, source: FeatureSource, objects: Objects, span: tuple[int, int], batch: int
) -> NDArray[np.float16]:
    """The tokens of the objects of images ``span[0]`` to ``span[1]``, in the objects' order."""
    mine = np.flatnonzero((objects.image >= span[0]) & (objects.image < span[1]))
    decoder = sam.mask_decoder
    tokens = np.zeros((len(mine), decoder.num_mask_tokens, decoder.transformer_dim), np.float16)
    images = np.unique(objects.image[mine])
    for start in range(0, len(images), batch):
        rows = images[start : start + batch]
        chosen = np.flatnonzero(np.isin(objects.image[mine], rows))
        neck = source.read(rows).neck[np.searchsorted(rows, objects.image[mine[chosen]])]
        boxes = torch.from_numpy(objects.boxes[mine[chosen]]).to(sam.device)
        tokens[chosen] = mask_tokens(sam, neck, boxes).numpy(force=True)
    return tokens
