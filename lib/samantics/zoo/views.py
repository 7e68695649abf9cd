"""Self-supervision: views of one picture belong together. No labels."""

from __future__ import annotations

import copy
import functools
import math
import warnings

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss, NTXentLoss
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
PROTOTYPES = 2048
LOCAL_VIEWS = 4


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
