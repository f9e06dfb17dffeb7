"""What a time means on this machine: its ceilings, measured, the bytes that inputs and outputs take, the share reached.

FLOPs and compulsory traffic are `lens.cost`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lens.cost import gemm_flops

from .case import tensors

if TYPE_CHECKING:
    from .timing import Clock

# the paper's times (arXiv 2605.21573) on one H100: 1024 x 1024, batch 1, prompt to pixels
PAPER_SECONDS = {"lens": 3.15, "turbo": 0.84}
H100_BF16 = 989.5e12  # FLOP/s of the dense matrix units: 132 multiprocessors x 4096 x 1.83 GHz; an H200 has the same
SAME_CHIP = "An H200 has an H100's multiprocessors and 1.4x its memory bandwidth."


def moved(*values: Any) -> int:
    """Bytes of all tensors in nested arguments and results: what a pass over them reads and writes once."""
    return sum(t.numel() * t.element_size() for t in tensors(values))


def roof(flops: float, moved_bytes: float, seconds: float, ceilings: dict[str, float]) -> dict[str, float]:
    """What a time means on this machine: rates, their shares of the ceilings, and the floor min time over both.

    ceilings: {"copy": bytes per second, "matmul": FLOP/s}, measured in the same run.
    """
    floor = max(flops / ceilings["matmul"], moved_bytes / ceilings["copy"])
    return {
        "flops_per_s": flops / seconds,
        "bytes_per_s": moved_bytes / seconds,
        "of_matmul": flops / seconds / ceilings["matmul"],
        "of_copy": moved_bytes / seconds / ceilings["copy"],
        "floor_s": floor,
        "of_floor": floor / seconds,
    }


def ceilings(device: torch.device, clock: Clock | None = None) -> dict[str, float]:
    """Measured now on this device: bytes/s of a copy far larger than any cache (read plus written), and FLOP/s of a
    square GEMM of random numbers, bfloat16 on a GPU, float32 on a CPU."""
    from .case import Subject, generator
    from .timing import clock_of

    gpu = device.type == "cuda"
    g = generator(device, "ceilings")
    source = torch.randn((1 << 28) if gpu else (16 << 20), generator=g, device=device)
    target = torch.empty_like(source)
    side, dtype = (8192, torch.bfloat16) if gpu else (768, torch.float32)
    a, b = (torch.randn(side, side, generator=g, device=device, dtype=dtype) for _ in range(2))
    clock, found = clock or clock_of(device), {}
    for name, call, work in (
        ("copy", lambda: target.copy_(source), 2 * moved(source)),
        ("matmul", lambda: a @ b, gemm_flops(side, side, side)),
    ):
        launcher = clock.launcher(Subject(call, mode="stream"), [()])
        launcher.outputs()
        launcher.round()
        found[name] = work / min(launcher.round() for _ in range(8 if gpu else 5))
    return found
