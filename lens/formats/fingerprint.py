"""The fingerprint of weights: which tensors a picture was drawn with, however they were stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from lens.formats.safetensors import Stored

_MIB = 1 << 20


def fingerprint(parts: Mapping[str, Mapping[str, Stored]], adapter: str = "") -> str:
    """SHA-256 over the tensors of every part that are loaded, in sorted order: part and released name, shape, dtype, first
    and last MiB. Cheap and telling; files, shards, prefixes and what else lies beside the weights do not count. adapter:
    the fingerprint of one that is merged into them.
    """
    digest = hashlib.sha256()
    for part, tensors in sorted(parts.items()):
        for name, stored in sorted(tensors.items()):
            digest.update(f"{part}/{name}\0{list(stored.shape)}\0{stored.dtype}\0".encode())
            digest.update(stored.shard.edges(stored.key, _MIB))
    digest.update(adapter.encode())
    return digest.hexdigest()
