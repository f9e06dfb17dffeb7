"""Which library computes joint attention on a GPU, or its gradients: what is installed, what fits, what is fastest.

Every candidate declares what it needs (architecture, dtype, head dim) and what it can do (backward, lengths that only
the device knows). Among those that can serve a call, the highest rate in attention_table.json wins; an entry there is
"measured" or "predicted" and names its source. Our own kernel is a candidate like the others, except that a prediction
alone never chooses it. LENS_ATTENTION=name, or `use(name)`, forces a choice; a forced candidate that cannot run raises.
Nothing here is imported before it is chosen. No candidate is ever given a mask.

Gradients are a choice of their own: a library's own pass, or, by its lse, one of BACKWARDS. The time of both passes
counts. Two libraries are mixed where both rates are measured, or where one is forced; a forced forward keeps its own
gradients if it has any. LENS_ATTENTION_BACKWARD=name, or `use_backward(name)`, forces them. Gradients whose sums are in
no fixed order are never taken unforced.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens.ops import backend
from lens.ops.attention import backward as gradients
from lens.ops.attention import forward as adapters
from lens.ops.attention import hopper
from lens.ops.attention.backward import Mixed
from lens.ops.attention.layout import Samples, dense
from lens.ops.override import Override, capability, dotted, one_of, rates

HALF = (torch.bfloat16, torch.float16)
LONG = 1024  # rows of the longest sample from which a call counts as "long"
failed: dict[str, str] = {}  # modules that are installed and cannot be imported, and why


@functools.cache
def installed(module: str) -> bool:
    """Whether `module` can be found, without importing it or its package (torch's own are imported anyway)."""
    top, _, rest = module.partition(".")
    if top in sys.modules and not rest:
        return sys.modules[top] is not None
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if not rest:  # a bare folder of this name, such as flash_attn with its part `cute` alone, is not the package
        return spec.origin is not None
    places = [Path(place, *rest.split(".")) for place in spec.submodule_search_locations or ()]
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)


@dataclass(frozen=True)
class Need:
    """What one call asks for."""

    device: str  # "cuda"; "cpu" has its own path in joint_attention
    arch: tuple[int, int]  # compute capability
    dtype: torch.dtype
    head_dim: int
    backward: bool  # a gradient is recorded
    device_lengths: bool  # the offsets change under a captured step: no length may be read on the host
    longest: int  # rows of the longest sample
    invariant: bool = False  # a sample's bits must not depend on what else is in the call

    @property
    def shape(self) -> str:
        """The shape class of the table for the forward pass."""
        length = "long" if self.longest >= LONG else "short"
        return f"{length} training" if self.backward else length


@dataclass(frozen=True)
class Candidate:
    """A library's attention, or ours, or a library's gradients alone, and what it needs."""

    name: str
    call: Callable[..., Any] | None  # an adapter of forward.py, or of backward.py
    streams: Callable[..., tuple[Tensor, Tensor]] | None = None  # instead, as hopper.streams
    kernel: str = ""  # of lens._C
    dtypes: tuple[torch.dtype, ...] = HALF
    arch: tuple[tuple[int, int], tuple[int, int]] = ((8, 0), (99, 9))  # first and last compute capability
    head_dim: tuple[int, int] = (8, 256)  # a multiple of, at most
    forward_modules: tuple[str, ...] = ()  # any one of these serves the forward pass; () is torch itself
    backward_modules: tuple[str, ...] | None = None  # for a call that records a gradient; None: the same
    rests_on: tuple[str, ...] = ()  # modules that all must be there besides
    function: str = ""  # that the module must have; private ones come and go
    backward: bool = True
    own: str = ""  # the name of its own gradients, where it is another
    logarithms: bool = False  # it gives them, for gradients of another library
    repeatable: bool = True  # its gradients are the same bits every time
    device_lengths: bool = True
    device: str = "cuda"
    varies: str = ""  # why a sample's bits may depend on the others of its call
    varies_here: Callable[[Any], str] | None = None  # the same, of the module as this process has it

    def modules(self, backward: bool) -> tuple[str, ...]:
        return self.forward_modules if self.backward_modules is None or not backward else self.backward_modules

    def missing(self, need: Need) -> str:
        """Why it cannot serve the call, or ""."""
        low, high = self.arch
        multiple, largest = self.head_dim
        if need.device != self.device:
            return f"runs on {self.device}, not on {need.device}"
        if not low <= need.arch <= high:
            return f"needs compute capability {dotted(low)} to {dotted(high)}, this is {dotted(need.arch)}"
        if need.dtype not in self.dtypes:
            return f"does not compute in {str(need.dtype).removeprefix('torch.')}"
        if need.head_dim % multiple or need.head_dim > largest:
            return f"needs heads of a multiple of {multiple} up to {largest} channels, these have {need.head_dim}"
        if need.backward and not self.backward:
            return "has no backward pass here"
        if need.invariant and self.varies:
            return f"is not batch-invariant: {self.varies}"
        if self.kernel and (why := backend.unavailable("cuda") or backend.without(self.kernel)):
            return why
        if need.device_lengths and not self.device_lengths:
            return "reads the lengths on the host, which a captured step does not know"
        names = self.modules(need.backward)
        if names and not any(map(installed, names)):
            return f"{' or '.join(names)} is not installed" + (" (backward)" if need.backward else "")
        if absent := [name for name in self.rests_on if not installed(name)]:
            return f"{', '.join(absent)} is not installed, which it is built on"
        if need.invariant and self.varies_here and (why := self.varies_here(importlib.import_module(names[0]))):
            return f"is not batch-invariant: {why}"
        keys = ((n, f"{n}.{self.function}") for n in names if installed(n))
        return next((failed[key] for pair in keys for key in pair if key in failed), "")

    def load(self, backward: bool) -> Any:
        """The module that serves the call, imported; None for torch. ImportError, recorded, says what is broken."""
        name = next((name for name in self.modules(backward) if installed(name)), "")
        if not name:
            return None
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:  # an extension built for another torch, say
            failed[name] = f"{name} cannot be imported: {error}"
            raise ImportError(failed[name]) from error
        if self.function and not hasattr(module, self.function):
            failed[f"{name}.{self.function}"] = f"{name} has no {self.function}"
            raise ImportError(failed[f"{name}.{self.function}"])
        return module


CANDIDATES = [
    Candidate(
        "lens-hopper",
        None,
        streams=hopper.streams,
        kernel="joint_attention",
        dtypes=(torch.bfloat16,),
        arch=((9, 0), (9, 0)),
        head_dim=(64, 64),
        logarithms=True,
    ),
    Candidate(
        "flash-attn-3",
        adapters.flash_attn_3,
        arch=((9, 0), (9, 0)),
        forward_modules=("flash_attn_interface", "fa3_fwd_interface"),
        backward_modules=("flash_attn_interface",),
        logarithms=True,
    ),
    Candidate(
        "flash-attn-4",
        adapters.flash_attn_4,
        arch=((9, 0), (11, 9)),
        forward_modules=("flash_attn.cute",),  # flash-attn 2 brings the folder, too, but not the compiler
        rests_on=("cutlass",),
        logarithms=True,
        varies="on Blackwell its tiles follow the longest sample of the call",
    ),
    Candidate("torch-cudnn", adapters.torch_cudnn, head_dim=(8, 128), device_lengths=False, logarithms=True),
    Candidate("flash-attn-2", adapters.flash_attn_2, forward_modules=("flash_attn",), logarithms=True),
    # a private op of torch: without a measured rate it is taken only where it is forced
    Candidate(
        "torch-cudnn-varlen",
        adapters.torch_cudnn_varlen,
        head_dim=(8, 128),
        backward=False,
        varies="cuDNN plans all samples of a call as one problem",
    ),
    Candidate(
        "torch-varlen",
        adapters.torch_varlen,
        forward_modules=("torch.nn.attention.varlen",),
        own="torch-flash",
        logarithms=True,
        varies_here=adapters.varlen_varies,
    ),
    Candidate(
        "torch-sdpa",
        adapters.torch_sdpa,
        dtypes=(*HALF, torch.float32, torch.float64),
        arch=((0, 0), (99, 9)),
        head_dim=(1, 1 << 30),
        device_lengths=False,
        own="torch-flash",
    ),
]
BACKWARDS = [
    Candidate(
        "flash-attn-3",
        gradients.flash_attn_3,
        arch=((9, 0), (9, 0)),
        head_dim=(8, 192),  # in a fixed order
        forward_modules=("flash_attn_interface",),
        function="_flash_attn_backward",
    ),
    Candidate(
        "flash-attn-4",
        gradients.flash_attn_4,
        arch=((9, 0), (11, 9)),
        forward_modules=("flash_attn.cute.interface",),
        rests_on=("cutlass",),
        function="_flash_attn_bwd",
    ),
    Candidate(
        "flash-attn-2",
        gradients.flash_attn_2,
        forward_modules=("flash_attn.flash_attn_interface",),
        function="_flash_attn_varlen_backward",
    ),
    Candidate("torch-flash", gradients.torch_flash),
    Candidate("torch-cudnn", gradients.torch_cudnn, head_dim=(8, 128), repeatable=False),
]


# ------------------------------------------------------------------------------------------------ the choice

TABLE = Path(__file__).with_name("attention_table.json")
_forcing = Override("LENS_ATTENTION", "lens.ops.attention.choice", lambda: [c.name for c in CANDIDATES])
forced, use = _forcing.forced, _forcing.use
_forcing_backward = Override(
    "LENS_ATTENTION_BACKWARD", "lens.ops.attention.choice", lambda: [c.name for c in BACKWARDS]
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


def _forced_or_refused(forcing: Override, known: list[Candidate], what: str, need: Need) -> str | None:
    if (name := forcing.forced()) is None:
        return None
    named = next((c for c in known if c.name == name), None)
    if named is None:
        names = one_of([c.name for c in known])
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
