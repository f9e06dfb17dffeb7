"""Shards on disk: WebDataset tars of one bucket each, a sidecar index, a manifest; written whole or not at all.

    OUT/manifest.json                 buckets with their sizes, shards with their hashes, what was left out and why, what was computed
                                      beforehand, the command
    OUT/manifest.head.json, .table.npy  what a training reads of it: mapped into memory, shared by the processes of a node
    OUT/512_1x1/000000.tar            members KEY.jpg (the encoded picture as it came), KEY.txt (caption), KEY.json (provenance),
                                      with --precompute also KEY.latents.npy, KEY.ids.npy, KEY.features.npy
    OUT/512_1x1/000000.json           keys; offset, size and CRC-32 of every member in the tar

The index is written after its tar, the manifest after all: an interrupted build goes on at the first shard without an index.
Any WebDataset reader can stream the tars; ours reads members at random by the index and checks them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lens.formats.files import CheckpointError, read_json, write_atomic, write_json

from ..loop.checkpoints import write_text
from ..loop.clock import Interrupted
from .buckets import Bucket
from .images import Unusable

if TYPE_CHECKING:
    from ..loop.ranks import Ranks

FORMAT = 1
MANIFEST = "manifest.json"
HEAD, TABLE = "manifest.head.json", "manifest.table.npy"
TEXT, META, LATENTS, IDS, FEATURES = "txt", "json", "latents.npy", "ids.npy", "features.npy"
OPEN_FILES, OPEN_INDEXES = 256, 512  # kept by a reader


@dataclass
class Sample:
    """What becomes the members of one key."""

    key: str
    picture: bytes
    suffix: str  # of the picture, without the dot
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)  # LATENTS, IDS, FEATURES

    def members(self) -> dict[str, Any]:
        out: dict[str, Any] = {"__key__": self.key, self.suffix: self.picture, TEXT: self.caption.encode()}
        out[META] = json.dumps(self.meta, ensure_ascii=False, sort_keys=True).encode()
        return out | {name: array_bytes(value) for name, value in self.arrays.items()}


def array_bytes(value: Tensor) -> bytes:
    """A .npy file; bfloat16, which NumPy lacks, as the uint16 of its bits."""
    value = value.detach().cpu().contiguous()
    stream = io.BytesIO()
    np.save(stream, (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy())
    return stream.getvalue()


def array_of(data: bytes) -> Tensor:
    """The inverse of `array_bytes`. Errors: Unusable."""
    try:
        value = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        raise Unusable(f"not an array: {error}") from None
    return value.view(torch.bfloat16) if value.dtype == torch.uint16 else value


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_shard(
    path: Path,
    bucket: Bucket,
    makers: Iterable[tuple[str, Callable[[], Sample]]],
    plan: str,
) -> dict[str, Any]:
    """Write `path` (.tar) and its index. makers: (name of the source, function that reads or draws it); one that raises
    Unusable is left out and named in the index. `plan`: hash of what the shard is made of, kept for resuming.

    Errors: OSError naming the file (a full disk, say), with nothing left behind.
    """
    from webdataset.writer import TarWriter

    keys: list[str] = []
    skipped: list[list[str]] = []

    # the samples, one after another, into a temporary file
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
            for source, make in makers:
                try:
                    sample = make()
                except Unusable as error:
                    skipped.append([source, str(error)])
                    continue
                tar.write(sample.members())
                keys.append(sample.key)

    write_atomic(path, write)
    places = {key: at for at, key in enumerate(keys)}
    parts: dict[str, list[list[int] | None]] = {}
    with tarfile.open(path) as tar, path.open("rb") as file:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, _, part = name.partition(".")  # WebDataset's rule: a key ends at the first dot of its last component
            file.seek(member.offset_data)
            entry = [member.offset_data, member.size, zlib.crc32(file.read(member.size))]
            parts.setdefault(part, [None] * len(keys))[places[folder + slash + stem]] = entry
    index = {
        "format": FORMAT,
        "bucket": bucket.name,
        "plan": plan,
        "bytes": path.stat().st_size,
        "sha256": digest_of(path),
        "skipped": skipped,
        "keys": keys,
        "parts": parts,
    }
    write_text(path.with_suffix(".json"), json.dumps(index, ensure_ascii=False) + "\n")
    return index


def read_index(path: Path) -> dict[str, Any]:
    """An index. Errors: ValueError naming a file that is none, or of another format."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not an index of a shard: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path}: not an index of a shard of format {FORMAT}")
    return index


@dataclass(frozen=True)
class Member:
    """The parts of one key and how to read them."""

    key: str
    parts: Mapping[str, tuple[int, int, int]]  # offset, size, CRC-32
    shard: Path
    pread: Callable[[Path, int, int], bytes]

    def read(self, part: str) -> bytes:
        """Errors: Unusable where the bytes are not those that were written; Interrupted where the shard cannot be read at all."""
        if part not in self.parts:
            raise Unusable(f"no .{part} beside it")
        offset, size, crc = self.parts[part]
        try:
            data = self.pread(self.shard, offset, size)
        except OSError as error:
            raise Interrupted(f"{self.shard}: {error.strerror}, asked for member {self.key}") from error
        if len(data) < size:
            raise Unusable(f"{self.shard.name} ends before it")
        if zlib.crc32(data) != crc:
            raise Unusable(f"its .{part} is not what was written")
        return data

    @property
    def picture(self) -> str:
        """The part that is the picture. Errors: Unusable where there is none."""
        known = (TEXT, META, LATENTS, IDS, FEATURES)
        for part in self.parts:
            if part not in known:
                return part
        raise Unusable("no picture beside it")


def read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest. Errors: FileNotFoundError, or ValueError naming a file that is none, or of another format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no finished shards here; `python -m train shards` writes them")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a manifest of shards: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: not a manifest of shards of format {FORMAT}")
    return manifest


def table_of(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """What a training reads of a manifest: a head, and a row for every shard that holds samples, those of a bucket together.

    A row: the shard's name and how many samples its bucket has up to its end.
    """
    buckets = manifest["buckets"]
    tars = {n: [[s["samples"], s["sha256"]] for s in own] for n, own in buckets.items()}
    rows: list[tuple[int, bytes]] = []
    places: dict[str, tuple[int, int]] = {}
    for name, shards in buckets.items():
        first, end = len(rows), 0
        for shard in shards:
            if shard["samples"]:
                end += shard["samples"]
                rows.append((end, shard["name"].encode()))
        places[name] = first, len(rows)
    longest = max((len(name) for _, name in rows), default=1)
    head = {
        "fingerprint": hashlib.sha256(json.dumps(tars).encode()).hexdigest()[:16],
        "precomputed": manifest["precomputed"],
        "max_upscale": manifest.get("max_upscale", 1.0),
        "sizes": manifest.get("sizes", {}),
        "command": manifest.get("command", ""),
        "rows": places,
    }
    return head, np.array(rows, dtype=[("end", "<i8"), ("name", f"S{longest}")])


# ------------------------------------------------------------------------------------------------ reading

Mark = tuple[tuple[int, ...], ...]
_checked: set[Mark] = (
    set()
)  # tables that are their manifests', by this process's own hash or by that of another of its node


def mark_of(folder: Path) -> Mark | None:
    """What is another as soon as a folder's manifest, head or table is: device, inode, size and times of the three files. None
    where one is missing."""
    try:
        found = [(folder / name).stat() for name in (MANIFEST, HEAD, TABLE)]
    except OSError:
        return None
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found)


def _is_of_its_manifest(folder: Path, head: Mapping[str, Any], mark: Mark) -> bool:
    """Whether a folder's table was made from its manifest, by the hashes in its head; read once for a mark."""
    if mark in _checked:
        return True
    own = head.get("manifest") == digest_of(folder / MANIFEST) and head.get("table") == digest_of(folder / TABLE)
    if own:
        _checked.add(mark)
    return own


def check_once_per_node(folders: Sequence[Path], group: Ranks) -> None:
    """The first process of every node hashes manifests and tables of finished folders, the others take its word for the very
    same files. A collective: every process calls it; what cannot be read is left to `ShardSet` to name."""

    def checked() -> set[Mark]:
        for folder in folders:
            with contextlib.suppress(OSError, ValueError):
                if mark := mark_of(folder):
                    _is_of_its_manifest(folder, read_json(folder / HEAD), mark)
        return _checked

    _checked.update(group.once_per_node(checked))


def _sound(head: Mapping[str, Any], table: np.ndarray) -> bool:
    """Whether head and table are of the form that `table_of` makes, whatever their hashes say."""

    def pairs(values: Any, most: int) -> bool:
        rows = values.values() if isinstance(values, dict) else [None]
        return all(
            isinstance(p, list | tuple) and len(p) == 2 and all(type(n) is int and 0 <= n <= most for n in p)
            for p in rows
        )

    texts = isinstance(head.get("fingerprint"), str) and isinstance(head.get("precomputed"), dict)
    grown = isinstance(head.get("max_upscale"), int | float)
    return texts and grown and pairs(head.get("rows"), len(table)) and pairs(head.get("sizes"), 1 << 20)


def _opened(folder: Path, mark: Mark | None) -> ShardSet:
    """A folder in another process of the same node, which need not hash what the first one has."""
    if mark:
        _checked.add(mark)
    return ShardSet(folder)


class ShardSet:
    """A finished folder of shards. `sizes`: samples of every bucket; members are counted through its shards in order.

    Sent to another process it is opened there anew. Errors: FileNotFoundError, ValueError naming the file.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._mark: Mark | None = None
        head, table = self._table()
        self.fingerprint: str = head["fingerprint"]
        self.precomputed: dict[str, str] = head["precomputed"]
        self.max_upscale = float(head["max_upscale"])
        self._check_sizes(head)
        self.sizes: dict[Bucket, int] = {}
        self._shards: dict[Bucket, np.ndarray] = {}
        for name, (first, last) in head["rows"].items():
            if last > first:
                bucket = Bucket.of(name)
                self._shards[bucket] = table[first:last]
                self.sizes[bucket] = int(table["end"][last - 1])
        self._indexes: OrderedDict[Path, tuple[list[str], dict[str, np.ndarray]]] = OrderedDict()
        self._files: OrderedDict[Path, int] = OrderedDict()

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """All of manifest.json. Errors: FileNotFoundError, ValueError naming it."""
        return read_manifest(self.folder)

    def _table(self) -> tuple[dict[str, Any], np.ndarray]:
        """What a training reads of the manifest: mapped from its table, which all processes of a node share, where that was made
        from this manifest; else from the manifest itself."""
        if mark := mark_of(self.folder):
            head: dict[str, Any] = {}
            with contextlib.suppress(CheckpointError):  # a damaged one is made anew from the manifest
                head = read_json(self.folder / HEAD)
            if _is_of_its_manifest(self.folder, head, mark):
                table = np.load(self.folder / TABLE, mmap_mode="r", allow_pickle=False)
                if _sound(head, table):
                    self._mark = mark
                    return head, table
        try:
            head, table = table_of(self.manifest)
            if not _sound(head, table):
                raise TypeError("sizes must hold height and width of every bucket")
            return head, table
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"{self.folder / MANIFEST}: not a manifest of shards, or a damaged one: {error!r}"
            ) from None

    def _check_sizes(self, head: Mapping[str, Any]) -> None:
        """Refuse pictures chosen, or latents computed, for sizes that the buckets' names do not stand for."""
        path, wrong = self.folder / MANIFEST, []
        for name in head["rows"]:
            bucket = Bucket.of(name)
            (h, w), (height, width) = head["sizes"].get(name, bucket.unrecorded_size), bucket.size
            if (h, w) != bucket.size:
                wrong.append(f"{name} is {h}x{w}, expected {height}x{width}")
        if wrong:
            command = head["command"] or f"python -m train shards --tars {self.folder}"
            raise ValueError(
                f"{path}: shards of other sizes, height x width: {'; '.join(wrong)}; "
                f"`{command} --out NEW` writes them anew"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.folder, self._mark)

    def member(self, bucket: Bucket, position: int) -> Member:
        """Member `position` of a bucket in stored order. Errors: Interrupted where its shard's index is missing or damaged."""
        rows = self._shards[bucket]
        ends = rows["end"]
        shard = int(np.searchsorted(ends, position, side="right"))
        path = self.folder / bucket.name / rows["name"][shard].decode()
        place = position - (int(ends[shard - 1]) if shard else 0)
        try:
            keys, parts = self._index(path)
            own = {name: tuple(table[place].tolist()) for name, table in parts.items() if table[place, 0] >= 0}
            return Member(keys[place], own, path, self._pread)
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else "not the index that was written"
            raise Interrupted(f"{path.with_suffix('.json')}: {why}, asked for member {place} of {path.name}") from error

    def _index(self, path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
        if path not in self._indexes:
            index = read_index(path.with_suffix(".json"))
            parts = {
                name: np.array([row or (-1, 0, 0) for row in rows], dtype=np.int64).reshape(len(index["keys"]), 3)
                for name, rows in index["parts"].items()
            }
            self._indexes[path] = index["keys"], parts
            if len(self._indexes) > OPEN_INDEXES:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(path)
        return self._indexes[path]

    def _pread(self, path: Path, offset: int, size: int) -> bytes:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(path)
        return os.pread(self._files[path], size, offset)

    def __del__(self) -> None:
        for handle in getattr(self, "_files", {}).values():
            os.close(handle)

    def faults(self) -> list[str]:
        """Every shard that is not what the manifest says, in words; [] where all are."""
        found = []
        for name, shards in self.manifest["buckets"].items():
            for shard in shards:
                path = self.folder / name / shard["name"]
                for file, key in ((path, "sha256"), (path.with_suffix(".json"), "index_sha256")):
                    if not file.is_file():
                        found.append(f"{file}: missing")
                    elif digest_of(file) != shard.get(key):
                        found.append(f"{file}: not the file that was written")
        return found


def _opened_together(sets: Sequence[ShardSet]) -> ShardSets:
    return ShardSets([own.folder for own in sets])


class ShardSets:
    """Finished folders as one set, each one's members after those of the folders before it.

    Errors: those of ShardSet; ValueError where folders hold different numbers computed beforehand, or one comes twice.
    """

    def __init__(self, folders: Sequence[Path]):
        self.sets = [ShardSet(folder) for folder in folders]
        first = self.sets[0]
        self.folder, self.precomputed = first.folder, first.precomputed
        marks = [own.fingerprint for own in self.sets]
        for place, own in enumerate(self.sets):
            if own.fingerprint in marks[:place]:
                raise ValueError(f"{own.folder}: the same shards as {self.sets[marks.index(own.fingerprint)].folder}")
            if own.precomputed != first.precomputed:
                raise ValueError(f"{own.folder} holds computed {own.precomputed}, {first.folder} {first.precomputed}")
        self.fingerprint = marks[0] if len(marks) == 1 else hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]
        self.max_upscale = max(own.max_upscale for own in self.sets)
        self.sizes: dict[Bucket, int] = {}
        for own in self.sets:
            for bucket, n in own.sizes.items():
                self.sizes[bucket] = self.sizes.get(bucket, 0) + n

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_together, (self.sets,)

    def member(self, bucket: Bucket, position: int) -> Member:
        """As of a ShardSet."""
        for own in self.sets:
            n = own.sizes.get(bucket, 0)
            if position < n:
                return own.member(bucket, position)
            position -= n
        raise IndexError(f"{bucket.name}: no member {position} beyond the last")


Shards = ShardSet | ShardSets


def write_manifest(
    folder: Path, shards: Sequence[tuple[Bucket, Path]], left_out: Mapping[str, int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of finished shards. left_out: reason -> count, of what never came to a shard."""
    buckets: dict[str, list[dict[str, Any]]] = {}
    skipped = 0
    for bucket, path in shards:
        index = read_index(path.with_suffix(".json"))
        skipped += len(index["skipped"])
        buckets.setdefault(bucket.name, []).append(
            {
                "name": path.name,
                "samples": len(index["keys"]),
                "bytes": index["bytes"],
                "sha256": index["sha256"],
                "index_sha256": digest_of(path.with_suffix(".json")),
            }
        )
    manifest = {
        "format": FORMAT,
        "samples": sum(s["samples"] for own in buckets.values() for s in own),
        "left_out": {**left_out, "unusable": left_out.get("unusable", 0) + skipped},
        "precomputed": {},
        **settings,
        "sizes": {name: Bucket.of(name).size for name in buckets},
        "buckets": buckets,
    }
    write_json(folder / MANIFEST, manifest)
    head, table = table_of(manifest)

    def write(temporary: Path) -> None:
        temporary.write_bytes(npy_bytes(table))

    write_atomic(folder / TABLE, write)
    write_json(folder / HEAD, {**head, "manifest": digest_of(folder / MANIFEST), "table": digest_of(folder / TABLE)})
    return manifest


def npy_bytes(array: np.ndarray) -> bytes:
    """A .npy file."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()
