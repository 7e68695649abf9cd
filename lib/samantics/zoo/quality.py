"""Is each model of the pocket zoo a good one of its kind? Measured on MojiWorld pictures that no model has seen.

``python -m samantics quality`` measures all and writes the model cards' page, ``assets/zoo/README.md``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn import functional

from samantics.cache import atomic_path
from samantics.data import first_world as mojiworld
from samantics.metrics.intervals import Interval, bootstrap_mean
from samantics.models import pocket
from samantics.probing.linear import linear_probe
from samantics.zoo.objectives import SamObjective, boxes_of, build_objective, caption, normalised

TRAIN_VIEWS = 4  # of each drawing, for the linear probe; one more tests it
DEFAULT_WORLD = mojiworld.World()
STREAM = "quality"  # of pictures: no training, probing or instance data uses it


def quality_table(
    models: Mapping[str, Any], scenes: int = 150, views: int = 2, world: mojiworld.World = DEFAULT_WORLD
) -> pd.DataFrame:
    """All measurements of the given models: ``encoder, measure, value, low, high, n``; percent, but for ranks.

    Args:
        models: by zoo name, as :func:`pocket.load` gives them.
        scenes: unseen scenes for masks, and four times as many pictures for captions.
        views: unseen views of each drawing for the zero-shot and nearest-neighbour figures.
        world: that the pictures are of; its image size is the models'.
    """
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        found: Mapping[str, NDArray[np.float64] | Interval]
        if name in ("sam", "sam2"):
            found = mask_quality(name, model, scenes, world)
        elif name == "clip":
            found = clip_quality(model, 4 * scenes, views, world)
        else:
            found = dinov2_quality(model, views, world)
        for measure, values in found.items():
            interval = values if isinstance(values, Interval) else bootstrap_mean(values)
            count = 1 if isinstance(values, Interval) else len(values)
            rows.append({"encoder": name, "measure": measure, **interval._asdict(), "n": count})
    return pd.DataFrame(rows)


# -------------------------------------------------------------------------------------------------- SAM and SAM 2


def unseen_scenes(count: int, world: mojiworld.World = DEFAULT_WORLD) -> mojiworld.Pictures:
    """Scenes that nothing else uses."""
    make = functools.partial(mojiworld.scene, world, STREAM)
    return mojiworld.render(make, range(count))


@torch.no_grad()
def mask_quality(
    name: str, model: Any, scenes: int, world: mojiworld.World = DEFAULT_WORLD
) -> dict[str, NDArray[np.float64]]:
    """IoU (percent) of every object of unseen scenes: best of three masks from a click at its centre, from a random
    click, the mask with the highest predicted IoU from the centre click, and the mask from its exact box. Beside them
    what the decoder's coarse logits could reach at best: the IoU of the true mask averaged to their cells."""
    sam = segmenter(name, model)
    pictures = unseen_scenes(scenes, world)
    measured: dict[str, list[NDArray[np.float64]]] = {}
    rng = np.random.default_rng(0)
    for image, instances in zip(pictures.images, pictures.instances, strict=True):
        masks = np.stack([instances == number for number in range(1, instances.max() + 1)])
        embedded = tuple(level.expand(len(masks), -1, -1, -1) for level in sam.embed(pixels_of(image[None])))
        centre = click_masks(sam, embedded, np.stack([centre_of(mask) for mask in masks]))
        anywhere = click_masks(sam, embedded, np.stack([any_of(mask, rng) for mask in masks]))
        boxed = sam.decode(embedded, boxes=boxes_of(torch.from_numpy(masks)))[0][:, :1]
        chosen = centre[1].argmax(1)
        ious = iou_with(centre[0], masks)
        results = {
            "click at the centre, best of three masks": ious.max(1),
            "click at the centre, mask that SAM prefers": ious[np.arange(len(masks)), chosen],
            "random click, best of three masks": iou_with(anywhere[0], masks).max(1),
            "box": iou_with(boxed, masks)[:, 0],
            "the true mask at the decoder's resolution": iou_with(coarse_masks(masks, boxed.shape[-1]), masks)[:, 0],
        }
        for measure, values in results.items():
            measured.setdefault(f"IoU (%), {measure}", []).append(100 * values)
    return {measure: np.concatenate(parts) for measure, parts in measured.items()}


def coarse_masks(masks: NDArray[np.bool_], side: int) -> Tensor:
    """``(B, 1, side, side)`` logits of ``(B, S, S)`` masks: positive where more than half of a cell is covered."""
    return functional.adaptive_avg_pool2d(torch.from_numpy(masks).float()[:, None], side) - 0.5


def segmenter(name: str, model: Any) -> SamObjective:
    """The model with the batched decoding that it was trained with."""
    sam = SamObjective(name, pocket.DEFAULT)
    sam.model = model
    return sam.eval()


def click_masks(sam: SamObjective, embedded: tuple[Tensor, ...], points: NDArray[Any]) -> tuple[Tensor, NDArray[Any]]:
    """The three masks of each click ``(B, 2)`` x, y in pixels: logits ``(B, 3, s, s)`` and predicted IoU ``(B, 3)``."""
    clicks = torch.from_numpy(points.astype(np.float32))[:, None]
    logits, iou = sam.decode(embedded, clicks, torch.ones(len(points), 1))
    return logits[:, 1:], iou[:, 1:].numpy()


def centre_of(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """x, y of the pixel farthest from the mask's border: SAM's own evaluation clicks there (its section 7.1)."""
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), mask.shape)
    return np.array([x, y])


def any_of(mask: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """x, y of a random pixel of the mask."""
    y, x = rng.choice(np.argwhere(mask))
    return np.array([x, y])


def iou_with(logits: Tensor, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """``(B, M)`` IoU of M masks (logits of any resolution) with each of ``(B, H, W)`` true ones, at full resolution."""
    found = functional.interpolate(logits, masks.shape[1:], mode="bilinear", align_corners=False).numpy() > 0
    overlap = (found & masks[:, None]).sum((2, 3))
    return overlap / (found | masks[:, None]).sum((2, 3)).clip(min=1)


def pixels_of(images: NDArray[np.uint8]) -> Tensor:
    """``(B, S, S, 3)`` uint8 to what the zoo's encoders take."""
    return normalised(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2))


# ----------------------------------------------------------------------------------------------------------- CLIP


def unseen_views(views: int, world: mojiworld.World = DEFAULT_WORLD) -> mojiworld.Pictures:
    """``views`` object-centric pictures of every drawing that nothing else uses."""
    count = len(mojiworld.catalogue())
    return mojiworld.render(
        lambda index: mojiworld.object_picture(world, STREAM, index, index // views), range(count * views)
    )


@torch.no_grad()
def clip_quality(
    model: Any, pictures: int, views: int, world: mojiworld.World = DEFAULT_WORLD
) -> dict[str, NDArray[np.float64]]:
    """Zero-shot category (train and held-out drawings) and drawing by prompt, and recall of captions (percent).

    A category is asked for by its own name, and by the names of its drawings, of which the best counts for it (as
    CHiLS does, Novack et al. 2023, arXiv 2302.02551): it tells an unknown thing from an unknown word for its kind.
    Beside them what prompts could reach at best: a linear probe taught the categories of the same drawings, whose
    weights take the prompts' place.
    """
    shown = unseen_views(views, world)
    drawings = shown.drawings[:, 0]
    vectors = batched(lambda x: model.encode_image(x, normalize=True), shown.images)

    def called(prompts: list[str]) -> NDArray[np.int64]:
        return (vectors @ model.encode_text(pocket.WordTokenizer()(prompts), normalize=True).T).argmax(1).numpy()

    right = 100.0 * (called(pocket.category_prompts()) == mojiworld.category_of_drawing()[drawings])
    drawing = called(pocket.drawing_prompts())
    by_drawings = 100.0 * (mojiworld.category_of_drawing()[drawing] == mojiworld.category_of_drawing()[drawings])
    held_out = mojiworld.held_out()[drawings]
    make = functools.partial(mojiworld.pretraining_picture, world, stream=STREAM)
    captioned = mojiworld.render(make, range(pictures))
    rng = np.random.default_rng(0)
    texts = [caption(rng, row.tolist()) for row in captioned.drawings]
    words = model.encode_text(pocket.WordTokenizer()(texts), normalize=True)
    similar = batched(lambda x: model.encode_image(x, normalize=True), captioned.images) @ words.T
    ranks = (similar > similar.diagonal()[:, None]).sum(1).numpy()
    return {
        "zero-shot category (%), train drawings": right[~held_out],
        "zero-shot category (%), held-out drawings": right[held_out],
        "linear probe, category of the same drawings (%)": probed(
            lambda x: model.encode_image(x, normalize=True), mojiworld.category_of_drawing(), world
        ),
        "zero-shot category by the drawings' prompts (%), train drawings": by_drawings[~held_out],
        "zero-shot drawing (%)": 100.0 * (drawing == drawings),
        f"caption recall@1 of {pictures} (%)": 100.0 * (ranks < 1),
        f"caption recall@5 of {pictures} (%)": 100.0 * (ranks < 5),
    }


def batched(encode: Any, images: NDArray[np.uint8], size: int = 64) -> Tensor:
    """``(N, C)`` outputs of ``encode`` for all images."""
    return torch.cat([encode(pixels_of(images[start : start + size])) for start in range(0, len(images), size)])


def probed(
    encode: Any, label_of_drawing: NDArray[np.int64], world: mojiworld.World = DEFAULT_WORLD
) -> NDArray[np.float64]:
    """Does a linear probe of ``encode``'s vectors, trained on other views of all drawings, name a view (percent)?"""
    views = mojiworld.classification_pictures(world, TRAIN_VIEWS + 1)
    labels = label_of_drawing[views.drawings[:, 0]].astype(np.int64)
    test = np.arange(len(labels)) % (TRAIN_VIEWS + 1) == TRAIN_VIEWS
    vectors = batched(encode, views.images).numpy()
    classes = int(label_of_drawing.max()) + 1
    found = linear_probe(vectors[~test], labels[~test], vectors[test], labels[test], classes, seeds=(0,))
    return 100.0 * found.top1[0]


# --------------------------------------------------------------------------------------------------------- DINOv2


@torch.no_grad()
def dinov2_quality(
    model: Any, views: int, world: mojiworld.World = DEFAULT_WORLD
) -> dict[str, NDArray[np.float64] | Interval]:
    """Does a linear probe, or the nearest other picture, name the drawing (percent)? Have the features collapsed?"""
    shown = unseen_views(views, world)
    drawings = shown.drawings[:, 0]
    vectors = batched(lambda x: model(x).last_hidden_state[:, 0], shown.images)
    unit = functional.normalize(vectors, dim=1)
    similar = (unit @ unit.T).fill_diagonal_(-2)
    rank = effective_rank(vectors)
    spread = float(unit.std(0).mean() * np.sqrt(unit.shape[1]))
    return {
        "linear probe, drawing (%)": probed(
            lambda x: model(x).last_hidden_state[:, 0], np.arange(len(mojiworld.catalogue())), world
        ),
        "nearest neighbour has the drawing (%)": 100.0 * (drawings[similar.argmax(1).numpy()] == drawings),
        f"effective rank of {vectors.shape[1]}": Interval(rank, rank, rank),
        "spread of unit vectors (1 = uniform, 0 = collapsed)": Interval(spread, spread, spread),
    }


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007), of centred ``(N, C)`` vectors."""
    values = torch.linalg.svdvals(vectors - vectors.mean(0))
    share = values / values.sum()
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))


# ----------------------------------------------------------------------------------------------------- model cards


def cards_page(table: pd.DataFrame) -> str:
    """Markdown: how each model of the zoo was trained and how good it is."""
    lines = [
        "# The pocket zoo: model cards\n",
        "Written by `python -m samantics quality` from the weight files' cards (`*.json`); do not edit.\n",
        "Trained on MojiWorld pictures (drawings: [OpenMoji](https://openmoji.org), CC BY-SA 4.0) and licensed as they",
        "are. For study only: these models know drawings on random backgrounds and nothing else.\n",
    ]
    for name in pocket.NAMES:
        card = pocket.card(name)
        recipe = card["recipe"]
        ended = {k.removeprefix("held_out_"): v for k, v in card["last"].items() if k.startswith("held_out_")}
        lines += [
            f"## {name}\n",
            f"- objective: {' '.join(str(inspect.getdoc(build_objective(name))).split())}",
            f"- pictures seen: {recipe['images']:,} ({recipe['pool']:,} different)",
            f"- batches of {recipe['batch']}, seed {recipe['seed']}, {card['parameters'] / 1e6:.2f} M parameters",
            f"- training: {card['seconds'] / 60:.0f} minutes on {card['machine']}",
            f"- at its end, on unseen pictures: {', '.join(f'{k} {v:.2f}' for k, v in ended.items())}",
            f"- world: {card['world']}",
            f"- SHA-256: `{card['sha256']}`",
            f"- licence: {card['licence']}\n",
            "| on unseen pictures | value | 95 % interval |",
            "|---|---|---|",
        ]
        for row in table[table["encoder"] == name].to_dict("records"):
            lines.append(f"| {row['measure']} | {row['value']:.1f} | {row['low']:.1f} to {row['high']:.1f} |")
        lines.append("")
    return "\n".join(lines)


def write_cards() -> pd.DataFrame:
    """Measure the shipped zoo and write its page; the measurements."""
    table = quality_table({name: pocket.load(name) for name in pocket.NAMES})
    with atomic_path(pocket.ASSETS / "README.md") as temporary:
        temporary.write_text(cards_page(table), encoding="utf-8")
    return table
