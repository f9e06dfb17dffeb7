"""One JSON object per line, appended and flushed, and a short line on the terminal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class JsonLog:
    """`log(step=10, loss=.5)` appends {"time": seconds since the epoch, ...} to `path` and prints it."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        cut = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        self.file = open(path, "a")  # noqa: SIM115 (open for the life of the run)
        if cut:  # a killed run's last line: what follows starts a line of its own
            self.file.write("\n")

    def __call__(self, **values: float | int | str) -> None:
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        self.file.write(json.dumps({"time": round(time.time(), 1), **rounded}) + "\n")
        self.file.flush()
        print("  ".join(f"{k} {v}" for k, v in rounded.items()), file=sys.stderr, flush=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a log in order. A line cut by a kill is left out."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # no JSON, or bytes that are no text
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
