"""What each model of the zoo is trained for: a subclass of `contract.Objective` and a line of `OBJECTIVES` each.

What SAM and SAM 2 ask is in `masks`.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from samantics.errors import StudyError
from samantics.models import pocket
from samantics.mojiworld import catalogue
from samantics.mojiworld.captions import caption
from samantics.zoo.contract import Batch, Objective, at_size, normalised
from samantics.zoo.masks import Sam2Objective, SamObjective

MASKED = 0.6  # share of Hiera's squares that are hidden
UNIT = 2  # their side, tokens: what a token of Hiera's last stage covers
HUE = 0.5  # radians: classes have colours of their own, and turning hues all the way round hides them


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
        other = batch.side != self.model.config.image_size
        return self.model(batch.pixels, interpolate_pos_encoding=other).loss, {}


class HieraObjective(Objective):
    """The same question put to SAM 2's trunk and neck, in SimMIM's way (Xie et al. 2022, arXiv 2111.09886).

    Hidden squares stay in place, as mean grey, because Hiera works in windows; its own MAE takes them out, with a
    Hiera of other code than `sam2`'s. A linear layer paints them from the neck's output.
    """

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT) -> None:
        super().__init__()
        self.config, self.model = config, pocket.build_sam2(config)
        self.paint = nn.Linear(config.dim, 3 * config.patch_size**2)

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, patch = batch.pixels, self.config.patch_size
        side = batch.side // patch // UNIT
        order = torch.rand(len(pixels), side * side, device=pixels.device).argsort(1).argsort(1)
        hidden = (order < MASKED * side * side).unflatten(1, (side, side))  # as many of every picture
        seen = pixels * ~hidden[:, None].repeat_interleave(UNIT * patch, 2).repeat_interleave(UNIT * patch, 3)
        painted = self.paint(self.model.image_encoder(seen)["vision_features"].permute(0, 2, 3, 1).flatten(1, 2))
        true = functional.unfold(pixels, patch, stride=patch).transpose(1, 2)
        wanted = hidden.repeat_interleave(UNIT, 1).repeat_interleave(UNIT, 2).flatten(1)
        return (painted.float() - true)[wanted].square().mean(), {}


class SelfSupervision(Objective):
    """Two views of a picture belong together; no labels (SimCLR, Chen et al. 2020, arXiv 2002.05709).

    NT-Xent compares the class tokens of the views, and the means of their patch tokens too: so the map itself has to
    carry what the picture shows. What is shipped is a moving average of the weights, as in DINOv2.
    DINOv2's own losses (class tokens against prototypes, masked patches) gained nothing at equal pictures in so short
    a training, and cost half as much again (assets/zoo/choices.csv).
    """

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT) -> None:
        super().__init__()
        self.student = pocket.build_dinov2(config)
        self.heads = nn.ModuleList(SimCLRProjectionHead(config.width, 512, 128) for _ in range(2))
        self.model = copy.deepcopy(self.student).requires_grad_(False)
        self.loss = NTXentLoss(temperature=0.15)

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        # DINOv2's large crops begin at 0.32: of these pictures, often of one object, that is too little to share
        views = torch.cat([augmented(batch.images, batch.side, (0.5, 1.0)) for _ in range(2)])
        tokens = self.student(views).last_hidden_state
        compared = zip(self.heads, (tokens[:, 0], tokens[:, 1:].mean(1)), strict=True)
        pairs = [functional.normalize(head(vectors).float(), dim=1).chunk(2) for head, vectors in compared]
        found = (pairs[0][0] @ pairs[0][1].T).argmax(1) == torch.arange(len(batch.images), device=views.device)
        return torch.stack([self.loss(*pair) for pair in pairs]).mean(), {"retrieval": found.float().mean()}

    @override
    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        update_momentum(self.student, self.model, cosine_schedule(int(progress * 1000), 1001, 0.99, 1.0))


def augmented(images: Tensor, side: int, share: tuple[float, float]) -> Tensor:
    """A random view of every image: a crop, mirrored or not, recoloured; `(B, 3, side, side)` normalised.

    All images at once, each with its own numbers: torchvision's transforms give a batch one view for all.

    Args:
        images: `(B, 3, S, S)` uint8.
        side: of the views, pixels.
        share: least and largest share of an image's area that a view shows.
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


class ClipObjective(Objective):
    """Image and caption find each other in the batch (Radford et al. 2021): `open_clip`'s model and loss.

    Before they are compared, vectors are standardised over the batch: otherwise all images have nearly one direction at
    first, all captions another, and some seeds take half of the training to leave it. What ships has the statistics in
    its last weights.
    """

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT) -> None:
        super().__init__()
        self.model, self.patch_size = pocket.build_clip(config), config.patch_size
        self.loss = open_clip.ClipLoss()
        self.tokenizer = pocket.WordTokenizer()
        self.image_statistics, self.text_statistics = (nn.BatchNorm1d(config.dim, affine=False) for _ in range(2))

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,))))
        tokens = self.tokenizer([caption(rng, row) for row in batch.drawings.tolist()]).to(batch.images.device)
        vectors = at_size(self.model.visual, "positional_embedding", batch.pixels, batch.side // self.patch_size)
        image = self.compared(self.image_statistics, vectors)
        text = self.compared(self.text_statistics, self.model.encode_text(tokens))
        loss = self.loss(image, text, self.model.logit_scale.exp())
        found = (image @ text.T).argmax(1) == torch.arange(len(image), device=image.device)
        return loss, {"retrieval": found.float().mean()}

    def compared(self, statistics: nn.BatchNorm1d, vectors: Tensor) -> Tensor:
        """Unit vectors, standardised over the batch also when they are measured: running averages are late."""
        vectors = vectors.float()
        own = statistics(vectors) if self.training else functional.batch_norm(vectors, None, None, training=True)
        return functional.normalize(own, dim=1)

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


class SupervisedObjective(Objective):
    """The ceiling: which classes does this picture show (softmax, its target shared by them)?

    Logits are scaled cosines with a learned vector for each class, as CLIP's are with its captions, of the mean token,
    standardised over the batch: without that they collapse to a constant before any class is learned. Also when it is
    measured: the features move faster, in the training, than their running averages, and these would be off.
    """

    def __init__(self, config: pocket.ZooConfig = pocket.DEFAULT) -> None:
        super().__init__()
        self.model = pocket.build_dinov2(config)
        self.standardise = nn.BatchNorm1d(config.width, affine=False, track_running_stats=False)
        self.names = nn.Parameter(0.02 * torch.randn(len(catalogue.classes()), config.width))
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @override
    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        shown = shown_classes(batch.drawings)
        vectors = self.standardise(self.model(batch.pixels).last_hidden_state[:, 1:].mean(1).float())
        cosines = functional.normalize(vectors, dim=1) @ functional.normalize(self.names, dim=1).T
        logits = self.scale.exp().clamp(max=100) * cosines.float()
        loss = functional.cross_entropy(logits, shown / shown.sum(1, keepdim=True))
        return loss, {"top1": torch.gather(shown, 1, logits.argmax(1, keepdim=True)).mean()}


def shown_classes(drawings: Tensor) -> Tensor:
    """`(B, classes)` float 0/1: which classes pictures show, given their `(B, MAX_OBJECTS)` drawings."""
    classes = len(catalogue.classes())
    label = torch.from_numpy(np.append(catalogue.class_of_drawing(), classes)).to(drawings.device)  # -1 is the last
    shown = torch.zeros(len(drawings), classes + 1, device=drawings.device)
    return shown.scatter(1, label[drawings], 1.0)[:, :-1]


class Entry(NamedTuple):
    """One way to train a model."""

    make: Callable[[pocket.ZooConfig], Objective]  # the objective, its model untrained and of these sizes
    architecture: str  # the pocket model that it ships
    asks: str  # the question that its loss puts to a picture
    parent: str = ""  # the trained model whose trunk it starts from; empty: none


MASKS = "which pixels belong to the thing under this click, or in this box?"
PIXELS = "what is behind the hidden squares?"
OBJECTIVES = {
    "mae": Entry(MaeObjective, "mae", PIXELS),
    "hiera": Entry(HieraObjective, "sam2", PIXELS),
    "sam": Entry(SamObjective, "sam", MASKS, parent="mae"),
    "sam2": Entry(Sam2Objective, "sam2", MASKS, parent="hiera"),
    "clip": Entry(ClipObjective, "clip", "which of these captions belongs to this picture?"),
    "dinov2": Entry(SelfSupervision, "dinov2", "which views are of one picture?"),
    "supervised": Entry(SupervisedObjective, "supervised", "which classes does this picture show?"),
    "sam_scratch": Entry(SamObjective, "sam", MASKS),
}


def entry(name: str) -> Entry:
    """How the model or control of that name is trained; StudyError where there is none."""
    if name not in OBJECTIVES:
        raise StudyError(f"no objective is called {name!r}: choose from {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def build_objective(name: str, config: pocket.ZooConfig = pocket.DEFAULT) -> Objective:
    """The untrained objective of that name; `StudyError` where there is none."""
    return entry(name).make(config)
