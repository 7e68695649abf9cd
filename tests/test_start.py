from __future__ import annotations

import numpy as np
import pytest

from samantics.data import first_world as mojiworld
from samantics.zoo import start as start_figures


def test_a_map_is_averaged_on_the_object_and_off_it_but_not_on_its_border() -> None:
    instances = np.zeros((8, 8), np.uint8)
    instances[:3, :4] = 1  # a token of 4 x 4 pixels, three quarters of it
    instances[3:, 7] = 1  # touches two more, a little
    picture = mojiworld.Picture(np.zeros((8, 8, 3), np.uint8), instances, (0,))
    maps = {"a": np.array([[0.9, 0.1], [0.3, 0.7]]), "b": np.array([[1.0, 0.0], [0.5, 0.0]])}
    assert start_figures.on_and_off(picture, maps) == {"a": (0.9, 0.3), "b": (1.0, 0.5)}


def test_variance_between_kinds_is_all_or_nothing_where_it_should_be() -> None:
    rng = np.random.default_rng(0)
    means = rng.random((2, 1, 1, 1, 3))
    own = rng.random((1, 3, 1, 1, 3))
    shape = (2, 3, 4, 4, 3)
    assert start_figures.between_kinds(np.broadcast_to(means, shape).reshape(6, 4, 4, 3), 2) == pytest.approx(100)
    assert start_figures.between_kinds(np.broadcast_to(own, shape).reshape(6, 4, 4, 3), 2) == pytest.approx(0)
