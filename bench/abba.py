"""Two checkouts measured in turns, A-B-B-A, every run in a process of its own: what `compare` judges.

    python -m bench abba ../before ops --case "ops/swiglu/*" --out ab

A is the other checkout, B this one; each must have its own built lens._C. A drift of the machine that is linear in time
falls on both alike. OUT holds before/1.json, 2.json, .. and after/1.json, ..: `python -m bench compare OUT/before OUT/after`
reads them again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .machine import ROOT

SIDES = ("before", "after")


def turns(rounds: int) -> list[str]:
    """A B B A, again and again."""
    return [SIDES[0], SIDES[1], SIDES[1], SIDES[0]] * rounds


def execute(checkout: Path, words: Sequence[str], out: Path) -> int:
    """`python -m bench run` of a checkout; its exit status. Its tables go to a log beside the result."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench", "run", *words, "--out", str(out)]
    # first on the path whatever is installed or named there: else both sides could be one build, and look alike
    places = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        return subprocess.run(
            command, cwd=checkout, env=env, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode


def abba(
    other: Path,
    words: Sequence[str],
    out: Path,
    rounds: int,
    run: Callable[[Path, Sequence[str], Path], int] = execute,
) -> dict[str, list[Path]]:
    """Result files of both sides. words: options of `bench run`. Errors: ValueError for a checkout without a bench, for
    results that are already there, and for a run that measured nothing, with the place of its log."""
    if not (other / "bench" / "__main__.py").is_file():
        raise ValueError(f"{other}: no checkout of Lens here, bench/__main__.py is missing")
    checkouts = dict(zip(SIDES, (other.resolve(), ROOT), strict=True))
    found: dict[str, list[Path]] = {side: [] for side in SIDES}
    if taken := [side for side in SIDES if list((out / side).glob("*.json"))]:
        raise ValueError(f"{out / taken[0]}: holds results of an earlier call; expected a new folder")
    for side in turns(rounds):
        path = (out / side / f"{len(found[side]) + 1}.json").resolve()
        status = run(checkouts[side], words, path)
        if not path.is_file():
            raise ValueError(
                f"the run of {checkouts[side]} ended with {status} and no result: {path.with_suffix('.log')}"
            )
        found[side].append(path)
        print(f"{side} {len(found[side])} of {2 * rounds}", file=sys.stderr, flush=True)
    return found
