"""Photographs behind the objects of the small world: fourteen places of four views each, a little soft, at any size.

The crops in assets/photos are made by `train.data.small_world.panoramas`. SOFTNESS is in pixels of the drawn picture, as a codec's
patches are: the best linear code of eight numbers per 8x8 pixels returns photographs of 64x64 at 23.8 dB as they are, at 25.3
with half a pixel of blur and at 28.5 with one, which is what it gives whole scenes.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

ASSETS = Path(__file__).parent / "assets" / "photos"
PLACES = (
    "apartment",
    "ballroom",
    "city",
    "desert",
    "field",
    "forest",
    "harbor",
    "lake",
    "lobby",
    "park",
    "savanna",
    "square",
    "walkway",
    "warehouse",
)
VIEWS = 4
HORIZON = 0.6  # of the height of a view, and of every crop of it
SOFTNESS = 1.0  # standard deviation of the blur in pixels
SHOWN = {  # classes that a place shows itself: "one tree" would not be true in front of a forest
    "apartment": ("door",),
    "city": ("car", "house"),
    "field": ("sun", "tree"),
    "forest": ("leaf", "tree"),
    "harbor": ("cloud", "house", "tree"),
    "lake": ("cloud", "sun"),
    "lobby": ("door",),
    "park": ("cloud", "house", "sun", "tree"),
    "savanna": ("cloud", "moon", "star", "tree"),
    "square": ("castle", "house", "sun"),
    "warehouse": ("door",),
}


def file_of(place: str, view: int) -> Path:
    """The WebP of a view."""
    return ASSETS / f"{place}_{view}.webp"


@functools.cache
def _whole(place: str, view: int) -> Image.Image:
    if place not in PLACES or not 0 <= view < VIEWS:
        raise ValueError(f"photograph: view {view} of {place!r}, expected 0 to {VIEWS - 1} of one of {PLACES}")
    with Image.open(file_of(place, view)) as image:
        return image.convert("RGB")


@functools.cache
def photograph(place: str, view: int, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3], not to be written to: the largest part of that aspect with the horizon where it was, antialiased.

    Errors: ValueError for a place or view there is not.
    """
    whole = _whole(place, view)
    scale = min(whole.width / width, whole.height / height)
    w, h = width * scale, height * scale
    left, top = (whole.width - w) / 2, HORIZON * (whole.height - h)
    fitted = whole.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
    out = np.array(fitted.filter(ImageFilter.GaussianBlur(SOFTNESS)))
    out.flags.writeable = False
    return out
