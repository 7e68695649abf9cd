"""Self-supervision: views of one picture belong together. No labels."""

from __future__ import annotations

import copy
import math

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from samantics.models import pocket
from samantics.zoo.contract import Batch, Objective, normalised

HUE = 0.5  # radians: classes have colours of their own, and turning hues all the way round hides them


class SelfSupervision(Objective):
    """Two views of a picture belong together; no labels (SimCLR, Chen et al. 2020, arXiv 2002.05709).

    NT-Xent compares the class tokens of the views and, with `maps`, the means of their patch tokens too: then the map
    itself has to carry what the picture shows. What is shipped is a moving average of the weights, as in DINOv2.
    DINOv2's own losses (class tokens against prototypes, masked patches) gained nothing at equal pictures in so short
    a training, and cost half as much again (assets/zoo/choices.csv).
    """

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT, maps: bool = True) -> None:
        super().__init__()
        self.student = pocket.build_dinov2(config)
        self.heads = nn.ModuleList(SimCLRProjectionHead(config.width, 512, 128) for _ in range(1 + maps))
        self.model = copy.deepcopy(self.student).requires_grad_(False)
        self.loss = NTXentLoss(temperature=0.15)

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        # DINOv2's large crops begin at 0.32: of these pictures, often of one object, that is too little to share
        views = torch.cat([augmented(batch.images, batch.side, (0.5, 1.0)) for _ in range(2)])
        tokens = self.student(views).last_hidden_state
        compared = [tokens[:, 0], tokens[:, 1:].mean(1)][: len(self.heads)]
        pairs = [functional.normalize(h(v).float(), dim=1).chunk(2) for h, v in zip(self.heads, compared, strict=True)]
        found = (pairs[0][0] @ pairs[0][1].T).argmax(1) == torch.arange(len(batch.images), device=views.device)
        return torch.stack([self.loss(*pair) for pair in pairs]).mean(), {"retrieval": found.float().mean()}

    @override
    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        update_momentum(self.student, self.model, cosine_schedule(int(progress * 1000), 1001, 0.99, 1.0))


def augmented(images: Tensor, side: int, share: tuple[float, float]) -> Tensor:
    """A random view of every image: a crop, mirrored or not, recoloured; normalised.

    All images at once, each with its own numbers: torchvision's transforms give a batch one view for all.

    Args:
        images: `(B, 3, S, S)` uint8.
        side: of the views, pixels.
        share: least and largest share of an image's area that a view shows.

    Returns:
        `(B, 3, side, side)` float32.
    """
    count, device = len(images), images.device
    area = torch.empty(count, device=device).uniform_(*share)
    aspect = torch.empty(count, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    size = (area[:, None].sqrt() * torch.stack([aspect.sqrt(), 1 / aspect.sqrt()], 1)).clamp(max=1)
    start = torch.rand(count, 2, device=device) * (1 - size)
    crop = torch.diag_embed(size)  # from the view's coordinates to the image's, both -1 to 1
    centre = (2 * start + size - 1)[..., None]
    places = functional.affine_grid(torch.cat([crop, centre], 2), [count, 3, side, side], align_corners=False)
    pixels = (images.float() / 255).contiguous()  # grid_sample of a channels-last tensor is many times slower
    views = functional.grid_sample(pixels, places, padding_mode="border", align_corners=False)
    mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
    return normalised(recoloured(torch.where(mirrored, views.flip(3), views)))


def recoloured(views: Tensor) -> Tensor:
    """Random brightness, contrast, saturation and hue for every image (RGB in 0-1); one in five turns grey."""
    count, device = len(views), views.device
    brightness, contrast, saturation = torch.empty(3, count, 1, 1, device=device).uniform_(0.3, 1.7)
    saturation = saturation * (torch.rand(count, 1, 1, device=device) > 0.2)
    turn = torch.empty(count, 1, 1, device=device).uniform_(-HUE, HUE)  # about the grey axis
    eye = torch.eye(3, device=device)
    grey = torch.full((3, 3), 1 / 3, device=device)
    skew = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) / math.sqrt(3)
    hue = turn.cos() * eye + (1 - turn.cos()) * grey + turn.sin() * skew  # Rodrigues' rotation
    matrix = brightness * contrast * (saturation * eye + (1 - saturation) * grey) @ hue
    mean = views.mean((1, 2, 3), keepdim=True)
    shifted = torch.einsum("bij,bjhw->bihw", matrix, views) + (1 - contrast[..., None]) * mean * brightness[..., None]
    return shifted.clamp(0, 1)
