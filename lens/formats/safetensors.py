"""Tensors in safetensors files: mapped shards, strict loading into modules, sharded saves that are whole at every moment."""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lens.formats import contents
from lens.formats.files import CheckpointError, is_there, parse_json, read_json, regular_file, write_atomic, write_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # read for a LoRA, whose numbers stand alone
_ITEMSIZE = {"BOOL": 1, "I8": 1, "I16": 2, "U16": 2, "U32": 4, "U64": 8}
_ITEMSIZE |= {name: dtype.itemsize for name, dtype in (DTYPES | INTEGERS | FLOAT8).items()}
_HEADER_BYTES = 100_000_000  # as the safetensors library limits it
_DIMENSIONS, _LARGEST = 16, 2**48  # no tensor of any model comes near
_SHARD_BYTES = 15_000_000
_SHARD_NAME = re.compile(r".+-\d{5}-of-\d{5}(\.\w+)?\.safetensors")
STEMS = ("diffusion_pytorch_model", "model")  # as diffusers and transformers name a part's weights

Entry = tuple[str, list[int], int, int]  # dtype, shape, first byte and byte after the last, of the data


class Shard:
    """One memory-mapped safetensors file. Pages are given back after each tensor: mapping costs no resident memory.

    Read as strictly as the format is written: every tensor fills its bytes, and together they fill the file.
    """

    def __init__(self, path: Path):
        self.path = path
        size = regular_file(path).st_size
        try:
            with path.open("rb") as file:
                head = file.read(256)
                if head[8:9] != b"{" and (what := contents.of_file(head)):
                    raise CheckpointError(f"{path}: is {what}")
                length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
                if not 2 <= length <= size - 8:
                    raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes)")
                if length > _HEADER_BYTES:
                    raise CheckpointError(f"{path}: a header of {length} bytes, expected at most {_HEADER_BYTES}")
                file.seek(8)
                text = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if not text.startswith(b"{"):  # as the format asks: no byte order mark, no space
            raise CheckpointError(
                f"{path}: broken safetensors header: expected '{{' as its first byte, got {text[:8]!r}"
            )
        header = parse_json(text, f"{path}: broken safetensors header")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{path}: broken safetensors header: __metadata__ must be an object of strings")
        self.metadata: dict[str, str] = metadata
        self.entries: dict[str, Entry] = {key: _entry(path, key, value) for key, value in header.items()}
        self._start = 8 + length
        self._check(size - self._start)
        self._map: mmap.mmap | None = None
        self.lasting: mmap.mmap | None = None  # of the tensors that stay in the file

    def _check(self, size: int) -> None:
        """The tensors must lie one after the other from the first byte of the data to the last."""
        end = 0
        for key, (dtype, shape, begin, after) in sorted(self.entries.items(), key=lambda item: item[1][2:]):
            if after > size:
                last, total = self._start + after, self._start + size
                raise CheckpointError(f"{self.path}: truncated: {key} ends at byte {last}, the file has {total}")
            if dtype in _ITEMSIZE and math.prod(shape) * _ITEMSIZE[dtype] != after - begin:
                raise CheckpointError(
                    f"{self.path}: {key} of shape {shape} and dtype {dtype} cannot fill {after - begin} bytes"
                )
            if begin != end:
                what = (
                    "overlaps the tensor before it" if begin < end else f"leaves {begin - end} bytes before it unused"
                )
                raise CheckpointError(f"{self.path}: {key} {what}")
            end = after
        if end != size:
            raise CheckpointError(f"{self.path}: {size - end} bytes after the last tensor belong to none")

    def read(self, key: str, into: Callable[[Tensor], None]) -> None:
        """Hand the tensor ``key``, a view of the mapping, to ``into``, which must copy; then drop its pages."""
        dtype, shape, begin, end = self.entries[key]
        torch_dtype = DTYPES.get(dtype) or INTEGERS.get(dtype) or FLOAT8.get(dtype)
        if torch_dtype is None:
            raise CheckpointError(f"{self.path}: {key} has dtype {dtype}, expected one of {sorted(DTYPES)}")
        count = math.prod(shape)
        if count == 0:
            return into(torch.empty(shape, dtype=torch_dtype))
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        into(torch.frombuffer(self._map, dtype=torch_dtype, count=count, offset=self._start + begin).view(shape))
        page = mmap.PAGESIZE
        first = (self._start + begin) // page * page
        self._map.madvise(mmap.MADV_DONTNEED, first, self._start + end - first)

    def mapped(self, key: str) -> Tensor | None:
        """The tensor ``key`` as a view of a mapping that lives as long as the view; None for what a tensor cannot begin at.

        Its pages are the file's until they are written to, which changes no file.
        """
        dtype, shape, begin, _ = self.entries[key]
        kind, count = (DTYPES | INTEGERS)[dtype], math.prod(shape)
        if count == 0 or (self._start + begin) % kind.itemsize:
            return None
        if self.lasting is None:
            with self.path.open("rb") as file:
                self.lasting = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self.lasting, dtype=kind, count=count, offset=self._start + begin).view(shape)

    def close(self) -> None:
        """Ends `read`; views by `mapped` stay."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def edges(self, key: str, count: int) -> bytes:
        """The first and the last ``count`` bytes of a tensor; all of one that is no longer than both."""
        _, _, begin, end = self.entries[key]
        with self.path.open("rb") as file:
            file.seek(self._start + begin)
            if end - begin <= 2 * count:
                return file.read(end - begin)
            first = file.read(count)
            file.seek(self._start + end - count)
            return first + file.read(count)


def _entry(path: Path, key: str, value: Any) -> Entry:
    """A tensor's line of the header, or CheckpointError."""
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: broken safetensors header: {key} must have dtype, shape and data_offsets, got {str(value)[:200]}"
        ) from None
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or not all(type(n) is int for n in numbers) or len(shape) > _DIMENSIONS:
        raise CheckpointError(
            f"{path}: broken safetensors header: {key} must have a dtype, at most {_DIMENSIONS} whole dimensions and two "
            f"offsets, got {str(value)[:200]}"
        )
    if not 0 <= begin <= end <= _LARGEST or any(not 0 <= n <= _LARGEST for n in shape):
        raise CheckpointError(f"{path}: {key} has the impossible shape {shape} at bytes {begin} to {end}")
    return dtype, shape, begin, end


@dataclass(frozen=True)
class Stored:
    """A tensor in a file under the name it has in the released layout: where it lies, and the shape it is wanted in.

    ``transposed``: the last two dimensions are stored the other way round; ``shape`` is the wanted one.
    """

    shard: Shard
    key: str
    shape: list[int]
    transposed: bool = False

    @property
    def dtype(self) -> str:
        return self.shard.entries[self.key][0]

    def read(self, into: Callable[[Tensor], None]) -> None:
        """Hand the tensor to ``into``, which must copy."""
        if self.transposed:
            self.shard.read(self.key, lambda value: into(value.transpose(-1, -2)))
        else:
            self.shard.read(self.key, lambda value: into(value.view(self.shape)))

    def mapped(self, dtype: torch.dtype) -> Tensor | None:
        """The tensor where it lies in its file, if it is stored in ``dtype`` and can be used there."""
        if (DTYPES | INTEGERS).get(self.dtype) != dtype or (value := self.shard.mapped(self.key)) is None:
            return None
        return value.transpose(-1, -2) if self.transposed else value.view(self.shape)


class Pages:
    """The pages of a module's tensors that stayed in their files. Copied and pickled without: copies hold their own."""

    def __init__(self, shards: Iterable[Shard] = ()):
        self._maps = [shard.lasting for shard in shards if shard.lasting is not None]
        begins = [(torch.frombuffer(own, dtype=torch.uint8).data_ptr(), len(own)) for own in self._maps]
        self._spans = [range(begin, begin + length) for begin, length in begins]

    def __reduce__(self) -> tuple[Any, ...]:
        return Pages, ()

    def __bool__(self) -> bool:
        return bool(self._maps)

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the files."""
        return any(tensor.data_ptr() in span for span in self._spans)

    def drop(self) -> None:
        """Give all pages back; the next use reads them again. What was written to them is lost."""
        for own in self._maps:
            own.madvise(mmap.MADV_DONTNEED)


def stored_as(shards: Mapping[str, Shard]) -> dict[str, Stored]:
    """Every tensor under its own name and of its own shape."""
    return {key: Stored(shard, key, shard.entries[key][1]) for key, shard in shards.items()}


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name.encode()) <= 255 and Path(name).name == name and "\0" not in name


def weights_name(names: Collection[str], where: str, variant: str | None = None) -> str:
    """Which of a folder's files holds a part's weights: a safetensors file, or the index of its shards.

    As diffusers chooses: of the ``variant``, where there is one of that name, else the default; an index before a file.
    What else lies there does not matter. Without a default, the only file or index that can be meant. CheckpointError,
    naming the folder ``where``, for none and for several.
    """
    kinds = [variant, None] if variant else [None]
    for kind in kinds:
        for stem in STEMS:
            index = f"{stem}.safetensors.index.{kind}.json" if kind else f"{stem}.safetensors.index.json"
            file = f"{stem}.{kind}.safetensors" if kind else f"{stem}.safetensors"
            if found := [name for name in (index, file) if name in names]:
                return found[0]
    indices = sorted(name for name in names if re.fullmatch(r".+\.safetensors\.index(\.\w+)?\.json", name))
    files = sorted(name for name in names if name.endswith(".safetensors"))
    whole = [name for name in files if not _SHARD_NAME.fullmatch(name)]
    # shards count only through an index; beside a whole file they are the rest of an older save
    if not indices and files and not whole:
        raise CheckpointError(f"{where}/{files[0]}: a shard without its index, expected a *.safetensors.index.json")
    if not indices and not whole:
        raise CheckpointError(f"{where}: no .safetensors file")
    if len(indices) > 1 or (not indices and len(whole) > 1):
        raise CheckpointError(
            f"{where}: expected {STEMS[0]}.safetensors or {STEMS[1]}.safetensors, got {', '.join(indices or whole)}: "
            "name the file itself, or its variant with --weights-variant"
        )
    return (indices or whole)[0]


def has_variant(names: Collection[str], variant: str) -> bool:
    """Whether a folder of these files has weights of that variant."""
    forms = ("{0}.safetensors.index.{1}.json", "{0}.{1}.safetensors")
    return any(form.format(stem, variant) in names for form in forms for stem in STEMS)


def shards_of(index: Path) -> dict[str, str]:
    """key -> file name of an index of shards."""
    weight_map = read_json(index).get("weight_map", {})
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise CheckpointError(f"{index}: expected a 'weight_map' object of keys and file names")
    return weight_map


def open_shards(path: Path, variant: str | None = None) -> dict[str, Shard]:
    """key -> shard for every tensor of a file, or of a folder (one file, or shards behind an index; see `weights_name`).
    Checks index against headers."""
    if not path.is_dir():
        shard = Shard(path)
        return dict.fromkeys(shard.entries, shard)
    name = ""
    try:
        name = weights_name(os.listdir(path), str(path), variant)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{error}{contents.of_folder(path)}") from None
    if name.endswith(".safetensors"):
        shard = Shard(path / name)
        return dict.fromkeys(shard.entries, shard)
    weight_map = shards_of(path / name)
    keys: dict[str, Shard] = {}
    for file in sorted(set(weight_map.values())):
        if not is_there(path / file):
            raise CheckpointError(f"{path / file}: shard named by {name} not found")
        shard = Shard(path / file)
        for key in shard.entries:
            if key in keys:
                raise CheckpointError(f"{shard.path}: {key} is also in {keys[key].path.name}")
            keys[key] = shard
    for key, file in weight_map.items():
        if key not in keys or keys[key].path.name != file:
            raise CheckpointError(f"{path / file}: {key} is promised by {name} but not in the file")
    return keys


def check_entries(
    where: Path,
    tensors: Mapping[str, Stored],
    expected: Mapping[str, tuple[list[int], Iterable[str]]],
    ignored: tuple[str, ...] = (),
) -> None:
    """The stored keys must be the ``expected`` ones (those with an ``ignored`` prefix aside), each key's shape exact
    and its dtype among the given; the headers tell, before the first byte of data is read."""
    files = sorted({s.shard.path for s in tensors.values()})
    missing = sorted(set(expected) - set(tensors))
    if missing:
        prefix = next((s.key.removesuffix(name) for name, s in tensors.items() if s.key.endswith(name)), "")
        raise CheckpointError(
            f"{files[0] if len(files) == 1 else where}: {len(missing)} keys missing, first {prefix + missing[0]!r}, "
            f"expected with shape {expected[missing[0]][0]}; {contents.of_names(s.key for s in tensors.values())}"
        )
    extra = sorted(k for k in set(tensors) - set(expected) if not k.startswith(ignored))
    if extra:
        raise CheckpointError(
            f"{tensors[extra[0]].shard.path}: {len(extra)} unexpected keys, first {tensors[extra[0]].key!r}; "
            f"{contents.of_names(tensors[key].key for key in extra)}"
        )
    for key, (shape, dtypes) in expected.items():
        stored = tensors[key]
        if stored.shape != shape:
            raise CheckpointError(f"{stored.shard.path}: {stored.key} must have shape {shape}, got {stored.shape}")
        if stored.dtype not in dtypes:
            cast = ": fp8 weights are not read yet; take the bf16 file" if stored.dtype in FLOAT8 else ""
            raise CheckpointError(
                f"{stored.shard.path}: {stored.key} must have a dtype of {sorted(dtypes)}, got {stored.dtype}{cast}"
            )


def load_parameters(
    module: nn.Module,
    source: Path | Mapping[str, Stored],
    names: Callable[[str], list[str]] = lambda name: [name],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ignored: tuple[str, ...] = (),
    unread: tuple[str, ...] = (),
    store: Callable[[nn.Module, str, Tensor, bool], None] | None = None,
    unused: tuple[str, ...] = (),
) -> None:
    """Fill a module built on the meta device from a file, a folder or opened tensors, strictly: every key once, every
    shape exact.

    ``names`` maps a name of the module to the stored keys it is made of, stacked along the rows. Keys with an
    ``ignored`` prefix may be in the files; names with an ``unread`` prefix are checked and stay on the meta device;
    ``unused`` names, which decide no result, may be missing or of any type, and are zero.
    ``store(module, name, value, is_parameter)`` keeps a value; by default as the module's own tensor.
    """
    tensors = stored_as(open_shards(source)) if isinstance(source, Path) else source
    where = source if isinstance(source, Path) else next((s.shard.path.parent for s in tensors.values()), Path())
    wanted: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
    expected: dict[str, tuple[list[int], Iterable[str]]] = {}
    for name, target in wanted.items():
        if name in unused:
            continue
        shape, pieces = list(target.shape), len(names(name))
        shape = [shape[0] // pieces, *shape[1:]] if pieces > 1 else shape
        dtypes = DTYPES if target.is_floating_point() else INTEGERS
        expected |= dict.fromkeys(names(name), (shape, dtypes))
    check_entries(where, tensors, expected, (*ignored, *unused))
    for name, target in wanted.items():
        if name.startswith(unread):
            continue
        sources = names(name)
        kind = dtype if target.is_floating_point() else target.dtype
        value = torch.empty(target.shape, dtype=kind, device=device)
        rows = value.shape[0] // len(sources) if value.dim() else 0
        for i, key in enumerate(sources):
            piece = value[i * rows : (i + 1) * rows] if len(sources) > 1 else value
            if name in unused:
                piece.zero_()
            else:
                tensors[key].read(lambda stored, piece=piece: piece.copy_(stored))  # type: ignore[misc]
        (store or assign)(module, name, value, isinstance(target, nn.Parameter))
    for shard in {stored.shard for stored in tensors.values()}:
        shard.close()


def assign(module: nn.Module, name: str, value: Tensor, is_parameter: bool) -> None:
    """Make a tensor the one of that dotted name."""
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    if is_parameter:
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(leaf, value)


def save_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor], shard_bytes: int = _SHARD_BYTES) -> None:
    """Write ``stem.safetensors``, or shards of at most ``shard_bytes`` with an index, in key order.

    A save over an older one is whole at every moment: new files take names of their own, one rename switches from all
    old to all new, and only then the old files go.
    """
    from safetensors.torch import save_file

    def write(path: Path, shard: dict[str, Tensor]) -> None:
        write_atomic(path, lambda temporary: save_file(shard, temporary, {"format": "pt"}))

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key in sorted(tensors):
        n = tensors[key].numel() * tensors[key].element_size()
        if size + n > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = tensors[key]
        size += n
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    old = {p for p in folder.glob(f"{stem}-*.safetensors") if _SHARD_NAME.fullmatch(p.name)}
    if len(shards) == 1:
        write(single, shards[0])
        index.unlink(missing_ok=True)  # until here the index, and with it the old shards, had precedence
    else:
        count = len(shards)
        for generation in itertools.count():
            stamp = f"{stem}-r{generation}" if generation else stem
            names = [f"{stamp}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
            if not any((folder / name).exists() for name in names):
                break
        for name, shard in zip(names, shards):
            write(folder / name, shard)
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        write_json(index, {"metadata": {}, "weight_map": weight_map})
        single.unlink(missing_ok=True)
    for path in old:
        path.unlink()


@dataclass(frozen=True)
class Streamed:
    """A tensor that is written piece by piece: ``pieces()`` gives the same tensors every time, in row-major order, which
    together fill ``shape`` in the file's ``dtype`` ("F32", "BF16", "U8")."""

    key: str
    dtype: str
    shape: list[int]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEMSIZE[self.dtype]


def planned_shards(stem: str, tensors: Sequence[Streamed], shard_bytes: int) -> dict[str, list[Streamed]]:
    """File name -> its tensors, in the order given: as few files of at most ``shard_bytes`` as that order allows."""
    groups: list[list[Streamed]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def stream_tensors(
    folder: Path, stem: str, tensors: Sequence[Streamed], shard_bytes: int, done: Callable[[Path, bool], None]
) -> None:
    """Write tensors of any size in constant memory: shards, each whole when it has its name, then their index.

    A shard that is there with the header it would get is kept: a writer that was stopped goes on where it was.
    ``done(path, kept)`` is told of each.
    """
    shards = planned_shards(stem, tensors, shard_bytes)
    for name, group in shards.items():
        path, header = folder / name, _header(group)
        size = len(header) + sum(tensor.nbytes for tensor in group)
        kept = is_there(path) and path.stat().st_size == size and _begins_with(path, header)
        if not kept:
            write_atomic(path, lambda temporary, g=group, h=header: _write_pieces(temporary, h, g))  # type: ignore[misc]
        done(path, kept)
    if len(shards) > 1:
        weight_map = {tensor.key: name for name, group in shards.items() for tensor in group}
        total = sum(tensor.nbytes for tensor in tensors)
        write_json(
            folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _header(tensors: Sequence[Streamed]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[tensor.key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _begins_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _write_pieces(path: Path, header: bytes, tensors: Sequence[Streamed]) -> None:
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            begin, wanted = file.tell(), (DTYPES | INTEGERS)[tensor.dtype]
            for piece in tensor.pieces():
                if piece.dtype != wanted:
                    raise ValueError(f"{path}: {tensor.key} must be made of {wanted}, got {piece.dtype}")
                file.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)
            if file.tell() - begin != tensor.nbytes:
                raise ValueError(f"{path}: {tensor.key} must have {tensor.nbytes} bytes, got {file.tell() - begin}")
