"""Attribute accuracy: of what a dense caption says of a scene, how much is so in the image that was drawn for it.

Of every object asked for: its class, and if a box of that class is seen its colour; of a single object its size class and its
place too, of two the relation. Of the scene: the backdrop. Boxes and colours are Lens-Eye's under GenEval's rule, sizes and places
the words' own definitions (data/small_world/layout.py), the backdrop the template judge's. What is not seen is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.small_world.layout import place_of, size_of
from ..data.small_world.scene import Scene
from ..evaluate import geneval, template
from ..evaluate.geneval import Detection

ATTRIBUTES = ("class", "colour", "size", "place", "relation", "background")
Marks = dict[str, list[bool]]


def _boxed(box: geneval.Box) -> tuple[int, int, int, int]:
    return tuple(round(v) for v in box)  # type: ignore[return-value]


def marks(scene: Scene, picture: np.ndarray, seen: Sequence[Detection]) -> Marks:
    """Attribute -> right or wrong, one for every time it is asked for. picture: uint8 [H, W, 3]."""
    found: Marks = {name: [] for name in ATTRIBUTES}
    free = sorted((d for d in seen if d.score > geneval.FOUND), key=lambda d: -d.score)
    boxes: list[Detection | None] = []
    for thing in scene.things:
        best = next((d for d in free if d.kind == thing.kind), None)
        if best is not None:  # a box stands for one object
            free.remove(best)
        boxes.append(best)
        found["class"].append(best is not None)
        if thing.colour is not None:
            found["colour"].append(best is not None and best.colour == thing.colour)
    if len(scene.things) == 1:
        (thing,), (box,), frame = scene.things, boxes, (scene.height, scene.width)
        for name, of in (("size", size_of), ("place", place_of)):
            found[name].append(box is not None and of(_boxed(box.box), *frame) == of(thing.box, *frame))
    if len(scene.things) == 2 and scene.relation in ("left", "above"):
        word = {"left": "left of", "above": "above"}[scene.relation]
        one, two = boxes
        found["relation"].append(one is not None and two is not None and word in geneval.relations(one.box, two.box))
    found["background"].append(template.background_of(picture.astype(np.float32))[0] == scene.background)
    return found


def accuracy(every: Sequence[Marks]) -> dict[str, float]:
    """Attribute -> share right of all times it was asked for; "all": the mean over images of the share of their own."""
    shares = {}
    for name in ATTRIBUTES:
        values = [v for one in every for v in one[name]]
        if values:
            shares[name] = sum(values) / len(values)
    own = [[v for values in one.values() for v in values] for one in every]
    return {**shares, "all": sum(sum(v) / len(v) for v in own) / len(own)}
