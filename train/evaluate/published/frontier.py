"""The paper's figure 2: score against seconds a 1024x1024 image, a circle a model, its area by parameters.

    python -m train evaluate frontier                                       # the paper's two alone
    python -m train evaluate frontier --model "Lens, ours" runs/evaluate/geneval/scores.json e2e.json 4.1 lens --out frontier.html

Only measured times: those of a result of `python -m bench run e2e` (case e2e/VARIANT/1024/b*/*/total, our subject, by image), all
of one GPU, and the two that the paper prints, of an H100. VARIANT is lens or turbo; it may be left out where the result has one
alone. Scores are refused where judges differ, and where the first column is not of English. Other models of the paper's figure
have no printed time, so they are not drawn.
"""

from __future__ import annotations

import argparse
import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.formats.files import read_json

from ... import report
from ...loop.checkpoints import write_text
from . import paper
from .judging import columns_of, expect_same_judges

TABLE_2 = {"geneval": "GenEval", "oneig": "OneIG EN", "longtext": "LongText EN", "cvtg": "CVTG Avg."}
PAPERS = {"Lens (20-step)": "Lens 20 steps", "Lens-Turbo (4-step)": "Lens-Turbo 4 steps"}  # table 2 -> latencies
PAPERS_GPU = "H100"
CASE = re.compile(r"e2e/([\w.-]+)/1024/b(\d+)/\w+/total")


@dataclass(frozen=True)
class Dot:
    """One model: score against seconds an image, its parameters in billions, and who measured the time where."""

    name: str
    score: float
    seconds: float
    billions: float
    gpu: str
    paper: bool = False


def seconds_of(path: Path, variant: str = "") -> tuple[str, float]:
    """(GPU, seconds a 1024x1024 image) of a bench result: the median of our subject, the best batch of its variant's cases.

    Errors: ValueError where there is no such case, or cases of several variants and none is named.
    """
    values = read_json(path)
    found: dict[str, list[float]] = {}
    for entry in values.get("benchmarks", []):
        told = entry.get("extra_info", {})
        match = CASE.fullmatch(str(told.get("case")))
        if match and told.get("subject") == "ours":
            found.setdefault(match[1], []).append(float(entry["stats"]["median"]) / int(match[2]))
    if not found or (variant and variant not in found):
        there = f", only of {', '.join(sorted(found))}" if found else ""
        raise ValueError(
            f"{path}: no case e2e/{variant or '*'}/1024/b*/*/total of our subject{there}: nothing was measured"
        )
    if not variant and len(found) > 1:
        raise ValueError(f"{path}: times of {', '.join(sorted(found))}: say which as the fifth value of --model")
    return str(values["machine_info"]["identity"]["device"]), min(found[variant or next(iter(found))])


def dots(runs: Sequence[Sequence[str]]) -> tuple[str, list[Dot]]:
    """(benchmark, ours and the paper's two). runs: (name, scores.json, bench.json, billions, variant or nothing). Errors: ValueError."""
    found, benchmarks, columns = [], set[str](), []
    for given in runs:
        if len(given) not in (4, 5):
            raise ValueError(f"--model: expected NAME SCORES BENCH BILLIONS [VARIANT], got {' '.join(given)}")
        name, scores, times, billions, *variant = given
        benchmark, own = columns_of(Path(scores))
        benchmarks.add(benchmark)
        columns += own[:1]
        if own[0].language != "en":
            raise ValueError(f"{scores}: {own[0].name} is of {own[0].language}, the paper's figure 2 of English")
        gpu, seconds = seconds_of(Path(times), *variant)
        total = own[0].figures[own[0].total]
        if total.value is None:
            raise ValueError(f"{scores}: {own[0].name} has no total ({total.note})")
        found.append(Dot(name, total.value, seconds, float(billions), gpu))
    if len(benchmarks) > 1 or len({d.gpu for d in found}) > 1:
        raise ValueError(
            f"frontier: benchmarks {', '.join(sorted(benchmarks))} on {', '.join(sorted({d.gpu for d in found}))}: expected one of each"
        )
    if columns:
        expect_same_judges(columns)
    benchmark = next(iter(benchmarks), "geneval")
    two, latency, sizes = paper.rows("table_2"), paper.tables()["latency_h100_1024"], paper.sizes()
    for model, key in PAPERS.items():
        score = two[model][TABLE_2[benchmark]]
        if score is not None:
            found.append(Dot(f"{model}, paper", score, latency[key], sizes[model], PAPERS_GPU, True))
    return benchmark, found


WIDTH, HEIGHT, MARGIN = 640, 420, 56


def drawn(benchmark: str, points: Sequence[Dot]) -> str:
    """Score (up) against seconds (right, logarithmic): a circle a model, its area by parameters; the paper's hollow."""
    xs, ys = [math.log(p.seconds) for p in points], [p.score for p in points]
    left, right, low, high = min(xs) - 0.3, max(xs) + 0.3, min(ys) - 0.02, max(ys) + 0.02

    def place(p: Dot) -> tuple[float, float]:
        x = MARGIN + (math.log(p.seconds) - left) / (right - left) * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (p.score - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    marks = []
    for number, p in enumerate(points):
        x, y = place(p)
        colour = report.COLOURS[number % len(report.COLOURS)]
        fill = "none" if p.paper else colour
        radius = 5 * math.sqrt(p.billions)
        label = html.escape(f"{p.name}: {p.score:.3f}, {p.seconds:.3g} s on {p.gpu}, {p.billions:g} billion parameters")
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" fill-opacity="0.7" stroke="{colour}">'
            f'<title>{label}</title></circle><text x="{x + radius + 4:.1f}" y="{y + 4:.1f}" fill="{colour}">{html.escape(p.name)}</text>'
        )
    axes = (
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">seconds a 1024x1024 image (logarithmic)</text>'
        f'<text x="12" y="{MARGIN / 2}">{html.escape(benchmark)}</text>'
    )
    for text, x, y in (
        (f"{math.exp(left):.2g}", MARGIN, HEIGHT - 30),
        (f"{math.exp(right):.2g}", WIDTH - MARGIN, HEIGHT - 30),
        (f"{low:.3f}", 10, HEIGHT - MARGIN),
        (f"{high:.3f}", 10, MARGIN),
    ):
        axes += f'<text x="{x}" y="{y}">{text}</text>'
    size = f'width="{WIDTH + 160}" height="{HEIGHT}" font-size="12" font-family="sans-serif"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{axes}{"".join(marks)}</svg>'


def page(benchmark: str, points: Sequence[Dot]) -> str:
    numbers: dict[str, Any] = {
        p.name: {"score": p.score, "seconds": p.seconds, "GPU": p.gpu, "billion parameters": p.billions} for p in points
    }
    others = {p.gpu for p in points if not p.paper and PAPERS_GPU.lower() not in p.gpu.lower()}
    note = f"<p>The paper's times are of an {PAPERS_GPU}; ours are of {html.escape(', '.join(others))}: not the same axis.</p>"
    sections = [
        ("Score against time", drawn(benchmark, points) + (note if others else "")),
        ("Numbers", report.table(numbers)),
    ]
    return report.page(f"{benchmark} against seconds an image", sections)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME SCORES BENCH BILLIONS", "VARIANT"),
        help="a model: its name, scores.json, bench result, parameters, and which of the result's variants it is",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evaluate/frontier.html"), help="default: runs/evaluate/frontier.html"
    )


def run(options: argparse.Namespace) -> int:
    benchmark, points = dots(options.model)
    write_text(options.out, page(benchmark, points))
    for p in points:
        print(f"{p.name}: {benchmark} {p.score:.3f}, {p.seconds:.3g} s on {p.gpu}, {p.billions:g} billion parameters")
    print(options.out)
    return 0
