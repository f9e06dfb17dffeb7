"""A stand-in for CUDA graphs on the CPU: records the operations of a step, with their addresses, and replays them.

As on a device, a replay runs no Python of the step: what was a number stays that number, what was a buffer is read and
written where it lay, and nothing between the operations survives from one replay to the next. What a capture forbids
(looking at a value, making a tensor from Python numbers) raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lens.ops.attention import choice as attention_choice
from lens.ops.attention.choice import Candidate

FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "_unique2", "masked_select", "item", "is_nonzero")
Call = tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]


class Recorder(TorchDispatchMode):
    """Within the block, every operation as (function, arguments, options, results)."""

    def __init__(self, forbid: bool = True) -> None:
        super().__init__()
        self.forbid = forbid
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if self.forbid and name in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]))
        return out


def is_view(func: Any) -> bool:
    """Results share memory with an argument, which nothing writes."""
    aliases = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


def is_allocation(func: Any) -> bool:
    return "empty" in func._schema.name


def launches(calls: list[Call]) -> list[str]:
    """The operations that would start at least one kernel."""
    return [c[0]._schema.name for c in calls if not is_view(c[0]) and not is_allocation(c[0])]


class RecordedGraph:
    """The recorded step."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = [c for c in calls if not is_view(c[0])]
        self._mutating = [c[0]._schema.is_mutable for c in self._calls]
        self.replays = 0
        own = (t for c, mutates in zip(self._calls, self._mutating) if not mutates for t in c[3])
        self.bytes = sum(t.numel() * t.element_size() for t in own)

    def replay(self) -> None:
        self.replays += 1
        for (_, _, _, results), mutates in zip(self._calls, self._mutating):
            for result in results:
                if not mutates and result.is_floating_point():
                    result.fill_(torch.nan)  # other graphs used the memory meanwhile
        for (func, args, kwargs, results), mutates in zip(self._calls, self._mutating):
            if is_allocation(func):
                continue
            made = [t for t in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            if not mutates:
                for result, value in zip(results, made, strict=True):
                    result.copy_(value)


class RecordingDriver:
    """``lens.engine.graphs.Driver`` for the CPU."""

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []
        self.fail_at: int | None = None  # the capture that runs out of memory

    def capture(self, step: Callable[[], None]) -> RecordedGraph:
        if self.fail_at == len(self.graphs):
            self.fail_at = None
            raise torch.OutOfMemoryError("CUDA out of memory")
        step()
        with Recorder() as recorder:
            step()
        self.graphs.append(RecordedGraph(recorder.calls))
        return self.graphs[-1]


@torch.library.custom_op("lens_test::varlen", mutates_args=())
def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    offsets: Tensor,
    longest_query: int,
    longest: int,
    scale: float,
) -> Tensor:
    """Attention told by offsets, read when it runs; rows of no sample are NaN, as memory nobody wrote may be.

    Rows beyond the bounds are left out, as a kernel leaves them out whose grid is sized by them.
    """
    out = torch.full_like(q, torch.nan)
    queries, rows = query_offsets.tolist(), offsets.tolist()
    for a, b, c, d in zip(queries, queries[1:], rows, rows[1:]):
        b, d = min(b, a + longest_query), min(d, c + longest)
        logits = torch.einsum("qnh,knh->nqk", q[a:b], k[c:d]) * scale
        out[a:b] = torch.einsum("nqk,knh->qnh", logits.softmax(-1), v[c:d])
    return out


varlen.register_fake(lambda q, *_: torch.empty_like(q))


def adapter(q: Tensor, k: Tensor, v: Tensor, samples: Any, module: Any) -> Tensor:
    assert samples.query_lengths is None, "a captured step must not know lengths"
    bounds = samples.longest_query, samples.longest
    return varlen(q, k, v, samples.query_offsets, samples.joint_offsets, *bounds, samples.scale)


OFFSETS_ALONE = Candidate(
    "told by offsets", adapter, dtypes=(torch.float32,), arch=((0, 0), (99, 9)), head_dim=(1, 512), device="cpu"
)


def offsets_alone(monkeypatch: Any, candidate: Candidate = OFFSETS_ALONE) -> None:
    """Within the test, attention of captured steps is computed by ``varlen``."""
    candidates(monkeypatch, candidate)


def candidates(monkeypatch: Any, *known: Candidate) -> None:
    """Within the test there are these candidates of attention, and every order holds them."""
    names = tuple(c.name for c in known)
    orders = {("8.0", f"{length}{training}"): names for length in ("long", "short") for training in ("", " training")}
    monkeypatch.setattr(attention_choice, "CANDIDATES", list(known))
    monkeypatch.setattr(attention_choice, "ORDERS", orders)
    attention_choice.choose.cache_clear()
