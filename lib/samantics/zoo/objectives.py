"""What the models of the pocket zoo are trained for: one class each, the same pictures for all.

A new objective is a subclass of `Objective` and a line of `OBJECTIVES`: the training loop, the controls and the command
line know it by that line alone. Losses are the packages' own where these have one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import open_clip
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead, SimCLRProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import masks_to_boxes
from typing_extensions import override

from samantics.data import first_world as mojiworld
from samantics.errors import StudyError
from samantics.models import pocket
from samantics.zoo.masks import (
    best_of_masks_loss,
    chosen_masks,
    jittered,
    sampled_clicks,
    shrunk_masks,
    trunk_of_dinov2,
    upsampled,
)
from samantics.zoo.views import TEACHER_TEMPERATURE, augmented, balanced, block_masks, normalised

PROTOTYPES = 2048
LOCAL_VIEWS = 4


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


# ------------------------------------------------------------------------------------------------------ SAM and SAM 2


class SamObjective(Objective):
    """Masks from clicks and boxes as in SAM (Kirillov et al. 2023, arXiv 2304.02643, sections 3 and A).

    Focal and dice loss 20:1, the best of three masks for a single click, a predicted IoU, and one corrective click
    in the region of error with the last mask as a prompt.
    """

    build: Callable[[pocket.ZooConfig], Any] = staticmethod(pocket.build_sam)
    prompts = operator.attrgetter("prompt_encoder")

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT, model: Any = None) -> None:
        super().__init__()
        self.model = self.build(config) if model is None else model

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        clicked, boxed = chosen_masks(batch.instances, (batch.drawings >= 0).sum(1)).unbind(1)
        image, side = self.embed(normalised(batch.images)), clicked.shape[-1]
        fine = 8 * image[0].shape[-1]  # masks are compared at twice the resolution of the logits
        target, box_target = shrunk_masks(clicked, fine), shrunk_masks(boxed, fine)
        points, labels = sampled_clicks(target.bool(), target, side)
        click, click_iou = self.decode(image, points, labels)
        first_loss, first_best = best_of_masks_loss(click[:, 1:], click_iou[:, 1:], target)
        best = click_iou[:, 1:].argmax(1) + 1
        prompt = click[torch.arange(len(click), device=click.device), best, None].detach()
        wrong = (upsampled(prompt) > 0).squeeze(1) != target.bool()
        more_points, more_labels = sampled_clicks(wrong, target, side)
        points, labels = torch.cat([points, more_points], 1), torch.cat([labels, more_labels], 1)
        second, second_iou = self.decode(image, points, labels, prompt=prompt)
        box, box_iou = self.decode(image, boxes=jittered(masks_to_boxes(boxed)))
        second_loss, second_best = best_of_masks_loss(second[:, :1], second_iou[:, :1], target)
        box_loss, box_best = best_of_masks_loss(box[:, :1], box_iou[:, :1], box_target)
        figures = {"iou_click": first_best, "iou_two_clicks": second_best, "iou_box": box_best}
        return first_loss + second_loss + box_loss, figures

    def embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The neck's output `(B, C, g, g)`, from normalised pixels; SAM 2 adds its two finer levels."""
        return (self.model.image_encoder(pixels),)

    def decode(
        self, image: tuple[Tensor, ...], points: Any = None, labels: Any = None, boxes: Any = None, prompt: Any = None
    ) -> tuple[Tensor, Tensor]:
        """All four masks of one prompt for each of B images.

        Args:
            image: of `embed`.
            points, labels: `(B, N, 2)` x, y in pixels and `(B, N)` 1 = object, 0 = background.
            boxes: `(B, 4)` xyxy in pixels.
            prompt: `(B, 1, 4g, 4g)` logits of an earlier mask.

        Returns:
            Logits `(B, 4, 4g, 4g)` (the first is the single-mask token's) and predicted IoU `(B, 4)`.
        """
        encoder = self.prompts(self.model)
        sparse, dense = encoder(points=None if points is None else (points, labels), boxes=boxes, masks=prompt)
        logits, iou, *_ = self.predict(image, encoder.get_dense_pe(), sparse, dense)
        return logits.float(), iou.float()

    def predict(self, image: tuple[Tensor, ...], position: Tensor, sparse: Tensor, dense: Tensor) -> Any:
        """The package's mask decoder on as many prompts as images."""
        # it repeats one image for all prompts and adds the dense prompt: so each image goes in there
        nothing = torch.zeros_like(image[0][:1])
        return self.model.mask_decoder.predict_masks(nothing, position, sparse, dense + image[0])

    @override
    def start_from(self, parent: Mapping[str, Tensor]) -> None:
        encoder = self.model.image_encoder
        trunk = trunk_of_dinov2(parent, len(encoder.blocks))
        wanted = [key for key in encoder.state_dict() if not key.startswith("neck")]
        encoder.load_state_dict({key: trunk[key] for key in wanted}, strict=False)


class Sam2Objective(SamObjective):
    """SAM 2 on images, trained as SAM is."""

    build = staticmethod(pocket.build_sam2)
    prompts = operator.attrgetter("sam_prompt_encoder")

    @override
    def embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        fine, middle, coarse = self.model.forward_image(pixels)["backbone_fpn"]
        return coarse + self.model.no_mem_embed.view(1, -1, 1, 1), fine, middle

    @override
    def predict(self, image: tuple[Tensor, ...], position: Tensor, sparse: Tensor, dense: Tensor) -> Any:
        return self.model.sam_mask_decoder.predict_masks(
            image[0], position, sparse, dense, repeat_image=False, high_res_features=list(image[1:])
        )


# ------------------------------------------------------------------------------------------------- captions and names


class ClipObjective(Objective):
    """Image and caption find each other in the batch (Radford et al. 2021): `open_clip`'s model and loss.

    Before they are compared, vectors are standardised over the batch. Otherwise all images have nearly one direction at
    first, and all captions another, and some seeds take half of the training to leave it. The model that is shipped
    has the statistics in its last weights.
    """

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT) -> None:
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
    """Make `norm` and then `@ projection` give what `statistics` made of it: (x - mean) / standard deviation."""
    mean, variance = statistics.running_mean, statistics.running_var
    assert mean is not None and variance is not None
    norm.bias.sub_(torch.linalg.pinv(projection.double().T) @ mean.double())  # what the projection takes to the mean
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


class SupervisedObjective(Objective):
    """SAM's image encoder taught which drawings an image shows (softmax, its target shared by them).

    Logits are scaled cosines with a learned vector for each name, as CLIP's are with its captions, of features that are
    standardised over the batch: without that they collapse to a constant before any name is learned. Also when it is
    measured: the features move faster, in the training, than their running averages, and these would be off.
    """

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT) -> None:
        super().__init__()
        self.model = pocket.build_sam(config)
        self.classes = len(mojiworld.catalogue())
        self.standardise = nn.BatchNorm1d(config.dim, affine=False, track_running_stats=False)
        self.names = nn.Parameter(0.02 * torch.randn(self.classes, config.dim))
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        shown = torch.zeros(len(batch.images), self.classes + 1, device=batch.images.device)
        shown = shown.scatter(1, batch.drawings.where(batch.drawings >= 0, self.classes), 1.0)[:, :-1]
        vectors = self.standardise(self.model.image_encoder(normalised(batch.images)).mean((2, 3)).float())
        cosines = functional.normalize(vectors, dim=1) @ functional.normalize(self.names, dim=1).T
        logits = self.scale.exp().clamp(max=100) * cosines.float()
        loss = functional.cross_entropy(logits, shown / shown.sum(1, keepdim=True))
        return loss, {"top1": torch.gather(shown, 1, logits.argmax(1, keepdim=True)).mean()}


# --------------------------------------------------------------------------------------------------- self-supervision


class SelfDistillation(Objective):
    """DINOv2's objective (Oquab et al. 2023): DINO on the class token, iBOT on masked patches, KoLeo; no labels.

    Self-distillation alone starts slowly on small budgets, so until `changes_at` the training is contrastive (SimCLR,
    Chen et al. 2020); then the student goes on as DINOv2's, and its moving average is its teacher. With 1 the whole
    training is SimCLR's: the row `simclr`. What is shipped is the teacher, as in DINOv2.
    """

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT, changes_at: float = 0.75) -> None:
        super().__init__()
        self.config, self.changes_at = config, changes_at
        self.student = pocket.build_dinov2(config)
        self.contrast = SimCLRProjectionHead(config.width, 512, 128)
        self.heads = self._heads()
        self.model = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_heads = self._heads().requires_grad_(False)  # weight_norm forbids a deep copy
        self.teacher_heads.load_state_dict(self.heads.state_dict())
        self.contrastive_loss = NTXentLoss(temperature=0.15)
        still = 1.0  # momentum of a centre that stays 0: the targets come balanced
        self.dino_loss = DINOLoss(PROTOTYPES, teacher_temp=TEACHER_TEMPERATURE, center_momentum=still)
        self.ibot_loss = IBOTPatchLoss(PROTOTYPES, teacher_temp=TEACHER_TEMPERATURE, center_momentum=still)
        self.koleo_loss = KoLeoLoss()

    def _heads(self) -> nn.ModuleDict:
        """One head for class tokens (DINO) and one for patches (iBOT).

        With batch norm, as DINO's code offers: without it, and untrained, they answer nearly the same for all pictures,
        and so small a difference, balanced, is a teacher without preferences.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # lightly's head uses torch's older weight_norm
            head = functools.partial(DINOProjectionHead, self.config.width, 512, 128, PROTOTYPES, batch_norm=True)
            return nn.ModuleDict({"class": head(), "patch": head()})

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        # DINOv2's large crops begin at 0.32: of these pictures, often of one object, that is too little to share
        large = [augmented(batch.images, self.config.image_size, (0.5, 1.0)) for _ in range(2)]
        if progress < self.changes_at or self.changes_at == 1:  # a progress of 1 is measured, too
            return self.contrastive(large)
        small = [augmented(batch.images, self.config.image_size // 2, (0.08, 0.32)) for _ in range(LOCAL_VIEWS)]
        return self.distilled(large, small)

    def contrastive(self, views: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent between the class tokens of two views `(B, 3, S, S)`."""
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
        koleo = torch.stack([self.koleo_loss(view) for view in seen[:, 0].float().chunk(2)]).sum()
        chance = (target_class / TEACHER_TEMPERATURE).softmax(1)
        unsure = -(chance * chance.clamp(min=1e-12).log()).sum(1).mean()
        figures = {"dino": dino, "ibot": ibot, "koleo": koleo / 2, "teacher_entropy": unsure}
        return dino + ibot + 0.1 * koleo, figures

    @override
    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        stage = max(0.0, progress - self.changes_at) / max(1 - self.changes_at, 1e-6)
        late = progress >= self.changes_at
        momentum = cosine_schedule(int(stage * 1000), 1001, 0.98, 1.0) if late else 0.9
        update_momentum(self.student, self.model, momentum)
        update_momentum(self.heads, self.teacher_heads, momentum)


# -------------------------------------------------------------------------------------------------------- all of them


@dataclasses.dataclass(frozen=True)
class Entry:
    """One way to train a model.

    Attributes:
        make: the objective, its model untrained and of these sizes.
        architecture: the pocket model that it ships.
        asks: the question that its loss puts to a picture.
        parent: the trained model whose trunk it starts from; empty: none.
    """

    make: Callable[[pocket.ZooConfig], Objective]
    architecture: str
    asks: str
    parent: str = ""


MASKS = "which pixels belong to the thing under this click, or in this box?"
VIEWS = "which views are of one picture?"
OBJECTIVES = {
    "sam": Entry(SamObjective, "sam", MASKS),
    "sam2": Entry(Sam2Objective, "sam2", MASKS),
    "clip": Entry(ClipObjective, "clip", "which of these captions belongs to this picture?"),
    "dinov2": Entry(SelfDistillation, "dinov2", f"{VIEWS} Then: what does your moving average see in the whole view?"),
    "simclr": Entry(functools.partial(SelfDistillation, changes_at=1.0), "dinov2", VIEWS),
    "supervised": Entry(SupervisedObjective, "sam", "which drawings does this picture show?"),
    "sam_from_dinov2": Entry(SamObjective, "sam", MASKS, parent="dinov2"),
}


def entry(name: str) -> Entry:
    """How the model or control of that name is trained.

    Raises:
        StudyError: no such objective.
    """
    if name not in OBJECTIVES:
        raise StudyError(f"no objective is called {name!r}: choose from {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def build_objective(name: str, config: pocket.ZooConfig = pocket.DEFAULT) -> Objective:
    """The untrained objective of that name; `StudyError` where there is none."""
    return entry(name).make(config)
