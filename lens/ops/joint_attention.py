"""Attention of every sample over its own [image | text] rows; PyTorch's kernels do the work.

CPU: the flash kernel, one call per sample, so that a sample's bits do not depend on its batch. Where a gradient is
recorded, samples of equal lengths share a call: faster for small samples, and equal at rounding level only (the
kernel's matrix products change bits with the alignment of its scratch memory, which a larger batch moves).
CUDA: one variable-length call for all samples in bfloat16; other dtypes have no such kernel and take one call per
sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lens.ops import backend, checks, reference


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_lengths: list[int],
    text_lengths: list[int],
    image_offsets: Tensor,
    text_offsets: Tensor,
    text_queries: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v within each sample, not causal: image_out [RI, N * H], text_out [RT, N * H].

    q, k, v: [RI + RT, N, H] in the joint layout, float32, bfloat16 (float32 softmax) or float64
    image_lengths, text_lengths: rows of every sample, on the host
    image_offsets, text_offsets: int32 [B + 1], the same on the device
    text_queries: False leaves out the text rows of q; text_out is then [0, N * H]
    scale: H^-0.5 by default
    Raises ValueError for shapes, dtypes, devices, lengths or (CPU, eager) offsets that do not fit. Differentiable.
    """
    op = "joint_attention"
    checks.expect_rank(op, "q", q, "RI + RT, N, H")
    checks.expect_floating(op, "q", q)
    for name, other in (("k", k), ("v", v)):
        checks.expect_shape(op, name, other, "RI + RT, N, H", *q.shape)
        checks.expect_like(op, name, other, q)
    if len(image_lengths) != len(text_lengths):
        checks.refuse(op, f"text_lengths must be B = {len(image_lengths)} numbers, got {len(text_lengths)}")
    if min(0, 0, *image_lengths, *text_lengths) < 0:
        checks.refuse(op, f"lengths must not be negative, got {image_lengths} and {text_lengths}")
    if sum(image_lengths) + sum(text_lengths) != q.shape[0]:
        total = f"{sum(image_lengths)} + {sum(text_lengths)}"
        checks.refuse(op, f"image_lengths and text_lengths must add up to RI + RT = {q.shape[0]}, got {total}")
    _expect_offsets("image_offsets", image_offsets, image_lengths, q)
    _expect_offsets("text_offsets", text_offsets, text_lengths, q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = backend.choose(op, q)
    if chosen == "reference":
        return reference.joint_attention(
            q, k, v, image_lengths, text_lengths, image_offsets, text_offsets, text_queries, scale
        )

    joint_lengths = [i + t for i, t in zip(image_lengths, text_lengths, strict=True)]
    query_lengths = joint_lengths if text_queries else list(image_lengths)
    if sum(query_lengths) == 0:
        return q[:0].flatten(1), q[:0].flatten(1)
    if not text_queries:
        q = _split_streams(q, image_lengths, text_lengths)[0]
    if chosen == "cpu":
        recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        out = _forward(q, k, v, query_lengths, joint_lengths, scale, recorded)[0]
    elif q.dtype == torch.bfloat16:
        joint_offsets = image_offsets + text_offsets
        query_offsets = joint_offsets if text_queries else image_offsets
        out = _varlen(q, k, v, query_offsets, joint_offsets, max(query_lengths), max(joint_lengths), scale)
    else:
        out = _sample_by_sample(q, k, v, query_lengths, joint_lengths, scale)
    out = out.flatten(1)
    return _split_streams(out, image_lengths, text_lengths) if text_queries else (out, out[:0])


def _expect_offsets(name: str, offsets: Tensor, lengths: Sequence[int], like: Tensor) -> None:
    op = "joint_attention"
    checks.expect_shape(op, name, offsets, "B + 1", len(lengths) + 1)
    checks.expect_like(op, name, offsets, like, torch.int32)
    if like.device.type == "cpu" and not torch.compiler.is_compiling():
        expected = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
        if offsets.tolist() != expected:
            checks.refuse(op, f"{name} must be {expected}, got {offsets.tolist()}")


def _split_streams(x: Tensor, image_lengths: Sequence[int], text_lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The image rows and the text rows of the joint rows x; a view where the stream lies in one piece."""
    lengths = [n for pair in zip(image_lengths, text_lengths, strict=True) for n in pair]
    parts = x.split(lengths)
    streams = []
    for first in (0, 1):
        pieces = [part for part in parts[first::2] if part.shape[0]]
        streams.append(torch.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else x[:0])
    return streams[0], streams[1]


# CPU ----------------------------------------------------------------------------------------------------------


def _groups(queries: Sequence[int], rows: Sequence[int], shared: bool) -> list[tuple[int, int, list[int], list[int]]]:
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


def _gather(x: Tensor, starts: list[int], rows: int) -> Tensor:
    """Rows starts[g] .. starts[g] + rows - 1 of x [R, N, H]: [G, N, rows, H], a view where they are consecutive."""
    if x.stride(2) != 1:  # the kernel walks over channels that lie side by side
        x = x.contiguous()
    if _consecutive(starts, rows):
        taken = x[starts[0] : starts[0] + len(starts) * rows].unflatten(0, (len(starts), rows))
    else:
        taken = torch.stack([x[start : start + rows] for start in starts])
    return taken.transpose(1, 2)


def _scatter(x: Tensor, starts: list[int], value: Tensor) -> None:
    """The inverse: value [G, N, rows, H] into x."""
    for start, sample in zip(starts, value.transpose(1, 2), strict=True):
        x[start : start + sample.shape[0]] = sample


@backend.custom_op("lens::joint_attention", devices=("cpu",))
def _forward(
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
    for queries, rows, query_starts, starts in _groups(query_lengths, joint_lengths, shared):
        group_out, group_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _gather(q, query_starts, queries), _gather(k, starts, rows), _gather(v, starts, rows), scale=scale
        )
        _scatter(out, query_starts, group_out)
        _scatter(lse, query_starts, group_lse[..., None])
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
    for queries, rows, query_starts, starts in _groups(query_lengths, joint_lengths, shared):
        of_query = [_gather(x, query_starts, queries) for x in (dout, q, out, lse)]
        dq_group, dk_group, dv_group = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            of_query[0],
            of_query[1],
            _gather(k, starts, rows),
            _gather(v, starts, rows),
            of_query[2],
            of_query[3].squeeze(-1),
            0.0,
            False,
            scale=scale,
        )
        _scatter(dq, query_starts, dq_group)
        _scatter(dk, starts, dk_group)
        _scatter(dv, starts, dv_group)
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


_forward.register_fake(_fake)
_backward.register_fake(_fake_gradients)
_forward.register_autograd(_gradients, setup_context=_save)


# CUDA ---------------------------------------------------------------------------------------------------------


def _varlen(
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


def _sample_by_sample(
    q: Tensor, k: Tensor, v: Tensor, query_lengths: Sequence[int], joint_lengths: Sequence[int], scale: float
) -> Tensor:
    samples = []
    splits = q.split(list(query_lengths)), k.split(list(joint_lengths)), v.split(list(joint_lengths))
    for parts in zip(*splits, strict=True):
        if parts[0].shape[0]:
            queries, keys, values = (x.transpose(0, 1)[None] for x in parts)
            samples.append(F.scaled_dot_product_attention(queries, keys, values, scale=scale)[0].transpose(0, 1))
    return torch.cat(samples)
