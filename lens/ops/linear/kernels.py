"""Our GEMMs with a fused epilogue as ops of torch: inference only, bfloat16, no gradient; linear/fused.py calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lens.ops import backend, checks
from lens.ops.linear import choice as linear_choice


def _side_by_side(rows: str, tensors: Sequence[Tensor | None]) -> dict[str, Any]:
    """Arguments of a kernel by stream; those of a stream that is not there are null."""
    both = dict(zip((f"image_{rows}", f"text_{rows}"), (*tensors, None)))
    return {name: None if t is None else _placed(t.contiguous()) for name, t in both.items()}


def _placed(t: Tensor, stride: int = 0) -> Tensor:
    """t where it can be read in chunks of 16 bytes, rows `stride` elements of bfloat16 apart as well; else a copy."""
    return t.clone(memory_format=torch.contiguous_format) if t.data_ptr() % 16 or stride % 8 else t


@backend.custom_op("lens::linear_qkv_norm_rope")
def qkv(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    norms: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    eps: float,
) -> Tensor:
    qkv = _fake_qkv(x, weight, bias, norms)
    backend.launch(
        "linear_qkv_norm_rope",
        qkv,
        **_side_by_side("x", x),
        **_side_by_side("weight", weight),
        **_side_by_side("bias", bias),
        **_side_by_side("q_weight", norms[::2]),
        **_side_by_side("k_weight", norms[1::2]),
        cos=_placed(cos.contiguous()),
        sin=_placed(sin.contiguous()),
        image_offsets=image_offsets.contiguous(),
        text_offsets=text_offsets.contiguous(),
        qkv=qkv,
        RI=x[0].shape[0],
        RT=x[1].shape[0],
        B=image_offsets.shape[0] - 1,
        N=qkv.shape[2],
        H=qkv.shape[3],
        K=x[0].shape[1],
        eps=eps,
        cluster=linear_choice.cluster(),
    )
    return qkv


@backend.custom_op("lens::linear_swiglu")
def swiglu(x: Sequence[Tensor], weight: Sequence[Tensor]) -> list[Tensor]:
    y = _fake_swiglu(x, weight)
    backend.launch(
        "linear_swiglu",
        x[0],
        **_side_by_side("x", x),
        **_side_by_side("weight", weight),
        **_side_by_side("y", y),
        RI=x[0].shape[0],
        RT=x[1].shape[0] if len(x) > 1 else 0,
        K=x[0].shape[1],
        F=y[0].shape[1],
        cluster=linear_choice.cluster(),
    )
    return y


@backend.custom_op("lens::linear_gated_residual")
def residual(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    gate: Sequence[Tensor],
    offsets: Sequence[Tensor],
) -> list[Tensor]:
    out, gate = _fake_residual(x), [_placed(g, g.stride(0)) for g in map(checks.dense_rows, gate)]
    tables: dict[str, Any] = {"text_gate": None, "text_gate_stride": 0}
    for stream, table in zip(("image", "text"), gate):
        tables |= {f"{stream}_gate": table, f"{stream}_gate_stride": table.stride(0)}
    backend.launch(
        "linear_gated_residual",
        x[0],
        **_side_by_side("x", x),
        **_side_by_side("y", y),
        **_side_by_side("weight", weight),
        **_side_by_side("bias", bias),
        image_offsets=offsets[0].contiguous(),
        text_offsets=offsets[-1].contiguous(),  # without a text stream nothing reads them
        **_side_by_side("out", out),
        RI=x[0].shape[0],
        RT=x[1].shape[0] if len(x) > 1 else 0,
        B=gate[0].shape[0],
        D=x[0].shape[1],
        K=y[0].shape[1],
        cluster=linear_choice.cluster(),
        **tables,
    )
    return out


def _fake_qkv(x: Sequence[Tensor], weight: Sequence[Tensor], bias: Any, norms: Sequence[Tensor], *_: Any) -> Tensor:
    head_dim = norms[0].shape[0]
    return x[0].new_empty(3, x[0].shape[0] + x[1].shape[0], weight[0].shape[0] // (3 * head_dim), head_dim)


def _fake_swiglu(x: Sequence[Tensor], weight: Sequence[Tensor]) -> list[Tensor]:
    return [a.new_empty(a.shape[0], w.shape[0] // 2) for a, w in zip(x, weight)]


def _fake_residual(x: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [a.new_empty(a.shape) for a in x]


qkv.register_fake(_fake_qkv)
swiglu.register_fake(_fake_swiglu)
residual.register_fake(_fake_residual)
