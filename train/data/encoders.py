"""What stands between pictures and captions and the MMDiT: one interface for the released networks and for Mini's.

A `Tokenizer` runs in the loader's workers and is sent there: it holds paths and builds the rest itself. A `LatentCodec` and a
`TextEncoder` run on the training's device. The same objects fill shards (`python -m train shards --precompute`), so numbers read
and numbers computed are the same. Ids and features are those after the constant chat prefix; nothing is padded.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lens.formats.files import read_json
from lens.formats.fingerprint import fingerprint
from lens.formats.released import transformer_config
from lens.formats.text_encoder import load_text_encoder, text_encoder_tensors
from lens.formats.vae import load_vae, vae_tensors

if TYPE_CHECKING:
    from lens.text_encoder import ChatTokenizer


class Tokenizer(Protocol):
    def __call__(self, caption: str) -> list[int]:
        """Ids after the chat prefix."""


class LatentCodec(Protocol):
    fingerprint: str  # of the weights

    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] -> normalised tokens of the posterior's mode, [n, I, C], on the codec's device."""


class TextEncoder(Protocol):
    fingerprint: str
    shape: tuple[int, int]  # F layers, E width

    def encode(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Ids after the prefix of n samples -> features of all their tokens, one sample after another, [RT, F, E]."""


def fingerprint_of(tensors: Iterable[Tensor], *settings: object) -> str:
    """SHA-256 over the bytes of tensors and the text of settings, 16 hex digits."""
    digest = hashlib.sha256(repr(settings).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ChatTokens:
    """The tokenizer of a checkpoint folder: the prompt and what follows it, at most `longest` ids with the prefix."""

    folder: Path
    longest: int = 512

    def __call__(self, caption: str) -> list[int]:
        from lens.text_encoder import DEFAULT_CHAT_DATE, PREFIX_TOKENS

        return _chat(self.folder).encode(caption, self.longest, "reference", DEFAULT_CHAT_DATE)[PREFIX_TOKENS:]


@functools.lru_cache(maxsize=4)
def _chat(folder: Path) -> ChatTokenizer:
    from lens.text_encoder import ChatTokenizer

    return ChatTokenizer(folder)


class ReleasedLatents:
    """A folder's `vae/`, one picture at a time: a picture's bits do not depend on its neighbours."""

    def __init__(self, vae: nn.Module, fingerprint: str):
        from lens.vae import PixelCodec

        self.codec, self.fingerprint = PixelCodec(vae), fingerprint

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.stack([self.codec.encode(picture.float() / 127.5 - 1) for picture in pixels])


class ReleasedText:
    """A folder's `text_encoder/`, one caption at a time. `prefix`: the ids before every caption."""

    def __init__(self, model: nn.Module, layers: Sequence[int], tokenizer: ChatTokens, fingerprint: str):
        from lens.text_encoder import DEFAULT_CHAT_DATE, TextEncoder

        chat = _chat(tokenizer.folder)
        self.encoder = TextEncoder(chat, model, layers)
        self.prefix = chat._encode(chat.frame(DEFAULT_CHAT_DATE)[0])
        self.shape = len(layers), self.encoder.width
        self.fingerprint = fingerprint_of((), fingerprint, self.prefix, tuple(layers))

    def encode(self, ids: Sequence[Sequence[int]]) -> Tensor:
        return torch.cat([torch.stack(self.encoder.features([*self.prefix, *own]), 1) for own in ids])


class MiniLatents:
    """The latent space of a "vae" stage folder."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        from ..networks.codec import Latents

        self.latents = Latents(folder, device)
        network: Any = self.latents.codec if self.latents.vae is None else self.latents.vae
        self.fingerprint = fingerprint_of([*network.state_dict().values(), self.latents.mean, self.latents.var])

    def encode(self, pixels: Tensor) -> Tensor:
        return self.latents.encode(pixels)


class MiniText:
    """A frozen encoder of the "encoder" or the joint stage; the prefix's keys and values are computed once."""

    def __init__(self, model: Any, layers: Sequence[int], prefix: Sequence[int]):  # transformers has no types
        self.model, self.layers, self.prefix = model.eval(), tuple(layers), list(prefix)
        self.shape = len(self.layers), self.model.config.hidden_size
        self.fingerprint = fingerprint_of(model.state_dict().values(), self.prefix, self.layers)

    @torch.no_grad()
    def encode(self, ids: Sequence[Sequence[int]]) -> Tensor:
        from ..networks.text_path import encode_packed

        return encode_packed(self.model, [list(own) for own in ids], self.prefix, self.layers)[0]


def released(
    folder: Path, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> tuple[ChatTokens, ReleasedLatents, ReleasedText]:
    """Tokenizer, codec (float32) and text encoder (`dtype`) of a checkpoint folder. Errors: as in loading."""

    path = folder / "transformer" / "config.json"
    layers = transformer_config(read_json(path), str(path)).selected_layer_index
    tokenizer = ChatTokens(folder / "tokenizer")
    model = load_text_encoder(folder / "text_encoder", dtype, device, max(layers) + 1)
    vae = load_vae(folder / "vae", torch.float32, device)
    codec = fingerprint({"vae": vae_tensors(folder / "vae")})[:16]
    text = fingerprint({"text_encoder": text_encoder_tensors(folder / "text_encoder", max(layers) + 1)})[:16]
    return tokenizer, ReleasedLatents(vae, codec), ReleasedText(model, layers, tokenizer, text)


def mini(recipe: str, vae: Path, encoder: Path, device: torch.device | str) -> tuple[ChatTokens, MiniLatents, MiniText]:
    """The same of Mini's stages: a "vae" folder, and the averaged encoder of a state file of "encoder" or of "pretrain"."""
    from .. import configs
    from ..loop.checkpoints import load_state
    from ..networks import text_path

    config = configs.load(recipe, "encoder")
    tokenizer = ChatTokens(text_path.ROOT / config.TOKENIZER, 1 << 20)
    prefix = text_path.tokenizer_of(config.TOKENIZER).prefix
    if torch.load(encoder, map_location="cpu", weights_only=True).get("stage") == "pretrain":
        average, model = load_state(encoder, "pretrain")["ema"]["average"], text_path.build(config)
        model.load_state_dict({k.removeprefix("encoder."): v for k, v in average.items() if k.startswith("encoder.")})
    else:
        model = text_path.load_trained(config, encoder)
    model.to(device)
    return tokenizer, MiniLatents(vae, device), MiniText(model, config.LAYERS, prefix)
