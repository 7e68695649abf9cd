"""``kill -9`` at any moment: the next run ends as an undisturbed one does and redoes one shard or interval at most."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import pytest
import works
from processes import finish, hidden, is_running, kill_again_and_again, tell, told
from servers import Handler, serve

from samantics.cache import remove_leftovers
from samantics.models.weights import WeightFile

# set SAMANTICS_SLOW for other moments than those of the first seed
pytestmark = pytest.mark.parametrize("seed", range(1, 7) if "SAMANTICS_SLOW" in os.environ else [1])


@pytest.mark.parametrize("name", works.WORKS)
def test_a_killed_work_ends_like_an_undisturbed_one(name: str, seed: int, tmp_path: Path) -> None:
    work, inputs, log = works.WORKS[name], tmp_path / "inputs", tmp_path / "log"
    work.prepare(inputs)
    finish(works.run, name, inputs, tmp_path / "whole", tmp_path / "once", log=tmp_path / "once")
    whole, pieces = work.read(tmp_path / "whole"), {}

    def check() -> None:
        wait_for_kernel(log)
        now = {path: path.stat().st_ino for path in (tmp_path / "killed").rglob(work.pieces or "none")}
        assert pieces.items() <= now.items()  # what was once there was not written again
        pieces.update(now)
        if name != "in-context training":  # whose only file is its checkpoint
            there = work.read(tmp_path / "killed")
            works.assert_same(there, {part: whole[part] for part in there})  # whole, or not there

    killed = kill_again_and_again(
        works.run, name, inputs, tmp_path / "killed", log, log=log, seed=seed, check=check, **work.kills
    )
    assert killed >= work.kills["kills"] - 1
    assert told(log) <= told(tmp_path / "once") + killed * work.lost
    works.assert_same(work.read(tmp_path / "killed"), whole)
    assert len(hidden(tmp_path / "killed")) <= (killed if name == "figures" else 0)
    remove_leftovers(tmp_path / "killed", "**/.*")  # with which the study's next run begins
    assert not hidden(tmp_path / "killed")


def wait_for_kernel(log: Path) -> None:
    """No notebook's kernel goes on alone."""
    over = time.monotonic() + 20
    with contextlib.suppress(FileNotFoundError, ValueError):
        while is_running(int(Path(f"{log}.pid").read_text())):
            assert time.monotonic() < over
            time.sleep(0.05)


def test_download(seed: int, tmp_path: Path) -> None:
    content, log = hashlib.shake_256(b"weights").digest(1_000_000), tmp_path / "log"

    def slowly(request: Handler, content: bytes, start: int) -> None:
        request.head(206 if start < len(content) else 416, len(content) - start)
        for place in range(start, len(content), works.PIECE):
            request.wfile.write(content[place : place + works.PIECE])
            tell(log)
            time.sleep(0.002)

    place = tmp_path / "weights" / "file.bin"
    place.parent.mkdir()
    with serve(content, *[slowly] * 9) as server:
        known = WeightFile("file.bin", server.url, hashlib.sha256(content).hexdigest(), 1, "none")
        killed = kill_again_and_again(
            works.fetch, known, place, log=log, seed=seed, kills=3, units=9, files=1, check=lambda: None
        )
    assert killed >= 2
    assert server.starts[0] == 0 and all(server.starts[1:])  # what had come was not fetched again
    assert place.read_bytes() == content and [path.name for path in place.parent.iterdir()] == ["file.bin"]
