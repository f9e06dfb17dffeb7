"""How a command ends whose output nobody reads any more, as in `lens generate ... | head -1`: of lens, train and bench."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TextIO

UNREAD = 128 + signal.SIGPIPE  # 141: what a shell says of a program that this signal ended


def unread_output_ends(command: Callable[[], int]) -> int:
    """The command's exit code; where it wrote to a pipe without a reader, UNREAD and no word, as other programs end there.

    Python ignores SIGPIPE, without which a server that hangs up would end a training; so a write fails instead.
    """
    try:
        try:
            return command()
        finally:
            if sys.stdout is not None:  # closed from the start: `>&-`
                sys.stdout.flush()  # here, not in the interpreter's last moments
    except BrokenPipeError:
        if not any(map(_unread, (sys.stdout, sys.stderr))):
            raise  # another pipe: a worker's or a server's
    except SystemExit as error:  # how Typer and rich end on one, each with a code of its own
        if not isinstance(error.__context__, BrokenPipeError):
            raise
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and _unread(stream):
            os.dup2(nowhere, stream.fileno())  # for what is left in the buffer
    return UNREAD


def _unread(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe whose reader is gone."""
    if stream is None:
        return False
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
