"""2. Buckets, aspect ratios, sizes. All sizes are (height, width) in pixels; one token covers 16 x 16 pixels."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from . import notices
from .arguments import shortened

TOKEN_PIXELS = 16  # the VAE's factor 8 times the 2x2 patch
MAX_SIDE = 65_536  # pixels: the tokens of one image must be countable in int32, with room for a batch

# (height, width) of the buckets from tall to square; the wide ones are their transposes. Aspect ratios are spoken of as
# "W:H". Bases 512, 768 and 1024 are the paper's 27 buckets, which Lens was trained on; 1440 is the released code's.
_TALL = ((1, 2), (9, 16), (2, 3), (3, 4), (1, 1))
_PORTRAIT = {
    512: ((704, 352), (672, 384), (640, 416), (608, 448), (512, 512)),
    768: ((1088, 544), (1024, 576), (960, 640), (896, 672), (768, 768)),
    1024: ((1472, 736), (1376, 768), (1248, 832), (1152, 864), (1024, 1024)),
    1440: ((2080, 1040), (1936, 1088), (1760, 1168), (1616, 1216), (1440, 1440)),
}
RELEASED_BASES = (512, 768, 1024, 1440)
MINI_BASES = (64, 96, 128)
TRAINED_BASE = 1024  # the largest of the training
TRAINED_PIXELS = max(height * width for height, width in _PORTRAIT[TRAINED_BASE])


def _round16(value: float) -> int:
    return max(TOKEN_PIXELS, int(value / TOKEN_PIXELS + 0.5) * TOKEN_PIXELS)


def parse_ratio(aspect_ratio: str) -> Fraction:
    """ "W:H" -> width / height. Anything from 1:2 to 2:1 is accepted; outside of that or not "W:H" raises."""
    try:
        w, h = aspect_ratio.split(":")
        ratio = Fraction(w.strip()) / Fraction(h.strip())
    except (ValueError, ZeroDivisionError, AttributeError):
        raise ValueError(f'aspect_ratio must be "W:H", such as "16:9", got {shortened(aspect_ratio)}') from None
    if not Fraction(1, 2) <= ratio <= 2:
        raise ValueError(f"aspect_ratio must lie between 1:2 and 2:1, got {shortened(aspect_ratio)}")
    return ratio


def bucket_size(base_resolution: int, aspect_ratio: str) -> tuple[int, int]:
    """(height, width) of a bucket: the table's where it has one (of any spelling: 2:4 is 1:2).

    Mini's bases and ratios between the table's nine: round16(base sqrt(H/W)), round16(base sqrt(W/H)).
    """
    if base_resolution not in RELEASED_BASES + MINI_BASES:
        raise ValueError(
            f"base_resolution must be one of {RELEASED_BASES} (released) or {MINI_BASES} (Mini), "
            f"got {shortened(base_resolution)}"
        )
    ratio = parse_ratio(aspect_ratio)
    for (w, h), (height, width) in zip(_TALL, _PORTRAIT.get(base_resolution, ())):
        if ratio == Fraction(w, h):
            return height, width
        if ratio == Fraction(h, w):
            return width, height
    return ratio_size(base_resolution, ratio)


def ratio_size(base_resolution: int, ratio: Fraction) -> tuple[int, int]:
    """(height, width) near base^2 pixels at width / height = ratio: round16(base / sqrt(ratio)), round16(base sqrt(ratio))."""
    stretch = math.sqrt(ratio)
    return _round16(base_resolution / stretch), _round16(base_resolution * stretch)


def _pixels(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        pixels = operator.index(value)  # numpy's integers too, never 64.0
    except TypeError:
        pixels = 0
    if pixels > MAX_SIDE:
        raise ValueError(
            f"{name} must be at most {MAX_SIDE} pixels, got {pixels if pixels < 10**18 else 'more than 10^18'}"
        )
    if pixels < TOKEN_PIXELS or pixels % TOKEN_PIXELS:
        below = pixels // TOKEN_PIXELS * TOKEN_PIXELS
        near = [n for n in (below, below + TOKEN_PIXELS) if TOKEN_PIXELS <= n <= MAX_SIDE] if pixels > 0 else []
        offer = f": {' or '.join(map(str, near))} is nearest" if near else ""
        raise ValueError(f"{name} must be a positive multiple of {TOKEN_PIXELS} pixels, got {shortened(value)}{offer}")
    return pixels


def check_size(height: int, width: int, max_resolution: int) -> tuple[int, int]:
    """Refuse sizes that tokens cannot tile; warn outside 1:2 to 2:1 and above the largest square shown to work; a note, as a
    warning too, from there down to the largest trained bucket. No Lens was trained between 1024^2 and 1440^2."""
    height, width = _pixels("height", height), _pixels("width", width)
    if not 0.5 <= height / width <= 2.0:
        notices.warn(f"height {height}, width {width} lies outside the trained aspect ratios 1:2 to 2:1")
    if height * width > max_resolution**2:
        notices.warn(
            f"height {height}, width {width} is larger than the largest size this model is shown to work at "
            f"({max_resolution} by {max_resolution}); composition may repeat or drift"
        )
    elif height * width > TRAINED_PIXELS:
        notices.warn(
            f"{height}x{width} is above {TRAINED_BASE}x{TRAINED_BASE}, the largest base Lens was trained at; it is shown to work "
            f"up to {max_resolution}x{max_resolution}"
        )
    return height, width


def request_grids(
    count: int,
    height: int | None,
    width: int | None,
    base: int | None,
    ratio: str | None,
    sizes: Sequence[tuple[int, int]] | None,
    default_base: int,
    max_resolution: int,
) -> list[tuple[int, int]]:
    """A call's size arguments -> one grid (height, width) in tokens per prompt. Half a pair, or two ways, raises."""
    for a, b, name in ((height, width, "height and width"), (base, ratio, "base_resolution and aspect_ratio")):
        if (a is None) != (b is None):
            raise ValueError(f"{name} must be given together")
    if sum(x is not None for x in (height, base, sizes)) > 1:
        raise ValueError("give only one of sizes, height and width, base_resolution and aspect_ratio")
    if sizes is not None:
        try:
            pairs = [(h, w) for h, w in sizes]
        except (TypeError, ValueError):
            pairs = []
        if len(pairs) != count:
            raise ValueError(f"sizes must be one (height, width) per prompt ({count}), got {shortened(sizes)}")
    elif base is not None and ratio is not None:
        pairs = [bucket_size(base, ratio)] * count
    elif height is not None and width is not None:
        pairs = [(height, width)] * count
    else:
        pairs = [(default_base, default_base)] * count
    pairs = [(_pixels("height", h), _pixels("width", w)) for h, w in pairs]
    grids: dict[tuple[int, int], tuple[int, int]] = {}
    for pair in pairs:  # one warning per size
        if pair not in grids:
            h, w = check_size(*pair, max_resolution)
            grids[pair] = h // TOKEN_PIXELS, w // TOKEN_PIXELS
    return [grids[pair] for pair in pairs]
