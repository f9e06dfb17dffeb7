"""When a training ends before its last step: by the clock, by a signal, by what the machine refuses."""

from __future__ import annotations

import errno
import re
import signal
import time

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Interrupted(RuntimeError):
    """What ends a training and is neither a mistake nor a bug: lost shards, a full disk, a killed process. One line says it."""


def duration(text: str) -> float:
    """ "90s", "9m", "1.5h" or plain seconds -> seconds. Errors: ValueError naming the text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise ValueError(f"duration: {text!r}, expected for example 90s, 9m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def positive(text: str) -> int:
    """A whole number of 1 or more. Errors: ValueError naming the text."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1. Errors: ValueError naming the text."""
    if not 0 < (value := float(text)) <= 1:
        raise ValueError(text)
    return value


class Clock:
    """Says when to stop: after `limit` seconds, or at the first SIGTERM or SIGINT. The loop then saves and exits 0."""

    def __init__(self, limit: float | None):
        self.start, self.limit, self.asked = time.monotonic(), limit, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        # whoever started this process may have kept them from it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))

    def _ask(self, *_: object) -> None:
        self.asked = True

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def over(self) -> bool:
        return self.asked or (self.limit is not None and self.elapsed >= self.limit)
