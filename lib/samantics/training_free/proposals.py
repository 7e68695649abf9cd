"""Proposals: every object's mask without its name, by prompting SAM or SAM 2 with a grid of points.

The same masks as the packages' automatic mask generators without crops (settings have the same meaning), but several
times faster: see `decoder`; masks stay small until predicted IoU has chosen among
them, and are encoded by pycocotools instead of in Python.

Proposals are stored one file per image, whole or not at all, so a killed run goes on where it stopped. Several
processes share the work:

    torchrun --nproc-per-node 8 -m samantics.training_free.proposals --annotations x.json --images folder --encoder sam
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.ops import nms
from tqdm.auto import tqdm

from samantics.cache import cache_dir, hash_value, remove_leftovers, write_json
from samantics.data.coco import CocoDataset, Rle, load_coco, mask_of, read_image, rles_of
from samantics.errors import StudyError
from samantics.models.encoder import Encoder, load_encoder
from samantics.training_free.decoder import MASK_THRESHOLD, EncodedImage, PointDecoder, encode_image

FORMAT = 1  # of the files; raised when the same settings would give other proposals
TOKENS_AT_ONCE = {"cpu": 4 * 4096, "cuda": 64 * 4096}  # on a CPU, what fits its cache; image tokens over all prompts
PIXELS_AT_ONCE = 4_000_000


@dataclasses.dataclass(frozen=True)
class ProposalSettings:
    """What is kept of the masks at the grid's points. The defaults are SAM's own.

    Attributes:
        points_per_side: the grid has this many points along each side of the image, three masks at each.
        predicted_iou: keep masks whose predicted IoU is above; 0 keeps all (SAM's head may predict less than 0).
        stability: keep masks whose stability (IoU of the mask cut at higher and at lower logits) is at least this.
        stability_offset: how much higher and lower, in logits.
        box_nms: of two masks whose boxes have a higher IoU, the one with the better predicted IoU stays; 1 keeps all.
    """

    points_per_side: int = 32
    predicted_iou: float = 0.88
    stability: float = 0.95
    stability_offset: float = 1.0
    box_nms: float = 0.7

    def __post_init__(self) -> None:
        if self.points_per_side < 1:
            raise StudyError(f"points_per_side is {self.points_per_side}: choose 1 or more")


@dataclasses.dataclass(frozen=True)
class Proposals:
    """Class-agnostic masks of one image, best predicted IoU first. There may be none.

    Attributes:
        size: height and width of the image, pixels.
        rles: ``N`` masks as COCO run lengths, at the image's resolution.
        boxes: ``(N, 4)`` x0, y0, x1, y1 in pixels, tight around the masks.
        predicted_iou, stability: ``(N,)``.
        points: ``(N, 2)`` the prompts, x, y in pixels.
    """

    size: tuple[int, int]
    rles: tuple[Rle, ...]
    boxes: NDArray[np.float64]
    predicted_iou: NDArray[np.float64]
    stability: NDArray[np.float64]
    points: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.rles)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """``(N, height, width)``; decoded on every call, so a list of images keeps its memory small."""
        return np.array([mask_of(rle) for rle in self.rles], bool).reshape(len(self), *self.size)

    def select(self, rows: NDArray[Any]) -> Proposals:
        """The proposals at these positions, in that order."""
        rles = tuple(self.rles[int(row)] for row in rows)
        return Proposals(
            self.size, rles, self.boxes[rows], self.predicted_iou[rows], self.stability[rows], self.points[rows]
        )


def point_grid(per_side: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """``(per_side ** 2, 2)`` x, y in pixels of an image of ``size`` (height, width), by rows."""
    steps = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(steps * size[1], steps * size[0])
    return np.stack([x.ravel(), y.ravel()], axis=1)


def propose(model: Any, image: Image.Image, settings: ProposalSettings | None = None) -> Proposals:
    """Masks of everything in an RGB image, by a ``Sam`` or a ``SAM2Base``.

    Raises:
        StudyError: the model has no mask decoder.
    """
    return propose_encoded(encode_image(model, image), settings or ProposalSettings())


@torch.inference_mode()
def propose_encoded(image: EncodedImage, settings: ProposalSettings) -> Proposals:
    """:func:`propose` for an image that is encoded already."""
    decoder = PointDecoder(image)
    points = point_grid(settings.points_per_side, image.size)
    tokens = image.embedding.shape[1] * image.embedding.shape[2]
    batch = max(1, TOKENS_AT_ONCE["cuda" if image.embedding.is_cuda else "cpu"] // tokens)
    parts = [_kept(decoder, points[start : start + batch], settings) for start in range(0, len(points), batch)]
    whole = Proposals(
        image.size,
        tuple(rle for part in parts for rle in part.rles),
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("boxes", "predicted_iou", "stability", "points")
        ),
    )
    # float32, and boxes whose far sides are the last pixels: as the packages rank and compare them
    boxes = torch.as_tensor(whole.boxes - (0, 0, 1, 1), dtype=torch.float32)
    best = nms(boxes, torch.as_tensor(whole.predicted_iou, dtype=torch.float32), settings.box_nms)
    return whole.select(best.numpy())


def _kept(decoder: PointDecoder, points: NDArray[np.float64], settings: ProposalSettings) -> Proposals:
    """The masks at ``(P, 2)`` points that pass both thresholds."""
    decoded = decoder.decode(points)
    promising = (decoded.predicted_iou > settings.predicted_iou) | (settings.predicted_iou <= 0)
    low = decoder.low_logits(decoded, promising)
    height, width = decoder.image.size
    share = max(1, PIXELS_AT_ONCE // (height * width))
    parts = [_full(decoder.image, low[start : start + share], settings) for start in range(0, len(low), share)]
    rows = np.concatenate([part[0] for part in parts]) if parts else np.empty(0, bool)
    owner = np.repeat(points, 3, axis=0)[promising.flatten().cpu().numpy()]
    return Proposals(
        decoder.image.size,
        tuple(rle for part in parts for rle in part[3]),
        np.concatenate([part[2] for part in parts]) if parts else np.empty((0, 4)),
        decoded.predicted_iou[promising].cpu().double().numpy()[rows],
        np.concatenate([part[1] for part in parts]) if parts else np.empty(0),
        owner[rows],
    )


def _full(
    image: EncodedImage, low: Tensor, settings: ProposalSettings
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64], list[Rle]]:
    """Of ``(M, 4h, 4w)`` logits: which are stable and not empty ``(M,)``; their stability, boxes and run lengths."""
    logits = image.full_logits(low)  # (M, width, height)
    counts = [
        (logits > MASK_THRESHOLD + o).sum((1, 2)) for o in (settings.stability_offset, -settings.stability_offset)
    ]
    stability = counts[0] / counts[1]
    masks = logits > MASK_THRESHOLD
    columns, rows = masks.any(2), masks.any(1)
    good = columns.any(1) & ~(stability < settings.stability)
    found = [side[good].cpu().numpy() for side in (columns, rows)]
    low_ends = [side.argmax(1) for side in found]
    high_ends = [side.shape[1] - side[:, ::-1].argmax(1) for side in found]
    boxes = np.stack([*low_ends, *high_ends], axis=1).astype(np.float64)
    rles = rles_of(masks[good].transpose(1, 2).cpu().numpy())
    return good.cpu().numpy(), stability[good].cpu().double().numpy(), boxes, rles


# -------------------------------------------------------------------------------------------------------- storing


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

    Under ``torchrun`` each process does its share. What is finished stays when a later image fails.

    Raises:
        StudyError: an image cannot be read; the model has no mask decoder.
    """
    folder = proposals_folder(encoder, dataset, settings, root)
    remove_leftovers(folder)
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    share = list(dataset.images)[rank::world]
    missing = [image_id for image_id in share if not _file(folder, image_id).is_file()]
    for image_id in tqdm(missing, desc=f"proposals of {encoder.name}", disable=not missing, mininterval=1):
        _write(propose(encoder.model, read_image(dataset, image_id), settings), _file(folder, image_id))
    return folder


def get_proposals(
    encoder: Encoder, dataset: CocoDataset, settings: ProposalSettings, root: Path | None = None
) -> dict[int, Proposals]:
    """Proposals of every image by its id: stored ones, and the missing ones computed first.

    Raises:
        StudyError: as :func:`compute_proposals`; a stored file is damaged.
    """
    folder = compute_proposals(encoder, dataset, settings, root)
    return {image_id: _read(_file(folder, image_id)) for image_id in dataset.images}


def _file(folder: Path, image_id: int) -> Path:
    return folder / f"{image_id}.json"


def _write(proposals: Proposals, path: Path) -> None:
    arrays = {name: getattr(proposals, name).tolist() for name in ("boxes", "predicted_iou", "stability", "points")}
    write_json(path, {"size": proposals.size, "counts": [rle["counts"] for rle in proposals.rles], **arrays})


def _read(path: Path) -> Proposals:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        size = (int(content["size"][0]), int(content["size"][1]))
        rles = tuple({"size": list(size), "counts": counts} for counts in content["counts"])
        arrays = {
            name: np.array(content[name], np.float64) for name in ("boxes", "predicted_iou", "stability", "points")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is damaged: delete it and run again, which redoes this image only") from error
    arrays["boxes"], arrays["points"] = arrays["boxes"].reshape(-1, 4), arrays["points"].reshape(-1, 2)
    return Proposals(size, rles, **arrays)


def main(arguments: list[str] | None = None) -> int:
    """Store the proposals of a COCO data set; one process per GPU under ``torchrun``."""
    parser = argparse.ArgumentParser(prog="python -m samantics.training_free.proposals", description=main.__doc__)
    parser.add_argument("--annotations", required=True, help="COCO JSON of the images (annotations may be missing)")
    parser.add_argument("--images", required=True, help="their folder")
    parser.add_argument("--encoder", default="sam", choices=("sam", "sam2"))
    parser.add_argument("--weights", default="zoo")
    for field in dataclasses.fields(ProposalSettings):
        parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    settings = ProposalSettings(**{field.name: options[field.name] for field in dataclasses.fields(ProposalSettings)})
    try:
        encoder = load_encoder(options["encoder"], options["weights"], device)
        print(compute_proposals(encoder, load_coco(options["annotations"], options["images"]), settings))
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
