"""Padded batch <-> packed rows. The rows are planned on the host by lens/packing.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens.ops import backend, checks, reference


def pack_tokens(x: Tensor, rows: Tensor) -> Tensor:
    """packed[r] = x.view(B * L, C)[rows[r]]: [B, L, C] -> [R, C].

    x: [B, L, C] float32, bfloat16 or float64
    rows: int64 [R], rows[r] = b * L + j of the r-th valid token, no token twice
    Raises ValueError for shapes, dtypes, devices or (CPU) rows that do not fit. Differentiable in x.
    """
    op = "pack_tokens"
    checks.expect_rank(op, "x", x, "B, L, C")
    checks.expect_floating(op, "x", x)
    _expect_rows(op, rows, x, x.shape[0] * x.shape[1])
    if backend.choose(op, x) == "reference":
        return reference.pack_tokens(x, rows)
    return _pack(x, rows)


def unpack_tokens(packed: Tensor, rows: Tensor, batch: int, length: int) -> Tensor:
    """x.view(B * L, C)[rows[r]] = packed[r], zero elsewhere: [R, C] -> [B, L, C].

    packed: [R, C] float32, bfloat16 or float64
    rows: int64 [R], rows[r] = b * L + j of the r-th valid token, no token twice
    Raises ValueError for shapes, dtypes, devices or (CPU) rows that do not fit. Differentiable in packed.
    """
    op = "unpack_tokens"
    checks.expect_rank(op, "packed", packed, "R, C")
    checks.expect_floating(op, "packed", packed)
    if batch < 0 or length < 0:
        checks.refuse(op, f"batch and length must not be negative, got {batch} and {length}")
    _expect_rows(op, rows, packed, batch * length)
    checks.expect_shape(op, "rows", rows, "R", packed.shape[0])
    if backend.choose(op, packed) == "reference":
        return reference.unpack_tokens(packed, rows, batch, length)
    return _unpack(packed, rows, batch, length)


def _expect_rows(op: str, rows: Tensor, like: Tensor, slots: int) -> None:
    checks.expect_rank(op, "rows", rows, "R")
    checks.expect_like(op, "rows", rows, like, torch.int64)
    if rows.shape[0] > slots:
        checks.refuse(op, f"rows must name each of B * L = {slots} tokens once at most, got R = {rows.shape[0]}")
    if like.shape[-1] == 0:
        checks.refuse(op, "C must be at least 1, got 0")


@backend.custom_op("lens::pack_tokens")
def _pack(x: Tensor, rows: Tensor) -> Tensor:
    x, rows = x.contiguous(), rows.contiguous()
    (batch, length, channels), count = x.shape, rows.shape[0]
    packed = x.new_empty(count, channels)
    backend.launch("pack_tokens", x, x=x, rows=rows, packed=packed, R=count, BL=batch * length, C=channels)
    return packed


@_pack.register_fake
def _(x: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(rows.shape[0], x.shape[2])


@backend.custom_op("lens::unpack_tokens")
def _unpack(packed: Tensor, rows: Tensor, batch: int, length: int) -> Tensor:
    packed, rows = packed.contiguous(), rows.contiguous()
    count, channels = packed.shape
    x = packed.new_empty(batch, length, channels)
    backend.launch("unpack_tokens", x, packed=packed, rows=rows, x=x, R=count, BL=batch * length, C=channels)
    return x


@_unpack.register_fake
def _(packed: Tensor, rows: Tensor, batch: int, length: int) -> Tensor:
    return packed.new_empty(batch, length, packed.shape[1])


def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, rows = inputs
    ctx.batch, ctx.length = x.shape[:2]
    ctx.save_for_backward(rows)


def _pack_gradients(ctx: Any, dpacked: Tensor) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    return _unpack(dpacked, rows, ctx.batch, ctx.length), None


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _unpack_gradients(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    return _pack(dx, rows), None, None, None


_pack.register_autograd(_pack_gradients, setup_context=_save_pack)
_unpack.register_autograd(_unpack_gradients, setup_context=_save_unpack)
