"""How many CPU threads a model runs on, and what a fork leaves of them.

Libraries split a GEMM or a convolution by the number of threads, and sums that are split otherwise have other last bits.
A small model runs on one thread: threads meet at every operation, of which each takes microseconds here, so more bring
nothing, and where the cores are busy each meeting waits for the scheduler (measured: 100 times slower). Its images thus
do not depend on the number of threads. A larger model runs on as many as torch is set to; recipes say how many.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

from lens import notices

SMALL_WIDTH = 256  # of activations, up to which one thread is enough

_lock = threading.Lock()
_inside = threading.local()
_users = 0  # threads within `one_thread`
_number = 1  # what torch was set to before the first of them
_parallel = False  # whether this process has run a model on several threads
_forked = False


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch's CPU work of the block on one thread; the number of before returns with its end. Threads may share it."""
    global _users, _number
    if getattr(_inside, "active", False):
        yield
        return
    with _lock:
        if _users == 0:
            _number = torch.get_num_threads()
        _users += 1
    _inside.active = True
    try:
        torch.set_num_threads(1)
        yield
    finally:
        _inside.active = False
        with _lock:
            _users -= 1
            torch.set_num_threads(_number)


@contextlib.contextmanager
def threads_for(width: int, device: torch.device) -> Iterator[None]:
    """The threads for a model of this width on a CPU; on other devices what torch is set to."""
    global _parallel, _forked
    if device.type == "cpu" and width <= SMALL_WIDTH:
        with one_thread():
            yield
        return
    if _forked:
        _forked = False
        notices.warn(
            "this process was forked from one that had drawn: OpenMP's threads do not survive a fork, so one is used; "
            "start workers with multiprocessing's 'spawn' or load the pipeline in each"
        )
    _parallel = _parallel or torch.get_num_threads() > 1
    yield


def number_for(width: int, device: torch.device) -> int:
    """How many threads `threads_for` gives."""
    return 1 if device.type == "cpu" and width <= SMALL_WIDTH else torch.get_num_threads()


def _after_fork() -> None:
    """A child waits for ever for threads that its parent had: with one thread there are none to wait for."""
    global _forked, _lock, _users
    _lock, _users = threading.Lock(), 0
    if _parallel and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        _forked = True


os.register_at_fork(after_in_child=_after_fork)
