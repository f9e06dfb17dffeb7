"""The MMDiT over a padded batch of one grid, as one function that torch compiles: how a CPU trains it fastest.

Packed rows (`lens.model`) waste nothing, but small ones leave a compiler nothing to fuse: at width 128 a step spends more on
dispatch than on arithmetic. Here the samples of a batch share one grid and one text length, texts are padded on the right and
padding is a mask of keys, so every operation is one of a few large ones of fixed shape. The numbers are those of
`LensTransformer2DModel` (test: within float32's rounding, gradients too), whose parameters and names these are.

Two things are laid out for vector units and change no number: channels of q and k are permuted so that a rotary pair lies in
two halves instead of side by side, and the MLP's hidden width is padded with zeros to a multiple of HIDDEN_MULTIPLE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config
import torch.nn.functional as F
from torch import Tensor

from lens.model import BLOCK_EPS, TEXT_EPS, Block, LensTransformer2DModel, StreamWeights
from lens.rope import grid_table

HIDDEN_MULTIPLE = 32


def _halves(x: Tensor) -> Tensor:
    """[..., 2i] and [..., 2i + 1] of the last dimension side by side -> all first ones, then all second ones."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _modulated(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _rms(x, weight, BLOCK_EPS) * (1 + scale[:, None]) + shift[:, None]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, R, N, H] in halves, cos and sin [R, H/2]."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _heads(stream: StreamWeights, x: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Modulated rows [B, R, D] -> normalised q and k in halves, and v, each [B, R, N, H]."""
    weight, bias = stream.qkv.weight.view(3, -1, head, x.shape[-1]), stream.qkv.bias.view(3, -1, head)
    weight = torch.cat([_halves(weight[:2].transpose(-1, -2)).transpose(-1, -2), weight[2:]])
    bias = torch.cat([_halves(bias[:2]), bias[2:]])
    q, k, v = F.linear(x, weight.flatten(0, 2), bias.flatten()).unflatten(-1, (3, -1, head)).unbind(2)
    return _rms(q, _halves(stream.q_norm), BLOCK_EPS), _rms(k, _halves(stream.k_norm), BLOCK_EPS), v


def _mlp(stream: StreamWeights, x: Tensor) -> Tensor:
    hidden = stream.w2.weight.shape[1]
    pad = -hidden % HIDDEN_MULTIPLE
    w13 = F.pad(stream.w13.weight.view(2, hidden, -1), (0, 0, 0, pad)).flatten(0, 1)
    a, b = F.linear(x, w13).chunk(2, -1)
    return F.linear(F.silu(a) * b, F.pad(stream.w2.weight, (0, pad)))


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """q [B, Q, N, H], k and v [B, R, N, H], bias [B, R] added to the scores -> [B, Q, N H]: two batched GEMMs."""
    batch, rows, heads, width = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q * width**-0.5, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, rows, -1) + bias[:, None, None]
    out = torch.bmm(scores.softmax(-1).flatten(0, 1), v)
    return out.view(batch, heads, rows, width).transpose(1, 2).flatten(2)


def _block(block: Block, image: Tensor, text: Tensor, temb: Tensor, table: Any, last: bool) -> tuple[Tensor, Tensor]:
    cos, sin, bias = table
    head, size = block.image.q_norm.shape[0], image.shape[1]
    rows, modulations, parts = [image, text], [], []
    for stream, x in zip(block.streams(), rows):
        modulation = stream.modulation(temb).unflatten(-1, (6, -1)).unbind(1)
        parts.append(_heads(stream, _modulated(x, stream.norm1, modulation[1], modulation[0]), head))
        modulations.append(modulation)
    q, k, v = (torch.cat(pair, 1) for pair in zip(*parts))
    if last:  # nothing reads the text stream's end
        q, rows = q[:, :size], rows[:1]
    mixed = _attention(_rotated(q, cos[: q.shape[1]], sin[: q.shape[1]]), _rotated(k, cos, sin), v, bias)
    out = []
    for stream, x, m, y in zip(block.streams(), rows, modulations, (mixed[:, :size], mixed[:, size:])):
        x = x + m[2][:, None] * stream.out(y)
        out.append(x + m[5][:, None] * _mlp(stream, _modulated(x, stream.norm2, m[4], m[3])))
    return out[0], text if last else out[1]


def velocity(
    model: LensTransformer2DModel,
    x: Tensor,
    features: Tensor,
    t: Tensor,
    table: tuple[Tensor, Tensor, Tensor],
    block_of: Callable[..., tuple[Tensor, Tensor]] = _block,
) -> Tensor:
    """x [B, I, C], features [B, T, F E] (layers side by side), t [B] in [0, 1] -> velocity [B, I, C].

    table: cos and sin [I + T, H/2] of the grid, and bias [B, I + T] of the keys (0, or -inf where a text row is padding).
    """
    layers = features.chunk(len(model.text_norms), -1)
    text = model.text_in(torch.cat([_rms(f, w, TEXT_EPS) for f, w in zip(layers, model.text_norms)], -1))
    image, temb = model.image_in(x), F.silu(model.time_embedding(t))
    blocks = model.layers()
    for index, block in enumerate(blocks):
        image, text = block_of(block, image, text, temb, table, index + 1 == len(blocks))
    scale, shift = model.final_modulation(temb).unflatten(-1, (2, -1)).unbind(1)
    image = F.layer_norm(image, image.shape[-1:], eps=BLOCK_EPS) * (1 + scale[:, None]) + shift[:, None]
    return model.image_out(image)


def key_bias(lengths: Sequence[int] | Tensor, image: int, text: int) -> Tensor:
    """Text lengths [B] -> [B, I + T]: -inf where a key is text padding, else 0."""
    after = torch.arange(text)[None] >= torch.as_tensor(lengths)[:, None]
    return F.pad(torch.zeros(after.shape).masked_fill_(after, float("-inf")), (image, 0))


class Padded:
    """`velocity` of one model; a block is compiled once where asked for, for all lengths and layers.

    gemm: dtype of the matrix products, by autocast: float32, or bfloat16, whose copies of the float32 weights are made at every
    step. Norms, softmax and the residual stream stay in float32.
    """

    def __init__(self, model: LensTransformer2DModel, compiled: bool, gemm: torch.dtype = torch.float32):
        self.model, self.gemm = model, gemm
        self.compiled = compiled
        self.block: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_block, dynamic=True) if compiled else _block

    def __call__(self, x: Tensor, t: Tensor, features: Tensor, lengths: Tensor, grid: tuple[int, int]) -> Tensor:
        """x [B, I, C], t [B], features [B, T, F E], lengths [B] (0: no text), grid in tokens -> velocity [B, I, C]."""
        image, text = x.shape[1], features.shape[1]
        cos, sin = grid_table(grid, text, self.model.config.axes_dims_rope, x.device)
        table = cos, sin, key_bias(lengths, image, text)
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(x.device.type, torch.bfloat16, enabled=self.gemm == torch.bfloat16))
            if self.compiled:
                # Equal numbers at the first call (32 samples, 32 tokens) shall not become one symbol, or each coincidence is
                # compiled; code generation parts lengths into ranges, each with a first, an inner and a last block.
                stack.enter_context(torch.fx.experimental._config.patch(use_duck_shape=False))  # type: ignore[attr-defined]
                stack.enter_context(torch._dynamo.config.patch(recompile_limit=32))
            return velocity(self.model, x, features.to(x.dtype), t, table, self.block).to(x.dtype)
