"""Which kernel computes a block's GEMM and the row op behind it: the first of an order that can serve the call.

"library" is cuBLASLt's GEMM and a row kernel after it, "fused" our GEMM with the row op in its epilogue. ORDERS holds one
tuple per (architecture, GEMM) for calls of ROWS rows and more; `python -m bench tables` rewrites it from committed results,
and "fused" is in an order only by one. Elsewhere the library serves. LENS_LINEAR=fused | library, or `use(name)`, forces a
choice for every GEMM; where `fused` cannot run, that raises.

Under batch invariance rows and orders do not count, for they are the whole batch's: "fused" wherever it can run, because a
row's bits depend on that row alone; elsewhere the library, sample by sample. `lens/engine/batch_invariance.py` has the price.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lens.ops import backend
from lens.ops.override import Override, capability, dotted, one_of

BACKENDS = ("library", "fused")
GEMMS = {
    "qkv": "linear_qkv_norm_rope",
    "w13": "linear_swiglu",
    "out": "linear_gated_residual",
    "w2": "linear_gated_residual",
}  # and the op of each
LIBRARY = ("library",)
BATCH_INVARIANT = ("fused", "library")
ROWS = 4096  # the fewest rows of a call that the orders speak of
# fmt: off
ORDERS: dict[tuple[str, str], tuple[str, ...]] = {
    # orders: begin
    ("9.0", "qkv"): ("library",),
    ("9.0", "w13"): ("library",),
    ("9.0", "out"): ("library",),
    ("9.0", "w2"): ("library",),
    # orders: end
}
# fmt: on
HEAD_DIM = 64  # of the one epilogue that knows heads
override = Override("LENS_LINEAR", "lens.ops.linear.choice", lambda: BACKENDS)
use = override.use
_cluster = 0


def cluster() -> int:
    """Blocks of our GEMM that share a tile of the weight: 1, 2, or 0 for whatever the launcher predicts is quicker."""
    return _cluster


@contextlib.contextmanager
def in_clusters(blocks: int) -> Iterator[None]:
    """Launch our GEMMs in clusters of 1 or 2 blocks inside, op by op or a step in one call; the same bits. A captured step
    keeps what it was captured with. RuntimeError where none fits the device."""
    global _cluster
    before, _cluster = _cluster, blocks
    try:
        yield
    finally:
        _cluster = before


@dataclass(frozen=True)
class GemmCall:
    """What one call asks for."""

    gemm: str
    device: str
    arch: tuple[int, int]  # compute capability
    dtype: torch.dtype
    rows: int  # of all streams; 0 where nothing may depend on them
    depth: int  # columns that are summed over
    columns: int
    head_dim: int = HEAD_DIM
    plain: bool = True  # the layers are torch.nn.Linear, with nothing around or hooked to them
    backward: bool = False  # a gradient is recorded
    batch_invariant: bool = False  # a sample's bits must not depend on its batch


def why_unsupported(call: GemmCall) -> str:
    """Why our kernel cannot serve the call, or ""."""
    op = GEMMS[call.gemm]
    if call.device != "cuda":
        return f"runs on cuda, not on {call.device}"
    if why := backend.unavailable("cuda") or backend.without(op):
        return why
    if call.arch != (9, 0):
        return f"needs compute capability 9.0, this is {dotted(call.arch)}"
    if call.dtype != torch.bfloat16:
        return f"computes in bfloat16, not in {str(call.dtype).removeprefix('torch.')}"
    if call.backward:
        return "has no backward pass: training takes cuBLASLt's GEMM"
    if not call.plain:
        return "a layer is no plain torch.nn.Linear"
    if call.gemm == "qkv" and call.head_dim != HEAD_DIM:
        return f"needs heads of {HEAD_DIM} channels, these have {call.head_dim}"
    for what, size in (("input", call.depth), ("output", call.columns)):
        if size % 64:
            return f"needs {what} columns in multiples of 64, got {size}"
    return ""


def order(call: GemmCall) -> tuple[str, ...]:
    """The kernels of the call, the best first."""
    if call.batch_invariant:
        return BATCH_INVARIANT
    return ORDERS.get((dotted(call.arch), call.gemm), LIBRARY) if call.rows >= ROWS else LIBRARY


def idle(batch_invariant: bool = False) -> bool:
    """Whether the library serves every call, which saves a look at each: nothing is forced, "fused" is first nowhere.
    batch_invariant: of those whose samples must not depend on their batch."""
    first = batch_invariant or any(names[0] == "fused" for names in ORDERS.values())
    return override.name != "fused" and (not first or backend.override() == "reference")


def decide(call: GemmCall) -> tuple[str, str]:
    """(kernel, why). RuntimeError where a forced one cannot run."""
    why = why_unsupported(call)
    if (name := override.name) is not None:
        op = f"lens.{GEMMS[call.gemm]}"
        if name not in BACKENDS:
            raise RuntimeError(f"{op}: {override.variable} must be {one_of(BACKENDS)}, got {name!r}")
        if name == "fused" and why:
            raise RuntimeError(f"{op}: fused was asked for but cannot run: {why}")
        return name, "forced"
    if why:
        return "library", f"fused {why}"
    if call.batch_invariant:
        return order(call)[0], "batch-invariant: a row's bits depend on that row alone"
    where = f"the order for {call.gemm} with {call.rows} rows on {dotted(call.arch)}"
    if "fused" not in order(call):
        return "library", f"fused is not in {where} without a committed result"
    return order(call)[0], f"the first in {where}"


@functools.lru_cache(maxsize=1024)
def choose(call: GemmCall) -> str:
    """The kernel that serves the call: "library" or "fused"."""
    return decide(call)[0]


override.changed = choose.cache_clear


def gemm_calls(
    gemms: Mapping[str, tuple[int, int]],
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    **more: bool,
) -> list[GemmCall]:
    """What the blocks of a model ask for with ``rows`` rows (0 with ``batch_invariant``), GEMM by GEMM: gemms holds the (input,
    output) columns of each."""
    arch = capability(device.index) if device.type == "cuda" else (0, 0)
    return [GemmCall(name, device.type, arch, dtype, rows, *gemms[name], head_dim, **more) for name in GEMMS]
