"""What a scene is: its objects, its sign, and which of them say more than their class and colour."""

from __future__ import annotations

from dataclasses import dataclass

from .layout import Box, place_of, size_of


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str | None
    box: Box  # the sprite fills it exactly


@dataclass(frozen=True)
class Sign:
    text: str
    paper: str  # palette words
    ink: str
    box: Box
    letter: int  # pixels from the highest to the lowest ink of the text


@dataclass(frozen=True)
class Scene:
    seed: int
    split: str
    task: str
    height: int
    width: int
    background: str  # one of BACKGROUNDS, or a photographed place
    variant: int  # of a place: the view
    relation: str | None  # "left" | "above" of things[0] to things[1]; "above" | "below" of things[0] to the sign
    things: tuple[Thing, ...]
    sign: Sign | None
    style: str
    language: str
    caption: str


def is_unusual(scene: Scene) -> bool:
    """Whether a single object is small, huge or off the middle."""
    if scene.task not in ("single_object", "colors"):
        return False
    box = scene.things[0].box
    size, place = size_of(box, scene.height, scene.width), place_of(box, scene.height, scene.width)
    return size != "large" or place != ("middle", "middle")
