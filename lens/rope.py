"""4. Positions -> cos/sin of the three-axis rotary embedding (frame, row, column).

A head's channels are complex pairs (2i, 2i + 1), split over the axes (frame 4, row 14, column 14 pairs at the released
size). Pair k of an axis with d channels turns by position * 10000^(-2k/d). Tables are plain tensors made on demand,
never buffers of a module.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10_000.0


def image_positions(height: int, width: int) -> Tensor:
    """int64 [h*w, 3]: (0, row, column) of a grid in tokens, centred with the negative half first, row by row."""
    rows = torch.arange(height) - (height - height // 2)
    columns = torch.arange(width) - (width - width // 2)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    return torch.cat([torch.zeros(height * width, 1, dtype=torch.long), grid], dim=1)


def text_positions(index: Tensor, height: int, width: int) -> Tensor:
    """int64 [T, 3]: text token ``index[j]`` sits at max(h//2, w//2) + index[j] on all axes, after the picture."""
    return (index.long() + max(height // 2, width // 2))[:, None].expand(-1, 3)


def rope_table(
    positions: Tensor, axes_dims: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """positions [R, axes] -> cos, sin, each [R, H/2] in ``dtype`` (float32 as the reference; float64 for proofs)."""
    angles = []
    for axis, d in enumerate(axes_dims):
        frequency = 1.0 / THETA ** (torch.arange(0, d, 2, dtype=dtype, device=positions.device) / d)
        angles.append(positions[:, axis, None].to(dtype) * frequency)
    angle = torch.cat(angles, dim=1)
    return angle.cos(), angle.sin()


@lru_cache(maxsize=32)
def grid_table(grid: tuple[int, int], texts: int, axes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of a grid's image rows, then of ``texts`` text rows."""
    positions = torch.cat([image_positions(*grid), text_positions(torch.arange(texts), *grid)])
    cos, sin = rope_table(positions, axes)
    return cos.to(device), sin.to(device)
