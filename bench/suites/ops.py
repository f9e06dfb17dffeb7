"""Every op of `lens.ops` against its specification, eager and compiled by Inductor; forward and backward.

ops/<stem>/<shape>/<dtype>/<forward | backward>. Shapes: "1024cfg" is a guided pair of 1024 x 1024 with 415 text tokens in
one half; "pair" two samples of 2048 image tokens, for a CPU; "mini" Lens-Mini's eight 64 x 64 pictures; "prompt" and "token"
the mixture of experts of a GPT-OSS-20B layer on a prompt's tokens and on one, beside transformers', which expands the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lens import ops
from lens.cost import attention_flops
from lens.ops import reference

from ..case import DTYPES, OURS, Case, Subject, Work, generator, tensors, wider
from ..roofline import moved
from ..work import experts, sinks
from ..work.comparators import compiled
from ..work.scale import Scale

SUBJECTS = (OURS, "spec_eager", "spec_compiled")
BOUND = {torch.bfloat16: 1.5e-2, torch.float32: 2e-5}
GOAL = 1.3  # a CPU kernel in float32 needs at most so many times Inductor's time, and less than eager's


@dataclass(frozen=True)
class OpSizes:
    images: tuple[int, ...]  # image tokens of each sample
    texts: tuple[int, ...]
    heads: int = 24
    head: int = 64
    channels: int = 128  # of a latent token
    encoder: int = 2880

    @property
    def width(self) -> int:
        return self.heads * self.head


SHAPES = {
    "1024cfg": OpSizes((4096, 4096), (415, 0)),
    "pair": OpSizes((2048, 2048), (415, 100)),
    "mini": OpSizes((16,) * 8, (12,) * 8, heads=2, channels=32, encoder=128),
    "small": OpSizes((9, 4), (5, 2), heads=2, channels=8, encoder=16),
}
STEMS = (
    "rms_norm_modulate",
    "gated_residual_norm_modulate",
    "qk_norm_rope",
    "swiglu",
    "gated_residual",
    "group_norm_silu",
    "guidance_step",
    "pack_tokens",
    "unpack_tokens",
    "joint_attention",
)
NO_GRADIENT = {"guidance_step", "group_norm_silu"}
CONSTANTS = {"cos", "sin", "delta"}  # floating-point arguments that carry no gradient
# elements a backward pass cannot avoid moving, in multiples of the elements of the output
BACKWARD = {
    "pack_tokens": 2.0,  # dpacked -> dx
    "unpack_tokens": 2.0,
    "rms_norm_modulate": 3.0,  # dy, x -> dx
    "gated_residual": 3.0,  # dout, y -> dy
    "gated_residual_norm_modulate": 3.0,  # of two outputs: dx_new, dnormed, x_new, y -> dx, dy
    "qk_norm_rope": 8 / 3,  # dqkv, q and k -> dqkv
    "swiglu": 5.0,  # dy, a, u -> da, du
    "joint_attention": 8.0,  # dout, q, k, v, out -> dq, dk, dv
}


def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def arguments(stem: str, s: OpSizes, dtype: torch.dtype, device: torch.device, turn: int = 0) -> dict[str, Any]:
    """Arguments of one call by the names of reference.py, drawn on the device from a fixed key."""
    g = generator(device, "ops", stem, turn)

    def normal(*size: int, wide: bool = False) -> Tensor:
        drawn = torch.randn(size, generator=g, device=device)
        return drawn.to(reference.arithmetic_dtype(dtype)) if wide else drawn.to(dtype)

    rows, text, samples, width = sum(s.images), sum(s.texts), len(s.images), s.width
    table = normal(samples, 6 * width)
    shift, scale, gate = (table[:, i * width : (i + 1) * width] for i in range(3))
    offsets, text_offsets = _offsets(s.images, device), _offsets(s.texts, device)
    modulation = {"weight": normal(width), "scale": scale, "shift": shift, "offsets": offsets}
    longest = max(s.texts)
    valid = torch.cat([b * longest + torch.arange(n) for b, n in enumerate(s.texts)]).to(device)
    if stem == "pack_tokens":
        return {"x": normal(samples, longest, s.encoder), "rows": valid}
    if stem == "unpack_tokens":
        return {"packed": normal(text, s.encoder), "rows": valid, "batch": samples, "length": longest}
    if stem == "rms_norm_modulate":
        return {"x": normal(rows, width), **modulation}
    if stem == "gated_residual":
        return {"x": normal(rows, width), "y": normal(rows, width), "gate": gate, "offsets": offsets}
    if stem == "gated_residual_norm_modulate":
        return {"x": normal(rows, width), "y": normal(rows, width), "gate": gate, **modulation}
    if stem == "swiglu":
        return {"h": normal(rows, 2 * int(width / 3 * 8))}
    if stem == "group_norm_silu":  # pixels of maps as wide as the model, for a shape like the others'
        return {
            "x": normal(rows, width),
            "weight": normal(width),
            "bias": normal(width),
            "offsets": offsets,
            "groups": 32,
        }
    if stem == "guidance_step":
        x, delta = normal(rows, s.channels, wide=True), normal(samples, wide=True)
        velocities = {"cond": normal(rows, s.channels), "uncond": normal(rows, s.channels)}
        return {"x": x, **velocities, "delta": delta, "guidance": 5.0, "offsets": offsets}
    streams = {"image_offsets": offsets, "text_offsets": text_offsets}
    if stem == "qk_norm_rope":
        angle = normal(rows + text, s.head // 2, wide=True)
        weights = {f"{stream}_{part}_weight": normal(s.head) for stream in ("image", "text") for part in "qk"}
        qkv = {"image_qkv": normal(rows, 3 * width), "text_qkv": normal(text, 3 * width)}
        return {**qkv, **weights, "cos": angle.cos(), "sin": angle.sin(), **streams}
    if stem == "joint_attention":
        q, k, v = normal(3, rows + text, s.heads, s.head).unbind(0)
        lengths = {"image_lengths": list(s.images), "text_lengths": list(s.texts)}
        return {"q": q, "k": k, "v": v, **lengths, **streams}
    raise ValueError(f"bench.suites.ops: no such op: {stem}")


def forward(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    """The call of one argument dict."""
    return lambda named: function(**named)


def both_ways(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    """Forward and backward: gradients of every differentiable argument; the outputs' gradients are the outputs."""

    def call(named: dict[str, Any]) -> Any:
        leaves = [v for n, v in named.items() if isinstance(v, Tensor) and v.is_floating_point() and n not in CONSTANTS]
        named = dict(named)
        grads = [leaf.detach().requires_grad_() for leaf in leaves]
        swap = {id(old): new for old, new in zip(leaves, grads)}
        named = {n: swap.get(id(v), v) for n, v in named.items()}
        outputs = tensors(function(**named))
        return torch.autograd.grad(outputs, grads, [out.detach() for out in outputs])

    return call


def widened(named: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments in the oracle's dtype."""
    wide = {n: v.to(wider(dtype)) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in named.items()}
    return wide


def work_of(stem: str, s: OpSizes, named: dict[str, Any], outputs: Any, backward: bool) -> tuple[float, float]:
    """(FLOPs, bytes) of one call; row ops count no FLOPs, for no row op is bound by them."""
    out = moved(outputs)
    flops = 0
    if stem == "joint_attention":
        flops = sum(attention_flops(i + t, i + t, s.width) for i, t in zip(s.images, s.texts))
    if stem == "pack_tokens":
        there = 2 * out + moved(named["rows"])  # rows that are not picked are not read
    else:
        there = moved({n: v for n, v in named.items() if n not in ("scale", "shift", "gate")}) + out
        there += sum(named[n].shape.numel() * named[n].element_size() for n in ("scale", "shift", "gate") if n in named)
    if not backward:
        return flops, there
    return 3.5 * flops, there + BACKWARD[stem] * out


def prepare(stem: str, shape: str, dtype: torch.dtype, backward: bool, device: torch.device) -> Work:
    """One op at one shape: four input sets on a GPU, one on a CPU, where a case fills the cache by itself."""
    s, op, spec = SHAPES[shape], getattr(ops, stem), getattr(reference, stem)
    inputs = [(arguments(stem, s, dtype, device, turn),) for turn in range(4 if device.type == "cuda" else 1)]
    wrap = both_ways if backward else forward
    with torch.no_grad():
        flops, moves = work_of(stem, s, inputs[0][0], op(**inputs[0][0]), backward)

    def oracle(named: dict[str, Any]) -> Any:
        with torch.enable_grad():
            return wrap(spec)(widened(named, dtype))

    # a fresh function per case: Inductor would else compile later cases for unknown shapes
    compile_spec = compiled(lambda **named: spec(**named))
    return Work(
        inputs=inputs,
        subjects={
            OURS: Subject(wrap(op), grad=backward),
            "spec_eager": Subject(wrap(spec), grad=backward),
            "spec_compiled": Subject(wrap(compile_spec), grad=backward),
        },
        oracle=oracle,
        bound=BOUND[dtype] * (2 if backward else 1),
        flops=flops,
        bytes=moves,
        note="forward and backward" if backward else "",
    )


def cases(scale: Scale, gpu: bool) -> list[Case]:
    """On a GPU the released shapes in both dtypes; on a CPU two shapes, attention only at Mini's."""
    shapes = ("small",) if scale.tiny else ("1024cfg",) if gpu else ("pair", "mini")
    found = []
    for shape in shapes:
        for backward in (False, True):
            for name in ("bf16", "fp32"):
                for stem in STEMS:
                    slow = stem == "joint_attention" and (shape == "pair" or (gpu and name == "fp32"))
                    if slow or (backward and stem in NO_GRADIENT):
                        continue

                    def make(
                        device: torch.device, stem: str = stem, shape: str = shape, name: str = name, b: bool = backward
                    ) -> Work:
                        return prepare(stem, shape, DTYPES[name], b, device)

                    id = f"{scale.prefix}ops/{stem}/{shape}/{name}/{'backward' if backward else 'forward'}"
                    found.append(Case(id, SUBJECTS, make))
    for name, size in (experts.SMALL if scale.tiny else experts.RELEASED).items():

        def layer(device: torch.device, size: experts.Size = size) -> Work:
            return experts.prepare(size, device)

        found.append(Case(f"{scale.prefix}ops/moe_mxfp4/{name}/bf16/forward", experts.SUBJECTS, layer))
    for name, shape_of in (sinks.SMALL if scale.tiny else sinks.RELEASED).items():

        def attend(device: torch.device, size: sinks.Size = shape_of) -> Work:
            return sinks.prepare(size, device)

        found.append(Case(f"{scale.prefix}ops/sink_attention/{name}/bf16/forward", sinks.SUBJECTS, attend))
    return found
