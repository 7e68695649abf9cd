"""Tuning the in-context model on base categories: the split, the batches, and the training loop."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_convert
from tqdm.auto import tqdm

from samantics.cache import Checkpoint, remove_leftovers
from samantics.data.coco import CocoDataset
from samantics.errors import StudyError
from samantics.incontext.model import InContextModel, hint_loss, matched_loss
from samantics.incontext.tokens import MapSource, Objects, processes
from samantics.scales import InContextSettings

RECORD_EVERY = 10  # steps between rows of the loss curve
SAVE_EVERY = 100  # steps between checkpoints


@dataclasses.dataclass(frozen=True)
class Split:
    """Category ids seen in tuning (base) and never labelled in it (novel), each ascending."""

    base: tuple[int, ...]
    novel: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """Every category id, ascending."""
        return tuple(sorted(self.base + self.novel))


def split_categories(dataset: CocoDataset, novel: Sequence[str]) -> Split:
    """Base and novel categories from the names of the novel ones."""
    ids = {name: number for number, name in dataset.categories.items()}
    if unknown := [name for name in novel if name not in ids]:
        wanted = "correct the list of novel categories in scales.py"
        raise StudyError(f"{dataset.path} has no category {unknown[0]!r}: {wanted}")
    chosen = sorted(ids[name] for name in set(novel))
    base = sorted(set(dataset.categories).difference(chosen))
    if not base or not chosen:
        counts = f"{len(base)} base and {len(chosen)} novel categories"
        raise StudyError(f"{dataset.path} leaves {counts}: at least one of each is needed")
    return Split(tuple(base), tuple(chosen))


def draw_references(
    objects: Objects, category_ids: Sequence[int], shots: int, seed: int, min_area: float
) -> NDArray[np.int64]:
    """`(C, shots)` rows of random references from different images; fewer shots of a seed are the first of more.

    A category with fewer images (COCO's toaster) shows them in turn until the shots are complete.
    """
    chosen, large = [], objects.reference_candidates(min_area)
    for category in category_ids:
        rng = np.random.default_rng([seed, category])
        rows = rng.permutation(np.flatnonzero((objects.categories == category) & large))
        _, first = np.unique(objects.image[rows], return_index=True)
        if not len(first):
            lacking = f"category {category} has no reference of {min_area:.0f} pixels or more"
            raise StudyError(f"{lacking}: add images to the reference data")
        chosen.append(np.resize(rows[np.sort(first)], shots))
    return np.stack(chosen)


class Pair(NamedTuple):
    """An image of a batch and a class to be found in it. Boxes are as in `DetrOutput`."""

    image: int  # position in the batch
    references: NDArray[np.int64]  # rows of the reference objects
    boxes: Tensor  # (n, 4) to be found
    hints: Tensor  # (m, 4) jittered boxes of the image's base objects
    hint_boxes: Tensor  # (m, 4) those boxes exactly
    hint_labels: Tensor  # (m,) 1 where the object is of the pair's class, else 0


@dataclasses.dataclass(frozen=True)
class BatchSampler:
    """Draws the batches of a training; a draw depends on seed, step and image alone, so a resumed run repeats it."""

    maps: MapSource  # SAM's, of the training images
    objects: Objects
    tokens: NDArray[np.float16]  # (R, T, D) mask tokens of the objects
    base: tuple[int, ...]  # category ids; objects of others are never to be found and never a reference
    input_size: int  # side of SAM's input, pixels
    settings: InContextSettings
    seed: int = 0

    @functools.cached_property
    def _labelled(self) -> NDArray[np.bool_]:
        """`(R,)` objects of base categories, crowds apart."""
        return np.isin(self.objects.categories, self.base) & ~self.objects.crowd

    @functools.cached_property
    def images(self) -> NDArray[np.int64]:
        """Rows of the images that show a base category: only in them is something to be found."""
        return np.unique(self.objects.image[self._labelled])

    @property
    def steps(self) -> int:
        """Training steps in all."""
        return max(1, round(self.settings.epochs * len(self.images) / self.settings.batch))

    def rows(self, step: int) -> NDArray[np.int64]:
        """The images of a step: every epoch goes through all of them in an order of its own."""
        count, size = len(self.images), self.settings.batch
        if count < size:
            raise StudyError(f"{count} images show a base category, fewer than a batch of {size}: add images")
        epoch, place = divmod(step, count // size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.images)[place * size :][:size]

    def batch(self, rows: NDArray[np.int64], step: int) -> tuple[NDArray[np.bool_], list[Pair]]:
        """For each image some of its base categories and `absent_classes` others; which images are to be mirrored."""
        mirrored, pairs = np.zeros(len(rows), bool), []
        for position, row in enumerate(rows):
            rng = np.random.default_rng([self.seed, step, int(row)])  # of the image: no process depends on another
            members = np.flatnonzero((self.objects.image == row) & self._labelled)
            categories, corners = self.objects.categories[members], self.objects.boxes[members]
            present = rng.permutation(np.unique(categories))[: self.settings.classes_per_image]
            absent = rng.permutation(np.setdiff1d(self.base, categories))[: self.settings.absent_classes]
            if rng.random() < self.settings.flip:
                mirrored[position] = True
                corners[:, [2, 0]] = self.objects.right[members, None] - corners[:, [0, 2]]
            boxes = box_convert(torch.from_numpy(corners) / self.input_size, "xyxy", "cxcywh")
            exact = boxes.repeat(self.settings.hints, 1)
            for category in (*present, *absent):
                same = torch.from_numpy(categories == category)
                references = self._references(int(category), int(row), rng)
                labels = same.float().repeat(self.settings.hints)
                pairs.append(Pair(position, references, boxes[same], jittered_boxes(exact, rng), exact, labels))
        return mirrored, pairs

    def _references(self, category: int, row: int, rng: np.random.Generator) -> NDArray[np.int64]:
        candidates = (self.objects.categories == category) & (self.objects.image != row)
        found = np.flatnonzero(candidates & self.objects.reference_candidates(self.settings.min_reference_area))
        if not found.size:
            where = f"outside image row {row}"
            raise StudyError(f"category {category} has no reference {where}: add images or make it novel")
        return rng.choice(found, rng.integers(1, self.settings.references_per_question + 1))


def jittered_boxes(boxes: Tensor, rng: np.random.Generator) -> Tensor:
    """`(m, 4)` boxes, centres moved by up to a fifth of the side, sides scaled by 0.6 to 1.4 (as in DN-DETR).

    Queries that start near an object learn what it is long before the others find it.
    """
    noise = torch.from_numpy(rng.uniform(-1, 1, boxes.shape)).float()
    centres = boxes[:, :2] + 0.2 * noise[:, :2] * boxes[:, 2:]
    return torch.cat([centres, boxes[:, 2:] * (1 + 0.4 * noise[:, 2:])], dim=1).clamp(0.01, 0.99)


def train(model: InContextModel, sampler: BatchSampler, checkpoint: Checkpoint) -> tuple[InContextModel, pd.DataFrame]:
    """Train to the end, from the checkpoint's step if there is one; each process of `torchrun` takes a share of a step.

    Returns:
        The model, in evaluation mode, and its loss curve, one row every `RECORD_EVERY` steps: `step, loss, loss_ce,
        loss_bbox, loss_giou`.

    Raises:
        StudyError: the checkpoint belongs to another training; the model's boxes are not finite.
    """
    settings, device = sampler.settings, next(model.parameters()).device
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    remove_leftovers(checkpoint.path.parent)
    first, curve = 0, []
    if state := checkpoint.load(device):
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, curve = state["step"], state["curve"]
    (rank, world), last = processes(), sampler.steps - 1
    trained = DistributedDataParallel(model) if world > 1 else model
    bar = tqdm(range(first, last + 1), initial=first, total=last + 1, desc="training", unit="step", disable=rank > 0)
    for step in bar:
        terms = _train_step(trained, optimiser, sampler, step)
        if step % RECORD_EVERY == 0 or step == last:
            curve.append({"step": step, **terms})
            bar.set_postfix(loss=f"{terms['loss']:.2f}")
        if rank == 0 and ((step + 1) % SAVE_EVERY == 0 or step == last):
            weights, moments = model.state_dict(), optimiser.state_dict()
            checkpoint.save({"model": weights, "optimiser": moments, "step": step + 1, "curve": curve})
    return model.eval(), pd.DataFrame(curve)


def _train_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, sampler: BatchSampler, step: int
) -> dict[str, float]:
    """One step; its loss and the loss's terms, over all processes."""
    settings, device, (rank, world) = sampler.settings, next(model.parameters()).device, processes()
    for group in optimiser.param_groups:  # the paper's schedule: a tenth of the rate in the last fifth
        group["lr"] = settings.learning_rate * (1.0 if step < 0.8 * sampler.steps else 0.1)
    model.train()
    torch.manual_seed(sampler.seed * 1_000_003 + step)  # of dropout, the same after a resumption
    rows = sampler.rows(step)[rank::world]
    mirrored, pairs = sampler.batch(rows, step)
    tokens = np.stack([sampler.tokens[pair.references].astype(np.float32).mean(0) for pair in pairs])
    image, hints = torch.tensor([pair.image for pair in pairs], device=device), None
    if settings.hints:
        hints = nn.utils.rnn.pad_sequence([pair.hints for pair in pairs], True, 0.5).to(device)
    output = model(sampler.maps(rows, mirrored), torch.from_numpy(tokens).to(device), image, hints)
    if not torch.isfinite(output.boxes).all():
        raise StudyError(f"the model's boxes are not finite at step {step}: lower the learning rate in scales.py")
    loss, terms = matched_loss(output.queries(None, settings.queries), [pair.boxes for pair in pairs])
    if settings.hints:
        boxes, labels = [pair.hint_boxes for pair in pairs], [pair.hint_labels for pair in pairs]
        loss = loss + hint_loss(output.queries(settings.queries), boxes, labels)
    values = torch.tensor([loss.item(), *terms.values()], device=device)
    if world > 1:
        dist.all_reduce(values)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimiser.step()
    return dict(zip(["loss", *terms], (values / world).tolist(), strict=True))
