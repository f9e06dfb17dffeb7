"""Attention on CUDA: one adapter per library, all with the same signature; attention_backends.py chooses among them.

An adapter takes q [RQ, N, H], k, v [R, N, H], the samples' places and the library's module -> out [RQ, N, H]. Samples
are told by offsets, or one call each; there is no mask. Backward passes are asked to be repeatable bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any) -> Tensor:
    # the default scale is left to the kernel: not every torch this package runs on takes the argument
    options = {} if samples.scale == q.shape[-1] ** -0.5 else {"scale": samples.scale}
    lengths = samples.longest_query, samples.longest
    return repeatable(module.varlen_attn(q, k, v, samples.query_offsets, samples.joint_offsets, *lengths, **options))


def torch_cudnn(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch_sdpa(q, k, v, samples, module)


def torch_cudnn_varlen(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any) -> Tensor:
    offsets, lengths = (samples.query_offsets, samples.joint_offsets), (samples.longest_query, samples.longest)
    # no bias; with the logarithms of the denominators, which it always makes; no dropout, not causal, no debug mask
    options: tuple[Any, ...] = (True, 0.0, False, False)
    made = torch.ops.aten._cudnn_attention_forward(q, k, v, None, *offsets, *lengths, *options, scale=samples.scale)
    out: Tensor = made[0]
    return out


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any) -> Tensor:
    if samples.query_lengths is None or samples.joint_lengths is None:
        raise RuntimeError("lens.joint_attention: one call per sample needs the lengths on the host")
    queries, rows = list(samples.query_lengths), list(samples.joint_lengths)
    done = []
    for parts in zip(q.split(queries), k.split(rows), v.split(rows), strict=True):
        if parts[0].shape[0]:
            query, key, value = (x.transpose(0, 1)[None] for x in parts)
            out = F.scaled_dot_product_attention(query, key, value, scale=samples.scale)
            done.append(repeatable(out)[0].transpose(0, 1))
    return torch.cat(done) if len(done) > 1 else done[0]


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any) -> Tensor:
    return _flash(module, q, k, v, samples, dropout_p=0.0)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any) -> Tensor:
    return _flash(module, q, k, v, samples, num_splits=1)  # keys in one piece: the sum's order is the sample's own


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any) -> Tensor:
    return _flash(module, q, k, v, samples, num_splits=1)


def _flash(module: Any, q: Tensor, k: Tensor, v: Tensor, samples: Samples, **options: Any) -> Tensor:
    """The three generations share these names; some return (out, logarithm of the denominators)."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = module.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=samples.query_offsets,
        cu_seqlens_k=samples.joint_offsets,
        max_seqlen_q=samples.longest_query,
        max_seqlen_k=samples.longest,
        softmax_scale=samples.scale,
        causal=False,
        deterministic=True,
        **options,
    )
    return out[0] if isinstance(out, tuple) else out


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """torch's own kernels free of float atomics: they obey the global switch alone."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def repeatable(out: Tensor) -> Tensor:
    """Make the backward pass of torch's own kernels `deterministic`."""
    node = out.grad_fn
    if node is None or torch.compiler.is_compiling():
        return out
    switches = contextlib.ExitStack()  # closed by the hook after the node, as often as it runs
    node.register_prehook(lambda _: switches.enter_context(deterministic()))
    node.register_hook(lambda *_: switches.close())
    return out
