"""A judge by template: is every object of a scene where its prompt puts it, of the right class and colour, and nothing else?

The picture's border tells its backdrop (any of the world's, any variant). At each place of the scene's layout every class,
colour, size and small shift is composited over that backdrop; the best fit in squared error is what the judge sees there, or
"nothing" where the best fit explains less than EXPLAINED of the difference from the bare backdrop. What is left of the
difference outside the fitted boxes must be small, else something is there that was not asked for.

It never looks at where the scene's own objects were drawn, only at the layout the prompt implies; and it is itself judged
on true renders and on their reconstructions (`python -m train evaluate --ceilings`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from ..data.sprites import KINDS, colours_of, fitted_size, sprite
from ..data.world import BACKGROUNDS, VARIANTS, Scene, arrangement, backdrop

EXPLAINED = 0.5  # share of the squared difference a fit must explain to count as an object
STRAY = 0.06  # share of pixels outside all boxes that may differ from the backdrop by more than STRAY_LEVEL
STRAY_LEVEL = 60.0  # of 255, root mean square over channels


@dataclass(frozen=True)
class Seen:
    kind: str | None  # None: nothing there
    colour: str | None
    box: tuple[int, int, int, int] | None
    explained: float


@dataclass(frozen=True)
class Verdict:
    things: tuple[Seen, ...]  # one per place of the layout
    background: str
    classes: tuple[bool, ...]
    colours: tuple[bool, ...]
    clean: bool

    @property
    def whole(self) -> bool:
        """Everything asked for is there, with its class and colour, and nothing else."""
        return all(self.classes) and all(self.colours) and self.clean


@functools.cache
def _backdrops(height: int, width: int) -> tuple[list[str], np.ndarray]:
    pairs = [(name, variant) for name in BACKGROUNDS for variant in range(VARIANTS)]
    return [name for name, _ in pairs], np.stack([backdrop(*pair, height, width) for pair in pairs])


def background_of(picture: np.ndarray) -> tuple[str, np.ndarray]:
    """float32 [H, W, 3] -> the backdrop (name, pixels) that fits the two outermost rows and columns best."""
    names, stack = _backdrops(*picture.shape[:2])
    edge = np.ones(picture.shape[:2], bool)
    edge[2:-2, 2:-2] = False
    error = np.minimum((stack[:, edge] - picture[edge]) ** 2, 60.0**2).mean((1, 2))  # capped: stars sit elsewhere
    best = int(error.argmin())
    return names[best], stack[best]


def look(
    picture: np.ndarray,
    canvas: np.ndarray,
    centre: tuple[float, float],
    rooms: list[tuple[float, float]],
    reach: int,
    step: int,
) -> Seen:
    """The best fit around a centre (x, y in pixels): rooms are the sizes (w, h) tried, reach and step the shifts."""
    height, width = picture.shape[:2]
    base = ((picture - canvas) ** 2).sum(-1)
    w_max, h_max = max(w for w, _ in rooms), max(h for _, h in rooms)
    window = base[
        max(0, int(centre[1] - h_max / 2 - reach)) : int(centre[1] + h_max / 2 + reach) + 1,
        max(0, int(centre[0] - w_max / 2 - reach)) : int(centre[0] + w_max / 2 + reach) + 1,
    ]
    whole = float(window.sum())
    best = (whole, None, None, None)
    tried = set()
    for kind in KINDS:
        colours = colours_of(kind)
        for room in rooms:
            w, h = fitted_size(kind, *room)
            if (kind, w, h) in tried:
                continue
            tried.add((kind, w, h))
            paint = np.stack([sprite(kind, colour, w, h).colour for colour in colours])
            keep = sprite(kind, colours[0], w, h).keep
            for dy in range(-reach, reach + 1, step):
                for dx in range(-reach, reach + 1, step):
                    x, y = round(centre[0] - w / 2) + dx, round(centre[1] - h / 2) + dy
                    if x < 0 or y < 0 or x + w > width or y + h > height:
                        continue
                    part = np.s_[y : y + h, x : x + w]
                    rest = picture[part] - canvas[part] * keep
                    error = ((rest - paint) ** 2).sum((1, 2, 3))
                    index = int(error.argmin())
                    total = whole - float(base[part].sum()) + float(error[index])
                    if total < best[0]:
                        best = (total, kind, colours[index], (x, y, x + w, y + h))
    explained = 1 - best[0] / max(whole, 1e-6)
    return Seen(*best[1:], explained) if explained >= EXPLAINED else Seen(None, None, None, explained)


def judge(pixels: np.ndarray, scene: Scene) -> Verdict:
    """Picture uint8 [H, W, 3] of the scene's size -> verdict. The scene supplies the layout and what was asked for."""
    if pixels.shape != (scene.height, scene.width, 3):
        raise ValueError(f"judge: picture {pixels.shape}, expected {(scene.height, scene.width, 3)}")
    picture = pixels.astype(np.float32)
    name, canvas = background_of(picture)
    same = len({(t.kind, t.colour) for t in scene.things}) == 1
    cells, small, large, jitter = arrangement(len(scene.things), same, scene.relation, scene.height, scene.width)
    shares = (0, 0.33, 0.67, 1) if small != large and len(cells) == 1 else (0.5,)
    rooms = [(small[0] + s * (large[0] - small[0]), small[1] + s * (large[1] - small[1])) for s in shares]
    reach = max(2, round(jitter * max(scene.height, scene.width)) + 1)
    seen = tuple(
        look(picture, canvas, (cx * scene.width, cy * scene.height), rooms, reach, 2 if reach > 2 else 1)
        for cx, cy in cells
    )
    outside = np.ones(picture.shape[:2], bool)
    for thing in seen:
        if thing.box is not None:
            x0, y0, x1, y1 = thing.box
            outside[max(0, y0 - 2) : y1 + 4, max(0, x0 - 2) : x1 + 2] = False  # four rows below: the contact shadow
    differs = np.sqrt(((picture - canvas) ** 2).mean(-1)) > STRAY_LEVEL
    clean = bool((differs & outside).mean() <= STRAY)
    return Verdict(
        seen,
        name,
        tuple(s.kind == t.kind for s, t in zip(seen, scene.things)),
        tuple(s.colour == t.colour for s, t in zip(seen, scene.things)),
        clean,
    )
