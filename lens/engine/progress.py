"""Progress of a call from Python: a line on stderr, where that is a terminal and two seconds have passed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

DELAY = 2.0  # seconds, before which nothing is shown


def counted_steps(steps: int, shown: bool) -> Iterator[int]:
    """0 .. steps - 1, each counted on one line that is wiped at the end."""
    stream = sys.stderr
    if not shown or stream is None or not stream.isatty():
        yield from range(steps)
        return
    began, wrote = time.monotonic(), False
    try:
        for step in range(steps):
            yield step
            seconds = time.monotonic() - began
            if seconds > DELAY and step + 1 < steps:
                left = seconds / (step + 1) * (steps - step - 1)
                stream.write(f"\r\033[Kdrawing: step {step + 1}/{steps}, {left:.0f} s left")
                stream.flush()
                wrote = True
    finally:
        if wrote:
            stream.write("\r\033[K")
            stream.flush()
