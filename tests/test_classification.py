"""What is classified: whose drawings train and test show, which pictures, a folder as one task."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from samantics.data import classification
from samantics.errors import StudyError
from samantics.mojiworld import catalogue, rendered
from samantics.mojiworld.world import STREAMS, World, visible_drawings
from samantics.scales import get_scale


@pytest.fixture
def rows(monkeypatch) -> dict[str, np.ndarray]:
    """The drawing of every picture of a stream; the pictures themselves are left blank."""
    shown = {}

    def blank(_world, stream, count) -> rendered.Pictures:
        own = np.concatenate(visible_drawings(stream.role, stream.classes))
        shown[stream.name] = own[np.arange(count) % len(own)]
        turn = sum(np.divmod(np.arange(count), len(own)))
        return rendered.Pictures(
            np.zeros((count, 1, 1, 3), np.uint8), np.ones((count, 1, 1), np.uint8),
            shown[stream.name][:, None].astype(np.int16), (turn % 2).astype(np.uint8),
        )  # fmt: skip

    monkeypatch.setattr(classification, "stored_pictures", blank)
    return shown


def test_no_probe_learns_from_a_test_artist_and_settings_are_chosen_on_artists(rows) -> None:
    tasks = classification.mojiworld_data(World(96), 2, 1, 3).tasks
    table = catalogue.catalogue()
    assert list(tasks) == ["view", "artist"] and tasks["view"].train is tasks["artist"].train
    for name, split in (("labels", "train"), ("views", "train"), ("test", "test")):
        assert set(table["split"][rows[name]]) == {split}
    artist = table["artist"][rows["labels"]].to_numpy()
    groups = tasks["artist"].groups
    assert groups is not None and len(set(groups)) == len(set(zip(groups, artist, strict=True))) == 6
    for task, stream in (("view", "views"), ("artist", "test")):
        part = tasks[task].test
        assert [tasks[task].classes[label] for label in part.labels[:99]] == list(table["class"][rows[stream][:99]])


def test_less_than_one_picture_a_drawing_is_that_share_of_the_classes(rows) -> None:
    data = classification.mojiworld_data(World(96), 0.25, 0.25, 0.25)
    assert len(set(data.hashes.values())) == 3  # features of one stream are not another's
    tasks = data.tasks
    for task in tasks.values():
        assert len(task.classes) == len(task.families) == len(task.prompts) == 116
        assert set(task.train.labels) == set(task.test.labels) == set(range(116))


def test_every_drawing_is_shown_in_a_studio_and_in_a_place(rows) -> None:
    data = classification.mojiworld_data(World(96), 2, 1, 2)
    for part, stream in ((data.tasks["view"].train, "labels"), (data.tasks["artist"].test, "test")):
        assert part.kinds is not None and set(part.kinds) == {"studio", "object"}
        assert len(set(zip(rows[stream], part.kinds, strict=True))) == len(part.labels)
        assert len(data.splits[part.split]) == len(data.masks[part.split]) == len(part.labels)


def test_some_of_the_views_and_some_of_the_classes(rows) -> None:
    whole, third = (classification.mojiworld_data(World(96), 2, 1, 2, view_step=step) for step in (1, 3))
    asked, few = (data.tasks["view"].test for data in (whole, third))
    assert (few.labels == asked.labels[::3]).all() and set(few.kinds) == {"studio", "object"}
    assert third.hashes["views"] != whole.hashes["views"] and third.hashes["test"] == whole.hashes["test"]
    eighth = classification.some_classes(whole, 8, 1)
    (task,), every = eighth.tasks.values(), whole.tasks["artist"]
    assert task.classes == every.classes[::8] and set(task.train.labels) == set(range(len(task.classes)))
    for mine, its in ((task.train, every.train), (task.test, every.test)):
        named = [every.classes[label] for label in its.labels if label % 8 == 0]
        assert [task.classes[label] for label in mine.labels] == named and len(eighth.splits[mine.split]) == len(named)


def test_a_stream_serves_what_it_is_called(monkeypatch) -> None:
    monkeypatch.setitem(STREAMS, "labels", dataclasses.replace(STREAMS["test"], name="labels"))
    with pytest.raises(StudyError, match="must not serve labels"):
        classification.mojiworld_data(World(96), 2, 1, 2)


def test_the_paper_scale_asks_for_its_folder(pocket_run) -> None:
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
    assert found.name == "own" and task.classes == ("cat", "dog") and task.test.kinds is None
    assert len(task.train.labels) + len(task.test.labels) == 10 and task.chance == 50
