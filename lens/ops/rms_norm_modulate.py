"""RMSNorm and modulation in one pass: y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale_b) + shift_b."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens.ops import backend, checks, reference


def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, offsets: Tensor, eps: float = 1e-6
) -> Tensor:
    """y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale_b) + shift_b, b the sample of the row: [R, D].

    x: [R, D] float32, bfloat16 (float32 arithmetic) or float64
    weight: [D], dtype of x
    scale, shift: [B, D], dtype of x; rows may lie any distance apart (slices of one modulation table)
    offsets: int32 [B + 1], first row of every sample and R at the end
    Raises ValueError for shapes, dtypes, devices or (CPU) offsets that do not fit. Differentiable in the floats.
    """
    op = "rms_norm_modulate"
    checks.expect_packed(op, x)
    rows, width = x.shape
    batch = checks.expect_offsets(op, "offsets", offsets, x)
    checks.expect_rows_have_sample(op, rows, batch)
    checks.expect_shape(op, "weight", weight, "D", width)
    checks.expect_like(op, "weight", weight, x)
    checks.expect_modulation(op, "scale", scale, x, batch, width)
    checks.expect_modulation(op, "shift", shift, x, batch, width)
    if backend.choose(op, x) == "reference":
        return reference.rms_norm_modulate(x, weight, scale, shift, offsets, eps)
    return _forward(x, weight, scale, shift, offsets, eps)


@backend.custom_op("lens::rms_norm_modulate")
def _forward(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, offsets: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    backend.launch(
        "rms_norm_modulate",
        x,
        x=x,
        weight=weight.contiguous(),
        offsets=offsets.contiguous(),
        y=y,
        **backend.rows_and_tables(x, scale=scale, shift=shift),
        eps=eps,
    )
    return y


@backend.custom_op("lens::rms_norm_modulate_backward")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.contiguous()
    dx, dweight = torch.empty_like(x), weight.new_empty(weight.shape)
    dscale, dshift = x.new_empty(scale.shape), x.new_empty(scale.shape)
    backend.launch(
        "rms_norm_modulate_backward",
        x,
        dy=dy.contiguous(),
        x=x,
        weight=weight.contiguous(),
        offsets=offsets.contiguous(),
        dx=dx,
        dweight=dweight,
        dscale=dscale,
        dshift=dshift,
        workspace=backend.column_sums(x, scale.shape[0], 2),
        **backend.rows_and_tables(x, scale=scale),
        eps=eps,
    )
    return dx, dweight, dscale, dshift


def _fake_gradients(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(scale.shape), x.new_empty(scale.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, _, offsets, ctx.eps = inputs
    ctx.save_for_backward(x, weight, scale, offsets)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, offsets = ctx.saved_tensors
    return *_backward(dy, x, weight, scale, offsets, ctx.eps), None, None


_forward.register_fake(lambda x, *_: x.new_empty(x.shape))
_backward.register_fake(_fake_gradients)
_forward.register_autograd(_gradients, setup_context=_save)
