"""Networks of the paper's ablations behind the loader's two protocols: FLUX.1's and SD3's autoencoders, Qwen3 text encoders.

FLUX.2's autoencoder and GPT-OSS are the released checkpoint's own (train/data/encoders.py); VTP's autoencoder, which no library has,
is vtp.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lens.text_encoder import SYSTEM
from lens.vae import patchify, unpatchify

from ..data.encoders import CALL_PIXELS, ReleasedText, fingerprint_of

RELEASED_LAYERS, RELEASED_DEPTH = (5, 11, 17, 23), 24  # of GPT-OSS
STRIDE = 16  # pixels of a token's side


def relative_layers(depth: int) -> tuple[int, ...]:
    """The layers of an encoder of that depth at the relative depth of the released four: 28 -> (6, 13, 20, 27)."""
    if depth < len(RELEASED_LAYERS):
        raise ValueError(f"relative_layers: {depth} layers, expected at least {len(RELEASED_LAYERS)}")
    return tuple(round((k + 1) * depth / RELEASED_DEPTH) - 1 for k in RELEASED_LAYERS)


class ScaledLatents:
    """A `LatentCodec` of an AutoencoderKL with stride 8: z = (mode - shift_factor) scaling_factor, 2x2 of these a token.

    FLUX.1 and SD3 (16 channels, 64 a token) differ in weights and in these two numbers, which the configuration has.
    """

    def __init__(self, vae: Any):
        """vae: diffusers' AutoencoderKL. Errors: ValueError for another stride."""
        stride = 2 ** (len(vae.config.block_out_channels) - 1)
        if stride != STRIDE // 2:
            raise ValueError(f"ScaledLatents: a VAE of stride {stride}, expected {STRIDE // 2}")
        self.vae = vae.eval().requires_grad_(False)
        self.shift, self.scale = float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)
        self.channels = 4 * vae.config.latent_channels
        self.fingerprint = fingerprint_of(vae.state_dict().values(), self.shift, self.scale)

    @classmethod
    def of_folder(cls, folder: Path, device: torch.device | str = "cpu") -> ScaledLatents:
        from diffusers import AutoencoderKL

        return cls(AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(device))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] -> [n, H/16 W/16, channels]."""
        together, parts = max(1, CALL_PIXELS // (pixels.shape[1] * pixels.shape[2])), []
        for some in pixels.split(together):
            x = (some.to(self.vae.device).float() / 127.5 - 1).permute(0, 3, 1, 2)
            parts.append((self.vae.encode(x).latent_dist.mode() - self.shift) * self.scale)
        return patchify(torch.cat(parts))

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, I, channels] of a grid (rows, columns) -> uint8 [n, H, W, 3]."""
        x = self.vae.decode(unpatchify(tokens, grid) / self.scale + self.shift, return_dict=False)[0]
        return ((x.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1)


class PrefixedTokens(Protocol):
    """Caption -> ids after a prefix that is the same for all."""

    @property
    def prefix(self) -> list[int]: ...

    def __call__(self, caption: str) -> list[int]: ...


class TemplateTokens:
    """A transformers tokenizer with its own chat template: the released instructions as the system's turn, the caption as the
    user's. The prefix is what all captions share up to the user's own words."""

    def __init__(self, tokenizer: Any, longest: int = 512):
        """longest: ids with the prefix; a longer text is cut at its end, as the released chat is."""
        self.tokenizer, self.longest = tokenizer, longest

    def _text(self, caption: str) -> str:
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": caption}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)

    @functools.cached_property
    def prefix(self) -> list[int]:
        mark = "\x02"
        before, found, _ = self._text(mark).partition(mark)
        if not found:
            raise ValueError("TemplateTokens: the chat template does not say the user's words")
        return self.tokenizer(before, add_special_tokens=False)["input_ids"]

    def __call__(self, caption: str) -> list[int]:
        ids = self.tokenizer(self._text(caption), add_special_tokens=False)["input_ids"][: self.longest]
        if ids[: len(self.prefix)] != self.prefix:
            raise ValueError(f"TemplateTokens: the tokens before a caption depend on it: {caption[:60]!r}")
        return ids[len(self.prefix) :]


class ChatModelText(ReleasedText):
    """A `TextEncoder` of any decoder of transformers with a `layers` list, Qwen3 among them: raw residual streams after four layers."""

    def __init__(self, model: Any, tokens: PrefixedTokens, layers: Sequence[int] | None = None):
        """model: without its LM head. layers: zero-based; None: at the released relative depth."""
        self.model, self.prefix = model.eval().requires_grad_(False), list(tokens.prefix)
        self.layers = tuple(layers or relative_layers(len(model.layers)))
        self.shape = len(self.layers), model.config.hidden_size
        self.fingerprint = fingerprint_of(model.state_dict().values(), self.prefix, self.layers)
        self._taken = {}
        for layer in set(self.layers):
            model.layers[layer].register_forward_hook(functools.partial(self._take, layer))

    @classmethod
    def of_folder(
        cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> tuple[TemplateTokens, ChatModelText]:
        from transformers import AutoModel, AutoTokenizer

        tokens = TemplateTokens(AutoTokenizer.from_pretrained(folder))
        return tokens, cls(AutoModel.from_pretrained(folder, dtype=dtype).to(device), tokens)
