"""The tables of docs/trust.md and the tests that they name."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLES = (TESTS.parent / "docs" / "trust.md").read_text(encoding="utf-8")


@functools.cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file.removeprefix("tests/")).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_test_that_is_named_exists() -> None:
    file, found = "", 0
    for new_file, name in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)", TABLES):
        file = new_file or file
        assert name in names_in(file), f"{file} has no {name}"
        found += 1
    assert found > 60


def test_every_fault_is_in_the_table() -> None:
    for path in sorted((TESTS / "faults").glob("test_*.py")):
        for name in names_in(f"tests/faults/{path.name}"):
            assert not name.startswith("test_") or name in TABLES, f"{path.name}::{name} is not in docs/trust.md"


def test_hostile_inputs_are_at_least_thirty_and_each_is_a_test() -> None:
    table = TABLES.partition("## Hostile")[2].partition("## Numbers")[0]
    rows = [line.strip("|").split("|")[-1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 30
    for row in rows:
        for cut in re.split(r",\s*", row):
            if not cut.startswith("test_"):
                start = "test_" + cut.rstrip(".").rstrip("_")
                assert any(name.startswith(start) for name in names_in("tests/test_hostile.py")), cut
