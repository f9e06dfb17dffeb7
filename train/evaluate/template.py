"""The auditing judge, by pixel templates: is every object where the prompt puts it, of the right class and colour?

It has no learned weights and is used for nothing but auditing: a score that Lens-Eye gives and this one refuses is suspect.
The picture's border tells its backdrop (any that is drawn, any variant; any photograph as well where one is asked for). At
each place of the layout that the prompt implies, every class of `classes`, in every colour, several sizes and small shifts,
is composited over that backdrop; the best fit in squared error is what the judge sees there, or "nothing" where the best fit
explains less than EXPLAINED of the difference from the bare backdrop. What differs from the backdrop outside the fitted
boxes must be little, else something is there that was not asked for.

It never looks at where the scene's own objects were drawn, only at the layout the prompt implies, and it is itself judged on
true renders and their reconstructions (`python -m train evaluate mini-bench --ceilings only`).

Lenient: a class outside `classes` is never seen, so a picture of one may pass as its nearest class within; one sprite per
class, so a smeared object passes while it stays nearer to its own sprite than to any other; strays below STRAY of the picture
pass; of a sign only that its room is not empty is required, never its words. Strict: objects must be at the usual places,
as the world arranges them (side by side or one above the other where the prompt does not say); another composition that
the prompt allows fails.

The fit, as one matrix product per class and size: with picture P, backdrop C, D = P - C, a sprite's premultiplied colour Q
and opacity a, the squared error of the composite changes by 2 sum(D C a) - 2 sum(D Q) + sum(C^2 a^2) - 2 sum(C a Q) +
sum(Q^2) against the bare backdrop, a dot product of the window's (DC, CC, D, C) with weights that depend on the sprite alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.small_world.backdrops import BACKGROUNDS, VARIANTS, backdrop
from ..data.small_world.kinds import KINDS
from ..data.small_world.layout import alone, arrangement, place_of, size_of, with_sign
from ..data.small_world.photographs import PLACES, VIEWS
from ..data.small_world.scene import Scene, is_unusual
from ..data.small_world.sprites import colours_of, fitted_size, sprite

EXPLAINED = 0.5  # share of the squared difference a fit must explain to count as an object
STRAY = 0.06  # share of pixels outside all boxes that may differ from the backdrop by more than STRAY_LEVEL
STRAY_LEVEL = 60.0  # of 255, root mean square over channels


@dataclass(frozen=True)
class ThingSeen:
    kind: str | None  # None: nothing there
    colour: str | None
    box: tuple[int, int, int, int] | None
    explained: float


@dataclass(frozen=True)
class TemplateVerdict:
    things: tuple[ThingSeen, ...]  # one per place of the layout
    background: str
    classes: tuple[bool, ...]
    colours: tuple[bool, ...]
    clean: bool

    @property
    def whole(self) -> bool:
        """Everything asked for is there, with its class and colour, and nothing else."""
        return all(self.classes) and all(self.colours) and self.clean


@functools.lru_cache(maxsize=4)
def _backdrops(height: int, width: int, photographs: bool) -> tuple[list[str], np.ndarray]:
    pairs = [(name, variant) for name in BACKGROUNDS for variant in range(VARIANTS)]
    if photographs:
        pairs += [(place, view) for place in PLACES for view in range(VIEWS)]
    return [name for name, _ in pairs], np.stack([backdrop(*pair, height, width) for pair in pairs])


def background_of(picture: np.ndarray, photographs: bool = False) -> tuple[str, np.ndarray]:
    """float32 [H, W, 3] -> the backdrop (name, pixels) that fits the two outermost rows and columns best.

    Drawn ones alone, or photographs too.
    """
    names, stack = _backdrops(*picture.shape[:2], photographs)
    edge = np.ones(picture.shape[:2], bool)
    edge[2:-2, 2:-2] = False
    error = np.minimum((stack[:, edge] - picture[edge]) ** 2, 60.0**2).mean((1, 2))  # capped: stars sit elsewhere
    best = int(error.argmin())
    return names[best], stack[best]


@functools.lru_cache(maxsize=1024)
def _weights(kind: str, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every colour of a class at a size: weights float32 [8 h w, n] of (DC, CC, D, C), and sum(Q^2) float32 [n]."""
    columns, squares = [], []
    for colour in colours_of(kind):
        art = sprite(kind, colour, width, height)
        alpha, paint = (1 - art.keep)[..., 0], np.moveaxis(art.colour, -1, 0)
        columns.append(np.concatenate([p.ravel() for p in (2 * alpha, alpha**2, -2 * paint, -2 * alpha * paint)]))
        squares.append((art.colour**2).sum())
    return np.stack(columns, 1).astype(np.float32), np.array(squares, np.float32)


def look(
    picture: np.ndarray,
    canvas: np.ndarray,
    centre: tuple[float, float],
    rooms: Sequence[tuple[float, float]],
    reach: int,
    step: int,
    classes: Sequence[str],
) -> ThingSeen:
    """The best fit around a centre (x, y in pixels): rooms are the sizes (w, h) tried, reach and step the shifts."""
    height, width = picture.shape[:2]
    # the squared error of a sprite on the backdrop is linear in these planes
    away = np.moveaxis(picture - canvas, -1, 0)
    back = np.moveaxis(canvas, -1, 0)
    base = (away**2).sum(0)
    planes = np.concatenate([(away * back).sum(0)[None], (back * back).sum(0)[None], away, back])
    w_max, h_max = max(w for w, _ in rooms), max(h for _, h in rooms)
    whole = float(
        base[
            max(0, int(centre[1] - h_max / 2 - reach)) : int(centre[1] + h_max / 2 + reach) + 1,
            max(0, int(centre[0] - w_max / 2 - reach)) : int(centre[0] + w_max / 2 + reach) + 1,
        ].sum()
    )
    # classes by the size that their sprite has in a room: one product serves all of a size
    sizes: dict[tuple[int, int], list[str]] = {}
    for kind in classes:
        for room in rooms:
            fitting = sizes.setdefault(fitted_size(kind, *room), [])
            if kind not in fitting:
                fitting.append(kind)
    # every size at every shift, every class and colour at once
    best, found = 0.0, None
    for (w, h), kinds in sizes.items():
        left, top = round(centre[0] - w / 2), round(centre[1] - h / 2)
        shifts = range(-reach, reach + 1, step)
        xs = [left + d for d in shifts if 0 <= left + d <= width - w]
        ys = [top + d for d in shifts if 0 <= top + d <= height - h]
        if not xs or not ys:
            continue
        near = planes[:, ys[0] : ys[-1] + h, xs[0] : xs[-1] + w]
        shown = np.lib.stride_tricks.sliding_window_view(near, (h, w), (1, 2))[:, ::step, ::step]
        windows = shown.transpose(1, 2, 0, 3, 4).reshape(len(ys) * len(xs), -1)
        for kind in kinds:
            weights, squares = _weights(kind, w, h)
            change = windows @ weights + squares
            index = int(change.argmin())
            if change.flat[index] < best:
                best = float(change.flat[index])
                place, colour = divmod(index, change.shape[1])
                y, x = ys[place // len(xs)], xs[place % len(xs)]
                found = (kind, colours_of(kind)[colour], (x, y, x + w, y + h))
    explained = -best / max(whole, 1e-6)
    return ThingSeen(*found, explained) if found and explained >= EXPLAINED else ThingSeen(None, None, None, explained)


Layout = tuple[list[tuple[float, float]], tuple[float, float], tuple[float, float], float]
FREE = ("two_object", "color_attr")  # tasks whose prompts need not say which object goes where


def layouts_of(scene: Scene) -> list[Layout]:
    """Every usual layout that the prompt allows: centres in fractions, smallest and largest room in pixels, jitter."""
    height, width = scene.height, scene.width
    if scene.task == "text":
        _, _, centre, room = with_sign(scene.relation, height, width)
        return [([centre] if scene.things else [], room, room, 0.01)]
    if is_unusual(scene):
        box = scene.things[0].box
        place = place_of(box, height, width)
        special = size_of(box, height, width) if place == ("middle", "middle") else place
        return [alone(special, height, width)]
    count, same = len(scene.things), scene.task == "counting"
    if scene.task in FREE:
        return [arrangement(count, same, relation, height, width) for relation in ("left", "above")]
    return [arrangement(count, same, scene.relation, height, width)]


def judge(pixels: np.ndarray, scene: Scene, classes: Sequence[str] | None = None) -> TemplateVerdict:
    """Picture uint8 [H, W, 3] of the scene's size -> verdict. The scene supplies the layout and what was asked for.

    Where the prompt leaves the layout or the order open, the reading with most right counts. classes: what may be seen
    (default: all of the world's; the fewer, the faster). Errors: ValueError for a picture of another size, or classes
    without one that the scene asks for.
    """
    classes = tuple(KINDS) if classes is None else tuple(classes)
    if pixels.shape != (scene.height, scene.width, 3):
        raise ValueError(f"judge: picture {pixels.shape}, expected {(scene.height, scene.width, 3)}")
    if unknown := {t.kind for t in scene.things} - set(classes):
        raise ValueError(f"judge: the scene asks for {sorted(unknown)}, expected only classes among {len(classes)}")
    picture = pixels.astype(np.float32)
    name, canvas = background_of(picture, scene.background in PLACES)
    verdicts = []
    for layout in layouts_of(scene):
        seen = tuple(_places(picture, canvas, layout, classes))
        clean = _clean(picture, canvas, scene, seen)
        for order in dict.fromkeys((seen, seen[::-1])) if scene.task in FREE else (seen,):
            right = tuple(s.kind == t.kind for s, t in zip(order, scene.things))
            painted = tuple(s.colour == t.colour for s, t in zip(order, scene.things))
            verdicts.append(TemplateVerdict(order, name, right, painted, clean))
        if any(v.whole for v in verdicts):
            break
    return max(verdicts, key=lambda v: (v.whole, sum(v.classes), sum(v.colours), v.clean))


def _places(picture: np.ndarray, canvas: np.ndarray, layout: Layout, classes: Sequence[str]) -> list[ThingSeen]:
    height, width = picture.shape[:2]
    cells, small, large, jitter = layout
    shares = (0, 0.33, 0.67, 1) if small != large and len(cells) == 1 else (0.5,)
    rooms = [(small[0] + s * (large[0] - small[0]), small[1] + s * (large[1] - small[1])) for s in shares]
    reach = max(2, round(jitter * max(height, width)) + 1)
    step = 2 if reach > 2 else 1
    return [look(picture, canvas, (cx * width, cy * height), rooms, reach, step, classes) for cx, cy in cells]


def _clean(picture: np.ndarray, canvas: np.ndarray, scene: Scene, seen: Sequence[ThingSeen]) -> bool:
    """Little differs from the backdrop outside the boxes; where a sign is asked for, its room is not empty."""
    differs = np.sqrt(((picture - canvas) ** 2).mean(-1)) > STRAY_LEVEL
    outside, filled = np.ones(picture.shape[:2], bool), True
    for thing in seen:
        if thing.box is not None:
            x0, y0, x1, y1 = thing.box
            outside[max(0, y0 - 2) : y1 + 4, max(0, x0 - 2) : x1 + 2] = False  # four rows below: the contact shadow
    if scene.task == "text":
        (cx, cy), (w, h), _, _ = with_sign(scene.relation, scene.height, scene.width)
        x, y = cx * scene.width, cy * scene.height
        room = np.s_[max(0, round(y - h / 2)) : round(y + h / 2) + 3, max(0, round(x - w / 2)) : round(x + w / 2) + 1]
        filled, outside[room] = bool(differs[room].mean() > STRAY), False
    return bool((differs & outside).mean() <= STRAY) and filled
