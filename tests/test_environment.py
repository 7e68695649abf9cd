"""pyproject.toml says what is needed, requirements.lock which versions; environment.yml and scripts use the lock."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from samantics.cache import PROJECT

SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text())
LOCK = (PROJECT / "requirements.lock").read_text().splitlines()


def needed() -> list[Requirement]:
    return [Requirement(text) for text in SETTINGS["project"]["dependencies"] + SETTINGS["dependency-groups"]["dev"]]


def test_lock_pins_exactly_and_names_no_registry() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line) for line in LOCK)
    assert len({line.split("==")[0] for line in LOCK}) == len(LOCK) > 100


@pytest.mark.parametrize("requirement", needed(), ids=lambda requirement: requirement.name)
def test_lock_has_a_fitting_version_of_every_dependency(requirement: Requirement) -> None:
    versions = dict(line.split("==") for line in LOCK)
    assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)])


def test_conda_takes_the_same_python_and_lock() -> None:
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    python, nodejs, pip, packages = environment["dependencies"]
    assert nodejs == "nodejs", "for npm ci of the drawings"
    assert SpecifierSet(SETTINGS["project"]["requires-python"]).contains(python.removeprefix("python=") + ".0")
    assert pip == "pip" and packages == {"pip": ["-r requirements.lock", "-e ."]}


def test_scripts_are_sound_bash() -> None:
    for script in ("run_all.sh", "run_tests.sh", "scripts/environment.sh", ".ci/run"):
        subprocess.run(["bash", "-n", PROJECT / script], check=True)
