"""The ops of lens.ops against their reference, eager and compiled by Inductor, on this CPU.

    python -m bench.ops                                   every op, float32 and bfloat16, forward and backward
    python -m bench.ops --op swiglu --dtype fp32 --threads 1

Rows of a large model: 4096 image tokens of width 1536, two samples. The three variants of a case take turns, and the
best time of each counts, so that other work on the machine hits all of them alike; only the ratios mean something.
Last line: the same table as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens import ops
from lens.ops import backend, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH, HEADS, HEAD_DIM, HIDDEN, CHANNELS, ENCODER = 1536, 24, 64, 4096, 128, 2880
IMAGE, TEXT = [2048, 2048], [415, 100]
GOAL = 1.3  # float32: at most this many times Inductor's time, and less than eager's


class Case(NamedTuple):
    arguments: dict[str, Any]
    differentiable: bool = True


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Arguments of every measured op; joint_attention is torch's own kernel and has no case here."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, wide: bool = False) -> Tensor:
        x = torch.randn(*shape, generator=generator)
        return x.to(reference.arithmetic_dtype(dtype)) if wide else x.to(dtype)

    rows, text_rows = sum(IMAGE), sum(TEXT)
    table = make(len(IMAGE), 6 * WIDTH)
    shift, scale, gate = (table[:, i * WIDTH : (i + 1) * WIDTH] for i in range(3))
    image_offsets, text_offsets = offsets(IMAGE), offsets(TEXT)
    x, y, weight = make(rows, WIDTH), make(rows, WIDTH), make(WIDTH)
    modulation = {"weight": weight, "scale": scale, "shift": shift, "offsets": image_offsets}
    angle = make(rows + text_rows, HEAD_DIM // 2, wide=True)
    heads = {f"{stream}_{part}_weight": make(HEAD_DIM) for stream in ("image", "text") for part in "qk"}
    qkv = {"image_qkv": make(rows, 3 * WIDTH), "text_qkv": make(text_rows, 3 * WIDTH), **heads}
    joint = {"cos": angle.cos(), "sin": angle.sin(), "image_offsets": image_offsets, "text_offsets": text_offsets}
    valid = torch.cat([b * max(TEXT) + torch.arange(n) for b, n in enumerate(TEXT)])
    sampler = {"x": make(rows, CHANNELS, wide=True), "cond": make(rows, CHANNELS), "uncond": make(rows, CHANNELS)}
    sampler |= {"delta": make(len(IMAGE), wide=True), "guidance": 5.0, "offsets": image_offsets}
    return {
        "pack_tokens": Case({"x": make(len(TEXT), max(TEXT), ENCODER), "rows": valid}),
        "unpack_tokens": Case(
            {"packed": make(text_rows, ENCODER), "rows": valid, "batch": len(TEXT), "length": max(TEXT)}
        ),
        "rms_norm_modulate": Case({"x": x, **modulation}),
        "qk_norm_rope": Case({**qkv, **joint}),
        "gated_residual": Case({"x": x, "y": y, "gate": gate, "offsets": image_offsets}),
        "gated_residual_norm_modulate": Case({"x": x, "y": y, "gate": gate, **modulation}),
        "swiglu": Case({"h": make(rows, 2 * HIDDEN)}),
        "guidance_step": Case(sampler, differentiable=False),
    }


def call(op: Callable[..., Any], case: Case, backward: bool) -> Callable[[], Any]:
    """One forward pass, or one forward and backward pass, as a function without arguments."""
    if not backward:
        return torch.no_grad()(lambda: op(**case.arguments))
    arguments = dict(case.arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name not in ("cos", "sin"):
            arguments[name] = value.detach().requires_grad_()
    leaves = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    sample = op(**arguments)
    douts = [torch.ones_like(out) for out in (sample if isinstance(sample, tuple) else (sample,))]
    return lambda: torch.autograd.grad(op(**arguments), leaves, douts)


def keep_freed_memory() -> None:
    """Let glibc reuse what was freed. New pages for every result would cost more than the kernels, by luck of the
    allocator for one variant and not for another."""
    libc, m_trim_threshold, m_mmap_max = ctypes.CDLL(None), -1, -4
    if not (libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1)):
        raise RuntimeError("this C library has no mallopt that works; the bench is written for glibc")


def take_turns(variants: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Best time of each variant in milliseconds; they run one after the other until the time is up."""
    best = [float("inf")] * len(variants)
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        for i, variant in enumerate(variants):
            start = time.perf_counter()
            variant()
            if turn >= 2:  # the first turns compile and warm up
                best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
        if turn == 1:
            end = time.perf_counter() + seconds
        if turn >= 5 and time.perf_counter() > end:
            return best


def measure(name: str, dtype: str, backward: bool, seconds: float) -> dict[str, Any]:
    case = cases(DTYPES[dtype])[name]
    spec = getattr(reference, name)
    # a fresh function per case: Inductor would else compile later cases for shapes unknown
    inductor = torch.compile(lambda **arguments: spec(**arguments), dynamic=False)
    with backend.use("compiled"):
        variants = [call(op, case, backward) for op in (getattr(ops, name), spec, inductor)]
        ours, eager, compiled = take_turns(variants, seconds)
    row = {"op": name, "pass": "backward" if backward else "forward", "dtype": dtype, "ms": ours}
    return {**row, "eager_ms": eager, "inductor_ms": compiled, "of_eager": ours / eager, "of_inductor": ours / compiled}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", choices=list(cases(torch.float32)), help="default: all")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: both")
    parser.add_argument("--pass", action="append", dest="passes", choices=["forward", "backward"], help="default: both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="OpenMP threads")
    parser.add_argument("--isa", choices=backend.available_isas(), help="default: the widest")
    parser.add_argument("--seconds", type=float, default=3.0, help="per case, after compilation")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows = []
    with backend.use_isa(options.isa or backend.isa()):
        print(
            f"torch {torch.__version__}, {backend.isa()} kernels, {options.threads} thread(s); ratios below 1: we win"
        )
        print(f"{'op':30} {'pass':9} {'dtype':5} {'ms':>8} {'eager':>8} {'inductor':>8} {'/eager':>7} {'/inductor':>9}")
        for dtype in options.dtype or DTYPES:
            for name, case in cases(DTYPES[dtype]).items():
                for which in options.passes or ("forward", "backward"):
                    if (options.op and name not in options.op) or (which == "backward" and not case.differentiable):
                        continue
                    row = measure(name, dtype, which == "backward", options.seconds)
                    rows.append(row)
                    late = dtype == "fp32" and (row["of_eager"] > 1 or row["of_inductor"] > GOAL)
                    print(
                        f"{name:30} {which:9} {dtype:5} {row['ms']:8.2f} {row['eager_ms']:8.2f} "
                        f"{row['inductor_ms']:8.2f} {row['of_eager']:7.2f} {row['of_inductor']:9.2f}"
                        f"{'  misses the goal' if late else ''}",
                        flush=True,
                    )
    print(json.dumps({"threads": options.threads, "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
