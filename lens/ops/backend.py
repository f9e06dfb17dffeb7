"""Which kernel runs, why, and how to override it.

A call picks its backend from the device of its tensors:

    reference   plain PyTorch, lens/ops/reference.py, on any device
    cpu         the compiled CPU kernels of lens._C
    cuda        the compiled CUDA kernels of lens._C

The compiled kernel is taken wherever there is one. Where there is none, the reference runs and importing this
module says so once, with the reason. LENS_OPS_BACKEND=reference | compiled, or `use(...)`, forces a choice; a
forced backend that cannot run raises. LENS_CPU_ISA=base | avx2 | avx512 | avx512bf16 | amx, or `use_isa(...)`, does the
same for the instruction set of the CPU kernels; the last two differ from avx512 in `moe_mxfp4`, amx in `sink_attention`, too.

`joint_attention` needs no extension: its "cpu" is PyTorch's kernel, its "cuda" what attention/choice.py chooses.
`sink_attention` has no CUDA kernel: on a GPU its reference runs, whatever is forced.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lens.ops.checks import dense_rows
from lens.ops.reference import arithmetic_dtype

CHOICES = ("auto", "reference", "compiled", "cpu", "cuda")
_BF16_ON_CUDA, _ON_CPU = ("moe_mxfp4",), ("sink_attention",)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


def _load() -> tuple[ModuleType | None, str]:
    # torch is imported by now: its bundled OpenMP runtime and the system's share one soname, so whichever is loaded first
    # serves both. With torch's loaded, torch.set_num_threads also governs the CPU kernels of lens._C.
    try:
        return importlib.import_module("lens._C"), ""
    except ImportError as error:
        return None, f"lens._C cannot be imported ({error}); build it with `pip install .`"


_extension, _missing = _load()
_with_cuda = _extension is not None and bool(_extension.with_cuda)
_choice = os.environ.get("LENS_OPS_BACKEND", "auto")
_isa: str = (
    "" if _extension is None else _extension.isa()
)  # which torch.compile can read, where it cannot call a builtin


def unavailable(device: str) -> str:
    """Why the compiled kernels cannot serve tensors on `device` ("cpu", "cuda", ...); "" if they can."""
    if device not in ("cpu", "cuda"):
        return f"there are no compiled kernels for device type {device}"
    if _extension is None:
        return _missing
    if device == "cuda" and not _with_cuda:
        return "lens._C was built without CUDA; rebuild it with LENS_CUDA=ON"
    return ""


@functools.cache
def no_target(index: int | None) -> str:
    """Why nothing in this build runs on a CUDA device (None: the current one), a launch's error 209; "" if something
    does."""
    if not torch.cuda.is_available():  # a fake tensor's
        return ""
    targets, capability = str(getattr(_extension, "cuda_targets", "")), torch.cuda.get_device_capability(index)
    if covers(targets, capability):
        return ""
    dotted = ".".join(map(str, capability))
    arch = "{}{}".format(*capability) + ("a" if capability == (9, 0) else "")
    return (
        f"lens._C was built for {targets or 'no target'}, which compute capability {dotted} cannot run; "
        f'rebuild it with LENS_CUDA_ARCHS="{arch}", or without LENS_CUDA_ARCHS'
    )


def covers(targets: str, capability: tuple[int, int]) -> bool:
    """Whether code for CMake's `targets` ("80-real 90a-real 120-virtual") runs on a device: machine code on its own
    major version from its minor on, PTX on everything newer, architecture-specific code on its own device alone."""
    for target in targets.split():
        number, _, kind = target.partition("-")
        own = number.rstrip("af")
        at = int(own[:-1]), int(own[-1])
        if number != own:
            found = capability == at
        else:
            real = kind != "virtual" and capability[0] == at[0] and capability >= at
            found = real or (kind != "real" and capability >= at)
        if found:
            return True
    return False


def no_kernel(op: str, dtype: torch.dtype) -> str:
    """Why `op` has no CUDA kernel for tensors of `dtype`; "" if it has."""
    if op in _ON_CPU:
        return "it has no CUDA kernel"
    if op in _BF16_ON_CUDA and dtype != torch.bfloat16:
        return f"its CUDA kernel multiplies bfloat16 alone, not {str(dtype).removeprefix('torch.')}"
    return ""


def without(kernel: str) -> str:
    """Why this build has no `kernel`; "" if it has."""
    return "" if hasattr(_extension, kernel) else f"lens._C was built without {kernel}"


def _refuse(op: str, device: str, reason: str) -> None:
    raise RuntimeError(f"lens.{op}: backend {_choice!r} was asked for but cannot run on {device}: {reason}")


def choose(op: str, x: Tensor) -> str:
    """Backend of `op` for tensors like x: "reference", "cpu" or "cuda". Raises if a forced one cannot run."""
    device = x.device.type
    if _choice == "reference" or (op in _ON_CPU and device == "cuda"):
        return "reference"
    if op == "joint_attention":
        reason = "" if device in ("cpu", "cuda") else f"no attention kernel is named for {device}"
    elif _extension is not None and device == "cpu":
        reason = ""
    elif _with_cuda and device == "cuda":
        reason = no_kernel(op, x.dtype) or no_target(x.device.index)
        if reason and not no_kernel(op, x.dtype) and _choice == "auto":
            warnings.warn(f"lens.ops: the cuda ops run their PyTorch reference: {reason}", stacklevel=3)
    else:
        reason = unavailable(device)
    if _choice in ("cpu", "cuda") and _choice != device:
        _refuse(op, device, f"the tensors are on {device}")
    if reason and _choice != "auto":
        _refuse(op, device, reason)
    return "reference" if reason else device


def override() -> str | None:
    """The choice that is forced, if any."""
    return None if _choice == "auto" else _choice


@contextlib.contextmanager
def use(choice: str) -> Iterator[None]:
    """Force a backend inside the block: "auto", "reference", "compiled", "cpu" or "cuda".

    "compiled" means the compiled kernels of the tensors' own device. The choice holds for the whole process.
    """
    global _choice
    before, _choice = _choice, _checked(choice, "backend")
    try:
        yield
    finally:
        _choice = before


def _checked(choice: str, name: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"lens.ops: {name} must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def isa() -> str:
    """Instruction set of the CPU kernels: "base", "avx2", "avx512", "avx512bf16" or "amx"."""
    extension("isa")
    return _isa


def available_isas() -> list[str]:
    """Instruction sets this CPU can run, narrowest first."""
    return list(extension("available_isas").available_isas())


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Force the instruction set of the CPU kernels inside the block; raises if the CPU lacks it."""
    module = extension("use_isa")
    before = _isa
    _set_isa(module, name)
    try:
        yield
    finally:
        _set_isa(module, before)


def _set_isa(module: Any, name: str) -> None:
    global _isa
    module.set_isa(name)
    _isa = module.isa()


def extension(op: str) -> Any:
    """lens._C, or an error that says why it is missing."""
    if _extension is None:
        raise RuntimeError(f"lens.{op}: {_missing}")
    return _extension


class CustomOp:
    """An op of torch.library: gradients, fake tensors, torch.compile and dispatch modes see it as one node.

    Where none of them is at work the function is called directly: the dispatcher costs about 30 microseconds, as
    much as the kernel itself on a small picture.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], devices: tuple[str, ...], mutates: tuple[str, ...]
    ) -> None:
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=mutates, device_types=devices)
        self.register_fake = self.registered.register_fake
        self.register_autograd = self.registered.register_autograd

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
            return self.registered(*arguments)
        return self.function(*arguments)


def custom_op(
    name: str, devices: tuple[str, ...] = ("cpu", "cuda"), mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], CustomOp]:
    """Decorator: register a function as the op `name` on these device types; `mutates`: arguments it writes."""
    return lambda function: CustomOp(name, function, devices, mutates)


def launch(kernel: str, like: Tensor, dtype: torch.dtype | None = None, **arguments: Any) -> None:
    """Run a kernel of lens._C on the device and current stream of `like`; tensors become addresses."""
    function = getattr(extension(kernel), kernel)
    # the caller's dict keeps temporaries alive until the kernel has been launched
    values: dict[str, Any] = {"dtype": DTYPES[dtype or like.dtype]}
    for name, value in arguments.items():
        values[name] = value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value
    if like.is_cuda:
        with torch.cuda.device(like.device):
            stream = torch.cuda.current_stream(like.device).cuda_stream
            function(**values, device=like.device.index, stream=stream)
    else:
        function(**values, device=-1, stream=0)


def column_sums(x: Tensor, batch: int, planes: int) -> Tensor:
    """Workspace for column sums per sample over x [R, D]: [split_slots(R, B), planes, D]; see csrc/params.h."""
    slots = x.shape[0] // extension("column_sums").split_rows + batch
    return x.new_empty(slots, planes, x.shape[1], dtype=arithmetic_dtype(x.dtype))


def rows_and_tables(x: Tensor, **tables: Tensor) -> dict[str, Any]:
    """Arguments of a kernel over x [R, D]: R, B, D, and of each modulation table [B, D] its rows and their stride."""
    dense = {name: dense_rows(table) for name, table in tables.items()}
    strides = {f"{name}_stride": table.stride(0) for name, table in dense.items()}
    sizes = {"R": x.shape[0], "B": next(iter(dense.values())).shape[0], "D": x.shape[1]}
    return {**dense, **strides, **sizes}


def split_chunks(rows: int) -> int:
    """Slots of a column sum over all rows; see csrc/params.h."""
    return -(-rows // extension("split_chunks").split_rows)


_checked(_choice, "LENS_OPS_BACKEND")
if _extension is not None and os.environ.get("LENS_CPU_ISA"):
    _set_isa(_extension, os.environ["LENS_CPU_ISA"])
if _choice != "reference":
    for _device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        if _why := unavailable(_device):
            if _choice != "auto":
                raise RuntimeError(f"lens.ops: LENS_OPS_BACKEND={_choice} cannot run on {_device}: {_why}")
            warnings.warn(f"lens.ops: the {_device} ops run their PyTorch reference: {_why}", stacklevel=2)
            break
