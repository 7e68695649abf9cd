from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from samantics import cli

COMMANDS = [name.replace("_", "-") for name in (c.callback.__name__ for c in cli.app.registered_commands if c.callback)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert f"Usage: samantics {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["train", "nobody"], 1, "error: no objective is called 'nobody'"),
        (["extract", "nowhere"], 1, "error: nowhere"),
        (["tune", "--scale", "poket"], 1, "error: no scale is called 'poket': choose from pocket, quick, lite, paper"),
        (["compare", "old"], 2, "Missing argument"),
        (["fly"], 2, "No such command 'fly'"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_a_fault_is_one_line_and_a_wrong_option_is_told(
    arguments: list[str], code: int, says: str, places: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(places)
    assert cli.main(arguments) == code
    told = capsys.readouterr().err
    assert says in told and (code == 2 or told.count("\n") == 1)
