"""The catalogue of MojiWorld: which drawing shows which class, in which superclass, by which artist.

A class is one thing (owl, helicopter, rose), its drawings are what independent artists made of it. Both tables are
committed; `curation` makes them from the packages of drawings by written rules.
"""

from __future__ import annotations

import functools
import io
from importlib.resources import files

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from samantics.errors import StudyError
from samantics.mojiworld.drawings import ARTISTS, Key, load_sprites

COLUMNS = ["codepoint", "class", "superclass", "artist", "icon"]


@functools.cache
def catalogue() -> pd.DataFrame:
    """All drawings, one row each: `codepoint, class, superclass, artist, icon, split` (of the artist).

    Raises:
        StudyError: the table is not what the library can use.
    """
    table = asset("catalogue.csv")
    if list(table) != COLUMNS or not set(table["artist"]) <= set(ARTISTS):
        raise StudyError(
            "assets/catalogue.csv has other columns or artists than this version: restore it, or write it anew"
        )
    return table.assign(split=[ARTISTS[artist].split for artist in table["artist"]])


@functools.cache
def instance_classes() -> pd.DataFrame:
    """The 80 classes of the instance data: `class, superclass, part` (`base` or `novel`)."""
    return asset("instance_classes.csv")


def asset(name: str) -> pd.DataFrame:
    """A table that is committed with the library."""
    return pd.read_csv(io.StringIO(files("samantics").joinpath(f"assets/{name}").read_text(encoding="utf-8")))


@functools.cache
def classes() -> tuple[str, ...]:
    """Names of all classes in the catalogue's order; their positions are the class labels."""
    return tuple(catalogue()["class"].unique())


@functools.cache
def superclasses() -> tuple[str, ...]:
    """Names of all superclasses in the catalogue's order."""
    return tuple(catalogue()["superclass"].unique())


@functools.cache
def class_of_drawing() -> NDArray[np.int64]:
    """`(D,)` class label of each drawing."""
    return pd.factorize(catalogue()["class"])[0]


@functools.cache
def superclass_of_drawing() -> NDArray[np.int64]:
    """`(D,)` position in `superclasses` of each drawing."""
    return pd.factorize(catalogue()["superclass"])[0]


@functools.cache
def superclass_of_class() -> NDArray[np.int64]:
    """`(C,)` position in `superclasses` of each class."""
    return superclass_of_drawing()[np.unique(class_of_drawing(), return_index=True)[1]]


@functools.cache
def sprites() -> tuple[Image.Image, ...]:
    """All drawings of the catalogue as cropped RGBA images (see `load_sprites`)."""
    return load_sprites(keys())


def keys() -> list[Key]:
    """`(artist, icon)` of every drawing."""
    return list(catalogue()[["artist", "icon"]].itertuples(index=False, name=None))
