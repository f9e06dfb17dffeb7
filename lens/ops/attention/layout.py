"""Where the samples of packed rows lie, with lengths on the host or on the device alone; samples as batches; gradients in a fixed order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Where the samples of packed rows lie. Lengths on the host are None where only the device knows them."""

    query_offsets: Tensor  # int32 [B + 1]
    joint_offsets: Tensor  # int32 [B + 1]
    longest_query: int  # at least the rows of every sample; the kernels size their grids by it
    longest: int
    scale: float
    query_lengths: Sequence[int] | None = None
    joint_lengths: Sequence[int] | None = None
    batch_invariant: bool = False  # a sample's bits must not depend on the others of the call

    def lengths(self) -> tuple[Sequence[int], Sequence[int]]:
        """Rows that ask and rows of every sample, on the host; waits for the device where only it knows them."""
        if self.query_lengths is not None and self.joint_lengths is not None:
            return self.query_lengths, self.joint_lengths
        return self.query_offsets.diff().tolist(), self.joint_offsets.diff().tolist()


def dense(*tensors: Tensor) -> list[Tensor]:
    """Rows whose channels lie side by side, which every library asks for; copies where they do not."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def groups(queries: Sequence[int], rows: Sequence[int], shared: bool) -> list[tuple[int, int, list[int], list[int]]]:
    """Samples that share a call: (queries, rows, first query row of each, first joint row of each)."""
    groups: dict[tuple[int, ...], tuple[int, int, list[int], list[int]]] = {}
    query_start = start = 0
    for b, (query_count, count) in enumerate(zip(queries, rows, strict=True)):
        if query_count:
            key = (query_count, count) if shared else (query_count, count, b)
            group = groups.setdefault(key, (query_count, count, [], []))
            group[2].append(query_start)
            group[3].append(start)
        query_start += query_count
        start += count
    return list(groups.values())


def _consecutive(starts: list[int], rows: int) -> bool:
    return starts == list(range(starts[0], starts[0] + len(starts) * rows, rows))


def gather(x: Tensor, starts: list[int], rows: int) -> Tensor:
    """Rows starts[g] .. starts[g] + rows - 1 of x [R, N, H]: [G, N, rows, H], a view where they are consecutive."""
    if x.stride(2) != 1:  # the kernel walks over channels that lie side by side
        x = x.contiguous()
    if _consecutive(starts, rows):
        taken = x[starts[0] : starts[0] + len(starts) * rows].unflatten(0, (len(starts), rows))
    else:
        taken = torch.stack([x[start : start + rows] for start in starts])
    return taken.transpose(1, 2)


def scatter(x: Tensor, starts: list[int], value: Tensor) -> None:
    """The inverse: value [G, N, rows, H] into x."""
    for start, sample in zip(starts, value.transpose(1, 2), strict=True):
        x[start : start + sample.shape[0]] = sample


class DeviceLayout(NamedTuple):
    """Where the rows of samples lie whose lengths only the device knows: those of a captured step."""

    image_rows: Tensor | None  # int64 [RI], each image row's place in the joint layout; None: the first RI
    text_rows: Tensor | None  # int64 [RT]; None: the rows after the images
    longest_image: int  # at least the image rows of every sample
    longest: int  # at least the rows of every sample
    joint_offsets: Tensor  # int32 [B + 1], image_offsets + text_offsets: added once, not in every block


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


def with_deterministic_backward(out: Tensor) -> Tensor:
    """Make the backward pass of torch's own attention kernels `deterministic`. Plain matrix products are by
    themselves, and would raise for want of a setting of cuBLAS."""
    node = out.grad_fn
    if node is None or torch.compiler.is_compiling() or not any(word in node.name() for word in ("Attention", "attn")):
        return out
    switches = contextlib.ExitStack()  # closed by the hook after the node, as often as it runs
    node.register_prehook(lambda _: switches.enter_context(deterministic()))
    node.register_hook(lambda *_: switches.close())
    return out
