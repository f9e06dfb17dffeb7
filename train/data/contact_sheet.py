"""Images with their captions below, and boxes to outline, as one PNG."""

from __future__ import annotations

import functools
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lens.formats.files import write_atomic

WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansCJK-Medium.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf")


@functools.cache
def wide_font() -> ImageFont.FreeTypeFont | None:
    """A font with Chinese and Japanese, where the system has one."""
    for name in WIDE_FONTS:
        try:
            return ImageFont.truetype(name, 10)
        except OSError:
            continue
    return None


def is_wide(text: str) -> bool:
    return any(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def drawable(text: str, wide: bool) -> str:
    """What of a caption the label font draws; Chinese and Japanese as \\u escapes where no font has them."""
    if wide or not is_wide(text):
        return text
    return "".join(f"\\u{ord(c):04x}" if unicodedata.east_asian_width(c) in "WF" else c for c in text)


def broken(text: str, columns: int) -> list[str]:
    """Lines of at most that many letter widths: a Chinese or Japanese letter is two wide and may end a line."""
    if not is_wide(text):
        return textwrap.wrap(text, columns)
    half = max(1, columns // 2)
    return [text[i : i + half] for i in range(0, len(text), half)]


def contact_sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    path: Path,
    columns: int = 10,
    cell: int = 160,
    boxes: Sequence[Sequence[tuple[str, tuple[int, int, int, int]]]] | None = None,
) -> None:
    """Pictures uint8 [H, W, 3] enlarged to `cell` pixels with their captions below; `boxes` are (label, box) to outline."""
    wide, columns = wide_font(), max(1, min(columns, len(pictures)))
    lines = [broken(drawable(caption, wide is not None), cell // 6) for caption in captions]
    tops = [0]  # of every row, and the end of the last: a row is as high as its longest caption needs
    for start in range(0, len(pictures), columns):
        longest = max(len(found) for found in lines[start : start + columns])
        tops.append(tops[-1] + cell + 7 + 11 * min(24, max(3, longest)))
    canvas = Image.new("RGB", (columns * (cell + 4), tops[-1]), "white")
    pen = ImageDraw.Draw(canvas)
    for i, picture in enumerate(pictures):
        x, y = i % columns * (cell + 4), tops[i // columns]
        scale = cell / max(picture.shape[:2])
        size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
        canvas.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (x, y))
        for label, box in boxes[i] if boxes else ():
            outline = [x + box[0] * scale, y + box[1] * scale, x + box[2] * scale - 1, y + box[3] * scale - 1]
            pen.rectangle(outline, outline="red")
            pen.text((outline[0] + 2, outline[1]), label, fill="red")
        for line, words in enumerate(lines[i][:24]):
            font = wide if is_wide(words) else None
            pen.text((x, y + cell + 1 + 11 * line), words, fill="black", font=font)
    write_atomic(path, lambda temporary: canvas.save(temporary, "PNG"))
