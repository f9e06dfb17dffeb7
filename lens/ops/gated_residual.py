"""A branch added through its gate: x + gate_b * y."""

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
    expect_residual(op, x, y, gate, offsets)
    if backend.choose(op, x) == "reference":
        return reference.gated_residual(x, y, gate, offsets)
    return _forward(x, y, gate, offsets)


def expect_residual(op: str, x: Tensor, y: Tensor, gate: Tensor, offsets: Tensor) -> None:
    """The checks that both forms of the op share."""
    checks.expect_packed(op, x)
    checks.expect_shape(op, "y", y, "R, D", *x.shape)
    checks.expect_like(op, "y", y, x)
    batch = checks.expect_offsets(op, "offsets", offsets, x)
    checks.expect_rows_have_sample(op, x.shape[0], batch)
    checks.expect_modulation(op, "gate", gate, x, batch, x.shape[1])


@backend.custom_op("lens::gated_residual")
def _forward(x: Tensor, y: Tensor, gate: Tensor, offsets: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    backend.launch(
        "gated_residual",
        x,
        x=x,
        y=y.contiguous(),
        offsets=offsets.contiguous(),
        out=out,
        **backend.rows_and_tables(x, gate=gate),
    )
    return out


@backend.custom_op("lens::gated_residual_backward")
def _backward(dout: Tensor, y: Tensor, gate: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    y = y.contiguous()
    dy, dgate = torch.empty_like(y), y.new_empty(gate.shape)
    backend.launch(
        "gated_residual_backward",
        y,
        dout=dout.contiguous(),
        y=y,
        offsets=offsets.contiguous(),
        dy=dy,
        dgate=dgate,
        workspace=backend.column_sums(y, gate.shape[0], 1),
        **backend.rows_and_tables(y, gate=gate),
    )
    return dy, dgate


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gate, offsets = inputs
    ctx.save_for_backward(y, gate, offsets)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return dout, *_backward(dout, *ctx.saved_tensors), None


_forward.register_fake(lambda x, *_: x.new_empty(x.shape))
_backward.register_fake(lambda dout, y, gate, _: (y.new_empty(y.shape), gate.new_empty(gate.shape)))
_forward.register_autograd(_gradients, setup_context=_save)
