"""Head-wise RMSNorm of q and k, RoPE, and the move of both streams into the joint layout, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens.ops import backend, checks, reference

_WEIGHTS = ("image_q_weight", "image_k_weight", "text_q_weight", "text_k_weight")
_INPUTS = ("image_qkv", "text_qkv", *_WEIGHTS, "cos", "sin", "image_offsets", "text_offsets")


def qk_norm_rope(
    image_qkv: Tensor,
    text_qkv: Tensor,
    image_q_weight: Tensor,
    image_k_weight: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """q, k: x * rsqrt(mean(x^2) + eps) * weight per head, then pairs (2 i, 2 i + 1) turned by angle i; v copied.

    image_qkv, text_qkv: [RI, 3 D] and [RT, 3 D], D = N * H; float32, bfloat16 (float32 arithmetic) or float64
    *_weight: [H] each, dtype of image_qkv; H even, at most 512
    cos, sin: [RI + RT, H / 2] in the joint layout, float32 (float64 for float64)
    image_offsets, text_offsets: int32 [B + 1] each
    Returns qkv [3, RI + RT, N, H] in the joint layout: [image rows | text rows] per sample.
    Raises ValueError for shapes, dtypes, devices or (CPU) offsets that do not fit. Differentiable in the
    projections and the weights, not in cos and sin.
    """
    op = "qk_norm_rope"
    checks.expect_packed(op, image_qkv, "image_qkv", "RI, 3 D")
    checks.expect_rank(op, "text_qkv", text_qkv, "RT, 3 D")
    width, joint_rows = image_qkv.shape[1], image_qkv.shape[0] + text_qkv.shape[0]
    checks.expect_shape(op, "text_qkv", text_qkv, "RT, 3 D", text_qkv.shape[0], width)
    checks.expect_like(op, "text_qkv", text_qkv, image_qkv)
    weights = (image_q_weight, image_k_weight, text_q_weight, text_k_weight)
    expect_heads(op, image_qkv, width, joint_rows, weights, cos, sin, image_offsets, text_offsets)
    call = reference.qk_norm_rope if backend.choose(op, image_qkv) == "reference" else _forward
    return call(image_qkv, text_qkv, *weights, cos, sin, image_offsets, text_offsets, eps)


def expect_heads(
    op: str,
    like: Tensor,
    width: int,
    joint_rows: int,
    weights: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
) -> None:
    """The checks of norms, rotation and offsets for QKV rows of `width` columns, beside rows like `like`."""
    checks.expect_rank(op, "image_q_weight", weights[0], "H")
    head_dim = weights[0].shape[0]
    if head_dim < 2 or head_dim % 2 or head_dim > 512:
        checks.refuse(op, f"image_q_weight must be [H] with H even and in [2, 512], got [{head_dim}]")
    if width % (3 * head_dim):
        checks.refuse(op, f"image_qkv must be [RI, 3 N H] with H = {head_dim}, got {[like.shape[0], width]}")
    for name, weight in zip(_WEIGHTS, weights, strict=True):
        checks.expect_shape(op, name, weight, "H", head_dim)
        checks.expect_like(op, name, weight, like)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.expect_shape(op, name, table, "RI + RT, H / 2", joint_rows, head_dim // 2)
        checks.expect_like(op, name, table, like, reference.arithmetic_dtype(like.dtype))
    batch = checks.expect_offsets(op, "image_offsets", image_offsets, like)
    checks.expect_rows_have_sample(op, joint_rows, batch)
    checks.expect_shape(op, "text_offsets", text_offsets, "B + 1", batch + 1)
    checks.expect_like(op, "text_offsets", text_offsets, image_offsets)


def _arguments(*inputs: Tensor) -> dict[str, Any]:
    """What both kernels take: the inputs by name, side by side in memory, and the sizes."""
    values: dict[str, Any] = {name: x.contiguous() for name, x in zip(_INPUTS, inputs, strict=True)}
    image_qkv, text_qkv, weight, offsets = inputs[0], inputs[1], inputs[2], inputs[-1]
    rows = {"RI": image_qkv.shape[0], "RT": text_qkv.shape[0], "B": offsets.shape[0] - 1}
    return {**values, **rows, "N": image_qkv.shape[1] // (3 * weight.shape[0]), "H": weight.shape[0]}


@backend.custom_op("lens::qk_norm_rope")
def _forward(
    image_qkv: Tensor,
    text_qkv: Tensor,
    image_q_weight: Tensor,
    image_k_weight: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    eps: float,
) -> Tensor:
    weights = image_q_weight, image_k_weight, text_q_weight, text_k_weight
    arguments = _arguments(image_qkv, text_qkv, *weights, cos, sin, image_offsets, text_offsets)
    qkv = _fake(image_qkv, text_qkv, image_q_weight)
    backend.launch("qk_norm_rope", qkv, **arguments, qkv=qkv, eps=eps)
    return qkv


@backend.custom_op("lens::qk_norm_rope_backward")
def _backward(
    dqkv: Tensor,
    image_qkv: Tensor,
    text_qkv: Tensor,
    image_q_weight: Tensor,
    image_k_weight: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = image_q_weight, image_k_weight, text_q_weight, text_k_weight
    arguments = _arguments(image_qkv, text_qkv, *weights, cos, sin, image_offsets, text_offsets)
    gradients = [torch.empty_like(arguments[name]) for name in _INPUTS[:6]]
    arguments |= {f"d{name}": gradient for name, gradient in zip(_INPUTS, gradients)}
    chunks = backend.split_chunks(image_qkv.shape[0]) + backend.split_chunks(text_qkv.shape[0])
    backend.launch(
        "qk_norm_rope_backward",
        dqkv,
        **arguments,
        dqkv=dqkv.contiguous(),
        workspace=cos.new_empty(chunks, 2, image_q_weight.shape[0]),
        eps=eps,
    )
    dimage, dtext, dimage_q, dimage_k, dtext_q, dtext_k = gradients
    return dimage, dtext, dimage_q, dimage_k, dtext_q, dtext_k


def _fake(image_qkv: Tensor, text_qkv: Tensor, weight: Tensor, *_: Any) -> Tensor:
    head_dim = weight.shape[0]
    rows, heads = image_qkv.shape[0] + text_qkv.shape[0], image_qkv.shape[1] // (3 * head_dim)
    return image_qkv.new_empty(3, rows, heads, head_dim)


def _fake_gradients(dqkv: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:6])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dqkv: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dqkv, *ctx.saved_tensors, ctx.eps), None, None, None, None, None


_forward.register_fake(_fake)
_backward.register_fake(_fake_gradients)
_forward.register_autograd(_gradients, setup_context=_save)
