"""Joint attention by lens._C on sm_90a: one launch reads the joint layout and writes both streams where they are read.

The kernel knows lengths from the offsets alone, on the device, and is forward only; gradients are those of torch's own
flash attention, which takes our result and its logarithms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens.ops import backend, reference
from lens.ops._attention_bound import HeadNorms, known_bound
from lens.ops._attention_cuda import deterministic

POLYNOMIAL = 1  # of every four exponentials, how many are polynomials; docs/attention.md
flash_backward = torch.ops.aten._flash_attention_backward  # torch's copy of flash-attn-2


@backend.custom_op("lens::joint_attention_hopper")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    images: int,
    longest: int,
    text_queries: bool,
    scale: float,
    score_bound: float,
    polynomial: int,
    logarithms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """image_out [RI, N * 64], text_out [RT, N * 64] or [0, N * 64], lse float32 [N, RS] or [N, 0].

    lse holds the natural logarithm of every softmax denominator; without text_queries its text columns hold nothing.
    longest: at least the rows of every sample; for the backward pass alone
    score_bound: |q . k| * scale exceeds it nowhere, see _attention_bound.py; inf where that is not known
    """
    rows, heads, channels = q.shape
    if scale <= 0:
        raise ValueError(f"lens.joint_attention: scale must be positive for lens-hopper, got {scale}")
    image, text, lse = _outputs(q, images, text_queries, logarithms)
    backend.launch(
        "joint_attention",
        q,
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        image_offsets=image_offsets.contiguous(),
        text_offsets=text_offsets.contiguous(),
        image_out=image,
        text_out=text if text_queries else None,
        lse=lse if logarithms else None,
        RI=images,
        RT=rows - images,
        B=image_offsets.shape[0] - 1,
        N=heads,
        H=channels,
        polynomial=polynomial,
        scale=scale,
        score_bound=score_bound,
    )
    return image, text, lse


def _outputs(q: Tensor, images: int, text_queries: bool, logarithms: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, channels = q.shape
    width = heads * channels
    text = q.new_empty(rows - images if text_queries else 0, width)
    return q.new_empty(images, width), text, q.new_empty(heads, rows if logarithms else 0, dtype=torch.float32)


@backend.custom_op("lens::joint_attention_hopper_backward")
def _backward(
    dimage: Tensor,
    dtext: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_out: Tensor,
    text_out: Tensor,
    lse: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; text_out without rows: the text rows of q asked nothing."""
    images, texts = image_out.shape[0], text_out.shape[0]
    rows = reference.joint_rows(image_offsets, text_offsets, images, q.shape[0] - images)[: images + texts]
    joint_offsets = image_offsets + text_offsets
    whole = images + texts == q.shape[0]

    def queries(image: Tensor, text: Tensor) -> Tensor:
        """Both streams as the rows that ask, in the order of the joint layout."""
        if not whole:
            return image.view(images, *q.shape[1:])
        joint = torch.empty_like(q, memory_format=torch.contiguous_format)
        return joint.index_copy_(0, rows, torch.cat([image, text]).view_as(joint))

    with deterministic():
        dq, dk, dv = flash_backward(
            queries(dimage, dtext),
            q if whole else q.index_select(0, rows),
            k,
            v,
            queries(image_out, text_out),
            lse if whole else lse.index_select(1, rows),
            joint_offsets if whole else image_offsets,
            joint_offsets,
            longest,
            longest,
            0.0,  # dropout
            False,  # causal
            torch.zeros(2, dtype=torch.uint64, device=q.device),  # the dropout's generator
            torch.empty(0, device=q.device),
            scale=scale,
        )
    if not whole:
        dq = torch.zeros_like(q, memory_format=torch.contiguous_format).index_copy_(0, rows, dq)
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, image_offsets, text_offsets, _, longest, _, scale, *_, logarithms = inputs
    if not logarithms:
        raise RuntimeError("lens.joint_attention: a gradient needs the logarithms of the denominators")
    ctx.plan = image_offsets, text_offsets, longest, scale
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, dimage: Tensor, dtext: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(dimage.contiguous(), dtext.contiguous(), *ctx.saved_tensors, *ctx.plan)
    return *gradients, *[None] * 9


@forward.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, image_offsets: Tensor, text_offsets: Tensor, images: int, *rest: Any) -> Any:
    _, text_queries, _, _, _, logarithms = rest
    return _outputs(q, images, text_queries, logarithms)


@_backward.register_fake
def _fake_gradients(dimage: Tensor, dtext: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


forward.register_autograd(_gradients, setup_context=_save)


def streams(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    images: int,
    longest: int,
    text_queries: bool,
    scale: float,
    norms: HeadNorms | None,
) -> tuple[Tensor, Tensor]:
    """image_out [RI, N * 64] and text_out [RT, N * 64], or [0, N * 64] without text_queries. Differentiable."""
    recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    known = None if norms is None or recorded else known_bound(norms, scale)
    bound = float("inf") if known is None else known
    places = image_offsets, text_offsets, images, longest
    image, text, _ = forward(q, k, v, *places, text_queries, scale, bound, POLYNOMIAL, recorded)
    return image, text
