"""The specification of every op in plain PyTorch, written from the maths.

Shape alphabet, used by every file of this project:

    B  samples in a batch            N  attention heads
    I  image tokens of a sample      H  channels of one head
    T  text tokens of a sample       D  width of the model, D = N * H
    S  joint tokens, S = I + T       F  hidden width of the MLP
    R  packed rows of one stream     C  latent channels of one token
    L  padded length of a batch      RI, RT, RS  packed image, text, joint rows, RS = RI + RT

Packed rows hold the samples back to back without padding: sample b owns rows offsets[b] to offsets[b + 1].
The joint layout holds [image rows | text rows] per sample, so joint_offsets = image_offsets + text_offsets.

Arithmetic is float32 for float32 and bfloat16 tensors and float64 for float64 tensors; results are rounded
once, when they are stored. Every function here differentiates through plain autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a tensor of `dtype` is computed with."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(arithmetic_dtype(x.dtype))


def sample_of_row(offsets: Tensor, rows: int) -> Tensor:
    """Sample b that owns each of the R packed rows: int64 [R]. Samples without rows are skipped."""
    row = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, row, right=True) - 1


def joint_rows(image_offsets: Tensor, text_offsets: Tensor, image_rows: int, text_rows: int) -> Tensor:
    """Joint row of every image row, then of every text row: int64 [RI + RT]."""
    b_image = sample_of_row(image_offsets, image_rows)
    b_text = sample_of_row(text_offsets, text_rows)
    image = torch.arange(image_rows, device=b_image.device) + text_offsets[b_image]
    text = torch.arange(text_rows, device=b_text.device) + image_offsets[b_text + 1]
    return torch.cat([image, text])


# Positions and rotary tables -------------------------------------------------------------------------------


def image_positions(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """(frame, row, column) of the tokens of a height x width grid, row by row: int64 [I, 3].

    Token (r, c) sits at (0, r - (height - height // 2), c - (width - width // 2)): centred, negative first.
    """
    row = torch.arange(height, device=device) - (height - height // 2)
    column = torch.arange(width, device=device) - (width - width // 2)
    grid = torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).reshape(-1, 2)
    return F.pad(grid, (1, 0))


def text_positions(height: int, width: int, length: int, device: torch.device | str | None = None) -> Tensor:
    """Positions of `length` text tokens beside a height x width grid: int64 [T, 3].

    Token j sits at max(height // 2, width // 2) + j on all three axes.
    """
    first = max(height // 2, width // 2)
    return (first + torch.arange(length, device=device))[:, None].expand(length, 3)


def rope_table(
    positions: Tensor,
    axes: tuple[int, ...] = (8, 28, 28),
    theta: float = 1e4,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every rotation angle, each [S, H / 2] in `dtype`.

    An axis of d channels turns d / 2 pairs by position * theta^(-2 k / d), k = 0 .. d / 2 - 1; the pairs of
    the axes follow one another in the order of `axes`. Angles are computed in float64 and rounded once.
    """
    angles = []
    for axis, channels in enumerate(axes):
        k = torch.arange(channels // 2, dtype=torch.float64, device=positions.device)
        angles.append(positions[:, axis, None].double() * theta ** (-2.0 * k / channels))
    angle = torch.cat(angles, -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


# Row ops ---------------------------------------------------------------------------------------------------


def pack_tokens(x: Tensor, rows: Tensor) -> Tensor:
    """packed[r] = x.view(B * L, C)[rows[r]]: [B, L, C] -> [R, C]."""
    return x.flatten(0, 1).index_select(0, rows)


def unpack_tokens(packed: Tensor, rows: Tensor, batch: int, length: int) -> Tensor:
    """x.view(B * L, C)[rows[r]] = packed[r], zero elsewhere: [R, C] -> [B, L, C]."""
    flat = packed.new_zeros(batch * length, packed.shape[1]).index_copy(0, rows, packed)
    return flat.view(batch, length, packed.shape[1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dim, in the arithmetic dtype (not rounded)."""
    x = _wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * _wide(weight)


def rms_norm_modulate(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, offsets: Tensor, eps: float = 1e-6
) -> Tensor:
    """y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale_b) + shift_b: [R, D] -> [R, D]."""
    b = sample_of_row(offsets, x.shape[0])
    y = rms_norm(x, weight, eps) * (1 + _wide(scale)[b]) + _wide(shift)[b]
    return y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (2 i, 2 i + 1) of the last dim by angle i: x [S, N, H], cos and sin [S, H / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def qk_norm_rope(
    image_qkv: Tensor,
    text_qkv: Tensor,
    image_q_weight: Tensor,
    image_k_weight: Tensor,
    text_q_weight: Tensor,
    text_k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """Head-wise RMSNorm of q and k with the stream's weight, then RoPE; v is copied.

    image_qkv [RI, 3 D] and text_qkv [RT, 3 D] -> qkv [3, RI + RT, N, H] in the joint layout, which is also
    the layout of the rows of cos and sin [RI + RT, H / 2].
    """
    head_dim = image_q_weight.shape[0]
    rows = joint_rows(image_offsets, text_offsets, image_qkv.shape[0], text_qkv.shape[0])
    streams = []
    for qkv, q_weight, k_weight in (
        (image_qkv, image_q_weight, image_k_weight),
        (text_qkv, text_q_weight, text_k_weight),
    ):
        heads = qkv.shape[1] // (3 * head_dim)
        q, k, v = qkv.view(qkv.shape[0], 3, heads, head_dim).unbind(1)
        streams.append(torch.stack([rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), _wide(v)]))
    stacked = torch.cat(streams, 1)
    q, k, v = torch.zeros_like(stacked).index_copy(1, rows, stacked).unbind(0)
    return torch.stack([rotate(q, cos, sin), rotate(k, cos, sin), v]).to(image_qkv.dtype)


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_lengths: list[int],
    text_lengths: list[int],
    image_offsets: Tensor,
    text_offsets: Tensor,
    text_queries: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v among the rows of each sample, not causal; scale defaults to H^-0.5.

    q, k, v [RS, N, H] in the joint layout -> image_out [RI, N * H], text_out [RT, N * H]. With
    text_queries=False the text rows of q are not used and text_out is [0, N * H].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    image_out, text_out = [q[:0].flatten(1)], [q[:0].flatten(1)]
    start = 0
    for image, text in zip(image_lengths, text_lengths, strict=True):
        stop = start + image + text
        queries = _wide(q[start : stop if text_queries else start + image])
        logits = torch.einsum("qnh,knh->nqk", queries, _wide(k[start:stop])) * scale
        out = torch.einsum("nqk,knh->qnh", logits.softmax(-1), _wide(v[start:stop])).to(q.dtype)
        image_out.append(out[:image].flatten(1))
        text_out.append(out[image:].flatten(1))
        start = stop
    return torch.cat(image_out), torch.cat(text_out)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, offsets: Tensor) -> Tensor:
    """x + gate_b * y: [R, D] -> [R, D]."""
    b = sample_of_row(offsets, x.shape[0])
    return (_wide(x) + _wide(gate)[b] * _wide(y)).to(x.dtype)


def gated_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    offsets: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """x_new = x + gate_b * y and rms_norm_modulate(x_new): two [R, D]. The norm reads the stored x_new."""
    x_new = gated_residual(x, y, gate, offsets)
    return x_new, rms_norm_modulate(x_new, weight, scale, shift, offsets, eps)


def swiglu(h: Tensor) -> Tensor:
    """silu(h[:, :F]) * h[:, F:]: [R, 2 F] -> [R, F]."""
    a, u = _wide(h).chunk(2, -1)
    return (F.silu(a) * u).to(h.dtype)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, groups: int, eps: float = 1e-6, activate: bool = True
) -> Tensor:
    """silu(n), n = (x - mean_bg) * rsqrt(var_bg + eps) * weight + bias; n itself without ``activate``: [R, D] -> [R, D].

    mean_bg and var_bg (of the population) go over the rows of sample b and the D / G neighbouring channels of group g.
    """
    samples = []
    for rows in filter(len, _wide(x).split(offsets.diff().tolist())):
        grouped = rows.view(len(rows), groups, x.shape[1] // groups)
        variance, mean = torch.var_mean(grouped, (0, 2), correction=0, keepdim=True)
        samples.append(((grouped - mean) * torch.rsqrt(variance + eps)).flatten(1))
    n = torch.cat([x[:0].to(arithmetic_dtype(x.dtype)), *samples]) * _wide(weight) + _wide(bias)
    return (F.silu(n) if activate else n).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: [R, K], [M, K], [M] -> [R, M], in the arithmetic dtype (not rounded)."""
    return F.linear(_wide(x), _wide(weight), None if bias is None else _wide(bias))


def linear_qkv_norm_rope(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    q_weight: Sequence[Tensor],
    k_weight: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """qk_norm_rope of linear(x_s, weight_s, bias_s), s = image, text: x_s [R_s, D] -> qkv [3, RI + RT, N, H]."""
    image, text = (linear(x[s], weight[s], bias[s]) for s in (0, 1))
    norms = _wide(q_weight[0]), _wide(k_weight[0]), _wide(q_weight[1]), _wide(k_weight[1])
    return qk_norm_rope(image, text, *norms, cos, sin, image_offsets, text_offsets, eps).to(x[0].dtype)


def linear_swiglu(x: Sequence[Tensor], weight: Sequence[Tensor]) -> list[Tensor]:
    """swiglu of linear(x_s, weight_s) for every stream s: [R_s, D], [2 F, D] (w1 above w3) -> [R_s, F]."""
    return [swiglu(linear(a, w)).to(a.dtype) for a, w in zip(x, weight, strict=True)]


def linear_gated_residual(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    gate: Sequence[Tensor],
    offsets: Sequence[Tensor],
) -> list[Tensor]:
    """x_s + gate_sb * linear(y_s, weight_s, bias_s) for every stream s: [R_s, D], [R_s, K] -> [R_s, D]."""
    return [
        gated_residual(_wide(a), linear(b, w, c), _wide(g), o).to(a.dtype)
        for a, b, w, c, g, o in zip(x, y, weight, bias, gate, offsets, strict=True)
    ]


def guidance_step(
    x: Tensor, cond: Tensor, uncond: Tensor | None, delta: Tensor, guidance: float, offsets: Tensor
) -> Tensor:
    """One guided Euler step in the dtype of x; every token keeps the norm of the prompt's velocity.

    comb = u + guidance * (c - u), comb *= |c| / |comb| per row (factor 1 where |comb| is 0),
    result = x + delta_b * comb. x, cond, uncond [R, C], delta [B] -> [R, C]. Without uncond comb = c.
    """
    c = comb = cond.to(x.dtype)
    if uncond is not None:
        u = uncond.to(x.dtype)
        comb = u + guidance * (c - u)
        norm = comb.norm(dim=-1, keepdim=True)
        factor = c.norm(dim=-1, keepdim=True) / torch.where(norm == 0, torch.ones_like(norm), norm)
        comb = comb * torch.where(norm == 0, torch.ones_like(norm), factor)
    return x + delta[sample_of_row(offsets, x.shape[0]), None] * comb


# Images of the data engine ---------------------------------------------------------------------------------


def box_sums(x: Tensor, boxes: int) -> Tensor:
    """Sums over `boxes` equal boxes of the first axis, times `boxes`: int64 [N, ...] -> [boxes, ...]; exact.

    A box that ends inside an element takes that share of it: F(k) = boxes * (sum before element a) + r * x[a] at the place
    k N = a boxes + r, and box k sums F(k + 1) - F(k).
    """
    n = x.shape[0]
    places = torch.arange(boxes + 1) * n
    before = torch.cat([torch.zeros_like(x[:1]), x.cumsum(0)])
    a, r = places // boxes, (places % boxes).view(-1, *[1] * (x.dim() - 1))
    return (boxes * before[a] + r * x[a.clamp(max=n - 1)]).diff(dim=0)


def image_sums(pixels: Tensor, h: int, w: int) -> Tensor:
    """[histogram of grey (256), sum of value, sum of L, sum of L^2] of an image: uint8 [H, W, 3] -> int64 [259].

    Grey and value per pixel, L as in `image_scores`; h <= H and w <= W are the sizes after the reduction.
    """
    r, g, b = pixels.long().unbind(-1)
    grey = (9798 * r + 19235 * g + 3735 * b + (1 << 14)) >> 15
    mean = box_sums(box_sums(grey, h).T, w).T.double() * (256.0 / (float(grey.shape[0]) * float(grey.shape[1])))
    q = (mean + 0.5).long()
    rows, columns = (torch.arange(-1, n + 1).abs() for n in (h, w))  # mirrored without the edge
    rows, columns = ((n - 1 - (n - 1 - i).abs()).clamp(min=0) for n, i in ((h, rows), (w, columns)))
    p = q[rows][:, columns]
    laplacian = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * q
    value = pixels.amax(-1).sum()
    sums = torch.stack([value, laplacian.sum(), (laplacian * laplacian).sum()])
    return torch.cat([torch.bincount(grey.flatten(), minlength=256), sums])


# A language model's attention ------------------------------------------------------------------------------


def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, cos: Tensor, sin: Tensor, window: int | None, scale: float
) -> Tensor:
    """softmax over (q' k^T * scale, sink) times (v, 0), of the last T of S tokens: [T, N, H], [S, M, H] x 2 -> [T, N, H].

    q' is q with its channels (i, i + H / 2) turned by angle i, rounded to its dtype; cos and sin [T, H / 2]. Query t sees
    the keys up to S - T + t, of a window the last ``window``. 128 queries at a time.
    """
    (length, heads, channels), (there, shared) = q.shape, k.shape[:2]
    turned = _wide(rotate_halves(_wide(q), cos, sin).to(q.dtype)).view(length, shared, heads // shared, channels)
    keys, values, sink = _wide(k).transpose(0, 1), _wide(v).transpose(0, 1), _wide(sinks).view(shared, -1, 1, 1)
    place = torch.arange(there, device=q.device)
    out = torch.empty_like(q)
    for start in range(0, length, 128):
        own = turned[start : start + 128].permute(1, 2, 0, 3)  # [M, N / M, queries, H]
        query = (place[there - length :])[start : start + 128, None]
        end = there - length + min(start + 128, length)
        first = 0 if window is None else max(0, there - length + start - window + 1)  # keys that no query here sees
        hidden = place[first:end] > query
        if window is not None:
            hidden = hidden | (place[first:end] <= query - window)
        grouped = own.flatten(1, 2) @ keys[:, first:end].transpose(1, 2) * scale  # heads that share keys side by side
        scores = grouped.view(*own.shape[:3], -1).masked_fill(hidden, -math.inf)
        shares = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1]
        mixed = (shares.flatten(1, 2) @ values[:, first:end]).view(own.shape)
        out[start : start + 128] = mixed.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + H / 2) of the last dim by angle i: x [T, N, H], cos and sin [T, H / 2]."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# Mixture of experts ----------------------------------------------------------------------------------------

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # sign, two bits of exponent, one of mantissa
_E8M0 = (*(math.ldexp(1.0, s - 127) for s in range(255)), math.nan)


def mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """MXFP4 weights: value * 2^(scale - 127), uint8 [..., G, 16] and [..., G] -> [..., 32 G] in `dtype`.

    A byte holds two E2M1 values, the low half first; 32 share an E8M0 scale, of which 255 is NaN (OCP Microscaling
    Formats 1.0). Every weight is exact in float32 but those beyond its range, and in bfloat16 as well.
    """
    values = torch.tensor(_E2M1 + tuple(-v for v in _E2M1), dtype=dtype, device=blocks.device)
    powers = torch.tensor(_E8M0, dtype=torch.float64, device=blocks.device).to(dtype)
    pairs = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    return (values[pairs.int()] * powers[scales.int()][..., None]).flatten(-2)


def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K experts of the largest logits x weight^T + bias, of equal ones the first, and the softmax among these K.

    x [R, D], weight [E, D], bias [E] -> experts int64 [R, K], largest first, and their shares [R, K] in the arithmetic
    dtype.
    """
    logits, experts = linear(x, weight, bias).sort(dim=-1, descending=True, stable=True)
    return experts[:, :top_k], logits[:, :top_k].softmax(-1)


def clamped_swiglu(h: Tensor, alpha: float, limit: float) -> Tensor:
    """g sigmoid(alpha g) (u + 1), g = min(h[:, 0::2], limit), u = h[:, 1::2] within +-limit: [R, 2 F] -> [R, F]."""
    gate, up = h[..., 0::2].clamp(max=limit), h[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def moe_mxfp4(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    top_k: int = 4,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """sum over a row's K experts of share_e (clamped_swiglu(x W1_e^T + b1_e) W2_e^T + b2_e): [R, D] -> [R, D].

    gate_up_blocks uint8 [E, 2 F, D / 32, 16], gate_up_scales uint8 [E, 2 F, D / 32], gate_up_bias [E, 2 F], down_blocks
    uint8 [E, D, F / 32, 16], down_scales uint8 [E, D, F / 32], down_bias [E, D]. The hidden rows are rounded to the
    dtype of x. One expert is decoded at a time.
    """
    experts, shares = route(x, router_weight, router_bias, top_k)
    made = shares.new_zeros(*experts.shape, x.shape[1])
    for e in experts.unique().tolist():
        row, place = (experts == e).nonzero(as_tuple=True)
        gate_up = mxfp4(gate_up_blocks[e], gate_up_scales[e], shares.dtype)
        hidden = clamped_swiglu(linear(x[row], gate_up, gate_up_bias[e]), alpha, limit).to(x.dtype)
        made[row, place] = linear(hidden, mxfp4(down_blocks[e], down_scales[e], shares.dtype), down_bias[e])
    return (shares[..., None] * made).sum(1).to(x.dtype)
