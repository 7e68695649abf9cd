"""The pictures of notebook 00: the world, and the four models at work on one scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.nn import functional

from samantics.data import first_world as mojiworld
from samantics.models import pocket
from samantics.models.encoder import Encoder
from samantics.plots import COLOURS, LABELS, headline
from samantics.zoo import quality


def world_figure(pictures: Mapping[str, Sequence[mojiworld.Picture]], title: str) -> Figure:
    """Rows of pictures; outlines show the exact visible masks."""
    columns = max(len(row) for row in pictures.values())
    figure, axes = plt.subplots(
        len(pictures), columns, figsize=(1.6 * columns, 1.75 * len(pictures) + 0.3), squeeze=False
    )
    for line, (name, row) in zip(axes, pictures.items(), strict=True):
        for axis, picture in zip(line, row, strict=False):
            axis.imshow(picture.image)
            for number in range(1, len(picture.drawings) + 1):
                axis.contour(picture.instances == number, [0.5], colors="white", linewidths=0.8)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    headline(figure, title)
    return figure


def object_words(picture: mojiworld.Picture) -> list[str]:
    """Drawing and category of each object."""
    table = mojiworld.catalogue()
    return [f"{table['drawing'][d]} ({table['category'][d]})" for d in picture.drawings]


# ------------------------------------------------------------------------------------------------------ SAM, SAM 2


def clicked_masks(name: str, model: Any, picture: mojiworld.Picture) -> pd.DataFrame:
    """One click at the centre of every object: the mask that the model prefers, its predicted and its true IoU.

    Columns: ``encoder, object, x, y`` (pixels), ``predicted_iou, iou`` (percent) and ``mask`` (H, W) bool.
    """
    masks = np.stack([picture.instances == number for number in range(1, len(picture.drawings) + 1)])
    points = np.stack([quality.centre_of(mask) for mask in masks])
    sam = quality.segmenter(name, model)
    with torch.no_grad():
        embedded = tuple(
            level.expand(len(masks), -1, -1, -1) for level in sam.embed(quality.pixels_of(picture.image[None]))
        )
        logits, predicted = quality.click_masks(sam, embedded, points)
    chosen = predicted.argmax(1)
    ious = quality.iou_with(logits, masks)
    large = functional.interpolate(logits, masks.shape[1:], mode="bilinear", align_corners=False).numpy() > 0
    rows = [
        {"encoder": name, "object": word, "x": int(x), "y": int(y), "predicted_iou": 100 * float(predicted[i, best]),
         "iou": 100 * float(ious[i, best]), "mask": large[i, best]}
        for i, (word, (x, y), best) in enumerate(zip(object_words(picture), points, chosen, strict=True))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def clicks_figure(picture: mojiworld.Picture, found: pd.DataFrame, title: str) -> Figure:
    """A row for each model: its mask (coloured) for a click (star) on each object."""
    names = list(dict.fromkeys(found["encoder"]))
    count = len(picture.drawings)
    figure, axes = plt.subplots(len(names), count, figsize=(1.9 * count, 2.3 * len(names) + 0.3), squeeze=False)
    for line, name in zip(axes, names, strict=True):
        for axis, row in zip(line, found[found["encoder"] == name].to_dict("records"), strict=True):
            axis.imshow(picture.image)
            axis.imshow(np.where(row["mask"][..., None], [*_rgb(COLOURS[name]), 0.65], 0.0))
            axis.plot(row["x"], row["y"], "*", color="white", markeredgecolor="black", markersize=11)
            axis.set_title(f"IoU {row['iou']:.0f} %", fontsize=9, loc="center")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(LABELS[name], color=COLOURS[name], fontweight="bold")
    headline(figure, title)
    return figure


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


# ----------------------------------------------------------------------------------------------------------- CLIP


def ranked_captions(model: Any, picture: mojiworld.Picture, captions: Sequence[str]) -> pd.DataFrame:
    """``caption, similarity`` (cosine) of a picture and each caption, best first."""
    with torch.no_grad():
        image = model.encode_image(quality.pixels_of(picture.image[None]), normalize=True)
        words = model.encode_text(pocket.WordTokenizer()(captions), normalize=True)
    scores = pd.DataFrame({"caption": list(captions), "similarity": (image @ words.T)[0].numpy()})
    return scores.sort_values("similarity", ascending=False, ignore_index=True)


def captions_figure(picture: mojiworld.Picture, ranked: pd.DataFrame, most: int = 8) -> Figure:
    """The picture, and its best captions; bold where the category is in the picture."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4), width_ratios=[1, 1.6])
    left.imshow(picture.image)
    left.set_axis_off()
    shown = {mojiworld.categories()[c] for c in mojiworld.category_of_drawing()[list(picture.drawings)]}
    rows = ranked.head(most)[::-1]
    right.plot(rows["similarity"], rows["caption"], "o", color=COLOURS["clip"], markersize=9)
    for label in right.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().removeprefix("a picture of ") in shown else "normal")
    right.set_xlabel("cosine with the picture (bold: shown)")
    named = ranked["caption"].str.removeprefix("a picture of ").isin(shown)
    places = ", ".join(str(place + 1) for place in np.flatnonzero(named))
    headline(figure, f"CLIP puts what is shown on place {places} of {len(ranked)}")
    return figure


# --------------------------------------------------------------------------------------------------------- DINOv2


def similarity_maps(
    encoders: Mapping[str, Encoder], picture: mojiworld.Picture, x: int, y: int
) -> dict[str, NDArray[Any]]:
    """``(h, w)`` cosine of every token with the token under the pixel ``(x, y)``, for each encoder's last layer."""
    maps = {}
    for name, encoder in encoders.items():
        dense = encoder.encode(quality.pixels_of(picture.image[None]))["final"].dense[0]
        unit = functional.normalize(dense - dense.mean((1, 2), keepdim=True), dim=0)
        side = picture.image.shape[0]
        row, column = y * unit.shape[1] // side, x * unit.shape[2] // side
        maps[name] = torch.einsum("chw,c->hw", unit, unit[:, row, column]).numpy()
    return maps


def similarity_figure(picture: mojiworld.Picture, maps: Mapping[str, NDArray[Any]], x: int, y: int) -> Figure:
    """The picture, clicked on its first object, and each encoder's map: bright tokens resemble the clicked one."""
    figure, axes = plt.subplots(1, len(maps) + 1, figsize=(2.2 * (len(maps) + 1), 2.7))
    axes[0].imshow(picture.image)
    axes[0].plot(x, y, "*", color="white", markeredgecolor="black", markersize=12)
    axes[0].set_title("clicked", loc="center", fontsize=10)
    for axis, (name, values) in zip(axes[1:], maps.items(), strict=True):
        axis.imshow(values, vmin=-0.2, vmax=1, cmap="cividis")
        axis.set_title(LABELS[name], loc="center", color=COLOURS[name])
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
    figure.colorbar(axes[-1].images[0], ax=axes.tolist(), label="cosine", shrink=0.75)
    means = [
        f"{LABELS[name]} {inside:.2f} / {outside:.2f}" for name, (inside, outside) in on_and_off(picture, maps).items()
    ]
    headline(figure, f"Cosine on / off the object: {', '.join(means)}")
    return figure


def on_and_off(
    picture: mojiworld.Picture, maps: Mapping[str, NDArray[Any]], number: int = 1
) -> dict[str, tuple[float, float]]:
    """Each map's mean over the tokens on an object, and over those that it does not touch."""
    means = {}
    for name, values in maps.items():
        patch = picture.image.shape[0] // len(values)
        cover = (picture.instances == number).reshape(len(values), patch, len(values), patch).mean((1, 3))
        means[name] = float(values[cover > 0.5].mean()), float(values[cover == 0].mean())
    return means


def pca_maps(encoders: Mapping[str, Encoder], pictures: Sequence[mojiworld.Picture]) -> dict[str, NDArray[Any]]:
    """``(N, h, w, 3)`` colours, 0-1: the first three principal components of all tokens of N pictures together.

    As DINOv2's authors show their features (Oquab et al. 2023, figure 1), without a threshold on the first component.
    """
    pixels = quality.pixels_of(np.stack([picture.image for picture in pictures]))
    maps = {}
    for name, encoder in encoders.items():
        dense = encoder.encode(pixels)["final"].dense.permute(0, 2, 3, 1)
        tokens = dense.flatten(0, 2) - dense.flatten(0, 2).mean(0)
        directions = torch.linalg.svd(tokens, full_matrices=False).Vh[:3]
        directions = directions * directions.sum(1, keepdim=True).sign()  # a component has no sign of its own
        parts = tokens @ directions.T
        low, high = torch.quantile(parts, torch.tensor([0.02, 0.98]), dim=0)
        maps[name] = ((parts - low) / (high - low)).clamp(0, 1).unflatten(0, dense.shape[:3]).numpy()
    return maps


def between_kinds(colours: NDArray[Any], kinds: int) -> float:
    """Percent of the variance of the pictures' middles that lies between kinds of picture.

    Args:
        colours: ``(N, h, w, 3)`` of :func:`pca_maps`; the N pictures are sorted by kind, as many of each.
    """
    high, wide = colours.shape[1] // 4, colours.shape[2] // 4
    middle = colours[:, high:-high, wide:-wide].mean((1, 2)).reshape(kinds, -1, 3)
    within = middle.var(1).mean(0).sum()
    return float(100 * (1 - within / middle.reshape(-1, 3).var(0).sum()))


def pca_figure(pictures: Sequence[mojiworld.Picture], maps: Mapping[str, NDArray[Any]], title: str) -> Figure:
    """Pictures above, and below a row for each encoder: tokens of one colour are alike to it, in all its pictures."""
    count = len(pictures)
    figure, axes = plt.subplots(len(maps) + 1, count, figsize=(1.4 * count, 1.45 * (len(maps) + 1) + 0.3))
    for axis, picture in zip(axes[0], pictures, strict=True):
        axis.imshow(picture.image)
    for line, (name, colours) in zip(axes[1:], maps.items(), strict=True):
        for axis, tokens in zip(line, colours, strict=True):
            axis.imshow(tokens)
        line[0].set_ylabel(LABELS[name], color=COLOURS[name], fontweight="bold")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
    headline(figure, title)
    return figure


def pca_table(maps: Mapping[str, NDArray[Any]]) -> pd.DataFrame:
    """``encoder, picture, row, column, red, green, blue``: the colours of :func:`pca_figure`."""
    parts = []
    for name, colours in maps.items():
        picture, row, column = np.indices(colours.shape[:3]).reshape(3, -1)
        red, green, blue = colours.reshape(-1, 3).T
        places = {"encoder": name, "picture": picture, "row": row, "column": column}
        parts.append(pd.DataFrame(places | {"red": red, "green": green, "blue": blue}))
    return pd.concat(parts, ignore_index=True)


def map_table(maps: Mapping[str, NDArray[Any]]) -> pd.DataFrame:
    """``encoder, row, column, cosine``: the numbers of a similarity figure."""
    parts = []
    for name, values in maps.items():
        row, column = np.indices(values.shape).reshape(2, -1)
        parts.append(pd.DataFrame({"encoder": name, "row": row, "column": column, "cosine": values.ravel()}))
    return pd.concat(parts, ignore_index=True)
