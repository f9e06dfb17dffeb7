"""Work in fixed blocks, each done by one thread: its bits do not depend on how many threads there are.

Libraries choose how they split a GEMM or a convolution, and so the order of its sums, by the number of threads that they
may use (docs/log.md has figures). Here they may use one, and the threads share out blocks that the shapes alone decide.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from .threads import one_thread

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def each(blocks: Sequence[Callable[[], None]]) -> None:
    """Run every block, on as many threads as torch is set to; returns when all are done. Blocks must not overlap in what
    they write. The first error in their order is raised."""
    threads = torch.get_num_threads()
    if threads == 1 or len(blocks) == 1:
        with one_thread():
            for block in blocks:
                block()
        return
    pool = _pool(threads)
    for pending in [pool.submit(_without_gradients, block) for block in blocks]:
        pending.result()


def _without_gradients(block: Callable[[], None]) -> None:
    with torch.no_grad():  # a state of each thread
        block()


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one thread each. Kept, as the libraries keep theirs."""
    with _lock:
        if threads not in _pools:
            pool = ThreadPoolExecutor(threads, thread_name_prefix="lens-block")
            ready = threading.Barrier(threads + 1)

            def prepare() -> None:
                torch.set_num_threads(1)
                ready.wait()

            for _ in range(threads):
                pool.submit(prepare)
            ready.wait()
            torch.set_num_threads(threads)  # what threads to come begin with; those of the pool keep theirs
            _pools[threads] = pool
        return _pools[threads]


def _after_fork() -> None:
    """A child has none of its parent's threads."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_after_fork)
