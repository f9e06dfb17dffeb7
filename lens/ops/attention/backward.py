"""Backward adapters of attention: gradients from q, k, v, out and the lse of any library's forward pass.

An adapter takes the library's module, dout, q, k, v, out, lse and the samples' layout -> dq, dk, dv. dout, q and out
are [RQ, N, H], k and v [R, N, H]; lse, float32 [N, RQ] without padding, holds the natural logarithm of every softmax
denominator of scaled scores. flash-attn from 2.6 on, 3, 4 and torch's copy of 2 take it as it is, cuDNN by groups of
equal samples as [B, N, queries, 1] (torch's form with offsets differs from release to release: its lse is
[RQ, N, 1] or [N, RQ], and some take the channels for the longest sample). Sums are in a fixed order but for cuDNN's,
which torch has no switch for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lens.ops.attention import layout
from lens.ops.attention.layout import Samples, dense, deterministic

Triple = tuple[Tensor, Tensor, Tensor]
torch_flash_backward = torch.ops.aten._flash_attention_backward  # torch's copy of flash-attn-2
torch_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def _layout(samples: Samples) -> tuple[Tensor, Tensor, int, int]:
    return samples.query_offsets, samples.joint_offsets, samples.longest_query, samples.longest


def _empty(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def flash_attn_2(
    module: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, samples: Samples
) -> Triple:
    dq, dk, dv = _empty(q, k, v)
    # no dropout; by name what releases before 2.7 spell otherwise, so that they raise
    options: dict[str, Any] = dict(window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None)
    given = *dense(dout, q, k, v, out), lse, dq, dk, dv, *_layout(samples), 0.0, samples.scale, False
    module._flash_attn_varlen_backward(*given, **options, deterministic=True)
    return dq, dk, dv


def flash_attn_3(
    module: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, samples: Samples
) -> Triple:
    dq, dk, dv = _empty(q, k, v)
    offsets, longest = _layout(samples)[:2], _layout(samples)[2:]
    given = *dense(dout, q, k, v, out), lse, *offsets, None, None, *longest, dq, dk, dv, samples.scale, False
    module._flash_attn_backward(*given, deterministic=True)  # the None: rows used of each sample
    return dq, dk, dv


def flash_attn_4(
    module: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, samples: Samples
) -> Triple:
    dout, q, k, v, out = dense(dout, q, k, v, out)
    names = "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    where = dict(zip(names, _layout(samples), strict=True))
    made = module._flash_attn_bwd(q, k, v, out, dout, lse, samples.scale, False, **where, deterministic=True)
    dq, dk, dv = made[:3]
    return dq, dk, dv


def torch_flash(
    module: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, samples: Samples
) -> Triple:
    # no dropout, whose generator is two zeros, not causal
    state = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    given = *dense(dout, q, k, v, out), lse, *_layout(samples), 0.0, False, *state
    with deterministic():
        dq, dk, dv = torch_flash_backward(*given, scale=samples.scale)
    return dq, dk, dv


def torch_cudnn(
    module: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, samples: Samples
) -> Triple:
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of no dropout
    for queries, rows, query_starts, starts in layout.groups(*samples.lengths(), shared=True):
        dout_, q_, out_, lse_ = (layout.gather(x, query_starts, queries) for x in (dout, q, out, lse.T[..., None]))
        k_, v_ = (layout.gather(x, starts, rows) for x in (k, v))
        given = dout_, q_, k_, v_, out_, lse_.contiguous(), seed, seed, None, None, None, queries, rows, 0.0, False
        made = torch_cudnn_backward(*given, scale=samples.scale)
        layout.scatter(dq, query_starts, made[0])
        layout.scatter(dk, starts, made[1])
        layout.scatter(dv, starts, made[2])
    return dq, dk, dv


class Mixed(torch.autograd.Function):
    """out [RQ, N, H] of one library with the gradients of another."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, samples: Samples, attend: Callable[..., Any], gradients: Any
    ) -> Tensor:
        out, lse = attend(q, k, v, samples)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.samples, ctx.gradients = samples, gradients
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        return *ctx.gradients(dout, *ctx.saved_tensors, ctx.samples), None, None, None
