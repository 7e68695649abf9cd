"""Small disks and read-only folders, for tests of what happens there."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A disk of that size at ``folder``; the test is skipped where none can be mounted."""
    folder.mkdir(parents=True)
    if os.getuid() != 0 or not _mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "small", str(folder)):
        pytest.skip("a small disk can be mounted by root only (mount -t tmpfs)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def enlarge(folder: Path, kilobytes: int) -> None:
    """Make room on a :func:`small_disk`."""
    assert _mount("-o", f"remount,size={kilobytes}k", str(folder))


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """The folder, whose files stay readable, without leave to write: by its permissions, or for root by a mount."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.getuid() != 0:
        folder.chmod(0o555)
        try:
            yield folder
        finally:
            folder.chmod(0o755)
        return
    if not (_mount("--bind", str(folder), str(folder)) and _mount("-o", "remount,bind,ro", str(folder))):
        pytest.skip("root may write everywhere, and no read-only disk can be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
