"""One launch of one subject, found easily by a profiler: `bench run --case X --profile`, `--trace FILE`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lens.formats.files import write_atomic

from .case import Case, Disagreement
from .measure import compare_results
from .timing import clock_of

WARM_UPS = 3


@contextmanager
def cuda_marks(name: str) -> Iterator[None]:
    """cudaProfilerStart and Stop around an NVTX range: `ncu --profile-from-start off` sees only what is inside."""
    torch.cuda.profiler.start()
    torch.cuda.nvtx.range_push(name)
    try:
        yield
        torch.cuda.synchronize()
    finally:
        torch.cuda.nvtx.range_pop()
        torch.cuda.profiler.stop()


def prepared(case: Case, subject: str, device: torch.device) -> Any:
    """The launcher of a subject, compared with the oracle and warm; ValueError for a subject the case cannot run."""
    work = case.prepare(device)
    if subject not in work.subjects:
        reason = work.left_out.get(subject, f"the case has {', '.join(work.subjects)}")
        raise ValueError(f"{case.id}: no subject {subject!r} here: {reason}")
    clock = clock_of(device)
    launchers, _ = compare_results(case, work, clock, (subject,))
    if subject in work.failed:
        raise Disagreement(f"{case.id}: {subject} has failed: {work.failed[subject]}")
    if subject not in launchers:
        raise ValueError(f"{case.id}: {subject} cannot run here: {work.left_out[subject]}")
    launcher = launchers[subject]
    if restore := work.subjects[subject].restore:
        restore()
    for _ in range(WARM_UPS):
        launcher.round()
    return launcher


def one_launch(launcher: Any, name: str, marks: Any = cuda_marks) -> None:
    """Exactly one call of the subject inside the marks, on the first inputs; a graph subject is called, not replayed,
    so that the profiler sees its kernels by name."""
    with marks(name), torch.set_grad_enabled(launcher.subject.grad):
        launcher.subject.call(*launcher.inputs[0])


def traced(launcher: Any, name: str, file: Path | None) -> str:
    """One call under the torch profiler: its table of the slowest, and a trace for chrome://tracing or Perfetto."""
    from torch.profiler import ProfilerActivity, profile, record_function

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    with profile(activities=activities) as profiler, record_function(name):
        with torch.set_grad_enabled(launcher.subject.grad):
            launcher.subject.call(*launcher.inputs[0])
        if gpu:
            torch.cuda.synchronize()
    if file is not None:
        write_atomic(file, lambda path: profiler.export_chrome_trace(str(path)))
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
