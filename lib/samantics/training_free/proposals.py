"""Proposals: every object's mask without its name, by prompting SAM or SAM 2 with a grid of points.

They are those of the packages' automatic mask generators without crops, several times faster: see `decoder`.
"""

import dataclasses
import functools
import itertools
import operator
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

from samantics.cache import cache_dir, hash_value, kept, reading
from samantics.data.coco import CocoDataset, Instance, Rle, mask_of, read_image, rles_of, shown
from samantics.models.encoder import Encoder
from samantics.training_free.decoder import MASK_THRESHOLD, PointDecoder, encode_image

FORMAT = 1  # of the files; raised when the same settings would give other proposals
TOKENS_AT_ONCE = {"cpu": 4 * 4096, "cuda": 64 * 4096}  # on a CPU, what fits its cache; image tokens over all prompts
PIXELS_AT_ONCE = 4_000_000
ARRAYS = ("boxes", "predicted_iou", "stability")  # of `Proposals`, as the files have them


@dataclasses.dataclass(frozen=True)
class ProposalSettings:
    """What is kept of the masks at the grid's points. The defaults are SAM's own."""

    points_per_side: int = 32  # the grid has so many points along each side of the image, three masks at each
    predicted_iou: float = 0.88  # keep masks whose predicted IoU is above; 0 keeps all (SAM may predict less than 0)
    stability: float = 0.95  # keep masks whose IoU, cut at higher and at lower logits, is at least this
    stability_offset: float = 1.0  # how much higher and lower
    box_nms: float = 0.7  # of two boxes with a higher IoU, the one with the better predicted IoU stays; 1 keeps all


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

    def select(self, rows: NDArray[Any]) -> "Proposals":
        """The proposals at these positions, in that order."""
        rles = tuple(self.rles[row] for row in rows)
        return Proposals(self.size, rles, *(getattr(self, name)[rows] for name in ARRAYS))


def point_grid(per_side: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """`(per_side ** 2, 2)` x, y in pixels of an image of `size` (height, width), by rows."""
    steps = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(steps * size[1], steps * size[0])
    return np.stack([x.ravel(), y.ravel()], axis=1)


@torch.inference_mode()
def propose(model: Any, image: Image.Image, settings: ProposalSettings) -> Proposals:
    """Masks of everything in an RGB image by a `Sam` or `SAM2Base`; StudyError where it has no mask decoder."""
    encoded = encode_image(model, image)
    decoder, points = PointDecoder(encoded), torch.as_tensor(point_grid(settings.points_per_side, encoded.size))
    batch = max(1, TOKENS_AT_ONCE[encoded.embedding.device.type] // encoded.embedding[0].numel())
    parts = [part for some in points.split(batch) for part in _masks_at(decoder, some.numpy(), settings)]
    rles, table = [rle for some, _ in parts for rle in some], np.concatenate([np.empty((0, 6)), *(t for _, t in parts)])
    found = Proposals(encoded.size, tuple(rles), table[:, :4], table[:, 4], table[:, 5])
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
    """Masks at `(P, 2)` points that pass both thresholds: run lengths, and `(M, 6)` box, predicted IoU, stability."""
    decoded = decoder.decode(points)
    promising = (decoded.predicted_iou > settings.predicted_iou) | (settings.predicted_iou <= 0)
    low, quality = decoder.low_logits(decoded, promising), decoded.predicted_iou[promising]
    # as many at a time as fit memory at full resolution
    at_once = max(1, PIXELS_AT_ONCE // (decoder.image.size[0] * decoder.image.size[1]))
    for start in range(0, len(low), at_once):
        part = slice(start, start + at_once)
        logits, offset = decoder.image.full_logits(low[part]), settings.stability_offset
        masks = logits > MASK_THRESHOLD
        stability = (logits > MASK_THRESHOLD + offset).sum((1, 2)) / (logits > MASK_THRESHOLD - offset).sum((1, 2))
        good = masks.any(2).any(1) & ~(stability < settings.stability)
        boxes = masks_to_boxes(masks[good]).double() + torch.tensor([0, 0, 1, 1], device=masks.device)
        table = torch.cat([boxes, quality[part][good, None].double(), stability[good, None].double()], dim=1)
        yield rles_of(masks[good].cpu().numpy()), table.cpu().numpy()


@torch.inference_mode()
def masks_from_boxes(model: Sam, dataset: CocoDataset, instances: Sequence[Instance]) -> list[Instance]:
    """The instances with the masks that SAM cuts out at their boxes, where it finds any."""
    predictor, image_of, masked = SamPredictor(model), operator.attrgetter("image_id"), []
    for image_id, found in itertools.groupby(sorted(instances, key=image_of), image_of):
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


def get_proposals(
    encoder: Encoder, dataset: CocoDataset, settings: ProposalSettings, root: Path | None = None
) -> dict[int, Proposals]:
    """Proposals of every image by its id, stored one file an image."""
    key = hash_value([FORMAT, encoder.name, encoder.weights_hash, dataset.hash, dataclasses.asdict(settings)])
    folder = (root or cache_dir() / "proposals") / f"{encoder.name}_{settings.points_per_side}_{key}"

    def made(image_id: int) -> dict[str, Any]:
        found = propose(encoder.model, read_image(dataset, image_id), settings)
        arrays = {name: getattr(found, name).tolist() for name in ARRAYS}
        return {"size": found.size, "counts": [rle["counts"] for rle in found.rles], **arrays}

    found = {}
    for image_id in shown(dataset, dataset.images, f"proposals of {encoder.name}"):
        path = folder / f"{image_id}.json"
        stored = kept(path, functools.partial(made, image_id))
        with reading(path):
            rles = tuple({"size": stored["size"], "counts": counts} for counts in stored["counts"])
            boxes, *rest = (np.array(stored[name], np.float64) for name in ARRAYS)
            found[image_id] = Proposals(tuple(stored["size"]), rles, boxes.reshape(-1, 4), *rest)
    return found
