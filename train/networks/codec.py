"""The latent space of Mini: an overlapped linear transform of pixels, whitened, and the statistics of its tokens.

z = (W * x + b - mean) / std at stride 8, learned in a minute together with its transposed inverse (stage "vae"); a token is
2x2 of these with channels in the order (c p1 p2), normalised by statistics measured once. See train/vae/__init__.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lens.formats.files import write_atomic
from lens.formats.vae import load_vae
from lens.vae import patchify, unpatchify

from ..data.small_world.kinds import CORE
from ..data.small_world.labels import CLASSES, COLOURS
from ..data.small_world.world import World
from ..loop.checkpoints import load_state
from ..loop.keys import keyed
from ..objectives.autoencoding import TokenHead

VALIDATION_SEED = 1_000_000_000  # scenes from here on are never trained on


def to_model(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [n, H, W, 3] (array, or tensor on any device) -> float32 [n, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def held_out_images(side: int, count: int = 256) -> dict[str, torch.Tensor]:
    """Scenes that no part trains on, in [-1, 1]: "" of all classes and tasks, "_core" of the CORE classes, "_text" with signs."""
    seeds = list(range(VALIDATION_SEED, VALIDATION_SEED + count))
    worlds = {"": World(), "_core": World(classes=CORE), "_text": World(tasks={"text": 1.0})}
    return {name: to_model(world.batch(seeds, side, side)[1]) for name, world in worlds.items()}


def sheet(path: Path, originals: torch.Tensor, copies: torch.Tensor, columns: int = 12, rows: int = 3) -> None:
    """Originals above their reconstructions, enlarged twice."""
    from PIL import Image

    cells, columns = [], min(columns, len(originals))
    for row in range(min(rows, len(originals) // columns)):
        for group in (originals, copies):
            picture = group[row * columns : (row + 1) * columns].clamp(-1, 1)
            cells.append(torch.cat(list(picture.cpu()), 2))
    image = ((torch.cat(cells, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    large = Image.fromarray(image).resize((image.shape[1] * 2, image.shape[0] * 2), Image.Resampling.NEAREST)
    write_atomic(path, lambda temporary: large.save(temporary, "PNG"))


def autoencoder(shape: dict[str, Any], seed: int) -> Any:
    """An AutoencoderKLFlux2 (diffusers has no types) of that configuration with weights drawn from the seed."""
    from diffusers import AutoencoderKLFlux2

    with torch.random.fork_rng():
        torch.manual_seed(keyed(seed, "vae init").initial_seed())
        return AutoencoderKLFlux2(**shape).train()


class Half(nn.Module):
    """The decoder or the encoder of a VAE with its 1x1 convolution, so that each has its own optimiser and state."""

    def __init__(self, vae: Any, part: str):
        super().__init__()
        self.part = part
        self.body = vae.decoder if part == "decoder" else vae.encoder
        self.point = vae.post_quant_conv if part == "decoder" else vae.quant_conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Decoder: [n, c, h, w] -> [n, 3, 8h, 8w]. Encoder: the reverse, 2c channels of moments."""
        return self.body(self.point(x)) if self.part == "decoder" else self.point(self.body(x))


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], over all pixels together."""
    return -10 * math.log10(((output.clamp(-1, 1) - target) / 2).pow(2).mean().item())


class LinearCodec(nn.Module):
    """z = (W * x + b - mean) / std at stride 8 with overlapping windows; x' = transposed convolution of z."""

    def __init__(self, channels: int, encode_kernel: int, decode_kernel: int):
        super().__init__()
        self.encode_filter = nn.Conv2d(3, channels, encode_kernel, 8, (encode_kernel - 8) // 2)
        self.decode_filter = nn.ConvTranspose2d(channels, 3, decode_kernel, 8, (decode_kernel - 8) // 2)
        self.whiten: nn.Module = nn.BatchNorm2d(channels, affine=False, momentum=0.02)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 3, 8h, 8w] -> [n, channels, h, w]."""
        return self.whiten(self.encode_filter(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decode_filter(z)

    @torch.no_grad()
    def start_from_principal_components(self, x: torch.Tensor) -> None:
        """Centre both kernels on the leading components of 8x8 patches of x [n, 3, H, W]."""
        channels = self.encode_filter.out_channels
        patches = F.unfold(x, 8, stride=8).transpose(1, 2).reshape(-1, 192)
        mean = patches.mean(0)
        centred = (patches - mean).double()
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        basis, std = vectors[:, -channels:].float(), values[-channels:].sqrt().float()
        for filters, weight in ((self.encode_filter, basis / std), (self.decode_filter, basis * std)):
            margin = (filters.kernel_size[0] - 8) // 2
            filters.weight.mul_(0.02)
            filters.weight[:, :, margin : margin + 8, margin : margin + 8] = weight.T.view(channels, 3, 8, 8)
        assert self.encode_filter.bias is not None
        assert self.decode_filter.bias is not None
        self.encode_filter.bias.copy_(-(mean @ basis) / std)
        self.decode_filter.bias.copy_(mean.view(3, 64).mean(1))


def head_of(config: ModuleType, purpose: str) -> TokenHead:
    """A head that names the class and the colour on every token, its weights drawn from the recipe's seed."""
    sizes = (len(CLASSES), len(COLOURS))
    with torch.random.fork_rng():  # torch's layers draw from the global generator before ours fills them
        return TokenHead(config.MODEL["latent_channels"], sizes, keyed(config.SEED, purpose + " head"))


Pixels = np.ndarray | torch.Tensor  # uint8 [n, H, W, 3]


@torch.no_grad()
def statistics(
    encode: Callable[[Pixels], torch.Tensor], config: ModuleType, rendered: Pixels | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance [4c] of the token channels over the first STATISTICS_SCENES training scenes, summed in float64.

    `rendered`: pixels uint8 [n, H, W, 3] of the scenes from seed 0 on, where they are at hand.
    """
    world, count = World(), config.STATISTICS_SCENES
    total, tokens = torch.zeros(2, 4 * config.MODEL["latent_channels"], dtype=torch.float64), 0
    for start in range(0, count, 250):
        stop = min(start + 250, count)
        if rendered is not None and stop <= len(rendered):
            pixels = rendered[start:stop]
        else:
            pixels = world.batch(list(range(start, stop)), config.SIDE, config.SIDE)[1]
        rows = patchify(encode(pixels)).flatten(0, 1).double().cpu()
        total += torch.stack([rows.sum(0), rows.pow(2).sum(0)])
        tokens += len(rows)
    mean, square = total / tokens
    return mean.float(), (square - mean.pow(2)).float()


class Latents:
    """The frozen latent space of a stage folder: pixels -> normalised tokens, as the released VAE's mode would give them.

    Either `codec.pt` (the linear codec) or `joint.pt` (the trained encoder's posterior mode; averaged weights) or a VAE in
    the released layout: the same calls serve all. Errors: a folder with two of them, with none, or with a joint training
    that is not finished.
    """

    EPS = 1e-4  # batch_norm_eps of the released layout

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.vae: Any = None  # an AutoencoderKLFlux2
        self.codec: LinearCodec | None = None
        self.mean: torch.Tensor
        self.var: torch.Tensor
        if (folder / "config.json").is_file():
            self.vae = load_vae(folder, torch.float32, "cpu").requires_grad_(False).to(self.device)
            statistics = self.vae.bn
            self.mean, self.var = statistics.running_mean, statistics.running_var
            return
        if (folder / "joint.pt").is_file():
            if (folder / "codec.pt").is_file():
                raise ValueError(
                    f"Latents: {folder} holds codec.pt and joint.pt, expected one latent space in a folder"
                )
            state = load_state(folder / "joint.pt", "vae joint")
            if state["mean"] is None:
                raise ValueError(
                    f"Latents: {folder / 'joint.pt'} is at step {state['step']}, expected a finished training"
                )
            self.vae = autoencoder(state["shape"], 0).eval().requires_grad_(False).to(self.device)
            for name, parameter in self.vae.named_parameters():
                parameter.copy_(state["ema"]["average"][f"vae.{name}"])
        else:
            state = load_state(folder / "codec.pt", "vae codec")
            self.codec = LinearCodec(*state["shape"])
            self.codec.load_state_dict(state["model"])
            self.codec.eval().requires_grad_(False).to(self.device)
        self.mean, self.var = state["mean"].to(self.device), state["var"].to(self.device)

    @torch.no_grad()
    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] in [-1, 1] -> latents [n, c, H/8, W/8]."""
        if self.codec is not None:
            return self.codec.encode(x)
        return self.vae.encode(x).latent_dist.mode()

    @torch.no_grad()
    def straighten(self, world: World, side: int, scenes: int = 1_024, least: float = 0.99) -> float:
        """Encode by one strided convolution instead of the VAE's encoder, which is many times slower, where it can: the
        encoder of a CPU recipe was regressed onto such a code, and least squares over the scenes find it again.

        Returns the share of the encoder's variance that the convolution explains on other scenes; below `least` nothing
        changes. 16x16 pixels at stride 8, the window of the recipe's own codec.
        """
        channels = self.vae.config.latent_channels

        def rows(seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
            x = to_model(world.batch(list(seeds), side, side)[1]).to(self.device)
            z = torch.cat([self.latents(part) for part in x.split(32)]).permute(0, 2, 3, 1).reshape(-1, channels)
            windows = F.unfold(x, 16, padding=4, stride=8).transpose(1, 2).flatten(0, 1)
            return torch.cat([windows, windows.new_ones(len(windows), 1)], 1).double(), z.double()

        (a, b), (c, d) = rows(range(scenes)), rows(range(VALIDATION_SEED, VALIDATION_SEED + scenes // 8))
        gram = a.T @ a
        ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        found = torch.linalg.solve(gram + ridge, a.T @ b)
        share = 1 - ((d - c @ found).pow(2).sum() / (d - d.mean(0)).pow(2).sum()).item()
        if share >= least:
            self.codec = LinearCodec(channels, 16, 16).eval().requires_grad_(False).to(self.device)
            self.codec.whiten = nn.Identity()
            self.codec.encode_filter.weight.copy_(found[:-1].T.reshape(channels, 3, 16, 16))
            assert self.codec.encode_filter.bias is not None
            self.codec.encode_filter.bias.copy_(found[-1])
        return share

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [n, c, h, w] -> [n, 3, 8h, 8w]: the trained decoder, or the codec's inverse."""
        if self.codec is None or self.vae is not None:
            return self.vae.decode(z, return_dict=False)[0]
        return self.codec.decode(z)

    @torch.no_grad()
    def encode(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 [n, H, W, 3] (array, or tensor on any device) -> normalised tokens float32 [n, H/16 * W/16, 4c]."""
        z = patchify(self.latents(to_model(pixels).to(self.device)))
        return (z - self.mean) / torch.sqrt(self.var + self.EPS)

    def denormalise(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Normalised tokens of a height x width token grid -> latents [n, c, 2 height, 2 width] for the decoder."""
        return unpatchify(tokens * torch.sqrt(self.var + self.EPS) + self.mean, (height, width))
