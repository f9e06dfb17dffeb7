"""The golden checkpoint as the small pipeline of many tests, and what they count and compare with."""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from lens import LensPipeline

FOLDER = Path(__file__).parent / "golden" / "dev"


@lru_cache(maxsize=1)
def shared() -> LensPipeline:
    """One pipeline for tests that leave it as it was."""
    return fresh()


def fresh(folder: Path = FOLDER, **kwargs) -> LensPipeline:
    return LensPipeline.from_pretrained(folder, **{"variant": "lens", "device": "cpu", **kwargs})


@contextmanager
def counted(owner: object, name: str):
    """Within the block, the arguments of every call of ``owner.name`` are kept in the list it gives."""
    original, calls = getattr(owner, name), []

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    setattr(owner, name, spy)
    try:
        yield calls
    finally:
        delattr(owner, name)


def same_bits(a, b) -> bool:
    """Equal shape, dtype and bits: tensors, arrays, pictures, or lists of them."""
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if hasattr(a, "tobytes"):
        return a.tobytes() == b.tobytes()
    return a == b
