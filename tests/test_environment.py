"""Files that must agree: versions wanted and locked, pages and what they link to, promises and their tests."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from samantics.cache import PROJECT

SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())
LOCK = dict(line.split("==") for line in (PROJECT / "requirements.lock").read_text().splitlines())


def test_lock_pins_exactly_and_names_no_registry() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", f"{name}=={version}") for name, version in LOCK.items())
    assert len((PROJECT / "requirements.lock").read_text().splitlines()) == len(LOCK) > 100


def test_lock_has_a_fitting_version_of_every_dependency() -> None:
    for text in SETTINGS["project"]["dependencies"] + SETTINGS["dependency-groups"]["dev"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)]), text


def test_conda_takes_the_same_python_and_lock() -> None:
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    python, nodejs, pip, packages = environment["dependencies"]
    assert nodejs == "nodejs", "for npm ci of the drawings"
    assert SpecifierSet(SETTINGS["project"]["requires-python"]).contains(python.removeprefix("python=") + ".0")
    assert pip == "pip" and packages == {"pip": ["-r requirements.lock", "-e ."]}


@pytest.mark.parametrize("script", ["run_all.sh", "run_tests.sh", "scripts/environment.sh", ".ci/run"])
def test_scripts_are_sound_bash(script: str) -> None:
    subprocess.run(["bash", "-n", PROJECT / script], check=True)


@pytest.mark.parametrize("page", [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")], ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_test_that_trust_names_exists() -> None:
    file, found = "", 0
    for new_file, name in re.findall(r"`(tests/\w+\.py)?::(\w+)", (PROJECT / "docs" / "trust.md").read_text()):
        file = new_file or file
        assert f"def {name}(" in (PROJECT / file).read_text(encoding="utf-8"), f"{file} has no {name}"
        found += 1
    assert found > 60
