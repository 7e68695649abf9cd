"""Captions of MojiWorld's pictures, the words they are made of, and prompts for zero-shot tests."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

import numpy as np

from samantics.mojiworld import catalogue as tables

OPENINGS = ("a picture of", "here is", "one sees", "this shows", "")
SEVERAL = ("and", "beside", "with")
BOTH = ("{a} {name} of the group {above}", "{above}: {a} {name}", "{a} {name} ({above})")
ABOVE_ONLY = ("something of the group {above}", "{above}")
NAME_ONLY = ("{a} {name}", "the {name}")
SHARES = (0.5, 0.35, 0.15)  # of objects that are named, named with their superclass, or by their superclass only


def caption(rng: np.random.Generator, drawings: Iterable[int]) -> str:
    """A caption that names the objects of a picture, in random order and varied forms.

    Args:
        rng: decides the form.
        drawings: catalogue rows, as in `Pictures`; -1 is skipped, and a class that is
            there several times is named once.

    Returns:
        The caption; its words (`split_words`) are among `caption_words`, and fewer than 75.
    """
    labels = dict.fromkeys(tables.class_of_drawing()[[row for row in drawings if row >= 0]].tolist())
    parts = []
    for label in rng.permutation(list(labels)):
        forms = (NAME_ONLY, BOTH, ABOVE_ONLY)[int(rng.choice(3, p=SHARES))]
        parts.append(_worded(forms[int(rng.integers(len(forms)))], int(label)))
    link = f" {SEVERAL[int(rng.integers(len(SEVERAL)))]} "
    return f"{OPENINGS[int(rng.integers(len(OPENINGS)))]} {link.join(parts)}".strip()


def _worded(form: str, label: int) -> str:
    name, above = _names()[label]
    return form.format(a="an" if name[0] in "aeiou" else "a", name=name, above=above)


@functools.cache
def _names() -> tuple[tuple[str, str], ...]:
    """Class and superclass of every label (looked up very often: a tuple is faster than the table)."""
    above = [tables.superclasses()[position] for position in tables.superclass_of_class()]
    return tuple(zip(tables.classes(), above, strict=True))


def class_prompts() -> tuple[tuple[str, ...], ...]:
    """For every class, in the order of its label, prompts whose text embeddings are averaged."""
    return tuple(
        tuple(f"{opening} {_worded(NAME_ONLY[0], label)}" for opening in OPENINGS[:3]) for label in range(len(_names()))
    )


def superclass_prompts() -> tuple[tuple[str, ...], ...]:
    """The same for every superclass."""
    forms = [f"{opening} {form}" for opening in OPENINGS[:2] for form in ABOVE_ONLY]
    return tuple(tuple(form.format(above=above) for form in forms) for above in tables.superclasses())


def split_words(text: str) -> list[str]:
    """Lower-case words of a text, without signs: what a tokenizer looks up."""
    return re.findall(r"[a-z0-9]+", text.lower())


@functools.cache
def caption_words() -> tuple[str, ...]:
    """All words that captions and prompts may hold, sorted: the vocabulary of a tokenizer."""
    forms = re.sub(r"{\w+}", "", " ".join([*OPENINGS, *SEVERAL, *BOTH, *ABOVE_ONLY, *NAME_ONLY, "a an"]))
    return tuple(sorted(set(split_words(" ".join([forms, *tables.classes(), *tables.superclasses()])))))
