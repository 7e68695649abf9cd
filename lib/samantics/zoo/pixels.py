"""Masked pictures are painted again from what is left of them: the parents of SAM and SAM 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from samantics.models import pocket
from samantics.zoo.contract import Batch, Objective

MASKED = 0.6  # share of Hiera's squares that are hidden
UNIT = 2  # their side, tokens: what a token of Hiera's last stage covers


class MaeObjective(Objective):
    """Masked autoencoder (He et al. 2022, arXiv 2111.06377): `transformers`' model and loss.

    Three quarters of the tokens are hidden, and their pixels are painted from the others. Pixels are not standardised
    square by square: many of these pictures have plain grounds, and that would make their noise the task.
    """

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT) -> None:
        super().__init__()
        self.model = pocket.build_mae(config)

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch.pixels
        own = batch.side == self.model.config.image_size
        return self.model(pixels, interpolate_pos_encoding=not own).loss, {}


class HieraObjective(Objective):
    """The same question put to SAM 2's trunk and neck, in SimMIM's way (Xie et al. 2022, arXiv 2111.09886).

    Hiera works in windows, so hidden squares stay in place, as mean grey; a linear layer paints them from the neck's
    output. Its own MAE takes them out, with a Hiera of other code than `sam2`'s.
    """

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT) -> None:
        super().__init__()
        self.config, self.model = config, pocket.build_sam2(config)
        self.paint = nn.Linear(config.dim, 3 * config.patch_size**2)

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, patch = batch.pixels, self.config.patch_size
        hidden = hidden_squares(len(pixels), batch.side // patch // UNIT, pixels.device)
        seen = pixels * ~hidden[:, None].repeat_interleave(UNIT * patch, 2).repeat_interleave(UNIT * patch, 3)
        painted = self.paint(self.model.image_encoder(seen)["vision_features"].permute(0, 2, 3, 1).flatten(1, 2))
        true = functional.unfold(pixels, patch, stride=patch).transpose(1, 2)
        wanted = hidden.repeat_interleave(UNIT, 1).repeat_interleave(UNIT, 2).flatten(1)
        return (painted.float() - true)[wanted].square().mean(), {}


def hidden_squares(count: int, side: int, device: torch.device) -> Tensor:
    """`(count, side, side)` bool: `MASKED` of the squares of every picture."""
    order = torch.rand(count, side * side, device=device).argsort(1).argsort(1)
    return (order < MASKED * side * side).unflatten(1, (side, side))
