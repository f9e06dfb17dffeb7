"""One call of the pipeline on random weights: its parts, its inputs, and the reference's loop around the same parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lens import LensPipeline, sampler
from lens.config import Defaults
from lens.cost import decoder_flops, encoder_flops, step_flops, step_traffic_bytes, text_projection_flops
from lens.engine.schedule_table import TableCache
from lens.text_encoder import PREFIX_TOKENS, TextEncoder
from lens.vae import PixelCodec

from ..case import LeftOut
from ..roofline import moved
from . import weights
from .comparators import Exact, Reference, exact_step, reference_step
from .denoiser import features_of
from .scale import Grid, Scale

GUIDANCE = {"lens": 5.0, "turbo": 1.0}
# relative L2 distance of two implementations over a whole schedule; the latents' way from the noise is compared, not the
# latents, most of which is the noise. The suite `step` holds every subject to wider arithmetic.
BOUND = {torch.bfloat16: 0.1, torch.float32: 5e-3}
Loop = Callable[[list[Tensor], list[Tensor]], list[Tensor]]  # (noise, features) -> latents


class NoEncoder:
    """Stands in where features are given: it encodes no prompts, and there are none."""

    width = 0  # of activations that it never has

    def encode(self, prompts: list[str], *_: object) -> list[Any]:
        if prompts:
            raise ValueError(f"bench.suites.e2e: this pipeline has no text encoder, got {len(prompts)} prompts")
        return []


class Prepared:
    """Knows its prompts' features already: what is left of a call is the denoiser's."""

    width = 0

    def __init__(self, features: dict[str, list[Tensor]]):
        self.features = features

    def encode(self, prompts: list[str], *_: object) -> list[list[Tensor]]:
        return [self.features[prompt] for prompt in prompts]


def way(draw: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """The same loop, telling the latents' way from the noise, its first argument."""
    return lambda noise, *rest: [x - n for x, n in zip(draw(noise, *rest), noise)]


@dataclass
class DrawingSetup:
    """One call of the pipeline: `grids` pictures with a text of `text` tokens each."""

    scale: Scale
    device: torch.device
    variant: str
    grids: list[Grid]
    text: int

    @property
    def steps(self) -> int:
        return self.scale.steps[self.variant]

    @property
    def guidance(self) -> float:
        return GUIDANCE[self.variant]

    @cached_property
    def encoder(self) -> TextEncoder:
        layers = self.scale.config.selected_layer_index
        model = weights.text_encoder(self.device, self.scale.dtype, self.scale.tiny, max(layers) + 1)
        tokenizer: Any = weights.IdTokenizer(model.config.vocab_size, PREFIX_TOKENS)
        return TextEncoder(tokenizer, model, layers)

    @cached_property
    def codec(self) -> PixelCodec:
        return PixelCodec(weights.autoencoder(self.device, self.scale.dtype, self.scale.tiny))

    @cached_property
    def transformer(self) -> Any:
        return weights.transformer(self.scale.config, self.device, self.scale.dtype)

    def pipeline(self, encoder: Any, codec: Any) -> LensPipeline:
        """The real pipeline; a stage that is not timed may be absent."""
        defaults = Defaults(self.variant, self.steps, self.guidance)
        parts = self.transformer, encoder, codec, sampler.Scheduler()
        return LensPipeline(*parts, defaults, batch_invariant=False)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(16 * h, 16 * w) for h, w in self.grids]

    def prompts(self, turn: int) -> list[str]:
        """Prompts of the text's length, one per picture, others every turn."""
        spell = weights.IdTokenizer(self.encoder.model.config.vocab_size, PREFIX_TOKENS)
        return [spell.prompt(self.text, 1000 * turn + k) for k in range(len(self.grids))]

    def seed(self, turn: int) -> int:
        return 100 * turn + 1

    def noise(self, turn: int) -> list[Tensor]:
        """What the seed draws."""
        shapes = [(h * w, self.scale.config.in_channels) for h, w in self.grids]
        return [n.to(self.device) for n in sampler.start_noise(shapes, self.seed(turn), None, None)[0]]

    def prepared(self, turns: int) -> Prepared:
        """An encoder of invented prompts "<turn> <k>"."""
        known = {}
        for turn in range(turns):
            for k, sample in enumerate(zip(*self.features(turn))):
                known[f"{turn} {k}"] = list(sample)
        return Prepared(known)

    def features(self, turn: int) -> list[Tensor]:
        """F tensors [B, T, E] of random features."""
        samples = [features_of(self.scale, self.text, self.device, "e2e", turn, k) for k in range(len(self.grids))]
        return [torch.stack(layer) for layer in zip(*samples)]

    def pixels(self, denoise: Loop) -> Callable[[list[Tensor], list[str]], list[Tensor]]:
        """(noise, prompts) -> pictures in [0, 1], by a loop between the pipeline's encoder and decoder."""

        def draw(noise: list[Tensor], prompts: list[str]) -> list[Tensor]:
            encoded = self.encoder.encode(prompts, 512, "reference", "2026-05-23")
            latents = denoise(noise, [torch.stack(layer) for layer in zip(*encoded)])
            return [(self.codec.decode(x, g).cpu() + 1) / 2 for x, g in zip(latents, self.grids)]

        return draw

    def reference(self, compile: bool = False) -> Loop:
        """(noise, features) -> latents, by the reference's loop; pictures of one size share its doubled batch."""
        reference = Reference(self.transformer, compile)

        def draw(grid: Grid, x: Tensor, features: list[Tensor]) -> Tensor:
            sigma = sampler.sigmas(grid[0] * grid[1], self.steps)
            time = sampler.conditioning_time(sigma[:-1], self.scale.dtype)
            mask = torch.ones(features[0].shape[:2], dtype=torch.bool, device=self.device)
            if self.guidance != 1.0:
                features = [torch.cat([f, torch.zeros_like(f)]) for f in features]
                mask = torch.cat([mask, torch.zeros_like(mask)])
            for i in range(self.steps):
                delta = sigma[i + 1] - sigma[i]
                x = reference_step(reference, x, features, mask, time[i].to(self.device), delta, self.guidance, grid)
            return x

        def loop(noise: list[Tensor], features: list[Tensor]) -> list[Tensor]:
            if len(set(self.grids)) == 1:
                return list(draw(self.grids[0], torch.stack(noise), features))
            alone = ([f[k : k + 1] for f in features] for k in range(len(noise)))
            return [draw(g, n[None], f)[0] for g, n, f in zip(self.grids, noise, alone)]

        return loop

    def exact(self) -> Loop:
        """The same by comparator (c); one schedule, hence one size, per call."""
        if len(set(self.grids)) > 1:
            raise LeftOut("comparator (c) draws one size per call")
        exact, grid, batch = Exact(self.transformer, compile=True), self.grids[0], len(self.grids)
        sigma = sampler.sigmas(grid[0] * grid[1], self.steps)
        time = sampler.conditioning_time(sigma[:-1], self.scale.dtype)
        table = TableCache().get(self.transformer, time)
        deltas = (sigma[1:] - sigma[:-1]).to(self.device)
        twice = 2 if self.guidance != 1.0 else 1
        texts = [self.text] * batch + [0] * (batch if twice == 2 else 0)
        images = [grid[0] * grid[1]] * batch * twice
        tables = exact.tables([grid] * len(texts), texts, self.scale.dtype)

        def loop(noise: list[Tensor], features: list[Tensor]) -> list[Tensor]:
            x = torch.cat(noise)
            text = self.transformer.project_text([f.flatten(0, 1) for f in features], [self.text] * batch)
            for i in range(self.steps):
                blocks, final = table.blocks[i][..., None, :], table.final[i][:, None]
                lengths = (tuple(images), tuple(texts))
                x = exact_step(exact, x, self.guidance, deltas[i], text, blocks, final, tables, lengths)
            return list(x.split(images[:batch]))

        return loop

    def work(self) -> tuple[float, float]:
        """(FLOPs, bytes) of prompt to pixels."""
        parts = self.work_of_text(), self.work_of_denoise(), self.work_of_decode()
        return sum(flops for flops, _ in parts), sum(moves for _, moves in parts)

    def work_of_denoise(self) -> tuple[float, float]:
        """(FLOPs, bytes) of the whole schedule."""
        twice = 2 if self.guidance != 1.0 else 1
        images = [h * w for h, w in self.grids] * twice
        texts = [self.text] * len(self.grids) + [0] * (len(self.grids) * (twice - 1))
        config, item = self.scale.config, self.scale.dtype.itemsize
        flops = self.steps * sum(step_flops(config, images, texts).values())
        projected = text_projection_flops(config, self.text * len(self.grids))
        return flops + projected, self.steps * step_traffic_bytes(config, images, texts, item)

    def work_of_text(self) -> tuple[float, float]:
        config, depth = self.encoder.model.config, len(self.encoder.model.layers)
        flops = len(self.grids) * encoder_flops(config, PREFIX_TOKENS + self.text, depth)
        return flops, moved(list(self.encoder.model.parameters()))

    def work_of_decode(self) -> tuple[float, float]:
        flops = sum(decoder_flops(self.codec.vae.config, grid) for grid in self.grids)
        return flops, len(self.grids) * moved(list(self.codec.vae.decoder.parameters()))
