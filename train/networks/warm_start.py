"""Weights trained in one latent space, carried over to another.

A codec that is trained again spans nearly the same pictures in another basis. Where the old normalised tokens are close to
a linear map of the new ones, `z_old = z_new M`, a generator needs no new start: its input layer reads `M` first, its
output layer is followed by the inverse, and everything between keeps what it has learned. The noise is not quite white
in the old basis then, which the first few hundred steps of training put right.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lens.config import LensConfig
from lens.model import LensTransformer2DModel
from lens.vae import PixelCodec

from ..data.small_world.world import World
from .codec import Latents, to_model

SCENES = 1_024  # 16 tokens each: many more rows than the map has columns


def latent_map(old: Tensor, new: Tensor) -> tuple[Tensor, float]:
    """Tokens [n, C] of the same pictures in two spaces -> (M [C, C] with old ~ new M, share of old's energy explained).

    Errors: ValueError where the shapes differ.
    """
    if old.shape != new.shape:
        raise ValueError(f"latent_map: old tokens {tuple(old.shape)}, new {tuple(new.shape)}; expected equal shapes")
    solution = torch.linalg.lstsq(new.double(), old.double()).solution
    rest = (old.double() - new.double() @ solution).pow(2).sum() / old.double().pow(2).sum()
    return solution.float(), 1 - rest.item()


@torch.no_grad()
def rebase(transformer: LensTransformer2DModel, m: Tensor) -> None:
    """Fold z_old = z_new M into the first and last layer: W_in <- W_in M^T; velocities <- velocities M^-1."""
    inverse = torch.linalg.inv(m.double())
    image, out = transformer.image_in, transformer.image_out
    image.weight.copy_(image.weight.double() @ m.double().T)
    out.weight.copy_(inverse.T @ out.weight.double())
    out.bias.copy_(out.bias.double() @ inverse)


@torch.no_grad()
def rebase_latents(
    transformer: LensTransformer2DModel, source: Path, latents: Latents, world: World, side: int
) -> float:
    """Carry a generator of the checkpoint folder `source` over to the space of `latents`; returns the share explained."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2.from_pretrained(source / "vae", torch_dtype=torch.float32).eval()
    codec = PixelCodec(vae)
    _, pixels = world.batch(list(range(SCENES)), side, side)
    old = torch.cat([codec.encode(picture) for picture in to_model(pixels).permute(0, 2, 3, 1)])
    m, share = latent_map(old, latents.encode(pixels).flatten(0, 1))
    rebase(transformer, m)
    return share


@torch.no_grad()
def widened(small: LensTransformer2DModel, config: LensConfig, generator: torch.Generator) -> LensTransformer2DModel:
    """A wider generator that draws what `small` draws: more channels and heads of the same head size, as many blocks or more.

    New residual channels begin at zero and are read by random weights; what writes them, new heads and new hidden units are
    read by zero weights. So the function is kept while every new weight but those has a gradient. RMS norms then see the same
    energy over more channels, which their weights take back; the final LayerNorm's mean is the one thing that moves a little.
    New blocks follow the old ones with gates of zero. Errors: ValueError where the head sizes or the encoders differ.
    """
    old = small.config
    same = (
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "enc_hidden_dim",
        "selected_layer_index",
        "axes_dims_rope",
    )
    if other := [name for name in same if getattr(old, name) != getattr(config, name)]:
        raise ValueError(f"widened: {', '.join(other)} of the two configurations differ, expected the same")
    if config.inner_dim < old.inner_dim or config.num_layers < old.num_layers:
        raise ValueError(f"widened: {config.inner_dim} x {config.num_layers} is smaller than what it starts from")
    wide = LensTransformer2DModel(config)
    wide.init_weights(generator)
    d, hidden, keep = old.inner_dim, old.mlp_hidden_dim, (old.inner_dim / config.inner_dim) ** 0.5

    def write(into: nn.Linear, source: nn.Linear, groups: int = 1, read: int | None = None, scale: float = 1.0) -> None:
        """Old rows (in `groups` equal parts) and columns; new rows write nothing unless they are `read` nowhere."""
        rows, columns = source.weight.shape[0] // groups, source.weight.shape[1]
        weight = into.weight.view(groups, -1, into.weight.shape[1])
        if read is None:
            weight[:, rows:] = 0.0
        weight[:, :rows, columns:] *= 0.0 if read == 0 else 1.0
        weight[:, :rows, :columns] = source.weight.view(groups, rows, columns) * scale
        if into.bias is not None:
            bias = into.bias.view(groups, -1)
            bias[:] = 0.0
            bias[:, :rows] = source.bias.view(groups, rows)

    # what the residual streams begin with, and what the time is told by
    write(wide.image_in, small.image_in)
    write(wide.text_in, small.text_in)
    for new, norm in zip(wide.text_norms, small.text_norms):
        new.copy_(norm)
    write(wide.time_embedding.linear_1, small.time_embedding.linear_1, read=1)
    wide.time_embedding.linear_2.weight[:, d:] = 0.0
    write(wide.time_embedding.linear_2, small.time_embedding.linear_2, read=0)
    # blocks: new channels are read by random weights and written by zeros
    for block, source in zip(wide.layers(), small.layers()):
        for stream, own in zip(block.streams(), source.streams()):
            write(stream.modulation, own.modulation, 6)
            stream.modulation.weight[:, d:] = 0.0
            gates = stream.modulation.bias.view(6, -1)[[2, 5], d:]
            stream.modulation.bias.view(6, -1)[[2, 5], d:] = torch.full_like(gates, 0.5)
            for name in ("norm1", "norm2"):
                getattr(stream, name)[:d] = getattr(own, name) * keep
            write(stream.qkv, own.qkv, 3, read=1)
            stream.q_norm.copy_(own.q_norm)
            stream.k_norm.copy_(own.k_norm)
            stream.out.weight[:d, d:] = 0.0
            write(stream.out, own.out)
            stream.out.weight[:d, d:] = 0.0
            write(stream.w13, own.w13, 2, read=1)
            write(stream.w2, own.w2)
            stream.w2.weight[:d, hidden:] = 0.0
    # the way out: the norm's mean over more channels is taken back
    write(wide.final_modulation, small.final_modulation, 2)
    wide.final_modulation.weight[:, d:] = 0.0
    for tensor in (wide.final_modulation.weight, wide.final_modulation.bias):
        tensor[config.inner_dim :] /= keep  # the shift, which `image_out` scales with the rest
    write(wide.image_out, small.image_out, scale=keep)
    return wide
