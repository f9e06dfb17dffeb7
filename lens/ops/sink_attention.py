"""Causal attention of a language model with a learned sink a head: grouped queries, a window or all tokens before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens.ops import backend, checks, reference


def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, cos: Tensor, sin: Tensor, window: int | None, scale: float
) -> Tensor:
    """softmax over (q' k^T * scale, sink) times (v, 0), of the last T of S tokens: -> [T, N, H] (arXiv 2508.10925).

    Query t is token S - T + t and sees that token and those before it, of a window the last ``window``; nothing but its
    own sink competes with them. N / M neighbouring query heads share a key head. q' is q with the channels (i, i + H / 2)
    turned by angle i, rounded to its dtype.

    q: [T, N, H] float32, bfloat16 (float32 arithmetic) or float64; H even, N a multiple of M, T at most S
    k, v: [S, M, H], sinks: [N], of the dtype of q; keys are turned already
    cos, sin: [T, H / 2], in the arithmetic dtype
    window: at least 1, or None: all tokens before; scale: positive
    On a CPU a row's bits depend on nothing but its query and the keys and values it sees, as long as the other values are
    finite (they are multiplied by 0), whatever the number of threads. There is no CUDA kernel: the specification runs there,
    128 queries at a time.
    Raises ValueError for shapes, dtypes, devices or a window that do not fit; RuntimeError if a gradient is asked for.
    """
    op = "sink_attention"
    checks.expect_rank(op, "q", q, "T, N, H")
    checks.expect_floating(op, "q", q)
    checks.expect_rank(op, "k", k, "S, M, H")
    (length, heads, channels), (there, shared) = q.shape, k.shape[:2]
    if shared == 0 or heads == 0 or heads % shared:
        checks.refuse(op, f"N must be a multiple of M = {shared}, got {heads}")
    if channels == 0 or channels % 2:
        checks.refuse(op, f"H must be even, got {channels}")
    if there < length:
        checks.refuse(op, f"S must be at least T = {length}, got {there}")
    if window is not None and (type(window) is not int or window < 1):
        checks.refuse(op, f"window must be a whole number from 1 on, or None, got {window!r}")
    if not scale > 0:
        checks.refuse(op, f"scale must be positive, got {scale!r}")
    checks.expect_shape(op, "k", k, "S, M, H", there, shared, channels)
    checks.expect_shape(op, "v", v, "S, M, H", there, shared, channels)
    checks.expect_shape(op, "sinks", sinks, "N", heads)
    wide = reference.arithmetic_dtype(q.dtype)
    for name, tensor in (("k", k), ("v", v), ("sinks", sinks)):
        checks.expect_like(op, name, tensor, q)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.expect_shape(op, name, table, "T, H / 2", length, channels // 2)
        checks.expect_like(op, name, table, q, wide)
    if backend.choose(op, q) == "reference":
        return reference.sink_attention(q, k, v, sinks, cos, sin, window, scale)
    return _forward(q, k, v, sinks, cos, sin, 0 if window is None or window >= there else window, float(scale))


@backend.custom_op("lens::sink_attention", devices=("cpu",))
def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, cos: Tensor, sin: Tensor, window: int, scale: float
) -> Tensor:
    out = q.new_empty(q.shape)
    launch(
        out,
        q,
        k,
        v,
        scale,
        sinks=sinks.contiguous(),
        cos=cos.contiguous(),
        sin=sin.contiguous(),
        window=window,
        causal=1,
    )
    return out


_forward.register_fake(lambda q, *_: q.new_empty(q.shape))


def launch(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, **more: Any) -> None:
    """The CPU kernel into ``out``, dense, like q. more: sinks, cos, sin or None, window, causal, as in csrc/params/attention.h."""
    (length, heads, channels), (there, shared) = q.shape, k.shape[:2]
    extension, wide = backend.extension("sink_attention"), reference.arithmetic_dtype(q.dtype)
    keys, width, threads = extension.sink_padded(there), extension.sink_padded(channels), torch.get_num_threads()
    backend.launch(
        "sink_attention",
        q,
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        out=out,
        keys=q.new_empty(shared, keys, width, dtype=wide),
        values=q.new_empty(shared, keys, width, dtype=wide),
        rooms=q.new_empty(threads, extension.sink_tile, 2 * (keys + width), dtype=wide),
        T=length,
        S=there,
        N=heads,
        M=shared,
        H=channels,
        W=threads,
        scale=scale,
        **more,
    )
