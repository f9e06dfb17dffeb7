"""Decode overlap: one batch is decoded while the next is denoised, and noise drawn while a prompt is encoded.

A lane takes a function and returns a pending result. On CUDA the function's kernels are queued on a side stream and the
host goes on, or the host's work runs on a thread; elsewhere the function runs at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")
Latents = TypeVar("Latents")
Out = TypeVar("Out")
Out_co = TypeVar("Out_co", covariant=True)


class Pending(Protocol[Out_co]):
    def result(self) -> Out_co:
        """Wait for the work and take what it made."""
        ...


class Lane(Protocol):
    def submit(self, work: Callable[[], Out], reads: Sequence[Tensor]) -> Pending[Out]:
        """Begin ``work`` after all that was begun before; ``reads`` must stay as they are until its result is taken."""
        ...


class Done(Generic[Out]):
    """The result of work that ran at once."""

    def __init__(self, value: Out):
        self._value = value

    def result(self) -> Out:
        return self._value


class Inline:
    """No second stream: work runs when it is submitted."""

    def submit(self, work: Callable[[], Out], reads: Sequence[Tensor]) -> Pending[Out]:
        return Done(work())


class _Queued(Generic[Out]):
    def __init__(self, value: Out, event: torch.cuda.Event):
        self._value = value
        self._event = event

    def result(self) -> Out:
        self._event.synchronize()
        return self._value


class SideStream:
    """A CUDA stream beside the caller's. What the work makes lives in that stream's memory until it is taken."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def submit(self, work: Callable[[], Out], reads: Sequence[Tensor]) -> Pending[Out]:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for tensor in reads:
            tensor.record_stream(self._stream)  # its memory is not handed out again before the work has read it
        with torch.cuda.stream(self._stream):
            value = work()
            event = torch.cuda.Event()
            event.record(self._stream)
        return _Queued(value, event)


class HostThread:
    """A thread for work of the host in which torch lets other threads run."""

    def submit(self, work: Callable[[], Out], reads: Sequence[Tensor]) -> Pending[Out]:
        future: Future[Out] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)  # raised where the result is taken

        threading.Thread(target=run, daemon=True).start()
        return future


def host_lane_for(device: torch.device) -> Lane:
    """Where the host has a device to keep busy meanwhile; without one a thread would only take turns."""
    return HostThread() if device.type == "cuda" else Inline()


def lane_for(device: torch.device) -> Lane:
    return SideStream(device) if device.type == "cuda" else Inline()


def overlapped(
    batches: Iterable[Batch],
    denoise: Callable[[Batch], Latents],
    decode: Callable[[Batch, Latents], Out],
    tensors: Callable[[Latents], Sequence[Tensor]],
    lane: Lane,
) -> Iterator[tuple[Batch, Out]]:
    """(batch, what ``decode`` made of it) in order. Batch k is decoded on the lane while batch k + 1 is denoised.

    ``denoise`` must return tensors of its own, not buffers that its next call writes. At most two batches are alive.
    """
    waiting: tuple[Batch, Pending[Out]] | None = None
    for batch in batches:
        latents = denoise(batch)
        pending = lane.submit(lambda batch=batch, latents=latents: decode(batch, latents), tensors(latents))  # type: ignore[misc]
        if waiting is not None:
            yield waiting[0], waiting[1].result()
        waiting = batch, pending
    if waiting is not None:
        yield waiting[0], waiting[1].result()
