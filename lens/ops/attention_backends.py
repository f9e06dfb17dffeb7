"""Which library computes joint attention on a GPU: what is installed, what fits, and what the table says is fastest.

Every candidate (attention_candidates.py) declares what it needs (architecture, dtype, head dim) and what it can do
(backward, lengths that only the device knows). Among those that can serve a call, the highest rate in
attention_table.json wins; an entry there is "measured" or "predicted" and names its source. Our own kernel is a
candidate like the others, except that a prediction alone never chooses it. LENS_ATTENTION=name, or `use(name)`, forces
a choice; a forced candidate that cannot run raises. Nothing here is imported before it is chosen. No candidate is ever
given a mask.

Gradients are a choice of their own: a library's own pass, or, by its logarithms, one of BACKWARDS. The time of both
passes counts. Two libraries are mixed where both rates are measured, or where one is forced; a forced forward keeps its
own gradients if it has any. LENS_ATTENTION_BACKWARD=name, or `use_backward(name)`, forces them. Gradients whose sums
are in no fixed order are never taken unforced.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens.ops._attention_gradients import Mixed
from lens.ops._samples import Samples, dense
from lens.ops.attention_candidates import BACKWARDS, CANDIDATES, LONG, Candidate, Need
from lens.ops.choice import Forcing, capability, dotted, either, rates

TABLE = Path(__file__).with_name("attention_table.json")
_forcing = Forcing("LENS_ATTENTION", "lens.ops.attention_backends", lambda: [c.name for c in CANDIDATES])
forced, use = _forcing.forced, _forcing.use
_forcing_backward = Forcing(
    "LENS_ATTENTION_BACKWARD", "lens.ops.attention_backends", lambda: [c.name for c in BACKWARDS]
)
forced_backward, use_backward = _forcing_backward.forced, _forcing_backward.use


@functools.cache
def table() -> dict[tuple[str, str, str], dict[str, Any]]:
    """(architecture, shape class, candidate) -> its entry: tflops, status, source."""
    return {(e["arch"], e["shape"], e["backend"]): e for e in rates(TABLE)}


def entry(name: str, need: Need, shape: str = "") -> dict[str, Any] | None:
    """The table's line for this architecture, else for the first of its family, else for 8.0. A forward pass in
    training that has no line of its own is the library's forward pass."""
    shapes = (shape,) if shape else (need.shape, need.shape.removesuffix(" training"))
    return next((found for a in _archs(need) for s in shapes if (found := table().get((a, s, name)))), None)


def _archs(need: Need) -> tuple[str, ...]:
    return dotted(need.arch), f"{need.arch[0]}.0", "8.0"


def _backward_shape(need: Need) -> str:
    return need.shape.replace("training", "backward")


class Choice(NamedTuple):
    """Who computes a call."""

    forward: Candidate
    backward: Candidate | None = None  # of BACKWARDS; None: the library's own, or no gradient is recorded

    @property
    def name(self) -> str:
        return self.forward.name

    @property
    def gradients(self) -> str:
        """The name of who computes the gradients."""
        return self.backward.name if self.backward else self.forward.own or self.forward.name

    def lines(self, need: Need) -> list[dict[str, Any] | None]:
        """The table's lines of all passes that the call needs."""
        found = [entry(self.name, need)]
        return [*found, entry(self.gradients, need, _backward_shape(need))] if need.backward else found

    def rank(self, need: Need) -> tuple[int, float]:
        """The higher the better: how near the architecture of its rates is, for those of another decide nothing beside
        this one's; then TFLOP/s of all passes, a backward pass being 2.5 forward ones."""
        lines = [line for line in self.lines(need) if line is not None]
        if len(lines) < 1 + need.backward:
            return -len(_archs(need)), 0.0
        archs = _archs(need)
        near = -max(archs.index(line.get("arch", archs[0])) for line in lines)
        work = [1.0, 2.5][: len(lines)]
        return near, sum(work) / sum(w / float(line["tflops"]) for w, line in zip(work, lines, strict=True))

    def doubt(self, need: Need) -> str:
        """Why what could serve the call does so only where it is forced, or ""."""
        measured = [line is not None and line["status"] == "measured" for line in self.lines(need)]
        asked, gradients_asked = forced() == self.name, need.backward and forced_backward() == self.gradients
        if need.backward and not gradients_asked and not (asked and self.backward is None):
            by = next((b for b in BACKWARDS if b.name == self.gradients), self.forward)
            if not by.repeatable:
                force = f"{_forcing_backward.variable}={by.name} forces it"
                return f"its gradients are other bits every time, which torch cannot switch off; {force}"
        if self.forward.kernel and not asked and not measured[0]:
            return f"not chosen before it was measured; {_forcing.variable}={self.name} forces it"
        if self.backward is not None and not asked and not gradients_asked and not all(measured):
            return f"{self.name} and {self.gradients} are not mixed before both were measured"
        return ""


def _choices(need: Need) -> Iterator[Choice]:
    """All that could serve the call."""
    for c in CANDIDATES:
        own = c.call is not None and not c.missing(need) and not _too_wide(c, need)
        if own or (not need.backward and not c.missing(need)):
            yield Choice(c)
        if need.backward and c.logarithms and not c.missing(replace(need, backward=False)):
            others = (b for b in BACKWARDS if not (own and b.name == Choice(c).gradients))
            yield from (Choice(c, b) for b in others if not b.missing(replace(need, backward=False)))


def _too_wide(c: Candidate, need: Need) -> bool:
    """Whether a library's own gradients are in a fixed order for narrower heads alone."""
    return need.backward and any(b.name == c.name and need.head_dim > b.head_dim[1] for b in BACKWARDS)


def _missing(c: Candidate, need: Need) -> str:
    """Why a candidate can serve no part of the call."""
    return c.missing(replace(need, backward=False) if c.logarithms or c in BACKWARDS else need)


def report(need: Need, backward: bool = False) -> list[tuple[str, bool, str]]:
    """(candidate, whether it is chosen, why or why not) for every candidate, the chosen one first; backward: for the
    gradients."""
    known, able = (BACKWARDS if backward else CANDIDATES), list(_choices(need))
    try:
        best, none = choose(need), ""
    except RuntimeError as error:
        best, none = None, str(error)
    shape = _backward_shape(need) if backward else need.shape
    is_forced = (forced_backward() if backward else forced()) is not None
    rows = []
    for c in known:
        served = [choice for choice in able if (choice.gradients if backward else choice.name) == c.name]
        chosen = best is not None and (best.gradients if backward else best.name) == c.name
        why = _missing(c, need) or none
        if not why:
            line = entry(c.name, need, shape if backward else "")
            why = f"no rate for {shape} calls in {TABLE.name}"
            if line:
                rate = f"{line['status']} {line['tflops']:g} TFLOP/s for {line['shape']} calls"
                why = f"{rate} on {line['arch']} ({line['source']})"
            doubts = [choice.doubt(need) for choice in served]
            if not chosen and doubts and all(doubts):
                why += f"; {doubts[-1 if backward else 0]}"
            if not chosen and need.invariant and not c.device_lengths:
                why += "; it reads the lengths on the host, and plain steps run what captured ones do"
        if chosen and is_forced:
            why = f"forced; {why}"
        rank = max((choice.rank(need) for choice in served), default=(-9, 0.0))
        rows.append(
            ((not chosen, not served or bool(_missing(c, need)), tuple(-r for r in rank)), (c.name, chosen, why))
        )
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def _forced_or_refused(forcing: Forcing, known: list[Candidate], what: str, need: Need) -> str | None:
    if (name := forcing.forced()) is None:
        return None
    named = next((c for c in known if c.name == name), None)
    if named is None:
        names = either([c.name for c in known])
        raise RuntimeError(f"lens.joint_attention: the {what} must be {names}, got {name!r}")
    if why := _missing(named, need):
        raise RuntimeError(f"lens.joint_attention: {name} was asked for but cannot run: {why}")
    return name


@functools.lru_cache(maxsize=256)
def choose(need: Need) -> Choice:
    """Who serves the call. RuntimeError where what is forced, or everything, cannot."""
    name = _forced_or_refused(_forcing, CANDIDATES, "attention backend", need)
    other = need.backward and _forced_or_refused(_forcing_backward, BACKWARDS, "gradients' backend", need)
    able = [c for c in _choices(need) if name in (None, c.name) and (not other or other == c.gradients)]
    if not able and (name or other):
        asked = " with the gradients of ".join(n for n in (name, other) if n)
        raise RuntimeError(
            f"lens.joint_attention: {asked} was asked for but cannot run: it gives no logarithms for them"
        )
    if name and not other:
        able = [c for c in able if c.backward is None] or able
    sure = [c for c in able if not c.doubt(need)]
    if not sure:
        doubts = {c.name: c.doubt(need) for c in reversed(able)}
        reasons = "; ".join(f"{c.name} {_missing(c, need) or doubts.get(c.name, 'serves none')}" for c in CANDIDATES)
        raise RuntimeError(f"lens.joint_attention: no attention backend can serve {need}: {reasons}")
    if need.invariant:  # alone a sample's step may be captured and beside another size not: the same must run
        sure = [c for c in sure if c.forward.device_lengths] or sure
    return max(sure, key=lambda c: c.rank(need))  # the first of the list where rates tie


_forcing.changed = _forcing_backward.changed = choose.cache_clear


def need_of(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    longest: int,
    device_lengths: bool = False,
    backward: bool = False,
    invariant: bool = False,
) -> Need:
    """What a call on `device` asks for."""
    arch = capability(device.index) if device.type == "cuda" else (0, 0)
    # the class is all that counts of the length, and few different needs keep the choice remembered; the longest of a
    # call is another sample's business, so whoever must not depend on others asks as for long ones
    longest = LONG if longest >= LONG or invariant else 0
    return Need(device.type, arch, dtype, head_dim, backward, device_lengths, longest, invariant)


def usual(
    longest: int = 4096 + 415, device_lengths: bool = False, backward: bool = False, invariant: bool = False
) -> Need:
    """What the released model asks for on the current CUDA device."""
    return need_of(torch.device("cuda"), torch.bfloat16, 64, longest, device_lengths, backward, invariant)


def summary() -> str:
    """The choice for the released model's shapes in a few words: plain and captured steps, training, its gradients.
    RuntimeError where not even plain steps can be served."""
    said = [f"{choose(usual()).name} (plain)"]
    for what, need in {"captured": usual(device_lengths=True), "training": usual(backward=True)}.items():
        try:
            said.append(f"{choose(need).name} ({what})")
        except RuntimeError:
            said.append(f"none ({what})")
        else:
            said += [f"{choose(need).gradients} (gradients)"] * need.backward
    return ", ".join(said)


def need_of_call(q: Tensor, k: Tensor, v: Tensor, longest: int, device_lengths: bool, invariant: bool = False) -> Need:
    """What this call asks for."""
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return need_of(q.device, q.dtype, q.shape[-1], longest, device_lengths, backward, invariant)


def _loaded(need: Need) -> tuple[Choice, Any, Any]:
    """Who serves the call and the modules of both passes, imported."""
    while True:
        chosen = choose(need)
        try:
            module = chosen.forward.load(need.backward and chosen.backward is None)
            return chosen, module, chosen.backward.load(True) if chosen.backward else None
        except ImportError as error:
            choose.cache_clear()
            choose(need)  # raises where it was forced
            warnings.warn(f"lens.joint_attention: {error}; trying the next backend", stacklevel=3)


def streams(need: Need) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The chosen candidate where it reads the joint layout and writes both streams itself."""
    chosen, _, module = _loaded(need)
    if chosen.forward.streams is None or chosen.backward is None or chosen.backward.call is None:
        return chosen.forward.streams
    return functools.partial(chosen.forward.streams, gradients=functools.partial(chosen.backward.call, module))


def run(q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> Tensor:
    """Attention by the chosen candidate, a library's: [RQ, N, H]."""
    need = need_of_call(q, k, v, samples.longest, samples.joint_lengths is None, samples.invariant)
    chosen, module, other = _loaded(need)
    call = chosen.forward.call
    assert call is not None, "a candidate that writes both streams is called by joint_attention"
    q, k, v = dense(q, k, v)
    if chosen.backward is None or chosen.backward.call is None:
        return call(q, k, v, samples, module)
    attend = functools.partial(call, module=module, logarithms=True)
    return Mixed.apply(q, k, v, samples, attend, functools.partial(chosen.backward.call, other))
