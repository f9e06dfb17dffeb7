"""GenEval in five languages: each prompt said anew from its metadata by a committed table of words, judged by the same metadata.

English is the benchmark's own wording. Chinese counts with measure words, Japanese with counters; French and Spanish adjectives
follow their noun in its gender. The table, assets/geneval_languages.json, is pinned by its SHA-256: a changed word is another
benchmark, and scores of before do not compare.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from .geneval_prompts import Entry

LANGUAGES = ("en", "zh", "fr", "ja", "es")
TABLE = Path(__file__).parents[1] / "assets" / "geneval_languages.json"
SHA256 = "582b4b810191a6b55785b993ec361d909fbd9b7299abb2831dfc31b049c3802c"


@functools.cache
def table() -> dict[str, Any]:
    """Errors: ValueError where the file is not the pinned one."""
    content = TABLE.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise ValueError(f"{TABLE}: SHA-256 {found}, expected {SHA256}: its words were changed")
    return json.loads(content)


def _chinese(want: Entry) -> str:
    """ "一只红色的狗": number, measure word, colour, noun."""
    words = table()
    noun, measure = words["names"][want["class"]]["zh"]
    colour = words["colours"][want["color"]]["zh"] if "color" in want else ""
    return f"{words['numbers']['zh'][str(want['count'])]}{measure}{colour}{noun}"


def _japanese(want: Entry) -> str:
    """ "赤い犬", or from two on "三匹の犬"."""
    words = table()
    noun, counter, *_ = words["names"][want["class"]]["ja"]
    colour = words["colours"][want["color"]]["ja"] if "color" in want else ""
    number = f"{words['numbers']['ja'][str(want['count'])]}{counter}の" if want["count"] > 1 else ""
    return f"{number}{colour}{noun}"


def _romance(want: Entry, language: str) -> str:
    """ "un chien rouge", or from two on "trois chiens"."""
    words = table()
    noun, gender, several = words["names"][want["class"]][language]
    if want["count"] > 1:
        return f"{words['numbers'][language][str(want['count'])]} {several}"
    article = {"fr": {"m": "un", "f": "une"}, "es": {"m": "un", "f": "una"}}[language][gender]
    colour = f" {words['colours'][want['color']][language]['mf'.index(gender)]}" if "color" in want else ""
    return f"{article} {noun}{colour}"


def of_french(phrase: str) -> str:
    """ "d'un chien", "de deux chiens"."""
    return f"d'{phrase}" if phrase[0] in "aeiouéèêœ" else f"de {phrase}"


def prompt(entry: Entry, language: str) -> str:
    """An entry in one of LANGUAGES. Errors: ValueError for another language."""
    if language not in LANGUAGES:
        raise ValueError(f"geneval --language {language!r}: expected one of {', '.join(LANGUAGES)}")
    if language == "en":
        return entry["prompt"]
    wants = entry["include"]
    relation = wants[1]["position"][0] if entry["tag"] == "position" else None
    side = table()["relations"][relation][language] if relation else ""
    if language == "zh":
        said = [_chinese(want) for want in wants]
        shown = f"{said[1]}在{said[0]}的{side}" if relation else f"有{'和'.join(said)}"
        return f"一张照片，画面中{shown}"
    if language == "ja":
        said = [_japanese(want) for want in wants]
        if not relation:
            return f"{'と'.join(said)}の写真"
        alive = len(table()["names"][wants[1]["class"]]["ja"]) > 2
        return f"{said[0]}の{side}に{'いる' if alive else 'ある'}{said[1]}の写真"
    said = [_romance(want, language) for want in wants]
    if language == "fr":
        if relation:
            return f"une photo {of_french(said[1])} {side} {of_french(said[0])}"
        return f"une photo {' et '.join(of_french(phrase) for phrase in said)}"
    return f"una foto de {f'{said[1]} {side} de {said[0]}' if relation else ' y '.join(said)}"
