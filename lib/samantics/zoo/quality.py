"""Is each model of the pocket zoo a good one of its kind? Measured on MojiWorld pictures that no model has seen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional
from torchvision.ops import masks_to_boxes

from samantics.cache import atomic_path
from samantics.data import first_world as mojiworld
from samantics.metrics.intervals import Interval, bootstrap_mean
from samantics.models import pocket
from samantics.probing.linear import linear_probe
from samantics.zoo.contract import normalised
from samantics.zoo.masks import Sam2Objective, SamObjective
from samantics.zoo.objectives import OBJECTIVES
from samantics.zoo.words import caption

Measures = Mapping[str, NDArray[np.float64] | Interval]
TRAIN_VIEWS = 4  # of each drawing, for the linear probe; one more tests it
DEFAULT_WORLD = mojiworld.World()
CARDS = """# The pocket zoo: model cards

Written by `python -m samantics quality` from the weight files' cards (`*.json`); do not edit.

Trained on MojiWorld pictures (drawings: [OpenMoji](https://openmoji.org), CC BY-SA 4.0) and licensed as they are. For
study only: these models know drawings on random backgrounds and nothing else."""
STREAM = "quality"  # of pictures: no training, probing or instance data uses it


def quality_table(
    models: Mapping[str, Any], scenes: int = 150, views: int = 2, world: mojiworld.World = DEFAULT_WORLD
) -> pd.DataFrame:
    """What pocket models do on unseen pictures: `encoder, measure, value, low, high, n`; percent, but for ranks.

    Args:
        models: by zoo name, as `pocket.load` gives them.
        scenes: unseen scenes for masks, and four times as many pictures for captions.
        views: unseen views of each drawing for the zero-shot and nearest-neighbour figures.
        world: that the pictures are of; its image size is the models'.
    """
    measures: dict[str, Callable[[Any], Measures]] = {
        "sam": lambda model: mask_quality(SamObjective(model=model).eval(), scenes, world),
        "sam2": lambda model: mask_quality(Sam2Objective(model=model).eval(), scenes, world),
        "clip": lambda model: clip_quality(model, 4 * scenes, views, world),
        "dinov2": lambda model: dinov2_quality(model, views, world),
    }
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        for measure, values in measures[name](model).items():
            interval = values if isinstance(values, Interval) else bootstrap_mean(values)
            count = 1 if isinstance(values, Interval) else len(values)
            rows.append({"encoder": name, "measure": measure, **interval._asdict(), "n": count})
    return pd.DataFrame(rows)


def pixels_of(images: NDArray[np.uint8]) -> Tensor:
    """`(B, S, S, 3)` uint8 RGB to `(B, 3, S, S)`, what the zoo's encoders take."""
    return normalised(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2))


def batched(encode: Callable[[Tensor], Tensor], images: NDArray[np.uint8], size: int = 64) -> Tensor:
    """`(N, C)` outputs of `encode` for all images."""
    return torch.cat([encode(pixels_of(images[start : start + size])) for start in range(0, len(images), size)])


def unseen_views(views: int, world: mojiworld.World = DEFAULT_WORLD) -> mojiworld.Pictures:
    """`views` object-centric pictures of every drawing that nothing else uses."""
    count = views * len(mojiworld.catalogue())
    return mojiworld.render(lambda index: mojiworld.object_picture(world, STREAM, index, index // views), range(count))


def probed(
    encode: Callable[[Tensor], Tensor], label_of_drawing: NDArray[np.int64], world: mojiworld.World = DEFAULT_WORLD
) -> NDArray[np.float64]:
    """Does a linear probe of `encode`'s vectors, trained on other views of all drawings, name a view (percent)?"""
    views = mojiworld.classification_pictures(world, TRAIN_VIEWS + 1)
    labels = label_of_drawing[views.drawings[:, 0]].astype(np.int64)
    test = np.arange(len(labels)) % (TRAIN_VIEWS + 1) == TRAIN_VIEWS
    vectors, classes = batched(encode, views.images).numpy(), int(label_of_drawing.max()) + 1
    found = linear_probe(vectors[~test], labels[~test], vectors[test], labels[test], classes, seeds=(0,))
    return 100.0 * found.top1[0]


# ------------------------------------------------------------------------------------------------------------- masks


@torch.no_grad()
def mask_quality(sam: SamObjective, scenes: int, world: mojiworld.World = DEFAULT_WORLD) -> Measures:
    """IoU (percent) of every object of unseen scenes: best of three masks from a click at its centre, from a random
    click, the mask with the highest predicted IoU from the centre click, and the mask from its exact box. Beside them
    what the decoder's coarse logits could reach at best: the IoU of the true mask averaged to their cells."""
    parts, rng = [], np.random.default_rng(0)
    for index in range(scenes):
        picture = mojiworld.scene(world, STREAM, index)
        masks = object_masks(picture)
        image = tuple(level.expand(len(masks), -1, -1, -1) for level in sam.embed(pixels_of(picture.image[None])))
        centre, predicted = click_masks(sam, image, np.stack([centre_of(mask) for mask in masks]))
        random, _ = click_masks(sam, image, np.stack([rng.choice(np.argwhere(mask))[::-1] for mask in masks]))
        boxed = sam.decode(image, boxes=masks_to_boxes(torch.from_numpy(masks)))[0][:, :1]
        best, clicked = predicted.argmax(1), iou_with(centre, masks)
        parts.append(
            {
                "click at the centre, best of three masks": clicked.max(1),
                "click at the centre, mask that SAM prefers": clicked[np.arange(len(masks)), best],
                "random click, best of three masks": iou_with(random, masks).max(1),
                "box": iou_with(boxed, masks)[:, 0],
                "the true mask at the decoder's resolution": iou_with(coarse_masks(masks, boxed.shape[-1]), masks)[
                    :, 0
                ],
            }
        )
    return {f"IoU (%), {measure}": 100 * np.concatenate([part[measure] for part in parts]) for measure in parts[0]}


def object_masks(picture: mojiworld.Picture) -> NDArray[np.bool_]:
    """`(N, S, S)` bool: the visible pixels of each object of a picture."""
    return picture.instances == np.arange(1, len(picture.drawings) + 1)[:, None, None]


def click_masks(sam: SamObjective, image: tuple[Tensor, ...], points: NDArray[Any]) -> tuple[Tensor, NDArray[Any]]:
    """The three masks of one click on each of B embedded images.

    Args:
        sam: in evaluation mode.
        image: of `sam.embed`.
        points: `(B, 2)` x, y in pixels.

    Returns:
        Logits `(B, 3, s, s)` and predicted IoU `(B, 3)`.
    """
    clicks = torch.from_numpy(points.astype(np.float32))[:, None]
    logits, iou = sam.decode(image, clicks, torch.ones(len(points), 1))
    return logits[:, 1:], iou[:, 1:].numpy()


def centre_of(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """x, y of the pixel farthest from the mask's border: SAM's own evaluation clicks there (its section 7.1)."""
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return np.array(np.unravel_index(depth.argmax(), mask.shape)[::-1])


def coarse_masks(masks: NDArray[np.bool_], side: int) -> Tensor:
    """`(B, 1, side, side)` logits of `(B, S, S)` masks: positive where more than half of a cell is covered."""
    return functional.adaptive_avg_pool2d(torch.from_numpy(masks).float()[:, None], side) - 0.5


def iou_with(logits: Tensor, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`(B, M)` IoU of M masks (logits of any resolution) with each of `(B, H, W)` true ones, at full resolution."""
    found = functional.interpolate(logits, masks.shape[1:], mode="bilinear", align_corners=False).numpy() > 0
    overlap = (found & masks[:, None]).sum((2, 3))
    return overlap / (found | masks[:, None]).sum((2, 3)).clip(min=1)


# ------------------------------------------------------------------------------------------------ words, and no words


@torch.no_grad()
def clip_quality(model: Any, pictures: int, views: int, world: mojiworld.World = DEFAULT_WORLD) -> Measures:
    """Zero-shot category (train and held-out drawings) and drawing by prompt, and recall of captions (percent).

    A category is asked for by its own name, and by the names of its drawings, of which the best counts for it (as
    CHiLS does, Novack et al. 2023, arXiv 2302.02551): it tells an unknown thing from an unknown word for its kind.
    Beside them what prompts could reach at best: a linear probe taught the categories of the same drawings, whose
    weights take the prompts' place.
    """
    encode, category = functools.partial(model.encode_image, normalize=True), mojiworld.category_of_drawing()

    def text(prompts: list[str]) -> Tensor:
        return model.encode_text(pocket.WordTokenizer()(prompts), normalize=True)

    shown = unseen_views(views, world)
    drawings, vectors = shown.drawings[:, 0], batched(encode, shown.images)
    by_category = (vectors @ text(pocket.category_prompts()).T).argmax(1).numpy()
    by_drawing = (vectors @ text(pocket.drawing_prompts()).T).argmax(1).numpy()
    right, held_out = by_category == category[drawings], mojiworld.held_out()[drawings]
    captioned = mojiworld.render(
        functools.partial(mojiworld.pretraining_picture, world, stream=STREAM), range(pictures)
    )
    rng = np.random.default_rng(0)
    similar = batched(encode, captioned.images) @ text([caption(rng, row.tolist()) for row in captioned.drawings]).T
    ranks = (similar > similar.diagonal()[:, None]).sum(1).numpy()
    return {
        "zero-shot category (%), train drawings": 100.0 * right[~held_out],
        "zero-shot category (%), held-out drawings": 100.0 * right[held_out],
        "linear probe, category of the same drawings (%)": probed(encode, category, world),
        "zero-shot category by the drawings' prompts (%), train drawings": (
            100.0 * (category[by_drawing] == category[drawings])[~held_out]
        ),
        "zero-shot drawing (%)": 100.0 * (by_drawing == drawings),
        f"caption recall@1 of {pictures} (%)": 100.0 * (ranks < 1),
        f"caption recall@5 of {pictures} (%)": 100.0 * (ranks < 5),
    }


@torch.no_grad()
def dinov2_quality(model: Any, views: int, world: mojiworld.World = DEFAULT_WORLD) -> Measures:
    """Does a linear probe, or the nearest other picture, name the drawing (percent)? Have the features collapsed?"""

    def encode(pixels: Tensor) -> Tensor:
        return model(pixels).last_hidden_state[:, 0]

    shown = unseen_views(views, world)
    drawings, vectors = shown.drawings[:, 0], batched(encode, shown.images)
    unit = functional.normalize(vectors, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1).numpy()
    rank, spread = effective_rank(vectors), float(unit.std(0).mean() * np.sqrt(unit.shape[1]))
    return {
        "linear probe, drawing (%)": probed(encode, np.arange(len(mojiworld.catalogue())), world),
        "nearest neighbour has the drawing (%)": 100.0 * (drawings[nearest] == drawings),
        f"effective rank of {vectors.shape[1]}": Interval(rank, rank, rank),
        "spread of unit vectors (1 = uniform, 0 = collapsed)": Interval(spread, spread, spread),
    }


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007), of centred `(N, C)` vectors."""
    values = torch.linalg.svdvals(vectors - vectors.mean(0))
    share = values / values.sum()
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))


# ------------------------------------------------------------------------------------------------------- model cards


def write_cards() -> pd.DataFrame:
    """Measure the shipped zoo and write its page, `assets/zoo/README.md`: `python -m samantics quality`."""
    table = quality_table({name: pocket.load(name) for name in pocket.NAMES})
    parts = [CARDS]
    for name in pocket.NAMES:
        card, asks = pocket.card(name), OBJECTIVES[name].asks
        facts = {"its objective asks": asks} | {key: card[key] for key in card if key not in ("model", "architecture")}
        told = {
            key: ", ".join(f"{k} {v}" for k, v in x.items()) if isinstance(x, dict) else x for key, x in facts.items()
        }
        parts.append(f"## {name}\n\n" + "\n".join(f"- {key}: {value}" for key, value in told.items()))
        rows = table[table["encoder"] == name].itertuples()
        lines = [f"| {row.measure} | {row.value:.1f} | {row.low:.1f} to {row.high:.1f} |" for row in rows]
        parts.append("\n".join(["| on unseen pictures | value | 95 % interval |", "|---|---|---|", *lines]))
    with atomic_path(pocket.ASSETS / "README.md") as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return table
