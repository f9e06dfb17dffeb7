"""Two results -> verdicts. Pure: no clock, no device.

A case is slower where best_after / best_before > 1 + max(2 %, band). The best of all rounds counts, for a machine can
only add time. The band is measured: every subject is timed twice in one run, and the larger difference of the two
results' pairs is what this machine cannot tell from a change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    subjects: only these; by default ours and what begins with it, for comparators are judged by nobody.
    """
    refuse_unlike(before.identity, after.identity)
    verdicts = []
    for key, row in after.rows.items():
        wanted = key[1].startswith(OURS) if subjects is None else key[1] in subjects
        if wanted and key in before.rows:
            was = before.rows[key]
            verdicts.append(Verdict(*key, was.best, row.best, max(was.band, row.band)))
    if not verdicts:
        raise Incomparable("no case with a common subject is in both results")
    return verdicts


def lost(before: Result, after: Result) -> list[str]:
    """Cases of ours that ran before and now failed or were left out: not slower, but gone."""
    gone: dict[str, Any] = {**after.bench.get("left_out", {}), **after.bench.get("failed", {})}
    return [
        case for case, subject in before.rows if subject == OURS and (case, subject) not in after.rows and case in gone
    ]


def sight(verdicts: list[Verdict]) -> str:
    """How small a regression this pair of results can see."""
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
