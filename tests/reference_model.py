"""An independent Lens in plain PyTorch, in the shape of the released code: what the packed model is held to.

Everything `lens` does cleverly is done here the slow way: text is padded and masked additively in every block, rotation
is a complex product, guidance runs a doubled batch of equal padded length, w1 and w3 are two products, the modulation
is computed in every block at every step, and the text branch of the last block is computed although nothing reads it.
Module names are the released keys, so a released file loads with load_state_dict. Only `as_lens` knows `lens`.

B samples, I image tokens, T text tokens, S = I + T, N heads, H head dim, D width, E encoder width, F feature layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from lens import LensTransformer2DModel


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float() / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(128, dtype=torch.float32) * (-math.log(10000.0) / 128))
        angles = (t.float()[:, None] * frequencies) * 1000
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], -1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class TimeTextEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)


class GateMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        hidden = int(width / 3 * 8)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def turn(x: Tensor, table: Tensor) -> Tensor:
    """Complex rotation: x [B, S, N, H], table complex64 [S, H/2]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table[None, :, None]).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.img_qkv = nn.Linear(width, 3 * width)
        self.txt_qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = RMSNorm(head_dim, 1e-6), RMSNorm(head_dim, 1e-6)
        self.norm_added_q, self.norm_added_k = RMSNorm(head_dim, 1e-6), RMSNorm(head_dim, 1e-6)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)

    def forward(
        self, image: Tensor, text: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        def split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
            return q, k, v

        image_q, image_k, image_v = split(self.img_qkv(image))
        text_q, text_k, text_v = split(self.txt_qkv(text))
        image_q, image_k = turn(self.norm_q(image_q), tables[0]), turn(self.norm_k(image_k), tables[0])
        text_q, text_k = turn(self.norm_added_q(text_q), tables[1]), turn(self.norm_added_k(text_k), tables[1])
        q, k, v = (
            torch.cat(pair, 1).transpose(1, 2) for pair in ((image_q, text_q), (image_k, text_k), (image_v, text_v))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        count = image.shape[1]
        return self.to_out[0](out[:, :count]), self.to_add_out(out[:, count:])


class Block(nn.Module):
    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        width = heads * head_dim
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.img_norm1, self.img_norm2 = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
        self.txt_norm1, self.txt_norm2 = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
        self.attn = Attention(heads, head_dim)
        self.img_mlp, self.txt_mlp = GateMLP(width), GateMLP(width)

    def forward(
        self, image: Tensor, text: Tensor, temb: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = self.img_mod(temb)[:, None].chunk(6, -1)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = self.txt_mod(temb)[:, None].chunk(6, -1)
        image_attention, text_attention = self.attn(
            self.img_norm1(image) * (1 + i_scale1) + i_shift1,
            self.txt_norm1(text) * (1 + t_scale1) + t_shift1,
            tables,
            mask,
        )
        image = image + i_gate1 * image_attention
        text = text + t_gate1 * text_attention
        image = image + i_gate2 * self.img_mlp(self.img_norm2(image) * (1 + i_scale2) + i_shift2)
        text = text + t_gate2 * self.txt_mlp(self.txt_norm2(text) * (1 + t_scale2) + t_shift2)
        return image, text


class FinalModulation(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)


class ReferenceLens(nn.Module):
    """config: the dict of a released transformer/config.json."""

    def __init__(self, config: dict):
        super().__init__()
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        width, features = heads * head_dim, len(config["selected_layer_index"])
        self.axes = tuple(config["axes_dims_rope"])
        self.img_in = nn.Linear(config["in_channels"], width)
        self.txt_norm = nn.ModuleList([RMSNorm(config["enc_hidden_dim"], 1e-5) for _ in range(features)])
        self.txt_in = nn.Linear(features * config["enc_hidden_dim"], width)
        self.time_text_embed = TimeTextEmbed(width)
        self.transformer_blocks = nn.ModuleList([Block(heads, head_dim) for _ in range(config["num_layers"])])
        self.norm_out = FinalModulation(width)
        self.proj_out = nn.Linear(width, config["in_channels"])

    def randomize(self, seed: int) -> ReferenceLens:
        """Weights at which every part matters: norms near 1, products of unit gain, modulation of order 0.3."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                if p.dim() == 2:
                    p.copy_(noise * (0.3 if "mod." in name else 1.0) / math.sqrt(p.shape[1]))
                elif name.endswith("bias"):
                    p.copy_(0.1 * noise)
                else:
                    p.copy_(1 + 0.2 * noise)
        return self.eval()

    def rotation(self, height: int, width: int, text: int) -> tuple[Tensor, Tensor]:
        """complex64 tables [I, H/2] and [T, H/2]."""

        def table(positions: Tensor) -> Tensor:
            parts = []
            for axis, d in enumerate(self.axes):
                inverse = 1.0 / torch.pow(10000.0, torch.arange(0, d, 2, dtype=torch.float32) / d)
                angles = torch.outer(positions[:, axis].float(), inverse)
                parts.append(torch.polar(torch.ones_like(angles), angles))
            return torch.cat(parts, 1)

        image = [(0, r - (height - height // 2), c - (width - width // 2)) for r in range(height) for c in range(width)]
        first = max(height // 2, width // 2)
        words = torch.arange(first, first + text)[:, None].expand(-1, 3)
        return table(torch.tensor(image)), table(words)

    def forward(
        self,
        hidden_states: Tensor,
        features: Sequence[Tensor],
        mask: Tensor,
        timestep: Tensor,
        grid: tuple[int, int],
        blocks: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """hidden_states [B, I, C], F features [B, T, E], mask [B, T] (True = valid), timestep [B], one grid (h, w)."""
        dtype = self.img_in.weight.dtype
        image = self.img_in(hidden_states.to(dtype))
        text = self.txt_in(torch.cat([norm(f.to(dtype)) for norm, f in zip(self.txt_norm, features)], -1))
        temb = self.time_text_embed.timestep_embedder(timestep)
        tables = self.rotation(*grid, text.shape[1])
        additive = torch.zeros(len(image), 1, 1, image.shape[1] + text.shape[1], dtype=dtype)
        additive[:, 0, 0, image.shape[1] :].masked_fill_(~mask.bool(), float("-inf"))
        for block in self.transformer_blocks:
            image, text = block(image, text, temb, tables, additive)
            if blocks is not None:
                blocks.append((image, text))
        scale, shift = self.norm_out.linear(F.silu(temb))[:, None].chunk(2, -1)
        image = F.layer_norm(image, (image.shape[-1],), eps=1e-6) * (1 + scale) + shift
        return self.proj_out(image)


def reference_sigmas(tokens: int, steps: int) -> Tensor:
    """float32 [steps + 1] of the released schedule, from the formulas."""
    large = 1.6927e-4 * tokens + 0.45666666
    small = 8.73809524e-5 * tokens + 1.89833333
    slope = (large - small) / 190
    mu = large if tokens > 4300 else slope * steps + large - 200 * slope
    values = []
    for k in range(steps):
        s = 1 + (1 / steps - 1) * (k / (steps - 1) if steps > 1 else 0)
        values.append(math.exp(mu) / (math.exp(mu) + (1 / s - 1)))
    return torch.tensor([*values, 0.0], dtype=torch.float32)


@torch.no_grad()
def reference_sample(
    model: ReferenceLens,
    noise: Tensor,
    positive: tuple[Sequence[Tensor], Tensor],
    negative: tuple[Sequence[Tensor], Tensor] | None,
    grid: tuple[int, int],
    steps: int,
    guidance: float,
) -> Tensor:
    """Latents [B, I, C] after a whole schedule. Always a doubled batch; ``negative`` None: no text, all masked."""
    features, mask = positive
    if negative is None:
        negative = [torch.zeros_like(f) for f in features], torch.zeros_like(mask)
    length = max(mask.shape[1], negative[1].shape[1])

    def widen(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, length - tensor.shape[1]))

    both = [torch.cat([widen(c), widen(u)]) for c, u in zip(features, negative[0])]
    both_mask = torch.cat([widen(mask), widen(negative[1])])
    sigmas, x = reference_sigmas(grid[0] * grid[1], steps), noise.float()
    for s, s_next in pairwise(sigmas):
        dtype = model.img_in.weight.dtype
        time = ((1000 * s).to(dtype) / 1000).float().expand(2 * len(x))
        c, u = model(torch.cat([x, x]), both, both_mask, time, grid).float().chunk(2)
        combined = u + guidance * (c - u)
        length_ratio = c.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
        x = x + (s_next - s) * combined * length_ratio
    return x


def as_lens(reference: ReferenceLens, config: dict) -> LensTransformer2DModel:
    """The same weights in the packed model, by the names of the released files."""
    from lens import LensTransformer2DModel
    from lens.formats.names import released_names
    from lens.formats.released import transformer_config

    model, state = LensTransformer2DModel(transformer_config(config)), reference.state_dict()
    model.load_state_dict({ours: torch.cat([state[k] for k in released_names(ours)]) for ours in model.state_dict()})
    return model.eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance in float64."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
