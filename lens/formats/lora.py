"""LoRA files -> weights: W + scale * alpha / r * up @ down, summed in float32 and rounded once to the weight's own type.

Read are a peft folder (adapter_model.safetensors, adapter_config.json) and a single safetensors file with peft's or
diffusers' key names; peft itself is not needed. An adapter speaks of the released modules ("transformer_blocks.0.attn.img_qkv");
ours may hold several of them stacked (w1 above w3), so each adapts its own rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lens.interrupts import held_back

from .files import CheckpointError, read_json
from .names import released_names
from .safetensors import Shard

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METADATA = "lora_adapter_metadata"  # where diffusers keeps a configuration inside a file
_PREFIX = re.compile(r"^(base_model\.model\.)?(transformer\.|diffusion_model\.)?(?!_)")
_LEAF = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B|down|up)(\.default)?\.weight")
_REFUSED = ("use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "megatron_config", "layer_replication")


@dataclass(frozen=True)
class Pair:
    """One adapted module: W [out, in] gains factor * up @ down."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r]
    factor: float  # alpha / r, or alpha / sqrt(r)


@dataclass(frozen=True)
class Adapter:
    """What a file holds, by released module name. ``fingerprint``: SHA-256 of names, numbers and factors."""

    name: str
    pairs: Mapping[str, Pair]
    fingerprint: str


def read(path: str | os.PathLike[str]) -> Adapter:
    """A peft folder or a safetensors file. CheckpointError names the file, the key, what was expected and what came."""
    where = Path(path)
    file = where / WEIGHTS if where.is_dir() else where
    if not file.is_file():
        raise CheckpointError(f"{file}: file not found; a LoRA is a .safetensors file or a folder with {WEIGHTS}")
    shard = Shard(file)
    config = file.parent / CONFIG
    if where.is_dir() or (file.name == WEIGHTS and config.is_file()):
        settings, source = read_json(config), config
    else:
        settings, source = _inside(shard), file
    _refuse(settings, source)
    sides: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key in sorted(shard.entries):
        tensor = _tensor(shard, key)
        name = key[_PREFIX.match(key).end() :]  # type: ignore[union-attr]
        if name.endswith(".alpha") and tensor.numel() == 1:
            alphas[name.removesuffix(".alpha")] = float(tensor)
            continue
        leaf = _LEAF.fullmatch(name)
        if leaf is None or tensor.dim() != 2:
            raise CheckpointError(
                f"{file}: {key} of shape {list(tensor.shape)} is no LoRA of a linear layer; expected keys such as "
                "base_model.model.transformer_blocks.0.attn.img_qkv.lora_A.weight, [r, in], and lora_B, [out, r]"
            )
        side = "A" if leaf["side"] in ("A", "down") else "B"
        if side in sides.setdefault(leaf["module"], {}):
            raise CheckpointError(f"{file}: {key}: {leaf['module']} has two matrices {side}")
        sides[leaf["module"]][side] = tensor
    shard.close()
    if not sides:
        raise CheckpointError(f"{file}: holds no LoRA")
    if stray := sorted(set(alphas) - set(sides)):
        raise CheckpointError(f"{file}: {stray[0]}.alpha without the LoRA it scales")
    pairs = {}
    for module, found in sides.items():
        if len(found) < 2:
            raise CheckpointError(f"{file}: {module} has lora_{next(iter(found))} alone, expected lora_A and lora_B")
        down, up = found["A"], found["B"]
        rank = len(down)
        if up.shape[1] != rank or rank == 0:
            raise CheckpointError(
                f"{file}: {module}: lora_A {list(down.shape)} and lora_B {list(up.shape)} do not share a rank"
            )
        pairs[module] = Pair(down, up, _factor(module, rank, settings, alphas.get(module), source))
    return Adapter(where.name, pairs, _fingerprint(pairs))


def _tensor(shard: Shard, key: str) -> Tensor:
    kept: list[Tensor] = []
    shard.read(key, lambda view: kept.append(view.clone()))
    if not kept[0].is_floating_point():
        raise CheckpointError(f"{shard.path}: {key} has dtype {kept[0].dtype}, expected a floating point type")
    if not torch.isfinite(kept[0]).all():
        raise CheckpointError(f"{shard.path}: {key} holds NaN or infinity")
    return kept[0]


def _inside(shard: Shard) -> dict[str, Any]:
    """The configuration diffusers writes into a file, without the part's name; {} where there is none."""
    text = shard.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        values = json.loads(text)
        return {key.removeprefix("transformer."): value for key, value in values.items()}
    except (ValueError, AttributeError):
        raise CheckpointError(f"{shard.path}: {METADATA} in its header is not a JSON object") from None


def _refuse(settings: dict[str, Any], source: Path) -> None:
    if (kind := settings.get("peft_type", "LORA")) != "LORA":
        raise CheckpointError(f"{source}: peft_type must be LORA, got {kind!r}")
    if (bias := settings.get("bias", "none")) != "none":
        raise CheckpointError(f"{source}: bias must be 'none', got {bias!r}")
    for key in _REFUSED:
        if settings.get(key):
            raise CheckpointError(f"{source}: {key} is not supported, got {settings[key]!r}")


def _factor(module: str, rank: int, settings: dict[str, Any], alpha: float | None, source: Path) -> float:
    """alpha / r of a module as peft has it: patterns first, the file's own alpha before the configuration's."""
    if settings and (said := _pattern(settings, "rank_pattern", module, settings.get("r"))) != rank:
        raise CheckpointError(f"{source}: {module} must have rank r = {said}, got {rank}")
    if alpha is None:
        alpha = _pattern(settings, "alpha_pattern", module, settings.get("lora_alpha", rank))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{source}: lora_alpha of {module} must be a number, got {alpha!r}")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _pattern(settings: dict[str, Any], field: str, module: str, default: Any) -> Any:
    """The value of the first pattern that the module's whole name or its end matches."""
    for pattern, value in (settings.get(field) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _fingerprint(pairs: Mapping[str, Pair]) -> str:
    digest = hashlib.sha256()
    for module, pair in sorted(pairs.items()):
        digest.update(f"{module}\0{pair.factor!r}\0{tuple(pair.down.shape)}\0{tuple(pair.up.shape)}\0".encode())
        for matrix in (pair.down, pair.up):
            digest.update(matrix.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ weights


def modules_of(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Released module name -> (our weight's name, first row, row after the last) of every linear layer."""
    found: dict[str, tuple[str, int, int]] = {}
    for name, weight in model.named_parameters():
        if weight.dim() != 2:
            continue
        keys = released_names(name)
        rows = weight.shape[0] // len(keys)
        for i, key in enumerate(keys):
            found[key.removesuffix(".weight")] = name, i * rows, (i + 1) * rows
    return found


def check(adapter: Adapter, model: nn.Module) -> None:
    """Every module of the adapter is one of the model, of its shape; else CheckpointError."""
    known, weights = modules_of(model), dict(model.named_parameters())
    for module, pair in adapter.pairs.items():
        if module not in known:
            raise CheckpointError(
                f"{adapter.name}: {module} is no linear layer of this model, which has {len(known)}, such as "
                "transformer_blocks.0.attn.img_qkv"
            )
        name, first, last = known[module]
        expected, got = [last - first, weights[name].shape[1]], [pair.up.shape[0], pair.down.shape[1]]
        if got != expected:
            raise CheckpointError(
                f"{adapter.name}: {module} must adapt a weight of shape {expected}, got lora_B @ lora_A of {got}"
            )
        if weights[name].is_meta:
            raise CheckpointError(f"{adapter.name}: the weight of {module} was dropped from this model")


@torch.no_grad()
def merged(weight: Tensor, parts: Iterable[tuple[int, int, Pair, float]]) -> Tensor:
    """W + sum of scale * factor * up @ down over (first row, row after the last, pair, scale), float32 [out, in]."""
    change = torch.zeros_like(weight, dtype=torch.float32)
    for first, last, pair, scale in parts:
        down, up = (matrix.to(weight.device, torch.float32) for matrix in (pair.down, pair.up))
        change[first:last] += scale * pair.factor * (up @ down)
    return weight.float() + change


class Adapters:
    """The adapters of one model. Weights they touch are kept as they were, in host memory, and come back bit for bit."""

    def __init__(self, model: nn.Module, changed: Callable[[set[str]], None] | None = None):
        """changed: called with the names of the weights that are others now, before anything can come between."""
        self.model = model
        self.changed = changed
        self.loaded: list[tuple[Adapter, float]] = []
        self._kept: dict[str, Tensor] = {}

    def add(self, adapter: Adapter, scale: float) -> set[str]:
        """Merge another one; returns the names of our weights that changed. All of it or nothing: where it does not fit,
        where memory ends and under Ctrl-C the weights are those of before."""
        check(adapter, self.model)
        return self._set([*self.loaded, (adapter, scale)])

    def clear(self) -> set[str]:
        """The weights as they were before the first adapter."""
        return self._set([])

    @torch.no_grad()
    def _set(self, loaded: Sequence[tuple[Adapter, float]]) -> set[str]:
        weights = dict(self.model.named_parameters())
        before, wanted = self._parts(self.loaded), self._parts(loaded)
        touched: list[str] = []
        with held_back() as interrupted:
            try:
                for name in before | wanted:
                    interrupted()
                    if name not in self._kept:
                        self._kept[name] = weights[name].detach().to("cpu", copy=True)
                    touched.append(name)
                    self._merge(weights[name], name, wanted)
                interrupted()
            except BaseException:
                for name in touched:
                    self._merge(weights[name], name, before)
                self._kept = {name: kept for name, kept in self._kept.items() if name in before}
                raise
            self._kept = {name: kept for name, kept in self._kept.items() if name in wanted}
            self.loaded = list(loaded)
            names = set(before) | set(wanted)
            if self.changed is not None:
                self.changed(names)
        return names

    def _parts(self, loaded: Sequence[tuple[Adapter, float]]) -> dict[str, list[tuple[int, int, Pair, float]]]:
        """What every weight gains under these adapters, by its name."""
        known = modules_of(self.model)
        parts: dict[str, list[tuple[int, int, Pair, float]]] = {}
        for adapter, scale in loaded:
            for module, pair in adapter.pairs.items():
                name, first, last = known[module]
                parts.setdefault(name, []).append((first, last, pair, scale))
        return parts

    def _merge(self, weight: Tensor, name: str, parts: Mapping[str, list[tuple[int, int, Pair, float]]]) -> None:
        base = self._kept[name].to(weight.device)
        weight.copy_(merged(base, parts[name]) if name in parts else base)
