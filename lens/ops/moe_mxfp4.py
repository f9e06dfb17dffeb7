"""A mixture of experts whose weights stay packed in MXFP4: router, experts, weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor

from lens.ops import backend, checks, reference

GROUP = 32  # weights that share a scale


def moe_mxfp4(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    top_k: int = 4,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """sum over a row's K experts of share_e (swiglu(x W1_e^T + b1_e) W2_e^T + b2_e): [R, D] -> [R, D].

    The K = top_k experts have the largest logits x router_weight^T + router_bias, of equal ones the first; share_e is the
    softmax among these. swiglu(h) = g sigmoid(alpha g) (u + 1), g = min(h[:, 0::2], limit), u = h[:, 1::2] within +-limit.
    Hidden rows are rounded to the dtype of x; all else is rounded once.

    x: [R, D] float32, bfloat16 (float32 arithmetic) or float64
    router_weight: [E, D], router_bias: [E], gate_up_bias: [E, 2 F], down_bias: [E, D], of the dtype of x
    gate_up_blocks: uint8 [E, 2 F, D / 32, 16], down_blocks: uint8 [E, D, F / 32, 16]: two E2M1 values a byte, low half first
    gate_up_scales: uint8 [E, 2 F, D / 32], down_scales: uint8 [E, D, F / 32]: 2^(s - 127) for 32 values; 255 is NaN
    A row's bits depend neither on the other rows nor on the number of threads. On a GPU so for bfloat16, which its kernel
    multiplies, with up to 1024 experts, D and F up to 26,000 and arrays on 16-byte boundaries (else RuntimeError); other dtypes
    run the specification there.
    Raises ValueError for shapes, dtypes or devices that do not fit, D or F that are no multiple of 32, K not in 1 to E;
    RuntimeError if a gradient is asked for.
    """
    op = "moe_mxfp4"
    checks.expect_packed(op, x)
    width = x.shape[1]
    checks.expect_rank(op, "router_weight", router_weight, "E, D")
    experts = router_weight.shape[0]
    checks.expect_rank(op, "gate_up_bias", gate_up_bias, "E, 2 F")
    hidden = gate_up_bias.shape[1] // 2
    for name, size in (("D", width), ("F", hidden)):
        if size % GROUP or size == 0:
            checks.refuse(op, f"{name} must be a multiple of {GROUP}, got {size}")
    if type(top_k) is not int or not 1 <= top_k <= experts:
        checks.refuse(op, f"top_k must be a whole number from 1 to E = {experts}, got {top_k!r}")
    packed: dict[str, tuple[Tensor, str, tuple[int, ...]]] = {}
    floats: dict[str, tuple[Tensor, str, tuple[int, ...]]] = {}
    floats["router_weight"] = router_weight, "E, D", (experts, width)
    floats["router_bias"] = router_bias, "E", (experts,)
    floats["gate_up_bias"] = gate_up_bias, "E, 2 F", (experts, 2 * hidden)
    floats["down_bias"] = down_bias, "E, D", (experts, width)
    packed["gate_up_blocks"] = gate_up_blocks, "E, 2 F, D / 32, 16", (experts, 2 * hidden, width // GROUP, 16)
    packed["gate_up_scales"] = gate_up_scales, "E, 2 F, D / 32", (experts, 2 * hidden, width // GROUP)
    packed["down_blocks"] = down_blocks, "E, D, F / 32, 16", (experts, width, hidden // GROUP, 16)
    packed["down_scales"] = down_scales, "E, D, F / 32", (experts, width, hidden // GROUP)
    for dtype, group in ((x.dtype, floats), (torch.uint8, packed)):
        for name, (tensor, symbols, sizes) in group.items():
            checks.expect_shape(op, name, tensor, symbols, *sizes)
            checks.expect_like(op, name, tensor, x, dtype)
    arguments = (
        x, router_weight, router_bias, gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias,
        top_k, float(alpha), float(limit),
    )  # fmt: skip
    if backend.choose(op, x) == "reference":
        return reference.moe_mxfp4(*arguments)
    return _forward(*arguments)


@backend.custom_op("lens::moe_mxfp4")
def _forward(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    top_k: int,
    alpha: float,
    limit: float,
) -> Tensor:
    x = x.contiguous()
    rows, width = x.shape
    experts, hidden = gate_up_bias.shape[0], gate_up_bias.shape[1] // 2
    y, wide = torch.empty_like(x), reference.arithmetic_dtype(x.dtype)
    room = backend.extension("moe_mxfp4").moe_workspace
    backend.launch(
        "moe_mxfp4",
        x,
        x=x,
        router_weight=router_weight.contiguous(),
        router_bias=router_bias.contiguous(),
        gate_up_blocks=gate_up_blocks.contiguous(),
        gate_up_scales=gate_up_scales.contiguous(),
        gate_up_bias=gate_up_bias.contiguous(),
        down_blocks=down_blocks.contiguous(),
        down_scales=down_scales.contiguous(),
        down_bias=down_bias.contiguous(),
        y=y,
        hidden=x.new_empty(room(rows, top_k, experts, hidden), dtype=wide),
        parts=x.new_empty(room(rows, top_k, experts, width), dtype=wide),
        wide=x.new_empty(rows, width, dtype=wide),
        plan=x.new_empty(2 * (rows * top_k + experts + 1), dtype=torch.int32),
        shares=x.new_empty(rows * top_k, dtype=wide),
        R=rows,
        D=width,
        F=hidden,
        E=experts,
        K=top_k,
        alpha=alpha,
        limit=limit,
    )
    return y


_forward.register_fake(lambda x, *_: x.new_empty(x.shape))
