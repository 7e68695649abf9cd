"""Tuning the in-context model on base categories: the split, the batches, and the training loop."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_convert
from tqdm.auto import tqdm

from samantics.cache import Checkpoint, remove_leftovers
from samantics.data.coco import CocoDataset
from samantics.errors import StudyError
from samantics.incontext.adapters import Adapters
from samantics.incontext.model import InContextModel, matched_loss
from samantics.incontext.tokens import Objects, SamData, SamMaps, box_means, mask_tokens, processes
from samantics.scales import InContextSettings

RECORD_EVERY = 10  # steps between rows of the loss curve
SAVE_EVERY = 100  # steps between checkpoints
NAMED = 256  # objects of a step that are named among all base classes
QUESTIONS = 4  # sets of references of each base class that are named beside them
RISING = 20  # steps over which a training's rate rises to its full height


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


class Questions(NamedTuple):
    """What the B images of a batch are asked: K classes each. Boxes are as in `DetrOutput`."""

    references: list[NDArray[np.int64]]  # B * K arrays of rows of reference objects
    boxes: list[Tensor]  # B * K of (n, 4), to be found


class Inputs(NamedTuple):
    """Arguments of `InContextModel.forward`."""

    maps: SamMaps
    tokens: Tensor  # (B, K, T, D)
    naming: tuple[Tensor, Tensor, Tensor, Tensor] | None


@dataclasses.dataclass(frozen=True)
class BatchSampler:
    """Draws the batches of a training; a draw depends on seed, step and image alone, so a resumed run repeats it."""

    data: SamData  # the training images
    base: tuple[int, ...]  # category ids; objects of others are never to be found and never a reference
    input_size: int  # side of SAM's input, pixels
    settings: InContextSettings
    seed: int = 0

    @functools.cached_property
    def labelled(self) -> NDArray[np.bool_]:
        """`(R,)` objects of base categories, crowds apart."""
        return np.isin(self.data.objects.categories, self.base) & ~self.data.objects.crowd

    @functools.cached_property
    def _candidates(self) -> dict[int, NDArray[np.int64]]:
        """Rows of the objects that may be references, by base category."""
        objects, large = self.data.objects, self.data.objects.reference_candidates(self.settings.min_reference_area)
        return {category: np.flatnonzero(large & (objects.categories == category)) for category in self.base}

    @property
    def _known(self) -> list[int]:
        """The base categories that have references."""
        return [category for category, rows in self._candidates.items() if len(rows)]

    @functools.cached_property
    def images(self) -> NDArray[np.int64]:
        """Rows of the images that show a base category: only in them is something to be found."""
        return np.unique(self.data.objects.image[self.labelled])

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

    def questions(self, rows: NDArray[np.int64], step: int) -> tuple[NDArray[np.bool_], Questions]:
        """For each image `classes_per_image` of its base categories and `absent_classes` others; which are mirrored.

        An image with fewer categories is asked for some of them again, with other references.
        """
        settings, objects, mirrored = self.settings, self.data.objects, np.zeros(len(rows), bool)
        references, boxes = [], []
        for position, row in enumerate(rows):
            rng = np.random.default_rng([self.seed, step, int(row)])  # of the image: no process depends on another
            members = np.flatnonzero((objects.image == row) & self.labelled)
            categories, corners = objects.categories[members], objects.boxes[members]
            present = np.resize(rng.permutation(np.unique(categories)), settings.classes_per_image)
            absent = rng.permutation(np.setdiff1d(self._known, categories))[: settings.absent_classes]
            slots = settings.classes_per_image + settings.absent_classes
            asked = np.resize(np.concatenate([present, absent]).astype(np.int64), slots)  # few classes: some again
            if rng.random() < settings.flip:
                mirrored[position] = True
                corners[:, [2, 0]] = objects.right[members, None] - corners[:, [0, 2]]
            found = box_convert(torch.from_numpy(corners) / self.input_size, "xyxy", "cxcywh")
            references += [self._references(int(category), int(row), rng) for category in asked]
            boxes += [found[torch.from_numpy(categories == category)] for category in asked]
        return mirrored, Questions(references, boxes)

    def _references(self, category: int, row: int, rng: np.random.Generator) -> NDArray[np.int64]:
        found = self._candidates[category]
        found = found[self.data.objects.image[found] != row]
        if not found.size:
            where = f"outside image row {row}"
            raise StudyError(f"category {category} has no reference {where}: add images or make it novel")
        return rng.choice(found, rng.integers(1, self.settings.references_per_question + 1))

    def tokens(self, references: Sequence[NDArray[np.int64]]) -> Tensor:
        """`(len, T, D)` mask tokens, averaged over each of these lists of rows."""
        return torch.from_numpy(np.stack([self.data.tokens[rows].astype(np.float32).mean(0) for rows in references]))

    def inputs(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_], asked: Questions, step: int) -> Inputs:
        """What the frozen SAM gives the model for these images and questions."""
        tokens = self.tokens(asked.references).unflatten(0, (len(rows), -1))
        return Inputs(self.data.maps(rows, mirrored), tokens, self.naming(step) if self.settings.naming else None)

    def naming(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Objects and references to be named among all base classes: `(n, L * C)`, `(n,)`, `(m, T, D)`, `(m,)`."""
        rng = np.random.default_rng([self.seed, step, len(self.data.dataset.images)])
        rows = rng.choice(np.flatnonzero(self.labelled), NAMED)
        labels = torch.from_numpy(np.searchsorted(self.base, self.data.objects.categories[rows]))
        most, known = self.settings.references_per_question, np.repeat(self._known, QUESTIONS)
        chosen = [rng.choice(self._candidates[c], rng.integers(1, most + 1)) for c in known.tolist()]
        contents = torch.from_numpy(self.data.contents[rows].astype(np.float32))
        return contents, labels, self.tokens(chosen), torch.from_numpy(np.searchsorted(self.base, known))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedSampler(BatchSampler):
    """The same batches, seen by the adapted SAM: everything is encoded anew, with gradients.

    That is why a question has the first of its references alone, and what is named are the objects of the step's own
    images. Images cannot be mirrored.
    """

    sam: Sam
    adapters: Adapters

    def inputs(
        self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_], asked: Questions, step: int,  # noqa: ARG002
    ) -> Inputs:  # fmt: skip
        """What the adapted SAM gives the model for these images and questions."""
        objects, chosen = self.data.objects, np.array([references[0] for references in asked.references])
        images, which = np.unique(np.concatenate([rows, objects.image[chosen]]), return_inverse=True)
        targets, references = torch.from_numpy(which).to(self.sam.device).tensor_split([len(rows)])
        seen = self.adapters(self.sam, self.data.maps(images))
        boxes = torch.from_numpy(objects.boxes).to(targets.device)
        tokens, naming = mask_tokens(self.sam, seen.neck[references], boxes[chosen]), None
        if self.settings.naming:
            members = np.flatnonzero(np.isin(objects.image, images) & self.labelled)
            image = torch.from_numpy(np.searchsorted(images, objects.image[members])).to(targets.device)
            contents = box_means(seen.trunk.flatten(1, 2), image, boxes[members] / self.input_size)
            labels = torch.from_numpy(np.searchsorted(self.base, objects.categories))
            naming = contents, labels[members], tokens, labels[chosen]
        return Inputs(SamMaps(*(part[targets] for part in seen)), tokens.unflatten(0, (len(rows), -1)), naming)


def train(
    model: InContextModel, sampler: BatchSampler, checkpoint: Checkpoint, steps: range | None = None
) -> tuple[InContextModel, pd.DataFrame]:
    """Train from the checkpoint's step, if there is one; each process of `torchrun` takes a share of a step.

    Args:
        model: trained in place.
        sampler: of the batches.
        checkpoint: where the training is saved.
        steps: only these of the training's; none: all.

    Returns:
        The model, in evaluation mode, and its loss curve, one row every `RECORD_EVERY` steps: `step, loss, loss_ce,
        loss_bbox, loss_giou, loss_naming`; its `attrs` have the `seconds` that these steps took.

    Raises:
        StudyError: the checkpoint belongs to another training; the model's boxes are not finite.
    """
    settings, steps, (rank, world) = sampler.settings, steps or range(sampler.steps), processes()
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    done, curve, seconds = _resumed(model, optimiser, checkpoint) or (steps.start, [], 0.0)
    trained = DistributedDataParallel(model) if world > 1 else model
    bar = tqdm(range(done, steps.stop), initial=done, total=steps.stop, desc="training", unit="step", disable=rank > 0)
    started = time.perf_counter() - seconds
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate_share(step, steps.start, sampler.steps)
        terms = _train_step(trained, optimiser, sampler, step)
        last, seconds = step == steps.stop - 1, time.perf_counter() - started
        if step % RECORD_EVERY == 0 or last:
            curve.append({"step": step, **terms})
            bar.set_postfix(loss=f"{terms['loss']:.2f}")
        if rank == 0 and ((step + 1) % SAVE_EVERY == 0 or last):
            now = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1, "curve": curve}
            checkpoint.save(now | {"seconds": seconds})
    table = pd.DataFrame(curve)
    table.attrs["seconds"] = seconds
    return model.eval(), table


def _resumed(
    model: InContextModel, optimiser: torch.optim.Optimizer, checkpoint: Checkpoint
) -> tuple[int, list[dict[str, float]], float] | None:
    """Model and optimiser as they were saved; the next step, the curve and the seconds till then, if anything was."""
    remove_leftovers(checkpoint.path.parent)
    state = checkpoint.load(next(model.parameters()).device)
    if not state:
        return None
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"], state["curve"], state["seconds"]


def rate_share(step: int, start: int, steps: int) -> float:
    """Of the learning rate: it rises at a training's start; the paper's schedule takes a tenth in the last fifth."""
    return min(1.0, (step - start + 1) / RISING) * (0.1 if step >= 0.8 * steps else 1.0)


def _train_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, sampler: BatchSampler, step: int
) -> dict[str, float]:
    """One step; its loss and the loss's terms, over all processes."""
    settings, device, (rank, world) = sampler.settings, next(model.parameters()).device, processes()
    model.train()
    torch.manual_seed(sampler.seed * 1_000_003 + step)  # of dropout, the same after a resumption
    rows = sampler.rows(step)[rank::world]
    mirrored, asked = sampler.questions(rows, step)
    maps, tokens, naming = sampler.inputs(rows, mirrored, asked, step)
    output, named = model(maps, tokens.to(device), naming and [part.to(device) for part in naming])
    if not torch.isfinite(output.boxes).all():
        raise StudyError(f"the model's boxes are not finite at step {step}: lower the learning rate in scales.py")
    loss, terms = matched_loss(output, asked.boxes)
    loss = loss + settings.naming * named
    terms["loss_naming"] = float(named.detach())
    values = torch.tensor([loss.item(), *terms.values()], device=device)
    if world > 1:
        dist.all_reduce(values)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimiser.step()
    return dict(zip(["loss", *terms], (values / world).tolist(), strict=True))
