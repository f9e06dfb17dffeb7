"""The discriminator's heads: small convolutions over the token grid, on image streams of a frozen MMDiT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..loop.keys import keyed

KERNEL, STRIDE, GROUPS, SLOPE = 4, 2, 8, 0.2


class Heads(nn.Module):
    """One head a tap: 4x4 convolution of stride 2 (D -> width), GroupNorm, LeakyReLU, 1x1 convolution, mean over space.

    Fully convolutional: any token grid of at least 2 x 2 serves. float32; weights follow from the seed alone.
    Errors: ValueError for a width that is no multiple of GROUPS.
    """

    def __init__(self, taps: int, inside: int, width: int, seed: int):
        if width % GROUPS:
            raise ValueError(f"HEAD_WIDTH: expected a multiple of {GROUPS}, got {width}")
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed(seed, "heads").initial_seed())
            self.heads = nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(inside, width, KERNEL, STRIDE, 1),
                    nn.GroupNorm(GROUPS, width),
                    nn.LeakyReLU(SLOPE),
                    nn.Conv2d(width, 1, 1),
                )
                for _ in range(taps)
            )

    def forward(self, streams: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Image rows [B I, D] behind each tap, the grid (h, w) of I = h w tokens -> logits float32 [B, taps]."""
        found = []
        for head, rows in zip(self.heads, streams, strict=True):
            x = rows.float().unflatten(0, (-1, *grid)).permute(0, 3, 1, 2)
            found.append(head(x).mean((1, 2, 3)))
        return torch.stack(found, 1)
