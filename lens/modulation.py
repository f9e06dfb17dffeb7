"""5. Shift, scale and gate of every step of a schedule as one table; eviction of the weights that make it.

A third of the released model (1.36 of 4.10 billion parameters) depends on the timestep alone. A schedule of K steps
needs K rows of [L blocks, 2 streams, 6, D], computed once; the weights may then leave the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINUSOID_CHANNELS = 256


def sinusoid(timestep: Tensor) -> Tensor:
    """timestep [K] in [0, 1] -> float32 [K, 256]: cos then sin of 1000 t exp(-ln(1e4) i / 128)."""
    half = SINUSOID_CHANNELS // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angle = 1000.0 * timestep.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


@dataclass(frozen=True, eq=False)
class Modulation:
    """Rows of B samples or K steps: ``blocks`` [B, L, 2 (image, text), 6, D], ``final`` [B, 2 (scale, shift), D].

    The six of a block and stream, in the order of the projection's output: shift1, scale1, gate1, shift2, scale2, gate2.
    """

    blocks: Tensor
    final: Tensor

    def rows(self, index: Tensor) -> Modulation:
        """The table's rows ``index`` (int64 [B]): one step for each sample of a batch."""
        return Modulation(self.blocks[index], self.final[index])


def concatenate(parts: Sequence[Modulation]) -> Modulation:
    """The rows of several tables, one after another."""
    if len(parts) == 1:
        return parts[0]
    return Modulation(torch.cat([p.blocks for p in parts]), torch.cat([p.final for p in parts]))


class TimeEmbedding(nn.Module):
    """temb = linear_2(SiLU(linear_1(sinusoid(t)))), timestep [K] -> [K, D] in the weights' dtype."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_CHANNELS, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid(timestep).to(self.linear_1.weight.dtype))))
