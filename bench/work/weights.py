"""Models at any size with random weights, made on the device: nothing is downloaded.

Scales keep activations sane: GEMMs have unit gain, norms lie around 1, gates around 0 with deviation 0.3, so that the
residual streams of 48 blocks grow by a small factor and attention is neither flat nor a single spike; text keys
are larger, so that losing the text cannot hide in rounding. All-zero or constant weights would run faster than real ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lens.config import LensConfig
from lens.model import LensTransformer2DModel

from ..case import LeftOut, generator

GATE = 0.3
TEXT_KEYS = 2.5  # norm weight of text keys: 200 of them then draw 40 % of the attention beside 4,096 image keys


@torch.no_grad()
def fill(module: nn.Module, device: torch.device, dtype: torch.dtype, key: str) -> nn.Module:
    """Give every parameter and buffer of a module made on the meta device storage and random values, in place.

    Matrices: normal with deviation 1 / sqrt(inputs), modulation GATE times that; vectors: biases 0.02 n, others (norm
    weights) 1 + 0.1 n. Drawn tensor by tensor from one generator.
    """
    module.to_empty(device=device)
    nn.Module.to(module, dtype)  # libraries override it with notices
    g = generator(device, "weights", key)
    for name, p in module.named_parameters():
        p.normal_(generator=g)
        if p.dim() == 1:
            p.mul_(0.02) if "bias" in name else p.mul_(0.1).add_(TEXT_KEYS if name.endswith("text.k_norm") else 1.0)
        else:
            inputs = p.shape[-2] if p.dim() == 3 else math.prod(p.shape[1:])  # experts hold [experts, inputs, outputs]
            p.mul_((GATE if "modulation" in name else 1.0) / math.sqrt(inputs))
        p.requires_grad_(False)
    return module.eval()


def transformer(config: LensConfig, device: torch.device, dtype: torch.dtype) -> LensTransformer2DModel:
    """Our denoiser with random weights; not batch-invariant on a CPU either, so that shapes are those of a GPU."""
    with torch.device("meta"):
        model = LensTransformer2DModel(config)
    fill(model, device, dtype, "transformer")
    model.batch_invariant = False
    return model


def encoder_config(tiny: bool) -> Any:
    """GPT-OSS-20B's shape, or a small one; LeftOut without transformers."""
    try:
        from transformers import GptOssConfig
    except ImportError as error:
        raise LeftOut(f"transformers is not installed: {error}") from None
    if tiny:
        sizes: dict[str, Any] = dict(
            vocab_size=512, hidden_size=64, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=4, sliding_window=32,
        )  # fmt: skip
    else:
        sizes = dict(num_local_experts=32, num_hidden_layers=24)
    return GptOssConfig(**sizes)


def text_encoder(device: torch.device, dtype: torch.dtype, tiny: bool, layers: int) -> Any:
    """transformers' GptOssModel with random weights: its first `layers` layers, experts unpacked to `dtype`.

    Its rotary tables are computed, hence made anew on the device.
    """
    config = encoder_config(tiny)
    from transformers import GptOssModel

    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = GptOssModel(config)
    del model.layers[layers:]
    fill(model, device, dtype, "text encoder")
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    return model


def autoencoder(device: torch.device, dtype: torch.dtype, tiny: bool) -> Any:
    """diffusers' AutoencoderKLFlux2 with random weights; LeftOut without diffusers."""
    try:
        from diffusers import AutoencoderKLFlux2
    except ImportError as error:
        raise LeftOut(f"diffusers is not installed, and decoding needs its AutoencoderKLFlux2: {error}") from None
    channels = {"block_out_channels": (32, 32, 32, 32)} if tiny else {}
    with torch.device("meta"):
        vae = AutoencoderKLFlux2(**channels)
    fill(vae, device, dtype, "autoencoder")
    g = generator(device, "latent statistics")
    mean: Tensor = vae.bn.running_mean
    mean.normal_(0.0, 0.1, generator=g)
    vae.bn.running_var.uniform_(0.5, 2.0, generator=g)
    return vae


class IdTokenizer:
    """Prompts -> token ids without a vocabulary: prompts are spelled as ids, "12 7 90"; the preamble precedes them.

    Stands where a checkpoint's chat tokenizer stands, because tokenising is left out of every time here.
    """

    def __init__(self, vocabulary: int, prefix: int):
        self.vocabulary, self.prefix, self.pad_id = vocabulary, prefix, 0

    def encode(self, prompt: str, max_length: int, truncation: str, chat_date: str | None) -> list[int]:
        head = [(7 * i + 3) % self.vocabulary for i in range(self.prefix)]
        return (head + [int(word) % self.vocabulary for word in prompt.split()])[:max_length]

    def prompt(self, tokens: int, seed: int) -> str:
        """A prompt of so many tokens."""
        g = torch.Generator().manual_seed(seed)
        return " ".join(map(str, torch.randint(0, self.vocabulary, (tokens,), generator=g).tolist()))
