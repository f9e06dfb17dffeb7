"""LongText-Bench: how much of a long text is written in the image, by a reader. Score: words read of all words asked for.

    python -m train evaluate longtext --prompts text_prompts.jsonl --model DIR --judge-url http://127.0.0.1:8000/v1
    python -m train evaluate longtext --prompts text_prompts_zh.jsonl --language zh --images DIR --judge-url ...   # 0_0.png ...
    python -m train evaluate longtext --prompts text_prompts.jsonl --images DIR --rapidocr

Source: X-Omni-Team/X-Omni, textbench, commit 2b8237b (Apache-2.0). The prompts are your own copy: JSON lines with prompt_id, prompt
and text, a list of strings. A target is all strings joined by a blank; words, of Chinese letters, match as multisets, and
all images count together, so that a long text weighs more than a short one. A target of which no letter is left has nothing to
divide by in the published code; here it is left out and counted. "mean of images" is the plain mean beside it. With --images a
prompt's images are all *.png whose name begins with its prompt_id before the first "_", as the published code takes them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...data.tables import json_lines
from . import command, judge_choice
from .chat_judges import Reader
from .drawing import Ask, Calls
from .judge_choice import reader_of
from .judging import Column, Figure, bootstrapped, commonest, mean
from .reading import read_all
from .text_match import longtext_clean, longtext_matches, without_hallucinations

LANGUAGES = ("en", "zh")
IMAGES, SEED, TOKENS = 4, 42, 1024


def prompts_of(path: Path) -> list[dict[str, Any]]:
    """Errors: ValueError naming file and line."""
    found = []
    for number, values in json_lines(path):
        try:
            values["prompt_id"] = int(values["prompt_id"])
            texts = values["text"]
            if not isinstance(values["prompt"], str) or not isinstance(texts, list):
                raise ValueError("prompt must be text, and text a list of texts")
            if not all(isinstance(t, str) for t in texts):
                raise ValueError("prompt must be text, and text a list of texts")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected prompt_id, prompt and text ({error!r})") from None
        found.append(values)
    if len({values["prompt_id"] for values in found}) < len(found) or not found:
        raise ValueError(f"{path}: expected prompts with different prompt_id")
    return found


def images_of(folder: Path) -> dict[int, list[str]]:
    """prompt_id -> its files in a folder, by the number that a name begins with: 12_0.png and 0012_0.png are both of 12."""
    found: dict[int, list[str]] = {}
    for path in sorted(folder.glob("*.png")):
        number = path.stem.split("_")[0]
        if re.fullmatch("[0-9]+", number):
            found.setdefault(int(number), []).append(path.name)
    return found


def pooled(rows: Sequence[tuple[int, int]]) -> float | None:
    """(read, asked) of each -> their sums' share."""
    asked = sum(of for _, of in rows)
    return sum(found for found, _ in rows) / asked if asked else None


class LongText:
    name = "longtext"

    def __init__(self, reader: Reader | None = None):
        """In place of what the options name (tests)."""
        self.reader = reader

    def asks(self, options: argparse.Namespace, language: str) -> list[Ask]:
        out, prompts = [], prompts_of(options.prompts)
        there = images_of(options.images) if options.images else {}  # in whatever number
        most = commonest((len(there.get(values["prompt_id"], ())) for values in prompts), IMAGES)
        for values in prompts:
            k = values["prompt_id"]
            files = tuple(there.get(k) or (f"{k}_{n}.png" for n in range(most)))
            seeds = tuple(range(SEED, SEED + len(files)))
            out.append(
                Ask(str(k), str(values.get("category", "all")), values["prompt"], values["prompt"], files, seeds)
            )
        return out

    def prepare(self, options: argparse.Namespace) -> None:
        self.reader = self.reader or reader_of(options, options.out)

    def arrange(self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path) -> None:
        """Nothing: the images are the layout."""

    def calls(self, options: argparse.Namespace, asks: Sequence[Ask], language: str) -> list[Calls]:
        number = sum(len(ask.files) for ask in asks)
        return [Calls("reader", number, None if options.rapidocr else (1_400, 200))]

    def score(self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path, name: str, language: str) -> Column:
        targets = {str(v["prompt_id"]): " ".join(v["text"]) for v in prompts_of(options.prompts)}
        self.prepare(options)
        reader = self.reader
        assert reader is not None, "prepared"
        column, empty, shares = Column(name, [reader.card], language=language), 0, list[float]()
        per_task: dict[str, list[tuple[int, int]]] = {}
        for ask, texts in read_all(reader, asks, folder, column, lambda _: TOKENS):
            target, images, sums = targets[ask.id], list[dict[str, Any]](), [0, 0]
            blank = not longtext_clean(target, language)
            empty += blank
            for file, text, why in texts:
                row: dict[str, Any] = {"file": file, "read": text, "not_judged": why}
                if text is not None and not blank:
                    read = without_hallucinations(text, last_alone=True)
                    found, of = longtext_matches(target, read, language)
                    row |= {"matched": found, "of": of}
                    shares.append(found / of)
                    sums = [sums[0] + found, sums[1] + of]
                images.append(row)
            per_task.setdefault(ask.task, []).append((sums[0], sums[1]))
            score = sums[0] / sums[1] if sums[1] else None
            row = {
                "id": ask.id,
                "task": ask.task,
                "prompt": ask.prompt,
                "drawn": ask.drawn,
                "target": target,
                "score": score,
            }
            column.rows.append({**row, "images": images})
        column.figures["total"] = bootstrapped([pair for own in per_task.values() for pair in own], pooled)
        if len(per_task) > 1:
            column.figures |= {task: bootstrapped(own, pooled) for task, own in per_task.items()}
        column.figures["mean of images"] = Figure(mean(shares), of=len(shares))
        if empty:
            column.figures["empty targets"] = Figure(float(empty), note="left out")
        return column

    def shown(self, options: argparse.Namespace, ask: Ask, folder: Path) -> np.ndarray | None:
        return command.first_image(ask, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_arguments(parser, LANGUAGES)
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="the benchmark's JSON lines, your own copy"
    )
    judge_choice.add_arguments(parser, soft=False)


def run(options: argparse.Namespace) -> int:
    return command.run(LongText(), options)
