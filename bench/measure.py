"""Timing on the CPU, and the card of the machine that a result belongs to."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lens
from lens.ops import backend

from .cases import CASES

_OUT_OF_CACHE = 64 << 20  # bytes of a case below which a cache may beat the memory roof


def timed(functions: list[Callable[[], Any]], seconds: float, at_least: int = 5) -> list[dict[str, float]]:
    """Median, 20th and 80th percentile in milliseconds of each function.

    The functions take turns, so that what else the machine does falls on all of them alike.
    """
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while len(times[0]) < at_least or time.perf_counter() < end:
        for function, taken in zip(functions, times):
            start = time.perf_counter_ns()
            function()
            taken.append((time.perf_counter_ns() - start) / 1e6)
    return [{name: _quantile(taken, q) for name, q in (("ms", 0.5), ("p20", 0.2), ("p80", 0.8))} for taken in times]


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 6)


def copy_bandwidth() -> float:
    """GB/s of torch's copy between arrays far larger than any cache: the roof of every case that only moves bytes."""
    source = torch.ones(64 << 20, dtype=torch.float32)
    target = torch.empty_like(source)
    (result,) = timed([lambda: target.copy_(source)], seconds=0.5)
    return round(2 * source.numel() * 4 / result["ms"] / 1e6, 2)


def card() -> dict[str, Any]:
    """What must be equal for two results to be compared."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": backend.isa(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The checkout's commit, with "+" where files differ from it; "unknown" outside of git."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except OSError:
        return "unknown"


def measure(case: str, seconds: float, roof: float) -> dict[str, Any]:
    """One row of a result: times, and where they apply the speed-up over eager and the part of the memory roof reached."""
    work = CASES[case]()
    with torch.no_grad():
        ours, *eager = timed([work.run, *([work.baseline] if work.baseline else [])], seconds)
    row: dict[str, Any] = {"case": case, **ours}
    if eager:
        row |= {"eager_ms": eager[0]["ms"], "speedup": round(eager[0]["ms"] / ours["ms"], 3)}
    if work.bytes >= _OUT_OF_CACHE:
        row["roof"] = round(work.bytes / ours["ms"] / 1e6 / roof, 3)
    return row


def result(rows: list[dict[str, Any]], roof: float) -> dict[str, Any]:
    return {"card": card(), "lens": lens.__version__, "commit": commit(), "copy_gb_per_s": roof, "rows": rows}
