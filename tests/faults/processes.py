"""Work in a process of its own that is killed: a fork of a server that has imported the packages already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "study",
    "samantics.zoo.training",
    "samantics.incontext.training",
    "samantics.training_free.proposals",
    "samantics.probing.features",
)
PATIENCE = 60.0  # seconds that any work here may take, on a machine that does other things too


def tell(log: Path) -> None:
    """Say that one more unit of work (an image, a step, a cell) is begun: a byte that a kill cannot take back."""
    with open(log, "ab") as file:
        file.write(b".")


def told(log: Path) -> int:
    """Units that were begun, by all runs together."""
    return log.stat().st_size if log.exists() else 0


def start(work: Callable[..., Any], *arguments: Any, log: Path, dies_at_file: int = 0) -> ForkServerProcess:
    """Start ``work(*arguments)`` in a process of its own; its output goes to ``log`` with the ending ``.txt``.

    Args:
        work: a function of a module; it finds this process's environment.
        dies_at_file: kill it when it has written that many files and is about to give the last its name.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PACKAGES))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent / "tmp")}
    (log.parent / "tmp").mkdir(exist_ok=True)
    process = context.Process(target=_run, args=(work, arguments, environment, log.with_suffix(".txt"), dies_at_file))
    process.start()
    return process


def _run(
    work: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], output: Path, dies_at_file: int
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    tempfile.tempdir = None  # to be found anew
    torch.set_num_threads(1)
    rename, files = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal files
        files += 1
        if files == dies_at_file:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = replace
    work(*arguments)


def finish(work: Callable[..., Any], *arguments: Any, log: Path) -> None:
    """Run ``work`` to its end, which must be a good one."""
    process = start(work, *arguments, log=log)
    process.join(PATIENCE)
    assert process.exitcode == 0, log.with_suffix(".txt").read_text()


def kill_again_and_again(
    work: Callable[..., Any],
    *arguments: Any,
    log: Path,
    seed: int,
    kills: int = 5,
    units: int = 3,
    seconds: float = 0.1,
    files: int = 3,
    check: Callable[[], None],
) -> int:
    """Start ``work`` and kill it (SIGKILL), ``kills`` times, then let it finish. Returns how often it was killed.

    Every second time it dies between writing a file and naming it, the worst moment for what is left behind: first
    its first file, then its second, up to ``files``. Else it dies up to ``units`` units after its start, and up to
    ``seconds`` later.

    Args:
        check: what must hold after every kill.
    """
    rng = random.Random(seed)
    killed = 0
    for attempt in range(kills):
        begun, dies_at_file = told(log), 1 + attempt // 2 % files if attempt % 2 else 0
        process = start(work, *arguments, log=log, dies_at_file=dies_at_file)
        if dies_at_file:
            process.join(PATIENCE)
        else:
            enough, over = begun + rng.randint(1, units), time.monotonic() + PATIENCE
            while process.is_alive() and told(log) < enough and time.monotonic() < over:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, seconds))
        process.kill()
        process.join(PATIENCE)
        assert process.exitcode in (0, -signal.SIGKILL), log.with_suffix(".txt").read_text()
        killed += process.exitcode != 0
        check()
        if process.exitcode == 0:
            break
    finish(work, *arguments, log=log)
    return killed


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be buried."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def hidden(folder: Path) -> list[Path]:
    """What unfinished writing has left in a folder and below it."""
    return sorted(folder.rglob(".*"))
