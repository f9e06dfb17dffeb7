"""What a score of a published benchmark is made of: who judged (`Card`), one number with its interval (`Figure`), one run (`Column`).

A judgement that failed is a missing value, never 0. Each dimension counts its own (`Count`): where more than MAX_MISSING of one's
are missing it has no figure, and the run no total. Scores of different judges do not stand side by side: `expect_same_judges`
refuses them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lens.formats.files import read_json

from ...loop.keys import keyed

MAX_MISSING = 0.05  # share of the judgements
RESAMPLES = 2000  # of a bootstrap over prompts
Z = 1.96  # of a 95 % interval
EVERY = 10.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Card:
    """Who judged: printed beside every score, and what scores are compared by.

    revision: of the weights; device: the GPU's name, or "cpu"; differs: how this judge differs from the published one, "" where
    it is the same.
    """

    judge: str
    revision: str
    dtype: str
    device: str
    differs: str = ""

    def __str__(self) -> str:
        return f"{self.judge}, revision {self.revision}, {self.dtype}, {self.device}"


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval; `of`: prompts, or whatever it is a mean of. value None: not measured, `note` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    of: int = 0
    note: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return self.note or "-"
        return f"{self.value:.3f}" if self.low is None else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass
class Count:
    """Judgements of one dimension: expected when it began, judged, and missing of these. stopped: it ended before its last."""

    expected: int
    judged: int = 0
    missing: int = 0
    stopped: bool = False

    def goes_on(self) -> bool:
        """False, from then on, once too many of the expected are missing: no figure can come of it, judge no more."""
        self.stopped = self.stopped or self.missing > MAX_MISSING * self.expected
        return not self.stopped

    @property
    def complete(self) -> bool:
        return not self.stopped and self.missing <= MAX_MISSING * self.judged

    def __str__(self) -> str:
        return f"{self.missing} of {self.judged} judgements missing{', the rest not made' if self.stopped else ''}"


@dataclass
class Column:
    """One run of a benchmark. figures: name -> number, the total under `total`; rows: one a prompt, with what each image was
    given and why; counts: dimension -> its judgements; language: of its prompts."""

    name: str
    cards: list[Card]
    figures: dict[str, Figure] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    total: str = "total"
    counts: dict[str, Count] = field(default_factory=dict)
    language: str = "en"

    def count(self, dimension: str, expected: int) -> Count:
        """A count that begins at zero."""
        self.counts[dimension] = Count(expected)
        return self.counts[dimension]

    @property
    def judged(self) -> int:
        return sum(count.judged for count in self.counts.values())

    @property
    def missing(self) -> int:
        return sum(count.missing for count in self.counts.values())

    @property
    def complete(self) -> bool:
        return self.judged > 0 and all(count.complete for count in self.counts.values())

    @property
    def lacking(self) -> str:
        """What keeps it from a total: "text: 3 of 20 judgements missing"; "" where nothing does."""
        ill = [f"{name}: {count}" for name, count in self.counts.items() if not count.complete]
        return "; ".join(ill) or ("" if self.judged else "nothing judged")

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "language": self.language,
            "judges": [asdict(card) for card in self.cards],
            "total": self.total,
            "missing": self.missing,
            "judged": self.judged,
            "counts": {name: asdict(count) for name, count in self.counts.items()},
            "figures": {name: asdict(figure) for name, figure in self.figures.items()},
        }

    @classmethod
    def of(cls, values: dict[str, Any], language: str) -> Column:
        """From `as_json`; without rows. language: where an older file does not say it. Errors: KeyError or TypeError."""
        figures = {name: Figure(**figure) for name, figure in values["figures"].items()}
        cards = [Card(**card) for card in values["judges"]]
        pooled = {"all": {"expected": values["judged"], "judged": values["judged"], "missing": values["missing"]}}
        counts = {name: Count(**count) for name, count in values.get("counts", pooled).items()}
        return cls(values["name"], cards, figures, [], values["total"], counts, values.get("language", language))


def columns_of(path: Path) -> tuple[str, list[Column]]:
    """(benchmark, columns) of a scores.json. Errors: ValueError naming the file."""
    try:
        values = read_json(path)
        if values["settings"].get("limit") is not None:
            raise ValueError("of a part of the prompts (--limit)")
        languages = values["settings"].get("language") or ["en"]
        told = languages[0] if len(languages) == 1 else "one of several languages"
        return values["benchmark"], [Column.of(column, told) for column in values["columns"]]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: no scores of a whole published benchmark ({error})") from None


def expect_same_judges(columns: Sequence[Column]) -> None:
    """Errors: ValueError naming both judges."""
    for other in columns[1:]:
        if other.cards != columns[0].cards:
            ours, theirs = ("; ".join(map(str, c.cards)) for c in (columns[0], other))
            raise ValueError(
                f"{columns[0].name} was judged by {ours}, {other.name} by {theirs}: scores of different judges do not compare"
            )


class Progress:
    """Says how far a run's judging is, at most once in EVERY seconds: "text: 40 of 200 prompts judged, 61 s left"."""

    def __init__(self, what: str, of: int, tell: Callable[[str], None] = print):
        self.what, self.of, self.tell = what, of, tell
        self.done, self.began = 0, time.monotonic()
        self.told = self.began

    def __call__(self) -> None:
        """One more prompt is judged."""
        self.done += 1
        now = time.monotonic()
        if now - self.told >= EVERY:
            self.told = now
            left = (now - self.began) / self.done * (self.of - self.done)
            self.tell(f"{self.what}: {self.done} of {self.of} prompts judged, {left:.0f} s left")


# ------------------------------------------------------------------------------------------------ numbers


def commonest(numbers: Iterable[int], otherwise: int) -> int:
    """Images that most prompts have, of equally common numbers the largest; those without any do not count."""
    found = Counter(number for number in numbers if number)
    return max(found, key=lambda number: (found[number], number), default=otherwise)


def mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _standard_error(groups: Sequence[Sequence[float]]) -> float:
    """Of the pooled mean of clustered values: sqrt(n / (n - 1) sum (S_g - m k_g)^2) / K, sums S_g over clusters of k_g, K in all."""
    n, size = len(groups), sum(map(len, groups))
    pooled = sum(map(sum, groups)) / size
    return math.sqrt(n / max(n - 1, 1) * sum((sum(g) - pooled * len(g)) ** 2 for g in groups)) / size


def share(groups: Sequence[Sequence[float]]) -> Figure:
    """A share of images, clustered by prompt: groups[i] are the 0s and 1s of prompt i, empty ones left out.

    The interval is Wilson's at the effective number p (1 - p) / e^2, e the standard error over prompts; where no image differs
    from another (e = 0), at the number of prompts.
    """
    groups = [g for g in groups if g]
    if not groups:
        return Figure(None, note="nothing judged")
    p, e = sum(map(sum, groups)) / sum(map(len, groups)), _standard_error(groups)
    of = p * (1 - p) / e**2 if e > 0 and 0 < p < 1 else float(len(groups))
    middle, half = p + Z * Z / (2 * of), Z * math.sqrt(p * (1 - p) / of + Z * Z / (4 * of * of))
    low, high = ((middle + sign * half) / (1 + Z * Z / of) for sign in (-1, 1))
    return Figure(p, min(p, max(0.0, low)), max(p, min(1.0, high)), len(groups))


def averaged(figures: Sequence[Figure]) -> Figure:
    """The plain mean of independent figures; its interval by their half-widths in squares. Not measured where one is not."""
    if ill := [f.note for f in figures if f.value is None]:
        return Figure(None, note=ill[0])
    values = [f.value or 0.0 for f in figures]
    middle = sum(values) / len(values)
    if any(f.low is None for f in figures):
        return Figure(middle, of=sum(f.of for f in figures))
    below = math.sqrt(sum((v - (f.low or 0.0)) ** 2 for v, f in zip(values, figures))) / len(figures)
    above = math.sqrt(sum(((f.high or 0.0) - v) ** 2 for v, f in zip(values, figures))) / len(figures)
    return Figure(middle, max(0.0, middle - below), min(1.0, middle + above), sum(f.of for f in figures))


def bootstrapped(rows: Sequence[Any], statistic: Callable[[Sequence[Any]], float | None]) -> Figure:
    """A statistic of per-prompt rows with its percentile interval over RESAMPLES draws of as many prompts, always the same draws.

    Draws for which it is None (nothing to divide by) are left out.
    """
    value = statistic(rows) if rows else None
    if value is None:
        return Figure(None, note="nothing judged")
    rng = np.random.default_rng(keyed(0, "bootstrap over prompts").initial_seed())
    draws = (statistic([rows[k] for k in rng.integers(len(rows), size=len(rows))]) for _ in range(RESAMPLES))
    found = [d for d in draws if d is not None]
    low, high = np.percentile(found, [2.5, 97.5])
    return Figure(value, float(low), float(high), len(rows))
