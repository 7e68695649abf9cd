"""What is classified: no held-out drawing in train, other views in test, a folder as one task."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from samantics.data import classification
from samantics.data import first_world as mojiworld
from samantics.errors import StudyError
from samantics.scales import get_scale


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
    assert found.name == "own" and task.classes == ("cat", "dog")
    assert len(task.train.labels) + len(task.test.labels) == 10 and task.chance == 50
