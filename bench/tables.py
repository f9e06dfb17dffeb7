"""Measured rates into the tables that choose kernels: committed results -> lens/ops/{attention,linear,invariance}_table.json.

A rate is the case's FLOPs over the best time, in TFLOP/s; its source names the case, the file and the commit that was
measured. It takes the place of the line with the same key, predicted or measured; where several results hold one, the
last one given counts. Lines that no result speaks of stay as they are. A price of batch invariance is the best time
under it over the best time without, less 1, of a case in which nothing was forced and measured rates chose.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from lens.engine import batch_invariance
from lens.formats.files import write_atomic
from lens.ops.attention import choice as attention_choice
from lens.ops.linear import choice as linear_choice

from .case import OURS
from .machine import ROOT
from .report import RESULTS, put
from .result import NoResult, Result, Row, load
from .suites.step import INVARIANT

# of the shape classes of attention_backends.AttentionCall, the case that stands for each
SHAPES = {
    "attention/4511,4096/bf16/forward": "long",
    "attention/8x968/bf16/forward": "short",
    "attention/4511,4096/bf16/training": "long training",
    "attention/8x968/bf16/training": "short training",
    "attention/4511,4096/bf16/gradients": "long backward",
    "attention/8x968/bf16/gradients": "short backward",
}
ATTENTION = ("arch", "shape", "backend")
LINEAR = ("arch", "gemm", "rows", "backend")
INVARIANCE = ("arch", "case")
Entry = dict[str, Any]


def _told(result: Result, row: Row, folder: Path) -> Entry:
    """What every measured line ends with."""
    return {"tflops": round(row.more["flops"] / row.best / 1e12, 1), **_source(result, row, folder)}


def _source(result: Result, row: Row, folder: Path) -> Entry:
    path = result.path.resolve()
    file = path.relative_to(folder) if path.is_relative_to(folder) else path.name
    source = f"{row.case}, {result.identity['device']}, {file}, commit {result.build['commit']}"
    return {"status": "measured", "source": source}


def attention_entries(result: Result, folder: Path = ROOT) -> list[Entry]:
    """Every candidate that ran, at the case of each shape class."""
    names, found = {c.name for c in (*attention_choice.CANDIDATES, *attention_choice.BACKWARDS)}, []
    for (case, subject), row in result.rows.items():
        if case in SHAPES and subject in names:
            key = {"arch": result.identity["capability"], "shape": SHAPES[case], "backend": subject}
            found.append({**key, **_told(result, row, folder)})
    return found


def linear_entries(result: Result, folder: Path = ROOT) -> list[Entry]:
    """Both ways of every product as a block calls it (with the norm that follows), at every number of rows."""
    found = []
    for (case, subject), row in result.rows.items():
        if case.startswith("gemm/") and subject in linear_choice.BACKENDS and row.more.get("block"):
            key = {"arch": result.identity["capability"], "gemm": row.more["gemm"], "rows": row.more["rows"]}
            found.append({**key, "backend": subject, **_told(result, row, folder)})
    return found


def invariance_entries(result: Result, folder: Path = ROOT) -> list[Entry]:
    """The price at every case that decides the default, where both subjects ran, ours multiplied, nothing was forced
    and the step without chose its products by measured rates: beside the library alone invariance could look cheap."""
    found = []
    for case in batch_invariance.CASES:
        plain, invariant = result.rows.get((case, OURS)), result.rows.get((case, INVARIANT))
        if plain is None or invariant is None or invariant.more["products"] != "ours":
            continue
        if plain.more["by_measured_rates"] and not plain.more["forced"] and not invariant.more["forced"]:
            key = {"arch": result.identity["capability"], "case": case}
            price = round(invariant.best / plain.best - 1, 4)
            found.append({**key, "price": price, **_source(result, invariant, folder)})
    return found


def merged(table: list[Entry], measured: Iterable[Entry], keys: tuple[str, ...]) -> list[Entry]:
    """The table with the measured lines: each in its place, a new one behind the last that shares its first two keys."""
    lines = list(table)
    for entry in measured:
        key = tuple(entry[k] for k in keys)
        same = [i for i, line in enumerate(lines) if tuple(line[k] for k in keys) == key]
        near = [i for i, line in enumerate(lines) if [line[k] for k in keys[:2]] == list(key[:2])]
        if same:
            lines[same[0]] = entry
        else:
            lines.insert(near[-1] + 1 if near else len(lines), entry)
    return lines


def written(value: dict[str, Any]) -> str:
    """A table as text: one line for each entry."""
    lines = ",\n".join(f"    {json.dumps(entry, ensure_ascii=False)}" for entry in value["entries"])
    return f'{{\n  "about": {json.dumps(value["about"], ensure_ascii=False)},\n  "entries": [\n{lines}\n  ]\n}}\n'


def committed_results(folder: Path = RESULTS) -> list[Path]:
    """Results of GPUs under bench/results, by name."""
    paths = [path for path in sorted(folder.glob("*/*.json")) if not path.name.startswith("summary")]
    return [path for path in paths if "capability" in load(path).identity]


def tables(
    results: list[Path],
    check: bool = False,
    attention: Path = attention_choice.TABLE,
    linear: Path = linear_choice.TABLE,
    invariance: Path = batch_invariance.TABLE,
    folder: Path = ROOT,
) -> list[Path]:
    """Write the tables; the changed files. check: change nothing, ValueError where one is stale. NoResult for a file
    that is none, or was not measured on a CUDA device."""
    loaded = [load(path) for path in results]
    for result in loaded:
        if "capability" not in result.identity:
            raise NoResult(f"{result.path}: measured on {result.identity.get('device')}, and the tables are of GPUs")
    changed = []
    for path, entries, keys in (
        (attention, attention_entries, ATTENTION),
        (linear, linear_entries, LINEAR),
        (invariance, invariance_entries, INVARIANCE),
    ):
        before = path.read_text(encoding="utf-8")
        value = json.loads(before)
        measured = [entry for result in loaded for entry in entries(result, folder)]
        text = written({**value, "entries": merged(value["entries"], measured, keys)})
        if text == before:
            continue
        changed.append(path)
        if not check:
            write_atomic(path, partial(put, text))
    if check and changed:
        raise ValueError(f"stale: {', '.join(p.name for p in changed)}; run python -m bench tables")
    return changed
