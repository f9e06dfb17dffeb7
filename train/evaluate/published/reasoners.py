"""The paper's table 6: what rewriting prompts brings, by reasoner; our own runs below its rows.

    python -m train evaluate reasoners                                      # the paper's rows alone
    python -m train evaluate reasoners runs/evaluate/*/scores.json

Reads scores.json files as the benchmarks write them (a run with --reasoner has two columns), refuses those of different judges
of one benchmark, and leaves blank what was not measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import paper
from .judging import Column, Figure, columns_of, expect_same_judges

# benchmark, figure of ours -> column of table 6
TABLE_6 = {
    ("oneig", "total"): "OneIG EN",
    ("geneval", "total"): "GenEval",
    ("longtext", "total"): "LongText EN",
    ("cvtg", "total"): "CVTG Avg.",
    ("cvtg", "NED"): "CVTG NED",
    ("cvtg", "CLIPScore"): "CVTG CLIP",
}


def reasoners(paths: Sequence[Path]) -> dict[str, dict[str, Figure]]:
    """Our rows of table 6: column name -> figure by table 6's names. Errors: ValueError for different judges of a benchmark."""
    per_benchmark: dict[str, list[Column]] = {}
    for path in paths:
        benchmark, columns = columns_of(path)
        per_benchmark.setdefault(benchmark, []).extend(columns)
    rows: dict[str, dict[str, Figure]] = {}
    for benchmark, columns in per_benchmark.items():
        expect_same_judges(columns)
        for column in columns:
            for (own, figure), name in TABLE_6.items():
                if own == benchmark and figure in column.figures:
                    rows.setdefault(column.name, {})[name] = column.figures[figure]
    return rows


def printed(rows: dict[str, dict[str, Figure]]) -> str:
    """Table 6 as text: the paper's rows, then ours with their intervals."""
    names = list(dict.fromkeys(TABLE_6.values()))
    lines = [["", *names]]
    for model, row in paper.rows("table_6_reasoners").items():
        lines.append([f"{model}, paper", *("" if row[n] is None else f"{row[n]:.3f}" for n in names)])
    for model, own in rows.items():
        lines.append([model, *("" if n not in own else str(own[n]) for n in names)])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scores", nargs="*", type=Path, metavar="SCORES", help="scores.json of any of the benchmarks")


def run(options: argparse.Namespace) -> int:
    print(printed(reasoners(options.scores)))
    return 0
