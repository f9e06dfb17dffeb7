"""Whole pictures and their stages: e2e/<lens | turbo>/<side | mixed>/b<batch>/<dtype>/<total | denoise | text | decode>.

`LensPipeline` as a user calls it, on random weights: prompt to pixels as an array, tokenising and image files left out.
The reference is the loop of comparator (a) around the same encoder and decoder, the exact one of comparator (c).
e2e/mini/64/b8 draws with the weights that ship.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lens import LensPipeline, sampler
from lens.config import Defaults
from lens.text_encoder import PREFIX_TOKENS, TextEncoder
from lens.vae import PixelCodec

from .. import weights
from ..case import OURS, Case, LeftOut, Subject, Work
from ..comparators import Exact, Reference, compiled, exact_step, reference_step
from ..roofline import decoder_flops, encoder_flops, moved, step_bytes, step_flops, text_projection_flops
from .scale import Grid, Scale

# relative L2 distance of two implementations over a whole schedule; the latents' way from the noise is compared, not the
# latents, most of which is the noise. The suite `step` holds every subject to wider arithmetic.
BOUND = {torch.bfloat16: 0.1, torch.float32: 5e-3}
STAGES = {
    "total": (OURS, "exact_compiled", "reference_eager"),
    "denoise": (OURS, "exact_compiled", "reference_eager", "reference_compiled"),
    "text": (OURS,),
    "decode": (OURS, "compiled"),
}
GUIDANCE = {"lens": 5.0, "turbo": 1.0}


class NoEncoder:
    """Stands in where features are given: it encodes no prompts, and there are none."""

    def encode(self, prompts: list[str], *_: object) -> list[Any]:
        if prompts:
            raise ValueError(f"bench.suites.e2e: this pipeline has no text encoder, got {len(prompts)} prompts")
        return []


@dataclass
class Drawing:
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
        return TextEncoder(weights.IdTokenizer(model.config.vocab_size, PREFIX_TOKENS), model, layers)

    @cached_property
    def codec(self) -> PixelCodec:
        return PixelCodec(weights.autoencoder(self.device, self.scale.dtype, self.scale.tiny))

    @cached_property
    def transformer(self) -> Any:
        return weights.transformer(self.scale.config, self.device, self.scale.dtype)

    def pipeline(self, encoder: Any, codec: Any) -> LensPipeline:
        """The real pipeline; a stage that is not timed may be absent."""
        defaults = Defaults(self.variant, self.steps, self.guidance)
        return LensPipeline(self.transformer, encoder, codec, sampler.Scheduler(), defaults)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(16 * h, 16 * w) for h, w in self.grids]

    def prompts(self, turn: int) -> list[str]:
        """Prompts of the text's length, one per picture, others every turn."""
        spell = weights.IdTokenizer(self.encoder.model.config.vocab_size, PREFIX_TOKENS)
        return [spell.prompt(self.text, 1000 * turn + k) for k in range(len(self.grids))]

    def noise(self, turn: int) -> list[Tensor]:
        shapes = [(h * w, self.scale.config.in_channels) for h, w in self.grids]
        return [n.to(self.device) for n in sampler.start_noise(shapes, 100 * turn + 1, None, None)[0]]

    def features(self, turn: int) -> list[Tensor]:
        """F tensors [B, T, E] of random features."""
        from .denoiser import features_of

        samples = [features_of(self.scale, self.text, self.device, "e2e", turn, k) for k in range(len(self.grids))]
        return [torch.stack(layer) for layer in zip(*samples)]

    def reference(self, compile: bool = False) -> Callable[[list[Tensor], list[Tensor]], list[Tensor]]:
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

    def exact(self) -> Callable[[list[Tensor], list[Tensor]], list[Tensor]]:
        """The same by comparator (c); one schedule, hence one size, per call."""
        if len(set(self.grids)) > 1:
            raise LeftOut("comparator (c) draws one size per call")
        from lens.modulation import TableCache

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

    def work_of_denoise(self) -> tuple[float, float]:
        """(FLOPs, bytes) of the whole schedule."""
        twice = 2 if self.guidance != 1.0 else 1
        images = [h * w for h, w in self.grids] * twice
        texts = [self.text] * len(self.grids) + [0] * (len(self.grids) * (twice - 1))
        config, item = self.scale.config, self.scale.dtype.itemsize
        flops = self.steps * sum(step_flops(config, images, texts).values())
        projected = text_projection_flops(config, self.text * len(self.grids))
        return flops + projected, self.steps * step_bytes(config, images, texts, item)

    def work_of_text(self) -> tuple[float, float]:
        config, depth = self.encoder.model.config, len(self.encoder.model.layers)
        flops = len(self.grids) * encoder_flops(config, PREFIX_TOKENS + self.text, depth)
        return flops, moved(list(self.encoder.model.parameters()))

    def work_of_decode(self) -> tuple[float, float]:
        flops = sum(decoder_flops(self.codec.vae.config, grid) for grid in self.grids)
        return flops, len(self.grids) * moved(list(self.codec.vae.decoder.parameters()))


def _denoise(d: Drawing) -> Work:
    pipe = d.pipeline(NoEncoder(), None)
    left_out: dict[str, str] = {}
    subjects = {}

    def ours(noise: list[Tensor], features: list[Tensor]) -> list[Tensor]:
        return list(pipe(prompt_embeds=features, sizes=d.sizes, latents=noise, output_type="latent").images)

    def way(draw: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        return lambda noise, features: [x - n for x, n in zip(draw(noise, features), noise)]

    subjects[OURS] = Subject(way(ours), mode="stream")
    subjects["reference_eager"] = Subject(way(d.reference()), mode="stream")
    subjects["reference_compiled"] = Subject(way(d.reference(compile=True)), mode="stream")
    try:
        subjects["exact_compiled"] = Subject(way(d.exact()))
    except LeftOut as reason:
        left_out["exact_compiled"] = str(reason)
    flops, moves = d.work_of_denoise()
    inputs = [(d.noise(turn), d.features(turn)) for turn in range(2)]
    first: Callable[[Any], Any] = lambda latents: latents[0]  # noqa: E731
    return Work(
        inputs, subjects, lambda *a: first(way(d.reference())(*a)), BOUND[d.scale.dtype], flops, moves,
        select=first, left_out=left_out,
    )  # fmt: skip


def _text(d: Drawing) -> Work:
    """Compared with the encoder's own hidden states; the last layer's only after its final norm, which is all it tells."""
    model = d.encoder.model

    def ours(prompts: list[str]) -> Any:
        return d.encoder.encode(prompts, 10**6, "reference", None)

    def select(found: Any) -> list[Tensor]:
        features = found[0]
        return [*features[:-1], model.norm(features[-1][None])[0]]

    @torch.no_grad()
    def oracle(prompts: list[str]) -> list[Tensor]:
        ids = torch.tensor([d.encoder.tokenizer.encode(prompts[0], 10**6, "reference", None)], device=d.device)
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        picked = [states[layer + 1] for layer in d.encoder.layers[:-1]] + [states[-1]]
        return [s[0, PREFIX_TOKENS:] for s in picked]

    flops, moves = d.work_of_text()
    inputs = [(d.prompts(turn),) for turn in range(2)]
    return Work(inputs, {OURS: Subject(ours, mode="stream")}, oracle, 2e-2, flops, moves, select=select)


def _decode(d: Drawing) -> Work:
    import copy

    from ..case import wider

    def by(codec: PixelCodec) -> Callable[..., list[Tensor]]:
        return lambda noise: [codec.decode(n, g) for n, g in zip(noise, d.grids)]

    def wide(noise: list[Tensor]) -> Tensor:
        return PixelCodec(copy.deepcopy(d.codec.vae).to(wider(d.scale.dtype))).decode(noise[0], d.grids[0])

    fused = PixelCodec(d.codec.vae)
    fused.vae = _Compiled(d.codec.vae)
    flops, moves = d.work_of_decode()
    return Work(
        inputs=[(d.noise(turn),) for turn in range(2)],
        subjects={OURS: Subject(by(d.codec), mode="stream"), "compiled": Subject(by(fused), mode="stream")},
        oracle=wide,
        bound=0.1 if d.scale.dtype == torch.bfloat16 else 1e-3,
        flops=flops,
        bytes=moves,
        select=lambda pictures: pictures[0],
    )


class _Compiled:
    """An autoencoder whose decode is compiled."""

    def __init__(self, vae: Any):
        self.decode = compiled(vae.decode)


def _total(d: Drawing) -> Work:
    """Prompt to pixels. Left out where diffusers is missing; the stages before it have cases of their own."""
    codec = d.codec  # first: where diffusers is missing, no encoder is made for nothing
    pipe = d.pipeline(d.encoder, codec)

    def ours(noise: list[Tensor], prompts: list[str]) -> list[Tensor]:
        images = pipe(prompts, sizes=d.sizes, latents=noise, output_type="np").images
        return [torch.from_numpy(image) for image in images]

    def around(denoise: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        def draw(noise: list[Tensor], prompts: list[str]) -> list[Tensor]:
            encoded = d.encoder.encode(prompts, 512, "reference", "2026-05-23")
            latents = denoise(noise, [torch.stack(layer) for layer in zip(*encoded)])
            return [(d.codec.decode(x, g).cpu() + 1) / 2 for x, g in zip(latents, d.grids)]

        return draw

    subjects = {OURS: Subject(ours, mode="stream")}
    subjects["reference_eager"] = Subject(around(d.reference()), mode="stream")
    left_out = {}
    try:
        subjects["exact_compiled"] = Subject(around(d.exact()), mode="stream")
    except LeftOut as reason:
        left_out["exact_compiled"] = str(reason)
    flops, moves = (sum(parts) for parts in zip(d.work_of_text(), d.work_of_denoise(), d.work_of_decode()))
    inputs = [(d.noise(turn), d.prompts(turn)) for turn in range(2)]
    first: Callable[[Any], Any] = lambda pictures: pictures[0]  # noqa: E731
    return Work(
        inputs, subjects, lambda *a: first(around(d.reference())(*a)), BOUND[d.scale.dtype], flops, moves,
        select=first, left_out=left_out,
    )  # fmt: skip


STAGE = {"total": _total, "denoise": _denoise, "text": _text, "decode": _decode}


def _mini(device: torch.device) -> Work:
    """Eight 64 x 64 pictures of the shipped Lens-Mini, 20 steps with guidance, weights loaded. The oracle draws the
    first alone."""
    pipe = LensPipeline.from_pretrained("mini", device=device)
    colours = ("red", "blue", "green", "pink", "white", "black", "yellow", "orange")

    def draw(thing: str, count: int = 8) -> Any:
        prompts = [f"a {colour} {thing}" for colour in colours[:count]]
        out = pipe(prompts, seed=0, num_inference_steps=20, guidance_scale=3.0, output_type="np")
        return torch.from_numpy(out.images)

    config = pipe.transformer.config
    images, texts = [16] * 16, [12] * 8 + [0] * 8
    return Work(
        inputs=[("apple",), ("star",)],
        subjects={OURS: Subject(draw, mode="stream")},
        oracle=lambda thing: draw(thing, 1)[0],
        bound=1e-6 if device.type == "cpu" else 0.2,
        flops=20 * sum(step_flops(config, images, texts).values()),
        bytes=20 * step_bytes(config, images, texts, pipe.dtype.itemsize),
        select=lambda pictures: pictures[0],
        note="FLOPs of the transformer alone, 12 text tokens assumed",
    )


def cases(scale: Scale, gpu: bool) -> list[Case]:
    """By value: both variants at the main size, stage by stage; batches; mixed sizes; the large size. Mini anywhere."""
    found = []
    main, large = scale.sizes[scale.main], scale.sizes[scale.large]
    mixed = list(scale.sizes.values())
    drawings: list[tuple[str, str, list[Grid]]] = [(v, f"{scale.main}/b1", [main]) for v in ("lens", "turbo")]
    drawings += [("turbo", f"{scale.main}/b{b}", [main] * b) for b in (8, 4)]
    drawings += [("turbo", f"{scale.large}/b1", [large]), ("lens", f"{scale.large}/b1", [large])]
    drawings += [(v, f"mixed/b{len(mixed)}", mixed) for v in ("turbo", "lens")]
    drawings += [("lens", f"{scale.main}/b{b}", [main] * b) for b in (4, 8)]
    text = scale.texts[-2]
    for variant, label, grids in drawings if gpu or scale.tiny else []:
        for stage, subjects in STAGES.items():
            if variant == "lens" and stage in ("text", "decode") and ("lens", label) != drawings[0][:2]:
                continue  # the same as Turbo's

            def make(
                device: torch.device, stage: str = stage, variant: str = variant, grids: list[Grid] = grids
            ) -> Work:
                return STAGE[stage](Drawing(scale, device, variant, grids, text))

            id = f"{scale.prefix}e2e/{variant}/{label}/{scale.dtype_name}/{stage}"
            found.append(Case(id, subjects, make, rounds=2))
    if not scale.tiny:
        found.append(Case(f"e2e/mini/64/b8/{'bf16' if gpu else 'fp32'}/total", (OURS,), _mini))
    return found
