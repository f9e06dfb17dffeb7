"""What is measured. A case id is "<what>/<shape>/<dtype>" and is never renamed, so that old results stay comparable.

An op case times lens.ops against the specification run by eager PyTorch on the same tensors, and knows how many bytes
it cannot avoid moving. The shapes are the released model's at 1024 x 1024 pixels and Lens-Mini's at eight 64 x 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lens import ops
from lens.ops import reference


@dataclass(frozen=True)
class Shape:
    images: tuple[int, ...]  # image tokens of each sample
    texts: tuple[int, ...]
    heads: int
    head_channels: int
    latent_channels: int

    @property
    def width(self) -> int:
        return self.heads * self.head_channels


SHAPES = {
    "1024px": Shape((4096,), (160,), heads=24, head_channels=64, latent_channels=128),
    "mini": Shape((16,) * 8, (12,) * 8, heads=2, head_channels=64, latent_channels=32),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """A prepared case: what to time, what to time it against (None: nothing), bytes read and written at least once."""

    run: Callable[[], Any]
    baseline: Callable[[], Any] | None
    bytes: int


def _offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _arguments(op: str, s: Shape, dtype: torch.dtype) -> list[Any]:
    """Arguments of one call in the order of reference.py, drawn from a fixed seed."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int, as_dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=g).to(as_dtype)

    rows, text_rows, samples, width = sum(s.images), sum(s.texts), len(s.images), s.width
    table = normal(samples, 6 * width)
    gate, scale, shift = (table[:, i * width : (i + 1) * width] for i in (2, 1, 0))
    offsets, text_offsets = _offsets(s.images), _offsets(s.texts)
    if op == "pack_tokens":
        longest = max(s.images)
        return [normal(samples, longest, width), torch.arange(rows)]
    if op == "unpack_tokens":
        return [normal(rows, width), torch.arange(rows), samples, max(s.images)]
    if op == "rms_norm_modulate":
        return [normal(rows, width), normal(width), scale, shift, offsets]
    if op == "qk_norm_rope":
        angle = normal(rows + text_rows, s.head_channels // 2, as_dtype=torch.float32)
        weights = [normal(s.head_channels) for _ in range(4)]
        qkv = [normal(rows, 3 * width), normal(text_rows, 3 * width)]
        return [*qkv, *weights, angle.cos(), angle.sin(), offsets, text_offsets]
    if op == "joint_attention":
        qkv = normal(3, rows + text_rows, s.heads, s.head_channels)
        return [*qkv, list(s.images), list(s.texts), offsets, text_offsets]
    if op == "gated_residual":
        return [normal(rows, width), normal(rows, width), gate, offsets]
    if op == "gated_residual_norm_modulate":
        return [normal(rows, width), normal(rows, width), gate, normal(width), scale, shift, offsets]
    if op == "swiglu":
        return [normal(rows, 2 * int(width / 3 * 8))]
    if op == "guidance_step":
        x = normal(rows, s.latent_channels, as_dtype=torch.float32)
        velocities = [normal(rows, s.latent_channels) for _ in range(2)]
        return [x, *velocities, normal(samples, as_dtype=torch.float32), 5.0, offsets]
    raise ValueError(f"no such op: {op}")


def _moved(values: Any) -> int:
    """Bytes of all tensors in a (nested) argument list or result."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    return sum(map(_moved, values)) if isinstance(values, list | tuple) else 0


def _op_case(op: str, shape: str, dtype: str) -> Callable[[], Work]:
    def prepare() -> Work:
        arguments = _arguments(op, SHAPES[shape], DTYPES[dtype])
        kernel, spec = getattr(ops, op), getattr(reference, op)
        moved = _moved(arguments) + _moved(kernel(*arguments))
        return Work(lambda: kernel(*arguments), lambda: spec(*arguments), moved)

    return prepare


def _mini() -> Work:
    """Eight 64 x 64 pictures of Lens-Mini in one call, 20 steps with guidance: prompt to pixels, weights loaded."""
    from lens import LensPipeline

    pipe = LensPipeline.from_pretrained("mini", device="cpu")
    prompts = [f"a {colour} apple" for colour in ("red", "blue", "green", "pink", "white", "black", "yellow", "orange")]
    return Work(lambda: pipe(prompts, seed=0, num_inference_steps=20, guidance_scale=3.0), None, 0)


CASES: dict[str, Callable[[], Work]] = {
    f"{op}/{shape}/{dtype}": _op_case(op, shape, dtype)
    for shape in SHAPES
    for op in ops.backend.OPS
    for dtype in DTYPES
    if not (op == "joint_attention" and shape == "1024px")  # seconds per call on a CPU: torch's kernel, not ours
}
CASES["pictures/mini/float32"] = _mini
