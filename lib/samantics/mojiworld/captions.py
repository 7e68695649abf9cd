"""Captions of MojiWorld's pictures, the words they are made of, and prompts for zero-shot tests."""

import re
from collections.abc import Iterable

import numpy as np

from samantics.mojiworld import catalogue as tables

OPENINGS = ("a picture of", "here is", "one sees", "this shows", "")
LINKS = ("and", "beside", "with")
FORMS = (  # share of the objects that are called by their name, by both names, by their superclass; and how
    (0.5, ("{a} {name}", "the {name}")),
    (0.35, ("{a} {name} of the group {above}", "{above}: {a} {name}", "{a} {name} ({above})")),
    (0.15, ("something of the group {above}", "{above}")),
)


def caption(rng: np.random.Generator, drawings: Iterable[int]) -> str:
    """A caption that names the objects of a picture, in random order and varied forms.

    Args:
        rng: decides the form.
        drawings: catalogue rows, as in `Pictures`; -1 is skipped, and a class that is there several times named once.
    """
    labels = dict.fromkeys(tables.class_of_drawing()[[row for row in drawings if row >= 0]].tolist())
    parts = []
    for label in rng.permutation(list(labels)):
        _, forms = FORMS[int(rng.choice(len(FORMS), p=[share for share, _ in FORMS]))]
        parts.append(_worded(forms[int(rng.integers(len(forms)))], int(label)))
    link = f" {LINKS[int(rng.integers(len(LINKS)))]} "
    return f"{OPENINGS[int(rng.integers(len(OPENINGS)))]} {link.join(parts)}".strip()


def _worded(form: str, label: int) -> str:
    name, above = tables.classes()[label], tables.superclass_of_class()[label]
    return form.format(a="an" if name[0] in "aeiou" else "a", name=name, above=above)


def class_prompts() -> tuple[tuple[str, ...], ...]:
    """For every class, in the order of its label, prompts whose text embeddings are averaged."""
    labels = range(len(tables.classes()))
    return tuple(tuple(f"{opening} {_worded('{a} {name}', label)}" for opening in OPENINGS[:3]) for label in labels)


def split_words(text: str) -> list[str]:
    """Lower-case words of a text, without signs: what a tokenizer looks up."""
    return re.findall(r"[a-z0-9]+", text.lower())


def caption_words() -> tuple[str, ...]:
    """All words that captions and prompts may hold, sorted: the vocabulary of a tokenizer."""
    forms = re.sub(r"{\w+}", "", " ".join([*OPENINGS, *LINKS, *(form for _, its in FORMS for form in its), "a an"]))
    return tuple(sorted(set(split_words(" ".join([forms, *tables.classes(), *tables.superclasses()])))))
