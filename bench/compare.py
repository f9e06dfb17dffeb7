"""Runs of two builds -> verdicts. Pure: no clock, no device.

A run's time is its best round, for a machine can only add time. The units that are compared are whole runs, each in a
process of its own and in turns (`bench.abba`): memory layout, clocks and neighbours differ between two runs of one build
by more than between two rounds of one run.

For a case with times a_1..a_n before and b_1..b_m after, the estimate is the median of all ratios b_j / a_i and the
interval lies between two of them, by the exact distribution of the Mann-Whitney statistic (Hodges and Lehmann). Over all
cases together it holds with CONFIDENCE: each gets (1 - CONFIDENCE) / cases. Then

    SLOWER, FASTER    the estimate is more than TOLERANCE away from 1, and the interval does not hold 1
    alike             the interval lies within TOLERANCE of 1, or the estimate does and the interval does not hold 1
    inconclusive      the interval holds 1 and a change beyond TOLERANCE: the spread of the runs hides what is asked

One run a side has no spread between runs. On a GPU, which measures with a clock of its own, its two passes stand in
for runs; on a CPU, where the same build measured twice differs by up to tens of per cent, every case is inconclusive.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .case import OURS
from .machine import Incomparable, refuse_unlike
from .result import Result

TOLERANCE = 0.02
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Verdict:
    """A case and subject of both sides: seconds (the best of each side), ratio after / before, and its interval."""

    case: str
    subject: str
    before: float
    after: float
    ratio: float
    low: float  # 0 and infinity where there are too few runs for an interval
    high: float

    @property
    def word(self) -> str:
        apart = not self.low <= 1 <= self.high
        if apart and self.ratio > 1 + TOLERANCE:
            return "SLOWER"
        if apart and self.ratio < 1 / (1 + TOLERANCE):
            return "FASTER"
        within = self.low >= 1 / (1 + TOLERANCE) and self.high <= 1 + TOLERANCE
        return "alike" if apart or within else "inconclusive"

    def __str__(self) -> str:
        spread = f"x{self.low:.3f} .. {self.high:.3f}" if self.high < math.inf else "too few runs"
        times = f"{1e3 * self.before:.4g} -> {1e3 * self.after:.4g} ms"
        return f"{self.word:12}  {self.case} [{self.subject}]  {times}  x{self.ratio:.3f} ({spread})"


@functools.cache
def mann_whitney(n: int, m: int) -> tuple[float, ...]:
    """P(U <= k) for k = 0 .. n m, of n and m draws from one distribution without ties."""
    counts = {(i, j): [1] for i in range(n + 1) for j in range(m + 1) if i == 0 or j == 0}
    for i in range(1, n + 1):
        for j in range(1, m + 1):  # the largest of all is one of the i, above all j, or one of the j
            first, second = counts[i - 1, j], counts[i, j - 1]
            counts[i, j] = [
                (first[k - j] if 0 <= k - j < len(first) else 0) + (second[k] if k < len(second) else 0)
                for k in range(i * j + 1)
            ]
    total = math.comb(n + m, n)
    return tuple(below / total for below in itertools.accumulate(counts[n, m]))


def interval(before: Sequence[float], after: Sequence[float], alpha: float) -> tuple[float, float, float]:
    """(estimate, low, high) of after / before, which the interval misses with a probability of at most alpha.

    (estimate, 0, infinity) where so few times cannot be so sure."""
    ratios = sorted(b / a for a in before for b in after)
    estimate = statistics.median(ratios)
    inner = -1
    for k, share in enumerate(mann_whitney(len(before), len(after))):
        if 2 * share > alpha:
            break
        inner = k
    if inner < 0:
        return estimate, 0.0, math.inf
    return estimate, ratios[inner], ratios[-1 - inner]


def runs_needed(cases: int) -> int:
    """Runs of each side from which so many cases have an interval."""
    n = 2
    while 2 / math.comb(2 * n, n) > (1 - CONFIDENCE) / max(cases, 1):
        n += 1
    return n


def times(results: Sequence[Result], key: tuple[str, str]) -> list[float]:
    """Best of every run; of a single run on a GPU, best of each pass."""
    found = [result.rows[key] for result in results if key in result.rows]
    if len(results) == 1 and found and results[0].identity.get("multiprocessors"):
        return [found[0].best, found[0].best * (1 + found[0].band)]
    return [row.best for row in found]


def compare(
    before: Sequence[Result], after: Sequence[Result], subjects: tuple[str, ...] | None = None
) -> list[Verdict]:
    """A verdict for every case and subject that both sides hold; Incomparable for unlike cards or nothing in common.

    before, after: the runs of either build. subjects: only these; by default ours, see `judged`.
    """
    for other in (*before[1:], *after):
        refuse_unlike(before[0].identity, other.identity)
    known = {key for result in before for key in result.rows}
    keys = [k for k in dict.fromkeys(k for r in after for k in r.rows) if judged(k[1], subjects) and k in known]
    verdicts = []
    for key in keys:
        a, b = times(before, key), times(after, key)
        if len(before) == len(after) == 1:
            pairs = [y / x for x in a for y in b]
            low, high = (min(pairs), max(pairs)) if len(a) > 1 else (0.0, math.inf)
            verdicts.append(Verdict(*key, min(a), min(b), min(b) / min(a), low, high))
        else:
            verdicts.append(Verdict(*key, min(a), min(b), *interval(a, b, (1 - CONFIDENCE) / len(keys))))
    if not verdicts and not lost(before, after, subjects):
        raise Incomparable("no case with a common subject is in both results")
    return verdicts


@dataclass(frozen=True)
class Lost:
    """A subject that has a time before, was asked for after and has none there."""

    case: str
    subject: str
    reason: str
    judged: bool

    def __str__(self) -> str:
        return f"{'LOST' if self.judged else 'lost':12}  {self.case} [{self.subject}]  it ran before: {self.reason}"


def judged(subject: str, subjects: tuple[str, ...] | None) -> bool:
    """Whether a verdict on the subject counts; by default ours and what begins with it: comparators are not judged."""
    return subject.startswith(OURS) if subjects is None else subject in subjects


def lost(before: Sequence[Result], after: Sequence[Result], subjects: tuple[str, ...] | None = None) -> list[Lost]:
    """Every subject that vanished: failed, left out, no longer offered, or not reached by a run that was cut off."""
    gone: dict[tuple[str, str], Lost] = {}
    for result in after:
        asked = result.bench["asked"]
        for case, subject in dict.fromkeys(key for r in before for key in r.rows):
            wanted = case in asked["cases"] and (asked["subjects"] is None or subject in asked["subjects"])
            if wanted and (case, subject) not in result.rows:
                reasons = result.bench["failed"].get(case, {}) | result.bench["left_out"].get(case, {})
                reason = reasons.get(subject, "not reached, or no longer there")
                gone.setdefault((case, subject), Lost(case, subject, reason, judged(subject, subjects)))
    return list(gone.values())


def summary(verdicts: Sequence[Verdict], runs: int) -> str:
    """How many of each, and what would help where it cannot be told. runs: of the side that has fewer."""
    if not verdicts:
        return "no subject is left to compare"
    words = [v.word for v in verdicts]
    counts = [f"{words.count(w)} {w}" for w in ("SLOWER", "FASTER", "alike", "inconclusive") if w in words]
    text = f"{', '.join(counts)}; changes within {TOLERANCE:.0%} pass"
    if "inconclusive" in words:
        needed = runs_needed(len(verdicts))
        if runs < needed and any(v.high == math.inf for v in verdicts):
            text += f". {runs} run(s) a side: {len(verdicts)} case(s) need {needed} in turns, as python -m bench abba makes them"
        else:
            widest = max(v.high / v.low - 1 for v in verdicts if v.word == "inconclusive")
            text += (
                f". Their runs spread by up to {widest:.0%}: this machine is shared or unsteady, or the rounds are few"
            )
    return text
