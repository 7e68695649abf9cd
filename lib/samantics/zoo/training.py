"""Trains the models of the pocket zoo: the same loop, pictures, batches and schedule for all; the objective differs.

Safe to kill at any moment: a model that is asked for again goes on from its last checkpoint, to the same result,
because every step draws its random numbers from `(seed, step)` and not from what came before.
"""

import contextlib
import copy
import dataclasses
import math
import os
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from samantics.cache import Checkpoint, atomic_path, hash_file, write_json, write_text
from samantics.errors import StudyError
from samantics.models import pocket
from samantics.models.encoder import has_fast_half, zoo_encoder
from samantics.mojiworld.rendered import Pictures, stored_pictures
from samantics.mojiworld.world import STREAMS, World, visible_drawings
from samantics.zoo.contract import Batch, Objective, pooled
from samantics.zoo.objectives import OBJECTIVES, build_objective, entry

TABLE = re.compile("embed|names|token")  # in the names of embeddings, whose rows are looked up one by one
# Convolutions of SAM 2's neck, after which no norm holds the map's size (SAM's neck ends in one): at the full rate it
# grew to a hundred times the positions that are added to it, and the decoder lost the prompt (assets/zoo/README.md).
NO_NORM = re.compile(r"neck\.convs|conv_s[01]")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How every model is trained. One recipe for all, so that only the objective differs."""

    images: int = 256_000  # pictures seen, counted with repetition
    pool: int = 256_000  # different pictures rendered; each is revisited `images / pool` times
    batch: int = 128  # pictures per step
    small: int = 64  # pixels to which pictures are shrunk at first, which is faster
    growth: float = 0.875  # the share of the training for which they are
    learning_rate: float = 5e-3  # the highest of both optimisers; a linear warm-up, then a cosine to zero
    weight_decay: float = 0.05
    warmup: float = 0.05  # share of the training
    clip: float = 1.0  # of the gradient's norm
    probe_points: int = 7  # how often the held-out objective and the probes are measured on the way
    checkpoint_every: int = 100  # steps
    seed: int = 0  # of initialisation, order of data, and augmentation

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.images // self.batch)

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        done = step / self.steps
        if done < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup * self.steps + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))

    def probe_steps(self) -> set[int]:
        """Steps after which to measure: close together at first, where the curves bend."""
        shares = np.linspace(1, 0, self.probe_points) ** 1.7
        return {round(share * self.steps) for share in shares}


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a training reads, and what its curves are measured on: never a test artist."""

    pool: Pictures  # to learn from
    held_out: Pictures  # never learned from; the objective is measured on them
    labelled: Pictures  # one labelled picture of every training drawing, for the probes of the curves
    choice: Pictures  # what these probes are tested on: the validation artist's drawings


def training_data(recipe: Recipe) -> TrainingData:
    """The pool of a recipe, and unseen and labelled pictures to measure it on; rendered once, then kept."""
    labels, choice = (sum(map(len, visible_drawings(STREAMS[name].role))) for name in ("labels", "choice"))
    counts = {"pretraining": recipe.pool, "held out": 512, "labels": labels, "choice": 4 * choice}
    world = World(pocket.DEFAULT.image_size)
    return TrainingData(*(stored_pictures(world, STREAMS[name], count) for name, count in counts.items()))


def batch_of(
    pictures: Pictures, rows: NDArray[np.int64], device: torch.device | str = "cpu", side: int | None = None
) -> Batch:
    """The pictures at `rows`, each mirrored or not, on the device; to be seen at `side` pixels (None: their own)."""
    order = np.sort(rows)  # memory-mapped files like to be read forwards
    parts = (pictures.images, pictures.instances, pictures.drawings)
    images, instances, drawings = (torch.from_numpy(part[order]).to(device) for part in parts)
    images = images.permute(0, 3, 1, 2)
    mirrored = torch.rand(len(images), 1, 1, device=device) < 0.5
    images = torch.where(mirrored[..., None], images.flip(3), images)
    instances = torch.where(mirrored, instances.flip(2), instances)
    return Batch(images, instances, drawings.long(), side or images.shape[-1])


def rows_of_step(recipe: Recipe, pool: int, step: int) -> NDArray[np.int64]:
    """Rows of the pool for one step: each epoch visits every picture once, in an order of its own."""
    epochs, places = np.divmod(np.arange(step * recipe.batch, (step + 1) * recipe.batch), pool)
    orders = {epoch: np.random.default_rng([recipe.seed, epoch]).permutation(pool) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])


def measured(name: str, objective: Objective, data: TrainingData, progress: float) -> dict[str, float]:
    """A point of the curves: probes of what would be shipped now, and the objective on held-out pictures."""
    device = next(objective.parameters()).device
    encoder = zoo_encoder(OBJECTIVES[name].architecture, copy.deepcopy(objective.shipped()), "")
    encoder = dataclasses.replace(encoder, model=encoder.model.to(device), device=device)
    train, test = (
        (pooled(encoder, part.images), torch.from_numpy(part.labels).to(device))
        for part in (data.labelled, data.choice)
    )
    return probe_scores(*train, *test) | held_out_figures(objective, data.held_out, progress)


def probe_scores(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Percent of test pictures whose class a linear probe and the nearest labelled picture name (for the curves).

    The probe is logistic regression on standardised features, 300 full-batch steps of Adam: enough for a curve, and
    quick on a GPU; the figures that are reported come from `linear_probe` in notebook 01.
    """
    near = train_labels[(functional.normalize(test, dim=1) @ functional.normalize(train, dim=1).T).argmax(1)]
    mean, spread = train.mean(0), train.std(0) + 1e-6
    torch.manual_seed(0)
    layer = nn.Linear(train.shape[1], int(train_labels.max()) + 1).to(train.device)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.01, weight_decay=1e-4)
    for _ in range(300):
        optimiser.zero_grad()
        functional.cross_entropy(layer((train - mean) / spread), train_labels).backward()
        optimiser.step()
    answers = {"probe_top1": layer((test - mean) / spread).argmax(1), "knn_top1": near}
    return {key: 100 * float((found == test_labels).float().mean()) for key, found in answers.items()}


@torch.no_grad()
def held_out_figures(objective: Objective, pictures: Pictures, progress: float) -> dict[str, float]:
    """Mean loss and figures of the objective on pictures never trained on, with fixed random choices."""
    device, batch = next(objective.parameters()).device, min(256, len(pictures))
    objective.eval()
    rows = []
    for start in range(0, len(pictures) - batch + 1, batch):
        torch.manual_seed(start)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_half(device)):
            loss, figures = objective(batch_of(pictures, np.arange(start, start + batch), device), progress)
        rows.append({"loss": float(loss)} | {key: float(value) for key, value in figures.items()})
    objective.train()
    return pd.DataFrame(rows).mean().add_prefix("held_out_").to_dict()


def train(name: str, recipe: Recipe, folder: Path, data: TrainingData, device: torch.device | str = "cpu") -> None:
    """Train one model and leave `<name>.safetensors`, its card `<name>.json` and its curve `<name>.csv` in `folder`.

    Args:
        name: of `OBJECTIVES`.
        folder: of the results, of the checkpoint meanwhile, and of the trained parent, if the objective has one.

    Raises:
        StudyError: unknown name; no parent in `folder`; a checkpoint of another recipe; the loss is not finite.
    """
    torch.manual_seed(recipe.seed)
    config = dataclasses.replace(pocket.DEFAULT, image_size=data.pool.images.shape[1])
    objective = untrained(name, config, folder).to(device).to(memory_format=torch.channels_last).train()
    optimisers = make_optimisers(objective, recipe)
    settings = dataclasses.asdict(recipe) | dataclasses.asdict(config)
    checkpoint = Checkpoint(folder / f"{name}.ckpt", {"model": name} | settings)
    state = checkpoint.load() or {"step": 0, "seconds": 0.0, "rows": []}
    begin, seconds, rows = state["step"], state["seconds"], state["rows"]
    if begin:
        objective.load_state_dict(state["objective"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
    for step in tqdm(range(begin, recipe.steps + 1), f"{name} (seed {recipe.seed})", initial=begin):
        if step in recipe.probe_steps() and (not rows or rows[-1]["step"] < step):
            place = {"step": step, "images": step * recipe.batch, "seconds": seconds}
            rows.append(place | measured(name, objective, data, step / recipe.steps))
        if step > begin and step % recipe.checkpoint_every == 0:
            states = {"objective": objective.state_dict(), "optimisers": [one.state_dict() for one in optimisers]}
            checkpoint.save({"step": step, "seconds": seconds, "rows": rows} | states)
        if step < recipe.steps:
            began = time.perf_counter()
            take_step(objective, optimisers, data.pool, recipe, step)
            seconds += time.perf_counter() - began
    export(name, recipe, config, folder, objective, rows)
    checkpoint.path.unlink(missing_ok=True)


def untrained(name: str, config: pocket.ZooConfig, folder: Path) -> Objective:
    """The objective before its first step, with its parent's trunk where it has one."""
    objective, parent = build_objective(name, config), OBJECTIVES[name].parent
    if not parent:
        return objective
    path = folder / f"{parent}.safetensors"
    if not path.is_file():
        raise StudyError(f"{name} starts from a trained {parent}, and {path} is missing: train {parent} there first")
    try:
        objective.start_from({key: value.float() for key, value in load_file(path).items()})
    except (KeyError, RuntimeError) as error:
        raise StudyError(f"{path} is no {parent} of these sizes: train {parent} there anew") from error
    return objective


def make_optimisers(objective: Objective, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside the network (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982), AdamW for the rest.

    Muon's steps are scaled to AdamW's size, so that both share one rate. Biases, norms and embeddings have no weight
    decay. Convolutions that no norm follows learn at a tenth of the rate, biases with them.
    """
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if p.ndim == 2 and not TABLE.search(name)}
    free = {name: p for name, p in trained.items() if NO_NORM.search(name)}
    other = [p for name, p in trained.items() if name not in matrices | free]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in other if p.ndim == 4 and len(p) > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in other if not (p.ndim == 4 and len(p) > 1)], "weight_decay": 0.0},
        {"params": list(free.values()), "weight_decay": recipe.weight_decay, "share": 0.1},  # of the rate
    ]
    options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    muon = torch.optim.Muon(matrices.values(), **options, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=other[0].is_cuda)]


def take_step(
    objective: Objective, optimisers: Sequence[torch.optim.Optimizer], pool: Pictures, recipe: Recipe, step: int
) -> None:
    """One optimiser step; all of its random numbers follow from the seed and the step."""
    device = next(objective.parameters()).device
    torch.manual_seed(recipe.seed * 1_000_003 + step)
    for group in [group for optimiser in optimisers for group in optimiser.param_groups]:
        group["lr"] = recipe.rate(step) * group.get("share", 1.0)
    side = recipe.small if step < recipe.growth * recipe.steps else None
    batch = batch_of(pool, rows_of_step(recipe, len(pool), step), device, side)
    half = torch.autocast(device.type, torch.bfloat16, enabled=has_fast_half(device))
    # plain matrix products on a CPU: the backward pass of its flash attention is slow on so few tokens
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with half, plain:
        loss, _ = objective(batch, step / recipe.steps)
    objective.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(objective.parameters(), recipe.clip)
    asked = step % 50 == 0 or step + 1 == recipe.steps  # now and then: the answer waits for the GPU
    if asked and not bool(torch.isfinite(norm)):
        raise StudyError(f"the loss is not finite at step {step}: lower the learning rate and train again")
    for optimiser in optimisers:
        optimiser.step()
    objective.after_step((step + 1) / recipe.steps)


def export(
    name: str, recipe: Recipe, config: pocket.ZooConfig, folder: Path, objective: Objective, rows: list[dict[str, Any]]
) -> None:
    """Write the model, its curve, and its card, which names the hash of the weights it started from."""
    path, parent, device = folder / f"{name}.safetensors", OBJECTIVES[name].parent, next(objective.parameters()).device
    with atomic_path(path) as temporary:
        weights = {key: shortened(value).contiguous().cpu() for key, value in objective.shipped().state_dict().items()}
        temporary.write_bytes(save(weights))  # save_file would hide that a disk is full
    write_text(folder / f"{name}.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.5g"))
    world, cpu = World(config.image_size), f"{platform.machine()} CPU, {os.cpu_count()} cores"
    card = {
        "model": name,
        "sha256": hash_file(path),
        "parent": hash_file(folder / f"{parent}.safetensors") if parent else "",
        "recipe": dataclasses.asdict(recipe),
        "architecture": dataclasses.asdict(config),
        "world": {**dataclasses.asdict(world), "hash": world.hash},
        "parameters": sum(p.numel() for p in objective.model.parameters()),
        "seconds": round(rows[-1]["seconds"], 1),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "torch": torch.__version__,
        "last": {key: round(value, 5) for key, value in rows[-1].items()},
        "licence": "CC BY-SA 4.0 (learned from drawings of six sets: see NOTICE)",
    }
    write_json(folder / f"{name}.json", card)


def shortened(value: Tensor) -> Tensor:
    """Weights as 16-bit numbers, those of large tensors to five significant bits; integers stay.

    A file of such numbers packs to 60 %, and git keeps every zoo that ever shipped. Biases, norms and SAM's frequencies
    keep all their digits: they weigh nothing, and their errors would move every token alike.
    """
    if not value.is_floating_point():
        return value
    half = value.half()
    mantissa, exponent = torch.frexp(half.double())
    return torch.ldexp((mantissa * 32).round() / 32, exponent).half() if value.numel() > 1024 else half


def train_models(names: Sequence[str], recipe: Recipe, folder: Path = pocket.ASSETS) -> None:
    """Train models one after the other, on a GPU where there is one: `python -m samantics train`."""
    for place, name in enumerate(names):
        if entry(name).parent not in names[:place]:
            untrained(name, pocket.DEFAULT, folder)  # StudyError before pictures are rendered
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    data = training_data(recipe)
    for name in names:
        train(name, recipe, folder, data, "cuda" if torch.cuda.is_available() else "cpu")
