"""Places: the backgrounds of MojiWorld, a score of kinds that superclasses live in, with slight variation only.

A background of its own for every picture would teach a model to tell pictures apart, not objects. So every place has
`VARIANTS` paintings, and a picture shows one of them, shifted, mirrored or not, and a little lighter or darker.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageEnhance

VARIANTS = 6
FINER = 3  # paintings are made this much larger, so that their edges are smooth
SPARE = 1.12  # and show more than a picture does, so that it can be shifted

Box = tuple[float, float, float, float]
Mark = Callable[[ImageDraw.ImageDraw, np.random.Generator, Box, str], None]


def _clouds(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """Three clouds of three puffs."""
    left, top, right, bottom = box
    for part in range(3):
        x = left + (right - left) * (part + rng.uniform(0.1, 0.7)) / 3
        y, r = top + (bottom - top) * rng.uniform(0.12, 0.5), (right - left) * rng.uniform(0.03, 0.05)
        for step, grown in ((-1.2, 0.8), (0, 1.2), (1.3, 0.9)):
            draw.ellipse((x + step * r - r * grown, y - r * grown, x + step * r + r * grown, y + r * grown), colour)


def _dots(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """Thirty small discs anywhere: stars, flakes, bubbles, pebbles."""
    for x, y, r in zip(
        rng.uniform(box[0], box[2], 30), rng.uniform(box[1], box[3], 30), rng.uniform(3, 8, 30), strict=True
    ):
        r *= (box[2] - box[0]) / 1000
        draw.ellipse((x - r, y - r, x + r, y + r), colour)


def _tufts(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """Two dozen tufts of grass."""
    unit = (box[2] - box[0]) / 60
    for x, y in zip(rng.uniform(box[0], box[2], 24), rng.uniform(box[1] + unit, box[3], 24), strict=True):
        for lean in (-1, 0, 1):
            draw.line((x, y, x + lean * unit, y - 1.6 * unit), colour, max(1, round(unit / 3)))


def _hills(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """Three round hills that stand on the lower edge."""
    width, base = box[2] - box[0], box[3]
    for part in range(3):
        x, r, h = box[0] + width * (part + rng.uniform(0.2, 0.8)) / 3, width * 0.3, width * rng.uniform(0.1, 0.2)
        draw.chord((x - r, base - h, x + r, base + h), 180, 360, colour)


def _trunks(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """Seven trunks from edge to edge."""
    for part in range(7):
        x = box[0] + (box[2] - box[0]) * (part + rng.uniform(0.2, 0.8)) / 7
        r = (box[2] - box[0]) * rng.uniform(0.012, 0.025)
        draw.rectangle((x - r, box[1], x + r, box[3]), colour)


def _waves(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """Rows of short arcs."""
    unit = (box[2] - box[0]) / 9
    for row, y in enumerate(np.arange(box[1] + unit * 0.4, box[3], unit * 0.6)):
        for x in np.arange(box[0] - unit * (row % 2) / 2, box[2], unit) + rng.uniform(-0.1, 0.1) * unit:
            draw.arc((x, y, x + unit * 0.7, y + unit * 0.4), 20, 160, colour, max(1, round(unit / 12)))


def _houses(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """A skyline on the lower edge."""
    width = (box[2] - box[0]) / 9
    for part in range(9):
        x, height = box[0] + part * width, width * rng.uniform(1.2, 3.2)
        draw.rectangle((x, box[3] - height, x + width * 0.94, box[3]), colour)


def _lane(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """The broken line in the middle of a road."""
    unit, y = (box[2] - box[0]) / 7, (box[1] + box[3]) / 2
    for x in np.arange(box[0] - rng.uniform(0, 1) * unit, box[2], unit):
        draw.rectangle((x, y - unit / 14, x + unit * 0.6, y + unit / 14), colour)


def _lines(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """Level lines: boards, blinds."""
    unit = (box[2] - box[0]) / 11
    for y in np.arange(box[1] + rng.uniform(0.2, 0.9) * unit, box[3], unit):
        draw.line((box[0], y, box[2], y), colour, max(1, round(unit / 9)))


def _stripes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """Upright stripes: wallpaper, a curtain, a mown pitch."""
    unit = (box[2] - box[0]) / 11
    for x in np.arange(box[0] - rng.uniform(0, 1) * unit, box[2], unit):
        draw.rectangle((x, box[1], x + unit / 2, box[3]), colour)


def _grid(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """Square tiles."""
    unit = (box[2] - box[0]) / 9
    shift = rng.uniform(0, 1) * unit
    for x in np.arange(box[0] - shift, box[2], unit):
        draw.line((x, box[1], x, box[3]), colour, max(1, round(unit / 12)))
    for y in np.arange(box[3], box[1], -unit):
        draw.line((box[0], y, box[2], y), colour, max(1, round(unit / 12)))


def _checks(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """A chequered cloth."""
    unit, shift = (box[2] - box[0]) / 11, rng.uniform(0, 2)
    for row, y in enumerate(np.arange(box[1], box[3], unit)):
        for x in np.arange(box[0] - (row % 2 + shift) * unit, box[2], 2 * unit):
            draw.rectangle((x, y, x + unit, min(y + unit, box[3])), colour)


def _bricks(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """Courses of bricks, by their joints."""
    unit, shift = (box[2] - box[0]) / 8, rng.uniform(0, 1)
    for row, y in enumerate(np.arange(box[3], box[1], -unit / 2)):
        draw.line((box[0], y, box[2], y), colour, max(1, round(unit / 12)))
        for x in np.arange(box[0] + (row % 2 / 2 - shift) * unit, box[2], unit):
            draw.line((x, y, x, y - unit / 2), colour, max(1, round(unit / 12)))


def _holes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, box: Box, colour: str) -> None:
    """The regular holes of a tool board."""
    unit = (box[2] - box[0]) / 14
    for y in np.arange(box[1] + rng.uniform(0, 1) * unit, box[3], unit):
        for x in np.arange(box[0] + rng.uniform(0, 1) * unit, box[2], unit):
            draw.ellipse((x - unit / 9, y - unit / 9, x + unit / 9, y + unit / 9), colour)


@dataclasses.dataclass(frozen=True)
class Place:
    """One kind of background: two fields that meet at a horizon, with marks on each.

    Attributes:
        home: superclasses that live there.
        horizon: share of the height that the upper field takes; 1: all of it.
        upper, lower: colour at the upper and at the lower edge of each field.
        marks: what is drawn on them: function, `upper` or `lower`, colour.
    """

    home: tuple[str, ...]
    horizon: float
    upper: tuple[str, str]
    lower: tuple[str, str]
    marks: tuple[tuple[Mark, str, str], ...]


SKY = ("#8fc9f2", "#dff1fb")
PLACES: Mapping[str, Place] = {
    "meadow": Place(("mammal", "bug or reptile", "plant"), 0.52, SKY, ("#a9d58a", "#86bf6c"),
                    ((_clouds, "upper", "#ffffff"), (_tufts, "lower", "#6aa653"))),
    "forest": Place(("mammal", "bird", "plant", "bug or reptile"), 0.62, ("#5c8f68", "#9cc59a"), ("#8a7a52", "#6f6142"),
                    ((_trunks, "upper", "#6b5a45"), (_tufts, "lower", "#4f7a4a"))),
    "savanna": Place(("mammal", "bird"), 0.55, ("#f6c98b", "#fbe8c0"), ("#dcb76a", "#c79c50"),
                     ((_hills, "upper", "#c9a46a"), (_tufts, "lower", "#a88240"))),
    "garden": Place(("plant", "fruit or vegetable", "bug or reptile"), 0.4, SKY, ("#9a7350", "#7b5a3e"),
                    ((_hills, "upper", "#8fbf7a"), (_lines, "lower", "#6a4c34"))),
    "sky": Place(("bird", "aircraft or boat", "nature"), 1, ("#6db5ee", "#cfe8fa"), ("#cfe8fa", "#cfe8fa"),
                 ((_clouds, "upper", "#ffffff"),)),
    "night": Place(("nature", "aircraft or boat"), 0.75, ("#141b3c", "#36407a"), ("#1c2440", "#11172c"),
                   ((_dots, "upper", "#f2edc4"), (_hills, "upper", "#1c2440"))),
    "mountains": Place(("nature", "aircraft or boat"), 0.7, ("#bcd3ea", "#f3e9e2"), ("#7f9c86", "#6b8a74"),
                       ((_hills, "upper", "#93a7bd"), (_tufts, "lower", "#577660"))),
    "sea": Place(("aircraft or boat", "sea animal", "bird"), 0.42, SKY, ("#5fa8cf", "#2f7eab"),
                 ((_clouds, "upper", "#ffffff"), (_waves, "lower", "#a8d6ea"))),
    "under water": Place(("sea animal",), 0.82, ("#4fb3c4", "#1c6f8f"), ("#d8c690", "#bfa970"),
                         ((_dots, "upper", "#bfe9ee"), (_dots, "lower", "#a58f58"))),
    "beach": Place(("sea animal", "accessory", "toy or party"), 0.45, ("#a6dcf5", "#4fa9d0"), ("#f0dca6", "#dfc384"),
                   ((_waves, "upper", "#d9f2fb"), (_dots, "lower", "#cdb074"))),
    "snow": Place(("nature", "sport", "clothing"), 0.5, ("#b9cbe0", "#e6edf5"), ("#fbfdff", "#e3ebf4"),
                  ((_hills, "upper", "#d5dfec"), (_dots, "upper", "#ffffff"))),
    "road": Place(("land vehicle", "town"), 0.55, SKY, ("#7d8087", "#62656c"),
                  ((_hills, "upper", "#9cc488"), (_lane, "lower", "#f4f1e6"))),
    "street": Place(("town", "land vehicle"), 0.66, ("#f3d9c4", "#fbeee0"), ("#b9b3ab", "#a19b93"),
                    ((_houses, "upper", "#b7a6b5"), (_grid, "lower", "#938d85"))),
    "brick wall": Place(("town", "household", "sport"), 0.8, ("#c47f63", "#b36d53"), ("#a9a49c", "#8f8a83"),
                        ((_bricks, "upper", "#dcb6a2"), (_grid, "lower", "#807b74"))),
    "kitchen": Place(("fruit or vegetable", "drink or tableware", "meal"), 0.6, ("#e4f0ee", "#cfe3e0"),
                     ("#c9b9a4", "#b5a38c"), ((_grid, "upper", "#a9cbc6"),)),
    "table": Place(("meal", "drink or tableware", "sweet"), 0.35, ("#f3e6cf", "#eadabd"), ("#b98a5a", "#9f7247"),
                   ((_stripes, "upper", "#eadcc0"), (_lines, "lower", "#8c623b"))),
    "picnic": Place(("sweet", "fruit or vegetable", "meal"), 0.22, ("#a9d58a", "#8fc574"), ("#fdf6f2", "#f6e6e0"),
                    ((_tufts, "upper", "#6aa653"), (_checks, "lower", "#e58f8a"))),
    "living room": Place(("household", "music or sound", "toy or party"), 0.64, ("#d9d3ea", "#cfc7e2"),
                         ("#c29a6f", "#a98259"), ((_stripes, "upper", "#c9c0df"), (_lines, "lower", "#97714a"))),
    "bathroom": Place(("household", "clothing", "accessory"), 0.7, ("#d4ecf7", "#bfe0ef"), ("#f0f2f4", "#dde2e6"),
                      ((_grid, "upper", "#f6fbfd"), (_checks, "lower", "#b8c6d0"))),
    "wardrobe": Place(("clothing", "accessory"), 0.85, ("#e9c9cf", "#dfb7c0"), ("#8d6b5c", "#76574a"),
                      ((_stripes, "upper", "#d7a9b4"),)),
    "workshop": Place(("tool", "device"), 0.68, ("#d8b98d", "#c9a775"), ("#8b8f94", "#73777c"),
                      ((_holes, "upper", "#a8875a"), (_lines, "lower", "#666a6f"))),
    "desk": Place(("stationery", "device", "tool"), 0.5, ("#e8ecef", "#d5dce1"), ("#cfae86", "#b8966d"),
                  ((_lines, "upper", "#c3ccd3"),)),
    "pitch": Place(("sport",), 0.25, ("#8d93b5", "#b4b9d1"), ("#8cc56f", "#6fae55"),
                   ((_dots, "upper", "#e9dcc9"), (_stripes, "lower", "#7cb962"))),
    "stage": Place(("music or sound", "toy or party"), 0.74, ("#a8323f", "#7e2230"), ("#b98a5a", "#96693f"),
                   ((_stripes, "upper", "#932838"), (_lines, "lower", "#80562f"))),
}  # fmt: skip


@functools.cache
def places_of(superclass: str) -> tuple[str, ...]:
    """Names of the places where a superclass lives."""
    return tuple(name for name, place in PLACES.items() if superclass in place.home)


@functools.lru_cache(maxsize=2 * VARIANTS * len(PLACES))
def painting(name: str, size: int, variant: int) -> Image.Image:
    """One of a place's paintings, square, `SPARE` times `size` pixels a side."""
    rng, place = np.random.default_rng([zlib.crc32(name.encode()), variant]), PLACES[name]
    shown = round(size * SPARE)
    side = FINER * shown
    level = round(side * (place.horizon + rng.uniform(-0.04, 0.04) * (place.horizon < 1)))
    image = Image.new("RGB", (side, side))
    fields = {"upper": (0, 0, side, level), "lower": (0, level, side, side)}
    for field, colours in (("upper", place.upper), ("lower", place.lower)):
        image.paste(shaded(ImageColor.getrgb(colours[0]), ImageColor.getrgb(colours[1]), side), fields[field][:2])
    for field in ("upper", "lower"):  # in this order, so that nothing above hangs over the horizon
        layer = image.crop(fields[field])
        for mark, where, colour in place.marks:
            if where == field and layer.height:
                mark(ImageDraw.Draw(layer), rng, (0, 0, layer.width, layer.height), colour)
        image.paste(layer, fields[field][:2])
    return image.resize((shown, shown), Image.Resampling.BOX)


def shaded(above: tuple[int, ...], below: tuple[int, ...], size: int) -> Image.Image:
    """A square that goes from one colour, at its upper edge, to another."""
    ramp = Image.linear_gradient("L").resize((size, size))
    top, bottom = (Image.new("RGB", (size, size), colour[:3]) for colour in (above, below))
    return Image.composite(bottom, top, ramp)


def place_background(rng: np.random.Generator, name: str, size: int) -> Image.Image:
    """A view of a place, `size` pixels a side."""
    whole = painting(name, size, int(rng.integers(VARIANTS)))
    left, top = (int(v) for v in rng.integers(0, whole.width - size + 1, 2))
    view = whole.crop((left, top, left + size, top + size))
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(view).enhance(float(rng.uniform(0.88, 1.06)))


def studio_background(rng: np.random.Generator, size: int) -> Image.Image:
    """A plain ground, darker towards its lower edge, as products are photographed on."""
    light = rng.integers(215, 252) - rng.integers(0, 36, 3)
    shade = rng.uniform(0.8, 0.92)
    return shaded(tuple(int(v) for v in light), tuple(int(v * shade) for v in light), size)
