"""Files read and written whole: JSON objects, atomic writes, and the error of every file that cannot be used."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the key, what was expected and what came."""


# ------------------------------------------------------------------------------------------------ files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


# ------------------------------------------------------------------------------------------------ saving


_STALE_SECONDS = 60.0  # a temporary file that nobody wrote to for so long may be swept, if nobody locks it
_swept: set[Path] = set()  # folders, once each per process


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """``write(temporary)``, flush to disk, rename to ``path``: a killed or failed save leaves the old file.

    A new file gets the mode that the umask allows, one that is replaced keeps its mode. The writer holds a lock on its
    temporary file, so that those of writers that were killed are known and swept by the next one in the folder.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # renamed over, /dev/null would be a file from then on
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    # part of the name only: one as long as the disk allows must still fit
    temporary = path.with_name(f".{path.name[:20]}.{secrets.token_hex(4)}.part")
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
        if mode is not None:  # before anything is in it, so that nobody reads what the old file hid
            os.fchmod(handle, mode | stat.S_IRUSR | stat.S_IWUSR)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
            if mode is not None:
                os.fchmod(file.fileno(), mode)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # name the file, not the temporary
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder: old temporary files of ``write_atomic`` that nobody locks."""
    if (folder := folder.resolve()) in _swept:
        return
    _swept.add(folder)
    for left in folder.glob(".*.part"):
        with contextlib.suppress(OSError):  # another process's, or gone meanwhile
            if not left.is_file() or left.is_symlink() or time.time() - left.stat().st_mtime < _STALE_SECONDS:
                continue
            handle = os.open(left, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(handle)


def write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)
