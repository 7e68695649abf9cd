"""Notebook 01's tables: kept until anything changes, and the right rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from PIL import Image

from samantics.data import classification
from samantics.data import first_world as mojiworld
from samantics.metrics.intervals import bootstrap_mean
from samantics.models.encoder import load_encoder
from samantics.probing import tables
from samantics.probing.features import encode_images
from samantics.probing.knn import knn_probe
from samantics.probing.linear import linear_probe
from samantics.probing.protocol import training_changes
from stub_encoder import MEAN, stored

LABELS, ROWS = np.arange(60) % 3, np.arange(60)


def _encoded(table, folder, name="sam", weights="0") -> tables.Encoded:
    store = stored(folder, table.astype(np.float32), 32, weights)
    return tables.Encoded(name, MEAN, ("early", "final"), {"all": store})


def _task(labels=LABELS) -> classification.Task:
    parts = [classification.Part("all", labels[part], ROWS[part]) for part in (ROWS < 40, ROWS >= 40)]
    return classification.Task("category", tuple("abc"), *parts)


def test_features_of_some_rows_and_of_a_whole_split(tmp_path) -> None:
    table = np.random.default_rng(0).normal(size=(60, 3)).round(2)
    encoded = _encoded(table, tmp_path)
    features, labels = encoded.features(_task().test)
    np.testing.assert_allclose(features, table[40:], atol=2e-3)
    assert labels.tolist() == LABELS[40:].tolist()
    whole, labels = encoded.features(classification.Part("all", LABELS))
    np.testing.assert_allclose(whole.take(ROWS), table, atol=2e-3)
    assert labels.tolist() == LABELS.tolist()


def test_a_probe_is_trained_once_and_again_for_other_labels(tmp_path, monkeypatch) -> None:
    encoded, task = _encoded(np.random.default_rng(0).normal(size=(60, 5)), tmp_path), _task()
    first = tables.probe(encoded, task, seeds=2)
    table = tables.few_shot({"sam": encoded}, task, (1, 2), 2)

    def forbidden(*_args, **_named):
        raise AssertionError("trained again")

    monkeypatch.setattr(tables, "linear_probe", forbidden)
    for before, after in zip(first, tables.probe(encoded, task, seeds=2), strict=True):
        np.testing.assert_equal(after, before)
    pd.testing.assert_frame_equal(tables.few_shot({"sam": encoded}, task, (1, 2), 2), table)
    other = _task(np.concatenate([LABELS[:40][::-1], LABELS[40:]]))
    for changed in (lambda: tables.probe(encoded, task, seeds=3), lambda: tables.probe(encoded, other, seeds=2)):
        with pytest.raises(AssertionError, match="trained again"):
            changed()


def test_a_table_is_made_again_where_any_of_its_models_was_trained_again(tmp_path) -> None:
    rng = np.random.default_rng(0)
    sam, old = (_encoded(rng.normal(size=(60, 5)), tmp_path, weights=weights) for weights in ("sam", "old clip"))
    new = _encoded(np.eye(3)[LABELS], tmp_path, weights="new clip")
    before, after = (tables.few_shot({"sam": sam, "clip": clip}, _task(), (4,), 2)["top1"] for clip in (old, new))
    assert before[0] == after[0] and before[1] < 80 < after[1] == 100


def test_a_separable_task_is_probed_perfectly_and_shuffled_labels_are_not(tmp_path) -> None:
    rng = np.random.default_rng(0)
    encoded = _encoded(rng.normal(size=(60, 6)) + 6 * np.eye(6)[LABELS], tmp_path)
    table, answers = tables.headline({"sam": encoded}, {"category": _task()}, seeds=2)
    assert table["probe"].tolist() == ["linear", "knn"] and table["seeds"].tolist() == [2, 1]
    assert (table["top1"] == 100).all() and (table["n_test"] == 20).all() and (table["dim"] == 6).all()
    classes = tables.class_rows(answers, _task(), encoded.data(_task())[3])
    assert classes["class"].tolist() == ["a", "b", "c"] and (classes["top1"] == 100).all()
    shots = tables.few_shot({"sam": encoded}, _task(), (1, 4, 64), seeds=2)
    assert shots["shots"].tolist() == [1, 4] and shots["top1"].iloc[-1] > 90
    mixed = _task(rng.permutation(LABELS))
    assert tables.row(encoded, mixed, "knn", tables.probe(encoded, mixed, "knn"))["top1"] < 60


def test_layers_poolings_and_the_protocol_have_their_rows(tmp_path, pocket_run) -> None:
    """The zoo's untrained CLIP on squares of six colours, and on the same colours as wide photographs."""
    scale = dataclasses.replace(pocket_run.scale, weights="zoo_random")
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (60, 1, 1, 3)) // 2 + 100 * np.eye(3, dtype=int)[LABELS][:, None, None]
    squares = np.broadcast_to(colours.clip(0, 255).astype(np.uint8), (60, 8, 8, 3))
    wide = [Image.fromarray(square).resize((16, 8)) for square in squares]
    for images, variants in ((squares, ["other statistics"]), (wide, ["other statistics", "aspect kept"])):
        hashes = {"all": f"colours {len(variants)}"}
        data = classification.ClassificationData("colours", {"all": images}, hashes, {"category": _task()}, {})
        run = dataclasses.replace(pocket_run, scale=scale, facts={})
        found = tables.encode_all(run, data, ["clip"])
        lines = tables.protocol_rows(run, data, found, _task(), seeds=1)
        assert lines["setting"].tolist()[-len(variants) - 1 :] == ["own", *variants]
        assert lines["question"].tolist()[:5] == [question for question, _ in _changes()]
    by_question = lines.groupby("question", sort=False)["top1"].first()
    assert by_question["headline"] == by_question["the encoder's input"] == by_question["no normalisation"]
    others = lines[lines["setting"] == ""]
    assert others["question"].tolist() == [
        "headline", "trunk instead of the last layer", "before the projection", "pooling", "before the projection",
    ]  # fmt: skip
    assert run.facts["weights:clip"] and run.facts["data:all"] == "colours 2"
    layers = tables.layer_rows(found, data.tasks)
    assert layers["depth"].iloc[-1] == 1 and layers["layer"].tolist() == list(found["clip"].layers)
    assert tables.pooling_rows(found, data.tasks, 1)["pooling"].tolist() == ["mean", "cls"]


def _changes() -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 3)).astype(np.float32), np.arange(12) % 2
    return list(training_changes((x, y, x, y, 2), (0,)))


def _table(sam, clip, dinov2):
    rows = [
        {
            "encoder": name,
            "labels": "category",
            "probe": "linear",
            "top1": value,
            "top1_low": value - 2,
            "top1_high": value + 2,
        }
        for name, value in (("sam", sam), ("clip", clip), ("dinov2", dinov2))
    ]
    return pd.DataFrame(rows)


def test_models_trained_once_keep_their_row_and_others_give_the_mean_of_their_trainings() -> None:
    others = pd.DataFrame({"model": ["clip", "clip"], "labels": ["category", "drawing"], "top1": [58.0, 90.0]})
    others = others.assign(top1_low=others["top1"] - 2, top1_high=others["top1"] + 2)
    table = _table(10, 60, 40).assign(layer="final", seeds=3)
    rows = tables.zoo_rows(table, others).set_index("encoder")
    assert rows.loc["sam", ["top1", "top1_low", "top1_high", "zoos"]].tolist() == [10, 8, 12, 1]
    clip = rows.loc["clip"]
    assert (clip["top1"], clip["lowest"], clip["highest"], clip["zoos"]) == (59, 58, 60, 2)
    noise = scipy.stats.t.ppf(0.975, 1) * 1  # two values 2 apart: the error of their mean is 1
    assert clip["top1_high"] == pytest.approx(59 + np.hypot(noise, 2))
    far = tables.zoo_rows(table, others.assign(top1=[20.0, 90.0])).set_index("encoder").loc["clip"]
    assert (far["top1_low"], far["top1_high"]) == (0, 100)


@pytest.mark.parametrize("name", ["sam", "dinov2"])
def test_half_precision_on_disk_changes_no_accuracy_beyond_its_interval(name: str, tmp_path) -> None:
    """The zoo's features of 40 drawings, as they come and as the store keeps them."""
    encoder, world = load_encoder(name), mojiworld.World()
    views = mojiworld.render(lambda index: mojiworld.object_picture(world, "halves", index, index // 6), range(240))
    labels, test = np.arange(240) // 6, np.arange(240) % 6 > 3
    with torch.inference_mode():
        pixels = encoder.inputs([Image.fromarray(image) for image in views.images])
        whole = encoder.pooled(pixels, [encoder.headline])[encoder.headline].numpy()
    half = encode_images(encoder, views.images, [encoder.headline], "data", folder=tmp_path).read(encoder.headline)
    assert not np.array_equal(whole, half)
    results = [
        (
            linear_probe(x[~test], labels[~test], x[test], labels[test], 40, seeds=(0,)),
            knn_probe(x[~test], labels[~test], x[test], labels[test], 40),
        )
        for x in (whole, half)
    ]
    for before, after in zip(*results, strict=True):
        interval = bootstrap_mean(100.0 * before.top1)
        assert interval.low <= 100 * after.top1.mean() <= interval.high
        assert (before.predictions == after.predictions).mean() > 0.9
