"""Which kernel serves each op on a device, and why."""

from __future__ import annotations

import torch

from lens.config import LensConfig
from lens.ops import backend
from lens.ops.attention import choice as attention_choice
from lens.ops.linear import choice as linear_choice

OWN_ISAS = {"moe_mxfp4": ("avx512bf16", "amx"), "sink_attention": ("amx",)}  # beyond avx512, op by op
OPS = (
    "pack_tokens",
    "unpack_tokens",
    "rms_norm_modulate",
    "qk_norm_rope",
    "joint_attention",
    "gated_residual",
    "gated_residual_norm_modulate",
    "swiglu",
    "guidance_step",
    "group_norm_silu",
    "moe_mxfp4",
    "sink_attention",
)


def report(device: str | None = None) -> list[tuple[str, str, str]]:
    """One row (op, backend, reason) per op for tensors on `device` ("cpu" or "cuda"; default: cuda if usable)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for op in OPS:
        try:
            dtype = torch.bfloat16 if device == "cuda" else torch.float32  # what each computes in by default
            chosen = backend.choose(op, torch.empty(0, device=device, dtype=dtype))
            reason = _reason(op, chosen, device)
        except RuntimeError as error:
            chosen, reason = "none", str(error)
        rows.append((op, chosen, reason))
    return rows


def gemms() -> list[tuple[str, str, str]]:
    """(GEMM, kernel, why) of the released model's guided 1024x1024 step on the current CUDA device; "none" where a
    forced one cannot run."""
    rows, config = [], LensConfig()
    device = torch.device("cuda")
    for call in linear_choice.gemm_calls(
        config.block_gemms, config.attention_head_dim, device, torch.bfloat16, 8192 + 415
    ):
        try:
            chosen, why = linear_choice.decide(call)
        except RuntimeError as error:
            chosen, why = "none", str(error)
        rows.append((call.gemm, chosen, why))
    return rows


def _reason(op: str, chosen: str, device: str) -> str:
    if (forced := backend.override()) is not None:
        return f"forced to {forced}"
    if chosen == "reference":
        no_kernel = backend.no_kernel(op, torch.bfloat16)
        return backend.unavailable(device) or no_kernel or backend.no_target(torch.cuda.current_device())
    if op == "joint_attention":
        if chosen == "cpu":
            return "torch's flash attention, per sample or group of equal samples; bfloat16 on AMX lens._C's"
        return "by candidate: " + attention_choice.summary()
    if chosen != "cpu":
        return "lens._C, CUDA kernels"
    isa = backend.isa()
    beyond = isa in ("avx512bf16", "amx") and isa not in OWN_ISAS.get(op, ())
    return f"lens._C, {'avx512' if beyond else isa} kernels"
