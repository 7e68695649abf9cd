"""The paper's protocol against its loop written out; each changed choice changes what it says and nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from samantics.models.encoder import load_encoder
from samantics.models.preprocessing import OPENAI
from samantics.probing import linear
from samantics.probing.linear import linear_probe
from samantics.probing.protocol import (
    Data,
    paper_input,
    paper_probe,
    projected_probe,
    training_changes,
)
from stub_encoder import CLASSES, MEAN, overlapping_classes, stored


@pytest.fixture(scope="module")
def tamed() -> Data:
    """Smaller numbers, as the paper's probe takes features as they are."""
    x, y, test_x, test_y = overlapping_classes()
    return x / 100, y, test_x / 100, test_y, CLASSES


def test_paper_probe_is_an_ordinary_training_loop(tamed: Data) -> None:
    x, y, test_x, test_y, _ = tamed
    course = paper_probe(*tamed, epochs=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = torch.nn.Linear(24, CLASSES)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(3):
        for rows in torch.from_numpy(rng.permutation(len(y))).split(128):
            loss = torch.nn.functional.cross_entropy(head(torch.from_numpy(x)[rows]), torch.from_numpy(y)[rows])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimiser.step()
    accuracy = (head(torch.from_numpy(test_x)).argmax(1).numpy() == test_y).mean()
    assert abs(accuracy - course[2].top1.mean()) < 0.02  # the same but for 16-bit rounding


def test_the_changes_of_training(tamed: Data) -> None:
    found = training_changes(tamed, seed=1)
    accuracy = {question: result.top1.mean() for (question, _), result in found.items()}
    assert all(result.top1.shape == (1, len(tamed[3])) for result in found.values())
    assert accuracy["selection on the reported split"] <= accuracy["the paper's protocol"]
    assert accuracy["under-training"] > accuracy["selection on the reported split"] + 0.1
    course = paper_probe(*tamed, seed=1)
    paper, last, _, raw = found.values()
    assert len(course) == 10 and last.top1.mean() == pytest.approx(course[-1].top1.mean(), abs=0.005)
    assert paper.top1.mean() == pytest.approx(max(result.top1.mean() for result in course), abs=0.005)
    assert linear_probe(*tamed, seeds=(1,)).top1.mean() > raw.top1.mean()


def test_projections_keep_distances_on_average_and_are_the_same_from_a_store(
    tamed: Data, tmp_path, monkeypatch
) -> None:
    x, y, test_x, test_y, classes = tamed
    x, test_x = ((part / x.std(0)).astype(np.float16).astype(np.float32) for part in (x, test_x))
    wide, narrow = (projected_probe((x, y, test_x, test_y, classes), width) for width in (200, 8))
    direct = linear_probe(x, y, test_x, test_y, classes, seeds=(0,))
    assert wide.top1.mean() == pytest.approx(direct.top1.mean(), abs=0.03)
    assert direct.top1.mean() > narrow.top1.mean() + 0.05 > 1 / CLASSES + 0.05
    columns = [stored(tmp_path / name, part).column(MEAN) for name, part in (("a", x), ("b", test_x))]
    monkeypatch.setattr(linear, "CHUNK_BYTES", 4 * 8 * 150)
    streamed = projected_probe((columns[0], y, columns[1], test_y, classes), 8)
    assert streamed.top1.mean() == pytest.approx(narrow.top1.mean(), abs=0.03)  # another order of the images


def test_the_papers_input_changes_statistics_and_padding_and_nothing_else() -> None:
    encoder = load_encoder("clip", "zoo_random")
    assert paper_input(encoder).preprocess == encoder.preprocess  # the zoo has the paper's
    for changes, expected in (
        ({"mean": OPENAI[0], "std": OPENAI[1]}, {}),
        ({"fit": "pad"}, {"fit": "squash"}),
        ({"fit": "crop"}, {"fit": "crop"}),
    ):
        own = dataclasses.replace(encoder, preprocess=dataclasses.replace(encoder.preprocess, **changes))
        assert paper_input(own).preprocess == dataclasses.replace(encoder.preprocess, **expected)
