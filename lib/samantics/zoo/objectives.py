"""What each model of the pocket zoo is trained for: one small module per objective, the same pictures for all.

Every objective holds the model of the official package and maps a :class:`Batch` to a loss and to figures that say
how well the objective is met. They use the packages' own losses where these have one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from typing import Any

import numpy as np
import open_clip
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss, NTXentLoss
from lightly.loss.swav_loss import sinkhorn
from lightly.models.modules import DINOProjectionHead, SimCLRProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss
from typing_extensions import override

from samantics.data import first_world as mojiworld
from samantics.errors import StudyError
from samantics.models import pocket


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures on the training device.

    Attributes:
        images: ``(B, 3, S, S)`` uint8, RGB.
        instances: ``(B, S, S)`` uint8, as in :class:`mojiworld.Picture`.
        drawings: ``(B, MAX_OBJECTS)`` int64 catalogue rows, -1 where there is no object.
    """

    images: Tensor
    instances: Tensor
    drawings: Tensor


def normalised(images: Tensor) -> Tensor:
    """``(B, 3, S, S)`` uint8 RGB, or float RGB in 0-1, to what the zoo's encoders take."""
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    mean = torch.tensor(pocket.MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(pocket.STD, device=pixels.device).view(3, 1, 1)
    return (pixels - mean) / std


class Objective(nn.Module):
    """A model and what it is trained for. ``progress`` is the share (0-1) of the training done."""

    model: Any  # what is shipped: the official package's own class

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to minimise, and figures for the log."""
        raise NotImplementedError

    def vectors(self, pixels: Tensor) -> Tensor:
        """``(B, C)`` image features as the paper pools them, from normalised pixels."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """What follows the optimiser's step (a moving average, a clamp)."""

    def shipped(self) -> nn.Module:
        """The model as it is used after the training."""
        model: nn.Module = self.model
        return model


# ------------------------------------------------------------------------------------------------- SAM and SAM 2


class SamObjective(Objective):
    """Masks from clicks and boxes as in SAM (Kirillov et al. 2023, arXiv 2304.02643, sections 3 and A).

    Focal and dice loss 20:1, the best of three masks for a single click, a predicted IoU, and one corrective click
    in the region of error with the last mask as a prompt. SAM 2 on images is trained in the same way.
    """

    def __init__(self, name: str, config: pocket.ZooConfig) -> None:
        super().__init__()
        self.name = name
        self.model = pocket.BUILDERS[name](config)
        self.mask_side = 8 * config.grid  # masks are compared at twice the resolution of the logits

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        clicked, boxed = chosen_masks(batch).unbind(1)
        target, box_target = shrunk_masks(clicked, self.mask_side), shrunk_masks(boxed, self.mask_side)
        image = self.embed(normalised(batch.images))
        points, labels = sampled_clicks(target.bool(), target, clicked.shape[-1])
        click, click_iou = self.decode(image, points, labels)
        first_loss, first_best = best_of_masks_loss(click[:, 1:], click_iou[:, 1:], target)
        best = click_iou[:, 1:].argmax(1) + 1
        prompt = click[torch.arange(len(click), device=click.device), best, None].detach()
        wrong = (upsampled(prompt) > 0).squeeze(1) != target.bool()
        more_points, more_labels = sampled_clicks(wrong, target, clicked.shape[-1])
        points, labels = torch.cat([points, more_points], 1), torch.cat([labels, more_labels], 1)
        second, second_iou = self.decode(image, points, labels, prompt=prompt)
        box, box_iou = self.decode(image, boxes=jittered(boxes_of(boxed)))
        second_loss, second_best = best_of_masks_loss(second[:, :1], second_iou[:, :1], target)
        box_loss, box_best = best_of_masks_loss(box[:, :1], box_iou[:, :1], box_target)
        figures = {"iou_click": first_best, "iou_two_clicks": second_best, "iou_box": box_best}
        return first_loss + second_loss + box_loss, figures

    @override
    def vectors(self, pixels: Tensor) -> Tensor:
        if self.name == "sam":
            return self.model.image_encoder(pixels).mean((2, 3))
        return self.model.image_encoder(pixels)["vision_features"].mean((2, 3))

    def embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The neck's output ``(B, C, g, g)``; SAM 2 adds its two finer levels."""
        if self.name == "sam":
            return (self.model.image_encoder(pixels),)
        fine, middle, coarse = self.model.forward_image(pixels)["backbone_fpn"]
        return coarse + self.model.no_mem_embed.view(1, -1, 1, 1), fine, middle

    def decode(
        self,
        image: tuple[Tensor, ...],
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All four masks of one prompt per image.

        Args:
            image: of :meth:`embed`, for B images.
            points, labels: ``(B, N, 2)`` x, y in pixels and ``(B, N)`` 1 = object, 0 = background.
            boxes: ``(B, 4)`` xyxy in pixels.
            prompt: ``(B, 1, 4g, 4g)`` logits of an earlier mask.

        Returns:
            Logits ``(B, 4, 4g, 4g)`` (the first is the single-mask token's) and predicted IoU ``(B, 4)``.
        """
        sam = self.name == "sam"
        encoder = self.model.prompt_encoder if sam else self.model.sam_prompt_encoder
        clicks = None if points is None or labels is None else (points, labels)
        sparse, dense = encoder(points=clicks, boxes=boxes, masks=prompt)
        position = encoder.get_dense_pe()
        if sam:  # its decoder repeats one image for all prompts and adds the dense prompt: so each image goes in there
            nothing = torch.zeros_like(image[0][:1])
            logits, iou = self.model.mask_decoder.predict_masks(nothing, position, sparse, dense + image[0])
        else:
            logits, iou, *_ = self.model.sam_mask_decoder.predict_masks(
                image[0], position, sparse, dense, repeat_image=False, high_res_features=list(image[1:])
            )
        return logits.float(), iou.float()


def chosen_masks(batch: Batch) -> Tensor:
    """``(B, 2, S, S)`` bool masks of two objects of every image, drawn at random; twice the same if there is one."""
    counts = (batch.drawings >= 0).sum(1)
    first = (torch.rand(len(counts), device=counts.device) * counts).long()
    chosen = torch.stack([first, (first + 1) % counts], 1) + 1
    return batch.instances[:, None] == chosen[..., None, None].to(batch.instances.dtype)


def shrunk_masks(masks: Tensor, side: int) -> Tensor:
    """``(B, side, side)`` float 0/1: at least half covered, or any covered where that leaves nothing."""
    share = functional.adaptive_avg_pool2d(masks.float(), side)
    half, some = (share >= 0.5).float(), (share > 0).float()
    return torch.where(half.flatten(1).any(1)[:, None, None], half, some)


def sampled_clicks(regions: Tensor, labels: Tensor, image_side: int) -> tuple[Tensor, Tensor]:
    """One uniform click in every region, and the label under it; where a region is empty, a click on the object.

    Args:
        regions: ``(B, M, M)`` bool.
        labels: ``(B, M, M)`` 1 on the object, 0 elsewhere.

    Returns:
        ``(B, 1, 2)`` x, y in image pixels and ``(B, 1)`` labels.
    """
    side = regions.shape[-1]
    regions = torch.where(regions.flatten(1).any(1)[:, None, None], regions, labels.bool())
    place = (torch.rand(regions.shape, device=regions.device) * regions).flatten(1).argmax(1, keepdim=True)
    points = torch.stack([place % side, place // side], -1)
    return (points + 0.5) * (image_side / side) - 0.5, torch.gather(labels.flatten(1), 1, place)


def boxes_of(masks: Tensor) -> Tensor:
    """``(B, 4)`` xyxy in pixels: the outermost pixels of each mask ``(B, S, S)``."""
    edges = []
    for dim in (1, 2):  # any over rows leaves columns: x first
        line = masks.any(dim)
        places = torch.arange(line.shape[-1], device=line.device)
        edges.append((torch.where(line, places, line.shape[-1]).amin(-1), torch.where(line, places, -1).amax(-1)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], -1).float()


def jittered(boxes: Tensor) -> Tensor:
    """Boxes with each edge moved by normal noise of 10 % of the side, 20 pixels at most, as SAM's training does."""
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + (torch.randn_like(boxes) * 0.1 * sides).clamp(-20, 20)


def upsampled(logits: Tensor) -> Tensor:
    """``(B, M, s, s)`` logits at twice their resolution."""
    return functional.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)


def best_of_masks_loss(logits: Tensor, predicted_iou: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """SAM's loss: 20 focal + dice of the best mask of each prompt, plus the squared error of every predicted IoU.

    Args:
        logits: ``(B, M, s, s)``; predicted_iou: ``(B, M)``; targets: ``(B, 2s, 2s)``.

    Returns:
        The mean loss and the mean IoU of the best mask.
    """
    large = upsampled(logits)
    target = targets[:, None].expand_as(large)
    focal = sigmoid_focal_loss(large, target, alpha=0.25, gamma=2.0, reduction="none").mean((-2, -1))
    chance = large.sigmoid()
    dice = 1 - (2 * (chance * target).sum((-2, -1)) + 1) / (chance.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    hard = large > 0
    overlap = (hard & target.bool()).sum((-2, -1))
    iou = overlap / (hard | target.bool()).sum((-2, -1)).clamp(min=1)
    loss = (20 * focal + dice).amin(-1).mean() + functional.mse_loss(predicted_iou, iou)
    return loss, iou.amax(-1).mean()


# ----------------------------------------------------------------------------------------------------------- CLIP


class ClipObjective(Objective):
    """Image and caption find each other in the batch (Radford et al. 2021): `open_clip`'s model and loss.

    Before they are compared, vectors are standardised over the batch. Otherwise all images have nearly one direction at
    first, and all captions another, and some seeds take half of the training to leave it. The model that is shipped
    has the statistics in its last weights.
    """

    def __init__(self, config: pocket.ZooConfig) -> None:
        super().__init__()
        self.model = pocket.build_clip(config)
        self.loss = open_clip.ClipLoss()
        self.tokenizer = pocket.WordTokenizer()
        self.image_statistics, self.text_statistics = (nn.BatchNorm1d(config.dim, affine=False) for _ in range(2))

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,))))
        tokens = self.tokenizer([caption(rng, row) for row in batch.drawings.tolist()]).to(batch.images.device)
        image = self.compared(self.image_statistics, self.model.encode_image(normalised(batch.images)))
        text = self.compared(self.text_statistics, self.model.encode_text(tokens))
        loss = self.loss(image, text, self.model.logit_scale.exp())
        found = (image @ text.T).argmax(1) == torch.arange(len(image), device=image.device)
        return loss, {"retrieval": found.float().mean()}

    def compared(self, statistics: nn.BatchNorm1d, vectors: Tensor) -> Tensor:
        """Unit vectors, standardised over the batch also when they are measured: running averages are late."""
        if self.training:
            standard = statistics(vectors.float())
        else:
            standard = functional.batch_norm(vectors.float(), None, None, training=True)
        return functional.normalize(standard, dim=1)

    @override
    def vectors(self, pixels: Tensor) -> Tensor:
        standard: Tensor = self.image_statistics(self.model.encode_image(pixels).float())
        return standard

    @override
    def shipped(self) -> nn.Module:
        model = copy.deepcopy(self.model)
        fold(self.image_statistics, model.visual.ln_post, model.visual.proj)
        fold(self.text_statistics, model.ln_final, model.text_projection)
        return model

    @override
    def after_step(self, progress: float) -> None:
        self.model.logit_scale.data.clamp_(0, math.log(100))  # as CLIP does


@torch.no_grad()
def fold(statistics: nn.BatchNorm1d, norm: nn.LayerNorm, projection: nn.Parameter) -> None:
    """Make ``norm`` and then ``@ projection`` give what ``statistics`` made of it: (x - mean) / standard deviation."""
    mean, variance = statistics.running_mean, statistics.running_var
    assert mean is not None and variance is not None
    offset = torch.linalg.pinv(projection.double().T) @ mean.double()  # what the projection takes to the mean
    norm.bias.sub_(offset)
    projection.div_((variance + statistics.eps).sqrt())


def caption(rng: np.random.Generator, drawings: list[int]) -> str:
    """A caption that names the objects of a picture, in random order: by drawing and category, or category only."""
    parts = []
    for drawing in rng.permutation([d for d in drawings if d >= 0]):
        name, group = _words()[drawing]
        parts.append(f"{name} a {group}" if rng.random() < 0.8 else group)
    return "a picture of " + " and ".join(parts)


@functools.cache
def _words() -> list[tuple[str, str]]:
    """Name and category of every drawing (looked up very often: a list is faster than the table)."""
    return list(mojiworld.catalogue()[["drawing", "category"]].itertuples(index=False, name=None))


# ------------------------------------------------------------------------------------------- DINOv2 and SimCLR


TEACHER_TEMPERATURE = 0.05


class SelfDistillation(Objective):
    """DINOv2's objective (Oquab et al. 2023): DINO on the class token, iBOT on masked patches, KoLeo; no labels.

    Self-distillation alone starts slowly on small budgets, so the first ``warmup`` of the training is contrastive
    (SimCLR, Chen et al. 2020); then the student goes on as DINOv2's, and its moving average is its teacher. With
    ``warmup=1`` the whole training is SimCLR's: the row ``simclr``. What is shipped is the teacher, as in DINOv2.
    """

    prototypes = 2048
    local_views = 4

    def __init__(self, config: pocket.ZooConfig, warmup: float) -> None:
        super().__init__()
        self.config, self.warmup = config, warmup
        self.student = pocket.build_dinov2(config)
        self.contrast = SimCLRProjectionHead(config.width, 512, 128)
        self.heads = self._heads()
        self.model = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_heads = self._heads().requires_grad_(False)  # weight_norm forbids a deep copy
        self.teacher_heads.load_state_dict(self.heads.state_dict())
        self.contrastive_loss = NTXentLoss(temperature=0.15)
        still = 1.0  # momentum of a centre that stays 0: the targets come balanced
        self.dino_loss = DINOLoss(self.prototypes, teacher_temp=TEACHER_TEMPERATURE, center_momentum=still)
        self.ibot_loss = IBOTPatchLoss(self.prototypes, teacher_temp=TEACHER_TEMPERATURE, center_momentum=still)
        self.koleo_loss = KoLeoLoss()

    def _heads(self) -> nn.ModuleDict:
        """One head for class tokens (DINO) and one for patches (iBOT).

        With batch norm, as DINO's code offers: without it, and untrained, they answer nearly the same for all pictures,
        and so small a difference, balanced, is a teacher without preferences.
        """
        width = self.config.width
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # lightly's head uses torch's older weight_norm
            head = functools.partial(DINOProjectionHead, width, 512, 128, self.prototypes, batch_norm=True)
            return nn.ModuleDict({"class": head(), "patch": head()})

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        # DINOv2's large crops begin at 0.32: of these pictures, often of one object, that is too little to share
        large = [augmented(batch.images, self.config.image_size, (0.5, 1.0)) for _ in range(2)]
        if progress < self.warmup or self.warmup == 1:  # a progress of 1 is measured, too
            return self.contrastive(large)
        small_side = self.config.image_size // 2
        small = [augmented(batch.images, small_side, (0.08, 0.32)) for _ in range(self.local_views)]
        return self.distilled(large, small)

    def contrastive(self, views: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent between the class tokens of two views."""
        tokens = self.student(torch.cat(views)).last_hidden_state[:, 0]
        first, second = functional.normalize(self.contrast(tokens).float(), dim=1).chunk(2)
        found = (first @ second.T).argmax(1) == torch.arange(len(first), device=first.device)
        return self.contrastive_loss(first, second), {"retrieval": found.float().mean()}

    def distilled(self, large: list[Tensor], small: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The student sees masked large views and small ones; it matches the teacher, which sees large ones whole."""
        views, count = torch.cat(large), len(large[0])
        masks = block_masks(len(views), self.config.grid, views.device)
        with torch.no_grad():
            target = self.model(views).last_hidden_state
            target_class = balanced(self.teacher_heads["class"](target[:, 0]).float())
            target_patches = balanced(self.teacher_heads["patch"](target[:, 1:][masks.flatten(1)]).float())
        seen = self.student(views, bool_masked_pos=masks.flatten(1)).last_hidden_state
        parts = self.student(torch.cat(small)).last_hidden_state[:, 0]
        classes = self.heads["class"](torch.cat([seen[:, 0], parts])).float()
        patches = self.heads["patch"](seen[:, 1:][masks.flatten(1)]).float()
        dino = self.dino_loss(list(target_class.chunk(2)), list(classes.split(count)))
        ibot = self.ibot_loss(target_patches, patches, mask=masks)
        koleo = sum(
            (self.koleo_loss(view) for view in seen[:, 0].float().chunk(2)), torch.zeros((), device=views.device)
        )
        chance = (target_class / TEACHER_TEMPERATURE).softmax(1)
        unsure = -(chance * chance.clamp(min=1e-12).log()).sum(1).mean()
        figures = {"dino": dino, "ibot": ibot, "koleo": koleo / 2, "teacher_entropy": unsure}
        return dino + ibot + 0.1 * koleo, figures

    @override
    def vectors(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).last_hidden_state[:, 0]

    @override
    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        stage = max(0.0, progress - self.warmup) / max(1 - self.warmup, 1e-6)
        momentum = 0.9 if progress < self.warmup else cosine_schedule(int(stage * 1000), 1001, 0.98, 1.0)
        update_momentum(self.student, self.model, momentum)
        update_momentum(self.heads, self.teacher_heads, momentum)


def balanced(logits: Tensor) -> Tensor:
    """The teacher's logits ``(N, K)``, moved so that over the batch every prototype is the answer equally often.

    Sinkhorn-Knopp in three rounds, as in DINOv2. DINO's moving centre taught nothing in 500 steps (a class loss of
    99.6 % of ln K).
    """
    shares = sinkhorn(logits, iterations=3, epsilon=TEACHER_TEMPERATURE)
    return TEACHER_TEMPERATURE * shares.clamp(min=1e-12).log()


def block_masks(count: int, grid: int, device: torch.device) -> Tensor:
    """``(count, grid, grid)`` bool: in half of the images one rectangle of 10-50 % of the patches is masked (iBOT)."""
    share = torch.empty(count, 1, device=device).uniform_(0.1, 0.5)
    aspect = torch.empty(count, 1, device=device).uniform_(math.log(0.5), math.log(2)).exp()
    sides = (torch.cat([share * aspect, share / aspect], 1).sqrt() * grid).round().clamp(1, grid)
    start = (torch.rand(count, 2, device=device) * (grid - sides + 1)).floor()
    place = torch.arange(grid, device=device)
    inside = (place >= start[..., None]) & (place < (start + sides)[..., None])  # (count, 2, grid)
    masked = torch.rand(count, 1, 1, device=device) < 0.5
    return inside[:, 0, :, None] & inside[:, 1, None, :] & masked


def augmented(images: Tensor, side: int, share: tuple[float, float]) -> Tensor:
    """A random view of every image: a crop of ``share`` of its area, mirrored or not, recoloured; normalised.

    Args:
        images: ``(B, 3, S, S)`` uint8.

    Returns:
        ``(B, 3, side, side)`` float32.
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


# ------------------------------------------------------------------------------------------------------- controls


class SupervisedObjective(Objective):
    """The ceiling: SAM's image encoder taught which drawings an image shows (softmax, its target shared by them).

    Logits are scaled cosines with a learned vector for each name, as CLIP's are with its captions, of features that are
    standardised over the batch: without that they collapse to a constant before any name is learned. Also when it is
    measured: the features move faster, in the training, than their running averages, and these would be off.
    """

    def __init__(self, config: pocket.ZooConfig) -> None:
        super().__init__()
        self.model = pocket.build_sam(config)
        self.classes = len(mojiworld.catalogue())
        self.standardise = nn.BatchNorm1d(config.dim, affine=False, track_running_stats=False)
        self.names = nn.Parameter(0.02 * torch.randn(self.classes, config.dim))
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        shown = torch.zeros(len(batch.images), self.classes + 1, device=batch.images.device)
        shown.scatter_(1, batch.drawings.where(batch.drawings >= 0, self.classes), 1.0)
        vectors = self.standardise(self.vectors(normalised(batch.images)).float())
        cosines = functional.normalize(vectors, dim=1) @ functional.normalize(self.names, dim=1).T
        logits = self.scale.exp().clamp(max=100) * cosines.float()
        shown = shown[:, :-1]
        loss = functional.cross_entropy(logits, shown / shown.sum(1, keepdim=True))
        return loss, {"top1": torch.gather(shown, 1, logits.argmax(1, keepdim=True)).mean()}

    @override
    def vectors(self, pixels: Tensor) -> Tensor:
        return self.model.image_encoder(pixels).mean((2, 3))


def build_objective(name: str, config: pocket.ZooConfig = pocket.DEFAULT) -> Objective:
    """The objective of that name: a model of the zoo, or a control (``simclr``, ``supervised``).

    Raises:
        StudyError: no such objective.
    """
    makers = {
        "sam": lambda: SamObjective("sam", config),
        "sam2": lambda: SamObjective("sam2", config),
        "clip": lambda: ClipObjective(config),
        "dinov2": lambda: SelfDistillation(config, warmup=0.75),
        "simclr": lambda: SelfDistillation(config, warmup=1.0),
        "supervised": lambda: SupervisedObjective(config),
    }
    if name not in makers:
        raise StudyError(f"no objective is called {name!r}: choose from {', '.join(makers)}")
    return makers[name]()
