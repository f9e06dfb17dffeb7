"""Signs with words: which texts, which colours, how large, and their pixels."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np

from .backdrops import BACKGROUNDS, PATTERNED, standing_out
from .glyphs import width_of, word_mask
from .kinds import PALETTE
from .sprites import lab, ring

WORDS = Path(__file__).parent / "assets" / "words.txt"
MIN_LETTER = 8  # pixels of a letter's height
MIN_LIGHTNESS = 40.0  # between paper and ink, in Lab's L
USUAL = ("white", "black")  # paper and ink of a sign whose colours go unsaid
CLEAR = "ACDEFGHJKMNPRTUVWXY"  # letters of made-up texts: none that reads as a digit
DIGITS = "2345679"


@functools.cache
def word_list() -> tuple[str, ...]:
    """Common words of two to six capitals."""
    return tuple(WORDS.read_text().split())


def draw_text(rng: random.Random, mixed_case: bool) -> str:
    """A word (five times in six), a made-up string of letters and digits, or a word with a number."""
    kind = rng.random()
    if kind < 0.10:
        return "".join(rng.choices(CLEAR, k=rng.choice((1, 2)))) + "".join(rng.choices(DIGITS, k=rng.choice((1, 2))))
    if kind < 0.17:
        return rng.choice([w for w in word_list() if len(w) <= 4]) + " " + rng.choice(DIGITS)
    word = rng.choice(word_list())
    # "Ill" is what mixed case must not make: capital I and small l look the same
    return word.capitalize() if mixed_case and rng.random() < 0.4 and "I" not in word and "L" not in word else word


@functools.cache
def colours_on(background: str) -> tuple[tuple[str, str], ...]:
    """(paper, ink) pairs that read well and stand out from the background; none on patterned walls."""
    if background not in BACKGROUNDS:
        raise ValueError(f"colours_on: unknown background {background!r}, expected one of {BACKGROUNDS}")
    if background in PATTERNED:
        return ()
    tone = {name: lab(np.array(rgb)) for name, rgb in PALETTE.items()}
    papers = [name for name in PALETTE if background in standing_out(tone[name])]
    return tuple((p, i) for p in papers for i in PALETTE if abs(tone[p][0] - tone[i][0]) >= MIN_LIGHTNESS)


def fitted(text: str, width: float, height: float) -> tuple[int, int, int] | None:
    """(letter height, sign width, sign height) of the largest sign in that room; None where letters get too small."""
    letter = int(min(width / (width_of(text) + 0.9), height / 2.0))
    if letter < MIN_LETTER:
        return None
    mask = word_mask(text, letter)
    wide = min(int(width), max(mask.shape[1] + max(6, round(0.9 * letter)), round(0.5 * width)))
    return letter, wide, min(int(height), letter + max(6, round(0.9 * letter)))


@functools.lru_cache(maxsize=512)
def _board(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage of a rounded board and of its inside within the rim: float32 [h, w, 1] each."""
    radius, rim = 0.24 * height, max(1.0, height / 18)
    x = np.abs(np.arange(width, dtype=np.float32) + 0.5 - width / 2)[None] - (width / 2 - radius)
    y = np.abs(np.arange(height, dtype=np.float32) + 0.5 - height / 2)[:, None] - (height / 2 - radius)
    distance = np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0) - radius
    cover = np.clip(0.5 - distance, 0, 1).astype(np.float32)
    return cover[..., None], np.clip(0.5 - distance - rim, 0, 1).astype(np.float32)[..., None]


@functools.lru_cache(maxsize=512)
def outline(width: int, height: int) -> np.ndarray:
    """bool [h + 2 r, w + 2 r]: the ring of r pixels around a board, r an eighth of its height."""
    rim = max(2, round(height / 8))
    return ring(np.pad(_board(width, height)[0][..., 0] > 0.5, rim), rim)


def paint(canvas: np.ndarray, text: str, paper: str, ink: str, letter: int, box: tuple[int, int, int, int]) -> None:
    """Draw a sign into float32 [H, W, 3]: soft drop shadow, rim and letters of ink on paper."""
    x0, y0, x1, y1 = box
    cover, inside = _board(x1 - x0, y1 - y0)
    drop = max(1, (y1 - y0) // 16)
    below = canvas[y0 + drop : y1 + drop, x0:x1]
    below *= 1 - 0.3 * cover[: below.shape[0]]
    mask = word_mask(text, letter)
    top, left = (y1 - y0 - mask.shape[0]) // 2, (x1 - x0 - mask.shape[1]) // 2
    inked = 1 - inside
    part = inked[top : top + mask.shape[0], left : left + mask.shape[1], 0]
    np.maximum(part, mask, out=part)
    face = np.array(PALETTE[paper], np.float32) * (1 - inked) + np.array(PALETTE[ink], np.float32) * inked
    view = canvas[y0:y1, x0:x1]
    view += (face - view) * cover
