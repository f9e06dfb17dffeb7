"""x + gate_b * y, alone and in one pass with the RMSNorm and modulation that follow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens.ops import backend, checks, reference


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, offsets: Tensor) -> Tensor:
    """x + gate_b * y, b the sample of the row: [R, D].

    x: [R, D] float32, bfloat16 (float32 arithmetic) or float64
    y: [R, D], dtype of x
    gate: [B, D], dtype of x; rows may lie any distance apart
    offsets: int32 [B + 1], first row of every sample and R at the end
    Raises ValueError for shapes, dtypes, devices or (CPU) offsets that do not fit. Differentiable in x, y, gate.
    """
    op = "gated_residual"
    _expect(op, x, y, gate, offsets)
    if backend.choose(op, x) == "reference":
        return reference.gated_residual(x, y, gate, offsets)
    return _forward(x, y, gate, offsets)


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
    _expect(op, x, y, gate, offsets)
    checks.expect_shape(op, "weight", weight, "D", x.shape[1])
    checks.expect_like(op, "weight", weight, x)
    checks.expect_modulation(op, "scale", scale, x, *gate.shape)
    checks.expect_modulation(op, "shift", shift, x, *gate.shape)
    if backend.choose(op, x) == "reference":
        return reference.gated_residual_norm_modulate(x, y, gate, weight, scale, shift, offsets, eps)
    return _norm_forward(x, y, gate, weight, scale, shift, offsets, eps)


def _expect(op: str, x: Tensor, y: Tensor, gate: Tensor, offsets: Tensor) -> None:
    checks.expect_packed(op, x)
    checks.expect_shape(op, "y", y, "R, D", *x.shape)
    checks.expect_like(op, "y", y, x)
    batch = checks.expect_offsets(op, "offsets", offsets, x)
    checks.expect_rows_have_sample(op, x.shape[0], batch)
    checks.expect_modulation(op, "gate", gate, x, batch, x.shape[1])


@torch.library.custom_op("lens::gated_residual", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(x: Tensor, y: Tensor, gate: Tensor, offsets: Tensor) -> Tensor:
    x, gate = x.contiguous(), checks.dense_rows(gate)
    out = torch.empty_like(x)
    backend.launch(
        "gated_residual",
        x,
        x=x,
        y=y.contiguous(),
        gate=gate,
        offsets=offsets.contiguous(),
        out=out,
        R=x.shape[0],
        B=gate.shape[0],
        D=x.shape[1],
        gate_stride=gate.stride(0),
    )
    return out


@_forward.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("lens::gated_residual_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(dout: Tensor, y: Tensor, gate: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    y, gate = y.contiguous(), checks.dense_rows(gate)
    dy, dgate = torch.empty_like(y), y.new_empty(gate.shape)
    backend.launch(
        "gated_residual_backward",
        y,
        dout=dout.contiguous(),
        y=y,
        gate=gate,
        offsets=offsets.contiguous(),
        dy=dy,
        dgate=dgate,
        workspace=backend.column_sums(y, gate.shape[0], 1),
        R=y.shape[0],
        B=gate.shape[0],
        D=y.shape[1],
        gate_stride=gate.stride(0),
    )
    return dy, dgate


@_backward.register_fake
def _(dout: Tensor, y: Tensor, gate: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gate, offsets = inputs
    ctx.save_for_backward(y, gate, offsets)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return dout, *_backward(dout, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("lens::gated_residual_norm_modulate", mutates_args=(), device_types=("cpu", "cuda"))
def _norm_forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    x, gate = x.contiguous(), checks.dense_rows(gate)
    scale, shift = checks.dense_rows(scale), checks.dense_rows(shift)
    x_new, normed = torch.empty_like(x), torch.empty_like(x)
    backend.launch(
        "gated_residual_norm_modulate",
        x,
        x=x,
        y=y.contiguous(),
        gate=gate,
        weight=weight.contiguous(),
        scale=scale,
        shift=shift,
        offsets=offsets.contiguous(),
        x_new=x_new,
        normed=normed,
        R=x.shape[0],
        B=gate.shape[0],
        D=x.shape[1],
        gate_stride=gate.stride(0),
        scale_stride=scale.stride(0),
        shift_stride=shift.stride(0),
        eps=eps,
    )
    return x_new, normed


@_norm_forward.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("lens::gated_residual_norm_modulate_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _norm_backward(
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
    x_new, gate, scale = x_new.contiguous(), checks.dense_rows(gate), checks.dense_rows(scale)
    dx, dy, dweight = torch.empty_like(x_new), torch.empty_like(x_new), weight.new_empty(weight.shape)
    dgate, dscale, dshift = (x_new.new_empty(gate.shape) for _ in range(3))
    backend.launch(
        "gated_residual_norm_modulate_backward",
        x_new,
        dx_new=dx_new.contiguous(),
        dnormed=dnormed.contiguous(),
        x_new=x_new,
        y=y.contiguous(),
        gate=gate,
        weight=weight.contiguous(),
        scale=scale,
        offsets=offsets.contiguous(),
        dx=dx,
        dy=dy,
        dgate=dgate,
        dweight=dweight,
        dscale=dscale,
        dshift=dshift,
        workspace=backend.column_sums(x_new, gate.shape[0], 3),
        R=x_new.shape[0],
        B=gate.shape[0],
        D=x_new.shape[1],
        gate_stride=gate.stride(0),
        scale_stride=scale.stride(0),
        eps=eps,
    )
    return dx, dy, dgate, dweight, dscale, dshift


@_norm_backward.register_fake
def _(
    dx_new: Tensor,
    dnormed: Tensor,
    x_new: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    rows, modulation = (x_new.new_empty(x_new.shape) for _ in range(2)), [x_new.new_empty(gate.shape) for _ in range(3)]
    return *rows, modulation[0], weight.new_empty(weight.shape), *modulation[1:]


def _norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, weight, scale, _, offsets, ctx.eps = inputs
    ctx.save_for_backward(output[0], y, gate, weight, scale, offsets)


def _norm_gradients(ctx: Any, dx_new: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
    return *_norm_backward(dx_new, dnormed, *ctx.saved_tensors, ctx.eps), None, None


_norm_forward.register_autograd(_norm_gradients, setup_context=_norm_save)
