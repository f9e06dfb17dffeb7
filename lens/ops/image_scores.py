"""Clarity, entropy and luminance of an image in one pass over its pixels, for the data engine. On the CPU alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lens.ops import backend, checks, reference

SIDE = 512  # of the reduced image, its shorter one
MOST_REDUCED = 1 << 27  # pixels of the reduced image, whose squares must sum below 2^63


@dataclass(frozen=True)
class ImageScores:
    """clarity: variance of the Laplacian of grey levels 0 to 255; entropy in bits, 0 to 8; luminance in [0, 1]."""

    clarity: float
    entropy: float
    luminance: float


def reduced_size(height: int, width: int, side: int = SIDE) -> tuple[int, int]:
    """(h, w) with the shorter side at `side`, never enlarged; the longer side is rounded half up, at least 1."""
    short = min(height, width)
    if short <= side:
        return height, width
    return tuple(max(1, (2 * n * side + short) // (2 * short)) for n in (height, width))  # type: ignore[return-value]


def image_scores(pixels: Tensor, side: int = SIDE) -> ImageScores:
    """The three scores that need no model (arXiv 2605.21573, data filters; the reduction is ours: the paper gives none).

    pixels: uint8 [H, W, 3] on the CPU, R G B, at least 1 x 1
    side: the shorter side at which clarity is judged; a smaller image is judged as it is

    grey g = (9798 R + 19235 G + 3735 B + 2^14) >> 15 per pixel (Rec. 601, as OpenCV rounds it);
    clarity   = variance of the 3x3 Laplacian (0 1 0, 1 -4 1, 0 1 0) of g's area means over h x w boxes, in steps of 1/256,
                borders mirrored without their edge;
    entropy   = -sum p log2 p over the 256 greys of the full image, in bits;
    luminance = mean of max(R, G, B) / 255, the V of HSV.

    The sums behind them are integers, so kernel and specification agree to the last bit on every CPU.
    Raises ValueError for another rank, dtype, device or side, and for more than 2^27 pixels after the reduction.
    """
    op = "image_scores"
    checks.expect_rank(op, "pixels", pixels, "H, W, 3")
    if pixels.dtype != torch.uint8 or pixels.device.type != "cpu":
        checks.refuse(op, f"pixels must be uint8 on the CPU, got {pixels.dtype} on {pixels.device}")
    height, width, channels = pixels.shape
    if channels != 3 or height == 0 or width == 0:
        checks.refuse(op, f"pixels must be [H, W, 3] with at least one pixel, got {list(pixels.shape)}")
    if side < 1:
        checks.refuse(op, f"side must be at least 1, got {side}")
    h, w = reduced_size(height, width, side)
    if h * w > MOST_REDUCED:
        checks.refuse(op, f"pixels must have at most 2^27 pixels at side {side}, got {h} x {w}")
    if backend.choose(op, pixels) == "reference":
        return scores_of(reference.image_sums(pixels, h, w).tolist(), height * width, h * w)
    pixels = pixels.contiguous()
    sums = torch.empty(259, dtype=torch.int64)
    workspace = torch.empty(4 * width + 8, dtype=torch.int64)
    arrays = {"pixels": pixels, "sums": sums, "workspace": workspace}
    backend.launch(op, pixels, torch.float32, **arrays, H=height, W=width, h=h, w=w)
    return scores_of(sums.tolist(), height * width, h * w)


def scores_of(sums: list[int], pixels: int, reduced: int) -> ImageScores:
    """From the integer sums [histogram (256), value, L, L^2] of an image of so many pixels, so many once reduced."""
    *histogram, value, total, squares = sums
    clarity = (squares * reduced - total * total) / (reduced * reduced) / 65536  # the numerator is exact
    entropy = -math.fsum(n / pixels * math.log2(n / pixels) for n in histogram if n)
    return ImageScores(clarity, max(0.0, entropy), value / (255 * pixels))
