"""What a source holds: a folder of images, a folder of tars (or one), a Parquet or JSONL list of paths and URLs.

Listing opens no image. It is in order of names, tars in the order of their members, lists in the order of their rows, so it
does not depend on the file system, and streams: no source is held in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..images import SUFFIXES
from .records import Item, arrow

KINDS = ("folder", "tars", "list")
IMAGES = (*SUFFIXES, ".avif", ".jfif", ".jpe")
LISTS = (".parquet", ".jsonl", ".ndjson")
COLUMNS = ("path", "file", "url", "caption")  # path and file are the same


def kind_of(source: Path) -> str:
    """Of KINDS. Errors: ValueError for what is none of them; FileNotFoundError."""
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such source")
    if source.is_file():
        if source.suffix.lower() in LISTS:
            return "list"
        if source.suffix.lower() == ".tar":
            return "tars"
        raise ValueError(f"{source}: expected a folder, a .tar, or a list ({', '.join(LISTS)})")
    return "tars" if next((p for p in files_of(source) if p.endswith(".tar")), None) else "folder"


def root_of(source: Path) -> Path:
    """The folder below which items' paths lie."""
    return source if source.is_dir() else source.parent


def files_of(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, in order of their names, without hidden ones. Links to folders are not followed."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{below}" for below in files_of(folder / entry.name))
        elif not entry.is_dir():
            yield entry.name


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGES)


def fingerprint(source: Path) -> str:
    """Of names, sizes and times of change of the files that a listing reads: SHA-256, 16 hex digits. It opens none of them."""
    kind, digest = kind_of(source), hashlib.sha256()
    names = files_of(source) if source.is_dir() else iter([source.name])
    for name in names:
        if source.is_dir() and not (is_image(name) if kind == "folder" else name.endswith(".tar")):
            continue
        path = root_of(source) / name
        try:
            status = path.stat()
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        except OSError as error:
            stamp = error.strerror or "unreadable"
        digest.update(f"{os.fsencode(name)!r} {stamp}\n".encode())
    return digest.hexdigest()[:16]


def items_of(source: Path) -> Iterator[Item]:
    """Everything that should be an image, as it is listed. Errors: ValueError, FileNotFoundError naming the source."""
    kind = kind_of(source)
    if kind == "folder":
        yield from (_file(name) for name in files_of(source) if is_image(name))
    elif kind == "tars":
        tars = (n for n in files_of(source) if n.endswith(".tar")) if source.is_dir() else iter([source.name])
        for name in tars:
            yield from _members(root_of(source), name)
    elif source.suffix.lower() == ".parquet":
        yield from _parquet(source)
    else:
        yield from _lines(source)


def readable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _file(name: str) -> Item:
    text = readable(name)
    if text != name:
        return Item(key=text, fault="its name is not UTF-8: rename it")
    return Item(key=name, path=name)


def _members(root: Path, name: str) -> Iterator[Item]:
    """Images of a tar with KEY.txt or "caption" of KEY.json beside them. A tar that ends too early yields what it has, then a fault."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    fault = None
    with (root / name).open("rb") as stream:

        def read(member: tarfile.TarInfo) -> bytes:
            stream.seek(member.offset_data)
            return stream.read(member.size)

        try:
            with tarfile.open(root / name, "r:") as tar:
                for member in tar:
                    if member.isfile():
                        parent, slash, last = member.name.rpartition("/")
                        stem, _, part = last.partition(".")  # WebDataset's rule: a key ends at the first dot
                        found.setdefault(parent + slash + stem, {})[part.lower()] = member
                stream.seek(tar.offset)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    fault = "the tar ends without an end mark: it may have lost members"
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            fault = f"the tar cannot be read to its end: {error}"
        for parts in found.values():
            caption = None
            try:
                if "txt" in parts:
                    caption = read(parts["txt"]).decode("utf-8-sig").strip() or None
                elif "json" in parts:
                    caption = _caption(json.loads(read(parts["json"])))
            except (ValueError, TypeError, RecursionError):
                caption = None  # an image without a caption is still an image
            for part, member in parts.items():
                if is_image(f".{part}"):
                    key = f"{name}/{readable(member.name)}"
                    place = (member.offset_data, member.size)
                    yield Item(key, name, readable(member.name), *place, caption=caption)
    if fault:
        yield Item(key=name, fault=fault)


def _caption(value: Any) -> str | None:
    text = value.get("caption") if isinstance(value, dict) else None
    return text.strip() or None if isinstance(text, str) else None


def _entry(value: Any, where: str) -> Item:
    """The item of a row of a list."""
    if not isinstance(value, dict):
        return Item(key=where, fault=f"expected an object with path or url, got {type(value).__name__}")
    path, url = value.get("path") or value.get("file"), value.get("url")
    given = [text for text in (path, url) if text is not None]
    if len(given) != 1 or not isinstance(given[0], str) or not given[0].strip() or "\0" in given[0]:
        return Item(key=where, fault="expected one of path (or file) and url, a text")
    if path is not None and path.lower().startswith(("http:", "https:")):
        path, url = None, path
    return Item(key=given[0], path=path, url=url, caption=_caption(value))


def _lines(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}#{number}"
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield Item(key=where, fault=f"not JSON: {error}")
            else:
                yield _entry(value, where)


def _parquet(path: Path) -> Iterator[Item]:
    pa = arrow()
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        there = [name for name in COLUMNS if name in file.schema_arrow.names]
        if not {"path", "file", "url"} & set(there):
            raise ValueError(f"{path}: no column path, file or url; it has {', '.join(file.schema_arrow.names)}")
        row = 0
        for batch in file.iter_batches(batch_size=4096, columns=there):
            for value in batch.to_pylist():
                row += 1
                yield _entry(value, f"{path.name}#{row}")
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file that can be read: {error}") from None
