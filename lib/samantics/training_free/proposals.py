"""Proposals: every object's mask without its name, by prompting SAM or SAM 2 with a grid of points.

The masks are those of the packages' automatic mask generators without crops, and the settings mean the same, but they
come several times faster: see `decoder`. Masks stay small until their predicted IoU has chosen among them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import Tensor
from torchvision.ops import nms
from tqdm.auto import tqdm

from samantics.cache import cache_dir, hash_value, reading, remove_leftovers, write_json
from samantics.data.coco import CocoDataset, Instance, Rle, mask_of, read_image, rles_of
from samantics.errors import StudyError
from samantics.models.encoder import Encoder
from samantics.training_free.decoder import MASK_THRESHOLD, EncodedImage, PointDecoder, encode_image

FORMAT = 1  # of the files; raised when the same settings would give other proposals
TOKENS_AT_ONCE = {"cpu": 4 * 4096, "cuda": 64 * 4096}  # on a CPU, what fits its cache; image tokens over all prompts
PIXELS_AT_ONCE = 4_000_000
ARRAYS = ("boxes", "predicted_iou", "stability", "points")


@dataclasses.dataclass(frozen=True)
class ProposalSettings:
    """What is kept of the masks at the grid's points. The defaults are SAM's own."""

    points_per_side: int = 32  # the grid has so many points along each side of the image, three masks at each
    predicted_iou: float = 0.88  # keep masks whose predicted IoU is above; 0 keeps all (SAM may predict less than 0)
    stability: float = 0.95  # keep masks whose IoU, cut at higher and at lower logits, is at least this
    stability_offset: float = 1.0  # how much higher and lower
    box_nms: float = 0.7  # of two boxes with a higher IoU, the one with the better predicted IoU stays; 1 keeps all

    def __post_init__(self) -> None:
        if self.points_per_side < 1:
            raise StudyError(f"points_per_side is {self.points_per_side}: choose 1 or more")


@dataclasses.dataclass(frozen=True)
class Proposals:
    """Class-agnostic masks of one image, best predicted IoU first. There may be none."""

    size: tuple[int, int]  # height and width of the image, pixels
    rles: tuple[Rle, ...]  # N masks as COCO run lengths, at the image's resolution
    boxes: NDArray[np.float64]  # (N, 4) x0, y0, x1, y1 in pixels, tight around the masks
    predicted_iou: NDArray[np.float64]  # (N,)
    stability: NDArray[np.float64]  # (N,)
    points: NDArray[np.float64]  # (N, 2) the prompts, x, y in pixels

    def __len__(self) -> int:
        return len(self.rles)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """`(N, height, width)`; decoded on every call, so a list of images keeps its memory small."""
        return np.array([mask_of(rle) for rle in self.rles], bool).reshape(len(self), *self.size)

    def select(self, rows: NDArray[Any]) -> Proposals:
        """The proposals at these positions, in that order."""
        return Proposals(
            self.size, tuple(self.rles[int(row)] for row in rows), *(getattr(self, name)[rows] for name in ARRAYS)
        )


def point_grid(per_side: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """`(per_side ** 2, 2)` x, y in pixels of an image of `size` (height, width), by rows."""
    steps = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(steps * size[1], steps * size[0])
    return np.stack([x.ravel(), y.ravel()], axis=1)


def propose(model: Any, image: Image.Image, settings: ProposalSettings | None = None) -> Proposals:
    """Masks of everything in an image.

    Args:
        model: a `Sam` or a `SAM2Base`.
        image: RGB.
        settings: SAM's own where None.

    Raises:
        StudyError: the model has no mask decoder.
    """
    return propose_encoded(encode_image(model, image), settings or ProposalSettings())


@torch.inference_mode()
def propose_encoded(image: EncodedImage, settings: ProposalSettings) -> Proposals:
    """`propose` for an image that is encoded already."""
    decoder = PointDecoder(image)
    points = point_grid(settings.points_per_side, image.size)
    tokens = image.embedding.shape[1] * image.embedding.shape[2]
    batch = max(1, TOKENS_AT_ONCE["cuda" if image.embedding.is_cuda else "cpu"] // tokens)
    starts = range(0, len(points), batch)
    parts = [part for start in starts for part in _masks_at(decoder, points[start : start + batch], settings)]
    whole = _joined(image.size, parts)
    # float32, and boxes whose far sides are the last pixels: as the packages rank and compare them
    boxes = torch.as_tensor(whole.boxes - (0, 0, 1, 1), dtype=torch.float32)
    best = nms(boxes, torch.as_tensor(whole.predicted_iou, dtype=torch.float32), settings.box_nms)
    return whole.select(best.numpy())


def _masks_at(decoder: PointDecoder, points: NDArray[np.float64], settings: ProposalSettings) -> Iterator[Proposals]:
    """The masks at `(P, 2)` points that pass both thresholds, as many at a time as fit memory at full resolution."""
    decoded = decoder.decode(points)
    promising = (decoded.predicted_iou > settings.predicted_iou) | (settings.predicted_iou <= 0)
    low = decoder.low_logits(decoded, promising)
    predicted_iou = decoded.predicted_iou[promising].cpu().double().numpy()
    prompts = np.repeat(points, 3, axis=0)[promising.flatten().cpu().numpy()]
    size = decoder.image.size
    share = max(1, PIXELS_AT_ONCE // (size[0] * size[1]))
    for start in range(0, len(low), share):
        part = slice(start, start + share)
        rows, rles, boxes, stability = _stable_masks(decoder.image.full_logits(low[part]), settings)
        yield Proposals(size, tuple(rles), boxes, predicted_iou[part][rows], stability, prompts[part][rows])


def _stable_masks(
    logits: Tensor, settings: ProposalSettings
) -> tuple[NDArray[np.bool_], list[Rle], NDArray[np.float64], NDArray[np.float64]]:
    """Of `(M, width, height)` logits: which are stable and not empty `(M,)`; their run lengths, boxes and stability."""
    inner, outer = (
        (logits > MASK_THRESHOLD + offset).sum((1, 2))
        for offset in (settings.stability_offset, -settings.stability_offset)
    )
    stability = inner / outer
    masks = logits > MASK_THRESHOLD
    columns, rows = masks.any(2), masks.any(1)
    good = columns.any(1) & ~(stability < settings.stability)
    sides = [side[good].cpu().numpy() for side in (columns, rows)]
    ends = [side.argmax(1) for side in sides] + [side.shape[1] - side[:, ::-1].argmax(1) for side in sides]
    rles = rles_of(masks[good].transpose(1, 2).cpu().numpy())
    boxes = np.stack(ends, axis=1).astype(np.float64)
    return good.cpu().numpy(), rles, boxes, stability[good].cpu().double().numpy()


def _joined(size: tuple[int, int], parts: Sequence[Proposals]) -> Proposals:
    none = Proposals(size, (), np.empty((0, 4)), np.empty(0), np.empty(0), np.empty((0, 2)))
    arrays = (np.concatenate([getattr(part, name) for part in (none, *parts)]) for name in ARRAYS)
    return Proposals(size, tuple(rle for part in parts for rle in part.rles), *arrays)


@torch.inference_mode()
def masks_from_boxes(model: Sam, dataset: CocoDataset, instances: Sequence[Instance]) -> list[Instance]:
    """The instances with the masks that SAM cuts out at their boxes, where it finds any."""
    predictor, by_image, masked = SamPredictor(model), dict[int, list[Instance]](), []
    for instance in instances:
        by_image.setdefault(instance.image_id, []).append(instance)
    for image_id, found in by_image.items():
        predictor.set_image(np.asarray(read_image(dataset, image_id)))
        for instance in found:
            masks, _, _ = predictor.predict(box=np.array(instance.box), multimask_output=False)
            if masks.any():
                masked.append(dataclasses.replace(instance, rle=rles_of(masks)[0], area=float(masks.sum())))
    return masked


def objects_of(dataset: CocoDataset, image_id: int) -> list[Instance]:
    """The objects of an image that count: no crowds."""
    return [instance for instance in dataset.by_image[image_id] if not instance.crowd]


def true_masks(dataset: CocoDataset) -> dict[int, Proposals]:
    """The annotated masks as proposals of perfect quality, by image id."""
    found = {}
    for image_id, record in dataset.images.items():
        objects = objects_of(dataset, image_id)
        boxes = np.array([instance.box for instance in objects], np.float64).reshape(-1, 4)
        ones, centres = np.ones(len(objects)), (boxes[:, :2] + boxes[:, 2:]) / 2
        rles = tuple(instance.rle for instance in objects)
        found[image_id] = Proposals((record.height, record.width), rles, boxes, ones, ones, centres)
    return found


def proposals_folder(
    encoder: Encoder, dataset: CocoDataset, settings: ProposalSettings, root: Path | None = None
) -> Path:
    """Where the proposals of this model, these images and settings are stored; others have another folder."""
    key = hash_value([FORMAT, encoder.name, encoder.weights_hash, dataset.hash, dataclasses.asdict(settings)])
    return (root or cache_dir() / "proposals") / f"{encoder.name}_{settings.points_per_side}_{key}"


def compute_proposals(
    encoder: Encoder, dataset: CocoDataset, settings: ProposalSettings, root: Path | None = None
) -> Path:
    """Propose and store for every image that has no stored proposals yet; returns their folder.

    Proposals are stored one file an image, whole or not at all, so a killed run goes on where it stopped. Under
    `torchrun` each process does its share.

    Raises:
        StudyError: an image cannot be read; the model has no mask decoder.
    """
    folder = proposals_folder(encoder, dataset, settings, root)
    remove_leftovers(folder)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    files = {image_id: folder / f"{image_id}.json" for image_id in list(dataset.images)[rank::world]}
    missing = [(image_id, path) for image_id, path in files.items() if not path.is_file()]
    for image_id, path in tqdm(missing, desc=f"proposals of {encoder.name}", disable=not missing, mininterval=1):
        found = propose(encoder.model, read_image(dataset, image_id), settings)
        arrays = {name: getattr(found, name).tolist() for name in ARRAYS}
        write_json(path, {"size": found.size, "counts": [rle["counts"] for rle in found.rles], **arrays})
    return folder


def get_proposals(
    encoder: Encoder, dataset: CocoDataset, settings: ProposalSettings, root: Path | None = None
) -> dict[int, Proposals]:
    """Proposals of every image by its id: stored ones, and the missing ones computed first.

    Raises:
        StudyError: as `compute_proposals`; a stored file is damaged.
    """
    folder = compute_proposals(encoder, dataset, settings, root)
    return {image_id: _read(folder / f"{image_id}.json") for image_id in dataset.images}


def _read(path: Path) -> Proposals:
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        height, width = (int(side) for side in content["size"])
        arrays = {name: np.array(content[name], np.float64) for name in ARRAYS}
        arrays |= {"boxes": arrays["boxes"].reshape(-1, 4), "points": arrays["points"].reshape(-1, 2)}
        rles = tuple({"size": [height, width], "counts": counts} for counts in content["counts"])
        return Proposals((height, width), rles, **arrays)
