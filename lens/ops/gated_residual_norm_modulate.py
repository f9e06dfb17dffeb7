"""x + gate_b * y in one pass with the RMSNorm and modulation that follow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens.ops import backend, checks, reference
from lens.ops.gated_residual import expect_residual


def gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    offsets: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """x_new = x + gate_b * y and rms_norm_modulate(x_new, weight, scale, shift): two [R, D].

    The norm reads x_new as it is stored, rounded to its dtype, so the result equals that of the two ops in a row.
    x, y, gate, offsets: as in gated_residual; weight, scale, shift, eps: as in rms_norm_modulate.
    Raises ValueError for shapes, dtypes, devices or (CPU) offsets that do not fit. Differentiable in the floats.
    """
    op = "gated_residual_norm_modulate"
    expect_residual(op, x, y, gate, offsets)
    checks.expect_shape(op, "weight", weight, "D", x.shape[1])
    checks.expect_like(op, "weight", weight, x)
    checks.expect_modulation(op, "scale", scale, x, *gate.shape)
    checks.expect_modulation(op, "shift", shift, x, *gate.shape)
    if backend.choose(op, x) == "reference":
        return reference.gated_residual_norm_modulate(x, y, gate, weight, scale, shift, offsets, eps)
    return _forward(x, y, gate, weight, scale, shift, offsets, eps)


@backend.custom_op("lens::gated_residual_norm_modulate")
def _forward(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    x_new, normed = torch.empty_like(x), torch.empty_like(x)
    backend.launch(
        "gated_residual_norm_modulate",
        x,
        x=x,
        y=y.contiguous(),
        weight=weight.contiguous(),
        offsets=offsets.contiguous(),
        x_new=x_new,
        normed=normed,
        **backend.rows_and_tables(x, gate=gate, scale=scale, shift=shift),
        eps=eps,
    )
    return x_new, normed


@backend.custom_op("lens::gated_residual_norm_modulate_backward")
def _backward(
    dx_new: Tensor,
    dnormed: Tensor,
    x_new: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_new = x_new.contiguous()
    dx, dy, dweight = torch.empty_like(x_new), torch.empty_like(x_new), weight.new_empty(weight.shape)
    dgate, dscale, dshift = (x_new.new_empty(gate.shape) for _ in range(3))
    backend.launch(
        "gated_residual_norm_modulate_backward",
        x_new,
        dx_new=dx_new.contiguous(),
        dnormed=dnormed.contiguous(),
        x_new=x_new,
        y=y.contiguous(),
        weight=weight.contiguous(),
        offsets=offsets.contiguous(),
        dx=dx,
        dy=dy,
        dgate=dgate,
        dweight=dweight,
        dscale=dscale,
        dshift=dshift,
        workspace=backend.column_sums(x_new, gate.shape[0], 3),
        **backend.rows_and_tables(x_new, gate=gate, scale=scale),
        eps=eps,
    )
    return dx, dy, dgate, dweight, dscale, dshift


def _fake_gradients(dx_new: Tensor, dnormed: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    x_new, _, gate, weight = inputs[:4]
    return tuple(x.new_empty(x.shape) for x in (x_new, x_new, gate, weight, gate, gate))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, weight, scale, _, offsets, ctx.eps = inputs
    ctx.save_for_backward(output[0], y, gate, weight, scale, offsets)


def _gradients(ctx: Any, dx_new: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dx_new, dnormed, *ctx.saved_tensors, ctx.eps), None, None


_forward.register_fake(lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)))
_backward.register_fake(_fake_gradients)
_forward.register_autograd(_gradients, setup_context=_save)
