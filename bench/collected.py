"""What pytest collects in `python -m bench run`: one benchmark per case and subject; see bench/plugin.py."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from bench import plugin


def test_case(case: str, subject: str, bench: plugin.Bench, benchmark: Any, request: pytest.FixtureRequest) -> None:
    row = bench.rows(case)[subject]
    if "left_out" in row:
        bench.keep(request.config, None)
        pytest.skip(row["left_out"])
    if "failed" in row:
        bench.keep(request.config, None)
        pytest.fail(row["failed"], pytrace=False)
    rounds = [seconds for part in row["passes"] for seconds in part]
    plugin.load(rounds)
    benchmark.extra_info.update(
        {"case": case, "subject": subject, **row, "passes": [len(part) for part in row["passes"]]}
    )
    benchmark.pedantic(plugin.replay, setup=plugin.rewind, rounds=len(rounds), iterations=1, warmup_rounds=0)
    bench.keep(request.config, benchmark.stats)
    print(f"{case} [{subject}] {1e3 * row['best']:.4g} ms", file=sys.stderr, flush=True)
