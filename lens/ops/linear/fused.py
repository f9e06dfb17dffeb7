"""GEMMs with a row op behind them: QKV with norm and rotation, w1 | w3 with SwiGLU, a branch through its gate.

Each function takes both streams of a block, image first, with their own weights: one launch where the kernel is ours,
because text rows alone cannot fill a GPU. After cuBLASLt's GEMM (linear/choice.py says when and why) the row op is a
kernel of its own; that is also the way of training. A layer is a torch.nn.Linear, or whatever maps rows
to rows in its place (an adapter around one), which the library way calls as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lens.ops import checks
from lens.ops.gated_residual import gated_residual
from lens.ops.gated_residual_norm_modulate import gated_residual_norm_modulate
from lens.ops.linear import choice as linear_choice
from lens.ops.linear import kernels
from lens.ops.linear_rows import available as linear_rows_available
from lens.ops.linear_rows import linear_rows
from lens.ops.qk_norm_rope import expect_heads, qk_norm_rope
from lens.ops.rms_norm_modulate import rms_norm_modulate
from lens.ops.swiglu import swiglu

Layer = Callable[[Tensor], Tensor]
Residual = (
    tuple[Tensor] | tuple[Tensor, Tensor, Tensor]
)  # of a stream: (x,), or (x, y, gate) where gate * y is still to add
Lengths = Sequence[Sequence[int] | None]  # of each stream: rows of every sample, each to have the bits it has alone
ON_DEVICE = (-1,)  # of a captured stream: lengths that only the device knows
LINE = {"cpu": 64, "cuda": 256}  # bytes; the library's choice looks at no more of an address


def linear(layer: Layer, x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """``layer`` over packed rows [R, K] -> [R, M]; sample by sample where ``lengths`` are given.

    bfloat16 rows on a CPU with AMX take `linear_rows`, of which a row has its bits in any company. Elsewhere:
    A library's GEMM changes a row's bits with the number of rows and with the alignment of the first one, so a
    sample keeps its bits in any batch only if its rows are multiplied alone and start on a cache line. ON_DEVICE raises.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and plain(layer) and serves_rows(layer, x):
        return linear_rows(x, layer.weight, layer.bias)  # type: ignore[attr-defined]
    if lengths is None:
        return layer(x)
    if tuple(lengths) == ON_DEVICE:
        raise RuntimeError("lens.linear: the library's GEMM runs sample by sample, by lengths that the host must know")
    parts, start = [], 0
    for length in lengths:
        if length:
            rows = x[start : start + length]
            parts.append(layer(rows.clone() if rows.data_ptr() % LINE.get(x.device.type, 1) else rows))
        start += length
    return layer(x[:0]) if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)


def linear_of(weight: Tensor, bias: Tensor | None, x: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """`linear` by weights that no layer holds and no gradient is recorded of: the bits that a layer of them has."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and by_rows():
        return linear_rows(x, weight, bias)
    return linear(lambda rows: F.linear(rows, weight, bias), x, lengths)


def linear_qkv_norm_rope(
    x: Sequence[Tensor],
    layers: Sequence[Layer],
    q_weight: Sequence[Tensor],
    k_weight: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    eps: float = 1e-6,
    lengths: Lengths = (None, None),
) -> Tensor:
    """qk_norm_rope of layer_s(x_s), s = image, text: qkv [3, RI + RT, N, H] in the joint layout.

    x: [RI, D] and [RT, D], float32, bfloat16 (float32 arithmetic) or float64
    layers: D -> 3 D columns with bias
    q_weight, k_weight: [H] of each stream
    cos, sin, image_offsets, text_offsets, eps: as in qk_norm_rope
    lengths: with them every sample has the bits it has alone
    Raises ValueError for shapes, dtypes, devices or (CPU) offsets that do not fit. Differentiable.
    """
    op, head_dim = "linear_qkv_norm_rope", q_weight[0].shape[-1]
    weights = q_weight[0], k_weight[0], q_weight[1], k_weight[1]
    if not _use_fused("qkv", op, x, layers, lengths, head_dim):
        image, text = (linear(*of) for of in zip(layers, x, lengths, strict=True))
        return qk_norm_rope(image, text, *weights, cos, sin, image_offsets, text_offsets, eps)
    linears = [_weights(op, layer, a) for layer, a in zip(layers, x, strict=True)]
    matrices, biases = [w for w, _ in linears], [b for _, b in linears if b is not None]
    if len(biases) != 2:
        checks.refuse(op, "layers must have a bias each, got none")
    rows = x[0].shape[0] + x[1].shape[0]
    expect_heads(op, x[0], matrices[0].shape[0], rows, weights, cos, sin, image_offsets, text_offsets)
    return kernels.qkv(list(x), matrices, biases, list(weights), cos, sin, image_offsets, text_offsets, eps)


def linear_swiglu(x: Sequence[Tensor], layers: Sequence[Layer], lengths: Lengths = (None, None)) -> list[Tensor]:
    """swiglu of layer_s(x_s) for one or both streams s: [R_s, D] -> [R_s, F].

    x: [R_s, D] float32, bfloat16 (float32 arithmetic) or float64
    layers: D -> 2 F columns without bias, w1's rows above w3's
    lengths: with them every sample has the bits it has alone
    Raises ValueError for shapes, dtypes or devices that do not fit. Differentiable.
    """
    op = "linear_swiglu"
    if not _use_fused("w13", op, x, layers, lengths):
        return [swiglu(linear(*of)) for of in zip(layers, x, lengths)]
    linears = [_weights(op, layer, a, biased=False) for layer, a in zip(layers, x, strict=True)]
    return kernels.swiglu(list(x), [w for w, _ in linears])


def linear_gated_residual(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    layers: Sequence[Layer],
    gate: Sequence[Tensor],
    offsets: Sequence[Tensor],
    lengths: Lengths = (None, None),
    gemm: str = "out",
) -> list[Tensor]:
    """x_s + gate_sb * layer_s(y_s) for one or both streams s, b the sample of the row: [R_s, D].

    x: [R_s, D] float32, bfloat16 (float32 arithmetic) or float64; y: [R_s, K], dtype of x
    layers: K -> D columns, with or without bias
    gate, offsets: of each stream, as in gated_residual; offsets of a stream that is left out are not read
    lengths: with them every sample has the bits it has alone; gemm: "out" or "w2", the line of the table
    Raises ValueError for shapes, dtypes, devices or (CPU) offsets that do not fit. Differentiable.
    """
    op = "linear_gated_residual"
    if not _use_fused(gemm, op, y, layers, lengths):
        return [gated_residual(a, linear(*of), g, o) for a, g, o, of in zip(x, gate, offsets, zip(layers, y, lengths))]
    linears = [_weights(op, layer, b) for layer, b in zip(layers, y, strict=True)]
    offsets = offsets[: len(x)]
    for a, b, (weight, _), g, o in zip(x, y, linears, gate, offsets, strict=True):
        checks.expect_shape(op, "x", a, "R, D", b.shape[0], weight.shape[0])
        checks.expect_like(op, "x", a, b)
        batch = checks.expect_offsets(op, "offsets", o, a)
        checks.expect_rows_have_sample(op, a.shape[0], batch)
        checks.expect_modulation(op, "gate", g, a, batch, a.shape[1])
    return kernels.residual(
        list(x), list(y), [w for w, _ in linears], [b for _, b in linears], list(gate), list(offsets)
    )


def linear_residual(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    layers: Sequence[Layer],
    gate: Sequence[Tensor],
    offsets: Sequence[Tensor],
    lengths: Lengths = (None, None),
    gemm: str = "out",
) -> list[Residual]:
    """linear_gated_residual whose last sum waits for the norm that follows, after the library's GEMM: one pass does
    both then. `residual_norm_modulate` takes the result."""
    if _use_fused(gemm, "linear_gated_residual", y, layers, lengths):
        return [(a,) for a in linear_gated_residual(x, y, layers, gate, offsets, lengths, gemm)]
    return [(a, linear(*of), g) for a, g, of in zip(x, gate, zip(layers, y, lengths))]


def residual_norm_modulate(
    residuals: Sequence[Residual],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    offsets: Sequence[Tensor],
    eps: float = 1e-6,
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of every residual stream, summed up, and rms_norm_modulate of them: x [R_s, D] and normed [R_s, D].

    weight, scale, shift, offsets, eps: of each stream, as in rms_norm_modulate
    """
    done = [
        (residual[0], rms_norm_modulate(residual[0], w, s, t, o, eps))
        if len(residual) == 1
        else gated_residual_norm_modulate(*residual, w, s, t, o, eps)
        for residual, w, s, t, o in zip(residuals, weight, scale, shift, offsets)
    ]
    return [a for a, _ in done], [b for _, b in done]


def linear_gated_residual_norm_modulate(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    layers: Sequence[Layer],
    gate: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    offsets: Sequence[Tensor],
    eps: float = 1e-6,
    lengths: Lengths = (None, None),
    gemm: str = "out",
) -> tuple[list[Tensor], list[Tensor]]:
    """linear_gated_residual and rms_norm_modulate of its result: x_new [R_s, D] and normed [R_s, D] of every stream s.

    weight, scale, shift, eps: as in rms_norm_modulate. A norm needs whole rows, which no tile of ours holds: after our
    GEMM it is a pass of its own, after the library's one pass with the residual.
    """
    residuals = linear_residual(x, y, layers, gate, offsets, lengths, gemm)
    return residual_norm_modulate(residuals, weight, scale, shift, offsets, eps)


# ---- which kernel


def _use_fused(
    gemm: str,
    op: str,
    x: Sequence[Tensor],
    layers: Sequence[Layer],
    lengths: Lengths,
    head_dim: int = linear_choice.HEAD_DIM,
) -> bool:
    """Whether our kernel serves the call; the streams agree in number, and a forced kernel that cannot run raises."""
    if len(layers) != len(x) or len(lengths) < len(x):
        checks.refuse(op, f"layers and lengths must be one per stream, got {len(layers)} for {len(x)} streams")
    batch_invariant = any(of is not None for of in lengths[: len(x)])
    if linear_choice.idle(batch_invariant and x[0].is_cuda):
        return False
    linears = [layer for layer in layers if plain(layer) and isinstance(layer, nn.Linear)]
    sizes = (linears[0].in_features, linears[0].out_features) if linears else (0, 0)
    recorded = torch.is_grad_enabled() and any(
        t.requires_grad for t in (*x, *(p for layer in linears for p in layer.parameters()))
    )
    call = linear_choice.GemmCall(
        gemm,
        x[0].device.type,
        linear_choice.capability(x[0].device.index) if x[0].is_cuda else (0, 0),
        x[0].dtype,
        0 if batch_invariant else sum(a.shape[0] for a in x),
        *sizes,
        head_dim,
        plain=len(linears) == len(layers),
        backward=recorded,
        batch_invariant=batch_invariant,
    )
    return linear_choice.choose(call) == "fused"


def by_rows() -> bool:
    """Whether `linear_rows` serves bfloat16 rows on a CPU: it can run, and the library is not forced."""
    return linear_choice.override.name != "library" and linear_rows_available()


def serves_rows(layer: Layer, x: Tensor) -> bool:
    """Whether it serves a call: dense weights of a plain layer, nothing recorded."""
    if not by_rows():
        return False
    assert isinstance(layer, nn.Linear)
    weight = layer.weight
    recorded = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters()))
    fits = x.dim() == 2 and weight.dtype == x.dtype and weight.device == x.device
    return fits and type(weight) in (nn.Parameter, Tensor) and not recorded


def plain(layer: Layer) -> bool:
    """Whether a layer is torch.nn.Linear itself, with nothing around it or hooked to it."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def _weights(op: str, layer: Layer, x: Tensor, biased: bool = True) -> tuple[Tensor, Tensor | None]:
    """A layer's weight and bias, both of the dtype and on the device of its rows x [R, K]."""
    assert isinstance(layer, nn.Linear)
    checks.expect_packed(op, x, "x", "R, K")
    checks.expect_shape(op, "x", x, "R, K", x.shape[0], layer.in_features)
    checks.expect_like(op, "weight", layer.weight, x)
    if layer.bias is not None:
        checks.expect_like(op, "bias", layer.bias, x)
        if not biased:
            checks.refuse(op, f"layers must have no bias, got one of {list(layer.bias.shape)}")
    return layer.weight, layer.bias
