"""Names inside LoRA files -> the model's own: diffusers', peft's, ComfyUI's, kohya's flat ones, wrapped or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lens.config import LensConfig
from lens.formats.names import released_names

# What trainers, wrappers and hosts put before a module's name, dotted or flat.
_WRAPPERS = frozenset((
    "base_model", "diffusion_model", "dit", "lora_transformer", "lora_unet", "lycoris", "model", "module", "net", "pipe",
    "transformer", "unet",
))  # fmt: skip
_FLAT_WRAPPERS = frozenset(
    ("base", "diffusion", "dit", "lora", "lycoris", "model", "module", "net", "transformer", "unet")
)
_TRANSPARENT = ("_orig_mod", "base_layer", "_fsdp_wrapped_module")  # torch.compile, peft, FSDP: anywhere in a name
_TEXT_ENCODERS = (
    "cond_stage_model",
    "te",
    "te1",
    "te2",
    "te3",
    "text_encoder",
    "text_encoder_2",
    "text_encoders",
    "text_model",
)
_FLAT_TEXT_ENCODERS = (
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lycoris_te_",
    "te_",
    "te1_",
    "te2_",
    "text_encoder_",
)
_SPLIT = {
    "attn.img_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.txt_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
# What the name of a tensor ends with, after the module's: matrices of every kind of adapter.
LEAVES = frozenset((
    "alpha", "b_norm", "diff", "diff_b", "dora_scale", "hada_t1", "hada_t2", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
    "lokr_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lora_A", "lora_B", "lora_down",
    "lora_magnitude_vector", "lora_mid", "lora_up", "set_weight", "w_norm",
))  # fmt: skip
_SAME = {
    "lora_down": "lora_A",
    "lora_up": "lora_B",
    "lora_magnitude_vector": "dora_scale",
    "w_norm": "diff",
    "b_norm": "diff_b",
}


@dataclass(frozen=True)
class Target:
    """Where a released name lies in our model: rows first to last of the parameter ``weight``."""

    weight: str
    first: int
    last: int


def targets_of(model: nn.Module) -> dict[str, Target]:
    """Released name -> rows of our parameters, of everything that an adapter may change: modules by their name, biases as
    MODULE.bias, and the three thirds of a stacked q, k, v by diffusers' names, too."""
    found: dict[str, Target] = {}
    for name, parameter in model.named_parameters():
        keys = released_names(name)
        rows = parameter.shape[0] // len(keys)
        for i, key in enumerate(keys):
            module = key.removesuffix(".weight")
            found[module] = Target(name, i * rows, (i + 1) * rows)
            plain = module.removesuffix(".bias")
            for whole, parts in _SPLIT.items():
                if plain.endswith(whole):
                    for k, part in enumerate(parts):
                        alias = plain.removesuffix(whole) + part + module.removeprefix(plain)
                        found[alias] = Target(name, k * rows // 3, (k + 1) * rows // 3)
    return found


def released_targets() -> Iterable[str]:
    """The names of the released Lens, of which those of a smaller one are a part."""
    from lens.model import LensTransformer2DModel

    with torch.device("meta"):
        return targets_of(LensTransformer2DModel(LensConfig()))


class Names:
    """Resolves names of files against those of a model."""

    def __init__(self, targets: Iterable[str]):
        self.targets = frozenset(targets)
        self._flat = {name.replace(".", "_"): name for name in self.targets}
        self._flat |= {f.removesuffix("_0"): n for f, n in self._flat.items() if n.endswith(".to_out.0")}

    def split(self, key: str) -> tuple[str, str, str] | None:
        """A tensor's name -> (module as the file has it, leaf, rest): "x.lora_A.default.weight" -> ("x", "lora_A", "default").
        None for one that belongs to no adapter. Leaves of one meaning become one."""
        words = key.split(".")
        for i in range(len(words) - 1, 0, -1):
            leaf, after = words[i], words[i + 1 :]
            if leaf == "lora" and after[:1] in (["down"], ["up"]):
                leaf, after = f"lora_{after[0]}", after[1:]
            if leaf in LEAVES and len(after) <= 2:
                rest = after[:-1] if after[-1:] == ["weight"] else after
                return ".".join(words[:i]), _SAME.get(leaf, leaf), ".".join(rest)
        return None

    def of_text_encoder(self, module: str) -> bool:
        words = [w for w in module.split(".") if w not in ("base_model", "model")]
        return bool(words) and (words[0] in _TEXT_ENCODERS or module.startswith(_FLAT_TEXT_ENCODERS))

    def resolve(self, module: str) -> str | None:
        """The model's name of a file's module; None for one that the model does not have."""
        words = [word for word in module.split(".") if word not in _TRANSPARENT]
        for i in range(len(words)):
            if (name := ".".join(words[i:])) in self.targets:
                return name
            if i == len(words) - 1:
                return self._resolve_flat(words[i])
            if words[i] not in _WRAPPERS:
                return None
        return None

    def _resolve_flat(self, word: str) -> str | None:
        parts = word.split("_")
        for i in range(len(parts)):
            if (name := self._flat.get("_".join(parts[i:]))) is not None:
                return name
            if parts[i] not in _FLAT_WRAPPERS:
                return None
        return None
