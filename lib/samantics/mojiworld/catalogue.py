"""The catalogue of MojiWorld: which drawing shows which class, in which superclass, by which artist.

A class is one thing (owl, helicopter, rose), its drawings are what independent artists made of it. Both tables are
committed; `scripts/curation.py` makes them from the packages of drawings by written rules.
"""

import functools

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from samantics.cache import ASSETS
from samantics.mojiworld.drawings import ARTISTS, load_sprites


@functools.cache
def catalogue() -> pd.DataFrame:
    """All drawings, one row each: `codepoint, class, superclass, artist, icon, split` (of the artist)."""
    table = pd.read_csv(ASSETS / "catalogue.csv")
    return table.assign(split=[ARTISTS[artist].split for artist in table["artist"]])


@functools.cache
def instance_classes() -> pd.DataFrame:
    """The 80 classes of the instance data: `class, superclass, part` (`base` or `novel`)."""
    return pd.read_csv(ASSETS / "instance_classes.csv")


@functools.cache
def classes() -> tuple[str, ...]:
    """Names of all classes in the catalogue's order; their positions are the class labels."""
    return tuple(catalogue()["class"].unique())


@functools.cache
def superclasses() -> tuple[str, ...]:
    """Names of all superclasses in the catalogue's order."""
    return tuple(catalogue()["superclass"].unique())


@functools.cache
def superclass_of_class() -> tuple[str, ...]:
    """The superclass of each class, by name."""
    return tuple(catalogue().drop_duplicates("class")["superclass"])


@functools.cache
def class_of_drawing() -> NDArray[np.int64]:
    """`(D,)` class label of each drawing."""
    return pd.factorize(catalogue()["class"])[0]


@functools.cache
def superclass_of_drawing() -> NDArray[np.int64]:
    """`(D,)` position in `superclasses` of each drawing."""
    return pd.factorize(catalogue()["superclass"])[0]


@functools.cache
def sprites() -> tuple[Image.Image, ...]:
    """All drawings of the catalogue as cropped RGBA images (see `load_sprites`)."""
    return load_sprites(zip(catalogue()["artist"], catalogue()["icon"], strict=True))
