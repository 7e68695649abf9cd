"""Places: the backgrounds of MojiWorld, some kinds that superclasses live in, with slight variation only.

A background of its own for every picture would teach a model to tell pictures apart, not objects. So every place has
`VARIANTS` paintings, and a picture shows one of them, shifted, mirrored or not, and a little lighter or darker.
"""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageEnhance
from PIL.ImageDraw import ImageDraw as Draw

from samantics.cache import ASSETS

VARIANTS = 6
FINER = 3  # paintings are made this much larger, so that their edges are smooth
SPARE = 1.12  # and show more than a picture does, so that it can be shifted

# the kinds of background: home (superclasses that live there), horizon (share of the height that the upper field takes;
# 1: all of it), upper and lower (colours at the upper and at the lower edge of each field), marks (name, field, colour)
PLACES: Mapping[str, dict[str, Any]] = pd.read_csv(ASSETS / "places.csv", index_col="place").to_dict("index")


def clouds(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """Three clouds of three puffs."""
    for part in range(3):
        x = w * (part + rng.uniform(0.1, 0.7)) / 3
        y, r = h * rng.uniform(0.12, 0.5), w * rng.uniform(0.03, 0.05)
        for step, grown in ((-1.2, 0.8), (0, 1.2), (1.3, 0.9)):
            draw.circle((x + step * r, y), r * grown, colour)


def dots(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """Thirty small discs anywhere: stars, flakes, bubbles, pebbles."""
    for x, y, r in zip(*(rng.uniform(*span, 30) for span in ((0, w), (0, h), (3, 8))), strict=True):
        draw.circle((x, y), r * (w / 1000), colour)


def tufts(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """Two dozen tufts of grass."""
    unit = w / 60
    for x, y in zip(rng.uniform(0, w, 24), rng.uniform(unit, h, 24), strict=True):
        for lean in (-1, 0, 1):
            draw.line((x, y, x + lean * unit, y - 1.6 * unit), colour, max(1, round(unit / 3)))


def hills(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """Three round hills that stand on the lower edge."""
    for part in range(3):
        x, r, height = w * (part + rng.uniform(0.2, 0.8)) / 3, w * 0.3, w * rng.uniform(0.1, 0.2)
        draw.chord((x - r, h - height, x + r, h + height), 180, 360, colour)


def trunks(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """Seven trunks from edge to edge."""
    for part in range(7):
        x, r = w * (part + rng.uniform(0.2, 0.8)) / 7, w * rng.uniform(0.012, 0.025)
        draw.rectangle((x - r, 0, x + r, h), colour)


def waves(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """Rows of short arcs."""
    unit = w / 9
    for row, y in enumerate(np.arange(unit * 0.4, h, unit * 0.6)):
        for x in np.arange(-unit * (row % 2) / 2, w, unit) + rng.uniform(-0.1, 0.1) * unit:
            draw.arc((x, y, x + unit * 0.7, y + unit * 0.4), 20, 160, colour, max(1, round(unit / 12)))


def houses(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """A skyline on the lower edge."""
    unit = w / 9
    for part in range(9):
        x = part * unit
        draw.rectangle((x, h - unit * rng.uniform(1.2, 3.2), x + unit * 0.94, h), colour)


def lane(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """The broken line in the middle of a road."""
    unit, y = w / 7, h / 2
    for x in np.arange(-rng.uniform(0, 1) * unit, w, unit):
        draw.rectangle((x, y - unit / 14, x + unit * 0.6, y + unit / 14), colour)


def lines(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """Level lines: boards, blinds."""
    unit = w / 11
    for y in np.arange(rng.uniform(0.2, 0.9) * unit, h, unit):
        draw.line((0, y, w, y), colour, max(1, round(unit / 9)))


def stripes(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """Upright stripes: wallpaper, a curtain, a mown pitch."""
    unit = w / 11
    for x in np.arange(-rng.uniform(0, 1) * unit, w, unit):
        draw.rectangle((x, 0, x + unit / 2, h), colour)


def grid(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """Square tiles."""
    unit = w / 9
    upright = [(x, 0, x, h) for x in np.arange(-rng.uniform(0, 1) * unit, w, unit)]
    for line in upright + [(0, y, w, y) for y in np.arange(h, 0, -unit)]:
        draw.line(line, colour, max(1, round(unit / 12)))


def checks(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """A chequered cloth."""
    unit, shift = w / 11, rng.uniform(0, 2)
    for row, y in enumerate(np.arange(0, h, unit)):
        for x in np.arange(-(row % 2 + shift) * unit, w, 2 * unit):
            draw.rectangle((x, y, x + unit, min(y + unit, h)), colour)


def bricks(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """Courses of bricks, by their joints."""
    unit, shift = w / 8, rng.uniform(0, 1)
    for row, y in enumerate(np.arange(h, 0, -unit / 2)):
        draw.line((0, y, w, y), colour, max(1, round(unit / 12)))
        for x in np.arange((row % 2 / 2 - shift) * unit, w, unit):
            draw.line((x, y, x, y - unit / 2), colour, max(1, round(unit / 12)))


def holes(draw: Draw, rng: Generator, w: int, h: int, colour: str) -> None:
    """The regular holes of a tool board."""
    unit = w / 14
    for y in np.arange(rng.uniform(0, 1) * unit, h, unit):
        for x in np.arange(rng.uniform(0, 1) * unit, w, unit):
            draw.circle((x, y), unit / 9, colour)


MARKS: Mapping[str, Callable[[Draw, Generator, int, int, str], None]] = {  # on a field w wide and h high
    mark.__name__: mark
    for mark in (clouds, dots, tufts, hills, trunks, waves, houses, lane, lines, stripes, grid, checks, bricks, holes)
}


def places_of(superclass: str) -> tuple[str, ...]:
    """Names of the places where a superclass lives."""
    return tuple(name for name, place in PLACES.items() if superclass in place["home"].split("|"))


@functools.lru_cache(maxsize=2 * VARIANTS * len(PLACES))
def painting(name: str, size: int, variant: int) -> Image.Image:
    """One of a place's paintings, square, `SPARE` times `size` pixels a side."""
    rng, place = np.random.default_rng([zlib.crc32(name.encode()), variant]), PLACES[name]
    shown = round(size * SPARE)
    side = FINER * shown
    level = round(side * (place["horizon"] + rng.uniform(-0.04, 0.04) * (place["horizon"] < 1)))
    image, marks = Image.new("RGB", (side, side)), [mark.split() for mark in place["marks"].split("|")]
    for field, top, bottom in (("upper", 0, level), ("lower", level, side)):
        above, below = place[field].split()
        layer = shaded(above, below, side).crop((0, 0, side, bottom - top))  # so that nothing hangs over the horizon
        for mark, where, colour in marks:
            if where == field and layer.height:
                MARKS[mark](ImageDraw.Draw(layer), rng, layer.width, layer.height, colour)
        image.paste(layer, (0, top))
    return image.resize((shown, shown), Image.Resampling.BOX)


def shaded(above: str | tuple[int, ...], below: str | tuple[int, ...], size: int) -> Image.Image:
    """A square that goes from one colour, at its upper edge, to another."""
    top, bottom = (Image.new("RGB", (size, size), colour) for colour in (above, below))
    return Image.composite(bottom, top, Image.linear_gradient("L").resize((size, size)))


def place_background(rng: Generator, name: str, size: int) -> Image.Image:
    """A view of a place, `size` pixels a side."""
    whole = painting(name, size, int(rng.integers(VARIANTS)))
    left, top = (int(v) for v in rng.integers(0, whole.width - size + 1, 2))
    view = whole.crop((left, top, left + size, top + size))
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageEnhance.Brightness(view).enhance(float(rng.uniform(0.88, 1.06)))


def studio_background(rng: Generator, size: int) -> Image.Image:
    """A plain ground, darker towards its lower edge, as products are photographed on."""
    light = rng.integers(215, 252) - rng.integers(0, 36, 3)
    shade = rng.uniform(0.8, 0.92)
    return shaded(tuple(int(v) for v in light), tuple(int(v * shade) for v in light), size)
