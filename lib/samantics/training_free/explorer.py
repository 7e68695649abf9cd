"""Click a place in a target image: what is like it, and what SAM would cut out there. A widget, and its static twin."""

from __future__ import annotations

import functools
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from samantics import plots
from samantics.data.coco import read_image
from samantics.errors import StudyError
from samantics.models.encoder import Encoder
from samantics.training_free import matching
from samantics.training_free.decoder import MASK_THRESHOLD, PointDecoder, encode_image
from samantics.training_free.pipeline import Pipeline

Point = tuple[float, float]
SOURCES = ("dinov2", "clip", "sam2", "sam")  # whose maps are shown; the first one names the masks
CELLS = 12  # clickable patches along a side of the image


def features_at(
    encoder: Encoder, image: Image.Image, masks: NDArray[np.bool_]
) -> tuple[matching.Features, NDArray[np.float32]]:
    """`(N, C)` features of unit length of `(N, height, width)` masks, and the map `(C, h, w)` they are means of."""
    tokens, geometry = matching.dense_maps(encoder, [image])[0], matching.uncropped(encoder).preprocess.geometry
    weights = matching.token_weights(masks, geometry(*image.size), tokens.shape[1:])
    return matching.unit(weights @ tokens.reshape(len(tokens), -1).T), tokens


def likeness_map(encoder: Encoder, image: Image.Image, point: Point) -> NDArray[np.float32]:
    """`(height, width)` cosine of every pixel's feature to that of the pixel at `point` (x, y), not below 0.

    Raises:
        StudyError: the point lies outside the image.
    """
    if not (0 <= point[0] < image.width and 0 <= point[1] < image.height):
        size = f"{image.width}x{image.height}"
        raise StudyError(f"the point {point} lies outside the image of {size} pixels: click inside")
    here = np.zeros((1, image.height, image.width), bool)
    here[0, int(point[1]), int(point[0])] = True
    clicked, tokens = features_at(encoder, image, here)
    cosines = (matching.unit(tokens.reshape(len(tokens), -1).T) @ clicked[0]).reshape(tokens.shape[1:])
    rows, columns = matching.resizing(matching.uncropped(encoder).preprocess.geometry(*image.size), cosines.shape)
    likeness: NDArray[np.float32] = (rows @ cosines @ columns.T).clip(0, 1)
    return likeness


@torch.inference_mode()
def click(pipeline: Pipeline, image_id: int, point: Point) -> tuple[NDArray[np.bool_], pd.DataFrame]:
    """What SAM cuts out at a point (x, y): `(3, height, width)` masks, and `category, score, predicted_iou` of each."""
    image, bank = (
        read_image(pipeline.data.targets, image_id),
        pipeline.bank(SOURCES[0], pipeline.run.scale.pipeline.shots),
    )
    decoder = PointDecoder(encode_image(pipeline.models["sam"].model, image))
    decoded = decoder.decode(np.array([point]))
    low = decoder.low_logits(decoded, torch.ones_like(decoded.predicted_iou, dtype=torch.bool))
    masks = (decoder.image.full_logits(low) > MASK_THRESHOLD).cpu().numpy()
    filled, scores = masks.any((1, 2)), np.zeros((len(masks), len(bank.category_ids)), np.float32)
    if filled.any():
        features, _ = features_at(pipeline.models[SOURCES[0]], image, masks[filled])
        scores[filled] = matching.class_scores(bank, features)
    names = np.where(filled, [pipeline.data.names[bank.category_ids[best]] for best in scores.argmax(1)], "empty")
    quality = decoded.predicted_iou[0].cpu().numpy()
    return masks, pd.DataFrame({"category": names, "score": scores.max(1), "predicted_iou": quality})


def static_view(pipeline: Pipeline, image_id: int, point: Point) -> tuple[Figure, Figure, pd.DataFrame]:
    """The likeness maps of a clicked patch, SAM's three masks at that point, and the table of `click`."""
    image = read_image(pipeline.data.targets, image_id)
    maps = plots.image_grid({"": [image] * (len(SOURCES) + 1)}, size=2.1)
    maps.axes[0].set_title("the clicked patch", fontsize=9)
    for axis, name in zip(maps.axes[1:], SOURCES, strict=True):
        values = likeness_map(pipeline.models[name], image, point)  # a scale for each: models differ in the cosines
        axis.imshow(values, cmap="magma", interpolation="bilinear")
        axis.set_title(f"{plots.LABELS[name]}: {values.min():.2f} to 1", fontsize=9, color=plots.COLOURS[name])
    plots.headline(maps, "Cosine of every place to the clicked patch (bright: alike)")
    found, table = click(pipeline, image_id, point)
    masks = plots.image_grid({"": [image] * len(found)}, size=3.0)
    for axis, mask, row in zip(masks.axes, found, table.itertuples(), strict=True):
        plots.show_instances(axis, image, masks=[mask], tint=0.3)
        axis.set_title(f"predicted IoU {row.predicted_iou:.2f}\n{row.category} ({row.score:.2f})", fontsize=9)
    plots.headline(masks, "One click, three masks, each with its best class")
    for axis in (*maps.axes, *masks.axes):
        axis.plot(*point, "P", color="white", markeredgecolor="black", markersize=10)
    return maps, masks, table


def explore(pipeline: Pipeline, image_id: int) -> None:
    """Show the widget where somebody can click (Jupyter); do nothing in a run without a reader (papermill)."""
    if "JPY_SESSION_NAME" in os.environ:  # Jupyter's servers set it for the kernels that they start
        from IPython.display import display

        display(widget(pipeline, image_id))


def widget(pipeline: Pipeline, image_id: int) -> object:
    """A mosaic of the image's patches as buttons; a click on one draws `static_view` for its centre."""
    import ipywidgets
    from IPython.display import display

    image, output = read_image(pipeline.data.targets, image_id), ipywidgets.Output()

    def clicked(point: Point, _button: object) -> None:
        with output:
            output.clear_output(wait=True)
            for figure in static_view(pipeline, image_id, point)[:2]:
                display(figure)
                plt.close(figure)

    colours = np.asarray(image.resize((CELLS, CELLS), Image.Resampling.BOX)).reshape(-1, 3)
    buttons = []
    for (row, column), colour in zip(np.ndindex(CELLS, CELLS), colours, strict=True):
        point = ((column + 0.5) * image.width / CELLS, (row + 0.5) * image.height / CELLS)
        buttons.append(ipywidgets.Button(layout=ipywidgets.Layout(width="25px", height="25px", margin="0")))
        buttons[-1].style.button_color = "#" + bytes(colour.tolist()).hex()
        buttons[-1].on_click(functools.partial(clicked, point))
    columns = ipywidgets.Layout(grid_template_columns=f"repeat({CELLS}, 26px)")
    return ipywidgets.VBox([ipywidgets.GridBox(buttons, layout=columns), output])
