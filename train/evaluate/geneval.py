"""GenEval's rule as pure functions: detections of a picture against what its prompt asks.

A prompt asks for objects (`Want`: a class, how many, perhaps a colour, perhaps a place relative to an earlier want) and may
forbid others (`exclude`: wrong from `count` boxes of the class on, so that counting means exactly n). Per want the `count` most
confident boxes of its class are taken; fewer are wrong. A colour must be seen in each of them; a relation must hold
between each of them and each box of the want it refers to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..data.small_world.kinds import KINDS

if TYPE_CHECKING:
    from ..data.small_world.scene import Scene

FOUND = 0.3  # a box counts from above this confidence on
SHRINK = 0.1  # of the two boxes' summed sizes, taken off their centres' offset
SIDE = 0.5  # sine of the angle from which on an offset is "left", "above", ...
BEST = 16  # boxes kept per class
COLOUR_TASKS = ("colors", "color_attr")

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive


@dataclass(frozen=True)
class Detection:
    kind: str
    score: float
    box: Box
    colour: str | None = None
    colours: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)  # palette word -> probability


@dataclass(frozen=True)
class Want:
    """`count` objects of a class; `relation` = (word, index of an earlier want that it is left of, above, ...)."""

    kind: str
    count: int = 1
    colour: str | None = None
    relation: tuple[str, int] | None = None


@dataclass(frozen=True)
class Asked:
    include: tuple[Want, ...]
    exclude: tuple[tuple[str, int], ...] = ()  # (class, count): wrong if at least so many


@dataclass(frozen=True)
class GenevalVerdict:
    right: bool
    found: tuple[bool, ...]  # per want: enough boxes of its class
    coloured: tuple[bool | None, ...]  # per want: its colour is right; None where none is asked or nothing was found
    reasons: tuple[str, ...]


def relations(one: Box, two: Box) -> set[str]:
    """Which of "left of", "right of", "above", "below" holds for box `one` as seen from box `two`.

    The centres' offset d is shrunk per axis towards 0 by SHRINK times the summed sizes and divided by |d| before
    shrinking; a component beyond SIDE counts. Two can hold at once; none holds where both components shrink to 0.
    """
    offset = [(one[i] + one[i + 2]) / 2 - (two[i] + two[i + 2]) / 2 for i in (0, 1)]
    sizes = [one[i + 2] - one[i] + two[i + 2] - two[i] for i in (0, 1)]
    shrunk = [math.copysign(max(abs(d) - SHRINK * s, 0.0), d) for d, s in zip(offset, sizes)]
    if all(abs(d) < 1e-3 for d in shrunk):
        return set()
    dx, dy = (d / math.hypot(*offset) for d in shrunk)
    held = {"left of": dx < -SIDE, "right of": dx > SIDE, "above": dy < -SIDE, "below": dy > SIDE}
    return {name for name, holds in held.items() if holds}


def judge(asked: Asked, seen: Sequence[Detection], found_above: float = FOUND) -> GenevalVerdict:
    """The rule. Of equally confident boxes the later one goes first, as in the original."""
    boxes: dict[str, list[Detection]] = {}
    later_first = list(reversed(seen))
    for detection in sorted(later_first, key=lambda d: -d.score):
        if detection.score > found_above:
            boxes.setdefault(detection.kind, []).append(detection)
    taken: list[list[Detection]] = []
    found, coloured, reasons = [], [], []
    for want in asked.include:
        have = boxes.get(want.kind, [])[:BEST][: want.count]
        enough, right_colour = len(have) >= want.count, None
        taken.append(have if enough else [])
        if not enough:
            reasons.append(f"{want.kind}: {want.count} asked for, {len(have)} seen")
        elif want.colour is not None:
            right_colour = all(d.colour == want.colour for d in have)
            if not right_colour:
                reasons.append(f"{want.colour} {want.kind} asked, {', '.join(str(d.colour) for d in have)} seen")
        if enough and want.relation is not None:
            word, other = want.relation
            if not 0 <= other < len(taken) - 1:
                raise ValueError(
                    f"judge: relation {want.relation} of want {len(taken) - 1}, expected an earlier want's index"
                )
            if not all(word in relations(d.box, target.box) for d in have for target in taken[other]):
                reasons.append(f"{want.kind} {word} {asked.include[other].kind} asked, not so")
        found.append(enough)
        coloured.append(right_colour)
    for kind, count in asked.exclude:
        if len(boxes.get(kind, [])[:BEST]) >= count:
            reasons.append(f"fewer than {count} {kind} asked, {len(boxes[kind])} seen")
    return GenevalVerdict(not reasons, tuple(found), tuple(coloured), tuple(reasons))


def asked(scene: Scene, said: bool = False) -> Asked:
    """What the scene's prompt asks for, in GenEval's terms; colours where the task is about colours.

    said: also wherever the prompt says them in another task, which is every colour that is not the class's natural one.
    """
    things = scene.things
    colours = [
        t.colour if scene.task in COLOUR_TASKS or (said and t.colour != KINDS[t.kind].natural) else None for t in things
    ]
    if scene.task == "counting":
        kind, count = things[0].kind, len(things)
        return Asked((Want(kind, count, colours[0]),), ((kind, count + 1),))
    if scene.task == "position":
        if len(things) != 2 or scene.relation not in ("left", "above"):
            raise ValueError(f"asked: position scene with {len(things)} things and relation {scene.relation!r}")
        word = {"left": "left of", "above": "above"}[scene.relation]
        return Asked((Want(things[1].kind, 1, colours[1]), Want(things[0].kind, 1, colours[0], (word, 0))))
    wants = []
    for i, (thing, colour) in enumerate(zip(things, colours)):
        relation = ("right of", i - 1) if scene.task == "row" and i else None
        wants.append(Want(thing.kind, 1, colour, relation))
    return Asked(tuple(wants))


def voted_colour(picture: np.ndarray, box: Box, palette: dict[str, tuple[int, int, int]], inner: float = 0.6) -> str:
    """Colour by arithmetic, as a cross-check of learned heads: uint8 [H, W, 3] -> a palette word.

    Every pixel of the box's middle (`inner` of each side) votes for the palette colour with the nearest chroma and, at a
    quarter weight, lightness in CIE Lab; saturated pixels count more. No weights, no training.
    """
    from ..data.small_world.sprites import lab

    height, width = picture.shape[:2]
    x0, y0, x1, y1 = box
    mx, my = (x1 - x0) * (1 - inner) / 2, (y1 - y0) * (1 - inner) / 2
    left, top = min(max(0, round(x0 + mx)), width - 1), min(max(0, round(y0 + my)), height - 1)
    part = picture[top : max(top + 1, round(y1 - my)), left : max(left + 1, round(x1 - mx))].reshape(-1, 3)
    names, scale = list(palette), np.array([0.5, 1.0, 1.0])
    pixels = lab(part.astype(np.float64)) * scale
    targets = lab(np.array([palette[n] for n in names], np.float64)) * scale
    nearest = ((pixels[:, None] - targets[None]) ** 2).sum(-1).argmin(1)
    weight = 0.15 + np.hypot(pixels[:, 1], pixels[:, 2]) / 60
    return names[int(np.bincount(nearest, weights=weight, minlength=len(names)).argmax())]
