"""Pictures as a generator might draw them: true renders bent, blurred, shrunk, reconstructed, noisy, of another tone."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loop.keys import keyed
from ..networks.codec import LinearCodec


def bent(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every picture bent by a smooth random field of about one pixel in 64."""
    count, _, height, width = x.shape
    coarse = torch.randn(count, 2, max(4, height // 12), max(4, width // 12), generator=generator)
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    field = field * (0.9 * 2 / 64) * torch.rand(count, 1, 1, 1, generator=generator)
    ys, xs = torch.meshgrid(
        (torch.arange(height) + 0.5) * 2 / height - 1, (torch.arange(width) + 0.5) * 2 / width - 1, indexing="ij"
    )
    grid = torch.stack([xs, ys], -1)[None] + field.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def blurred(x: Tensor, sigma: float) -> Tensor:
    reach = max(1, round(2.5 * sigma))
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    line = (line / line.sum()).view(1, 1, -1, 1).repeat(3, 1, 1, 1)
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, line, groups=3), line.transpose(2, 3), groups=3)


def copies(x: Tensor, config: ModuleType, step: int, codec: LinearCodec | None) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> the same pictures, a share of them disturbed in each way of config.COPIES."""
    generator, count = keyed(config.SEED, "copies", step), len(x)
    scale = min(x.shape[2:]) / 64  # disturbances grow with the picture

    def some(name: str) -> Tensor:
        return torch.rand(count, generator=generator) < config.COPIES[name]

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    x = x.clone()
    if (pick := some("warp")).any():
        x[pick] = bent(x[pick], generator)
    if (pick := some("blur")).any():
        x[pick] = blurred(x[pick], draw(0.3, 1.1).item() * scale)
    if (pick := some("shrink")).any():
        factor = draw(0.5, 0.9).item()
        small = F.interpolate(x[pick], scale_factor=factor, mode="bilinear", antialias=True, align_corners=False)
        x[pick] = F.interpolate(small, x.shape[2:], mode="bilinear", align_corners=False)
    if (pick := some("reconstruct")).any() and codec is not None:
        z = codec.encode(x[pick])
        level = draw(0.0, 0.35, len(z), 1, 1, 1)
        x[pick] = codec.decode(z + level * torch.randn(z.shape, generator=generator)).clamp(-1, 1)
    if (pick := some("noise")).any():
        level = draw(0.0, 0.14, int(pick.sum()), 1, 1, 1)
        x[pick] = x[pick] + level * torch.randn(x[pick].shape, generator=generator)
    if (pick := some("tone")).any():
        n = int(pick.sum())
        x[pick] = x[pick] * draw(0.85, 1.1, n, 1, 1, 1) + draw(-0.08, 0.08, n, 3, 1, 1)
    return x.clamp(-1, 1)
