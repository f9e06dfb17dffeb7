"""The shape judge, by pixels alone: how far is every object that stands in a picture from the nearest true render?

A detector names an object whose outline is torn, that shows a lattice, or that floats beside a copy of itself. This judge
redraws the picture from true renders and measures what is left. It has no learned weights.

1. Backdrop: the world's own where one fits, else the surroundings filled in (`surroundings.py`): in the end of what the fitted
   objects cover alone, so that over an unknown backdrop a halo is no fault, only what is missing or wrong within.
2. Candidates: a detector's boxes, and later every patch that the redrawn picture leaves unexplained, so that a duplicate the
   detector overlooks is found as well (over an unknown backdrop the boxes alone).
3. Class and colour: the candidate at about COARSE pixels against every class in every colour, size and shift composited
   over the backdrop, one matrix product per class and size (the expansion of the squared error is template.py's).
4. Fit: the best few classes at full resolution, pixel by pixel in place and size, with the world's contact shadow.
5. Distance: with picture P, redrawn picture T, backdrop C, and W the fitted box with a margin around it,

       distance = sum_W |P - T|^2 / max(sum_W |T - C|^2, 3 FAINT^2 |W|)

   It is 0 for a picture equal to a true render and near 1 for one that has nothing to do with it. Holes, speckle, torn
   outlines and what clings to the outside of the silhouette all count. Pixels in another object's box are left to that object.

6. Outline: the same of slopes, S a triangle filter of BLUR of the picture's shorter side per axis,

       outline = sum_W |grad S(P - T)|^2 / max(sum_W |grad S T|^2, 3 FLAT^2 |W|)

   A reconstruction, which is a blurred render, has a small one at every size of picture; a torn outline has not, however little
   its area.

`soft` = sigmoid(bias - weights . (distance, outline)) is calibrated (`shape_calibration.py`): an object is a true shape from
1/2 on. A picture is right where GenEval's rule holds, everything in it is a true shape, and nothing else stands there.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.small_world.backdrops import shadow
from ..data.small_world.sprites import colours_of, fitted_size, scaled, sprite
from . import geneval
from .detector import SIGN, overlap
from .geneval import Asked, Detection
from .surroundings import Box, filled, surroundings, within

CALIBRATION = Path(__file__).parent / "assets" / "shape.json"
COARSE, SIZES, REACH = (
    18,
    (15, 17, 19, 21),
    3,
)  # a candidate's longer side, longer sides tried, shifts; in coarse pixels
WINDOW = max(SIZES) + 2 * REACH + 2
NEAR, MOST = (
    0.15,
    4,
)  # at most so many classes are fitted, those within so much of the best in what they leave unexplained
FAINT = 30.0  # of 255: the least contrast that a distance is measured against
ALIKE = 0.6  # two detected boxes whose intersection over union exceeds this are one candidate
SAME = 0.45  # two boxes whose intersection over union exceeds this are one object; so is one that lies inside the other
INSIDE = 0.75  # by this share of the smaller
FLAT = 320.0  # of 255 per shorter side: the least slope that an outline is measured against
BLUR = 1 / 16  # of the shorter side: width of the filter whose slopes are outlines; half of it each way, and the middle
STRETCH = 0.04  # of the longer side: by how much width and height may leave a class's own proportions
STRAY = 45.0  # of 255, root mean square over channels: what the redrawn picture leaves unexplained
LEAST = 6  # pixels: nothing smaller is an object
PATCH = 0.012  # of the picture: the least unexplained patch that is an object or a piece of one

Pixels = tuple[int, int, int, int]  # x0, y0, x1, y1, x1 and y1 exclusive


@dataclass(frozen=True)
class Found:
    """An object: the nearest true render, its box, both distances to it, and how much farther the nearest of another class is."""

    kind: str
    colour: str | None
    box: Pixels
    distance: float
    outline: float
    margin: float
    soft: float

    @property
    def counts(self) -> bool:
        return self.soft >= 0.5


@dataclass(frozen=True)
class ShapesSeen:
    """A picture as the judge sees it: `backdrop` None where it is not one of the world's; `redrawn` float32 [H, W, 3]."""

    backdrop: str | None
    objects: tuple[Found, ...]
    redrawn: np.ndarray

    def judged_by(self, calibration: Calibration) -> ShapesSeen:
        objects = [replace(o, soft=calibration.soft(o.distance, o.outline)) for o in self.objects]
        return replace(self, objects=tuple(objects))


@dataclass(frozen=True)
class ShapeVerdict:
    right: bool
    distance: float | None  # mean over the objects asked for, 1 for one that is missing; None where none is asked
    soft: float  # the least of all objects; 0 where the rule does not hold or something else stands there
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """soft = sigmoid(bias - distance_weight distance - outline_weight outline)."""

    bias: float
    distance_weight: float
    outline_weight: float

    def soft(self, distance: float, outline: float) -> float:
        return 1 / (
            1 + math.exp(min(60.0, self.distance_weight * distance + self.outline_weight * outline - self.bias))
        )

    @classmethod
    def load(cls, path: Path = CALIBRATION) -> Calibration:
        """The committed table. Errors: ValueError naming the file where one of the three is no positive number."""
        values = json.loads(path.read_text(encoding="utf-8"))
        names = [field.name for field in fields(cls)]
        if not all(isinstance(values.get(name), float) and values[name] > 0 for name in names):
            raise ValueError(f"{path}: expected positive numbers {', '.join(names)}, got {values}")
        return cls(**{name: values[name] for name in names})


class ShapeJudge:
    """`classes`: what may be seen; the fewer, the faster."""

    def __init__(self, classes: Sequence[str], calibration: Calibration | None = None):
        self.classes = tuple(classes)
        self.calibration = calibration or Calibration.load()

    def look(self, picture: np.ndarray, detections: Sequence[Detection], sign: bool = False) -> ShapesSeen:
        """Picture uint8 [H, W, 3] and a detector's boxes -> what stands in it. sign: a sign is asked for and is no stray.

        Errors: ValueError for another dtype or shape.
        """
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"ShapeJudge.look: picture {picture.dtype} {picture.shape}, expected uint8 [H, W, 3]")
        found = [d for d in detections if d.score > geneval.FOUND]
        signs = [d.box for d in found if d.kind == SIGN and sign]
        boxes = _one_each([d for d in found if d.kind in self.classes and not any(_same(d.box, s) for s in signs)])
        pixels = picture.astype(np.float32)
        backdrop, canvas = surroundings(pixels, [*boxes, *signs])
        work = _Work(pixels, canvas, signs)
        whole = [] if backdrop is None else _wider(work.unexplained(), boxes)
        work.fit([*boxes, *whole], self.classes)
        if backdrop is not None:
            work.fit(work.unexplained(), self.classes)
        else:
            canvas = work.canvas = filled(pixels, ~work.covered())
        redrawn, objects = work.redrawn(), []
        shorter = min(picture.shape[:2])
        reach, flat = round(BLUR / 2 * shorter), FLAT / shorter
        torn, edges = _slopes(pixels - redrawn, reach), _slopes(redrawn, reach)
        for k, one in enumerate(work.fits):
            own = work.window(k)
            left = float(((pixels - redrawn)[own] ** 2).sum())
            there = float(((redrawn - canvas)[own] ** 2).sum())
            norm = max(there, 3 * FAINT**2 * float(own.sum()))
            distance, margin = left / norm, (one.next_error - one.error) / norm
            outline = float(torn[own].sum() / max(float(edges[own].sum()), 3 * flat**2 * float(own.sum())))
            soft = self.calibration.soft(distance, outline)
            objects.append(Found(one.kind, one.colour, one.box, distance, outline, margin, soft))
        return ShapesSeen(backdrop, tuple(objects), redrawn)


def judge(asked: Asked, seen: ShapesSeen) -> ShapeVerdict:
    """GenEval's rule on what stands in the picture, the shape of each, and nothing else there."""
    boxes = [Detection(o.kind, 1 - min(o.distance, 1.0), o.box, o.colour) for o in seen.objects]
    ruled = geneval.judge(asked, boxes, found_above=-1.0)
    reasons, wanted = list(ruled.reasons), sum(want.count for want in asked.include)
    if len(boxes) > wanted:
        reasons.append(f"{wanted} asked for, {len(boxes)} stand there")
    torn = [o for o in seen.objects if not o.counts]
    distances, free = [], list(seen.objects)
    for want in asked.include:
        named = sorted(free, key=lambda o: (o.kind != want.kind, o.colour != (want.colour or o.colour), o.distance))
        taken, free = named[: want.count], named[want.count :]
        distances += [min(1.0, o.distance) for o in taken] + [1.0] * (want.count - len(taken))
    soft = 0.0 if reasons else min((o.soft for o in seen.objects), default=1.0)
    reasons += [f"{o.kind}: distance {o.distance:.2f} to the nearest true render" for o in torn]
    return ShapeVerdict(soft >= 0.5, float(np.mean(distances)) if distances else None, soft, tuple(reasons))


# ------------------------------------------------------------------------------------------------ which boxes


def _same(one: Box, two: Box) -> bool:
    """Whether two boxes are of one object: they overlap by more than SAME, or one lies inside the other by INSIDE."""
    w, h = (max(0.0, min(one[i + 2], two[i + 2]) - max(one[i], two[i])) for i in (0, 1))
    smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (one, two))
    return overlap(one, two) > SAME or w * h > INSIDE * smaller


def _one_each(found: Sequence[Detection]) -> list[Box]:
    """The boxes, most confident first, without near copies of one that is already there, whatever its class."""
    kept: list[Box] = []
    for one in sorted(found, key=lambda d: -d.score):
        if not any(overlap(one.box, box) > ALIKE for box in kept):
            kept.append(one.box)
    return kept


def _wider(boxes: Sequence[Box], known: Sequence[Box]) -> list[Box]:
    """The boxes that hold known ones, and that neither one of these nor all of them together are much like."""
    out = []
    for box in boxes:
        inside = [k for k in known if _same(k, box)]
        around = [(*np.min(inside, 0)[:2], *np.max(inside, 0)[2:])] if inside else []
        if inside and not any(overlap(box, other) > ALIKE for other in inside + around):
            out.append(box)
    return out


def patches(mask: np.ndarray) -> list[Box]:
    """Boxes of the connected patches of a mask [H, W] that make up at least PATCH of it, on a grid of 32 cells or so."""
    height, width = mask.shape
    cell = max(2, round(min(height, width) / 32))
    grid = mask[: height // cell * cell, : width // cell * cell].reshape(height // cell, cell, -1, cell)
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(grid.mean((1, 3)) > 0.35))}
    out: list[Box] = []
    while left:
        patch, edge = [], [left.pop()]
        while edge:
            y, x = edge.pop()
            patch.append((y, x))
            around = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= around
            edge += around
        if len(patch) * cell**2 >= PATCH * mask.size:
            ys, xs = zip(*patch)
            out.append((min(xs) * cell, min(ys) * cell, (max(xs) + 1) * cell, (max(ys) + 1) * cell))
    return sorted(out)


def _slopes(pixels: np.ndarray, reach: int) -> np.ndarray:
    """float32 [H, W, 3] -> squared slope [H, W], summed over channels, after a triangle filter of 2 reach + 1 pixels per axis.

    The filter takes away what a codec loses, which is fine detail; an outline out of its place stays.
    """
    weights = reach + 1 - np.abs(np.arange(-reach, reach + 1, dtype=np.float32))
    for axis in (0, 1):
        ends = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        padded, size = np.pad(pixels, ends, mode="edge"), pixels.shape[axis]
        pixels = sum(w * padded.take(range(i, i + size), axis) for i, w in enumerate(weights)) / weights.sum()
    slopes = [np.diff(pixels, axis=axis, append=pixels.take([-1], axis)) for axis in (0, 1)]
    return sum((slope**2).sum(-1) for slope in slopes)


# ------------------------------------------------------------------------------------------------ redrawing


@functools.lru_cache(maxsize=1024)  # a fit asks for the same few sizes again and again, another picture for others
def _art(kind: str, colour: str | None, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """What a sprite keeps of its backdrop and what it adds, both float32 [h, w, 3]: equal shapes multiply fast."""
    art = scaled(kind, colour, width, height)
    return np.repeat(art.keep, 3, 2), art.colour


@functools.lru_cache(maxsize=256)
def _shadow(width: int) -> np.ndarray:
    return np.repeat(shadow(width), 3, 2)


def _blend(canvas: np.ndarray, x: int, y: int, keep: np.ndarray, add: np.ndarray | None = None) -> None:
    """canvas = canvas keep + add, at (x, y), as far as it lies inside."""
    height, width = canvas.shape[:2]
    top, bottom, left, right = max(0, y), min(height, y + keep.shape[0]), max(0, x), min(width, x + keep.shape[1])
    if top < bottom and left < right:
        part, own = canvas[top:bottom, left:right], np.s_[top - y : bottom - y, left - x : right - x]
        part *= keep[own]
        if add is not None:
            part += add[own]


def paint(canvas: np.ndarray, kind: str, colour: str | None, box: Pixels, origin: tuple[int, int] = (0, 0)) -> None:
    """A true render of an object with its shadow into float32 [H, W, 3], whose corner is at `origin` (x, y) of the picture."""
    x, y = box[0] - origin[0], box[1] - origin[1]
    width, height = box[2] - box[0], box[3] - box[1]
    keep = _shadow(width)
    _blend(canvas, x, y + height - math.ceil(keep.shape[0] * 0.6), keep)
    _blend(canvas, x, y, *_art(kind, colour, width, height))


# ------------------------------------------------------------------------------------------------ fitting


@dataclass(frozen=True)
class _Fit:
    kind: str
    colour: str | None
    box: Pixels
    error: float
    explained: float  # squared difference from the backdrop, less the error
    next_error: float = math.inf  # of the best of another class


def _edge_moved(box: Pixels, edge: int, by: int) -> Pixels:
    x0, y0, x1, y1 = (v + by * (i == edge) for i, v in enumerate(box))
    return x0, y0, x1, y1


def _margin(box: Box) -> float:
    """Pixels around a fitted box that belong to the object: what clings to its outline, and its shadow."""
    return max(2.0, round(0.08 * max(box[2] - box[0], box[3] - box[1])))


class _Work:
    """One picture while its objects are fitted."""

    def __init__(self, picture: np.ndarray, canvas: np.ndarray, signs: Sequence[Box]):
        self.picture, self.canvas = picture, canvas
        self.height, self.width = picture.shape[:2]
        self.free = np.ones((self.height, self.width), bool)
        for box in signs:
            self.free[within(box, 2, self.height, self.width)] = False
        self.fits: list[_Fit] = []

    def within(self, box: Box, beyond: float = 0.0) -> tuple[slice, slice]:
        return within(box, beyond, self.height, self.width)

    def fit(self, boxes: Sequence[Box], classes: Sequence[str]) -> None:
        """Adds the fits of these candidates; of fits to the same pixels those stay that explain most of them."""
        found = list(self.fits)
        for box in boxes:
            others = [b for b in [*boxes, *(f.box for f in self.fits)] if not _same(b, box)]
            found.append(self._fitted(box, self._own(box, others), classes))
        self.fits = []
        found.sort(key=lambda f: -f.explained)
        while found:
            best = found.pop(0)
            rivals: list[_Fit] = []  # what else is told of these pixels: several objects side by side, say
            for one in found:
                if _same(one.box, best.box) and not any(_same(one.box, r.box) for r in rivals):
                    rivals.append(one)
            if sum(r.explained for r in rivals) <= best.explained or len(rivals) < 2:
                self.fits.append(best)
                found = [one for one in found if not _same(one.box, best.box)]

    def _own(self, box: Box, others: Sequence[Box]) -> np.ndarray:
        own = self.free.copy()
        for other in others:
            own[self.within(other)] = False
        own[self.within(box)] = True
        return own

    def window(self, k: int) -> np.ndarray:
        """bool [H, W]: the fit's box with its margin, without what lies in another's box alone."""
        box, inside = self.fits[k].box, np.zeros_like(self.free)
        inside[self.within(box, _margin(box))] = True
        return inside & self._own(box, [f.box for i, f in enumerate(self.fits) if i != k])

    def redrawn(self) -> np.ndarray:
        out = self.canvas.copy()
        for one in self.fits:
            paint(out, one.kind, one.colour, one.box)
        return out

    def covered(self) -> np.ndarray:
        """bool [H, W]: what the fits hide or shade."""
        white = np.full_like(self.canvas, 255.0)
        for one in self.fits:
            paint(white, one.kind, one.colour, one.box)
        return (white != 255).any(-1)

    def unexplained(self) -> list[Box]:
        """Boxes of what differs from the redrawn picture outside every fit's window."""
        differs = np.sqrt(((self.picture - self.redrawn()) ** 2).mean(-1)) > STRAY
        for one in self.fits:
            differs[self.within(one.box, _margin(one.box))] = False
        return patches(differs & self.free)

    def _fitted(self, box: Box, own: np.ndarray, classes: Sequence[str]) -> _Fit:
        longer = max(box[2] - box[0], box[3] - box[1])
        window = _Window(self.picture, self.canvas, own, self.within(box, 0.2 * longer + 1))
        picture = np.where(own[..., None], self.picture, self.canvas)  # another's pixels must not draw a fit towards it
        coarse = coarse_fits(picture, self.canvas, box, classes)
        close = max(2, sum(c.left - coarse[0].left < NEAR for c in coarse[:MOST]))
        fits = [window.descended(c, 1 if longer < 48 else 2) for c in coarse[:close]]
        fits.sort(key=lambda f: f.error)
        best = window.refined(fits[0])
        return replace(best, next_error=fits[1].error if len(fits) > 1 else math.inf)


class _Window:
    """The pixels around a candidate, and the squared error that a true render leaves there."""

    def __init__(self, picture: np.ndarray, canvas: np.ndarray, own: np.ndarray, at: tuple[slice, slice]):
        self.frame = picture.shape[1], picture.shape[0]
        self.origin = at[1].start, at[0].start
        self.picture, self.canvas = picture[at], canvas[at]
        self.own = np.repeat(own[at][..., None], 3, 2).astype(np.float32)
        bare = (self.picture - self.canvas) * self.own
        self.bare = float(np.vdot(bare, bare))
        self.errors: dict[tuple[str, str | None, Pixels], float] = {}

    def fit(self, kind: str, colour: str | None, box: Pixels) -> _Fit:
        error = self.error(kind, colour, box)
        return _Fit(kind, colour, box, error, self.bare - error)

    def error(self, kind: str, colour: str | None, box: Pixels) -> float:
        """Infinite where the box leaves the frame or has no room for a picture."""
        x0, y0, x1, y1 = box
        if min(x0, y0) < 0 or x1 > self.frame[0] or y1 > self.frame[1] or min(x1 - x0, y1 - y0) < LEAST:
            return math.inf
        if (kind, colour, box) not in self.errors:
            left = self.canvas.copy()
            paint(left, kind, colour, box, self.origin)
            left -= self.picture
            left *= self.own
            self.errors[kind, colour, box] = float(np.vdot(left, left))
        return self.errors[kind, colour, box]

    def descended(self, coarse: Coarse, step: int) -> _Fit:
        """The best place and size of the class, in its own proportions, downhill from the coarse one."""
        kind, colour = coarse.kind, coarse.colour
        side = min(round(max(coarse.box[2] - coarse.box[0], coarse.box[3] - coarse.box[1])), min(self.frame))
        w, h = fitted_size(kind, side, side)
        x = min(max(0, round((coarse.box[0] + coarse.box[2] - w) / 2)), self.frame[0] - w)
        y = min(max(0, round((coarse.box[1] + coarse.box[3] - h) / 2)), self.frame[1] - h)
        at = (side, x, y)

        def box(at: tuple[int, int, int]) -> Pixels:
            w, h = fitted_size(kind, at[0], at[0])
            return at[1], at[2], at[1] + w, at[2] + h

        while True:
            here = box(at)
            moved = [(at[0], at[1] + i * step, at[2] + j * step) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            for grown in (at[0] - step, at[0] + step):  # one side or the other stays, or the middle
                w, h = fitted_size(kind, grown, grown)
                dx, dy = here[2] - here[0] - w, here[3] - here[1] - h
                moved += [(grown, at[1] + i, at[2] + j) for i in (0, dx // 2, dx) for j in (0, dy // 2, dy)]
            best = min(moved, key=lambda a: self.error(kind, colour, box(a)))
            if self.error(kind, colour, box(best)) < self.error(kind, colour, here):
                at = best
            elif step > 1:
                step //= 2
            else:
                return self.fit(kind, colour, here)

    def refined(self, fit: _Fit) -> _Fit:
        """Each edge by itself, pixel by pixel and by no more than STRETCH of the longer side, and every colour of the class."""
        kind, here = fit.kind, fit.box
        most = max(1, round(STRETCH * max(here[2] - here[0], here[3] - here[1])))
        size = here[2] - here[0], here[3] - here[1]
        colour = min(colours_of(kind), key=lambda c: self.error(kind, c, here))
        while True:
            moved = [_edge_moved(here, edge, d) for edge in range(4) for d in (-1, 1)]
            moved += [(here[0] + i, here[1] + j, here[2] + i, here[3] + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            moved = [b for b in moved if max(abs(b[2] - b[0] - size[0]), abs(b[3] - b[1] - size[1])) <= most]
            best = min(moved, key=lambda b: self.error(kind, colour, b))
            if self.error(kind, colour, best) >= self.error(kind, colour, here):
                return self.fit(kind, colour, here)
            here = best


# ------------------------------------------------------------------------------------------------ class and colour


@dataclass(frozen=True)
class Coarse:
    left: float  # share of the squared difference from the backdrop that the fit leaves
    kind: str
    colour: str | None
    box: Box


@functools.lru_cache(maxsize=1024)
def _weights(kind: str, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every colour of a class at a size: weights float32 [8 h w, n] of (DC, CC, D, C), and sum(Q^2) float32 [n]."""
    columns, squares = [], []
    for colour in colours_of(kind):
        art = sprite(kind, colour, width, height)
        alpha, colours = (1 - art.keep)[..., 0], np.moveaxis(art.colour, -1, 0)
        columns.append(np.concatenate([p.ravel() for p in (2 * alpha, alpha**2, -2 * colours, -2 * alpha * colours)]))
        squares.append((art.colour**2).sum())
    return np.stack(columns, 1).astype(np.float32), np.array(squares, np.float32)


def coarse_fits(picture: np.ndarray, canvas: np.ndarray, box: Box, classes: Sequence[str]) -> list[Coarse]:
    """Of every class the best colour, size and place near a box, best first; the box's longer side is shrunk to COARSE."""
    scale = max(box[2] - box[0], box[3] - box[1], LEAST) / COARSE
    left, top = ((box[i] + box[i + 2]) / 2 - WINDOW * scale / 2 for i in (0, 1))
    region = left, top, left + WINDOW * scale, top + WINDOW * scale
    small, behind = (_shrunk(pixels, region) for pixels in (picture, canvas))
    away, back = np.moveaxis(small - behind, -1, 0), np.moveaxis(behind, -1, 0)
    planes = np.concatenate([(away * back).sum(0)[None], (back * back).sum(0)[None], away, back])
    total = max(1.0, float((away**2).sum()))
    sizes: dict[tuple[int, int], list[str]] = {}
    for kind in classes:
        for side in SIZES:
            sizes.setdefault(fitted_size(kind, side, side), []).append(kind)
    best: dict[str, Coarse] = {}
    for (w, h), kinds in sizes.items():
        x, y = (WINDOW - w) // 2, (WINDOW - h) // 2
        near = planes[:, y - REACH : y + h + REACH, x - REACH : x + w + REACH]
        windows = np.lib.stride_tricks.sliding_window_view(near, (h, w), (1, 2)).transpose(1, 2, 0, 3, 4)
        rows = windows.reshape((2 * REACH + 1) ** 2, -1)
        for kind in dict.fromkeys(kinds):
            weights, squares = _weights(kind, w, h)
            change = rows @ weights + squares
            index = int(change.argmin())
            place, colour = divmod(index, change.shape[1])
            remains = 1 + float(change.flat[index]) / total
            if kind not in best or remains < best[kind].left:
                down, right = divmod(place, 2 * REACH + 1)
                x0, y0 = left + (x - REACH + right) * scale, top + (y - REACH + down) * scale
                there = x0, y0, x0 + w * scale, y0 + h * scale
                best[kind] = Coarse(remains, kind, colours_of(kind)[colour], there)
    return sorted(best.values(), key=lambda c: c.left)


def _shrunk(pixels: np.ndarray, region: Box) -> np.ndarray:
    """float32 [WINDOW, WINDOW, 3] of a region, which may leave the frame: its edge goes on there."""
    height, width = pixels.shape[:2]
    beyond = 1 + math.ceil(max(0, -region[0], -region[1], region[2] - width, region[3] - height))
    whole = np.pad(pixels, ((beyond, beyond), (beyond, beyond), (0, 0)), mode="edge")
    image = Image.fromarray(np.clip(whole + 0.5, 0, 255).astype(np.uint8))
    box = tuple(v + beyond for v in region)
    return np.asarray(image.resize((WINDOW, WINDOW), Image.Resampling.HAMMING, box=box), np.float32)
