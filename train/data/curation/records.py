"""The record of one image: its Parquet schema, the thresholds, and the view that says which step leaves it out.

A record keeps every score that was computed; nothing in it depends on a threshold. Which records are dropped, and by which
step, is computed from the records whenever it is asked for (`View`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lens.formats.files import write_atomic

FORMAT = 1  # of records and manifests
SOURCES = ("real", "synthetic", "text_heavy", "text_synthetic")  # the paper's four
STEPS = ("broken", "area", "nsfw", "aesthetic", "watermark", "clarity", "entropy", "luminance", "duplicate")
MODELS = ("nsfw", "aesthetic", "watermark", "embedding")  # what classifiers write
STEP_OF_MODEL = {"nsfw": "nsfw", "aesthetic": "aesthetic", "watermark": "watermark", "embedding": "duplicate"}


@dataclass(frozen=True)
class Item:
    """Where one image is. Of path and url one is set; `fault` says what is wrong with an entry that names neither.

    key: how the source calls it: the path below SOURCE, TAR/MEMBER, the path or URL in a list
    path: below SOURCE, or beside the list; of the tar where `member` is set, whose bytes are [offset, offset + size)
    """

    key: str
    path: str | None = None
    member: str | None = None
    offset: int | None = None
    size: int | None = None
    url: str | None = None
    caption: str | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Record:
    """One image. None: not known, not judged. Columns of the Parquet files, in this order.

    root: "source" or "out": below which folder `path` lies; images from URLs lie in tars below OUT/fetched
    byte_count, sha256: of the encoded file; format, mode: Pillow's names; width, height: as it is meant to be seen
    failure: why it could not be read or decoded, else None
    clarity, entropy, luminance: see `lens.ops.image_scores`; nsfw, watermark: probabilities; aesthetic: 1 to 10
    ..._by: "name@revision dtype" of the model that gave the score beside it
    embedding: float16 bytes, little-endian, of unit length before it was rounded
    """

    key: str
    source: str
    licence: str
    root: str = "source"
    path: str | None = None
    member: str | None = None
    offset: int | None = None
    size: int | None = None
    url: str | None = None
    caption: str | None = None
    byte_count: int | None = None
    sha256: str | None = None
    format: str | None = None
    mode: str | None = None
    width: int | None = None
    height: int | None = None
    failure: str | None = None
    clarity: float | None = None
    entropy: float | None = None
    luminance: float | None = None
    nsfw: float | None = None
    nsfw_by: str | None = None
    aesthetic: float | None = None
    aesthetic_by: str | None = None
    watermark: float | None = None
    watermark_by: str | None = None
    embedding: bytes | None = None
    embedding_by: str | None = None

    def with_(self, **changes: Any) -> Record:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Thresholds:
    """What a record must hold to be kept. The area and the aesthetic score are the paper's, the duplicates' .985 is for CLIP
    ViT-L/14; it publishes no other, so the rest are ours: calibrate them on your data.

    area_min: width x height in pixels                                   [paper] 384 x 384
    nsfw_max, watermark_max: probabilities                               [ours]
    aesthetic_min: 1 to 10                                               [paper] 3
    clarity_min: variance of the Laplacian at a shorter side of 512      [ours]
    entropy_min: bits                                                    [ours]
    luminance_min, luminance_max: mean V of HSV in [0, 1]                [ours]
    duplicate_above: cosine; None: the embedding model's own             [paper] .985 for CLIP ViT-L/14
    """

    area_min: int = 384 * 384
    nsfw_max: float = 0.5
    aesthetic_min: float = 3.0
    watermark_max: float = 0.5
    clarity_min: float = 4.0
    entropy_min: float = 2.0
    luminance_min: float = 0.06
    luminance_max: float = 0.98
    duplicate_above: float | None = None

    @classmethod
    def of(cls, pairs: Iterable[str]) -> Thresholds:
        """From "name=value" words. Errors: ValueError naming the word."""
        known, found = {f.name: f for f in dataclasses.fields(cls)}, dict[str, Any]()
        for word in pairs:
            name, _, text = word.partition("=")
            if name not in known:
                raise ValueError(f"--set {word}: no threshold {name!r}; there are {', '.join(known)}")
            try:
                found[name] = int(text) if name == "area_min" else float(text)
            except ValueError:
                raise ValueError(f"--set {word}: expected a number, got {text!r}") from None
            if found[name] != found[name]:
                raise ValueError(f"--set {word}: expected a number, got {text!r}")
        return cls(**found)

    def rejects(self, step: str, column: np.ndarray) -> np.ndarray:
        """bool [N]: which values (float64, NaN where not judged) a step leaves out. Not for "broken" and "duplicate"."""
        if step == "luminance":
            return (column < self.luminance_min) | (column > self.luminance_max)
        if step in ("nsfw", "watermark"):
            return column > getattr(self, f"{step}_max")
        return column < getattr(self, f"{step}_min")


# ------------------------------------------------------------------------------------------------ Parquet


def arrow() -> Any:
    """pyarrow. Errors: ValueError that says how to get it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("curate: records are Parquet files, which need pyarrow: pip install -e '.[data]'") from None
    return pyarrow


_KINDS = {"int": "int64", "float": "float64", "bytes": "binary", "str": "string"}


def schema_of(kind: type, dictionaries: Sequence[str] = ()) -> Any:
    """The Arrow schema of a dataclass of this file; `dictionaries`: columns that repeat few values."""
    pa, columns = arrow(), []
    for f in dataclasses.fields(kind):
        name, _, optional = str(f.type).partition(" | ")
        value = getattr(pa, _KINDS[name])()
        columns.append(
            pa.field(f.name, pa.dictionary(pa.int32(), value) if f.name in dictionaries else value, bool(optional))
        )
    return pa.schema(columns, metadata={"lens": f"{kind.__name__} {FORMAT}"})


REPEATED = ("source", "licence", "root", "format", "mode", *(f"{name}_by" for name in MODELS))


def write_rows(path: Path, rows: Sequence[Item] | Sequence[Record]) -> None:
    """A Parquet file, whole or not at all; the same rows give the same bytes. Errors: OSError naming the file."""
    pa = arrow()
    kind = type(rows[0]) if rows else Record
    schema = schema_of(kind, REPEATED if kind is Record else ())
    columns = {f.name: [getattr(row, f.name) for row in rows] for f in dataclasses.fields(kind)}
    write_table(path, pa.table(columns, schema=schema))


def write_table(path: Path, table: Any) -> None:
    """As `write_rows`, of an Arrow table."""
    arrow()
    from pyarrow import parquet

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # pyarrow's own file hides what went wrong with a disk
            parquet.write_table(table, file, compression="zstd")

    write_atomic(path, write)


def read_table(path: Path, columns: Sequence[str] | None = None) -> Any:
    """An Arrow table of `columns`. Errors: ValueError naming a file that is none of ours, or of another format."""
    pa = arrow()
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        said = (file.schema_arrow.metadata or {}).get(b"lens", b"").decode()
        if not said.endswith(f" {FORMAT}"):
            raise ValueError(f"{path}: expected records of format {FORMAT}, got {said or 'another Parquet file'!r}")
        return file.read(columns)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file that can be read: {error}") from None


def read_rows(path: Path, kind: type[Any], first: int = 0, count: int | None = None) -> list[Any]:
    """Items or records of a file. Errors: those of `read_table`."""
    table = read_table(path).slice(first, count)
    return [kind(**row) for row in table.to_pylist()]


# ------------------------------------------------------------------------------------------------ the view


@dataclass(frozen=True)
class Count:
    """What a step of the paper's order did: how many came to it, were not judged by it, were left out by it."""

    step: str
    came: int
    not_judged: int
    dropped: int


@dataclass
class View:
    """Which step leaves each record out, by thresholds alone. `reason`: int8 [N], a place in STEPS, or -1: kept."""

    reason: np.ndarray
    counts: list[Count] = field(default_factory=list)

    @property
    def kept(self) -> np.ndarray:
        """bool [N]."""
        return self.reason < 0

    def words(self) -> list[str | None]:
        """`drop_reason` of every record."""
        return [STEPS[place] if place >= 0 else None for place in self.reason]


@dataclass(frozen=True)
class Pairs:
    """Records whose embeddings are near: places a < b (int64 [P]) and their cosine (float64 [P]), all above `floor`."""

    a: np.ndarray
    b: np.ndarray
    cosine: np.ndarray
    floor: float


COLUMNS = (
    "key",
    "width",
    "height",
    "failure",
    "nsfw",
    "aesthetic",
    "watermark",
    "clarity",
    "entropy",
    "luminance",
    "embedding_by",
)


def columns_of(tables: Iterable[Any]) -> dict[str, Any]:
    """What a view reads of all parts: float64 arrays with NaN for what is unknown, keys as strings, `failed` and `embedded` bool."""
    got: dict[str, list[Any]] = {name: [] for name in ("key", "failed", "embedded", "area", *STEPS[2:8])}
    for table in tables:
        got["key"] += table.column("key").to_pylist()
        got["failed"].append(table.column("failure").is_valid().to_numpy())
        got["embedded"].append(table.column("embedding_by").is_valid().to_numpy())
        width, height = (_floats(table, name) for name in ("width", "height"))
        got["area"].append(width * height)
        for name in STEPS[2:8]:
            got[name].append(_floats(table, name))
    empty = np.zeros(0)
    return {name: own if name == "key" else np.concatenate(own or [empty]) for name, own in got.items()}


def _floats(table: Any, name: str) -> np.ndarray:
    return np.asarray(table.column(name).cast("float64").to_numpy(zero_copy_only=False), dtype=np.float64)


def view(
    columns: Mapping[str, Any], thresholds: Thresholds, pairs: Pairs | None, duplicate_above: float | None
) -> View:
    """Each record's first rejecting step in the paper's order. A score that is missing rejects nothing.

    Of records that the first eight steps keep and that pairs above `duplicate_above` connect, one stays: the one of the
    highest aesthetic score, then the largest area, then the first key. Errors: ValueError where the pairs were only looked
    for above a higher cosine.
    """
    n = len(columns["key"])
    reason = np.full(n, -1, np.int8)
    counts = []
    for place, step in enumerate(STEPS[:-1]):
        left = reason < 0
        if step == "broken":
            out, unknown = columns["failed"].astype(bool), np.zeros(n, bool)
        else:
            out, unknown = thresholds.rejects(step, columns[step]), np.isnan(columns[step])
        reason[left & out] = place
        counts.append(Count(step, int(left.sum()), int((left & unknown).sum()), int((left & out).sum())))
    left = reason < 0
    if pairs is not None and duplicate_above is not None:
        if duplicate_above < pairs.floor:
            raise ValueError(f"duplicate_above={duplicate_above:g}: pairs were only looked for above {pairs.floor:g}")
        near = pairs.cosine > duplicate_above
        near &= left[pairs.a] & left[pairs.b]
        quality = np.nan_to_num(columns["aesthetic"], nan=-np.inf), columns["area"], columns["key"]
        for twin in _not_the_best(pairs.a[near], pairs.b[near], quality):
            reason[twin] = len(STEPS) - 1
    unknown = left & ~columns["embedded"].astype(bool)
    dropped = int((reason == len(STEPS) - 1).sum())
    counts.append(Count(STEPS[-1], int(left.sum()), int(unknown.sum()), dropped))
    return View(reason, counts)


def _not_the_best(a: np.ndarray, b: np.ndarray, quality: tuple[np.ndarray, np.ndarray, Sequence[str]]) -> Iterator[int]:
    """Members of every component of the pairs but its best."""
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        while (above := parent.setdefault(x, x)) != x:
            parent[x] = x = parent[above]
        return x

    for x, y in zip(a.tolist(), b.tolist()):
        parent[root(x)] = root(y)
    groups: dict[int, list[int]] = {}
    for x in parent:
        groups.setdefault(root(x), []).append(x)
    aesthetic, area, key = quality
    for group in groups.values():
        best = min(group, key=lambda x: (-aesthetic[x], -area[x], key[x], x))
        yield from (x for x in group if x != best)
