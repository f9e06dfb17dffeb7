"""A result file: pytest-benchmark's JSON, with our card and rows in it. Reading, checking, tables.

machine_info      {"identity", "build"} of `bench.machine.card`
bench             {"ceilings", "before", "after", "asked": {"cases": ids, "subjects": names, null: all},
                  "left_out", "failed": {case: {subject: reason}}}
benchmarks        one per case and subject; stats.data are seconds, extra_info our row
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .roofline import SAME_CHIP

ABOVE = (
    "Above 100 %: the ceilings are a copy of 64 MB or more and one large GEMM, measured once before. What fits a cache is faster than "
    "the copy, and so is an op that reads more than it writes, for a CPU's plain store reads the line first."
)
DISTURBED = 1.25  # median over best of a CPU's rounds from which something else ran beside them


@dataclass(frozen=True)
class Row:
    """One subject of one case: best of all rounds in seconds, and how far two timings of it lay apart."""

    case: str
    subject: str
    best: float
    median: float
    band: float
    more: dict[str, Any]


@dataclass(frozen=True)
class Result:
    path: Path
    identity: dict[str, Any]
    build: dict[str, Any]
    bench: dict[str, Any]
    rows: dict[tuple[str, str], Row]


class NoResult(ValueError):
    """A file that is no result of `python -m bench run`."""


def parse(path: Path, value: Any) -> Result:
    """pytest-benchmark's dict -> Result; NoResult where something is missing."""
    try:
        rows = {}
        for entry in value["benchmarks"]:
            more, stats = entry["extra_info"], entry["stats"]
            key = more["case"], more["subject"]
            row = rows[key] = Row(*key, float(stats["min"]), float(stats["median"]), float(more["band"]), more)
            if not (0 < row.best < math.inf and 0 <= row.band < math.inf):  # compared, a NaN would pass as no slower
                raise ValueError(f"{key}: best {row.best} s and band {row.band} are no measurement")
        info, bench = value["machine_info"], value["bench"]
        if missing := {"asked", "left_out", "failed"} - set(bench):
            raise KeyError(*sorted(missing))
        return Result(path, dict(info["identity"]), dict(info["build"]), dict(bench), rows)
    except (KeyError, TypeError, ValueError) as error:
        raise NoResult(f"{path}: not a result of `python -m bench run`: {error!r}") from None


def load(path: Path) -> Result:
    """Read a result file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NoResult(f"{path}: not a result of `python -m bench run`: {error}") from None
    return parse(path, value)


def load_runs(path: Path) -> list[Result]:
    """A result, or every run of a folder. NoResult where there is none."""
    found = load_folder(path) if path.is_dir() else [load(path)]
    if not found:
        raise NoResult(f"{path}: no result of `python -m bench run` in this folder")
    return found


def load_folder(folder: Path) -> list[Result]:
    """Every result of a folder, oldest name first."""
    return [load(path) for path in sorted(folder.glob("*.json")) if path.name != "summary.json"]


def time_text(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def conditions(result: Result) -> str:
    """The line above a table: what was measured on."""
    i, b, c = result.identity, result.build, result.bench.get("ceilings", {})
    words = [str(i.get("device")), *(f"{k} {i[k]}" for k in ("driver", "cuda", "isa") if k in i)]
    words += [f"{i['threads']} thread(s)"] if "threads" in i else []
    words += [str(i["clock"])] if "clock" in i else []
    words += [f"torch {i.get('torch')}", f"lens {b.get('lens')} at {b.get('commit')}"]
    if c:
        words.append(f"copy {c['copy'] / 1e9:.0f} GB/s and GEMM {c['matmul'] / 1e12:.3g} TFLOP/s here")
    return "; ".join(words)


def unsteadiness(result: Result) -> list[str]:
    """What a CPU's times cannot show: how far two passes lie apart, and medians far above the best."""
    rows = list(result.rows.values())
    if not rows:
        return []
    bands = sorted(row.band for row in rows)
    lines = [
        f"Two passes of this run differ by {bands[len(bands) // 2]:.1%} in the middle, {bands[-1]:.1%} at worst; two runs may "
        "differ by more: python -m bench abba."
    ]
    disturbed = [row for row in rows if row.median > DISTURBED * row.best]
    if disturbed:
        worst = max(row.median / row.best for row in disturbed)
        lines.append(
            f"{len(disturbed)} of {len(rows)} medians lie more than {DISTURBED - 1:.0%} above the best round, up to x{worst:.2f}: "
            "others used these cores, or the rounds were few."
        )
    return lines


def table(result: Result) -> str:
    """Markdown: every case with its subjects, errors and shares of the ceilings, and what was left out."""
    lines = [conditions(result), ""]
    if "H200" in str(result.identity.get("device")):
        lines += [SAME_CHIP, ""]
    lines += ["| case | subject | best | median | band | error | of floor | of matrix peak | of copy |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    above = False
    for row in result.rows.values():
        r = row.more.get("roof", {})
        shares = [f"{r[k]:.0%}" if r.get(k) else "" for k in ("of_floor", "of_matmul", "of_copy")]
        above |= any(r.get(k, 0) > 1 for k in ("of_floor", "of_matmul", "of_copy"))
        if row.more.get("in_cache") and r.get("of_copy"):
            shares[2] += " (in cache)"
        if goal := row.more.get("goal"):
            shares[0] = f"goal {time_text(goal)}: {'met' if row.best < goal else 'MISSED'}"
        rate = f" ({row.more['images'] / row.best:.3g} images/s)" if "images" in row.more else ""
        times = (
            f"{time_text(row.best)}{rate} | {time_text(row.median)} | {row.band:.1%} | {row.more.get('error', 0):.1e}"
        )
        lines.append(f"| {row.case} | {row.subject} | {times} | {' | '.join(shares)} |")
    for outcome, words in (("left_out", "left out"), ("failed", "FAILED")):
        for case, subjects in result.bench.get(outcome, {}).items():
            lines += [f"| {case} | {subject} | {words}: {why} | | | | | | |" for subject, why in subjects.items()]
    return "\n".join([*lines, *(["", ABOVE] if above else [])])
