"""The catalogue is what its rules make of the pinned packages, and drawings that are not those are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import curation
from samantics.cache import PROJECT
from samantics.errors import StudyError
from samantics.mojiworld import catalogue as tables
from samantics.mojiworld import drawings

TABLE = tables.catalogue()


def test_packages_make_the_very_tables_that_are_committed(tmp_path: Path) -> None:
    for made in curation.write_catalogue(tmp_path):
        assert made.read_bytes() == (PROJECT / "lib/samantics/assets" / made.name).read_bytes(), made.name


def test_catalogue_is_what_the_study_asks_for() -> None:
    classes = TABLE.groupby("class")
    assert 440 <= classes.ngroups <= 470 and TABLE["superclass"].nunique() == 22
    assert classes["superclass"].nunique().eq(1).all() and classes["codepoint"].nunique().eq(1).all()
    assert not TABLE.duplicated(["class", "artist"]).any() and not TABLE.duplicated(["artist", "icon"]).any()
    shares = TABLE.groupby(["class", "split"]).size().unstack(fill_value=0)
    assert shares["train"].min() >= 4 and shares["test"].eq(2).all() and shares["validation"].le(1).all()


def test_instance_classes_are_drawn_by_everybody_and_share_superclasses() -> None:
    table = tables.instance_classes()
    assert table["part"].value_counts().to_dict() == {"base": 60, "novel": 20}
    base, novel = (set(table["superclass"][table["part"] == part]) for part in ("base", "novel"))
    assert base == novel and table["class"].is_unique
    assert TABLE[TABLE["class"].isin(table["class"])].groupby("class")["artist"].nunique().eq(9).all()


def test_lock_pins_the_versions_of_the_library_with_digests_and_no_address() -> None:
    text = (PROJECT / "package-lock.json").read_text()
    packages = json.loads(text)["packages"]
    wanted = json.loads((PROJECT / "package.json").read_text())["dependencies"]
    assert wanted == {f"@iconify-json/{name}": artist.version for name, artist in drawings.ARTISTS.items()}
    for name, version in wanted.items():
        entry = packages[f"node_modules/{name}"]
        assert entry["version"] == version and entry["integrity"].startswith("sha512-")
    assert "resolved" not in text and "://" not in text


def test_notice_names_every_artist_and_licence() -> None:
    notice = (PROJECT / "NOTICE").read_text()
    for name, artist in drawings.ARTISTS.items():
        line = next(line for line in notice.splitlines() if f"@iconify-json/{name} " in line)
        assert artist.version in line and artist.licence in line and artist.title.split(",")[0] in line


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the smallest package, and no other."""
    source = drawings.packages_dir() / "@iconify-json" / "fxemoji"
    home = tmp_path / "drawings" / "node_modules" / "@iconify-json" / "fxemoji"
    shutil.copytree(source, home)
    monkeypatch.setenv("SAMANTICS_DRAWINGS", str(tmp_path / "drawings"))
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))
    drawings.load_package.cache_clear()
    yield home
    drawings.load_package.cache_clear()


def test_missing_and_altered_packages_and_missing_icons_are_refused(copied: Path) -> None:
    with pytest.raises(StudyError, match=r"@iconify-json/noto are not installed.*environment\.sh"):
        drawings.load_sprites([("noto", "owl")])
    with pytest.raises(StudyError, match="fxemoji has no icon 'yeti'"):
        drawings.load_sprites([("fxemoji", "yeti")])
    drawings.load_package.cache_clear()
    with open(copied / "icons.json", "a") as file:
        file.write(" ")
    with pytest.raises(StudyError, match=r"was altered, or is not version 1\.2\.2: delete it"):
        drawings.load_package("fxemoji")


# ---------------------------------------------------------------------------------------------- sprites


def test_a_copy_of_the_rasterised_drawings_serves_without_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))
    keys = tables.keys()[5:500:60]
    direct = [drawings.rasterised(drawings.load_package(artist).svg(icon)) for artist, icon in keys]
    drawings.load_sprites(keys)
    (path,) = (tmp_path / "cache" / "drawings").iterdir()
    monkeypatch.setenv("SAMANTICS_DRAWINGS", str(path))
    monkeypatch.setattr(drawings, "load_package", None)  # not looked at any more
    for one, other in zip(direct, drawings.load_sprites(keys[::-1])[::-1], strict=True):
        seen = np.asarray(one)[..., 3] > 0
        assert (np.asarray(one)[seen] == np.asarray(other)[seen]).all() and one.size == other.size
    with pytest.raises(StudyError, match="lacks 1 drawings, such as noto/owl: set"):
        drawings.load_sprites([("noto", "owl")])
    monkeypatch.setenv("SAMANTICS_DRAWINGS", str(tmp_path / "nowhere.npz"))
    with pytest.raises(StudyError, match="not there: correct or unset it"):
        drawings.load_sprites(keys)
    (tmp_path / "broken.npz").write_bytes(b"PK")
    monkeypatch.setenv("SAMANTICS_DRAWINGS", str(tmp_path / "broken.npz"))
    with pytest.raises(StudyError, match="damaged"):
        drawings.load_sprites(keys)
