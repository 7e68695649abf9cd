"""Training-free classification of proposals: features of masks against a memory of a few references per class."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_tools
from torchvision.ops import batched_nms

from samantics.data.coco import Instance, Rle, xywh
from samantics.errors import StudyError
from samantics.metrics.coco_ap import Result
from samantics.training_free.mask_features import Features, unit
from samantics.training_free.proposals import Proposals


@dataclasses.dataclass(frozen=True)
class MemoryBank:
    """What is remembered of the references. Classes may have different numbers of them, at least one each."""

    category_ids: tuple[int, ...]  # the K classes
    features: Features  # (R, C), one unit vector per reference
    labels: NDArray[np.int64]  # (R,), position of its class in category_ids
    prototypes: Features  # (K, C), the mean of each class's features, of unit length


def remember(references: Mapping[int, Sequence[Instance]], features: Mapping[int, Features]) -> MemoryBank:
    """The memory bank of references (by category, one at least), given their features `(C,)` by instance id."""
    chosen = {category: instances for category, instances in references.items() if instances}
    if not chosen:
        raise StudyError("no category has a reference: give annotated reference images")
    labels = np.repeat(np.arange(len(chosen)), [len(instances) for instances in chosen.values()])
    stacked = np.stack([features[i.id] for instances in chosen.values() for i in instances])
    prototypes = np.stack([stacked[labels == label].mean(0) for label in range(len(chosen))])
    return MemoryBank(tuple(chosen), stacked, labels, unit(prototypes))


def _nearest(bank: MemoryBank, features: Features) -> Features:
    cosines = features @ bank.features.T
    return np.stack([cosines[:, bank.labels == label].max(1) for label in range(len(bank.category_ids))], axis=1)


def _centred(bank: MemoryBank, features: Features) -> Features:
    mean = bank.prototypes.mean(0)
    return unit(features - mean) @ unit(bank.prototypes - mean).T


SCORINGS: Mapping[str, Callable[[MemoryBank, Features], Features]] = {
    "prototype": lambda bank, features: features @ bank.prototypes.T,  # cosine to the mean of the class
    "nearest": _nearest,  # cosine to the class's nearest reference
    "centred": _centred,  # cosine to the prototype, both less the mean of all prototypes
}
# What a mask's score is multiplied by, from the largest share of it inside a better mask of its class.
MERGINGS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[Any]]] = {
    "none": np.ones_like,
    "hard": lambda most: most <= 0.5,
    "soft": lambda most: np.sqrt((1 - most).clip(min=0)),
    "semantic_soft": lambda most: np.sqrt((1 - most).clip(min=0)),
}


def _chosen(rules: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in rules:
        raise StudyError(f"{what} is {name!r}: choose from {', '.join(rules)}")
    return rules[name]


def class_scores(bank: MemoryBank, features: Features, scoring: str = "prototype") -> Features:
    """`(N, K)` scores, 0-1, of `(N, C)` unit features for every class of the bank, by a rule of `SCORINGS`.

    Raises:
        StudyError: no such scoring.
    """
    return _chosen(SCORINGS, scoring, "scoring")(bank, features).clip(min=0)


def merged_scores(
    rles: Sequence[Rle], features: Features, categories: NDArray[np.int64], scores: NDArray[Any], merging: str
) -> NDArray[np.float64]:
    """Scores `(N,)` after merging, for masks ranked best first; 0 marks a mask that is dropped.

    By the largest share of mask i inside a better mask j of its class, IoS_ij = |M_i and M_j| / |M_i|; `semantic_soft`
    takes it times max(0, f_i . f_j), so that a part that looks unlike the whole is kept (arXiv 2507.02798).
    """
    factor, final = _chosen(MERGINGS, merging, "merging"), scores.astype(np.float64)
    if merging == "none":
        return final  # without asking which mask lies in which
    for category in np.unique(categories):
        rows = np.flatnonzero(categories == category)
        chosen = [rles[row] for row in rows.tolist()]
        inside = np.tril(np.asarray(mask_tools.iou(chosen, chosen, [1] * len(chosen))), -1)  # "crowd": divides by |M_i|
        if merging == "semantic_soft":
            inside = inside * (features[rows] @ features[rows].T).clip(0, 1)
        final[rows] *= factor(inside.max(1))
    return final


def match(
    image_id: int, proposals: Proposals, features: Features, bank: MemoryBank,
    scoring: str = "prototype", merging: str = "none", nms: float = 0.5,
) -> list[Result]:  # fmt: skip
    """The classified, ranked instances of one image as COCO results; none where there are no proposals.

    Args:
        image_id: of the image.
        proposals: N masks.
        features: `(N, C)` of the proposals, of unit length.
        bank: what is remembered of the references.
        scoring, merging: names of `SCORINGS` and `MERGINGS`.
        nms: within a class, of two boxes with a higher IoU the one with the better predicted IoU stays.
    """
    scores = class_scores(bank, features, scoring) if len(features) else np.empty((0, len(bank.category_ids)))
    categories = np.array(bank.category_ids)[scores.argmax(1)]
    return ranked(image_id, proposals, features, categories, scores.max(1), merging, nms)


def ranked(
    image_id: int, proposals: Proposals, features: Features, categories: NDArray[np.int64], scores: NDArray[Any],
    merging: str = "none", nms: float = 0.5,
) -> list[Result]:  # fmt: skip
    """COCO results of proposals with categories and scores `(N,)`, the best 100 after per-class NMS and merging."""
    boxes, *others = (torch.as_tensor(v) for v in (proposals.boxes, proposals.predicted_iou, categories))
    alone = batched_nms(boxes, *others, nms).numpy()
    alone = alone[np.argsort(-scores[alone], kind="stable")]
    found, categories = proposals.select(alone), categories[alone]
    final = merged_scores(found.rles, features[alone], categories, scores[alone], merging)
    order = [row for row in np.argsort(-final, kind="stable").tolist() if final[row] > 0][:100]
    return [result_of(image_id, int(categories[row]), found, row, final[row]) for row in order]


def result_of(image_id: int, category_id: int, proposals: Proposals, row: int, score: float) -> Result:
    """One entry of a COCO result file: one of the proposals, with a name."""
    box = xywh(tuple(proposals.boxes[row].tolist()))
    place = {"image_id": image_id, "category_id": category_id, "bbox": box}
    return {**place, "segmentation": proposals.rles[row], "score": float(score)}
