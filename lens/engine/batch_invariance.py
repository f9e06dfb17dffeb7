"""Batch invariance: which kernels give a sample the same bits in any batch, what that costs, when it is the default.

Rows of our GEMMs depend on themselves alone (docs/gemm.md), so where they serve every GEMM of the blocks, invariance
costs what our GEMMs lose to the orders of linear/choice.py, and steps are captured as without it. Elsewhere the library's
GEMMs run sample by sample. On a CPU it is the default; with AMX bfloat16 has a GEMM of its own (ops/linear_rows.py). The
default on a GPU follows a rule: on, where the price was measured at every case of CASES and the highest is below LIMIT,
unless an attention is forced that looks at other samples.
invariance_table.json holds the prices; `python -m bench tables` writes those of committed results.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lens.config import LensConfig
from lens.ops.attention import choice as attention_choice
from lens.ops.linear import choice as linear_choice
from lens.ops.linear.fused import plain
from lens.ops.override import capability, dotted

if TYPE_CHECKING:
    from lens.model import LensTransformer2DModel

LIMIT = 0.02  # of a step's time
CASES = ("step/1024/cfg/text415/bf16", "step/1024/b4/text200/bf16", "step/1024/b8/text200/bf16")
TABLE = Path(__file__).with_name("invariance_table.json")


@functools.cache
def table() -> list[dict[str, Any]]:
    """Entries of invariance_table.json: arch, case, price (a step with over one without, less 1), status, source."""
    entries: list[dict[str, Any]] = json.loads(TABLE.read_text())["entries"]
    for e in entries:
        known = e["status"] in ("measured", "predicted") and e["case"] in CASES and e["source"]
        if not known or not -1 < e["price"] < float("inf"):
            raise ValueError(f"{TABLE.name}: a measured or predicted price with its source expected, got {e}")
    return entries


def price(arch: tuple[int, int], status: str = "measured") -> float | None:
    """The highest price of any case; None where one has no such entry."""
    found = {e["case"]: float(e["price"]) for e in table() if (e["arch"], e["status"]) == (dotted(arch), status)}
    return max(found.values()) if set(found) == set(CASES) else None


def why_library_gemm(config: LensConfig, device: torch.device, dtype: torch.dtype, layers: Sequence[Any] = ()) -> str:
    """Why the library's GEMMs serve blocks whose samples must not depend on their batch, hence one sample at a time;
    "" where our GEMMs serve them. RuntimeError where our GEMMs are forced and cannot run."""
    if linear_choice.idle(batch_invariant=True):
        return "the reference ops were asked for"
    for call in linear_choice.gemm_calls(
        config.block_gemms,
        config.attention_head_dim,
        device,
        dtype,
        0,
        plain=all(map(plain, layers)),
        batch_invariant=True,
    ):
        chosen, why = linear_choice.decide(call)
        if chosen == "library":
            return f"{call.gemm}: {why}"
    return ""


def why_library_gemm_of_model(model: LensTransformer2DModel, device: torch.device | None = None) -> str:
    """The same of a model's own layers."""
    layers = [layer for b in model.layers() for s in b.streams() for layer in (s.qkv, s.out, s.w13, s.w2)]
    return why_library_gemm(model.config, device or model.device, model.dtype, layers)


def why_attention_is_not_invariant(config: LensConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Why attention, as it is forced, cannot keep samples apart, or ""."""
    try:
        attention_choice.choose(
            attention_choice.attention_call(device, dtype, config.attention_head_dim, 0, batch_invariant=True)
        )
    except RuntimeError as error:
        return str(error)
    return ""


def default(model: LensTransformer2DModel, device: torch.device | None = None) -> bool:
    """The default of ``model.batch_invariant``: on a CPU yes, on a GPU by the rule above. device: where the model
    will run, the model's own by default."""
    device = device or model.device
    if device.type != "cuda":
        return device.type == "cpu"
    found = price(capability(device.index))
    if found is None or found >= LIMIT or why_library_gemm_of_model(model, device):
        return False
    return not why_attention_is_not_invariant(model.config, device, model.dtype)


def report(device: torch.device) -> tuple[bool, str]:
    """(whether it is the default, what it is and costs) of the released model on a CUDA device."""
    arch, no = (
        capability(device.index),
        "no, at rounding level: a picture's last bits depend on what is drawn beside it",
    )
    try:
        why = why_library_gemm(LensConfig(), device, torch.bfloat16)
    except RuntimeError as error:
        return False, str(error)
    if why:
        return False, f"{no}; batch_invariant=True runs each GEMM sample by sample, not captured ({why})"
    if why := why_attention_is_not_invariant(LensConfig(), device, torch.bfloat16):
        return False, f"{no}; batch_invariant=True raises ({why})"
    measured, predicted = price(arch), price(arch, "predicted")
    if measured is not None:
        said = f"{100 * measured:.1f} % of a step, measured"
        if measured < LIMIT:
            return True, f"yes, bit for bit, by our GEMMs: {said}"
    else:
        said = "not measured" if predicted is None else f"{100 * predicted:.1f} % of a step, predicted"
    return False, f"{no}; batch_invariant=True takes our GEMMs in every block, captured ({said})"
