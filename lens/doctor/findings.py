"""The doctor's findings, and their report as text or JSON.

A finding is "ok", "note" (works, but could be better or is absent by choice) or "broken"; its remedy, where there is
one, is a command or a sentence that changes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .. import __version__

OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Finding:
    section: str
    name: str
    status: str
    detail: str
    remedy: str = ""


def broken(findings: Sequence[Finding]) -> bool:
    return any(f.status == BROKEN for f in findings)


def as_json(findings: Sequence[Finding]) -> str:
    status = BROKEN if broken(findings) else OK
    return json.dumps({"status": status, "version": __version__, "findings": [asdict(f) for f in findings]}, indent=2)


def as_text(findings: Sequence[Finding]) -> str:
    marks = {OK: "ok    ", NOTE: "note  ", BROKEN: "BROKEN"}
    width = max(len(f.name) for f in findings)
    lines: list[str] = []
    section = ""
    for f in findings:
        if f.section != section:
            section = f.section
            lines += ["", section] if lines else [section]
        lines.append(f"  {marks[f.status]}  {f.name:<{width}}  {f.detail}")
        if f.remedy:
            lines.append(f"          {'':<{width}}  -> {f.remedy}")
    failures = [f.name for f in findings if f.status == BROKEN]
    verdict = f"broken: {', '.join(failures)}" if failures else "everything that is here works"
    return "\n".join([*lines, "", verdict])
