"""Tensors in safetensors files: mapped shards, strict loading into modules, sharded saves that are whole at every moment."""

from __future__ import annotations

import itertools
import json
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lens.formats.files import CheckpointError, read_json, write_atomic, write_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
_SHARD_BYTES = 15_000_000
_SHARD_NAME = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")


class Shard:
    """One memory-mapped safetensors file. Pages are given back after each tensor: mapping costs no resident memory."""

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(8)
                length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
                if not 2 <= length <= size - 8:
                    raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes)")
                self.header_bytes = head + file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        try:
            header = json.loads(self.header_bytes[8:])
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.entries: dict[str, tuple[str, list[int], int, int]] = {
                key: (
                    str(e["dtype"]),
                    [int(n) for n in e["shape"]],
                    int(e["data_offsets"][0]),
                    int(e["data_offsets"][1]),
                )
                for key, e in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{path}: broken safetensors header: {error!r}") from None
        self._start = 8 + length
        for key, (_, shape, begin, end) in self.entries.items():
            if not 0 <= begin <= end or any(n < 0 for n in shape):
                raise CheckpointError(f"{path}: {key} has the impossible shape {shape} at bytes {begin} to {end}")
            if self._start + end > size:
                raise CheckpointError(f"{path}: truncated: {key} ends at byte {self._start + end}, the file has {size}")
        self._map: mmap.mmap | None = None

    def read(self, key: str, into: Callable[[Tensor], None]) -> None:
        """Hand the tensor ``key``, a view of the mapping, to ``into``, which must copy; then drop its pages."""
        dtype, shape, begin, end = self.entries[key]
        torch_dtype = DTYPES.get(dtype) or INTEGERS.get(dtype)
        if torch_dtype is None:
            raise CheckpointError(f"{self.path}: {key} has dtype {dtype}, expected one of {sorted(DTYPES)}")
        count = math.prod(shape)
        if count * torch_dtype.itemsize != end - begin:
            raise CheckpointError(
                f"{self.path}: {key} of shape {shape} and dtype {dtype} cannot fill {end - begin} bytes"
            )
        if count == 0:
            return into(torch.empty(shape, dtype=torch_dtype))
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        into(torch.frombuffer(self._map, dtype=torch_dtype, count=count, offset=self._start + begin).view(shape))
        page = mmap.PAGESIZE
        first = (self._start + begin) // page * page
        self._map.madvise(mmap.MADV_DONTNEED, first, self._start + end - first)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and Path(name).name == name


def open_shards(folder: Path) -> dict[str, Shard]:
    """key -> shard for every tensor of a folder (one file, or shards behind an index). Checks index against headers."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: folder not found")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    weight_map: dict[str, str] = {}
    if indices:
        weight_map = read_json(indices[0]).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(_is_file_name(n) for n in weight_map.values()):
            raise CheckpointError(f"{indices[0]}: expected a 'weight_map' object of keys and file names")
    names = sorted(set(weight_map.values())) if indices else sorted(p.name for p in folder.glob("*.safetensors"))
    if not indices:  # shards count only through an index; beside a whole file they are the rest of an older save
        whole = [name for name in names if not _SHARD_NAME.fullmatch(name)]
        if names and not whole:
            raise CheckpointError(
                f"{folder / names[0]}: a shard without its index, expected a *.safetensors.index.json"
            )
        names = whole
    if not names:
        raise CheckpointError(f"{indices[0] if indices else folder}: no .safetensors file")
    keys: dict[str, Shard] = {}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: shard named by {indices[0].name} not found")
        shard = Shard(folder / name)
        for key in shard.entries:
            if key in keys:
                raise CheckpointError(f"{shard.path}: {key} is also in {keys[key].path.name}")
            keys[key] = shard
    for key, name in weight_map.items():
        if key not in keys or keys[key].path.name != name:
            raise CheckpointError(f"{folder / name}: {key} is promised by {indices[0].name} but not in the file")
    return keys


def check_entries(
    folder: Path,
    shards: Mapping[str, Shard],
    expected: Mapping[str, tuple[list[int], Iterable[str]]],
    ignored: tuple[str, ...] = (),
) -> None:
    """The stored keys must be the ``expected`` ones (those with an ``ignored`` prefix aside), each key's shape exact
    and its dtype among the given; the headers tell, before the first byte of data is read."""
    files = sorted({s.path for s in shards.values()})
    missing = sorted(set(expected) - set(shards))
    if missing:
        raise CheckpointError(
            f"{files[0] if len(files) == 1 else folder}: {len(missing)} keys missing, first {missing[0]!r}, "
            f"expected with shape {expected[missing[0]][0]}"
        )
    extra = sorted(k for k in set(shards) - set(expected) if not k.startswith(ignored))
    if extra:
        raise CheckpointError(f"{shards[extra[0]].path}: {len(extra)} unexpected keys, first {extra[0]!r}")
    for key, (shape, dtypes) in expected.items():
        stored, got = shards[key].entries[key][:2]
        if got != shape:
            raise CheckpointError(f"{shards[key].path}: {key} must have shape {shape}, got {got}")
        if stored not in dtypes:
            raise CheckpointError(f"{shards[key].path}: {key} must have a dtype of {sorted(dtypes)}, got {stored}")


def load_parameters(
    module: nn.Module,
    folder: Path,
    names: Callable[[str], list[str]] = lambda name: [name],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ignored: tuple[str, ...] = (),
    unread: tuple[str, ...] = (),
    store: Callable[[nn.Module, str, Tensor, bool], None] | None = None,
) -> None:
    """Fill a module built on the meta device from ``folder``, strictly: every key once, every shape exact.

    ``names`` maps a name of the module to the stored keys it is made of, stacked along the rows. Keys with an
    ``ignored`` prefix may be in the files; names with an ``unread`` prefix are checked and stay on the meta device.
    ``store(module, name, value, is_parameter)`` keeps a value; by default as the module's own tensor.
    """
    shards = open_shards(folder)
    wanted: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
    expected = {key: name for name in wanted for key in names(name)}
    stored_as: dict[str, tuple[list[int], Iterable[str]]] = {}
    for key, name in expected.items():
        shape, pieces = list(wanted[name].shape), len(names(name))
        stored_as[key] = (
            [shape[0] // pieces, *shape[1:]] if pieces > 1 else shape,
            DTYPES if wanted[name].is_floating_point() else INTEGERS,
        )
    check_entries(folder, shards, stored_as, ignored)
    for name, target in wanted.items():
        if name.startswith(unread):
            continue
        sources = names(name)
        value = torch.empty(target.shape, dtype=dtype if target.is_floating_point() else target.dtype, device=device)
        rows = value.shape[0] // len(sources) if value.dim() else 0
        for i, key in enumerate(sources):
            piece = value[i * rows : (i + 1) * rows] if len(sources) > 1 else value
            shards[key].read(key, lambda stored, piece=piece: piece.copy_(stored))  # type: ignore[misc]
        (store or _assign)(module, name, value, isinstance(target, nn.Parameter))
    for shard in set(shards.values()):
        shard.close()


def _assign(module: nn.Module, name: str, value: Tensor, is_parameter: bool) -> None:
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
