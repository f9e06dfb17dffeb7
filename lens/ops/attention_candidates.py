"""What can compute joint attention on a GPU, or its gradients: every candidate and what it needs; attention_backends.py
chooses. Nothing here is imported before it is chosen."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens.ops import _attention_cuda as adapters
from lens.ops import _attention_gradients as gradients
from lens.ops import _attention_hopper, backend
from lens.ops.choice import dotted

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
    call: Callable[..., Any] | None  # an adapter of _attention_cuda.py, or of _attention_gradients.py
    streams: Callable[..., tuple[Tensor, Tensor]] | None = None  # instead, as _attention_hopper.streams
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
        streams=_attention_hopper.streams,
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
