"""AP of the in-context model for base and novel categories, with controls, and failures by rule."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
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

from samantics.data.coco import CocoDataset, ImageRecord, Instance, box_iou, rles_of
from samantics.data.instances import xywh
from samantics.errors import StudyError
from samantics.incontext.model import InContextModel
from samantics.incontext.tokens import MapSource, box_masks, input_scales
from samantics.incontext.training import Split
from samantics.metrics.coco_ap import IOU_TYPES, Result, ap_interval, evaluate
from samantics.scales import InContextSettings

VARIANTS = (
    "class_oracle",  # an image is asked only for classes that it shows, as in the paper
    "all_classes",  # every image is asked for every class
    "wrong_reference",  # as the oracle, with references of another class of the split that the image does not show
    "random_reference",  # as the oracle, with Gaussian noise of the mean and spread of real base embeddings
)
FATES = ("found", "bad mask", "confused with base", "confused with novel", "missed")
CORNERS = ["x0", "y0", "x1", "y1"]
Draw = tuple[int, int]  # shots and seed of the references


@torch.no_grad()
def class_embeddings(model: InContextModel, tokens: NDArray[np.float16], references: NDArray[np.int64]) -> Tensor:
    """`(C, dim)` embeddings of `(C, shots)` rows of references: their mask tokens are averaged, then fused."""
    averaged = torch.from_numpy(tokens[references].astype(np.float32).mean(axis=1))
    embeddings: Tensor = model.fuser(averaged.to(next(model.parameters()).device))
    return embeddings


def random_embeddings(real: Tensor, count: int, seed: int) -> Tensor:
    """`(count, dim)` Gaussian vectors with the mean and spread, per dimension, of `(C, dim)` real ones."""
    noise = torch.randn(count, real.shape[1], generator=torch.Generator().manual_seed(seed)).to(real.device)
    return real.mean(0) + real.std(0) * noise


@torch.no_grad()
def detect(
    model: InContextModel, sam: Sam, dataset: CocoDataset, maps: MapSource, embeddings: Tensor,
    asked: NDArray[np.bool_], settings: InContextSettings,
) -> pd.DataFrame:  # fmt: skip
    """The best detections of every class in every image that is asked for it, with SAM's masks.

    `embeddings` are `(E, dim)`; `asked (N, E)` says which image is asked for which. Columns: `image` and `embedding`
    (positions in `asked`), `score` 0-1, `x0, y0, x1, y1` in SAM's frame, `mask` (COCO's run lengths, text).
    """
    parts, records, size = [], list(dataset.images.values()), sam.image_encoder.img_size
    for image in tqdm(np.flatnonzero(asked.any(1)), desc="detecting", unit="image"):
        found = maps(np.array([image]))
        memory, tables = model.encode(found), []
        for rows in torch.from_numpy(np.flatnonzero(asked[image])).to(embeddings.device).split(256):
            output = model.decode(memory, embeddings[rows], torch.zeros_like(rows))
            scores, order = output.logits[-1].sigmoid().topk(min(settings.top, output.logits.shape[-1]), dim=1)
            boxes = box_convert(output.boxes[-1], "cxcywh", "xyxy").clamp(0, 1) * size
            boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
            kept = (scores >= settings.min_score) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
            table = pd.DataFrame(boxes[kept].numpy(force=True), columns=CORNERS).assign(image=image)
            table["embedding"] = rows[:, None].expand_as(scores)[kept].numpy(force=True)
            tables.append(table.assign(score=scores[kept].numpy(force=True)))
        table = pd.concat(tables, ignore_index=True)
        parts.append(table.assign(mask=_masks(sam, found.neck, table[CORNERS].to_numpy(), records[image])))
    return pd.concat(parts, ignore_index=True)


def _masks(sam: Sam, neck: Tensor, boxes: NDArray[np.float32], record: ImageRecord) -> list[str]:
    """SAM's mask of each `(D, 4)` box of an image; boxes that agree to the input's pixel share one, as many do."""
    different, which = np.unique(boxes.round().astype(np.int64), axis=0, return_inverse=True)
    parts = torch.from_numpy(different).to(neck).split(64) if len(different) else []
    rles = [rle for part in parts for rle in rles_of(box_masks(sam, neck, part, record.width, record.height))]
    return [rles[row]["counts"] for row in which.ravel()]


def detect_draws(
    model: InContextModel, sam: Sam, dataset: CocoDataset, maps: MapSource, embeddings: Mapping[Draw, Tensor],
    split: Split, settings: InContextSettings,
) -> pd.DataFrame:  # fmt: skip
    """`detect` with, draw by draw, first the `(C, dim)` embeddings of `split.all`, then random ones.

    Every image is asked for every class; with random embeddings only for those that it shows.
    """
    shown, classes = shown_classes(dataset, split), len(split.all)
    real = torch.cat(list(embeddings.values()))
    base = torch.from_numpy(np.isin(split.all, split.base))
    noise = [random_embeddings(e[base], classes, 1000 * shots + seed) for (shots, seed), e in embeddings.items()]
    asked = np.concatenate([np.ones((len(shown), len(real)), bool), np.tile(shown, len(noise))], axis=1)
    return detect(model.eval(), sam, dataset, maps, torch.cat([real, *noise]), asked, settings)


def shown_classes(dataset: CocoDataset, split: Split) -> NDArray[np.bool_]:
    """`(N, C)` which image shows which category (crowds apart), categories as in `split.all`."""
    shown = {(i.image_id, i.category_id) for i in dataset.instances if not i.crowd}
    return np.array([[(image, category) in shown for category in split.all] for image in dataset.images])


def wrong_classes(shown: NDArray[np.bool_], split: Split, seed: int) -> NDArray[np.int64]:
    """`(N, C)` for each class that an image shows, the column of one of its split that it does not show; else -1."""
    rng = np.random.default_rng(seed)
    base = np.isin(split.all, split.base)
    wrong = np.full(shown.shape, -1)
    for row, column in np.argwhere(shown):
        absent = np.flatnonzero(~shown[row])
        if not absent.size:
            raise StudyError(f"image row {row} shows every category: a wrong reference needs one that it does not show")
        alike = absent[base[absent] == base[column]]
        wrong[row, column] = rng.choice(alike if alike.size else absent)
    return wrong


def asked_pairs(variant: str, shown: NDArray[np.bool_], split: Split, seed: int) -> pd.DataFrame:
    """Which images are asked for what: `image` row, `embedding` (a column of `shown`), `category` id that is meant."""
    image, meant = np.argwhere(shown | (variant == "all_classes")).T
    column = wrong_classes(shown, split, seed)[image, meant] if variant == "wrong_reference" else meant
    return pd.DataFrame({"image": image, "embedding": column, "category": np.array(split.all)[meant]})


@dataclasses.dataclass(frozen=True)
class DrawDetections:
    """Detections in a test set, for several draws of references."""

    dataset: CocoDataset
    split: Split
    input_size: int  # side of SAM's input, pixels
    draws: tuple[Draw, ...]  # in the order in which `detections` numbers their embeddings
    detections: pd.DataFrame  # see `detect_draws`

    def results(self, variant: str, draw: Draw) -> list[Result]:
        """Detections of a variant and a draw (shots, seed) in COCO's result format, in pixels of the image."""
        pairs = asked_pairs(variant, shown_classes(self.dataset, self.split), self.split, draw[1])
        block = self.draws.index(draw) + len(self.draws) * (variant == "random_reference")
        pairs["embedding"] += block * len(self.split.all)
        found = self.detections.merge(pairs, on=["image", "embedding"])
        records = list(self.dataset.images.values())
        boxes = found[CORNERS].to_numpy() / input_scales(self.dataset, self.input_size)[found["image"]]
        return [
            {
                "image_id": records[row.image].id,
                "category_id": row.category,
                "score": row.score,
                "bbox": xywh(box),
                "segmentation": {"size": [records[row.image].height, records[row.image].width], "counts": row.mask},
            }
            for row, box in zip(found.itertuples(), boxes.tolist(), strict=True)
        ]

    def ap(self, samples: int = 1000) -> pd.DataFrame:
        """AP of every variant, split, number of shots and kind of overlap, percent; mean over draws.

        Columns `variant, split, shots, iou_type, AP, AP50, AP75, AR100, low, high, seeds`; low and high are the 95 %
        bootstrap interval of AP over images and draws.
        """
        rows, sides = [], {"base": self.split.base, "novel": self.split.novel}
        for variant, shots in itertools.product(VARIANTS, sorted({shots for shots, _ in self.draws})):
            draws = [self.results(variant, draw) for draw in self.draws if draw[0] == shots]
            for side, iou_type in itertools.product(sides, IOU_TYPES):
                runs = [evaluate(self.dataset, results, iou_type, sides[side]) for results in draws]
                head = {"variant": variant, "split": side, "shots": shots, "iou_type": iou_type}
                means = pd.DataFrame([run.metrics for run in runs])[["AP", "AP50", "AP75", "AR100"]].mean()
                _, low, high = ap_interval(runs, samples)
                rows.append({**head, **means, "low": low, "high": high, "seeds": len(runs)})
        return pd.DataFrame(rows)


def corners(result: Result) -> tuple[float, float, float, float]:
    """A result's box as `(x0, y0, x1, y1)`, pixels."""
    x, y, width, height = result["bbox"]
    return x, y, x + width, y + height


def best_detections(dataset: CocoDataset, results: Sequence[Result], target: Instance, count: int = 4) -> list[Result]:
    """The best detections of the target's class in its image, those with at least half the best score.

    Each has an `iou` too: the largest IoU of its box with an object of the class.
    """
    found = [r for r in results if (r["image_id"], r["category_id"]) == (target.image_id, target.category_id)]
    found = sorted(found, key=lambda r: -r["score"])[:count]
    truths = [o.box for o in dataset.by_image[target.image_id] if o.category_id == target.category_id]
    best = [r for r in found if r["score"] >= found[0]["score"] / 2]
    return [{**r, "iou": float(box_iou([corners(r)], truths).max())} for r in best]


def fates(dataset: CocoDataset, split: Split, results: Sequence[Result]) -> pd.DataFrame:
    """What became of every object when all classes were asked for, by one rule.

    Of the detections of any class whose box overlaps the object's with an IoU of 0.5 or more, the best-scored decides:
    none: `missed`; of another class: `confused with base` or `... novel`, whichever that class is; of its own: `found`
    when the masks' IoU is 0.5 or more too, else `bad mask`. `duplicate` is True where a second detection of its own
    class overlaps it so, with at least half the best one's score.

    Returns:
        Columns `instance, image_id, category_id, held_out, area, split, fate, duplicate, decided_by, score`;
        `decided_by` is the position of the deciding detection in `results`, -1 for none.
    """
    by_image: dict[int, list[int]] = {image_id: [] for image_id in dataset.images}
    for position, result in enumerate(results):
        by_image[result["image_id"]].append(position)
    objects = [i for i in dataset.instances if not i.crowd]
    fields = [(i.id, i.image_id, i.category_id, i.held_out, i.area) for i in objects]
    table = pd.DataFrame(fields, columns=["instance", "image_id", "category_id", "held_out", "area"])
    table["split"] = np.where(table["category_id"].isin(split.base), "base", "novel")
    return table.join(pd.DataFrame([_fate(i, split, results, by_image[i.image_id]) for i in objects]))


def _fate(instance: Instance, split: Split, results: Sequence[Result], positions: Sequence[int]) -> dict[str, Any]:
    overlap = box_iou([corners(results[p]) for p in positions], [instance.box])[:, 0]
    near = [p for p, iou in zip(positions, overlap, strict=True) if iou >= 0.5]
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


def fate_shares(table: pd.DataFrame) -> pd.DataFrame:
    """Share of each fate in percent, for base objects of train drawings, of held-out ones, and for novel ones.

    Columns `group, objects, duplicates, fate, share`; `duplicates` is the share of objects found more than once.
    """
    group = table["split"] + " categories"
    if table["held_out"].any():
        drawings = np.where(table["held_out"], ", held-out drawings", ", train drawings")
        group = group.where(table["split"] == "novel", group + drawings)
    rows = []
    for name, objects in table.groupby(group):
        shares = objects["fate"].value_counts(normalize=True)
        head = {"group": name, "objects": len(objects), "duplicates": 100 * objects["duplicate"].mean()}
        rows += [{**head, "fate": fate, "share": 100 * shares.get(fate, 0.0)} for fate in FATES]
    return pd.DataFrame(rows)
