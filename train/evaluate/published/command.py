"""What all published benchmarks share: options, drawing with and without a reasoner, judging, and what is written.

OUT gets scores.json, one rows_*.jsonl a column (every prompt with what each of its images was given and why), a contact sheet
a task, and index.html with the numbers beside the paper's rows.
"""

from __future__ import annotations

import argparse
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lens.formats.files import write_json

from ... import report
from ...cost import GPUS
from ...data.contact_sheet import contact_sheet
from ...loop.checkpoints import write_text
from . import paper, rewrites
from .drawing import Ask, Calls, described, drawn, estimate, image_flops, model_of, read_image
from .judging import MAX_MISSING, Column, Figure, expect_same_judges

SHEET = 40  # images of a contact sheet: the first of each of the first prompts
TEXT_TOKENS = 40  # of a prompt, assumed by the estimate


class Benchmark(Protocol):
    """One published benchmark. `asks` in the order of its own file."""

    name: str

    def asks(self, options: argparse.Namespace, language: str) -> list[Ask]: ...

    def prepare(self, options: argparse.Namespace) -> None:
        """Load and test the judges: before anything is drawn, so that hours of drawing do not end at a judge there is not."""
        ...

    def arrange(self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path) -> None:
        """Whatever else the benchmark's layout has beside the images that were drawn."""
        ...

    def calls(self, options: argparse.Namespace, asks: Sequence[Ask], language: str) -> list[Calls]: ...

    def score(self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path, name: str, language: str) -> Column:
        """Judge a folder in the benchmark's layout. An image that is missing is a missing judgement."""
        ...

    def shown(self, options: argparse.Namespace, ask: Ask, folder: Path) -> np.ndarray | None:
        """The image of a prompt that a contact sheet shows."""
        ...


def size_of(text: str) -> tuple[int, int]:
    """ "1024x1024" -> (height, width)."""
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected HEIGHTxWIDTH")
    height, width = text.split("x")
    return int(height), int(width)


def prices_of(text: str) -> tuple[float, float]:
    """ "0.4,1.6": USD per million tokens read and written."""
    try:
        read, written = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected READ,WRITTEN in USD per million tokens") from None
    return read, written


def add_arguments(parser: argparse.ArgumentParser, languages: Sequence[str]) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="what the pipeline loads: mini, a folder in the released layout, a hub id")
    what.add_argument(
        "--images", type=Path, metavar="DIR", help="score images that are there, in the benchmark's own layout"
    )
    parser.add_argument("--out", type=Path, help="folder of images and scores (default: runs/evaluate/BENCHMARK)")
    parser.add_argument("--name", help="how the column is called (default: the model or the folder)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--size", type=size_of, metavar="HxW", help="of every image (default: the model's square)")
    parser.add_argument("--device", help="cuda or cpu, of model and judges (default: cuda where there is one)")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="the first N prompts of each task only: no published score"
    )
    parser.add_argument("--language", nargs="+", choices=languages, default=["en"], help="a column each (default: en)")
    parser.add_argument(
        "--dry-run", action="store_true", help="images, judgements, hours and money; draws and judges nothing"
    )
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="of --dry-run (default: h100)")
    parser.add_argument("--gpu-price", type=float, metavar="USD", help="of one GPU hour, for --dry-run")
    parser.add_argument(
        "--judge-prices", type=prices_of, metavar="READ,WRITTEN", help="USD per million tokens of a judge at a server"
    )
    rewrites.add_arguments(parser)


def limited(asks: Sequence[Ask], limit: int | None) -> list[Ask]:
    """The first `limit` of each task."""
    seen: dict[str, int] = {}
    kept = []
    for ask in asks:
        seen[ask.task] = seen.get(ask.task, 0) + 1
        if limit is None or seen[ask.task] <= limit:
            kept.append(ask)
    return kept


def run(bench: Benchmark, options: argparse.Namespace) -> int:
    """0; 1 where a column has no total because judgements are missing."""
    out = options.out = options.out or Path("runs/evaluate") / bench.name
    reasoner = options.reasoner != "none"
    if options.images and not options.images.is_dir():
        raise ValueError(f"--images {options.images}: no such folder")
    if options.images and reasoner:
        raise ValueError("--images are drawn already: --reasoner has nothing to rewrite")
    if options.images and len(options.language) > 1:
        raise ValueError("--images are of one language: give one --language")
    if options.images and (given := [n for n in ("steps", "guidance", "size") if getattr(options, n) is not None]):
        raise ValueError(f"--images are drawn already: --{given[0]} has nothing to draw")
    rewrites.expect_used(options)
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    every = {language: limited(bench.asks(options, language), options.limit) for language in options.language}
    if options.dry_run:
        print(dry_run(bench, options, every))
        return 0
    bench.prepare(options)
    name = options.name or options.model or options.images.name
    # the runs: a language with and without a reasoner each
    runs = []
    for language, asks in every.items():
        title = name if len(every) == 1 and language == "en" else f"{name}, {language}"
        runs.append((title, language, asks))
        if reasoner:
            own = f"{title}, reasoner {options.reasoner}"
            begun = (out / "images" / slug(own) / "drawn.json").is_file()
            runs.append((own, language, rewrites.rewritten(options, bench.name, asks, out, begun=begun)))
    folders = [options.images or out / "images" / slug(title) for title, _, _ in runs]
    if options.model:
        model = model_of(options)
        for (title, _, asks), folder in zip(runs, folders):
            drawn(model, asks, folder, lambda line, title=title: print(f"{title}: {line}", flush=True))  # type: ignore[misc]
            bench.arrange(options, asks, folder)
        del model
    columns = []
    for (title, language, asks), folder in zip(runs, folders):
        column = bench.score(options, asks, folder, title, language)
        columns.append(closed(column))
        print(said(column), flush=True)
    expect_same_judges(columns)
    written(bench, options, out, columns, runs, folders)
    print(out / "index.html")
    return 0 if all(column.complete for column in columns) else 1


def dry_run(bench: Benchmark, options: argparse.Namespace, every: Mapping[str, Sequence[Ask]]) -> str:
    """The estimate of all columns. every: language -> its prompts."""
    asks, times = [ask for own in every.values() for ask in own], 1 if options.reasoner == "none" else 2
    made: dict[str, Calls] = {}
    for call in (call for language, own in every.items() for call in bench.calls(options, own, language)):
        number = made[call.judge].number if call.judge in made else 0
        made[call.judge] = replace(call, number=number + times * call.number)
    calls = list(made.values())
    if options.reasoner != "none":
        calls += rewrites.calls(options, bench.name, every.values())
    if options.images:
        return f"{len(asks)} prompts\n" + estimate(0, 0.0, calls, options.gpu, options.gpu_price, options.judge_prices)
    images = times * sum(len(ask.files) for ask in asks)
    config, defaults = described(options.model)
    size = options.size or (defaults.base_resolution,) * 2
    steps = defaults.num_inference_steps if options.steps is None else options.steps
    guidance = defaults.guidance_scale if options.guidance is None else options.guidance
    a_image = image_flops(config, size, steps, guidance, TEXT_TOKENS)
    table = estimate(images, a_image, calls, options.gpu, options.gpu_price, options.judge_prices)
    return f"{len(asks)} prompts, {size[0]}x{size[1]}, {steps} steps, guidance {guidance:g}\n{table}"


def closed(column: Column) -> Column:
    """Without the figures of a dimension of which too many judgements are missing, and then without its total."""
    for dimension, count in column.counts.items():
        for name in column.figures:
            if not count.complete and (name == dimension or name.startswith(f"{dimension}, ")):
                column.figures[name] = Figure(None, note=f"no figure: {count}")
    if not column.complete and column.total in column.figures:
        column.figures[column.total] = Figure(None, note=f"no total: {column.lacking}")
    return column


def said(column: Column) -> str:
    lines = [f"{column.name}: {column.judged} judgements, {column.missing} missing"]
    lines += [f"  by {card}{f'; {card.differs}' if card.differs else ''}" for card in column.cards]
    lines += [f"  {name:24} {figure}" for name, figure in column.figures.items()]
    if not column.complete:
        lines.append(f"  no total: {column.lacking}; at most {MAX_MISSING:.0%} may be")
    return "\n".join(lines)


def slug(text: str) -> str:
    """A file name of a column's title."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_") or "column"


# ------------------------------------------------------------------------------------------------ what is written


def table_of(columns: Sequence[Column], rows: dict[str, dict[str, float | None]]) -> str:
    """Ours with intervals above the paper's rows, as HTML. What is not known is blank."""
    names = list(dict.fromkeys(name for column in columns for name in column.figures))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = ""
    for column in columns:
        cells = "".join(f"<td>{html.escape(str(column.figures.get(name, '')))}</td>" for name in names)
        body += f"<tr><th>{html.escape(column.name)}</th>{cells}</tr>"
    for model, row in rows.items():
        values = [row.get(name) for name in names]
        cells = "".join(f"<td>{'' if v is None else f'{v:.3f}'}</td>" for v in values)
        body += f"<tr><th>{html.escape(model)}, paper</th>{cells}</tr>"
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def written(
    bench: Benchmark,
    options: argparse.Namespace,
    out: Path,
    columns: Sequence[Column],
    runs: Sequence[tuple[str, str, Sequence[Ask]]],
    folders: Sequence[Path],
) -> None:
    """scores.json, rows, sheets and the page."""
    settings = {
        k: v for k, v in vars(options).items() if isinstance(v, str | int | float | list | tuple | bool) or v is None
    }
    write_json(
        out / "scores.json", {"benchmark": bench.name, "settings": settings, "columns": [c.as_json() for c in columns]}
    )
    shown = ""
    for column, (_, _, asks), folder in zip(columns, runs, folders):
        lines = [json.dumps(row, ensure_ascii=False) for row in column.rows]
        write_text(out / f"rows_{slug(column.name)}.jsonl", "".join(f"{line}\n" for line in lines))
        marks: dict[str, Any] = {row["id"]: row.get("score") for row in column.rows}
        for task in dict.fromkeys(ask.task for ask in asks):
            own = [(a, bench.shown(options, a, folder)) for a in [a for a in asks if a.task == task][:SHEET]]
            there = [(a, image) for a, image in own if image is not None]
            if not there:
                continue
            path = out / f"sheet_{slug(column.name)}_{slug(task)}.png"
            scores = ["-" if marks.get(a.id) is None else f"{marks[a.id]:.2f}" for a, _ in there]
            captions = [f"{score} {a.drawn}" for score, (a, _) in zip(scores, there)]
            contact_sheet([image for _, image in there], captions, path, columns=10)
            title = html.escape(f"{column.name}: {task}")
            shown += f'<figure><img src="{path.name}" alt="{title}"><figcaption>{title}</figcaption></figure>'
    which, rows = paper.beside(bench.name, options.language[0]) if len(options.language) == 1 else ("", {})
    judges = "".join(
        f"<li>{html.escape(str(c))}{html.escape(f'; {c.differs}') if c.differs else ''}</li>" for c in columns[0].cards
    )
    note = ""
    if rows:
        note = f"<p>Paper: {which}; {html.escape(paper.WITH_REASONER)}.</p>"
    if any(card.differs for card in columns[0].cards):
        note += "<p>The judge is not the published one: read ours beside ours, not beside the paper's.</p>"
    if options.limit is not None:
        note += f"<p>The first {options.limit} prompts of each task only.</p>"
    sections = [("Scores", table_of(columns, rows) + note), ("Judges", f"<ul>{judges}</ul>"), ("First images", shown)]
    write_text(out / "index.html", report.page(f"{bench.name}: {columns[0].name}", [s for s in sections if s[1]]))


def first_image(ask: Ask, folder: Path) -> np.ndarray | None:
    """Where every image is a file of its own: the first that can be read."""
    for file in ask.files:
        try:
            image = read_image(folder / file)
        except ValueError:
            continue
        if image is not None:
            return image
    return None
