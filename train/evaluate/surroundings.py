"""What would be behind the objects of a picture: the world's backdrop or photograph that fits, else the surroundings filled in."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..data.small_world.backdrops import BACKGROUNDS, VARIANTS, backdrop
from ..data.small_world.photographs import PLACES, VIEWS

Box = tuple[float, float, float, float]
UNKNOWN = 40.0  # of 255, root mean square beyond which no drawn backdrop of the world fits
PHOTOGRAPH = 32.0  # the same of a photograph, whose rows are not even: it must be that very one
CAP = 60.0  # of 255: stars and flakes sit elsewhere in every picture, so a pixel's error counts up to this much
EVEN = 20.0  # of 255: pixels of a row that is off as a whole differ from one another by less
SAMPLES = 1500  # pixels outside the objects that a backdrop is chosen by
REACH = 0.1  # a shadow or halo reaches this share of the longer side beyond an object's box


def within(box: Box, beyond: float, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a box grown by `beyond` pixels on each side, inside the frame."""
    x0, y0, x1, y1 = box
    rows = slice(max(0, math.floor(y0 - beyond)), max(0, min(height, math.ceil(y1 + beyond))))
    return rows, slice(max(0, math.floor(x0 - beyond)), max(0, min(width, math.ceil(x1 + beyond))))


@functools.lru_cache(maxsize=4)
def _backdrops(height: int, width: int) -> tuple[list[tuple[str, int]], np.ndarray]:
    """Every backdrop and variant, and their pixels float32 [H W, 3, n]: those of one place lie together."""
    pairs = [(name, variant) for name in BACKGROUNDS for variant in range(VARIANTS)]
    pairs += [(place, view) for place in PLACES for view in range(VIEWS)]
    stack = np.empty((height * width, 3, len(pairs)), np.float32)
    for i, pair in enumerate(pairs):
        stack[..., i] = backdrop(*pair, height, width).reshape(-1, 3)
    return pairs, stack


def surroundings(picture: np.ndarray, boxes: Sequence[Box]) -> tuple[str | None, np.ndarray]:
    """float32 [H, W, 3] and the boxes of what stands in it -> the backdrop's name (None: unknown) and its pixels.

    The backdrop that fits the pixels outside the boxes best is moved, row by row, by the median of what is left there: a
    horizon one row higher or a sky a shade darker is no fault of the objects. Where none fits, see `filled`.
    """
    height, width = picture.shape[:2]
    outside = np.ones((height, width), bool)
    for box in boxes:
        outside[within(box, REACH * max(box[2] - box[0], box[3] - box[1]), height, width)] = False
    outside[[0, -1]] = outside[:, [0, -1]] = True  # nothing in the world touches the frame
    places = np.flatnonzero(outside)
    places = places[:: max(1, len(places) // SAMPLES)]
    pairs, stack = _backdrops(height, width)
    apart = stack[places]
    apart -= picture.reshape(-1, 3)[places][..., None]
    apart *= apart
    mean = np.minimum(apart.mean(1), CAP**2).mean(0)
    best = int(mean.argmin())
    if mean[best] > (PHOTOGRAPH if pairs[best][0] in PLACES else UNKNOWN) ** 2:
        return None, filled(picture, outside)
    canvas = stack[..., best].reshape(picture.shape)
    return pairs[best][0], canvas + _moved(picture - canvas, outside, max(4, width // 10))[:, None]


def _moved(left: np.ndarray, known: np.ndarray, least: int) -> np.ndarray:
    """By how much each row of a backdrop lies off, float32 [H, 3], from what is left [H, W, 3] where `known` [H, W], outside the
    known objects; 0 where fewer than `least` pixels tell.

    A row that is off as a whole, of whose pixels four in five lie close to their median, is moved by any amount; else something
    stands in it that nobody told of, and only pixels near the backdrop tell.
    """
    rows, count = np.arange(len(left)), known.sum(1)
    middle = _sorted(left, known)
    middle = (
        middle[rows, np.maximum(count - 1, 0) // 2] + middle[rows, np.minimum(count // 2, known.shape[1] - 1)]
    ) / 2
    off = _sorted(np.abs(left - middle[:, None]).mean(-1), known)
    four_fifths = 0.8 * np.maximum(count - 1, 0)
    below, above = np.floor(four_fifths).astype(int), np.ceil(four_fifths).astype(int)
    spread = off[rows, below] + (off[rows, above] - off[rows, below]) * (four_fifths - below)
    even = spread <= EVEN
    moved = np.where((even & (count >= least))[:, None], middle, np.float32(0))
    for row in np.flatnonzero(~even & (count >= least)):
        own = left[row][known[row]]
        near = own[np.abs(own).mean(-1) <= EVEN]
        if len(near) >= least:
            moved[row] = np.median(near, 0)
    return moved


def _sorted(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """[H, W, ...] along rows, those that are not known behind all others."""
    shown = known.reshape(known.shape + (1,) * (values.ndim - 2))
    return np.sort(np.where(shown, values, np.inf), axis=1)


def filled(picture: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Pixels [H, W, 3] where `known` [H, W] is false are filled in from coarser and coarser means of those around them."""
    if known.all() or min(known.shape) == 1:
        return picture
    height, width = known.shape
    more = (0, height % 2), (0, width % 2)
    count = np.pad(known, more).reshape((height + 1) // 2, 2, -1, 2).sum((1, 3))
    sums = np.pad(np.where(known[..., None], picture, 0), (*more, (0, 0)))
    sums = sums.reshape((height + 1) // 2, 2, -1, 2, 3).sum((1, 3))
    coarse = filled((sums / np.maximum(count, 1)[..., None]).astype(np.float32), count > 0)
    planes = [Image.fromarray(np.ascontiguousarray(coarse[..., c])) for c in range(3)]
    fine = np.stack([np.asarray(p.resize((width, height), Image.Resampling.BILINEAR)) for p in planes], -1)
    return np.where(known[..., None], picture, fine)
