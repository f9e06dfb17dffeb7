"""The paper's own rows: tables 1, 2, 5 and 6 as printed, from assets/paper_tables.json. What it does not print stays None.

Its scores are with a reasoner (GPT-5.5) unless a row says otherwise, and by the benchmarks' own judges.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens.formats.files import read_json

TABLES = Path(__file__).parents[1] / "assets" / "paper_tables.json"
WITH_REASONER = "the paper's rows are with its reasoner, GPT-5.5, except where a row says otherwise"

Rows = Mapping[str, Mapping[str, float | None]]  # model -> column -> value


@functools.cache
def tables() -> dict[str, Any]:
    return read_json(TABLES)


def rows(table: str) -> Rows:
    """A table's rows by its own column names. Errors: KeyError for a table there is not."""
    found = tables()[table]
    columns = found["columns"]
    models = {name: values for name, values in found.items() if isinstance(values, list) and name != "columns"}
    return {name: dict(zip(columns, values, strict=True)) for name, values in models.items()}


def sizes() -> dict[str, float]:
    """Model of table 2 -> its parameters in billions, where the paper prints them."""
    return {name: float(str(row["size"]).removesuffix("B")) for name, row in rows("table_2").items() if row["size"]}


def beside(benchmark: str, language: str = "en") -> tuple[str, dict[str, dict[str, float | None]]]:
    """What the paper prints for a benchmark: (which table, model -> figure of ours -> value).

    Figures carry the names that ours have: "total"; of cvtg also "2R" to "5R", "NED" and "CLIPScore".
    """
    two = rows("table_2")
    if benchmark == "cvtg":
        names = {"2R": "2R", "3R": "3R", "4R": "4R", "5R": "5R", "total": "Avg.", "NED": "NED", "CLIPScore": "CLIP"}
        return "table 5", {
            m: {ours: row[theirs] for ours, theirs in names.items()} for m, row in rows("table_5_cvtg_regions").items()
        }
    column = {
        ("geneval", "en"): "GenEval",
        ("oneig", "en"): "OneIG EN",
        ("oneig", "zh"): "OneIG ZH",
        ("longtext", "en"): "LongText EN",
    }.get((benchmark, language))
    if column is None:
        return "", {}
    return "table 2", {model: {"total": row[column]} for model, row in two.items()}
