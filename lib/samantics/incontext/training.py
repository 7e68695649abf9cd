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
from samantics.incontext.tokens import MapSource, Objects
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
    """Base and novel categories from the names of the novel ones.

    Raises:
        StudyError: the data set has no category of a name, or no base or no novel category is left.
    """
    ids, path = {name: number for number, name in dataset.categories.items()}, dataset.path
    for name in novel:
        if name not in ids:
            raise StudyError(f"{path} has no category {name!r}: correct the list of novel categories in scales.py")
    chosen = sorted(ids[name] for name in set(novel))
    base = sorted(set(dataset.categories).difference(chosen))
    if not base or not chosen:
        counts = f"{len(base)} base and {len(chosen)} novel categories"
        raise StudyError(f"{path} leaves {counts}: at least one of each is needed")
    return Split(tuple(base), tuple(chosen))


def draw_references(
    objects: Objects, category_ids: Sequence[int], shots: int, seed: int, min_area: float
) -> NDArray[np.int64]:
    """`(C, shots)` rows of randomly drawn reference objects, those of a category from as many images.

    The first references of a seed are the same for every number of shots. A category with fewer images (COCO's toaster)
    shows them in turn until the shots are complete.

    Raises:
        StudyError: a category has no object that is large enough.
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


class PairBatch(NamedTuple):
    """B images and P pairs of one of them and a class to be found in it. Boxes are as in `DetrOutput`."""

    rows: NDArray[np.int64]  # (B,) positions of the images in the data set
    mirrored: NDArray[np.bool_]  # (B,) all boxes of these are those of the mirror image
    image: Tensor  # (P,) position of each pair's image in `rows`
    references: list[NDArray[np.int64]]  # for each pair the rows of its reference objects
    boxes: list[Tensor]  # for each pair the (n, 4) boxes to be found
    hints: list[Tensor]  # for each pair (m, 4) jittered boxes of the image's base objects
    hint_boxes: list[Tensor]  # (m, 4) those boxes exactly
    hint_labels: list[Tensor]  # (m,) 1 where the object is of the pair's class, else 0


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
        images, size = self.images, self.settings.batch
        if len(images) < size:
            raise StudyError(f"{len(images)} images show a base category, fewer than a batch of {size}: add images")
        per_epoch = len(images) // size
        order = np.random.default_rng([self.seed, step // per_epoch]).permutation(images)
        return order[step % per_epoch * size :][:size]

    def batch(self, rows: NDArray[np.int64], step: int) -> PairBatch:
        """For each image some of its base categories and `absent_classes` others, each with references elsewhere.

        Raises:
            StudyError: a category has no reference in another image.
        """
        batch = PairBatch(rows, np.zeros(len(rows), bool), torch.empty(0), [], [], [], [], [])
        image = []
        for position, row in enumerate(rows):
            rng = np.random.default_rng([self.seed, step, int(row)])  # of the image: no process depends on another
            members = np.flatnonzero((self.objects.image == row) & self._labelled)
            categories = self.objects.categories[members]
            present = rng.permutation(np.unique(categories))[: self.settings.classes_per_image]
            absent = rng.permutation(np.setdiff1d(self.base, categories))[: self.settings.absent_classes]
            corners = self.objects.boxes[members]
            if rng.random() < self.settings.flip:
                batch.mirrored[position] = True
                corners[:, [2, 0]] = self.objects.right[members, None] - corners[:, [0, 2]]
            boxes = box_convert(torch.from_numpy(corners) / self.input_size, "xyxy", "cxcywh")
            hinted = np.tile(np.arange(len(members)), self.settings.hints)
            for category in (*present, *absent):
                image.append(position)
                batch.references.append(self._references(int(category), int(row), rng))
                same = torch.from_numpy(categories == category)
                batch.boxes.append(boxes[same])
                batch.hints.append(jittered_boxes(boxes[hinted], rng))
                batch.hint_boxes.append(boxes[hinted])
                batch.hint_labels.append(same[hinted].float())
        return batch._replace(image=torch.tensor(image))

    def _references(self, category: int, row: int, rng: np.random.Generator) -> NDArray[np.int64]:
        candidates = (self.objects.categories == category) & (self.objects.image != row)
        found = np.flatnonzero(candidates & self.objects.reference_candidates(self.settings.min_reference_area))
        if not found.size:
            raise StudyError(
                f"category {category} has no reference outside image row {row}: add images or make it novel"
            )
        return rng.choice(found, rng.integers(1, self.settings.references_per_question + 1))

    def averaged_tokens(self, references: Sequence[NDArray[np.int64]]) -> Tensor:
        """`(P, T, D)` mask tokens of each pair, averaged over its references."""
        return torch.stack([torch.from_numpy(self.tokens[rows].astype(np.float32).mean(0)) for rows in references])


def jittered_boxes(boxes: Tensor, rng: np.random.Generator) -> Tensor:
    """`(m, 4)` boxes, centres moved by up to a fifth of the side, sides scaled by 0.6 to 1.4 (as in DN-DETR).

    Queries that start near an object learn what it is long before the others find it.
    """
    noise = torch.from_numpy(rng.uniform(-1, 1, boxes.shape)).float()
    centres = boxes[:, :2] + 0.2 * noise[:, :2] * boxes[:, 2:]
    return torch.cat([centres, boxes[:, 2:] * (1 + 0.4 * noise[:, 2:])], dim=1).clamp(0.01, 0.99)


def train(model: InContextModel, sampler: BatchSampler, checkpoint: Checkpoint) -> tuple[InContextModel, pd.DataFrame]:
    """Train to the end, from the checkpoint's step if there is one.

    Under `torchrun` (an initialised process group) every process takes its share of each step's images.

    Returns:
        The model, in evaluation mode, and its loss curve, one row every `RECORD_EVERY` steps: `step, loss, loss_ce,
        loss_bbox, loss_giou`.

    Raises:
        StudyError: the checkpoint belongs to another training; the model's boxes are not finite.
    """
    settings, device = sampler.settings, next(model.parameters()).device
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    remove_leftovers(checkpoint.path.parent)
    state = checkpoint.load(device)
    first, curve = 0, []
    if state is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, curve = state["step"], state["curve"]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    trained = DistributedDataParallel(model) if world > 1 else model
    last = sampler.steps - 1
    bar = tqdm(range(first, last + 1), initial=first, total=last + 1, desc="training", unit="step", disable=rank > 0)
    for step in bar:
        terms = _train_step(trained, optimiser, sampler, step, rank, world)
        if step % RECORD_EVERY == 0 or step == last:
            curve.append({"step": step, **terms})
            bar.set_postfix(loss=f"{terms['loss']:.2f}")
        if rank == 0 and ((step + 1) % SAVE_EVERY == 0 or step == last):
            weights, moments = model.state_dict(), optimiser.state_dict()
            checkpoint.save({"model": weights, "optimiser": moments, "step": step + 1, "curve": curve})
    return model.eval(), pd.DataFrame(curve)


def _train_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, sampler: BatchSampler, step: int, rank: int, world: int
) -> dict[str, float]:
    """One step; its loss and the loss's terms, over all processes."""
    settings, device = sampler.settings, next(model.parameters()).device
    for group in optimiser.param_groups:  # the paper's schedule: a tenth of the rate in the last fifth
        group["lr"] = settings.learning_rate * (1.0 if step < 0.8 * sampler.steps else 0.1)
    model.train()
    torch.manual_seed(sampler.seed * 1_000_003 + step)  # of dropout, the same after a resumption
    batch = sampler.batch(sampler.rows(step)[rank::world], step)
    tokens, hints = sampler.averaged_tokens(batch.references).to(device), None
    if settings.hints:
        hints = nn.utils.rnn.pad_sequence(batch.hints, batch_first=True, padding_value=0.5).to(device)
    output = model(sampler.maps(batch.rows, batch.mirrored), tokens, batch.image.to(device), hints)
    if not torch.isfinite(output.boxes).all():
        raise StudyError(f"the model's boxes are not finite at step {step}: lower the learning rate in scales.py")
    loss, terms = matched_loss(output.queries(None, settings.queries), batch.boxes)
    if settings.hints:
        loss = loss + hint_loss(output.queries(settings.queries), batch.hint_boxes, batch.hint_labels)
    values = torch.tensor([loss.item(), *terms.values()], device=device)
    if world > 1:
        dist.all_reduce(values)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimiser.step()
    return dict(zip(["loss", *terms], (values / world).tolist(), strict=True))
