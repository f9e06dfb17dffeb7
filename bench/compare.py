"""Two results -> verdict. Pure: no clock, no device."""

from __future__ import annotations

from typing import Any


class Incomparable(ValueError):
    """Results of different machines or settings: refused, not failed."""


def compare(before: dict[str, Any], after: dict[str, Any], tolerance: float) -> list[dict[str, Any]]:
    """Per case in both results, {case, before, after, ratio, slower}: slower where the median grew by more than
    `tolerance` (0.05 is five percent) and by more than the spread, i.e. the new 20th percentile exceeds the old 80th.
    """
    for key in before["card"].keys() | after["card"].keys():
        a, b = before["card"].get(key), after["card"].get(key)
        if a != b:
            raise Incomparable(f"{key} differs: {a!r} and {b!r}")
    old = {row["case"]: row for row in before["rows"]}
    verdicts = []
    for row in after["rows"]:
        if (was := old.get(row["case"])) is not None:
            ratio = row["ms"] / was["ms"]
            slower = ratio > 1 + tolerance and row["p20"] > was["p80"]
            verdicts.append(
                {"case": row["case"], "before": was["ms"], "after": row["ms"], "ratio": ratio, "slower": slower}
            )
    if not verdicts:
        raise Incomparable("no case is in both results")
    return verdicts


def markdown(result: dict[str, Any]) -> str:
    """A result as a table, its conditions in the line above."""
    c = result["card"]
    lines = [
        f"{c['device']}, {c['threads']} threads, {c['isa']}, torch {c['torch']}, lens {result['lens']} at "
        f"{result['commit']}; memory copy {result['copy_gb_per_s']} GB/s",
        "",
        "| case | ms (p20 to p80) | eager ms | speed-up | of memory roof |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        eager = f"{row['eager_ms']:.4g} | {row['speedup']:.2f}" if "eager_ms" in row else " | "
        roof = f"{row['roof']:.0%}" if "roof" in row else ""
        lines.append(f"| {row['case']} | {row['ms']:.4g} ({row['p20']:.4g} to {row['p80']:.4g}) | {eager} | {roof} |")
    return "\n".join(lines)
