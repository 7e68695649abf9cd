"""A worker of ``torchrun`` dies: the command fails instead of hanging, and the next one ends with the same features."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import works
from PIL import Image
from processes import PATIENCE, finish, start
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from samantics import cli
from samantics.cache import write_json
from samantics.probing import features as store

SHARD_ROWS, IMAGES = 4, 24


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Of ``python -m samantics``, on a folder of photographs that it makes."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    kind = ["--encoder", "dinov2", "--weights", "zoo_random", "--layers", "final:cls"]
    return [
        "extract",
        str(tmp_path / "photos"),
        *kind,
        "--batch-size",
        "2",
        "--workers",
        "1",
        "--shard-rows",
        str(SHARD_ROWS),
    ]


def shards(cache: Path) -> works.Results:
    """The finished shards; two processes sum as one does, but for rounding."""
    notes = {str(path.relative_to(cache)): path for path in cache.rglob("shard_*.json")}
    return {name: np.load(path.with_suffix(".npy")).astype(float) for name, path in notes.items()}


def exits() -> None:
    os._exit(3)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def worker(options: list[str], dies: Callable[[], None] | None) -> int:
    """What a process of ``torchrun`` does; after a shard each, the second dies and the first would never end."""
    torch.set_num_threads(1)
    if dies is not None:
        notes = []

        def write(path: Path, value: Any) -> None:
            notes.append(path.name)
            if len(notes) == 3:  # the store's key, a shard's note, and now the next one's
                dies() if os.environ["RANK"] == "1" else time.sleep(10 * PATIENCE)
            write_json(path, value)

        store.write_json = write
    return cli.main(options)


def launch(options: list[str], dies: Callable[[], None] | None = None) -> None:
    """As the command ``torchrun`` does, with workers forked from this process: they need not import torch again."""
    config = LaunchConfig(
        1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test", start_method="fork", max_restarts=0
    )
    try:
        elastic_launch(config, worker)(options, dies)
    except ChildFailedError as error:
        print(error)
        os._exit(1)  # what the command makes of it


@pytest.mark.parametrize("dies", [exits, is_killed])
def test_the_run_fails_and_the_next_completes_it(
    dies: Callable[[], None], options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "alone"))
    assert cli.main(options) == 0
    monkeypatch.setenv("SAMANTICS_CACHE", str(tmp_path / "two"))
    failing = start(launch, options, dies, log=tmp_path / "log")
    failing.join(PATIENCE)
    assert failing.exitcode == 1, (tmp_path / "log.txt").read_text()
    before, whole = shards(tmp_path / "two"), shards(tmp_path / "alone")
    assert 0 < len(before) < len(whole) == IMAGES // SHARD_ROWS
    notes = {path: path.stat().st_ino for path in (tmp_path / "two").rglob("shard_*.json")}
    finish(launch, options, log=tmp_path / "log")
    works.assert_same(shards(tmp_path / "two"), whole)
    assert {path: path.stat().st_ino for path in notes} == notes  # what was finished was not done again
    assert not list((tmp_path / "two").rglob(".*"))


@pytest.mark.skipif("SAMANTICS_SLOW" not in os.environ, reason="the command torchrun itself: set SAMANTICS_SLOW=1")
def test_torchrun_itself(options: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"SAMANTICS_CACHE": str(tmp_path / "two"), "OMP_NUM_THREADS": "1"}
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import sys\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}\n"
        "import test_torchrun\n"
        f"sys.exit(test_torchrun.worker({options}, test_torchrun.is_killed))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    failing = subprocess.run([*torchrun, str(dying)], env=environment, timeout=300, check=False)
    assert failing.returncode != 0 and 0 < len(shards(tmp_path / "two")) < IMAGES // SHARD_ROWS
    subprocess.run([*torchrun, "-m", "samantics", *options], env=environment, timeout=300, check=True)
    alone = [sys.executable, "-m", "samantics", *options]
    subprocess.run(alone, env=environment | {"SAMANTICS_CACHE": str(tmp_path / "alone")}, timeout=300, check=True)
    works.assert_same(shards(tmp_path / "two"), shards(tmp_path / "alone"))
