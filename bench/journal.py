"""What is being done, written down before it begins, so that a process that dies or hangs in it leaves the name behind.

A kernel that hangs blocks Python inside the driver, where no signal is heard: a thread that sees the same instruction
of the main thread too long ends the process. Whoever started it starts it again with the same file, and what
the file names is not begun again: the hang has cost one subject. Without LENS_JOURNAL, a path, nothing of this happens.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "LENS_JOURNAL"
STILL, COMPILING = 25.0, 60.0  # seconds at one instruction, a CPU's reference; where torch.compile may be waited for
HUNG = 70  # exit status


class Journal:
    """done: names that ended; lost: the one in which each earlier process ended, and how."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[str] = set()
        self.lost: dict[str, str] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            name, what = json.loads(line)
            if what == "ended":
                self.done.add(name)
                self.lost.pop(name, None)
            else:
                self.lost[name] = "the process ended while it ran" if what == "began" else what

    def write(self, name: str, what: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([name, what]) + "\n")


def _opened() -> Journal | None:
    path = os.environ.get(VARIABLE)
    return Journal(Path(path)) if path else None


journal = _opened()
_errors = os.fdopen(os.dup(2), "w") if journal is not None else sys.stderr  # pytest takes the descriptor itself
_at: list[str] = []  # what is being done, outermost first


def subject(case: str, name: str) -> str:
    """What the journal calls one subject of a case; a case alone is all of them, in turns."""
    return f"{case} [{name}]"


@contextlib.contextmanager
def doing(name: str) -> Iterator[None]:
    """Keep the name in the journal while the block runs; an exception ends it like any end."""
    if journal is None:
        yield
        return
    journal.write(name, "began")
    _at.append(name)
    try:
        yield
    finally:
        _at.pop()
        journal.write(name, "ended")


def say(line: str) -> None:
    """A line past whatever captures output."""
    print(line, file=_errors, flush=True)


def leave_broken(name: str) -> None:
    """After an error in `name`: end the process where its device answers no more, for every later call would fail."""
    if journal is None or not (why := device_error()):
        return
    journal.write(name, f"broke the device's context: {why}")
    say(f"LOST {name}: the device answers no more: {why}")
    os._exit(HUNG)


def device_error() -> str:
    """The error of a CUDA context that no call gets through any more, or ""."""
    torch = sys.modules.get("torch")  # not imported: no context
    if torch is None or not torch.cuda.is_available():
        return ""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def watch(still: float = STILL) -> None:
    """From now on a main thread that stands still in `doing` ends the process with HUNG; without a journal, nothing.

    LENS_STILL: other seconds.
    """
    if journal is not None:
        still = float(os.environ.get("LENS_STILL", still))
        threading.Thread(target=_watch, args=(journal, still), daemon=True).start()


def _watch(journal: Journal, still: float) -> None:
    main, last, since = threading.main_thread().ident, None, time.monotonic()
    while True:
        # where a call holds the interpreter's lock and this thread is never run, the C thread of faulthandler ends it
        faulthandler.dump_traceback_later(2 * still, exit=True, file=_errors)
        time.sleep(still / 20)
        frame = sys._current_frames().get(main or 0)
        now = (id(frame), frame.f_lasti, tuple(_at)) if frame else None
        if now != last or not _at:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > still:
            journal.write(_at[-1], f"hung: at one place for {still:.0f} s")
            say(f"LOST {_at[-1]}: hung, at one place for {still:.0f} s")
            faulthandler.dump_traceback(file=_errors)
            os._exit(HUNG)
