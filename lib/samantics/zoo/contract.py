"""What an objective is: one class that holds a model and turns a batch of pictures into a loss."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from samantics.models.encoder import ZOO, Encoder


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures on the training device."""

    images: Tensor  # (B, 3, S, S) uint8, RGB
    instances: Tensor  # (B, S, S) uint8; 0 is background, i + 1 marks the visible pixels of object i
    drawings: Tensor  # (B, MAX_OBJECTS) int64 rows of the catalogue, -1 where there is no object
    side: int  # of the pictures as the model is to see them: S, or fewer pixels at first

    @property
    def pixels(self) -> Tensor:
        """`(B, 3, side, side)` normalised."""
        images = self.images
        if self.side != images.shape[-1]:
            images = functional.interpolate(images.float() / 255, self.side, mode="bilinear", antialias=True)
        return normalised(images)


class Objective(nn.Module):
    """A model and what it is trained for. `progress` is the share (0-1) of the training done."""

    model: Any  # what is shipped: the official package's own class

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
        return self.model


def at_size(module: nn.Module, name: str, pixels: Tensor, grid: int) -> Tensor:
    """A ViT's output for `(B, 3, S, S)` pictures of `grid` tokens a side: its table of positions is interpolated.

    The table of that name is `(1, g, g, C)`, or `(1 + g * g, C)` where a class token comes first.
    """
    table = module.get_parameter(name)
    square = table if table.ndim == 4 else table[1:].unflatten(0, (math.isqrt(len(table) - 1),) * 2)[None]
    if square.shape[1] == grid:
        return module(pixels)
    square = functional.interpolate(square.permute(0, 3, 1, 2), (grid, grid), mode="bicubic").permute(0, 2, 3, 1)
    fitted = square if table.ndim == 4 else torch.cat([table[:1], square[0].flatten(0, 1)])
    return functional_call(module, {name: fitted}, (pixels,))


def normalised(images: Tensor) -> Tensor:
    """`(B, 3, S, S)` uint8 RGB, or float RGB in 0-1, to what the zoo's encoders take."""
    return ZOO.normalised(images, seen=images[:, 0])  # which only padded images need


def batches(images: NDArray[np.uint8], size: int = 64) -> Iterator[Tensor]:
    """`(B, 3, S, S)` inputs of the zoo's encoders from `(N, S, S, 3)` images."""
    for start in range(0, len(images), size):
        yield normalised(torch.from_numpy(np.array(images[start : start + size])).permute(0, 3, 1, 2))


def pooled(encoder: Encoder, images: NDArray[np.uint8]) -> Tensor:
    """`(N, C)` float32 features of `(N, S, S, 3)` images, pooled as the paper does, on the encoder's device."""
    return torch.cat([encoder.pooled(pixels, [encoder.headline])[encoder.headline] for pixels in batches(images)])
