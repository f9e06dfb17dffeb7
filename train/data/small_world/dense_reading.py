"""A dense caption read back: the inverse of `dense`, for captions of whoever wrote them.

    read("The picture shows a red apple. The apple is in the middle. ...").things     # (("apple", "red"),)

Every sentence must be one of the grammar, filled with its own phrases, and say nothing that another one contradicts: no thing
that the opening does not name, no other count or colour, no place against the relation, no light against the backdrop.
Photographed places are not read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import dense_phrases as phrases
from .dense import MAX_WORDS, MIN_WORDS, count_words
from .kinds import KINDS, PALETTE
from .mentions import nouns_of
from .phrases import NUMBERS
from .wording import OPPOSITE

_COUNTS = {word: count for count, word in NUMBERS.items()}
_FORMS = {form: kind for kind in KINDS for form in nouns_of(kind, "en")}
_RELATIONS = {text: relation for relation, texts in phrases.RELATIONS.items() for text in texts}
_PLACES = {text: place for place, texts in phrases.PLACES.items() for text in texts}
_BACKDROPS = {text: name for name, texts in phrases.BACKDROPS.items() for text in texts}
_LAYOUTS = {text: count for count, texts in phrases.LAYOUTS.items() for text in texts}


def _any(texts: Iterable[str]) -> str:
    return "|".join(re.escape(text) for text in sorted(set(texts), key=lambda text: (-len(text), text)))


_SIZE, _COLOUR, _NOUN = (_any(group) for group in ([s for g in phrases.SIZES.values() for s in g], PALETTE, _FORMS))
_OBJECT = rf"(?:an?|one) (?:(?:{_SIZE}) )?(?:(?:{_COLOUR}) )?(?:{_NOUN})"
_NAME = rf"{_NOUN}|sign"
_GROUP = rf"(?:{_any(_COUNTS)}) (?:(?:{_COLOUR}) )?(?:{_NOUN})"
# sentence -> its templates, and what may fill them
_SENTENCES: Mapping[str, tuple[Sequence[str], Mapping[str, str]]] = {
    "open one": (phrases.OPEN_ONE, {"x": _OBJECT}),
    "open pair": ((*phrases.OPEN_LEFT, *phrases.OPEN_ABOVE), {"x": _OBJECT, "y": _OBJECT}),
    "open count": (phrases.OPEN_COUNT, {"n": _GROUP, "l": _any(_LAYOUTS)}),
    "open row": (phrases.OPEN_ROW, {"x": _OBJECT, "y": _OBJECT, "z": _OBJECT}),
    "open sign": (phrases.OPEN_SIGN, {}),
    "open thing and sign": (phrases.OPEN_THING_SIGN, {"x": _OBJECT}),
    "where": (phrases.WHERE, {"x": _NAME, "p": _any(_PLACES)}),
    "look": ((*phrases.LOOK, *phrases.LOOK_ALL), {"x": _NAME, "m": _any(phrases.MATERIALS)}),
    "same": (phrases.SAME, {"a": rf"(?:Both|All (?:{_any(_COUNTS)})) (?:{_NOUN})", "n": _GROUP, "x": _NOUN}),
    "same colour": (
        phrases.SAME_COLOUR,
        {"a": rf"(?:Both|All (?:{_any(_COUNTS)})) (?:{_NOUN})", "n": _GROUP, "x": _NOUN, "b": "both|all", "c": _COLOUR},
    ),
    "related": (phrases.RELATED, {"x": _NAME, "r": _any(_RELATIONS), "y": _NAME}),
    "between": (phrases.BETWEEN, {"x": _NOUN, "y": _NOUN, "z": _NOUN}),
    "sign": (phrases.SIGN, {"t": '[^"]+', "i": _COLOUR, "p": _COLOUR}),
    "background": (phrases.BACKGROUND, {"b": _any(_BACKDROPS)}),
    "light": (sorted({text for group in (phrases.INSIDE, *phrases.LIGHT.values()) for text in group}), {}),
    "shadow": (phrases.SHADOW, {"o": rf"each object|(?:the|each) (?:{_NAME})"}),
    "style": (phrases.STYLE, {}),
    "mood": (phrases.MOOD, {}),
    "closing": (phrases.CLOSING, {}),
}


@functools.cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """(sentence, pattern) of every template; what fills a slot twice is the same twice."""
    found = []
    for name, (templates, slots) in _SENTENCES.items():
        for template in templates:
            pattern, seen = "", set()
            for piece in re.split(r"(\{\w\})", template):
                slot = piece[1:-1]
                if not piece.startswith("{"):
                    pattern += re.escape(piece)
                elif slot in seen:
                    pattern += f"(?P={slot})"
                else:
                    pattern += f"(?P<{slot}>{slots[slot]})"
                    seen.add(slot)
            found.append((name, re.compile(pattern, re.IGNORECASE)))
    return found


def _matched(sentence: str) -> tuple[str, dict[str, str]]:
    for name, pattern in _patterns():
        if match := pattern.fullmatch(sentence):
            lower = {slot: text if slot == "t" else text.lower() for slot, text in match.groupdict().items()}
            return name, lower
    raise ValueError(f"no sentence of a dense caption: {sentence!r}")


def _thing(phrase: str) -> tuple[str, str | None]:
    """ "a rather small red apple" -> ("apple", "red")."""
    noun = next(form for form in sorted(_FORMS, key=len, reverse=True) if f" {phrase}".endswith(f" {form}"))
    before = phrase.removesuffix(noun).split()
    return _FORMS[noun], before[-1] if before and before[-1] in PALETTE else None


# ------------------------------------------------------------------------------------------------ captions


@dataclass(frozen=True)
class Reading:
    """What a caption says: (class, colour) of every thing, a counted one as often as it is there, others from left to right or
    from top to bottom; of two things "left" or "above", of one and a sign "above" or "below"; the backdrop; a sign's text."""

    things: tuple[tuple[str, str | None], ...]
    relation: str | None
    background: str | None
    sign: str | None


def read(text: str) -> Reading:
    """Errors: ValueError, with the sentence, for what is no dense caption."""
    if not MIN_WORDS <= count_words(text) <= MAX_WORDS:
        raise ValueError(f"{count_words(text)} words, expected {MIN_WORDS} to {MAX_WORDS}")
    found: dict[str, list[dict[str, str]]] = {}
    for sentence in re.findall(r'(?:"[^"]*"|[^".])+(?:\.|$)', text):
        name, parts = _matched(sentence.strip())
        found.setdefault(name, []).append(parts)
    openings = [name for name in found if name.startswith("open")]
    if [len(found[name]) for name in openings] != [1]:
        raise ValueError(f"openings: {openings}, expected one")
    opening, parts = openings[0], found[openings[0]][0]
    if opening == "open count":
        count, phrase = parts["n"].split(" ", 1)
        things = [_thing(phrase)] * _COUNTS[count]
        if _LAYOUTS[parts["l"]] != len(things):
            raise ValueError(f"{count} things {parts['l']!r}")
    else:
        things = [_thing(parts[slot]) for slot in "xyz" if slot in parts]
    signed = opening in ("open sign", "open thing and sign")
    if signed != ("sign" in found):
        raise ValueError("a sign without a text, or a text without a sign")
    _check_names(found, things, signed)
    relation = _check_places(found, things, opening)
    backdrop = {_BACKDROPS[parts["b"]] for parts in found.get("background", [])}
    for name in backdrop if "light" in found else ():
        lights = [t.lower() for t in phrases.LIGHT.get(name, phrases.INSIDE)]
        if not any(sentence.strip().lower() in lights for sentence in re.findall(r"[^.]+\.", text)):
            raise ValueError(f"no light of the backdrop {name!r}")
    if len(backdrop) > 1:
        raise ValueError(f"backdrops: {sorted(backdrop)}")
    return Reading(tuple(things), relation, next(iter(backdrop), None), found["sign"][0]["t"] if signed else None)


def _check_names(
    found: Mapping[str, list[dict[str, str]]], things: Sequence[tuple[str, str | None]], signed: bool
) -> None:
    """What is spoken of is there, in that number and colour."""
    kinds = {kind for kind, _ in things} | ({"sign"} if signed else set())
    for name, several in found.items():
        for parts in () if name.startswith("open") else several:
            words = [parts[slot] for slot in "xyz" if parts.get(slot)]
            words += [parts["o"].split(" ", 1)[1]] if "o" in parts else []
            words += [
                parts[slot].split(" ", 2 if parts[slot].startswith("all") else 1)[-1] for slot in "an" if slot in parts
            ]
            for word in words:
                named = "sign" if word == "sign" else _thing(word)[0] if word != "object" else None
                if named is not None and named not in kinds:
                    raise ValueError(f"{word!r} is spoken of, and not there")
            counted = {w for slot in "an" if slot in parts for w in parts[slot].split() if w in (*_COUNTS, "both")}
            if any(len(things) != _COUNTS.get(word, 2) for word in counted):
                raise ValueError(f"{sorted(counted)} of {len(things)} things")
            if "c" in parts and any(colour != parts["c"] for _, colour in things):
                raise ValueError(f"{parts['c']!r} of other colours")


def _check_places(
    found: Mapping[str, list[dict[str, str]]], things: list[tuple[str, str | None]], opening: str
) -> str | None:
    """The relation; `things` are put in its order."""

    def kind(word: str) -> str:
        return "sign" if word == "sign" else _FORMS[word]

    between = [[kind(parts[slot]) for slot in "xyz"] for parts in found.get("between", [])]
    if opening == "open row" and between != [[one for one, _ in things]]:
        raise ValueError("a row without its order, or in another one")
    if opening == "open pair" and len(found.get("related", [])) != 1:
        raise ValueError("two things without a relation")
    relation, order = None, [one for one, _ in things]
    for parts in found.get("related", []):
        first, relation, second = kind(parts["x"]), _RELATIONS[parts["r"]], kind(parts["y"])
        if first == second:
            raise ValueError(f"{first!r} {relation} itself")
        if (relation in ("right", "below") and second != "sign") or first == "sign":
            first, relation, second = second, OPPOSITE[relation], first
        if second != "sign":
            things.sort(key=lambda thing: thing[0] != first)
        order = [first, second]
    low, high = {"left": (1, "left"), "above": (0, "top")}.get(relation or "", (None, ""))
    for parts in found.get("where", []):
        place, one = _PLACES[parts["p"]], kind(parts["x"])
        if low is not None and "sign" not in order:
            expected = high if one == order[0] else {"left": "right", "top": "bottom"}[high]
            if place[low] != expected:
                raise ValueError(f"the {one} {parts['p']}, against the relation {relation!r}")
    return relation
