"""The transformer as one call: what LensTransformer2DModel.denoise computes, launched by C++ from memory made before.

Of use where every kernel of a step is ours: an sm_90a device, bfloat16, heads of 64. A step launched op by op costs the
host some 450 calls of Python; this one costs a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens.ops import attention_backends, backend, checks, linear_backends
from lens.ops._attention_bound import known_bound
from lens.ops._attention_hopper import POLYNOMIAL
from lens.ops.linear_fused import plain

if TYPE_CHECKING:
    from lens.model import LensTransformer2DModel, Stream
    from lens.modulation import Modulation
    from lens.packing import Packing

OWN_ATTENTION = "lens-hopper"
ALIGNED = 16  # bytes


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
        scale=head_dim**-0.5,
        eps=eps,
    )


denoise_step.register_fake(lambda *_: None)


def why_not(model: LensTransformer2DModel, packing: Packing) -> str:
    """Why steps of this plan run op by op; "" where they are one call."""
    if linear_backends.idle():
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
        sum(i + t for i, t in lengths),
        plain=all(map(plain, layers)),
        alone=bool(model.batch_invariant),
    )
    by_library = [need.product for need in needs if linear_backends.choose(need) != "fused"]
    if by_library:
        return f"the library multiplies {', '.join(by_library)}"
    longest = max((i + t for i, t in lengths), default=0) if packing.places is None else packing.places.longest
    captured, head_dim = packing.places is not None, config.attention_head_dim
    need = attention_backends.need_of(model.device, model.dtype, head_dim, longest, device_lengths=captured)
    chosen = attention_backends.choose(need).name
    return "" if chosen == OWN_ATTENTION else f"attention is {chosen}'s"


class DenoiseStep:
    """One model and one plan of rows: pointer tables, workspace and the buffers its inputs are brought to.

    Holds addresses of the model's weights, good as long as they stay where they are, and bounds of the scores, good as
    long as the blocks' ``norms`` are what they were.
    """

    def __init__(self, model: LensTransformer2DModel, packing: Packing, eps: float):
        config, rows, texts = model.config, sum(packing.image_lengths), sum(packing.text_lengths)
        width, hidden, samples = config.inner_dim, config.mlp_hidden_dim, len(packing.image_lengths)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=model.device, dtype=model.dtype)

        blocks = [block.streams() for block in model.layers()]
        self.packing = packing
        self.hidden, self.eps = hidden, eps
        self.weights = torch.tensor([[_addresses(stream) for stream in streams] for streams in blocks], device="cpu")
        self.score_bounds = bounds(model)
        self.ends = [t for end in (model.image_in, model.image_out) for t in (end.weight, end.bias)]
        self.image_rows = empty(rows, config.in_channels)
        self.modulation = empty(samples, len(blocks), 2, 6, width)
        self.final_modulation = empty(samples, 2, width)
        self.table_rows = torch.zeros(samples, dtype=torch.int64, device=model.device)
        self.workspace = empty(rows + texts, 2 * width + max(3 * width, hidden))

    def tensors(self) -> list[Tensor]:
        return [self.image_rows, self.modulation, self.final_modulation, self.table_rows, self.workspace]

    def take(self, x: Tensor, table: Modulation, first: Tensor, index: Tensor) -> None:
        """Bring in latents x float32 [R, C], once per half, and the rows first + index of the modulation table."""
        self.image_rows.view(-1, *x.shape).copy_(x)
        torch.add(first, index, out=self.table_rows)
        torch.index_select(table.blocks, 0, self.table_rows, out=self.modulation)
        torch.index_select(table.final, 0, self.table_rows, out=self.final_modulation)

    def run(self, text_rows: Tensor, velocity: Tensor) -> None:
        """velocity [RI, C] of what was taken and text_rows [RT, D]."""
        p = self.packing
        places = p.cos, p.sin, p.image_offsets, p.text_offsets
        taken = self.image_rows, text_rows, self.modulation, self.final_modulation
        denoise_step(
            self.weights, self.score_bounds, self.ends, *taken, *places, self.workspace, velocity, self.hidden, self.eps
        )


def _addresses(stream: Stream) -> list[int]:
    """Of one stream's weights, in the order of StreamWeights in csrc/params.h."""
    tensors = (
        stream.norm1, stream.qkv.weight, stream.qkv.bias, stream.q_norm, stream.k_norm,
        stream.out.weight, stream.out.bias, stream.norm2, stream.w13.weight, stream.w2.weight,
    )  # fmt: skip
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNED:
            checks.refuse("denoise_step", f"weights must be dense and start on {ALIGNED} bytes, got {tensor.stride()}")
    return [tensor.data_ptr() for tensor in tensors]


def bounds(model: LensTransformer2DModel) -> Tensor:
    """Of every block, what no attention score exceeds, or inf: float64 [L] on the host."""
    scale = model.config.attention_head_dim**-0.5
    known = [known_bound(block.norms(), scale) for block in model.layers()]
    return torch.tensor([math.inf if k is None else k for k in known], dtype=torch.float64, device="cpu")
