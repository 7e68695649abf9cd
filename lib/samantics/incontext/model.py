"""In-context learning on a frozen SAM: "find the objects of this reference's class" (the study, section 4).

A reference's box goes through SAM's prompt encoder and the two-way transformer of its mask decoder; the mask tokens
that come out pass the fuser, an MLP, and become the class embedding. It is added to every query of a small deformable
DETR over SAM's intermediate trunk maps of the target image, whose head knows one class: "same class as the
reference". The boxes found prompt SAM's mask decoder. Fuser and DETR are trained, nothing of SAM is.

Everything happens in SAM's input frame: the image's long side fills the square input, the rest is padding. Boxes are
``(x0, y0, x1, y1)`` in its pixels, unless said otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss
from tqdm.auto import tqdm
from transformers import DeformableDetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoder,
    DeformableDetrEncoder,
    DeformableDetrMLPPredictionHead,
    DeformableDetrSinePositionEmbedding,
    inverse_sigmoid,
)

from samantics.cache import atomic_path, remove_leftovers
from samantics.data.coco import CocoDataset
from samantics.errors import StudyError
from samantics.incontext.tokens import FeatureSource, Objects, SamMaps
from samantics.scales import InContextSettings

LOSS_WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}  # also the matcher's costs
CLASS_PRIOR = 0.01  # a query's score at the start: focal loss needs it small (Lin et al. 2017, section 3.3)
RECORD_EVERY = 10  # steps between rows of the loss curve
SAVE_EVERY = 100  # steps between checkpoints


# ------------------------------------------------------------------------------------------------------ the model


class Detections(NamedTuple):
    """What the DETR says of P pairs of an image and a class embedding, at each of its decoder layers.

    Attributes:
        logits: ``(layers, P, Q)`` of "an instance of the reference's class".
        boxes: ``(layers, P, Q, 4)`` centre x, centre y, width, height, as shares of the input's side.
    """

    logits: Tensor
    boxes: Tensor


class InContextModel(nn.Module):
    """The trained part: fuser and deformable DETR (Zhu et al. 2021, arXiv 2010.04159, with iterative box refinement).

    Args:
        settings: sizes.
        trunk_width: channels of SAM's trunk maps.
        token_shape: (T, D) of a reference's mask tokens.
    """

    def __init__(self, settings: InContextSettings, trunk_width: int, token_shape: tuple[int, int]) -> None:
        super().__init__()
        dim, levels, layers = settings.dim, settings.trunk_maps, settings.decoder_layers
        config = detr_config(settings)
        self.fuser = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(token_shape), settings.fuser_width),
            nn.GELU(),
            nn.Linear(settings.fuser_width, settings.fuser_width),
            nn.GELU(),
            nn.Linear(settings.fuser_width, dim),
        )
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(trunk_width, dim, 1), nn.GroupNorm(32, dim)) for _ in range(levels)
        )
        self.positions = DeformableDetrSinePositionEmbedding(dim // 2, normalize=True)
        self.level_embedding = nn.Parameter(torch.randn(levels, dim))
        self.encoder = DeformableDetrEncoder(config)
        self.decoder = DeformableDetrDecoder(config)
        self.query_content = nn.Embedding(settings.queries, dim)
        self.hint_content = nn.Parameter(torch.randn(dim))
        self.place = DeformableDetrMLPPredictionHead(2 * dim, dim, dim, 2)
        self.anchors = nn.Parameter(torch.logit(nn.functional.pad(spread_points(settings.queries), (0, 2), value=0.25)))
        self.class_heads = nn.ModuleList(nn.Linear(dim, 1) for _ in range(layers))
        self.box_heads = nn.ModuleList(DeformableDetrMLPPredictionHead(dim, dim, 4, 3) for _ in range(layers))
        self.decoder.bbox_embed = self.box_heads
        self._reset_heads()

    def _reset_heads(self) -> None:
        """Start with small scores, and with the anchors themselves as boxes."""
        for name, parameter in self.class_heads.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))
        for name, parameter in self.box_heads.named_parameters():
            if ".layers.2." in name:
                nn.init.zeros_(parameter)

    def forward(self, maps: SamMaps, tokens: Tensor, owner: Tensor, hints: Tensor | None = None) -> Detections:
        """Find each reference's class in its image.

        Args:
            maps: of B images.
            tokens: ``(P, T, D)`` mask tokens, averaged over the references where there are several.
            owner: ``(P,)`` row of each pair's image in ``maps``.
            hints: ``(P, M, 4)`` boxes, as :class:`Detections` has them, that M further queries start from; in
                training only. Their answers come behind those of the other queries, which do not see them.
        """
        return self.detect(maps, self.fuser(tokens), owner, hints)

    def detect(self, maps: SamMaps, embeddings: Tensor, owner: Tensor, hints: Tensor | None = None) -> Detections:
        """As :meth:`forward`, from ``(P, dim)`` class embeddings."""
        memory, inside, shapes = self._memory(maps)
        pairs, levels = len(owner), len(shapes)
        boxes, content = self.anchors.sigmoid().expand(pairs, -1, -1), self.query_content.weight
        attention = {}
        if hints is not None:
            boxes = torch.cat([boxes, hints], dim=1)
            content = torch.cat([content, self.hint_content.expand(hints.shape[1], -1)])
            attention["attention_mask"] = hint_mask(len(self.anchors), hints.shape[1]).to(content)
        found = self.decoder(
            inputs_embeds=content + embeddings[:, None],
            object_queries_position_embeddings=self.place(box_waves(boxes, content.shape[1] // 2)),
            encoder_hidden_states=memory.index_select(0, owner),  # memory[owner] adds its gradients in any order
            encoder_attention_mask=inside[owner],
            reference_points=boxes,
            valid_ratios=torch.ones(pairs, levels, 2, device=memory.device),
            **_geometry(shapes, memory.device),
            **attention,
        )
        states = found.intermediate_hidden_states.unbind(1)
        starts = [boxes, *found.intermediate_reference_points.unbind(1)[:-1]]
        logits = [head(state)[..., 0] for head, state in zip(self.class_heads, states, strict=True)]
        moved = [refined(head(state), start) for head, state, start in zip(self.box_heads, states, starts, strict=True)]
        return Detections(torch.stack(logits), torch.stack(moved))

    def _memory(self, maps: SamMaps) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """DETR encoder output ``(B, L * h * w, dim)``, ``inside`` of its tokens, and the (h, w) of each level."""
        batch, levels, _, height, width = maps.trunk.shape
        shape = torch.Size((batch, self.level_embedding.shape[1], height, width))
        grid = self.positions(shape=shape, device=maps.trunk.device, dtype=torch.float32)
        content = [project(level) for project, level in zip(self.projections, maps.trunk.unbind(1), strict=True)]
        places = [grid + level[:, None, None] for level in self.level_embedding]
        inside = maps.inside.flatten(1).repeat(1, levels)
        shapes = [(height, width)] * levels
        memory = self.encoder(
            inputs_embeds=torch.cat([c.flatten(2) for c in content], dim=2).transpose(1, 2),
            attention_mask=inside,
            spatial_position_embeddings=torch.cat([p.flatten(2) for p in places], dim=2).transpose(1, 2),
            valid_ratios=torch.ones(batch, levels, 2, device=inside.device),
            **_geometry(shapes, inside.device),
        ).last_hidden_state
        return memory, inside, shapes


def detr_config(settings: InContextSettings) -> DeformableDetrConfig:
    """The sizes of the DETR's encoder and decoder as `transformers` wants them."""
    return DeformableDetrConfig(
        d_model=settings.dim,
        encoder_layers=settings.encoder_layers,
        decoder_layers=settings.decoder_layers,
        encoder_attention_heads=settings.heads,
        decoder_attention_heads=settings.heads,
        encoder_ffn_dim=settings.ffn_width,
        decoder_ffn_dim=settings.ffn_width,
        num_feature_levels=settings.trunk_maps,
        num_queries=settings.queries,
        dropout=settings.dropout,
        with_box_refine=True,
    )


def spread_points(count: int) -> Tensor:
    """``(count, 2)`` points spread evenly over the unit square: the R2 sequence (Roberts 2018)."""
    plastic = 1.32471795724474602596
    steps = torch.arange(1, count + 1, dtype=torch.float64)[:, None] * torch.tensor([1 / plastic, 1 / plastic**2])
    return ((0.5 + steps) % 1).float()


def refined(offsets: Tensor, start: Tensor) -> Tensor:
    """``(..., 4)`` boxes from a head's offsets and the boxes that it started from."""
    return (offsets + inverse_sigmoid(start)).sigmoid()


def box_waves(boxes: Tensor, width: int) -> Tensor:
    """``(..., 4 * width)`` sines and cosines of the four numbers of boxes (Liu et al. 2022, arXiv 2201.12329)."""
    steps = torch.arange(0, width, 2, device=boxes.device) / width
    angles = boxes[..., None] * (2 * math.pi / 10000**steps)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def hint_mask(queries: int, hints: int) -> Tensor:
    """``(1, 1, N, N)`` to be added to the attention of N = queries + hints: nobody but itself sees a hint."""
    mask = torch.zeros(queries + hints, queries + hints)
    mask[:, queries:] = -math.inf
    return mask.fill_diagonal_(0.0)[None, None]


def _geometry(shapes: list[tuple[int, int]], device: torch.device) -> dict[str, Any]:
    """The levels' sizes in the three forms that `transformers` asks for."""
    sizes = torch.tensor(shapes, device=device)
    begins = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    return {"spatial_shapes": sizes, "spatial_shapes_list": shapes, "level_start_index": begins}


# -------------------------------------------------------------------------------------------------- base and novel


@dataclasses.dataclass(frozen=True)
class Split:
    """Category ids seen in tuning (base) and never labelled in it (novel), each ascending."""

    base: tuple[int, ...]
    novel: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """Every category id, ascending."""
        return tuple(sorted(self.base + self.novel))


def split_categories(dataset: CocoDataset, novel: Sequence[str]) -> Split:
    """Base and novel categories from the names of the novel ones.

    Raises:
        StudyError: the data set has no category of a name, or no base category is left.
    """
    ids = {name: number for number, name in dataset.categories.items()}
    unknown = [name for name in novel if name not in ids]
    if unknown:
        raise StudyError(
            f"{dataset.path} has no category {unknown[0]!r}: correct the list of novel categories in scales.py"
        )
    chosen = {ids[name] for name in novel}
    base = tuple(sorted(set(dataset.categories) - chosen))
    if not base or not chosen:
        raise StudyError(
            f"{dataset.path} leaves {len(base)} base and {len(chosen)} novel categories: at least one of each is needed"
        )
    return Split(base, tuple(sorted(chosen)))


def draw_references(
    objects: Objects, category_ids: Sequence[int], shots: int, seed: int, min_area: float
) -> NDArray[np.int64]:
    """``(C, shots)`` rows of randomly drawn reference objects, those of a category from as many images.

    The first references of a seed are the same for every number of shots.

    Raises:
        StudyError: a category has too few objects that are large enough, in distinct images.
    """
    chosen = []
    for category in category_ids:
        rng = np.random.default_rng([seed, category])
        rows = rng.permutation(np.flatnonzero((objects.categories == category) & usable(objects, min_area)))
        _, first = np.unique(objects.image[rows], return_index=True)
        if len(first) < shots:
            raise StudyError(
                f"category {category} has references in {len(first)} images and {shots} are needed: "
                "add images to the reference data or ask for fewer shots"
            )
        chosen.append(rows[np.sort(first)[:shots]])
    return np.stack(chosen)


def usable(objects: Objects, min_area: float) -> NDArray[np.bool_]:
    """``(R,)`` which objects may be a reference: no crowds, nothing smaller than ``min_area`` pixels."""
    return ~objects.crowd & (objects.area >= min_area)


# -------------------------------------------------------------------------------------------------------- training


class Questions(NamedTuple):
    """What a training step asks of B images.

    Attributes:
        rows: ``(B,)`` of the images.
        owner: ``(P,)`` position of each question's image in ``rows``.
        references: for each question the rows of its reference objects.
        answers: for each question the ``(n, 4)`` boxes to be found, as :class:`Detections` has them.
        hints: for each question ``(m, 4)`` roughly the boxes of the image's base objects.
        truths: ``(m, 4)`` those boxes exactly.
        same: ``(m,)`` 1 where the object is of the class that is asked for, else 0.
        mirrored: ``(B,)`` which images are mirrored; all boxes are those of the mirror image then.
    """

    rows: NDArray[np.int64]
    owner: Tensor
    references: list[NDArray[np.int64]]
    answers: list[Tensor]
    hints: list[Tensor]
    truths: list[Tensor]
    same: list[Tensor]
    mirrored: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Lesson:
    """All that training needs besides the model.

    Attributes:
        source, objects, tokens: SAM's maps of the training images, their objects, and the objects' mask tokens.
        base: ids of the base categories; objects of others never answer a question and are never a reference.
        input_size: side of SAM's input, pixels.
        seed: of the order of images, the questions and (with :func:`build_model`) the initialisation.
    """

    source: FeatureSource
    objects: Objects
    tokens: NDArray[np.float16]
    base: tuple[int, ...]
    input_size: int
    settings: InContextSettings
    seed: int = 0

    @functools.cached_property
    def images(self) -> NDArray[np.int64]:
        """Rows of the images that show a base category: only they can be asked something."""
        return np.unique(self.objects.image[np.isin(self.objects.categories, self.base) & ~self.objects.crowd])

    @property
    def steps(self) -> int:
        """Training steps in all."""
        return max(1, round(self.settings.epochs * len(self.images) / self.settings.batch))

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """The images of a step: every epoch goes through all of them in an order of its own."""
        images, size = self.images, self.settings.batch
        if len(images) < size:
            raise StudyError(f"{len(images)} images show a base category, fewer than a batch of {size}: add images")
        per_epoch = len(images) // size
        order = np.random.default_rng([self.seed, step // per_epoch]).permutation(images)
        return order[step % per_epoch * size :][:size]

    def questions(self, rows: NDArray[np.int64], step: int) -> Questions:
        """For each image some of its base categories and ``absent_classes`` others, each with a reference elsewhere.

        Raises:
            StudyError: a category has no reference in another image.
        """
        nobody = np.zeros(len(rows), bool)
        asked = Questions(rows, torch.empty(0, dtype=torch.int64), [], [], [], [], [], nobody)
        owner = []
        for position, row in enumerate(rows):
            rng = np.random.default_rng([self.seed, step, int(row)])  # of the image: no process depends on another
            mine = np.flatnonzero((self.objects.image == row) & ~self.objects.crowd & self._is_base)
            present = np.unique(self.objects.categories[mine])
            chosen = rng.permutation(present)[: self.settings.classes_per_image]
            others = rng.permutation(np.setdiff1d(self.base, present))[: self.settings.absent_classes]
            corners = self.objects.boxes[mine]
            if rng.random() < self.settings.flip:
                asked.mirrored[position] = True
                corners = corners.copy()
                corners[:, [2, 0]] = self.objects.right[mine, None] - corners[:, [0, 2]]
            boxes = box_convert(torch.from_numpy(corners) / self.input_size, "xyxy", "cxcywh")
            hinted = np.tile(np.arange(len(mine)), self.settings.hints)
            for category in (*chosen, *others):
                owner.append(position)
                asked.references.append(self._references(int(category), int(row), rng))
                same = torch.from_numpy(self.objects.categories[mine] == category)
                asked.answers.append(boxes[same])
                asked.hints.append(shaken(boxes[hinted], rng))
                asked.truths.append(boxes[hinted])
                asked.same.append(same[hinted].float())
        return asked._replace(owner=torch.tensor(owner))

    @functools.cached_property
    def _is_base(self) -> NDArray[np.bool_]:
        return np.isin(self.objects.categories, self.base)

    def _references(self, category: int, row: int, rng: np.random.Generator) -> NDArray[np.int64]:
        fits = (self.objects.categories == category) & (self.objects.image != row)
        found = np.flatnonzero(fits & usable(self.objects, self.settings.min_reference_area))
        if not found.size:
            raise StudyError(
                f"category {category} has no reference outside image row {row}: add images or make it novel"
            )
        return rng.choice(found, rng.integers(1, self.settings.references_per_question + 1))

    def averaged_tokens(self, references: Sequence[NDArray[np.int64]]) -> Tensor:
        """``(P, T, D)`` mask tokens of each question, averaged over its references."""
        return torch.stack([torch.from_numpy(self.tokens[rows].astype(np.float32).mean(0)) for rows in references])


def shaken(boxes: Tensor, rng: np.random.Generator) -> Tensor:
    """``(m, 4)`` boxes, centres moved by up to a fifth of the side and sides scaled by 0.6 to 1.4 (as DN-DETR does it).

    Li et al. 2022, arXiv 2203.01305: queries that start near an object learn what it is long before the others find it.
    """
    noise = torch.from_numpy(rng.uniform(-1, 1, boxes.shape)).float()
    centres = boxes[:, :2] + 0.2 * noise[:, :2] * boxes[:, 2:]
    return torch.cat([centres, boxes[:, 2:] * (1 + 0.4 * noise[:, 2:])], dim=1).clamp(0.01, 0.99)


def build_model(settings: InContextSettings, sam: Sam, seed: int) -> InContextModel:
    """An untrained model for that SAM, its initialisation seeded."""
    decoder = sam.mask_decoder
    width = sam.image_encoder.neck[0].in_channels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = InContextModel(settings, width, (decoder.num_mask_tokens, decoder.transformer_dim))
    return model.to(sam.device)


def loss_of(detections: Detections, answers: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Focal + L1 + GIoU loss after Hungarian matching, summed over decoder layers; and the last layer's three terms.

    Normalised by the objects to be found in the batch of all processes, so that the mean over processes, which
    ``DistributedDataParallel`` takes, is the loss of the whole batch.
    """
    device = detections.logits.device
    layers: list[dict[str, Tensor]] = [
        {"logits": logits[..., None], "pred_boxes": boxes}
        for logits, boxes in zip(detections.logits, detections.boxes, strict=True)
    ]
    labels = [
        {"class_labels": torch.zeros(len(a), dtype=torch.int64, device=device), "boxes": a.to(device)} for a in answers
    ]
    matcher = DeformableDetrHungarianMatcher(*(LOSS_WEIGHTS[name] for name in LOSS_WEIGHTS))
    criterion = DeformableDetrImageLoss(matcher, num_classes=1, focal_alpha=0.25, losses=["labels", "boxes"])
    terms = criterion({**layers[-1], "auxiliary_outputs": layers[:-1]}, labels)
    here = sum(len(a) for a in answers)
    share = max(here, 1) / per_process(here, device)  # the criterion divided by the objects of this process alone
    total = sum(LOSS_WEIGHTS[name.rstrip("_0123456789")] * value for name, value in terms.items())
    assert isinstance(total, Tensor)
    return total * share, {name: float((terms[name] * share).detach()) for name in LOSS_WEIGHTS}


def per_process(count: int, device: torch.device) -> float:
    """The mean of a count over all processes, at least one in all."""
    everywhere, world = torch.tensor(float(count), device=device), 1
    if dist.is_initialized():
        dist.all_reduce(everywhere)
        world = dist.get_world_size()
    return max(float(everywhere), 1.0) / world


def hint_loss(detections: Detections, truths: Sequence[Tensor], same: Sequence[Tensor]) -> Tensor:
    """The same three losses for the queries that start at hints; each knows its object, so nothing is matched.

    Args:
        detections: of the hints, padded to the longest list.
        truths, same: see :class:`Questions`.
    """
    device = detections.logits.device
    real = torch.zeros(detections.logits.shape[1:], dtype=torch.bool, device=device)
    for row, boxes in zip(real, truths, strict=True):
        row[: len(boxes)] = True
    labels, target = torch.cat(list(same)).to(device), torch.cat(list(truths)).to(device)
    corners = box_convert(target, "cxcywh", "xyxy")
    total = torch.zeros((), device=device)
    for logits, boxes in zip(detections.logits, detections.boxes, strict=True):
        focal = sigmoid_focal_loss(logits[real], labels, alpha=0.25, gamma=2, reduction="sum")
        distance = (boxes[real] - target).abs().sum()
        giou = generalized_box_iou_loss(box_convert(boxes[real], "cxcywh", "xyxy"), corners, reduction="sum")
        total = total + sum(w * v for w, v in zip(LOSS_WEIGHTS.values(), (focal, distance, giou), strict=True))
    return total / per_process(len(target), device)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where training is saved, and what it must have been trained with to be used.

    Attributes:
        path: of the file.
        identity: JSON-able values by name: settings, split, hashes of data and weights, seed.
    """

    path: Path
    identity: dict[str, Any]

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """What was saved, or None where nothing was.

        Raises:
            StudyError: the file is damaged, or was trained with something else.
        """
        if not self.path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
            saved = state["identity"]
        except Exception as error:  # torch.load raises nearly anything on a damaged file
            raise StudyError(f"{self.path} is damaged: remove it, and training starts anew") from error
        changed = [name for name in self.identity if saved.get(name) != self.identity[name]]
        if changed:
            raise StudyError(
                f"{self.path} was trained with another {changed[0]} ({saved.get(changed[0])!r}, now "
                f"{self.identity[changed[0]]!r}): remove it or train under another name"
            )
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file, whole."""
        with atomic_path(self.path) as temporary:
            torch.save(state | {"identity": self.identity}, temporary)


def train(model: InContextModel, lesson: Lesson, checkpoint: Checkpoint) -> pd.DataFrame:
    """Train to the end, from the checkpoint's step if there is one. Returns the loss curve, one row each few steps.

    Under ``torchrun`` (an initialised process group) every process takes its share of each step's images.

    Raises:
        StudyError: the checkpoint belongs to another training; the loss is not finite.
    """
    settings, device = lesson.settings, next(model.parameters()).device
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    remove_leftovers(checkpoint.path.parent)
    state = checkpoint.load(device)
    first, curve = 0, []
    if state is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, curve = state["step"], state["curve"]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    trained = DistributedDataParallel(model) if world > 1 else model
    bar = tqdm(
        range(first, lesson.steps), initial=first, total=lesson.steps, desc="training", unit="step", disable=rank > 0
    )
    for step in bar:
        terms = _train_step(trained, optimiser, lesson, step, rank, world)
        if step % RECORD_EVERY == 0 or step + 1 == lesson.steps:
            curve.append({"step": step, **terms})
            bar.set_postfix(loss=f"{terms['loss']:.2f}")
        if rank == 0 and ((step + 1) % SAVE_EVERY == 0 or step + 1 == lesson.steps):
            done = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1, "curve": curve}
            checkpoint.save(done)
    model.eval()
    return pd.DataFrame(curve)


def _train_step(
    model: nn.Module, optimiser: torch.optim.Optimizer, lesson: Lesson, step: int, rank: int, world: int
) -> dict[str, float]:
    """One step; its loss and the loss's terms, over all processes."""
    settings, device = lesson.settings, next(model.parameters()).device
    for group in optimiser.param_groups:
        group["lr"] = settings.learning_rate * learning_rate_share(step, lesson.steps)
    model.train()
    torch.manual_seed(lesson.seed * 1_000_003 + step)  # of dropout, the same after a resumption
    asked = lesson.questions(lesson.rows_of(step)[rank::world], step)
    tokens, hints = lesson.averaged_tokens(asked.references).to(device), None
    if settings.hints:
        hints = nn.utils.rnn.pad_sequence(asked.hints, batch_first=True, padding_value=0.5).to(device)
    maps = lesson.source.read(asked.rows, asked.mirrored)
    detections = model(maps, tokens, asked.owner.to(device), hints)
    if not torch.isfinite(detections.boxes).all():
        raise StudyError(f"the model's boxes are not finite at step {step}: lower the learning rate in scales.py")
    loss, terms = loss_of(Detections(*(part[:, :, : settings.queries] for part in detections)), asked.answers)
    if settings.hints:
        hinted = Detections(*(part[:, :, settings.queries :] for part in detections))
        loss = loss + hint_loss(hinted, asked.truths, asked.same)
    values = torch.tensor([loss.item(), *terms.values()], device=device)
    if world > 1:
        dist.all_reduce(values)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimiser.step()
    return dict(zip(["loss", *terms], (values / world).tolist(), strict=True))


def learning_rate_share(step: int, steps: int) -> float:
    """The paper's schedule: the full rate for four fifths of the steps, then a tenth."""
    return 1.0 if step < 0.8 * steps else 0.1
