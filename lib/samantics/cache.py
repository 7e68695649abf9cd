"""Places and safe writing: where a run keeps its files, and how a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samantics.errors import StudyError

PROJECT = Path(__file__).resolve().parents[2]
TEMPORARY = re.compile(r"\..+(\.\w+)\.\w+\1")  # names of half-written files: .name.ending.random.ending
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, the limit on a file's size


def cache_dir() -> Path:
    """Folder of everything that can be computed again: ``$SAMANTICS_CACHE``, else ``.cache`` in the project."""
    return Path(os.environ.get("SAMANTICS_CACHE") or PROJECT / ".cache")


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it onto ``path`` when the block ends well.

    A reader therefore sees the old file or the whole new one, also after a kill at any moment.

    Raises:
        StudyError: the folder cannot be written or the disk is full; the old file is left as it was.
    """
    path = Path(path)
    handle, temporary = None, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        temporary = Path(name)
        _lock(handle)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)  # temporary files are private; results are for everyone
        os.replace(temporary, path)
    except Exception as error:
        reason = getattr(error, "errno", None) or _refusal(temporary)
        if reason in FULL:
            raise StudyError(f"no space left while writing {path}: free some space and run again") from error
        if reason in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StudyError(f"cannot write {path}: make its folder writable or choose another") from error
        raise
    finally:
        if handle is not None:
            os.close(handle)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _lock(handle: int) -> bool:
    """Lock a file for as long as this process has it open; False where another has, or the disk knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _refusal(temporary: Path | None) -> int | None:
    """Why a file can grow no further, as an error number: NumPy, torch and safetensors do not pass it on."""
    if temporary is None:
        return None
    try:
        with open(temporary, "ab") as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def remove_leftovers(folder: Path, pattern: str = ".*") -> None:
    """Delete what killed processes were writing in a folder; the files of living ones are locked, and stay.

    Args:
        pattern: of :meth:`Path.glob`; ``**/.*`` goes through all folders below, too.
    """
    for path in folder.glob(pattern):
        if TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                if _lock(file.fileno()):
                    path.unlink()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around the reading of a file that can be computed again.

    Raises:
        StudyError: it cannot be read as what it should be.
    """
    try:
        yield
    except Exception as error:  # NumPy and pandas raise nearly anything on a damaged file
        raise StudyError(f"{path} is damaged: delete it, and it is computed again") from error


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused (they are not JSON)."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def hash_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_value(value: Any) -> str:
    """SHA-256 (first 16 hexadecimal digits) of any JSON-able value; equal values give equal hashes."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
