"""Notebook 01's tables: no held-out drawing in train, streamed equal to whole, sentences that follow the numbers."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from PIL import Image

from samantics.data import classification
from samantics.data import first_world as mojiworld
from samantics.errors import StudyError
from samantics.metrics.intervals import bootstrap_mean
from samantics.models.encoder import load_encoder
from samantics.probing import figures as probing_figures
from samantics.probing import tables as probing
from samantics.probing.features import encode_images
from samantics.probing.linear import ProbeResult, knn_probe, linear_probe
from stub_encoder import MEAN, LookUp


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> classification.ClassificationData:
    def blank(_world, views, _workers=0) -> mojiworld.Pictures:
        count = views * len(mojiworld.catalogue())
        empty = np.zeros((count, 1, 1), np.uint8)
        return mojiworld.Pictures(np.zeros((count, 1, 1, 3), np.uint8), empty, np.zeros((count, 6), np.int16))

    patch = pytest.MonkeyPatch()
    patch.setattr(mojiworld, "classification_pictures", blank)
    found = classification.mojiworld_data(mojiworld.World(), 6, 2)
    patch.undo()
    return found


def test_no_held_out_drawing_is_in_a_train_image_of_the_category_probe(data) -> None:
    task = data.tasks["category"]
    drawing = np.repeat(np.arange(626), 6)
    assert not mojiworld.held_out()[drawing[task.train.rows]].any()
    assert mojiworld.held_out()[drawing[task.test.rows]].all()
    assert (task.groups == drawing[task.train.rows]).all()
    assert (task.train.labels == mojiworld.category_of_drawing()[task.groups]).all()


def test_train_and_test_of_the_drawing_probe_are_other_views_of_all_drawings(data) -> None:
    task = data.tasks["drawing"]
    assert not set(task.train.rows) & set(task.test.rows)
    assert (np.bincount(task.train.labels) == 4).all() and (np.bincount(task.test.labels) == 2).all()


def _encoded(table, tmp_path, shard_rows=4, weights="0"):
    stub = LookUp(table.astype(np.float32))
    encoder = dataclasses.replace(stub.encoder, weights_hash=weights)
    store = encode_images(encoder, stub.images, [MEAN], "data", folder=tmp_path, shard_rows=shard_rows)
    return probing.Encoded("sam", MEAN, ("early", "final"), {"all": store})


def test_features_of_some_rows_are_those_of_the_whole(tmp_path) -> None:
    table = np.random.default_rng(0).normal(size=(13, 3)).round(2)
    encoded = _encoded(table, tmp_path)
    rows = np.array([11, 2, 7])
    part = classification.Part("all", np.array([0, 1, 2]), np.sort(rows))
    features, labels = encoded.features(part)
    np.testing.assert_allclose(features, table[np.sort(rows)], atol=2e-3)
    assert labels.tolist() == [0, 1, 2]
    whole, _ = encoded.features(classification.Part("all", np.zeros(13, int)))
    np.testing.assert_allclose(probing.gathered(whole, rows), table[rows], atol=2e-3)


def test_a_probe_is_trained_once_and_again_for_other_labels(tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    labels, rows = np.arange(60) % 3, np.arange(60)
    encoded = _encoded(rng.normal(size=(60, 5)), tmp_path, shard_rows=32)
    parts = [classification.Part("all", labels[part], rows[part]) for part in (rows < 40, rows >= 40)]
    task = classification.Task("category", tuple("abc"), *parts)
    first = probing.probe(encoded, task, seeds=2)
    table = probing.few_shot({"sam": encoded}, task, (1, 2), 2)

    def forbidden(*_args, **_named):
        raise AssertionError("trained again")

    monkeypatch.setattr(probing, "linear_probe", forbidden)
    again = probing.probe(encoded, task, seeds=2)
    for field in dataclasses.fields(ProbeResult):
        np.testing.assert_equal(getattr(again, field.name), getattr(first, field.name))
    pd.testing.assert_frame_equal(probing.few_shot({"sam": encoded}, task, (1, 2), 2), table)
    other = dataclasses.replace(task, train=dataclasses.replace(task.train, labels=task.train.labels[::-1].copy()))
    for changed in (lambda: probing.probe(encoded, task, seeds=3), lambda: probing.probe(encoded, other, seeds=2)):
        with pytest.raises(AssertionError, match="trained again"):
            changed()


def test_a_table_is_made_again_where_any_of_its_models_was_trained_again(tmp_path) -> None:
    rng = np.random.default_rng(0)
    labels, rows = np.arange(60) % 3, np.arange(60)
    parts = [classification.Part("all", labels[part], rows[part]) for part in (rows < 40, rows >= 40)]
    task = classification.Task("category", tuple("abc"), *parts)
    sam, old = (_encoded(rng.normal(size=(60, 5)), tmp_path, 32, weights) for weights in ("sam", "old clip"))
    new = _encoded(np.eye(3)[labels], tmp_path, 32, "new clip")
    before, after = (probing.few_shot({"sam": sam, "clip": clip}, task, (4,), 2)["top1"] for clip in (old, new))
    assert before[0] == after[0] and before[1] < 80 < after[1] == 100


def test_a_separable_task_is_probed_perfectly_and_shuffled_labels_are_not(tmp_path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 4
    table = rng.normal(size=(80, 6)) + 6 * np.eye(6)[labels]
    encoded = _encoded(table, tmp_path, shard_rows=32)
    rows = np.arange(80)
    task = classification.Task(
        "category", tuple("abcd"), classification.Part("all", labels[:48], rows[:48]),
        classification.Part("all", labels[48:], rows[48:]),
    )  # fmt: skip
    for kind in ("linear", "knn"):
        line = probing.row(encoded, task, kind, probing.probe(encoded, task, kind))
        assert line["top1"] == 100 and line["n_test"] == 32 and line["dim"] == 6
    shots = probing.few_shot({"sam": encoded}, task, probing.possible_shots(task, (1, 4, 64)), seeds=2)
    assert shots["shots"].tolist() == [1, 4] and shots["top1"].iloc[-1] > 90
    mixed = dataclasses.replace(task, train=dataclasses.replace(task.train, labels=rng.permutation(labels[:48])))
    assert probing.row(encoded, mixed, "knn", probing.probe(encoded, mixed, "knn"))["top1"] < 60


def _result(hits, predictions=None):
    top1 = np.atleast_2d(np.array(hits, bool))
    return ProbeResult(np.zeros(top1.shape, int) if predictions is None else np.atleast_2d(predictions), top1, top1)


def test_only_right_follows_its_rule() -> None:
    answers = {
        ("sam", "category"): _result([[1, 1, 0, 1], [1, 1, 0, 0]]),
        ("clip", "category"): _result([[0, 1, 1, 0], [0, 0, 1, 0]]),
        ("random", "category"): _result([[1, 1, 1, 1]]),
        ("clip", "drawing"): _result([[1, 1, 1, 1]]),
    }
    assert probing.only_right(answers, "category", "sam").tolist() == [0]
    assert probing.only_right(answers, "category", "clip").tolist() == [2]


def test_confusion_rows_are_shares() -> None:
    task = classification.Task("category", ("a", "b"), *[classification.Part("all", np.zeros(1, int))] * 2)
    result = _result([[1, 0, 1, 1]], [0, 1, 1, 1])
    matrix = probing.confusion(result, task, np.array([0, 0, 1, 1]))
    assert matrix.to_numpy().tolist() == [[50, 50], [0, 100]]


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


def test_sentences_follow_the_numbers() -> None:
    clear = probing.order_sentences(_table(10, 60, 40))
    assert clear[0].startswith("category: CLIP 60.0 [58.0, 62.0] > DINOv2") and "SAM is below both" in clear[1]
    assert "DINOv2, the weaker of them, has 4.0 times" in clear[1]
    assert "not clearly below" in probing.order_sentences(_table(40, 60, 41))[1]


def test_models_trained_once_keep_their_row_and_others_give_the_mean_of_their_trainings() -> None:
    others = pd.DataFrame({"model": ["clip", "clip"], "labels": ["category", "drawing"], "top1": [58.0, 90.0]})
    others = others.assign(top1_low=others["top1"] - 2, top1_high=others["top1"] + 2)
    table = _table(10, 60, 40).assign(layer="final", seeds=3)
    rows = probing.zoo_rows(table, others).set_index("encoder")
    assert rows.loc["sam", ["top1", "top1_low", "top1_high", "zoos"]].tolist() == [10, 8, 12, 1]
    clip = rows.loc["clip"]
    assert (clip["top1"], clip["lowest"], clip["highest"], clip["zoos"]) == (59, 58, 60, 2)
    noise = scipy.stats.t.ppf(0.975, 1) * 1  # two values 2 apart: the error of their mean is 1
    assert clip["top1_high"] == pytest.approx(59 + np.hypot(noise, 2))
    far = probing.zoo_rows(table, others.assign(top1=[20.0, 90.0])).set_index("encoder").loc["clip"]
    assert (far["top1_low"], far["top1_high"]) == (0, 100)
    figure = probing_figures.zoos_figure(probing.zoo_rows(table, others), table, others)
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert sorted(value for line in marks for value in line.get_ydata()) == [10, 40, 58, 60]
    plt.close(figure)


def test_the_paper_scale_asks_for_its_folder(pocket_run) -> None:
    from samantics.scales import get_scale

    run = dataclasses.replace(pocket_run, scale=get_scale("paper"))
    with pytest.raises(StudyError, match="--data DIR"):
        classification.scale_data(run)


def test_a_folder_of_ones_own_is_one_task(tmp_path, pocket_run) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "own" / label).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (8, 8), (number * 40, 0, 0)).save(tmp_path / "own" / label / f"{number}.png")
    found = classification.scale_data(pocket_run, tmp_path / "own")
    task = found.tasks["class"]
    assert found.name == "own" and task.classes == ("cat", "dog")
    assert len(task.train.labels) + len(task.test.labels) == 10 and task.chance == 50


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
            knn_probe(x[~test], labels[~test], x[test], labels[test], 40, (10,))[10],
        )
        for x in (whole, half)
    ]
    for before, after in zip(*results, strict=True):
        interval = bootstrap_mean(100.0 * before.top1)
        assert interval.low <= 100 * after.top1.mean() <= interval.high
        assert (before.predictions == after.predictions).mean() > 0.9
