"""The first world: the same bytes on every rerun, exact masks, and no held-out drawing where it must not be."""

from __future__ import annotations

import functools
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samantics.data import coco
from samantics.data import first_world as mojiworld
from samantics.mojiworld.world import Canvas

WORLD = mojiworld.World()


def test_catalogue_and_drawings_are_what_the_study_asks_for() -> None:
    table = mojiworld.catalogue()
    sizes = table.groupby("category").size()
    assert 16 <= len(sizes) <= 24 and sizes.min() >= 15
    assert table["drawing"].is_unique and table["codepoint"].is_unique
    held_out = table.assign(out=mojiworld.held_out()).groupby("category")["out"].mean()
    assert held_out.between(0.24, 0.36).all()
    assert table.groupby("category")["theme"].nunique().eq(1).all()
    assert len(mojiworld.sprites()) == len(table)
    assert all((np.asarray(s.getchannel("A")) >= 128).sum() > 200 for s in mojiworld.sprites())


@pytest.mark.parametrize("make", [mojiworld.scene, functools.partial(mojiworld.object_picture, drawing=7)])
def test_a_picture_depends_on_nothing_but_its_name(make) -> None:
    first = [make(WORLD, "test", index) for index in (3, 1)]
    again = [make(WORLD, "test", index) for index in (1, 3)][::-1]
    for a, b in zip(first, again, strict=True):
        assert (
            a.image.tobytes() == b.image.tobytes() and (a.instances == b.instances).all() and a.drawings == b.drawings
        )
    others = [make(WORLD, "other", 3), make(mojiworld.World(seed=1), "test", 3), make(WORLD, "test", 4)]
    assert all(other.image.tobytes() != first[0].image.tobytes() for other in others)


def test_an_object_that_would_be_hidden_is_refused_and_changes_nothing() -> None:
    canvas = Canvas(Image.new("RGB", (64, 64)))
    small, large = (Image.new("RGBA", (side, side), (255, 0, 0, 255)) for side in (10, 64))
    rng = np.random.default_rng(0)
    assert canvas.place(small, 0, rng, margin=0.5)
    before = canvas.instances.copy()
    assert not canvas.place(large, 1, rng, margin=0.5)  # would cover the small one
    assert canvas.drawings == [0] and (canvas.instances == before).all()


def test_objects_stay_visible_and_their_sizes_are_spread() -> None:
    sides = []
    for index in range(150):
        picture = mojiworld.scene(WORLD, "test", index)
        areas = np.bincount(picture.instances.ravel(), minlength=len(picture.drawings) + 1)[1:]
        assert len(areas) == len(picture.drawings) >= 1 and areas.min() >= 16
        for number in range(1, len(picture.drawings) + 1):
            ys, xs = np.nonzero(picture.instances == number)
            sides.append(max(np.ptp(ys), np.ptp(xs)) / WORLD.image_size)
    small, large = np.quantile(sides, [0.1, 0.9])
    assert small < 0.2 < 0.35 < large <= 0.75


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_held_out_share_is_kept_to(share: float) -> None:
    drawings = [d for i in range(40) for d in mojiworld.scene(WORLD, "test", i, held_out_share=share).drawings]
    assert (mojiworld.held_out()[drawings] == bool(share)).all()


def test_theme_strength_makes_and_removes_co_occurrence() -> None:
    label = mojiworld.category_of_drawing()

    def same(strength: float) -> float:
        world = mojiworld.World(theme_strength=strength)
        scenes = [mojiworld.scene(world, "test", index).drawings for index in range(150)]
        return float(np.mean([label[a] == label[b] for drawings in scenes for a, b in combinations(drawings, 2)]))

    by_chance = float(((np.bincount(label) / len(label)) ** 2).sum())
    assert abs(same(0) - by_chance) < 0.04
    assert same(1) > by_chance + 0.2


def test_stored_pictures_equal_rendered_ones(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path))
    make = functools.partial(mojiworld.pretraining_picture, WORLD)
    stored = mojiworld.stored_pictures(make, 5, "test", workers=1)
    direct = mojiworld.render(make, range(5))
    for part in ("images", "instances", "drawings"):
        assert (getattr(stored, part) == getattr(direct, part)).all()
    assert isinstance(mojiworld.stored_pictures(make, 5, "test").images, np.memmap)


def test_mojiworld_scenes_as_coco(tmp_path: Path) -> None:
    world = mojiworld.World(image_size=96, seed=5)
    dataset = mojiworld.write_mojiworld(world, "test", 4, tmp_path, held_out_share=0.5)
    assert len(dataset.images) == 4 and not dataset.notes
    assert tuple(dataset.categories.values()) == mojiworld.categories() and min(dataset.categories) == 1
    for index, image_id in enumerate(dataset.images):
        picture = mojiworld.scene(world, "test", index, 0.5)
        assert np.array_equal(np.asarray(coco.read_image(dataset, image_id)), picture.image)
        for position, instance in enumerate(dataset.by_image[image_id]):
            assert np.array_equal(coco.mask_of(instance.rle), picture.instances == position + 1)
            row = picture.drawings[position]
            assert instance.drawing == mojiworld.catalogue()["drawing"][row]
            assert instance.held_out == mojiworld.held_out()[row]
            assert dataset.categories[instance.category_id] == mojiworld.catalogue()["category"][row]
    before = {p: p.stat().st_mtime_ns for p in dataset.folder.iterdir()}
    again = mojiworld.write_mojiworld(world, "test", 4, tmp_path, held_out_share=0.5)
    assert again.hash == dataset.hash and {p: p.stat().st_mtime_ns for p in dataset.folder.iterdir()} == before
    assert not any(
        i.held_out for i in mojiworld.write_mojiworld(world, "train", 4, tmp_path, held_out_share=0).instances
    )
