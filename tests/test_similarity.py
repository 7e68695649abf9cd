"""Mutual nearest neighbours against scikit-learn's, and against what chance gives."""

from __future__ import annotations

import numpy as np
from sklearn.neighbors import NearestNeighbors

from samantics.data.classification import ClassificationData, Part, Task
from samantics.probing.similarity import (
    K,
    known_relations,
    mutual_knn,
    nearest,
    null,
    same,
    similarity_table,
)  # fmt: skip


def test_neighbours_are_sklearns_and_never_the_picture_itself() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 6))
    found = NearestNeighbors(n_neighbors=K, metric="cosine").fit(vectors).kneighbors(return_distance=False)
    expected = np.zeros((50, 50), bool)
    np.put_along_axis(expected, found, True, axis=1)
    assert np.array_equal(nearest(vectors), expected) and not nearest(vectors).diagonal().any()


def test_a_space_shares_all_with_its_rotation_and_what_chance_gives_with_noise() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 6))
    turned = vectors @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert mutual_knn(nearest(vectors), nearest(3 * turned)).mean() > 0.999
    noise = nearest(rng.normal(size=(200, 6)))
    by_chance = null(nearest(vectors), noise)
    assert abs(by_chance.mean() - K / 199) < 0.005  # of ten neighbours each is one of 199
    assert np.quantile(by_chance, 0.005) < mutual_knn(nearest(vectors), noise).mean() < np.quantile(by_chance, 0.995)


def test_the_table_tells_a_class_from_nothing() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 6
    spaces = {name: nearest(rng.normal(size=(120, 8)) + 4 * np.eye(8)[labels]) for name in ("sam", "clip")}
    table = similarity_table(spaces, {"class": same(labels), "nothing": same(rng.permutation(labels))})
    rows = table.set_index(["encoder", "other"])
    assert len(rows) == 6 and (rows.loc[(slice(None), "class"), "value"] > 90).all()
    assert (rows.loc[(slice(None), "class"), "p"] == 0.01).all()
    assert rows.loc[("sam", "clip"), "value"] > rows.loc[("sam", "clip"), "null_high"]
    assert (rows.loc[(slice(None), "nothing"), "p"] > 0.01).all()


def test_what_is_known_of_pictures_without_a_model() -> None:
    """Bars and squares, red and green; shape and colour are known each by themselves."""
    masks = np.zeros((48, 32, 32), np.uint8)
    masks[:24, 4:28, 12:16], masks[24:, 8:24, 8:24] = 1, 1
    masks[24:, 14:18, 14:18] = 0  # a hole
    images = np.zeros((48, 32, 32, 3), np.uint8)
    images[::2, ..., 0], images[1::2, ..., 1] = 200, 200
    part = Part("test", np.arange(48) // 12)
    task = Task("artist", tuple("abcd"), part, part, ("bar", "bar", "square", "square"))
    data = ClassificationData("made up", {"test": images}, {"test": "1"}, {"artist": task}, {"test": masks})
    known = known_relations(data, task, np.arange(48))
    assert list(known) == ["colour", "shape", "superclass", "class"]
    assert mutual_knn(known["colour"], same(np.arange(48) % 2)).mean() == 1
    assert mutual_knn(known["shape"], known["superclass"]).mean() == 1
    assert known["class"].sum() == 48 * 11
