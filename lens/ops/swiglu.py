"""The gate of the MLP: silu(h[:, :F]) * h[:, F:]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens.ops import backend, checks, reference


def swiglu(h: Tensor) -> Tensor:
    """silu(h[:, :F]) * h[:, F:]: [R, 2 F] -> [R, F], silu(a) = a / (1 + e^-a).

    h: [R, 2 F] float32, bfloat16 (float32 arithmetic) or float64; F may be odd
    Raises ValueError for another rank, an odd number of columns or another dtype. Differentiable.
    """
    op = "swiglu"
    checks.expect_rank(op, "h", h, "R, 2 F")
    checks.expect_floating(op, "h", h)
    if h.shape[1] % 2 or h.shape[1] == 0:
        checks.refuse(op, f"h must be [R, 2 F] with F at least 1, got {list(h.shape)}")
    if backend.choose(op, h) == "reference":
        return reference.swiglu(h)
    return _forward(h)


@backend.custom_op("lens::swiglu")
def _forward(h: Tensor) -> Tensor:
    h = h.contiguous()
    rows, hidden = h.shape[0], h.shape[1] // 2
    y = h.new_empty(rows, hidden)
    backend.launch("swiglu", h, h=h, y=y, R=rows, F=hidden)
    return y


@backend.custom_op("lens::swiglu_backward")
def _backward(dy: Tensor, h: Tensor) -> Tensor:
    dy, h = dy.contiguous(), h.contiguous()
    dh = torch.empty_like(h)
    backend.launch("swiglu_backward", h, dy=dy, h=h, dh=dh, R=h.shape[0], F=h.shape[1] // 2)
    return dh


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> Tensor:
    (h,) = ctx.saved_tensors
    return _backward(dy, h)


_forward.register_fake(lambda h: h.new_empty(h.shape[0], h.shape[1] // 2))
_backward.register_fake(lambda dy, h: h.new_empty(h.shape))
_forward.register_autograd(_gradients, setup_context=_save)
