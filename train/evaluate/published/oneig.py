"""OneIG-Bench, English and Chinese: alignment, text, reasoning, style and diversity, each by its published arithmetic.

    python -m train evaluate oneig --prompts OneIG-Benchmark --model DIR --judge-url http://127.0.0.1:8000/v1
    python -m train evaluate oneig --prompts OneIG-Benchmark --language zh --images DIR --name lens --judge-url ...
    python -m train evaluate oneig ... --judged elsewhere.jsonl

Source: OneIG-Bench/OneIG-Benchmark, commit 41b4983; it has no licence file, so prompts, questions and targets are your own copy of
the repository. Images: CATEGORY/NAME/ID.webp, a grid of two by two (--grid); cells that are black all over are none. Judges
see the cells as JPEG, as there.

alignment   yes/no questions to a vision model, only "Yes" is yes. A question counts as no where any of its parents was
            answered no; parents of parents do not count. Mean over questions, images, prompts.
text        1 - min(M, ED) (1 - CR) (1 - WAC) / M over all images, see text_match.oneig_text; M = 100, Chinese 50
reasoning   cosine of image and reference answer by LLM2CLIP, whose text half is code inside its folder: no loader here, values
            come by --judged, a line an id and dimension
style       of the anime prompts that name one: mean over CSD and OneIG's own encoder (--csd FILE --style-encoder DIR) of
            max(0, best cosine) to the reference vectors in the repository, over images, over prompts; or by --judged
diversity   mean distance of a prompt's images by DreamSim (--dreamsim, needs the package dreamsim), or by --judged
total       the plain mean of the five, as published tables have it; the repository itself prints no total

--judged has a line a prompt and dimension, one value an image: {"dimension": "diversity", "category": "anime", "id": "012", "values":
[0.4]}. Ids repeat in every category; reasoning and style have one category, which may be left out. A prompt without values is a
missing judgement, and so is each of the --grid images of a prompt that has none.

With --soft, "alignment, soft" is the hard rule's continuous form: each question's probability of Yes times its parents'.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lens.formats.files import read_json

from ...data.tables import json_lines
from . import chat_judges, command, judge_choice
from .chat_judges import Answerer, ChatJudge, Reader, as_jpeg
from .drawing import Ask, Calls, read_image, write_image
from .judge_choice import judge_of, reader_of
from .judging import Card, Column, Figure, Progress, averaged, bootstrapped, mean
from .qwen_judge import QwenJudge
from .reading import read_all
from .styles import Csd, OneigStyle, Styles
from .text_match import Match, oneig_match, oneig_text, without_hallucinations

LANGUAGES = ("en", "zh")
CATEGORIES = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}
STYLED = "anime"  # the category whose prompts name styles
ALIGNED = ("anime", "human", "object", "multilingualism")  # categories with questions; the last is Chinese alone
DIMENSIONS = ("alignment", "text", "reasoning", "style", "diversity")
ONE_CATEGORY = {"reasoning": "reasoning", "style": STYLED}  # dimensions whose prompts are all of one category
ELSEWHERE = {
    "reasoning": "not measured: LLM2CLIP's values by --judged",
    "style": "not measured: --csd and --style-encoder, or values by --judged",
    "diversity": "not measured: --dreamsim, or values by --judged",
}
LIMITS = {"en": 100, "zh": 50}  # of the edit distance
SEED = 42
LONG, TOKENS = 60, (128, 256)  # words of a target from above which the reader may write twice as many tokens


@dataclass(frozen=True)
class Questions:
    """Of one prompt: number -> question, number -> numbers of its parents (0: none)."""

    texts: Mapping[int, str]
    parents: Mapping[int, tuple[int, ...]]


class Distance(Protocol):
    card: Card

    def distance(self, one: np.ndarray, two: np.ndarray) -> float: ...


class DreamSim:
    """`Distance` by the ensemble of the package dreamsim, which fetches its weights itself."""

    def __init__(self, device: str):
        """Errors: ImportError naming the package."""
        import torch

        try:
            from dreamsim import dreamsim
        except ImportError:
            raise ImportError("--dreamsim: the package dreamsim is not installed; pip install dreamsim") from None
        self.torch, self.device = torch, device
        self.model, self.preprocess = dreamsim(pretrained=True, device=device)
        self.card = Card("DreamSim ensemble", "the package's own", "float32", device)

    def distance(self, one: np.ndarray, two: np.ndarray) -> float:
        from PIL import Image

        pair = [self.preprocess(Image.fromarray(image)).to(self.device) for image in (one, two)]
        with self.torch.no_grad():
            return float(self.model(*pair))


# ------------------------------------------------------------------------------------------------ the user's copy


def rows_of(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows. Errors: FileNotFoundError."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def prompts_of(folder: Path, language: str) -> list[tuple[str, str, str]]:
    """(category, id, prompt). Errors: ValueError naming the file and what it lacks."""
    path, column = (
        (folder / "OneIG-Bench.csv", "prompt_en") if language == "en" else (folder / "OneIG-Bench-ZH.csv", "prompt_cn")
    )
    out = []
    for row in rows_of(path):
        if not {"category", "id", column} <= set(row) or row["category"] not in CATEGORIES:
            raise ValueError(f"{path}: expected category (one of {', '.join(CATEGORIES)}), id and {column}, got {row}")
        out.append((CATEGORIES[row["category"]], row["id"], row[column]))
    return out


def questions_of(folder: Path, category: str, language: str) -> dict[str, Questions]:
    """Id -> its questions. Errors: FileNotFoundError, ValueError."""
    path = folder / "scripts" / "alignment" / "Q_D" / f"{category}{'' if language == 'en' else '_zh'}.json"

    def numbered(values: Any) -> dict[int, Any]:
        return {int(k): v for k, v in (json.loads(values) if isinstance(values, str) else values).items()}

    out = {}
    for key, item in read_json(path).items():
        try:
            texts, parents = numbered(item["question"]), numbered(item["dependency"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {key}: expected question and dependency ({error!r})") from None
        if not texts or set(texts) != set(range(1, len(texts) + 1)):
            raise ValueError(f"{path}: {key}: questions must be numbered from 1 on, got {sorted(texts)}")
        out[key] = Questions(texts, {k: tuple(v) for k, v in parents.items()})
    return out


def targets_of(folder: Path, language: str) -> dict[str, str]:
    path = folder / "scripts" / "text" / f"text_content{'' if language == 'en' else '_zh'}.csv"
    return {row["id"]: row["text_content"] for row in rows_of(path)}


def styles_of(folder: Path) -> dict[str, str]:
    """Id -> style of the prompts that name one, as the reference vectors are called. Errors: FileNotFoundError, ValueError."""
    path = folder / "scripts" / "style" / "style.csv"
    rows = rows_of(path)
    if any(not {"id", "class"} <= set(row) for row in rows):
        raise ValueError(f"{path}: expected columns id and class, got {', '.join(rows[0])}")
    return {row["id"]: row["class"].lower().replace(" ", "_") for row in rows if row["class"]}


def judgeable(options: argparse.Namespace, language: str) -> dict[str, list[str]]:
    """Dimension of ELSEWHERE that is asked for -> CATEGORY/ID of its prompts, whatever --limit. Errors: as the user's files."""
    every = [(category, key) for category, key, _ in prompts_of(options.prompts, language)]
    own = {"reasoning": [pair for pair in every if pair[0] == ONE_CATEGORY["reasoning"]], "diversity": every}
    if "style" in options.dimensions:
        known = styles_of(options.prompts)
        own["style"] = [pair for pair in every if pair[0] == STYLED and pair[1] in known]
    return {d: ["/".join(pair) for pair in own[d]] for d in ELSEWHERE if d in options.dimensions}


def judged_elsewhere(path: Path, known: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[float]]]:
    """Dimension -> CATEGORY/ID -> one value an image; known: as `judgeable`. Errors: ValueError naming file and line."""
    out: dict[str, dict[str, list[float]]] = {}
    for number, values in json_lines(path):
        try:
            dimension, given = values["dimension"], values["values"]
            if dimension not in ELSEWHERE:
                raise ValueError(f"dimension must be one of {', '.join(ELSEWHERE)}")
            if dimension not in known:  # not asked for
                continue
            category = values.get("category", ONE_CATEGORY.get(dimension))
            if category is None:
                raise ValueError(f"{dimension} needs a category, one of {', '.join(CATEGORIES.values())}")
            key = f"{CATEGORIES.get(category, category)}/{values['id']}"
            if key not in known[dimension]:
                raise ValueError(f"{dimension} has no prompt {key}")
            if key in out.setdefault(dimension, {}):
                raise ValueError(f"{dimension} of {key} a second time")
            numbers = isinstance(given, list) and all(type(v) in (int, float) and math.isfinite(v) for v in given)
            if not numbers:
                raise ValueError(f"values must be a list of finite numbers, got {given!r}")
            out[dimension][key] = [float(v) for v in given]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{path}, line {number}: expected dimension, category, id and values ({error!r})"
            ) from None
    return out


# ------------------------------------------------------------------------------------------------ grids and arithmetic


def split(grid: np.ndarray, columns: int, rows: int) -> list[np.ndarray]:
    """Cells of a grid, row by row, those left out that are black all over; what does not divide is cut at the end."""
    height, width = grid.shape[0] // rows, grid.shape[1] // columns
    cells = [
        grid[r * height : (r + 1) * height, c * width : (c + 1) * width] for r in range(rows) for c in range(columns)
    ]
    return [cell for cell in cells if cell.any()]


def joined(images: Sequence[np.ndarray | None], columns: int) -> np.ndarray:
    """A grid of images of one size; black where there is none. Errors: ValueError without any."""
    shape = next((image.shape for image in images if image is not None), None)
    if shape is None:
        raise ValueError("joined: no image")
    cells = [np.zeros(shape, np.uint8) if image is None else image for image in images]
    return np.concatenate([np.concatenate(cells[k : k + columns], 1) for k in range(0, len(cells), columns)])


def aligned(yes: Mapping[int, float], questions: Questions) -> float:
    """The share of questions answered yes, none below a parent that was answered no: of one image.

    yes: number -> 1 or 0. Parents are looked up as they were answered, not as they count.
    """
    ruled_out = {k for k, parents in questions.parents.items() if any(p != 0 and yes[p] == 0 for p in parents)}
    return sum(0.0 if k in ruled_out else yes[k] for k in questions.texts) / len(questions.texts)


def softly_aligned(chances: Mapping[int, float], questions: Questions) -> float:
    """The same with probabilities: each question's times its parents'."""
    total = 0.0
    for k in questions.texts:
        chance = chances[k]
        for parent in questions.parents.get(k, ()):
            chance *= chances[parent] if parent else 1.0
        total += chance
    return total / len(questions.texts)


# ------------------------------------------------------------------------------------------------ the benchmark


class OneIG:
    name = "oneig"

    def __init__(
        self,
        answerer: Answerer | None = None,
        reader: Reader | None = None,
        distance: Distance | None = None,
        styles: Styles | None = None,
    ):
        """In place of what the options name (tests)."""
        self.answerer, self.reader, self.distance, self.styles = answerer, reader, distance, styles

    def asks(self, options: argparse.Namespace, language: str) -> list[Ask]:
        number = options.grid**2
        seeds = tuple(range(SEED, SEED + number))
        out = []
        for category, key, prompt in prompts_of(options.prompts, language):
            files = tuple(f"single/{category}/{key}_{k}.png" for k in range(number))
            out.append(Ask(f"{category}/{key}", category, prompt, prompt, files, seeds))
        return out

    def prepare(self, options: argparse.Namespace) -> None:
        if options.judged:
            if len(options.language) > 1 or options.reasoner != "none":
                raise ValueError("--judged has the values of one column: give one --language, and no --reasoner")
            judged_elsewhere(options.judged, judgeable(options, options.language[0]))
        if "alignment" in options.dimensions:
            self.answerer = self.answerer or judge_of(options, options.out)
        if "text" in options.dimensions:
            shared = (
                self.answerer if isinstance(self.answerer, ChatJudge | QwenJudge) and not options.rapidocr else None
            )
            alone = "alignment" not in options.dimensions
            self.reader = self.reader or shared or reader_of(options, options.out, alone)
        if "diversity" in options.dimensions and options.dreamsim:
            self.distance = self.distance or DreamSim(options.device)
        if "style" in options.dimensions and (options.csd or options.style_encoder):
            if not (options.csd and options.style_encoder):
                raise ValueError("style needs both: --csd FILE and --style-encoder DIR")
            known = options.prompts / "scripts" / "style"
            self.styles = self.styles or Styles(
                [
                    (Csd(options.csd, options.device), known / "CSD_embed.pt"),
                    (OneigStyle(options.style_encoder, options.device), known / "SE_embed.pt"),
                ]
            )

    def grid_path(self, options: argparse.Namespace, ask: Ask, folder: Path) -> Path:
        """CATEGORY/NAME/ID*: the one file that begins with the id, as the published code looks for it."""
        category, _, key = ask.id.partition("/")
        name = options.name if options.images and options.name else self.column_folder(options, folder, category)
        there = sorted((folder / category / name).glob(f"{key}*"))
        return there[0] if len(there) == 1 else folder / category / name / f"{key}.webp"

    def column_folder(self, options: argparse.Namespace, folder: Path, category: str) -> str:
        """NAME where nobody says it: "lens" for our own images, else the only folder there is."""
        if options.images is None:
            return "lens"
        found = sorted(p.name for p in (folder / category).glob("*") if p.is_dir())
        if len(found) > 1:
            raise ValueError(f"{folder / category}: images of {', '.join(found)}: say which by --name")
        return found[0] if found else "lens"

    def arrange(self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path) -> None:
        for ask in asks:
            images = [read_image(folder / file) for file in ask.files]
            path = self.grid_path(options, ask, folder)
            if any(image is not None for image in images) and not path.is_file():
                write_image(joined(images, options.grid), path)

    def cells(self, options: argparse.Namespace, ask: Ask, folder: Path) -> list[np.ndarray]:
        """A prompt's images as the judges see them; none where the file is missing or no image."""
        try:
            grid = read_image(self.grid_path(options, ask, folder))
        except ValueError:
            return []
        return [] if grid is None else [as_jpeg(cell) for cell in split(grid, options.grid, options.grid)]

    def calls(self, options: argparse.Namespace, asks: Sequence[Ask], language: str) -> list[Calls]:
        images, questions = options.grid**2, 0
        for category in ALIGNED:
            own = {a.id.partition("/")[2] for a in asks if a.task == category}
            if own:
                found = questions_of(options.prompts, category, language)
                questions += sum(len(q.texts) for key, q in found.items() if key in own)
        texts = sum(a.task == "text" for a in asks)
        read = (
            [Calls("reader", texts * images, None if options.rapidocr else (1_400, 60))]
            if "text" in options.dimensions
            else []
        )
        ask = (
            [Calls("questions", questions * images, chat_judges.QUESTION_TOKENS)]
            if "alignment" in options.dimensions
            else []
        )
        return ask + read

    def score(self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path, name: str, language: str) -> Column:
        self.prepare(options)
        column = Column(name, [], language=language)
        rows: dict[str, dict[str, Any]] = {
            a.id: {"id": a.id, "task": a.task, "prompt": a.prompt, "drawn": a.drawn, "score": None, "images": []}
            for a in asks
        }
        known = judgeable(options, language) if options.judged else {}
        elsewhere = judged_elsewhere(options.judged, known) if options.judged else {}
        if "alignment" in options.dimensions:
            self._alignment(options, asks, folder, language, column, rows)
        if "text" in options.dimensions:
            self._text(options, asks, folder, language, column, rows)
        for dimension, why in ELSEWHERE.items():
            if dimension not in options.dimensions:
                continue
            if dimension in elsewhere:
                own = [a.id for a in asks if a.id in known[dimension]]
                values = [mean(elsewhere[dimension].get(key, [])) for key in own]
                found, count = [v for v in values if v is not None], column.count(dimension, len(own))
                count.judged, count.missing = len(own), len(own) - len(found)
                column.figures[dimension] = bootstrapped(found, mean)
                column.cards.append(
                    Card(f"{dimension}: {options.judged.name}", "given", "given", "given", "judged elsewhere")
                )
            elif dimension == "diversity" and options.dreamsim:
                self._diversity(options, asks, folder, column, rows)
            elif dimension == "style" and self.styles is not None:
                self._style(options, asks, folder, column, rows)
            else:
                column.figures[dimension] = Figure(None, note=why)
        order = {d: column.figures.get(d, Figure(None, note="not asked for")) for d in DIMENSIONS}
        column.figures = {**order, **column.figures, "total": averaged(list(order.values()))}
        column.rows = list(rows.values())
        return column

    def _alignment(
        self,
        options: argparse.Namespace,
        asks: Sequence[Ask],
        folder: Path,
        language: str,
        column: Column,
        rows: dict[str, Any],
    ) -> None:
        judge = self.answerer
        assert judge is not None, "prepared"
        column.cards.append(judge.card)
        known = {
            c: questions_of(options.prompts, c, language) for c in dict.fromkeys(a.task for a in asks) if c in ALIGNED
        }
        hard, soft, per_category = [], [], dict[str, list[float]]()
        asked = [(a, known[a.task].get(a.id.partition("/")[2])) for a in asks if a.task in known]
        pairs = [(ask, questions) for ask, questions in asked if questions is not None]
        progress, number = Progress("alignment", len(pairs)), options.grid**2
        count = column.count("alignment", number * sum(len(questions.texts) for _, questions in pairs))
        for ask, questions in pairs:
            if not count.goes_on():
                break
            images, chances = [], []
            numbers = list(questions.texts)
            cells = self.cells(options, ask, folder)
            if not cells:  # no image of the prompt counts as judged in any of its questions
                count.judged += number * len(numbers)
                count.missing += number * len(numbers)
            for image in cells:
                said = judge.answer(image, [questions.texts[k] for k in numbers])
                count.judged += len(said)
                lost = [str(s) for s in said if isinstance(s, Exception)]
                count.missing += len(lost)
                row: dict[str, Any] = {"not_judged": lost}
                answers = {k: s for k, s in zip(numbers, said) if not isinstance(s, Exception)}
                if not lost:  # an image with a question missing has no score: a parent may be among them
                    images.append(aligned({k: float(s.yes) for k, s in answers.items()}, questions))
                    row |= {"yes": {k: s.yes for k, s in answers.items()}, "score": images[-1]}
                    told = {k: s.soft for k, s in answers.items() if s.soft is not None}
                    if len(told) == len(numbers):
                        chances.append(softly_aligned(told, questions))
                        row["soft"] = chances[-1]
                rows[ask.id]["images"].append(row)
            if (value := mean(images)) is not None:
                hard.append(value)
                per_category.setdefault(ask.task, []).append(value)
                rows[ask.id]["score"] = value
            if (value := mean(chances)) is not None:
                soft.append(value)
            progress()
        column.figures["alignment"] = bootstrapped(hard, mean)
        column.figures |= {f"alignment, {category}": bootstrapped(own, mean) for category, own in per_category.items()}
        if options.soft:
            figure = bootstrapped(soft, mean)
            column.figures["alignment, soft"] = (
                figure if soft else Figure(None, note="the judge tells no probabilities")
            )

    def _text(
        self,
        options: argparse.Namespace,
        asks: Sequence[Ask],
        folder: Path,
        language: str,
        column: Column,
        rows: dict[str, Any],
    ) -> None:
        reader = self.reader
        assert reader is not None, "prepared"
        column.cards.append(reader.card)
        targets = targets_of(options.prompts, language)
        own = [a for a in asks if a.task == "text" and a.id.partition("/")[2] in targets]

        def target(ask: Ask) -> str:
            return targets[ask.id.partition("/")[2]]

        def limit(ask: Ask) -> int:
            return TOKENS[len(target(ask).split()) > LONG]

        def images_of(ask: Ask) -> list[tuple[str, np.ndarray | None]]:
            cells: list[np.ndarray] = self.cells(options, ask, folder)
            return [(str(k), cell) for k, cell in enumerate(cells)] or [(str(k), None) for k in range(options.grid**2)]

        def measured(groups: Sequence[Sequence[Match]], name: str) -> float | None:
            found = oneig_text(list(itertools.chain(*groups)), LIMITS[language])
            return None if found is None else found[name]

        matches: list[list[Match]] = []
        for ask, texts in read_all(reader, own, folder, column, limit, images_of):
            read = [oneig_match(target(ask), without_hallucinations(text)) for _, text, _ in texts if text is not None]
            rows[ask.id]["images"] += [{"read": text, "not_judged": why} for _, text, why in texts]
            if read:
                matches.append(read)
                rows[ask.id]["score"] = measured([read], "score")
        column.figures["text"] = bootstrapped(matches, lambda groups: measured(groups, "score"))
        column.figures |= {
            f"text, {name}": Figure(measured(matches, name), of=len(matches)) for name in ("ED", "CR", "WAC")
        }

    def _style(
        self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path, column: Column, rows: dict[str, Any]
    ) -> None:
        judge = self.styles
        assert judge is not None, "prepared"
        column.cards += judge.cards
        known, found = styles_of(options.prompts), []
        own = [(a, known[key]) for a in asks if a.task == STYLED and (key := a.id.partition("/")[2]) in known]
        progress, count = Progress("style", len(own)), column.count("style", len(own) * options.grid**2)
        for ask, style in own:
            if not count.goes_on():
                break
            cells = self.cells(options, ask, folder)
            count.judged += len(cells) or options.grid**2
            try:
                if not cells:
                    raise ValueError("no such image, or none that can be read")
                values = judge.scores(cells, style)
                found.append(sum(values) / len(values))
                rows[ask.id]["images"] += [{"style": style, "style_score": value} for value in values]
            except Exception as error:  # a missing judgement, whatever it is
                count.missing += len(cells) or options.grid**2
                rows[ask.id]["images"].append({"style": style, "not_judged": [str(error)]})
            progress()
        column.figures["style"] = bootstrapped(found, mean)

    def _diversity(
        self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path, column: Column, rows: dict[str, Any]
    ) -> None:
        judge = self.distance
        assert judge is not None, "prepared"
        column.cards.append(judge.card)
        found, every = [], math.comb(options.grid**2, 2)  # pairs of a prompt
        progress, count = Progress("diversity", len(asks)), column.count("diversity", every * len(asks))
        for ask in asks:
            if not count.goes_on():
                break
            cells, distances, lost = self.cells(options, ask, folder), list[float](), list[str]()
            if not cells:
                count.judged += every
                count.missing += every
            for pair in itertools.combinations(cells, 2):
                count.judged += 1
                try:
                    distances.append(judge.distance(*pair))
                except Exception as error:  # a missing judgement, whatever it is
                    count.missing += 1
                    lost.append(str(error))
            if lost:
                rows[ask.id]["images"].append({"not_judged": lost})
            if distances:
                found.append(sum(distances) / len(distances))
            progress()
        column.figures["diversity"] = bootstrapped(found, mean)

    def shown(self, options: argparse.Namespace, ask: Ask, folder: Path) -> np.ndarray | None:
        return next(iter(self.cells(options, ask, folder)), None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_arguments(parser, LANGUAGES)
    parser.add_argument("--prompts", type=Path, required=True, metavar="DIR", help="the repository, your own copy")
    parser.add_argument("--grid", type=int, default=2, help="images of a prompt are GRID by GRID (default: 2)")
    parser.add_argument(
        "--dimensions", nargs="+", choices=DIMENSIONS, default=list(DIMENSIONS), help="default: all five"
    )
    parser.add_argument("--dreamsim", action="store_true", help="diversity by DreamSim (package dreamsim)")
    parser.add_argument("--csd", type=Path, metavar="FILE", help="style: CSD's checkpoint.pth")
    parser.add_argument("--style-encoder", type=Path, metavar="DIR", help="style: OneIG-StyleEncoder's folder")
    parser.add_argument(
        "--judged",
        type=Path,
        metavar="FILE",
        help="JSON lines: dimension, category, id, values of reasoning, style, diversity",
    )
    judge_choice.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    return command.run(OneIG(), options)
