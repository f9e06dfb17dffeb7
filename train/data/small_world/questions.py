"""What a caption says, as questions to a linear reader of the text encoder's features: attribute, token, value.

Asked is the class at each mention of an object, its colour where the later of noun and colour word ends, and what is true
of the whole (count, relation, background or photographed place, class and colour of the first three objects in reading
order, the colours of a sign) at the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .backdrops import BACKGROUNDS
from .kinds import KINDS, PALETTE
from .mentions import mentions, said_background
from .photographs import PLACES
from .scene import Scene
from .wording import OPPOSITE

CLASSES = tuple(KINDS)
COLOURS = (*PALETTE, None)
RELATIONS = ("left", "right", "above", "below")
MOST = 5  # objects of a scene
SLOTS = 3  # objects whose class and colour the last token is asked for
LETTERS = 8  # places in a sign's text that are told apart
SIZES = {  # values of each attribute
    "class": len(CLASSES),
    "colour": len(COLOURS),
    "count": MOST,
    "relation": len(RELATIONS),
    "background": len(BACKGROUNDS),
    "paper": len(PALETTE),
    "ink": len(PALETTE),
    "letter": LETTERS,
    **{
        f"{name} {slot}": size
        for slot in range(SLOTS)
        for name, size in (("class", len(CLASSES)), ("colour", len(COLOURS)))
    },
    "place": len(PLACES),
}
INDEX: dict[str, dict[str | None, int]] = {
    "class": {name: i for i, name in enumerate(CLASSES)},
    "colour": {name: i for i, name in enumerate(COLOURS)},
    "relation": {name: i for i, name in enumerate(RELATIONS)},
    "background": {name: i for i, name in enumerate(BACKGROUNDS)},
    "place": {name: i for i, name in enumerate(PLACES)},
}


@dataclass(frozen=True)
class Ask:
    """At this token a reader of this attribute should find this value."""

    attribute: str
    token: int
    value: int


def token_at(offsets: Sequence[tuple[int, int]], end: int) -> int:
    """The token in which the text up to character `end` ends."""
    return max(i for i, (start, _) in enumerate(offsets) if start < end)


def asks(scene: Scene, offsets: Sequence[tuple[int, int]], last: int, first: int = 0) -> list[Ask]:
    """Everything the caption says, as questions to readers. `offsets`: characters of each token; `last`: the last token;
    `first`: row of the caption's first token, counted on to.

    A colour the grammar leaves out is the natural one, so it is asked as well. A relation is that of the object named
    first to the one named second (a sign is an object).
    """
    found, out = mentions(scene), []
    for mention in found:
        thing = scene.things[mention.thing]
        out += [Ask("class", token_at(offsets, end), INDEX["class"][thing.kind]) for end in mention.nouns]
        out.append(Ask("colour", token_at(offsets, mention.known), INDEX["colour"][thing.colour]))
    if scene.things:
        out.append(Ask("count", last, len(scene.things) - 1))
    if scene.relation is not None and (scene.style != "geneval" or scene.task == "position"):
        starts = [mention.nouns[0] for mention in found]
        if scene.sign is not None:
            starts.append(scene.caption.lower().index("sign"))
        said = scene.relation if starts[0] < starts[1] else OPPOSITE[scene.relation]
        out.append(Ask("relation", last, INDEX["relation"][said]))
    if (background := said_background(scene)) is not None:
        attribute = "place" if background in PLACES else "background"
        out.append(Ask(attribute, last, INDEX[attribute][background]))
    for slot, (kind, colour) in enumerate(dict.fromkeys((t.kind, t.colour) for t in scene.things)):
        if slot < SLOTS:
            out.append(Ask(f"class {slot}", last, INDEX["class"][kind]))
            out.append(Ask(f"colour {slot}", last, INDEX["colour"][colour]))
    if scene.sign is not None:
        out.append(Ask("paper", last, INDEX["colour"][scene.sign.paper]))
        out.append(Ask("ink", last, INDEX["colour"][scene.sign.ink]))
        start = scene.caption.index(f'"{scene.sign.text}"') + 1
        for i in range(min(LETTERS, len(scene.sign.text))):
            if token_at(offsets, start + i + 1) != token_at(offsets, start + i + 2):  # the last letter of its token
                out.append(Ask("letter", token_at(offsets, start + i + 1), i))
    return [Ask(ask.attribute, first + ask.token, ask.value) for ask in out]


def grouped(asked: Sequence[Ask]) -> dict[str, list[tuple[int, int]]]:
    """attribute -> (token, value) of its questions; attributes nobody asks about are left out, the order is that of SIZES."""
    out: dict[str, list[tuple[int, int]]] = {name: [] for name in SIZES}
    for ask in asked:
        out[ask.attribute].append((ask.token, ask.value))
    return {name: pairs for name, pairs in out.items() if pairs}
