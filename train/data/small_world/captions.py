"""From a scene to a caption: every caption is true, in one of four styles.

"geneval": the forms of the GenEval benchmark, "a photo of ...". "brief": 6-35 tokens, one of many paraphrases (both
`grammar`). "dense": 40-100 words (`dense`). "translated": brief, in Chinese, French, Japanese or Spanish (`translations`).

A class in its natural colour may go unnamed in colour ("a star" is yellow), a sign may be black on white unsaid; any other
colour, and any unusual size or place of a single object, is always said, so a prompt has one right answer. A photographed
place is always said, in English alone: a backdrop that goes unsaid is a drawn one.
"""

from __future__ import annotations

import random
import re

from . import dense, dense_phrases, grammar, phrases, place_phrases, translations
from .kinds import KINDS, PALETTE
from .photographs import PLACES as PHOTOGRAPHED
from .scene import Scene, is_unusual
from .translations import LANGUAGES

STYLES = ("geneval", "brief", "dense", "translated")


def can_say(scene: Scene, style: str) -> bool:
    """Whether a caption of that style gives the scene away without loss."""
    if style == "geneval":
        coloured = scene.sign is not None and (scene.sign.paper, scene.sign.ink) != ("white", "black")
        one = scene.task == "counting" and len(scene.things) == 1
        return scene.task != "row" and not (is_unusual(scene) or coloured or one)
    if style == "translated":
        return scene.task in translations.TASKS and not is_unusual(scene) and scene.background not in PHOTOGRAPHED
    return style in STYLES


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
        return grammar.geneval(scene, rng)
    if style == "dense":
        return dense.caption(scene, rng)
    if style == "translated":
        return translations.caption(scene, rng, language, 0.5)
    return grammar.brief(scene, rng)


def words(photographs: bool = False) -> set[str]:
    """Every word the grammar can say in lower case, and the pieces of its Chinese and Japanese; sign texts left out.

    What is said of photographed places is left out as well unless asked for.
    """
    out = set(phrases.NUMBERS.values()) | {"a", "an", "just", "is", "are", "them", "it", "of", "sign"} | set(PALETTE)
    texts = [name for kind in KINDS.values() for name in (kind.noun, kind.plural, *kind.also)]
    groups: list[tuple[str, ...]] = [phrases.SINGLE, phrases.PAIR, phrases.COUNT, phrases.ROW, phrases.PLACED]
    groups += [phrases.SIGN, phrases.SIGN_SAYS, phrases.SIGN_COLOURS]
    groups += [phrases.SIGN_ALONE, phrases.SIGN_ABOVE, phrases.SIGN_BELOW]
    for group in groups:
        texts += group
    for table in (phrases.BACKGROUNDS, phrases.RELATIONS, phrases.SIZES, phrases.PLACES):
        texts += [text for group in table.values() for text in group]
    places = place_phrases.texts() if photographs else []
    for text in [*texts, *dense_phrases.texts(), *places]:
        out |= {word.strip(',.;:"').lower() for word in re.sub(r"\{\w+\}", " ", text).split()}
    return {word for word in out | translations.words() if word}
