"""Where a run keeps what it computed: files that appear whole or not at all, one cache, one checkpoint."""

import contextlib
import dataclasses
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import pandas as pd
import torch
from filelock import FileLock

from samantics.errors import StudyError

PROJECT = Path(__file__).resolve().parents[2]
ASSETS = Path(__file__).resolve().parent / "assets"  # tables and weights that come with the library
TEMPORARY = re.compile(r"\..+(\.\w+)\.\w+\1")  # names of half-written files: .name.ending.random.ending
T = TypeVar("T")
MISSING = "\\N"  # a missing number in a kept table, as databases write it: an empty cell is an empty text
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, the limit on a file's size


def cache_dir() -> Path:
    """Folder of everything that can be computed again: ``$SAMANTICS_CACHE``, else ``.cache`` in the project."""
    return Path(os.environ.get("SAMANTICS_CACHE") or PROJECT / ".cache")


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it onto `path` when the block ends well.

    A reader sees the old file or the whole new one, also after a kill at any moment. StudyError where the folder cannot
    be written or the disk is full; the old file is left as it was.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, f".{glob.escape(path.name)}.*")
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        with open(handle, "rb") as held:
            temporary = Path(name)
            _lock(held)
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written)
            os.chmod(temporary, 0o644)  # temporary files are private; results are for everyone
            os.replace(temporary, path)
    except Exception as error:
        reason = getattr(error, "errno", None) or (temporary and _refusal(temporary))
        if reason in FULL:
            raise StudyError(f"no space left while writing {path}: free some space and run again") from error
        if reason in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StudyError(f"cannot write {path}: make its folder writable or choose another") from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _lock(file: IO[bytes]) -> bool:
    """Lock a file for as long as this process has it open; False where another has, or the disk knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _refusal(temporary: Path) -> int | None:
    """Why a file can grow no further, as an error number: NumPy, torch and safetensors do not pass it on."""
    try:
        with open(temporary, "ab") as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file)
    except OSError as error:
        return error.errno
    return None


def remove_leftovers(folder: Path, pattern: str = "**/.*") -> None:
    """Delete what killed processes were writing below a folder; the files of living ones are locked."""
    for path in folder.glob(pattern):
        if TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                if _lock(file):
                    path.unlink()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around the reading of a file that can be computed again: StudyError where it is not what it should be."""
    try:
        yield
    except Exception as error:  # NumPy and pandas raise nearly anything on a damaged file
        raise StudyError(f"{path} is damaged: delete it, and it is computed again") from error


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def hash_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, hexadecimal; StudyError where they cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): make it readable") from error


def hash_value(value: Any) -> str:
    """SHA-256 (first 16 hexadecimal digits) of any JSON-able value; equal values give equal hashes."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------- the cache


def _read(path: Path) -> Any:
    if path.suffix == ".csv":
        return pd.read_csv(path, keep_default_na=False, na_values=[MISSING])
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    return json.loads(path.read_text(encoding="utf-8"))


def _write(value: Any, path: Path) -> None:
    if path.suffix == ".csv":
        value.to_csv(path, index=False, na_rep=MISSING)
    elif path.suffix == ".npz":
        np.savez(path, **value)
    else:
        path.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")


def kept(path: Path, make: Callable[[], T]) -> T:
    """What a file of the cache holds; it is made and written first where the file is not there.

    The value is read back even when it was just made, so that the first run and every later one go on with the same.
    Processes that ask at the same time wait for the first one instead of computing it twice.

    Args:
        path: the file, named after all that its content depends on (`hash_value` of the settings). Its ending says
            what it holds: `.csv` a table, `.json` a JSON value, `.npz` arrays by name.
        make: computes the value.

    Raises:
        StudyError: the file is damaged, its folder cannot be written, or the disk is full.
    """
    if not path.is_file():
        with alone(path):
            if not path.is_file():
                value = make()
                with atomic_path(path) as temporary:
                    _write(value, temporary)
    with reading(path):
        return _read(path)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process makes this file; where a disk knows no locks, both make it and the last one stays."""
    lock = FileLock(f"{path}.lock")
    with contextlib.suppress(OSError, NotImplementedError):  # `atomic_path` says what is wrong with the folder
        lock.acquire()
    try:
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)  # before the release, or the next one's would go
            lock.release()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a training is saved; what it must have been trained with to be resumed: JSON-able values by name."""

    path: Path
    identity: dict[str, Any]

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """What was saved, or None where nothing was; StudyError where it is damaged or has other settings."""
        if not self.path.is_file():
            return None
        try:
            state = torch.load(self.path, map_location=device, weights_only=True)
            saved = state["identity"]
        except Exception as error:  # torch.load raises nearly anything on a damaged file
            raise StudyError(f"the checkpoint {self.path} is damaged: delete it, and training starts anew") from error
        for name, value in self.identity.items():
            if saved.get(name) != value:
                raise StudyError(
                    f"the checkpoint {self.path} was trained with another {name} ({saved.get(name)!r}, now {value!r}): "
                    "delete it, or train under another name"
                )
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file, whole."""
        with atomic_path(self.path) as temporary:
            torch.save(state | {"identity": self.identity}, temporary)
