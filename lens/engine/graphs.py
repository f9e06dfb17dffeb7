"""Captured steps: one CUDA graph per shape of a step, replayed once per step, kept while they fit a byte budget.

`Driver` is the only CUDA here; what the cache does with it is plain Python. A graph's memory between its nodes is the
preallocated workspace of its step: all graphs take it from one pool, because they never run at the same time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

S = TypeVar("S")


@contextmanager
def marked(name: str) -> Iterator[None]:
    """A named range for the profilers (NVTX), where there is a device that can be profiled."""
    if not torch.cuda.is_initialized():
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


class Graph(Protocol):
    """What a captured step offers."""

    bytes: int  # the memory it added to the pool

    def replay(self) -> None: ...


class Driver(Protocol):
    """How a step is captured."""

    def capture(self, step: Callable[[], None]) -> Graph:
        """Run ``step`` at least once as it is, then record it without running it."""
        ...


class CudaGraph:
    """One captured step on the current stream's device."""

    def __init__(self, graph: torch.cuda.CUDAGraph, size: int):
        self._graph = graph
        self.bytes = size

    def replay(self) -> None:
        self._graph.replay()


class CudaDriver:
    """Captures on a stream of its own on the model's device, which need not be the current one, into one pool."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device  # None: the current one
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()

    def capture(self, step: Callable[[], None]) -> Graph:
        with torch.cuda.device(self._device):
            return self._capture(step)

    def _capture(self, step: Callable[[], None]) -> Graph:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()  # loads kernels and library handles, which a capture forbids
        self._stream.synchronize()
        torch.cuda.empty_cache()  # as the capture itself begins: what it reserves is then the graph's
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved()
        # thread_local: another thread may decode a picture meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        return CudaGraph(graph, max(0, torch.cuda.memory_reserved() - before))


@dataclass
class Entry(Generic[S]):
    """A captured step and the buffers it reads and writes."""

    state: S
    graph: Graph
    bytes: int


class GraphCache(Generic[S]):
    """Captured steps by key, least recently used first; beyond ``budget`` bytes the oldest go. The latest stays.

    One run at a time: a run that finds the cache claimed runs its steps without a graph, to the same bits.
    """

    def __init__(self, driver: Driver, budget: int, device: torch.device | None = None):
        self.driver = driver
        self.device = device  # of CUDA, where runs may be on different streams
        self.budget = budget
        self._entries: OrderedDict[Hashable, Entry[S]] = OrderedDict()
        self._claim = threading.Lock()
        self._last: torch.cuda.Event | None = None  # the end of the last run, on whatever stream it was

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Held by all entries: buffers and workspace."""
        return sum(entry.bytes for entry in self._entries.values())

    def claim(self) -> bool:
        """Take the cache for one run; False where another run has it. Give it back with ``release``."""
        if not self._claim.acquire(blocking=False):
            return False
        if self._last is not None:  # the host is done with that run, but its stream may still be at work on the buffers
            torch.cuda.current_stream(self.device).wait_event(self._last)
        return True

    def release(self) -> None:
        if self.device is not None:
            self._last = torch.cuda.current_stream(self.device).record_event()
        self._claim.release()

    def find(self, key: Hashable) -> Entry[S] | None:
        """The entry of ``key``, which becomes the latest used."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def add(self, key: Hashable, state: S, size: int, step: Callable[[], None]) -> Entry[S]:
        """Capture ``step`` over ``state``, buffers of ``size`` bytes. Where memory runs out, all others go first."""
        try:
            graph = self.driver.capture(step)
        except torch.OutOfMemoryError:
            if not self._entries:
                raise
            self._entries.clear()
            torch.cuda.empty_cache()
            graph = self.driver.capture(step)
        entry = self._entries[key] = Entry(state, graph, size + graph.bytes)
        while len(self._entries) > 1 and self.bytes > self.budget:
            self._entries.popitem(last=False)
        return entry

    def keep(self, wanted: Callable[[Hashable], bool]) -> None:
        """Drop the entries whose key is not wanted any more."""
        for key in [k for k in self._entries if not wanted(k)]:
            del self._entries[key]

    def clear(self) -> None:
        """Drop every graph, for the memory; waits for no run in progress, so only its owner calls it."""
        self._entries.clear()
