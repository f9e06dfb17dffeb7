"""2. Buckets, aspect ratios, sizes. All sizes are (height, width) in pixels; one token covers 16 x 16 pixels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

TOKEN_PIXELS = 16  # the VAE's factor 8 times the 2x2 patch

# (height, width) of the released buckets; aspect ratios are spoken of as "W:H". Other bases follow the formula of bucket_size.
_RATIOS = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")
_PORTRAIT = {
    1024: ((1472, 736), (1376, 768), (1248, 832), (1152, 864), (1024, 1024)),
    1440: ((2080, 1040), (1936, 1088), (1760, 1168), (1616, 1216), (1440, 1440)),
}
RELEASED_BASES = (512, 768, 1024, 1440)
MINI_BASES = (64, 96, 128)


def _round16(value: float) -> int:
    return max(TOKEN_PIXELS, int(value / TOKEN_PIXELS + 0.5) * TOKEN_PIXELS)


def parse_ratio(aspect_ratio: str) -> float:
    """ "W:H" -> height / width. Anything from 1:2 to 2:1 is accepted; outside of that or not "W:H" raises."""
    try:
        w, h = (float(part) for part in aspect_ratio.split(":"))
        ratio = h / w
    except (ValueError, ZeroDivisionError, AttributeError):
        raise ValueError(f'aspect_ratio must be "W:H", such as "16:9", got {aspect_ratio!r}') from None
    if not (math.isfinite(ratio) and 0.5 <= ratio <= 2.0):
        raise ValueError(f"aspect_ratio must lie between 1:2 and 2:1, got {aspect_ratio!r}")
    return ratio


def bucket_size(base_resolution: int, aspect_ratio: str) -> tuple[int, int]:
    """(height, width) of a bucket: the released table where it has one, else round16(base sqrt(H/W)), round16(base sqrt(W/H))."""
    if base_resolution not in RELEASED_BASES + MINI_BASES:
        raise ValueError(
            f"base_resolution must be one of {RELEASED_BASES} (released) or {MINI_BASES} (Mini), got {base_resolution!r}"
        )
    ratio = parse_ratio(aspect_ratio)
    if base_resolution in _PORTRAIT and aspect_ratio in _RATIOS:
        index = _RATIOS.index(aspect_ratio)
        if index <= 4:
            return _PORTRAIT[base_resolution][index]
        height, width = _PORTRAIT[base_resolution][8 - index]
        return width, height
    return _round16(base_resolution * math.sqrt(ratio)), _round16(base_resolution / math.sqrt(ratio))


def check_size(height: int, width: int, max_trained: int) -> tuple[int, int]:
    """Refuse sizes that tokens cannot tile; warn outside 1:2 to 2:1 and above the largest trained base squared."""
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or isinstance(value, bool) or value < TOKEN_PIXELS or value % TOKEN_PIXELS:
            raise ValueError(f"{name} must be a positive multiple of {TOKEN_PIXELS} pixels, got {value!r}")
    if not 0.5 <= height / width <= 2.0:
        warnings.warn(f"{height}x{width} lies outside the trained aspect ratios 1:2 to 2:1", stacklevel=3)
    if height * width > max_trained**2:
        warnings.warn(
            f"{height}x{width} is larger than the largest size this model was trained at ({max_trained}x{max_trained}); "
            "composition may repeat or drift",
            stacklevel=3,
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
    max_trained: int,
) -> list[tuple[int, int]]:
    """A call's size arguments -> one grid (height, width) in tokens per prompt. Half a pair or two ways at once raise."""
    for a, b, name in ((height, width, "height and width"), (base, ratio, "base_resolution and aspect_ratio")):
        if (a is None) != (b is None):
            raise ValueError(f"{name} must be given together")
    if sum(x is not None for x in (height, base, sizes)) > 1:
        raise ValueError("give only one of sizes, height and width, base_resolution and aspect_ratio")
    if sizes is not None:
        pairs = [tuple(s) for s in sizes]
        if len(pairs) != count or any(len(p) != 2 for p in pairs):
            raise ValueError(f"sizes must be one (height, width) per prompt ({count}), got {sizes!r}")
    elif base is not None and ratio is not None:
        pairs = [bucket_size(base, ratio)] * count
    elif height is not None and width is not None:
        pairs = [(height, width)] * count
    else:
        pairs = [(default_base, default_base)] * count
    checked = [check_size(h, w, max_trained) for h, w in pairs]
    return [(h // TOKEN_PIXELS, w // TOKEN_PIXELS) for h, w in checked]
