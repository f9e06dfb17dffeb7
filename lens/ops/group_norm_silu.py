"""GroupNorm and SiLU of the pixel decoder in one op, on packed channels-last rows."""

from __future__ import annotations

from torch import Tensor

from lens.ops import backend, checks, reference


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    groups: int,
    eps: float = 1e-6,
    activate: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """silu(n), n = (x - mean_bg) * rsqrt(var_bg + eps) * weight + bias; n itself without ``activate``.

    mean_bg and var_bg (of the population) go over the rows of sample b and the D / G neighbouring channels of group g.

    x: [R, D] float32, bfloat16 (float32 arithmetic) or float64: the pixels of B pictures, row by row, channels last
    weight, bias: [D] like x
    offsets: int32 [B + 1], first row of every picture and R at the end
    groups: G, a divisor of D
    out: [R, D] like x, dense, written and returned; None: a new tensor. It may be x.
    Returns [R, D] like x. The sums go over fixed runs of rows: neither threads nor other samples change a bit. Raises
    ValueError for shapes, dtypes, devices or (CPU) offsets that do not fit, RuntimeError if a gradient is asked for:
    the decoder is not trained through this op.
    """
    op = "group_norm_silu"
    checks.expect_packed(op, x)
    rows, width = x.shape
    for name, value in (("weight", weight), ("bias", bias)):
        checks.expect_shape(op, name, value, "D", width)
        checks.expect_like(op, name, value, x)
    batch = checks.expect_offsets(op, "offsets", offsets, x)
    checks.expect_rows_have_sample(op, rows, batch)
    if groups < 1 or width % groups:
        checks.refuse(op, f"groups must divide D = {width}, got {groups}")
    if out is not None:
        checks.expect_shape(op, "out", out, "R, D", rows, width)
        checks.expect_like(op, "out", out, x)
        if not out.is_contiguous():
            checks.refuse(op, f"out must be dense, got the strides {list(out.stride())}")
    if backend.choose(op, x) == "reference":
        y = reference.group_norm_silu(x, weight, bias, offsets, groups, eps, activate)
        return y if out is None else out.copy_(y)
    y = x.new_empty(x.shape) if out is None else out
    _forward(x, weight, bias, offsets, groups, float(eps), activate, y)
    return y


@backend.custom_op("lens::group_norm_silu", mutates=("y",))
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, groups: int, eps: float, activate: bool, y: Tensor
) -> None:
    batch, width = offsets.shape[0] - 1, x.shape[1]
    backend.launch(
        "group_norm_silu",
        x,
        x=x.contiguous(),
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        offsets=offsets.contiguous(),
        y=y,
        workspace=backend.column_sums(x, batch, 2),
        table=x.new_empty(batch, 2, width, dtype=reference.arithmetic_dtype(x.dtype)),
        R=x.shape[0],
        B=batch,
        D=width,
        G=groups,
        activate=int(activate),
        eps=eps,
    )


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, groups: int, eps: float, activate: bool, y: Tensor
) -> None:
    return None
