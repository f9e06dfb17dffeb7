"""Sizes a suite runs at: the released model's, or a small stand-in of the same structure for a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lens.config import LensConfig

from ..case import DTYPES

Grid = tuple[int, int]


@dataclass(frozen=True)
class Scale:
    """sizes: side in pixels -> grid in tokens of 16 x 16; texts: tokens of a prompt, longest last."""

    prefix: str
    config: LensConfig
    dtype_name: str
    sizes: dict[int, Grid]
    main: int  # the size of the headline
    large: int
    texts: tuple[int, ...]
    train: tuple[tuple[int, int], ...]  # (size, batch)
    steps: dict[str, int]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def tiny(self) -> bool:
        return bool(self.prefix)

    def tokens(self, size: int) -> int:
        """Image tokens of a square picture."""
        return self.sizes[size][0] * self.sizes[size][1]


RELEASED = Scale(
    prefix="",
    config=LensConfig(),
    dtype_name="bf16",
    sizes={size: (size // 16, size // 16) for size in (512, 768, 1024, 1440)},
    main=1024,
    large=1440,
    texts=(64, 200, 415),
    train=((512, 24), (1024, 6)),
    steps={"lens": 20, "turbo": 4},
)
TINY = Scale(
    prefix="tiny/",
    config=LensConfig.tiny(),
    dtype_name="fp32",
    sizes={64: (4, 4), 96: (6, 6)},
    main=64,
    large=96,
    texts=(5, 12),
    train=((64, 2),),
    steps={"lens": 3, "turbo": 2},
)
