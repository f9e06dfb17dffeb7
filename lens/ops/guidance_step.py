"""Guidance, rescale and Euler step of the sampler in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from lens.ops import backend, checks, reference


def guidance_step(
    x: Tensor, cond: Tensor, uncond: Tensor | None, delta: Tensor, guidance: float, offsets: Tensor
) -> Tensor:
    """comb = u + guidance * (c - u); comb *= |c| / |comb| per row (1 where |comb| is 0); x + delta_b * comb.

    x: [R, C] float32 (float64 with float64 velocities), the latents
    cond, uncond: [R, C] float32 or bfloat16, the velocities with and without prompt; without uncond comb = c
    delta: [B], dtype of x, s_next - s of every sample
    offsets: int32 [B + 1], first row of every sample and R at the end
    Returns [R, C] in the dtype of x. Raises ValueError for shapes, dtypes, devices or (CPU) offsets that do not
    fit, RuntimeError if a gradient is asked for: the sampler is not trained through this op.
    """
    op = "guidance_step"
    checks.expect_rank(op, "x", x, "R, C")
    rows, channels = x.shape
    if channels == 0:
        checks.refuse(op, "C must be at least 1, got 0")
    checks.expect_floating(op, "cond", cond)
    checks.expect_like(op, "x", x, cond, reference.arithmetic_dtype(cond.dtype))
    for name, velocity in (("cond", cond), ("uncond", uncond)):
        if velocity is not None:
            checks.expect_shape(op, name, velocity, "R, C", rows, channels)
            checks.expect_like(op, name, velocity, cond)
    batch = checks.expect_offsets(op, "offsets", offsets, x)
    checks.expect_rows_have_sample(op, rows, batch)
    checks.expect_shape(op, "delta", delta, "B", batch)
    checks.expect_like(op, "delta", delta, x)
    if backend.choose(op, x) == "reference":
        return reference.guidance_step(x, cond, uncond, delta, guidance, offsets)
    return _forward(x, cond, uncond, delta, float(guidance), offsets)


@backend.custom_op("lens::guidance_step")
def _forward(x: Tensor, cond: Tensor, uncond: Tensor | None, delta: Tensor, guidance: float, offsets: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    backend.launch(
        "guidance_step",
        x,
        dtype=cond.dtype,
        x=x,
        cond=cond.contiguous(),
        uncond=None if uncond is None else uncond.contiguous(),
        delta=delta.contiguous(),
        offsets=offsets.contiguous(),
        out=out,
        R=x.shape[0],
        B=delta.shape[0],
        C=x.shape[1],
        guidance=guidance,
    )
    return out


_forward.register_fake(lambda x, *_: x.new_empty(x.shape))
