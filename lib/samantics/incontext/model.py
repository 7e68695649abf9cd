"""In-context learning on a frozen SAM: the trained network and its losses (the study, section 4).

    reference + box -- SAM --> mask tokens -- fuser MLP --> class embedding --+
    target ----------- SAM --> trunk maps ----------------> deformable DETR <-+--> boxes, "same class as the reference?"

Fuser and DETR are trained, nothing of SAM is. The DETR's parts, matcher and losses are those of `transformers`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss
from transformers import DeformableDetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoder,
    DeformableDetrEncoder,
    DeformableDetrMLPPredictionHead,
    DeformableDetrSinePositionEmbedding,
    inverse_sigmoid,
)

from samantics.incontext.tokens import SamMaps, processes
from samantics.scales import InContextSettings

LOSS_WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}  # also the matcher's costs
CLASS_PRIOR = 0.01  # a query's score at the start: focal loss needs it small (Lin et al. 2017, section 3.3)


class DetrOutput(NamedTuple):
    """Predictions of Q queries for P pairs of an image and a class embedding, at each decoder layer."""

    logits: Tensor  # (layers, P, Q) of "an instance of the reference's class"
    boxes: Tensor  # (layers, P, Q, 4) centre x, centre y, width, height, as shares of the input's side

    def queries(self, start: int | None, end: int | None = None) -> DetrOutput:
        """Only the queries from `start` to `end`."""
        return DetrOutput(self.logits[:, :, start:end], self.boxes[:, :, start:end])


class Memory(NamedTuple):
    """The output of the DETR's encoder for B images."""

    tokens: Tensor  # (B, L * h * w, dim)
    inside: Tensor  # (B, L * h * w) bool, False for padding
    geometry: dict[str, Any]  # the sizes of the L levels, in the three forms that `transformers` asks for


class InContextModel(nn.Module):
    """Fuser and deformable DETR with iterative box refinement (Zhu et al. 2021, arXiv 2010.04159).

    `trunk_width`: channels of SAM's trunk maps; `token_shape`: (T, D) of a reference's mask tokens.
    """

    def __init__(self, settings: InContextSettings, trunk_width: int, token_shape: tuple[int, int]) -> None:
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
        self.hint_content = nn.Parameter(torch.randn(dim))
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

    def forward(self, maps: SamMaps, tokens: Tensor, image: Tensor, hints: Tensor | None = None) -> DetrOutput:
        """Find each reference's class in its image.

        Args:
            maps: of B images.
            tokens: `(P, T, D)` mask tokens, averaged over the references where there are several.
            image: `(P,)` row of each pair's image in `maps`.
            hints: `(P, M, 4)` boxes, as in `DetrOutput`, that M further queries start from, in training only (DN-DETR,
                Li et al. 2022, arXiv 2203.01305). Their outputs come after the other queries', which do not see them.
        """
        return self.decode(self.encode(maps), self.fuser(tokens), image, hints)

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
        return Memory(encoded.last_hidden_state, inside, geometry)

    def decode(self, memory: Memory, embeddings: Tensor, image: Tensor, hints: Tensor | None = None) -> DetrOutput:
        """Boxes and scores from `(P, dim)` class embeddings, each added to every query; else as `forward`."""
        pairs, queries = len(image), len(self.anchors)
        boxes, content, mask = self.anchors.sigmoid().expand(pairs, -1, -1), self.query_content.weight, None
        if hints is not None:
            boxes = torch.cat([boxes, hints], dim=1)
            content = torch.cat([content, self.hint_content.expand(hints.shape[1], -1)])
            mask = content.new_zeros(boxes.shape[1], boxes.shape[1])  # added to the attention
            mask[:, queries:] = -math.inf  # nobody but itself sees a hint
            mask = mask.fill_diagonal_(0.0)[None, None]
        decoded = self.decoder(
            inputs_embeds=content + embeddings[:, None],
            object_queries_position_embeddings=self.place(box_waves(boxes, content.shape[1] // 2)),
            encoder_hidden_states=memory.tokens.index_select(0, image),  # tokens[image] adds gradients in any order
            encoder_attention_mask=memory.inside[image],
            reference_points=boxes,
            valid_ratios=torch.ones(pairs, len(self.level_embedding), 2, device=boxes.device),
            attention_mask=mask,
            **memory.geometry,
        )
        states = decoded.intermediate_hidden_states.unbind(1)
        starts = [boxes, *decoded.intermediate_reference_points.unbind(1)[:-1]]
        logits = [head(state)[..., 0] for head, state in zip(self.class_heads, states, strict=True)]
        moved = [
            (head(state) + inverse_sigmoid(start)).sigmoid()
            for head, state, start in zip(self.box_heads, states, starts, strict=True)
        ]
        return DetrOutput(torch.stack(logits), torch.stack(moved))


def build_model(settings: InContextSettings, sam: Sam, seed: int) -> InContextModel:
    """An untrained model for that SAM, its initialisation seeded."""
    decoder, width = sam.mask_decoder, sam.image_encoder.neck[0].in_channels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return InContextModel(settings, width, (decoder.num_mask_tokens, decoder.transformer_dim)).to(sam.device)


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

    `boxes` are for each pair the `(n, 4)` to be found, as in `DetrOutput`. Divided by the objects to be found in the
    batch of all processes: the mean over processes, which `DistributedDataParallel` takes, is the whole batch's loss.
    """
    device = output.logits.device
    layers = [{"logits": logits[..., None], "pred_boxes": found} for logits, found in zip(*output, strict=True)]
    labels = [{"class_labels": torch.zeros(len(b)).long().to(device), "boxes": b.to(device)} for b in boxes]
    matcher = DeformableDetrHungarianMatcher(*LOSS_WEIGHTS.values())
    criterion = DeformableDetrImageLoss(matcher, num_classes=1, focal_alpha=0.25, losses=["labels", "boxes"])
    terms = criterion({**layers[-1], "auxiliary_outputs": layers[:-1]}, labels)
    here = sum(len(b) for b in boxes)
    share = max(here, 1) / mean_count(here, device)  # the criterion divided by the objects of this process alone
    total = sum(LOSS_WEIGHTS[name.rstrip("_0123456789")] * value for name, value in terms.items())
    assert isinstance(total, Tensor)
    return total * share, {name: float((terms[name] * share).detach()) for name in LOSS_WEIGHTS}


def hint_loss(output: DetrOutput, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """The same three losses for the queries that start at hints; each knows its object, so nothing is matched.

    `output` is of the hints, padded to the longest list; for each pair `boxes` `(m, 4)` are the hints' objects and
    `labels` `(m,)` 1 where the object is of the pair's class, else 0.
    """
    device = output.logits.device
    counts = torch.tensor([len(b) for b in boxes], device=device)
    real = torch.arange(output.logits.shape[-1], device=device) < counts[:, None]
    label, target = torch.cat(list(labels)).to(device), torch.cat(list(boxes)).to(device)
    corners = box_convert(target, "cxcywh", "xyxy")
    total = torch.zeros((), device=device)
    for logits, found in zip(*output, strict=True):
        focal = sigmoid_focal_loss(logits[real], label, alpha=0.25, gamma=2, reduction="sum")
        distance = (found[real] - target).abs().sum()
        giou = generalized_box_iou_loss(box_convert(found[real], "cxcywh", "xyxy"), corners, reduction="sum")
        total = total + sum(w * v for w, v in zip(LOSS_WEIGHTS.values(), (focal, distance, giou), strict=True))
    return total / mean_count(len(target), device)


def mean_count(count: int, device: torch.device) -> float:
    """The mean of a count over all processes, at least one in all."""
    everywhere = torch.tensor(float(count), device=device)
    if dist.is_initialized():
        dist.all_reduce(everywhere)
    return max(float(everywhere), 1.0) / processes()[1]
