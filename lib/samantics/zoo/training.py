"""Trains the models of the pocket zoo: ``python -m samantics train sam`` (sam2, clip, dinov2; or a control).

The same loop for all: equal pictures, equal batches, equal schedule; only the objective differs. Uses a GPU if there
is one. Safe to kill at any moment: rerun the same command and it goes on from its last checkpoint, to the same
result (every step draws its random numbers from ``(seed, step)``, not from what came before).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from samantics.cache import atomic_path, hash_file, hash_value, remove_leftovers, write_json
from samantics.data import first_world as mojiworld
from samantics.errors import StudyError
from samantics.models import pocket
from samantics.zoo.objectives import Batch, Objective, build_objective, normalised

CONTROLS = ("simclr", "supervised", "sam_from_dinov2")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How every model is trained. One recipe for all, so that only the objective differs.

    Attributes:
        images: pictures seen, counted with repetition.
        pool: different pictures rendered; each is revisited ``images / pool`` times.
        batch: pictures per step.
        learning_rate: AdamW's highest; a linear warm-up, then a cosine to zero.
        probe_points: how often the held-out objective and the probes are measured on the way.
        theme_strength: of the world that is learned from.
        seed: of initialisation, order of data, and augmentation.
    """

    images: int = 128_000
    pool: int = 60_000
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    probe_points: int = 10
    checkpoint_every: int = 100
    theme_strength: float = mojiworld.World().theme_strength
    seed: int = 0

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


# ------------------------------------------------------------------------------------------------------ the pool


def pretraining_pool(
    world: mojiworld.World, count: int, stream: str = "pretraining", workers: int = 0
) -> mojiworld.Pictures:
    """``count`` pictures to pretrain on (or, of another stream, to measure on), memory-mapped from the cache folder."""
    make = functools.partial(mojiworld.pretraining_picture, world, stream=stream)
    return mojiworld.stored_pictures(make, count, f"{stream}_{world.hash}", workers)


class DeviceData:
    """Pictures, memory-mapped, of which batches go to the device where the model is."""

    def __init__(self, pictures: mojiworld.Pictures, device: torch.device) -> None:
        self.pictures, self.device = pictures, device

    def batch(self, rows: np.ndarray) -> Batch:
        """The pictures at ``rows``, each mirrored or not."""
        order = np.sort(rows)  # memory-mapped files like to be read forwards
        images, instances, drawings = (
            torch.from_numpy(np.ascontiguousarray(array[order])).to(self.device)
            for array in (self.pictures.images, self.pictures.instances, self.pictures.drawings)
        )
        images = images.permute(0, 3, 1, 2)
        mirrored = torch.rand(len(images), 1, 1, device=self.device) < 0.5
        images = torch.where(mirrored[..., None], images.flip(3), images)
        return Batch(images, torch.where(mirrored, instances.flip(2), instances), drawings.long())


# --------------------------------------------------------------------------------------------------- measurements


@dataclasses.dataclass(frozen=True)
class ProbeData:
    """Labelled pictures for the curves: normalised pixels are made batch by batch."""

    images: np.ndarray  # (N, S, S, 3) uint8
    drawings: np.ndarray  # (N,) int64
    test: np.ndarray  # (N,) bool


def probe_data(
    per_drawing: int = 6, test_views: int = 2, workers: int = 0, image_size: int = pocket.DEFAULT.image_size
) -> ProbeData:
    """The classification set of notebook 01 at drawing level (default world), rendered with all cores."""
    pictures = mojiworld.classification_pictures(mojiworld.World(image_size), per_drawing, workers)
    view = np.arange(len(pictures)) % per_drawing
    return ProbeData(pictures.images, pictures.drawings[:, 0].astype(np.int64), view >= per_drawing - test_views)


@torch.no_grad()
def probe_vectors(objective: Objective, images: np.ndarray, device: torch.device) -> Tensor:
    """``(N, C)`` float32 features of the objective's model, pooled as the paper does."""
    objective.eval()
    parts = []
    for start in range(0, len(images), 256):
        pixels = normalised(torch.from_numpy(np.array(images[start : start + 256])).to(device).permute(0, 3, 1, 2))
        with mixed_precision(device):
            parts.append(objective.vectors(pixels).float())
    objective.train()
    return torch.cat(parts)


def probe_scores(vectors: Tensor, data: ProbeData) -> dict[str, float]:
    """Percent of test views whose drawing a linear probe and a 10-nearest-neighbour vote name (for the curves).

    The probe is logistic regression on standardised features, 300 full-batch steps of Adam: enough for a curve; the
    figures that are reported come from ``probe`` in notebook 01.
    """
    test = torch.from_numpy(data.test).to(vectors.device)
    labels = torch.from_numpy(data.drawings).to(vectors.device)
    unit = functional.normalize(vectors, dim=1)
    near = labels[~test][(unit[test] @ unit[~test].T).topk(10).indices]
    votes = functional.one_hot(near, len(mojiworld.catalogue())).sum(1)
    standard = (vectors - vectors[~test].mean(0)) / (vectors[~test].std(0) + 1e-6)
    torch.manual_seed(0)
    with torch.enable_grad():
        layer = nn.Linear(vectors.shape[1], len(mojiworld.catalogue())).to(vectors.device)
        optimiser = torch.optim.Adam(layer.parameters(), lr=0.01, weight_decay=1e-4)
        for _ in range(300):
            optimiser.zero_grad()
            functional.cross_entropy(layer(standard[~test]), labels[~test]).backward()
            optimiser.step()
    return {
        "probe_top1": 100 * float((layer(standard[test]).argmax(1) == labels[test]).float().mean()),
        "knn_top1": 100 * float((votes.argmax(1) == labels[test]).float().mean()),
    }


@torch.no_grad()
def held_out_figures(objective: Objective, data: DeviceData, progress: float, batch: int) -> dict[str, float]:
    """Mean loss and figures of the objective on pictures never trained on, with fixed random choices."""
    objective.eval()
    rows: list[dict[str, float]] = []
    for start in range(0, len(data.pictures) - batch + 1, batch):
        torch.manual_seed(start)
        with mixed_precision(data.device):
            loss, figures = objective(data.batch(np.arange(start, start + batch)), progress)
        rows.append({"held_out_loss": float(loss), **{f"held_out_{k}": float(v) for k, v in figures.items()}})
    objective.train()
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


# ------------------------------------------------------------------------------------------------------- training


def train(
    name: str,
    recipe: Recipe,
    folder: Path,
    data: DeviceData,
    held_out: DeviceData,
    probing: ProbeData,
    start_from: Path | None = None,
) -> Objective:
    """Train one model and leave ``<name>.safetensors``, its card ``<name>.json`` and ``<name>.csv`` in ``folder``.

    Its tokens are :data:`pocket.DEFAULT`'s, 16 pixels wide; how many there are follows from the size of the pictures.

    Args:
        start_from: a trained DINOv2 (safetensors) whose trunk ``sam_from_dinov2`` begins with.

    Raises:
        StudyError: unknown name; a checkpoint of another recipe lies in ``folder``; the loss is not finite.
    """
    device = data.device
    config = dataclasses.replace(pocket.DEFAULT, image_size=data.pictures.images.shape[1])
    torch.manual_seed(recipe.seed)
    objective = build_objective("sam" if name == "sam_from_dinov2" else name, config)
    objective = objective.to(device).to(memory_format=torch.channels_last).train()
    if name == "sam_from_dinov2":
        if start_from is None:
            raise StudyError("sam_from_dinov2 starts from a trained DINOv2: name its file with --start-from")
        copy_trunk(start_from, objective.model)
    optimiser = _optimiser(objective, recipe)
    remove_leftovers(folder)
    state = _State(folder / f"{name}.ckpt", hash_value([name, dataclasses.asdict(recipe), dataclasses.asdict(config)]))
    state.restore(objective, optimiser)
    measure_at = recipe.probe_steps()
    bar = tqdm(total=recipe.steps, initial=state.step, desc=f"{name} (seed {recipe.seed})", unit="step", mininterval=2)
    while True:
        if state.step in measure_at and (not state.rows or state.rows[-1]["step"] < state.step):
            scores = probe_scores(probe_vectors(objective, probing.images, device), probing)
            figures = held_out_figures(objective, held_out, state.step / recipe.steps, min(256, len(held_out.pictures)))
            state.rows.append(
                {"step": state.step, "images": state.step * recipe.batch, "seconds": state.seconds, **scores, **figures}
            )
            bar.set_postfix(
                {key: f"{value:.2f}" for key, value in (scores | figures).items() if "loss" in key or "top1" in key}
            )
        if state.step == recipe.steps:
            break
        began = time.perf_counter()
        _step(objective, optimiser, data, recipe, state.step)
        state.step += 1
        state.seconds += time.perf_counter() - began
        bar.update()
        if state.step % recipe.checkpoint_every == 0:
            state.save(objective, optimiser)
    bar.close()
    _export(name, recipe, config, folder, objective, state)
    state.path.unlink(missing_ok=True)
    return objective


def _step(objective: Objective, optimiser: torch.optim.Optimizer, data: DeviceData, recipe: Recipe, step: int) -> None:
    torch.manual_seed(recipe.seed * 1_000_003 + step)
    for group in optimiser.param_groups:
        group["lr"] = recipe.rate(step)
    batch = data.batch(_rows(recipe, len(data.pictures), step))
    with mixed_precision(data.device), attention_kernel(data.device):
        loss, _ = objective(batch, step / recipe.steps)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(objective.parameters(), recipe.clip)
    if step % 50 == 0 and not bool(torch.isfinite(norm)):  # asked now and then: the answer waits for the GPU
        raise StudyError(f"the loss is not finite at step {step}: lower the learning rate and train again")
    optimiser.step()
    objective.after_step((step + 1) / recipe.steps)


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 where the device computes in it: GPUs, and processors with AVX-512 BF16."""
    native = device.type == "cuda" or bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def attention_kernel(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Plain matrix products on a CPU: the backward pass of its flash attention is slow on so few tokens."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def _rows(recipe: Recipe, pool: int, step: int) -> np.ndarray:
    """Rows of the pool for one step: each epoch visits every picture once, in an order of its own."""
    places = np.arange(step * recipe.batch, (step + 1) * recipe.batch)
    rows = np.empty(recipe.batch, np.int64)
    for epoch in np.unique(places // pool):
        mine = places // pool == epoch
        rows[mine] = _order(recipe.seed, int(epoch), pool)[places[mine] % pool]
    return rows


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, pool: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(pool)


def _optimiser(objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; biases, norms and embeddings (one-dimensional parameters) without weight decay."""
    trained = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=trained[0].is_cuda)


class _State:
    """Where a training stands, and its checkpoint file."""

    def __init__(self, path: Path, recipe_hash: str) -> None:
        self.path, self.recipe_hash = path, recipe_hash
        self.step, self.seconds = 0, 0.0
        self.rows: list[dict[str, Any]] = []

    def save(self, objective: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        with atomic_path(self.path) as temporary:
            torch.save(
                {
                    "recipe": self.recipe_hash,
                    "step": self.step,
                    "seconds": self.seconds,
                    "rows": self.rows,
                    "objective": objective.state_dict(),
                    "optimiser": optimiser.state_dict(),
                },
                temporary,
            )

    def restore(self, objective: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise StudyError(f"the checkpoint {self.path} is damaged: delete it to begin again") from error
        if saved["recipe"] != self.recipe_hash:
            raise StudyError(f"the checkpoint {self.path} is of another recipe: delete it, or give its settings")
        self.step, self.seconds, self.rows = saved["step"], saved["seconds"], saved["rows"]
        objective.load_state_dict(saved["objective"])
        optimiser.load_state_dict(saved["optimiser"])


def copy_trunk(dinov2: Path, sam: Any) -> None:
    """Begin a pocket SAM with the trunk of a trained pocket DINOv2 (as the paper's SAM began with MAE's)."""
    source = {key: value.float() for key, value in load_file(dinov2).items()}
    encoder = sam.image_encoder
    trunk = {key: value for key, value in encoder.state_dict().items() if not key.startswith("neck")}
    renamed: dict[str, Tensor] = {}
    grid = pocket.DEFAULT.grid
    renamed["pos_embed"] = source["embeddings.position_embeddings"][:, 1:].reshape(1, grid, grid, -1)
    for key, value in source.items():
        if key.startswith("embeddings.patch_embeddings.projection."):
            renamed[key.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")] = value
    for block in range(pocket.DEFAULT.depth):
        old, new = f"encoder.layer.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            qkv = [source[f"{old}attention.{part}.{kind}"] for part in ("q_proj", "k_proj", "v_proj")]
            renamed[f"{new}attn.qkv.{kind}"] = torch.cat(qkv)
            scale = source[f"{old}layer_scale1.lambda1"], source[f"{old}layer_scale2.lambda1"]
            shape = (-1, 1) if kind == "weight" else (-1,)
            renamed[f"{new}attn.proj.{kind}"] = source[f"{old}attention.o_proj.{kind}"] * scale[0].view(shape)
            renamed[f"{new}mlp.lin1.{kind}"] = source[f"{old}mlp.fc1.{kind}"]
            renamed[f"{new}mlp.lin2.{kind}"] = source[f"{old}mlp.fc2.{kind}"] * scale[1].view(shape)
            renamed[f"{new}norm1.{kind}"] = source[f"{old}norm1.{kind}"]
            renamed[f"{new}norm2.{kind}"] = source[f"{old}norm2.{kind}"]
    assert renamed.keys() == trunk.keys(), renamed.keys() ^ trunk.keys()
    encoder.load_state_dict(renamed, strict=False)


def _export(
    name: str, recipe: Recipe, config: pocket.ZooConfig, folder: Path, objective: Objective, state: _State
) -> None:
    """The model in 16 bit, its curve, and its card."""
    weights = {
        key: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for key, value in objective.shipped().state_dict().items()
    }
    path = folder / f"{name}.safetensors"
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(weights))  # save_file would hide that a disk is full
    with atomic_path(folder / f"{name}.csv") as temporary:
        pd.DataFrame(state.rows).to_csv(temporary, index=False, float_format="%.5g")
    device = next(objective.parameters()).device
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    )
    world = mojiworld.World(config.image_size, recipe.theme_strength)
    write_json(
        folder / f"{name}.json",
        {
            "model": name,
            "sha256": hash_file(path),
            "recipe": dataclasses.asdict(recipe),
            "architecture": dataclasses.asdict(config),
            "world": {**dataclasses.asdict(world), "hash": world.hash},
            "parameters": sum(p.numel() for p in objective.model.parameters()),
            "seconds": round(state.seconds, 1),
            "machine": machine,
            "torch": torch.__version__,
            "last": {key: round(value, 5) for key, value in state.rows[-1].items()},
            "licence": "CC BY-SA 4.0 (learned from OpenMoji drawings, CC BY-SA 4.0)",
        },
    )


# ---------------------------------------------------------------------------------------------------- all of it


def prepared_data(
    recipe: Recipe, device: torch.device, workers: int = 0, image_size: int = pocket.DEFAULT.image_size
) -> tuple[DeviceData, DeviceData, ProbeData]:
    """The pool, unseen pictures of the default world, and the probing set.

    Raises:
        StudyError: tokens do not divide pictures of that size.
    """
    if image_size % pocket.DEFAULT.patch_size:
        raise StudyError(
            f"the image size is {image_size}: choose a multiple of {pocket.DEFAULT.patch_size}, a token's side"
        )
    world = mojiworld.World(image_size, recipe.theme_strength)
    data = DeviceData(pretraining_pool(world, recipe.pool, workers=workers), device)
    unseen = pretraining_pool(mojiworld.World(image_size), 256, "held_out", workers)
    return data, DeviceData(unseen, device), probe_data(workers=workers, image_size=image_size)


def train_models(
    names: Sequence[str],
    recipe: Recipe,
    folder: Path = pocket.ASSETS,
    start_from: Path | None = None,
    workers: int = 0,
    image_size: int = pocket.DEFAULT.image_size,
) -> None:
    """Train models one after the other on the same pictures.

    Args:
        names: of ``pocket.NAMES`` or ``CONTROLS``.
        folder: of the results; by default where the zoo is loaded from.
        start_from: trained DINOv2 weights, for ``sam_from_dinov2``.
        workers: processes that render; 0 for all cores.
        image_size: pixels of a side; others than the zoo's do not fit it.

    Raises:
        StudyError: no such model; pictures of another size than the zoo's in the zoo's own folder.
    """
    known = (*pocket.NAMES, *CONTROLS)
    if wrong := [name for name in names if name not in known]:
        raise StudyError(f"no model is called {wrong[0]!r}: choose from {', '.join(known)}")
    if image_size != pocket.DEFAULT.image_size and folder == pocket.ASSETS:
        raise StudyError(f"the zoo's pictures have {pocket.DEFAULT.image_size} pixels: name another folder with --out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    data, held_out, probing = prepared_data(recipe, device, workers, image_size)
    for name in names:
        train(name, recipe, folder, data, held_out, probing, start_from)
