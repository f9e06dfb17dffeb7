"""A checkpoint of the released size with random weights, in the released names, dtypes and shards, written in constant memory.

Scales are those of `weights.fill`: GEMMs of unit gain, norms around 1, gates around 0. MXFP4 experts are random bytes with
scales that give their matrices unit gain as well. Every piece of a tensor is drawn from a generator of its own, keyed by
the seed, the tensor's name and its place, so that a writer that was stopped goes on and two runs write the same bytes.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.config import VARIANTS, LensConfig
from lens.formats.files import is_there, read_json, write_json
from lens.formats.names import released_names
from lens.formats.released import released_config, released_index, released_scheduler
from lens.formats.safetensors import Streamed, stream_tensors
from lens.formats.vae import save_vae
from lens.model import LensTransformer2DModel
from lens.sampler import Scheduler

from .weights import GATE, TEXT_KEYS, fill

SHARD_BYTES = 4_000_000_000
SPARE_BYTES = 1 << 30  # of the disk that are left free
_PIECE = 1 << 22  # elements drawn at a time
_E2M1_RMS = math.sqrt((0 + 0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8)  # of its eight magnitudes, equally often
TOKENIZER = Path(__file__).parents[2] / "lens" / "mini" / "base" / "tokenizer"
MARK = "full_size.json"


@dataclass(frozen=True)
class EncoderSize:
    """GPT-OSS-20B; 32 inputs share a scale, so widths are multiples of 32."""

    layers: int = 24
    width: int = 2880
    heads: int = 64
    key_value_heads: int = 8
    experts: int = 32
    vocabulary: int = 201088


@dataclass(frozen=True)
class Sizes:
    transformer: LensConfig
    encoder: EncoderSize
    decoder: tuple[int, ...] = (128, 256, 512, 512)  # channels of the autoencoder's levels


def sizes(scale: int = 1) -> Sizes:
    """The released sizes, or those of about 1 / ``scale`` of the weights, by the same code.

    Widths are divided by w, the largest power of two with w^3 <= scale, depths and the vocabulary by scale / w^2 and
    scale / w; 16: half as wide, a quarter as deep. ValueError for less than 1 or more than 4096.
    """
    if not 1 <= scale <= 4096:
        raise ValueError(f"bench full_size: scale must be 1 to 4096, got {scale}")
    w = 1
    while (2 * w) ** 3 <= scale:
        w *= 2
    deep, encoder = scale // w**2, EncoderSize()
    layers = max(4, encoder.layers // deep)
    width = max(32, encoder.width // w // 32 * 32)
    small = EncoderSize(
        layers=layers, width=width, heads=max(8, encoder.heads // w), experts=encoder.experts if w < 4 else 8,
        vocabulary=max(4096, encoder.vocabulary * w // scale),
    )  # fmt: skip
    released = LensConfig()
    transformer = replace(
        released,
        num_layers=max(2, released.num_layers // deep),
        num_attention_heads=released.num_attention_heads // w if w < 16 else 2,
        enc_hidden_dim=small.width,
        selected_layer_index=tuple((k + 1) * layers // 4 - 1 for k in range(4)),
    )
    return Sizes(transformer, small, tuple(max(32, c // w // 32 * 32) for c in (128, 256, 512, 512)))


# ------------------------------------------------------------------------------------------------ drawing


def _drawn(
    seed: int, key: str, shape: list[int], draw: Callable[[np.random.Generator, int], Tensor]
) -> Callable[[], Iterator[Tensor]]:
    """Pieces of a tensor, each from a generator of its own, drawn by as many threads as torch is set to: one piece for
    each is ahead of the one that is written."""

    def piece(begin: int) -> Tensor:
        digest = hashlib.sha256(f"{seed} {key} {begin}".encode()).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
        return draw(generator, min(_PIECE, math.prod(shape) - begin))

    def pieces() -> Iterator[Tensor]:
        begins, threads = range(0, math.prod(shape), _PIECE), torch.get_num_threads()
        if len(begins) == 1:
            yield piece(0)
            return
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque[Future[Tensor]] = deque()
            for begin in begins:
                ahead.append(pool.submit(piece, begin))
                if len(ahead) > threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    return pieces


def _normal(seed: int, key: str, dtype: str, shape: list[int], deviation: float, mean: float = 0.0) -> Streamed:
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]

    def draw(generator: np.random.Generator, count: int) -> Tensor:
        values = generator.standard_normal(count, np.float32)
        values *= deviation
        values += mean
        return torch.from_numpy(values).to(kind)

    return Streamed(key, dtype, shape, _drawn(seed, key, shape, draw))


def _bytes(seed: int, key: str, shape: list[int], low: int = 0, high: int = 256) -> Streamed:
    def draw(generator: np.random.Generator, count: int) -> Tensor:
        return torch.from_numpy(generator.integers(low, high, count, np.uint8))

    return Streamed(key, "U8", shape, _drawn(seed, key, shape, draw))


def transformer_tensors(config: LensConfig, dtype: str, seed: int) -> list[Streamed]:
    """Every released key of the transformer in the order of the model."""
    with torch.device("meta"):
        model = LensTransformer2DModel(config)
    found = []
    for name, value in model.state_dict().items():
        keys = released_names(name)
        shape = [value.shape[0] // len(keys), *value.shape[1:]]
        for key in keys:
            if len(shape) > 1:
                gain = GATE if "modulation" in name else 1.0
                found.append(_normal(seed, key, dtype, shape, gain / math.sqrt(math.prod(shape[1:]))))
            elif name.endswith("bias"):
                found.append(_normal(seed, key, dtype, shape, 0.02))
            else:
                found.append(_normal(seed, key, dtype, shape, 0.1, TEXT_KEYS if name.endswith("text.k_norm") else 1.0))
    return found


def encoder_tensors(size: EncoderSize, seed: int) -> list[Streamed]:
    """Every key of GPT-OSS's causal LM with MXFP4 experts, in bfloat16 else."""
    d, q, kv = size.width, 64 * size.heads, 64 * size.key_value_heads
    found: list[Streamed] = []

    def matrix(key: str, *shape: int) -> None:
        found.append(_normal(seed, key, "BF16", list(shape), 1 / math.sqrt(shape[-1])))

    def vector(key: str, n: int, mean: float = 0.0) -> None:
        found.append(_normal(seed, key, "BF16", [n], 0.1 if mean else 0.02, mean))

    def experts(key: str, outputs: int) -> None:
        # a block's 16 bytes are 32 weights; scales of 2^(s - 127), two of them around unit gain
        scale = 127 + math.floor(math.log2(1 / (_E2M1_RMS * math.sqrt(d))))
        found.append(_bytes(seed, f"{key}_blocks", [size.experts, outputs, d // 32, 16]))
        found.append(_bytes(seed, f"{key}_scales", [size.experts, outputs, d // 32], scale, scale + 2))
        found.append(_normal(seed, f"{key}_bias", "BF16", [size.experts, outputs], 0.02))

    found.append(_normal(seed, "model.embed_tokens.weight", "BF16", [size.vocabulary, d], 1.0))
    for layer in range(size.layers):
        at = f"model.layers.{layer}"
        vector(f"{at}.input_layernorm.weight", d, 1.0)
        for name, n in (("q", q), ("k", kv), ("v", kv)):
            matrix(f"{at}.self_attn.{name}_proj.weight", n, d)
            vector(f"{at}.self_attn.{name}_proj.bias", n)
        matrix(f"{at}.self_attn.o_proj.weight", d, q)
        vector(f"{at}.self_attn.o_proj.bias", d)
        vector(f"{at}.self_attn.sinks", size.heads, 1.0)
        vector(f"{at}.post_attention_layernorm.weight", d, 1.0)
        matrix(f"{at}.mlp.router.weight", size.experts, d)
        vector(f"{at}.mlp.router.bias", size.experts)
        experts(f"{at}.mlp.experts.gate_up_proj", 2 * d)
        experts(f"{at}.mlp.experts.down_proj", d)
    vector("model.norm.weight", d, 1.0)
    matrix("lm_head.weight", size.vocabulary, d)
    return found


def encoder_settings(size: EncoderSize) -> dict[str, Any]:
    """``text_encoder/config.json``."""
    ids = {name: min(k, size.vocabulary - 1) for name, k in (("eos_token_id", 200002), ("pad_token_id", 199999))}
    return {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
        "attention_dropout": 0.0, "dtype": "bfloat16", **ids,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": size.width, "initial_context_length": 4096,
        "initializer_range": 0.02, "intermediate_size": size.width,
        "layer_types": ["sliding_attention" if k % 2 == 0 else "full_attention" for k in range(size.layers)],
        "max_position_embeddings": 131072, "num_attention_heads": size.heads, "num_experts_per_tok": 4,
        "num_hidden_layers": size.layers, "num_key_value_heads": size.key_value_heads,
        "num_local_experts": size.experts, "quantization_config": {"quant_method": "mxfp4"}, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
        "vocab_size": size.vocabulary,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ writing


def make(
    folder: Path, scale: int, dtype: str, seed: int, text_encoder: bool = True, say: Callable[[str], None] | None = None
) -> int:
    """Write the checkpoint; returns its bytes. What an earlier, stopped run finished is kept.

    dtype: of the transformer, "F32" or "BF16". OSError where the disk has too little room, before anything is written;
    ValueError where the folder holds another checkpoint.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    size = sizes(scale)
    # as JSON gives it back
    asked = {"scale": scale, "dtype": dtype, "seed": seed, "decoder": list(size.decoder), **asdict(size.encoder)}
    parts = {"transformer": ("diffusion_pytorch_model", transformer_tensors(size.transformer, dtype, seed))}
    if text_encoder:
        parts["text_encoder"] = ("model", encoder_tensors(size.encoder, seed))
    if is_there(folder / MARK):
        if (there := read_json(folder / MARK)) != asked:
            differs = ", ".join(f"{k} {there.get(k)!r}" for k in asked if there.get(k) != asked[k])
            raise ValueError(f"{folder / MARK}: another checkpoint is there ({differs}): delete the folder first")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: must be empty or begun by this command, holds {next(folder.iterdir()).name}")
    total = sum(tensor.nbytes for _, tensors in parts.values() for tensor in tensors)
    folder.mkdir(parents=True, exist_ok=True)
    done = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if free < total - done + SPARE_BYTES:
        raise OSError(
            f"{folder}: {(total - done) / 1e9:.1f} GB are still to be written and {SPARE_BYTES / 1e9:.1f} GB to be left "
            f"free, the disk has {free / 1e9:.1f} GB"
        )
    write_json(folder / MARK, asked)
    for part, (stem, tensors) in parts.items():
        stream_tensors(
            folder / part, stem, tensors, SHARD_BYTES,
            lambda path, kept: say(f"{path} {'was there' if kept else 'written'}, {path.stat().st_size / 1e9:.2f} GB"),
        )  # fmt: skip
    write_json(folder / "transformer" / "config.json", released_config(size.transformer))
    if text_encoder:
        write_json(folder / "text_encoder" / "config.json", encoder_settings(size.encoder))
    _write_vae(folder / "vae", size, seed)
    shutil.copytree(TOKENIZER, folder / "tokenizer", dirs_exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", released_scheduler(Scheduler(use_dynamic_shifting=True)))
    steps, guidance = VARIANTS["turbo"]
    about = {"variant": "turbo", "num_inference_steps": steps, "guidance_scale": guidance, "base_resolution": 512}
    write_json(folder / "model_index.json", released_index(about))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_vae(folder: Path, size: Sizes, seed: int) -> None:
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        vae = AutoencoderKLFlux2(block_out_channels=size.decoder)
    fill(vae, torch.device("cpu"), torch.float32, f"full size {seed}")
    g = torch.Generator().manual_seed(seed)
    vae.bn.running_mean.normal_(0.0, 0.1, generator=g)
    vae.bn.running_var.uniform_(0.5, 2.0, generator=g)
    save_vae(vae, folder)
