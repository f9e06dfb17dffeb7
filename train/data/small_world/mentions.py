"""Where a caption names the objects of its scene and their colours, and whether it says the background: by its words.

for mention in mentions(scene):
    scene.caption[: mention.nouns[0]]      # ends with the noun of scene.things[mention.thing]
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from . import dense, grammar, translations
from .kinds import KINDS
from .scene import Scene


@dataclass(frozen=True)
class Mention:
    """Characters at which things: the index of the first thing of that class and colour; the ends of its nouns; the end
    of the first noun with a colour word beside it, or of that word, from which on the colour is known."""

    thing: int
    nouns: tuple[int, ...]
    known: int


@functools.cache
def nouns_of(kind: str, language: str) -> tuple[str, ...]:
    """What the class may be called, lower case, longest first."""
    entry = KINDS[kind]
    forms = {entry.names[language]} if language != "en" else {entry.noun, entry.plural, *entry.also}
    return tuple(sorted((form.lower() for form in forms), key=lambda form: (-len(form), form)))


@functools.cache
def colour_words(colour: str, language: str) -> tuple[str, ...]:
    return (colour,) if language == "en" else translations.COLOURS[language][colour]


@functools.cache
def _pattern(forms: tuple[str, ...], spaced: bool) -> re.Pattern[str]:
    joined = "|".join(map(re.escape, forms))
    return re.compile(rf"(?<!\w)(?:{joined})(?!\w)" if spaced else joined)


def mentions(scene: Scene) -> list[Mention]:
    """One entry per distinct (class, colour) that the caption names, in the order of `scene.things`."""
    text, spaced = scene.caption.lower(), scene.language not in ("zh", "ja")
    if scene.sign is not None:  # what a sign says is not about the objects
        quoted = f'"{scene.sign.text.lower()}"'
        text = text.replace(quoted, "\0" * len(quoted))
    first = {(t.kind, t.colour): i for i, t in reversed(list(enumerate(scene.things)))}
    found: dict[int, list[tuple[int, int]]] = {}
    taken = bytearray(len(text))
    forms = [(form, i) for i in first.values() for form in nouns_of(scene.things[i].kind, scene.language)]
    for form, i in sorted(forms, key=lambda item: -len(item[0])):  # "palm tree" before "tree"
        for match in _pattern((form,), spaced).finditer(text):
            if not any(taken[match.start() : match.end()]):
                taken[match.start() : match.end()] = b"\1" * (match.end() - match.start())
                found.setdefault(i, []).append(match.span())
    out = []
    for i in sorted(found):
        nouns, colour = sorted(found[i]), scene.things[i].colour
        known = nouns[0][1]
        if colour is not None:
            words = _pattern(colour_words(colour, scene.language), spaced).finditer(text)
            said = [m.span() for m in words if not any(taken[m.start() : m.end()])]
            beside = [(n, w) for n in nouns for w in said if max(n[0] - w[1], w[0] - n[1]) <= 1]
            if beside:  # unsaid is only what the noun itself tells
                known = max(*(end for _, end in beside[0]))
        out.append(Mention(i, tuple(end for _, end in nouns), known))
    return out


def said_background(scene: Scene) -> str | None:
    """The background's name where the caption says it."""
    text = scene.caption.lower().rstrip(".。")
    if scene.style == "dense":
        return scene.background if any(p.lower() in text for p in dense.BEHIND[scene.background]) else None
    if scene.style == "translated":
        clauses: tuple[str, ...] = translations.BEHIND[scene.language][scene.background]
    else:
        clauses = grammar.CLAUSES[scene.background]
    endings = [c.lower().replace("it all", word) for c in clauses for word in ("it", "them")]
    return scene.background if text.endswith(tuple(endings)) else None
