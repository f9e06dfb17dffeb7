"""Attention on a CPU, one call per sample, so that a sample's bits do not depend on its batch: bfloat16 by the kernel of
`sink_attention` where there is AMX and no gradient is recorded, else by PyTorch's flash kernel.

Where a gradient is recorded, samples of equal lengths share a call: faster for small samples, and equal at rounding
level only (the kernel's GEMMs change bits with the alignment of its scratch memory, which a larger batch
moves).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lens.ops import backend, reference
from lens.ops.attention import layout
from lens.ops.sink_attention import launch


def by_amx(q: Tensor) -> bool:
    """Whether `forward_by_amx` serves queries like q."""
    return (
        q.dtype == torch.bfloat16
        and q.shape[-1] % 2 == 0
        and backend.without("sink_attention") == ""
        and backend.isa() == "amx"
    )


@backend.custom_op("lens::joint_attention_amx", devices=("cpu",))
def forward_by_amx(
    q: Tensor, k: Tensor, v: Tensor, query_lengths: Sequence[int], joint_lengths: Sequence[int], scale: float
) -> Tensor:
    """out [RQ, N, H]: shares rounded to bfloat16 before they are multiplied, as in PyTorch's kernel; whatever the threads."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    whole = {"sinks": None, "cos": None, "sin": None, "window": 0, "causal": 0}
    first = start = 0
    for queries, rows in zip(query_lengths, joint_lengths, strict=True):
        if queries:
            own = slice(start, start + rows)
            launch(out[first : first + queries], q[first : first + queries], k[own], v[own], scale, **whole)
        first, start = first + queries, start + rows
    return out


forward_by_amx.register_fake(lambda q, *_: q.new_empty(q.shape))


@backend.custom_op("lens::joint_attention", devices=("cpu",))
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lengths: Sequence[int],
    joint_lengths: Sequence[int],
    scale: float,
    shared: bool,
) -> tuple[Tensor, Tensor]:
    """out [RQ, N, H] and the logarithm of every softmax denominator [RQ, N, 1] for the queries q [RQ, N, H].

    shared: samples of equal lengths take one call.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(*q.shape[:2], 1, dtype=reference.arithmetic_dtype(q.dtype))
    for queries, rows, query_starts, starts in layout.groups(query_lengths, joint_lengths, shared):
        group_out, group_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            layout.gather(q, query_starts, queries),
            layout.gather(k, starts, rows),
            layout.gather(v, starts, rows),
            scale=scale,
        )
        layout.scatter(out, query_starts, group_out)
        layout.scatter(lse, query_starts, group_lse[..., None])
    return out, lse


@backend.custom_op("lens::joint_attention_backward", devices=("cpu",))
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_lengths: Sequence[int],
    joint_lengths: Sequence[int],
    scale: float,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for queries, rows, query_starts, starts in layout.groups(query_lengths, joint_lengths, shared):
        of_query = [layout.gather(x, query_starts, queries) for x in (dout, q, out, lse)]
        dq_group, dk_group, dv_group = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            of_query[0],
            of_query[1],
            layout.gather(k, starts, rows),
            layout.gather(v, starts, rows),
            of_query[2],
            of_query[3].squeeze(-1),
            0.0,
            False,
            scale=scale,
        )
        layout.scatter(dq, query_starts, dq_group)
        layout.scatter(dk, starts, dk_group)
        layout.scatter(dv, starts, dv_group)
    return dq, dk, dv


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(*q.shape[:2], 1, dtype=reference.arithmetic_dtype(q.dtype))


def _fake_gradients(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.plan = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dout, *ctx.saved_tensors, *ctx.plan), None, None, None, None


forward.register_fake(_fake)
_backward.register_fake(_fake_gradients)
forward.register_autograd(_gradients, setup_context=_save)
