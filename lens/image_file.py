"""9. Pictures on disk: PNG files that carry their recipe, file names, the contact sheet."""

from __future__ import annotations

import json
import math
import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .formats.files import write_atomic
from .ops import backend
from .request import MAX_STEPS, shortened
from .resolution import MAX_SIDE
from .sampler import MAX_SEED, MIN_SEED

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

_UNWRITTEN = {"loras", "wish", "reasoner", "threads", "hardware", "torch_version"}  # where there is nothing to say
_SINCE = {"solver", *_UNWRITTEN}  # fields that not every recipe has
RECIPE_KEY = "lens"  # the PNG text chunk (iTXt, UTF-8) that holds the recipe as one JSON object
PARAMETERS_KEY = "parameters"  # where other programs and sharing sites look for a prompt and its settings
_SAMPLERS = {"euler": "Euler", "dpm2m": "DPM++ 2M"}  # our solvers by the names those know
MAX_THREADS = 1024  # that a recipe may ask for
NAME_MAX = 255  # bytes of a file name, of every file system in use
_SLUG = 40  # characters
_NAME_FIELDS = ("index", "prompt", "seed")

_SHEET_SMALL, _SHEET_LARGE = 192, 512  # a sheet enlarges smaller pictures and reduces larger ones, by whole factors
_GAP, _FONT_SIZE, _LINE = 12, 13, 17
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "NotoSans-Regular.ttf")
_PAPER, _INK = (250, 250, 248), (40, 40, 40)


class RecipeError(ValueError):
    """A picture without a recipe, or with one that cannot be read; the message names the file."""


@dataclass(frozen=True)
class Machine:
    """What decides the last bits of a picture besides its recipe."""

    threads: int
    hardware: str  # "cpu avx512", or "cuda 9.0"
    torch_version: str

    @classmethod
    def here(cls, device: torch.device, threads: int) -> Machine:
        """What draws on ``device``."""
        if device.type == "cuda":
            hardware = "cuda {}.{}".format(*torch.cuda.get_device_capability(device))
        else:
            hardware = f"cpu {torch.backends.cpu.get_cpu_capability().lower()}"
            if not backend.unavailable("cpu") and backend.override() != "reference":
                hardware += f", {backend.isa()} kernels"
        return cls(threads, hardware, torch.__version__)

    def differences(self, other: Machine) -> str:
        """What is known here and different there, as words."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        mine = {"threads": threads, "hardware": self.hardware, "torch_version": f"torch {self.torch_version}"}
        named = {
            name: (text, getattr(other, name))
            for name, text in mine.items()
            if getattr(self, name) and getattr(self, name) != getattr(other, name)
        }
        return ", ".join(f"{text} (here {there})" for text, there in named.values())


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
    wish: str = ""  # what a reasoner made ``prompt`` of, and which one
    reasoner: str = ""
    threads: int = 0  # of the CPU; 0, and "" below: not known, unwritten
    hardware: str = ""  # device and instruction set
    torch_version: str = ""

    @property
    def machine(self) -> Machine:
        return Machine(self.threads, self.hardware, self.torch_version)

    def to_json(self, **beside: Any) -> str:
        """One line; `beside` comes first: what is no part of the recipe."""
        values = beside | {name: value for name, value in asdict(self).items() if value or name not in _UNWRITTEN}
        return json.dumps(values, ensure_ascii=False)

    def parameters(self) -> str:
        """The recipe as A1111 writes it and many programs read it: prompt, negative prompt, a line of settings. What has
        no name there (chat date, fingerprint, LoRAs) stands in ``to_json`` alone, which is what ``--like`` reads."""
        height, width = self.size
        settings = {
            "Steps": self.steps,
            "Sampler": _SAMPLERS.get(self.solver, self.solver),
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": f"{width}x{height}",
            "Model": _quoted(self.model),
            "Version": f"Lens {self.version}",
        }
        negative = [f"Negative prompt: {self.negative}"] if self.negative else []
        return "\n".join([self.prompt, *negative, ", ".join(f"{key}: {value}" for key, value in settings.items())])

    @classmethod
    def from_json(cls, text: str, source: str) -> Recipe:
        """Strict: every field present (``loras`` where there were any, others since there was something to say) and of
        its type. ``source`` is named in errors."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # also an integer of more digits than Python reads
            raise RecipeError(f"{source}: its recipe is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise RecipeError(f"{source}: its recipe must be a JSON object, got {type(values).__name__}")
        names = {f.name for f in fields(cls)}
        missing, unknown = names - _SINCE - set(values), set(values) - names
        if missing or unknown:
            what = f"has no {', '.join(sorted(missing))}" if missing else f"has the unknown {_keys(unknown)}"
            raise RecipeError(
                f"{source}: its recipe {what}; it was written by version {shortened(values.get('version'))}, this "
                f"is {_version()}"
            )
        for name, value in values.items():
            if expected := _why_invalid(name, value):
                raise RecipeError(f"{source}: {name} of its recipe must be {expected}, got {shortened(value)}")
        loras = tuple((name, digest, float(scale)) for name, digest, scale in values.get("loras", ()))
        return cls(**{**values, "size": tuple(values["size"]), "guidance": float(values["guidance"]), "loras": loras})


def _quoted(value: str) -> str:
    """A value as a line of settings has it, whose parts are split at commas and colons."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _keys(names: set[str]) -> str:
    listed = ", ".join(shortened(name) for name in sorted(names)[:5])
    return f"key{'s' if len(names) > 1 else ''} {listed}" + ", ..." * (len(names) > 5)


def _version() -> str:
    from . import __version__

    return __version__


def _why_invalid(name: str, value: Any) -> str:
    """What a field of a recipe must be, where ``value`` is not; else ""."""

    def whole(v: Any, least: int, most: int) -> bool:
        return isinstance(v, int) and not isinstance(v, bool) and least <= v <= most

    def number(v: Any) -> bool:
        try:
            return isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
        except OverflowError:  # an integer beyond every float
            return False

    if name == "size":
        sides = isinstance(value, list) and len(value) == 2 and all(whole(v, 1, MAX_SIDE) for v in value)
        return "" if sides else f"[height, width] in pixels, up to {MAX_SIDE}"
    if name == "seed":
        return "" if whole(value, MIN_SEED, MAX_SEED) else "an integer of 64 bits"
    if name == "threads":
        return "" if whole(value, 1, MAX_THREADS) else f"an integer from 1 to {MAX_THREADS}"
    if name == "steps":
        return "" if whole(value, 1, MAX_STEPS) else f"an integer from 1 to {MAX_STEPS}"
    if name == "guidance":
        return "" if number(value) and value >= 0 else "a finite number >= 0"
    if name == "loras":
        triples = isinstance(value, list) and all(
            isinstance(v, list) and [isinstance(s, str) for s in v] == [True, True, False] and number(v[2])
            for v in value
        )
        return "" if triples else "a list of [name, fingerprint, scale]"
    return "" if isinstance(value, str) else "a string"


# ------------------------------------------------------------------------------------------------ files


def text_chunks(recipe: Recipe | None) -> PngInfo:
    """What a PNG says about itself: the recipe, and the same for the readers of other programs."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if recipe is not None:
        info.add_itxt(RECIPE_KEY, recipe.to_json())
        info.add_text(PARAMETERS_KEY, recipe.parameters())  # iTXt where it is not Latin-1
    return info


def save_png(image: Image, path: Path, recipe: Recipe | None = None) -> None:
    """Write a PNG, whole or not at all; missing folders are made. The recipe travels inside."""
    info = text_chunks(recipe)
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def read_recipe(path: Path) -> Recipe:
    """The recipe of a picture written by `save_png`. A file that is no PNG or carries none raises RecipeError."""
    from PIL import Image, UnidentifiedImageError

    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise RecipeError(f"{path}: not a readable PNG file: it is no regular file")
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
    kept = "".join(c if c.isalnum() or _joins(c) else " " for c in prompt.lower())
    words = "-".join(filter(None, (_unjoined(word) for word in kept.split())))
    if len(words) > _SLUG:
        end = _SLUG
        while end and _joins(words[end]):  # never between a letter and its marks
            end -= 1
        words = words[: _SLUG + 1].rpartition("-")[0] or words[:end]
    return words or "picture"


def _joins(c: str) -> bool:
    """Combining marks, without which Thai, Hindi or decomposed text is other text, and the joiners between letters."""
    return unicodedata.category(c)[0] == "M" or c in "\u200c\u200d"


def _unjoined(word: str) -> str:
    """A word without marks that have no letter before them, and without joiners at its end."""
    while word and _joins(word[0]):
        word = word[1:]
    return word.rstrip("\u200c\u200d")


def check_name(pattern: str) -> None:
    """Refuse a file name pattern that cannot be filled in."""
    try:
        parts = list(string.Formatter().parse(pattern))
        for _, field, form, _ in parts:
            if field is not None and field not in _NAME_FIELDS:
                raise ValueError(f"unknown field {{{field}}}")
            if "{" in (form or "") or any(int(width) > NAME_MAX for width in re.findall("[0-9]+", form or "")):
                raise ValueError(f"{{{field}:{form}}} must be no wider than {NAME_MAX} characters")
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
    """Pillow's own font has only ASCII; other scripts use a font of the system, or else show as boxes."""
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
    """Lines no wider than ``width``: broken at spaces, inside a word only where that word is too wide."""
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
