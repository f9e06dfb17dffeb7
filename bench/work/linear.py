"""A block's GEMMs with the row op behind each, as the model calls them: gemm/<what>/<rows>/<dtype>.

what: qkv_norm_rope, w13_swiglu, out_residual_norm and w2_residual_norm, which make up a block, and the last two without
their norm. `ours` is what `lens.ops.linear.choice` chooses; `library` (cuBLASLt, then the row kernel) and `fused` (our
GEMM with the row op in its epilogue) are forced; `fused_alone` and `fused_clusters` force what `fused` chooses itself,
thread blocks without and with clusters of two. Text rows share the launch of `ours`. `cutlass`, in builds with
LENS_CUTLASS, knows one stream with samples of one length. A rate counts the GEMM's FLOPs over the time of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lens.cost import gemm_flops
from lens.ops import backend, reference
from lens.ops.linear import choice as linear_choice
from lens.ops.linear import fused as linear_fused

from ..case import OURS, Case, Subject, Work, generator, wider
from .scale import Scale

CUTLASS = "cutlass"
CLUSTERS = {"fused_alone": 1, "fused_clusters": 2}  # subject -> blocks that share a tile of the weight
KINDS = {  # what -> the GEMM of linear/choice.py, and whether a norm follows
    "w13_swiglu": ("w13", False),
    "qkv_norm_rope": ("qkv", False),
    "w2_residual_norm": ("w2", True),
    "out_residual_norm": ("out", True),
    "w2_residual": ("w2", False),
    "out_residual": ("out", False),
}
BOUND = {torch.bfloat16: 1.5e-2, torch.float32: 2e-5}


def subjects_of(what: str) -> tuple[str, ...]:
    """The ways of one GEMM."""
    return (OURS, *linear_choice.BACKENDS, *CLUSTERS, *[CUTLASS] * (what in ("w2_residual", "out_residual")))


def prepare(scale: Scale, what: str, images: list[int], texts: list[int], device: torch.device) -> Work:
    """images, texts: rows of every sample; without any text the text stream is absent, but from qkv, where it is empty."""
    config, dtype, (name, norm) = scale.config, scale.dtype, KINDS[what]
    d, f, head = config.inner_dim, config.mlp_hidden_dim, config.attention_head_dim
    depth, columns, biased = {
        "qkv": (d, 3 * d, True),
        "w13": (d, 2 * f, False),
        "out": (d, d, True),
        "w2": (f, d, False),
    }[name]
    streams = [images, texts] if sum(texts) or name == "qkv" else [images]
    rows, g = [sum(s) for s in streams], generator(device, "linear", what, *images, *texts)

    def normal(*shape: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, device=device) * gain).to(dtype)

    layers = [nn.Linear(depth, columns, biased, device=device, dtype=dtype).requires_grad_(False) for _ in streams]
    for layer in layers:
        layer.weight.copy_(normal(columns, depth, gain=1 / math.sqrt(depth)))
        if layer.bias is not None:
            layer.bias.copy_(normal(columns, gain=0.02))
    offsets = [torch.tensor([0, *s]).cumsum(0).to(device, torch.int32) for s in streams]
    tables = [[normal(len(s), d, gain=0.3) for _ in range(3)] for s in streams]
    gate, scales, shift = ([table[i] for table in tables] for i in range(3))
    norms = [1 + normal(d, gain=0.1) for _ in streams]
    q_norms, k_norms = ([1 + normal(head, gain=0.1) for _ in streams] for _ in "qk")
    angle = torch.randn((sum(rows), head // 2), generator=g, device=device)
    cos, sin = angle.cos(), angle.sin()

    def call(x: list[Tensor], y: list[Tensor]) -> Any:
        """x: what the GEMM reads; y: the residual stream."""
        if name == "qkv":
            return linear_fused.linear_qkv_norm_rope(x, layers, q_norms, k_norms, cos, sin, offsets[0], offsets[1])
        if name == "w13":
            return linear_fused.linear_swiglu(x, layers)
        if not norm:
            return linear_fused.linear_gated_residual(y, x, layers, gate, offsets, gemm=name)
        modulation = norms, scales, shift
        return linear_fused.linear_gated_residual_norm_modulate(y, x, layers, gate, *modulation, offsets, gemm=name)

    def forced(way: str, cluster: int = 0) -> Callable[..., Any]:
        def run(x: list[Tensor], y: list[Tensor]) -> Any:
            with linear_choice.use(way), linear_choice.in_clusters(cluster):
                return call(x, y)

        return run

    def cutlass(x: list[Tensor], y: list[Tensor]) -> Any:
        out, (samples, length) = torch.empty_like(y[0]), (len(images), images[0])
        arguments: dict[str, Any] = {"B": samples, "S": length, "D": columns, "K": depth, "x": y[0], "out": out}
        arguments |= {"a": x[0], "weight": layers[0].weight, "bias": layers[0].bias}
        arguments |= {"gate": gate[0], "gate_stride": gate[0].stride(0)}
        backend.launch("cutlass_linear_gated_residual", y[0], **arguments)
        return [out]

    def oracle(x: list[Tensor], y: list[Tensor]) -> Any:
        def wide(values: list[Tensor]) -> list[Tensor]:
            return [v.to(wider(dtype)) for v in values]

        weight = wide([layer.weight for layer in layers])
        bias = [None if layer.bias is None else layer.bias.to(wider(dtype)) for layer in layers]
        if name == "qkv":
            given, (c, s) = [b for b in bias if b is not None], wide([cos, sin])
            of_heads = wide(q_norms), wide(k_norms)
            return reference.linear_qkv_norm_rope(wide(x), weight, given, *of_heads, c, s, offsets[0], offsets[1])
        if name == "w13":
            return reference.linear_swiglu(wide(x), weight)
        added = reference.linear_gated_residual(wide(y), wide(x), weight, bias, wide(gate), offsets)
        if not norm:
            return added
        of = zip(added, wide(norms), wide(scales), wide(shift), offsets)
        return added, [reference.rms_norm_modulate(*one) for one in of]

    subjects = {OURS: Subject(call)}
    left_out: dict[str, str] = {}
    arch = linear_choice.capability(device.index) if device.type == "cuda" else (0, 0)
    asked = linear_choice.GemmCall(name, device.type, arch, dtype, sum(rows), depth, columns, head)
    subjects["library"] = Subject(forced("library"))
    if why := linear_choice.why_unsupported(asked):
        left_out |= dict.fromkeys(("fused", *CLUSTERS), why)
    else:
        subjects |= {way: Subject(forced("fused", n)) for way, n in {"fused": 0, **CLUSTERS}.items()}
    if CUTLASS in subjects_of(what):
        if why := backend.without("cutlass_linear_gated_residual"):
            left_out[CUTLASS] = f"{why}: build with LENS_CUTLASS"
        elif len(streams) > 1 or len(set(images)) > 1:
            left_out[CUTLASS] = "one stream with samples of one length alone"
        else:
            subjects[CUTLASS] = Subject(cutlass)
    item, total = dtype.itemsize, sum(rows)
    out = {"qkv": 3 * d, "w13": f, "out": d, "w2": d}[name] + d * norm + d * (name in ("out", "w2"))  # y is read, too
    moves = item * (total * (depth + out) + len(streams) * columns * (depth + biased)) + 8 * angle.numel() * (
        name == "qkv"
    )
    sets = min(8, max(2, math.ceil(200e6 / moves))) if device.type == "cuda" else 1
    inputs = [([normal(r, depth) for r in rows], [normal(r, d) for r in rows]) for _ in range(sets)]
    return Work(
        inputs=inputs,
        subjects=subjects,
        oracle=oracle,
        bound=BOUND[dtype],
        flops=gemm_flops(total, depth, columns),
        bytes=moves,
        data=[layer.weight for layer in layers],
        left_out=left_out,
        more={"gemm": name, "rows": total, "block": norm or name in ("qkv", "w13")},
    )


def cases(scale: Scale, gpu: bool) -> list[Case]:
    """Image rows of a guided pair and of one sample at the main size, with and without text rows."""
    one, longest, shorter = scale.tokens(scale.main), scale.texts[-1], scale.texts[-2]
    sizes = [([one] * 2, [longest, 0]), ([one], [shorter]), ([one] * 2, [0, 0]), ([one], [0])]
    found = []
    for images, texts in sizes:
        for what in KINDS:

            def make(
                device: torch.device, what: str = what, images: list[int] = images, texts: list[int] = texts
            ) -> Work:
                return prepare(scale, what, images, texts, device)

            label = f"{sum(images)}" + (f"+text{sum(texts)}" if sum(texts) else "")
            found.append(Case(f"{scale.prefix}gemm/{what}/{label}/{scale.dtype_name}", subjects_of(what), make))
    return found
