"""Classes and colours of the small world: vendored emoji, recoloured as whole objects, pre-scaled for numpy.

Recolouring keeps an asset's shading and replaces its paint. With luminance l of a pixel, the median m of l over the
painted part and a palette colour c: `c * (l/m)^0.85` where l <= m, a blend of c towards white where l > m. Parts that
are not paint (tyres, windows, leaves, pages, handles) are left alone by a soft hue mask.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .kinds import KINDS, PAINTABLE, PALETTE, Kind

ASSETS = Path(__file__).parent / "assets" / "emoji"

__all__ = [
    "KINDS",
    "PAINTABLE",
    "PALETTE",
    "Kind",
    "Sprite",
    "artwork",
    "colours_of",
    "fitted_size",
    "lab",
    "outline",
    "recolour",
    "ring",
    "sprite",
    "surface_lab",
]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def colours_of(kind: str) -> tuple[str | None, ...]:
    """Every colour the class is drawn in; for classes never recoloured the one true word (or None)."""
    return tuple(PALETTE) if KINDS[kind].paint is not None else (KINDS[kind].natural,)


def _hue_saturation(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    high, low = rgb.max(-1), rgb.min(-1)
    span = np.maximum(high - low, 1e-6)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(high == r, ((g - b) / span) % 6, np.where(high == g, (b - r) / span + 2, (r - g) / span + 4)) / 6
    return hue, (high - low) / np.maximum(high, 1e-6)


def recolour(rgba: np.ndarray, kind: Kind, colour: str) -> np.ndarray:
    """float32 RGBA [h, w, 4] in [0, 1] -> the same asset painted in a palette colour."""
    rgb, alpha = rgba[..., :3], rgba[..., 3]
    luminance = rgb @ LUMA
    if kind.paint == "all":
        weight = np.ones_like(alpha)
    else:
        assert kind.paint is not None, f"{kind.name} is never recoloured"
        hue, saturation = _hue_saturation(rgb)
        distance = np.abs((hue - float(kind.paint) + 0.5) % 1.0 - 0.5)
        weight = np.clip((0.16 - distance) / 0.04, 0, 1) * np.clip((saturation - 0.18) / 0.2, 0, 1)
    painted = (weight > 0.5) & (alpha > 0.5)
    middle = float(np.median(luminance[painted]))
    ratio = luminance / middle
    target = np.array(PALETTE[colour], np.float32) / 255
    top = max(float(np.quantile(ratio[painted], 0.99)), 1.1)
    glow = np.clip((ratio - 1) / (top - 1), 0, 1)[..., None] * (0.35 if colour == "black" else 0.5)
    dark = target * np.minimum(ratio, 1)[..., None] ** 0.85
    if colour == "black":  # keep form visible: shade less
        dark = target * np.minimum(ratio, 1)[..., None] ** 0.4
    new = dark + (1 - dark) * glow
    out = rgba.copy()
    out[..., :3] = rgb + (new - rgb) * weight[..., None]
    return out


@functools.cache
def artwork(kind: str, colour: str | None) -> np.ndarray:
    """float32 RGBA [h, w, 4] in [0, 1], trimmed, longer side 96. Errors: unknown class or colour (KeyError)."""
    with Image.open(ASSETS / f"{kind}.webp") as image:
        rgba = np.asarray(image.convert("RGBA"), np.float32) / 255
    if KINDS[kind].paint is None:
        return rgba
    return recolour(rgba, KINDS[kind], str(colour))


@dataclass(frozen=True)
class Sprite:
    """`colour` float32 [h, w, 3] premultiplied in [0, 255], `keep` = 1 - alpha float32 [h, w, 1]."""

    colour: np.ndarray
    keep: np.ndarray


def fitted_size(kind: str, width: float, height: float) -> tuple[int, int]:
    """Largest (w, h) in whole pixels with the asset's aspect ratio that fits into width x height."""
    h, w = artwork(kind, KINDS[kind].natural or "red").shape[:2]
    scale = min(width / w, height / h)
    return max(1, int(w * scale + 1e-6)), max(1, int(h * scale + 1e-6))


@functools.lru_cache(maxsize=8192)  # every class in every colour and size would be gigabytes at 128 pixels
def sprite(kind: str, colour: str | None, width: int, height: int) -> Sprite:
    """`scaled`, of which those drawn last are kept."""
    return scaled(kind, colour, width, height)


@functools.lru_cache(maxsize=512)  # every painted class in every colour, with room for the others
def _planes(kind: str, colour: str | None) -> tuple[Image.Image, ...]:
    """Premultiplied red, green and blue and alpha of the artwork, as Pillow resizes them: one by one."""
    rgba = artwork(kind, colour)
    premultiplied = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)
    return tuple(Image.fromarray(np.ascontiguousarray(premultiplied[..., c])) for c in range(4))


def scaled(kind: str, colour: str | None, width: int, height: int) -> Sprite:
    """The artwork at a size in whole pixels."""
    planes = _planes(kind, colour)
    how = Image.Resampling.BOX if width >= planes[0].width else Image.Resampling.HAMMING
    stack = np.stack([np.asarray(plane.resize((width, height), how)) for plane in planes], -1)
    np.clip(stack, 0, 1, out=stack)
    return Sprite(stack[..., :3] * 255, 1 - stack[..., 3:])


@functools.lru_cache(maxsize=8192)
def outline(kind: str, width: int, height: int) -> np.ndarray:
    """bool [h + 2 r, w + 2 r]: the ring of r pixels around the object drawn at w x h, r a twentieth of its longer side."""
    rim = max(2, round(max(width, height) / 20))
    solid = np.pad(sprite(kind, colours_of(kind)[0], width, height).keep[..., 0] < 0.5, rim)
    return ring(solid, rim)


def ring(solid: np.ndarray, rim: int) -> np.ndarray:
    """Pixels of bool [H, W] that are not solid and at most `rim` steps to the side, up or down away from what is."""
    grown = solid.copy()
    for _ in range(rim):
        padded = np.pad(grown, 1)
        grown = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown & ~solid


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 255], [..., 3] -> CIE Lab (D65)."""
    c = np.asarray(rgb, np.float64) / 255
    c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = c @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    xyz = xyz / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


@functools.cache
def surface_lab(kind: str, colour: str | None) -> tuple[float, float, float]:
    """Median Lab of the object's outer band (what has to stand out from the background)."""
    rgba = artwork(kind, colour)
    solid = rgba[..., 3] > 0.6
    inner = solid.copy()
    for _ in range(10):
        padded = np.pad(inner, 1)
        inner = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    band = rgba[..., :3][solid & ~inner]
    lightness, a, b = (float(v) for v in np.median(lab(band * 255), 0))
    return lightness, a, b
