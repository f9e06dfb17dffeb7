"""Stamped pictures with exact labels, and what is no watermark but looks alike: every picture from its seed and number alone.

A watermark is what somebody laid over a finished picture to mark it as theirs: lettering or a logo that lets the picture through, in a
corner, across the middle, or all over. STYLES are drawn by `stamped`, which also gives the coverage; UNSEEN of them no training
draws, so that a judge is measured on what it was never shown.

`Pictures` has the grounds: scenes of the small world, photographs, lettering, drawings of shapes, and what has detail in every pixel, as
the enlarged photographs have not: mosaics of shrunken ones, and textures of noise. A judge that was not shown those took one
photograph of three for stamped. Some of all of them get decoys first:
opaque lettering of a watermark's size and places, signs, opaque bands, shadows and glass that let the picture through
and say nothing, grids and stripes. What is legible in the scene is no watermark.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..evaluate.planted_defects import drawn
from .lettering import Style, font_files, fonts_of
from .lettering import drawn as lettered
from .small_world.photographs import PLACES, VIEWS, file_of
from .small_world.world import World

STYLES = ("corner", "across", "tiled", "logo", "crossed", "band", "seal")
UNSEEN = ("band", "seal")  # no training draws them
HELD_OUT_PLACES = ("ballroom", "desert", "harbor", "park")  # photographs that no training sees
HELD_OUT_FONT = "DejaVu"  # families whose files begin so
GROUNDS = {"world": 0.15, "photograph": 0.2, "mosaic": 0.27, "texture": 0.18, "lettering": 0.12, "drawing": 0.08}
VISIBLE = 14.0  # levels of 255 that a stamp changes on average where it covers, or MASKED of the deviation there: nobody sees less
MASKED = 0.5
OPAQUE = 0.75  # of a stamp at most; what is more opaque counts as part of the scene
COVERED = 0.03  # share of a cell that a stamp covers, from which on the cell has one
SYLLABLES = tuple("ba co di fu ga he ki lo ma ne pi ro sa te vu wi ya zo lens art pix nor dan ste".split())  # noqa: SIM905
MARKS = (
    "{}",
    "© {}",
    "www.{}.com",
    "{}.net",
    "@{}",
    "{} photo",
    "{} images",
    "{} stock",
    "SAMPLE",
    "PREVIEW",
    "{} studio",
)


@dataclass(frozen=True)
class Pen:
    """What lettering is drawn with. fonts: files; empty: Pillow's own."""

    fonts: tuple[Path, ...] = ()

    def font(self, rng: np.random.Generator, size: int) -> Any:
        if not self.fonts:
            return ImageFont.load_default(size)
        return _font(self.fonts[int(rng.integers(len(self.fonts)))], size)


@functools.lru_cache(maxsize=256)
def _font(path: Path, size: int) -> Any:
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def pen_of(folders: Sequence[Path], held_out: bool) -> Pen:
    """The Latin fonts below folders: those of HELD_OUT_FONT, or all others. Errors: ValueError where there is none."""
    files = [path for path in fonts_of("Latin", font_files(folders)) if (HELD_OUT_FONT in path.name) is held_out]
    if not files:
        kind = f"of {HELD_OUT_FONT}" if held_out else f"beside {HELD_OUT_FONT}"
        raise ValueError(f"--fonts: no Latin font {kind} below {', '.join(map(str, folders))}")
    return Pen(tuple(files))


# ------------------------------------------------------------------------------------------------ stamps


def words(rng: np.random.Generator) -> str:
    name = "".join(SYLLABLES[int(i)] for i in rng.integers(0, len(SYLLABLES), int(rng.integers(2, 5))))
    said = MARKS[int(rng.integers(len(MARKS)))].format(name)
    return said.upper() if rng.random() < 0.3 else said.title() if rng.random() < 0.4 else said


def _line(rng: np.random.Generator, pen: Pen, size: int, said: str | None = None) -> Image.Image:
    """One line as a mask, as large as it is."""
    font, said = pen.font(rng, max(7, size)), said or words(rng)
    left, top, right, bottom = font.getbbox(said)
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), said, font=font, fill=255)
    return mask


def _logo(rng: np.random.Generator, pen: Pen, side: int) -> Image.Image:
    """A mark of a few strokes: a ring, a polygon, a star or bars, often with a letter in it."""
    side = max(12, side)
    mask = Image.new("L", (side, side))
    draw, width = ImageDraw.Draw(mask), max(1, round(side * rng.uniform(0.05, 0.14)))
    kind, low, high = int(rng.integers(4)), width, side - 1 - width
    filled = rng.random() < 0.25
    if kind == 0:
        draw.ellipse([low, low, high, high], outline=255, width=width, fill=255 if filled else None)
    elif kind == 1:
        turn, sides = float(rng.uniform(0, 90)), int(rng.integers(3, 7))
        fill = 255 if filled else None
        draw.regular_polygon((side / 2, side / 2, side / 2 - 1), sides, turn, fill, 255, width)
    elif kind == 2:
        at = np.arange(10) * np.pi / 5 - np.pi / 2
        reach = np.where(np.arange(10) % 2, 0.42, 1.0) * (side / 2 - 1)
        points = [(side / 2 + r * np.cos(a), side / 2 + r * np.sin(a)) for r, a in zip(reach, at)]
        draw.polygon(points, outline=255, fill=255 if filled else None, width=width)
    else:
        for bar in range(int(rng.integers(2, 5))):
            x = bar * 1.8 * width
            draw.rectangle([x, side * rng.uniform(0, 0.5), x + width, side - 1], fill=255)
    if rng.random() < 0.6:
        letter = _line(rng, pen, side // 2, chr(65 + int(rng.integers(26))))
        x, y = (side - letter.width) // 2, (side - letter.height) // 2
        mask.paste(0 if filled else 255, (x, y), letter)
    return mask


def _beside(one: Image.Image, other: Image.Image, below: bool) -> Image.Image:
    gap = max(2, one.height // 6)
    width, height = max(one.width, other.width), max(one.height, other.height)
    size = (width, one.height + gap + other.height) if below else (one.width + gap + other.width, height)
    mask = Image.new("L", size)
    mask.paste(one, ((width - one.width) // 2, 0) if below else (0, (height - one.height) // 2))
    other_at = (
        ((width - other.width) // 2, one.height + gap) if below else (one.width + gap, (height - other.height) // 2)
    )
    mask.paste(other, other_at)
    return mask


def _within(mask: Image.Image, width: float, height: float) -> Image.Image:
    scale = min(1.0, width / mask.width, height / mask.height)
    return mask if scale == 1 else mask.resize((max(1, int(mask.width * scale)), max(1, int(mask.height * scale))))


def _at_edge(rng: np.random.Generator, size: tuple[int, int], mask: Image.Image) -> tuple[int, int]:
    """A corner, or the middle of the lower edge, a little inwards."""
    place, edge = int(rng.integers(5)), int(min(size) * rng.uniform(0.01, 0.07))
    x = {0: edge, 1: edge, 4: (size[0] - mask.width) // 2}.get(place, size[0] - edge - mask.width)
    return max(0, x), edge if place in (0, 2) else max(0, size[1] - edge - mask.height)


def coverage(rng: np.random.Generator, pen: Pen, size: tuple[int, int], style: str) -> tuple[Image.Image, Image.Image]:
    """(what is lighter or darker "L", what is below it "L": a band, or nothing) of a stamp for a picture of (width, height)."""
    width, height = size
    short, whole, under = min(size), Image.new("L", size), Image.new("L", size)
    if style == "corner":
        line = _line(rng, pen, round(short * float(np.exp(rng.uniform(np.log(0.028), np.log(0.075))))))
        if rng.random() < 0.2:
            line = _beside(line, _line(rng, pen, round(short * 0.03)), True)
        line = _within(line, 0.9 * width, 0.3 * height)
        whole.paste(line, _at_edge(rng, size, line))
    elif style == "logo":
        mark = _logo(rng, pen, round(short * rng.uniform(0.08, 0.3)))
        if rng.random() < 0.5:
            below = rng.random() < 0.5
            mark = _beside(mark, _line(rng, pen, round(mark.height * (0.25 if below else 0.5))), below)
        mark = _within(mark, 0.8 * width, 0.8 * height)
        middle = (width - mark.width) // 2, (height - mark.height) // 2
        whole.paste(mark, middle if rng.random() < 0.4 else _at_edge(rng, size, mark))
    elif style in ("across", "crossed"):
        line = _line(rng, pen, round(short * rng.uniform(0.07, 0.2)))
        line = _within(line, 0.85 * width, 0.3 * height)
        if rng.random() < 0.5:
            line = line.rotate(float(rng.uniform(-45, 45)), Image.Resampling.BICUBIC, expand=True)
        line = _within(line, 0.95 * width, 0.9 * height)
        whole.paste(line, ((width - line.width) // 2, (height - line.height) // 2))
        if style == "crossed":
            draw, thick = ImageDraw.Draw(whole), max(1, round(short * rng.uniform(0.003, 0.01)))
            draw.line([(0, 0), (width, height)], 255, thick)
            draw.line([(0, height), (width, 0)], 255, thick)
    elif style == "tiled":
        logo, unit = rng.random() < 0.25, round(short * rng.uniform(0.03, 0.08))
        tile = _logo(rng, pen, 2 * unit) if logo else _line(rng, pen, unit)
        turn = float(rng.choice([0.0, 1.0]) * rng.uniform(-45, 45))
        tile = tile.rotate(turn, Image.Resampling.BICUBIC, expand=True)
        dx, dy = (int(side * rng.uniform(1.15, 2.0)) + 4 for side in tile.size)
        for row, y in enumerate(range(-tile.height // 2, height, dy)):
            for x in range(-(dx // 2) * (row % 2), width, dx):
                whole.paste(255, (x, y), tile)
    elif style == "band":
        line = _within(_line(rng, pen, round(short * rng.uniform(0.04, 0.09))), 0.9 * width, 0.2 * height)
        tall = round(line.height * rng.uniform(1.4, 2.2))
        y = int((height - tall) * rng.choice([1.0, 0.92, 0.5]))
        under.paste(255, (0, y, width, y + tall))
        whole.paste(line, ((width - line.width) // 2, y + (tall - line.height) // 2))
    elif style == "seal":
        side = round(short * rng.uniform(0.25, 0.55))
        ring, letters = Image.new("L", (side, side)), max(8, side // 9)
        ImageDraw.Draw(ring).ellipse([0, 0, side - 1, side - 1], outline=255, width=max(1, side // 40))
        said = f"{words(rng)} - "
        said = (said * 6)[: max(10, round(2.6 * (side / 2 - letters) * np.pi / (0.9 * letters) / 1.3))]
        for i, letter in enumerate(said):
            angle = 2 * np.pi * i / len(said)
            if letter == " ":
                continue
            glyph = _line(rng, Pen(pen.fonts[:1]), letters, letter)
            glyph = glyph.rotate(-np.degrees(angle), Image.Resampling.BICUBIC, expand=True)
            x, y = (side / 2 + (side / 2 - letters) * f for f in (np.sin(angle), -np.cos(angle)))
            ring.paste(255, (int(x - glyph.width / 2), int(y - glyph.height / 2)), glyph)
        middle = (width - side) // 2, (height - side) // 2
        whole.paste(ring, middle if rng.random() < 0.4 else _at_edge(rng, size, ring))
    else:
        raise ValueError(f"stamp {style!r}: expected one of {', '.join(STYLES)}")
    return whole, under


def stamped(
    picture: np.ndarray, rng: np.random.Generator, pen: Pen = Pen(), styles: Sequence[str] = STYLES
) -> tuple[np.ndarray, np.ndarray, str]:
    """uint8 [H, W, 3] -> (the same with a stamp, bool [H, W] where it is, its style).

    Its opacity is .2 to .75, its colour mostly white, else black, grey or any; where that would hardly be seen, black or white,
    whichever changes more, and more of it.
    """
    style = styles[int(rng.integers(len(styles)))]
    image = Image.fromarray(picture)
    letters, band = coverage(rng, pen, image.size, style)
    choice, opacity = rng.random(), float(rng.uniform(0.2, OPAQUE))
    grey = 255 if choice < 0.6 else 0 if choice < 0.75 else 128
    colour = np.array([grey] * 3 if choice < 0.85 else rng.integers(0, 256, 3), np.float32)
    if band.getbbox():
        dark = rng.random() < 0.7
        image.paste((0,) * 3 if dark else (255,) * 3, (0, 0), _share(band, float(rng.uniform(0.25, 0.6))))
        colour, opacity = np.full(3, 255 if dark else 0, np.float32), max(opacity, 0.5)
    elif style in ("corner", "across") and rng.random() < 0.3:  # a soft shadow that keeps it legible
        shadow = letters.filter(ImageFilter.BoxBlur(max(1, image.height // 150)))
        image.paste((0, 0, 0), (1, 1), _share(shadow, 0.6 * opacity))
    where = np.asarray(letters) > 127
    behind = np.asarray(image)[where].astype(np.float32)

    def change(colour: np.ndarray) -> float:
        return float(np.abs(colour - behind).mean()) if len(behind) else 255.0

    least = max(VISIBLE, MASKED * float(behind.mean(1).std()) if len(behind) else 0.0)
    if change(colour) * opacity < least:
        colour = max((np.full(3, v, np.float32) for v in (0, 255)), key=change)
        opacity = min(OPAQUE, max(opacity, least / max(1.0, change(colour))))
    image.paste(tuple(int(v) for v in colour), (0, 0), _share(letters, opacity))
    return np.asarray(image), where | (np.asarray(band) > 0), style


def _share(mask: Image.Image, share: float) -> Image.Image:
    return mask.point([round(v * share) for v in range(256)])


# ------------------------------------------------------------------------------------------------ what is none


def decoyed(picture: np.ndarray, rng: np.random.Generator, pen: Pen) -> np.ndarray:
    """One to three things that are no watermark: opaque lettering anywhere, a sign, a band, shadows and glass, grids, stripes."""
    image = Image.fromarray(picture)
    width, height = image.size
    for _ in range(int(rng.integers(1, 4))):
        kind = int(rng.integers(6))
        colour: Any = tuple(rng.integers(0, 256, 3).tolist())
        if kind < 2:  # lettering of a watermark's size and places, as opaque as the scene
            line = _line(rng, pen, round(min(image.size) * rng.uniform(0.03, 0.16)))
            line = _within(line, 0.9 * width, 0.5 * height)
            at: Any = tuple(int(rng.integers(0, max(1, a - b))) for a, b in zip(image.size, line.size))
            if rng.random() < 0.4:
                at = _at_edge(rng, image.size, line)
            behind = np.asarray(image.crop((*at, at[0] + line.width, at[1] + line.height)), np.float32).mean((0, 1))
            if np.abs(behind - colour).mean() < 60:
                colour = (0, 0, 0) if behind.mean() > 128 else (255, 255, 255)
            if kind == 1:  # on a sign
                edge = max(3, line.height // 3)
                paper: Any = tuple(255 - v for v in colour)
                box = [at[0] - edge, at[1] - edge, at[0] + line.width + edge, at[1] + line.height + edge]
                ImageDraw.Draw(image).rectangle(box, fill=paper)
                colour = (0, 0, 0) if sum(paper) > 380 else (255, 255, 255)
            image.paste(colour, at, line)
        elif kind == 2:  # a shadow or a pane that lets the picture through
            pane = Image.new("L", image.size)
            x, y = int(rng.integers(-width // 4, width)), int(rng.integers(-height // 4, height))
            box = [x, y, x + int(rng.integers(20, width)), y + int(rng.integers(20, height))]
            draw = ImageDraw.Draw(pane)
            (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=int(rng.integers(30, 160)))
            if rng.random() < 0.7:
                pane = pane.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 12))))
            image.paste((0, 0, 0) if rng.random() < 0.5 else (255, 255, 255), (0, 0), pane)
        elif kind == 3:  # bars, fences, grids
            draw, step = ImageDraw.Draw(image), int(rng.integers(8, 60))
            x0, x1 = sorted(rng.integers(0, width, 2).tolist())
            for x in range(x0, x1, step):
                draw.line([(x, 0), (x, height)], colour, max(1, step // 6))
            if rng.random() < 0.5:
                for y in range(0, height, step):
                    draw.line([(x0, y), (x1, y)], colour, max(1, step // 6))
        elif kind == 4:  # a row of the same small things
            draw, step = ImageDraw.Draw(image), int(rng.integers(14, 60))
            y0 = int(rng.integers(0, height))
            for y in range(y0, min(height, y0 + step * int(rng.integers(1, 4))), step):
                for x in range(step // 2, width, step):
                    draw.ellipse([x, y, x + step // 3, y + step // 3], fill=colour)
        else:  # an edge of the picture, as frames and letterboxes have it
            draw, tall = ImageDraw.Draw(image), int(height * rng.uniform(0.03, 0.15))
            draw.rectangle(
                [0, height - tall, width, height] if rng.random() < 0.5 else [0, 0, width, tall], fill=colour
            )
    return np.asarray(image)


@dataclass
class Pictures:
    """Grounds by number. held_out: scenes, photographs and lettering that no training has. side: their shorter side in pixels."""

    seed: int
    pen: Pen
    held_out: bool = False
    side: int = 320

    def __post_init__(self) -> None:
        places = [p for p in PLACES if (p in HELD_OUT_PLACES) is self.held_out]
        self.photographs = tuple(file_of(place, view) for place in places for view in range(VIEWS))
        self.world = World("held_out" if self.held_out else "train")
        fonts = {"Latin": list(self.pen.fonts)} if self.pen.fonts else {}
        self.lettering = Style(fonts, self.photographs, self.side * 5 // 4, self.side, self.seed)

    def ground(self, number: int) -> np.ndarray:
        """uint8 [H, W, 3] without anything on it."""
        rng, side = generator(self.seed, "ground", number), self.side
        shares = {kind: share for kind, share in GROUNDS.items() if self.pen.fonts or kind != "lettering"}
        weights = np.array(list(shares.values()))
        kind = list(shares)[int(rng.choice(len(shares), p=weights / weights.sum()))]
        if kind == "world":
            scene = self.world.scene(int(rng.integers(1 << 30)), 256, 320)
            return np.asarray(Image.fromarray(self.world.render(scene)).resize((side * 5 // 4, side)))
        if kind == "lettering":
            return lettered(self.lettering, number).image
        if kind == "drawing":
            return np.asarray(drawn(number, side))
        if kind == "texture":
            return texture(rng, side, side * 5 // 4)
        if kind == "mosaic":
            return self._mosaic(rng)
        picture = self._photograph(rng)
        part = float(rng.uniform(0.6, 1.0))
        w, h = picture.width * part, picture.height * part * rng.uniform(0.65, 1.0)
        x, y = rng.uniform(0, picture.width - w), rng.uniform(0, picture.height - h)
        shape = (round(side * w / h), side) if w > h else (side, round(side * h / w))
        found = np.asarray(picture.resize(shape, Image.Resampling.BICUBIC, (x, y, x + w, y + h)))
        grain = rng.normal(0, rng.uniform(0, 8), (*found.shape[:2], 1)) + rng.normal(0, rng.uniform(0, 4), found.shape)
        return (found + grain).clip(0, 255).astype(np.uint8)  # enlarged photographs have lost theirs

    def _photograph(self, rng: np.random.Generator) -> Image.Image:
        with Image.open(self.photographs[int(rng.integers(len(self.photographs)))]) as opened:
            picture = opened.convert("RGB")
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture

    def _mosaic(self, rng: np.random.Generator) -> np.ndarray:
        """Shrunken, sharpened photographs side by side, each continued by its mirror images."""
        height, width = self.side, self.side * 5 // 4
        whole = Image.new("RGB", (width, height))
        parts = [(0, width)] if rng.random() < 0.6 else [(0, cut := int(rng.integers(width // 4, width))), (cut, width)]
        for left, right in parts:
            by = float(rng.uniform(0.3, 0.9))
            tile = np.asarray(self._photograph(rng).reduce(2) if by < 0.5 else self._photograph(rng))
            side = max(64, round(224 * by))
            image = Image.fromarray(tile).resize((side, side), Image.Resampling.LANCZOS)
            tile = np.asarray(image.filter(ImageFilter.UnsharpMask(1.0, int(rng.integers(0, 200)), 0)))
            rows, columns = -(-height // side), -(-(right - left) // side)
            tile = np.pad(tile, ((0, side * (rows - 1)), (0, side * (columns - 1)), (0, 0)), "symmetric")
            whole.paste(Image.fromarray(tile[:height, : right - left]), (left, 0))
        return np.asarray(whole)


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: noise whose amplitude falls as a power of the frequency, as grass, gravel, foliage or cloth; often
    folded into blobs and veins, stretched along one direction, or in patches."""
    fy, fx = np.fft.fftfreq(height)[:, None] * rng.uniform(0.5, 2), np.fft.rfftfreq(width)[None] * rng.uniform(0.5, 2)
    power = np.maximum(np.hypot(fy, fx), 1 / width) ** -rng.uniform(0.4, 1.8)
    power *= np.exp(-((np.hypot(fy, fx) / rng.uniform(0.15, 1.0)) ** 2))

    def field() -> np.ndarray:
        phase = rng.normal(size=(2, *power.shape))
        made = np.fft.irfft2((phase[0] + 1j * phase[1]) * power, (height, width))
        return np.asarray(made / max(1e-9, made.std()))

    base, kind = field(), rng.random()
    if kind < 0.25:
        base = np.abs(base) * 2 - 1
    elif kind < 0.45:
        base = np.tanh(base * rng.uniform(1, 4))
    elif kind < 0.6:
        base = np.sin(base * rng.uniform(2, 5))
    if rng.random() < 0.4:
        base = base * (np.tanh(np.sort(field(), axis=1)[:, ::-1] * 2) + 1) / 2
    colour, tint = rng.uniform(40, 215, 3), rng.normal(1, 0.25, 3)
    pixels = colour + base[..., None] * tint * rng.uniform(12, 60) + field()[..., None] * rng.normal(0, 6, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed} stamps {purpose} {number}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def worn(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As files are: of another tone, resized, a little soft, through JPEG."""
    tone, tint = float(rng.uniform(0.75, 1.15)), rng.uniform(-18, 18, 3)
    table = [min(255, max(0, round(v * tone + shift))) for shift in tint for v in range(256)]
    image = Image.fromarray(picture).point(table)
    if rng.random() < 0.5:
        by = float(rng.uniform(0.7, 1.0))
        image = image.resize((round(image.width * by), round(image.height * by)), Image.Resampling.BICUBIC)
    kind = rng.random()
    if kind < 0.2:
        image = image.filter(ImageFilter.UnsharpMask(1.5, int(rng.integers(30, 150)), 0))
    elif kind < 0.35:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.0))))
    if rng.random() < 0.6:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(rng.integers(45, 96)))
        image = Image.open(stream)
    return np.asarray(image.convert("RGB"))
