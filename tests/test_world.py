"""MojiWorld: the same bytes on every rerun, exact masks, and no artist where he must not be seen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO

from samantics.errors import StudyError
from samantics.mojiworld import captions, floors, rendered
from samantics.mojiworld import catalogue as tables
from samantics.mojiworld import world as mojiworld
from samantics.mojiworld.drawings import ARTISTS
from samantics.mojiworld.places import PLACES, painting, place_background, places_of
from samantics.mojiworld.world import KINDS, STREAMS, Stream, World, picture

WORLD = World(image_size=64)
SPLIT = tables.catalogue()["split"].to_numpy(dtype=str)
LABEL = tables.class_of_drawing()
NOVEL = mojiworld.visible_drawings("tuning", "novel")[0]


def shown_by(stream: Stream, count: int, world: World = WORLD) -> list[mojiworld.Picture]:
    return [picture(world, stream, index) for index in range(count)]


# ------------------------------------------------------------------------------------------------ who may see what


@pytest.mark.parametrize("name", STREAMS)
def test_no_stream_ever_shows_an_artist_or_class_it_must_not(name: str) -> None:
    """Every drawing that any picture of the stream can hold, and what a few hundred pictures do hold."""
    stream = STREAMS[name]
    allowed = {"choice": {"validation"}, "test": {"test"}, "targets": {"test", "train"}}.get(stream.role, {"train"})
    reachable = np.concatenate(mojiworld.visible_drawings(stream.role, stream.classes))
    expected = [row for row in range(len(SPLIT)) if SPLIT[row] in allowed]
    if stream.classes != "all":
        table = tables.instance_classes()
        wanted = set(table["class"][table["part"].isin(mojiworld.PARTS[stream.classes])])
        expected = [row for row in expected if tables.catalogue()["class"][row] in wanted]
    assert sorted(reachable) == expected
    seen = {drawing for one in shown_by(stream, 60) for drawing in one.drawings}
    assert seen <= set(expected) and len(seen) > 40


def test_balanced_streams_show_every_drawing_in_every_kind() -> None:
    for name in ("labels", "views", "choice", "test"):
        rows = mojiworld.visible_drawings(STREAMS[name].role)[0]
        for index in (0, 7):
            first, again = (picture(WORLD, STREAMS[name], index + turn) for turn in (0, len(rows)))
            assert first.drawings == again.drawings == (rows[index],)
            assert {first.kind, again.kind} == {"studio", "object"}


def test_half_of_the_targets_objects_are_by_test_artists() -> None:
    shown = [d for one in shown_by(STREAMS["targets"], 150) for d in one.drawings]
    assert 0.44 < np.mean(SPLIT[shown] == "test") < 0.56


def test_a_stream_of_the_wrong_role_is_refused() -> None:
    STREAMS["pretraining"].require("pretraining")
    for name in ("choice", "test", "targets"):
        with pytest.raises(StudyError, match="must not serve pretraining: choose another stream"):
            STREAMS[name].require("pretraining")
    for name, row in (("pretraining", np.flatnonzero(SPLIT == "test")[0]), ("tuning", NOVEL[0])):
        with pytest.raises(StudyError, match="must not show drawing"):
            picture(WORLD, STREAMS[name], 0, drawing=int(row))


# --------------------------------------------------------------------------------------------------- one picture


@pytest.mark.parametrize("name", ["pretraining", "targets", "test"])
def test_a_picture_depends_on_nothing_but_its_name(name: str) -> None:
    stream = STREAMS[name]
    first = [picture(WORLD, stream, index) for index in (3, 5)]
    painting.cache_clear()
    again = [picture(WORLD, stream, index) for index in (5, 3)][::-1]
    for a, b in zip(first, again, strict=True):
        assert a.image.tobytes() == b.image.tobytes() and (a.instances == b.instances).all()
        assert (a.drawings, a.kind, a.place) == (b.drawings, b.kind, b.place)
    others = [(WORLD, dataclasses.replace(stream, name="other"), 3), (World(64, seed=1), stream, 3), (WORLD, stream, 4)]
    assert all(picture(*other).image.tobytes() != first[0].image.tobytes() for other in others)


def test_masks_and_colours_equal_a_painter_that_goes_pixel_by_pixel() -> None:
    rng = np.random.default_rng(5)
    background = Image.new("RGB", (48, 48), (10, 200, 30))
    canvas, copy = mojiworld.Canvas(background.copy()), np.random.default_rng(5)
    expected = np.asarray(background).astype(float).copy()
    owner = np.zeros((48, 48), int)
    for drawing in (3, 200, 1410, 2000, 3100):
        sprite = tables.sprites()[drawing].resize((22, 18))
        placed = canvas.place(sprite, drawing, rng, margin=0.1)
        left, top = (int(v) for v in copy.uniform(0.1, 0.9, 2) * 48 - np.array(sprite.size) / 2)
        pixels = np.asarray(sprite).astype(float)
        after, full = owner.copy(), 0
        for y in range(sprite.height):
            for x in range(sprite.width):
                full += pixels[y, x, 3] >= 128
                if 0 <= top + y < 48 and 0 <= left + x < 48:
                    alpha = pixels[y, x, 3] / 255
                    if placed:
                        below = expected[top + y, left + x]
                        expected[top + y, left + x] = (1 - alpha) * below + alpha * pixels[y, x, :3]
                    if pixels[y, x, 3] >= 128:
                        after[top + y, left + x] = 99
        hidden = any(
            (after == number).sum() < 0.35 * area
            for number, area in enumerate(canvas.full_areas[: owner.max()], start=1)
        )
        assert placed == (not hidden and (after == 99).sum() >= max(8, 0.35 * full))
        if placed:
            owner = np.where(after == 99, len(canvas.drawings), after)
    done = canvas.picture("scene", "meadow")
    assert len(done.drawings) >= 3 and (done.instances == owner).all()
    assert np.abs(done.image - expected).max() <= len(done.drawings)  # each layer is rounded


def test_kinds_hold_what_they_promise() -> None:
    for kind in KINDS:
        stream = dataclasses.replace(STREAMS["pretraining"], kinds=(kind,))
        for one in shown_by(stream, 30):
            assert one.kind == kind and (one.place == "") == (kind == "studio")
            assert 2 <= len(one.drawings) <= 6 if kind == "scene" else len(one.drawings) == 1
            areas = np.bincount(one.instances.ravel(), minlength=len(one.drawings) + 1)[1:]
            assert len(areas) == len(one.drawings) and areas.min() >= 5
    kinds = [one.kind for one in shown_by(STREAMS["pretraining"], 30)]
    assert all(kinds.count(kind) == 10 for kind in KINDS)


def test_a_third_of_the_companions_are_the_anchors_class_by_another_artist() -> None:
    artists = tables.catalogue()["artist"].to_numpy()
    world = World(64, theme_strength=0.0)
    pairs = [(one.drawings[0], d) for one in shown_by(STREAMS["targets"], 250, world) for d in one.drawings[1:]]
    same = [(a, d) for a, d in pairs if LABEL[a] == LABEL[d]]
    assert abs(len(same) / len(pairs) - 1 / 3) < 0.04
    assert np.mean([artists[a] != artists[d] for a, d in same]) > 0.97  # or met by chance


def test_flocks_are_in_pretraining_only() -> None:
    def flocks(name: str) -> float:
        stream = dataclasses.replace(STREAMS[name], kinds=("scene",))
        large = [one.drawings for one in shown_by(stream, 300) if len(one.drawings) >= 4]
        return float(np.mean([len(set(LABEL[list(drawings)])) == 1 for drawings in large]))

    assert flocks("pretraining") > 0.08
    assert flocks("targets") < 0.06 and flocks("tuning") < 0.06  # met by chance
    assert not any(STREAMS[name].flocks for name in ("references", "tuning", "choice scenes", "targets"))


def test_theme_strength_ties_places_and_companions_to_superclasses() -> None:
    above = tables.superclass_of_class()[LABEL]
    stream = Stream("themes", "pretraining", ("scene",))

    def themed(strength: float) -> tuple[float, float]:
        scenes = shown_by(stream, 120, World(64, theme_strength=strength))
        fits = [one.place in places_of(tables.superclasses()[above[one.drawings[0]]]) for one in scenes]
        pairs = [(a, b) for one in scenes for a, b in combinations(one.drawings, 2) if LABEL[a] != LABEL[b]]
        return float(np.mean(fits)), float(np.mean([above[a] == above[b] for a, b in pairs]))

    chance = np.mean([len(places_of(name)) for name in tables.superclasses()]) / len(PLACES)
    assert themed(1.0)[0] == 1.0 and abs(themed(0.0)[0] - chance) < 0.08
    assert themed(1.0)[1] > 0.3 > 0.12 > themed(0.0)[1]


def test_places_serve_every_superclass_and_vary_a_little_only() -> None:
    assert 12 <= len(PLACES) <= 24
    assert {name for place in PLACES.values() for name in place["home"].split("|")} == set(tables.superclasses())
    for name in ("meadow", "stage"):
        views = [
            np.asarray(place_background(np.random.default_rng(k), name, 64), float).mean((0, 1)) for k in range(12)
        ]
        others = [np.asarray(painting(other, 64, 0), float).mean((0, 1)) for other in PLACES if other != name]
        assert np.std(views, axis=0).max() < 15 < min(np.abs(np.mean(views, axis=0) - o).max() for o in others[:3])


@pytest.mark.parametrize(
    "impossible",
    [
        lambda: World(theme_strength=1.5),
        lambda: World(image_size=8),
        lambda: rendered.stored_pictures(WORLD, STREAMS["targets"], 0),
    ],
)
def test_impossible_worlds_are_refused(impossible: Callable[[], object]) -> None:
    with pytest.raises(StudyError, match="choose"):
        impossible()


@pytest.mark.parametrize(("size", "count"), [(32, 100), (97, 4), (200, 2)])
def test_any_size(size: int, count: int) -> None:
    for index in range(count):  # many of the smallest: thin things vanish, and must not be waited for
        one = picture(World(image_size=size), STREAMS["pretraining"], index)
        assert one.image.shape == (size, size, 3) and one.instances.shape == (size, size) and one.instances.max() >= 1


# ------------------------------------------------------------------------------------------------- many pictures


def test_stored_pictures_equal_rendered_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.sprites()
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path))
    monkeypatch.setattr(rendered, "CHUNK", 4)
    stream = STREAMS["choice scenes"]
    stored = rendered.stored_pictures(WORLD, stream, 10)
    direct = rendered.render(WORLD, stream, range(10))
    for part in vars(direct):
        assert (getattr(stored, part) == getattr(direct, part)).all(), part
    assert isinstance(rendered.stored_pictures(WORLD, stream, 10).images, np.memmap)
    assert (stored.labels == LABEL[stored.drawings[:, 0]]).all()
    assert not list((tmp_path / "mojiworld").glob(".*unfinished"))


def test_a_half_rendered_folder_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.sprites()
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path))
    stream = STREAMS["test"]
    rendered.stored_pictures(WORLD, stream, 2)
    (made,) = [path for path in (tmp_path / "mojiworld").iterdir() if path.is_dir()]
    left = made.rename(made.with_name(f".{made.name}.unfinished"))  # as a killed run leaves it
    (left / "images.npy").write_bytes(b"half")
    assert len(rendered.stored_pictures(WORLD, stream, 2)) == 2 and not left.exists()
    (made / "images.npy").write_bytes(b"half")
    with pytest.raises(StudyError, match="damaged: delete it"):
        rendered.stored_pictures(WORLD, stream, 2)


def test_scenes_are_written_as_coco_reads_them(tmp_path: Path) -> None:
    stream = STREAMS["targets"]
    path, images = rendered.write_scenes(WORLD, stream, 6, tmp_path)
    coco = COCO(path)
    assert len(coco.getCatIds()) == 80 and len(coco.getImgIds()) == 6
    assert sum(entry["part"] == "novel" for entry in coco.loadCats(coco.getCatIds())) == 20
    for index in range(6):
        one, record = picture(WORLD, stream, index), coco.loadImgs(index + 1)[0]
        assert (np.asarray(Image.open(images / record["file_name"])) == one.image).all()
        found = coco.loadAnns(coco.getAnnIds(imgIds=index + 1))
        assert len(found) == len(one.drawings)
        for number, (entry, drawing) in enumerate(zip(found, one.drawings, strict=True), start=1):
            mask, row = one.instances == number, tables.catalogue().iloc[drawing]
            assert (mask_tools.decode(coco.annToRLE(entry)).astype(bool) == mask).all()
            ys, xs = np.nonzero(mask)
            assert entry["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1] and entry["area"] == mask.sum()
            assert entry["artist"] in ARTISTS and entry["split"] in ("train", "test")
            assert (entry["class"], entry["artist"]) == (row["class"], row["artist"])
            assert coco.loadCats(entry["category_id"])[0]["name"] == row["class"]
    before = json.loads(path.read_text())
    again, _ = rendered.write_scenes(WORLD, stream, 6, tmp_path)
    assert again == path and json.loads(path.read_text()) == before


# ------------------------------------------------------------------------------------------- captions and floors


def test_captions_name_what_is_shown_in_words_of_the_vocabulary() -> None:
    rng, words = np.random.default_rng(0), set(captions.caption_words())
    named = both = above_only = 0
    for row in rng.integers(0, len(LABEL), 600).tolist():
        text = captions.caption(rng, [row, -1])
        name, above = tables.classes()[LABEL[row]], tables.superclasses()[tables.superclass_of_class()[LABEL[row]]]
        assert set(captions.split_words(text)) <= words
        has_name, has_above = name in text, above in text
        assert has_name or has_above
        named, both, above_only = named + has_name, both + (has_name and has_above), above_only + (not has_name)
    assert 0.8 < named / 600 < 0.9 and 0.28 < both / 600 < 0.5 and 0.1 < above_only / 600 < 0.2
    many = [captions.caption(rng, rng.integers(0, len(LABEL), 6)) for _ in range(300)]
    assert max(len(captions.split_words(text)) for text in many) < 75 and len(set(many)) == 300


def test_instruments_see_what_they_should() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    pixels, colours = floors.small_pixels(images), floors.colour_histograms(images)
    assert np.allclose(pixels, floors.small_pixels(images // 2 + 20), atol=0.05)  # neither brightness nor contrast
    assert np.allclose(colours, floors.colour_histograms(images[:, ::-1, ::-1]))  # no place
    assert not np.allclose(pixels, floors.small_pixels(images[:, ::-1]))
    by_hand = [sum((p // 43 == (0, 1, 2)).all() for p in one) for one in images.reshape(4, -1, 3)]
    assert np.allclose(colours[:, 0 * 36 + 1 * 6 + 2], np.sqrt(np.array(by_hand) / (32 * 32)), atol=1e-6)
    for vectors in (instrument(images) for instrument in floors.INSTRUMENTS.values()):
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
