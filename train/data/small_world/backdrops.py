"""What is behind the objects of the small world: twelve backdrops in numpy, photographs, contact shadows, and the rules of
contrast: from a drawn backdrop's colours, and from the pixels of a photograph around an outline."""

from __future__ import annotations

import functools
import random

import numpy as np

from .photographs import PLACES, photograph
from .sprites import lab, surface_lab

MIN_CONTRAST = 28.0
FAINT = 0.1  # share of the pixels around an outline that may have less where a photograph is behind
VARIANTS = 8  # horizon heights, tile phases, star fields per background
PLAIN = {"grey": (164, 166, 174), "pink": (246, 170, 182), "mint": (150, 216, 182), "lavender": (186, 172, 234)}
# Colours a background may put behind an object, for the contrast rule.
BEHIND = {
    **{name: (rgb,) for name, rgb in PLAIN.items()},
    "meadow": ((128, 188, 248), (128, 200, 84)),
    "table": ((250, 238, 216), (172, 120, 72)),
    "checker": ((240, 240, 246), (206, 218, 234)),
    "night": ((24, 22, 66),),
    "beach": ((168, 220, 246), (64, 158, 196), (240, 216, 160)),
    "sunset": ((150, 96, 156), (240, 138, 112), (252, 200, 128)),
    "brick": ((172, 92, 74),),
    "snow": ((176, 204, 232), (234, 240, 248)),
}
BACKGROUNDS = tuple(BEHIND)
SHARES = tuple(0.5 if name in ("beach", "sunset", "brick", "snow") else 1.0 for name in BACKGROUNDS)
PATTERNED = ("checker", "brick")  # seams that no sign is put over


def contrast(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """How far Lab colours [..., 3] are apart to the eye: distance [...], with hue counting less where both are dark."""
    hue = np.minimum(1.0, np.maximum(one[..., 0], two[..., 0]) / 50)
    return np.hypot(one[..., 0] - two[..., 0], hue * np.linalg.norm(one[..., 1:] - two[..., 1:], axis=-1))


def standing_out(own: np.ndarray) -> tuple[str, ...]:
    """Backgrounds a surface of that Lab colour stands out from."""
    return tuple(
        name
        for name, behind in BEHIND.items()
        if min(contrast(own, lab(np.array(rgb))) for rgb in behind) >= MIN_CONTRAST
    )


@functools.cache
def allowed(kind: str, colour: str | None) -> tuple[str, ...]:
    """Backgrounds this object stands out from."""
    return standing_out(np.array(surface_lab(kind, colour)))


def stands_out(own: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether a surface of that Lab colour stands out from all but FAINT of the pixels [n, 3] around it (0 to 255)."""
    return bool((contrast(own, lab(pixels)) < MIN_CONTRAST).mean() <= FAINT)


def around(picture: np.ndarray, box: tuple[int, int, int, int], shape: np.ndarray) -> np.ndarray:
    """Pixels [n, 3] of a picture [H, W, 3] where `shape` is: bool, centred on the box and larger; what leaves the frame is cut."""
    height, width = picture.shape[:2]
    rim = (shape.shape[0] - (box[3] - box[1])) // 2
    top, left = box[1] - rim, box[0] - rim
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(height, top + shape.shape[0]), min(width, left + shape.shape[1])
    return picture[y0:y1, x0:x1][shape[y0 - top : y1 - top, x0 - left : x1 - left]]


def _gradient(height: int, width: int, top: tuple[int, ...], bottom: tuple[int, ...]) -> np.ndarray:
    blend = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    rows = np.array(top, np.float32) * (1 - blend) + np.array(bottom, np.float32) * blend
    return np.broadcast_to(rows, (height, width, 3)).copy()


def _sprinkle(out: np.ndarray, rng: random.Random, count: int, rgb: tuple[int, ...], least: float) -> None:
    """Single pixels blended towards a colour: stars, snowflakes."""
    height, width = out.shape[:2]
    for _ in range(count):
        y, x = rng.randrange(height), rng.randrange(width)
        out[y, x] += (np.array(rgb, np.float32) - out[y, x]) * rng.uniform(least, 0.95)


def _bricks(height: int, width: int, phase: int) -> np.ndarray:
    course = max(5, round(min(height, width) / 9))
    joint = max(1, course // 8)
    rows, cols = np.arange(height)[:, None] + phase * course // 4, np.arange(width)[None]
    shifted = cols + (rows // course % 2) * course + phase * 3
    mortar = (rows % course < joint) | (shifted % (2 * course) < joint)
    # neighbouring bricks differ a little: a hash of their row and column, the same for every picture of that size
    tone = ((rows // course * 7 + shifted // (2 * course) * 13) % 5 - 2).astype(np.float32)[..., None] * 2.5
    wall = np.array((172, 92, 74), np.float32) + tone
    return np.where(mortar[..., None], np.array((190, 122, 104), np.float32), wall).astype(np.float32)


def backdrop(name: str, variant: int, height: int, width: int) -> np.ndarray:
    """float32 [H, W, 3] in [0, 255]: one of BACKGROUNDS, or one of PLACES with a view for its variant."""
    if name in PLACES:
        return photograph(name, variant, height, width).astype(np.float32)
    return _drawn(name, variant, height, width)


@functools.cache
def _drawn(name: str, variant: int, height: int, width: int) -> np.ndarray:
    rng = random.Random(f"backdrop {name} {variant} {height} {width}")
    if name in PLAIN:
        base = PLAIN[name]
        return _gradient(height, width, tuple(min(255, c + 6) for c in base), tuple(c - 6 for c in base))
    if name == "checker":
        tile = max(4, round(min(height, width) / 8))
        phase = variant % 2
        rows, cols = np.arange(height)[:, None] // tile, np.arange(width)[None] // tile
        odd = ((rows + cols + phase) % 2)[..., None].astype(np.float32)
        first, second = (np.array(c, np.float32) for c in BEHIND[name])
        return first * (1 - odd) + second * odd
    if name == "brick":
        return _bricks(height, width, variant)
    if name == "night":
        out = _gradient(height, width, (12, 14, 48), (42, 34, 92))
        _sprinkle(out, rng, round(height * width / 150), (255, 255, 235), 0.35)
        return out
    horizon = round(height * (0.60 + 0.14 * variant / (VARIANTS - 1)))
    if name == "meadow":
        sky = _gradient(horizon, width, (88, 164, 246), (160, 208, 250))
        return np.concatenate([sky, _gradient(height - horizon, width, (138, 206, 92), (104, 184, 70))])
    if name == "table":
        wall = _gradient(horizon, width, (252, 242, 222), (246, 232, 206))
        board = _gradient(height - horizon, width, (184, 132, 82), (158, 108, 62))
        for y in range(0, height - horizon, max(3, round(height / 11))):
            board[y : y + max(1, height // 96)] *= 0.8
        return np.concatenate([wall, board])
    if name == "snow":
        sky = _gradient(horizon, width, (160, 192, 226), (198, 218, 238))
        out = np.concatenate([sky, _gradient(height - horizon, width, (240, 244, 250), (224, 232, 244))])
        _sprinkle(out[:horizon], rng, round(horizon * width / 110), (255, 255, 255), 0.6)
        return out
    if name == "beach":
        shore = horizon + max(1, round(height * 0.08))
        waterline = round(height * 0.42)
        sky = _gradient(waterline, width, (140, 206, 246), (200, 232, 248))
        sea = _gradient(shore - waterline, width, (48, 140, 186), (96, 186, 210))
        sea[-max(1, height // 48) :] = (236, 246, 248)  # the foam of the last wave
        return np.concatenate([sky, sea, _gradient(height - shore, width, (244, 222, 168), (234, 206, 146))])
    if name == "sunset":
        middle = round(height * 0.55)
        upper = _gradient(middle, width, (128, 84, 158), (240, 130, 112))
        return np.concatenate([upper, _gradient(height - middle, width, (242, 138, 110), (254, 214, 132))])
    raise ValueError(f"backdrop: unknown background {name!r}, expected one of {BACKGROUNDS + PLACES}")


@functools.cache
def shadow(width: int) -> np.ndarray:
    """Soft contact shadow under an object of that width: float32 keep-factor [h, w, 1]."""
    w, h = max(3, round(width * 1.0)), max(2, round(width * 0.16))
    y = (np.arange(h) + 0.5 - h / 2)[:, None] / (h / 2)
    x = (np.arange(w) + 0.5 - w / 2)[None] / (w / 2)
    return (1 - 0.38 * np.clip(1 - (x * x + y * y), 0, 1) ** 0.8).astype(np.float32)[..., None]
