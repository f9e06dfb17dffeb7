"""Backward passes of torch's own attention kernels that are the same bits every time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """torch's own kernels free of float atomics: they obey the global switch alone, and not where it only warns."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # every gradient is written, none wants NaN before
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def repeatable(out: Tensor) -> Tensor:
    """Make the backward pass of torch's own attention kernels `deterministic`. Plain products are by themselves, and
    would raise for want of a setting of cuBLAS."""
    node = out.grad_fn
    if node is None or torch.compiler.is_compiling() or not any(word in node.name() for word in ("Attention", "attn")):
        return out
    switches = contextlib.ExitStack()  # closed by the hook after the node, as often as it runs
    node.register_prehook(lambda _: switches.enter_context(deterministic()))
    node.register_hook(lambda *_: switches.close())
    return out
