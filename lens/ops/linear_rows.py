"""y = x weight^T + bias on a CPU with AMX, every row by itself: a GEMM whose bits do not follow the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lens.ops import backend, checks, reference

STEP, BLOCK, PANEL = 32, 16, 32  # inputs of a product of tiles, rows of a block, outputs of a panel
NEAR = 768 * 1024  # bytes of panels in the second cache, beside three blocks of rows


def available() -> bool:
    """Whether this build and CPU have the kernel, and neither backend nor instruction set are forced to do without."""
    return backend.without("linear_rows") == "" and backend.isa() == "amx" and backend.override() != "reference"


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, summed in float32 in the order of the inputs and rounded once: [R, K] -> [R, N].

    x: [R, K], weight: [N, K], bias: [N] or None, all bfloat16 on a CPU that has AMX
    A row's bits depend neither on the other rows nor on the number of threads. Numbers below the smallest normal one are
    taken for zero, as AMX does.
    Raises ValueError for shapes, dtypes or devices that do not fit; RuntimeError where there is no AMX, or if a gradient is
    asked for.
    """
    op = "linear_rows"
    checks.expect_packed(op, x, "x", "R, K")
    checks.expect_rank(op, "weight", weight, "N, K")
    checks.expect_shape(op, "weight", weight, "N, K", weight.shape[0], x.shape[1])
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        checks.refuse(op, f"x must be bfloat16 on the CPU, got {str(x.dtype).removeprefix('torch.')} on {x.device}")
    if weight.shape[0] == 0:
        checks.refuse(op, "weight must have at least one output, got none")
    checks.expect_like(op, "weight", weight, x)
    if bias is not None:
        checks.expect_shape(op, "bias", bias, "N", weight.shape[0])
        checks.expect_like(op, "bias", bias, x)
    if backend.override() == "reference":
        return reference.linear(x, weight, bias).to(x.dtype)
    if not available():
        raise RuntimeError(f"lens.{op}: needs a CPU with AMX, this one runs the {backend.isa()} kernels")
    return _forward(x, weight, bias)


def panels_of(outputs: int, inputs: int, threads: int) -> int:
    """How many panels a thread takes at a time: as many as leave room in the second cache, but four tasks a thread."""
    return max(1, min(NEAR // (PANEL * 2 * inputs), outputs // (PANEL * 4 * threads)))


@backend.custom_op("lens::linear_rows", devices=("cpu",))
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (rows, inputs), outputs, threads = x.shape, weight.shape[0], torch.get_num_threads()
    wide, panels = -(-inputs // STEP) * STEP, panels_of(outputs, inputs, threads)
    y = x.new_empty(rows, outputs)
    backend.launch(
        "linear_rows",
        x,
        x=x.contiguous(),
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        y=y,
        packed=x.new_empty(-(-rows // BLOCK) * BLOCK * wide),
        panels=x.new_empty(threads * panels * PANEL * wide),
        R=rows,
        K=inputs,
        N=outputs,
        W=threads,
        P=panels,
    )
    return y


_forward.register_fake(lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))
