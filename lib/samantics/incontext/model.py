"""In-context learning on a frozen SAM: the trained network and its losses (the study, section 4).

    reference + box -- SAM --> mask tokens -- fuser MLP --> class embedding --+
    target ----------- SAM --> trunk maps ----------------> deformable DETR <-+--> boxes, "same class as the reference?"

Fuser and DETR are trained, nothing of SAM is. The DETR's parts, matcher and losses are those of `transformers`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torchvision.ops import box_convert
from transformers import DeformableDetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoder,
    DeformableDetrEncoder,
    DeformableDetrMLPPredictionHead,
    DeformableDetrSinePositionEmbedding,
    inverse_sigmoid,
)

from samantics.incontext.adapters import Adapters
from samantics.incontext.tokens import SamMaps, box_means, processes
from samantics.scales import InContextSettings

LOSS_WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}  # also the matcher's costs
TEMPERATURE = 0.1  # of naming by cosines
LEAST = 0.01  # added to an agreement, so that no logarithm is without end
CLASS_PRIOR = 0.01  # a query's score at the start: focal loss needs it small (Lin et al. 2017, section 3.3)


class DetrOutput(NamedTuple):
    """Predictions of Q queries for each of K class embeddings that B images are asked for, at each decoder layer."""

    logits: Tensor  # (layers, B, K, Q) of "an instance of the reference's class"
    boxes: Tensor  # (layers, B, K, Q, 4) centre x, centre y, width, height, as shares of the input's side


class Memory(NamedTuple):
    """The output of the DETR's encoder for B images."""

    tokens: Tensor  # (B, L * h * w, dim)
    inside: Tensor  # (B, L * h * w) bool, False for padding
    maps: Tensor  # (B, L * C, h, w) SAM's trunk maps themselves
    geometry: dict[str, Any]  # the sizes of the L levels, in the three forms that `transformers` asks for


class InContextModel(nn.Module):
    """Fuser and deformable DETR with iterative box refinement (Zhu et al. 2021, arXiv 2010.04159).

    The paper's head reads from the sum of query and class embedding whether both are of one class, which it learns in
    days. Where `settings.naming` is above 0 this is a variant, the study's own: class embeddings and what lies in boxes
    learn to name base classes (see `naming_loss`), and a query's score is told how well the two agree. A novel class
    is then compared by the base classes that it resembles.

    `trunk_width`: channels of SAM's trunk maps; `token_shape`: (T, D) of a reference's mask tokens; `classes`: how many
    are base, for the naming.
    """

    def __init__(
        self, settings: InContextSettings, trunk_width: int, token_shape: tuple[int, int], classes: int
    ) -> None:
        super().__init__()
        dim, layers, width = settings.dim, settings.decoder_layers, settings.fuser_width
        config = DeformableDetrConfig(
            d_model=dim, dropout=settings.dropout, num_queries=settings.queries, with_box_refine=True,
            num_feature_levels=settings.trunk_maps,
            encoder_layers=settings.encoder_layers, decoder_layers=layers,
            encoder_attention_heads=settings.heads, decoder_attention_heads=settings.heads,
            encoder_ffn_dim=settings.ffn_width, decoder_ffn_dim=settings.ffn_width,
        )  # fmt: skip
        first, second = nn.Linear(math.prod(token_shape), width), nn.Linear(width, width)
        self.fuser = nn.Sequential(nn.Flatten(), first, nn.GELU(), second, nn.GELU(), nn.Linear(width, dim))
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(trunk_width, dim, 1), nn.GroupNorm(32, dim)) for _ in range(settings.trunk_maps)
        )
        self.positions = DeformableDetrSinePositionEmbedding(dim // 2, normalize=True)
        self.level_embedding = nn.Parameter(torch.randn(settings.trunk_maps, dim))
        self.encoder = DeformableDetrEncoder(config)
        self.decoder = DeformableDetrDecoder(config)
        self.query_content = nn.Embedding(settings.queries, dim)
        self.place = DeformableDetrMLPPredictionHead(2 * dim, dim, dim, 2)
        self.anchors = nn.Parameter(torch.logit(nn.functional.pad(spread_points(settings.queries), (0, 2), value=0.25)))
        scores = [nn.Linear(dim, 1) for _ in range(layers)]
        boxes = [DeformableDetrMLPPredictionHead(dim, dim, 4, 3) for _ in range(layers)]
        for score, box in zip(scores, boxes, strict=True):  # start with small scores, and with the anchors as boxes
            nn.init.constant_(score.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))
            nn.init.zeros_(box.layers[2].weight)
            nn.init.zeros_(box.layers[2].bias)
        self.class_heads, self.box_heads = nn.ModuleList(scores), nn.ModuleList(boxes)
        self.decoder.bbox_embed = self.box_heads
        self.adapters: Adapters | None = None  # see `with_adapters`
        self.scale: nn.BatchNorm1d | None = None
        if settings.naming:
            wide = settings.trunk_maps * trunk_width
            self.scale = nn.BatchNorm1d(wide, affine=False, momentum=None)  # of SAM's channels, over all steps
            self.look = nn.Sequential(nn.Linear(wide, width), nn.GELU(), nn.Linear(width, dim))
            self.names = nn.Parameter(torch.randn(classes, dim))
            self.gain = nn.Parameter(torch.ones(()))

    def forward(
        self, maps: SamMaps, tokens: Tensor, naming: Sequence[Tensor] | None = None
    ) -> tuple[DetrOutput, Tensor]:
        """Find the classes of references in images; the loss of naming objects and references (0 without `naming`).

        Args:
            maps: of B images.
            tokens: `(B, K, T, D)` mask tokens of K classes for each, averaged over the references where there are
                several.
            naming: contents and labels of objects, mask tokens and labels of references.
        """
        asked = self.fuser(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        output = self.decode(self.encode(maps), asked)
        return output, tokens.new_zeros(()) if naming is None else self.naming_loss(*naming)

    def naming_loss(self, contents: Tensor, labels: Tensor, tokens: Tensor, classes: Tensor) -> Tensor:
        """Cross-entropy of naming objects by what lies in their boxes, and references by their class embeddings.

        Args:
            contents: `(N, L * C)` of objects, whose base classes are `labels` `(N,)`.
            tokens: `(M, T, D)` mask tokens of references, whose base classes are `classes` `(M,)`.
        """
        assert self.scale is not None
        seen, embeddings = self.named(self.look(self.scale(contents))), self.named(self.fuser(tokens))
        return cross_entropy(seen, labels) + cross_entropy(embeddings, classes)

    def looked(self, contents: Tensor) -> Tensor:
        """`(N, dim)` of `(N, L * C)` contents, scaled by what all steps saw: no batch or process depends on another."""
        assert self.scale is not None
        mean, variance = self.scale.running_mean, self.scale.running_var
        return self.look(nn.functional.batch_norm(contents, mean, variance))

    def named(self, features: Tensor) -> Tensor:
        """`(..., base classes)` logits of `(..., dim)` features: their cosine with the direction of each class."""
        return normalize(features, dim=-1) @ normalize(self.names, dim=-1).T / TEMPERATURE

    def agreement(self, contents: Tensor, embeddings: Tensor) -> Tensor:
        """How much likelier than by chance `(..., dim)` contents and embeddings have one base class, as a log."""
        same = (self.named(contents).softmax(-1) * self.named(embeddings).softmax(-1)).sum(-1)
        return torch.log(len(self.names) * same + LEAST)

    def encode(self, maps: SamMaps) -> Memory:
        """SAM's trunk maps, projected to `dim` channels and passed through the DETR's encoder."""
        batch, levels, _, height, width = maps.trunk.shape
        shape, device = torch.Size((batch, self.level_embedding.shape[1], height, width)), maps.trunk.device
        grid = self.positions(shape=shape, device=device, dtype=torch.float32)
        content = [project(level) for project, level in zip(self.projections, maps.trunk.unbind(1), strict=True)]
        places = [grid + level[:, None, None] for level in self.level_embedding]
        inside = maps.inside.flatten(1).repeat(1, levels)
        geometry = {
            "spatial_shapes": torch.tensor([(height, width)] * levels, device=device),
            "spatial_shapes_list": [(height, width)] * levels,
            "level_start_index": torch.arange(levels, device=device) * height * width,
        }
        encoded = self.encoder(
            inputs_embeds=torch.cat([c.flatten(2) for c in content], dim=2).transpose(1, 2),
            attention_mask=inside,
            spatial_position_embeddings=torch.cat([p.flatten(2) for p in places], dim=2).transpose(1, 2),
            valid_ratios=torch.ones(batch, levels, 2, device=device),
            **geometry,
        )
        return Memory(encoded.last_hidden_state, inside, maps.trunk.flatten(1, 2), geometry)

    def decode(self, memory: Memory, embeddings: Tensor) -> DetrOutput:
        """Boxes and scores from `(B, K, dim)` class embeddings, each added to every query of its own.

        Args:
            memory: of B images.
            embeddings: what each image is asked for. The queries of one class do not see those of another.
        """
        images, classes, dim = embeddings.shape
        boxes = self.anchors.sigmoid().repeat(images, classes, 1)  # (B, K * Q, 4): an image's classes share its memory
        decoded = self.decoder(
            inputs_embeds=(self.query_content.weight + embeddings[:, :, None]).flatten(1, 2),
            object_queries_position_embeddings=self.place(box_waves(boxes, dim // 2)),
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=memory.inside,
            reference_points=boxes,
            valid_ratios=torch.ones(images, len(self.level_embedding), 2, device=boxes.device),
            attention_mask=own_class_only(classes, len(self.anchors)).to(boxes)[None, None],
            **memory.geometry,
        )
        starts = [boxes, *decoded.intermediate_reference_points.unbind(1)[:-1]]
        logits, moved = [], []
        for layer, (state, start) in enumerate(zip(decoded.intermediate_hidden_states.unbind(1), starts, strict=True)):
            logits.append(self.class_heads[layer](state)[..., 0].unflatten(1, (classes, -1)))
            moved.append((self.box_heads[layer](state) + inverse_sigmoid(start)).sigmoid().unflatten(1, (classes, -1)))
        if self.scale is not None:
            image = torch.arange(images, device=boxes.device).repeat_interleave(boxes.shape[1])
            # a box of NaN, which the training refuses, would make roi_align read outside its memory
            corners = box_convert(moved[-1].detach().flatten(0, 2), "cxcywh", "xyxy").nan_to_num()
            contents = self.looked(box_means(memory.maps, image, corners)).view(images, classes, -1, dim)
            logits[-1] = logits[-1] + self.gain * self.agreement(contents, embeddings[:, :, None])
        return DetrOutput(torch.stack(logits), torch.stack(moved))


def own_class_only(classes: int, queries: int) -> Tensor:
    """`(K * Q, K * Q)` added to the self-attention of the queries: 0 within a class, minus infinity between two."""
    whole = torch.full((classes, queries, classes, queries), -math.inf)
    whole.diagonal(dim1=0, dim2=2)[:] = 0.0
    return whole.flatten(0, 1).flatten(1)


def build_model(settings: InContextSettings, sam: Sam, classes: int, seed: int) -> InContextModel:
    """An untrained model for that SAM and so many base classes, its initialisation seeded."""
    decoder, width = sam.mask_decoder, sam.image_encoder.neck[0].in_channels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return InContextModel(settings, width, (decoder.num_mask_tokens, decoder.transformer_dim), classes).to(
            sam.device
        )


def with_adapters(model: InContextModel, sam: Sam, maps: int, width: int, seed: int = 0) -> InContextModel:
    """A copy of the model with adapters beside it that do nothing yet, seeded."""
    adapted = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted.adapters = Adapters(sam, maps, width).to(sam.device)
    return adapted


def spread_points(count: int) -> Tensor:
    """`(count, 2)` points spread evenly over the unit square: the R2 sequence (Roberts 2018)."""
    plastic = 1.32471795724474602596
    steps = torch.arange(1, count + 1, dtype=torch.float64)[:, None] * torch.tensor([1 / plastic, 1 / plastic**2])
    return ((0.5 + steps) % 1).float()


def box_waves(boxes: Tensor, width: int) -> Tensor:
    """`(..., 4 * width)` sines and cosines of the four numbers of boxes (Liu et al. 2022, arXiv 2201.12329)."""
    steps = torch.arange(0, width, 2, device=boxes.device) / width
    angles = boxes[..., None] * (2 * math.pi / 10000**steps)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def matched_loss(output: DetrOutput, boxes: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Focal + L1 + GIoU loss after Hungarian matching, summed over decoder layers, and the last layer's three terms.

    `boxes` are for each of the B * K questions the `(n, 4)` to be found, as in `DetrOutput`. Divided by the objects to
    be found in the batch of all processes: the mean over processes, which `DistributedDataParallel` takes, is the
    whole batch's loss.
    """
    device, asked = output.logits.device, DetrOutput(*(part.flatten(1, 2) for part in output))
    layers = [{"logits": logits[..., None], "pred_boxes": found} for logits, found in zip(*asked, strict=True)]
    labels = [{"class_labels": torch.zeros(len(b)).long().to(device), "boxes": b.to(device)} for b in boxes]
    matcher = DeformableDetrHungarianMatcher(*LOSS_WEIGHTS.values())
    criterion = DeformableDetrImageLoss(matcher, num_classes=1, focal_alpha=0.25, losses=["labels", "boxes"])
    terms = criterion({**layers[-1], "auxiliary_outputs": layers[:-1]}, labels)
    here = sum(len(b) for b in boxes)
    share = max(here, 1) / mean_count(here, device)  # the criterion divided by the objects of this process alone
    total = sum(LOSS_WEIGHTS[name.rstrip("_0123456789")] * value for name, value in terms.items())
    assert isinstance(total, Tensor)
    return total * share, {name: float((terms[name] * share).detach()) for name in LOSS_WEIGHTS}


def mean_count(count: int, device: torch.device) -> float:
    """The mean of a count over all processes, at least one in all."""
    everywhere = torch.tensor(float(count), device=device)
    if dist.is_initialized():
        dist.all_reduce(everywhere)
    return max(float(everywhere), 1.0) / processes()[1]
