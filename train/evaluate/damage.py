"""Pictures damaged on purpose, as a young model damages them: what the shape judge must refuse, and the more the worse.

    damaged(picture, canvas, boxes, "torn", 1.0, seed=0)

`amount` 0 leaves the picture as it is, 1 is what a person sees at a glance.

    torn       every outline is pulled about by up to a tenth of the object, as if the paper had been torn
    lattice    blocks of 8 pixels, the codec's, are moved out of their places
    holes      the backdrop shows through patches of the object
    speckle    patches of other colours on the object
    halo       patches of the object's own colour around it
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..data.small_world.kinds import PALETTE
from .surroundings import Box, within

BLOCK = 8  # pixels: a latent's
SEEN = 20.0  # of 255: what differs from the backdrop by more belongs to the object


def _noise(rng: np.random.Generator, height: int, width: int, grain: float) -> np.ndarray:
    """Smooth noise [height, width] of unit variance or so, its grains about `grain` pixels wide."""
    rows, columns = max(2, round(height / grain) + 1), max(2, round(width / grain) + 1)
    coarse = Image.fromarray(rng.normal(size=(rows, columns)).astype(np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _patches(rng: np.random.Generator, where: np.ndarray, share: float, grain: float) -> np.ndarray:
    """bool: patches that cover that share of `where`."""
    height, width = where.shape
    noise = _noise(rng, height, width, grain)
    if share <= 0 or not where.any():
        return np.zeros_like(where)
    return where & (noise >= np.quantile(noise[where], max(0.0, 1 - share)))


def damaged(
    picture: np.ndarray, canvas: np.ndarray, boxes: Sequence[Box], how: str, amount: float, seed: int = 0
) -> np.ndarray:
    """Picture uint8 [H, W, 3], what is behind its objects float32 [H, W, 3], their boxes -> uint8. Errors: ValueError."""
    if how not in DAMAGES:
        raise ValueError(f"damaged: {how!r}, expected one of {', '.join(DAMAGES)}")
    out, rng = picture.astype(np.float32), np.random.default_rng(seed)
    for box in boxes:
        size = max(box[2] - box[0], box[3] - box[1])
        at = within(box, size / 8, *picture.shape[:2])
        part, behind = out[at], canvas[at]
        DAMAGES[how](part, behind, np.abs(part - behind).mean(-1) > SEEN, size, amount, rng)
    return np.clip(out + 0.5, 0, 255).astype(np.uint8)


# Each changes `part` [h, w, 3], the object's surroundings, in place; `silhouette` [h, w], `size` its longer side in pixels.


def _torn(
    part: np.ndarray, behind: np.ndarray, silhouette: np.ndarray, size: float, amount: float, rng: np.random.Generator
) -> None:
    h, w = silhouette.shape
    moved = [i + 0.055 * size * amount * _noise(rng, h, w, size / 7) for i in np.mgrid[:h, :w]]
    rows, columns = (np.clip(np.round(m), 0, n - 1).astype(int) for m, n in zip(moved, (h, w)))
    part[...] = part[rows, columns]


def _lattice(
    part: np.ndarray, behind: np.ndarray, silhouette: np.ndarray, size: float, amount: float, rng: np.random.Generator
) -> None:
    h, w = silhouette.shape
    shape = 2, -(-h // BLOCK), -(-w // BLOCK)
    moved = np.round(rng.uniform(-4, 4, shape) * amount).astype(int).repeat(BLOCK, 1).repeat(BLOCK, 2)[:, :h, :w]
    rows, columns = (np.clip(i + m, 0, n - 1) for i, m, n in zip(np.mgrid[:h, :w], moved, (h, w)))
    part[...] = part[rows, columns]


def _holes(
    part: np.ndarray, behind: np.ndarray, silhouette: np.ndarray, size: float, amount: float, rng: np.random.Generator
) -> None:
    empty = _patches(rng, silhouette, 0.2 * amount, size / 6)
    part[empty] = behind[empty]


def _speckle(
    part: np.ndarray, behind: np.ndarray, silhouette: np.ndarray, size: float, amount: float, rng: np.random.Generator
) -> None:
    for colour in rng.permutation(list(PALETTE.values()))[:4]:
        part[_patches(rng, silhouette, 0.06 * amount, size / 10)] = colour


def _halo(
    part: np.ndarray, behind: np.ndarray, silhouette: np.ndarray, size: float, amount: float, rng: np.random.Generator
) -> None:
    if silhouette.any():
        colour = np.median(part[silhouette], 0)
        around = _patches(rng, ~silhouette, 0.3 * amount, size / 6)
        part[around] += 0.8 * (colour - part[around])


DAMAGES = {"torn": _torn, "lattice": _lattice, "holes": _holes, "speckle": _speckle, "halo": _halo}
