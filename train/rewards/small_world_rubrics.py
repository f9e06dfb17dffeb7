"""Rubrics of the small world: sentences that a person and a language model read, and that the local judge reads back.

A rubric is one check on a class of objects (or on the whole); `sentence` writes it and `parse` reads it, the two being inverse.
Every prompt has ten of them, what it asks for first, and the global one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..data.small_world.kinds import KINDS, PALETTE
from ..data.small_world.scene import Scene
from ..data.small_world.wording import with_article
from ..evaluate import geneval
from ..evaluate.detector import SIGN

GLOBAL = "Verify that the entire image is structurally coherent and physically plausible."
SPECIFIC = 10  # rubrics a prompt beside the global one
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
_NOUNS = {**{name: (kind.noun, kind.plural) for name, kind in KINDS.items()}, SIGN: ("sign", "signs")}
_KIND_OF = {word: name for name, words in _NOUNS.items() for word in words}

# check -> sentence; of its fields only those that are named in it are set
SENTENCES = {
    "shown": "Verify that the image shows {a_kind}.",
    "count": "Verify that the image shows exactly {number} {counted}.",
    "colour": "Verify that every {kind} in the image is {colour}.",
    "relation": "Verify that the {kind} is {relation} the {other}.",
    "text": 'Verify that the sign reads "{text}".',
    "alone": "Verify that the image shows no object but {listed}.",
    "shape": "Verify that every {kind} has a complete and correct outline.",
    "whole": "Verify that no {kind} is torn, smeared or blotched.",
    "class": "Verify that no {kind} could be taken for an object of another kind.",
    "backdrop": "Verify that the background is one scene without foreign patches.",
    "inside": "Verify that every {kind} lies entirely inside the frame.",
    "size": "Verify that every {kind} is large enough to be recognised at a glance.",
    "contrast": "Verify that every {kind} stands out clearly from the background.",
    "global": GLOBAL,
}
_FIELDS = {
    "a_kind": "(?P<a_kind>.+)",
    "number": f"(?P<number>{'|'.join(NUMBERS.values())})",
    "counted": "(?P<counted>.+)",
    "kind": "(?P<kind>.+)",
    "colour": f"(?P<colour>{'|'.join(PALETTE)})",
    "relation": "(?P<relation>left of|right of|above|below)",
    "other": "(?P<other>.+)",
    "text": "(?P<text>.+)",
    "listed": "(?P<listed>.+)",
}


@dataclass(frozen=True)
class Rubric:
    """`kinds`: the classes it is about, one but for "alone"; `value`: a colour, a relation or a sign's text."""

    check: str
    kinds: tuple[str, ...] = ()
    count: int = 1
    value: str = ""


def sentence(rubric: Rubric) -> str:
    words = {"colour": rubric.value, "relation": rubric.value, "text": rubric.value}
    if rubric.kinds:
        one, many = _NOUNS[rubric.kinds[0]]
        words |= {"kind": one, "a_kind": with_article(one), "number": NUMBERS[rubric.count]}
        words |= {"counted": one if rubric.count == 1 else many, "other": _NOUNS[rubric.kinds[-1]][0]}
        words["listed"] = ", ".join(_NOUNS[kind][1] for kind in rubric.kinds)
    return SENTENCES[rubric.check].format(**words)


def _patterns() -> dict[str, re.Pattern[str]]:
    found = {}
    for check, text in SENTENCES.items():
        pattern = re.escape(text)
        for field, group in _FIELDS.items():
            pattern = pattern.replace(re.escape("{" + field + "}"), group)
        found[check] = re.compile(pattern)
    return found


_PATTERNS = _patterns()


def parse(text: str) -> Rubric:
    """The rubric of a sentence. Errors: ValueError for one that is not of this world."""
    for check, pattern in _PATTERNS.items():
        match = pattern.fullmatch(text)
        if match is None:
            continue
        found = match.groupdict()
        nouns = [found[name] for name in ("kind", "counted", "other") if name in found]
        nouns += [re.sub("^an? ", "", found["a_kind"])] if "a_kind" in found else found.get("listed", "").split(", ")
        kinds = [_KIND_OF.get(noun) for noun in nouns if noun]
        if None not in kinds:
            value = next((found[name] for name in ("colour", "relation", "text") if name in found), "")
            count = next((n for n, word in NUMBERS.items() if word == found.get("number")), 1)
            return Rubric(check, tuple(kind for kind in kinds if kind), count, value)
    raise ValueError(
        f"small_world_rubrics: {text!r}, expected a sentence that train.rewards.small_world_rubrics writes"
    )


def rubrics_of(scene: Scene) -> list[Rubric]:
    """The ten of a prompt: what it says first, then what keeps each object whole. Errors: ValueError for a sign alone, about which
    there is not enough to say."""
    wants = [replace(want, relation=None) for want in geneval.asked(scene, said=True).include]
    if scene.sign is not None:
        wants.append(geneval.Want(SIGN))
    kinds = tuple(dict.fromkeys(want.kind for want in wants))
    objects = [kind for kind in kinds if kind != SIGN]
    counts = {kind: sum(want.count for want in wants if want.kind == kind) for kind in kinds}
    found = [Rubric("shown", (kind,)) for kind in kinds]
    found += [Rubric("colour", (want.kind,), value=want.colour) for want in wants if want.colour is not None]
    for want in geneval.asked(scene).include:
        if want.relation is not None:
            found.append(Rubric("relation", (want.kind, wants[want.relation[1]].kind), value=want.relation[0]))
    if scene.sign is not None:
        found.append(Rubric("text", value=scene.sign.text))
    found += [Rubric("count", (kind,), count) for kind, count in counts.items()]
    found.append(Rubric("alone", kinds))
    found += [Rubric(check, (kind,)) for check in ("shape", "whole", "class") for kind in objects]
    found.append(Rubric("backdrop"))
    found += [Rubric(check, (kind,)) for check in ("inside", "size", "contrast") for kind in kinds]
    found = list(dict.fromkeys(found))
    if len(found) < SPECIFIC or not objects:
        raise ValueError(f"rubrics_of: {scene.caption!r} gives {len(found)} rubrics, expected {SPECIFIC}")
    return found[:SPECIFIC]
