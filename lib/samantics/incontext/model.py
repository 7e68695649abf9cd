"""In-context learning on a frozen SAM: the trained network and its losses (the study, section 4).

    reference + box -- SAM --> mask tokens -- fuser MLP --> class embedding --+
    target ----------- SAM --> trunk maps ----------------> deformable DETR <-+--> boxes, "same class as the reference?"

Fuser and DETR are trained, nothing of SAM is. The DETR's parts, matcher and losses are those of `transformers`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torchvision.ops import box_convert
from transformers import DeformableDetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.models.deformable_detr import modeling_deformable_detr as detr

from samantics.incontext.tokens import Rows, SamData, SamMaps, box_means, mask_tokens, trunk_blocks
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


class Adapters(nn.Module):
    """Small adapters in SAM's frozen trunk (Houlsby et al. 2019, arXiv 1902.00751): does the gap come from SAM?

    Behind each trunk block that follows the first of `maps` trunk maps, a bottleneck of `width` channels adds to what
    the block says, nothing at the start. They are tuned as the fuser is: on the same questions, by the same losses.
    """

    def __init__(self, sam: Sam, maps: int, width: int) -> None:
        super().__init__()
        self.blocks, dim = trunk_blocks(sam, maps), sam.image_encoder.neck[0].in_channels
        self.layers = nn.ModuleList()
        for _ in sam.image_encoder.blocks[self.blocks[0] + 1 :]:
            up = nn.Linear(width, dim)
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
            self.layers.append(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(), up))

    def forward(self, sam: Sam, maps: SamMaps) -> SamMaps:
        """SAM's maps with the adapters at work, from the first trunk map, which none of them has touched."""
        state, trunk = maps.trunk[:, 0].permute(0, 2, 3, 1), [maps.trunk[:, 0]]
        for number, layer in enumerate(self.layers, start=self.blocks[0] + 1):
            state = sam.image_encoder.blocks[number](state)
            state = state + layer(state)
            if number in self.blocks:
                trunk.append(state.permute(0, 3, 1, 2))
        return SamMaps(torch.stack(trunk, dim=1), sam.image_encoder.neck(state.permute(0, 3, 1, 2)), maps.inside)


@torch.no_grad()
def adapted_data(data: SamData, sam: Sam, adapters: Adapters, rows: Rows | None = None) -> SamData:
    """The data as the adapted SAM sees it; mask tokens only of the objects in `rows`, all others are zero."""

    def maps(images: Rows, mirrored: NDArray[np.bool_] | None = None) -> SamMaps:
        return adapters(sam, data.maps(images, mirrored))

    tokens = np.zeros_like(data.tokens)
    for chosen in [] if rows is None else np.array_split(rows, len(rows) // 32 + 1):
        images = np.unique(data.objects.image[chosen])
        image, boxes = data.objects.among(images, chosen, sam.device)
        tokens[chosen] = mask_tokens(sam, maps(images).neck[image], boxes).numpy(force=True)
    return data._replace(maps=maps, tokens=tokens)


class InContextModel(nn.Module):
    """Fuser and deformable DETR with iterative box refinement (Zhu et al. 2021, arXiv 2010.04159).

    The paper's head reads from the sum of query and class embedding whether both are of one class, which it learns in
    days. Where `settings.naming` is above 0 this is a variant, the study's own: class embeddings and what lies in boxes
    learn to name the base classes, and a query's score is told how well the two agree. A novel class is then compared
    by the base classes that it resembles.
    """

    def __init__(self, settings: InContextSettings, sam: Sam, classes: int) -> None:
        super().__init__()
        trunk_width = sam.image_encoder.neck[0].in_channels
        values = sam.mask_decoder.num_mask_tokens * sam.mask_decoder.transformer_dim  # of a reference's mask tokens
        dim, layers, width = settings.dim, settings.decoder_layers, settings.fuser_width
        config = DeformableDetrConfig(
            d_model=dim, dropout=settings.dropout, num_queries=settings.queries, with_box_refine=True,
            num_feature_levels=settings.trunk_maps,
            encoder_layers=settings.encoder_layers, decoder_layers=layers,
            encoder_attention_heads=settings.heads, decoder_attention_heads=settings.heads,
            encoder_ffn_dim=settings.ffn_width, decoder_ffn_dim=settings.ffn_width,
        )  # fmt: skip
        inner = nn.Linear(values, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        self.fuser = nn.Sequential(nn.Flatten(), *inner, nn.Linear(width, dim))
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(trunk_width, dim, 1), nn.GroupNorm(32, dim)) for _ in range(settings.trunk_maps)
        )
        self.positions = detr.DeformableDetrSinePositionEmbedding(dim // 2, normalize=True)
        self.level_embedding = nn.Parameter(torch.randn(settings.trunk_maps, dim))
        self.encoder = detr.DeformableDetrEncoder(config)
        self.decoder = detr.DeformableDetrDecoder(config)
        self.query_content = nn.Embedding(settings.queries, dim)
        self.place = detr.DeformableDetrMLPPredictionHead(2 * dim, dim, dim, 2)
        self.anchors = nn.Parameter(torch.logit(nn.functional.pad(spread_points(settings.queries), (0, 2), value=0.25)))
        scores = [nn.Linear(dim, 1) for _ in range(layers)]
        boxes = [detr.DeformableDetrMLPPredictionHead(dim, dim, 4, 3) for _ in range(layers)]
        for score, box in zip(scores, boxes, strict=True):  # start with small scores, and with the anchors as boxes
            nn.init.constant_(score.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))
            nn.init.zeros_(box.layers[2].weight)
            nn.init.zeros_(box.layers[2].bias)
        self.class_heads, self.box_heads = nn.ModuleList(scores), nn.ModuleList(boxes)
        self.decoder.bbox_embed = self.box_heads
        self.adapters: Adapters | None = None  # of a second arm, see `InContextStudy.adapted`
        self.naming = settings.naming > 0
        if self.naming:
            wide = settings.trunk_maps * trunk_width
            self.scale = nn.BatchNorm1d(wide, affine=False, momentum=None)  # of SAM's channels, over all steps
            self.look = nn.Sequential(nn.Linear(wide, width), nn.GELU(), nn.Linear(width, dim))
            self.names = nn.Parameter(torch.randn(classes, dim))
            self.gain = nn.Parameter(torch.ones(()))

    def forward(
        self, maps: SamMaps, tokens: Tensor, naming: Sequence[Tensor] | None = None
    ) -> tuple[DetrOutput, Tensor]:
        """Find K classes in each of B images, by their `(B, K, T, D)` mask tokens; and the loss of naming, else 0.

        `naming`: `(N, L * C)` contents of objects, their base classes; `(M, T, D)` tokens of references, theirs.
        """
        asked = self.fuser(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        output = self.decode(self.encode(maps), asked)
        if naming is None:
            return output, tokens.new_zeros(())
        contents, labels, references, classes = naming
        seen, embeddings = self.named(self.look(self.scale(contents))), self.named(self.fuser(references))
        return output, cross_entropy(seen, labels) + cross_entropy(embeddings, classes)

    def looked(self, contents: Tensor) -> Tensor:
        """`(N, dim)` of `(N, L * C)` contents, scaled by what all steps saw: no batch or process depends on another."""
        return self.look(nn.functional.batch_norm(contents, self.scale.running_mean, self.scale.running_var))

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
        queries = len(self.anchors)
        apart = torch.full((classes, queries, classes, queries), -math.inf)
        apart.diagonal(dim1=0, dim2=2)[:] = 0.0
        boxes = self.anchors.sigmoid().repeat(images, classes, 1)  # (B, K * Q, 4): an image's classes share its memory
        decoded = self.decoder(
            inputs_embeds=(self.query_content.weight + embeddings[:, :, None]).flatten(1, 2),
            object_queries_position_embeddings=self.place(box_waves(boxes, dim // 2)),
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=memory.inside,
            reference_points=boxes,
            valid_ratios=torch.ones(images, len(self.level_embedding), 2, device=boxes.device),
            attention_mask=apart.flatten(0, 1).flatten(1).to(boxes)[None, None],
            **memory.geometry,
        )
        starts = [boxes, *decoded.intermediate_reference_points.unbind(1)[:-1]]
        logits, moved = [], []
        for layer, (state, start) in enumerate(zip(decoded.intermediate_hidden_states.unbind(1), starts, strict=True)):
            logits.append(self.class_heads[layer](state)[..., 0].unflatten(1, (classes, -1)))
            box = (self.box_heads[layer](state) + detr.inverse_sigmoid(start)).sigmoid()
            moved.append(box.unflatten(1, (classes, -1)))
        if self.naming:
            image = torch.arange(images, device=boxes.device).repeat_interleave(boxes.shape[1])
            # a box of NaN, which the training refuses, would make roi_align read outside its memory
            corners = box_convert(moved[-1].detach().flatten(0, 2), "cxcywh", "xyxy").nan_to_num()
            contents = self.looked(box_means(memory.maps, image, corners)).view(images, classes, -1, dim)
            logits[-1] = logits[-1] + self.gain * self.agreement(contents, embeddings[:, :, None])
        return DetrOutput(torch.stack(logits), torch.stack(moved))


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

    `boxes`: `(n, 4)` to be found for each of the B * K questions. Divided by the objects in the batch of all processes:
    the mean over processes, which `DistributedDataParallel` takes, is the whole batch's loss.
    """
    device, asked = output.logits.device, DetrOutput(*(part.flatten(1, 2) for part in output))
    layers = [{"logits": logits[..., None], "pred_boxes": found} for logits, found in zip(*asked, strict=True)]
    labels = [{"class_labels": torch.zeros(len(b)).long().to(device), "boxes": b.to(device)} for b in boxes]
    matcher = DeformableDetrHungarianMatcher(*LOSS_WEIGHTS.values())
    criterion = DeformableDetrImageLoss(matcher, num_classes=1, focal_alpha=0.25, losses=["labels", "boxes"])
    terms = criterion({**layers[-1], "auxiliary_outputs": layers[:-1]}, labels)
    here = sum(len(b) for b in boxes)
    everywhere, world = torch.tensor(float(here), device=device), processes()[1]
    if world > 1:
        dist.all_reduce(everywhere)
    share = max(here, 1) / (max(float(everywhere), 1.0) / world)  # the criterion divided by this process's objects
    total = sum(LOSS_WEIGHTS[name.rstrip("_0123456789")] * value for name, value in terms.items())
    assert isinstance(total, Tensor)
    return total * share, {name: float((terms[name] * share).detach()) for name in LOSS_WEIGHTS}


def processes() -> tuple[int, int]:
    """Rank of this process and how many there are (of `torchrun`)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
