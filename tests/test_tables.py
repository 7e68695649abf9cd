"""Notebook 01's tables: kept until anything changes, the right rows; the dense pair; mutual nearest neighbours."""

import dataclasses
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, jaccard_score
from sklearn.neighbors import NearestNeighbors

from samantics.data.classification import ClassificationData, Part, Task
from samantics.models.encoder import load_encoder
from samantics.mojiworld import catalogue
from samantics.mojiworld.rendered import render
from samantics.mojiworld.world import STREAMS, World, picture
from samantics.probing import dense, similarity, tables
from samantics.probing.features import encode_images
from samantics.probing.similarity import K, known_relations, mutual_knn, nearest, null, same, similarity_table
from stub_encoder import MEAN, LookUp, Unreadable

LABELS = np.arange(60) % 3
KINDS = np.array(["studio", "object"])[np.arange(20) % 2]


def _encoded(table, folder, weights="0", kind=list) -> tables.Encoded:
    """Features of 40 train images and of 20 test images, by an encoder that looks them up."""
    stores = {}
    for split, part in {"train": table[:40], "test": table[40:]}.items():
        stub = LookUp(part.astype(np.float32))
        encoder, readouts = dataclasses.replace(stub.encoder, weights_hash=weights), [MEAN, tables.TOKENS]
        stores[split] = encode_images(encoder, kind(stub.images), readouts, split, folder=folder)
    return tables.Encoded("sam", MEAN, ("early", "final"), stores)


def _task(labels=LABELS) -> Task:
    train, test = Part("train", labels[:40]), Part("test", labels[40:], KINDS)
    return Task("artist", tuple("abc"), train, test, ("first", "first", "second"))


def test_a_probe_is_trained_once_and_again_for_other_labels(tmp_path, monkeypatch) -> None:
    encoded, task = _encoded(np.random.default_rng(0).normal(size=(60, 5)), tmp_path), _task()
    first = tables.probe(encoded, [task], seeds=2)["artist"]
    table = tables.few_shot({"sam": encoded}, task, (1, 2), 2)

    monkeypatch.setattr(tables, "linear_probe", Mock(side_effect=AssertionError("trained again")))
    for before, after in zip(first, tables.probe(encoded, [task], seeds=2)["artist"], strict=True):
        np.testing.assert_equal(after, before)
    pd.testing.assert_frame_equal(tables.few_shot({"sam": encoded}, task, (1, 2), 2), table)
    other = _task(labels=np.concatenate([LABELS[:40][::-1], LABELS[40:]]))
    for changed in (lambda: tables.probe(encoded, [task], seeds=3), lambda: tables.probe(encoded, [other], seeds=2)):
        with pytest.raises(AssertionError, match="trained again"):
            changed()


def test_one_probe_answers_several_tasks_as_it_answers_each(tmp_path) -> None:
    encoded = _encoded(np.random.default_rng(0).normal(size=(60, 5)) + np.eye(5)[LABELS], tmp_path)
    tasks = [dataclasses.replace(_task(), name="view", test=Part("train", LABELS[:40])), _task()]
    both = tables.probe(encoded, tasks, "knn")
    assert both["view"].top1.shape == (1, 40) and both["artist"].top1.shape == (1, 20)
    for task in tasks:
        alone = tables.probe(encoded, [task], "knn")[task.name]
        np.testing.assert_array_equal(both[task.name].predictions, alone.predictions)
        np.testing.assert_array_equal(both[task.name].top1, alone.top1)


def test_a_table_is_made_again_where_any_of_its_models_was_trained_again(tmp_path) -> None:
    rng = np.random.default_rng(0)
    sam, old = (_encoded(rng.normal(size=(60, 5)), tmp_path, weights=weights) for weights in ("sam", "old clip"))
    new = _encoded(np.eye(3)[LABELS], tmp_path, weights="new clip")
    before, after = (tables.few_shot({"sam": sam, "clip": clip}, _task(), (4,), 2)["top1"] for clip in (old, new))
    assert before[0] == after[0] and before[1] < 80 < after[1] == 100


def test_a_separable_task_is_probed_perfectly_by_kind_and_shuffled_labels_are_not(tmp_path) -> None:
    rng = np.random.default_rng(0)
    encoded = _encoded(rng.normal(size=(60, 6)) + 6 * np.eye(6)[LABELS], tmp_path)
    table, answers = tables.headline({"sam": encoded}, {"artist": _task()}, seeds=2)
    assert table["probe"].unique().tolist() == ["linear", "attentive", "knn"]
    assert table["kind"].tolist() == ["all", "object", "studio"] * 3 and table["n_test"].tolist() == [20, 10, 10] * 3
    assert (table[table["probe"] != "attentive"]["top1"] == 100).all() and (table["top1"] > 60).all()
    assert set(table["dim"]) == {6, 6 * 36}
    assert set(answers) == {("sam", "artist", kind) for kind in ("linear", "attentive", "knn")}
    classes = tables.class_rows(answers, _task(), LABELS[40:]).set_index("class")
    assert classes["sam"].to_dict() == dict.fromkeys("abc", 100) and classes["n_test"].sum() == 20
    shots = tables.few_shot({"sam": encoded}, _task(), (1, 4, 64), seeds=2)
    assert shots["shots"].tolist() == [1, 4] and shots["top1"].iloc[-1] > 90
    damaged = _encoded(np.eye(3)[LABELS], tmp_path, "damaged", Unreadable)  # leaves 12, 13 and 12 train images
    shots = tables.few_shot({"sam": damaged}, _task(), (12, 13), seeds=1)
    assert shots["shots"].tolist() == [12] and shots["top1"].tolist() == [100]
    mixed = _task(labels=rng.permutation(LABELS))
    assert tables.probe(encoded, [mixed], "knn")["artist"].top1.mean() < 0.6


def test_prompts_layers_poolings_and_the_protocol_have_their_rows(pocket_run) -> None:
    """The zoo's untrained CLIP on squares of three colours, with the names of three of MojiWorld's classes."""
    prompts = (("a picture of a bat",), ("a picture of a bear", "here is a bear"), ("a picture of a rose",))
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (60, 1, 1, 3)) // 2 + 100 * np.eye(3, dtype=int)[LABELS][:, None, None]
    squares = np.broadcast_to(colours.clip(0, 255).astype(np.uint8), (60, 8, 8, 3))
    splits, hashes = {"train": squares[:40], "test": squares[40:]}, {"train": "a", "test": "b"}
    masks = {split: np.ones((len(part), 8, 8), np.uint8) for split, part in splits.items()}
    tasks = {"artist": dataclasses.replace(_task(), prompts=prompts)}
    data = ClassificationData("colours", splits, hashes, tasks, masks)
    run = dataclasses.replace(pocket_run, scale=dataclasses.replace(pocket_run.scale, weights="zoo_random"))
    found = tables.encode_all(run, data, ["clip"])
    named = tables.zero_shot(run, found, data.tasks)
    assert named[0]["probe"].unique() == ["zero_shot"] and named[0]["n_test"].tolist() == [20, 10, 10]
    assert named[1]["clip", "artist", "zero_shot"].top1.shape == (1, 20)
    assert tables.zero_shot(run, found, {"artist": _task()})[0].empty
    answers = tables.headline(found, data.tasks, 1)[1]
    lines = tables.protocol_rows(run, data, found, _task(), answers)
    assert lines["question"].tolist()[0] == "the paper's protocol" and len(lines) == 5
    assert lines["top1"].iloc[-1] == 100 * answers["clip", "artist", "linear"].top1.mean()
    assert run.facts["weights:clip"] and run.facts["data:train"] == "a"
    inputs = tables.input_rows(run, data, step=1).set_index(["encoder", "setting"])["top1"]
    assert len(inputs) == 6 and inputs.between(0, 100).all()
    layers = tables.layer_rows(found, _task())
    assert layers["depth"].iloc[-1] == 1 and layers["layer"].tolist() == list(found["clip"].layers)
    pooling = tables.pooling_rows(found, _task())
    assert pooling.groupby("where")["pooling"].agg(set).to_dict() == {
        "trunk": {"mean", "cls"}, "before projection": {"mean", "cls"}, "output": {"mean", "cls", "object"}
    }  # fmt: skip
    floors = tables.floor_rows(data, found)
    assert floors["instrument"].tolist() == ["pixels", "colour histogram", "untrained network"]


@pytest.fixture(scope="module")
def shown() -> dense.Scenes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "stored_pictures", lambda world, stream, count: render(world, stream, range(count)))
        return dense.scenes(World(96), "targets", 4)


def test_every_pixel_has_the_class_of_its_object(shown: dense.Scenes) -> None:
    known = catalogue.instance_classes()["class"].tolist()
    for index in range(4):
        one = picture(World(96), STREAMS["targets"], index)
        for number, drawing in enumerate(one.drawings, start=1):
            where = one.instances == number
            row = catalogue.catalogue().iloc[drawing]
            assert (shown.labels["class"][index][where] == known.index(row["class"]) + 1).all()
            assert (shown.labels["superclass"][index][where] - 1 == catalogue.superclass_of_drawing()[drawing]).all()
        assert (shown.labels["class"][index][one.instances == 0] == 0).all()


def test_outlines_and_shares_are_counted_in_the_right_tokens() -> None:
    field = np.zeros((1, 96, 96), np.uint8)
    field[0, :10, :20] = 1
    edges = dense.outlines(field, 48)
    assert edges[0, :5, 9].all() and edges[0, 4, :10].all() and edges.sum() == 5 + 10 - 1
    targets = dense.shares(field.astype(np.int64), 2).reshape(12, 12, 2)
    assert targets[0, 0, 1] == 1 and targets[1, 0, 1] == 0.25 and targets[0, 2, 1] == 0.5 and targets[5, 5, 0] == 1
    assert (targets.sum(-1) == 1).all()
    asked = dense.cells(edges).reshape(12, 12, 4, 4)
    assert np.array_equal(asked[0, 2], edges[0, :4, 8:12]) and np.array_equal(asked[1, 0], edges[0, 4:8, :4])


def test_metrics_are_sklearns() -> None:
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.random((3, 144, 16)) < 0.2)
    logits = torch.from_numpy(rng.normal(size=(3, 144, 16))) + truth
    found = dense.average_precision(dense.score_counts(logits, truth.reshape(-1, 16)))
    reference = average_precision_score(truth.ravel().numpy(), logits.ravel().numpy())
    assert found == pytest.approx(100 * reference, abs=0.5)  # scores in 200 steps
    labels, called = rng.integers(0, 4, (3, 12, 12)), rng.integers(0, 4, (3, 144))
    counts = dense.overlaps(torch.eye(4)[torch.from_numpy(called)], labels)
    reference = jaccard_score(labels.ravel(), called.ravel(), average=None)[1:].mean()
    assert dense.mean_iou(counts) == pytest.approx(100 * reference)


def test_a_planted_label_is_read_and_noise_is_not() -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    labels = rng.integers(0, 3, (60, 12, 12)).repeat(8, 1).repeat(8, 2)
    targets = dense.shares(labels, 3)  # 8,640 tokens
    edges = (torch.rand(8640, 16, generator=generator) < 0.3).float()
    for signal, low, high in ((5.0, 90, 100), (0.0, 0, 60)):
        tokens = torch.randn(8640, 30, generator=generator)
        tokens[:, :3] += signal * targets
        tokens[:, 3:19] += signal * edges
        *of_labels, of_edges = dense.linear_readouts(tokens[:7000], [targets[:7000]], edges[:7000], tokens[7000:])
        assert low <= 100 * (of_labels[0].argmax(1) == targets[7000:].argmax(1)).float().mean() <= high
        assert low <= 100 * ((of_edges > 0) == edges[7000:].bool()).float().mean() <= max(high, 75)


def test_rows_of_an_encoder(shown: dense.Scenes) -> None:
    rows = dense.dense_rows(load_encoder("sam2", "zoo_random"), shown, shown)
    assert [row["task"] for row in rows] == ["semantic", "semantic", "boundary"]
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 100 for row in rows[2:])


def test_neighbours_are_sklearns_and_never_the_picture_itself() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 6))
    found = NearestNeighbors(n_neighbors=K, metric="cosine").fit(vectors).kneighbors(return_distance=False)
    expected = np.zeros((50, 50), bool)
    np.put_along_axis(expected, found, True, axis=1)
    assert np.array_equal(nearest(vectors), expected) and not nearest(vectors).diagonal().any()
    assert np.array_equal(nearest(vectors[:5]), ~np.eye(5, dtype=bool))  # fewer than K others: all of them


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


def test_instruments_see_what_they_should() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    pixels, colours = similarity.small_pixels(images), similarity.colour_histograms(images)
    assert np.allclose(pixels, similarity.small_pixels(images // 2 + 20), atol=0.05)  # neither brightness nor contrast
    assert np.allclose(colours, similarity.colour_histograms(images[:, ::-1, ::-1]))  # no place
    assert not np.allclose(pixels, similarity.small_pixels(images[:, ::-1]))
    by_hand = [sum((p // 43 == (0, 1, 2)).all() for p in one) for one in images.reshape(4, -1, 3)]
    assert np.allclose(colours[:, 0 * 36 + 1 * 6 + 2], np.sqrt(np.array(by_hand) / (32 * 32)), atol=1e-6)
    for vectors in (instrument(images) for instrument in similarity.INSTRUMENTS.values()):
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
