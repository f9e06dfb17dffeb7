"""Rows of a list that people or other stages wrote: JSON lines, or Parquet (where pyarrow is installed), one row at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lens.formats.files import parse_json

_BATCH = 8192  # rows of a Parquet file that are read at once


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file, or of all .jsonl and .parquet files of a folder in order of their names. columns: of Parquet, those of them
    that it has. Errors: ValueError naming file and line; FileNotFoundError."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".parquet"))
        if not files:
            raise ValueError(f"{path}: holds no .jsonl and no .parquet file")
        for one in files:
            yield from read_rows(one, columns)
        return
    if path.suffix == ".parquet":
        yield from _parquet(path, columns)
        return
    for _, row in json_lines(path):
        yield row


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every line that holds more than space. Errors: ValueError naming file and line, for whatever is no
    object of JSON in UTF-8; OSError."""
    with path.open("rb") as file:  # no other separator ends a line of JSON
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, parse_json(line, f"{path}, line {number}")


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file that can be read: {error}") from None
    kept = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
    for batch in file.iter_batches(_BATCH, columns=kept):
        yield from batch.to_pylist()
