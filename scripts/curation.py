"""How the catalogue is made: the rules by which drawings, classes and superclasses are chosen.

1. Candidates are the emoji of five groups (`GROUPS`): things, no faces, people, symbols or flags.
2. An artist's drawing of an emoji is found by its code points, else by its names; a name of two emoji is no name.
3. Drawings that fill a tile (`is_tile`) are left out: their silhouette is the tile's, not the thing's.
4. A class has both test artists and at least `MIN_TRAIN_ARTISTS` train artists.
5. Of emoji that differ by a detail one stays, and what is not one thing with one look goes (`LEFT_OUT`).

The lists are in `assets/curation.json`.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from samantics.cache import ASSETS, write_text
from samantics.errors import StudyError
from samantics.mojiworld.drawings import ARTISTS, Key, load_package, packages_dir, rasterised

GROUPS = ("Animals & Nature", "Food & Drink", "Activities", "Objects", "Travel & Places")  # as twemoji names them
MIN_TRAIN_ARTISTS, TEST_ARTISTS = 4, 2
NOVEL, INSTANCE_CLASSES = 20, 80
TILE_COVER = 0.93  # of its square box: round and pointed things cover less, and so do nearly all boxes

# superclass -> its emoji; reason to leave out -> emoji, as a regular expression; artist -> emoji whose name leads to
# something else there, or to a framed picture; emoji -> what the thing is called, where that is another name
SUPERCLASSES, LEFT_OUT, WRONG, RENAMED = json.loads((ASSETS / "curation.json").read_text(encoding="utf-8")).values()


def candidates() -> dict[str, str]:
    """Code points -> Twemoji's name, of all emoji in `GROUPS`."""
    (icons, chars), path = load_package("twemoji"), packages_dir() / "@iconify-json" / "twemoji" / "metadata.json"
    groups = json.loads(path.read_text(encoding="utf-8"))["categories"]
    wanted = {icon for group in GROUPS for icon in groups[group]}
    return {code: icon for code, icon in sorted(chars.items()) if icon_named(icons, icon) in wanted}


def icon_named(icons: dict[str, Any], name: str) -> str | None:
    """The icon of that name, also through its aliases; None where there is none."""
    for _ in range(5):  # an alias may name an alias
        if name in icons["icons"]:
            return name
        name = icons.get("aliases", {}).get(name, {}).get("parent", "")
    return None


def emoji_names() -> dict[str, tuple[str, ...]]:
    """Code points -> the names by which artists call them, those with aliases too; never the name of two emoji."""
    names: dict[str, set[str]] = {}
    for artist in ARTISTS:
        icons, chars = load_package(artist)
        codes: dict[str, list[str]] = {}
        for code, icon in chars.items():
            names.setdefault(code, set()).add(icon)
            codes.setdefault(icon, []).append(code)
        for alias, entry in icons.get("aliases", {}).items():
            for code in codes.get(entry["parent"], []):
                names[code].add(alias)
    owners = Counter(name for several in names.values() for name in several)
    return {code: tuple(sorted(name for name in several if owners[name] == 1)) for code, several in names.items()}


def is_tile(image: Image.Image) -> bool:
    """Whether a cropped drawing is a filled, roughly square tile."""
    cover = float((np.asarray(image.getchannel("A")) >= 128).mean())
    return cover > TILE_COVER and 0.9 < image.width / image.height < 1.1


def write_catalogue(folder: Path = ASSETS) -> tuple[Path, Path]:
    """Make `catalogue.csv` and `instance_classes.csv` from the installed packages; their paths."""
    table, paths = made_catalogue(), (folder / "catalogue.csv", folder / "instance_classes.csv")
    for path, content in zip(paths, (table, made_instance_classes(table)), strict=True):
        write_text(path, content.to_csv(index=False, lineterminator="\n"))
    return paths


def made_catalogue() -> pd.DataFrame:
    """One row a drawing, by superclass, class, artist; StudyError for an emoji neither placed nor left out."""
    superclass_of = {icon: name for name, icons in SUPERCLASSES.items() for icon in icons.split()}
    left_out = re.compile("|".join(LEFT_OUT.values()))
    names, rows, unplaced = emoji_names(), [], []
    for code, icon in candidates().items():
        if icon not in superclass_of and left_out.fullmatch(icon):
            continue
        drawn = drawings_of_emoji(code, icon, names.get(code, ()))
        splits = Counter(ARTISTS[artist].split for artist, _ in drawn)
        if splits["train"] < MIN_TRAIN_ARTISTS or splits["test"] < TEST_ARTISTS:
            continue
        if icon not in superclass_of:
            unplaced.append(icon)
            continue
        name = RENAMED.get(icon, icon).replace("-", " ")
        rows += [(code, name, superclass_of[icon], artist, found) for artist, found in drawn]
    if unplaced:
        raise StudyError(f"{', '.join(unplaced)}: place these emoji in assets/curation.json")
    order = {name: place for place, name in enumerate(SUPERCLASSES)}
    rows.sort(key=lambda row: (order[row[2]], row[1], list(ARTISTS).index(row[3])))
    return pd.DataFrame(rows, columns=["codepoint", "class", "superclass", "artist", "icon"])


def drawings_of_emoji(code: str, icon: str, names: Iterable[str]) -> list[Key]:
    """Every artist's drawing of an emoji, as (artist, icon); `icon` is Twemoji's name, `names` the others'."""
    drawn = []
    for artist in ARTISTS:
        icons, chars = load_package(artist)
        if icon in WRONG.get(artist, "").split():
            continue
        known = [chars[code]] if code in chars else [icon, *names]
        if artist == "fxemoji":
            known = [name.replace("-", "") for name in known]
        own = next((found for name in known if (found := icon_named(icons, name))), None)
        if own and not is_tile(rasterised(artist, own, 64)):
            drawn.append((artist, own))
    return drawn


def made_instance_classes(table: pd.DataFrame) -> pd.DataFrame:
    """`class, superclass, part` of the 80 classes of the instance data, chosen before any result by lot.

    Drawn by all nine artists; four of a superclass, in the 20 superclasses that have the most of them: three are base
    (60 in all), one is novel (20), so that base and novel classes have the same superclasses.
    """
    whole = table.groupby(["superclass", "class"], sort=False)["artist"].nunique()
    known = whole[whole == len(ARTISTS)].reset_index()
    known["lot"] = [zlib.crc32(name.encode()) for name in known["class"]]
    most = known["superclass"].value_counts(sort=False).nlargest(NOVEL).index
    chosen = known[known["superclass"].isin(most)].sort_values("lot").groupby("superclass", sort=False).head(4)
    order = chosen.sort_values(["superclass", "lot"])
    parts = np.tile(["base"] * (INSTANCE_CLASSES // NOVEL - 1) + ["novel"], NOVEL)
    return order.assign(part=parts).sort_index().reset_index(drop=True)[["class", "superclass", "part"]]
