"""Two results -> verdicts. Pure: no clock, no device.

A case is slower where best_after / best_before > 1 + max(2 %, band). The best of all rounds counts, for a machine can
only add time. The band is measured: every subject is timed twice in one run, and the larger difference of the two
results' pairs is what this machine cannot tell from a change.
"""

from __future__ import annotations

from dataclasses import dataclass

from .case import OURS
from .machine import Incomparable, refuse_unlike
from .result import Result

LEAST = 0.02


@dataclass(frozen=True)
class Verdict:
    case: str
    subject: str
    before: float
    after: float
    band: float  # of both results, the larger

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def limit(self) -> float:
        """The largest ratio that passes."""
        return 1 + max(LEAST, self.band)

    @property
    def slower(self) -> bool:
        return self.ratio > self.limit


def compare(before: Result, after: Result, subjects: tuple[str, ...] | None = None) -> list[Verdict]:
    """A verdict for every case and subject that both results hold; Incomparable for unlike cards or nothing in common.

    subjects: only these; by default ours, see `judged`.
    """
    refuse_unlike(before.identity, after.identity)
    verdicts = []
    for key, row in after.rows.items():
        if judged(key[1], subjects) and key in before.rows:
            was = before.rows[key]
            verdicts.append(Verdict(*key, was.best, row.best, max(was.band, row.band)))
    if not verdicts and not lost(before, after, subjects):
        raise Incomparable("no case with a common subject is in both results")
    return verdicts


@dataclass(frozen=True)
class Lost:
    """A subject that has a time in the first result, was asked for in the second and has none there."""

    case: str
    subject: str
    reason: str
    judged: bool

    def __str__(self) -> str:
        return f"{'LOST' if self.judged else 'lost':6}  {self.case} [{self.subject}]  it ran before: {self.reason}"


def judged(subject: str, subjects: tuple[str, ...] | None) -> bool:
    """Whether a verdict on the subject counts; by default ours and what begins with it, for comparators are judged by
    nobody."""
    return subject.startswith(OURS) if subjects is None else subject in subjects


def lost(before: Result, after: Result, subjects: tuple[str, ...] | None = None) -> list[Lost]:
    """Every subject that vanished: failed, left out, no longer offered, or not reached by a run that was cut off."""
    asked, gone = after.bench["asked"], []
    for case, subject in before.rows:
        wanted = case in asked["cases"] and (asked["subjects"] is None or subject in asked["subjects"])
        if wanted and (case, subject) not in after.rows:
            reasons = after.bench["failed"].get(case, {}) | after.bench["left_out"].get(case, {})
            gone.append(
                Lost(case, subject, reasons.get(subject, "not reached, or no longer there"), judged(subject, subjects))
            )
    return gone


def sight(verdicts: list[Verdict]) -> str:
    """How small a regression this pair of results can see."""
    if not verdicts:
        return "no subject is left to compare"
    limits = sorted(v.limit - 1 for v in verdicts)
    middle, worst = limits[len(limits) // 2], limits[-1]
    blind = sum(limit > 0.1 for limit in limits)
    text = f"regressions above {middle:.1%} show in half of the cases, above {worst:.1%} in all"
    if blind:
        text += f"; {blind} of {len(limits)} cases hide 10 % or more: this machine is shared or unsteady, run it again alone"
    return text


def lines(verdicts: list[Verdict]) -> list[str]:
    """One line per verdict."""
    out = []
    for v in verdicts:
        mark = "SLOWER" if v.slower else "ok"
        times = f"{1e3 * v.before:.4g} -> {1e3 * v.after:.4g} ms"
        out.append(f"{mark:6}  {v.case} [{v.subject}]  {times}  x{v.ratio:.3f} (up to x{v.limit:.3f} passes)")
    return out
