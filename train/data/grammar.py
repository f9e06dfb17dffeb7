"""From a scene to a sentence: every caption is true, 6-35 tokens long, one of several paraphrases.

Grammar (probabilities in `caption`): an object phrase is [article|number] [size] [colour] noun; a relation phrase joins
two of them; a background clause may follow. A class in its natural colour may go unnamed in colour ("a star" is yellow);
any other colour is always said, so a prompt without a colour word has one right answer.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from .sprites import KINDS

if TYPE_CHECKING:
    from .world import Scene, Thing

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}

BACKGROUNDS = {
    "grey": (
        "on a plain grey background",
        "on grey",
        "in front of a grey wall",
        "with a simple grey backdrop",
        "against a flat grey background",
        "on a grey backdrop",
        "with grey behind it all",
        "set on plain grey",
    ),
    "pink": (
        "on a plain pink background",
        "on a pink backdrop",
        "in front of a pink wall",
        "with a simple pink backdrop",
        "against a flat pink background",
        "on soft pink",
        "with pink behind it all",
        "set on plain pink",
    ),
    "mint": (
        "on a plain mint background",
        "on a mint backdrop",
        "in front of a mint wall",
        "with a simple mint backdrop",
        "against a flat mint background",
        "on pale mint",
        "with mint behind it all",
        "set on plain mint",
    ),
    "lavender": (
        "on a plain lavender background",
        "on a lavender backdrop",
        "in front of a lavender wall",
        "with a simple lavender backdrop",
        "against a flat lavender background",
        "on pale lavender",
        "with lavender behind it all",
        "set on plain lavender",
    ),
    "meadow": (
        "on green grass under a blue sky",
        "in a meadow with a clear blue sky",
        "on a lawn under the sky",
        "outdoors on the grass",
        "on a sunny meadow",
        "in a green field below a blue sky",
        "on grass on a clear day",
        "in a meadow",
    ),
    "table": (
        "on a wooden table by a cream wall",
        "in a room with a wooden table",
        "on a wooden table",
        "on a brown table in front of a cream wall",
        "standing on a wooden desk",
        "on a table made of wood",
        "indoors on a wooden table",
        "on wooden boards by a pale wall",
    ),
    "checker": (
        "on a checkered wall",
        "against a checkered background",
        "in front of checkered tiles",
        "with a checkered backdrop",
        "on white and blue tiles",
        "before a tiled wall",
        "on a checkerboard pattern",
        "with pale tiles behind",
    ),
    "night": (
        "against a dark starry night",
        "in the night sky",
        "on a dark night with stars",
        "under a starry sky at night",
        "in front of a dark sky full of stars",
        "at night among the stars",
        "with a starry night behind",
        "in a starry night",
    ),
}

SINGLE = (
    "a photo of {x}",
    "a picture of {x}",
    "{x}",
    "an image of {x}",
    "there is {x}",
    "a drawing of {x}",
    "{x} in the center of the picture",
    "{x} in the middle",
    "one can see {x}",
    "this picture shows {x}",
)
PAIR = (
    "a photo of {x} and {y}",
    "a picture of {x} and {y}",
    "{x} and {y}",
    "{x} next to {y}",
    "{x} beside {y}",
    "there is {x} and {y}",
    "an image of {x} with {y} beside it",
    "{x} together with {y}",
)
RELATIONS = {
    "left": (
        "{x} to the left of {y}",
        "{x} left of {y}",
        "{x} on the left and {y} on the right",
        "on the left {x}, on the right {y}",
        "a photo of {x} left of {y}",
        "a picture of {x} to the left of {y}",
        "{y} on the right and {x} on the left",
        "{x} at the left side of {y}",
    ),
    "right": (
        "{x} to the right of {y}",
        "{x} right of {y}",
        "{x} on the right and {y} on the left",
        "on the right {x}, on the left {y}",
        "a photo of {x} right of {y}",
        "a picture of {x} to the right of {y}",
        "{y} on the left and {x} on the right",
        "{x} at the right side of {y}",
    ),
    "above": (
        "{x} above {y}",
        "{x} at the top and {y} at the bottom",
        "{x} over {y}",
        "a photo of {x} above {y}",
        "a picture of {x} above {y}",
        "{y} at the bottom with {x} above it",
        "{x} higher up than {y}",
        "at the top {x}, below it {y}",
    ),
    "below": (
        "{x} below {y}",
        "{x} at the bottom and {y} at the top",
        "{x} under {y}",
        "a photo of {x} below {y}",
        "a picture of {x} below {y}",
        "{y} at the top with {x} below it",
        "{x} beneath {y}",
        "at the bottom {x}, above it {y}",
    ),
}
COUNT = (
    "a photo of {n}",
    "a picture of {n}",
    "{n}",
    "exactly {n}",
    "there are {n}",
    "an image of {n}",
    "a group of {n}",
    "one can see {n}",
)
ROW = (
    "{x}, {y} and {z} in a row",
    "from left to right {x}, {y} and {z}",
    "{x} on the left, {y} in the middle and {z} on the right",
    "a photo of {x}, {y} and {z}",
    "a row of {x}, {y} and {z}",
    "a picture of {x}, {y} and {z} side by side",
)
SIZES = ("large", "big")


def noun(thing: Thing, number: int, rng: random.Random, colour_words: float) -> str:
    kind = KINDS[thing.kind]
    natural = thing.colour is None or thing.colour == kind.natural
    say_colour = thing.colour is not None and (not natural or rng.random() < colour_words)
    word = kind.noun if number == 1 else kind.plural
    if thing.kind == "shirt" and rng.random() < 0.3:
        word = "t-" + word
    return f"{thing.colour} {word}" if say_colour else word


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def caption(scene: Scene, rng: random.Random) -> str:
    """A true sentence about the scene. `rng` decides the wording only."""
    spoken = 0.7 if KINDS[scene.things[0].kind].paint is not None else 0.4
    if scene.task == "counting":
        text = rng.choice(COUNT).format(
            n=f"{NUMBERS[len(scene.things)]} {noun(scene.things[0], len(scene.things), rng, spoken)}"
        )
        if len(scene.things) == 1:
            text = text.replace("there are", "there is").replace("a group of one", "just one")
    else:
        phrases = []
        for thing in scene.things:
            phrase = noun(thing, 1, rng, spoken)
            if scene.task in ("single", "colours") and rng.random() < 0.2:
                phrase = f"{rng.choice(SIZES)} {phrase}"
            phrases.append(with_article(phrase))
        if scene.task in ("single", "colours"):
            text = rng.choice(SINGLE).format(x=phrases[0])
        elif scene.task == "row":
            text = rng.choice(ROW).format(x=phrases[0], y=phrases[1], z=phrases[2])
        elif scene.relation in ("left", "above") and scene.task in ("position", "binding", "pair"):
            if scene.task == "position" or (scene.relation == "above") or rng.random() < 0.4:
                other = {"left": "right", "above": "below"}[scene.relation]
                if rng.random() < 0.5:
                    text = rng.choice(RELATIONS[scene.relation]).format(x=phrases[0], y=phrases[1])
                else:
                    text = rng.choice(RELATIONS[other]).format(x=phrases[1], y=phrases[0])
            else:
                text = rng.choice(PAIR).format(x=phrases[0], y=phrases[1])
        else:
            raise ValueError(f"caption: task {scene.task!r} with relation {scene.relation!r} is not in the grammar")
    if rng.random() < 0.78:
        clause = rng.choice(BACKGROUNDS[scene.background])
        if "it all" in clause:
            clause = clause.replace("it all", "them" if len(scene.things) > 1 else "it")
        text = f"{text}, {clause}" if rng.random() < 0.5 else f"{text} {clause}"
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:] + "."
    return text


def words() -> set[str]:
    """Every lower-case word the grammar can say (the tokenizer's closure is built over these)."""
    out: set[str] = (
        set(NUMBERS.values()) | set(SIZES) | {"a", "an", "just", "is", "are", "t-shirt", "t-shirts", "them", "it"}
    )
    from .sprites import PALETTE

    out |= set(PALETTE)
    for kind in KINDS.values():
        out |= {kind.noun, kind.plural}
    templates = [*SINGLE, *PAIR, *COUNT, *ROW, *(t for group in RELATIONS.values() for t in group)]
    templates += [t for group in BACKGROUNDS.values() for t in group]
    for template in templates:
        for letter in "xyzn":
            template = template.replace("{" + letter + "}", " ")
        out |= {word.strip(",.") for word in template.split()}
    return {word for word in out if word}
