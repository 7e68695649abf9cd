"""MojiWorld: the same bytes on every rerun, exact masks, no artist where he must not be seen; the pinned catalogue."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import curation
from refusals import refused
from samantics.cache import ASSETS, PROJECT
from samantics.data.coco import mask_of
from samantics.data.coco_files import load_coco
from samantics.mojiworld import captions, drawings, rendered
from samantics.mojiworld import catalogue as tables
from samantics.mojiworld.places import PLACES, painting, place_background, places_of
from samantics.mojiworld.world import KINDS, STREAMS, Canvas, Picture, Stream, World, picture, visible_drawings

WORLD = World(image_size=64)
TABLE = tables.catalogue()
SPLIT = TABLE["split"].to_numpy(dtype=str)
ARTIST = TABLE["artist"].to_numpy(dtype=str)
LABEL, ABOVE = tables.class_of_drawing(), tables.superclass_of_drawing()


def shown_by(stream: Stream, count: int, world: World = WORLD) -> list[Picture]:
    return [picture(world, stream, index) for index in range(count)]


@pytest.mark.parametrize("name", STREAMS)
def test_no_stream_ever_shows_an_artist_or_class_it_must_not(name: str) -> None:
    """Every drawing that any picture of the stream can hold, and what a few hundred pictures do hold."""
    stream, others = STREAMS[name], {"test": {"test"}, "targets": {"test", "train"}}
    allowed = {"validation"} if name.startswith("choice") else others.get(name, {"train"})
    part = TABLE["class"].map(tables.instance_classes().set_index("class")["part"])
    wanted = {"all": part.notna() | True, "instances": part.notna(), "base": part == "base"}[stream.classes]
    expected = np.flatnonzero(np.isin(SPLIT, list(allowed)) & wanted).tolist()
    assert sorted(np.concatenate(visible_drawings(stream.role, stream.classes))) == expected
    seen = {drawing for one in shown_by(stream, 60) for drawing in one.drawings}
    assert seen <= set(expected) and len(seen) > 40


def test_balanced_streams_show_every_drawing_in_every_kind() -> None:
    for name in ("labels", "views", "choice", "test"):
        rows = visible_drawings(STREAMS[name].role)[0]
        for index in (0, 7):
            first, again = (picture(WORLD, STREAMS[name], index + turn) for turn in (0, len(rows)))
            assert first.drawings == again.drawings == (rows[index],)
            assert {first.kind, again.kind} == {"studio", "object"}


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
    canvas = Canvas(Image.new("RGB", (48, 48), (10, 200, 30)))
    rng, copy = np.random.default_rng(5), np.random.default_rng(5)
    owner, expected, areas = np.zeros((48, 48), int), np.asarray(canvas.image).astype(float), []
    for drawing in (3, 200, 1410, 2000, 3100):
        sprite = tables.sprites()[drawing].resize((22, 18))
        placed = canvas.place(sprite, drawing, rng, margin=0.1)
        left, top = (int(v) for v in copy.uniform(0.1, 0.9, 2) * 48 - np.array(sprite.size) / 2)
        after, painted, pixels = owner.copy(), expected.copy(), np.asarray(sprite).astype(float)
        for y, x in np.ndindex(18, 22):
            spot, alpha = (top + y, left + x), pixels[y, x, 3] / 255
            if min(spot) >= 0 and max(spot) < 48:
                painted[spot] = (1 - alpha) * painted[spot] + alpha * pixels[y, x, :3]
                after[spot] = len(areas) + 1 if pixels[y, x, 3] >= 128 else after[spot]
        full = [*areas, (pixels[..., 3] >= 128).sum()]
        seen = [(after == number).sum() for number in range(1, len(full) + 1)]
        assert placed == (seen[-1] >= 8 and all(one >= 0.35 * area for one, area in zip(seen, full, strict=True)))
        if placed:
            owner, expected, areas = after, painted, full
    assert len(canvas.drawings) >= 3 and (canvas.instances == owner).all()
    assert np.abs(np.asarray(canvas.image) - expected).max() <= len(canvas.drawings)  # each layer is rounded


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


def test_half_of_the_targets_are_by_test_artists_a_third_of_the_companions_of_the_anchors_class() -> None:
    scenes = shown_by(STREAMS["targets"], 250, World(64, theme_strength=0.0))
    assert 0.44 < np.mean([SPLIT[drawing] == "test" for one in scenes for drawing in one.drawings]) < 0.56
    pairs = np.array([(one.drawings[0], other) for one in scenes for other in one.drawings[1:]])
    same = LABEL[pairs[:, 0]] == LABEL[pairs[:, 1]]
    assert abs(same.mean() - 1 / 3) < 0.04
    assert (ARTIST[pairs[same, 0]] != ARTIST[pairs[same, 1]]).mean() > 0.97  # or met by chance


def test_flocks_are_in_pretraining_only() -> None:
    def flocks(name: str) -> float:
        scenes = shown_by(dataclasses.replace(STREAMS[name], kinds=("scene",)), 300)
        return np.mean([len({*LABEL[list(one.drawings)]}) == 1 for one in scenes if len(one.drawings) >= 4])

    assert flocks("pretraining") > 0.08
    assert flocks("targets") < 0.06 and flocks("tuning") < 0.06  # met by chance


def test_theme_strength_ties_places_and_companions_to_superclasses() -> None:
    def themed(strength: float) -> tuple[float, float]:
        scenes = shown_by(Stream("themes", "pretraining", ("scene",)), 120, World(64, theme_strength=strength))
        fits = [one.place in places_of(tables.superclasses()[ABOVE[one.drawings[0]]]) for one in scenes]
        pairs = [(a, b) for one in scenes for a, b in combinations(one.drawings, 2) if LABEL[a] != LABEL[b]]
        return np.mean(fits), np.mean([ABOVE[a] == ABOVE[b] for a, b in pairs])

    (always, close), (never, apart) = themed(1.0), themed(0.0)
    by_chance = np.mean([len(places_of(name)) for name in tables.superclasses()]) / len(PLACES)
    assert always == 1.0 and abs(never - by_chance) < 0.08 and close > 0.3 > 0.12 > apart


def test_places_serve_every_superclass_and_vary_a_little_only() -> None:
    assert 12 <= len(PLACES) <= 24
    assert {name for place in PLACES.values() for name in place["home"].split("|")} == set(tables.superclasses())
    for name, other in (("meadow", "forest"), ("stage", "meadow")):
        views = [np.mean(place_background(np.random.default_rng(k), name, 64), (0, 1)) for k in range(12)]
        apart = np.abs(np.mean(views, axis=0) - np.mean(painting(other, 64, 0), (0, 1))).max()
        assert np.std(views, axis=0).max() < 15 < apart


@pytest.mark.parametrize(
    "impossible",
    [
        lambda: World(theme_strength=1.5),
        lambda: World(image_size=8),
        lambda: rendered.stored_pictures(WORLD, STREAMS["targets"], 0),
        lambda: picture(WORLD, STREAMS["pretraining"], 0, drawing=int(np.flatnonzero(SPLIT == "test")[0])),
        lambda: picture(WORLD, STREAMS["tuning"], 0, drawing=int(visible_drawings("tuning", "novel")[0][0])),
    ],
)
def test_impossible_worlds_and_forbidden_drawings_are_refused(impossible: Callable[[], object]) -> None:
    refused("choose", impossible)


@pytest.mark.parametrize(("size", "count"), [(32, 100), (97, 4), (200, 2)])
def test_any_size(size: int, count: int) -> None:
    for index in range(count):  # many of the smallest: thin things vanish, and must not be waited for
        one = picture(World(image_size=size), STREAMS["pretraining"], index)
        assert one.image.shape == (size, size, 3) and one.instances.shape == (size, size) and one.instances.max() >= 1


def test_stored_pictures_equal_rendered_ones_and_what_a_killed_run_left_is_cleared_away(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.sprites()
    monkeypatch.setattr(rendered, "CHUNK", 4)
    stream, folder = STREAMS["choice scenes"], places / "cache" / "mojiworld"
    stored, direct = rendered.stored_pictures(WORLD, stream, 10), rendered.render(WORLD, stream, range(10))
    for part in vars(direct):
        assert (getattr(stored, part) == getattr(direct, part)).all(), part
    assert isinstance(stored.images, np.memmap) and (stored.labels == LABEL[stored.drawings[:, 0]]).all()
    (made,) = [path for path in folder.iterdir() if path.is_dir()]
    left = (made / "images.npy").rename(made / ".images.npy.abc123.npy")  # as a killed run leaves it
    left.write_bytes(b"half")
    assert (rendered.stored_pictures(WORLD, stream, 10).images == direct.images).all() and not left.exists()
    (made / "images.npy").write_bytes(b"half")
    refused("damaged: delete it", rendered.stored_pictures, WORLD, stream, 10)


def test_scenes_are_written_as_coco_reads_them(tmp_path: Path) -> None:
    stream = STREAMS["targets"]
    dataset, table = rendered.write_scenes(WORLD, stream, 6, tmp_path), TABLE
    assert len(dataset.categories) == 80 and len(dataset.images) == 6 and not dataset.notes
    for index, record in enumerate(dataset.images.values()):
        one, found = picture(WORLD, stream, index), dataset.by_image[record.id]
        assert (np.asarray(Image.open(dataset.folder / record.file)) == one.image).all()
        for number, (entry, drawing) in enumerate(zip(found, one.drawings, strict=True), start=1):
            mask, row = one.instances == number, table.iloc[drawing]
            assert (mask_of(entry.rle) == mask).all() and entry.area == mask.sum()
            ys, xs = np.nonzero(mask)
            assert entry.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert (entry.artist, entry.split) == (row["artist"], row["split"])
            assert dataset.categories[entry.category_id] == row["class"]
    written = dataset.path.stat().st_mtime_ns
    assert load_coco(dataset.path, dataset.folder) == dataset  # as any COCO data
    assert rendered.write_scenes(WORLD, stream, 6, tmp_path) == dataset and dataset.path.stat().st_mtime_ns == written
    (dataset.folder / "00003.png").unlink()
    says = f"{dataset.folder} is damaged: delete it, and it is computed again"
    refused(says, rendered.write_scenes, WORLD, stream, 6, tmp_path)


def test_captions_name_what_is_shown_in_words_of_the_vocabulary() -> None:
    rng, words = np.random.default_rng(0), set(captions.caption_words())
    shares = np.zeros(3)  # by name, by both names, by the superclass only
    for row in rng.integers(0, len(LABEL), 600).tolist():
        text = captions.caption(rng, [row, -1])
        name, above = TABLE.loc[row, ["class", "superclass"]]
        assert set(captions.split_words(text)) <= words
        assert name in text or above in text
        shares += np.array([name in text, name in text and above in text, name not in text]) / 600
    assert (shares > [0.8, 0.28, 0.1]).all() and (shares < [0.9, 0.5, 0.2]).all()
    many = [captions.caption(rng, rng.integers(0, len(LABEL), 6)) for _ in range(300)]
    assert max(len(captions.split_words(text)) for text in many) < 75 and len(set(many)) == 300


def test_packages_make_the_very_tables_that_are_committed(tmp_path: Path) -> None:
    for made in curation.write_catalogue(tmp_path):
        assert made.read_bytes() == (ASSETS / made.name).read_bytes(), made.name


def test_catalogue_is_what_the_study_asks_for() -> None:
    classes = TABLE.groupby("class")
    assert 440 <= classes.ngroups <= 470 and TABLE["superclass"].nunique() == 22
    assert classes["superclass"].nunique().eq(1).all() and classes["codepoint"].nunique().eq(1).all()
    assert not TABLE.duplicated(["class", "artist"]).any() and not TABLE.duplicated(["artist", "icon"]).any()
    shares = TABLE.groupby(["class", "split"]).size().unstack(fill_value=0)
    assert shares["train"].min() >= 4 and shares["test"].eq(2).all() and shares["validation"].le(1).all()
    table = tables.instance_classes()  # drawn by everybody; base and novel ones share superclasses
    assert table["part"].value_counts().to_dict() == {"base": 60, "novel": 20}
    base, novel = (set(table["superclass"][table["part"] == part]) for part in ("base", "novel"))
    assert base == novel and table["class"].is_unique
    assert TABLE[TABLE["class"].isin(table["class"])].groupby("class")["artist"].nunique().eq(9).all()


def test_every_artist_is_pinned_with_a_digest_and_no_address_and_named_with_the_licence() -> None:
    lock, notice = ((PROJECT / name).read_text() for name in ("package-lock.json", "NOTICE"))
    wanted = json.loads((PROJECT / "package.json").read_text())["dependencies"]
    assert wanted == {f"@iconify-json/{name}": artist.version for name, artist in drawings.ARTISTS.items()}
    for name, artist in drawings.ARTISTS.items():
        entry = json.loads(lock)["packages"][f"node_modules/@iconify-json/{name}"]
        assert entry["version"] == artist.version and entry["integrity"].startswith("sha512-")
        line = next(line for line in notice.splitlines() if f"@iconify-json/{name} " in line)
        assert artist.version in line and artist.licence in line and artist.title.split(",")[0] in line
    assert "resolved" not in lock and "://" not in lock


def test_missing_and_altered_packages_are_refused(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = drawings.packages_dir() / "@iconify-json" / "fxemoji"  # the smallest
    copy = places / "node_modules" / "@iconify-json" / "fxemoji"
    shutil.copytree(source, copy)
    monkeypatch.setattr(drawings, "packages_dir", lambda: places / "node_modules")
    monkeypatch.setattr(drawings, "load_package", drawings.load_package.__wrapped__)  # keeps nothing
    refused(r"@iconify-json/noto are not installed.*environment\.sh", drawings.load_sprites, [("noto", "owl")])
    with open(copy / "icons.json", "a") as file:
        file.write(" ")
    refused(r"was altered, or is not version 1\.2\.2: delete it", drawings.load_package, "fxemoji")


def test_a_copy_of_the_rasterised_drawings_serves_without_packages(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = list(zip(TABLE["artist"], TABLE["icon"], strict=True))[5:500:60]
    direct = [drawings.rasterised(*key) for key in keys]
    drawings.load_sprites(keys)
    (path,) = (places / "cache" / "drawings").iterdir()
    monkeypatch.setenv("SAMANTICS_DRAWINGS", str(path))
    monkeypatch.setattr(drawings, "load_package", None)  # not looked at any more
    for one, other in zip(direct, drawings.load_sprites(keys[::-1])[::-1], strict=True):
        seen = np.asarray(one)[..., 3] > 0
        assert (np.asarray(one)[seen] == np.asarray(other)[seen]).all() and one.size == other.size
    (places / "broken.npz").write_bytes(b"PK")
    for name, key, says in (
        (path.name, ("noto", "owl"), "lacks 1 drawings, such as noto/owl: set"),
        ("nowhere.npz", keys[0], "not there: correct or unset it"),
        ("broken.npz", keys[0], "damaged"),
    ):
        monkeypatch.setenv("SAMANTICS_DRAWINGS", str(path if name == path.name else places / name))
        refused(says, drawings.load_sprites, [key])
