"""The rules of the prompt writer that can be counted, as a linter: what it returns is what an answer breaks, in words.

The paper's rules for subjects: wholly visible and unobstructed, exact numbers, one uniform colour for each object that has one, each
label beside its object. The words that stand for a break of them are lists here; words of the item itself (a "striped bathing
suit") break nothing. What no list can tell, whether a sentence is true of the taxonomy or a rubric visible, is left to a reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .taxonomy import DIMENSIONS, Item

RUBRICS = 10
BEGINNING = "Verify that "
WORDS = (12, 90)  # of a prompt
RUBRIC_WORDS = 30
MOST_THINGS = 10
ABOUT = (*DIMENSIONS, "subject", "text", "scene")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
COLOURS = (
    *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gray"),
    *(
        "turquoise",
        "beige",
        "teal",
        "violet",
        "crimson",
        "scarlet",
        "maroon",
        "navy",
        "magenta",
        "cyan",
        "indigo",
        "lilac",
    ),
)
VAGUE = (
    *("some", "several", "many", "few", "a couple of", "various", "numerous", "countless", "dozens", "hundreds"),
    *("a handful of", "a group of", "a bunch of", "a number of", "a variety of", "lots of", "multiple", "scattered"),
)
HIDDEN = (
    *(
        "hidden",
        "half-hidden",
        "partially",
        "partly",
        "obscured",
        "occluded",
        "cropped",
        "concealed",
        "peeking",
        "peeping",
    ),
    *("cut off", "out of frame", "behind", "overlapping", "overlap", "covered by", "submerged", "buried"),
)
MIXED = (
    *("multicoloured", "multicolored", "multi-coloured", "multi-colored", "rainbow", "striped", "stripes", "two-tone"),
    *(
        "gradient",
        "patterned",
        "chequered",
        "checkered",
        "polka-dot",
        "polka-dotted",
        "iridescent",
        "colourful",
        "colorful",
    ),
)
PLACES = (
    *("left", "right", "above", "below", "under", "underneath", "beneath", "beside", "next to", "on", "in", "inside"),
    *(
        "in front of",
        "between",
        "among",
        "around",
        "near",
        "at",
        "over",
        "against",
        "along",
        "across",
        "opposite",
        "facing",
    ),
)
_SMALL = frozenset(
    re.findall("[a-z]+", "a an and at by for from in into its of off on or over that the to under up with whose which")
)


@dataclass(frozen=True)
class Thing:
    """What a prompt shows. colour: "" where none is said."""

    label: str
    count: int
    colour: str


@dataclass(frozen=True)
class Draft:
    """An answer of the writer. evidence: (dimension, words of the prompt); rubrics: (what it is about, text)."""

    prompt: str
    things: tuple[Thing, ...]
    evidence: tuple[tuple[str, str], ...]
    rubrics: tuple[tuple[str, str], ...]


def broken_rules(draft: Draft, item: Item, dimensions: Sequence[str], general: str) -> list[str]:
    """What is wrong with a draft, [] where nothing is. general: the rubric that every prompt has besides, which none may repeat."""
    return [
        *_prompt(draft, item),
        *_things(draft, item),
        *_evidence(draft, dimensions),
        *_rubrics(draft, dimensions, general),
    ]


def found(words: Sequence[str], text: str) -> list[str]:
    """Those of `words` that `text` has as whole words."""
    return [word for word in words if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text, re.IGNORECASE)]


def unquoted(text: str) -> str:
    """Without what stands in double quotes."""
    return re.sub(r"[\"“][^\"“”]*[\"”]", " ", text)


def _prompt(draft: Draft, item: Item) -> Iterator[str]:
    text = draft.prompt
    count = len(text.split())
    if not WORDS[0] <= count <= WORDS[1] or "\n" in text.strip():
        yield f"the prompt has {count} words, expected one paragraph of {WORDS[0]} to {WORDS[1]}"
    plain, own = unquoted(text), unquoted(item.name)
    for name, words in (("an exact number", VAGUE), ("a wholly visible thing", HIDDEN), ("one uniform colour", MIXED)):
        if bad := [word for word in found(words, plain) if word not in found(words, own)]:
            yield f"the prompt says {', '.join(map(repr, bad))}, expected {name}"
    for quoted in re.findall(r'"([^"]+)"', item.name):
        if not re.search(rf"[\"“]{re.escape(quoted)}[.,]?[\"”]", text):
            yield f'the prompt lacks the text "{quoted}" in double quotes'
    content = [word for word in re.findall(r"[^\W\d_]+", own.casefold()) if word not in _SMALL]
    missing = [word for word in content if word[:4] not in text.casefold()]
    if 2 * len(missing) > len(content):
        yield f"the prompt lacks {', '.join(missing)} of the subject {item.name!r}"


def _things(draft: Draft, item: Item) -> Iterator[str]:
    text, own = unquoted(draft.prompt), unquoted(item.name)
    if not draft.things:
        yield "no object is listed, expected the subject at least"
    for thing in draft.things:
        if not thing.label.strip() or thing.label.casefold() not in draft.prompt.casefold():
            yield f"the object {thing.label!r} is not in the prompt by that label"
            continue
        if not 1 <= thing.count <= MOST_THINGS:
            yield f"{thing.label!r}: {thing.count} of them, expected 1 to {MOST_THINGS}"
        elif thing.count > 1 and not _before(text, (NUMBERS[thing.count - 2], str(thing.count)), thing.label):
            yield f"{thing.label!r}: expected {NUMBERS[thing.count - 2]!r} right before it"
        colour = thing.colour.casefold()
        if colour and colour.split()[-1] not in COLOURS:
            yield f"{thing.label!r}: the colour {thing.colour!r}, expected one of {', '.join(COLOURS[:12])} ..."
        elif colour and not found((colour,), thing.label) and not _before(text, (colour,), thing.label):
            yield f"{thing.label!r}: expected {thing.colour!r} right before it"
    labels = " ".join(thing.label for thing in draft.things)
    colours = [word for thing in draft.things for word in thing.colour.casefold().split()]
    if loose := [w for w in found(COLOURS, text) if w not in colours and w not in found(COLOURS, f"{own} {labels}")]:
        yield f"the prompt says {', '.join(map(repr, loose))}, which is the colour of no listed object"
    counts = [NUMBERS[thing.count - 2] for thing in draft.things if 2 <= thing.count <= MOST_THINGS]
    if loose := [w for w in found(NUMBERS, text) if w not in counts and w not in found(NUMBERS, f"{own} {labels}")]:
        yield f"the prompt says {', '.join(map(repr, loose))}, which is the number of no listed object"
    any_colour = "|".join(COLOURS)
    if mixed := re.search(rf"\b({any_colour})[ -](?:and|&)[ -]({any_colour})\b", text, re.IGNORECASE):
        yield f"the prompt says {mixed[0]!r}, expected one uniform colour"


def _evidence(draft: Draft, dimensions: Sequence[str]) -> Iterator[str]:
    given = dict(draft.evidence)
    if sorted(name for name, _ in draft.evidence) != sorted(dimensions):
        got = ", ".join(name for name, _ in draft.evidence) or "nothing"
        yield f"evidence for {got}, expected it for {', '.join(dimensions)}, once each"
    for name, quote in draft.evidence:
        if not quote.strip() or quote.casefold().strip(" .") not in draft.prompt.casefold():
            yield f"{name}: the quote {quote[:60]!r} is not in the prompt"
    if "count" in dimensions and not any(thing.count > 1 for thing in draft.things):
        yield "count: expected an object of which there are two or more"
    if "colour" in dimensions and not any(thing.colour for thing in draft.things):
        yield "colour: expected an object with a colour"
    if "spatial relationship" in dimensions and not found(PLACES, given.get("spatial relationship", "")):
        yield "spatial relationship: expected words for a place in its quote"


def _rubrics(draft: Draft, dimensions: Sequence[str], general: str) -> Iterator[str]:
    texts = [text for _, text in draft.rubrics]
    if len(texts) != RUBRICS or len({text.casefold().strip(" .") for text in texts}) != len(texts):
        yield f"{len(texts)} rubrics, {len(set(texts))} of them different, expected {RUBRICS} different ones"
    for about, text in draft.rubrics:
        if not text.startswith(BEGINNING) or len(text.split()) > RUBRIC_WORDS or "\n" in text:
            yield f"the rubric {text[:60]!r}: expected {BEGINNING.strip()!r} and at most {RUBRIC_WORDS} words"
        if about not in ABOUT:
            yield f"the rubric {text[:60]!r} is about {about!r}, expected one of {', '.join(ABOUT)}"
        if text.casefold().strip(" .") == general.casefold().strip(" ."):
            yield f"the rubric {text[:60]!r} is the general one, which is asked anyway"
        if found(("or",), unquoted(text)):
            yield f"the rubric {text[:60]!r} says 'or', expected one fact"
        if about == "count" and not (found((*NUMBERS, "one", "single"), text) or re.search(r"\d", text)):
            yield f"the rubric {text[:60]!r} is about a count, expected its number"
        if about == "colour" and not found([thing.colour for thing in draft.things if thing.colour], text):
            yield f"the rubric {text[:60]!r} is about a colour, expected one that an object has"
    together = "\n".join(texts).casefold()
    for thing in draft.things:
        if thing.label.casefold() not in together and not _alike(thing.label, together):
            yield f"no rubric names {thing.label!r}"
    for name in dimensions:
        if all(about != name for about, _ in draft.rubrics):
            yield f"no rubric is about {name}"


def _before(text: str, words: Sequence[str], label: str) -> bool:
    """Whether one of `words` stands before the label with at most three words between, none of them another's end."""
    either = "|".join(map(re.escape, words))
    return bool(re.search(rf"\b(?:{either})\b[ -](?:[\w'’-]+[ ,]+){{0,3}}{re.escape(label)}", text, re.IGNORECASE))


def _alike(label: str, text: str) -> bool:
    """Whether the text has the label in the other number: boat, boats; box, boxes; berry, berries."""
    word = label.casefold()
    stem = re.sub(r"(ies|es|s|y)$", "", word)
    return len(stem) > 2 and stem in text
