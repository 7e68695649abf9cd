"""MojiWorld: the controlled world of the pocket scale. One thing, many artists; exact masks; who may see what.

A picture is a function of `(world.seed, stream.name, index)` alone, so it is the same on every rerun, in any order
and in any process. There are three kinds: *studio* (one object on a plain ground), *object* (one object in a place) and
*scene* (two to six objects, themed). A stream has a role, and the role says whose drawings it may show: what models
learn from shows train artists only, recipes are chosen on the validation artist, results are reported on test artists.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from samantics.cache import hash_value
from samantics.errors import StudyError
from samantics.mojiworld import catalogue as tables
from samantics.mojiworld.drawings import ARTISTS
from samantics.mojiworld.places import PLACES, place_background, places_of, studio_background

KINDS = ("studio", "object", "scene")
MAX_OBJECTS = 6
MIN_VISIBLE = 0.35  # share of every object that stays visible; a newcomer that would hide more is placed elsewhere
MIN_PIXELS = 8  # of an object, or it is nothing to be seen
PLACEMENT_TRIES = 12
SAME_CLASS = 1 / 3  # of the companions in a scene: the anchor's class, by another artist
FLOCKS = 0.15  # of the scenes of a stream that has flocks: one class only

RENDERER = 1  # counted up with every change of what the code below and the places paint

RGB = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class World:
    """What a MojiWorld is made of.

    `theme_strength` is the chance that a place fits the first object's superclass, and that a companion of another
    class shares its superclass or place. At 0, places and superclasses say nothing about each other (only that a third
    of the companions are of the anchor's class remains).
    """

    image_size: int = 128  # side of the square images, pixels
    theme_strength: float = 0.8
    seed: int = 0  # every picture depends on it

    def __post_init__(self) -> None:
        if not (0 <= self.theme_strength <= 1 and 32 <= self.image_size <= 2048):
            raise StudyError(f"{self}: choose an image_size from 32 to 2048 and a theme_strength from 0 to 1")

    @property
    def hash(self) -> str:
        """Identifies the world and the drawings it is made of: data of another hash are other data."""
        digests = [artist.digest for artist in ARTISTS.values()]
        return hash_value([RENDERER, dataclasses.asdict(self), digests, tables.catalogue().to_csv(index=False)])


ROLES: Mapping[str, tuple[str, ...]] = {  # role -> splits of the artists that its pictures may show
    **dict.fromkeys(("pretraining", "labels", "views", "references", "tuning"), ("train",)),
    "choice": ("validation",),
    "test": ("test",),
    "targets": ("test", "train"),
}


@dataclasses.dataclass(frozen=True)
class Stream:
    """A sequence of pictures for one purpose. Streams of different names never share a picture."""

    name: str  # the pictures depend on it
    role: str  # of `ROLES`; an object's artist is of the first split it names, or of one of them, by a fair coin
    kinds: tuple[str, ...] = KINDS  # of the pictures, in turn
    classes: str = "all"  # of the catalogue, or `instances` (the 80), or their `base` or `novel` ones
    balanced: bool = False  # the first object goes through all drawings in turn, instead of being drawn by lot
    flocks: bool = False  # some of the scenes hold one class only


ONE_OBJECT = ("studio", "object")
STREAMS: Mapping[str, Stream] = {
    stream.name: stream
    for stream in (
        Stream("pretraining", "pretraining", flocks=True),
        Stream("held out", "pretraining", flocks=True),
        Stream("labels", "labels", ONE_OBJECT, balanced=True),
        Stream("views", "views", ONE_OBJECT, balanced=True),
        Stream("choice", "choice", ONE_OBJECT, balanced=True),
        Stream("test", "test", ONE_OBJECT, balanced=True),
        Stream("references", "references", ("scene",), "instances"),
        Stream("tuning", "tuning", ("scene",), "base"),
        Stream("choice scenes", "choice", ("scene",), "instances"),
        Stream("targets", "targets", ("scene",), "instances"),
    )
}


def class_names(classes: str) -> set[str]:
    """The classes that a stream's `classes` names."""
    table = tables.instance_classes()
    chosen = table["class"][(table["part"] == classes) | (classes == "instances")]
    return set(tables.classes() if classes == "all" else chosen)


@functools.cache
def visible_drawings(role: str, classes: str = "all") -> tuple[NDArray[np.int64], ...]:
    """Rows of the catalogue that pictures of a role may show: one array for each split of artists it names.

    Args:
        role: of `ROLES`.
        classes: as in `Stream`.
    """
    table = tables.catalogue()
    named = table["class"].isin(class_names(classes))
    return tuple((named & (table["split"] == split)).to_numpy().nonzero()[0] for split in ROLES[role])


@dataclasses.dataclass(frozen=True)
class Picture:
    """One rendered image and what it shows."""

    image: RGB  # (S, S, 3) uint8
    instances: NDArray[np.uint8]  # (S, S); 0 is background, i + 1 marks the visible pixels of object i
    drawings: tuple[int, ...]  # for each object its row in `catalogue`
    kind: str  # `studio`, `object` or `scene`
    place: str  # of `PLACES`; empty in a studio


def picture(world: World, stream: Stream, index: int, drawing: int | None = None) -> Picture:
    """Picture `index` (0 or more) of a stream; the same one for the same arguments, everywhere.

    Args:
        drawing: row of the catalogue that the first object shows; None: as the stream has it.

    Raises:
        StudyError: `drawing` is not one that this stream may show.
    """
    rng = np.random.default_rng([world.seed, zlib.crc32(stream.name.encode()), index])
    pools = visible_drawings(stream.role, stream.classes)
    rows = np.concatenate(pools)
    if drawing is None:
        drawing = int(rows[index % len(rows)]) if stream.balanced else _pick(rng, pools)
    elif drawing not in rows:
        raise StudyError(f"stream {stream.name!r} must not show drawing {drawing}: choose one of its artists' own")
    turn = sum(divmod(index, len(rows))) if stream.balanced else index  # every drawing in every kind
    kind, size = stream.kinds[turn % len(stream.kinds)], world.image_size
    place = ""
    if kind != "studio":
        themed = rng.random() < world.theme_strength
        pool = places_of(tables.catalogue()["superclass"][drawing]) if themed else tuple(PLACES)
        place = pool[int(rng.integers(len(pool)))]
    canvas = Canvas(place_background(rng, place, size) if place else studio_background(rng, size))
    if kind == "scene":
        _fill(canvas, rng, world, stream, drawing)
    while not canvas.drawings:
        canvas.place(posed(rng, drawing, size * rng.uniform(0.5, 0.85)), drawing, rng, margin=0.35)
    return Picture(np.asarray(canvas.image), canvas.instances, tuple(canvas.drawings), kind, place)


def _fill(canvas: "Canvas", rng: Generator, world: World, stream: Stream, anchor: int) -> None:
    """Two to six objects of 20-60 % of the side; what finds no room in `PLACEMENT_TRIES` tries is left out."""
    flock = stream.flocks and rng.random() < FLOCKS
    for position in range(int(rng.integers(2, MAX_OBJECTS + 1))):
        drawing = _companion(rng, world, stream, anchor, flock) if position else anchor
        for tries in range(PLACEMENT_TRIES) if position > 1 else itertools.repeat(0):  # two find room sooner or later
            size = world.image_size * np.exp(rng.uniform(np.log(0.2), np.log(0.6 - 0.2 * tries / PLACEMENT_TRIES)))
            if canvas.place(posed(rng, drawing, size), drawing, rng, margin=0.12):
                break


def _companion(rng: Generator, world: World, stream: Stream, anchor: int, flock: bool) -> int:
    """A drawing to stand beside `anchor`: its class by another artist, its theme, or any."""
    pools = visible_drawings(stream.role, stream.classes)
    label = tables.class_of_drawing()
    if flock or rng.random() < SAME_CLASS:
        same = [pool[label[pool] == label[anchor]] for pool in pools]
        others = [pool[pool != anchor] for pool in same]
        return _pick(rng, others if any(map(len, others)) else same)
    if rng.random() < world.theme_strength:
        above = tables.superclass_of_drawing()
        related = [int(above[anchor])] if rng.random() < 0.5 else _neighbours(int(above[anchor]))
        pools = tuple(pool[np.isin(above[pool], related)] for pool in pools)
    return _pick(rng, pools)


def _pick(rng: Generator, pools: Sequence[NDArray[np.int64]]) -> int:
    """A drawing of one of the pools (a fair coin between those that hold any): first its class, so all are alike."""
    filled = [pool for pool in pools if len(pool)]
    pool = filled[int(rng.integers(len(filled)))]
    labels = tables.class_of_drawing()[pool]
    shown = np.unique(labels)
    return int(rng.choice(pool[labels == shown[int(rng.integers(len(shown)))]]))


@functools.cache
def _neighbours(above: int) -> list[int]:
    """The superclasses that share a place with one (itself among them)."""
    homes = [set(places_of(name)) for name in tables.superclasses()]
    return [other for other, its in enumerate(homes) if its & homes[above]]


def posed(rng: Generator, drawing: int, size: float) -> Image.Image:
    """A drawing with its long side `size` pixels: recoloured, flipped or not, turned by up to about 30 degrees."""
    sprite = tables.sprites()[drawing]
    scale = size / max(sprite.size)
    shape = tuple(max(2, round(side * scale)) for side in sprite.size)
    sprite = sprite.resize((shape[0], shape[1]), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    alpha = sprite.getchannel("A")
    sprite = sprite.convert("RGB").convert("RGB", _colour_matrix(rng))
    sprite.putalpha(alpha)
    return sprite.rotate(float(np.clip(rng.normal(0, 12), -30, 30)), Image.Resampling.BILINEAR, expand=True)


def _colour_matrix(rng: Generator) -> tuple[float, ...]:
    """12 numbers (3x4) for `Image.convert`: hue turned by up to 15 degrees, saturation, contrast and brightness."""
    turn = np.deg2rad(rng.uniform(-15, 15))
    grey = np.full((3, 3), 1 / 3)
    skew = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    # Rodrigues' rotation about the grey axis: the hue turns, the grey part stays
    hue = np.cos(turn) * np.eye(3) + (1 - np.cos(turn)) * grey + np.sin(turn) * skew
    saturation, contrast = rng.uniform(0.7, 1.2), rng.uniform(0.8, 1.1)
    matrix = contrast * (saturation * np.eye(3) + (1 - saturation) * grey) @ hue
    shift = 128 * (1 - contrast) + rng.uniform(-15, 15)
    return tuple(float(v) for v in np.column_stack([matrix, np.full(3, shift)]).ravel())


class Canvas:
    """A picture in the making: the newest object lies on top."""

    def __init__(self, background: Image.Image) -> None:
        self.image = background
        self.instances = np.zeros((background.height, background.width), np.uint8)
        self.full_areas: list[int] = []
        self.drawings: list[int] = []

    def place(self, sprite: Image.Image, drawing: int, rng: Generator, margin: float) -> bool:
        """Put the sprite at a random place, its centre at least `margin` (share of the side) inside the frame.

        Returns False, with nothing changed, where too little of it or of an older object would be seen.
        """
        side = self.image.width
        left, top = (int(v) for v in rng.uniform(margin, 1 - margin, 2) * side - np.array(sprite.size) / 2)
        opaque = np.asarray(sprite.getchannel("A")) >= 128
        rows, columns = slice(max(top, 0), top + sprite.height), slice(max(left, 0), left + sprite.width)
        covered = opaque[rows.start - top : side - top, columns.start - left : side - left]
        hidden = np.bincount(self.instances[rows, columns][covered], minlength=len(self.drawings) + 1)[1:]
        seen = np.bincount(self.instances.ravel(), minlength=len(self.drawings) + 1)[1:] - hidden
        seen, areas = np.append(seen, covered.sum()), np.array([*self.full_areas, opaque.sum()])
        if (seen < MIN_VISIBLE * areas).any() or seen[-1] < MIN_PIXELS:
            return False
        self.image.paste(sprite, (left, top), sprite)
        self.drawings.append(drawing)
        self.full_areas.append(int(areas[-1]))
        self.instances[rows, columns][covered] = len(self.drawings)
        return True
