"""Attention on CUDA: one variable-length call for all samples in bfloat16; other dtypes have no such kernel and take one
call per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    joint_offsets: Tensor,
    longest_query: int,
    longest: int,
    scale: float,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # the default scale is left to the kernel: not every torch this package runs on takes the argument
    options: dict[str, Any] = {} if scale == q.shape[-1] ** -0.5 else {"scale": scale}
    out: Any = varlen_attn(q, k, v, query_offsets, joint_offsets, longest_query, longest, **options)
    return out


def sample_by_sample(
    q: Tensor, k: Tensor, v: Tensor, query_lengths: Sequence[int], joint_lengths: Sequence[int], scale: float
) -> Tensor:
    samples = []
    splits = q.split(list(query_lengths)), k.split(list(joint_lengths)), v.split(list(joint_lengths))
    for parts in zip(*splits, strict=True):
        if parts[0].shape[0]:
            queries, keys, values = (x.transpose(0, 1)[None] for x in parts)
            samples.append(F.scaled_dot_product_attention(queries, keys, values, scale=scale)[0].transpose(0, 1))
    return torch.cat(samples)
