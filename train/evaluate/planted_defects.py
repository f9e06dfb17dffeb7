"""Images whose one defect is known: what each cleaning step must find, and nothing else.

A clean image is a drawing of overlapping shapes in random colours under fine noise. Each defect changes what its own step
measures and keeps the rest: flat tones stay sharp, dark images keep their noise, blurred ones their histogram.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 400  # of the shorter side; the area step asks for 384 x 384


@dataclass(frozen=True)
class Planted:
    """A file to write: its name, its bytes, the step that must leave it out (None: it must be kept)."""

    name: str
    data: bytes
    step: str | None


def drawn(seed: int, height: int = SIDE, width: int = 432) -> Image.Image:
    """A clean image, from its seed alone."""
    draw = np.random.default_rng([5, seed])
    image = Image.new("RGB", (width, height), tuple(draw.integers(60, 200, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(24):
        x, y = draw.integers(-40, width), draw.integers(-40, height)
        w, h = draw.integers(30, 220, 2).tolist()
        shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
        shape([x, y, x + w, y + h], fill=tuple(draw.integers(20, 236, 3).tolist()))
    return noisy(np.asarray(image), draw, 12)


def noisy(pixels: np.ndarray, draw: np.random.Generator, reach: int) -> Image.Image:
    """uint8 [H, W, 3] with the same noise of +-reach on all channels."""
    noise = draw.integers(-reach, reach + 1, (*pixels.shape[:2], 1))
    return Image.fromarray((pixels.astype(np.int16) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 92} if kind == "JPEG" else {}), **options)
    return stream.getvalue()


def torn(image: Image.Image) -> bytes:
    data = encoded(image)
    return data[: len(data) // 2]


def blurred(image: Image.Image) -> bytes:
    return encoded(image.filter(ImageFilter.GaussianBlur(6)))


def two_toned(image: Image.Image) -> bytes:
    """Sharp, and one bit a pixel."""
    grey = np.asarray(image.convert("L"))
    return encoded(Image.fromarray(np.where(grey > np.median(grey), 200, 90).astype(np.uint8)).convert("RGB"), "PNG")


def dark(image: Image.Image) -> bytes:
    pixels = np.asarray(image)
    return encoded(noisy(pixels // 16, np.random.default_rng(int(pixels.sum())), 10), "PNG")


def tinted(channel: int, low: int, high: int) -> Callable[[Image.Image], bytes]:
    """One channel squeezed into [low, high]: what a judge of that colour sees."""

    def change(image: Image.Image) -> bytes:
        pixels = np.array(image)
        pixels[..., channel] = low + pixels[..., channel].astype(np.int32) * (high - low) // 255
        return encoded(Image.fromarray(pixels), "PNG")

    return change


DEFECTS: dict[str, Callable[[Image.Image], bytes]] = {
    "broken": torn,
    "area": lambda image: encoded(image.resize((360, 340), Image.Resampling.LANCZOS), "PNG"),
    "clarity": blurred,
    "entropy": two_toned,
    "luminance": dark,
}
JUDGED: dict[str, Callable[[Image.Image], bytes]] = {  # by models that look at colours: red, green, blue
    "nsfw": tinted(0, 225, 250),
    "watermark": tinted(1, 225, 250),
    "aesthetic": tinted(2, 0, 3),
}
COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "again": lambda image: encoded(image, "JPEG", optimize=True),
    "smaller": lambda image: encoded(image.resize((421, 390), Image.Resampling.LANCZOS)),
    "brighter": lambda image: encoded(image.point([min(255, i * 103 // 100) for i in range(256)] * 3)),
    "as WebP": lambda image: encoded(image, "WEBP", quality=85),
}


def planted(seed: int, judged: bool = False) -> list[Planted]:
    """One clean image and, by the seed's rest, one defect or a near-duplicate of it; every fourth seed is clean alone.

    Of a near-duplicate and its original one must go; which, the aesthetic score may decide (`settled`).
    """
    kinds = [*DEFECTS, *(JUDGED if judged else {}), *COPIES]
    kind = kinds[seed // 4 % len(kinds)]
    name, place = f"{seed % 100:02d}/{seed:06d}", seed % 4
    clean = drawn(2 * seed)
    made = [Planted(f"{name}.jpg", encoded(clean), None)]
    if place == 0:
        return made
    if kind in COPIES:
        made.append(Planted(f"{name} {kind}.img.jpg", COPIES[kind](clean), "duplicate"))
    else:
        spoil = {**DEFECTS, **JUDGED}[kind]
        made.append(Planted(f"{name} {kind}.img.jpg", spoil(drawn(2 * seed + 1)), kind))
    return made


def settled(found: dict[str, str | None], expected: dict[str, str | None]) -> dict[str, str | None]:
    """What was found, where an original went instead of its near-duplicate as if it had been the other way round."""
    out = dict(found)
    for name, step in expected.items():
        original = f"{name.partition(' ')[0]}.jpg"
        if step == "duplicate" and (found.get(name), found.get(original)) == (None, "duplicate"):
            out[name], out[original] = "duplicate", None
    return out
