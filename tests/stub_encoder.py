"""An encoder whose features are known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samantics.models.architectures import Architecture, LayerOutput
from samantics.models.encoder import Encoder
from samantics.models.preprocessing import Preprocessing

MEAN = ("final", "mean")


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
