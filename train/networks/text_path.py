"""Mini's differentiable text path: captions -> ids -> residual stream of every layer of a transformers GPT-OSS model.

The 97-token chat prefix is constant, so its keys and values are computed once per batch with batch 1 and shared; the result
equals transformers' own forward over the whole sequence (test: 1e-5). Samples of a batch run in a few calls of similar
lengths, each padded to its longest: attention is causal, so what pads the right is never read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lens.text_encoder import ANSWER, DEFAULT_CHAT_DATE, PREFIX_TOKENS, RETURN, ChatTokenizer

from ..loop.checkpoints import folder_tensors, load_state
from ..loop.keys import keyed

ROOT = Path(__file__).resolve().parents[2]


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

    def encode_answer(self, wish: str, answer: str) -> tuple[list[int], int]:
        """A chat in which the assistant's final turn is `answer`: ids after the prefix, and where the answer begins.

        The user's turn is encoded as a prompt of the text path is, so one model serves as text encoder and as reasoner.
        """
        head = self.encode(wish)[0] + self.chat._encode(ANSWER)
        written = self.chat._plain.encode(answer, add_special_tokens=False).ids
        return head + written + self.chat._encode(RETURN), len(head)


def _experts(mlp: Any, x: Tensor) -> Tensor:
    """[R, E] -> [R, E]: every expert on every row, weighted by the router (zero where not chosen): few large GEMMs."""
    experts, router = mlp.experts, mlp.router
    logits = F.linear(x, router.weight, router.bias)
    top, index = logits.topk(router.top_k, -1)
    weight = torch.zeros_like(logits).scatter(-1, index, top.softmax(-1))
    gate_up = torch.einsum("re,nef->nrf", x, experts.gate_up_proj) + experts.gate_up_proj_bias[:, None]
    out = torch.bmm(experts._apply_gate(gate_up), experts.down_proj) + experts.down_proj_bias[:, None]
    return torch.einsum("nre,rn->re", out, weight)


def _layer(
    layer: Any, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor
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


def _masks(start: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Additive causal mask [length, start + length] of queries start.. over keys 0.., optionally windowed."""
    k = torch.arange(start + length, device=device)[None]
    q = k[:, start:].T
    seen = (k <= q) if window is None else (k <= q) & (k > q - window)
    return torch.zeros(length, start + length, device=device).masked_fill(~seen, float("-inf"))


def residuals(
    model: Any, ids: Tensor, past: list[tuple[Tensor, Tensor]] | None = None
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """ids [B, T] -> raw residual stream [B, T, E] after every layer, and each layer's keys and values.

    `past`: keys and values of a constant prefix computed with batch 1; positions then start after it. Equal to the full
    sequence through transformers (test: 1e-5). Differentiable.
    """
    body = model.model if hasattr(model, "model") else model
    start = 0 if past is None else past[0][0].shape[2]
    x = body.embed_tokens(ids)
    cos, sin = body.rotary_emb(x, torch.arange(start, start + ids.shape[1], device=ids.device)[None])
    out, cache = [], []
    masks = {w: _masks(start, ids.shape[1], w, ids.device) for w in (None, body.config.sliding_window)}
    for i, layer in enumerate(body.layers):
        window = body.config.sliding_window if body.config.layer_types[i] == "sliding_attention" else None
        x, own = _layer(layer, x, cos, sin, None if past is None else past[i], masks[window])
        out.append(x)
        cache.append(own)
    return out, cache


def calls_of(lengths: Sequence[int], fill: float) -> list[list[int]]:
    """Places in `lengths` that share a call, the longest first: the shortest has at least `fill` of the longest's."""
    calls: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not calls or lengths[i] < fill * lengths[calls[-1][0]]:
            calls.append([])
        calls[-1].append(i)
    return calls


def encode_packed(
    model: nn.Module,
    tokens: Sequence[Sequence[int]],
    prefix: Sequence[int],
    layers: Sequence[int] = (0, 1, 2, 3),
    fill: float | None = None,
) -> tuple[Tensor, list[int]]:
    """Ids after the prefix, any lengths >= 1 -> features [R, F, E] of all samples one after another, and their lengths.

    Differentiable in the captions' own path; the constant prefix runs once with batch 1 and without gradient. Samples share
    a call, padded to its longest, where the shortest has at least `fill` of the longest's tokens: 1 never pads, 0 makes
    one call; default 0.75 on a CPU, 0.4 on a GPU. The results are equal up to rounding (test: 1e-5).
    """
    lengths = [len(ids) for ids in tokens]
    if not lengths or min(lengths) == 0:
        raise ValueError(f"encode_packed: expected samples of at least one token, got lengths {lengths}")
    device = next(model.parameters()).device
    if fill is None:
        fill = 0.75 if device.type == "cpu" else 0.4
    with torch.no_grad():
        _, past = residuals(model, torch.tensor([list(prefix)], device=device))
    parts, starts, at = [], [0] * len(tokens), 0
    for members in calls_of(lengths, fill):
        longest = lengths[members[0]]
        ids = [[*tokens[i], *[0] * (longest - lengths[i])] for i in members]
        states, _ = residuals(model, torch.tensor(ids, device=device), past)
        parts.append(torch.stack([states[layer] for layer in layers], 2).flatten(0, 1))
        for i in members:
            starts[i], at = at, at + longest
    rows = [start + k for start, length in zip(starts, lengths) for k in range(length)]
    return torch.cat(parts).index_select(0, torch.tensor(rows, device=device)), lengths


def encode_batch(
    model: nn.Module,
    tokens: Sequence[Sequence[int]],
    prefix: Sequence[int],
    layers: Sequence[int] = (0, 1, 2, 3),
    fill: float | None = None,
) -> list[Tensor]:
    """`encode_packed`, cut into the features [T, F, E] of each sample."""
    packed, lengths = encode_packed(model, tokens, prefix, layers, fill)
    return list(packed.split(lengths))


def rebase_vocabulary(weights: Mapping[str, Tensor], source: Path, target: Path) -> dict[str, Tensor]:
    """Weights of a model over the tokenizer of folder `source` -> over that of folder `target`.

    Rows of the token embedding and of `lm_head` move with their token's spelling. A token the source lacks starts from the
    mean of the rows of the pieces it falls into there; where these are mere bytes, which tell nothing about a word and make
    most Chinese characters alike, from a row drawn with the mean and deviation of the source's rows. Other tensors are
    passed on. Errors: ValueError where the rows are not the source's.
    """
    from tokenizers import Tokenizer

    old, new = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (source, target))
    if old.get_vocab() == new.get_vocab():
        return dict(weights)
    tokens = sorted(new.get_vocab(), key=new.get_vocab().__getitem__)
    out = dict(weights)
    for name in weights:
        if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            continue
        source_rows = weights[name].float()
        if len(source_rows) != old.get_vocab_size():
            raise ValueError(
                f"rebase_vocabulary: {name} has {len(source_rows)} rows, {source} {old.get_vocab_size()} tokens"
            )
        mean, deviation = source_rows.mean(0), source_rows.std(0)
        rows = []
        for token in tokens:
            pieces = [] if old.token_to_id(token) is not None else old.model.tokenize(token)
            if not pieces:
                rows.append(source_rows[old.token_to_id(token)])
            elif any(len(piece.value) > 1 for piece in pieces):
                rows.append(source_rows[[piece.id for piece in pieces]].mean(0))
            else:
                noise = torch.randn(len(mean), generator=keyed(0, f"{name} {token}"))
                rows.append(mean + deviation * noise)
        out[name] = torch.stack(rows).to(weights[name].dtype)
    return out


@functools.lru_cache(maxsize=4)
def tokenizer_of(folder: str) -> CaptionTokenizer:
    return CaptionTokenizer(ROOT / folder)


def build(config: ModuleType) -> nn.Module:
    """A fresh GptOssForCausalLM of the recipe; weights depend on the recipe's seed alone."""
    from transformers import GptOssConfig, GptOssForCausalLM

    document = json.loads((ROOT / config.TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    rows = len(document["model"]["vocab"]) + len(document["added_tokens"])
    parsed = GptOssConfig(vocab_size=rows, pad_token_id=None, bos_token_id=None, eos_token_id=None, **config.MODEL)
    parsed._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(keyed(config.SEED, "encoder init").initial_seed())
        model = GptOssForCausalLM(parsed).float()
        nn.init.normal_(model.model.embed_tokens.weight, std=config.EMBEDDING_STD)
    return model.train()


def weights_of_folder(config: ModuleType, folder: Path) -> dict[str, Tensor]:
    """Text encoder of a checkpoint folder in the released layout, its vocabulary carried over to the recipe's tokenizer."""
    return rebase_vocabulary(folder_tensors(folder / "text_encoder"), folder / "tokenizer", ROOT / config.TOKENIZER)


def load_trained(config: ModuleType, path: Path) -> nn.Module:
    """The averaged model of an encoder state file."""
    average = load_state(path, "encoder")["ema"]["average"]
    model = build(config)
    model.load_state_dict({k.removeprefix("model."): v for k, v in average.items() if k.startswith("model.")})
    return model
