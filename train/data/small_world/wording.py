"""The smallest English pieces of a caption: opposite relations, articles, an object's colour and noun."""

from __future__ import annotations

import random
import re

from .kinds import KINDS
from .scene import Thing

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def with_article(phrase: str) -> str:
    vowel = (phrase[0] in "aeiou" and not re.match(r"(uni|use|eu|one\b)", phrase)) or phrase.startswith("hour")
    return ("an " if vowel else "a ") + phrase


def noun(thing: Thing, number: int, rng: random.Random, colour_words: float, synonyms: float = 0.0) -> str:
    """[colour] noun; a natural colour is said with probability `colour_words`, any other always."""
    kind = KINDS[thing.kind]
    natural = thing.colour is None or thing.colour == kind.natural
    say_colour = thing.colour is not None and (not natural or rng.random() < colour_words)
    word = kind.noun if number == 1 else kind.plural
    if number == 1 and kind.also and rng.random() < synonyms:
        word = rng.choice(kind.also)
    return f"{thing.colour} {word}" if say_colour else word
