"""The attentive probe: it starts at the mean, and finds one token among many, which a mean hides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from samantics.probing.attentive import QUERIES, AttentiveProbe, attentive_probe
from samantics.probing.linear import linear_probe

TOKENS, WIDTH, CLASSES = 36, 8, 4


@pytest.fixture(scope="module")
def hidden() -> tuple[np.ndarray, np.ndarray]:
    """`(400, 36, 8)` noise; one token, marked in the first number, carries the class in four others."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) % CLASSES
    maps = rng.normal(size=(400, TOKENS, WIDTH))
    where = rng.integers(TOKENS, size=400)
    maps[np.arange(400), where, 0] += 8
    maps[np.arange(400), where, 1:5] += 4 * np.eye(CLASSES)[labels]
    return maps.astype(np.float32), labels


def test_it_starts_at_the_mean_over_tokens() -> None:
    torch.manual_seed(0)
    tokens, probe = torch.randn(5, TOKENS, WIDTH), AttentiveProbe(WIDTH, 3, seed=0).eval()
    probe.queries.data.zero_()
    probe.layer.weight.data = torch.eye(3, QUERIES * WIDTH)
    expected = tokens.mean(1)[:, :3]  # batch norms are fresh: they change nothing but their epsilon
    torch.testing.assert_close(probe(tokens.flatten(1)), expected, atol=1e-4, rtol=1e-4)


def test_it_finds_the_token_that_a_mean_drowns(hidden) -> None:
    maps, labels = hidden
    flat, train = maps.reshape(400, -1), np.arange(400) < 300
    data = flat[train], labels[train], flat[~train], labels[~train], CLASSES
    found = attentive_probe(*data, seeds=(0, 1), epochs=40)
    assert found.top1.shape == (2, 100) and (found.top1 == (found.predictions == labels[~train])).all()
    mean = linear_probe(maps[train].mean(1), labels[train], maps[~train].mean(1), labels[~train], CLASSES, seeds=(0,))
    assert found.top1.mean() > mean.top1.mean() + 0.2
    mixed = attentive_probe(flat[train], np.random.default_rng(0).permutation(labels[train]), *data[2:], epochs=10)
    assert mixed.top1.mean() < 0.45
