"""The drawings of MojiWorld: nine open emoji sets, one for each artist, rasterised once.

The sets are npm packages pinned in `package.json`; `scripts/environment.sh` installs them into the environment's
own folder. What they are rasterised to is one file of 8 MB in the cache's folder `drawings`. A machine without npm
can be given a copy of that file: the variable `SAMANTICS_DRAWINGS` names it, or another folder of packages.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image
from tqdm.auto import tqdm

from samantics.cache import PROJECT, cache_dir, hash_value, kept, reading
from samantics.errors import StudyError

SPRITE_SIZE = 128  # pixels of a rasterised drawing before it is cropped to what it shows
ELSEWHERE = "set SAMANTICS_DRAWINGS to a copy of another machine's .cache/drawings/*.npz"
CURE = f"run scripts/environment.sh again (it installs them), or {ELSEWHERE}"

Key = tuple[str, str]  # (artist, icon)


@dataclasses.dataclass(frozen=True)
class Artist:
    """One set of drawings, by one artist."""

    split: str  # `train`, `validation` or `test`: who may see its drawings (see `world`)
    title: str  # the set's name, and who made it
    licence: str  # SPDX identifier
    version: str  # of the package `@iconify-json/<name>`
    digest: str  # first 16 hexadecimal digits of SHA-256 over its `icons.json` and `chars.json`


ARTISTS: Mapping[str, Artist] = {
    "openmoji": Artist("train", "OpenMoji", "CC-BY-SA-4.0", "1.2.29", "18d48f4b8c35d02a"),
    "noto": Artist("train", "Noto Emoji, Google", "Apache-2.0", "1.2.9", "959d40ff719c6361"),
    "noto-v1": Artist("train", "Noto Emoji of 2013-2017, Google", "Apache-2.0", "1.2.5", "f3b3c1043831e90e"),
    "emojione": Artist("train", "EmojiOne 2, Emoji One", "CC-BY-4.0", "1.2.3", "5e76822012d13a6c"),
    "emojione-v1": Artist("train", "EmojiOne 1, Emoji One", "CC-BY-SA-4.0", "1.2.3", "df22c5f5fb9b32d9"),
    "streamline-emojis": Artist("train", "Streamline Emojis, Streamline", "CC-BY-4.0", "1.2.4", "a5d104f212fbfa61"),
    "fxemoji": Artist("validation", "Firefox OS Emoji, Mozilla", "Apache-2.0", "1.2.2", "a08d03858531d6e1"),
    "twemoji": Artist("test", "Twitter Emoji, Twitter", "CC-BY-4.0", "1.2.5", "06cbf33a3c8355e2"),
    "fluent-emoji-flat": Artist("test", "Fluent Emoji Flat, Microsoft", "MIT", "1.2.6", "07f8ede1e3405afb"),
}

# ---------------------------------------------------------------------------------------------------- the packages


@dataclasses.dataclass(frozen=True)
class Package:
    """One installed set: its icons as SVG, and which of them stands for which character."""

    artist: str  # whose it is
    icons: dict[str, Any]  # Iconify's `icons.json`: `icons` by name, `aliases`, `width` and `height`
    chars: dict[str, str]  # code points (lower case, joined by hyphens) -> icon; empty where the set does not say

    def find(self, name: str) -> str | None:
        """The icon of that name, also through its aliases; None where there is none."""
        for _ in range(5):  # an alias may name an alias
            if name in self.icons["icons"]:
                return name
            name = self.icons.get("aliases", {}).get(name, {}).get("parent", "")
        return None

    def svg(self, icon: str) -> str:
        """One icon as an SVG document on a square ground; an icon that is not square stands in its middle."""
        if icon not in self.icons["icons"]:
            raise StudyError(f"@iconify-json/{self.artist} has no icon {icon!r}, which catalogue.csv names: {CURE}")
        entry = self.icons["icons"][icon]
        width, height = (entry.get(side, self.icons.get(side, 16)) for side in ("width", "height"))
        side = max(width, height)
        left, top = entry.get("left", 0) - (side - width) / 2, entry.get("top", 0) - (side - height) / 2
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}">{entry["body"]}</svg>'
        )


def packages_dir() -> Path:
    """The folder `node_modules` that holds the sets: in `SAMANTICS_DRAWINGS`, else in the environment's folder."""
    named = os.environ.get("SAMANTICS_DRAWINGS")
    if named and Path(named).is_dir():
        return Path(named) / "node_modules"
    homes = [Path(sys.prefix) / "drawings", PROJECT / ".venv" / "drawings"]
    return next((home for home in homes if home.is_dir()), homes[0]) / "node_modules"


@functools.cache
def load_package(artist: str) -> Package:
    """One set; StudyError where it is missing or not the very package that is pinned."""
    wanted, folder = ARTISTS[artist], packages_dir() / "@iconify-json" / artist
    try:
        icons, chars = ((folder / name).read_bytes() for name in ("icons.json", "chars.json"))
    except OSError as error:
        raise StudyError(f"the drawings @iconify-json/{artist} are not installed in {folder}: {CURE}") from error
    if hashlib.sha256(icons + chars).hexdigest()[:16] != wanted.digest:
        raise StudyError(f"{folder} was altered, or is not version {wanted.version}: delete it, then {CURE}")
    return Package(artist, json.loads(icons), json.loads(chars))


def rasterised(svg: str, size: int = SPRITE_SIZE) -> Image.Image:
    """An SVG document as an RGBA image of `size` pixels a side, cropped to what it shows."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha >= 8)).getbbox())


# ----------------------------------------------------------------------------------------------------- the sprites


def load_sprites(keys: Iterable[Key]) -> tuple[Image.Image, ...]:
    """The drawings named, as cropped RGBA images, in the order of `keys`; rasterised on the first call ever."""
    keys = tuple(keys)
    path, stored = _stored(keys)
    with reading(path):
        names, ends, data = stored["names"].tolist(), stored["ends"].tolist(), stored["data"].tobytes()
        spans = {tuple(name.split("/")): slice(*span) for name, *span in zip(names, [0, *ends], ends, strict=False)}
    missing = [key for key in keys if key not in spans]
    if missing:
        raise StudyError(f"{path} lacks {len(missing)} drawings, such as {'/'.join(missing[0])}: {ELSEWHERE}")
    with reading(path):
        return tuple(Image.open(io.BytesIO(data[spans[key]])).convert("RGBA") for key in keys)


def _stored(keys: tuple[Key, ...]) -> tuple[Path, dict[str, Any]]:
    """The rasterised drawings and their file: what `SAMANTICS_DRAWINGS` names, else the cache's, made if need be."""
    named = Path(os.environ.get("SAMANTICS_DRAWINGS") or ".")
    if named.is_dir():
        versions = {name: artist.digest for name, artist in ARTISTS.items()}
        path = cache_dir() / "drawings" / f"{hash_value([SPRITE_SIZE, versions, keys])}.npz"
        return path, kept(path, lambda: _rasterised(keys))
    if not named.is_file():
        raise StudyError(f"SAMANTICS_DRAWINGS names {named}, which is not there: correct or unset it")
    with reading(named), np.load(named) as stored:
        return named, dict(stored)


def _rasterised(keys: tuple[Key, ...]) -> dict[str, Any]:
    """`names` (artist/icon), `data` (lossless WebP, one after another) and `ends` (of each in `data`)."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = pool.map(_as_webp, keys, chunksize=64)
        chunks = list(tqdm(made, "rasterising the drawings", len(keys), leave=False))
    return {
        "names": np.array(["/".join(key) for key in keys]),
        "ends": np.cumsum([len(chunk) for chunk in chunks]),
        "data": np.frombuffer(b"".join(chunks), np.uint8),
    }


def _as_webp(key: Key) -> bytes:
    buffer, (artist, icon) = io.BytesIO(), key
    rasterised(load_package(artist).svg(icon)).save(buffer, "WEBP", lossless=True, quality=20, method=1)
    return buffer.getvalue()
