"""The small world: an integer seed -> a scene (objects, boxes, colours, relation, caption) -> pixels.

    world = World(split="train")
    scene = world.scene(seed=7, height=64, width=64)      # a record, no pixels yet
    pixels = world.render(scene)                          # uint8 [64, 64, 3]

Rules: a scene depends on (seed, split, height, width) only; nothing is cut at the frame; every object differs from
its background by a `contrast` of at least MIN_CONTRAST; two objects of one scene never share both class and colour; scenes with
a held-out colour x class or class x class pair never appear in "train" and always in "held_out".
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
from dataclasses import dataclass

import numpy as np

from . import grammar
from .sprites import KINDS, PAINTABLE, PALETTE, colours_of, fitted_size, lab, sprite, surface_lab

TASKS = {
    "single": 0.12,
    "colours": 0.20,
    "pair": 0.09,
    "position": 0.16,
    "counting": 0.15,
    "binding": 0.14,
    "row": 0.14,
}
BACKGROUNDS = tuple(grammar.BACKGROUNDS)
MIN_CONTRAST = 28.0
VARIANTS = 8  # horizon heights, tile phases, star fields per background
PLAIN = {"grey": (164, 166, 174), "pink": (246, 170, 182), "mint": (150, 216, 182), "lavender": (186, 172, 234)}
# Colours a background may put behind an object, for the contrast rule.
BEHIND = {
    **{name: (rgb,) for name, rgb in PLAIN.items()},
    "meadow": ((128, 188, 248), (128, 200, 84)),
    "table": ((250, 238, 216), (172, 120, 72)),
    "checker": ((240, 240, 246), (206, 218, 234)),
    "night": ((24, 22, 66),),
}


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str | None
    box: tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive; the sprite fills it exactly


@dataclass(frozen=True)
class Scene:
    seed: int
    split: str
    task: str
    height: int
    width: int
    background: str
    variant: int
    relation: str | None  # "left" | "above": of things[0] to things[1]; None otherwise
    things: tuple[Thing, ...]
    caption: str


def _draw(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


@functools.cache
def held_out_colours() -> frozenset[tuple[str, str]]:
    """(class, colour) pairs kept for evaluation: one non-natural colour of each recolourable class."""
    out = set()
    for kind in PAINTABLE:
        colours = [c for c in PALETTE if c != KINDS[kind].natural]
        out.add((kind, max(colours, key=lambda c, k=kind: _draw(f"held-out colour {k} {c}"))))
    return frozenset(out)


@functools.cache
def held_out_pairs() -> frozenset[frozenset[str]]:
    """Unordered class pairs kept for evaluation: one in ten."""
    kinds = sorted(KINDS)
    pairs = [frozenset((a, b)) for i, a in enumerate(kinds) for b in kinds[i + 1 :]]
    return frozenset(p for p in pairs if _draw("held-out pair " + " ".join(sorted(p))) < 0.1)


def contrast(one: np.ndarray, two: np.ndarray) -> float:
    """How far two Lab colours are apart to the eye: distance, with hue counting less where both are dark."""
    hue = min(1.0, max(float(one[0]), float(two[0])) / 50)
    return float(np.hypot(one[0] - two[0], hue * np.linalg.norm(one[1:] - two[1:])))


@functools.cache
def allowed(kind: str, colour: str | None) -> tuple[str, ...]:
    """Backgrounds this object stands out from."""
    own = np.array(surface_lab(kind, colour))
    return tuple(
        name
        for name, behind in BEHIND.items()
        if min(contrast(own, lab(np.array(rgb))) for rgb in behind) >= MIN_CONTRAST
    )


def _gradient(height: int, width: int, top: tuple[int, ...], bottom: tuple[int, ...]) -> np.ndarray:
    blend = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    rows = np.array(top, np.float32) * (1 - blend) + np.array(bottom, np.float32) * blend
    return np.broadcast_to(rows, (height, width, 3)).copy()


@functools.cache
def backdrop(name: str, variant: int, height: int, width: int) -> np.ndarray:
    """float32 [H, W, 3] in [0, 255]."""
    rng = random.Random(f"backdrop {name} {variant} {height} {width}")
    if name in PLAIN:
        base = PLAIN[name]
        return _gradient(height, width, tuple(min(255, c + 6) for c in base), tuple(c - 6 for c in base))
    if name == "checker":
        tile = max(4, round(min(height, width) / 8))
        phase = variant % 2
        rows, cols = np.arange(height)[:, None] // tile, np.arange(width)[None] // tile
        odd = ((rows + cols + phase) % 2)[..., None].astype(np.float32)
        first, second = (np.array(c, np.float32) for c in BEHIND[name])
        return first * (1 - odd) + second * odd
    if name == "night":
        out = _gradient(height, width, (12, 14, 48), (42, 34, 92))
        for _ in range(round(height * width / 150)):
            y, x = rng.randrange(height), rng.randrange(width)
            out[y, x] += (np.array((255, 255, 235), np.float32) - out[y, x]) * rng.uniform(0.35, 0.95)
        return out
    horizon = round(height * (0.60 + 0.14 * variant / (VARIANTS - 1)))
    if name == "meadow":
        sky = _gradient(horizon, width, (88, 164, 246), (160, 208, 250))
        return np.concatenate([sky, _gradient(height - horizon, width, (138, 206, 92), (104, 184, 70))])
    if name == "table":
        wall = _gradient(horizon, width, (252, 242, 222), (246, 232, 206))
        board = _gradient(height - horizon, width, (184, 132, 82), (158, 108, 62))
        for y in range(0, height - horizon, max(3, round(height / 11))):
            board[y : y + max(1, height // 96)] *= 0.8
        return np.concatenate([wall, board])
    raise ValueError(f"backdrop: unknown background {name!r}, expected one of {BACKGROUNDS}")


@functools.cache
def shadow(width: int) -> np.ndarray:
    """Soft contact shadow under an object of that width: float32 keep-factor [h, w, 1]."""
    w, h = max(3, round(width * 1.0)), max(2, round(width * 0.16))
    y = (np.arange(h) + 0.5 - h / 2)[:, None] / (h / 2)
    x = (np.arange(w) + 0.5 - w / 2)[None] / (w / 2)
    return (1 - 0.38 * np.clip(1 - (x * x + y * y), 0, 1) ** 0.8).astype(np.float32)[..., None]


def arrangement(
    count: int, same: bool, relation: str | None, height: int, width: int
) -> tuple[list[tuple[float, float]], tuple[float, float], tuple[float, float], float]:
    """Where objects go: cell centres in fractions of the frame, smallest and largest room (w, h) in pixels, jitter in fractions."""
    side = min(height, width)
    if count == 1:
        return [(0.5, 0.5)], (0.62 * side, 0.62 * side), (0.80 * side, 0.80 * side), 0.05
    if count == 2 and relation == "above":
        return [(0.5, 0.26), (0.5, 0.74)], (0.56 * side, 0.43 * height), (0.56 * side, 0.46 * height), 0.015
    if count == 2:
        return [(0.26, 0.5), (0.74, 0.5)], (0.43 * width, 0.58 * side), (0.46 * width, 0.58 * side), 0.015
    if count == 3 and same:
        cells, room = [(0.5, 0.26), (0.26, 0.74), (0.74, 0.74)], (0.42 * width, 0.44 * height)
    elif count == 3:
        cells, room = [(0.18, 0.5), (0.5, 0.5), (0.82, 0.5)], (0.30 * width, 0.44 * side)
    else:
        cells = [(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)]
        room = (0.42 * width, 0.43 * height)
    return cells, room, room, 0.015


class World:
    """Scenes and pixels of one split ("train" or "held_out"). Thread-safe: state is read-only caches."""

    def __init__(self, split: str = "train", tasks: dict[str, float] | None = None):
        if split not in ("train", "held_out"):
            raise ValueError(f"World: split {split!r}, expected 'train' or 'held_out'")
        self.split = split
        self.tasks = dict(tasks or TASKS)
        unknown = set(self.tasks) - set(TASKS)
        if unknown:
            raise ValueError(f"World: unknown tasks {sorted(unknown)}, expected some of {list(TASKS)}")

    def scene(self, seed: int, height: int = 64, width: int = 64) -> Scene:
        """The scene of an integer seed. Errors: sides must be multiples of 16 of at least 64."""
        if height % 16 or width % 16 or min(height, width) < 64:
            raise ValueError(f"World.scene: {height}x{width}, expected multiples of 16 of at least 64")
        rng = random.Random(f"{self.split} {seed} {height}x{width}")
        for _ in range(10_000):
            scene = self._attempt(rng, seed, height, width)
            if scene is not None:
                return scene
        raise ValueError(f"World.scene: tasks {list(self.tasks)} have no scene in split {self.split!r}")

    def _attempt(self, rng: random.Random, seed: int, height: int, width: int) -> Scene | None:
        task = rng.choices(list(self.tasks), list(self.tasks.values()))[0]
        count, relation = 1, None
        if task in ("pair", "position", "binding"):
            count = 2
            vertical = 0.12 if task == "pair" else 0.5 if task == "position" else 0.35
            relation = "above" if rng.random() < vertical else "left"
        elif task == "counting":
            count = rng.choices((1, 2, 3, 4), (1, 3, 3, 3))[0]
        elif task == "row":
            count = 3
        chosen = self._choose(rng, task, count)
        if chosen is None:
            return None
        possible = [b for b in BACKGROUNDS if all(b in allowed(*c) for c in chosen)]
        if not possible:
            return None
        background = rng.choice(possible)
        boxes = self._layout(rng, chosen, relation, height, width)
        things = tuple(Thing(kind, colour, box) for (kind, colour), box in zip(chosen, boxes))
        draft = Scene(seed, self.split, task, height, width, background, rng.randrange(VARIANTS), relation, things, "")
        text = grammar.caption(draft, rng)
        return Scene(**{**draft.__dict__, "caption": text})

    def _choose(self, rng: random.Random, task: str, count: int) -> list[tuple[str, str | None]] | None:
        if task == "counting":
            kind = rng.choice(list(KINDS))
            chosen = [(kind, rng.choice(colours_of(kind)))] * count
        elif task == "single":
            kind = rng.choice(list(KINDS))
            chosen = [(kind, KINDS[kind].natural)]
        elif task == "colours":
            kind = rng.choice(PAINTABLE)
            chosen = [(kind, rng.choice(list(PALETTE)))]
        else:
            pool = PAINTABLE if task == "binding" else list(KINDS)
            kinds = rng.sample(pool, count)
            chosen = [(kind, rng.choice(colours_of(kind))) for kind in kinds]
            if task == "pair":  # plain "an apple and a car": natural colours half of the time
                chosen = [(k, KINDS[k].natural if rng.random() < 0.5 else c) for k, c in chosen]
            named = [c for _, c in chosen if c is not None]
            if task == "binding" and len(set(named)) < len(named):
                return None
        kinds = {kind for kind, _ in chosen}
        held = any(c in held_out_colours() for c in chosen) or any(pair <= kinds for pair in held_out_pairs())
        return chosen if held == (self.split == "held_out") else None

    def _layout(
        self, rng: random.Random, chosen: list[tuple[str, str | None]], relation: str | None, height: int, width: int
    ) -> list[tuple[int, int, int, int]]:
        """One object centred in each cell with jitter; boxes stay inside the frame."""
        cells, smallest, largest, jitter = arrangement(len(chosen), len(set(chosen)) == 1, relation, height, width)
        scale = rng.random() if smallest != largest else 0.0
        room = tuple(a + scale * (b - a) for a, b in zip(smallest, largest))
        boxes = []
        for (kind, _), (cx, cy) in zip(chosen, cells):
            w, h = fitted_size(kind, *room)
            x = round((cx + rng.uniform(-jitter, jitter)) * width - w / 2)
            y = round((cy + rng.uniform(-jitter, jitter)) * height - h / 2)
            x, y = min(max(x, 1), width - w - 1), min(max(y, 1), height - h - 1)
            boxes.append((x, y, x + w, y + h))
        return boxes

    def render(self, scene: Scene) -> np.ndarray:
        """uint8 [H, W, 3]."""
        canvas = backdrop(scene.background, scene.variant, scene.height, scene.width).copy()
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            if not (0 <= x0 < x1 <= scene.width and 0 <= y0 < y1 <= scene.height):
                raise ValueError(f"World.render: box {thing.box} leaves the {scene.height}x{scene.width} frame")
            keep = shadow(x1 - x0)
            sh, sw = keep.shape[:2]
            top, left = min(y1 - math.ceil(sh * 0.6), scene.height - sh), x0
            canvas[top : top + sh, left : left + sw] *= keep
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            art = sprite(thing.kind, thing.colour, x1 - x0, y1 - y0)
            view = canvas[y0:y1, x0:x1]
            view *= art.keep
            view += art.colour
        return (canvas + 0.5).astype(np.uint8)

    def batch(self, seeds: list[int], height: int = 64, width: int = 64) -> tuple[list[Scene], np.ndarray]:
        """Scenes and pixels uint8 [n, H, W, 3] of several seeds."""
        scenes = [self.scene(seed, height, width) for seed in seeds]
        return scenes, np.stack([self.render(scene) for scene in scenes])
