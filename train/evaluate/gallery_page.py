"""The gallery's page: records in, one HTML file out. Knows nothing of models, worlds or judges.

Pictures travel inside the page as data URIs, so that the one file can be mailed and opened without a network; no script runs.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = Path(__file__).with_name("gallery.html.jinja")
CURVE = (400, 220, 44, 8, 8, 34)  # width, height; margins left, right, top, bottom
POINTS = 240  # of one line of the loss curve
LINES = {  # of a log: what is drawn as a curve, and how it is called
    "loss": "training loss",
    "held_loss": "unseen scenes",
    "with_text": "unseen scenes",
    "without_text": "unseen scenes without their text",
}
MEANS = ("detector", "shape judge", "its soft score", "distance to a true render")
FACTS = {"psnr": "dB on unseen scenes", "text_explains": "of the loss explained by text"}


@dataclass(frozen=True)
class Share:
    """Part of `of` things that were right, with the interval it lies in where one is known."""

    value: float
    low: float | None = None
    high: float | None = None
    of: int | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f}"

    @property
    def interval(self) -> str:
        return "" if self.low is None else f"{self.low:.3f}–{self.high:.3f}"


@dataclass(frozen=True)
class Card:
    """One drawn picture: its PNG file's bytes, its sides in pixels, and the judge's word on it (right None: not judged)."""

    prompt: str
    seed: int
    png: bytes
    size: tuple[int, int]
    right: bool | None
    reason: str = ""
    language: str = "en"
    label: str = ""

    @property
    def source(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    @property
    def verdict(self) -> str:
        return {True: "right", False: "wrong", None: "unjudged"}[self.right]


@dataclass(frozen=True)
class Task:
    """A task's first pictures and its row of the score table: shares by column, None where nothing was measured."""

    name: str
    asks: str
    cards: Sequence[Card]
    shares: Mapping[str, Share | None] = field(default_factory=dict)
    shown: str = ""  # the column that the shown pictures belong to


@dataclass(frozen=True)
class Class:
    name: str
    card: Card
    share: Share | None


@dataclass(frozen=True)
class StageLog:
    """A training stage as its log tells it; `facts` are (what, number) pairs and `recipe` is its file and text."""

    name: str
    facts: Sequence[tuple[str, str]]
    lines: Mapping[str, Sequence[tuple[float, float]]]
    recipe: tuple[str, str] | None = None


@dataclass(frozen=True)
class Page:
    model: Mapping[str, Any]  # name, parameters, megabytes, side, steps, guidance, fingerprint, version, date
    classes: Sequence[Class]
    tasks: Sequence[Task]
    columns: Sequence[tuple[str, str]]  # of the score table: (key into Task.shares, heading)
    means: Sequence[tuple[str, Sequence[str]]]  # of GenEval's six tasks: of what, and by the judges in MEANS
    numbers: Sequence[tuple[str, Share, Share]]  # counting: number asked for, detector's score, shape judge's
    class_sheet: Card  # every class: true, reconstructed, drawn
    guidance: Sequence[tuple[str, Sequence[Card]]]  # per prompt its cards, strength by strength
    sizes: Sequence[tuple[str, Sequence[Card]]]  # the same, size by size
    languages: Sequence[Card]
    dense: Sequence[Card]
    signs: Sequence[Card]
    stages: Sequence[StageLog]
    notes: Sequence[str]  # how the judges judged
    commands: Sequence[str]


def render(page: Page) -> str:
    """The page as HTML. Every text is escaped; a name the template does not know raises jinja2.UndefinedError."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["tally"] = tally
    environment.globals.update(curve=curve, mean_headings=MEANS)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page=page)
    return text + "\n" if not text.endswith("\n") else text


def tally(cards: Sequence[Card]) -> str:
    """ "7 of 8 right"; pictures without a judge are said, not counted."""
    judged = [card for card in cards if card.right is not None]
    words = f"{sum(bool(card.right) for card in judged)} of {len(judged)} right" if judged else ""
    rest = len(cards) - len(judged)
    return ", ".join(part for part in (words, f"{rest} not judged" if rest else "") if part)


# ------------------------------------------------------------------------------------------------ training logs


def facts(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Steps, samples and minutes over all sittings (a log's clock starts anew with each), and the last of FACTS."""
    if not rows:
        return []
    timed = [row for row in rows if "seconds" in row]
    ends = [a for a, b in zip(timed, [*timed[1:], {"seconds": -1}]) if b["seconds"] < a["seconds"]]
    out = [("steps", f"{rows[-1]['step']:,}")]
    samples = sum(row.get("samples", row.get("rate", 0.0) * row["seconds"]) for row in ends)  # older logs have a rate
    out += [("samples", f"{samples:,.0f}")] if samples else []
    out += [("minutes", f"{sum(row['seconds'] for row in ends) / 60:.0f}")] if ends else []
    for key, words in FACTS.items():
        values = [row[key] for row in rows if key in row]
        out += [(words, f"{values[-1]:.3g}")] if values else []
    return out


def lines(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The curves of LINES; a step that was logged twice, before and after a resumption, counts as it was last."""
    found = {}
    for key, words in LINES.items():
        values = {
            row["step"]: row[key] for row in rows if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
        }
        if len(values) > 1:
            found[words] = sorted(values.items())
    return found


# ------------------------------------------------------------------------------------------------ the loss curve


def curve(lines: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Lines of (step, value) -> what an SVG of CURVE's size draws: polylines, ticks of both axes, the frame.

    The vertical axis starts at 0 and ends above the largest value after the first fiftieth of the steps: the steep start
    leaves the picture at its top rather than flattening everything else.
    """
    width, height, left, right, top, bottom = CURVE
    last = max(step for points in lines.values() for step, _ in points)
    late = [value for points in lines.values() for step, value in points if step >= last / 50]
    x_tick, y_tick = tick(last), tick(max(late))
    highest = y_tick * (int(max(late) / y_tick) + 1)

    def at(step: float, value: float) -> str:
        x = left + (width - left - right) * step / last
        y = top + (height - top - bottom) * (1 - value / highest)
        return f"{x:.1f},{y:.1f}"

    drawn = []
    for number, (name, points) in enumerate(lines.items()):
        thinned = [points[i] for i in range(0, len(points), max(1, len(points) // POINTS))]
        thinned += [points[-1]] if thinned[-1] != points[-1] else []
        drawn.append(
            {"name": name, "number": number, "points": " ".join(at(*p) for p in thinned), "last": points[-1][1]}
        )
    return {
        "size": (width, height),
        "frame": (left, top, width - right, height - bottom),
        "lines": drawn,
        "x": [(at(step, 0).split(",")[0], f"{step:,.0f}".replace(",", " ")) for step in steps(x_tick, last)],
        "y": [(at(0, value).split(",")[1], f"{value:g}") for value in steps(y_tick, highest)],
    }


def tick(largest: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides [0, largest] into three to six parts or so."""
    power = 10.0 ** int(f"{largest / 4:e}".split("e")[1])
    return next(m * power for m in (1, 2, 5, 10) if m * power >= largest / 5)


def steps(by: float, to: float) -> list[float]:
    return [i * by for i in range(int(to / by + 1e-9) + 1)]
