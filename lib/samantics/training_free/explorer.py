"""What there is to look at: references, what is like a place, truth above predictions."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
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
from samantics.training_free.pipeline import Pipeline

SOURCES = ("dinov2", "clip", "sam2", "sam")  # whose maps are shown
KIND_SHADES = {"correct": "#0072B2", "class": "#E69F00", "location": "#E69F00"}  # other kinds of error: black


def reference_figure(pipeline: Pipeline) -> Figure:
    """The first reference of each class, of 24 classes at most, with the number of its references."""
    groups, names, dataset = pipeline.references[0], pipeline.data.names, pipeline.data.references
    some = list(groups)[:: math.ceil(len(groups) / 24)]
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
    """Images under the names of their true objects and, below, with the results that are rows of `judged`."""
    dataset, names = pipeline.data.targets, pipeline.data.names

    def draw(axis: Axes, what: tuple[str, int]) -> None:
        row, image_id = what
        rles, shades, words, tint = [i.rle for i in dataset.by_image[image_id]], ["#FFFFFF"], list[str](), 0.0
        if row == "predicted":
            found = judged[judged["image_id"] == image_id]
            rles, tint = [results[place]["segmentation"] for place in found.index], 0.2
            shades = [KIND_SHADES.get(kind, "#222222") for kind in found["kind"]]
            words = [names[category] for category in found["category_id"]]
        masks = [mask_of(rle) for rle in rles]
        plots.show_instances(axis, read_image(dataset, image_id), masks=masks, names=words, shades=shades, tint=tint)

    rows = {row: [(row, image_id) for image_id in image_ids] for row in ("truth", "predicted")}
    shown = [Counter(names[i.category_id] for i in dataset.by_image[image_id]).items() for image_id in image_ids]
    titles = ["\n".join(f"{count} {name}" for name, count in some) for some in shown]
    return plots.image_grid(rows, {"truth": titles}, size=1.9, draw=draw)


def likeness_map(encoder: Encoder, image: Image.Image, point: tuple[float, float]) -> NDArray[np.float32]:
    """`(height, width)` cosine of every pixel's feature to that of the pixel at `point` (x, y), not below 0.

    Raises:
        StudyError: the point lies outside the image.
    """
    if not (0 <= point[0] < image.width and 0 <= point[1] < image.height):
        size = f"{image.width}x{image.height}"
        raise StudyError(f"the point {point} lies outside the image of {size} pixels: choose one inside")
    grid = mask_features.dense_maps(encoder, [image])[0]
    geometry = mask_features.uncropped(encoder).preprocess.geometry(*image.size)
    rows, columns = mask_features.resizing(geometry, grid.shape[1:])
    here = mask_features.unit(grid @ columns[int(point[0])] @ rows[int(point[1])])
    cosines = (mask_features.unit(grid.reshape(len(grid), -1).T) @ here).reshape(grid.shape[1:])
    return (rows @ cosines @ columns.T).clip(0, 1)


def likeness_figure(models: Mapping[str, Encoder], image: Image.Image, point: tuple[float, float]) -> Figure:
    """The likeness maps of a point by the models of `SOURCES`, a scale for each: they differ in their cosines."""
    figure = plots.image_grid({"": [image] * (len(SOURCES) + 1)}, size=2.1)
    figure.axes[0].set_title("the place", fontsize=9)
    for axis, name in zip(figure.axes[1:], SOURCES, strict=True):
        values = likeness_map(models[name], image, point)
        axis.imshow(values, cmap="magma", interpolation="bilinear")
        axis.set_title(f"{plots.LABELS[name]}: {values.min():.2f} to 1", fontsize=9, color=plots.COLOURS[name])
    for axis in figure.axes:
        axis.plot(*point, "P", color="white", markeredgecolor="black", markersize=10)
    plots.headline(figure, "Cosine of every place to the marked one (bright: alike)")
    return figure
