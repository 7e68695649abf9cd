"""Views of pictures, and what a teacher says of them: what self-supervision is trained with."""

from __future__ import annotations

import math

import torch
from lightly.loss.swav_loss import sinkhorn
from torch import Tensor
from torch.nn import functional

from samantics.models.preprocessing import IMAGENET

TEACHER_TEMPERATURE = 0.05


def normalised(images: Tensor) -> Tensor:
    """`(B, 3, S, S)` uint8 RGB, or float RGB in 0-1, to what the zoo's encoders take."""
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in IMAGENET)
    return (pixels - mean) / std


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
