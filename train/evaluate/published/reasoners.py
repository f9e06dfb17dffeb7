"""The paper's table 6: what rewriting prompts brings, by reasoner; our own runs below its rows.

    python -m train evaluate reasoners                                      # the paper's rows alone
    python -m train evaluate reasoners runs/evaluate/*/scores.json

Reads scores.json files as the benchmarks write them (a run with --reasoner has two columns), refuses those of different judges
of one benchmark, two columns of one name and a file without English ones, and leaves blank what was not measured. Columns of other
languages beside English ones are left out, and said.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import paper
from .judging import Column, Figure, averaged, columns_of, expect_same_judges

LANGUAGE = "en"  # of table 6
AREAS = ("2R", "3R", "4R", "5R")  # of CVTG; the paper's Avg. is their plain mean
# benchmark, figure of ours -> column of table 6
TABLE_6 = {
    ("oneig", "total"): "OneIG EN",
    ("geneval", "total"): "GenEval",
    ("longtext", "total"): "LongText EN",
    ("cvtg", "mean of areas"): "CVTG Avg.",
    ("cvtg", "NED"): "CVTG NED",
    ("cvtg", "CLIPScore"): "CVTG CLIP",
}


def figure_of(column: Column, figure: str) -> Figure | None:
    """A figure of a column; CVTG's mean of its areas is made anew, and there is none unless all four are."""
    if figure != "mean of areas":
        return column.figures.get(figure)
    if not column.complete:
        return Figure(None, note=f"no mean: {column.lacking}")
    missing = Figure(None, note="not all four areas")
    return averaged([column.figures.get(area, missing) for area in AREAS])


def reasoners(paths: Sequence[Path]) -> dict[str, dict[str, Figure]]:
    """Our rows of table 6: column name -> figure by table 6's names. Errors: ValueError for different judges of a benchmark, for
    two columns of one name, and for a file of other languages alone."""
    per_benchmark: dict[str, list[Column]] = {}
    found: dict[tuple[str, str], Path] = {}
    for path in paths:
        benchmark, columns = columns_of(path)
        english = [column for column in columns if column.language == LANGUAGE]
        others = ", ".join(f"{column.name} ({column.language})" for column in columns if column not in english)
        if not english:
            raise ValueError(f"{path}: expected {benchmark} of English, as table 6 has it, got {others or 'no column'}")
        if others:
            print(f"{path}: left out, table 6 is of English: {others}")
        for column in english:
            if (before := found.setdefault((benchmark, column.name), path)) is not path:
                raise ValueError(
                    f"{path}: {benchmark} of {column.name!r}, as in {before}: give one of them another --name"
                )
        per_benchmark.setdefault(benchmark, []).extend(english)
    rows: dict[str, dict[str, Figure]] = {}
    for benchmark, columns in per_benchmark.items():
        expect_same_judges(columns)
        for column in columns:
            for (own, figure), name in TABLE_6.items():
                if own == benchmark and (told := figure_of(column, figure)) is not None:
                    rows.setdefault(column.name, {})[name] = told
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
