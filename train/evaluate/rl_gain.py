"""What RL gained over its base: of errors the share that is gone, with intervals, against what was asked of it.

    python -m train evaluate rl-gain --base runs/mini_rl/base_20/scores.json --rl runs/mini_rl/rl_20/scores.json
    python -m train evaluate rl-gain --base B.json --rl SEED11.json SEED12.json SEED13.json --out lens/mini/rl/scores.json

Reads what mini-bench writes, with --sizes and without. Of every size that both have, and of guidance 1 and 3:

    six        errors of GenEval's six tasks by the detector's rule, mean over tasks: a third gone at guidance 1, a quarter at 3
    binding    errors of color_attr: half gone at guidance 1
    audit      errors by the template judge, which no reward reads, mean over tasks: a fifth gone, the interval above 0
    distance   of the shape judge, mean over tasks: a fifth of the gap to the VAE's floor closed, where --floor tells it
    g1 over g3 the six-task mean of RL at guidance 1 less the base's at 3: 0 or more

Several files of --rl are seeds: their pictures are pooled. Intervals are 95 %, of 4,000 draws. Where all files tell the marks of as
many pictures, pictures are drawn, each with all models' marks for its prompt and seed; else every task's count is drawn from
its binomial, which is rather too wide. A share of no error at all is not told.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..loop.checkpoints import write_text
from .mini_bench import GENEVAL

DRAWS, SEED = 4000, 5
ROUNDING = 1e-9  # a third of the errors gone is a third of them
BOUND = ("color_attr",)
Counts = Sequence[tuple[int, int]]  # right, of: one pair a task
Marks = Sequence[np.ndarray]  # of each task float [files, pictures], 1 where right
Rows = Mapping[str, Mapping[str, Any]]  # task -> row of mini-bench
GOALS = {
    ("six", "1"): 1 / 3,
    ("six", "3"): 1 / 4,
    ("binding", "1"): 1 / 2,
    ("audit", "1"): 1 / 5,
    ("distance", "1"): 1 / 5,
}


@dataclass(frozen=True)
class Gain:
    """base, rl: the scores (distances) compared. gained: share of errors gone, or the difference; low, high: of `gained`; met: None
    where nothing is asked."""

    size: str
    what: str
    guidance: str
    base: float
    rl: float
    gained: float
    low: float | None
    high: float | None
    goal: float | None
    met: bool | None


def share_gone(base: float, rl: float) -> float:
    """1 - (errors of rl) / (errors of base), NaN where the base has none."""
    return 1 - (1 - rl) / (1 - base) if base < 1 else float("nan")


def interval(base: Counts, rl: Counts, gained: Any = share_gone) -> tuple[float, float]:
    """95 % interval of `gained` of both means over tasks, by draws from binomials whose shares have one picture added to each side."""
    random = np.random.default_rng(SEED)

    def drawn(counts: Counts) -> np.ndarray:
        return np.mean([random.binomial(of, (right + 1) / (of + 2), DRAWS) / of for right, of in counts], 0)

    values = np.array([gained(b, r) for b, r in zip(drawn(base), drawn(rl))])
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)


def paired_interval(base: Marks, rl: Marks, gained: Any = share_gone) -> tuple[float, float]:
    """The same by draws of pictures, alike for all files: what one prompt and seed gives each model stays together."""
    random = np.random.default_rng(SEED)
    before, after = np.zeros(DRAWS), np.zeros(DRAWS)
    for one, other in zip(base, rl):
        drawn = random.multinomial(one.shape[1], np.full(one.shape[1], 1 / one.shape[1]), DRAWS) / one.shape[1]
        before += drawn @ one.mean(0) / len(base)
        after += drawn @ other.mean(0) / len(base)
    values = np.array([gained(b, r) for b, r in zip(np.minimum(before, 1), np.minimum(after, 1))])
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)


def marks_of(files: Sequence[Rows], name: str, tasks: Sequence[str] = GENEVAL) -> list[np.ndarray] | None:
    """Of each task float [files, pictures]; None where a file tells none, or of another number of pictures."""
    found = []
    for task in tasks:
        own = [rows[task].get("marks", {}).get(name, "") for rows in files]
        if len(set(map(len, own))) != 1 or not own[0]:
            return None
        found.append(np.array([[float(mark) for mark in marks] for marks in own]))
    return found


def between(
    base: Sequence[Rows], rl: Sequence[Rows], name: str, tasks: Sequence[str], gained: Any
) -> tuple[float, float]:
    """The interval that the files allow."""
    one, other = marks_of(base, name, tasks), marks_of(rl, name, tasks)
    if one is None or other is None or any(a.shape[1] != b.shape[1] for a, b in zip(one, other)):
        return interval(counts_of(base, name, tasks), counts_of(rl, name, tasks), gained)
    return paired_interval(one, other, gained)


def mean(counts: Counts) -> float:
    return float(np.mean([right / of for right, of in counts]))


def counts_of(files: Sequence[Rows], name: str, tasks: Sequence[str] = GENEVAL) -> list[tuple[int, int]]:
    """Of each task how many pictures are right by a column of mini-bench, of all files together. Errors: ValueError for a task or a
    column that a file lacks."""
    found = []
    for task in tasks:
        if any(not isinstance(rows.get(task, {}).get(name), int | float) for rows in files):
            raise ValueError(
                f"rl-gain: a file has no {name!r} of {task}; mini-bench of all of {', '.join(GENEVAL)} writes it"
            )
        own = [(round(rows[task][name] * rows[task]["pictures"]), rows[task]["pictures"]) for rows in files]
        found.append((sum(right for right, _ in own), sum(of for _, of in own)))
    return found


def gains(
    base: Mapping[str, Sequence[Rows]], rl: Mapping[str, Sequence[Rows]], size: str, floor: float | None
) -> list[Gain]:
    """guidance -> rows of each file, of one size."""
    found = []

    def add(what: str, guidance: str, name: str, tasks: Sequence[str] = GENEVAL) -> None:
        own = base[guidance], rl[guidance]
        before, after = (mean(counts_of(files, name, tasks)) for files in own)
        gained, goal = share_gone(before, after), GOALS.get((what, guidance))
        low, high = between(*own, name, tasks, share_gone)
        met = None if goal is None or np.isnan(gained) else gained >= goal - ROUNDING and (what != "audit" or low > 0)
        found.append(Gain(size, what, guidance, before, after, gained, low, high, goal, met))

    for guidance in [g for g in base if g in rl]:
        both = base[guidance], rl[guidance]
        add("six", guidance, "score")
        add("binding", guidance, "score", BOUND)
        add("audit", guidance, "audit")
        far, near = (float(np.mean([rows[task]["distance"] for rows in one for task in GENEVAL])) for one in both)
        gap = float("nan") if floor is None else (far - near) / (far - floor)
        goal = GOALS.get(("distance", guidance))
        met = None if floor is None or goal is None else gap >= goal - ROUNDING
        found.append(Gain(size, "distance", guidance, far, near, gap, None, None, goal, met))
    if "1" in rl and "3" in base:
        own = counts_of(base["3"], "score"), counts_of(rl["1"], "score")
        low, high = between(base["3"], rl["1"], "score", GENEVAL, lambda b, r: r - b)
        gained = mean(own[1]) - mean(own[0])
        found.append(
            Gain(size, "g1 over g3", "1", mean(own[0]), mean(own[1]), gained, low, high, 0.0, gained >= -ROUNDING)
        )
    return found


def numbers(files: Sequence[Rows]) -> dict[str, str]:
    """Counting by the number asked for: right of pictures, of all files together."""
    found: dict[str, list[int]] = {}
    for rows in files:
        for number, entry in rows["counting"]["numbers"].items():
            own = found.setdefault(number, [0, 0])
            own[0] += entry["score"]
            own[1] += entry["pictures"]
    return {number: f"{right}/{of}" for number, (right, of) in sorted(found.items())}


def read(paths: Sequence[Path]) -> dict[str, dict[str, list[Rows]]]:
    """Files of mini-bench -> size -> guidance -> rows of each. Errors: ValueError naming a file that is none."""
    found: dict[str, dict[str, list[Rows]]] = {}
    for path in paths:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            side = values["settings"]["side"]
            sizes = values.get("sizes") or {f"{side}x{side}": values}
            for size, own in sizes.items():
                for guidance, rows in own["guidance"].items():
                    found.setdefault(size, {}).setdefault(guidance, []).append(rows)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no scores of mini-bench: {error!r}") from None
    return found


def line(gain: Gain) -> str:
    goal = (
        ""
        if gain.goal is None
        else f"  asked {gain.goal:+.2f}: {'not told' if gain.met is None else 'met' if gain.met else 'not met'}"
    )
    around = "" if gain.low is None else f" [{gain.low:+.2f}, {gain.high:+.2f}]"
    return f"{gain.size:9s} {gain.what:11s} g {gain.guidance}  {gain.base:.3f} -> {gain.rl:.3f}  {gain.gained:+.2f}{around}{goal}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, nargs="+", required=True, metavar="FILE", help="scores.json of the base")
    parser.add_argument("--rl", type=Path, nargs="+", required=True, metavar="FILE", help="of RL; several are seeds")
    parser.add_argument("--floor", type=float, help="mean distance of true renders through the VAE")
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")


def run(options: argparse.Namespace) -> int:
    base, rl = read(options.base), read(options.rl)
    sizes = [size for size in base if size in rl]
    if not sizes:
        raise ValueError(f"rl-gain: no size in common: {', '.join(base)} and {', '.join(rl)}")
    found = [gain for size in sizes for gain in gains(base[size], rl[size], size, options.floor)]
    counted = {}
    for size in sizes:
        for guidance in [g for g in base[size] if g in rl[size]]:
            both = {name: numbers(scores[size][guidance]) for name, scores in (("base", base), ("rl", rl))}
            counted[f"{size} g {guidance}"] = both
    for gain in found:
        print(line(gain))
    for name, both in counted.items():
        print(
            f"counting {name}: " + ", ".join(f"{n}: {both['base'].get(n, '-')} -> {v}" for n, v in both["rl"].items())
        )
    if options.out is not None:
        rows = [{k: None if v != v else v for k, v in asdict(gain).items()} for gain in found]
        content = {"files": len(options.rl), "floor": options.floor, "gains": rows, "counting": counted}
        write_text(options.out, json.dumps(content, indent=1) + "\n")
    return 0
