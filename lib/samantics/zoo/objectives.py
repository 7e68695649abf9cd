"""What each model of the pocket zoo is trained for: the same pictures for all, one class of one contract each.

A new objective is a subclass of `contract.Objective` and a line of `OBJECTIVES`: the training loop and the command
line know it by that line alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from samantics.errors import StudyError
from samantics.models import pocket
from samantics.zoo.contract import Objective
from samantics.zoo.masks import Sam2Objective, SamObjective
from samantics.zoo.pixels import HieraObjective, MaeObjective
from samantics.zoo.views import SelfSupervision
from samantics.zoo.words import ClipObjective, SupervisedObjective


@dataclasses.dataclass(frozen=True)
class Entry:
    """One way to train a model."""

    make: Callable[[pocket.ZooConfig], Objective]  # the objective, its model untrained and of these sizes
    architecture: str  # the pocket model that it ships
    asks: str  # the question that its loss puts to a picture
    parent: str = ""  # the trained model whose trunk it starts from; empty: none


MASKS = "which pixels belong to the thing under this click, or in this box?"
PIXELS = "what is behind the hidden squares?"
VIEWS = "which views are of one picture?"
OBJECTIVES = {
    "mae": Entry(MaeObjective, "mae", PIXELS),
    "hiera": Entry(HieraObjective, "sam2", PIXELS),
    "sam": Entry(SamObjective, "sam", MASKS, parent="mae"),
    "sam2": Entry(Sam2Objective, "sam2", MASKS, parent="hiera"),
    "clip": Entry(ClipObjective, "clip", "which of these captions belongs to this picture?"),
    "dinov2": Entry(SelfSupervision, "dinov2", VIEWS),
    "supervised": Entry(SupervisedObjective, "supervised", "which classes does this picture show?"),
    "simclr": Entry(functools.partial(SelfSupervision, maps=False), "dinov2", VIEWS),
    "sam_scratch": Entry(SamObjective, "sam", MASKS),
    "sam2_scratch": Entry(Sam2Objective, "sam2", MASKS),
}


def entry(name: str) -> Entry:
    """How the model or control of that name is trained; StudyError where there is none."""
    if name not in OBJECTIVES:
        raise StudyError(f"no objective is called {name!r}: choose from {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def build_objective(name: str, config: pocket.ZooConfig = pocket.DEFAULT) -> Objective:
    """The untrained objective of that name; `StudyError` where there is none."""
    return entry(name).make(config)
