"""What the choices among implementations share: a name that is forced, a device's architecture."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence

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


@functools.cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device; None: the current one when first asked."""
    return torch.cuda.get_device_capability(index)


def dotted(arch: tuple[int, int]) -> str:
    """An architecture as orders and messages have it."""
    return f"{arch[0]}.{arch[1]}"
