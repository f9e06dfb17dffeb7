"""Processes that prepare data ahead of a training: to stop is the training's alone, and they end with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

import torch


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Processes started inside never see SIGINT or SIGTERM, which a terminal or a scheduler sends to the whole group.

    They inherit that both are blocked: to stop is the training's alone, which saves first. Pools start their workers at
    `submit`. The tracker of shared memory comes first: multiprocessing unblocks both once it has started it.
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker() -> None:
    """A worker computes on one thread, and ends with the training, however that ends."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"

    def end_with_parent() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
