"""Refusals in the caller's language: op, argument, what was expected, what came.

A shape is named by its symbols and numbers at once: `[B, D] = [2, 1536]`.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def refuse(op: str, message: str) -> NoReturn:
    raise ValueError(f"lens.{op}: {message}")


def _plain(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")


def expect_tensor(op: str, name: str, x: Tensor) -> None:
    """x is a dense tensor, neither None nor a list, nor sparse."""
    if not isinstance(x, Tensor):
        refuse(op, f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        refuse(op, f"{name} must be a dense tensor, got the layout {_plain(x.layout)}")


def expect_floating(op: str, name: str, x: Tensor) -> None:
    """x holds float32, bfloat16 or float64."""
    expect_tensor(op, name, x)
    if x.dtype not in FLOATS:
        refuse(op, f"{name} must be float32, bfloat16 or float64, got {_plain(x.dtype)}")


def expect_rank(op: str, name: str, x: Tensor, symbols: str) -> None:
    """x has as many dims as `symbols` names, e.g. "R, D"."""
    expect_tensor(op, name, x)
    rank = symbols.count(",") + 1
    if x.dim() != rank:
        refuse(op, f"{name} must be [{symbols}], got {list(x.shape)}")


def expect_packed(op: str, x: Tensor, name: str = "x", symbols: str = "R, D") -> None:
    """Floating rows of at least one channel."""
    expect_rank(op, name, x, symbols)
    expect_floating(op, name, x)
    if x.shape[1] == 0:
        refuse(op, f"{name} must be [{symbols}] with at least one channel, got {list(x.shape)}")


def expect_shape(op: str, name: str, x: Tensor, symbols: str, *sizes: int) -> None:
    """x has exactly these sizes."""
    expect_tensor(op, name, x)
    if x.shape != sizes:
        refuse(op, f"{name} must be [{symbols}] = {list(sizes)}, got {list(x.shape)}")


def expect_like(op: str, name: str, x: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> None:
    """x is on the device of `like` and has its dtype, or `dtype`."""
    expect_tensor(op, name, x)
    dtype = dtype or like.dtype
    if x.dtype != dtype:
        refuse(op, f"{name} must be {_plain(dtype)}, got {_plain(x.dtype)}")
    if x.device != like.device:
        refuse(op, f"{name} must be on {like.device}, got {x.device}")


def expect_offsets(op: str, name: str, offsets: Tensor, like: Tensor) -> int:
    """int32 [B + 1] beside `like`; returns B."""
    expect_rank(op, name, offsets, "B + 1")
    if offsets.shape[0] < 1:
        refuse(op, f"{name} must be [B + 1], got {list(offsets.shape)}")
    expect_like(op, name, offsets, like, torch.int32)
    return offsets.shape[0] - 1


def expect_rows_have_sample(op: str, rows: int, batch: int) -> None:
    if batch == 0 and rows != 0:
        refuse(op, f"offsets must name a sample for R = {rows} rows, got B = 0")


def expect_modulation(op: str, name: str, m: Tensor, like: Tensor, batch: int, width: int) -> None:
    """A [B, D] view like `like`."""
    expect_shape(op, name, m, "B, D", batch, width)
    expect_like(op, name, m, like)


def dense_rows(m: Tensor) -> Tensor:
    """m [B, D] itself if the channels of a row lie side by side (any row stride), else a contiguous copy."""
    return m if m.stride(1) == 1 or m.shape[1] == 1 else m.contiguous()
