"""Proposals: every object's mask without its name, by prompting SAM or SAM 2 with a grid of points.

The masks are those of the packages' automatic mask generators without crops, and the settings mean the same, but they
come several times faster: see `decoder`. Masks stay small until their predicted IoU has chosen among them.
"""

from __future__ import annotations

import dataclasses
import functools
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
from torchvision.ops import masks_to_boxes, nms

from samantics.cache import cache_dir, hash_value, kept, reading, remove_leftovers
from samantics.data.coco import CocoDataset, Instance, Rle, mask_of, read_image, rles_of, shown
from samantics.errors import StudyError
from samantics.models.encoder import Encoder
from samantics.training_free.decoder import MASK_THRESHOLD, EncodedImage, PointDecoder, encode_image

FORMAT = 1  # of the files; raised when the same settings would give other proposals
TOKENS_AT_ONCE = {"cpu": 4 * 4096, "cuda": 64 * 4096}  # on a CPU, what fits its cache; image tokens over all prompts
PIXELS_AT_ONCE = 4_000_000


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

    def __len__(self) -> int:
        return len(self.rles)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """`(N, height, width)`; decoded on every call, so a list of images keeps its memory small."""
        return np.array([mask_of(rle) for rle in self.rles], bool).reshape(len(self), *self.size)

    def select(self, rows: NDArray[Any]) -> Proposals:
        """The proposals at these positions, in that order."""
        rles = tuple(self.rles[int(row)] for row in rows)
        return Proposals(self.size, rles, self.boxes[rows], self.predicted_iou[rows], self.stability[rows])


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
    decoder, points = PointDecoder(image), torch.as_tensor(point_grid(settings.points_per_side, image.size))
    batch = max(1, TOKENS_AT_ONCE["cuda" if image.embedding.is_cuda else "cpu"] // image.embedding[0].numel())
    parts = [part for some in points.split(batch) for part in _masks_at(decoder, some.numpy(), settings)]
    rles, table = [rle for some, _ in parts for rle in some], np.concatenate([np.empty((0, 6)), *(t for _, t in parts)])
    found = Proposals(image.size, tuple(rles), table[:, :4], table[:, 4], table[:, 5])
    return found.select(surviving(found, settings))


def surviving(found: Proposals, settings: ProposalSettings) -> NDArray[np.int64]:
    """Positions of the proposals that pass both thresholds and the NMS of boxes, best predicted IoU first."""
    promising = (found.predicted_iou > settings.predicted_iou) | (settings.predicted_iou <= 0)
    good = np.flatnonzero(promising & (found.stability >= settings.stability))
    # float32, and boxes whose far sides are the last pixels: as the packages rank and compare them
    boxes, quality = found.boxes[good] - (0, 0, 1, 1), found.predicted_iou[good]
    alone = nms(torch.tensor(boxes, dtype=torch.float32), torch.tensor(quality, dtype=torch.float32), settings.box_nms)
    return good[alone.numpy()]


def _masks_at(
    decoder: PointDecoder, points: NDArray[np.float64], settings: ProposalSettings
) -> Iterator[tuple[list[Rle], NDArray[np.float64]]]:
    """The masks at `(P, 2)` points that pass both thresholds, as many at a time as fit memory at full resolution.

    Yields run lengths and a table `(M, 6)`: box, predicted IoU, stability.
    """
    decoded = decoder.decode(points)
    promising = (decoded.predicted_iou > settings.predicted_iou) | (settings.predicted_iou <= 0)
    low, quality = decoder.low_logits(decoded, promising), decoded.predicted_iou[promising]
    at_once = max(1, PIXELS_AT_ONCE // (decoder.image.size[0] * decoder.image.size[1]))
    for start in range(0, len(low), at_once):
        logits, quality_here = decoder.image.full_logits(low[start : start + at_once]), quality[start : start + at_once]
        masks, offset = logits > MASK_THRESHOLD, settings.stability_offset
        sums = [(logits > MASK_THRESHOLD + shift).sum((1, 2)) for shift in (offset, -offset)]
        stability = sums[0] / sums[1]
        good = masks.any(2).any(1) & ~(stability < settings.stability)
        boxes = masks_to_boxes(masks[good]).double() + torch.tensor([0, 0, 1, 1], device=masks.device)
        table = torch.cat([boxes, quality_here[good, None].double(), stability[good, None].double()], dim=1)
        yield rles_of(masks[good].cpu().numpy()), table.cpu().numpy()


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
        boxes, ones = np.array([i.box for i in objects], np.float64).reshape(-1, 4), np.ones(len(objects))
        found[image_id] = Proposals((record.height, record.width), tuple(i.rle for i in objects), boxes, ones, ones)
    return found


def proposals_folder(
    encoder: Encoder, dataset: CocoDataset, settings: ProposalSettings, root: Path | None = None
) -> Path:
    """Where the proposals of this model, these images and settings are stored; others have another folder."""
    key = hash_value([FORMAT, encoder.name, encoder.weights_hash, dataset.hash, dataclasses.asdict(settings)])
    return (root or cache_dir() / "proposals") / f"{encoder.name}_{settings.points_per_side}_{key}"


def get_proposals(
    encoder: Encoder, dataset: CocoDataset, settings: ProposalSettings, root: Path | None = None
) -> dict[int, Proposals]:
    """Proposals of every image by its id, stored one file an image; under `torchrun` each process has its share."""
    folder = proposals_folder(encoder, dataset, settings, root)
    remove_leftovers(folder)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    found = {}
    for image_id in shown(dataset, list(dataset.images)[rank::world], f"proposals of {encoder.name}"):
        path = folder / f"{image_id}.json"
        stored = kept(path, functools.partial(_stored, encoder, dataset, settings, image_id))
        with reading(path):
            found[image_id] = _proposals(stored)
    return found


def _stored(encoder: Encoder, dataset: CocoDataset, settings: ProposalSettings, image_id: int) -> dict[str, Any]:
    """What a file holds: the fields of `Proposals`, of run lengths the counts alone."""
    found = propose(encoder.model, read_image(dataset, image_id), settings)
    arrays = {name: getattr(found, name).tolist() for name in ("boxes", "predicted_iou", "stability")}
    return {"size": found.size, "counts": [rle["counts"] for rle in found.rles], **arrays}


def _proposals(stored: dict[str, Any]) -> Proposals:
    height, width = (int(side) for side in stored["size"])
    rles = tuple({"size": [height, width], "counts": counts} for counts in stored["counts"])
    boxes, *rest = (np.array(stored[name], np.float64) for name in ("boxes", "predicted_iou", "stability"))
    return Proposals((height, width), rles, boxes.reshape(-1, 4), *rest)
