"""From a scene to a caption: every caption is true, in one of four styles.

"geneval": the forms of the GenEval benchmark, "a photo of ...". "brief": 6-35 tokens, one of many paraphrases. "dense":
40-100 words (`dense`). "translated": brief, in Chinese, French, Japanese or Spanish (`translations`).

A class in its natural colour may go unnamed in colour ("a star" is yellow), a sign may be black on white unsaid; any other
colour, and any unusual size or place of a single object, is always said, so a prompt has one right answer. A photographed place is
always said, in English alone: a backdrop that goes unsaid is a drawn one.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from . import dense, dense_phrases, place_phrases, translations
from .kinds import KINDS, PALETTE
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
from .translations import LANGUAGES

CLAUSES = {**BACKGROUNDS, **place_phrases.CLAUSES}  # what may follow a short caption

if TYPE_CHECKING:
    from .world import Scene, Sign, Thing

STYLES = ("geneval", "brief", "dense", "translated")
OTHER = {"left": "right", "right": "left", "above": "below", "below": "above"}


def is_unusual(scene: Scene) -> bool:
    """Whether a single object is small, huge or off the middle."""
    if scene.task not in ("single_object", "colors"):
        return False
    box = scene.things[0].box
    size, place = size_of(box, scene.height, scene.width), place_of(box, scene.height, scene.width)
    return size != "large" or place != ("middle", "middle")


def can_say(scene: Scene, style: str) -> bool:
    """Whether a caption of that style gives the scene away without loss."""
    if style == "geneval":
        coloured = scene.sign is not None and (scene.sign.paper, scene.sign.ink) != ("white", "black")
        one = scene.task == "counting" and len(scene.things) == 1
        return scene.task != "row" and not (is_unusual(scene) or coloured or one)
    if style == "translated":
        return scene.task in translations.TASKS and not is_unusual(scene) and scene.background not in PHOTOGRAPHED
    return style in STYLES


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


def caption(scene: Scene, rng: random.Random, style: str = "brief", language: str = "en") -> str:
    """A true caption of the scene; `rng` decides the wording only.

    Errors: ValueError for an unknown style or language, or a style that cannot say this scene (`can_say`).
    """
    if style not in STYLES or (language not in LANGUAGES if style == "translated" else language != "en"):
        expected = f"one of {STYLES}, 'en' or for 'translated' one of {LANGUAGES}"
        raise ValueError(f"caption: style {style!r} in language {language!r}, expected {expected}")
    if not can_say(scene, style):
        raise ValueError(f"caption: style {style!r} cannot say this scene of task {scene.task!r} (see can_say)")
    if style == "geneval":
        text = geneval(scene, rng)
        return f"{text} {rng.choice(CLAUSES[scene.background])}" if scene.background in PHOTOGRAPHED else text
    if style == "dense":
        return dense.caption(scene, rng)
    if style == "translated":
        return translations.caption(scene, rng, language, 0.5)
    return brief(scene, rng)


def geneval(scene: Scene, rng: random.Random) -> str:
    always = 1.0 if scene.task in ("colors", "color_attr") else 0.0
    if scene.task == "counting":
        return f"a photo of {NUMBERS[len(scene.things)]} {noun(scene.things[0], len(scene.things), rng, always)}"
    phrases = [with_article(noun(thing, 1, rng, always)) for thing in scene.things]
    if scene.sign:
        return "a photo of " + " and ".join([*phrases, f'a sign that says "{scene.sign.text}"'])
    if scene.task == "position":
        first, relation, second = phrases[0], scene.relation, phrases[1]
        if rng.random() < 0.5:
            first, relation, second = second, OTHER[relation], first
        return f"a photo of {first} {relation}{' of' if relation in ('left', 'right') else ''} {second}"
    return "a photo of " + " and ".join(phrases)


def sign_phrase(sign: Sign, rng: random.Random) -> str:
    """A sign with its text; black on white may go unsaid."""
    if (sign.paper, sign.ink) == ("white", "black") and rng.random() < 0.7:
        return rng.choice(SIGN).format(c="a sign", t=sign.text)
    carrier = rng.choice(SIGN_COLOURS).format(paper=sign.paper, ink=sign.ink)
    return rng.choice(SIGN_SAYS).format(c=with_article(carrier), t=sign.text)


def brief(scene: Scene, rng: random.Random) -> str:
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
    if scene.task == "text":
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
    if scene.task == "position" or scene.relation == "above" or rng.random() < 0.4:
        if rng.random() < 0.5:
            return rng.choice(RELATIONS[scene.relation]).format(x=phrases[0], y=phrases[1])
        return rng.choice(RELATIONS[OTHER[scene.relation]]).format(x=phrases[1], y=phrases[0])
    return rng.choice(PAIR).format(x=phrases[0], y=phrases[1])


def words(photographs: bool = False) -> set[str]:
    """Every word the grammar can say in lower case, and the pieces of its Chinese and Japanese; sign texts left out.

    What is said of photographed places is left out as well unless asked for.
    """
    out = set(NUMBERS.values()) | {"a", "an", "just", "is", "are", "them", "it", "of", "sign"} | set(PALETTE)
    texts = [name for kind in KINDS.values() for name in (kind.noun, kind.plural, *kind.also)]
    for group in (SINGLE, PAIR, COUNT, ROW, PLACED, SIGN, SIGN_SAYS, SIGN_COLOURS, SIGN_ALONE, SIGN_ABOVE, SIGN_BELOW):
        texts += group
    for table in (BACKGROUNDS, RELATIONS, SIZES, PLACES):
        texts += [text for group in table.values() for text in group]
    places = place_phrases.texts() if photographs else []
    for text in [*texts, *dense_phrases.texts(), *places]:
        out |= {word.strip(',.;:"').lower() for word in re.sub(r"\{\w+\}", " ", text).split()}
    return {word for word in out | translations.words() if word}
