"""What a group of pictures of one prompt adds: different backdrops and places, where the prompt leaves them open.

A policy that is rewarded picture by picture finds the one backdrop that is easiest to draw and to judge. Here a picture is
rewarded for what the others of its group have not:  1 - share of the others with the same backdrop (or place). And scores are
made `neutral`: what a backdrop or a place earns by being itself is taken off, so that no advantage speaks for one or another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..data.small_world.layout import place_of
from ..evaluate import geneval
from ..evaluate.detector import Detector
from ..evaluate.geneval import Detection
from ..evaluate.surroundings import surroundings

THUMB = 8  # pixels of the side of a thumbnail


@dataclass(frozen=True)
class Look:
    """A picture in a few words: its backdrop (None: none of the world's), where its surest object is, and a thumbnail."""

    backdrop: str | None
    place: tuple[str, str] | None
    thumbnail: np.ndarray  # uint8 [THUMB, THUMB, 3]


def thumbnail(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((THUMB, THUMB), Image.Resampling.BOX))


def look_at(detector: Detector, picture: np.ndarray) -> Look:
    """uint8 [H, W, 3] -> what tells it apart from the others of its group."""
    (seen,) = detector.look([picture])
    boxes = [d.box for d in seen if d.score > geneval.FOUND]
    return look_of(picture, seen, surroundings(picture.astype(np.float32), boxes)[0])


def look_of(picture: np.ndarray, seen: Sequence[Detection], backdrop: str | None) -> Look:
    """The same where its objects and its backdrop are known."""
    found = [d for d in seen if d.score > geneval.FOUND]
    height, width = picture.shape[:2]
    place = None
    if found:
        x0, y0, x1, y1 = found[0].box
        place = place_of((round(x0), round(y0), round(x1), round(y1)), height, width)
    return Look(backdrop, place, thumbnail(picture))


def rarity(values: Sequence[object], groups: Sequence[int]) -> np.ndarray:
    """Per picture 1 - the share of the others of its group with the same value; 0 for None and where it is alone: float64 [n]."""
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    out = np.zeros(len(values))
    for own in members.values():
        counts = Counter(values[i] for i in own)
        for i in own:
            if values[i] is not None and len(own) > 1:
                out[i] = 1 - (counts[values[i]] - 1) / (len(own) - 1)
    return out


def rewards(looks: Sequence[Look], groups: Sequence[int]) -> np.ndarray:
    """Mean of both rarities: float64 [n] in [0, 1]. A backdrop that the prompt asks for is equal in all, and moves no advantage."""
    return (rarity([one.backdrop for one in looks], groups) + rarity([one.place for one in looks], groups)) / 2


def neutral(
    score: np.ndarray,
    valid: np.ndarray,
    groups: Sequence[int],
    factors: Sequence[Sequence[object]],
    shrink: float = 8.0,
) -> np.ndarray:
    """Scores without what the values of factors are worth by themselves: float64 [n].

    score = group + the sum of one effect per factor's value + rest, by ridge regression over the pictures that are valid and
    whose values are all known (not None); the effects, of mean 0 over these, are taken off. An effect is shrunk as if `shrink` more
    pictures of its value had shown none: else one torn picture would speak well of the three others of its backdrop. With 0, the
    smallest solution, what is left less its groups' means adds up to 0 over every value. Pictures with a None keep their score: a
    backdrop that is none of the world's is a fault.
    """
    known = np.array(valid, bool)
    for values in factors:
        known &= np.array([value is not None for value in values])
    if not factors or not known.any():
        return score.astype(np.float64)
    names = [
        (place, value) for place, values in enumerate(factors) for value in dict.fromkeys(values) if value is not None
    ]
    columns = np.array([[float(factors[place][i] == value) for place, value in names] for i in range(len(score))])
    rest, design = score[known].astype(np.float64), columns[known]
    members = np.array(groups)[known]
    for group in np.unique(members):
        own = members == group
        rest[own], design[own] = rest[own] - rest[own].mean(), design[own] - design[own].mean(0)
    if shrink:
        effects = np.linalg.solve(design.T @ design + shrink * np.eye(len(names)), design.T @ rest)
    else:
        effects = np.linalg.lstsq(design, rest, rcond=1e-9)[0]
    worth = columns @ effects
    return score - np.where(known, worth - worth[known].mean(), 0.0)


def effective_number(values: Sequence[object]) -> float:
    """exp of the entropy of a histogram: 1 where all are alike, n where n values are equally often."""
    shares = np.array(list(Counter(values).values())) / len(values)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def spread(looks: Sequence[Look], groups: Sequence[int]) -> float:
    """Mean distance (root mean square, of 1) between the thumbnails of two pictures of a group; NaN without a pair."""
    found = []
    for group in dict.fromkeys(groups):
        own = np.stack([one.thumbnail for one, g in zip(looks, groups) if g == group]).astype(np.float64) / 255
        if len(own) > 1:
            apart = np.sqrt(((own[:, None] - own[None]) ** 2).mean((2, 3, 4)))
            found.append(apart.sum() / (len(own) * (len(own) - 1)))
    return float(np.mean(found)) if found else float("nan")


def sharpness(picture: np.ndarray) -> float:
    """Mean |Laplacian| of the grey picture, of 255: falls where pictures blur."""
    grey = picture.astype(np.float64).mean(-1)
    inner = grey[1:-1, 1:-1]
    return float(np.abs(grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner).mean())
