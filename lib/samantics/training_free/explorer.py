"""What there is to look at: references, what is like a place and what SAM cuts out there, truth above predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from samantics import plots
from samantics.data.coco import Instance, mask_of, read_image
from samantics.errors import StudyError
from samantics.metrics.coco_ap import Result
from samantics.models.encoder import Encoder
from samantics.training_free import mask_features
from samantics.training_free.decoder import MASK_THRESHOLD, PointDecoder, encode_image
from samantics.training_free.matching import class_scores
from samantics.training_free.pipeline import Pipeline

Point = tuple[float, float]
SOURCES = ("dinov2", "clip", "sam2", "sam")  # whose maps are shown
KIND_SHADES = {"correct": "#0072B2", "class": "#E69F00", "location": "#E69F00"}  # other kinds of error: black


def reference_figure(pipeline: Pipeline, most: int = 24) -> Figure:
    """The first reference of each class, or of so many of them, with the number of its references."""
    groups, names, dataset = pipeline.references[0], pipeline.data.names, pipeline.data.references
    some = list(groups)[:: -(-len(groups) // most)]
    rows = {" " * start: some[start : start + 8] for start in range(0, len(some), 8)}

    def draw(axis: Axes, instance: Instance) -> None:
        x0, y0, x1, y1 = instance.box
        margin = 0.4 * max(x1 - x0, y1 - y0)
        plots.show_instances(axis, read_image(dataset, instance.image_id), masks=[mask_of(instance.rle)], tint=0)
        axis.set(xlim=(x0 - margin, x1 + margin), ylim=(y1 + margin, y0 - margin))

    shown = {row: [groups[c][0] for c in part] for row, part in rows.items()}
    titles = {row: [fill(f"{names[c]} ({len(groups[c])})", 16) for c in part] for row, part in rows.items()}
    return plots.image_grid(shown, titles, draw=draw)


def gallery_figure(
    pipeline: Pipeline, results: Sequence[Result], judged: pd.DataFrame, image_ids: Sequence[int]
) -> Figure:
    """Images with their true objects and, below, with the results that are rows of `judged` (see `verdicts`)."""
    dataset, names = pipeline.data.targets, pipeline.data.names

    def draw(axis: Axes, what: tuple[str, int]) -> None:
        row, image_id = what
        objects, found = dataset.by_image[image_id], judged[judged["image_id"] == image_id]
        masks, shades = [i.rle for i in objects], ["#DDDDDD"]
        words = [names[i.category_id] for i in objects]
        if row == "predicted":
            masks = [results[place]["segmentation"] for place in found.index]
            shades = [KIND_SHADES.get(kind, "#222222") for kind in found["kind"]]
            words = [names[category] for category in found["category_id"]]
        tint = 0.2 * (row == "predicted")
        decoded = [mask_of(rle) for rle in masks]
        plots.show_instances(axis, read_image(dataset, image_id), masks=decoded, names=words, shades=shades, tint=tint)

    rows = {row: [(row, image_id) for image_id in image_ids] for row in ("truth", "predicted")}
    return plots.image_grid(rows, {"truth": [str(n) for n in image_ids]}, size=1.9, draw=draw)


def features_at(
    encoder: Encoder, image: Image.Image, masks: NDArray[np.bool_]
) -> tuple[mask_features.Features, NDArray[np.float32]]:
    """`(N, C)` features of unit length of `(N, height, width)` masks, and the map `(C, h, w)` they are means of."""
    tokens = mask_features.dense_maps(encoder, [image])[0]
    geometry = mask_features.uncropped(encoder).preprocess.geometry(*image.size)
    weights = mask_features.token_weights(masks, geometry, tokens.shape[1:])
    return mask_features.unit(weights @ tokens.reshape(len(tokens), -1).T), tokens


def likeness_map(encoder: Encoder, image: Image.Image, point: Point) -> NDArray[np.float32]:
    """`(height, width)` cosine of every pixel's feature to that of the pixel at `point` (x, y), not below 0.

    Raises:
        StudyError: the point lies outside the image.
    """
    if not (0 <= point[0] < image.width and 0 <= point[1] < image.height):
        size = f"{image.width}x{image.height}"
        raise StudyError(f"the point {point} lies outside the image of {size} pixels: choose one inside")
    here = np.zeros((1, image.height, image.width), bool)
    here[0, int(point[1]), int(point[0])] = True
    there, tokens = features_at(encoder, image, here)
    cosines = (mask_features.unit(tokens.reshape(len(tokens), -1).T) @ there[0]).reshape(tokens.shape[1:])
    geometry = mask_features.uncropped(encoder).preprocess.geometry(*image.size)
    rows, columns = mask_features.resizing(geometry, cosines.shape)
    likeness: NDArray[np.float32] = (rows @ cosines @ columns.T).clip(0, 1)
    return likeness


@torch.inference_mode()
def masks_at(pipeline: Pipeline, image_id: int, point: Point, source: str) -> tuple[NDArray[np.bool_], pd.DataFrame]:
    """SAM's `(3, height, width)` masks at a point (x, y), and `category, score, predicted_iou` of each, by `source`."""
    image, bank = read_image(pipeline.data.targets, image_id), pipeline.bank(source, pipeline.run.scale.pipeline.shots)
    decoder = PointDecoder(encode_image(pipeline.models["sam"].model, image))
    decoded = decoder.decode(np.array([point]))
    low = decoder.low_logits(decoded, torch.ones_like(decoded.predicted_iou, dtype=torch.bool))
    masks = (decoder.image.full_logits(low) > MASK_THRESHOLD).cpu().numpy()
    filled, scores = masks.any((1, 2)), np.zeros((len(masks), len(bank.category_ids)), np.float32)
    if filled.any():
        scores[filled] = class_scores(bank, features_at(pipeline.models[source], image, masks[filled])[0])
    names = np.where(filled, [pipeline.data.names[bank.category_ids[best]] for best in scores.argmax(1)], "empty")
    quality = decoded.predicted_iou[0].cpu().numpy()
    return masks, pd.DataFrame({"category": names, "score": scores.max(1), "predicted_iou": quality})


def static_view(
    pipeline: Pipeline, image_id: int, point: Point, source: str = "dinov2"
) -> tuple[Figure, Figure, pd.DataFrame]:
    """The likeness maps of a point, SAM's three masks there, and the table of `masks_at`."""
    image = read_image(pipeline.data.targets, image_id)
    maps = plots.image_grid({"": [image] * (len(SOURCES) + 1)}, size=2.1)
    maps.axes[0].set_title("the place", fontsize=9)
    for axis, name in zip(maps.axes[1:], SOURCES, strict=True):
        values = likeness_map(pipeline.models[name], image, point)  # a scale for each: models differ in the cosines
        axis.imshow(values, cmap="magma", interpolation="bilinear")
        axis.set_title(f"{plots.LABELS[name]}: {values.min():.2f} to 1", fontsize=9, color=plots.COLOURS[name])
    plots.headline(maps, "Cosine of every place to the marked one (bright: alike)")
    found, table = masks_at(pipeline, image_id, point, source)
    masks = plots.image_grid({"": [image] * len(found)}, size=3.0)
    for axis, mask, row in zip(masks.axes, found, table.itertuples(), strict=True):
        plots.show_instances(axis, image, masks=[mask], tint=0.3)
        axis.set_title(f"predicted IoU {row.predicted_iou:.2f}\n{row.category} ({row.score:.2f})", fontsize=9)
    plots.headline(masks, "One point, three masks, each with its best class")
    for axis in (*maps.axes, *masks.axes):
        axis.plot(*point, "P", color="white", markeredgecolor="black", markersize=10)
    return maps, masks, table


def explore(pipeline: Pipeline, image_id: int, source: str) -> None:
    """Two sliders that move the point, where somebody can (Jupyter); nothing in a run without a reader (papermill)."""
    if "JPY_SESSION_NAME" in os.environ:  # Jupyter's servers set it for the kernels that they start
        from ipywidgets import interact_manual

        record = pipeline.data.targets.images[image_id]

        def view(x: int, y: int) -> None:
            static_view(pipeline, image_id, (x, y), source)

        interact_manual(view, x=(0, record.width - 1), y=(0, record.height - 1))
