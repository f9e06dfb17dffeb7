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
class AttentionCall:
    """What one call asks for."""

    device: str  # "cuda"; "cpu" has its own path in joint_attention
    arch: tuple[int, int]  # compute capability
    dtype: torch.dtype
    head_dim: int
    backward: bool  # a gradient is recorded
    device_lengths: bool  # the offsets change under a captured step: no length may be read on the host
    longest: int  # rows of the longest sample
    batch_invariant: bool = False  # a sample's bits must not depend on what else is in the call

    @property
    def shape(self) -> str:
        """The shape class of the table for the forward pass."""
        length = "long" if self.longest >= LONG else "short"
        return f"{length} training" if self.backward else length


@dataclass(frozen=True)
class Candidate:
    """A library's attention, or ours, or a library's gradients alone, and what it needs."""

    name: str
    adapter: Callable[..., Any] | None  # an adapter of forward.py, or of backward.py
    streams: Callable[..., tuple[Tensor, Tensor]] | None = None  # instead, as hopper.streams
    kernel: str = ""  # of lens._C
    dtypes: tuple[torch.dtype, ...] = HALF
    arch: tuple[tuple[int, int], tuple[int, int]] = ((8, 0), (99, 9))  # first and last compute capability
    head_dim: tuple[int, int] = (8, 256)  # a multiple of, at most
    forward_modules: tuple[str, ...] = ()  # any one of these serves the forward pass; () is torch itself
    backward_modules: tuple[str, ...] | None = None  # for a call that records a gradient; None: the same
    also_requires: tuple[str, ...] = ()  # modules that all must be there besides
    function: str = ""  # that the module must have; private ones come and go
    backward: bool = True
    own_backward: str = ""  # the name of its own gradients, where it is another
    gives_lse: bool = False  # it gives them, for gradients of another library
    deterministic: bool = True  # its gradients are the same bits every time
    device_lengths: bool = True
    device: str = "cuda"
    why_not_invariant: str = ""  # why a sample's bits may depend on the others of its call

    def modules(self, backward: bool) -> tuple[str, ...]:
        return self.forward_modules if self.backward_modules is None or not backward else self.backward_modules

    def why_unsupported(self, call: AttentionCall) -> str:
        """Why it cannot serve the call, or ""."""
        low, high = self.arch
        multiple, largest = self.head_dim
        if call.device != self.device:
            return f"runs on {self.device}, not on {call.device}"
        if not low <= call.arch <= high:
            return f"needs compute capability {dotted(low)} to {dotted(high)}, this is {dotted(call.arch)}"
        if call.dtype not in self.dtypes:
            return f"does not compute in {str(call.dtype).removeprefix('torch.')}"
        if call.head_dim % multiple or call.head_dim > largest:
            return f"needs heads of a multiple of {multiple} up to {largest} channels, these have {call.head_dim}"
        if call.backward and not self.backward:
            return "has no backward pass here"
        if call.batch_invariant and self.why_not_invariant:
            return f"is not batch-invariant: {self.why_not_invariant}"
        if self.kernel and (why := backend.unavailable("cuda") or backend.without(self.kernel)):
            return why
        if call.device_lengths and not self.device_lengths:
            return "reads the lengths on the host, which a captured step does not know"
        names = self.modules(call.backward)
        if names and not any(map(installed, names)):
            return f"{' or '.join(names)} is not installed" + (" (backward)" if call.backward else "")
        if absent := [name for name in self.also_requires if not installed(name)]:
            return f"{', '.join(absent)} is not installed, which it is built on"
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
        gives_lse=True,
    ),
    Candidate(
        "flash-attn-3",
        adapters.flash_attn_3,
        arch=((9, 0), (9, 0)),
        forward_modules=("flash_attn_interface", "fa3_fwd_interface"),
        backward_modules=("flash_attn_interface",),
        gives_lse=True,
    ),
    Candidate(
        "flash-attn-4",
        adapters.flash_attn_4,
        arch=((9, 0), (11, 9)),
        forward_modules=("flash_attn.cute",),  # flash-attn 2 brings the folder, too, but not the compiler
        also_requires=("cutlass",),
        gives_lse=True,
        why_not_invariant="on Blackwell its tiles follow the longest sample of the call",
    ),
    Candidate("torch-cudnn", adapters.torch_cudnn, head_dim=(8, 128), device_lengths=False, gives_lse=True),
    Candidate("flash-attn-2", adapters.flash_attn_2, forward_modules=("flash_attn",), gives_lse=True),
    # a private op of torch: without a measured rate it is taken only where it is forced
    Candidate(
        "torch-cudnn-varlen",
        adapters.torch_cudnn_varlen,
        head_dim=(8, 128),
        backward=False,
        why_not_invariant="cuDNN plans all samples of a call as one problem",
    ),
    Candidate(
        "torch-varlen",
        adapters.torch_varlen,
        forward_modules=("torch.nn.attention.varlen",),
        own_backward="torch-flash",
        gives_lse=True,
    ),
    Candidate(
        "torch-sdpa",
        adapters.torch_sdpa,
        dtypes=(*HALF, torch.float32, torch.float64),
        arch=((0, 0), (99, 9)),
        head_dim=(1, 1 << 30),
        device_lengths=False,
        own_backward="torch-flash",
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
        also_requires=("cutlass",),
        function="_flash_attn_bwd",
    ),
    Candidate(
        "flash-attn-2",
        gradients.flash_attn_2,
        forward_modules=("flash_attn.flash_attn_interface",),
        function="_flash_attn_varlen_backward",
    ),
    Candidate("torch-flash", gradients.torch_flash),
    Candidate("torch-cudnn", gradients.torch_cudnn, head_dim=(8, 128), deterministic=False),
]


# ------------------------------------------------------------------------------------------------ the choice

TABLE = Path(__file__).with_name("attention_table.json")
override = Override("LENS_ATTENTION", "lens.ops.attention.choice", lambda: [c.name for c in CANDIDATES])
use = override.use
override_backward = Override(
    "LENS_ATTENTION_BACKWARD", "lens.ops.attention.choice", lambda: [c.name for c in BACKWARDS]
)
use_backward = override_backward.use


@functools.cache
def table() -> dict[tuple[str, str, str], dict[str, Any]]:
    """(architecture, shape class, candidate) -> its entry: tflops, status, source."""
    return {(e["arch"], e["shape"], e["backend"]): e for e in rates(TABLE)}


def entry(name: str, call: AttentionCall, shape: str = "") -> dict[str, Any] | None:
    """The table's line for this architecture, else for the first of its family, else for 8.0. A forward pass in
    training that has no line of its own is the library's forward pass."""
    shapes = (shape,) if shape else (call.shape, call.shape.removesuffix(" training"))
    return next((found for a in _archs(call) for s in shapes if (found := table().get((a, s, name)))), None)


def _archs(call: AttentionCall) -> tuple[str, ...]:
    return dotted(call.arch), f"{call.arch[0]}.0", "8.0"


def _backward_shape(call: AttentionCall) -> str:
    return call.shape.replace("training", "backward")


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
        return self.backward.name if self.backward else self.forward.own_backward or self.forward.name

    def lines(self, call: AttentionCall) -> list[dict[str, Any] | None]:
        """The table's lines of all passes that the call needs."""
        found = [entry(self.name, call)]
        return [*found, entry(self.gradients, call, _backward_shape(call))] if call.backward else found

    def rank(self, call: AttentionCall) -> tuple[int, float]:
        """The higher the better: how near the architecture of its rates is, for those of another decide nothing beside
        this one's; then TFLOP/s of all passes, a backward pass being 2.5 forward ones."""
        lines = [line for line in self.lines(call) if line is not None]
        if len(lines) < 1 + call.backward:
            return -len(_archs(call)), 0.0
        archs = _archs(call)
        near = -max(archs.index(line.get("arch", archs[0])) for line in lines)
        work = [1.0, 2.5][: len(lines)]
        return near, sum(work) / sum(w / float(line["tflops"]) for w, line in zip(work, lines, strict=True))

    def doubt(self, call: AttentionCall) -> str:
        """Why what could serve the call does so only where it is forced, or ""."""
        measured = [line is not None and line["status"] == "measured" for line in self.lines(call)]
        asked, gradients_asked = override.name == self.name, call.backward and override_backward.name == self.gradients
        if call.backward and not gradients_asked and not (asked and self.backward is None):
            by = next((b for b in BACKWARDS if b.name == self.gradients), self.forward)
            if not by.deterministic:
                force = f"{override_backward.variable}={by.name} forces it"
                return f"its gradients are other bits every time, which torch cannot switch off; {force}"
        if self.forward.kernel and not asked and not measured[0]:
            return f"not chosen before it was measured; {override.variable}={self.name} forces it"
        if self.backward is not None and not asked and not gradients_asked and not all(measured):
            return f"{self.name} and {self.gradients} are not mixed before both were measured"
        return ""


def _choices(call: AttentionCall) -> Iterator[Choice]:
    """All that could serve the call."""
    for c in CANDIDATES:
        own = c.adapter is not None and not c.why_unsupported(call) and not _too_wide(c, call)
        if own or (not call.backward and not c.why_unsupported(call)):
            yield Choice(c)
        if call.backward and c.gives_lse and not c.why_unsupported(replace(call, backward=False)):
            others = (b for b in BACKWARDS if not (own and b.name == Choice(c).gradients))
            yield from (Choice(c, b) for b in others if not b.why_unsupported(replace(call, backward=False)))


def _too_wide(c: Candidate, call: AttentionCall) -> bool:
    """Whether a library's own gradients are in a fixed order for narrower heads alone."""
    return call.backward and any(b.name == c.name and call.head_dim > b.head_dim[1] for b in BACKWARDS)


def _why_unsupported(c: Candidate, call: AttentionCall) -> str:
    """Why a candidate can serve no part of the call."""
    return c.why_unsupported(replace(call, backward=False) if c.gives_lse or c in BACKWARDS else call)


def report(call: AttentionCall, backward: bool = False) -> list[tuple[str, bool, str]]:
    """(candidate, whether it is chosen, why or why not) for every candidate, the chosen one first; backward: for the
    gradients."""
    known, able = (BACKWARDS if backward else CANDIDATES), list(_choices(call))
    try:
        best, none = choose(call), ""
    except RuntimeError as error:
        best, none = None, str(error)
    shape = _backward_shape(call) if backward else call.shape
    is_forced = (override_backward.name if backward else override.name) is not None
    rows = []
    for c in known:
        served = [choice for choice in able if (choice.gradients if backward else choice.name) == c.name]
        chosen = best is not None and (best.gradients if backward else best.name) == c.name
        why = _why_unsupported(c, call) or none
        if not why:
            line = entry(c.name, call, shape if backward else "")
            why = f"no rate for {shape} calls in {TABLE.name}"
            if line:
                rate = f"{line['status']} {line['tflops']:g} TFLOP/s for {line['shape']} calls"
                why = f"{rate} on {line['arch']} ({line['source']})"
            doubts = [choice.doubt(call) for choice in served]
            if not chosen and doubts and all(doubts):
                why += f"; {doubts[-1 if backward else 0]}"
            if not chosen and call.batch_invariant and not c.device_lengths:
                why += "; it reads the lengths on the host, and plain steps run what captured ones do"
        if chosen and is_forced:
            why = f"forced; {why}"
        rank = max((choice.rank(call) for choice in served), default=(-9, 0.0))
        rows.append(
            (
                (not chosen, not served or bool(_why_unsupported(c, call)), tuple(-r for r in rank)),
                (c.name, chosen, why),
            )
        )
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def _checked_override(override: Override, known: list[Candidate], what: str, call: AttentionCall) -> str | None:
    if (name := override.name) is None:
        return None
    named = next((c for c in known if c.name == name), None)
    if named is None:
        names = one_of([c.name for c in known])
        raise RuntimeError(f"lens.joint_attention: the {what} must be {names}, got {name!r}")
    if why := _why_unsupported(named, call):
        raise RuntimeError(f"lens.joint_attention: {name} was asked for but cannot run: {why}")
    return name


@functools.lru_cache(maxsize=256)
def choose(call: AttentionCall) -> Choice:
    """Who serves the call. RuntimeError where what is forced, or everything, cannot."""
    name = _checked_override(override, CANDIDATES, "attention backend", call)
    other = call.backward and _checked_override(override_backward, BACKWARDS, "gradients' backend", call)
    able = [c for c in _choices(call) if name in (None, c.name) and (not other or other == c.gradients)]
    if not able and (name or other):
        asked = " with the gradients of ".join(n for n in (name, other) if n)
        raise RuntimeError(f"lens.joint_attention: {asked} was asked for but cannot run: it gives no lse for them")
    if name and not other:
        able = [c for c in able if c.backward is None] or able
    sure = [c for c in able if not c.doubt(call)]
    if not sure:
        doubts = {c.name: c.doubt(call) for c in reversed(able)}
        reasons = "; ".join(
            f"{c.name} {_why_unsupported(c, call) or doubts.get(c.name, 'serves none')}" for c in CANDIDATES
        )
        raise RuntimeError(f"lens.joint_attention: no attention backend can serve {call}: {reasons}")
    if call.batch_invariant:  # alone a sample's step may be captured and beside another size not: the same must run
        sure = [c for c in sure if c.forward.device_lengths] or sure
    return max(sure, key=lambda c: c.rank(call))  # the first of the list where rates tie


override.changed = override_backward.changed = choose.cache_clear


def attention_call(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    longest: int,
    device_lengths: bool = False,
    backward: bool = False,
    batch_invariant: bool = False,
) -> AttentionCall:
    """What a call on `device` asks for."""
    arch = capability(device.index) if device.type == "cuda" else (0, 0)
    # the class is all that counts of the length, and few different needs keep the choice remembered; the longest of a
    # call is another sample's business, so whoever must not depend on others asks as for long ones
    longest = LONG if longest >= LONG or batch_invariant else 0
    return AttentionCall(device.type, arch, dtype, head_dim, backward, device_lengths, longest, batch_invariant)


def released_call(
    longest: int = 4096 + 415, device_lengths: bool = False, backward: bool = False, batch_invariant: bool = False
) -> AttentionCall:
    """What the released model asks for on the current CUDA device."""
    return attention_call(torch.device("cuda"), torch.bfloat16, 64, longest, device_lengths, backward, batch_invariant)


def summary() -> str:
    """The choice for the released model's shapes in a few words: plain and captured steps, training, its gradients.
    RuntimeError where not even plain steps can be served."""
    said = [f"{choose(released_call()).name} (plain)"]
    for what, call in {
        "captured": released_call(device_lengths=True),
        "training": released_call(backward=True),
    }.items():
        try:
            said.append(f"{choose(call).name} ({what})")
        except RuntimeError:
            said.append(f"none ({what})")
        else:
            said += [f"{choose(call).gradients} (gradients)"] * call.backward
    return ", ".join(said)


def call_of(
    q: Tensor, k: Tensor, v: Tensor, longest: int, device_lengths: bool, batch_invariant: bool = False
) -> AttentionCall:
    """What this call asks for."""
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return attention_call(q.device, q.dtype, q.shape[-1], longest, device_lengths, backward, batch_invariant)


def _loaded(call: AttentionCall) -> tuple[Choice, Any, Any]:
    """Who serves the call and the modules of both passes, imported."""
    while True:
        chosen = choose(call)
        try:
            module = chosen.forward.load(call.backward and chosen.backward is None)
            return chosen, module, chosen.backward.load(True) if chosen.backward else None
        except ImportError as error:
            choose.cache_clear()
            choose(call)  # raises where it was forced
            warnings.warn(f"lens.joint_attention: {error}; trying the next backend", stacklevel=3)


def streams(call: AttentionCall) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The chosen candidate where it reads the joint layout and writes both streams itself."""
    chosen, _, module = _loaded(call)
    if chosen.forward.streams is None or chosen.backward is None or chosen.backward.adapter is None:
        return chosen.forward.streams
    return functools.partial(chosen.forward.streams, gradients=functools.partial(chosen.backward.adapter, module))


def run(q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> Tensor:
    """Attention by the chosen candidate, a library's: [RQ, N, H]."""
    call = call_of(q, k, v, samples.longest, samples.joint_lengths is None, samples.batch_invariant)
    chosen, module, other = _loaded(call)
    adapter = chosen.forward.adapter
    assert adapter is not None, "a candidate that writes both streams is called by joint_attention"
    q, k, v = dense(q, k, v)
    if chosen.backward is None or chosen.backward.adapter is None:
        return adapter(q, k, v, samples, module)
    attend = functools.partial(adapter, module=module, with_lse=True)
    return Mixed.apply(q, k, v, samples, attend, functools.partial(chosen.backward.adapter, other))
