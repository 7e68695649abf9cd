"""Click a place in a target image: what is like it, and what SAM would cut out there. A widget, and its static twin."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from samantics.data.coco import read_image
from samantics.errors import StudyError
from samantics.models.encoder import Encoder
from samantics.training_free.decoder import MASK_THRESHOLD, PointDecoder, encode_image
from samantics.training_free.figures import click_figure, likeness_figure
from samantics.training_free.matching import MatchSettings, class_scores, dense_maps, token_weights, uncropped, unit
from samantics.training_free.pipeline import Pipeline

Point = tuple[float, float]
CELLS = 12  # clickable patches along a side of the image


def likeness_map(encoder: Encoder, image: Image.Image, point: Point) -> NDArray[np.float32]:
    """``(height, width)`` cosine of every pixel's feature to that of the pixel at ``point`` (x, y), not below 0.

    Raises:
        StudyError: the point lies outside the image.
    """
    if not (0 <= point[0] < image.width and 0 <= point[1] < image.height):
        raise StudyError(
            f"the point {point} lies outside the image of {image.width}x{image.height} pixels: click inside"
        )
    tokens = dense_maps(encoder, [image])[0]
    grid = (tokens.shape[1], tokens.shape[2])
    features = unit(tokens.reshape(len(tokens), -1).T)
    here = np.zeros((1, image.height, image.width), bool)
    here[0, int(point[1]), int(point[0])] = True
    geometry = uncropped(encoder).preprocess.geometry(*image.size)
    clicked = unit(token_weights(here, geometry, grid) @ features)[0]
    whole = torch.from_numpy((features @ clicked).reshape(1, 1, *grid))
    seen = geometry.seen
    side = torch.nn.functional.interpolate(whole, (geometry.size, geometry.size), mode="bilinear", align_corners=False)
    cut = side[..., seen[1] : seen[3], seen[0] : seen[2]]
    shown = torch.nn.functional.interpolate(cut, (image.height, image.width), mode="bilinear", align_corners=False)
    return shown[0, 0].numpy().clip(0, 1)


@dataclasses.dataclass(frozen=True)
class Clicked:
    """SAM's three masks at a point.

    Attributes:
        masks: ``(3, height, width)``.
        predicted_iou: ``(3,)``.
        classes: name and score of the best class of each; an empty mask has none.
    """

    masks: NDArray[np.bool_]
    predicted_iou: NDArray[np.float32]
    classes: tuple[tuple[str, float], ...]


@torch.inference_mode()
def click(pipeline: Pipeline, image_id: int, point: Point, source: str = "dinov2") -> Clicked:
    """What SAM cuts out at a point (x, y), and which class the references give each mask."""
    image = read_image(pipeline.data.targets, image_id)
    encoded = encode_image(pipeline.models["sam"].model, image)
    decoder = PointDecoder(encoded)
    decoded = decoder.decode(np.array([point]))
    low = decoder.low_logits(decoded, torch.ones(1, 3, dtype=torch.bool, device=decoded.predicted_iou.device))
    masks = (encoded.full_logits(low) > MASK_THRESHOLD).transpose(1, 2).cpu().numpy()
    names = tuple(_named(pipeline, image, mask, source) for mask in masks)
    return Clicked(masks, decoded.predicted_iou[0].cpu().numpy(), names)


def _named(pipeline: Pipeline, image: Image.Image, mask: NDArray[np.bool_], source: str) -> tuple[str, float]:
    if not mask.any():
        return "empty", 0.0
    encoder = pipeline.models[source]
    tokens = dense_maps(encoder, [image])[0]
    geometry = uncropped(encoder).preprocess.geometry(*image.size)
    weights = token_weights(mask[None], geometry, (tokens.shape[1], tokens.shape[2]))
    bank = pipeline.bank(source, pipeline.run.scale.pipeline.shots)
    scores = class_scores(bank, unit(weights @ tokens.reshape(len(tokens), -1).T), MatchSettings())[0]
    best = int(scores.argmax())
    return pipeline.data.names[bank.category_ids[best]], float(scores[best])


def static_view(
    pipeline: Pipeline, image_id: int, point: Point, sources: Sequence[str] = ("dinov2", "clip", "sam2", "sam")
) -> tuple[Figure, Figure, Clicked]:
    """The likeness maps of a clicked patch, and SAM's three masks at that point with scores and classes."""
    image = read_image(pipeline.data.targets, image_id)
    maps = {name: likeness_map(pipeline.models[name], image, point) for name in sources}
    found = click(pipeline, image_id, point)
    masks = click_figure(image, point, found.masks, found.predicted_iou, found.classes)
    return likeness_figure(image, point, maps), masks, found


def explore(pipeline: Pipeline) -> None:
    """Show the widget where somebody can click (Jupyter); do nothing in a run without a reader (papermill)."""
    if "JPY_SESSION_NAME" not in os.environ:  # Jupyter's servers set it for the kernels that they start
        return
    from IPython.display import display

    display(widget(pipeline))


def widget(pipeline: Pipeline) -> object:
    """A mosaic of the image's patches as buttons; a click on one draws :func:`static_view` for its centre."""
    import ipywidgets
    from IPython.display import display

    chooser = ipywidgets.Dropdown(options=list(pipeline.data.targets.images), description="image")
    mosaic = ipywidgets.GridBox(layout=ipywidgets.Layout(grid_template_columns=f"repeat({CELLS}, 26px)"))
    output = ipywidgets.Output()

    def clicked(point: Point, _button: object) -> None:
        with output:
            output.clear_output(wait=True)
            for figure in static_view(pipeline, chooser.value, point)[:2]:
                display(figure)
                plt.close(figure)

    def chosen(_change: object = None) -> None:
        image = read_image(pipeline.data.targets, chooser.value)
        colours = np.asarray(image.resize((CELLS, CELLS), Image.Resampling.BOX)).reshape(-1, 3)
        buttons = []
        for number, colour in enumerate(colours):
            point = ((number % CELLS + 0.5) * image.width / CELLS, (number // CELLS + 0.5) * image.height / CELLS)
            button = ipywidgets.Button(layout=ipywidgets.Layout(width="25px", height="25px", margin="0"))
            button.style.button_color = "#" + bytes(colour.tolist()).hex()
            button.on_click(functools.partial(clicked, point))
            buttons.append(button)
        mosaic.children = buttons

    chooser.observe(chosen, names="value")
    chosen()
    return ipywidgets.VBox([chooser, mosaic, output])
