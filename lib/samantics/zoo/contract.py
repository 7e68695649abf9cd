"""What an objective is: one class that holds a model and turns a batch of pictures into a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from samantics.models.preprocessing import IMAGENET


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures on the training device.

    Attributes:
        images: `(B, 3, S, S)` uint8, RGB.
        instances: `(B, S, S)` uint8; 0 is background, `i + 1` marks the visible pixels of object `i`.
        drawings: `(B, MAX_OBJECTS)` int64 rows of the catalogue, -1 where there is no object.
    """

    images: Tensor
    instances: Tensor
    drawings: Tensor


class Objective(nn.Module):
    """A model and what it is trained for. `progress` is the share (0-1) of the training done.

    Attributes:
        model: what is shipped: the official package's own class.
        changes_at: share of the training at which the loss becomes another one (the two do not compare); 1: never.
    """

    model: Any
    changes_at: float = 1.0

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and figures for the log."""
        raise NotImplementedError

    def start_from(self, parent: Mapping[str, Tensor]) -> None:
        """Take over the trunk of a trained parent, given its weights by name."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """What follows the optimiser's step (a moving average, a clamp)."""

    def shipped(self) -> nn.Module:
        """The model as it is used after the training."""
        model: nn.Module = self.model
        return model


def normalised(images: Tensor) -> Tensor:
    """`(B, 3, S, S)` uint8 RGB, or float RGB in 0-1, to what the zoo's encoders take."""
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in IMAGENET)
    return (pixels - mean) / std
