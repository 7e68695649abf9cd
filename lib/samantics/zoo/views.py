"""Self-supervision: views of one picture belong together. No labels."""

from __future__ import annotations

import copy
import math
import warnings

import torch
from lightly.loss import IBOTPatchLoss, NTXentLoss
from lightly.loss.swav_loss import sinkhorn
from lightly.models.modules import DINOProjectionHead, SimCLRProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from samantics.models import pocket
from samantics.zoo.contract import Batch, Objective, normalised

TEACHER_TEMPERATURE = 0.05
PROTOTYPES = 512
PATCHES = 0.5  # weight of the masked patches


class SelfSupervision(Objective):
    """Two views of a picture belong together, and hidden patches are told from the rest; no labels.

    From the first step to the last: NT-Xent between the views' class tokens (SimCLR, Chen et al. 2020), and DINOv2's
    loss of masked patches (iBOT, Zhou et al. 2022), whose targets a moving average of the student gives. It is the
    moving average that is shipped, as in DINOv2. DINOv2's own loss of class tokens starts too slowly for so short a
    training. With no weight on patches it is SimCLR's training.
    """

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT, patches: float = PATCHES, maps: bool = False) -> None:
        super().__init__()
        self.config, self.patches = config, patches
        self.student = pocket.build_dinov2(config)
        self.contrast = SimCLRProjectionHead(config.width, 512, 128)
        self.maps = maps
        self.contrast_map = SimCLRProjectionHead(config.width, 512, 128)
        self.model = copy.deepcopy(self.student).requires_grad_(False)
        self.contrastive_loss = NTXentLoss(temperature=0.15)
        if patches:
            self.head, self.teacher_head = self._head(), self._head().requires_grad_(False)  # no deep copy: weight_norm
            self.teacher_head.load_state_dict(self.head.state_dict())
            still = 1.0  # momentum of a centre that stays 0: the targets come balanced
            self.patch_loss = IBOTPatchLoss(PROTOTYPES, teacher_temp=TEACHER_TEMPERATURE, center_momentum=still)

    def _head(self) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # lightly's head uses torch's older weight_norm
            return DINOProjectionHead(self.config.width, 512, 128, PROTOTYPES)

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        # DINOv2's large crops begin at 0.32: of these pictures, often of one object, that is too little to share
        views = torch.cat([augmented(batch.images, batch.side, (0.5, 1.0)) for _ in range(2)])
        masks = block_masks(len(views), batch.side // self.config.patch_size, views.device) if self.patches else None
        seen = self.student(views, bool_masked_pos=None if masks is None else masks.flatten(1)).last_hidden_state
        first, second = functional.normalize(self.contrast(seen[:, 0]).float(), dim=1).chunk(2)
        found = (first @ second.T).argmax(1) == torch.arange(len(first), device=first.device)
        loss, figures = self.contrastive_loss(first, second), {"retrieval": found.float().mean()}
        if self.maps:
            one, two = functional.normalize(self.contrast_map(seen[:, 1:].mean(1)).float(), dim=1).chunk(2)
            loss = loss + self.contrastive_loss(one, two)
        if masks is None:
            return loss, figures
        hidden = masks.flatten(1)
        with torch.no_grad():
            whole = self.model(views).last_hidden_state[:, 1:][hidden]
            target = balanced(self.teacher_head(whole).float())
        patch_loss = self.patch_loss(target, self.head(seen[:, 1:][hidden]).float(), mask=masks)
        return loss + self.patches * patch_loss, figures | {"patches": patch_loss}

    @override
    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        momentum = cosine_schedule(int(progress * 1000), 1001, 0.99, 1.0)
        update_momentum(self.student, self.model, momentum)
        if self.patches:
            update_momentum(self.head, self.teacher_head, momentum)


def balanced(logits: Tensor) -> Tensor:
    """The teacher's logits `(N, K)`, moved so that over the batch every prototype is the answer equally often.

    Sinkhorn-Knopp in three rounds, as in DINOv2. DINO's moving centre taught nothing in 500 steps (a class loss of
    99.6 % of ln K).
    """
    shares = sinkhorn(logits, iterations=3, epsilon=TEACHER_TEMPERATURE)
    return TEACHER_TEMPERATURE * shares.clamp(min=1e-12).log()


def block_masks(count: int, grid: int, device: torch.device) -> Tensor:
    """`(count, grid, grid)` bool: in half of the images one rectangle of 10-50 % of the patches is masked (iBOT).

    `lightly.models.utils.random_block_mask` draws from Python's own generator, which a resumed training cannot seed.
    """
    share = torch.empty(count, 1, device=device).uniform_(0.1, 0.5)
    aspect = torch.empty(count, 1, device=device).uniform_(math.log(0.5), math.log(2)).exp()
    sides = (torch.cat([share * aspect, share / aspect], 1).sqrt() * grid).round().clamp(1, grid)
    start = (torch.rand(count, 2, device=device) * (grid - sides + 1)).floor()
    place = torch.arange(grid, device=device)
    inside = (place >= start[..., None]) & (place < (start + sides)[..., None])  # (count, 2, grid)
    masked = torch.rand(count, 1, 1, device=device) < 0.5
    return inside[:, 0, :, None] & inside[:, 1, None, :] & masked


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
    turn = torch.empty(count, 1, 1, device=device).uniform_(-math.pi, math.pi)  # radians about the grey axis
    eye = torch.eye(3, device=device)
    grey = torch.full((3, 3), 1 / 3, device=device)
    skew = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=device) / math.sqrt(3)
    hue = turn.cos() * eye + (1 - turn.cos()) * grey + turn.sin() * skew  # Rodrigues' rotation
    matrix = brightness * contrast * (saturation * eye + (1 - saturation) * grey) @ hue
    mean = views.mean((1, 2, 3), keepdim=True)
    shifted = torch.einsum("bij,bjhw->bihw", matrix, views) + (1 - contrast[..., None]) * mean * brightness[..., None]
    return shifted.clamp(0, 1)
