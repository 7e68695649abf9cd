"""An encoder whose features are known beforehand, and classes to probe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samantics.models.encoder import Encoder
from samantics.models.preprocessing import Preprocessing
from samantics.models.registry import Architecture, LayerOutput
from samantics.probing.features import FeatureStore, encode_images

MEAN = ("final", "mean")
CLASSES = 12
Data = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]


class LookUp:
    """An encoder whose feature for image ``i`` is row ``i`` of a table: image ``i`` shows its number in its pixels."""

    def __init__(self, table: NDArray[np.float32]) -> None:
        self.table = torch.from_numpy(table)
        self.images = [np.full((4, 4, 3), (i // 65536, i // 256 % 256, i % 256), np.uint8) for i in range(len(table))]
        self.calls, self.largest_batch = 0, 0

    def forward(self, _model: Any, pixels: Tensor) -> dict[str, LayerOutput]:
        self.calls += len(pixels)
        self.largest_batch = max(self.largest_batch, len(pixels))
        digits = (pixels[:, :, 0, 0] * 255).round().long()
        rows = digits @ torch.tensor([65536, 256, 1])
        dense = self.table[rows][:, :, None, None].expand(-1, -1, 4, 4)
        return {"early": LayerOutput(dense * 2), "final": LayerOutput(dense)}

    @property
    def encoder(self) -> Encoder:
        layers = ("early", "final")
        architecture = Architecture(lambda _model: [], self.forward, lambda _model, output: output, after=layers)
        preprocess = Preprocessing(4, "squash", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return Encoder("stub", "0", torch.nn.Identity(), preprocess, architecture, torch.device("cpu"))


def overlapping_classes() -> Data:
    """Train and test: Gaussian classes with features of very different scales, as raw encoder features have."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(CLASSES, 24))
    scales = 10.0 ** rng.uniform(-3, 2, 24)

    def draw(count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        labels = rng.permutation(np.repeat(np.arange(CLASSES), count))
        return ((means[labels] + 1.5 * rng.normal(size=(len(labels), 24))) * scales).astype(np.float32), labels

    return *draw(40), *draw(60)


def stored(folder: Path, table: NDArray[np.float32], shard_rows: int = 100, weights: str = "0") -> FeatureStore:
    """A store of given vectors, made by an encoder that looks them up."""
    stub = LookUp(table)
    encoder = dataclasses.replace(stub.encoder, weights_hash=weights)
    return encode_images(encoder, stub.images, [MEAN], "data", folder=folder, shard_rows=shard_rows)
