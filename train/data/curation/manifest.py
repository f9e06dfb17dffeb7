"""What a curation holds: numbered manifests over its parts, pairs of near-duplicates, and the view of all of it.

    OUT/manifest-0001.json   plan, models, thresholds, steps with their counts, parts and pairs with their SHA-256
    OUT/pairs-HASH.parquet   a, b (int64: places in the parts, counted through), cosine (float64)

A manifest is never changed. Other thresholds give the next number over the same parts; the highest is the one that counts.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lens.formats.files import read_json, write_json

from ..shards import digest_of
from .duplicates import near_pairs
from .engine import PLAN, part_file
from .records import (
    COLUMNS,
    FORMAT,
    Count,
    Pairs,
    Record,
    Thresholds,
    View,
    arrow,
    columns_of,
    read_table,
    view,
    write_table,
)

FLOOR_BELOW = 0.02  # pairs are looked for so far below the embedding's own threshold


def manifests(out: Path) -> list[Path]:
    """In rising order."""
    return sorted(p for p in out.glob("manifest-*.json") if re.fullmatch(r"manifest-\d{4,}\.json", p.name))


class Curation:
    """A finished folder. Errors: FileNotFoundError, ValueError naming the file."""

    def __init__(self, out: Path):
        self.out = out
        if not (found := manifests(out)):
            raise FileNotFoundError(f"{out}: no manifest here; `python -m train curate SOURCE {out}` writes it")
        self.path = found[-1]
        self.manifest = read_json(self.path)
        if self.manifest.get("format") != FORMAT:
            raise ValueError(f"{self.path}: not a manifest of a curation of format {FORMAT}")
        self.thresholds = Thresholds(**self.manifest["thresholds"])

    @property
    def plan(self) -> dict[str, Any]:
        return dict(self.manifest["plan"])

    @functools.cached_property
    def files(self) -> list[Path]:
        return [self.out / part["file"] for part in self.manifest["parts"]]

    @functools.cached_property
    def columns(self) -> dict[str, Any]:
        """See `columns_of`."""
        return columns_of(read_table(path, COLUMNS) for path in self.files)

    @functools.cached_property
    def pairs(self) -> Pairs | None:
        return read_pairs(self.out, self.manifest["pairs"])

    def view(self, thresholds: Thresholds | None = None) -> View:
        """By the manifest's thresholds, or by others."""
        asked = thresholds or self.thresholds
        return view(self.columns, asked, self.pairs, above(asked, self.manifest["pairs"]))

    def records(self, places: np.ndarray | None = None) -> Iterator[Record]:
        """Those at some places (rising), or all, a part at a time, without their embeddings."""
        names = [f.name for f in dataclasses.fields(Record) if f.name != "embedding"]
        first = 0
        for path, part in zip(self.files, self.manifest["parts"]):
            end = first + part["records"]
            own = None if places is None else places[(places >= first) & (places < end)] - first
            if own is None or len(own):
                table = read_table(path, names)
                table = table if own is None else table.take(own)
                yield from (Record(**row) for row in table.to_pylist())
            first = end

    def embeddings(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        return embeddings_of(self.files)

    def image(self, record: Record) -> bytes:
        """The encoded bytes. Errors: OSError."""
        root = self.out if record.root == "out" else Path(self.manifest["root"])
        with (root / str(record.path)).open("rb") as stream:
            if record.offset is None:
                return stream.read()
            stream.seek(record.offset)
            return stream.read(int(record.size or 0))

    def faults(self) -> list[str]:
        """Files that are not what the manifest says, in words."""
        told = [*self.manifest["parts"], *([self.manifest["pairs"]] if self.manifest["pairs"] else [])]
        found = []
        for entry in told:
            path = self.out / entry["file"]
            if not path.is_file():
                found.append(f"{path}: missing")
            elif digest_of(path) != entry["sha256"]:
                found.append(f"{path}: not the file that was written")
        return found


def above(thresholds: Thresholds, pairs: dict[str, Any] | None) -> float | None:
    """The cosine of step 9: the thresholds' own, else the embedding's; None where nothing was embedded."""
    if pairs is None:
        return None
    return thresholds.duplicate_above if thresholds.duplicate_above is not None else float(pairs["threshold"])


def embeddings_of(files: list[Path]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """float16 [N, E], the places (int64 [N]) and the file hashes of all records that have an embedding."""
    rows, places, hashes, first = [], [], list[str](), 0
    for path in files:
        table = read_table(path, ["embedding", "sha256"])
        own = np.flatnonzero(table.column("embedding").is_valid().to_numpy())
        table_own = table.take(own)
        rows += [np.frombuffer(b"".join(table_own.column("embedding").to_pylist()), "<f2")]
        places.append(own + first)
        hashes += table_own.column("sha256").to_pylist()
        first += len(table)
    flat = np.concatenate([np.zeros(0, "<f2"), *rows])
    return flat.reshape(len(hashes), -1), np.concatenate([np.zeros(0, np.int64), *places]), hashes


def read_pairs(out: Path, entry: dict[str, Any] | None) -> Pairs | None:
    if entry is None:
        return None
    table = read_table(out / entry["file"])
    a, b, cosine = (table.column(name).to_numpy() for name in ("a", "b", "cosine"))
    return Pairs(a, b, cosine, float(entry["floor"]))


def write_pairs(out: Path, parts: list[dict[str, Any]], threshold: float, floor: float) -> dict[str, Any]:
    """Look for pairs above `floor` among the parts' embeddings, unless that was done; the manifest's entry."""
    key = json.dumps([[part["sha256"] for part in parts], floor])
    path = out / f"pairs-{hashlib.sha256(key.encode()).hexdigest()[:12]}.parquet"
    if not path.is_file():
        rows, places, hashes = embeddings_of([out / part["file"] for part in parts])
        found = near_pairs(rows, places, hashes, floor)
        pa = arrow()
        schema = pa.schema(
            [("a", pa.int64()), ("b", pa.int64()), ("cosine", pa.float64())], metadata={"lens": f"Pairs {FORMAT}"}
        )
        write_table(path, pa.table({"a": found.a, "b": found.b, "cosine": found.cosine}, schema=schema))
    return {"file": path.name, "sha256": digest_of(path), "threshold": threshold, "floor": floor}


def kind_of_failure(text: str) -> str:
    """The sort of a failure, which names no number and no file."""
    head = text.partition(":")[0]
    return re.sub(r"\d+( x \d+)?", "N", head)


def write_manifest(
    out: Path, root: Path, thresholds: Thresholds, embedding_threshold: float | None
) -> tuple[Path, list[Count], bool]:
    """The next manifest over finished parts, unless the last one says the same; its path, the counts, whether it is new.

    embedding_threshold: of the model that embedded, None where none did.
    """
    plan = read_json(out / PLAN)
    files = [part_file(out, number) for number in range(len(plan["parts"]))]
    relative = [path.relative_to(out).as_posix() for path in files]
    parts = [
        {"file": name, "records": count, "sha256": digest_of(path)}
        for name, path, count in zip(relative, files, plan["parts"], strict=True)
    ]
    entry = None
    if embedding_threshold is not None:
        floor = round(min(embedding_threshold, thresholds.duplicate_above or 1.0) - FLOOR_BELOW, 6)
        entry = write_pairs(out, parts, embedding_threshold, floor)
    columns = columns_of(read_table(path, COLUMNS) for path in files)
    found = view(columns, thresholds, read_pairs(out, entry), above(thresholds, entry))
    failures = collections.Counter(
        kind_of_failure(text) for path in files for text in read_table(path, ["failure"]).column(0).to_pylist() if text
    )
    body = {
        "format": FORMAT,
        "root": str(root),
        "plan": {name: value for name, value in plan.items() if name != "parts"},
        "thresholds": dataclasses.asdict(thresholds),
        "records": sum(plan["parts"]),
        "kept": int(found.kept.sum()),
        "steps": [dataclasses.asdict(count) for count in found.counts],
        "failures": dict(sorted(failures.items())),
        "pairs": entry,
        "parts": parts,
    }
    before = manifests(out)
    if before and read_json(before[-1]) == json.loads(json.dumps(body)):
        return before[-1], found.counts, False
    number = int(before[-1].stem.rpartition("-")[2]) + 1 if before else 1
    path = out / f"manifest-{number:04d}.json"
    write_json(path, body)
    return path, found.counts, True
