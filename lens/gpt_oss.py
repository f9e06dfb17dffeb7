"""GPT-OSS (arXiv 2508.10925) for what Lens needs of it: features of decoder layers, and the reasoner's writing.

Prompts are packed, never padded: R rows of D channels in all, sample after sample. Their constant beginning is read once,
its keys and values are kept. Experts stay in MXFP4 where the checkpoint has them so (`lens.ops.moe_mxfp4`). Attention is
grouped-query with a learned sink per head, S keys before and with a sample's T tokens, in a window on every other layer.

On a CPU a sample's bits do not depend on its neighbours: library GEMMs run sample by sample; the experts' op, which reads
every expert once for all of them, and AMX's GEMM are independent by themselves.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .engine.content import content, glance, write_counts
from .ops import reference
from .ops.linear.fused import linear

_PREFIXES = 8  # whose keys and values are kept
_HEAD_ROWS = 8192  # of the LM head, that are widened at a time


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071, section 3): slow rotations are slowed by ``factor``, fast ones are kept, between
    ``beta_slow`` and ``beta_fast`` turns over the original length they are mixed; attention grows by 0.1 ln(factor) + 1."""

    factor: float = 32.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False  # the bounds of the mixture to whole pairs
    attention_factor: float | None = None

    def frequencies(self, theta: float, channels: int) -> tuple[Tensor, float]:
        """Radians per position of every pair, float32 [channels / 2], and the factor of cos and sin."""

        def pair(turns: float) -> float:
            return channels * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, channels - 1)
        kept = theta ** (torch.arange(0, channels, 2).float() / channels)
        slowed = 1 - ((torch.arange(channels // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
        grown = 1.0 if self.factor <= 1 else 0.1 * math.log(self.factor) + 1
        mixed = 1 / (self.factor * kept) * (1 - slowed) + 1 / kept * slowed
        return mixed, grown if self.attention_factor is None else self.attention_factor


@dataclass(frozen=True)
class GptOssConfig:
    """The model's shape, by the names of its files; the defaults are GPT-OSS-20B's."""

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 24
    head_dim: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    layer_types: tuple[str, ...] = ("sliding_attention", "full_attention") * 12
    sliding_window: int | None = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    attention_bias: bool = True
    packed: bool = True  # experts in MXFP4

    def rotary(self) -> tuple[Tensor, float]:
        """Radians per position of every pair, float32 [head_dim / 2], and the factor of cos and sin."""
        if self.rope_scaling is not None:
            return self.rope_scaling.frequencies(self.rope_theta, self.head_dim)
        return 1 / self.rope_theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim), 1.0


class Keys:
    """Keys and values of one sample, [S, key heads, head_dim] each, in every layer that was run."""

    def __init__(self, room: int, begin: Keys | None = None):
        """room: positions there will be at most; begin: all positions that come before, copied layer by layer when a layer
        is first extended, so that ``begin`` may be filled in the same pass, as an earlier sample."""
        self.length: int = 0 if begin is None else begin.room
        self.room: int = room
        self._begin, self._begun = begin, self.length
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def extended(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer with those of the next positions. `length` is the caller's to move on."""
        if layer not in self._held:
            self._held[layer] = keys.new_empty(self.room, *keys.shape[1:]), keys.new_empty(self.room, *keys.shape[1:])
            if self._begin is not None and self._begun:
                for own, there in zip(self._held[layer], self._begin._held[layer]):
                    own[: self._begun] = there
        held, end = self._held[layer], self.length + len(keys)
        held[0][self.length : end], held[1][self.length : end] = keys, values
        return held[0][:end], held[1][:end]


@dataclass(frozen=True)
class Samples:
    """Whose rows are packed: the keys that each sample has, and how many rows of it follow."""

    keys: tuple[Keys, ...]
    lengths: tuple[int, ...]


class Attention(nn.Module):
    """Grouped-query attention of one layer."""

    def __init__(self, config: GptOssConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
        width, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, n, bias) for n in (queries, keys, keys))
        self.o_proj = nn.Linear(queries, width, bias)
        self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, samples: Samples) -> Tensor:
        """x [R, D], cos and sin [R, head_dim / 2] in the arithmetic dtype -> [R, D]."""
        lengths = samples.lengths
        q, k, v = (
            linear(p, x, lengths).view(len(x), -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        k = reference.rotate_halves(k.to(cos.dtype), cos, sin).to(k.dtype)
        out = []
        for q1, k1, v1, c, s, held in zip(*(y.split(lengths) for y in (q, k, v, cos, sin)), samples.keys):
            keys, values = held.extended(self.layer, k1, v1)
            out.append(ops.sink_attention(q1, keys, values, self.sinks, c, s, self.window, self.head_dim**-0.5))
        mixed = out[0] if len(out) == 1 else torch.cat(out)
        return linear(self.o_proj, mixed.flatten(1), lengths)


class Experts(nn.Module):
    """The mixture of experts of one layer, with its router."""

    def __init__(self, config: GptOssConfig):
        super().__init__()
        self.top_k, self.alpha, self.limit = config.num_experts_per_tok, config.swiglu_alpha, config.swiglu_limit
        self.packed = config.packed
        experts, width, hidden = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.router = nn.Linear(width, experts)
        self.experts = nn.Module()
        for name, inputs, outputs in (("gate_up_proj", width, 2 * hidden), ("down_proj", hidden, width)):
            shapes = {"": (experts, inputs, outputs), "_bias": (experts, outputs)}
            if self.packed:
                del shapes[""]
                shapes |= {"_blocks": (experts, outputs, inputs // 32, 16), "_scales": (experts, outputs, inputs // 32)}
            for end, shape in shapes.items():
                kind = torch.uint8 if end in ("_blocks", "_scales") else torch.get_default_dtype()
                value = nn.Parameter(torch.empty(shape, dtype=kind), requires_grad=False)
                self.experts.register_parameter(name + end, value)

    def forward(self, x: Tensor, samples: Samples) -> Tensor:
        """[R, D] -> [R, D]."""
        if not self.packed:
            return torch.cat([self._expanded(rows) for rows in x.split(samples.lengths)])
        e: Any = self.experts
        router = self.router
        return ops.moe_mxfp4(
            x, router.weight, router.bias, e.gate_up_proj_blocks, e.gate_up_proj_scales, e.gate_up_proj_bias,
            e.down_proj_blocks, e.down_proj_scales, e.down_proj_bias, self.top_k, self.alpha, self.limit,
        )  # fmt: skip

    def _expanded(self, x: Tensor) -> Tensor:
        """The same with weights [E, D, 2 F] and [E, F, D] in the dtype of x."""
        e: Any = self.experts
        chosen, shares = reference.route(x, self.router.weight, self.router.bias, self.top_k)
        made = shares.new_zeros(*chosen.shape, x.shape[1])
        for expert in chosen.unique().tolist():
            row, place = (chosen == expert).nonzero(as_tuple=True)
            gate_up = (x[row] @ e.gate_up_proj[expert]).float() + e.gate_up_proj_bias[expert]
            hidden = reference.clamped_swiglu(gate_up, self.alpha, self.limit).to(x.dtype)
            made[row, place] = (hidden @ e.down_proj[expert]).float() + e.down_proj_bias[expert]
        return (shares[..., None] * made).sum(1).to(x.dtype)


class RmsNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight in the arithmetic dtype, rounded once."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        nothing = self.weight.new_zeros(1, len(self.weight))
        rows = torch.arange(0, len(x) + 1, max(1, len(x)), dtype=torch.int32, device=x.device)  # one sample of all
        return ops.rms_norm_modulate(x, self.weight, nothing, nothing, rows, self.eps)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: GptOssConfig, layer: int):
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Experts(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, samples: Samples) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, samples)
        return x + self.mlp(self.post_attention_layernorm(x), samples)


class _Prefixes:
    """Keys and values of the last few beginnings of prompts, as the weights were when they were read.

    Threads may share it; copied and pickled empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[Any, tuple[Hashable, Keys]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Prefixes, ()

    def get(self, key: Any, weights: Hashable) -> Keys | None:
        """weights: a `glance` at what they are made of; those that were made of others are none."""
        with self._lock:
            if key in self._held and self._held[key][0] == weights:
                self._held.move_to_end(key)
                return self._held[key][1]
        return None

    def keep(self, key: Any, weights: Hashable, made: Keys) -> None:
        with self._lock:
            self._held[key] = weights, made
            self._held.move_to_end(key)
            while len(self._held) > _PREFIXES:
                self._held.popitem(last=False)

    def __len__(self) -> int:
        return len(self._held)


class GptOss(nn.Module):
    """The decoder. Parameters have the names of the released files without "model."; `formats.gpt_oss` fills them.

    The embedding, and the LM head that writing needs, may have another dtype than the rest: rows are converted as read.
    """

    def __init__(self, config: GptOssConfig, depth: int | None = None):
        """depth: layers to build, all by default."""
        super().__init__()
        self.config = config
        depth = config.num_hidden_layers if depth is None else depth
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, n) for n in range(depth)])
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.pages: Any = None  # `formats.safetensors.Pages`, of weights that are mapped
        self.streamed = False  # whether a layer's pages are given back when it has run
        self._prefixes = _Prefixes()

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @torch.no_grad()
    def forward(self, ids: Sequence[Sequence[int]], keys: Sequence[Keys], layers: Collection[int]) -> dict[int, Tensor]:
        """The next tokens of each sample (at least one) after its keys, which grow by them -> layer: raw residual [R, D].

        Stops after the last of ``layers``.
        """
        lengths = [len(own) for own in ids]
        places = [torch.arange(k.length, k.length + n) for k, n in zip(keys, lengths)]
        frequencies, grown = self.config.rotary()
        angle = torch.cat(places).float()[:, None] * frequencies
        wide = reference.arithmetic_dtype(self.dtype)
        cos, sin = ((f * grown).to(self.device, wide) for f in (angle.cos(), angle.sin()))
        flat = torch.tensor([token for own in ids for token in own], device=self.device)
        x = F.embedding(flat, self.embed_tokens.weight).to(self.dtype)
        samples = Samples(tuple(keys), tuple(lengths))
        found: dict[int, Tensor] = {}
        for n, layer in enumerate(self.layers[: 1 + max(layers)]):
            x = layer(x, cos, sin, samples)
            if n in layers:
                found[n] = x
            if self.streamed and self.pages:
                self.pages.drop()
        for own, length in zip(keys, lengths):
            own.length += length
        return found

    def features(self, ids: Sequence[Sequence[int]], layers: Sequence[int], prefix: int) -> list[list[Tensor]]:
        """Raw residual after each of ``layers`` of every sample, [T, D] each, T = len(ids) - prefix at least 1.

        The first ``prefix`` tokens are read by themselves, once for all samples and calls that share them: by causality
        they are what they would be in front of any prompt. Those not known yet run in the same pass, in front of the
        samples, so that every layer's weights are read once.
        """
        held: dict[tuple[int, ...], Keys] = {}
        new: dict[tuple[int, ...], tuple[Hashable, Keys]] = {}
        table, last = self.embed_tokens.weight, max(layers)
        weights = [table, *(weight for layer in self.layers[: 1 + last] for weight in layer.parameters())]
        # a glance at streamed weights would read pages that were given back: of those torch's own counts must do
        seen = (tuple(map(id, weights)), write_counts(weights)) if self.streamed else glance(weights)

        def key(begin: tuple[int, ...]) -> Any:
            return begin, self.dtype, self.device, last

        for begin in dict.fromkeys(tuple(own[:prefix]) for own in ids):
            # of the table the rows that are read, which a glance at all of it would hardly meet
            made_of: Hashable = (seen, content(table[list(begin)].unbind()))
            known = self._prefixes.get(key(begin), made_of)
            if known is None:
                known = Keys(len(begin))
                if begin:
                    new[begin] = made_of, known
            held[begin] = known
        begun = [Keys(len(own), held[tuple(own[:prefix])]) for own in ids]
        states = self([*new, *(own[prefix:] for own in ids)], [*(made for _, made in new.values()), *begun], layers)
        for begin, (made_of, made) in new.items():
            self._prefixes.keep(key(begin), made_of, made)
        lengths = [*map(len, new), *(len(own) - prefix for own in ids)]
        parts = [[part.clone() for part in states[n].split(lengths)[len(new) :]] for n in layers]
        return [list(sample) for sample in zip(*parts)]

    # ------------------------------------------------------------------------------------------------ writing

    @torch.no_grad()
    def write(
        self,
        head: Tensor,
        ids: Sequence[int],
        most: int,
        stop: Collection[int] = (),
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """At most ``most`` tokens after ``ids``, the first of ``stop`` included, where it comes.

        head: the LM head [V, D]. temperature 0: the most probable token, of equal ones the first; else drawn from
        softmax(logits / temperature) with ``generator``. Needs all layers. Errors: ValueError.
        """
        if len(self.layers) < self.config.num_hidden_layers:
            raise ValueError(f"GptOss.write: needs all {self.config.num_hidden_layers} layers, has {len(self.layers)}")
        if temperature < 0 or (temperature > 0 and generator is None):
            raise ValueError(f"GptOss.write: temperature must be 0, or positive with a generator, got {temperature}")
        last, keys, new = len(self.layers) - 1, Keys(len(ids) + most), list(ids)
        written: list[int] = []
        while len(written) < most:
            state = self.norm(self([new], [keys], (last,))[last][-1:])
            logits = self._logits(state, head)[0]
            if temperature:
                shares = (logits / temperature).softmax(-1).cpu()
                token = int(torch.multinomial(shares, 1, generator=generator))
            else:
                token = int(logits.argmax())
            written.append(token)
            if token in stop:
                break
            new = [token]
        return written

    @torch.no_grad()
    def probabilities(self, head: Tensor, ids: Sequence[int], begin: int) -> Tensor:
        """Probability of each of ``ids[begin:]`` after those before it, [len(ids) - begin] in float32; begin >= 1. Needs all
        layers."""
        last = len(self.layers) - 1
        states = self.norm(self([ids[:-1]], [Keys(len(ids))], (last,))[last][begin - 1 :])
        shares = self._logits(states, head).softmax(-1)
        return shares.gather(-1, torch.tensor(ids[begin:], device=shares.device)[:, None])[:, 0]

    @staticmethod
    def _logits(state: Tensor, head: Tensor) -> Tensor:
        """state head^T in float32: [R, D], [V, D] -> [R, V]. A head of another dtype is converted piece by piece."""
        if head.dtype == state.dtype:
            return F.linear(state, head).float()
        return torch.cat([F.linear(state, part.to(state.dtype)) for part in head.split(_HEAD_ROWS)], -1).float()
