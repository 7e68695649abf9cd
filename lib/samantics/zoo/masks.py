"""SAM and SAM 2: masks from clicks and boxes."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import masks_to_boxes, sigmoid_focal_loss
from typing_extensions import override

from samantics.models import pocket
from samantics.zoo.contract import Batch, Objective, at_size

PROMPTED = 4  # prompts for every image
MAE_NAMES = {  # parts of a name in MAE's trunk, and in SAM's
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.layers.": "blocks.",
    "attention.o_proj": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2", "mlp.fc": "mlp.lin",
}  # fmt: skip


class SamObjective(Objective):
    """Masks from clicks and boxes as in SAM (Kirillov et al. 2023, arXiv 2304.02643, sections 3 and A).

    Focal and dice loss 20:1, the best of three masks for a single click, a predicted IoU, and one corrective click
    in the region of error with the last mask as a prompt. For every encoded image `PROMPTED` prompts are asked, half
    clicks, half boxes, spread over all objects of the batch: a scene of six counts six times as much as a picture of
    one, where masks are easy. Masks are compared at the resolution of the logits.
    """

    build: Callable[[pocket.ZooConfig], Any] = staticmethod(pocket.build_sam)
    prompts = operator.attrgetter("prompt_encoder")

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT, model: Any = None) -> None:
        super().__init__()
        self.config, self.model = config, self.build(config) if model is None else model

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        instances = functional.interpolate(batch.instances[:, None], batch.side, mode="nearest-exact")[:, 0]
        masks, owner = chosen_masks(instances)
        image = tuple(level[owner] for level in self.embed(batch.pixels))
        target, half, side = shrunk_masks(masks, 4 * image[0].shape[-1]), len(masks) // 2, masks.shape[-1]
        clicked, boxed = target[:half], target[half:]
        points, labels = sampled_clicks(clicked.bool(), clicked, side)
        corners = jittered(masks_to_boxes(masks[half:]))
        prompts = zip(self.prompt(points, labels), self.prompt(boxes=corners), strict=True)  # two tokens for each
        logits, iou = self.decode(image, *map(torch.cat, prompts))
        first_loss, first_best = best_of_masks_loss(logits[:half, 1:], iou[:half, 1:], clicked)
        box_loss, box_best = best_of_masks_loss(logits[half:, :1], iou[half:, :1], boxed)
        best = iou[:half, 1:].argmax(1) + 1
        before = logits[torch.arange(half, device=logits.device), best, None].detach()
        more_points, more_labels = sampled_clicks((before[:, 0] > 0) != clicked.bool(), clicked, side)
        points, labels = torch.cat([points, more_points], 1), torch.cat([labels, more_labels], 1)
        image = tuple(level[:half] for level in image)
        second, second_iou = self.decode(image, *self.prompt(points, labels, before=before))
        second_loss, second_best = best_of_masks_loss(second[:, :1], second_iou[:, :1], clicked)
        figures = {"iou_click": first_best, "iou_two_clicks": second_best, "iou_box": box_best}
        return first_loss + second_loss + box_loss, figures

    def embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The neck's output `(B, C, g, g)`, from normalised pixels; SAM 2 adds its two finer levels."""
        side = pixels.shape[-1]
        self.fit(side)
        return (at_size(self.model.image_encoder, "pos_embed", pixels, side // self.config.patch_size),)

    def fit(self, side: int) -> None:
        """Tell the prompt encoder the size of the pictures, which it keeps as two numbers."""
        encoder, grid = self.prompts(self.model), side // self.config.patch_size
        encoder.image_embedding_size, encoder.input_image_size = (grid, grid), (side, side)

    def prompt(
        self, points: Any = None, labels: Any = None, boxes: Any = None, before: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The package's tokens and map of one prompt for each of N objects: `sparse, dense` of `decode`.

        Args:
            points, labels: `(N, K, 2)` x, y in pixels and `(N, K)` 1 = object, 0 = background.
            boxes: `(N, 4)` xyxy in pixels.
            before: `(N, 1, 4g, 4g)` logits of an earlier mask.
        """
        clicks = None if points is None else (points, labels)
        return self.prompts(self.model)(points=clicks, boxes=boxes, masks=before)

    def decode(self, image: tuple[Tensor, ...], sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(N, 4, 4g, 4g)` of all masks of N prompts (first the single-mask token's), predicted IoU `(N, 4)`.

        `image` is `embed`'s, repeated: one for each prompt.
        """
        position = self.model.prompt_encoder.get_dense_pe()
        # the package repeats one image for all prompts and adds the dense prompt: so each image goes in there
        nothing = torch.zeros_like(image[0][:1])
        logits, iou = self.model.mask_decoder.predict_masks(nothing, position, sparse, dense + image[0])
        return logits.float(), iou.float()

    @override
    def start_from(self, parent: Mapping[str, Tensor]) -> None:
        encoder, trunk = self.model.image_encoder, {}
        for name, value in parent.items():
            for old, new in MAE_NAMES.items():
                name = name.replace(old, new)
            trunk[name] = value
        for name in [name for name in trunk if "attention.q_proj" in name]:
            parts = [trunk[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            trunk[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        positions = parent["vit.embeddings.position_embeddings"][0, 1:]
        trunk["pos_embed"] = positions.unflatten(0, (math.isqrt(len(positions)),) * 2)[None]
        wanted = [key for key in encoder.state_dict() if not key.startswith("neck")]
        encoder.load_state_dict({key: trunk[key] for key in wanted}, strict=False)


class Sam2Objective(SamObjective):
    """SAM 2 on images, trained as SAM is."""

    build = staticmethod(pocket.build_sam2)
    prompts = operator.attrgetter("sam_prompt_encoder")

    @override
    def start_from(self, parent: Mapping[str, Tensor]) -> None:
        part = "image_encoder."
        encoder = {key.removeprefix(part): value for key, value in parent.items() if key.startswith(part)}
        self.model.image_encoder.load_state_dict(encoder)

    @override
    def embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        self.fit(pixels.shape[-1])
        fine, middle, coarse = self.model.forward_image(pixels)["backbone_fpn"]
        return coarse + self.model.no_mem_embed.view(1, -1, 1, 1), fine, middle

    @override
    def decode(self, image: tuple[Tensor, ...], sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        position, finer = self.model.sam_prompt_encoder.get_dense_pe(), list(image[1:])
        logits, iou, _, _ = self.model.sam_mask_decoder.predict_masks(
            image[0], position, sparse, dense, repeat_image=False, high_res_features=finer
        )
        return logits.float(), iou.float()


def chosen_masks(instances: Tensor) -> tuple[Tensor, Tensor]:
    """Objects drawn evenly from all objects of `(B, S, S)` instances, none twice before each was drawn once.

    Returns `(PROMPTED * B, S, S)` bool masks, and which of the B images each is on.
    """
    counts = instances.flatten(1).amax(1).long()
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    number = torch.arange(1, len(owner) + 1, device=counts.device) - (counts.cumsum(0) - counts)[owner]
    wanted = PROMPTED * len(counts)
    order = torch.randperm(len(owner), device=counts.device).repeat(-(-wanted // len(owner)))[:wanted]
    return instances[owner[order]] == number[order, None, None].to(instances.dtype), owner[order]


def shrunk_masks(masks: Tensor, side: int) -> Tensor:
    """`(B, side, side)` float 0/1: at least half covered, or any covered where that leaves nothing."""
    share = functional.adaptive_avg_pool2d(masks.float(), side)
    half, some = (share >= 0.5).float(), (share > 0).float()
    return torch.where(half.flatten(1).any(1)[:, None, None], half, some)


def sampled_clicks(regions: Tensor, labels: Tensor, image_side: int) -> tuple[Tensor, Tensor]:
    """One click in every `(B, M, M)` bool region, on the object where that is empty; the label that lies under it.

    `labels` `(B, M, M)` are 1 on the object. Returns `(B, 1, 2)` x, y in image pixels and `(B, 1)` labels.
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


def best_of_masks_loss(logits: Tensor, predicted_iou: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """SAM's loss: 20 focal + dice of the best mask of each prompt, plus the squared error of every predicted IoU.

    Of `(B, M, s, s)` logits, `(B, M)` predicted IoU and `(B, s, s)` targets 0 or 1 the mean loss, and the mean IoU of
    the best mask.
    """
    target, hard = targets[:, None].expand_as(logits), logits > 0
    iou = (hard & target.bool()).sum((-2, -1)) / (hard | target.bool()).sum((-2, -1)).clamp(min=1)
    focal = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0).mean((-2, -1))
    chance = logits.sigmoid()
    dice = 1 - (2 * (chance * target).sum((-2, -1)) + 1) / (chance.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    loss = (20 * focal + dice).amin(-1).mean() + functional.mse_loss(predicted_iou, iou)
    return loss, iou.amax(-1).mean()
