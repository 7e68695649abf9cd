"""The one error type that users meet, and how its lines name things."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

NAMED = 3  # ids or files that a line names


class StudyError(Exception):
    """A fault that the user can mend. Its message is one line: what happened, to which file, what to do."""


def printable(path: Path | str) -> str:
    """A path for a message: in quotes and escaped where it has line breaks, control characters or odd bytes."""
    return str(path) if str(path).isprintable() else repr(str(path))


def writable(name: str) -> str:
    """A name as tables and pictures can hold it: one line of proper Unicode; folders may be named by any bytes."""
    return " ".join(name.encode("utf-8", "replace").decode().split()) or "(blank)"


def short(value: Any) -> str:
    """A value of a user's file, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listing(values: Collection[Any]) -> str:
    """`2, 3, 5 and 7 more`."""
    more = f" and {len(values) - NAMED} more" if len(values) > NAMED else ""
    return ", ".join(short(value) for value in [*values][:NAMED]) + more


def noted(noun: str, which: Collection[Any], why: str) -> list[str]:
    """A line such as `2 images (3, 5): damaged`; none where there are none."""
    return [f"{len(which)} {noun}{'s' * (len(which) > 1)} ({listing(which)}): {why}"] if which else []
