"""Ctrl-C held back while several things must change together or not at all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_back() -> Iterator[Callable[[], None]]:
    """Within the block SIGINT raises nothing by itself; the function it gives raises what was held back.

    Call that where the work may still be undone. One that comes later is raised behind the block, which has then done
    all of its work. Signals reach the main thread alone, and other threads have nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before, came = signal.getsignal(signal.SIGINT), list[tuple[int, Any]]()

    def answer() -> None:
        if came and callable(before):
            number, frame = came.pop()
            came.clear()
            before(number, frame)

    if not callable(before):  # SIG_IGN, SIG_DFL, or a handler that was not set from Python
        yield answer
        return
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield answer
    finally:
        signal.signal(signal.SIGINT, before)
        answer()
