"""Dense captions: 40-100 English words on count, layout, each object, relation, sign, background, light, mood.

A sentence plan is drawn per scene: what tells the objects apart (opening, relation, sign, unusual places and sizes) is
always said; the rest is added in random order until a drawn number of words is reached, then put in one of four orders.
"""

from __future__ import annotations

import random

from . import place_phrases
from .dense_phrases import (
    BACKDROPS,
    BACKGROUND,
    BETWEEN,
    CLOSING,
    INSIDE,
    LAYOUTS,
    LIGHT,
    LOOK,
    LOOK_ALL,
    MATERIALS,
    MOOD,
    OPEN_ABOVE,
    OPEN_COUNT,
    OPEN_LEFT,
    OPEN_ONE,
    OPEN_ROW,
    OPEN_SIGN,
    OPEN_THING_SIGN,
    PLACES,
    RELATED,
    RELATIONS,
    SAME,
    SAME_COLOUR,
    SHADOW,
    SIGN,
    SIZES,
    STYLE,
    WHERE,
)
from .kinds import KINDS
from .layout import place_of, size_of
from .photographs import PLACES as PHOTOGRAPHED
from .phrases import NUMBERS
from .scene import Scene, Thing
from .wording import OPPOSITE, with_article

MIN_WORDS, MAX_WORDS = 40, 100

BEHIND = {**BACKDROPS, **place_phrases.BACKDROPS}
LIT = {**LIGHT, **place_phrases.LIGHT}
ORDERS = (
    ("open", "thing", "relation", "sign", "background", "light", "shadow", "look", "style", "mood", "closing"),
    ("background", "light", "open", "relation", "thing", "sign", "look", "shadow", "style", "mood", "closing"),
    ("style", "open", "sign", "relation", "look", "thing", "closing", "background", "light", "mood", "shadow"),
    ("open", "background", "look", "relation", "thing", "sign", "shadow", "mood", "light", "style", "closing"),
)


def count_words(text: str) -> int:
    """Words as they are counted for MIN_WORDS and MAX_WORDS: what blanks separate."""
    return len(text.split())


def _sentence(template: str, **parts: str) -> str:
    text = template.format(**parts)
    return text[0].upper() + text[1:]


def caption(scene: Scene, rng: random.Random) -> str:
    """40-100 true words about the scene. Errors: ValueError where the clauses cannot reach MIN_WORDS."""
    things = list(dict.fromkeys((t.kind, t.colour) for t in scene.things))
    names = []
    for kind, _ in things:
        also = KINDS[kind].also
        names.append(
            rng.choice(also) if also and scene.task != "counting" and rng.random() < 0.12 else KINDS[kind].noun
        )
    must = {"open": [_open(scene, rng, names)]}
    may: list[tuple[str, str]] = []
    if scene.task == "counting":
        must, may = _counting(scene, rng, must)
    else:
        for thing, name in zip(scene.things, names):
            place = place_of(thing.box, scene.height, scene.width)
            where = _sentence(rng.choice(WHERE), x=name, p=rng.choice(PLACES[place]))
            if scene.task in ("single_object", "colors") and place != ("middle", "middle"):
                must["thing"] = [where]
            elif scene.task != "row":
                may.append(("thing", where))
            may.append(("look", _sentence(rng.choice(LOOK), x=name, m=rng.choice(MATERIALS))))
        if scene.task == "row":
            must["relation"] = [_sentence(rng.choice(BETWEEN), **dict(zip("xyz", names)))]
        elif scene.relation:
            must["relation"] = [_relation(scene, rng, names)]
    if scene.sign:
        must["sign"] = [_sentence(rng.choice(SIGN), t=scene.sign.text, i=scene.sign.ink, p=scene.sign.paper)]
    may += _surroundings(scene, rng, names)
    if scene.background in PHOTOGRAPHED:
        must["background"] = [sentence for slot, sentence in may if slot == "background"]
        may = [pair for pair in may if pair[0] != "background"]
    return _compose(rng, must, may)


def _sized(thing: Thing, scene: Scene, rng: random.Random, name: str, always: bool) -> str:
    size = size_of(thing.box, scene.height, scene.width)
    colour = f"{thing.colour} " if thing.colour else ""
    if always or rng.random() < 0.4:
        return with_article(f"{rng.choice(SIZES[size])} {colour}{name}")
    return with_article(colour + name)


def _open(scene: Scene, rng: random.Random, names: list[str]) -> str:
    if scene.task == "counting":
        kind, colour, count = KINDS[scene.things[0].kind], scene.things[0].colour, len(scene.things)
        colour = f"{colour} " if colour else ""
        if count == 1:
            return _sentence(rng.choice(OPEN_ONE), x=f"one {colour}{kind.noun}")
        phrase = f"{NUMBERS[count]} {colour}{kind.plural}"
        return _sentence(rng.choice(OPEN_COUNT), n=phrase, l=rng.choice(LAYOUTS[count]))
    single = scene.task in ("single_object", "colors")
    unusual = single and size_of(scene.things[0].box, scene.height, scene.width) in ("small", "huge")
    phrases = [_sized(thing, scene, rng, name, unusual) for thing, name in zip(scene.things, names)]
    parts = dict(zip("xyz", phrases))
    if scene.task == "text":
        return _sentence(rng.choice(OPEN_THING_SIGN if phrases else OPEN_SIGN), **parts)
    if single:
        return _sentence(rng.choice(OPEN_ONE), **parts)
    if scene.task == "row":
        return _sentence(rng.choice(OPEN_ROW), **parts)
    if rng.random() < 0.3:
        parts = {"x": phrases[1], "y": phrases[0]}
    return _sentence(rng.choice(OPEN_ABOVE if scene.relation in ("above", "below") else OPEN_LEFT), **parts)


def _relation(scene: Scene, rng: random.Random, names: list[str]) -> str:
    assert scene.relation is not None
    first, relation, second = names[0], scene.relation, "sign" if scene.sign else names[1]
    if rng.random() < 0.5:
        first, relation, second = second, OPPOSITE[relation], first
    return _sentence(rng.choice(RELATED), x=first, r=rng.choice(RELATIONS[relation]), y=second)


def _counting(
    scene: Scene, rng: random.Random, must: dict[str, list[str]]
) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    kind, colour, count = KINDS[scene.things[0].kind], scene.things[0].colour, len(scene.things)
    if count == 1:
        may = [("thing", _sentence(rng.choice(WHERE), x=kind.noun, p=rng.choice(PLACES["middle", "middle"])))]
        return must, [*may, ("look", _sentence(rng.choice(LOOK), x=kind.noun, m=rng.choice(MATERIALS)))]
    numbered = f"{NUMBERS[count]} {kind.plural}"
    whole, together = (f"Both {kind.plural}", "both") if count == 2 else (f"All {numbered}", "all")
    may = [
        ("thing", _sentence(rng.choice(SAME), a=whole, n=numbered, x=kind.noun)),
        ("look", _sentence(rng.choice(LOOK_ALL), x=kind.noun, m=rng.choice(MATERIALS))),
    ]
    if colour:
        may.append(("look", _sentence(rng.choice(SAME_COLOUR), a=whole, b=together, n=numbered, x=kind.noun, c=colour)))
    return must, may


def _surroundings(scene: Scene, rng: random.Random, names: list[str]) -> list[tuple[str, str]]:
    photographed = scene.background in PHOTOGRAPHED
    backdrop = rng.choice(BEHIND[scene.background])
    objects = [*names, *(["sign"] if scene.sign else [])]
    many = len(scene.things) > 1 or len(objects) > 1
    under = "each " + (names[0] if scene.task == "counting" else "object") if many else f"the {objects[0]}"
    return [
        ("background", _sentence(rng.choice(BACKGROUND), b=backdrop)),
        ("light", rng.choice(LIT.get(scene.background, INSIDE))),
        ("shadow", _sentence(rng.choice(SHADOW), o=under)),
        ("style", rng.choice(place_phrases.STYLE if photographed else STYLE)),
        ("mood", rng.choice(MOOD)),
        ("closing", rng.choice(place_phrases.CLOSING if photographed else CLOSING)),
    ]


def _compose(rng: random.Random, must: dict[str, list[str]], may: list[tuple[str, str]]) -> str:
    target = rng.randint(MIN_WORDS + 2, 92)
    plan = {slot: list(sentences) for slot, sentences in must.items()}
    total = sum(count_words(s) for sentences in plan.values() for s in sentences)
    rng.shuffle(may)
    may.sort(key=lambda pair: pair[0] == "background" and rng.random() < 0.7, reverse=True)  # told more often than mood
    for slot, sentence in may:
        more = count_words(sentence)
        if total >= target:
            break
        if total + more <= MAX_WORDS:
            plan.setdefault(slot, []).append(sentence)
            total += more
    if total < MIN_WORDS:
        raise ValueError(f"dense.caption: the clauses have {total} words in all, expected at least {MIN_WORDS}")
    return " ".join(s for slot in rng.choice(ORDERS) for s in plan.get(slot, ()))
