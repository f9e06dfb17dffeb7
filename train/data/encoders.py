"""What stands between pictures and captions and the MMDiT: one interface for the released networks and for Mini's.

A `Tokenizer` runs in the loader's workers and is sent there: it holds paths and builds the rest itself. A `LatentCodec` and a
`TextEncoder` run on the training's device. The same objects fill shards (`python -m train shards --precompute`), so numbers read
and numbers computed are the same. Ids and features are those after the constant chat prefix; nothing is padded.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from lens.formats.files import read_json
from lens.formats.fingerprint import fingerprint
from lens.formats.released import transformer_config
from lens.formats.text_encoder import load_text_encoder, text_encoder_tensors
from lens.formats.vae import load_vae, vae_tensors

if TYPE_CHECKING:
    from lens.text_encoder import ChatTokenizer


CALL_PIXELS = 1 << 22  # of a call of the VAE: 16 pictures of 512x512, 4 of 1024x1024
FILL = 0.4  # of a call of the text encoder: the shortest caption's share of the longest


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
        from lens.text_encoder import DEFAULT_CHAT_DATE

        prefix, ids = self.prefix, _chat(self.folder).encode(caption, self.longest, "reference", DEFAULT_CHAT_DATE)
        if ids[: len(prefix)] != prefix[: len(ids)]:
            raise ValueError(f"{self.folder}: the tokens before a caption depend on it: {caption[:60]!r}")
        return ids[len(prefix) :]

    @property
    def prefix(self) -> list[int]:
        """The ids before every caption; 97 of a released tokenizer."""
        return _prefix(self.folder)


@functools.lru_cache(maxsize=4)
def _chat(folder: Path) -> ChatTokenizer:
    from lens.text_encoder import ChatTokenizer

    return ChatTokenizer(folder)


@functools.lru_cache(maxsize=4)
def _prefix(folder: Path) -> list[int]:
    from lens.text_encoder import DEFAULT_CHAT_DATE

    chat = _chat(folder)
    return chat._encode(chat.frame(DEFAULT_CHAT_DATE)[0])


class ReleasedLatents:
    """A folder's `vae/`, pictures of one size together. half: convolutions in bfloat16."""

    def __init__(self, vae: nn.Module, fingerprint: str, half: bool = False):
        from lens.vae import PixelCodec

        self.codec, self.fingerprint, self.half = PixelCodec(vae), fingerprint, half

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        from lens.vae import patchify

        vae, mean, std = self.codec.vae, self.codec._mean, self.codec._std
        together = max(1, CALL_PIXELS // (pixels.shape[1] * pixels.shape[2]))
        parts = []
        for some in pixels.split(together):
            x = (some.to(mean.device).float() / 127.5 - 1).to(mean.dtype).permute(0, 3, 1, 2)
            with torch.autocast(mean.device.type, torch.bfloat16, enabled=self.half):
                latents = vae.encode(x).latent_dist.mode()
            parts.append((patchify(latents.to(mean.dtype)) - mean) / std)
        return torch.cat(parts)


@torch.no_grad()
def half_error(vae: Any, side: int = 256) -> tuple[float, float]:
    """What bfloat16 convolutions move the posterior's mode by on a fixed picture, and the posterior's own deviation: both root
    mean squares over latent numbers."""
    device = next(vae.parameters()).device
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    smooth = torch.stack([x, y, torch.sin(9 * x * y)])  # slopes, waves; and below them edges and grain
    grain = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0)) * 0.1
    picture = (smooth + grain + 0.5 * ((x * 8).round() % 2)).clamp(-1, 1)[None].to(device)
    whole = vae.encode(picture).latent_dist
    with torch.autocast(device.type, torch.bfloat16):
        rounded = vae.encode(picture).latent_dist.mode()
    error, deviation = (rounded.float() - whole.mode().float()), whole.std.float()
    return error.square().mean().sqrt().item(), deviation.square().mean().sqrt().item()


class ReleasedText:
    """A folder's `text_encoder/`, captions of near lengths together, each to rounding what it is alone.

    prefix: the ids before every caption; their keys and values are computed once and read by every call.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], tokenizer: ChatTokens, fingerprint: str):
        from lens.text_encoder import TextEncoder

        self.model: Any = model
        self.layers, self.prefix = tuple(layers), tokenizer.prefix
        self.shape = len(layers), TextEncoder(_chat(tokenizer.folder), model, layers).width  # which checks the layers
        self.fingerprint = fingerprint_of((), fingerprint, self.prefix, tuple(layers))
        self._taken: dict[int, Tensor] = {}
        for layer in set(layers):
            cast(Any, self.model).layers[layer].register_forward_hook(functools.partial(self._take, layer))

    def _take(self, layer: int, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._taken[layer] = output[0] if isinstance(output, tuple) else output

    @functools.cached_property
    def _cache(self) -> str:
        """What transformers calls the argument, which it renames in 5.40."""
        return next(
            name for name in ("cache", "past_key_values") if name in inspect.signature(self.model.forward).parameters
        )

    @functools.cached_property
    def _past(self) -> Any:
        ids = torch.tensor([self.prefix], device=self._device)
        return self.model(input_ids=ids, use_cache=True).past_key_values

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode(self, ids: Sequence[Sequence[int]]) -> Tensor:
        from ..networks.text_path import calls_of

        lengths, before = [len(own) for own in ids], len(self.prefix)
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        for members in calls_of(lengths, FILL):
            longest = lengths[members[0]]
            padded = torch.tensor([[*ids[i], *[0] * (longest - lengths[i])] for i in members], device=self._device)
            seen = torch.tensor([[1] * (before + lengths[i]) + [0] * (longest - lengths[i]) for i in members])
            past = copy.deepcopy(self._past)  # a call adds to it
            past.batch_repeat_interleave(len(members))
            self.model(input_ids=padded, attention_mask=seen.to(self._device), use_cache=True, **{self._cache: past})
            states = torch.stack([self._taken[layer] for layer in self.layers], 2)
            for row, i in enumerate(members):
                found[i] = states[row, : lengths[i]]
        self._taken = {}
        return torch.cat(found)


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
    """Tokenizer, codec and text encoder (`dtype`) of a checkpoint folder. Errors: as in loading.

    The codec is float32; on a GPU with a `dtype` of bfloat16 its convolutions are, too, where `half_error` allows it.
    """

    path = folder / "transformer" / "config.json"
    layers = transformer_config(read_json(path), str(path)).selected_layer_index
    tokenizer = ChatTokens(folder / "tokenizer")
    model = load_text_encoder(folder / "text_encoder", dtype, device, max(layers) + 1)
    vae = load_vae(folder / "vae", torch.float32, device)
    codec = fingerprint({"vae": vae_tensors(folder / "vae")})[:16]
    text = fingerprint({"text_encoder": text_encoder_tensors(folder / "text_encoder", max(layers) + 1)})[:16]
    half = False
    if torch.device(device).type == "cuda" and dtype == torch.bfloat16:
        error, deviation = half_error(vae)
        half = error < deviation
        print(
            f"VAE in {'bfloat16' if half else 'float32'}: bfloat16 moves latents by {error:.2g}, their own deviation is "
            f"{deviation:.2g}",
            flush=True,
        )
    return tokenizer, ReleasedLatents(vae, codec, half), ReleasedText(model, layers, tokenizer, text)


def mini(recipe: str, vae: Path, encoder: Path, device: torch.device | str) -> tuple[ChatTokens, MiniLatents, MiniText]:
    """The same of Mini's stages: a "vae" folder, and the averaged encoder of a state file of "encoder" or of "pretrain"."""
    from .. import configs
    from ..loop.checkpoints import load_state
    from ..networks import text_path

    config = configs.beside(recipe, "encoder")
    tokenizer = ChatTokens(text_path.ROOT / config.TOKENIZER, 1 << 20)
    prefix = text_path.tokenizer_of(config.TOKENIZER).prefix
    if torch.load(encoder, map_location="cpu", weights_only=True).get("stage") == "pretrain":
        average, model = load_state(encoder, "pretrain")["ema"]["average"], text_path.build(config)
        model.load_state_dict({k.removeprefix("encoder."): v for k, v in average.items() if k.startswith("encoder.")})
    else:
        model = text_path.load_trained(config, encoder)
    model.to(device)
    return tokenizer, MiniLatents(vae, device), MiniText(model, config.LAYERS, prefix)
