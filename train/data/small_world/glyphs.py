"""Words as ink: letters of DejaVu Sans Bold from a vendored atlas, at any height, without a font at run time.

    python -m train.data.small_world.glyphs DejaVuSans-Bold.ttf            # rewrite train/data/small_world/assets/glyphs
    python -m train.data.small_world.glyphs DejaVuSans-Bold.ttf --check    # compare, write nothing, exit 1 on a difference

The atlas is one grey row of cells, one per letter, whose capitals are CAPITAL pixels high; `glyphs.json` holds where
each cell starts, how far the pen moves, the checksum of the font file and the SHA-256 of the decoded pixels.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lens.formats.files import write_atomic, write_json

ASSETS = Path(__file__).parent / "assets" / "glyphs"
FONT_SHA256 = "0d977336a6d5fba34eab8e3199eb218327161b5143749f802982c2bc34df0c96"  # DejaVu Sans Bold 2.37
LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits + " !?&+-.:'"
CAPITAL = 40  # pixels of a capital's height in the atlas
MARGIN = 4  # pixels around each cell, for ink that leaves its advance


@functools.cache
def atlas() -> tuple[np.ndarray, dict[str, tuple[int, float]]]:
    """float32 [rows, columns] in [0, 1] and letter -> (first column of its cell, advance in pixels)."""
    record = json.loads((ASSETS / "glyphs.json").read_text())
    with Image.open(ASSETS / "glyphs.png") as image:
        pixels = np.asarray(image.convert("L"), np.float32) / 255
    return pixels, {letter: (int(x), float(advance)) for letter, (x, advance) in record["letters"].items()}


@functools.cache
def _line(text: str) -> np.ndarray:
    """The text at the atlas's size, cut to its ink: float32 [h, w] in [0, 1]."""
    pixels, letters = atlas()
    unknown = sorted(set(text) - set(letters))
    if unknown or not text.strip():
        raise ValueError(f"word_mask: text {text!r}, expected some of the letters {''.join(letters)!r}, not {unknown}")
    advances = [letters[letter][1] for letter in text]
    line = np.zeros((pixels.shape[0], int(sum(advances)) + 2 * MARGIN + 2), np.float32)
    pen = 0.0
    for letter, advance in zip(text, advances):
        start, width, left = letters[letter][0], int(advance + 0.5) + 2 * MARGIN, round(pen)
        view = line[:, left : left + width]
        np.maximum(view, pixels[:, start : start + view.shape[1]], out=view)
        pen += advance
    rows, columns = np.flatnonzero(line.any(1)), np.flatnonzero(line.any(0))
    return line[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def width_of(text: str) -> float:
    """Width of the text's ink over its height."""
    height, width = _line(text).shape
    return width / height


@functools.lru_cache(maxsize=4096)
def word_mask(text: str, height: int) -> np.ndarray:
    """Ink coverage of a text, antialiased: float32 [height, w] in [0, 1], cut to the ink (capitals fill the height).

    Errors: ValueError for a letter the atlas lacks, a blank text or a height below 1.
    """
    if height < 1:
        raise ValueError(f"word_mask: height {height}, expected at least 1")
    line = _line(text)
    size = (max(1, round(line.shape[1] * height / line.shape[0])), height)
    how = Image.Resampling.HAMMING if height <= line.shape[0] else Image.Resampling.BICUBIC
    mask = np.clip(np.asarray(Image.fromarray(line).resize(size, how)), 0, 1)
    mask.setflags(write=False)
    return mask


def pixel_hash(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.width}x{image.height}".encode() + image.convert("L").tobytes()).hexdigest()


def rasterise(font_file: Path) -> tuple[Image.Image, dict[str, Any]]:
    """The atlas of a font file and its record. Errors: SystemExit where the file is another font."""
    from PIL import ImageDraw, ImageFont

    found = hashlib.sha256(font_file.read_bytes()).hexdigest()
    if found != FONT_SHA256:
        raise SystemExit(f"{font_file}: SHA-256 {found}, expected {FONT_SHA256} (DejaVu Sans Bold 2.37)")
    size = next(
        s
        for s in range(CAPITAL, 3 * CAPITAL)
        if -_font(ImageFont, font_file, s).getbbox("H", anchor="ls")[1] >= CAPITAL
    )
    font = _font(ImageFont, font_file, size)
    boxes = [font.getbbox(letter, anchor="ls") for letter in LETTERS]
    top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
    letters, at = {}, 0
    for letter in LETTERS:
        letters[letter] = (at, round(float(font.getlength(letter)), 3))
        at += int(letters[letter][1] + 0.5) + 2 * MARGIN
    image = Image.new("L", (at, bottom - top + 2), 0)
    pen = ImageDraw.Draw(image)
    for letter, (start, _) in letters.items():
        pen.text((start + MARGIN, 1 - top), letter, fill=255, font=font, anchor="ls")
    record = {"font": "DejaVu Sans Bold 2.37", "font_sha256": FONT_SHA256, "capital": CAPITAL, "letters": letters}
    return image, {**record, "pixels_sha256": pixel_hash(image)}


def _font(module: Any, font_file: Path, size: int) -> Any:
    return module.truetype(str(font_file), size, layout_engine=module.Layout.BASIC)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.data.small_world.glyphs", description=__doc__.split("\n")[0])
    parser.add_argument("font", type=Path, help="DejaVuSans-Bold.ttf, version 2.37")
    parser.add_argument("--check", action="store_true", help="compare with the vendored atlas, write nothing")
    options = parser.parse_args(argv)
    image, record = rasterise(options.font)
    if options.check:
        equal = json.loads((ASSETS / "glyphs.json").read_text()) == json.loads(json.dumps(record))
        print("equal" if equal else "different")
        return 0 if equal else 1
    write_atomic(ASSETS / "glyphs.png", lambda temporary: image.save(temporary, "PNG", optimize=True))
    write_json(ASSETS / "glyphs.json", record)
    print(f"{len(record['letters'])} letters, {(ASSETS / 'glyphs.png').stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
