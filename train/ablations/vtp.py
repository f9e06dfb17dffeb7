"""VTP's autoencoder (arXiv 2512.13687, github.com/MiniMax-AI/VTP) from its released folder, behind the loader's protocol.

Two vision transformers as in DINOv3: patches of 16x16 pixels, normalised as ImageNet's, become 64 channels each through a bottleneck
without bias; the decoder turns these into pixels by a shuffle. Positions are rotary, of coordinates in [-1, 1] whatever the size, and
are computed in bfloat16, as the weights were trained. The folder is what transformers' `save_pretrained` wrote: `config.json`,
which leaves out whatever has its default, and `model.safetensors`, whose keys the modules here have. Its text encoder and its
contrastive heads are not read.

Latents are normalised by the channels' mean and standard deviation, which VTP keeps beside its code and not in the folder:
`generation/latent_stats/vtp_{s,b,l}/latents_stats.pt`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens.formats.files import CheckpointError, read_json
from lens.formats.safetensors import load_parameters

from ..data.encoders import CALL_PIXELS, fingerprint_of

STRIDE = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in [0, 1]
STATISTICS = "latents_stats.pt"
DECODER_FFN_RATIO = 4.0
DEFAULTS: dict[str, Any] = {  # of VTP's configuration, where config.json says nothing
    "train_reconstruction": True,
    "vision_patch_size": 16,
    "vision_embed_dim": 768,
    "vision_depth": 12,
    "vision_num_heads": 12,
    "vision_mlp_ratio": 4.0,
    "vision_ffn_layer": "swiglu",
    "vision_norm_layer": "rmsnorm",
    "vision_init_values": None,
    "vision_use_qk_norm": False,
    "vision_feature_bottleneck": 64,
    "decoder_embed_dim": 768,
    "decoder_num_heads": 12,
    "decoder_depth": 12,
    "decoder_ffn_layer": "swiglu",
    "decoder_norm_layer": "layernorm",
    "decoder_init_values": None,
    "decoder_use_qk_norm": False,
}
UNREAD = (  # of the text encoder and the contrastive loss
    *("text_transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection"),
    *("visual_proj.", "logit_scale", "logit_bias"),
)


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layernorm": lambda width: nn.LayerNorm(width, eps=1e-6),
    "layernormbf16": lambda width: nn.LayerNorm(width, eps=1e-5),
    "rmsnorm": RmsNorm,
}
ALIGNED = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128}  # the hidden width is a multiple of it


class RotaryTable(nn.Module):
    """Axial, without a weight: a quarter of a head's channels pairs for the rows, a quarter for the columns."""

    periods: Tensor

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.register_buffer("periods", torch.empty(width // heads // 4))

    def forward(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """bfloat16 cos and sin [rows columns, head], its second half as its first."""
        kind: Any = {"dtype": torch.bfloat16, "device": self.periods.device}
        y, x = (2.0 * (torch.arange(0.5, n, **kind) / n) - 1.0 for n in (rows, columns))
        places = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)
        angles = (2 * math.pi * places[..., None] / self.periods.bfloat16()).flatten(1).repeat(1, 2)
        return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, R, H], in bfloat16; the rows before the table's, such as the class token, stay."""
    a, b = x[..., -len(cos) :, :].bfloat16().chunk(2, -1)
    turned = torch.cat([a, b], -1) * cos + torch.cat([-b, a], -1) * sin
    return torch.cat([x[..., : -len(cos), :].bfloat16(), turned], -2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = RmsNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RmsNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = _rotated(self.q_norm(q), *table), _rotated(self.k_norm(k), *table)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGlu(nn.Module):
    def __init__(self, width: int, hidden: int, multiple: int):
        super().__init__()
        hidden = int(hidden * 2 / 3)
        hidden += -hidden % multiple
        self.w1, self.w2, self.w3 = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, ffn: str, norm: str, scaled: bool, qk_norm: bool):
        super().__init__()
        self.norm1, self.norm2 = NORMS[norm](width), NORMS[norm](width)
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = Mlp(width, hidden) if ffn == "mlp" else SwiGlu(width, hidden, ALIGNED[ffn])
        self.ls1 = LayerScale(width) if scaled else nn.Identity()
        self.ls2 = LayerScale(width) if scaled else nn.Identity()

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), table))
        return x + self.ls2(self.mlp(self.norm2(x)))


def _blocks(settings: Mapping[str, Any], part: str, ratio: float) -> nn.ModuleList:
    own = {name.removeprefix(f"{part}_"): value for name, value in settings.items() if name.startswith(f"{part}_")}
    width, hidden = own["embed_dim"], int(own["embed_dim"] * ratio)
    kinds = own["ffn_layer"], own["norm_layer"], bool(own["init_values"]), own["use_qk_norm"]
    return nn.ModuleList([Block(width, own["num_heads"], hidden, *kinds) for _ in range(own["depth"])])


class Trunk(nn.Module):
    """Normalised pixels [n, 3, H, W] -> latents [n, C, H/16, W/16]."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        width, channels = settings["vision_embed_dim"], settings["vision_feature_bottleneck"]
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))  # of its training alone
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, STRIDE, STRIDE)})
        self.rope_embed = RotaryTable(width, settings["vision_num_heads"])
        self.blocks = _blocks(settings, "vision", settings["vision_mlp_ratio"])
        self.norm = NORMS[settings["vision_norm_layer"]](width)
        self.feature_bottleneck = nn.Identity() if channels == width else nn.Linear(width, channels, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels)
        grid = rows, columns = x.shape[2], x.shape[3]
        table, x = self.rope_embed(rows, columns), x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, table)
        return self.feature_bottleneck(self.norm(x)[:, 1:]).transpose(1, 2).unflatten(2, grid)


class PixelDecoder(nn.Module):
    """Latents [n, C, h, w] -> normalised pixels [n, 3, 16 h, 16 w]."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        width, channels = settings["decoder_embed_dim"], settings["vision_feature_bottleneck"]
        self.proj_in = nn.Conv2d(channels, width, 1)
        self.rope_embed = RotaryTable(width, settings["decoder_num_heads"])
        self.blocks = _blocks(settings, "decoder", DECODER_FFN_RATIO)
        self.norm = NORMS[settings["decoder_norm_layer"]](width)
        self.proj_out = nn.Conv2d(width, 3 * STRIDE**2, 1)

    def forward(self, latents: Tensor) -> Tensor:
        grid = rows, columns = latents.shape[2], latents.shape[3]
        table, x = self.rope_embed(rows, columns), self.proj_in(latents).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, table)
        return F.pixel_shuffle(self.proj_out(self.norm(x).transpose(1, 2).unflatten(2, grid)), STRIDE)


class VtpAutoencoder(nn.Module):
    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self.trunk, self.pixel_decoder = Trunk(settings), PixelDecoder(settings)


def settings_of(path: Path) -> dict[str, Any]:
    """config.json with its defaults. Errors: CheckpointError where it is of another model or of a kind there is not."""
    given = read_json(path)
    if given.get("model_type") != "vtp":
        raise CheckpointError(f"{path}: model_type must be 'vtp', got {given.get('model_type')!r}")
    settings = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    for name, value in settings.items():
        kinds = {"ffn_layer": (*ALIGNED, "mlp"), "norm_layer": tuple(NORMS)}.get(name.partition("_")[2])
        if kinds and value not in kinds:
            raise CheckpointError(f"{path}: {name} must be one of {', '.join(kinds)}, got {value!r}")
        if name.endswith(("_dim", "_depth", "_heads", "_bottleneck", "_size")) and (
            type(value) is not int or value < 1
        ):
            raise CheckpointError(f"{path}: {name} must be a positive integer, got {value!r}")
    if settings["vision_patch_size"] != STRIDE:
        raise CheckpointError(f"{path}: vision_patch_size must be {STRIDE}, got {settings['vision_patch_size']}")
    if settings["train_reconstruction"] is not True:
        raise CheckpointError(f"{path}: train_reconstruction must be true, for a VTP without it has no decoder")
    for part in ("vision", "decoder"):
        width, heads = settings[f"{part}_embed_dim"], settings[f"{part}_num_heads"]
        if width % (4 * heads):
            raise CheckpointError(
                f"{path}: {part}_embed_dim must be a multiple of 4 x {part}_num_heads ({heads}), got {width}"
            )
    return settings


def statistics_of(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of the latents' channels. Errors: CheckpointError."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: file not found: the latents' mean and deviation, generation/latent_stats/*/{STATISTICS} in VTP's repository"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (found[name].float().flatten() for name in ("mean", "std"))
    except Exception as error:  # of a damaged file torch raises whatever its pickle did
        raise CheckpointError(f"{path}: expected tensors 'mean' and 'std' as torch.save wrote them: {error}") from error
    for name, value in (("mean", mean), ("std", std)):
        if value.shape != (channels,) or not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} must be {channels} finite numbers, got shape {list(value.shape)}")
    if not (std > 0).all():
        raise CheckpointError(f"{path}: std must be positive, got {std.min().item():g}")
    return mean, std


class VtpLatents:
    """A `LatentCodec` of VTP: a latent is a token. (z - mean) / std."""

    def __init__(self, model: VtpAutoencoder, mean: Tensor, std: Tensor):
        """mean, std [C]: of the latents' channels."""
        self.model = model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self.mean, self.std, self.channels = mean.to(self.device), std.to(self.device), len(mean)
        self._pixel_mean, self._pixel_std = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, STD))
        self.fingerprint = fingerprint_of([*model.state_dict().values(), mean, std])

    @classmethod
    def of_folder(cls, folder: Path, statistics: Path | None = None, device: torch.device | str = "cpu") -> VtpLatents:
        """statistics: the file of the latents' mean and deviation (default: latents_stats.pt in the folder).

        Errors: CheckpointError.
        """
        settings = settings_of(folder / "config.json")
        moments = statistics_of(statistics or folder / STATISTICS, settings["vision_feature_bottleneck"])
        with torch.device("meta"):
            model = VtpAutoencoder(settings)
        load_parameters(model, folder, device=device, ignored=UNREAD)
        return cls(model, *moments)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] -> [n, H/16 W/16, channels]. Errors: ValueError for sides that are no multiples of 16."""
        height, width = pixels.shape[1:3]
        if height % STRIDE or width % STRIDE:
            raise ValueError(f"VtpLatents.encode: {height}x{width} pixels, expected multiples of {STRIDE}")
        together, parts = max(1, CALL_PIXELS // (height * width)), []
        for some in pixels.split(together):
            x = some.to(self.device).permute(0, 3, 1, 2).float() / 255
            z = self.model.trunk((x - self._pixel_mean) / self._pixel_std)
            parts.append((z.flatten(2).transpose(1, 2) - self.mean) / self.std)
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, I, channels] of a grid (rows, columns) -> uint8 [n, H, W, 3]."""
        z = (tokens.to(self.device) * self.std + self.mean).transpose(1, 2).unflatten(2, grid)
        x = self.model.pixel_decoder(z) * self._pixel_std + self._pixel_mean
        return (x.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)
