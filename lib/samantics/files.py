"""Places and safe writing: where a run keeps its files, and how a file appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samantics.errors import StudyError

PROJECT = Path(__file__).resolve().parents[2]


def cache_dir() -> Path:
    """Folder of everything that can be computed again: ``$SAMANTICS_CACHE``, else ``.cache`` in the project."""
    return Path(os.environ.get("SAMANTICS_CACHE", PROJECT / ".cache"))


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it onto ``path`` when the block ends well.

    A reader therefore sees the old file or the whole new one, also after a kill at any moment.

    Raises:
        StudyError: the folder cannot be written or the disk is full; the old file is left as it was.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)  # temporary files are private; results are for everyone
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StudyError(f"no space left while writing {path}: free some space and run again") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StudyError(f"cannot write {path}: make its folder writable or choose another") from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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
