"""9. Pictures on disk: PNG files that carry their recipe, file names, the contact sheet."""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .formats.files import write_atomic

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPE_KEY = "lens"  # the PNG text chunk (iTXt, UTF-8) that holds the recipe as one JSON object
DEFAULT_NAME = "{index:03d}-{prompt}-{seed}"
_NAME_FIELDS = ("index", "prompt", "seed")
_WHERE_PRESENT = ("loras", "wish", "reasoner")  # fields of a recipe that are unwritten where they are empty

_SHEET_SMALL, _SHEET_LARGE = 192, 512  # a sheet enlarges smaller pictures and reduces larger ones, by whole factors
_GAP, _FONT_SIZE, _LINE = 12, 13, 17
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "NotoSans-Regular.ttf")
_PAPER, _INK = (250, 250, 248), (40, 40, 40)


class RecipeError(ValueError):
    """A picture without a recipe, or with one that cannot be read; the message names the file."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a picture's pixels, given the weights that ``fingerprint`` names.

    ``model`` is how to find them again: an embedded model's name or a hub id; of a folder only its last part, so that a
    shared picture does not tell its maker's paths.
    """

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]  # (height, width) in pixels
    variant: str
    chat_date: str
    truncation: str
    model: str
    dtype: str
    version: str
    fingerprint: str
    solver: str = "euler"  # absent in recipes of versions that knew no other
    loras: tuple[tuple[str, str, float], ...] = ()  # (name, fingerprint, scale) of each; unwritten where there are none
    wish: str = ""  # what a reasoner made ``prompt`` of, and which one; both unwritten where there was none
    reasoner: str = ""

    def to_json(self) -> str:
        values = asdict(self)
        for name in _WHERE_PRESENT:
            if not values[name]:
                del values[name]
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, source: str) -> Recipe:
        """Strict: every field present (_WHERE_PRESENT where there is any, ``solver`` since there are two) and of its type.
        ``source`` is named in errors."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{source}: its recipe is not valid JSON: {error}") from None
        names = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) | {*_WHERE_PRESENT, "solver"} != names:
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise RecipeError(f"{source}: its recipe must have the keys {sorted(names)}, got {got}")
        for name, value in values.items():
            if not _is_valid(name, value):
                raise RecipeError(f"{source}: {name} of its recipe is {value!r}")
        loras = tuple((name, digest, float(scale)) for name, digest, scale in values.get("loras", ()))
        return cls(**{**values, "size": tuple(values["size"]), "guidance": float(values["guidance"]), "loras": loras})


def _is_valid(name: str, value: Any) -> bool:
    def whole(v: Any, minimum: int) -> bool:
        return isinstance(v, int) and not isinstance(v, bool) and v >= minimum

    if name == "size":
        return isinstance(value, list) and len(value) == 2 and all(whole(v, 1) for v in value)
    if name in ("seed", "steps"):
        return whole(value, 0 if name == "seed" else 1)

    def number(v: Any) -> bool:
        return isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)

    if name == "guidance":
        return number(value) and value >= 0
    if name == "loras":
        return isinstance(value, list) and all(
            isinstance(v, list) and [isinstance(s, str) for s in v] == [True, True, False] and number(v[2])
            for v in value
        )
    return isinstance(value, str)


# ------------------------------------------------------------------------------------------------ files


def save_png(image: Image, path: Path, recipe: Recipe | None = None) -> None:
    """Write a PNG, whole or not at all; missing folders are made. The recipe travels inside."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if recipe is not None:
        info.add_itxt(RECIPE_KEY, recipe.to_json())
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def read_recipe(path: Path) -> Recipe:
    """The recipe of a picture written by `save_png`. A file that is no PNG or carries none raises RecipeError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text chunks may follow the pixels
            text = getattr(image, "text", {}).get(RECIPE_KEY)
    except FileNotFoundError:
        raise RecipeError(f"{path}: file not found") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise RecipeError(f"{path}: not a readable PNG file: {error}") from None
    if text is None:
        raise RecipeError(f"{path}: carries no recipe; only PNG files written by lens generate do")
    return Recipe.from_json(text, str(path))


def slug(prompt: str) -> str:
    """A prompt as part of a file name: words of any script joined by "-", as many as fit 40 characters."""
    words = "-".join(re.findall(r"[^\W_]+", prompt.lower()))
    if len(words) > 40:
        words = words[:41].rpartition("-")[0] or words[:40]
    return words or "picture"


def check_name(pattern: str) -> None:
    """Refuse a file name pattern that cannot be filled in."""
    try:
        parts = list(string.Formatter().parse(pattern))
        for _, field, _, _ in parts:
            if field is not None and field not in _NAME_FIELDS:
                raise ValueError(f"unknown field {{{field}}}")
        file_name(pattern, 0, "prompt", 0)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        known = ", ".join(f"{{{f}}}" for f in _NAME_FIELDS)
        raise ValueError(f"cannot use {pattern!r} as a file name: {error}; known fields: {known}") from None
    if "/" in pattern or "\0" in pattern:
        raise ValueError(f"cannot use {pattern!r} as a file name: it names a folder; give that with --output")


def file_name(pattern: str, index: int, prompt: str, seed: int) -> str:
    """``pattern`` with {index}, {prompt} (its slug) and {seed} filled in; ".png" is added where missing."""
    name = pattern.format(index=index, prompt=slug(prompt), seed=seed)
    return name if name.lower().endswith(".png") else name + ".png"


# ------------------------------------------------------------------------------------------------ contact sheet


def contact_sheet(images: Sequence[Image], captions: Sequence[str], scale: int | None = None) -> Image:
    """All pictures on one page, row by row, each with its caption below.

    scale: whole factor by which every picture is enlarged, pixel by pixel, without smoothing. None: small pictures are
    enlarged to at most 192 pixels, and those above 512 are reduced by a whole factor.
    """
    from PIL import Image, ImageDraw

    if not images or len(images) != len(captions):
        raise ValueError(f"contact_sheet needs one caption per picture, got {len(captions)} for {len(images)}")
    cells = [_resized(image, scale) for image in images]
    font = _font("".join(captions))
    width = max(max(c.width for c in cells), 160)
    texts = [_wrapped(caption, width, font.getlength) for caption in captions]
    columns = min(len(cells), max(1, round(math.sqrt(len(cells) * 1.6))))
    rows = [range(i, min(i + columns, len(cells))) for i in range(0, len(cells), columns)]
    heights = [max(cells[k].height + 6 + _LINE * len(texts[k]) for k in row) for row in rows]
    page = Image.new("RGB", (_GAP + columns * (width + _GAP), _GAP + sum(h + _GAP for h in heights)), _PAPER)
    draw = ImageDraw.Draw(page)
    top = _GAP
    for row, height in zip(rows, heights):
        for column, k in enumerate(row):
            left = _GAP + column * (width + _GAP)
            page.paste(cells[k], (left, top))
            for n, line in enumerate(texts[k]):
                draw.text((left, top + cells[k].height + 6 + n * _LINE), line, _INK, font)
        top += height + _GAP
    return page


def _font(text: str) -> Any:
    """Pillow's own font knows ASCII alone; other scripts are written in what the system has, or else as boxes."""
    from PIL import ImageFont

    for name in () if text.isascii() else _WIDE_FONTS:
        try:
            return ImageFont.truetype(name, _FONT_SIZE)
        except OSError:
            continue
    return ImageFont.load_default(size=_FONT_SIZE)


def _resized(image: Image, scale: int | None) -> Image:
    from PIL.Image import Resampling

    longest = max(image.size)
    if scale is None and longest > _SHEET_LARGE:
        return image.reduce(math.ceil(longest / _SHEET_LARGE))
    factor = max(1, _SHEET_SMALL // longest) if scale is None else scale
    return image.resize((image.width * factor, image.height * factor), Resampling.NEAREST)


def _wrapped(text: str, width: int, length: Any) -> list[str]:
    """Lines no wider than ``width``: broken at spaces, inside words only where one alone is too wide."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r"\S+\s*", paragraph):
            if line and length((line + word).rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            while length(word.rstrip()) > width and len(word) > 1:
                cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or length(word[:n]) <= width)
                lines.append(word[:cut])
                word = word[cut:]
            line += word
        lines.append(line.rstrip())
    return lines
