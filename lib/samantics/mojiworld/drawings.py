"""The drawings of MojiWorld: nine open emoji sets, one for each artist, rasterised once.

The sets are npm packages pinned in `package.json`; `scripts/environment.sh` installs them into the environment's
own folder. What they are rasterised to is one file of 8 MB in the cache's folder `drawings`. A machine without npm
can be given a copy of that file: the variable `SAMANTICS_DRAWINGS` names it.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import resvg_py
from PIL import Image
from tqdm.auto import tqdm

from samantics.cache import ASSETS, PROJECT, cache_dir, hash_value, kept, reading
from samantics.errors import StudyError

SPRITE_SIZE = 128  # pixels of a rasterised drawing before it is cropped to what it shows
ELSEWHERE = "set SAMANTICS_DRAWINGS to a copy of another machine's .cache/drawings/*.npz"
CURE = f"run scripts/environment.sh again (it installs them), or {ELSEWHERE}"

Key = tuple[str, str]  # (artist, icon)


class Artist(NamedTuple):
    """One set of drawings, by one artist."""

    split: str  # `train`, `validation` or `test`: who may see its drawings (see `world`)
    title: str  # the set's name, and who made it
    licence: str  # SPDX identifier
    version: str  # of the package `@iconify-json/<name>`
    digest: str  # first 16 hexadecimal digits of SHA-256 over its `icons.json` and `chars.json`


ARTISTS: Mapping[str, Artist] = {
    name: Artist(*cells) for name, *cells in pd.read_csv(ASSETS / "artists.csv", dtype=str).itertuples(index=False)
}


def packages_dir() -> Path:
    """The folder `node_modules` that holds the sets."""
    homes = [Path(sys.prefix) / "drawings", PROJECT / ".venv" / "drawings"]
    return next((home for home in homes if home.is_dir()), homes[0]) / "node_modules"


@functools.cache
def load_package(artist: str) -> tuple[dict[str, Any], dict[str, str]]:
    """`icons.json` (Iconify's: icons by name, aliases, sizes) and `chars.json` (code points -> icon) of one set.

    StudyError where it is missing or not the very package that is pinned.
    """
    wanted, folder = ARTISTS[artist], packages_dir() / "@iconify-json" / artist
    try:
        icons, chars = ((folder / name).read_bytes() for name in ("icons.json", "chars.json"))
    except OSError as error:
        raise StudyError(f"the drawings @iconify-json/{artist} are not installed in {folder}: {CURE}") from error
    if hashlib.sha256(icons + chars).hexdigest()[:16] != wanted.digest:
        raise StudyError(f"{folder} was altered, or is not version {wanted.version}: delete it, then {CURE}")
    return json.loads(icons), json.loads(chars)


def rasterised(artist: str, icon: str, size: int = SPRITE_SIZE) -> Image.Image:
    """A drawing, centred on a square of `size` pixels a side, as an RGBA image cropped to what it shows."""
    icons, _ = load_package(artist)
    entry = icons["icons"][icon]
    width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
    side = max(width, height)
    left, top = entry.get("left", 0) - (side - width) / 2, entry.get("top", 0) - (side - height) / 2
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {side} {side}">{entry["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha >= 8)).getbbox())


def load_sprites(keys: Iterable[Key]) -> tuple[Image.Image, ...]:
    """The drawings named, as cropped RGBA images, in the order of `keys`; rasterised on the first call ever."""
    keys, named = tuple(keys), os.environ.get("SAMANTICS_DRAWINGS")
    if named and not Path(named).is_file():
        raise StudyError(f"SAMANTICS_DRAWINGS names {named}, which is not there: correct or unset it")
    versions = {name: artist.digest for name, artist in ARTISTS.items()}
    path = Path(named or cache_dir() / "drawings" / f"{hash_value([SPRITE_SIZE, versions, keys])}.npz")
    stored = kept(path, functools.partial(_rasterised, keys))
    with reading(path):
        spans, data = itertools.pairwise([0, *stored["ends"].tolist()]), stored["data"].tobytes()
        images = [Image.open(io.BytesIO(data[slice(*span)])).convert("RGBA") for span in spans]
        drawn = dict(zip(stored["names"].tolist(), images, strict=True))
    missing = [name for name in map("/".join, keys) if name not in drawn]
    if missing:
        raise StudyError(f"{path} lacks {len(missing)} drawings, such as {missing[0]}: {ELSEWHERE}")
    return tuple(drawn["/".join(key)] for key in keys)


def _rasterised(keys: tuple[Key, ...]) -> dict[str, Any]:
    """`names` (artist/icon), `data` (lossless WebP, one after another) and `ends` (of each in `data`)."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = pool.map(_as_webp, keys, chunksize=64)
        chunks = list(tqdm(made, "rasterising the drawings", len(keys), leave=False))
    names, ends = np.array(["/".join(key) for key in keys]), np.cumsum([len(chunk) for chunk in chunks])
    return {"names": names, "ends": ends, "data": np.frombuffer(b"".join(chunks), np.uint8)}


def _as_webp(key: Key) -> bytes:
    buffer = io.BytesIO()
    rasterised(*key).save(buffer, "WEBP", lossless=True, quality=20, method=1)
    return buffer.getvalue()
