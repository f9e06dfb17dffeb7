"""Images whose one defect is known: what each cleaning step must find, and nothing else.

A clean image is a drawing of overlapping shapes in random colours under fine noise. Each defect changes what its own step
measures and keeps the rest: flat tones stay sharp, dark images keep their noise, blurred ones their histogram.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 400  # of the shorter side; the area step asks for 384 x 384
AREA = 384 / SIDE  # what the area step asks for, squared, at any other side


Change = Callable[[Image.Image], bytes]  # a drawing -> the encoded image with a defect


@dataclass(frozen=True)
class Planted:
    """A file to write: its name, its bytes, the step that must leave it out (None: it must be kept)."""

    name: str
    data: bytes
    step: str | None


def drawn(seed: int, side: int = SIDE) -> Image.Image:
    """A clean image, from its seed alone: the same drawing at any side, under noise of single pixels."""
    draw, scale = np.random.default_rng([5, seed]), side / SIDE
    width, height = round(432 * scale), side
    image = Image.new("RGB", (width, height), tuple(draw.integers(60, 200, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(24):
        x, y = draw.integers(-40, 432), draw.integers(-40, SIDE)
        w, h = draw.integers(30, 220, 2).tolist()
        shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
        box = [round(at * scale) for at in (x, y, x + w, y + h)]
        shape(box, fill=tuple(draw.integers(20, 236, 3).tolist()))
    return noisy(np.asarray(image), draw, 12)


def noisy(pixels: np.ndarray, draw: np.random.Generator, reach: int) -> Image.Image:
    """uint8 [H, W, 3] with the same noise of +-reach on all channels."""
    noise = draw.integers(-reach, reach + 1, (*pixels.shape[:2], 1), dtype=np.int16)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def resized(image: Image.Image, by: float) -> Image.Image:
    return image.resize((round(image.width * by), round(image.height * by)), Image.Resampling.LANCZOS)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    usual = {"JPEG": {"quality": 92}, "PNG": {"compress_level": 1}}.get(kind, {})
    image.save(stream, kind, **{**usual, **options})
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


def tinted(channel: int, low: int, high: int) -> Change:
    """One channel squeezed into [low, high]: what a judge of that colour sees."""

    def change(image: Image.Image) -> bytes:
        pixels = np.array(image)
        pixels[..., channel] = low + pixels[..., channel].astype(np.int32) * (high - low) // 255
        return encoded(Image.fromarray(pixels), "PNG")

    return change


DEFECTS: dict[str, Change] = {
    "broken": torn,
    "area": lambda image: encoded(resized(image, 0.85), "PNG"),
    "clarity": blurred,
    "entropy": two_toned,
    "luminance": dark,
}
JUDGED: dict[str, Change] = {  # by models that look at colours: red, green, blue
    "nsfw": tinted(0, 225, 250),
    "watermark": tinted(1, 225, 250),
    "aesthetic": tinted(2, 0, 3),
}
COPIES: dict[str, Change] = {
    "again": lambda image: encoded(image, "JPEG", optimize=True),
    "smaller": lambda image: encoded(resized(image, 0.975)),
    "brighter": lambda image: encoded(image.point([min(255, i * 103 // 100) for i in range(256)] * 3)),
    "as WebP": lambda image: encoded(image, "WEBP", quality=85),
}


def plan(seed: int, judged: Mapping[str, Change] | None = None) -> list[tuple[str, str, str | None]]:
    """(name, what is done to it, the step that must leave it out) of what `planted` makes of a seed."""
    kinds = [*DEFECTS, *(judged or {}), *COPIES]
    kind, name = kinds[seed // 4 % len(kinds)], f"{seed % 100:02d}/{seed:06d}"
    made: list[tuple[str, str, str | None]] = [(f"{name}.jpg", "", None)]
    if seed % 4:
        made.append((f"{name} {kind}.img.jpg", kind, "duplicate" if kind in COPIES else kind))
    return made


def planted(seed: int, judged: Mapping[str, Change] | None = None, side: int = SIDE) -> list[Planted]:
    """One clean image and, by the seed's rest, one defect or a near-duplicate of it; every fourth seed is clean alone.

    judged: what to do to an image that a model's step must find, by step: JUDGED for `small_onnx.colour_judges`.
    Of a near-duplicate and its original one must go; which, the aesthetic score may decide (`settled`).
    """
    clean = drawn(2 * seed, side)
    made = []
    for name, kind, step in plan(seed, judged):
        if not kind:
            data = encoded(clean)
        elif kind in COPIES:
            data = COPIES[kind](clean)
        else:
            data = {**DEFECTS, **(judged or {})}[kind](drawn(2 * seed + 1, side))
        made.append(Planted(name, data, step))
    return made


def settled(found: dict[str, str | None], expected: dict[str, str | None]) -> dict[str, str | None]:
    """What was found, where an original went instead of its near-duplicate as if it had been the other way round."""
    out = dict(found)
    for name, step in expected.items():
        original = f"{name.partition(' ')[0]}.jpg"
        if step == "duplicate" and (found.get(name), found.get(original)) == (None, "duplicate"):
            out[name], out[original] = "duplicate", None
    return out
