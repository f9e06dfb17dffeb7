"""What one call of denoise_step reads and writes besides weights, made when a run starts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lens.ops import checks
from lens.ops.attention.hopper import known_bound
from lens.ops.denoise_step import denoise_step

if TYPE_CHECKING:
    from lens.model import LensTransformer2DModel, StreamWeights
    from lens.modulation import Modulation
    from lens.packing import Packing

ALIGNED = 16  # bytes


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
        layout = p.cos, p.sin, p.image_offsets, p.text_offsets
        taken = self.image_rows, text_rows, self.modulation, self.final_modulation
        denoise_step(
            self.weights, self.score_bounds, self.ends, *taken, *layout, self.workspace, velocity, self.hidden, self.eps
        )


def _addresses(stream: StreamWeights) -> list[int]:
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
