"""The paper's probing protocol, and each of its choices changed alone: what would the figure be without it?"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from samantics.models.encoder import Encoder
from samantics.models.preprocessing import IMAGENET, OPENAI
from samantics.probing import linear
from samantics.probing.features import Column
from samantics.probing.linear import Features, Labels, ProbeResult, linear_probe

EPOCHS, LONG = 10, 50  # the paper's, and what asks whether they were enough
Data = tuple[Features, Labels, Features, Labels, int]  # train (N, C) and labels, test (n, C) and labels, classes


def paper_probe(
    train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, classes: int, seed: int = 0,
    epochs: int = EPOCHS,
) -> list[ProbeResult]:  # fmt: skip
    """The protocol of the paper's code on stored features: the inputs of its linear layer are the same in every epoch.

    Adam at 1e-3 without weight decay, batches of 128, gradients clipped to norm 1, halved rate after five epochs
    without a better loss on the reported split, 16-bit mixed precision (bfloat16), features as they are. Arguments and
    errors: as `linear_probe`.

    Returns:
        The answers after each epoch. The paper reports the best of ten, chosen on the very split that it reports.
    """
    train_x = linear.checked(train_x, train_y, classes, "train")
    test_x = linear.checked(test_x, test_y, classes, "test")
    layer = _fresh_layer(train_x.shape[1], classes, seed)
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.5, patience=5)
    labels, test_labels = (torch.from_numpy(part.astype(np.int64)) for part in (train_y, test_y))
    rng, course = np.random.default_rng(seed), []
    for _ in range(epochs):
        with linear.tiny_numbers_as_zero():
            for rows, vectors in linear.batches(train_x, linear.BATCH, rng=rng):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(layer(vectors), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
                optimiser.step()
        ranked, total = np.empty((len(test_y), min(5, classes)), np.int64), 0.0
        for rows, vectors in linear.batches(test_x, 4096):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                logits = layer(vectors).float()
            total += float(F.cross_entropy(logits, test_labels[rows], reduction="sum"))
            ranked[rows] = logits.topk(ranked.shape[1]).indices.numpy()
        schedule.step(total / len(test_y))
        course.append(linear.scored(ranked, test_y))
    return course


def _fresh_layer(width: int, classes: int, seed: int) -> nn.Linear:
    """`nn.Linear` with its usual start, drawn from a generator of its own: probes may train side by side."""
    layer, generator = nn.Linear(width, classes), torch.Generator().manual_seed(seed)
    for parameter in (layer.weight, layer.bias):
        nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
    return layer


def training_changes(data: Data, groups: Labels | None = None, seed: int = 0) -> dict[tuple[str, str], ProbeResult]:
    """The paper's probe, and what changes as its choices are given up one by one: results by question and setting.

    Its choices: ten epochs, the best of them on the very split that is reported, one learning rate for all, features as
    they are. `linear_probe`, which makes none of them, is the next row (`groups`: see there).
    """
    course = paper_probe(*data, seed=seed, epochs=LONG)
    best = max(course[:EPOCHS], key=lambda result: float(result.top1.mean()))
    return {
        ("the paper's protocol", f"{EPOCHS} epochs, best on the reported split"): best,
        ("selection on the reported split", f"{EPOCHS} epochs, the last"): course[EPOCHS - 1],
        ("under-training", f"{LONG} epochs, the last"): course[-1],
        ("one learning rate for all", "swept, features as they are"): linear_probe(
            *data, seeds=(seed,), standardise=False, groups=groups
        ),
    }


def projected_probe(data: Data, width: int, seed: int = 0) -> ProbeResult:
    """The sound probe of features projected at random to `width`, which compares encoders at one width.

    The Gaussian matrix keeps lengths on average.
    """
    train_x, train_y, test_x, test_y, classes = data
    rng = np.random.default_rng([seed, train_x.shape[1], width])
    matrix = (rng.normal(size=(train_x.shape[1], width)) / np.sqrt(width)).astype(np.float32)
    train, test = (
        dataclasses.replace(x, projection=matrix) if isinstance(x, Column) else x @ matrix for x in (train_x, test_x)
    )
    return linear_probe(train, train_y, test, test_y, classes, seeds=(seed,))


def input_variants(name: str) -> dict[str, dict[str, Any]]:
    """What the paper's code does to an encoder's input, as changes of a zoo model's `Preprocessing`: by setting.

    CLIP is given another model's colour statistics there; pictures for SAM and SAM 2 are squashed, not padded.
    """
    if name == "clip":
        return {"its own colour statistics": {}, "another's": dict(zip(("mean", "std"), OPENAI, strict=True))}
    shapes = {"pictures of 3:4, padded": {"fit": "pad"}, "pictures of 3:4, squashed": {"fit": "squash"}}
    return shapes if name in ("sam", "sam2") else {}


def paper_input(encoder: Encoder) -> Encoder:
    """The encoder with the paper's input: ImageNet's colour statistics for all, squashed where it would be padded."""
    fit = "squash" if encoder.preprocess.fit == "pad" else encoder.preprocess.fit
    preprocess = dataclasses.replace(encoder.preprocess, mean=IMAGENET[0], std=IMAGENET[1], fit=fit)
    return dataclasses.replace(encoder, preprocess=preprocess)
