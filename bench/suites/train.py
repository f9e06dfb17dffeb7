"""A training step: train/<side>/b<batch>/<dtype>. Flow-matching loss, forward, backward, AdamW over all weights.

Every subject steps the same weights with the same optimiser; its learning rate is 0, which costs the same time and
leaves the weights as they were, so that all results can be compared. The reference recomputes its blocks in the
backward pass, because what eager PyTorch keeps of them does not fit a card of 141 GB. `ours_selective` and `ours_block` are
the trainer's model (train/networks/denoiser.py) with that much computed again: MFU does not count it, `peak_bytes` shows what it saves.
"tokens" of a row, image and text, over its time is the throughput.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lens.cost import step_flops, step_traffic_bytes, text_projection_flops
from lens.model import LensTransformer2DModel
from lens.packing import plan
from train.networks.denoiser import Denoiser

from ..case import OURS, Case, Subject, Work, generator, wider
from ..work import weights
from ..work.comparators import Exact, Reference
from ..work.denoiser import features_of
from ..work.scale import Scale

SUBJECTS = (OURS, "ours_selective", "ours_block", "exact_compiled", "reference_eager")
BOUND = {torch.bfloat16: 0.15, torch.float32: 2e-3}


def step_of(
    model: LensTransformer2DModel, optimiser: torch.optim.Optimizer, velocity: Callable[..., Tensor]
) -> Callable[..., Any]:
    """One training step by a way of computing the velocity; returns the loss and three gradients."""
    watched = (model.image_out, model.layers()[0].image.qkv, model.layers()[0].image.modulation)

    def step(latents: Tensor, target: Tensor, time: Tensor, features: list[Tensor]) -> Any:
        optimiser.zero_grad(set_to_none=True)
        v = velocity(latents, time, features)
        loss = F.mse_loss(v.to(target.dtype), target)
        loss.backward()
        optimiser.step()
        return loss, [layer.weight.grad for layer in watched]

    return step


def ways(model: LensTransformer2DModel, scale: Scale, size: int, batch: int, text: int) -> dict[str, Any]:
    """(latents [B, I, C], time [B], features F of [B, T, E]) -> velocity [B, I, C], by name."""
    grid, texts = scale.sizes[size], [text] * batch
    packing = plan([grid] * batch, texts, scale.config.axes_dims_rope, model.device)
    lengths = ((grid[0] * grid[1],) * batch, (text,) * batch)

    def ours(x: Tensor, time: Tensor, features: list[Tensor]) -> Tensor:
        rows = model.project_text([f.flatten(0, 1) for f in features], texts)
        return model.denoise(x.flatten(0, 1).to(model.dtype), rows, model.modulate(time), packing).view_as(x)

    def exact(compile: bool, recompute: bool) -> Callable[..., Tensor]:
        way = Exact(model, compile, recompute)
        tables = way.tables([grid] * batch, texts, model.dtype)

        def velocity(x: Tensor, time: Tensor, features: list[Tensor]) -> Tensor:
            rows = model.project_text([f.flatten(0, 1) for f in features], texts)
            table = model.modulate(time)
            blocks, final = table.blocks.permute(1, 2, 3, 0, 4), table.final.transpose(0, 1)
            return way(x.flatten(0, 1).to(model.dtype), rows, blocks, final, tables, lengths).view_as(x)

        return velocity

    def reference(x: Tensor, time: Tensor, features: list[Tensor]) -> Tensor:
        mask = torch.ones(features[0].shape[:2], dtype=torch.bool, device=x.device)
        return Reference(model, recompute=True)(x, features, mask, time, grid)

    def recomputed(what: str) -> Callable[..., Tensor]:
        with torch.device("meta"):
            twin = Denoiser(scale.config, model.dtype, what).train()
        twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)  # the very same parameters

        def velocity(x: Tensor, time: Tensor, features: list[Tensor]) -> Tensor:
            rows = torch.stack([f.flatten(0, 1) for f in features], 1)
            return twin(x.flatten(0, 1), rows, time, packing).view_as(x)

        return velocity

    return {OURS: ours, "recomputed": recomputed, "exact": exact, "reference_eager": reference}


def prepare(scale: Scale, size: int, batch: int, device: torch.device) -> Work:
    """All weights train; gradients of the wide oracle come from recomputed blocks."""
    model = weights.transformer(scale.config, device, scale.dtype).train().requires_grad_(True)
    text, tokens = scale.texts[-2], scale.tokens(size)
    inputs = []
    for turn in range(2):
        g = generator(device, "train", turn)
        x, target = (torch.randn((batch, tokens, scale.config.in_channels), generator=g, device=device) for _ in "xy")
        samples = [features_of(scale, text, device, "train", turn, k) for k in range(batch)]
        features = [torch.stack(layer) for layer in zip(*samples)]
        inputs.append((x, target, torch.rand(batch, generator=g, device=device), features))

    def oracle(x: Tensor, target: Tensor, time: Tensor, features: list[Tensor]) -> Any:
        wide = wider(scale.dtype)
        twin = copy.deepcopy(model).to(wide)
        velocity = ways(twin, scale, size, batch, text)["exact"](False, True)
        with torch.enable_grad():
            loss = F.mse_loss(velocity(x.to(wide), time, [f.to(wide) for f in features]), target.to(wide))
            loss.backward()
        return loss, [
            m.weight.grad for m in (twin.image_out, twin.layers()[0].image.qkv, twin.layers()[0].image.modulation)
        ]

    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, fused=device.type == "cuda")
    by = ways(model, scale, size, batch, text)
    velocities = {
        OURS: by[OURS],
        "ours_selective": by["recomputed"]("selective"),
        "ours_block": by["recomputed"]("block"),
        "exact_compiled": by["exact"](True, False),
        "reference_eager": by["reference_eager"],
    }
    images, texts = [tokens] * batch, [text] * batch
    config, item = scale.config, scale.dtype.itemsize
    forward = sum(step_flops(config, images, texts).values()) + text_projection_flops(config, text * batch)
    every = sum(p.numel() for p in model.parameters())
    return Work(
        inputs=inputs,
        subjects={n: Subject(step_of(model, optimiser, v), mode="stream", grad=True) for n, v in velocities.items()},
        oracle=oracle,
        bound=BOUND[scale.dtype],
        flops=3.0 * forward,
        bytes=3.0 * step_traffic_bytes(config, images, texts, item) + 8.0 * item * every,  # AdamW: w, m, v, gradient
        data=[p for p in model.parameters() if p.dim() > 1],
        note="FLOPs as three forwards; attention's backward counted as two",
        more={"tokens": batch * (tokens + text)},
    )


def cases(scale: Scale, gpu: bool) -> list[Case]:
    """The paper's first stages."""
    found = []
    for size, batch in scale.train if gpu or scale.tiny else ():

        def make(device: torch.device, size: int = size, batch: int = batch) -> Work:
            return prepare(scale, size, batch, device)

        found.append(Case(f"{scale.prefix}train/{size}/b{batch}/{scale.dtype_name}", SUBJECTS, make, rounds=2))
    return found
