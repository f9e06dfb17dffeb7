"""Whole pictures and their stages: e2e/<lens | turbo>/<side | mixed>/b<batch | queue>/<dtype>/<stage>.

`LensPipeline` as a user calls it, on random weights: prompt to pixels as an array, tokenising and image files left out.
Stages: total; denoise, text, decode by themselves; host and host_total, the CPU's share (work/host.py); first and
first_latents, right after loading; stream, many pictures (work/throughput.py). The reference is the loop of comparator
(a) around the same encoder and decoder, the exact one of comparator (c). e2e/mini/64/b8 draws with the weights that ship.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lens import LensPipeline
from lens.cost import step_flops, step_traffic_bytes
from lens.ops import backend
from lens.text_encoder import PREFIX_TOKENS
from lens.vae import PixelCodec

from ..case import OURS, Case, LeftOut, Subject, Work
from ..work import host, throughput
from ..work.comparators import compiled
from ..work.drawing import BOUND, DrawingSetup, NoEncoder, way
from ..work.scale import Grid, Scale

SUBJECTS = {
    "total": (OURS, "exact_compiled", "reference_eager"),
    "denoise": (OURS, "exact_compiled", "reference_eager", "reference_compiled"),
    "text": (OURS,),
    "decode": (OURS, "eager", "compiled"),
    "host": host.SUBJECTS,
    "host_total": (OURS,),
    "first": (OURS,),
    "first_latents": (OURS,),
    "stream": throughput.SUBJECTS,
}


MINI_SUBJECTS = (OURS, "spec_eager")


def _denoise(d: DrawingSetup) -> Work:
    pipe: Any = d.pipeline(NoEncoder(), None)
    left_out: dict[str, str] = {}
    subjects = {}

    def ours(noise: list[Tensor], features: list[Tensor]) -> list[Tensor]:
        return list(pipe(prompt_embeds=features, sizes=d.sizes, latents=noise, output_type="latent").images)

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


def _text(d: DrawingSetup) -> Work:
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


def _decode(d: DrawingSetup) -> Work:
    import copy

    from ..case import wider

    def by(codec: PixelCodec) -> Callable[..., list[Tensor]]:
        return lambda noise: [codec.decode(n, g) for n, g in zip(noise, d.grids)]

    def wide(noise: list[Tensor]) -> Tensor:
        return PixelCodec(copy.deepcopy(d.codec.vae).to(wider(d.scale.dtype))).decode(noise[0], d.grids[0])

    eager, fused = PixelCodec(d.codec.vae), PixelCodec(d.codec.vae)
    eager.vae, fused.vae = _By(d.codec.vae, d.codec.vae.decode), _By(d.codec.vae, compiled(d.codec.vae.decode))
    subjects = {OURS: d.codec, "eager": eager, "compiled": fused}
    flops, moves = d.work_of_decode()
    return Work(
        inputs=[(d.noise(turn),) for turn in range(2)],
        subjects={name: Subject(by(codec), mode="stream") for name, codec in subjects.items()},
        oracle=wide,
        bound=0.1 if d.scale.dtype == torch.bfloat16 else 1e-3,
        flops=flops,
        bytes=moves,
        select=lambda images: images[0],
    )


class _By:
    """An autoencoder of which our decoder sees no module: what decodes is diffusers' own, or that compiled."""

    def __init__(self, vae: Any, decode: Callable[..., Any]):
        self.decode, self.bn, self.config = decode, vae.bn, vae.config


def _total(d: DrawingSetup) -> Work:
    """Prompt to pixels. Left out where diffusers is missing; the stages before it have cases of their own."""
    codec = d.codec  # first: where diffusers is missing, no encoder is made for nothing
    pipe: Any = d.pipeline(d.encoder, codec)

    def ours(noise: list[Tensor], prompts: list[str]) -> list[Tensor]:
        images = pipe(prompts, sizes=d.sizes, latents=noise, output_type="np").images
        return [torch.from_numpy(image) for image in images]

    subjects = {OURS: Subject(ours, mode="stream")}
    subjects["reference_eager"] = Subject(d.pixels(d.reference()), mode="stream")
    left_out = {}
    try:
        subjects["exact_compiled"] = Subject(d.pixels(d.exact()), mode="stream")
    except LeftOut as reason:
        left_out["exact_compiled"] = str(reason)
    inputs = [(d.noise(turn), d.prompts(turn)) for turn in range(2)]
    first: Callable[[Any], Any] = lambda pictures: pictures[0]  # noqa: E731
    return Work(
        inputs, subjects, lambda *a: first(d.pixels(d.reference())(*a)), BOUND[d.scale.dtype], *d.work(),
        select=first, left_out=left_out, more={"images": len(d.grids)},
    )  # fmt: skip


STAGE: dict[str, Callable[[DrawingSetup], Work]] = {
    "total": _total,
    "denoise": _denoise,
    "text": _text,
    "decode": _decode,
    "host": host.denoise,
    "host_total": host.total,
    "first": host.first,
    "first_latents": host.first_latents,
}


def _mini(device: torch.device) -> Work:
    """Eight 64 x 64 pictures of the shipped Lens-Mini, 20 steps with guidance, weights loaded. The oracle draws the
    first alone. spec_eager: the same pipeline with every op as its specification in plain PyTorch."""
    pipe: Any = LensPipeline.from_pretrained("mini", device=device)
    colours = ("red", "blue", "green", "pink", "white", "black", "yellow", "orange")

    def draw(thing: str, count: int = 8) -> Any:
        prompts = [f"a {colour} {thing}" for colour in colours[:count]]
        out = pipe(prompts, seed=0, num_inference_steps=20, guidance_scale=3.0, output_type="np")
        return torch.from_numpy(out.images)

    config = pipe.transformer.config

    def draw_by_specification(thing: str) -> Any:
        with backend.use("reference"):
            return draw(thing)

    images, texts = [16] * 16, [12] * 8 + [0] * 8
    return Work(
        inputs=[("apple",), ("star",)],
        subjects={OURS: Subject(draw, mode="stream"), "spec_eager": Subject(draw_by_specification, mode="stream")},
        oracle=lambda thing: draw(thing, 1)[0],
        bound=1e-6 if device.type == "cpu" else 0.2,
        flops=20 * sum(step_flops(config, images, texts).values()),
        bytes=20 * step_traffic_bytes(config, images, texts, pipe.dtype.itemsize),
        select=lambda images: images[0],
        note="FLOPs of the transformer alone, 12 text tokens assumed",
    )


def cases(scale: Scale, gpu: bool) -> list[Case]:
    """By value: one picture of the main size, in all and stage by stage; the host, the first picture; many pictures;
    batches; the large size; mixed sizes. Mini anywhere; on a CPU besides it one decode at 512x512, without Inductor, which
    compiles for minutes."""
    if not gpu and not scale.tiny:

        def decode(device: torch.device) -> Work:
            return _decode(DrawingSetup(scale, device, "turbo", [scale.sizes[512]], scale.texts[-2]))

        return [
            Case("e2e/mini/64/b8/fp32/total", MINI_SUBJECTS, _mini),
            Case(f"e2e/turbo/512/b1/{scale.dtype_name}/decode", (OURS, "eager"), decode),
        ]
    main, large = scale.sizes[scale.main], scale.sizes[scale.large]
    mixed, text = list(scale.sizes.values()), scale.texts[-2]
    found: list[Case] = []

    def add(variant: str, label: str, stage: str, prepare: Callable[[torch.device], Work], rounds: int = 2) -> None:
        id = f"{scale.prefix}e2e/{variant}/{label}/{scale.dtype_name}/{stage}"
        found.append(Case(id, SUBJECTS[stage], prepare, rounds))

    def draw(variant: str, label: str, grids: list[Grid], *stages: str) -> None:
        for stage in stages:

            def make(device: torch.device, stage: str = stage) -> Work:
                return STAGE[stage](DrawingSetup(scale, device, variant, grids, text))

            long = variant == "lens" or stage.startswith("first")
            add(variant, label, stage, make, rounds=5 if "host" in stage else 1 if long else 2)

    def stream(label: str, queue: list[Grid], batch: int, by: int) -> None:
        def make(device: torch.device) -> Work:
            return throughput.prepare(DrawingSetup(scale, device, "turbo", queue, text), batch, by)

        add("turbo", label, "stream", make, rounds=1)

    one = f"{scale.main}/b1"
    draw("turbo", one, [main], "total")
    draw("lens", one, [main], "total")
    draw("turbo", one, [main], "host", "denoise", "text", "decode")
    draw("lens", one, [main], "denoise", "host")
    draw("turbo", one, [main], "first_latents", "host_total")
    for batch in (4, 1, 8):
        stream(f"{scale.main}/b{batch}", [main] * batch * max(3, 8 // batch), batch, batch)
    stream("mixed/queue", mixed * 4, 8, 1)
    draw("turbo", one, [main], "first")
    for batch in (8, 4):
        draw("turbo", f"{scale.main}/b{batch}", [main] * batch, "total", "denoise", "text", "decode")
    draw("turbo", f"{scale.large}/b1", [large], "total", "denoise", "text", "decode")
    draw("lens", f"{scale.large}/b1", [large], "total", "denoise")  # text and decode are Turbo's
    draw("lens", one, [main], "text", "decode")  # the same again, under the other name
    draw("turbo", f"mixed/b{len(mixed)}", mixed, "total", "denoise", "text", "decode")
    draw("lens", f"mixed/b{len(mixed)}", mixed, "total", "denoise")
    for batch in (4, 8):
        draw("lens", f"{scale.main}/b{batch}", [main] * batch, "total", "denoise")
    if not scale.tiny:
        found.append(Case("e2e/mini/64/b8/bf16/total", MINI_SUBJECTS, _mini))
    return found
