"""LoRA for the trainings: frozen weights, W x + alpha / r * up (down x) beside them, saved as peft saves it.

    python -m train pretrain --init lens/mini/base --vae lens/mini/base/vae --lora r=16,alpha=32 --out runs/style
    python -m train pretrain --vae lens/mini/base/vae --out runs/style --export runs/style/export
    lens generate "a red apple" --lora runs/style/export/lora --lora-scale 0.8

The model's own layers are adapted, not modules of peft's: ours hold w1 above w3 in one matrix, with an adapter each, and ops
that read `weight` instead of calling the layer must find the adapter in it. Key names, configuration and start are peft's
(`init_lora_weights="gaussian"`: down of deviation 1 / r, up zero), so that its tools load the files (tests/train/test_lora.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens.formats.files import write_atomic
from lens.formats.lora import CONFIG, WEIGHTS, modules_of

from .keys import keyed
from .ranks import place

ATTENTION = ("attn.img_qkv", "attn.txt_qkv", "attn.to_out.0", "attn.to_add_out")
MLP = tuple(f"{stream}_mlp.{part}" for stream in ("img", "txt") for part in ("w1", "w2", "w3"))
NO_BASE = "--lora: expected --init CHECKPOINT beside it, the released layout's folder whose weights stay frozen"
COMFYUI = "lora_comfyui.safetensors"
NO_LORA = "none"  # the name of no adapter
TARGETS = {"attention": ATTENTION, "all": ATTENTION + MLP}


@dataclass(frozen=True)
class Lora:
    """What `--lora` says. `targets`: a name of TARGETS."""

    r: int
    alpha: float
    targets: str = "attention"

    def __str__(self) -> str:
        return f"r={self.r},alpha={self.alpha:g},targets={self.targets}"


def parse_lora(text: str) -> Lora:
    """ "r=64", "r=64,alpha=128,targets=all" -> Lora; alpha is 2 r unless given. Errors: ValueError naming the text."""
    how = f"--lora: {text!r}, expected for example r=64,alpha=128,targets={'|'.join(TARGETS)}"
    pairs = [part.partition("=") for part in text.split(",")]
    values = {name.strip(): value.strip() for name, _, value in pairs}
    if len(values) < len(pairs) or "r" not in values or set(values) - {"r", "alpha", "targets"}:
        raise ValueError(how)
    try:
        r = int(values["r"])
        found = Lora(r, float(values.get("alpha", 2 * r)), values.get("targets", "attention"))
    except ValueError:
        raise ValueError(how) from None
    if r < 1 or not 0 < found.alpha < float("inf") or found.targets not in TARGETS:
        raise ValueError(how)
    return found


def lora_of(recipe: ModuleType) -> Lora | None:
    """The LoRA that a recipe's LORA says, if any."""
    return parse_lora(recipe.LORA) if hasattr(recipe, "LORA") else None


def lora_of_training(state: dict[str, Any] | None, text: str | None) -> Lora | None:
    """The LoRA of a training: that of its state, or of `--lora`. Errors: ValueError where they differ."""
    asked = parse_lora(text) if text else None
    if state is None:
        return asked
    held = state["settings"].get("LORA")
    if asked and held != str(asked):
        raise ValueError(f"--lora {asked}: this training has {held or 'none'}")
    return parse_lora(held) if held else None


class LoraLinear(nn.Module):
    """A linear layer, frozen by `attach_lora`, and the adapters, float32, of the released modules its rows are made of.

    One adapter trains; `keep_lora` puts frozen copies beside it, by name. Which is in force is an argument of the call.
    summed: rows are multiplied with W + alpha / r * up down, summed once a call, in place of two more GEMMs: faster where
    weights are small beside rows. Under float32 alone, since bfloat16 would round a small adapter away.
    """

    def __init__(self, base: nn.Linear, modules: list[str], lora: Lora, summed: bool = False):
        super().__init__()
        self.summed = summed
        self.base, self.modules_adapted, self.factor = base, modules, lora.alpha / lora.r
        trained, device = base.weight.requires_grad, base.weight.device

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns, device=device), requires_grad=trained)

        self.down = nn.ParameterList(matrix(lora.r, base.in_features) for _ in modules)
        self.up = nn.ParameterList(matrix(base.out_features // len(modules), lora.r) for _ in modules)
        self.kept = nn.ModuleDict()  # name -> ModuleDict of down and up

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        """adapter: None, the one that trains; NO_LORA, no adapter at all; else a name that `keep_lora` was given."""
        if adapter == NO_LORA or self.summed:
            return F.linear(x, self.sum_of(adapter), self.base.bias)
        downs, ups = self.sides(adapter)
        parts = [F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) for down, up in zip(downs, ups)]
        return self.base(x) + self.factor * (parts[0] if len(parts) == 1 else torch.cat(parts, -1))

    def bound(self, adapter: str | None) -> Callable[[Tensor], Tensor]:
        """The layer under an adapter, for the parts of one call: what is summed is summed once."""
        if self.summed:
            return partial(F.linear, weight=self.sum_of(adapter), bias=self.base.bias)
        return self if adapter is None else partial(self, adapter=adapter)

    def sum_of(self, adapter: str | None) -> Tensor:
        """W + alpha / r * up down of an adapter in W's dtype; differentiable."""
        weight = self.base.weight
        if adapter == NO_LORA:
            return weight
        downs, ups = self.sides(adapter)
        parts = [torch.addmm(w, up, down, alpha=self.factor) for w, up, down in zip(weight.chunk(len(ups)), ups, downs)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def sides(self, adapter: str | None) -> tuple[nn.ParameterList, nn.ParameterList]:
        """Down and up of the adapter that trains, or of a kept one."""
        if adapter is None:
            return self.down, self.up
        kept = self.kept[adapter]
        assert isinstance(kept, nn.ModuleDict)
        down, up = kept["down"], kept["up"]
        assert isinstance(down, nn.ParameterList)
        assert isinstance(up, nn.ParameterList)
        return down, up

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with, for ops that do not call it: the sum in float32, rounded once."""
        change = torch.cat([up.float() @ down.float() for down, up in zip(self.down, self.up)])
        return (self.base.weight.float() + self.factor * change).to(self.base.weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def attach_lora(model: nn.Module, lora: Lora, frozen: torch.dtype | None = None, summed: bool = False) -> None:
    """Freeze the model and put adapters, not yet drawn, around the layers of `lora.targets`. They train where the layer did.

    frozen: what the frozen weights are kept in, which is what they are used in: nothing is added to them that rounding
    could lose. None leaves them as they are. A model on the meta device stays there. summed: see `LoraLinear`. Errors:
    ValueError for summed adapters of rounded weights.
    """
    if summed and frozen not in (None, torch.float32):
        raise ValueError(f"attach_lora: summed adapters of weights in {frozen}, expected float32")
    found: dict[str, list[str]] = {}
    for module, (name, _, _) in modules_of(model).items():
        if module.partition("transformer_blocks.")[2].partition(".")[2] in TARGETS[lora.targets]:
            found.setdefault(name.removesuffix(".weight"), []).append(module)
    wrapped = {}
    for name, modules in found.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear), name
        wrapped[name] = LoraLinear(layer, modules, lora, summed)
    model.requires_grad_(False).to(frozen)
    for name, adapted in wrapped.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapted)


@torch.no_grad()
def keep_lora(model: nn.Module, name: str) -> None:
    """A frozen copy of the adapter as it is now, to be called by ``name``; one of that name is written over."""
    for _, layer in lora_layers(model):
        if name not in layer.kept:
            sides = {"down": layer.down, "up": layer.up}
            layer.kept[name] = nn.ModuleDict(
                {side: nn.ParameterList(nn.Parameter(p.clone(), False) for p in own) for side, own in sides.items()}
            )
        for copy, own in zip(layer.sides(name), (layer.down, layer.up)):
            for target, source in zip(copy, own):
                target.copy_(source)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Our name and layer of everything `attach_lora` wrapped."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@torch.no_grad()
def init_lora(model: nn.Module, seed: int) -> None:
    """Draw what `attach_lora` put there, sharded or not: down of deviation 1 / r, up zero, so that nothing changes at first."""
    for _, layer in lora_layers(model):
        for module, down, up in zip(layer.modules_adapted, layer.down, layer.up):
            # each from a key of its own: the start does not depend on what else is adapted
            place(down, torch.randn(down.shape, generator=keyed(seed, f"lora {module}")) / len(down))
            place(up, torch.zeros(up.shape))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Every adapter into its layer; what `attach_lora` wrapped is a plain linear layer again."""
    for name, layer in list(lora_layers(model)):
        layer.base.weight.copy_(layer.weight)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)


@torch.no_grad()
def round_lora(model: nn.Module, dtype: torch.dtype) -> None:
    """The adapter that trains, rounded to what it is saved as, so that merged weights are made of the same numbers."""
    for _, layer in lora_layers(model):
        for p in (*layer.down, *layer.up):
            p.copy_(p.to(dtype))


def save_lora(
    model: nn.Module, lora: Lora, folder: Path, dtype: torch.dtype = torch.float32, base: str | None = None
) -> None:
    """The adapters as a peft folder: adapter_model.safetensors and adapter_config.json; beside them the same
    numbers as one file in ComfyUI's names, lora_down, lora_up and alpha, which finds nothing under peft's.

    base: the model that is adapted, an embedded one's name or a folder; `LensPipeline.from_pretrained(folder)` then is that
    model with the adapter.
    """
    matrices = {
        module: (down, up)
        for _, layer in lora_layers(model)
        for module, down, up in zip(layer.modules_adapted, layer.down, layer.up)
    }
    write_lora(matrices, lora, folder, dtype, base)


def write_lora(
    matrices: Mapping[str, tuple[Tensor, Tensor]], lora: Lora, folder: Path, dtype: torch.dtype, base: str | None
) -> None:
    """`save_lora` of module -> (down [r, in], up [out, r])."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    comfyui: dict[str, Tensor] = {}
    for module, (down, up) in matrices.items():
        for side, way, value in (("A", "down", down), ("B", "up", up)):
            kept = value.detach().to("cpu", dtype).contiguous()
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = kept
            comfyui[f"diffusion_model.{module}.lora_{way}.weight"] = kept
        comfyui[f"diffusion_model.{module}.alpha"] = torch.tensor(float(lora.alpha))
    write_atomic(folder / COMFYUI, lambda temporary: save_file(comfyui, temporary, {"format": "pt"}))
    write_atomic(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": "gaussian",
        "target_modules": list(TARGETS[lora.targets]),
    }
    text = json.dumps(config, indent=2) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(folder / CONFIG, write)
