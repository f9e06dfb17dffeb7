"""Files read and written whole: JSON objects, atomic writes, and the error of every file that cannot be used."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lens.notices import printable

_LONGEST_MESSAGE = 2000  # characters; paths may have 4,096 bytes, but hardly do


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the key, what was expected and what came. A long one,
    since what came may be of any length, loses its middle."""

    def __init__(self, message: str):
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 4 :]}"
        super().__init__(printable(message))  # what came may hold what drives a terminal


# ------------------------------------------------------------------------------------------------ reading

_JSON_BYTES = 1 << 27  # the largest that people have, a tokenizer.json, is 28 MB
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may stand for no character


def regular_file(path: Path) -> os.stat_result:
    """The status of a file that can be read. CheckpointError for whatever else has that name, before it is opened: a
    named pipe would never end, a device neither."""
    try:
        status = path.stat()
    except FileNotFoundError:
        link = f": a link to {os.readlink(path)}, which is not there" if path.is_symlink() else ""
        raise CheckpointError(f"{path}: file not found{link}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character
        shown = str(path) if len(str(path)) <= 300 else f"{str(path)[:300]}..."
        raise CheckpointError(f"{shown}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise CheckpointError(f"{path}: expected a file, got {kind}")
    return status


def is_there(path: Path) -> bool:
    """Whether anything has that name, a broken link included; False for names that no file can have."""
    try:
        path.lstat()
    except (OSError, ValueError):
        return False
    return True


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole file of at most ``limit`` bytes, or CheckpointError naming it."""
    size = regular_file(path).st_size
    if size > limit:
        raise CheckpointError(f"{path}: expected at most {limit} bytes, got {size}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_text(path: Path, limit: int = _JSON_BYTES) -> str:
    """A whole UTF-8 file of at most ``limit`` bytes, or CheckpointError naming it."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or CheckpointError naming the file."""
    return parse_json(read_bytes(path, _JSON_BYTES), str(path))


def parse_json(text: str | bytes, source: str) -> dict[str, Any]:
    """A JSON object, or CheckpointError naming ``source``: numbers are finite and fit a double, text is Unicode, no key
    comes twice in an object, and objects are as deep as Python can follow."""
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        hooks: dict[str, Any] = {"parse_int": _integer, "parse_float": _finite, "parse_constant": _finite}
        value = json.loads(decoded, object_pairs_hook=_once, **hooks)
        if _SURROGATE.search(decoded):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise CheckpointError(f"{source}: not JSON that can be read: nested too deep") from None
    except (ValueError, OverflowError) as error:  # of UTF-8, of JSON, of numbers
        raise CheckpointError(f"{source}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise ValueError(f"the key {twice!r} comes twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 309:  # what no double holds; beyond 4,300 Python refuses to read it at all
        raise ValueError(f"an integer of {len(digits.lstrip('-'))} digits")
    _finite(digits)
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text if len(text) < 30 else text[:30] + '...'} is no finite number")
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
        mode = stat.S_IMODE((path.stat() if path.exists() else os.fstat(handle)).st_mode)
        # before anything is in it, so that nobody reads what the old file hid
        os.fchmod(handle, mode | stat.S_IRUSR | stat.S_IWUSR)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
            os.fchmod(
                file.fileno(), mode
            )  # safetensors puts a file of its own in its place, which only the owner reads
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
