"""The CUDA row kernels against the speed of a copy on the same device, forward and backward.

    python -m bench.gpu_rows                        every op, bfloat16, two samples of 1024 x 1024 pixels
    python -m bench.gpu_rows --op swiglu --dtype float32

Each op runs `CALLS` times inside one CUDA graph, so that no host time is measured, over inputs that take turns and
together exceed the L2 cache. Reported per call: microseconds (median of the replays), bytes it cannot avoid moving per
second, and the share of that in the bytes per second of a device copy. Last line: the same table as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lens import ops
from lens.ops import backend

from .cases import Shape, _arguments, _moved

RELEASED = Shape((4096, 4096), (415, 0), heads=24, head_channels=64, latent_channels=128)
OPS = tuple(op for op in backend.OPS if op != "joint_attention")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# elements a backward pass cannot avoid moving, in multiples of the elements of the output
BACKWARD = {
    "rms_norm_modulate": 3.0,  # dy, x -> dx
    "gated_residual": 3.0,  # dout, y -> dy
    "gated_residual_norm_modulate": 3.0,  # of two outputs: dx_new, dnormed, x_new, y -> dx, dy
    "qk_norm_rope": 8 / 3,  # dqkv, q and k -> dqkv
    "swiglu": 5.0,  # dy, a, u -> da, du
}
CALLS, TURNS, REPLAYS = 24, 4, 30


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """Time of one call: `CALLS` of them, in turns, in one graph; median of the replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # loads kernels and fills the allocator, neither of which a capture allows
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()
    times = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / CALLS)
    return sorted(times)[len(times) // 2]


def copy_rate() -> float:
    """Bytes per second, read and written, of a copy far larger than the cache."""
    source = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / microseconds([lambda: target.copy_(source)]) * 1e6


def on_device(values: list[Any]) -> list[Any]:
    return [value.cuda() if isinstance(value, Tensor) else value for value in values]


def forward(op: str, arguments: list[Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return getattr(ops, op)(*arguments)

    return call


def both_ways(op: str, arguments: list[Any]) -> Callable[[], Any]:
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.dtype.is_floating_point]
    if op == "qk_norm_rope":
        leaves = leaves[:6]  # the rotary tables carry no gradient
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def call() -> Any:
        outputs = getattr(ops, op)(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, [output.detach() for output in outputs])

    return call


def measure(op: str, dtype: torch.dtype, roof: float) -> list[dict[str, Any]]:
    turns = [on_device(_arguments(op, RELEASED, dtype)) for _ in range(TURNS)]
    output = forward(op, turns[0])()
    there = microseconds([forward(op, arguments) for arguments in turns])
    moved = {"forward": _moved(turns[0]) + _moved(output)}
    taken = {"forward": there}
    if op in BACKWARD:
        moved["backward"] = int(BACKWARD[op] * _moved(output))
        taken["backward"] = microseconds([both_ways(op, arguments) for arguments in turns]) - there
    return [
        {
            "op": op,
            "pass": which,
            "us": round(us, 2),
            "GB/s": round(moved[which] / us / 1e3, 1),
            "of copy": round(moved[which] / us * 1e6 / roof, 3),
        }
        for which, us in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu_rows: torch sees no CUDA device, nothing was measured")
    rows = []
    with backend.use("cuda"):
        roof = copy_rate()
        print(f"copy: {roof / 1e9:.0f} GB/s on {torch.cuda.get_device_name()}")
        for op in options.op or OPS:
            for row in measure(op, DTYPES[options.dtype], roof):
                rows.append(row)
                print(f"{op:30} {row['pass']:9} {row['us']:9.2f} us {row['GB/s']:8.1f} GB/s {row['of copy']:6.1%}")
    card = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": options.dtype}
    print(json.dumps({**card, "copy GB/s": round(roof / 1e9, 1), "rows": rows}))


if __name__ == "__main__":
    main()
