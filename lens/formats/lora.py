"""LoRA files -> weights: W + scale * change, summed in float32 and rounded once to the weight's own type.

A change is alpha / r * up @ down (LoRA), a Kronecker product (LoKr), a Hadamard product (LoHa) or a difference as it is
(`.diff`); with a magnitude (DoRA) it is magnitude * V / |V| - W, where V is W plus the change and |V| the norm of each row.
Read are a peft folder (adapter_model.safetensors, adapter_config.json), diffusers' folder and a single safetensors file,
under the names of `lora_names`; peft itself is not needed. An adapter speaks of the released modules
("transformer_blocks.0.attn.img_qkv"); a weight of our model may hold several of them stacked (w1 above w3), so each adapts its own rows.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lens import notices
from lens.arguments import location
from lens.formats.interrupts import held_back

from . import contents
from .files import CheckpointError, is_there, parse_json, read_json
from .hub import is_hub_id
from .lora_names import Names, Target, released_targets, targets_of
from .names import released_names
from .patterns import fullmatch
from .safetensors import FLOAT8, Shard

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # where diffusers keeps a configuration inside a file
HEADER_ALPHA, HEADER_RANK = "ss_network_alpha", "ss_network_dim"  # kohya's, in the header
# what trainers write of the model that they adapted: in the header; peft in the configuration, where it may be a path
HEADER_BASES = ("modelspec.architecture", "ss_base_model_version", "base_model", "base_model_name_or_path")
_REFUSED = ("fan_in_fan_out", "lora_bias", "modules_to_save", "megatron_config", "layer_replication")
_KINDS = ("LORA", "LOKR", "LOHA")
_MOST_PATTERNS = 2000
_LARGEST_NUMBER = 1e30


@dataclass(frozen=True)
class Pair:
    """One adapted module: W [out, in] gains factor * up @ down."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r]
    factor: float  # alpha / r, or alpha / sqrt(r)
    magnitude: Tensor | None = None  # DoRA: [out, 1], or [1, in] where columns are normalised

    @property
    def shape(self) -> list[int]:
        return [len(self.up), self.down.shape[1]]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    def product(self, device: torch.device) -> Tensor:
        """What the factor multiplies, float32 [out, in]."""
        down, up = (matrix.to(device, torch.float32) for matrix in self.matrices)
        return up @ down


@dataclass(frozen=True)
class Kronecker:
    """LoKr: W gains factor * left (x) right; each of both may be a product of two matrices."""

    left: tuple[Tensor, ...]  # [a, b], or [a, r] and [r, b]
    right: tuple[Tensor, ...]  # [c, d]; W is [a c, b d]
    factor: float
    magnitude: Tensor | None = None

    @property
    def shape(self) -> list[int]:
        (a, b), (c, d) = ([side[0].shape[0], side[-1].shape[1]] for side in (self.left, self.right))
        return [a * c, b * d]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        return (*self.left, *self.right)

    def product(self, device: torch.device) -> Tensor:
        left, right = (
            functools.reduce(torch.matmul, [m.to(device, torch.float32) for m in side])
            for side in (self.left, self.right)
        )
        return torch.kron(left, right)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: W gains factor * (a1 @ b1) * (a2 @ b2), elementwise."""

    matrices: tuple[Tensor, Tensor, Tensor, Tensor]  # a1 [out, r], b1 [r, in], a2, b2
    factor: float
    magnitude: Tensor | None = None

    @property
    def shape(self) -> list[int]:
        return [len(self.matrices[0]), self.matrices[1].shape[1]]

    def product(self, device: torch.device) -> Tensor:
        a1, b1, a2, b2 = (matrix.to(device, torch.float32) for matrix in self.matrices)
        return (a1 @ b1) * (a2 @ b2)


@dataclass(frozen=True)
class Difference:
    """W, a bias or a norm gains the tensor as it is."""

    value: Tensor
    factor: float = 1.0
    magnitude: Tensor | None = None

    @property
    def shape(self) -> list[int]:
        return list(self.value.shape)

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        return (self.value,)

    def product(self, device: torch.device) -> Tensor:
        return self.value.to(device, torch.float32)


Change = Pair | Kronecker | Hadamard | Difference


@dataclass(frozen=True)
class Adapter:
    """What a file holds, by released module name (MODULE.bias for a bias). ``fingerprint``: SHA-256 of names, numbers and
    factors."""

    name: str
    pairs: Mapping[str, Change]
    fingerprint: str


# ------------------------------------------------------------------------------------------------ reading


def read(path: str | os.PathLike[str], model: nn.Module | None = None) -> Adapter:
    """A folder of peft's or diffusers', or a safetensors file, for a model (None: one with the released Lens's names).

    CheckpointError names the file, the key, what was expected and what came. A warning tells what is left out.
    """
    where = Path(location("path", path))
    file = _file(where)
    shard = Shard(file)
    config = file.parent / CONFIG
    if is_there(config) and (where.is_dir() or file.name == WEIGHTS):
        settings, source = read_json(config), config
    elif file.name == WEIGHTS and where.is_dir():
        raise CheckpointError(f"{config}: file not found")
    else:
        settings, source = _inside(shard), file
    _refuse(settings, source)
    names = Names(targets_of(model)) if model is not None else _released()
    found, others = _sorted(shard, names)
    shard.close()
    if others:
        notices.warn(f"{file}: {others} keys of a text encoder are left out; only the transformer is adapted")
    if not found:
        raise CheckpointError(f"{file}: holds no LoRA; {contents.of_names(shard.entries)}")
    _note_base(shard, settings, source)
    header = _header_alpha(shard) if _asks_the_header(settings, found) else None
    pairs: dict[str, Change] = {}
    for module, leaves in found.items():
        for target, change in _changes(module, leaves, settings, header, file, source):
            if target in pairs:
                raise CheckpointError(f"{file}: {target} is changed twice")
            pairs[target] = change
    if settings.get("use_dora") and not any(change.magnitude is not None for change in pairs.values()):
        raise CheckpointError(f"{source}: use_dora is set, but {file.name} has no magnitude vectors")
    return Adapter(where.name, pairs, _fingerprint(pairs))


@functools.cache
def _released() -> Names:
    return Names(released_targets())


def _file(where: Path) -> Path:
    """The safetensors file of a LoRA: itself, or the folder's."""
    if not is_there(where):
        raise CheckpointError(
            f"{str(where)[:300]}: file not found; a LoRA is a .safetensors file or a folder with {WEIGHTS}"
        )
    if not where.is_dir():
        return where
    for name in (WEIGHTS, DIFFUSERS):
        if is_there(where / name):
            return where / name
    others = sorted(where.glob("*.safetensors"))
    if len(others) == 1 and not is_there(where / CONFIG):
        return others[0]
    several = (
        f"; it has {', '.join(path.name for path in others[:4])}: name one" if others else contents.of_folder(where)
    )
    raise CheckpointError(
        f"{where / WEIGHTS}: file not found; a LoRA is a .safetensors file or a folder with {WEIGHTS}{several}"
    )


def _sorted(shard: Shard, names: Names) -> tuple[dict[str, dict[str, Tensor]], int]:
    """module -> leaf -> tensor, by released name, and how many keys belong to a text encoder."""
    found: dict[str, dict[str, Tensor]] = {}
    others = 0
    for key in sorted(shard.entries):
        split = names.split(key)
        module = split[0] if split else key
        if names.of_text_encoder(module):
            others += 1
            continue
        shape = shard.entries[key][1]
        if (
            split is None
            or split[2] == "bias"
            or split[1] in ("set_weight", "lora_mid", "lokr_t2", "hada_t1", "hada_t2")
        ):
            raise CheckpointError(
                f"{shard.path}: {key} of shape {shape} is no LoRA of a linear layer; expected keys such as "
                "base_model.model.transformer_blocks.0.attn.img_qkv.lora_A.weight, [r, in], and lora_B, [out, r]"
            )
        resolved = names.resolve(module)
        if resolved is None:
            raise CheckpointError(
                f"{shard.path}: {module} is no linear layer of this model, which has {len(names.targets)} names, such as "
                "transformer_blocks.0.attn.img_qkv"
            )
        leaves = found.setdefault(resolved, {})
        if split[1] in leaves:
            side = split[1].removeprefix("lora_")
            raise CheckpointError(f"{shard.path}: {key}: {resolved} has two matrices {side}")
        leaves[split[1]] = _tensor(shard, key, split[1])
    return found, others


def _tensor(shard: Shard, key: str, leaf: str) -> Tensor:
    kept: list[Tensor] = []
    shard.read(key, lambda view: kept.append(view.clone()))
    value = kept[0].float() if shard.entries[key][0] in FLOAT8 else kept[0]
    if leaf == "alpha" and value.numel() == 1:
        value = value.double()
    if not value.is_floating_point():
        raise CheckpointError(f"{shard.path}: {key} has dtype {value.dtype}, expected a floating point type")
    if not torch.isfinite(value).all():
        raise CheckpointError(f"{shard.path}: {key} holds NaN or infinity")
    if value.dim() == 4 and value.shape[2:] == (1, 1):  # a 1x1 convolution, as some trainers keep linear layers
        value = value[:, :, 0, 0]
    expected = (
        (1,) if leaf == "diff_b" else (1, 2) if leaf in ("diff", "dora_scale") else (0, 1) if leaf == "alpha" else (2,)
    )
    if value.dim() not in expected or (leaf == "alpha" and value.numel() != 1):
        raise CheckpointError(
            f"{shard.path}: {key} of shape {list(value.shape)} is no LoRA of a linear layer; expected "
            f"{' or '.join(map(str, expected))} dimensions"
        )
    return value


def _changes(
    module: str,
    leaves: dict[str, Tensor],
    settings: dict[str, Any],
    header: tuple[float, int | None] | None,
    file: Path,
    source: Path,
) -> list[tuple[str, Change]]:
    """What a module's tensors change: (module or MODULE.bias, change)."""
    made: list[tuple[str, Change]] = []
    magnitude, alpha = leaves.pop("dora_scale", None), leaves.pop("alpha", None)
    for leaf, target in (("diff", module), ("diff_b", f"{module}.bias")):
        if leaf in leaves:
            made.append((target, Difference(leaves.pop(leaf))))
    number = None if alpha is None else float(alpha)
    kinds = {leaf.partition("_")[0] for leaf in leaves}
    if not kinds:
        if alpha is not None or magnitude is not None or not made:
            what = "alpha" if alpha is not None else "dora_scale"
            raise CheckpointError(f"{file}: {module}.{what} without the LoRA it scales")
        return made
    if len(kinds) > 1:
        raise CheckpointError(f"{file}: {module} has {', '.join(sorted(leaves))}, expected one kind of adapter")
    kind = kinds.pop()
    change: Change
    if kind == "lora":
        if len(leaves) < 2:
            raise CheckpointError(f"{file}: {module} has {next(iter(leaves))} alone, expected lora_A and lora_B")
        down, up = leaves["lora_A"], leaves["lora_B"]
        rank = len(down)
        if up.shape[1] != rank or rank == 0:
            raise CheckpointError(
                f"{file}: {module}: lora_A {list(down.shape)} and lora_B {list(up.shape)} do not share a rank"
            )
        change = Pair(down, up, _factor(module, rank, settings, number, header, source), magnitude)
    elif kind == "hada":
        rank, matrices = _matrices(module, leaves, ("w1_a", "w1_b", "w2_a", "w2_b"), file)
        factor = _product_factor(module, rank, settings, number, source)
        change = Hadamard((matrices[0], matrices[1], matrices[2], matrices[3]), factor, magnitude)
        if change.shape != [len(matrices[2]), matrices[3].shape[1]]:
            raise CheckpointError(f"{file}: {module}: its two products of LoHa differ in shape")
    else:
        sides, ranks = [], []
        for side in ("w1", "w2"):
            whole = f"lokr_{side}" in leaves
            rank, matrices = _matrices(module, leaves, (side,) if whole else (f"{side}_a", f"{side}_b"), file)
            sides.append(matrices)
            ranks += [] if whole else [rank]
        # both sides whole: LyCORIS sets alpha to the rank, so that the factor is 1
        factor = _product_factor(module, ranks[-1], settings, number, source) if ranks else 1.0
        change = Kronecker(sides[0], sides[1], factor, magnitude)
    if magnitude is not None:
        change = _with_magnitude(module, change, magnitude, file)
    return [*made, (module, change)]


def _matrices(
    module: str, leaves: dict[str, Tensor], wanted: Sequence[str], file: Path
) -> tuple[int, tuple[Tensor, ...]]:
    """The rank and the matrices of a product, checked to fit."""
    kind = next(iter(leaves)).partition("_")[0]
    names = [f"{kind}_{name}" for name in wanted]
    if missing := [name for name in names if name not in leaves]:
        raise CheckpointError(f"{file}: {module} has {', '.join(sorted(leaves))}, expected {missing[0]}, too")
    matrices = tuple(leaves[name] for name in names)
    for left, right in zip(matrices[::2], matrices[1::2]):
        if left.shape[1] != right.shape[0] or right.shape[0] == 0:
            raise CheckpointError(
                f"{file}: {module}: {names[0]} {list(left.shape)} and {names[1]} {list(right.shape)} do not share a rank"
            )
    return matrices[0].shape[1], matrices


def _with_magnitude(module: str, change: Change, magnitude: Tensor, file: Path) -> Change:
    rows, columns = change.shape
    if magnitude.shape in ((rows,), (rows, 1)):
        magnitude = magnitude.reshape(rows, 1)
    elif magnitude.shape != (1, columns):
        raise CheckpointError(
            f"{file}: {module}: a magnitude must have shape [{rows}, 1] or [1, {columns}], got {list(magnitude.shape)}"
        )
    values = {field: getattr(change, field) for field in change.__dataclass_fields__}
    return type(change)(**{**values, "magnitude": magnitude})


def _inside(shard: Shard) -> dict[str, Any]:
    """The configuration diffusers writes into a file, without the part's name; {} where there is none."""
    text = shard.metadata.get(METADATA)
    if text is None:
        return {}
    values = parse_json(text, f"{shard.path}: {METADATA} in its header")
    return {
        key.removeprefix("transformer."): value for key, value in values.items() if not key.startswith("text_encoder")
    }


def _note_base(shard: Shard, settings: Mapping[str, Any], source: Path) -> None:
    """Warn where a file names another model as the one that it was trained on. Where names and shapes fit it is merged all
    the same: what a trainer writes there may be a folder of its own."""
    said = {(shard.path, f"{key} in its header"): shard.metadata.get(key) for key in HEADER_BASES}
    base = settings.get(HEADER_BASES[-1])
    if isinstance(base, str) and is_hub_id(base):  # a path says nothing
        said[source, HEADER_BASES[-1]] = base
    told = {key: value for key, value in said.items() if value not in (None, "", "None")}
    if told and not any("lens" in str(value).lower() for value in told.values()):
        (where, key), value = next(iter(told.items()))
        notices.warn(
            f"{where}: {key} names {str(value)[:80]!r}, another model than this Lens, into which it is merged all the same"
        )


def _asks_the_header(settings: Mapping[str, Any], found: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether a LoRA's alpha stands neither beside its matrices nor in a configuration."""
    told = "lora_alpha" in settings or bool(settings.get("alpha_pattern"))
    return not told and any("lora_A" in leaves and "alpha" not in leaves for leaves in found.values())


def _header_alpha(shard: Shard) -> tuple[float, int | None] | None:
    """The alpha, and the rank it is meant for (None: any), that kohya's trainers write into the header; None where they
    did not. Warns of one that is no number, which then counts as absent."""
    numbers: list[float | None] = []
    for key in (HEADER_ALPHA, HEADER_RANK):
        text = shard.metadata.get(key, "None")
        try:
            number = None if text in ("", "None") else float(text)
        except ValueError:
            number = math.nan
        if number is not None and not abs(number) < _LARGEST_NUMBER:
            notices.warn(
                f"{shard.path}: {key} in its header must be a number, got {text[:40]!r}: not used, "
                + ("alpha is taken as the rank" if key == HEADER_ALPHA else f"{HEADER_ALPHA} is taken for any rank")
            )
            number = None
        numbers.append(number)
    alpha, rank = numbers
    return None if alpha is None else (alpha, None if rank is None else int(rank))


def _refuse(settings: dict[str, Any], source: Path) -> None:
    if (kind := settings.get("peft_type") or "LORA") not in _KINDS:
        raise CheckpointError(f"{source}: peft_type must be one of {', '.join(_KINDS)}, got {kind!r}")
    if (bias := settings.get("bias") or "none") != "none":
        raise CheckpointError(f"{source}: bias must be 'none', got {bias!r}")
    for key in _REFUSED:
        if settings.get(key):
            raise CheckpointError(f"{source}: {key} is not supported, got {settings[key]!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
            raise CheckpointError(
                f"{source}: {key} must be an object of at most {_MOST_PATTERNS} patterns, got {str(patterns)[:80]}"
            )


def _factor(
    module: str,
    rank: int,
    settings: dict[str, Any],
    alpha: float | None,
    header: tuple[float, int | None] | None,
    source: Path,
) -> float:
    """alpha / r of a module as peft has it: patterns first; the file's own alpha before the configuration's, and that
    before the header's, which counts where nothing else tells and its rank is the module's."""
    if "r" in settings or settings.get("rank_pattern"):
        said = _pattern(settings, "rank_pattern", module, settings.get("r"), source)
        if said != rank:
            raise CheckpointError(f"{source}: {module} must have rank r = {said}, got {rank}")
    if alpha is None and header is not None:
        if header[1] in (None, rank):
            alpha = header[0]
        else:
            notices.warn(
                f"{source}: {HEADER_ALPHA} = {header[0]:g} in its header is for rank {header[1]}, but {module} has rank {rank}: "
                "not used"
            )
    number: Any = alpha
    if number is None:
        number = _pattern(settings, "alpha_pattern", module, settings.get("lora_alpha", rank), source)
    number = _number(f"lora_alpha of {module}", number, source)
    return number / math.sqrt(rank) if settings.get("use_rslora") else number / rank


def _product_factor(module: str, rank: int, settings: dict[str, Any], alpha: float | None, source: Path) -> float:
    """alpha / r of a LoKr or LoHa: the file's alpha over its own rank, or the configuration's over the configuration's."""
    if alpha is not None or "alpha" not in settings:
        return (rank if alpha is None else alpha) / rank
    values = [
        _number(f"{field} of {module}", _pattern(settings, patterns, module, settings.get(field), source), source)
        for field, patterns in (("alpha", "alpha_pattern"), ("r", "rank_pattern"))
    ]
    if values[1] <= 0:
        raise CheckpointError(f"{source}: r of {module} must be positive, got {values[1]:g}")
    return values[0] / values[1]


def _number(what: str, value: Any, source: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST_NUMBER:
        raise CheckpointError(f"{source}: {what} must be a number, got {str(value)[:40]!r}")
    return float(value)


def _pattern(settings: dict[str, Any], field: str, module: str, default: Any, source: Path) -> Any:
    """The value of the first pattern that the module's whole name or its end matches, as peft finds it."""
    for pattern, value in (settings.get(field) or {}).items():
        try:
            if fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except ValueError as error:
            raise CheckpointError(
                f"{source}: {field}: {pattern[:80]!r} is no pattern that is read here: {error}"
            ) from None
    return default


def _fingerprint(pairs: Mapping[str, Change]) -> str:
    digest = hashlib.sha256()
    for module, change in sorted(pairs.items()):
        magnitude = () if change.magnitude is None else (change.magnitude,)
        matrices = (*change.matrices, *magnitude)
        shapes = [tuple(matrix.shape) for matrix in matrices]
        digest.update(f"{module}\0{type(change).__name__}\0{change.factor!r}\0{shapes}\0".encode())
        for matrix in matrices:
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
    known, weights = targets_of(model), dict(model.named_parameters())
    for module, change in adapter.pairs.items():
        if module not in known:
            raise CheckpointError(
                f"{adapter.name}: {module} is no linear layer of this model, which has {len(modules_of(model))}, such as "
                "transformer_blocks.0.attn.img_qkv"
            )
        target = known[module]
        expected, got = [target.last - target.first, *weights[target.weight].shape[1:]], change.shape
        if got != expected:
            what = "lora_B @ lora_A of" if isinstance(change, Pair) else "a change of"
            raise CheckpointError(f"{adapter.name}: {module} must adapt a weight of shape {expected}, got {what} {got}")
        if weights[target.weight].is_meta and getattr(model, "stored_modulation", None) is None:
            raise CheckpointError(f"{adapter.name}: the weight of {module} was dropped from this model")


@torch.no_grad()
def merged(weight: Tensor, parts: Iterable[tuple[int, int, Change, float]]) -> Tensor:
    """W + sum of scale * change over (first row, row after the last, change, scale), float32 of W's shape."""
    total = torch.zeros_like(weight, dtype=torch.float32)
    for first, last, change, scale in parts:
        product = change.product(weight.device)
        if change.magnitude is None:
            total[first:last] += scale * change.factor * product
            continue
        base = weight[first:last].float()
        turned = base + change.factor * product
        magnitude = change.magnitude.to(weight.device, torch.float32)
        norm = torch.linalg.vector_norm(turned, dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)
        total[first:last] += scale * (magnitude * turned / norm.clamp_min(torch.finfo(torch.float32).tiny) - base)
    return weight.float() + total


def parts_of(
    model: nn.Module, loaded: Sequence[tuple[Adapter, float]]
) -> dict[str, list[tuple[int, int, Change, float]]]:
    """What every weight gains under these adapters, by its name, as `merged` reads it."""
    known: dict[str, Target] = targets_of(model)
    parts: dict[str, list[tuple[int, int, Change, float]]] = {}
    for adapter, scale in loaded:
        for module, change in adapter.pairs.items():
            target = known[module]
            parts.setdefault(target.weight, []).append((target.first, target.last, change, scale))
    return parts


@torch.no_grad()
def merge(adapter: Adapter, model: nn.Module) -> None:
    """An adapter that is part of a checkpoint, into the weights for good. Errors: those of `check`."""
    check(adapter, model)
    weights = dict(model.named_parameters())
    for name, parts in parts_of(model, [(adapter, 1.0)]).items():
        weights[name].copy_(merged(weights[name], parts))


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
        before, wanted = parts_of(self.model, self.loaded), parts_of(self.model, loaded)
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

    def _merge(self, weight: Tensor, name: str, parts: Mapping[str, list[tuple[int, int, Change, float]]]) -> None:
        base = self._kept[name].to(weight.device)
        weight.copy_(merged(base, parts[name]) if name in parts else base)
