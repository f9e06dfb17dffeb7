"""Mini's differentiable text path: captions -> ids -> residual stream of every layer of a transformers GPT-OSS model.

The 97-token chat prefix is constant, so its keys and values are computed once per batch with batch 1 and shared; the result
equals transformers' own forward over the whole sequence (test: 1e-5).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lens.text_encoder import DEFAULT_CHAT_DATE, PREFIX_TOKENS, ChatTokenizer


class CaptionTokenizer:
    """Caption -> ids after the constant prefix (the prompt and what follows it), and where each word ends."""

    def __init__(self, folder: Path):
        self.chat = ChatTokenizer(folder)
        before, after = self.chat.frame(DEFAULT_CHAT_DATE)
        self.prefix = self.chat._encode(before)
        self.suffix = self.chat._encode(after)
        if len(self.prefix) != PREFIX_TOKENS:
            raise ValueError(f"{folder}: the chat prefix has {len(self.prefix)} tokens, expected {PREFIX_TOKENS}")

    def encode(self, caption: str) -> tuple[list[int], list[tuple[int, int]]]:
        """ids of the caption and the suffix; (start, end) character offsets of the caption's own tokens."""
        encoding = self.chat._plain.encode(caption, add_special_tokens=False)
        return encoding.ids + self.suffix, encoding.offsets


def _experts(mlp: nn.Module, x: Tensor) -> Tensor:
    """[R, E] -> [R, E]: every expert on every row, weighted by the router (zero where not chosen): few large products."""
    experts, router = mlp.experts, mlp.router
    logits = F.linear(x, router.weight, router.bias)
    top, index = logits.topk(router.top_k, -1)
    weight = torch.zeros_like(logits).scatter(-1, index, top.softmax(-1))
    gate_up = torch.einsum("re,nef->nrf", x, experts.gate_up_proj) + experts.gate_up_proj_bias[:, None]
    out = torch.bmm(experts._apply_gate(gate_up), experts.down_proj) + experts.down_proj_bias[:, None]
    return torch.einsum("nre,rn->re", out, weight)


def _layer(
    layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One decoder layer over x [B, T, E]; `past` holds keys and values [1, N, P, H] shared by the batch.

    The shared keys are multiplied with all queries of the batch at once, never copied per sample.
    """
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

    attention, (batch, length, _) = layer.self_attn, x.shape
    a = layer.input_layernorm(x)
    q, k, v = (
        p(a).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    heads, groups, width = k.shape[1], attention.num_key_value_groups, attention.head_dim
    grouped = (q * attention.scaling).reshape(
        batch, heads, groups * length, width
    )  # query head i reads kv head i // groups
    parts = [grouped @ k.transpose(2, 3)]
    if past is not None:
        shared = grouped.transpose(0, 1).reshape(heads, batch * groups * length, width)
        parts.insert(0, (shared @ past[0][0].transpose(1, 2)).view(heads, batch, groups * length, -1).transpose(0, 1))
    scores = torch.cat(parts, -1).view(batch, heads * groups, length, -1) + mask
    sinks = attention.sinks.reshape(1, -1, 1, 1).expand(batch, -1, length, 1)
    weights = torch.cat([scores, sinks], -1).softmax(-1).view(batch, heads, groups * length, -1)
    start = scores.shape[-1] - length
    mixed = weights[..., start:-1] @ v
    if past is not None:
        shared = weights[..., :start].transpose(0, 1).reshape(heads, batch * groups * length, start)
        mixed = mixed + (shared @ past[1][0]).view(heads, batch, groups * length, width).transpose(0, 1)
    mixed = mixed.reshape(batch, heads * groups, length, width).transpose(1, 2).reshape(batch, length, -1)
    x = x + attention.o_proj(mixed)
    a = layer.post_attention_layernorm(x)
    return x + _experts(layer.mlp, a.reshape(batch * length, -1)).view_as(x), (k, v)


def _masks(start: int, length: int, window: int | None) -> Tensor:
    """Additive causal mask [length, start + length] of queries start.. over keys 0.., optionally windowed."""
    q, k = torch.arange(start, start + length)[:, None], torch.arange(start + length)[None]
    seen = (k <= q) if window is None else (k <= q) & (k > q - window)
    return torch.zeros(length, start + length).masked_fill(~seen, float("-inf"))


def residuals(
    model: nn.Module, ids: Tensor, past: list[tuple[Tensor, Tensor]] | None = None
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """ids [B, T] -> raw residual stream [B, T, E] after every layer, and each layer's keys and values.

    `past`: keys and values of a constant prefix computed with batch 1; positions then start after it. Equal to the full
    sequence through transformers (test: 1e-5). Differentiable.
    """
    body = model.model if hasattr(model, "model") else model
    start = 0 if past is None else past[0][0].shape[2]
    x = body.embed_tokens(ids)
    cos, sin = body.rotary_emb(x, torch.arange(start, start + ids.shape[1])[None])
    out, cache = [], []
    for i, layer in enumerate(body.layers):
        window = body.config.sliding_window if body.config.layer_types[i] == "sliding_attention" else None
        x, own = _layer(layer, x, cos, sin, None if past is None else past[i], _masks(start, ids.shape[1], window))
        out.append(x)
        cache.append(own)
    return out, cache


def encode_batch(
    model: nn.Module, tokens: Sequence[Sequence[int]], prefix: Sequence[int], layers: Sequence[int] = (0, 1, 2, 3)
) -> list[Tensor]:
    """Ids after the prefix, any lengths -> per sample features [T, F, E], differentiable in the captions' own path.

    The constant prefix runs once with batch 1 and without gradient. Samples of equal length share a batch.
    """
    with torch.no_grad():
        _, past = residuals(model, torch.tensor([list(prefix)]))
    groups: dict[int, list[int]] = {}
    for i, ids in enumerate(tokens):
        groups.setdefault(len(ids), []).append(i)
    out: list[Tensor] = [torch.empty(0)] * len(tokens)
    for members in groups.values():
        states, _ = residuals(model, torch.tensor([list(tokens[i]) for i in members]), past)
        stacked = torch.stack([states[layer] for layer in layers], 2)
        for row, i in enumerate(members):
            out[i] = stacked[row]
    return out
