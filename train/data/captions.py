"""Captions of images by a vision-language model: what it is told, what its answer must be, and the words counted.

A caption is dense (about 109 words in the paper), brief, or both; beside it stand the visible text in its own language, one scenario
and one category. What cannot be told is "unknown", which stays so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lens.chat_client import BadAnswer, Chat, Reply

from .taxonomy import CATEGORIES

VERSION = "v1"
CAPTIONER = Path(__file__).parent / "assets" / f"captioner.{VERSION}.md"
MODEL = "gpt-4.1-mini"
DETAILS = {"dense": ("dense",), "brief": ("brief",), "both": ("dense", "brief")}
UNKNOWN = "unknown"
SCENARIOS = ("portrait", "landscape", "visual content", "artistic style", "text-rich", "other", UNKNOWN)
PAPER_WORDS = 109  # the mean of the paper's dense captions
# prose in the place of a caption
_DECLINED = re.compile(
    r"(i['’]?m sorry|i am sorry|sorry, |i can(no|['’])t |i am unable|i['’]m unable|as an ai\b)", re.IGNORECASE
)


@dataclass(frozen=True)
class Caption:
    """dense, brief: "" where not asked for; text: (language, words) of what can be read in the image; refused: why there is
    nothing else, else ""."""

    dense: str = ""
    brief: str = ""
    text: tuple[tuple[str, str], ...] = ()
    scenario: str = UNKNOWN
    category: str = UNKNOWN
    refused: str = ""


def instructions(detail: str) -> str:
    """The system prompt of a detail: the file, its lines marked for another detail left out. ValueError for an unknown one."""
    if detail not in DETAILS:
        raise ValueError(f"caption: detail must be one of {', '.join(DETAILS)}, got {detail!r}")
    lines = []
    for line in CAPTIONER.read_text(encoding="utf-8").splitlines():
        match = re.match(r"\[(dense|brief)\] ", line)
        if match is None or match[1] in DETAILS[detail]:
            lines.append(line[match.end() :] if match else line)
    return "\n".join(lines) + "\n"


def chat_of(image: np.ndarray, detail: str) -> Chat:
    """The call about one image, uint8 [H, W, 3]."""
    return Chat(
        user="Describe this image.",
        system=instructions(detail),
        images=(image,),
        schema=_schema(DETAILS[detail]),
        max_tokens=1536,
    )


def read_caption(reply: Reply, detail: str) -> Caption:
    """An answer, a refusal being one too: asking again would not change it. Errors: BadAnswer for any other form."""
    if reply.refusal or reply.finish == "content_filter":
        return Caption(refused=" ".join((reply.refusal or reply.finish).split()))
    try:
        values = json.loads(reply.text)
        texts = {name: " ".join(_words(values[name]).split()) for name in DETAILS[detail]}
        text = tuple((_words(t["language"]), _words(t["text"])) for t in values["visible_text"])
        scenario, category = values["scenario"], values["category"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if _DECLINED.match(reply.text.strip()):
            return Caption(refused=" ".join(reply.text.split())[:200])
        cut = ", cut off at its token limit" if reply.finish == "length" else ""
        raise BadAnswer(f"expected a caption as JSON{cut} ({error!r}): {reply.text[:120]!r}") from None
    for name, value in texts.items():
        if _DECLINED.match(value):
            return Caption(refused=value[:200])
        if not value:
            raise BadAnswer(f"{name}: expected text, got none")
    for name, value, allowed in (("scenario", scenario, SCENARIOS), ("category", category, (*CATEGORIES, UNKNOWN))):
        if value not in allowed:
            raise BadAnswer(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return Caption(**texts, text=text, scenario=scenario, category=category)


def word_count(text: str) -> int:
    """Words; of scripts that write none apart (Han, kana, Thai and its neighbours), letters."""
    apart = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
    return len(apart.findall(text)) + len(re.findall(r"\w[\w'’-]*", apart.sub(" ", text)))


def statistics(counts: Sequence[int]) -> dict[str, float]:
    """mean, deviation, and percentiles of word counts; {} of none."""
    if not counts:
        return {}
    values = np.asarray(counts, dtype=np.float64)
    found = {f"p{p}": float(np.percentile(values, p)) for p in (5, 25, 50, 75, 95)}
    return {"captions": len(counts), "mean": float(values.mean()), "sd": float(values.std()), **found}


def histogram(counts: Sequence[int], width: int = 10, shown: Sequence[int] = ()) -> dict[str, float]:
    """Counts by bins of `width` words, from the first that has any to the last; those of `shown`, too, where they have none."""
    if not counts:
        return {}
    ends = [*counts, *shown]
    bins = range(min(ends) // width, max(ends) // width + 1)
    return {f"{b * width} to {b * width + width - 1}": sum(c // width == b for c in counts) for b in bins}


def _words(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _schema(names: Sequence[str]) -> dict[str, Any]:
    text = {"type": "string"}

    def record(parts: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}

    seen = {"type": "array", "items": record({"text": text, "language": text})}
    chosen = {"scenario": SCENARIOS, "category": (*CATEGORIES, UNKNOWN)}
    enums = {name: {"type": "string", "enum": list(allowed)} for name, allowed in chosen.items()}
    return record({**dict.fromkeys(names, text), "visible_text": seen, **enums})
