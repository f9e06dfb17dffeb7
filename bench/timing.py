"""Time of prepared calls: CUDA events around streams or replayed graphs, perf_counter on a CPU.

A round is one launch: `calls` calls of a subject over inputs that take turns. Subjects take turns too, round by round,
so that warming up, clocks and neighbours fall on all alike; and all of it happens twice, because the difference of the
two passes is what the measurement cannot see (the band of `bench.compare`).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .case import Subject

PASSES = 2
SHORT = 0.5e-3  # seconds a round lasts at least, by repeating calls: events resolve about half a microsecond
LONG = 5e-3  # seconds from which one call is a round
MOST_CALLS = 64
MOST_ROUNDS = 200  # of one subject in one pass


def keep_freed_memory() -> bool:
    """Let glibc reuse what was freed; False where the C library cannot. New pages for every result would cost more than
    the CPU kernels, by luck of the allocator for one subject and not for another."""
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):
        return False


class CpuLauncher:
    """Calls of a subject on the CPU."""

    def __init__(self, subject: Subject, inputs: Sequence[tuple[Any, ...]], clock: CpuClock):
        self.subject, self.inputs, self.turn, self.clock = subject, inputs, 0, clock
        self.host: list[float] = []
        self.calls = 1

    def outputs(self) -> Any:
        """The result for the first inputs."""
        with torch.set_grad_enabled(self.subject.grad):
            return self.subject.call(*self.inputs[0])

    def ready(self) -> None:
        """Nothing to capture here."""

    def round(self) -> float:
        """Seconds of one call."""
        arguments = self.inputs[self.turn % len(self.inputs)]
        self.turn += 1
        with torch.set_grad_enabled(self.subject.grad):
            if self.subject.timed is not None:
                return self.subject.timed(*arguments)
            start = self.clock.now()
            self.subject.call(*arguments)
            return self.clock.now() - start


class CpuClock:
    """Wall time by default; `now` may be another clock, as that of one thread's CPU time, which no neighbour lengthens."""

    l2 = 32 << 20  # what a large cache of a CPU may hold for one core

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now = now

    def launcher(self, subject: Subject, inputs: Sequence[tuple[Any, ...]]) -> CpuLauncher:
        return CpuLauncher(subject, inputs, self)


class CudaLauncher:
    """Calls of a subject on the current CUDA device, as they are or from one captured graph.

    A call longer than LONG moves far more than any cache holds and is alone in its round; shorter ones share a round and
    take turns over all inputs.
    """

    def __init__(self, subject: Subject, inputs: Sequence[tuple[Any, ...]], clock: CudaClock):
        self.subject, self.inputs, self.clock = subject, inputs, clock
        self.graph: torch.cuda.CUDAGraph | None = None
        self.host: list[float] = []  # seconds the host needs to launch one call
        self.calls, self.turn = 1, 0
        self._first: Any = None

    def _call(self, index: int) -> Any:
        with torch.set_grad_enabled(self.subject.grad):
            return self.subject.call(*self.inputs[index % len(self.inputs)])

    def outputs(self) -> Any:
        """The result for the first inputs, by the launch that will be timed: after a replay, where there is a graph."""
        if self.subject.mode != "graph":
            return self._call(0)
        self._capture(1)
        assert self.graph is not None
        self.graph.replay()
        torch.cuda.synchronize()
        return self._first

    def _capture(self, calls: int) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for index in range(min(calls, len(self.inputs))):  # loads kernels and tunes, which a capture does not allow
                self._call(index)
        torch.cuda.current_stream().wait_stream(side)
        self.graph, self._first = None, None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(calls):
                result = self._call(index)
                if index == 0:
                    self._first = result  # stays allocated, so nothing later in the graph overwrites it
                del result
        self.graph, self.calls = graph, calls

    def ready(self) -> None:
        """After the comparison: so many calls a round that events resolve it, a multiple of the inputs."""
        if self.subject.timed is not None:
            return
        one = self._once()
        if one < LONG:
            one = min(one, self._once(), self._once())
            calls = calls_per_round(one, len(self.inputs))
            if self.subject.mode == "graph":
                self._capture(calls)
            self.calls = calls
        self.host.clear()

    def _launch(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for _ in range(self.calls):
            self._call(self.turn)
            self.turn += 1

    def _once(self) -> float:
        self.clock.flush()
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin = time.perf_counter()
        start.record()
        self._launch()
        stop.record()
        self.host.append((time.perf_counter() - begin) / self.calls)
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def round(self) -> float:
        """Seconds of one call on the device."""
        if self.subject.timed is not None:
            torch.cuda.synchronize()
            self.turn += 1
            return self.subject.timed(*self.inputs[(self.turn - 1) % len(self.inputs)])
        return self._once() / self.calls


def calls_per_round(seconds: float, inputs: int) -> int:
    """A multiple of the inputs that lasts SHORT, at most MOST_CALLS or once through the inputs."""
    turns = max(1, round(SHORT / max(seconds, 1e-7) / inputs))
    return inputs * max(1, min(turns, MOST_CALLS // inputs))


class CudaClock:
    """Events on the current stream, the L2 cache overwritten before every round."""

    def __init__(self, device: torch.device):
        size = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or (64 << 20)
        self._scratch = torch.zeros(2 * size, dtype=torch.uint8, device=device)
        self.l2 = size

    def flush(self) -> None:
        self._scratch.bitwise_not_()  # reads and writes all of it

    def launcher(self, subject: Subject, inputs: Sequence[tuple[Any, ...]]) -> CudaLauncher:
        return CudaLauncher(subject, inputs, self)


Clock = CpuClock | CudaClock


def clock_of(device: torch.device) -> Clock:
    """The clock of a device type."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def take_turns(launchers: dict[str, Any], seconds: float, at_least: int) -> dict[str, list[list[float]]]:
    """Seconds of every round of every subject, in `PASSES` passes: {name: [[...], [...]]}.

    A pass lasts `seconds` / PASSES per subject, and at least `at_least` rounds. The launchers are warm.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in launchers}
    for _ in range(PASSES):
        for name in launchers:
            times[name].append([])
        until = time.perf_counter() + seconds * len(launchers) / PASSES
        turns = 0
        while launchers and (turns < at_least or (turns < MOST_ROUNDS and time.perf_counter() < until)):
            for name, launcher in launchers.items():
                times[name][-1].append(launcher.round())
            turns += 1
    return times


def best(passes: Sequence[Sequence[float]]) -> float:
    """The fastest round of all: what the code can do; everything slower is the machine."""
    return min(min(rounds) for rounds in passes)


def band(passes: Sequence[Sequence[float]]) -> float:
    """How far apart two timings of one build lie: (slower best - faster best) / faster best."""
    bests = [min(rounds) for rounds in passes]
    return (max(bests) - min(bests)) / min(bests)
