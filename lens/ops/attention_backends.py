"""Which library computes joint attention on a GPU: what is installed, what fits, and what the table says is fastest.

Every candidate declares what it needs (architecture, dtype, head dim) and what it can do (backward, lengths that only
the device knows). Among those that can serve a call, the highest rate in attention_table.json wins; an entry there is
"measured" or "predicted" and names its source. Our own kernel is a candidate like the others, except that a prediction
alone never chooses it. LENS_ATTENTION=name, or `use(name)`, forces a choice; a forced candidate that cannot run raises.
Nothing here is imported before it is chosen. No candidate is ever given a mask.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens.ops import _attention_cuda as adapters
from lens.ops import _attention_hopper, backend
from lens.ops.choice import Forcing, capability, dotted, either, rates

HALF = (torch.bfloat16, torch.float16)
LONG = 1024  # rows of the longest sample from which a call counts as "long"
TABLE = Path(__file__).with_name("attention_table.json")


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

    @property
    def shape(self) -> str:
        """The shape class of the table."""
        return "backward" if self.backward else "long" if self.longest >= LONG else "short"


@dataclass(frozen=True)
class Candidate:
    """A library's attention, or ours, and what it needs."""

    name: str
    call: Callable[..., Tensor] | None  # an adapter: (q, k, v, Samples, module) -> [RQ, N, H]
    streams: Callable[..., tuple[Tensor, Tensor]] | None = None  # instead, as _attention_hopper.streams
    kernel: str = ""  # of lens._C
    dtypes: tuple[torch.dtype, ...] = HALF
    arch: tuple[tuple[int, int], tuple[int, int]] = ((8, 0), (99, 9))  # first and last compute capability
    head_dim: tuple[int, int] = (8, 256)  # a multiple of, at most
    forward_modules: tuple[str, ...] = ()  # any one of these serves the forward pass; () is torch itself
    backward_modules: tuple[str, ...] | None = None  # for a call that records a gradient; None: the same
    rests_on: tuple[str, ...] = ()  # modules that all must be there besides
    backward: bool = True
    device_lengths: bool = True
    device: str = "cuda"

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
        if self.kernel and (why := backend.unavailable("cuda") or backend.without(self.kernel)):
            return why
        if need.device_lengths and not self.device_lengths:
            return "reads the lengths on the host, which a captured step does not know"
        names = self.modules(need.backward)
        if names and not any(map(installed, names)):
            return f"{' or '.join(names)} is not installed" + (" (backward)" if need.backward else "")
        if absent := [name for name in self.rests_on if not installed(name)]:
            return f"{', '.join(absent)} is not installed, which it is built on"
        return next((failed[n] for n in names if n in failed and installed(n)), "")

    def load(self, need: Need) -> Any:
        """The module that serves the call, imported; None for torch. ImportError says what is broken."""
        names = [name for name in self.modules(need.backward) if installed(name)]
        return importlib.import_module(names[0]) if names else None


CANDIDATES = [
    Candidate(
        "lens-hopper",
        None,
        streams=_attention_hopper.streams,
        kernel="joint_attention",
        dtypes=(torch.bfloat16,),
        arch=((9, 0), (9, 0)),
        head_dim=(64, 64),
    ),
    Candidate(
        "flash-attn-3",
        adapters.flash_attn_3,
        arch=((9, 0), (9, 0)),
        forward_modules=("flash_attn_interface", "fa3_fwd_interface"),
        backward_modules=("flash_attn_interface",),
    ),
    Candidate(
        "flash-attn-4",
        adapters.flash_attn_4,
        arch=((9, 0), (11, 9)),
        forward_modules=("flash_attn.cute",),  # flash-attn 2 brings the folder, too, but not the compiler
        rests_on=("cutlass",),
    ),
    Candidate("torch-cudnn", adapters.torch_cudnn, head_dim=(8, 128), device_lengths=False),
    Candidate("flash-attn-2", adapters.flash_attn_2, forward_modules=("flash_attn",)),
    # a private op of torch: without a measured rate it is taken only where it is forced
    Candidate("torch-cudnn-varlen", adapters.torch_cudnn_varlen, head_dim=(8, 128), backward=False),
    Candidate("torch-varlen", adapters.torch_varlen, forward_modules=("torch.nn.attention.varlen",)),
    Candidate(
        "torch-sdpa",
        adapters.torch_sdpa,
        dtypes=(*HALF, torch.float32, torch.float64),
        arch=((0, 0), (99, 9)),
        head_dim=(1, 1 << 30),
        device_lengths=False,
    ),
]
failed: dict[str, str] = {}  # modules that are installed and cannot be imported, and why
_forcing = Forcing("LENS_ATTENTION", "lens.ops.attention_backends", lambda: [c.name for c in CANDIDATES])
forced, use = _forcing.forced, _forcing.use


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


@functools.cache
def table() -> dict[tuple[str, str, str], dict[str, Any]]:
    """(architecture, shape class, candidate) -> its entry: tflops, status, source."""
    return {(e["arch"], e["shape"], e["backend"]): e for e in rates(TABLE)}


def entry(name: str, need: Need) -> dict[str, Any] | None:
    """The table's line for this architecture, else for the first of its family, else for 8.0."""
    archs = (dotted(need.arch), f"{need.arch[0]}.0", "8.0")
    return next((found for a in archs if (found := table().get((a, need.shape, name)))), None)


def _rate(candidate: Candidate, need: Need) -> float:
    found = entry(candidate.name, need)
    return 0.0 if found is None else float(found["tflops"])


def unproven(candidate: Candidate, need: Need) -> str:
    """Why a candidate that could serve the call is chosen only where it is forced, or ""."""
    found = entry(candidate.name, need)
    if candidate.kernel and (found is None or found["status"] != "measured"):
        return f"not chosen before it was measured; LENS_ATTENTION={candidate.name} forces it"
    return ""


def report(need: Need) -> list[tuple[str, bool, str]]:
    """(candidate, whether it is chosen, why or why not) for every candidate, the chosen one first."""
    ranked = sorted(CANDIDATES, key=lambda c: (bool(c.missing(need)), bool(unproven(c, need)), -_rate(c, need)))
    try:
        best = choose(need).name
    except RuntimeError as error:
        return [(c.name, False, c.missing(need) or str(error)) for c in ranked]
    rows = []
    for c in sorted(ranked, key=lambda c: c.name != best):
        why = c.missing(need)
        if not why:
            line = entry(c.name, need)
            why = (
                f"{line['status']} {line['tflops']:g} TFLOP/s for {line['shape']} calls on {line['arch']} ({line['source']})"
                if line
                else f"no rate for {need.shape} calls in {TABLE.name}"
            )
            if c.name != best and (doubt := unproven(c, need)):
                why += f"; {doubt}"
        if c.name == best and forced() is not None:
            why = f"forced; {why}"
        rows.append((c.name, c.name == best, why))
    return rows


@functools.lru_cache(maxsize=256)
def choose(need: Need) -> Candidate:
    """The candidate that serves the call. RuntimeError where a forced one, or none, can."""
    if (name := forced()) is not None:
        named = next((c for c in CANDIDATES if c.name == name), None)
        if named is None:
            known = either([c.name for c in CANDIDATES])
            raise RuntimeError(f"lens.joint_attention: the attention backend must be {known}, got {name!r}")
        if why := named.missing(need):
            raise RuntimeError(f"lens.joint_attention: {name} was asked for but cannot run: {why}")
        return named
    able = [c for c in CANDIDATES if not (c.missing(need) or unproven(c, need))]
    if not able:
        reasons = "; ".join(f"{c.name} {c.missing(need) or unproven(c, need)}" for c in CANDIDATES)
        raise RuntimeError(f"lens.joint_attention: no attention backend can serve {need}: {reasons}")
    return max(able, key=lambda c: _rate(c, need))  # the first of the list where rates tie


_forcing.changed = choose.cache_clear


def need_of(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    longest: int,
    device_lengths: bool = False,
    backward: bool = False,
) -> Need:
    """What a call on `device` asks for."""
    arch = capability(device.index) if device.type == "cuda" else (0, 0)
    # the class is all that counts of the length, and few different needs keep the choice remembered
    return Need(device.type, arch, dtype, head_dim, backward, device_lengths, LONG if longest >= LONG else 0)


def usual(longest: int = 4096 + 415, device_lengths: bool = False, backward: bool = False) -> Need:
    """What the released model asks for on the current CUDA device."""
    return need_of(torch.device("cuda"), torch.bfloat16, 64, longest, device_lengths, backward)


def summary() -> str:
    """The choice for the released model's shapes in a few words: eager, captured, training."""
    needs = {"eager": usual(), "captured": usual(device_lengths=True), "training": usual(backward=True)}
    return ", ".join(f"{choose(need).name} ({what})" for what, need in needs.items())


def need_of_call(q: Tensor, k: Tensor, v: Tensor, longest: int, device_lengths: bool) -> Need:
    """What this call asks for."""
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return need_of(q.device, q.dtype, q.shape[-1], longest, device_lengths, backward)


def streams(need: Need) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The chosen candidate where it reads the joint layout and writes both streams itself."""
    return choose(need).streams


def run(q: Tensor, k: Tensor, v: Tensor, samples: adapters.Samples) -> Tensor:
    """Attention by the chosen candidate, a library's: [RQ, N, H]."""
    need = need_of_call(q, k, v, samples.longest, samples.joint_lengths is None)
    while True:
        chosen = choose(need)
        try:
            module = chosen.load(need)
        except (ImportError, OSError) as error:  # an extension built for another torch, say
            broken = next(name for name in chosen.modules(need.backward) if installed(name))
            failed[broken] = f"{broken} cannot be imported: {error}"
            choose.cache_clear()
            if forced() is None:
                warnings.warn(f"lens.joint_attention: {failed[broken]}; trying the next backend", stacklevel=2)
            continue
        assert chosen.call is not None, "a candidate that writes both streams is called by joint_attention"
        return chosen.call(q, k, v, samples, module)
