"""The weaknesses of the paper's probing protocol, one line of a table each: what would the figure be without it?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samantics.models.architectures import Readout
from samantics.models.encoder import Encoder
from samantics.models.preprocessing import IMAGENET, OPENAI
from samantics.probing.linear import ProbeResult, linear_probe, paper_probe

Features = Mapping[Readout, tuple[NDArray[Any], NDArray[Any]]]  # train (N, C) and test (n, C)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        question: the weakness.
        setting: what was done.
        layer, pooling, dim: of the features that were probed.
        result: per test image and seed.
    """

    question: str
    setting: str
    layer: str
    pooling: str
    dim: int
    result: ProbeResult


def protocol_lines(
    features: Features,
    headline: Readout,
    train_y: NDArray[Any],
    test_y: NDArray[Any],
    classes: int,
    seeds: Sequence[int] = (0, 1, 2),
    long: int = 100,
) -> list[Line]:
    """The paper's probe of the headline features, and what changes with each of its choices.

    The paper's choices: one learning rate for all and features as they are, ten epochs, the best epoch on the very
    split that is reported. The last line is the sound probe, which makes none of them.

    Args:
        long: epochs of the line that asks whether ten were enough.
    """
    train_x, test_x = features[headline]
    data = (train_x, train_y, test_x, test_y, classes)
    short = [paper_probe(*data, seed=seed) for seed in seeds]
    trained = [paper_probe(*data, seed=seed, epochs=long) for seed in seeds]
    raw = linear_probe(*data, seeds=seeds, standardise=False)
    sound = linear_probe(*data, seeds=seeds)

    def line(question: str, setting: str, result: ProbeResult) -> Line:
        return Line(question, setting, *headline, train_x.shape[1], result)

    return [
        line(
            "the paper's protocol", "10 epochs, best on the reported split", joined([probe.result for probe in short])
        ),
        line("selection on the reported split", "10 epochs, the last", joined([probe.last for probe in short])),
        line("under-training", f"{long} epochs, the last", joined([probe.last for probe in trained])),
        line("one learning rate for all", "swept, features as they are", raw),
        line("no normalisation", "swept, features standardised", sound),
    ]


def feature_lines(
    features: Features,
    headline: Readout,
    train_y: NDArray[Any],
    test_y: NDArray[Any],
    classes: int,
    width: int,
    seeds: Sequence[int] = (0, 1, 2),
) -> list[Line]:
    """The sound probe of every layer and pooling given, and of the headline features projected to one ``width``."""
    lines = []
    for (layer, pooling), (train_x, test_x) in features.items():
        result = linear_probe(train_x, train_y, test_x, test_y, classes, seeds=seeds)
        lines.append(Line(_question(headline, (layer, pooling)), "", layer, pooling, train_x.shape[1], result))
    train_x, test_x = features[headline]
    results = []
    for seed in seeds:  # each with a projection of its own
        matrix = random_projection(train_x.shape[1], width, seed)
        results.append(linear_probe(train_x @ matrix, train_y, test_x @ matrix, test_y, classes, seeds=(seed,)))
    lines.append(Line("unequal widths", f"random projection to {width}", *headline, width, joined(results)))
    return lines


def _question(headline: Readout, wanted: Readout) -> str:
    if wanted == headline:
        return "headline"
    if wanted[0] == "before_projection":
        return "before the projection"
    return "pooling" if wanted[0] == headline[0] else "trunk instead of the last layer"


def random_projection(width: int, new_width: int, seed: int) -> NDArray[np.float32]:
    """``(width, new_width)`` Gaussian matrix that keeps lengths on average: compares encoders at one width."""
    rng = np.random.default_rng([seed, width, new_width])
    return (rng.normal(size=(width, new_width)) / np.sqrt(new_width)).astype(np.float32)


def joined(results: Sequence[ProbeResult]) -> ProbeResult:
    """Probes of one seed each as one result of many seeds."""
    return ProbeResult(
        np.concatenate([result.predictions for result in results]),
        np.concatenate([result.top1 for result in results]),
        np.concatenate([result.top5 for result in results]),
        sum((result.learning_rates for result in results), ()),
        sum((result.epochs for result in results), ()),
        sum((result.held_out for result in results), ()),
        sum((result.converged for result in results), ()),
    )


def input_variants(encoder: Encoder) -> dict[str, Encoder]:
    """The encoder with its own input and with each choice of the paper (or its opposite) made alone.

    ``own``; ``other statistics`` (ImageNet's for CLIP's own or, where the model has ImageNet's, CLIP's); and for
    encoders that keep the aspect ``squashed``, else ``aspect kept``. Square images look alike either way.
    """
    own = encoder.preprocess
    mean, std = OPENAI if (own.mean, own.std) == IMAGENET else IMAGENET
    shape: tuple[str, Any] = ("aspect kept", "pad") if own.fit == "squash" else ("squashed", "squash")
    return {
        "own": encoder,
        "other statistics": dataclasses.replace(encoder, preprocess=dataclasses.replace(own, mean=mean, std=std)),
        shape[0]: dataclasses.replace(encoder, preprocess=dataclasses.replace(own, fit=shape[1])),
    }
