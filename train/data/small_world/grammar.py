"""The grammar of short English captions: "geneval", the forms of that benchmark, and "brief", one of many paraphrases."""

from __future__ import annotations

import random

from . import place_phrases
from .kinds import KINDS
from .layout import place_of, size_of
from .photographs import PLACES as PHOTOGRAPHED
from .phrases import (
    BACKGROUNDS,
    COUNT,
    NUMBERS,
    PAIR,
    PLACED,
    PLACES,
    RELATIONS,
    ROW,
    SIGN,
    SIGN_ABOVE,
    SIGN_ALONE,
    SIGN_BELOW,
    SIGN_COLOURS,
    SIGN_SAYS,
    SINGLE,
    SIZES,
)
from .scene import Scene, Sign, is_unusual
from .wording import OPPOSITE, noun, with_article

CLAUSES = {**BACKGROUNDS, **place_phrases.CLAUSES}  # what may follow a short caption


def geneval(scene: Scene, rng: random.Random) -> str:
    """The benchmark's form, and the place where it is a photographed one."""
    text = _geneval(scene, rng)
    return f"{text} {rng.choice(CLAUSES[scene.background])}" if scene.background in PHOTOGRAPHED else text


def _geneval(scene: Scene, rng: random.Random) -> str:
    always = 1.0 if scene.task in ("colors", "color_attr") else 0.0
    if scene.task == "counting":
        return f"a photo of {NUMBERS[len(scene.things)]} {noun(scene.things[0], len(scene.things), rng, always)}"
    phrases = [with_article(noun(thing, 1, rng, always)) for thing in scene.things]
    if scene.sign:
        return "a photo of " + " and ".join([*phrases, f'a sign that says "{scene.sign.text}"'])
    if scene.task == "position" and scene.relation is not None:
        first, relation, second = phrases[0], scene.relation, phrases[1]
        if rng.random() < 0.5:
            first, relation, second = second, OPPOSITE[relation], first
        return f"a photo of {first} {relation}{' of' if relation in ('left', 'right') else ''} {second}"
    return "a photo of " + " and ".join(phrases)


def sign_phrase(sign: Sign, rng: random.Random) -> str:
    """A sign with its text; black on white may go unsaid."""
    if (sign.paper, sign.ink) == ("white", "black") and rng.random() < 0.7:
        return rng.choice(SIGN).format(c="a sign", t=sign.text)
    carrier = rng.choice(SIGN_COLOURS).format(paper=sign.paper, ink=sign.ink)
    return rng.choice(SIGN_SAYS).format(c=with_article(carrier), t=sign.text)


def brief(scene: Scene, rng: random.Random) -> str:
    """One of many paraphrases, with its backdrop more often than not; a photographed place is always said."""
    text = _brief(scene, rng)
    said = rng.random() < 0.78 or (scene.task == "text" and rng.random() < 0.5)
    if said or scene.background in PHOTOGRAPHED:
        clause = rng.choice(CLAUSES[scene.background])
        if "it all" in clause:
            clause = clause.replace("it all", "them" if len(scene.things) + (scene.sign is not None) > 1 else "it")
        text = f"{text}, {clause}" if rng.random() < 0.5 or scene.sign else f"{text} {clause}"
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:] + "."
    return text


def _brief(scene: Scene, rng: random.Random) -> str:
    spoken = 0.4 if not scene.things or KINDS[scene.things[0].kind].paint is None else 0.7
    if scene.task == "counting":
        count = len(scene.things)
        text = rng.choice(COUNT).format(n=f"{NUMBERS[count]} {noun(scene.things[0], count, rng, spoken)}")
        if count == 1:
            text = text.replace("there are", "there is").replace("a group of one", "just one")
        return text
    phrases, unusual = [], is_unusual(scene)
    for thing in scene.things:
        phrase = noun(thing, 1, rng, spoken, synonyms=0.1)
        if scene.task in ("single_object", "colors"):
            size = size_of(thing.box, scene.height, scene.width)
            if size in SIZES and (size != "large" or rng.random() < 0.2):
                phrase = f"{rng.choice(SIZES[size])} {phrase}"
        phrases.append(with_article(phrase))
    if scene.sign is not None:
        sign = sign_phrase(scene.sign, rng)
        if not phrases:
            return rng.choice(SIGN_ALONE).format(s=sign)
        return rng.choice(SIGN_ABOVE if scene.relation == "above" else SIGN_BELOW).format(x=phrases[0], s=sign)
    if unusual:
        place = place_of(scene.things[0].box, scene.height, scene.width)
        if place != ("middle", "middle"):
            return rng.choice(PLACED).format(x=phrases[0], p=rng.choice(PLACES[place]))
    if scene.task in ("single_object", "colors"):
        return rng.choice(SINGLE).format(x=phrases[0])
    if scene.task == "row":
        return rng.choice(ROW).format(x=phrases[0], y=phrases[1], z=phrases[2])
    assert scene.relation is not None
    if scene.task == "position" or scene.relation == "above" or rng.random() < 0.4:
        if rng.random() < 0.5:
            return rng.choice(RELATIONS[scene.relation]).format(x=phrases[0], y=phrases[1])
        return rng.choice(RELATIONS[OPPOSITE[scene.relation]]).format(x=phrases[1], y=phrases[0])
    return rng.choice(PAIR).format(x=phrases[0], y=phrases[1])
