"""The flow-matching loss of a micro-batch of the global stream: every draw is keyed by (seed, purpose, step, picture)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from lens.config import LensConfig
from lens.packing import Packing

from ..data.loader import STRIDE, ShardBatch
from ..loop.keys import keyed
from ..networks.generator import packing_of, packing_on
from . import flow_matching


def times(recipe: ModuleType, batch: ShardBatch) -> Tensor:
    """t = sigmoid(mu + sigma z) of every picture, float32 [B]; z from a key of its own (or its quantile, stratified)."""
    mu, count = flow_matching.mu_of(recipe.MU, batch.bucket.tokens), len(batch.lengths)
    samples = range(batch.slot * STRIDE, batch.slot * STRIDE + count)
    u = torch.cat(
        [torch.rand(1, generator=keyed(recipe.SEED, "time", batch.step, s), dtype=torch.float64) for s in samples]
    )
    if recipe.TIME_STRATIFIED:
        u = (torch.randperm(count, generator=keyed(recipe.SEED, "quantile", batch.step, batch.slot)) + u) / count
    return flow_matching.logit_normal(u, mu, recipe.TIME_SIGMA)


def noise(recipe: ModuleType, batch: ShardBatch) -> Tensor:
    """Like the latents; every picture's from a key of its own, drawn where the latents are."""
    like, first = batch.encoded[0], batch.slot * STRIDE
    return torch.stack(
        [
            torch.randn(
                like.shape[1:],
                generator=keyed(recipe.SEED, "noise", batch.step, first + i, like.device),
                device=like.device,
            )
            for i in range(len(like))
        ]
    )


class FlowMatching:
    """The loss of every picture, mean |v(x_t, t, text) - (eps - x0)|^2 over tokens and channels, and its time.

    Errors: ValueError where latents or text features are not what the MMDiT takes.
    """

    def __init__(self, recipe: ModuleType, shape: LensConfig):
        self.recipe, self.axes = recipe, shape.axes_dims_rope
        self.takes = shape.in_channels, (len(shape.selected_layer_index), shape.enc_hidden_dim)

    def __call__(self, model: nn.Module, batch: ShardBatch) -> tuple[Tensor, Tensor]:
        clean, features = batch.encoded
        if (given := (clean.shape[-1], tuple(features.shape[1:]))) != self.takes:
            words = [
                f"latents of {channels} channels and {f} x {e} text features"
                for channels, (f, e) in (given, self.takes)
            ]
            raise ValueError(
                f"the data has {words[0]}, the MMDiT takes {words[1]}: other networks than it was made for"
            )
        t = times(self.recipe, batch).to(clean.device)
        x, target = flow_matching.noised(clean, noise(self.recipe, batch), t)
        v = velocity(model, x, features, t, batch.lengths, batch.bucket.grid, self.axes)
        return flow_matching.loss(v, target), t


def velocity(
    model: nn.Module,
    x: Tensor,
    features: Tensor,
    t: Tensor,
    lengths: Sequence[int],
    grid: tuple[int, int],
    axes: tuple[int, ...],
) -> Tensor:
    """x [B, I, C], features [RT, F, E], t [B] -> [B, I, C]."""
    return model(x.flatten(0, 1), features, t, packing_for(x, lengths, grid, axes)).view_as(x)


def packing_for(x: Tensor, lengths: Sequence[int], grid: tuple[int, int], axes: tuple[int, ...]) -> Packing:
    """The plan of a batch of one grid, on the device of x [B, I, C]."""
    if x.device.type == "cpu":
        return packing_of(grid, tuple(lengths), axes)
    return packing_on(grid, list(lengths), axes, x.device)
