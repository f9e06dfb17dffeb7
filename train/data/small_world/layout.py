"""Where things go, in fractions of the frame, and the words for it: size classes and the nine places."""

from __future__ import annotations

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive
PLACES = tuple((row, column) for row in ("top", "middle", "bottom") for column in ("left", "middle", "right"))
SIZES = ("small", "medium", "large", "huge")
SMALL, MEDIUM, LARGE = 0.37, 0.57, 0.84  # up to these shares of the frame's shorter side


def size_of(box: Box, height: int, width: int) -> str:
    """One of SIZES: the box's longer side against the frame's shorter one."""
    share = max(box[2] - box[0], box[3] - box[1]) / min(height, width)
    return "small" if share <= SMALL else "medium" if share <= MEDIUM else "large" if share <= LARGE else "huge"


def place_of(box: Box, height: int, width: int) -> tuple[str, str]:
    """One of PLACES: (row, column) of the box's centre."""
    x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
    return (
        "top" if y < 0.39 else "middle" if y <= 0.61 else "bottom",
        "left" if x < 0.39 else "middle" if x <= 0.61 else "right",
    )


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
    elif count == 5:  # the dots of a die
        cells = [(0.18, 0.18), (0.82, 0.18), (0.5, 0.5), (0.18, 0.82), (0.82, 0.82)]
        return cells, (0.30 * width, 0.30 * height), (0.30 * width, 0.30 * height), 0.005
    else:
        cells = [(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)]
        room = (0.42 * width, 0.43 * height)
    return cells, room, room, 0.015


def alone(
    special: tuple[str, str] | str, height: int, width: int
) -> tuple[list[tuple[float, float]], tuple[float, float], tuple[float, float], float]:
    """`arrangement` of a single object that is "small" or "huge" in the middle, or at one of the PLACES."""
    side = min(height, width)
    if special == "small":
        return [(0.5, 0.5)], (0.31 * side, 0.31 * side), (0.365 * side, 0.365 * side), 0.02
    if special == "huge":
        return [(0.5, 0.5)], (0.89 * side, 0.89 * side), (0.95 * side, 0.95 * side), 0.01
    assert not isinstance(special, str), special
    row, column = special
    x = {"left": 0.22, "middle": 0.5, "right": 0.78}[column]
    y = {"top": 0.22, "middle": 0.5, "bottom": 0.78}[row]
    return [(x, y)], (0.39 * side, 0.39 * side), (0.46 * side, 0.46 * side), 0.02


def with_sign(
    relation: str | None, height: int, width: int
) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]:
    """Sign centre, sign room, object centre, object room; `relation` is the object's to the sign, None for a sign alone."""
    side = min(height, width)
    if relation is None:
        return (0.5, 0.5), (width - 3, 0.50 * height), (0.5, 0.5), (0, 0)
    sign, thing = (0.79, 0.29) if relation == "above" else (0.21, 0.71)
    return (0.5, sign), (width - 3, 0.37 * height), (0.5, thing), (0.60 * side, 0.52 * height)


def placed(size: tuple[int, int], centre: tuple[float, float], height: int, width: int) -> Box:
    """The box of that size (w, h) around a centre in fractions, moved where it would come nearer than a pixel to the frame."""
    (w, h), (cx, cy) = size, centre
    if w > width - 2 or h > height - 2:
        raise ValueError(f"placed: {w}x{h} does not fit into a frame of {width}x{height} with a pixel to spare")
    x, y = round(cx * width - w / 2), round(cy * height - h / 2)
    x, y = min(max(x, 1), width - w - 1), min(max(y, 1), height - h - 1)
    return x, y, x + w, y + h
