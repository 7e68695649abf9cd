"""Two runs of one clone at once: one is refused in one line, the other's results are those of a run alone."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import works
from processes import PATIENCE, start

from notebooks import write_notebook
from samantics.cache import PROJECT

WAITS = """\
import time
from pathlib import Path
while not Path({go!r}).exists():
    time.sleep(0.02)
print("done")"""


def results(figures: Path) -> dict[str, bytes]:
    """The executed notebooks and their pages."""
    return {path.name: path.read_bytes() for path in (figures / "pocket" / "notebooks").iterdir()}


def test_one_of_two_runs_started_at_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = tmp_path / "go"
    write_notebook(tmp_path / "notebooks", "00_waits", WAITS.format(go=str(go)))
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAMANTICS_FIGURES", str(tmp_path / "figures"))
    logs = [tmp_path / "first", tmp_path / "second"]
    runs = [start(works.run_command, tmp_path / "notebooks", log=log) for log in logs]
    over = time.monotonic() + PATIENCE
    while all(run.is_alive() for run in runs) and time.monotonic() < over:
        time.sleep(0.02)
    refused = next(number for number, run in enumerate(runs) if not run.is_alive())
    assert runs[1 - refused].is_alive()  # it waits for the file
    go.touch()
    for run in runs:
        run.join(PATIENCE)
    assert [runs[refused].exitcode, runs[1 - refused].exitcode] == [1, 0]
    (line,) = logs[refused].with_suffix(".txt").read_text().splitlines()
    assert line == (
        f"error: another run at scale pocket is under way ({tmp_path / 'cache' / 'pocket.lock'}): wait for its end"
    )
    both = results(tmp_path / "figures")
    monkeypatch.setenv("SAMANTICS_FIGURES", str(tmp_path / "alone"))
    alone = start(works.run_command, tmp_path / "notebooks", log=tmp_path / "third")
    alone.join(PATIENCE)
    assert alone.exitcode == 0 and results(tmp_path / "alone") == both


@pytest.mark.skipif("SAMANTICS_SLOW" not in os.environ, reason="notebook 00 by the command itself: SAMANTICS_SLOW=1")
def test_two_run_all_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"SAMANTICS_CACHE": f"{tmp_path}/cache", "SAMANTICS_FIGURES": f"{tmp_path}/figures"}
    command = [str(PROJECT / "run_all.sh"), "--only", "00"]
    runs = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1]
    refused = next(end for run, end in zip(runs, ends, strict=True) if run.returncode == 1)
    assert refused.startswith("error: another run at scale pocket is under way") and refused.count("\n") == 1
    assert (tmp_path / "figures" / "pocket" / "index.html").exists()
