"""Texts read from images against texts asked for, exactly as the benchmarks' own code compares them, its oddities included.

All keep the same letters: CJK U+4E00 to U+9FA5, ASCII letters and digits, blanks, French accents. No accent of another language,
no punctuation survives. OneIG decides by each string itself whether it is Chinese; LongText by the file it is of.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence

from ..ocr import edit_distance

_LETTERS = "\u4e00-\u9fa5a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ"
_FOREIGN = re.compile(rf"[^{_LETTERS}\s]")
_BLANK = re.compile(r"\s+")
_HAN = re.compile("[\u4e00-\u9fff]")
HALLUCINATED = ("addCriterion", "No text recognized.")  # what Qwen2.5-VL writes where there is nothing to read


def without_hallucinations(text: str, last_alone: bool = False) -> str:
    """A reader's answer without HALLUCINATED. last_alone: as LongText's code does, which removes the last of them only.

    The judge is told to answer without a full stop where there is no text, and the word removed has one: "No text
    recognized" stays, as published.
    """
    for word in HALLUCINATED[-1:] if last_alone else HALLUCINATED:
        text = text.replace(word, "")
    return text


# ------------------------------------------------------------------------------------------------ OneIG


def oneig_clean(text: str) -> str:
    """Foreign letters gone, blanks collapsed; of a string with any Han letter no blank stays at all.

    A target that stands in the file as Python writes a list ("['Grand', 'Opening']") loses its brackets and quotes here.
    """
    kept = _FOREIGN.sub("", text)
    return _BLANK.sub("" if _HAN.search(kept) else " ", kept).strip()


def oneig_matches(asked: str, read: str) -> tuple[int, int]:
    """Of cleaned texts: (words or letters of `asked` that were read, as multisets, all of `asked`). The asked text decides."""
    if _HAN.search(asked):
        want, have = Counter(asked), Counter(read)
    else:
        want, have = Counter(asked.split()), Counter(read.split())
    return (want & have).total(), want.total()


Match = tuple[int, int, int]  # edit distance, words or letters read, all asked for


def oneig_match(asked: str, read: str) -> Match:
    """Of one image's raw texts."""
    pair = oneig_clean(asked), oneig_clean(read)
    return edit_distance(*pair), *oneig_matches(*pair)


def oneig_text(matches: Sequence[Match], limit: int) -> dict[str, float] | None:
    """Of every image -> ED, CR, WAC and the score 1 - min(limit, ED) (1 - CR) (1 - WAC) / limit; None where nothing is asked for.

    ED: mean edit distance; CR: share of images without one; WAC: matches over all asked for. limit: 100, for Chinese 50.
    Case counts.
    """
    words = sum(of for _, _, of in matches)
    if not words:
        return None
    ed, cr = sum(d for d, _, _ in matches) / len(matches), sum(d == 0 for d, _, _ in matches) / len(matches)
    wac = sum(found for _, found, _ in matches) / words
    return {"ED": ed, "CR": cr, "WAC": wac, "score": 1 - min(limit, ed) * (1 - cr) * (1 - wac) / limit}


# ------------------------------------------------------------------------------------------------ LongText


def longtext_clean(text: str, language: str) -> str:
    """English: foreign letters gone, blanks collapsed, lower case. Chinese: no blanks, case kept."""
    kept = _FOREIGN.sub("", text)
    return _BLANK.sub(" ", kept).strip().lower() if language == "en" else _BLANK.sub("", kept)


def longtext_matches(asked: str, read: str, language: str) -> tuple[int, int]:
    """(words, of Chinese letters, of the asked text that were read, as multisets; all of them), of raw texts."""
    want, have = (longtext_clean(text, language) for text in (asked, read))
    pair = (Counter(want.split()), Counter(have.split())) if language == "en" else (Counter(want), Counter(have))
    return (pair[0] & pair[1]).total(), pair[0].total()


# ------------------------------------------------------------------------------------------------ CVTG


def quoted_words(prompt: str) -> list[str]:
    """Lower-cased words inside single quotes. An apostrophe opens a quote as well: as published."""
    return [word for part in re.findall(r"'(.*?)'", prompt) for word in part.lower().split()]


def closeness(word: str, read: Sequence[str]) -> float:
    """1 - edit distance / (longest length + 1e-5) to the read word that difflib calls closest."""
    best = difflib.get_close_matches(word, read, n=1, cutoff=0)
    if not best:
        return 0.0
    return 1 - edit_distance(word, best[0]) / (max(len(word), len(best[0])) + 1e-5)


def cvtg_words(asked: Sequence[str], lines: Sequence[str]) -> tuple[int, list[float]]:
    """(how many asked words are among those read, the closeness of each). A word that is read once serves any number."""
    read = [word for line in lines for word in line.lower().split()] or [""]
    return sum(word in read for word in asked), [closeness(word, read) for word in asked]
