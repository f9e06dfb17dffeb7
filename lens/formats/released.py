"""The released layout <-> LensTransformer2DModel: configurations, the transformer, the scheduler, the index of a folder.

A checkpoint is a folder in the released layout: transformer/, text_encoder/, tokenizer/, vae/, and where they were kept
scheduler/ and model_index.json; or its parts from several places (`parts.find`). Our own metadata, where present, is the
"lens" entry of model_index.json. Loading is strict and names what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens.arguments import shortened
from lens.config import Defaults, LensConfig, expect_variant
from lens.formats.contents import of_names
from lens.formats.files import CheckpointError, is_there, read_json, write_json
from lens.formats.names import released_names, without_prefix
from lens.formats.parts import Part
from lens.formats.safetensors import Stored, assign, load_parameters, open_shards, save_tensors
from lens.model import LensTransformer2DModel
from lens.sampler import Scheduler

STREAMS = ("image", "text")  # of a block, by the names of its attributes

# ------------------------------------------------------------------------------------------------ configurations

# Switches of the released transformer that select the only architecture Lens ever shipped.
_FIXED = {"gate_mlp": True, "rms_norm": True, "multi_layer_encoder_feature": True}
# Switches of the released scheduler that would change a picture and that Lens does not have.
_REFUSED = ("use_karras_sigmas", "use_beta_sigmas", "use_exponential_sigmas", "invert_sigmas", "shift_terminal")
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_STEEPEST = 1e6  # of the time shift: beyond it float32 has one sigma left
# No model comes near, and none larger can be built: width, depth, layers that are read.
_WIDEST, _DEEPEST, _MOST_LAYERS = 1 << 20, 1000, 64


def transformer_config(values: dict[str, Any], source: str = "config.json") -> LensConfig:
    """A released ``transformer/config.json``; unknown keys, another architecture, wrong sums raise, naming ``source``."""
    name = values.get("_class_name", "LensTransformer2DModel")
    if name != "LensTransformer2DModel":
        raise CheckpointError(f"{source}: _class_name must be LensTransformer2DModel, got {name!r}")
    known = {f.name for f in fields(LensConfig)}
    settings: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("_") or key == "inner_dim":
            continue
        if key in _FIXED:
            if value != _FIXED[key]:
                raise CheckpointError(
                    f"{source}: {key} must be {_FIXED[key]}, got {value!r}: this is another architecture than Lens"
                )
        elif key in known:
            settings[key] = tuple(value) if isinstance(value, list) else value
        else:
            raise CheckpointError(
                f"{source}: unknown key {key!r}; expected {sorted(known | set(_FIXED) | {'inner_dim'})}"
            )
    for key in ("num_layers", "num_attention_heads", "attention_head_dim"):
        if key not in settings:
            raise CheckpointError(f"{source}: key {key!r} is missing: this is not a Lens transformer configuration")
    for key, value in settings.items():
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, int) and number > _WIDEST:
                raise CheckpointError(f"{source}: {key} must be at most {_WIDEST}, got {str(number)[:40]}")
    try:
        config = LensConfig(**settings)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from None
    for key, size, most in (
        ("num_layers", config.num_layers, _DEEPEST),
        ("num_attention_heads * attention_head_dim", config.inner_dim, _WIDEST),
        ("the number of layers in selected_layer_index", len(config.selected_layer_index), _MOST_LAYERS),
    ):
        if size > most:
            raise CheckpointError(f"{source}: {key} must be at most {most}, got {size}")
    if values.get("inner_dim", config.inner_dim) != config.inner_dim:
        raise CheckpointError(
            f"{source}: inner_dim must be num_attention_heads * attention_head_dim = {config.inner_dim}, "
            f"got {values['inner_dim']}"
        )
    return config


def released_config(config: LensConfig) -> dict[str, Any]:
    """The inverse: ``transformer/config.json``, ready for json.dump."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    return {"_class_name": "LensTransformer2DModel", "inner_dim": config.inner_dim, **_FIXED, **values}


def scheduler_config(values: dict[str, Any], source: str = "scheduler_config.json") -> Scheduler:
    """A released ``scheduler_config.json``; what would change a picture and Lens does not have is refused."""
    name = values.get("_class_name", _SCHEDULER)
    if name != _SCHEDULER:
        raise CheckpointError(f"{source}: _class_name must be {_SCHEDULER}, got {name!r}")
    for key in _REFUSED:
        if values.get(key):
            raise CheckpointError(f"{source}: {key} is not supported, expected false or null, got {values[key]!r}")
    for key, only in (("time_shift_type", "exponential"), ("num_train_timesteps", 1000)):
        if values.get(key, only) != only:
            raise CheckpointError(f"{source}: {key} must be {only!r}, got {values[key]!r}")
    shift = values.get("shift", 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift <= _STEEPEST:
        raise CheckpointError(f"{source}: shift must be a positive number, got {shift!r}")
    switches = {key: values.get(key) or False for key in ("use_dynamic_shifting", "stochastic_sampling")}
    for key, value in switches.items():
        if not isinstance(value, bool):
            raise CheckpointError(f"{source}: {key} must be true or false, got {value!r}")
    return Scheduler(shift=float(shift), **switches)


def released_scheduler(scheduler: Scheduler) -> dict[str, Any]:
    """The inverse: ``scheduler_config.json``, ready for json.dump."""
    fixed = {"num_train_timesteps": 1000, "time_shift_type": "exponential"}
    return {"_class_name": _SCHEDULER, **fixed, **asdict(scheduler)}


def released_index(about: dict[str, Any]) -> dict[str, Any]:
    """``model_index.json`` of a checkpoint whose own metadata is ``about``."""
    return {
        "_class_name": "LensPipeline",
        "scheduler": ["diffusers", _SCHEDULER],
        "text_encoder": ["transformers", "GptOssForCausalLM"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["lens", "LensTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
        "lens": about,
    }


# ------------------------------------------------------------------------------------------------ parts


LARGE = (
    10**9
)  # weights of a transformer, from which on a CPU draws in bfloat16 and leaves the modulation's in the files


def placement(
    device: str | torch.device | None, dtype: torch.dtype | None, large: bool = False
) -> tuple[torch.device, torch.dtype]:
    """Where to load to, and as what: None means cuda and bfloat16 where usable, else cpu and float32, or bfloat16 for a
    ``large`` transformer: in float32 one of the released size would fill 16 GB."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    if dtype is None:
        dtype = torch.bfloat16 if chosen.type == "cuda" or large else torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"dtype must be torch.float32 or torch.bfloat16 (float16 overflows in this model), got {shortened(dtype)}"
        )
    return chosen, dtype


def transformer_tensors(source: Path | Part) -> dict[str, Stored]:
    """The tensors of a transformer by released name; with or without one of `names.PREFIXES`."""
    part = Part.of(source)
    return without_prefix(open_shards(part.weights, part.variant), "img_in.weight")


class StoredModulation:
    """(block, stream) -> its modulation's weight and bias, read anew each time: they serve a schedule's table alone."""

    def __init__(self, tensors: Mapping[str, Stored], dtype: torch.dtype, device: torch.device | str):
        self.tensors, self.dtype, self.device = tensors, dtype, device

    def __call__(self, block: int, stream: int) -> tuple[Tensor, Tensor]:
        weight, bias = (
            self._read(f"blocks.{block}.{STREAMS[stream]}.modulation.{leaf}") for leaf in ("weight", "bias")
        )
        return weight, bias

    def _read(self, name: str) -> Tensor:
        (key,) = released_names(name)
        stored = self.tensors[key]
        made = torch.empty(stored.shape, dtype=self.dtype, device=self.device)

        def keep(value: Tensor) -> None:
            made.copy_(value)

        stored.read(keep)
        stored.shard.close()
        return made


def recall_modulation(model: LensTransformer2DModel) -> None:
    """Read the modulation weights that stayed in the files, as where something is to change them."""
    stored = model.stored_modulation
    if stored is None:
        return
    for index, block in enumerate(model.layers()):
        for stream, part in enumerate(block.streams()):
            for name, value in zip(("weight", "bias"), stored(index, stream)):
                assign(part.modulation, name, value.to(model.device, model.dtype), True)
    model.stored_modulation = None


def load_transformer(
    source: Path | Part, dtype: torch.dtype, device: torch.device | str, modulation: bool = True
) -> LensTransformer2DModel:
    """``transformer/`` of the released layout, or a file, -> LensTransformer2DModel in eval mode.

    Without ``modulation`` the blocks' modulation weights, a third of the released model, are checked and stay in the
    files; a schedule's table reads them block by block.
    """
    part = Part.of(source)
    parsed, tensors = described_transformer(part)
    if parsed.num_layers > max(100, len(tensors)):  # seen before so many blocks are built
        raise CheckpointError(f"{part}: num_layers is {parsed.num_layers}, more than the keys stored in {part.weights}")
    with torch.device("meta"):
        model = LensTransformer2DModel(parsed)
    blocks = range(0 if modulation else parsed.num_layers)
    left = tuple(f"blocks.{i}.{stream}.modulation." for i in blocks for stream in STREAMS)
    load_parameters(model, tensors, released_names, dtype, device, unread=left)
    if not modulation:
        model.stored_modulation = StoredModulation(tensors, dtype, device)
    model.batch_invariant = model.device.type == "cpu"  # as one that was made there
    return model.eval()


def described_transformer(part: Part) -> tuple[LensConfig, dict[str, Stored]]:
    """A transformer's configuration, from its settings, else from its tensors; and the tensors."""
    settings = part.settings()
    if settings is not None:
        config = transformer_config(settings, str(part))
        return config, transformer_tensors(part)
    tensors = transformer_tensors(part)
    return config_of_tensors(tensors, part.weights), tensors


def config_of_tensors(tensors: Mapping[str, Stored], where: Path) -> LensConfig:
    """The configuration of a transformer without config.json: sizes by the tensors, all else as released."""

    def size(key: str, dimension: int = 0) -> int:
        if key not in tensors or len(tensors[key].shape) <= dimension:
            raise CheckpointError(f"{where}: no Lens transformer: {key} is missing; {of_names(_keys(tensors))}")
        return tensors[key].shape[dimension]

    width, head = size("img_in.weight"), size("transformer_blocks.0.attn.norm_q.weight")
    blocks = {match[1] for key in tensors if (match := re.match(r"transformer_blocks\.(\d+)\.", key))}
    norms = sum(1 for key in tensors if re.fullmatch(r"txt_norm\.\d+\.weight", key))
    released = LensConfig()
    if head != released.attention_head_dim or norms != len(released.selected_layer_index):
        raise CheckpointError(
            f"{where}: heads of {head} and {norms} text layers, expected {released.attention_head_dim} and "
            f"{len(released.selected_layer_index)} as released; another model needs its config.json beside the file"
        )
    values = {
        "num_layers": len(blocks),
        "num_attention_heads": width // head,
        "in_channels": size("img_in.weight", 1),
        "out_channels": size("img_in.weight", 1) // released.patch_size**2,
        "enc_hidden_dim": size("txt_norm.0.weight"),
    }
    return transformer_config({**released_config(released), "inner_dim": width, **values}, str(where))


def _keys(tensors: Mapping[str, Stored]) -> list[str]:
    return [stored.key for stored in tensors.values()]


def load_scheduler(path: Path | None) -> Scheduler:
    """``scheduler/``, or its scheduler_config.json; None: the released schedule."""
    if path is None:
        return Scheduler()
    path = path / "scheduler_config.json" if path.is_dir() else path
    return scheduler_config(read_json(path), str(path))


def check_fit(where: str, config: LensConfig, encoder_width: int, token_channels: int) -> None:
    """The transformer must fit the encoder it reads and the VAE it writes for; ``where``: the file of its configuration."""
    for key, expected in (("enc_hidden_dim", encoder_width), ("in_channels", token_channels)):
        if getattr(config, key) != expected:
            part = "text encoder's hidden_size" if key == "enc_hidden_dim" else "VAE's 4 * latent_channels"
            raise CheckpointError(f"{where}: {key} must be the {part} = {expected}, got {getattr(config, key)}")


def check_sampler(folder: Path | None, defaults: Defaults, scheduler: Scheduler) -> None:
    """A distilled student is drawn by the steps it was trained on."""
    student = defaults.distilled
    if student is not None and (student.sampler == "renoise") != scheduler.stochastic_sampling:
        path = (folder or Path("scheduler")) / "scheduler_config.json"
        expected = str(student.sampler == "renoise").lower()
        raise CheckpointError(
            f"{path}: stochastic_sampling must be {expected}, as the student was trained (lens.distilled.sampler is "
            f"{student.sampler!r} in model_index.json), got {str(scheduler.stochastic_sampling).lower()}"
        )


def read_index(root: Path) -> dict[str, Any]:
    """``model_index.json`` of a Lens checkpoint, {} where it was not kept, or CheckpointError saying what the folder is."""
    path = root / "model_index.json"
    if not root.is_dir():
        raise CheckpointError(f"{root}: folder not found")
    if not is_there(path):
        return {}
    index = read_json(path)
    if index.get("_class_name") != "LensPipeline":
        raise CheckpointError(
            f"{path}: _class_name must be LensPipeline, got {index.get('_class_name')!r}: another model"
        )
    return index


def read_defaults(root: Path | None, variant: str | None, name: str) -> Defaults:
    """What a call uses where the caller says nothing, from ``model_index.json``, the caller's variant or the name."""
    index = read_index(root) if root else {}
    expect_variant(variant)
    try:
        return Defaults.choose(variant, index.get("lens"), name, str(root / "model_index.json") if root else name)
    except ValueError as error:  # names the file
        raise CheckpointError(str(error)) from None


def released_tensors(model: LensTransformer2DModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(released key, tensor) of every parameter, the inverse of loading."""
    for name, value in model.state_dict().items():
        if value.is_meta:
            raise ValueError(
                f"lens.formats.released: {name} was dropped by lens.engine.schedule_table.evict and cannot be saved"
            )
        keys = released_names(name)
        for key, piece in zip(keys, value.chunk(len(keys)) if len(keys) > 1 else [value]):
            yield key, piece.detach().to("cpu", dtype).contiguous()


def save_transformer(model: LensTransformer2DModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``transformer/`` in the released layout."""
    save_tensors(folder, "diffusion_pytorch_model", dict(released_tensors(model, dtype)))
    write_json(folder / "config.json", released_config(model.config))
