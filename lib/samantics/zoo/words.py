"""What is learned from words: captions (CLIP), or names as labels (the control `supervised`)."""

from __future__ import annotations

import copy
import math

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from samantics.models import pocket
from samantics.mojiworld import catalogue
from samantics.mojiworld.captions import caption
from samantics.zoo.contract import Batch, Objective, at_size


class ClipObjective(Objective):
    """Image and caption find each other in the batch (Radford et al. 2021): `open_clip`'s model and loss.

    Before they are compared, vectors are standardised over the batch. Otherwise all images have nearly one direction at
    first, and all captions another, and some seeds take half of the training to leave it. The model that is shipped
    has the statistics in its last weights.
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
        pixels = batch.pixels
        vectors = at_size(self.model.visual, "positional_embedding", pixels, pixels.shape[-1] // self.patch_size)
        image = self.compared(self.image_statistics, vectors)
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
