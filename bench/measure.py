"""One case -> its rows: results compared first, then timed in turns, then set against the ceilings."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch

from . import journal
from .case import OURS, Case, Disagreement, LeftOut, Work, distance, refuse_constant
from .roofline import roof
from .timing import Clock, band, best, clock_of, take_turns

COLD = 2  # inputs of so many L2 caches are not served by it


def compare_results(
    case: Case, work: Work, clock: Clock, wanted: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Launch every wanted subject once, by the launch that will be timed; launchers and errors by name.

    A subject too far from the oracle has failed, and so has ours that cannot run; a comparator that cannot is left out.
    Each with its reason, and the others are timed all the same.
    """
    refuse_constant(work.inputs, case.id)
    refuse_constant(work.data, f"{case.id}: weights")
    oracle = work.oracle(*work.inputs[0])
    launchers: dict[str, Any] = {}
    errors: dict[str, float] = {}
    for name in [n for n in work.subjects if n in wanted]:
        launcher = clock.launcher(work.subjects[name], work.inputs)
        try:
            with journal.doing(journal.subject(case.id, name)):
                found = work.select(launcher.outputs())
        except Exception as error:  # of whatever kind: the others are timed
            journal.leave_broken(journal.subject(case.id, name))
            _cannot_run(work, name, error)
            continue
        try:
            away = distance(found, oracle)
            if not away <= work.bound:
                raise Disagreement(f"{away:.3g} away from the oracle (bound {work.bound:.3g}): not timed")
        except ValueError as wrong:  # other shapes or another number of tensors among them
            work.failed[name] = f"{type(wrong).__name__}: {wrong}"
        else:
            launchers[name], errors[name] = launcher, away
        del found
    return launchers, errors


def _cannot_run(work: Work, name: str, error: Exception) -> None:
    """Ours has failed, a comparator is left out."""
    words = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    (work.failed if name.startswith(OURS) else work.left_out)[name] = words


def _warm_up(launcher: Any, device: torch.device) -> dict[str, int]:
    """One round, but of a subject that takes its own time, which may be that of a first call. On a GPU the bytes
    allocated before it, the weights and graphs of all subjects among them, and at its peak."""
    if launcher.subject.timed is not None:
        return {}
    if device.type != "cuda":
        launcher.round()
        return {}
    torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device)
    launcher.round()
    launcher.host.clear()
    return {"resident_bytes": int(resident), "peak_bytes": int(torch.cuda.max_memory_allocated(device))}


def measure(
    case: Case,
    device: torch.device,
    seconds: float,
    ceilings: dict[str, float],
    wanted: tuple[str, ...] | None = None,
    clock: Clock | None = None,
) -> dict[str, dict[str, Any]]:
    """Rows of one case by subject: {"passes": seconds of every round in each pass, "best", "band", "error", ...}, or
    {"left_out": reason} or {"failed": reason}. ConstantData comes through."""
    names = tuple(n for n in case.subjects if wanted is None or n in wanted)
    clock = clock or clock_of(device)
    try:
        work = case.prepare(device)
    except LeftOut as reason:
        return {name: {"left_out": str(reason)} for name in names}
    launchers, errors = compare_results(case, work, clock, names)
    release(device)  # the oracle's copies
    memory: dict[str, dict[str, int]] = {}
    for name, launcher in launchers.items():
        try:
            with journal.doing(journal.subject(case.id, name)):
                if restore := work.subjects[name].restore:
                    restore()
                launcher.ready()
        except Exception as error:  # such as a graph of many calls that does not fit
            _cannot_run(work, name, error)
    launchers = {n: launcher for n, launcher in launchers.items() if n not in work.failed and n not in work.left_out}
    for name, launcher in launchers.items():
        memory[name] = _warm_up(launcher, device)
    with journal.doing(case.id):
        times = take_turns(launchers, seconds, case.rounds)
    in_cache = work.bytes * len(work.inputs) < COLD * getattr(clock, "l2", 0)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in work.failed:
            rows[name] = {"failed": work.failed[name]}
            continue
        if name not in launchers:
            rows[name] = {"left_out": work.left_out.get(name, "not prepared")}
            continue
        fastest = best(times[name])
        rows[name] = {
            "passes": times[name],
            "best": fastest,
            "band": band(times[name]),
            "error": errors[name],
            "bound": work.bound,
            "flops": work.flops,
            "bytes": work.bytes,
            "note": work.note,
            "mode": work.subjects[name].mode if device.type == "cuda" else "call",
            "roof": roof(work.flops, work.bytes, fastest, ceilings),
            "in_cache": in_cache,
            "host": min(launchers[name].host, default=None),
            **work.more,
            **work.subjects[name].extra_fields(),
            **memory[name],
        }
    return rows


def release(device: torch.device) -> None:
    """Give back what a finished case held: compiled regions, graphs and weights."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def forget_compiled() -> None:
    """Drop torch.compile's caches between cases: the next size must not find the last one's recompile counters."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
