"""Where a checkpoint comes from: embedded weights, a folder, a hub id; what its name says, and its fingerprint."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from lens.formats.files import CheckpointError
from lens.formats.safetensors import Shard

_MIB = 1 << 20


EMBEDDED = {"mini": "base", "mini-base": "base", "mini-rl": "rl", "mini-turbo": "turbo"}


def resolve(source: str | os.PathLike[str]) -> Path:
    """ "mini..." -> the embedded weights; an existing folder -> itself; else a hub id, fetched by huggingface_hub."""
    name = os.fspath(source)
    if name in EMBEDDED:
        folder = Path(__file__).parents[1] / "mini" / EMBEDDED[name]
        if not (folder / "model_index.json").is_file():
            shipped = [n for n, f in EMBEDDED.items() if (folder.parent / f / "model_index.json").is_file()]
            raise CheckpointError(f"{name!r} is not part of this version of Lens; embedded models: {shipped}")
        return folder
    if name and Path(name).is_dir():
        return Path(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name))
        except Exception as error:
            raise CheckpointError(
                f"{name!r} is neither a folder here nor a hub id that can be fetched: {error}"
            ) from error
    raise CheckpointError(f"{name!r}: expected one of {sorted(EMBEDDED)}, a folder in the released layout or a hub id")


def variant_hint(source: str | os.PathLike[str]) -> str:
    """The name a source speaks of its variant by: the hub id, or the folder's (of a hub cache: the repository's)."""
    path = Path(os.fspath(source))
    if not path.is_dir():
        return str(source)
    path = path.resolve()
    return path.parent.parent.name if path.parent.name == "snapshots" else path.name


def fingerprint(root: Path) -> str:
    """SHA-256 over each safetensors file's name, size, header, first and last MiB, in sorted order: cheap, telling."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.safetensors"), key=lambda p: p.relative_to(root).as_posix()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        digest.update(Shard(path).header_bytes)
        with path.open("rb") as file:
            digest.update(file.read(_MIB))
            file.seek(max(0, size - _MIB))
            digest.update(file.read(_MIB))
    return digest.hexdigest()
