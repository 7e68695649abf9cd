"""Notebook 05: the reader's own images and COCO files, a small example in their place, and files to take away."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
import torch
from matplotlib.font_manager import findfont
from numpy.typing import NDArray
from PIL import Image
from torchvision.utils import draw_bounding_boxes

from samantics import plots
from samantics.cache import atomic_path, write_json, write_text
from samantics.data.coco import CocoDataset, ImageRecord, mask_of, read_image, shown
from samantics.data.coco_files import coco_entries, write_coco
from samantics.metrics.coco_ap import Result
from samantics.models import pocket
from samantics.mojiworld import catalogue as tables
from samantics.mojiworld.rendered import write_scenes
from samantics.mojiworld.world import Stream, World, picture, visible_drawings
from samantics.run import Run, empty_own, own_data

EXAMPLE = {"classes": 4, "pictures": 12, "references": 80, "targets": 8}  # of each what the example has
FONT = findfont("DejaVu Sans")
LEAST_HEIGHT = 12  # pixels of a box whose name is drawn
WORLD = World(pocket.DEFAULT.image_size, seed=5)


def inputs(
    run: Run, folder: str, files: Mapping[str, str], weights: str = "", shots: int = 0
) -> tuple[Run, str, dict[str, str]]:
    """The reader's data or, where nothing is given at all, a small example that is written into the cache.

    Args:
        run: of the notebook.
        folder: of images, or "".
        files: `references`, `targets`, `images` and `target_images`, or "" for each.
        weights: others than the scale's.
        shots: references per class; 0 takes the scale's.

    Returns:
        The run with the reader's settings and, for the reader's own data, a folder of its own for figures; the folder
        of images, a sub-folder for each class ("" where there is none); the files (empty where there are none).
    """
    settings, shots = run.scale.pipeline, shots or run.scale.pipeline.shots
    settings = dataclasses.replace(settings, shots=shots, shot_curve=(shots,))
    scale = dataclasses.replace(run.scale, weights=weights or run.scale.weights, pipeline=settings)
    run, given = dataclasses.replace(run, scale=scale), list(filter(None, [folder, *files.values()]))
    if not given:
        return run, str(_example_folder(run.cache / "example/folder")), _example_files(run.cache / "example")
    run = own_data(run)
    empty_own(run.figures, "05_*", given)
    return run, folder, dict(files) if any(files.values()) else {}


def _example_folder(folder: Path) -> Path:
    """Pictures of a few classes by several artists, a sub-folder for each."""
    drawings, names = visible_drawings("labels", "novel")[0], tables.catalogue()["class"]
    stream = Stream("example", "labels", ("object",))
    for name in names[drawings].unique()[: EXAMPLE["classes"]]:
        own = drawings[names[drawings] == name]
        for number in range(EXAMPLE["pictures"]):
            path = folder / name / f"{number:02d}.png"
            if not path.is_file():
                _save(path, picture(WORLD, stream, number, int(own[number % len(own)])).image)
    return folder


def _example_files(home: Path) -> dict[str, str]:
    """Scenes of the 20 novel classes as COCO files."""
    files = {"images": str(home)}
    for role in ("references", "targets"):
        stream = Stream(f"example {role}", role, ("scene",), "novel")
        scenes, path = write_scenes(WORLD, stream, EXAMPLE[role], home), home / f"{role}.json"
        images = [dataclasses.replace(r, file=f"{scenes.folder.name}/{r.file}") for r in scenes.images.values()]
        write_coco(path, images, scenes.categories, scenes.instances)
        files[role] = str(path)
    return files


def top_results(results: Sequence[Result], min_score: float = 0.0, most: int = 20) -> list[Result]:
    """The best-scored results of each image, best first: at most `most`, none below `min_score`."""
    chosen, counts = [], Counter[int]()
    for result in sorted(results, key=lambda r: -r["score"]):
        counts[result["image_id"]] += 1
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
    place, annotations = {category: number for number, category in enumerate(names)}, list[dict[str, Any]]()
    stems = _stems(dataset)
    for image_id in shown(dataset, dataset.images, "files to take away"):
        record, stem = dataset.images[image_id], stems[image_id]
        found = [result for result in results if result["image_id"] == image_id]
        masks = [mask_of(result["segmentation"]) for result in found]
        labels = np.zeros((record.height, record.width), np.uint8 if len(names) < 256 else np.uint16)
        for result, mask in zip(found[::-1], masks[::-1], strict=True):  # the best on top
            labels[mask] = place[result["category_id"]] + 1
        for result, mask in zip(found, masks, strict=True):
            entry = {"id": len(annotations) + 1, "iscrowd": 0, "area": float(mask.sum())}
            annotations.append({**result, **entry, "segmentation": polygons(mask)})
        words = [f"{names[result['category_id']]} {result['score']:.2f}" for result in found]
        _save(folder / "label_maps" / f"{stem}.png", labels)
        _save(folder / "overlays" / f"{stem}.png", _overlay(read_image(dataset, image_id), found, masks, words))
        write_text(folder / "yolo" / f"{stem}.txt", "".join(_yolo_line(result, place, record) for result in found))
    write_json(folder / "instances.json", coco_entries(dataset.images.values(), names) | {"annotations": annotations})
    write_json(folder / "results.json", list(results))
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in names.values()))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _stems(dataset: CocoDataset) -> dict[int, str]:
    """What the files of each image are called: as the image without its ending, and its id where others are, too."""
    stems = {image_id: str(Path(record.file).with_suffix("")) for image_id, record in dataset.images.items()}
    while len(set(stems.values())) < len(stems):  # again, where x.png has become x_1 and there is an x_1.png
        alike = Counter(stems.values())
        stems = {n: f"{stem}_{n}" if alike[stem] > 1 else stem for n, stem in stems.items()}
    return stems


def _yolo_line(result: Result, place: Mapping[int, int], record: ImageRecord) -> str:
    """`class x y width height`."""
    x, y, width, height = result["bbox"]
    shares = np.array([x + width / 2, y + height / 2, width, height]) / ([record.width, record.height] * 2)
    return " ".join([str(place[result["category_id"]]), *(f"{share:.6f}" for share in shares)]) + "\n"


def _overlay(
    image: Image.Image, results: Sequence[Result], masks: Sequence[NDArray[np.bool_]], words: Sequence[str]
) -> NDArray[np.uint8]:
    """The image with masks, boxes and, where a box has room for it, its name; the best on top."""
    shades = [plots.CYCLE[number % len(plots.CYCLE)] for number in range(len(results))]
    picture = torch.from_numpy(plots.tinted(image, masks, shades, 0.4)).permute(2, 0, 1)
    size = max(9, min(image.size) // 40)
    for result, shade, word in list(zip(results, shades, words, strict=True))[::-1]:
        x, y, width, height = result["bbox"]
        box, name = torch.tensor([[x, y, x + width, y + height]]), [word] if height >= LEAST_HEIGHT else None
        picture = draw_bounding_boxes(
            picture, box, name, shade, font=FONT, font_size=size, label_colors=plots.ink(shade), fill_labels=True
        )
    return picture.permute(1, 2, 0).numpy()


def _save(path: Path, pixels: NDArray[Any]) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary)
