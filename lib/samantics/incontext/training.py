"""Tuning the in-context model on base categories: the split, the batches, and the training loop."""

import dataclasses
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

from samantics.cache import Checkpoint
from samantics.data.coco import CocoDataset
from samantics.errors import StudyError
from samantics.incontext.model import Adapters, InContextModel, matched_loss, processes
from samantics.incontext.tokens import Rows, SamData, SamMaps, box_means, mask_tokens
from samantics.scales import InContextSettings

RECORD_EVERY = 10  # steps between rows of the loss curve
SAVE_EVERY = 100  # steps between checkpoints
NAMED = 256  # objects of a step that are named among all base classes
QUESTIONS = 4  # sets of references of each base class that are named beside them
RISING = 20  # steps over which a training's rate rises to its full height

Naming = tuple[Tensor, Tensor, Tensor, Tensor]  # contents of objects, their labels; tokens of references, their labels


class Split(NamedTuple):
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


def draw_references(data: SamData, category_ids: Sequence[int], shots: int, seed: int) -> NDArray[np.int64]:
    """`(C, shots)` rows of random references from different images; fewer shots of a seed are the first of more."""
    chosen, objects = [], data.objects
    for category in category_ids:
        rng = np.random.default_rng([seed, category])
        rows = rng.permutation(np.flatnonzero((objects.categories == category) & objects.large))
        _, first = np.unique(objects.image[rows], return_index=True)
        if not len(first):
            name = data.dataset.categories.get(category, category)  # which only the targets may have
            raise StudyError(f"{data.dataset.path} has no {name!r} large enough for a reference: add images")
        chosen.append(np.resize(rows[np.sort(first)], shots))  # of few images (COCO's toaster) some come again
    return np.stack(chosen)


@dataclasses.dataclass
class BatchSampler:
    """Draws the batches of a training; a draw depends on seed, step and image alone, so a resumed run repeats it."""

    data: SamData  # the training images
    base: tuple[int, ...]  # category ids; objects of others are never to be found and never a reference
    input_size: int  # side of SAM's input, pixels
    settings: InContextSettings
    seed: int = 0
    adapted: tuple[Sam, Adapters] | None = None  # through which everything is seen, encoded anew, with gradients

    def __post_init__(self) -> None:
        objects = self.data.objects
        self.labelled = np.isin(objects.categories, self.base) & ~objects.crowd  # (R,)
        self.candidates = {c: np.flatnonzero(objects.large & (objects.categories == c)) for c in self.base}
        self.known = [category for category, rows in self.candidates.items() if len(rows)]
        self.images = np.unique(objects.image[self.labelled])  # only in them is something to be found
        # of the training: at least one in each half of `InContextStudy.halves`
        self.steps = max(2, round(self.settings.epochs * len(self.images) / self.settings.batch))
        if self.settings.adapters and self.settings.flip:  # before the fuser is tuned, not after it
            raise StudyError("adapters are tuned on images as they are: set flip (or adapters) to 0 in scales.py")

    def rows(self, step: int) -> Rows:
        """The images of a step: every epoch goes through all of them in an order of its own."""
        count, size = len(self.images), self.settings.batch
        if count < size:
            raise StudyError(f"{count} images show a base category, fewer than a batch of {size}: add images")
        epoch, place = divmod(step, count // size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.images)[place * size :][:size]

    def questions(self, rows: Rows, step: int) -> tuple[NDArray[np.bool_], list[NDArray[np.int64]], list[Tensor]]:
        """Each of B images is asked for `classes_per_image` base categories that it shows, and `absent_classes` others.

        `(B,)` which are mirrored; of each of the B * K questions rows of references and boxes, as in `DetrOutput`.
        """
        settings, objects, mirrored = self.settings, self.data.objects, np.zeros(len(rows), bool)
        references, boxes, slots = [], [], settings.classes_per_image + settings.absent_classes
        for position, row in enumerate(rows):
            rng = np.random.default_rng([self.seed, step, int(row)])  # of the image: no process depends on another
            members = np.flatnonzero((objects.image == row) & self.labelled)
            categories, corners = objects.categories[members], objects.boxes[members]
            present = np.resize(rng.permutation(np.unique(categories)), settings.classes_per_image)
            absent = rng.permutation(np.setdiff1d(self.known, categories))[: settings.absent_classes]
            asked = np.resize(np.concatenate([present, absent]).astype(np.int64), slots)  # few classes: some again
            if rng.random() < settings.flip:
                mirrored[position] = True
                corners[:, [2, 0]] = objects.right[members, None] - corners[:, [0, 2]]
            found = box_convert(torch.from_numpy(corners) / self.input_size, "xyxy", "cxcywh")
            for category in asked.tolist():
                others = self.candidates[category][objects.image[self.candidates[category]] != row]
                if not others.size:
                    data, file = self.data.dataset, list(self.data.dataset.images.values())[row].file
                    lacking = f"{data.path} has no reference of {data.categories[category]!r} outside {file}"
                    raise StudyError(f"{lacking}: add images, or make it novel in scales.py")
                references.append(rng.choice(others, rng.integers(1, settings.references_per_question + 1)))
                boxes.append(found[torch.from_numpy(categories == category)])
        return mirrored, references, boxes

    def tokens(self, references: Sequence[NDArray[np.int64]]) -> Tensor:
        """`(len, T, D)` mask tokens, averaged over each of these lists of rows."""
        return torch.from_numpy(np.stack([self.data.tokens[rows].astype(np.float32).mean(0) for rows in references]))

    def inputs(
        self, rows: Rows, mirrored: NDArray[np.bool_], references: Sequence[NDArray[np.int64]], step: int
    ) -> tuple[SamMaps, Tensor, Naming | None]:
        """What SAM gives the model for these images and questions: see `InContextModel.forward`."""
        if self.adapted:
            return self._adapted_inputs(rows, np.array([some[0] for some in references]), *self.adapted)
        tokens = self.tokens(references).unflatten(0, (len(rows), -1))
        return self.data.maps(rows, mirrored), tokens, self.naming(step) if self.settings.naming else None

    def naming(self, step: int) -> Naming:
        """Objects and references that are to be named among all base classes in a step."""
        rng = np.random.default_rng([self.seed, step, len(self.data.dataset.images)])
        rows = rng.choice(np.flatnonzero(self.labelled), NAMED)
        labels = torch.from_numpy(np.searchsorted(self.base, self.data.objects.categories[rows]))
        most, known = self.settings.references_per_question, np.repeat(self.known, QUESTIONS)
        chosen = [rng.choice(self.candidates[c], rng.integers(1, most + 1)) for c in known.tolist()]
        contents = torch.from_numpy(self.data.contents[rows].astype(np.float32))
        return contents, labels, self.tokens(chosen), torch.from_numpy(np.searchsorted(self.base, known))

    def _adapted_inputs(
        self, rows: Rows, references: NDArray[np.int64], sam: Sam, adapters: Adapters
    ) -> tuple[SamMaps, Tensor, Naming | None]:
        """To save encoding a question has one reference, and what is named are the objects of the step's own images."""
        objects, naming = self.data.objects, None
        images = np.unique(np.concatenate([rows, objects.image[references]]))
        seen = adapters(sam, self.data.maps(images))
        image, boxes = objects.among(images, references, sam.device)
        tokens = mask_tokens(sam, seen.neck[image], boxes)
        if self.settings.naming:
            members = np.flatnonzero(np.isin(objects.image, images) & self.labelled)
            image, boxes = objects.among(images, members, sam.device)
            contents = box_means(seen.trunk.flatten(1, 2), image, boxes / self.input_size)
            labels = torch.from_numpy(np.searchsorted(self.base, objects.categories))
            naming = contents, labels[members], tokens, labels[references]
        targets = torch.from_numpy(np.searchsorted(images, rows)).to(sam.device)
        return SamMaps(*(part[targets] for part in seen)), tokens.unflatten(0, (len(rows), -1)), naming


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
        # the rate rises at the start; the paper's schedule takes a tenth in the last fifth
        share = min(1.0, (step - steps.start + 1) / RISING) * (0.1 if step >= 0.8 * sampler.steps else 1.0)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * share
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
    state = checkpoint.load(next(model.parameters()).device)
    if not state:
        return None
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"], state["curve"], state["seconds"]


def _train_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, sampler: BatchSampler, step: int
) -> dict[str, float]:
    """One step; its loss and the loss's terms, over all processes."""
    settings, device, (rank, world) = sampler.settings, next(model.parameters()).device, processes()
    model.train()
    torch.manual_seed(sampler.seed * 1_000_003 + step)  # of dropout, the same after a resumption
    rows = sampler.rows(step)[rank::world]
    mirrored, references, boxes = sampler.questions(rows, step)
    maps, tokens, naming = sampler.inputs(rows, mirrored, references, step)
    output, named = model(maps, tokens.to(device), naming and [part.to(device) for part in naming])
    if not torch.isfinite(output.boxes).all():
        raise StudyError(f"the model's boxes are not finite at step {step}: lower the learning rate in scales.py")
    loss, terms = matched_loss(output, boxes)
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
