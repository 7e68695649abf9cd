"""What the in-context model finds, measured: AP for base and novel categories, controls, and failures by rule.

One table of detections per draw of references serves every variant:

- ``class_oracle``: an image is asked only for classes that it shows, as the paper does;
- ``all_classes``: every image is asked for every class;
- ``wrong_reference``: as the oracle, but each class is asked for with references of another class of its split, one
  that the image does not show. A model that ignored its reference would score the same;
- ``random_reference``: as the oracle, but the class embedding is Gaussian noise with the mean and spread, per
  dimension, of real embeddings of base classes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_tools
from segment_anything.modeling import Sam
from torch import Tensor
from torchvision.ops import box_convert
from tqdm.auto import tqdm

from samantics.cache import atomic_path, reading
from samantics.data.coco import CocoDataset, Instance, rles_of
from samantics.errors import StudyError
from samantics.incontext.model import InContextModel, Split
from samantics.incontext.tokens import FeatureSource, box_masks, input_scales
from samantics.metrics.coco_ap import IOU_TYPES, Result, ap_interval, evaluate
from samantics.scales import InContextSettings

VARIANTS = ("class_oracle", "all_classes", "wrong_reference", "random_reference")


@dataclasses.dataclass(frozen=True)
class Found:
    """Detections as arrays, D of them.

    Attributes:
        image: ``(D,)`` row of the image in ``dataset.images``.
        asked: ``(D,)`` row of the class embedding that found it.
        scores: ``(D,)`` 0-1.
        boxes: ``(D, 4)`` in SAM's input frame.
    """

    image: NDArray[np.int64]
    asked: NDArray[np.int64]
    scores: NDArray[np.float32]
    boxes: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.image)


@torch.no_grad()
def class_embeddings(model: InContextModel, tokens: NDArray[np.float16], references: NDArray[np.int64]) -> Tensor:
    """``(C, dim)`` embeddings of ``(C, shots)`` rows of references: their mask tokens are averaged, then fused."""
    device = next(model.parameters()).device
    averaged = tokens[references].astype(np.float32).mean(axis=1)
    embeddings: Tensor = model.fuser(torch.from_numpy(averaged).to(device))
    return embeddings


def random_embeddings(real: Tensor, count: int, seed: int) -> Tensor:
    """``(count, dim)`` Gaussian vectors with the mean and spread, per dimension, of ``(C, dim)`` real ones."""
    noise = torch.randn(count, real.shape[1], generator=torch.Generator().manual_seed(seed)).to(real.device)
    return real.mean(0) + real.std(0) * noise


@torch.no_grad()
def find(
    model: InContextModel,
    source: FeatureSource,
    embeddings: Tensor,
    asked: NDArray[np.bool_],
    input_size: int,
    top: int,
    min_score: float,
    pairs: int = 256,
) -> Found:
    """Ask images for classes.

    Args:
        embeddings: ``(E, dim)``.
        asked: ``(N, E)`` which image is asked for which embedding.
        top, min_score: detections kept per image and embedding.
        pairs: questions answered in one forward.
    """
    model.eval()
    parts: list[Found] = []
    for image in tqdm(np.flatnonzero(asked.any(1)), desc="detecting", unit="image"):
        maps = source.read(np.array([image]))
        for rows in torch.from_numpy(np.flatnonzero(asked[image])).to(embeddings.device).split(pairs):
            detections = model.detect(maps, embeddings[rows], torch.zeros_like(rows))
            scores, order = detections.logits[-1].sigmoid().topk(min(top, detections.logits.shape[-1]), dim=1)
            boxes = box_convert(detections.boxes[-1], "cxcywh", "xyxy").clamp(0, 1) * input_size
            boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
            kept = (scores >= min_score) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
            owners = rows[:, None].expand_as(scores)[kept].numpy(force=True)
            parts.append(
                Found(
                    np.full(len(owners), image), owners, scores[kept].numpy(force=True), boxes[kept].numpy(force=True)
                )
            )
    return joined(parts)


def joined(parts: Sequence[Found]) -> Found:
    """Several tables of detections as one."""
    empty = Found(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty((0, 4), np.float32))
    parts = [empty, *parts]
    return Found(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Found)))


def masks_of(sam: Sam, source: FeatureSource, dataset: CocoDataset, found: Found, batch: int = 64) -> list[str]:
    """Run lengths (COCO's compressed text) of SAM's mask for every detection's box.

    Boxes that agree to the input's pixel share a mask: many questions find the same object.
    """
    records = list(dataset.images.values())
    rounded = found.boxes.round().astype(np.int64)
    texts = np.empty(len(found), object)
    for image in tqdm(np.unique(found.image), desc="masks", unit="image"):
        rows = np.flatnonzero(found.image == image)
        boxes, which = np.unique(rounded[rows], axis=0, return_inverse=True)
        neck = source.read(np.array([image])).neck
        width, height = records[image].width, records[image].height
        masks = [box_masks(sam, neck, part, width, height) for part in torch.from_numpy(boxes).to(neck).split(batch)]
        texts[rows] = np.array([rle["counts"] for rle in rles_of(np.concatenate(masks))], object)[which.ravel()]
    return list(texts)


# -------------------------------------------------------------------------------------------------------- variants


def shown(dataset: CocoDataset, split: Split) -> NDArray[np.bool_]:
    """``(N, C)`` which image shows which category (crowds apart), categories as in ``split.all``."""
    columns = {category: column for column, category in enumerate(split.all)}
    table = np.zeros((len(dataset.images), len(columns)), bool)
    for row, image_id in enumerate(dataset.images):
        for instance in dataset.by_image[image_id]:
            table[row, columns[instance.category_id]] |= not instance.crowd
    return table


def wrong_classes(present: NDArray[np.bool_], split: Split, seed: int) -> NDArray[np.int64]:
    """``(N, C)`` for each class that an image shows, the column of one of its split that it does not show; else -1.

    Raises:
        StudyError: an image shows every category.
    """
    rng = np.random.default_rng(seed)
    base = np.isin(split.all, split.base)
    wrong = np.full(present.shape, -1)
    for row, column in np.argwhere(present):
        absent = np.flatnonzero(~present[row])
        if not absent.size:
            raise StudyError(f"image row {row} shows every category: a wrong reference needs one that it does not show")
        alike = absent[base[absent] == base[column]]
        wrong[row, column] = rng.choice(alike if alike.size else absent)
    return wrong


def questions(variant: str, present: NDArray[np.bool_], split: Split, seed: int) -> pd.DataFrame:
    """Which images are asked for what: ``image`` row, ``asked`` column of ``present``, ``category`` id that is meant.

    Raises:
        StudyError: no such variant.
    """
    if variant not in VARIANTS:
        raise StudyError(f"no variant is called {variant!r}: choose from {', '.join(VARIANTS)}")
    image, meant = np.argwhere(present | (variant == "all_classes")).T
    asked = wrong_classes(present, split, seed)[image, meant] if variant == "wrong_reference" else meant
    return pd.DataFrame({"image": image, "asked": asked, "category": np.array(split.all)[meant]})


def coco_results(
    dataset: CocoDataset, input_size: int, found: Found, masks: Sequence[str], asked: pd.DataFrame
) -> list[Result]:
    """The answers to some :func:`questions` in COCO's result format, boxes and masks in pixels of the image."""
    table = pd.DataFrame({"image": found.image, "asked": found.asked, "detection": np.arange(len(found))})
    answers = table.merge(asked, on=["image", "asked"])
    records = list(dataset.images.values())
    boxes = found.boxes / input_scales(dataset, input_size)[found.image]
    results: list[Result] = []
    for image, detection, category in answers[["image", "detection", "category"]].to_numpy().tolist():
        record = records[image]
        x0, y0, x1, y1 = boxes[detection].tolist()
        results.append(
            {
                "image_id": record.id,
                "category_id": category,
                "score": float(found.scores[detection]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": {"size": [record.height, record.width], "counts": masks[detection]},
            }
        )
    return results


@dataclasses.dataclass(frozen=True)
class Trial:
    """One draw of references and what was found with it.

    Attributes:
        shots, seed: of the draw.
        found: every image asked for every class; ``asked`` is the class's position in ``split.all``.
        found_masks: run lengths for ``found``.
        noise, noise_masks: the same for random embeddings, asked only for classes that an image shows.
    """

    shots: int
    seed: int
    found: Found
    found_masks: list[str]
    noise: Found
    noise_masks: list[str]

    def results(self, variant: str, dataset: CocoDataset, split: Split, input_size: int) -> list[Result]:
        """Detections of a variant in COCO's result format."""
        found, masks = (
            (self.noise, self.noise_masks) if variant == "random_reference" else (self.found, self.found_masks)
        )
        return coco_results(
            dataset, input_size, found, masks, questions(variant, shown(dataset, split), split, self.seed)
        )


def ap_table(
    dataset: CocoDataset, split: Split, input_size: int, trials: Sequence[Trial], samples: int = 1000
) -> pd.DataFrame:
    """AP of every variant, split, number of shots and kind of overlap: means over seeds, 95 % over images and seeds.

    Columns ``variant, split, shots, iou_type, AP, AP50, AP75, AR100, low, high, seeds``; percent.
    """
    rows = []
    for variant, shots in itertools.product(VARIANTS, sorted({trial.shots for trial in trials})):
        draws = [t.results(variant, dataset, split, input_size) for t in trials if t.shots == shots]
        for (name, ids), iou_type in itertools.product((("base", split.base), ("novel", split.novel)), IOU_TYPES):
            runs = [evaluate(dataset, results, iou_type, ids) for results in draws]
            interval = ap_interval(runs, samples)
            means = {m: float(np.mean([run.metrics[m] for run in runs])) for m in ("AP", "AP50", "AP75", "AR100")}
            head: dict[str, Any] = {"variant": variant, "split": name, "shots": shots, "iou_type": iou_type}
            rows.append({**head, **means, "low": interval.low, "high": interval.high, "seeds": len(runs)})
    return pd.DataFrame(rows)


def run_trials(
    model: InContextModel,
    sam: Sam,
    target: tuple[CocoDataset, FeatureSource],
    embeddings: dict[tuple[int, int], Tensor],
    split: Split,
    settings: InContextSettings,
) -> list[Trial]:
    """Ask every target image for every class, once for each draw of references.

    Args:
        target: the test data and SAM's maps of its images.
        embeddings: ``(C, dim)`` class embeddings, as :func:`class_embeddings` gives them for ``split.all``, by
            (shots, seed).
    """
    dataset, source = target
    present = shown(dataset, split)
    classes, size = len(split.all), sam.image_encoder.img_size
    real = torch.cat(list(embeddings.values()))
    base = np.isin(split.all, split.base)
    noise = [
        random_embeddings(e[torch.from_numpy(base)], classes, 1000 * shots + seed)
        for (shots, seed), e in embeddings.items()
    ]
    asked = np.concatenate([np.ones((len(present), len(real)), bool), np.tile(present, len(noise))], axis=1)
    found = find(model, source, torch.cat([real, *noise]), asked, size, settings.top, settings.min_score)
    masks = masks_of(sam, source, dataset, found)
    trials = []
    for number, (shots, seed) in enumerate(embeddings):
        halves = [selected(found, masks, (number + len(noise) * part) * classes, classes) for part in (0, 1)]
        trials.append(Trial(shots, seed, *halves[0], *halves[1]))
    return trials


def selected(found: Found, masks: Sequence[str], first: int, count: int) -> tuple[Found, list[str]]:
    """The detections of embeddings ``first`` to ``first + count``, counted from 0 again, and their masks."""
    rows = np.flatnonzero((found.asked >= first) & (found.asked < first + count)).tolist()
    return Found(found.image[rows], found.asked[rows] - first, found.scores[rows], found.boxes[rows]), [
        masks[r] for r in rows
    ]


def save_trials(trials: Sequence[Trial], path: Path) -> None:
    """Keep trials in one file."""
    arrays: dict[str, Any] = {"draws": np.array([[t.shots, t.seed] for t in trials])}
    for number, trial in enumerate(trials):
        for part, found, masks in (
            ("found", trial.found, trial.found_masks),
            ("noise", trial.noise, trial.noise_masks),
        ):
            arrays |= {f"{number}_{part}_{f.name}": getattr(found, f.name) for f in dataclasses.fields(Found)}
            arrays[f"{number}_{part}_masks"] = np.array(masks, dtype=np.bytes_)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_trials(path: Path) -> list[Trial]:
    """What :func:`save_trials` wrote.

    Raises:
        StudyError: the file is damaged.
    """
    with reading(path), np.load(path) as arrays:
        return [
            Trial(int(shots), int(seed), *_half(arrays, f"{number}_found"), *_half(arrays, f"{number}_noise"))
            for number, (shots, seed) in enumerate(arrays["draws"])
        ]


def _half(arrays: Mapping[str, NDArray[Any]], name: str) -> tuple[Found, list[str]]:
    found = Found(*(arrays[f"{name}_{f.name}"] for f in dataclasses.fields(Found)))
    return found, [text.decode() for text in arrays[f"{name}_masks"].tolist()]


# -------------------------------------------------------------------------------------------------------- failures

FATES = ("found", "bad mask", "confused with base", "confused with novel", "missed")


def fates(dataset: CocoDataset, split: Split, results: Sequence[Result]) -> pd.DataFrame:
    """What became of every object when all classes were asked for, by one rule.

    Of the detections of any class whose box overlaps the object's with an IoU of 0.5 or more, the best-scored decides:
    none: ``missed``; of another class: ``confused with base`` or ``... novel``, whichever that class is; of its own:
    ``found`` when the masks' IoU is 0.5 or more too, else ``bad mask``. ``duplicate`` is True where a second detection
    of its own class overlaps it so, with at least half the best one's score.

    Columns ``instance, image_id, category_id, split, held_out, area, fate, duplicate, decided_by, score``;
    ``decided_by`` is the position of the deciding detection in ``results``, -1 for none.
    """
    by_image: dict[int, list[int]] = {image_id: [] for image_id in dataset.images}
    for position, result in enumerate(results):
        by_image[result["image_id"]].append(position)
    rows = []
    for instance in dataset.instances:
        if not instance.crowd:
            side = "base" if instance.category_id in split.base else "novel"
            head = {
                "instance": instance.id,
                "image_id": instance.image_id,
                "category_id": instance.category_id,
                "split": side,
            }
            mine = by_image[instance.image_id]
            rows.append(
                {**head, "held_out": instance.held_out, "area": instance.area, **_fate(instance, split, results, mine)}
            )
    return pd.DataFrame(rows)


def _fate(instance: Instance, split: Split, results: Sequence[Result], positions: Sequence[int]) -> dict[str, Any]:
    x0, y0, x1, y1 = instance.box
    boxes = np.array([results[p]["bbox"] for p in positions]).reshape(-1, 4)
    overlap = mask_tools.iou(boxes, np.array([[x0, y0, x1 - x0, y1 - y0]]), [0])
    near = [p for p, iou in zip(positions, np.reshape(overlap, -1), strict=True) if iou >= 0.5]
    if not near:
        return {"fate": "missed", "duplicate": False, "decided_by": -1, "score": 0.0}
    near.sort(key=lambda p: -results[p]["score"])
    best = results[near[0]]
    own = [results[p]["score"] for p in near if results[p]["category_id"] == instance.category_id]
    if best["category_id"] != instance.category_id:
        fate = "confused with base" if best["category_id"] in split.base else "confused with novel"
    else:
        same = mask_tools.iou([best["segmentation"]], [instance.rle], [0])[0, 0] >= 0.5
        fate = "found" if same else "bad mask"
    duplicate = len(own) > 1 and own[1] >= own[0] / 2
    return {"fate": fate, "duplicate": duplicate, "decided_by": near[0], "score": best["score"]}
