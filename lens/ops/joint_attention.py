"""Attention of every sample over its own [image | text] rows; attention/choice.py says which library computes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lens.ops import backend, checks, reference
from lens.ops.attention import choice as attention_choice
from lens.ops.attention import cpu as attention_cpu
from lens.ops.attention.hopper import HeadNorms
from lens.ops.attention.layout import DeviceLayout, Samples

MANY = 16  # samples from which on a GPU gathers rows instead of cutting and joining pieces


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
    layout: DeviceLayout | None = None,
    norms: HeadNorms | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v within each sample, not causal: image_out [RI, N * H], text_out [RT, N * H].

    q, k, v: [RI + RT, N, H] in the joint layout, float32, bfloat16 (float32 softmax) or float64
    image_lengths, text_lengths: rows of every sample, on the host
    image_offsets, text_offsets: int32 [B + 1], the same on the device
    text_queries: False leaves out the text rows of q; text_out is then [0, N * H]
    scale: H^-0.5 by default
    layout: with it the offsets alone say where samples lie, and of the lengths only the totals count
    norms: the weights of the norms that q and k come from; they bound the scores, which saves a kernel the maxima
    batch_invariant: a sample's bits must not depend on the others of the call; on a CPU they never do
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
    _expect_offsets("image_offsets", image_offsets, image_lengths, q, layout is None)
    _expect_offsets("text_offsets", text_offsets, text_lengths, q, layout is None)
    offsets, scale = (image_offsets, text_offsets), q.shape[-1] ** -0.5 if scale is None else float(scale)
    if layout is not None:
        return attend_with_device_lengths(
            q, k, v, sum(image_lengths), *offsets, text_queries, scale, layout, norms, batch_invariant
        )
    chosen = backend.choose(op, q)
    if chosen == "reference":
        return reference.joint_attention(q, k, v, image_lengths, text_lengths, *offsets, text_queries, scale)

    joint_lengths = [i + t for i, t in zip(image_lengths, text_lengths, strict=True)]
    query_lengths = joint_lengths if text_queries else list(image_lengths)
    if sum(query_lengths) == 0:
        return q[:0].flatten(1), q[:0].flatten(1)
    if chosen == "cuda":
        call = attention_choice.call_of(q, k, v, max(joint_lengths), False, batch_invariant)
        if (streams := attention_choice.streams(call)) is not None:
            return streams(q, k, v, *offsets, sum(image_lengths), max(joint_lengths), text_queries, scale, norms)
    if not text_queries:
        q = _split_streams(q, image_lengths, text_lengths, *offsets)[0]
    if chosen == "cpu":
        recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if not recorded and scale > 0 and attention_cpu.by_amx(q):
            out = attention_cpu.forward_by_amx(q, k, v, query_lengths, joint_lengths, scale)
        else:
            out = attention_cpu.forward(q, k, v, query_lengths, joint_lengths, scale, recorded)[0]
    else:
        joint_offsets = image_offsets + text_offsets
        query_offsets = joint_offsets if text_queries else image_offsets
        longest = max(query_lengths), max(joint_lengths)
        samples = Samples(query_offsets, joint_offsets, *longest, scale, query_lengths, joint_lengths, batch_invariant)
        out = attention_choice.run(q, k, v, samples)
    out = out.flatten(1)
    return _split_streams(out, image_lengths, text_lengths, *offsets) if text_queries else (out, out[:0])


def _expect_offsets(name: str, offsets: Tensor, lengths: Sequence[int], like: Tensor, known: bool) -> None:
    op = "joint_attention"
    checks.expect_shape(op, name, offsets, "B + 1", len(lengths) + 1)
    checks.expect_like(op, name, offsets, like, torch.int32)
    if known and like.device.type == "cpu" and not torch.compiler.is_compiling():
        expected = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
        if offsets.tolist() != expected:
            checks.refuse(op, f"{name} must be {expected}, got {offsets.tolist()}")


def _split_streams(
    x: Tensor, image_lengths: Sequence[int], text_lengths: Sequence[int], image_offsets: Tensor, text_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The image rows and the text rows of the joint rows x; a view where the stream lies in one piece."""
    if x.is_cuda and len(image_lengths) > MANY:
        return _gather_streams(x, sum(image_lengths), image_offsets, text_offsets)
    lengths = [n for pair in zip(image_lengths, text_lengths, strict=True) for n in pair]
    parts = x.split(lengths)
    streams = []
    for first in (0, 1):
        pieces = [part for part in parts[first::2] if part.shape[0]]
        streams.append(torch.cat(pieces) if len(pieces) > 1 else pieces[0] if pieces else x[:0])
    return streams[0], streams[1]


def _gather_streams(x: Tensor, image_rows: int, image_offsets: Tensor, text_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The same by two gathers, whatever the number of samples: a training batch's hundreds of pieces would keep the
    host busier than the device."""
    rows = reference.joint_rows(image_offsets, text_offsets, image_rows, x.shape[0] - image_rows)
    return x.index_select(0, rows[:image_rows]), x.index_select(0, rows[image_rows:])


def attend_with_device_lengths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    images: int,
    image_offsets: Tensor,
    text_offsets: Tensor,
    text_queries: bool,
    scale: float,
    layout: DeviceLayout,
    norms: HeadNorms | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """`joint_attention` without one look at a length: what a captured step replays for other texts of the same total."""
    call = attention_choice.call_of(q, k, v, layout.longest, True, batch_invariant)
    if (streams := attention_choice.streams(call)) is not None:
        offsets = image_offsets, text_offsets
        return streams(q, k, v, *offsets, images, layout.longest, text_queries, scale, norms)
    longest = layout.longest if text_queries else layout.longest_image
    query_offsets = layout.joint_offsets if text_queries else image_offsets
    if not text_queries:
        q = q[:images] if layout.image_rows is None else q.index_select(0, layout.image_rows)
    samples = Samples(
        query_offsets, layout.joint_offsets, longest, layout.longest, scale, batch_invariant=batch_invariant
    )
    out = attention_choice.run(q, k, v, samples).flatten(1)
    if not text_queries:
        return out, out[:0]
    image = out[:images] if layout.image_rows is None else out.index_select(0, layout.image_rows)
    return image, out[images:] if layout.text_rows is None else out.index_select(0, layout.text_rows)
