"""Which library computes joint attention on a GPU, or its gradients: the first of an order that can serve the call.

Every candidate declares what it needs (architecture, dtype, head dim, modules) and what it can do (backward, lengths that
only the device knows). ORDERS holds one tuple of names per (architecture, use), the fastest first; `python -m bench tables`
rewrites it from committed results, and our own kernel is in an order only by one. LENS_ATTENTION=name, or `use(name)`,
forces a candidate, in an order or not; a forced candidate that cannot run raises. Nothing here is imported before it is
chosen. No candidate is ever given a mask. To add a library: an adapter in forward.py, a Candidate, its name in an order.

A call that records a gradient is served by a candidate with its own gradients, or by a pair: "torch-cudnn + flash-attn-3"
takes the forward pass of the one and, by its lse, the gradients of the other, one of BACKWARDS. A pair is in an order only
by a committed result. LENS_ATTENTION_BACKWARD=name, or `use_backward(name)`, forces the gradients; a forced forward pass
keeps its own if it has any. A nondeterministic backward pass serves only where it is forced.
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
from lens.ops.override import Override, capability, dotted, one_of

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
    def use(self) -> str:
        """What ORDERS has a tuple for: "long", "short", "long training" or "short training"."""
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
    gives_lse: bool = False  # for gradients of another library
    deterministic: bool = True  # its gradients are the same bits every time
    device_lengths: bool = True
    device: str = "cuda"
    why_not_invariant: str = ""  # why a sample's bits may depend on the others of its call
    varies_here: Callable[[Any], str] | None = None  # the same, of the module as this process has it

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
        if call.batch_invariant and self.varies_here and (why := self.varies_here(importlib.import_module(names[0]))):
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
        backward=False,
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
    # a private op of torch: in no order without a committed result
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
        varies_here=adapters.varlen_varies,
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

# (architecture, use) -> candidates and pairs, the fastest first. Lines without a source go by published figures of other
# machines; an architecture without a line goes by its family's x.0, else by 8.0's.
# fmt: off
ORDERS: dict[tuple[str, str], tuple[str, ...]] = {
    # orders: begin
    ("9.0", "long"): ("flash-attn-3", "flash-attn-4", "torch-cudnn", "flash-attn-2", "torch-varlen", "torch-sdpa"),
    ("9.0", "short"): ("flash-attn-3", "flash-attn-4", "flash-attn-2", "torch-varlen", "torch-cudnn", "torch-sdpa"),
    ("9.0", "long training"): ("flash-attn-3", "flash-attn-4", "flash-attn-2", "torch-varlen", "torch-sdpa"),
    ("9.0", "short training"): ("flash-attn-3", "flash-attn-4", "flash-attn-2", "torch-varlen", "torch-sdpa"),
    ("8.0", "long"): ("flash-attn-2", "torch-varlen", "torch-sdpa", "torch-cudnn"),
    ("8.0", "short"): ("flash-attn-2", "torch-varlen", "torch-cudnn", "torch-sdpa"),
    ("8.0", "long training"): ("flash-attn-2", "torch-varlen", "torch-sdpa"),
    ("8.0", "short training"): ("flash-attn-2", "torch-varlen", "torch-sdpa"),
    ("10.0", "long"): ("flash-attn-4", "flash-attn-2", "torch-varlen", "torch-sdpa", "torch-cudnn"),
    # orders: end
}
# fmt: on
override = Override("LENS_ATTENTION", "lens.ops.attention.choice", lambda: [c.name for c in CANDIDATES])
override_backward = Override(
    "LENS_ATTENTION_BACKWARD", "lens.ops.attention.choice", lambda: [c.name for c in BACKWARDS]
)
use, use_backward = override.use, override_backward.use


class Choice(NamedTuple):
    """Which candidates compute a call."""

    forward: Candidate
    backward: Candidate | None = None  # of BACKWARDS; None: the library's own, or no gradient is recorded

    @property
    def name(self) -> str:
        return self.forward.name

    @property
    def gradients(self) -> str:
        """The name of what computes the gradients."""
        return self.backward.name if self.backward else self.forward.own_backward or self.forward.name

    def why_unsupported(self, call: AttentionCall) -> str:
        """Why it cannot serve the call, or ""."""
        if self.backward is not None:
            if not self.forward.gives_lse:
                return f"gives no lse for the gradients of {self.backward.name}"
            one_pass = replace(call, backward=False)
            return self.forward.why_unsupported(one_pass) or self.backward.why_unsupported(one_pass)
        own = _named(BACKWARDS, self.forward.name)
        if call.backward and own and call.head_dim > own.head_dim[1]:
            return (
                f"its backward pass is deterministic up to {own.head_dim[1]} channels a head, not for {call.head_dim}"
            )
        return self.forward.why_unsupported(call)


def order(call: AttentionCall) -> tuple[str, tuple[str, ...]]:
    """The architecture whose order the call goes by, and the order."""
    archs = dotted(call.arch), f"{call.arch[0]}.0", "8.0"
    return next((arch, ORDERS[arch, call.use]) for arch in archs if (arch, call.use) in ORDERS)


def _named(known: list[Candidate], name: str) -> Candidate | None:
    return next((c for c in known if c.name == name), None)


def _in_order(call: AttentionCall) -> list[Choice]:
    """The choices of the call's order, the best first."""
    found = []
    for name in order(call)[1]:
        forward, _, gradients = name.partition(" + ")
        candidate, backward = _named(CANDIDATES, forward), _named(BACKWARDS, gradients)
        if candidate is not None and (backward is not None) == bool(gradients):
            found.append(Choice(candidate, backward))
    if call.batch_invariant:  # first what a captured step can run: a plain one, beside another size, must run the same
        found.sort(key=lambda choice: not choice.forward.device_lengths)
    return found


def _forced(call: AttentionCall, name: str | None, gradients: str | None) -> Iterator[Choice]:
    """The choices with the forward pass and the gradients that are forced, the best first."""
    for c in [c for c in CANDIDATES if c.name == name] if name else [choice.forward for choice in _in_order(call)]:
        if gradients in (None, Choice(c).gradients):
            yield Choice(c)
        if call.backward:
            yield from (Choice(c, b) for b in BACKWARDS if b.name == gradients or (not gradients and b.deterministic))


def _no_part(c: Candidate, call: AttentionCall) -> str:
    """Why a candidate can serve no part of the call, or ""."""
    return c.why_unsupported(replace(call, backward=False) if c.gives_lse or c in BACKWARDS else call)


def _checked_override(forced: Override, known: list[Candidate], what: str, call: AttentionCall) -> str | None:
    """The name that is forced, if any. RuntimeError for one that is not known or cannot serve."""
    if (name := forced.name) is None:
        return None
    if (candidate := _named(known, name)) is None:
        names = one_of([c.name for c in known])
        raise RuntimeError(f"lens.joint_attention: the {what} must be {names}, got {name!r}")
    if why := _no_part(candidate, call):
        raise RuntimeError(f"lens.joint_attention: {name} was asked for but cannot run: {why}")
    return name


@functools.lru_cache(maxsize=256)
def choose(call: AttentionCall) -> Choice:
    """The first that can serve the call. RuntimeError where what is forced, or everything in the order, cannot."""
    name = _checked_override(override, CANDIDATES, "attention backend", call)
    gradients = _checked_override(override_backward, BACKWARDS, "gradients' backend", call) if call.backward else None
    reasons = []
    for choice in _forced(call, name, gradients) if name or gradients else _in_order(call):
        if not (why := choice.why_unsupported(call)):
            return choice
        reasons.append(f"{choice.name} {why}")
    asked = " with the gradients of ".join(filter(None, (name, gradients)))
    what = f"{asked} was asked for but cannot run" if asked else f"no attention backend can serve {call}"
    raise RuntimeError(f"lens.joint_attention: {what}: {'; '.join(reasons)}")


def report(call: AttentionCall, backward: bool = False) -> list[tuple[str, bool, str]]:
    """(candidate, whether it is chosen, why or why not) for every candidate, the chosen one first; backward: for the
    gradients."""
    known, forced = (BACKWARDS, override_backward) if backward else (CANDIDATES, override)
    try:
        best, none = choose(call), ""
    except RuntimeError as error:
        best, none = None, str(error)

    def part(choice: Choice) -> str:
        return choice.gradients if backward else choice.name

    arch, ordered = order(call)[0], _in_order(call)
    where, names = f"the order for {call.use} calls on {arch}", [part(choice) for choice in ordered]
    rows = []
    for c in known:
        chosen, force = best is not None and part(best) == c.name, f"{forced.variable}={c.name} forces it"
        unsupported = _no_part(c, call) or none
        reasons = [choice.why_unsupported(call) for choice in ordered if part(choice) == c.name]
        if unsupported:
            why = unsupported
        elif chosen:
            why = "forced" if forced.name else f"the first in {where} that can serve"
        elif forced.name:
            why = f"{forced.name} is forced"
        elif not c.deterministic:
            why = f"its backward pass is nondeterministic, which torch cannot switch off; {force}"
        elif not reasons:
            why = f"not in {where} without a committed result; {force}"
        else:
            why = reasons[0] if all(reasons) else f"after {part(best)} in {where}" if best else none
        place = names.index(c.name) if c.name in names else len(names)
        rows.append(((not chosen, bool(unsupported), place), (c.name, chosen, why)))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


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
    # the class is all that counts of the length, and few different calls keep the choice remembered; under batch
    # invariance the longest sample must not matter, so the call counts as long
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
    """The choice for the call and the modules of both passes, imported."""
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
