"""Attention on CUDA: one adapter per library, all with the same signature; choice.py chooses among them.

An adapter takes q [RQ, N, H], k, v [R, N, H], the samples' layout and the library's module -> out [RQ, N, H]; where it
takes `with_lse`, too, then (out, lse) as backward.py describes it. Channels lie side by side; samples are
told by offsets, or one call each; there is no mask. Backward passes are asked to be deterministic, which
cuDNN's cannot be.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention

from lens.ops.attention import layout
from lens.ops.attention.layout import Samples, with_deterministic_backward

torch_flash_forward = torch.ops.aten._flash_attention_forward
torch_cudnn_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
SDPA = attention.SDPBackend
DETERMINISTIC = [SDPA.FLASH_ATTENTION, SDPA.EFFICIENT_ATTENTION, SDPA.MATH]


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any, with_lse: bool = False) -> Any:
    if with_lse:  # what varlen_attn calls; its own lse changes shape between releases
        where = samples.query_offsets, samples.joint_offsets, samples.longest_query, samples.longest
        return torch_flash_forward(q, k, v, *where, 0.0, False, False, scale=samples.scale)[:2]
    # the default scale is left to the kernel: not every torch this package runs on takes the argument
    options: dict[str, Any] = {} if samples.scale == q.shape[-1] ** -0.5 else {"scale": samples.scale}
    if samples.batch_invariant and replaced_flash():
        if why := varlen_varies(module):
            raise RuntimeError(f"lens.joint_attention: torch-varlen is not batch-invariant: {why}")
        options["num_splits"] = 1
    lengths = samples.longest_query, samples.longest
    return with_deterministic_backward(
        module.varlen_attn(q, k, v, samples.query_offsets, samples.joint_offsets, *lengths, **options)
    )


def replaced_flash() -> str | None:
    """The name of what this process put in the place of torch's flash attention, or None."""
    return getattr(attention, "current_flash_attention_impl", lambda: None)()


def varlen_varies(module: Any) -> str:
    """Why a sample's bits in `varlen_attn` may depend on the others of the call, or ""; torch's own never do."""
    if not (name := replaced_flash()) or "num_splits" in inspect.signature(module.varlen_attn).parameters:
        return ""
    return (
        f"{name}, which this process put in the place of torch's flash attention, may split keys by the longest sample, "
        f"and varlen_attn of torch {torch.__version__} takes no num_splits to forbid it"
    )


def torch_cudnn(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any, with_lse: bool = False) -> Any:
    if not with_lse:
        with attention.sdpa_kernel(SDPA.CUDNN_ATTENTION):
            return _sample_by_sample(q, k, v, samples)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(*q.shape[:2], 1, dtype=torch.float32)
    for queries, rows, query_starts, starts in layout.groups(*samples.lengths(), shared=True):
        query, keys = layout.gather(q, query_starts, queries), [layout.gather(x, starts, rows) for x in (k, v)]
        # no bias; with lse; no dropout, not causal, no debug mask
        made = torch_cudnn_forward(query, *keys, None, True, 0.0, False, False, scale=samples.scale)
        layout.scatter(out, query_starts, made[0])
        layout.scatter(lse, query_starts, made[1].reshape(*query.shape[:3], 1))
    return out, lse.squeeze(-1).T.contiguous()


def torch_cudnn_varlen(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any) -> Tensor:
    offsets, lengths = (samples.query_offsets, samples.joint_offsets), (samples.longest_query, samples.longest)
    # no bias; with lse, which it always makes; no dropout, not causal, no debug mask
    options: tuple[Any, ...] = (True, 0.0, False, False)
    attend: Callable[..., Sequence[Tensor]] = torch.ops.aten._cudnn_attention_forward
    return attend(q, k, v, None, *offsets, *lengths, *options, scale=samples.scale)[0]


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any) -> Tensor:
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return _sample_by_sample(q, k, v, samples)
    # torch prefers cuDNN's on some devices, and no switch makes its backward pass deterministic
    with attention.sdpa_kernel(DETERMINISTIC):
        return _sample_by_sample(q, k, v, samples)


def _sample_by_sample(q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> Tensor:
    if samples.query_lengths is None or samples.joint_lengths is None:
        raise RuntimeError("lens.joint_attention: one call per sample needs the lengths on the host")
    queries, rows = list(samples.query_lengths), list(samples.joint_lengths)
    done = []
    for parts in zip(q.split(queries), k.split(rows), v.split(rows), strict=True):
        if parts[0].shape[0]:
            query, key, value = (x.transpose(0, 1)[None] for x in parts)
            out = F.scaled_dot_product_attention(query, key, value, scale=samples.scale)
            done.append(with_deterministic_backward(out)[0].transpose(0, 1))
    return torch.cat(done) if len(done) > 1 else done[0]


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any, with_lse: bool = False) -> Any:
    more = {"return_attn_probs": True} if with_lse else {}  # no probabilities come without dropout
    return _flash(module, q, k, v, samples, with_lse, dropout_p=0.0, **more)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any, with_lse: bool = False) -> Any:
    # releases before it was an argument return them always, or never
    known = with_lse and "return_attn_probs" in inspect.signature(module.flash_attn_varlen_func).parameters
    more = {"return_attn_probs": True} if known else {}
    # keys in one piece: a sum's order is its own
    return _flash(module, q, k, v, samples, with_lse, num_splits=1, **more)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, samples: Samples, module: Any, with_lse: bool = False) -> Any:
    more = {"return_lse": True} if with_lse else {}
    return _flash(module, q, k, v, samples, with_lse, num_splits=1, **more)


def _flash(
    module: Any, q: Tensor, k: Tensor, v: Tensor, samples: Samples, with_lse: bool, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """The three generations share these names; some return (out, lse) whether asked or not, 2 a third thing."""
    options |= dict(cu_seqlens_q=samples.query_offsets, cu_seqlens_k=samples.joint_offsets)
    options |= dict(max_seqlen_q=samples.longest_query, max_seqlen_k=samples.longest, softmax_scale=samples.scale)
    made = module.flash_attn_varlen_func(q, k, v, causal=False, deterministic=True, **options)
    if not with_lse:
        return made[0] if isinstance(made, tuple) else made
    if not isinstance(made, tuple):
        raise RuntimeError(f"lens.joint_attention: this release of {module.__name__} gives no lse for gradients")
    return made[0], made[1]
