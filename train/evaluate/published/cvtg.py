"""CVTG-2K: words in two to five places of an image, by a reader, and CLIPScore. Score: words read of all words asked for.

    python -m train evaluate cvtg --prompts CVTG2K --model DIR --judge-url http://127.0.0.1:8000/v1      # CVTG2K/CVTG/2.json ...
    python -m train evaluate cvtg --prompts CVTG2K --images DIR --rapidocr                              # DIR/CVTG/2/0.png ...

Source: NJU-PCALab/TextCrafter; the scorer as later copies have it; the data set is your own copy. The words are those inside single
quotes of the prompt, lower-cased; a word that is read once serves any number of the same. An apostrophe opens a quote as well, as
published. 2R to 5R: both parts of the set together. total: all words together; the paper's Avg. of Lens is the plain mean of its
four areas, "mean of areas" here. NED: over words, 1 - edit distance / longest length, to the closest word read. CLIPScore:
2.5 max(0, cosine) of CLIP ViT-L/14 with "A photo depicts " before the prompt, over images.

The published reader is PaddleOCR; a server's model or RapidOCR in its place is a variant, and its card says so. VQAScore and the
aesthetic score of that code are not built: the paper does not report them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lens.formats.files import read_json

from . import command, judge_choice
from .chat_judges import Reader
from .drawing import Ask, Calls, read_image
from .judge_choice import reader_of
from .judging import Card, Column, Figure, averaged, bootstrapped, mean
from .models import CLIP, Clip, ClipScorer
from .reading import read_all
from .text_match import cvtg_words, quoted_words

PARTS, AREAS = ("CVTG", "CVTG-Style"), (2, 3, 4, 5)
SEED, TOKENS = 42, 256
PREFIX = "A photo depicts "

Row = tuple[int, int, float]  # words read, words asked for, the sum of their closeness


def words(rows: Sequence[Row]) -> float | None:
    asked = sum(of for _, of, _ in rows)
    return sum(found for found, _, _ in rows) / asked if asked else None


def closest(rows: Sequence[Row]) -> float | None:
    asked = sum(of for _, of, _ in rows)
    return sum(near for _, _, near in rows) / asked if asked else None


class Cvtg:
    name = "cvtg"

    def __init__(self, reader: Reader | None = None, clip: ClipScorer | None = None):
        """In place of what the options name (tests)."""
        self.reader, self.clip = reader, clip

    def asks(self, options: argparse.Namespace, language: str) -> list[Ask]:
        """Errors: ValueError naming a file that is not the data set's."""
        out = []
        for part in PARTS:
            for area in AREAS:
                path = options.prompts / part / f"{area}.json"
                try:
                    rows = [(str(item["index"]), item["prompt"]) for item in read_json(path)["data_list"]]
                except (KeyError, TypeError) as error:
                    raise ValueError(f"{path}: expected data_list of index and prompt ({error!r})") from None
                for index, prompt in rows:
                    file = f"{part}/{area}/{index}.png"
                    out.append(Ask(f"{part}/{area}/{index}", f"{area}R", prompt, prompt, (file,), (SEED,)))
        return out

    def prepare(self, options: argparse.Namespace) -> None:
        self.reader = self.reader or reader_of(options, options.out)
        if self.clip is None and not options.no_clip:
            self.clip = Clip(options.clip, options.device)

    def arrange(self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path) -> None:
        """Nothing: the images are the layout."""

    def calls(self, options: argparse.Namespace, asks: Sequence[Ask], language: str) -> list[Calls]:
        number = sum(len(ask.files) for ask in asks)
        clip = [] if options.no_clip else [Calls("CLIP", number)]
        return [Calls("reader", number, None if options.rapidocr else (1_400, 40)), *clip]

    def score(self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path, name: str, language: str) -> Column:
        self.prepare(options)
        reader = self.reader
        assert reader is not None, "prepared"
        card = reader.card
        if not card.differs:
            card = Card(card.judge, card.revision, card.dtype, card.device, "the published reader is PaddleOCR")
        column = Column(name, [card, *([self.clip.card] if self.clip else [])], language=language)
        clips = column.count("CLIPScore", sum(len(ask.files) for ask in asks)) if self.clip else None
        areas: dict[str, list[Row]] = {}
        similar: list[float] = []
        for ask, texts in read_all(reader, asks, folder, column, lambda _: TOKENS):
            asked, images, score = quoted_words(ask.prompt), list[dict[str, Any]](), None
            for file, text, why in texts:
                row: dict[str, Any] = {"file": file, "read": text, "not_judged": why}
                if text is not None:
                    found, near = cvtg_words(asked, text.splitlines())
                    areas.setdefault(ask.task, []).append((found, len(asked), sum(near)))
                    score = found / len(asked) if asked else None
                    row |= {"matched": found, "of": len(asked)}
                if self.clip is not None and clips is not None and clips.goes_on():
                    clips.judged += 1
                    try:
                        image = read_image(folder / file)
                        if image is None:
                            raise ValueError("no such image")
                        row["clip"] = 2.5 * max(0.0, self.clip.similarity(image, PREFIX + ask.prompt))
                        similar.append(row["clip"])
                    except Exception as error:  # a missing judgement, whatever it is
                        clips.missing += 1
                        row["clip_not_judged"] = str(error)
                images.append(row)
            row = {
                "id": ask.id,
                "task": ask.task,
                "prompt": ask.prompt,
                "drawn": ask.drawn,
                "words": asked,
                "score": score,
            }
            column.rows.append({**row, "images": images})
        column.figures |= {area: bootstrapped(rows, words) for area, rows in sorted(areas.items())}
        every = [row for rows in areas.values() for row in rows]
        plain = [column.figures.get(f"{area}R", Figure(None, note="not all four areas")) for area in AREAS]
        if not column.counts["text"].complete:
            plain = [Figure(None, note=f"no mean: text: {column.counts['text']}")]
        column.figures["total"] = bootstrapped(every, words)
        column.figures["mean of areas"] = averaged(plain)
        column.figures["NED"] = bootstrapped(every, closest)
        column.figures["CLIPScore"] = (
            bootstrapped(similar, mean) if self.clip else Figure(None, note="not measured: --no-clip")
        )
        return column

    def shown(self, options: argparse.Namespace, ask: Ask, folder: Path) -> np.ndarray | None:
        return command.first_image(ask, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_arguments(parser, ("en",))
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="DIR", help="the data set's folder, your own copy"
    )
    parser.add_argument("--clip", default=CLIP, metavar="SOURCE", help=f"hub id or folder (default: {CLIP})")
    parser.add_argument("--no-clip", action="store_true", help="leave CLIPScore out")
    judge_choice.add_arguments(parser, soft=False)


def run(options: argparse.Namespace) -> int:
    return command.run(Cvtg(), options)
