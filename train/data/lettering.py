"""Text on a background, with what it says and where: one image by (seed, number) alone.

Font, size, colour, blur, rotation, layout and background are drawn from a generator keyed by seed and number. Every line and every word
keeps its string and its quadrilateral in pixels (top left, top right, bottom right, bottom left of the upright line, turned with it).
Scripts whose letters change shape or order need a Pillow with raqm; a script for which there is no font, or no raqm, is refused
by name, never drawn as boxes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from .small_world.photographs import ASSETS as PHOTOGRAPHS

WORDS = Path(__file__).parent / "assets" / "sign_words.v1.json"
SHAPED = ("Hebrew", "Arabic", "Devanagari", "Bengali", "Tamil", "Thai")  # need raqm
FROM_THE_RIGHT = ("Hebrew", "Arabic")
UNSPACED = ("Thai", "Han", "Kana")  # words of a line stand without blanks
LAYOUTS = ("line", "paragraph", "heading", "scattered")
BACKGROUNDS = ("plain", "gradient", "noise", "photograph")
CONTRAST = 3.0  # least ratio of luminances (WCAG 2) between letters and what is behind them
TURN = 25.0  # degrees, at most
BLUR = 0.05  # standard deviation at most, as a share of the letters' size
LEAST = 10  # pixels of a letter's size
NAMED = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (200, 30, 40),
    "orange": (240, 140, 30),
    "yellow": (245, 215, 50),
    "green": (40, 140, 60),
    "turquoise": (50, 190, 180),
    "blue": (40, 80, 190),
    "purple": (120, 50, 150),
    "pink": (240, 130, 180),
    "brown": (115, 75, 40),
}

Quad = list[list[float]]


class NoFont(ValueError):
    """A script that cannot be drawn here; the message says what is missing."""


@dataclass(frozen=True)
class Lettering:
    """image: uint8 [H, W, 3]. record: plain values, see `drawn`."""

    image: np.ndarray
    record: dict[str, Any]


@functools.cache
def words() -> dict[str, dict[str, list[str]]]:
    """Script -> language -> words."""
    table = json.loads(WORDS.read_text(encoding="utf-8"))
    return {script: {language: text.split() for language, text in own.items()} for script, own in table.items()}


def font_files(folders: Sequence[Path]) -> list[Path]:
    """Errors: ValueError for a folder that is none."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--fonts: {folder} is no folder")
    found = {p for folder in folders for p in folder.rglob("*") if p.suffix.lower() in (".ttf", ".otf", ".ttc")}
    return sorted(found, key=lambda p: (p.name, str(p)))


@functools.lru_cache(maxsize=64)
def font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    """With raqm where Pillow has it. Errors: OSError."""
    engine = ImageFont.Layout.RAQM if features.check("raqm") else ImageFont.Layout.BASIC
    return ImageFont.truetype(str(path), size, layout_engine=engine)


@functools.cache
def letters_of(path: Path) -> frozenset[str]:
    """Of the letters in `words`, those that a font has: whose glyph is not the one for a letter that it has not."""
    try:
        plain = ImageFont.truetype(str(path), 32, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        return frozenset()
    every = {letter for own in words().values() for some in own.values() for word in some for letter in word}

    def glyph(letter: str) -> tuple[tuple[int, int], bytes]:
        mask = plain.getmask(letter)
        return mask.size, bytes(mask)

    missing = glyph("\uffff")
    return frozenset(letter for letter in every if glyph(letter) != missing)


def fonts_of(script: str, files: Sequence[Path]) -> list[Path]:
    """The fonts that have every letter of a script. Errors: NoFont, which names the script."""
    if script not in words():
        raise NoFont(f"synthesize_text: no words for the script {script!r}; there are {', '.join(words())}")
    if script in SHAPED and not features.check("raqm"):
        raise NoFont(f"synthesize_text: {script} needs shaping, and this Pillow is built without raqm")
    needed = {letter for some in words()[script].values() for word in some for letter in word}
    found = [path for path in files if needed <= letters_of(path)]
    if not found:
        raise NoFont(
            f"synthesize_text: no font for {script}: none of {len(files)} has all of its {len(needed)} letters"
        )
    return found


# ------------------------------------------------------------------------------------------------ one image


@dataclass(frozen=True)
class Style:
    """What is drawn from. fonts: script -> files; photographs: of backgrounds; width, height: in pixels."""

    fonts: dict[str, list[Path]]
    photographs: tuple[Path, ...]
    width: int
    height: int
    seed: int


def style(
    scripts: Sequence[str], folders: Sequence[Path], backgrounds: Path | None, size: tuple[int, int], seed: int
) -> Style:
    """size: (height, width). backgrounds: a folder of images, None: the photographs that come with the small world. NoFont, ValueError."""
    files = font_files(folders)
    pictures = sorted(
        p for p in (backgrounds or PHOTOGRAPHS).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
    )
    if not pictures:
        raise ValueError(f"--backgrounds: {backgrounds} holds no image")
    return Style({s: fonts_of(s, files) for s in scripts}, tuple(pictures), size[1], size[0], seed)


def drawn(made: Style, number: int) -> Lettering:
    """The image of a number.

    record: text (lines joined by line feeds), lines [{text, quad, colour, words [{text, quad}]}], script, language, font, size
    (pixels of the first block's letters), background, layout, rotation (degrees, counter-clockwise), blur (pixels), caption, seed,
    number, width, height.
    """
    rng = generator(made.seed, number)
    script = _pick(rng, sorted(made.fonts))
    language = _pick(rng, sorted(words()[script]))
    file = _pick(rng, made.fonts[script])
    layout = _pick(rng, LAYOUTS)
    ground, image = background(made, rng)
    blocks = _blocks(rng, layout, script, language)
    size = max(LEAST, round(made.height * float(np.exp(rng.uniform(np.log(0.05), np.log(0.2))))))
    turn = float(rng.uniform(-TURN, TURN)) if rng.random() < 0.4 else 0.0
    soft = float(rng.uniform(0.2, 1.0)) * BLUR if rng.random() < 0.3 else 0.0
    align = _pick(rng, ("left", "center", "right"))
    rooms = _rooms(rng, len(blocks), made.width, made.height)
    lines: list[dict[str, Any]] = []
    colour, blur = (0, 0, 0), 0.0
    for place, (block, room) in enumerate(zip(blocks, rooms)):
        layer, marked, used = _fitted(block, file, size, script, align, turn, room)
        x, y = (room[axis] + int(rng.integers(0, max(0, room[axis + 2] - layer.size[axis]) + 1)) for axis in (0, 1))
        behind = np.asarray(image.crop((x, y, x + layer.width, y + layer.height)), np.float64)
        if place == 0:
            colour, size, blur = readable(rng, behind), used, soft * used
        if blur:
            layer = layer.filter(ImageFilter.GaussianBlur(blur))
        shade = _against(colour, behind)
        image.paste(Image.new("RGB", layer.size, shade), (x, y), layer)
        lines += [{**_moved(line, x, y), "colour": list(shade)} for line in marked]
    record = {
        "text": "\n".join(line["text"] for line in lines),
        "lines": lines,
        "script": script,
        "language": language,
        "font": file.name,
        "size": size,
        "background": ground,
        "layout": layout,
        "rotation": round(turn, 2),
        "blur": round(blur, 2),
        "seed": made.seed,
        "number": number,
        "width": made.width,
        "height": made.height,
    }
    record["caption"] = caption(record)
    return Lettering(np.asarray(image), record)


def generator(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng(
        int.from_bytes(hashlib.sha256(f"{seed} lettering {number}".encode()).digest()[:8], "big")
    )


def background(made: Style, rng: np.random.Generator) -> tuple[str, Image.Image]:
    """(its name, RGB of the whole size)."""
    kind, size = _pick(rng, BACKGROUNDS), (made.width, made.height)
    one, other = (tuple(int(v) for v in rng.integers(0, 256, 3)) for _ in range(2))
    if kind == "plain":
        return kind, Image.new("RGB", size, one)
    if kind == "gradient":
        x = np.linspace(0, 1, made.width)[None] * rng.uniform(-1, 1) + np.linspace(0, 1, made.height)[:, None]
        x = ((x - x.min()) / (np.ptp(x) or 1))[..., None]
        return kind, Image.fromarray((np.array(one) * (1 - x) + np.array(other) * x).astype(np.uint8))
    if kind == "noise":
        small = rng.integers(-40, 41, (max(2, made.height // 24), max(2, made.width // 24), 3))
        tint = np.clip(np.array(one) + small, 0, 255).astype(np.uint8)
        return kind, Image.fromarray(tint).resize(size, Image.Resampling.BICUBIC)
    path = made.photographs[int(rng.integers(len(made.photographs)))]
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    scale = max(size[0] / picture.width, size[1] / picture.height)
    picture = picture.resize((max(size[0], round(picture.width * scale)), max(size[1], round(picture.height * scale))))
    left, top = (int(rng.integers(0, a - b + 1)) for a, b in zip(picture.size, size))
    return kind, picture.crop((left, top, left + size[0], top + size[1]))


def contrast(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    """WCAG 2: (L1 + .05) / (L2 + .05) of the relative luminances of two sRGB colours, the lighter first."""

    def luminance(colour: Sequence[float] | np.ndarray) -> float:
        c = np.asarray(colour, np.float64) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def readable(rng: np.random.Generator, behind: np.ndarray) -> tuple[int, int, int]:
    """A colour of `NAMED`, a little varied, that stands out from the mean of what is behind it; black or white where none drawn does."""
    mean = behind.reshape(-1, 3).mean(0)
    for _ in range(24):
        base = np.array(NAMED[_pick(rng, tuple(NAMED))])
        red, green, blue = (int(v) for v in np.clip(base + rng.integers(-20, 21, 3), 0, 255))
        if contrast((red, green, blue), mean) >= CONTRAST:
            return red, green, blue
    return _against((128, 128, 128), behind)


def caption(record: dict[str, Any]) -> str:
    """An English sentence that says what is written, as it is written, and how; the colour where all lines have one."""
    names = {
        min(NAMED, key=lambda n: sum((a - b) ** 2 for a, b in zip(NAMED[n], line["colour"])))
        for line in record["lines"]
    }
    name = f" {names.pop()}" if len(names) == 1 else ""
    looks = {"plain": "a plain background", "gradient": "a smooth gradient", "noise": "a soft mottled background"}
    where = looks.get(record["background"], "a photograph")
    tilt = "" if not record["rotation"] else f", tilted to the {'left' if record['rotation'] > 0 else 'right'}"
    soft = " slightly blurred" if record["blur"] else ""
    quoted = [f'"{line["text"]}"' for line in record["lines"]]
    said = quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]
    kind = {"line": "One line of", "paragraph": "A paragraph of", "heading": "A heading and smaller"}
    begin = kind.get(record["layout"], "Separate pieces of")
    return f"{begin}{soft}{name} lettering on {where}{tilt}, reading {said}."


def agreement(asked: str, read: str) -> float:
    """The share of the asked words, or letters where words are not kept apart, that were read: case, accents and punctuation aside."""

    def parts(text: str) -> Counter[str]:
        plain = unicodedata.normalize("NFKD", text.casefold().replace("ı", "i").replace("ł", "l"))
        kept = "".join(c if c.isalnum() else " " for c in plain if not unicodedata.combining(c))
        apart = "".join(f" {c} " if unicodedata.east_asian_width(c) in "WF" else c for c in kept)
        return Counter(apart.split())

    wanted = parts(asked)
    return (wanted & parts(read)).total() / max(1, wanted.total())


# ------------------------------------------------------------------------------------------------ blocks of lines


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _blocks(rng: np.random.Generator, layout: str, script: str, language: str) -> list[list[tuple[str, float]]]:
    """Blocks of (line, size as a multiple of the block's)."""
    pool = words()[script][language]

    def line(least: int, most: int) -> str:
        count = int(rng.integers(least, most + 1))
        said = [pool[int(i)] for i in rng.permutation(len(pool))[:count]]
        if script not in UNSPACED and rng.random() < 0.15:
            said.append(str(int(rng.integers(1, 1000))))
        text = ("" if script in UNSPACED else " ").join(said)
        return text.upper() if script in ("Latin", "Cyrillic") and language != "tr" and rng.random() < 0.35 else text

    if layout == "line":
        return [[(line(1, 4), 1.0)]]
    if layout == "paragraph":
        return [[(line(2, 4), 0.7) for _ in range(int(rng.integers(2, 5)))]]
    if layout == "heading":
        return [[(line(1, 2), 1.3), *((line(2, 5), 0.6) for _ in range(int(rng.integers(1, 4))))]]
    return [[(line(1, 3), 0.8)] for _ in range(int(rng.integers(2, 5)))]


def _rooms(rng: np.random.Generator, count: int, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """(x, y, width, height) of one room a block, apart from each other: the image, or bands of it in a drawn order."""
    edge = round(0.04 * min(width, height))
    if count == 1:
        return [(edge, edge, width - 2 * edge, height - 2 * edge)]
    band = (height - 2 * edge) // count
    order = [int(i) for i in rng.permutation(count)]
    return [(edge, edge + band * place, width - 2 * edge, band) for place in order]


def _fitted(
    block: Sequence[tuple[str, float]],
    file: Path,
    size: int,
    script: str,
    align: str,
    turn: float,
    room: tuple[int, int, int, int],
) -> tuple[Image.Image, list[dict[str, Any]], int]:
    """(mask "L" of a block, rotated, that fits its room; its lines; the size that fitted)."""
    while True:
        mask, lines = _block(block, file, size, script, align)
        layer, moved = _rotated(mask, lines, turn)
        if (layer.width <= room[2] and layer.height <= room[3]) or size <= LEAST // 2:
            return layer, moved, size
        shrink = min(room[2] / layer.width, room[3] / layer.height)
        size = max(LEAST // 2, min(size - 1, int(size * shrink)))


def _block(
    block: Sequence[tuple[str, float]], file: Path, size: int, script: str, align: str
) -> tuple[Image.Image, list[dict[str, Any]]]:
    right = script in FROM_THE_RIGHT
    options: dict[str, Any] = {"direction": "rtl"} if right else {}
    rows, y = [], 0.0
    for text, scale in block:
        own = font(file, max(LEAST // 2, round(size * scale)))
        ascent, descent = own.getmetrics()
        rows.append((text, own, own.getlength(text, **options), y))
        y += 1.15 * (ascent + descent)
    pad = round(0.25 * size)
    width = max(length for _, _, length, _ in rows)
    mask = Image.new("L", (int(width) + 2 * pad + 1, int(y) + 2 * pad + 1), 0)
    pen, lines = ImageDraw.Draw(mask), []
    for text, own, length, top in rows:
        free = width - length
        x = pad + (0.0 if align == "left" else free / 2 if align == "center" else free)
        pen.text((x, pad + top), text, font=own, fill=255, **options)
        left, upper, farther, lower = own.getbbox(text, **options)
        parts, done = [], ""
        for word in text.split(" "):
            before = own.getlength(done, **options) if done else 0.0
            long = own.getlength(word, **options)
            start = x + (length - before - long if right else before)
            parts.append({"text": word, "quad": _quad(start, pad + top + upper, start + long, pad + top + lower)})
            done += word + " "
        quad = _quad(x + left, pad + top + upper, x + farther, pad + top + lower)
        lines.append({"text": text, "quad": quad, "words": parts})
    return mask, lines


def _quad(left: float, top: float, right: float, bottom: float) -> Quad:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def _rotated(mask: Image.Image, lines: list[dict[str, Any]], turn: float) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Counter-clockwise about the centre, the layer grown to hold it all."""
    if not turn:
        return mask, lines
    layer = mask.rotate(turn, Image.Resampling.BICUBIC, expand=True)
    angle = np.deg2rad(turn)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # y points down
    before, after = np.array(mask.size) / 2, np.array(layer.size) / 2

    def turned(quad: Quad) -> Quad:
        return [[float(v) for v in matrix @ (np.array(corner) - before) + after] for corner in quad]

    return layer, [_mapped(line, turned) for line in lines]


def _moved(line: dict[str, Any], x: int, y: int) -> dict[str, Any]:
    return _mapped(line, lambda quad: [[round(a + x, 1), round(b + y, 1)] for a, b in quad])


def _mapped(line: dict[str, Any], change: Any) -> dict[str, Any]:
    parts = [{**word, "quad": change(word["quad"])} for word in line["words"]]
    return {**line, "quad": change(line["quad"]), "words": parts}


def _against(colour: Sequence[int], behind: np.ndarray) -> tuple[int, int, int]:
    """The colour, or black or white where it does not stand out from what is behind this block."""
    mean = behind.reshape(-1, 3).mean(0)
    if contrast(colour, mean) >= CONTRAST:
        return int(colour[0]), int(colour[1]), int(colour[2])
    return (0, 0, 0) if contrast((0, 0, 0), mean) >= contrast((255, 255, 255), mean) else (255, 255, 255)
