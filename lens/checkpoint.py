"""Every file layout <-> our names. The one place that knows foreign keys; loading is strict and names what is wrong.

A checkpoint is a folder in the released layout: model_index.json, transformer/, text_encoder/, tokenizer/, vae/,
scheduler/. Our own metadata, where present, is the "lens" entry of model_index.json.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import VARIANTS, Defaults, LensConfig
from .model import LensTransformer2DModel
from .sampler import Scheduler

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
_SHARD_BYTES = 15_000_000
_MIB = 1 << 20
_SHARD_NAME = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the key, what was expected and what came."""


# ------------------------------------------------------------------------------------------------ names

_TOP = {
    "image_in": "img_in",
    "text_in": "txt_in",
    "time_embedding": "time_text_embed.timestep_embedder",
    "final_modulation": "norm_out.linear",
    "image_out": "proj_out",
}
_STREAM = {
    "image": {
        "modulation": "img_mod.1", "norm1": "img_norm1.weight", "norm2": "img_norm2.weight", "qkv": "attn.img_qkv",
        "q_norm": "attn.norm_q.weight", "k_norm": "attn.norm_k.weight", "out": "attn.to_out.0", "mlp": "img_mlp",
    },
    "text": {
        "modulation": "txt_mod.1", "norm1": "txt_norm1.weight", "norm2": "txt_norm2.weight", "qkv": "attn.txt_qkv",
        "q_norm": "attn.norm_added_q.weight", "k_norm": "attn.norm_added_k.weight", "out": "attn.to_add_out",
        "mlp": "txt_mlp",
    },
}  # fmt: skip


def released_names(name: str) -> list[str]:
    """Our parameter name -> the released keys it is made of, stacked along the rows in this order."""
    if match := re.fullmatch(r"text_norms\.(\d+)", name):
        return [f"txt_norm.{match[1]}.weight"]
    if match := re.fullmatch(r"blocks\.(\d+)\.(image|text)\.(\w+)(\.weight|\.bias)?", name):
        index, stream, part, leaf = match[1], _STREAM[match[2]], match[3], match[4] or ""
        prefix = f"transformer_blocks.{index}."
        if part == "w13":
            return [f"{prefix}{stream['mlp']}.w1.weight", f"{prefix}{stream['mlp']}.w3.weight"]
        if part == "w2":
            return [f"{prefix}{stream['mlp']}.w2.weight"]
        return [f"{prefix}{stream[part]}{leaf}"]
    top, _, rest = name.partition(".")
    return [f"{_TOP[top]}.{rest}"]


# ------------------------------------------------------------------------------------------------ configurations

# Switches of the released transformer that select the only architecture Lens ever shipped.
_FIXED = {"gate_mlp": True, "rms_norm": True, "multi_layer_encoder_feature": True}
# Switches of the released scheduler that would change a picture and that Lens does not have.
_REFUSED = ("use_karras_sigmas", "use_beta_sigmas", "use_exponential_sigmas", "invert_sigmas", "shift_terminal")
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def transformer_config(values: dict[str, Any], source: str = "config.json") -> LensConfig:
    """A released ``transformer/config.json``; unknown keys, another architecture, wrong sums raise, naming ``source``."""
    name = values.get("_class_name", "LensTransformer2DModel")
    if name != "LensTransformer2DModel":
        raise CheckpointError(f"{source}: _class_name must be LensTransformer2DModel, got {name!r}")
    known = {f.name for f in fields(LensConfig)}
    ours: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("_") or key == "inner_dim":
            continue
        if key in _FIXED:
            if value != _FIXED[key]:
                raise CheckpointError(
                    f"{source}: {key} must be {_FIXED[key]}, got {value!r}: this is another architecture than Lens"
                )
        elif key in known:
            ours[key] = tuple(value) if isinstance(value, list) else value
        else:
            raise CheckpointError(
                f"{source}: unknown key {key!r}; expected {sorted(known | set(_FIXED) | {'inner_dim'})}"
            )
    for key in ("num_layers", "num_attention_heads", "attention_head_dim"):
        if key not in ours:
            raise CheckpointError(f"{source}: key {key!r} is missing: this is not a Lens transformer configuration")
    try:
        config = LensConfig(**ours)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from None
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
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise CheckpointError(f"{source}: shift must be a positive number, got {shift!r}")
    return Scheduler(
        use_dynamic_shifting=bool(values.get("use_dynamic_shifting", False)),
        shift=float(shift),
        stochastic_sampling=bool(values.get("stochastic_sampling", False)),
    )


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


# ------------------------------------------------------------------------------------------------ files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


class Shard:
    """One memory-mapped safetensors file. Pages are given back after each tensor: mapping costs no resident memory."""

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(8)
                length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
                if not 2 <= length <= size - 8:
                    raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes)")
                self.header_bytes = head + file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        try:
            header = json.loads(self.header_bytes[8:])
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.entries: dict[str, tuple[str, list[int], int, int]] = {
                key: (
                    str(e["dtype"]),
                    [int(n) for n in e["shape"]],
                    int(e["data_offsets"][0]),
                    int(e["data_offsets"][1]),
                )
                for key, e in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{path}: broken safetensors header: {error!r}") from None
        self._start = 8 + length
        for key, (_, shape, begin, end) in self.entries.items():
            if not 0 <= begin <= end or any(n < 0 for n in shape):
                raise CheckpointError(f"{path}: {key} has the impossible shape {shape} at bytes {begin} to {end}")
            if self._start + end > size:
                raise CheckpointError(f"{path}: truncated: {key} ends at byte {self._start + end}, the file has {size}")
        self._map: mmap.mmap | None = None

    def read(self, key: str, into: Callable[[Tensor], None]) -> None:
        """Hand the tensor ``key``, a view of the mapping, to ``into``, which must copy; then drop its pages."""
        dtype, shape, begin, end = self.entries[key]
        torch_dtype = _DTYPES.get(dtype) or _INTEGERS.get(dtype)
        if torch_dtype is None:
            raise CheckpointError(f"{self.path}: {key} has dtype {dtype}, expected one of {sorted(_DTYPES)}")
        count = math.prod(shape)
        if count * torch_dtype.itemsize != end - begin:
            raise CheckpointError(
                f"{self.path}: {key} of shape {shape} and dtype {dtype} cannot fill {end - begin} bytes"
            )
        if count == 0:
            return into(torch.empty(shape, dtype=torch_dtype))
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        into(torch.frombuffer(self._map, dtype=torch_dtype, count=count, offset=self._start + begin).view(shape))
        page = mmap.PAGESIZE
        first = (self._start + begin) // page * page
        self._map.madvise(mmap.MADV_DONTNEED, first, self._start + end - first)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and Path(name).name == name


def open_shards(folder: Path) -> dict[str, Shard]:
    """key -> shard for every tensor of a folder (one file, or shards behind an index). Checks index against headers."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: folder not found")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    weight_map: dict[str, str] = {}
    if indices:
        weight_map = read_json(indices[0]).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(_is_file_name(n) for n in weight_map.values()):
            raise CheckpointError(f"{indices[0]}: expected a 'weight_map' object of keys and file names")
    names = sorted(set(weight_map.values())) if indices else sorted(p.name for p in folder.glob("*.safetensors"))
    if not indices:  # shards count only through an index; beside a whole file they are the rest of an older save
        whole = [name for name in names if not _SHARD_NAME.fullmatch(name)]
        if names and not whole:
            raise CheckpointError(
                f"{folder / names[0]}: a shard without its index, expected a *.safetensors.index.json"
            )
        names = whole
    if not names:
        raise CheckpointError(f"{indices[0] if indices else folder}: no .safetensors file")
    keys: dict[str, Shard] = {}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: shard named by {indices[0].name} not found")
        shard = Shard(folder / name)
        for key in shard.entries:
            if key in keys:
                raise CheckpointError(f"{shard.path}: {key} is also in {keys[key].path.name}")
            keys[key] = shard
    for key, name in weight_map.items():
        if key not in keys or keys[key].path.name != name:
            raise CheckpointError(f"{folder / name}: {key} is promised by {indices[0].name} but not in the file")
    return keys


def check_entries(
    folder: Path,
    shards: Mapping[str, Shard],
    expected: Mapping[str, tuple[list[int], Iterable[str]]],
    ignored: tuple[str, ...] = (),
) -> None:
    """The stored keys must be the ``expected`` ones (those with an ``ignored`` prefix aside), each key's shape exact
    and its dtype among the given; the headers tell, before the first byte of data is read."""
    files = sorted({s.path for s in shards.values()})
    missing = sorted(set(expected) - set(shards))
    if missing:
        raise CheckpointError(
            f"{files[0] if len(files) == 1 else folder}: {len(missing)} keys missing, first {missing[0]!r}, "
            f"expected with shape {expected[missing[0]][0]}"
        )
    extra = sorted(k for k in set(shards) - set(expected) if not k.startswith(ignored))
    if extra:
        raise CheckpointError(f"{shards[extra[0]].path}: {len(extra)} unexpected keys, first {extra[0]!r}")
    for key, (shape, dtypes) in expected.items():
        stored, got = shards[key].entries[key][:2]
        if got != shape:
            raise CheckpointError(f"{shards[key].path}: {key} must have shape {shape}, got {got}")
        if stored not in dtypes:
            raise CheckpointError(f"{shards[key].path}: {key} must have a dtype of {sorted(dtypes)}, got {stored}")


def load_parameters(
    module: nn.Module,
    folder: Path,
    names: Callable[[str], list[str]] = lambda name: [name],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ignored: tuple[str, ...] = (),
    unread: tuple[str, ...] = (),
    store: Callable[[nn.Module, str, Tensor, bool], None] | None = None,
) -> None:
    """Fill a module built on the meta device from ``folder``, strictly: every key once, every shape exact.

    ``names`` maps a name of the module to the stored keys it is made of, stacked along the rows. Keys with an
    ``ignored`` prefix may be in the files; names with an ``unread`` prefix are checked and stay on the meta device.
    ``store(module, name, value, is_parameter)`` keeps a value; by default as the module's own tensor.
    """
    shards = open_shards(folder)
    wanted: dict[str, Tensor] = dict(module.state_dict(keep_vars=True))
    expected = {key: name for name in wanted for key in names(name)}
    stored_as: dict[str, tuple[list[int], Iterable[str]]] = {}
    for key, name in expected.items():
        shape, pieces = list(wanted[name].shape), len(names(name))
        stored_as[key] = (
            [shape[0] // pieces, *shape[1:]] if pieces > 1 else shape,
            _DTYPES if wanted[name].is_floating_point() else _INTEGERS,
        )
    check_entries(folder, shards, stored_as, ignored)
    for name, target in wanted.items():
        if name.startswith(unread):
            continue
        sources = names(name)
        value = torch.empty(target.shape, dtype=dtype if target.is_floating_point() else target.dtype, device=device)
        rows = value.shape[0] // len(sources) if value.dim() else 0
        for i, key in enumerate(sources):
            piece = value[i * rows : (i + 1) * rows] if len(sources) > 1 else value
            shards[key].read(key, lambda stored, piece=piece: piece.copy_(stored))  # type: ignore[misc]
        (store or _assign)(module, name, value, isinstance(target, nn.Parameter))
    for shard in set(shards.values()):
        shard.close()


def _assign(module: nn.Module, name: str, value: Tensor, is_parameter: bool) -> None:
    *path, leaf = name.split(".")
    for part in path:
        module = getattr(module, part)
    if is_parameter:
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(leaf, value)


# ------------------------------------------------------------------------------------------------ parts


def placement(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Where to load to, and as what: None means cuda and bfloat16 where usable, else cpu and float32."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    if dtype is None:
        dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"dtype must be torch.float32 or torch.bfloat16 (float16 overflows in this model), got {dtype}"
        )
    return chosen, dtype


def load_transformer(folder: Path, dtype: torch.dtype, device: torch.device | str) -> LensTransformer2DModel:
    """``transformer/`` of the released layout -> our model in eval mode."""
    path = folder / "config.json"
    parsed = transformer_config(read_json(path), str(path))
    if parsed.num_layers > max(1000, len(open_shards(folder))):  # seen before so many blocks are built
        raise CheckpointError(f"{path}: num_layers is {parsed.num_layers}, more than the keys stored in {folder}")
    with torch.device("meta"):
        model = LensTransformer2DModel(parsed)
    load_parameters(model, folder, released_names, dtype, device)
    return model.eval()


def load_vae(folder: Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """``vae/`` -> diffusers' AutoencoderKLFlux2 in eval mode."""
    from diffusers import AutoencoderKLFlux2

    path = folder / "config.json"
    config = read_json(path)
    if config.get("_class_name") != "AutoencoderKLFlux2":
        raise CheckpointError(f"{path}: _class_name must be AutoencoderKLFlux2, got {config.get('_class_name')!r}")
    try:
        with torch.device("meta"):
            vae = AutoencoderKLFlux2.from_config(config)
    except Exception as error:  # whatever diffusers trips over in a configuration
        raise CheckpointError(f"{path}: not a configuration of AutoencoderKLFlux2: {error}") from error
    load_parameters(vae, folder, dtype=dtype, device=device)
    return vae.eval()


def packed_experts(folder: Path) -> bool:
    """Whether a text encoder's experts are stored in MXFP4: on a GPU their kernels keep them where they were loaded."""
    return read_json(folder / "config.json").get("quantization_config") is not None


def load_text_encoder(
    folder: Path, dtype: torch.dtype, device: torch.device | str, depth: int | None = None
) -> nn.Module:
    """``text_encoder/`` -> transformers' GptOssModel (no LM head) in eval mode; MXFP4 experts through transformers.

    ``depth``: decoder layers to keep; what comes after the last selected one is never read.

    The released config names a class, LensGptOssEncoder, that no library has; model_type gpt_oss is what counts.
    """
    from transformers import GptOssConfig, GptOssModel

    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "gpt_oss":
        raise CheckpointError(f"{path}: model_type must be gpt_oss, got {config.get('model_type')!r}")
    quantization = config.get("quantization_config")
    if quantization is not None and (not isinstance(quantization, dict) or quantization.get("quant_method") != "mxfp4"):
        raise CheckpointError(
            f"{path}: quantization_config must be absent or of quant_method mxfp4, got {quantization!r}"
        )
    shards = open_shards(folder)
    try:
        parsed = GptOssConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = GptOssModel(parsed)
    except Exception as error:  # whatever transformers trips over in a configuration
        raise CheckpointError(f"{path}: not a configuration of GPT-OSS: {error!r}") from error
    if depth is not None and depth > len(model.layers):
        raise CheckpointError(
            f"{path}: num_hidden_layers must be at least {depth}, because the transformer's selected_layer_index "
            f"names layer {depth - 1}, got {len(model.layers)}"
        )
    prefix = "model." if any(key.startswith("model.") for key in shards) else ""
    if quantization is not None:
        check_entries(folder, shards, _mxfp4_entries(model, prefix), ("lm_head.",))
        model = _load_mxfp4(folder, parsed, dtype, device)
    else:
        unread = tuple(f"layers.{n}." for n in range(len(model.layers) if depth is None else depth, len(model.layers)))
        load_parameters(model, folder, lambda name: [prefix + name], dtype, device, ("lm_head.",), unread)
        model.rotary_emb = type(model.rotary_emb)(parsed).to(device)  # its tables are computed, not stored
    if depth is not None:
        del model.layers[depth:]
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if left:
        raise CheckpointError(f"{folder}: {left[0]!r} is neither stored nor computed by this version of transformers")
    return model.eval()


def _mxfp4_entries(model: nn.Module, prefix: str) -> dict[str, tuple[list[int], Iterable[str]]]:
    """Stored keys of a GPT-OSS model whose experts are MXFP4: 32 inputs share a scale, a byte of a block holds two."""
    entries: dict[str, tuple[list[int], Iterable[str]]] = {}
    for name, value in model.state_dict().items():
        shape = list(value.shape)
        if ".experts." in name and not name.endswith("_bias"):
            experts, inputs, outputs = shape
            entries[f"{prefix}{name}_blocks"] = [experts, outputs, inputs // 32, 16], ("U8",)
            entries[f"{prefix}{name}_scales"] = [experts, outputs, inputs // 32], ("U8",)
        else:
            entries[prefix + name] = shape, _DTYPES
    return entries


def _load_mxfp4(folder: Path, config: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """GPT-OSS with MXFP4 experts (``*_blocks``, ``*_scales``), by transformers: dequantised on a CPU."""
    from transformers import GptOssModel, Mxfp4Config

    on_cpu = torch.device(device).type == "cpu"
    kwargs = {"quantization_config": Mxfp4Config(dequantize=True)} if on_cpu else {"device_map": {"": str(device)}}
    try:
        with _quiet_transformers():  # it reports the LM head we leave out; keys and shapes are already checked
            return GptOssModel.from_pretrained(folder, config=config, dtype=dtype, **kwargs)
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot load this GPT-OSS checkpoint: {error}") from error


def load_scheduler(folder: Path) -> Scheduler:
    """``scheduler/scheduler_config.json``."""
    path = folder / "scheduler_config.json"
    return scheduler_config(read_json(path), str(path))


def check_fit(root: Path, config: LensConfig, encoder_width: int, token_channels: int) -> None:
    """The transformer must fit the encoder it reads and the VAE it writes for."""
    path = root / "transformer" / "config.json"
    for key, expected in (("enc_hidden_dim", encoder_width), ("in_channels", token_channels)):
        if getattr(config, key) != expected:
            part = "text encoder's hidden_size" if key == "enc_hidden_dim" else "VAE's 4 * latent_channels"
            raise CheckpointError(f"{path}: {key} must be the {part} = {expected}, got {getattr(config, key)}")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_index(root: Path) -> dict[str, Any]:
    """``model_index.json`` of a Lens checkpoint, or CheckpointError saying what the folder is instead."""
    path = root / "model_index.json"
    if not root.is_dir():
        raise CheckpointError(f"{root}: folder not found")
    index = read_json(path)
    if index.get("_class_name") != "LensPipeline":
        raise CheckpointError(
            f"{path}: _class_name must be LensPipeline, got {index.get('_class_name')!r}: another model"
        )
    for part in ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"):
        if not (root / part).is_dir():
            raise CheckpointError(f"{root / part}: folder not found, expected the released layout")
    return index


def read_defaults(root: Path, variant: str | None, name: str) -> Defaults:
    """What a call uses where the caller says nothing, from ``model_index.json``, the caller's variant or the name."""
    index, path = read_index(root), root / "model_index.json"
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant must be one of {sorted(VARIANTS)} or None, got {variant!r}")
    try:
        return Defaults.choose(variant, index.get("lens"), name, str(path))
    except ValueError as error:  # names the file
        raise CheckpointError(str(error)) from None


EMBEDDED = {"mini": "base", "mini-base": "base", "mini-rl": "rl", "mini-turbo": "turbo"}


def resolve(source: str | os.PathLike[str]) -> Path:
    """ "mini..." -> the embedded weights; an existing folder -> itself; else a hub id, fetched by huggingface_hub."""
    name = os.fspath(source)
    if name in EMBEDDED:
        folder = Path(__file__).parent / "mini" / EMBEDDED[name]
        if not (folder / "model_index.json").is_file():
            shipped = [n for n, f in EMBEDDED.items() if (folder.parent / f / "model_index.json").is_file()]
            raise CheckpointError(f"{name!r} is not part of this version of Lens; embedded models: {shipped}")
        return folder
    if name and Path(name).is_dir():
        return Path(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name))
        except Exception as error:
            raise CheckpointError(
                f"{name!r} is neither a folder here nor a hub id that can be fetched: {error}"
            ) from error
    raise CheckpointError(f"{name!r}: expected one of {sorted(EMBEDDED)}, a folder in the released layout or a hub id")


def spoken_name(source: str | os.PathLike[str]) -> str:
    """The name a source speaks of its variant by: the hub id, or the folder's (of a hub cache: the repository's)."""
    path = Path(os.fspath(source))
    if not path.is_dir():
        return str(source)
    path = path.resolve()
    return path.parent.parent.name if path.parent.name == "snapshots" else path.name


def fingerprint(root: Path) -> str:
    """SHA-256 over each safetensors file's name, size, header, first and last MiB, in sorted order: cheap, telling."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.safetensors"), key=lambda p: p.relative_to(root).as_posix()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()}\0{size}\0".encode())
        digest.update(Shard(path).header_bytes)
        with path.open("rb") as file:
            digest.update(file.read(_MIB))
            file.seek(max(0, size - _MIB))
            digest.update(file.read(_MIB))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ saving


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """``write(temporary)``, flush to disk, rename to ``path``: a killed or failed save leaves the old file."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # renamed over, /dev/null would be a file from then on
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:  # part of the name only: one as long as the disk allows must still fit
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:20]}.", suffix=".part")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.close(handle)
    try:
        write(Path(temporary))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # name the file, not the temporary
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def released_tensors(model: LensTransformer2DModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(released key, tensor) of every parameter, the inverse of loading."""
    for name, value in model.state_dict().items():
        if value.is_meta:
            raise ValueError(f"lens.checkpoint: {name} was dropped by lens.modulation.evict and cannot be saved")
        keys = released_names(name)
        for key, piece in zip(keys, value.chunk(len(keys)) if len(keys) > 1 else [value]):
            yield key, piece.detach().to("cpu", dtype).contiguous()


def save_tensors(folder: Path, stem: str, tensors: Mapping[str, Tensor], shard_bytes: int = _SHARD_BYTES) -> None:
    """Write ``stem.safetensors``, or shards of at most ``shard_bytes`` with an index, in key order.

    A save over an older one is whole at every moment: new files take names of their own, one rename switches from all
    old to all new, and only then the old files go.
    """
    from safetensors.torch import save_file

    def write(path: Path, shard: dict[str, Tensor]) -> None:
        write_atomic(path, lambda temporary: save_file(shard, temporary, {"format": "pt"}))

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key in sorted(tensors):
        n = tensors[key].numel() * tensors[key].element_size()
        if size + n > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][key] = tensors[key]
        size += n
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    old = {p for p in folder.glob(f"{stem}-*.safetensors") if _SHARD_NAME.fullmatch(p.name)}
    if len(shards) == 1:
        write(single, shards[0])
        index.unlink(missing_ok=True)  # until here the index, and with it the old shards, had precedence
    else:
        count = len(shards)
        for generation in itertools.count():
            stamp = f"{stem}-r{generation}" if generation else stem
            names = [f"{stamp}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
            if not any((folder / name).exists() for name in names):
                break
        for name, shard in zip(names, shards):
            write(folder / name, shard)
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        write_json(index, {"metadata": {}, "weight_map": weight_map})
        single.unlink(missing_ok=True)
    for path in old:
        path.unlink()


def save_transformer(model: LensTransformer2DModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``transformer/`` in the released layout."""
    save_tensors(folder, "diffusion_pytorch_model", dict(released_tensors(model, dtype)))
    write_json(folder / "config.json", released_config(model.config))


def save_text_encoder(model: nn.Module, folder: Path) -> None:
    """Write ``text_encoder/`` of a GPT-OSS model of transformers: configuration and bfloat16 weights."""
    tensors = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_tensors(folder, "model", tensors)
    config: Any = model.config
    values = json.loads(config.to_json_string(use_diff=False))
    values.update(architectures=["GptOssForCausalLM"], dtype="bfloat16", torch_dtype="bfloat16")
    for key in ("_name_or_path", "transformers_version"):
        values.pop(key, None)
    write_json(folder / "config.json", dict(sorted(values.items())))


def save_vae(vae: nn.Module, folder: Path) -> None:
    """Write ``vae/`` of a diffusers AutoencoderKLFlux2: bfloat16 weights, statistics float32 for they scale all latents."""
    tensors = {
        name: value.cpu().contiguous() if name.startswith("bn.") else value.to("cpu", torch.bfloat16).contiguous()
        for name, value in vae.state_dict().items()
    }
    save_tensors(folder, "diffusion_pytorch_model", tensors)
    config: Any = vae.config
    values = {k: v for k, v in dict(config).items() if k not in ("_name_or_path", "_use_default_values")}
    write_json(folder / "config.json", dict(sorted({"_class_name": "AutoencoderKLFlux2", **values}.items())))
