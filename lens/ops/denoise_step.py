"""The transformer as one call: what LensTransformer2DModel.denoise computes, launched by C++ from memory made before.

Of use where every kernel of a step is ours: an sm_90a device, bfloat16, heads of 64. A step launched op by op costs the
host some 450 calls of Python; this one costs a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lens.ops import attention_backends, backend, linear_backends
from lens.ops._attention_hopper import POLYNOMIAL
from lens.ops.linear_fused import plain

if TYPE_CHECKING:
    from lens.model import LensTransformer2DModel
    from lens.packing import Packing

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
    ends: weight and bias of the first product, weight and bias of the last
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
        cluster=linear_backends.cluster(),
        scale=head_dim**-0.5,
        eps=eps,
    )


denoise_step.register_fake(lambda *_: None)


def why_not(model: LensTransformer2DModel, packing: Packing) -> str:
    """Why steps of this plan run op by op; "" where they are one call."""
    invariant = model.invariant
    if linear_backends.idle(alone=invariant and model.device.type == "cuda"):
        return "the library multiplies"  # nearly always, and said without a look at anything else
    if model.training:
        return "the model is in training"
    if why := backend.without("denoise_step"):
        return why
    config, lengths = model.config, list(zip(packing.image_lengths, packing.text_lengths))
    if config.in_channels % 64:
        return f"needs image tokens in multiples of 64 channels, got {config.in_channels}"
    layers = [model.image_in, model.image_out]
    layers += [layer for b in model.layers() for s in b.streams() for layer in (s.qkv, s.out, s.w13, s.w2)]
    needs = linear_backends.needs(
        config,
        model.device,
        model.dtype,
        0 if invariant else sum(i + t for i, t in lengths),
        plain=all(map(plain, layers)),
        alone=invariant,
    )
    by_library = [need.product for need in needs if linear_backends.choose(need) != "fused"]
    if by_library:
        return f"the library multiplies {', '.join(by_library)}"
    longest = max((i + t for i, t in lengths), default=0) if packing.places is None else packing.places.longest
    captured, head_dim = packing.places is not None, config.attention_head_dim
    need = attention_backends.need_of(model.device, model.dtype, head_dim, longest, captured, invariant=invariant)
    chosen = attention_backends.choose(need).name
    return "" if chosen == OWN_ATTENTION else f"attention is {chosen}'s"
