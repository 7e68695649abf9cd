"""Prompts and losses of masks: what SAM and SAM 2 are trained with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss


def chosen_masks(instances: Tensor, counts: Tensor) -> Tensor:
    """`(B, 2, S, S)` bool masks of two objects of every image, drawn at random; twice the same if there is one.

    Args:
        instances: `(B, S, S)` uint8, 0 for background, i + 1 on object i.
        counts: `(B,)` how many objects each image has.
    """
    first = (torch.rand(len(counts), device=counts.device) * counts).long()
    chosen = torch.stack([first, (first + 1) % counts], 1) + 1
    return instances[:, None] == chosen[..., None, None].to(instances.dtype)


def shrunk_masks(masks: Tensor, side: int) -> Tensor:
    """`(B, side, side)` float 0/1: at least half covered, or any covered where that leaves nothing."""
    share = functional.adaptive_avg_pool2d(masks.float(), side)
    half, some = (share >= 0.5).float(), (share > 0).float()
    return torch.where(half.flatten(1).any(1)[:, None, None], half, some)


def sampled_clicks(regions: Tensor, labels: Tensor, image_side: int) -> tuple[Tensor, Tensor]:
    """One uniform click in every region, and the label under it; where a region is empty, a click on the object.

    Args:
        regions: `(B, M, M)` bool.
        labels: `(B, M, M)` 1 on the object, 0 elsewhere.

    Returns:
        `(B, 1, 2)` x, y in image pixels and `(B, 1)` labels.
    """
    side = regions.shape[-1]
    regions = torch.where(regions.flatten(1).any(1)[:, None, None], regions, labels.bool())
    place = (torch.rand(regions.shape, device=regions.device) * regions).flatten(1).argmax(1, keepdim=True)
    points = torch.stack([place % side, place // side], -1)
    return (points + 0.5) * (image_side / side) - 0.5, torch.gather(labels.flatten(1), 1, place)


def jittered(boxes: Tensor) -> Tensor:
    """Boxes with each edge moved by normal noise of 10 % of the side, 20 pixels at most, as SAM's training does."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + (torch.randn_like(boxes) * 0.1 * sides).clamp(-20, 20)


def upsampled(logits: Tensor) -> Tensor:
    """`(B, M, s, s)` logits at twice their resolution."""
    return functional.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)


def mask_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """`(B, M)`: 20 times the focal loss plus the dice loss of `(B, M, S, S)` logits against 0/1 masks."""
    focal = sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0, reduction="none").mean((-2, -1))
    chance = logits.sigmoid()
    dice = 1 - (2 * (chance * targets).sum((-2, -1)) + 1) / (chance.sum((-2, -1)) + targets.sum((-2, -1)) + 1)
    return 20 * focal + dice


def best_of_masks_loss(logits: Tensor, predicted_iou: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """SAM's loss: 20 focal + dice of the best mask of each prompt, plus the squared error of every predicted IoU.

    Args:
        logits: `(B, M, s, s)`.
        predicted_iou: `(B, M)`.
        targets: `(B, 2s, 2s)` 0 or 1.

    Returns:
        The mean loss and the mean IoU of the best mask.
    """
    large = upsampled(logits)
    target = targets[:, None].expand_as(large)
    hard = large > 0
    iou = (hard & target.bool()).sum((-2, -1)) / (hard | target.bool()).sum((-2, -1)).clamp(min=1)
    loss = mask_losses(large, target).amin(-1).mean() + functional.mse_loss(predicted_iou, iou)
    return loss, iou.amax(-1).mean()


DINOV2_NAMES = {  # parts of a name in DINOv2's trunk, and in SAM's
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "attention.o_proj": "attn.proj",
    "mlp.fc": "mlp.lin",
}


def trunk_of_dinov2(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A pocket DINOv2's trunk under the names of SAM's image encoder; its layer scales go into the weights."""
    trunk = {}
    for name, value in weights.items():
        for old, new in DINOV2_NAMES.items():
            name = name.replace(old, new)
        trunk[name] = value
    positions = weights["embeddings.position_embeddings"][0, 1:]
    side = math.isqrt(len(positions))
    trunk["pos_embed"] = positions.reshape(1, side, side, -1)
    for block, kind in itertools.product((f"blocks.{number}." for number in range(depth)), ("weight", "bias")):
        parts = [trunk[f"{block}attention.{part}_proj.{kind}"] for part in "qkv"]
        trunk[f"{block}attn.qkv.{kind}"] = torch.cat(parts)
        for part, scale in (("attn.proj", "layer_scale1"), ("mlp.lin2", "layer_scale2")):
            scaled = torch.einsum("i,i...->i...", trunk[f"{block}{scale}.lambda1"], trunk[f"{block}{part}.{kind}"])
            trunk[f"{block}{part}.{kind}"] = scaled
    return trunk
