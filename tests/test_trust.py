"""The tables of docs/trust.md and the tests that they name."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_test_that_is_named_exists() -> None:
    file, found = "", 0
    for new_file, name in re.findall(r"`(tests/\w+\.py)?::(\w+)", (TESTS.parent / "docs" / "trust.md").read_text()):
        file = new_file or file
        assert f"def {name}(" in (TESTS.parent / file).read_text(encoding="utf-8"), f"{file} has no {name}"
        found += 1
    assert found > 60
