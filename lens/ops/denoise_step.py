"""The transformer as one call: what LensTransformer2DModel.denoise computes, launched by C++ from memory made before.

Of use where every kernel of a step is ours: an sm_90a device, bfloat16, heads of 64. A step launched op by op costs the
host some 450 calls of Python; this one costs a call.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lens.ops import backend
from lens.ops.attention.hopper import POLYNOMIAL
from lens.ops.linear import choice as linear_choice

OWN_ATTENTION = "lens-hopper"


@backend.custom_op("lens::denoise_step", mutates=("workspace", "velocity"))
def denoise_step(
    weights: Tensor,
    score_bounds: Tensor,
    ends: Sequence[Tensor],
    image_rows: Tensor,
    text_rows: Tensor,
    modulation: Tensor,
    final_modulation: Tensor,
    cos: Tensor,
    sin: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    workspace: Tensor,
    velocity: Tensor,
    hidden: int,
    eps: float,
) -> None:
    """velocity [RI, C] of image_rows [RI, C] and text_rows [RT, D], all bfloat16; sizes as in csrc/params.h.

    weights: int64 [L, 2, 10] on the host, addresses by WEIGHTS; score_bounds: float64 [L] on the host
    ends: weight and bias of the first GEMM, weight and bias of the last
    workspace: [RI + RT, 2 D + max(3 D, F)], whose content does not matter; hidden: F
    """
    head_dim, names = 2 * cos.shape[1], ("image_in", "image_in_bias", "image_out", "image_out_bias")
    backend.launch(
        "denoise_step",
        velocity,
        weights=weights,
        score_bounds=score_bounds,
        **dict(zip(names, ends, strict=True)),  # type: ignore[arg-type]
        image_rows=image_rows,
        text_rows=text_rows,
        modulation=modulation,
        final_modulation=final_modulation,
        cos=cos,
        sin=sin,
        image_offsets=image_offsets,
        text_offsets=text_offsets,
        workspace=workspace,
        velocity=velocity,
        RI=image_rows.shape[0],
        RT=text_rows.shape[0],
        B=image_offsets.shape[0] - 1,
        L=weights.shape[0],
        N=text_rows.shape[1] // head_dim,
        H=head_dim,
        F=hidden,
        C=image_rows.shape[1],
        polynomial=POLYNOMIAL,
        cluster=linear_choice.cluster(),
        scale=head_dim**-0.5,
        eps=eps,
    )


denoise_step.register_fake(lambda *_: None)
