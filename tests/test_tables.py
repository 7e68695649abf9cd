"""Notebook 01's tables: kept until anything changes, and the right rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from samantics.data import classification
from samantics.probing import tables
from samantics.probing.features import encode_images
from stub_encoder import MEAN, LookUp

LABELS = np.arange(60) % 3
KINDS = np.array(["studio", "object"])[np.arange(20) % 2]


def _encoded(table, folder, name="sam", weights="0") -> tables.Encoded:
    """Features of 40 train images and of 20 test images, by an encoder that looks them up."""
    stores = {}
    for split, part in {"train": table[:40], "test": table[40:]}.items():
        stub = LookUp(part.astype(np.float32))
        encoder = dataclasses.replace(stub.encoder, weights_hash=weights)
        readouts = [MEAN, tables.TOKENS]
        stores[split] = encode_images(encoder, stub.images, readouts, split, folder=folder, shard_rows=32)
    return tables.Encoded(name, MEAN, ("early", "final"), stores)


def _task(name="artist", labels=LABELS) -> classification.Task:
    train, test = classification.Part("train", labels[:40]), classification.Part("test", labels[40:], KINDS)
    return classification.Task(name, tuple("abc"), train, test, ("first", "first", "second"))


def test_a_probe_is_trained_once_and_again_for_other_labels(tmp_path, monkeypatch) -> None:
    encoded, task = _encoded(np.random.default_rng(0).normal(size=(60, 5)), tmp_path), _task()
    first = tables.probe(encoded, [task], seeds=2)["artist"]
    table = tables.few_shot({"sam": encoded}, task, (1, 2), 2)

    def forbidden(*_args, **_named):
        raise AssertionError("trained again")

    monkeypatch.setattr(tables, "linear_probe", forbidden)
    for before, after in zip(first, tables.probe(encoded, [task], seeds=2)["artist"], strict=True):
        np.testing.assert_equal(after, before)
    pd.testing.assert_frame_equal(tables.few_shot({"sam": encoded}, task, (1, 2), 2), table)
    other = _task(labels=np.concatenate([LABELS[:40][::-1], LABELS[40:]]))
    for changed in (lambda: tables.probe(encoded, [task], seeds=3), lambda: tables.probe(encoded, [other], seeds=2)):
        with pytest.raises(AssertionError, match="trained again"):
            changed()


def test_one_probe_answers_several_tasks_as_it_answers_each(tmp_path) -> None:
    encoded = _encoded(np.random.default_rng(0).normal(size=(60, 5)) + np.eye(5)[LABELS], tmp_path)
    tasks = [dataclasses.replace(_task("view"), test=classification.Part("train", LABELS[:40])), _task()]
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
    mixed = _task(labels=rng.permutation(LABELS))
    assert tables.probe(encoded, [mixed], "knn")["artist"].top1.mean() < 0.6


def test_layers_poolings_and_the_protocol_have_their_rows(tmp_path, pocket_run) -> None:
    """The zoo's untrained CLIP on squares of six colours."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (60, 1, 1, 3)) // 2 + 100 * np.eye(3, dtype=int)[LABELS][:, None, None]
    squares = np.broadcast_to(colours.clip(0, 255).astype(np.uint8), (60, 8, 8, 3))
    splits, hashes = {"train": squares[:40], "test": squares[40:]}, {"train": "a", "test": "b"}
    masks = {split: np.ones((len(part), 8, 8), np.uint8) for split, part in splits.items()}
    data = classification.ClassificationData("colours", splits, hashes, {"artist": _task()}, masks)
    run = dataclasses.replace(pocket_run, scale=dataclasses.replace(pocket_run.scale, weights="zoo_random"))
    found = tables.encode_all(run, data, ["clip"])
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


def test_clip_is_asked_by_name_where_it_knows_the_words(pocket_run) -> None:
    """Prompts of three of MojiWorld's classes; pictures that are noise, so chance is what comes out."""
    prompts = (("a picture of a bat",), ("a picture of a bear", "here is a bear"), ("a picture of a rose",))
    pictures = np.random.default_rng(0).integers(0, 256, (60, 96, 96, 3), np.uint8)
    splits = {"train": pictures[:40], "test": pictures[40:]}
    task = dataclasses.replace(_task(), prompts=prompts)
    data = classification.ClassificationData("noise", splits, dict.fromkeys(splits, "n"), {"artist": task}, {})
    run = dataclasses.replace(pocket_run, scale=dataclasses.replace(pocket_run.scale, weights="zoo_random"))
    found = tables.encode_all(run, data, ["clip"])
    table, answers = tables.zero_shot(run, found, data.tasks)
    assert table["probe"].unique() == ["zero_shot"] and table["n_test"].tolist() == [20, 10, 10]
    assert answers["clip", "artist", "zero_shot"].top1.shape == (1, 20)
    assert tables.zero_shot(run, found, {"artist": _task()})[0].empty
