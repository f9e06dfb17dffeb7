"""Encoded pictures -> pixels of a bucket: orientation, colour mode, crop to the aspect, antialiased bicubic; up only where told."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from .buckets import cover_box, covers

ORIENTATION = 274  # EXIF
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class Unusable(ValueError):
    """A picture or a member of a shard that must be left out; the message says why."""


def _opened(data: bytes | Path) -> Any:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow prints the address of the stream, which differs from run to run
        reason = "not a picture" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        raise Unusable(reason) from None


def oriented_size(path: Path | bytes) -> tuple[int, int]:
    """(height, width) as the picture is meant to be seen, from the file's header. Errors: Unusable."""
    with _opened(path) as image:
        try:
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        except Exception as error:  # EXIF is a format of its own, and may be broken in any way
            raise Unusable(f"EXIF: {error}") from None
    return (image.width, image.height) if turned else (image.height, image.width)


def decoded(data: bytes) -> Any:
    """The whole picture in RGB, turned upright; what is transparent is white. Errors: Unusable."""
    from PIL import Image, ImageOps

    image = _opened(data)
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits of grey, which Pillow would clip
            image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, IndexError, MemoryError, Image.DecompressionBombError) as error:
        raise Unusable(str(error) or type(error).__name__) from None
    except Exception as error:  # decoders of rare formats also raise what they like
        raise Unusable(f"{type(error).__name__}: {error}") from None


def fitted(data: bytes, size: tuple[int, int], max_upscale: float = 1.0) -> np.ndarray:
    """The centre of a picture that has the aspect of `size`, at that size: uint8 [H, W, 3]. Errors: Unusable, for one that
    would have to grow more than `max_upscale`, too."""
    from PIL import Image

    image, (height, width) = decoded(data), size
    if not covers(image.height, image.width, size, max_upscale):
        more = f" even enlarged by {max_upscale:g}" if max_upscale > 1 else ""
        raise Unusable(f"{image.height}x{image.width} is smaller than {height}x{width}{more}")
    if (image.height, image.width) != size:
        box = cover_box(image.height, image.width, size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.array(image)
