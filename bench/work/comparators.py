"""What we are measured against, on our own weights: nothing here calls `lens.ops`.

`Reference` is the structure of the reference implementation in plain PyTorch: text padded to one length, an additive
mask, guidance as a doubled batch, rotation as a complex product, w1 and w3 as two GEMMs, modulation and text
projection at every step, every row computed. Eager it is comparator (a), under torch.compile (b).

`Exact` is the honest competitor (c): our model on torch's ops with every exact saving, for torch.compile and CUDA
graphs: no mask, no padding, no text in the unconditional half, modulation from a table, text projected once per prompt,
the last block's text branch left out, attention by the fastest kernel torch has.

Both are compiled block by block, as libraries of this kind do it: all blocks share one compiled region, which takes
seconds where the whole graph of 48 blocks takes minutes.

B samples, I image tokens, T text tokens of a sample (padded in Reference), N heads, H head channels, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens.model import Block, LensTransformer2DModel, StreamWeights

NORM_EPS, TEXT_EPS = 1e-6, 1e-5
Pair = tuple[Tensor, Tensor]


def rms(x: Tensor, weight: Tensor, eps: float = NORM_EPS) -> Tensor:
    """RMSNorm over the last dim: the mean square in float32, rounded before the weight, as the reference does."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function under torch.compile with static shapes."""
    return torch.compile(function, dynamic=False)


def _variant(block: Callable[..., Any], compile: bool, recompute: bool) -> Callable[..., Any]:
    """A block compiled, and recomputed in the backward pass, where asked."""
    block = compiled(block) if compile else block
    if not recompute:
        return block
    from torch.utils.checkpoint import checkpoint

    return lambda *arguments: checkpoint(block, *arguments, use_reentrant=False)


def fastest_attention() -> AbstractContextManager[Any]:
    """Torch's attention kernels in the order of their speed on Hopper: cuDNN, flash, memory-efficient, plain."""
    if not torch.cuda.is_available():
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def axis_angles(positions: Tensor, axes: Sequence[int]) -> Tensor:
    """positions [S, 3] -> float32 [S, H / 2]: position times 10000^(-2 k / d) for the pairs k of every axis of d."""
    parts = []
    for axis, channels in enumerate(axes):
        k = torch.arange(channels // 2, device=positions.device, dtype=torch.float32)
        parts.append(positions[:, axis, None].float() * torch.exp(k * (-2.0 * math.log(10000.0) / channels)))
    return torch.cat(parts, dim=1)


def grid_positions(grid: tuple[int, int], text: int, device: torch.device) -> Tensor:
    """[h w + text, 3]: the centred picture row by row, then text on all axes from max(h // 2, w // 2)."""
    (h, w), first = grid, max(grid[0] // 2, grid[1] // 2)
    cells = torch.cartesian_prod(torch.arange(h) - (h - h // 2), torch.arange(w) - (w - w // 2))
    words = (torch.arange(text) + first)[:, None].repeat(1, 3)
    return torch.cat([F.pad(cells, (1, 0)), words]).to(device)


# ---------------------------------------------------------------------------------------------- (a), (b)


def _complex_turn(x: Tensor, turn: Tensor) -> Tensor:
    """x [B, S, N, H] as complex pairs times turn, complex [S, H / 2]."""
    pairs = torch.view_as_complex(x.to(turn.real.dtype).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn[None, :, None, :]).flatten(3).to(x.dtype)


def _padded_heads(stream: StreamWeights, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = x.shape
    head = stream.q_norm.shape[0]
    q, k, v = stream.qkv(x).view(batch, length, 3, width // head, head).unbind(2)
    return _complex_turn(rms(q, stream.q_norm), turn), _complex_turn(rms(k, stream.k_norm), turn), v


def _padded_mlp(stream: StreamWeights, x: Tensor) -> Tensor:
    w1, w3 = stream.w13.weight.chunk(2)
    return stream.w2(F.silu(F.linear(x, w1)) * F.linear(x, w3))


def padded_block(block: Block, image: Tensor, text: Tensor, temb: Tensor, turns: Pair, mask: Tensor) -> Pair:
    """One block on padded streams [B, I, D] and [B, T, D]; temb [B, D] after SiLU; mask additive [B, 1, 1, I + T]."""
    streams, x = block.streams(), [image, text]
    tables = [stream.modulation(temb)[:, None].chunk(6, dim=-1) for stream in streams]
    normed = [rms(x[i], s.norm1) * (1 + tables[i][1]) + tables[i][0] for i, s in enumerate(streams)]
    heads = [_padded_heads(s, normed[i], turns[i]) for i, s in enumerate(streams)]
    q, k, v = (torch.cat(both, dim=1).transpose(1, 2) for both in zip(*heads))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    for i, (s, part) in enumerate(zip(streams, mixed.split([image.shape[1], text.shape[1]], dim=1))):
        shift, scale, gate = tables[i][3:]
        x[i] = x[i] + tables[i][2] * s.out(part)
        x[i] = x[i] + gate * _padded_mlp(s, rms(x[i], s.norm2) * (1 + scale) + shift)
    return x[0], x[1]


class Reference(nn.Module):
    """The reference's structure on the weights of `model`, one grid for the whole batch. See the top of this file."""

    def __init__(self, model: LensTransformer2DModel, compile: bool = False, recompute: bool = False):
        super().__init__()
        self.model = model
        self._block = _variant(padded_block, compile, recompute)
        self._turns: dict[tuple[object, ...], Pair] = {}

    def turns(self, grid: tuple[int, int], text: int, device: torch.device, dtype: torch.dtype) -> Pair:
        """Complex rotations of the picture's and the text's rows."""
        key = (grid, text, str(device), dtype)
        if key not in self._turns:  # kept from step to step, as libraries keep them
            angle = axis_angles(grid_positions(grid, text, device), self.model.config.axes_dims_rope)
            angle = angle.double() if dtype == torch.float64 else angle
            turn = torch.polar(torch.ones_like(angle), angle)
            self._turns[key] = turn[: grid[0] * grid[1]], turn[grid[0] * grid[1] :]
        return self._turns[key]

    def forward(
        self, latents: Tensor, features: Sequence[Tensor], mask: Tensor, timestep: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """latents [B, I, C], F features [B, T, E], mask bool [B, T], timestep [B] in [0, 1] -> velocity [B, I, C]."""
        model, dtype = self.model, self.model.dtype
        image = model.image_in(latents.to(dtype))
        normed = [rms(f.to(dtype), w, TEXT_EPS) for f, w in zip(features, model.text_norms, strict=True)]
        text = model.text_in(torch.cat(normed, dim=-1))
        temb = F.silu(model.time_embedding(timestep))
        bias = torch.zeros(len(latents), 1, 1, image.shape[1] + text.shape[1], dtype=dtype, device=latents.device)
        bias[:, 0, 0, image.shape[1] :] = torch.where(mask, 0.0, -math.inf).to(dtype)
        turns = self.turns(grid, text.shape[1], latents.device, dtype)
        for block in model.layers():
            image, text = self._block(block, image, text, temb, turns, bias)
        scale, shift = model.final_modulation(temb)[:, None].chunk(2, dim=-1)
        return model.image_out(F.layer_norm(image, image.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift)


def reference_step(
    reference: Reference,
    x: Tensor,
    features: Sequence[Tensor],
    mask: Tensor,
    time: Tensor,
    delta: Tensor,
    guidance: float,
    grid: tuple[int, int],
) -> Tensor:
    """One Euler step of latents x [B, I, C] in float32. With guidance, features and mask hold 2 B rows, prompts first,
    and the batch is doubled; the guided velocity keeps the norm of the prompt's per token."""
    if guidance == 1.0:
        return x + delta * reference(x, features, mask, time.expand(len(x)), grid).to(x.dtype)
    both = reference(torch.cat([x, x]), features, mask, time.expand(2 * len(x)), grid).to(x.dtype)
    c, u = both.chunk(2)
    mixed = u + guidance * (c - u)
    return x + delta * mixed * (c.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))


# ---------------------------------------------------------------------------------------------- (c)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [S, N, H], cos and sin [S, H / 2]: pairs (2 i, 2 i + 1) turned, rounded once."""
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None], sin[:, None]
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2).to(x.dtype)


def _heads(stream: StreamWeights, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    head = stream.q_norm.shape[0]
    q, k, v = stream.qkv(x).view(len(x), 3, -1, head).unbind(1)
    return _turn(rms(q, stream.q_norm), cos, sin), _turn(rms(k, stream.k_norm), cos, sin), v


def _mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one sample: [S, N, H] each -> [S_q, N H], no mask."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)


def _mlp(stream: StreamWeights, x: Tensor) -> Tensor:
    a, u = stream.w13(x).chunk(2, dim=-1)
    return stream.w2(F.silu(a) * u)


def exact_block(
    block: Block,
    image: Tensor,
    text: Tensor,
    table: Tensor,
    cosines: Pair,
    sines: Pair,
    lengths: tuple[tuple[int, ...], tuple[int, ...]],
    last: bool,
) -> Pair:
    """One block on packed streams [RI, D], [RT, D].

    table [2, 6, K, D]: K = 1 row for all samples (a step of one schedule), or one for each of K samples of equal
    lengths (training).
    """
    streams, x = block.streams(), [image, text]

    def normed(i: int, weight: Tensor, shift: int) -> Tensor:
        rows = rms(x[i], weight).unflatten(0, (table.shape[2], -1))
        return (rows * (1 + table[i, shift + 1][:, None]) + table[i, shift][:, None]).flatten(0, 1)

    def gated(i: int, gate: int, y: Tensor) -> Tensor:
        return x[i] + (table[i, gate][:, None] * y.unflatten(0, (table.shape[2], -1))).flatten(0, 1)

    heads = [_heads(s, normed(i, s.norm1, 0), cosines[i], sines[i]) for i, s in enumerate(streams)]
    pieces = [[t.split(list(lengths[i])) for t in heads[i]] for i in (0, 1)]
    outs: list[list[Tensor]] = [[], []]
    for b, (i, t) in enumerate(zip(*lengths, strict=True)):
        q, k, v = [torch.cat([pieces[0][j][b], pieces[1][j][b]]) if t else pieces[0][j][b] for j in range(3)]
        out = _mixed(q[:i] if last else q, k, v)
        outs[0].append(out[:i])
        outs[1].append(out[i:])
    for i in (0,) if last else (0, 1):
        s = streams[i]
        x[i] = gated(i, 2, s.out(torch.cat(outs[i]) if len(outs[i]) > 1 else outs[i][0]))
        x[i] = gated(i, 5, _mlp(s, normed(i, s.norm2, 3)))
    return x[0], x[1]


class Exact(nn.Module):
    """Every exact saving on torch's ops. Text rows are projected before; see the top of this file."""

    def __init__(self, model: LensTransformer2DModel, compile: bool = False, recompute: bool = False):
        super().__init__()
        self.model = model
        self._block = _variant(exact_block, compile, recompute)

    def tables(self, grids: Sequence[tuple[int, int]], texts: Sequence[int], dtype: torch.dtype) -> tuple[Pair, Pair]:
        """cos (image rows, text rows) and sin of a packed batch, in arithmetic dtype."""
        angles = []
        for grid, text in zip(grids, texts, strict=True):
            angle = axis_angles(grid_positions(grid, text, self.model.device), self.model.config.axes_dims_rope)
            angles.append(angle.double() if dtype == torch.float64 else angle)
        image = torch.cat([a[: h * w] for a, (h, w) in zip(angles, grids)])
        words = torch.cat([a[h * w :] for a, (h, w) in zip(angles, grids)])
        return (image.cos(), words.cos()), (image.sin(), words.sin())

    def forward(
        self,
        image_rows: Tensor,
        text_rows: Tensor,
        blocks: Tensor,
        final: Tensor,
        tables: tuple[Pair, Pair],
        lengths: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> Tensor:
        """image_rows [RI, C], text_rows [RT, D], blocks [L, 2, 6, K, D], final [2, K, D] -> velocity [RI, C]."""
        layers = self.model.layers()
        image, text = self.model.image_in(image_rows), text_rows
        with fastest_attention():
            for index, block in enumerate(layers):
                last = index + 1 == len(layers)
                image, text = self._block(block, image, text, blocks[index], *tables, lengths, last)
        rows = F.layer_norm(image, image.shape[-1:], eps=NORM_EPS).unflatten(0, (final.shape[1], -1))
        return self.model.image_out((rows * (1 + final[0][:, None]) + final[1][:, None]).flatten(0, 1))


def exact_step(exact: Exact, x: Tensor, guidance: float, delta: Tensor, *call: Any) -> Tensor:
    """One Euler step of packed latents x [RI, C]; with guidance the rows enter twice, prompts first. call: what
    `Exact.forward` takes after the rows."""
    rows = x.to(exact.model.dtype)
    if guidance == 1.0:
        return x + delta * exact(rows, *call).to(x.dtype)
    c, u = exact(torch.cat([rows, rows]), *call).to(x.dtype).chunk(2)
    mixed = u + guidance * (c - u)
    return x + delta * mixed * (c.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
