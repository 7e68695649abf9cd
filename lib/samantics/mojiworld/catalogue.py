"""The catalogue of MojiWorld: which drawing shows which class, in which superclass, by which artist.

A class is one thing (owl, helicopter, rose), its drawings are what independent artists made of it. Both tables are
committed; `curation` makes them from the packages of drawings by written rules.
"""

from __future__ import annotations

import difflib
import functools
import io
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from samantics.errors import StudyError
from samantics.mojiworld.drawings import ARTISTS, Key, artists_of, export_drawings, load_sprites

COLUMNS = ["codepoint", "class", "superclass", "artist", "icon"]


@functools.cache
def catalogue() -> pd.DataFrame:
    """All drawings, one row each: `codepoint, class, superclass, artist, icon, split` (of the artist).

    Raises:
        StudyError: the table is not what the library can use.
    """
    table = _asset("catalogue.csv")
    if list(table) != COLUMNS or not set(table["artist"]) <= set(ARTISTS):
        raise StudyError(
            "assets/catalogue.csv has other columns or artists than this version: restore it, or write it anew"
        )
    return table.assign(split=[ARTISTS[artist].split for artist in table["artist"]])


@functools.cache
def instance_classes() -> pd.DataFrame:
    """The 80 classes of the instance data: `class, superclass, part` (`base` or `novel`)."""
    return _asset("instance_classes.csv")


def _asset(name: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(files("samantics").joinpath(f"assets/{name}").read_text(encoding="utf-8")))


@functools.cache
def classes() -> tuple[str, ...]:
    """Names of all classes in the catalogue's order; their positions are the class labels."""
    return tuple(dict.fromkeys(catalogue()["class"]))


@functools.cache
def superclasses() -> tuple[str, ...]:
    """Names of all superclasses in the catalogue's order."""
    return tuple(dict.fromkeys(catalogue()["superclass"]))


@functools.cache
def class_of_drawing() -> NDArray[np.int64]:
    """`(D,)` class label of each drawing."""
    return _positions(catalogue()["class"], classes())


@functools.cache
def superclass_of_class() -> NDArray[np.int64]:
    """`(C,)` position in `superclasses` of each class."""
    first = catalogue().drop_duplicates("class")
    return _positions(first["superclass"], superclasses())


def _positions(values: Iterable[str], names: tuple[str, ...]) -> NDArray[np.int64]:
    place = {name: position for position, name in enumerate(names)}
    return np.array([place[value] for value in values], np.int64)


def class_labels(names: Iterable[str]) -> NDArray[np.int64]:
    """`(n,)` labels of the classes named.

    Raises:
        StudyError: there is no such class; the message names the nearest one.
    """
    names = tuple(names)
    for name in names:
        if name not in classes():
            near = ", ".join(difflib.get_close_matches(name, classes(), 3)) or "see catalogue.csv"
            raise StudyError(f"MojiWorld has no class {name!r}: perhaps {near}")
    return _positions(names, classes())


def drawings_of(splits: Iterable[str], labels: Iterable[int] | None = None) -> NDArray[np.int64]:
    """Rows of `catalogue`, ascending: the drawings by artists of some splits.

    Args:
        splits: `train`, `validation`, `test`.
        labels: of the classes they show; None: all classes.

    Raises:
        StudyError: there is no such split.
    """
    artists = [artist for split in splits for artist in artists_of(split)]
    shown = catalogue()["artist"].isin(artists).to_numpy()
    if labels is not None:
        shown = shown & np.isin(class_of_drawing(), list(labels))
    return np.flatnonzero(shown)


@functools.cache
def sprites() -> tuple[Image.Image, ...]:
    """All drawings of the catalogue as cropped RGBA images (see `load_sprites`)."""
    return load_sprites(keys())


def keys() -> list[Key]:
    """`(artist, icon)` of every drawing."""
    return list(catalogue()[["artist", "icon"]].itertuples(index=False, name=None))


def export_catalogue_drawings(path: Path | str) -> Path:
    """All drawings in one file, for a machine without npm (see `export_drawings`)."""
    return export_drawings(path, keys())
