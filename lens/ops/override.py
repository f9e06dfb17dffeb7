"""What the choices among implementations share: a name that is forced, a table of rates, a device's architecture."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


class Override:
    """The name that a choice is forced to: the environment variable's, or that of `use`. None: the order decides."""

    def __init__(self, variable: str, module: str, names: Callable[[], Sequence[str]]) -> None:
        self.variable = variable
        self.module = module
        self.names = names  # that `use` takes
        self.name: str | None = os.environ.get(variable) or None  # the name that is forced, if any
        self.changed: Callable[[], None] = lambda: None  # forgets choices made before

    @contextlib.contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Force a name inside the block (None: choose by the order). The choice holds for the whole process."""
        if name is not None and name not in self.names():
            raise ValueError(f"{self.module}: name must be {one_of(self.names())}, got {name!r}")
        before, self.name = self.name, name
        self.changed()
        try:
            yield
        finally:
            self.name = before
            self.changed()


def one_of(names: Sequence[str]) -> str:
    """Names in a message."""
    return " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"


def rates(path: Path, **known: Collection[str]) -> list[dict[str, Any]]:
    """Entries of a table of rates: tflops, status (measured or predicted), source and keys. ValueError for one that is
    no rate, or has a key that is not among those known."""
    entries: list[dict[str, Any]] = json.loads(path.read_text())["entries"]
    for e in entries:
        allowed = {**known, "status": ("measured", "predicted")}
        if any(e[key] not in values for key, values in allowed.items()) or not e["source"] or not e["tflops"] > 0:
            raise ValueError(f"{path.name}: a measured or predicted rate with its source expected, got {e}")
    return entries


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device; None: the current one when first asked."""
    return torch.cuda.get_device_capability(index)


def dotted(arch: tuple[int, int]) -> str:
    """An architecture as tables and messages have it."""
    return f"{arch[0]}.{arch[1]}"
