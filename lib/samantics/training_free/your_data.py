"""Notebook 05: the reader's own images and COCO files, a small example in their place, and files to take away."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm.auto import tqdm

from samantics.cache import atomic_path, write_json
from samantics.data import first_world as mojiworld
from samantics.data.coco import CocoDataset, ImageRecord, mask_of, read_image, write_coco
from samantics.data.first_world import write_mojiworld
from samantics.metrics.coco_ap import Result
from samantics.plots import CYCLE
from samantics.run import Run, own_data

EXAMPLE = {"classes": 4, "pictures": 12, "references": 80, "targets": 8}  # of each what the example has
WORLD = mojiworld.World(seed=5)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What notebook 05 works on."""

    run: Run  # with the reader's settings and, for the reader's own data, a folder of its own for figures
    folder: str  # of images, a sub-folder for each class; "" where there is none
    files: dict[str, str]  # references, targets and images; empty where there are none


def inputs(run: Run, folder: str, files: Mapping[str, str], weights: str = "", shots: int = 0) -> Inputs:
    """The reader's data or, where nothing is given at all, a small example that is written into the cache.

    Args:
        folder: of images, or "".
        files: `references`, `targets` and `images`, or "" for each.
        weights: others than the scale's.
        shots: references per class; 0 takes the scale's.
    """
    settings = run.scale.pipeline
    settings = dataclasses.replace(settings, shots=shots or settings.shots, shot_curve=(shots or settings.shots,))
    scale = dataclasses.replace(run.scale, weights=weights or run.scale.weights, pipeline=settings)
    run = dataclasses.replace(run, scale=scale)
    if folder or any(files.values()):
        return Inputs(own_data(run), folder, dict(files) if any(files.values()) else {})
    home = run.cache / "example"
    return Inputs(run, str(_example_folder(home / "folder")), _example_files(home))


def _example_folder(folder: Path) -> Path:
    """Pictures of a few drawings, a sub-folder for each."""
    names = mojiworld.catalogue()["drawing"]
    for drawing in range(0, len(names), len(names) // EXAMPLE["classes"])[: EXAMPLE["classes"]]:
        for number in range(EXAMPLE["pictures"]):
            path = folder / names.iloc[drawing] / f"{number:02d}.png"
            if not path.is_file():
                picture = mojiworld.object_picture(WORLD, "example", drawing * EXAMPLE["pictures"] + number, drawing)
                with atomic_path(path) as temporary:
                    Image.fromarray(picture.image).save(temporary)
    return folder


def _example_files(home: Path) -> dict[str, str]:
    """Scenes as COCO files."""
    files = {}
    for name in ("references", "targets"):
        scenes, path = write_mojiworld(WORLD, f"example_{name}", EXAMPLE[name], home), home / f"{name}.json"
        images = [dataclasses.replace(r, file=f"{scenes.folder.name}/{r.file}") for r in scenes.images.values()]
        write_coco(path, images, scenes.categories, scenes.instances)
        files[name] = str(path)
    return files | {"images": str(home)}


def top_results(results: Sequence[Result], min_score: float = 0.0, most: int = 20) -> list[Result]:
    """The best-scored results of each image, best first: at most `most`, none below `min_score`."""
    counts: dict[int, int] = {}
    chosen = []
    for result in sorted(results, key=lambda r: -r["score"]):
        counts[result["image_id"]] = counts.get(result["image_id"], 0) + 1
        if result["score"] >= min_score and counts[result["image_id"]] <= most:
            chosen.append(result)
    return chosen


def polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Outlines `x, y, x, y, ...` of a mask, pixels from the image's corner, as COCO writes them (holes are filled)."""
    contours: Any = contourpy.contour_generator(z=np.pad(mask, 1).astype(float)).lines(0.5)
    # the padding moves pixel centres to 1, 2, ...; seen from the corner they lie at 0.5, 1.5, ...
    return [(points[:-1] - 0.5).round(2).ravel().tolist() for points in contours if len(points) > 3]


def export(results: Sequence[Result], dataset: CocoDataset, names: Mapping[int, str], folder: Path) -> list[Path]:
    """Write instances in the forms that other tools take; what an earlier run left in the folder goes.

    - `results.json`: COCO results; `instances.json`: a COCO data set with polygons, for annotation tools;
    - `overlays/`: the images with masks, boxes and names drawn on them;
    - `label_maps/`: PNG of the image's size, 0 where nothing is, else the position of the class in `classes.txt` (from
      1); better-scored instances lie on top;
    - `yolo/`: for each image `class x y width height` a line, class from 0, centres and sides as shares of the image.

    Args:
        results: see `top_results`.
        names: of the categories, by id.
        folder: for the files.

    Returns:
        The files.
    """
    shutil.rmtree(folder, ignore_errors=True)
    place = {category: number for number, category in enumerate(names)}
    stems, annotations = _stems(dataset), list[dict[str, Any]]()
    for image_id, record in tqdm(dataset.images.items(), desc="files to take away", mininterval=1, leave=False):
        found = [result for result in results if result["image_id"] == image_id]
        masks = np.array([mask_of(result["segmentation"]) for result in found], bool)
        masks = masks.reshape(-1, record.height, record.width)
        labels = np.zeros(masks.shape[1:], np.uint8 if len(names) < 256 else np.uint16)
        for result, mask in zip(reversed(found), masks[::-1], strict=True):
            labels[mask] = place[result["category_id"]] + 1
        for result, mask in zip(found, masks, strict=True):
            entry = {"id": len(annotations) + 1, "iscrowd": 0, "area": float(mask.sum())}
            annotations.append({**result, **entry, "segmentation": polygons(mask)})
        overlay = _overlay(read_image(dataset, image_id), found, masks, names)
        for kind, picture in (("label_maps", Image.fromarray(labels)), ("overlays", overlay)):
            with atomic_path(folder / kind / f"{stems[image_id]}.png") as temporary:
                picture.save(temporary)
        _write(folder / "yolo" / f"{stems[image_id]}.txt", [_yolo(result, record, place) for result in found])
    images = [{"id": r.id, "file_name": r.file, "width": r.width, "height": r.height} for r in dataset.images.values()]
    categories = [{"id": category, "name": name} for category, name in names.items()]
    write_json(folder / "instances.json", {"images": images, "annotations": annotations, "categories": categories})
    write_json(folder / "results.json", list(results))
    _write(folder / "classes.txt", names.values())
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _yolo(result: Result, image: ImageRecord, place: Mapping[int, int]) -> str:
    x, y, width, height = result["bbox"]
    across, down = (x + width / 2) / image.width, (y + height / 2) / image.height
    return (
        f"{place[result['category_id']]} {across:.6f} {down:.6f} {width / image.width:.6f} {height / image.height:.6f}"
    )


def _stems(dataset: CocoDataset) -> dict[int, str]:
    """File names without ending, by image id; images that differ in their ending only get their id as well."""
    stems = {image_id: str(Path(record.file).with_suffix("")) for image_id, record in dataset.images.items()}
    twice = {stem for stem in stems.values() if list(stems.values()).count(stem) > 1}
    return {image_id: f"{stem}_{image_id}" if stem in twice else stem for image_id, stem in stems.items()}


def _overlay(
    image: Image.Image, results: Sequence[Result], masks: NDArray[np.bool_], names: Mapping[int, str]
) -> Image.Image:
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if not results:
        return image
    colours = [CYCLE[number % len(CYCLE)] for number in range(len(results))]
    for mask, colour in zip(masks[::-1], colours[::-1], strict=True):  # one by one: the best on top
        picture = draw_segmentation_masks(picture, torch.from_numpy(mask), alpha=0.4, colors=colour)
    x, y, width, height = torch.tensor([result["bbox"] for result in results]).T
    words = [f"{names[result['category_id']]} {result['score']:.2f}" for result in results]
    boxes = torch.stack([x, y, x + width, y + height], 1)
    return Image.fromarray(draw_bounding_boxes(picture, boxes, words, colours).permute(1, 2, 0).numpy())


def _write(path: Path, lines: Iterable[str]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
