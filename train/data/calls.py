"""Many slow calls at once, their results in order: for stages that wait for a server, a few images in memory at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """(job, function(job)), as jobs come; `workers` threads, and never more than twice as many jobs begun and not yet taken.

    An exception of a job, or of the caller, ends it: jobs that have not begun are dropped, those under way are waited for.
    """
    pool, waiting = ThreadPoolExecutor(max(1, workers)), deque[tuple[Job, Future[Result]]]()
    try:
        for job in jobs:
            waiting.append((job, pool.submit(function, job)))
            if len(waiting) >= 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
