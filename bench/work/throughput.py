"""Many pictures through `LensPipeline.stream`: e2e/turbo/<side>/b<batch>/<dtype>/stream, e2e/turbo/mixed/queue/....

Ours decodes one batch while the next is denoised. `calls` draws the same requests by calls of the pipeline after one
another: in batches of the same size, or, for the queue of mixed sizes, picture by picture as they came. Pictures per
second: `images` of a row by its time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lens.request import Request

from ..case import OURS, Subject, Work
from .drawing import BOUND, DrawingSetup

CALLS = "calls"
SUBJECTS = (OURS, CALLS)


def prepare(d: DrawingSetup, batch: int, by: int) -> Work:
    """The requests of `d` in batches of at most `batch`, against calls of `by` pictures each. The oracle draws the last
    picture by the reference's loop."""
    codec = d.codec  # first: where diffusers is missing, no encoder is made for nothing
    pipe: Any = d.pipeline(d.encoder, codec)

    def seeds(turn: int) -> list[int]:
        return [d.seed(turn) + k for k in range(len(d.grids))]

    def ours(turn: int, prompts: list[str]) -> list[Tensor]:
        requests = [Request(p, size=size, seed=seed) for p, size, seed in zip(prompts, d.sizes, seeds(turn))]
        drawn = pipe.stream(requests, max_images=batch, output_type="np")
        return [torch.from_numpy(image) for _, image, _ in sorted(drawn, key=lambda one: one[0])]

    def calls(turn: int, prompts: list[str]) -> list[Tensor]:
        images = []
        for k in range(0, len(prompts), by):
            part = slice(k, k + by)
            made = pipe(prompts[part], sizes=d.sizes[part], seed=seeds(turn)[part], output_type="np")
            images += [torch.from_numpy(image) for image in made.images]
        return images

    def oracle(turn: int, prompts: list[str]) -> Tensor:
        last = replace(d, grids=d.grids[-1:])
        vars(last).update({part: getattr(d, part) for part in ("encoder", "codec", "transformer")})
        return last.pixels(last.reference())(d.noise(turn)[-1:], prompts[-1:])[0]

    return Work(
        inputs=[(turn, d.prompts(turn)) for turn in range(2)],
        subjects={OURS: Subject(ours, mode="stream"), CALLS: Subject(calls, mode="stream")},
        oracle=oracle,
        bound=BOUND[d.scale.dtype],
        flops=d.work()[0],
        bytes=d.work()[1],
        select=lambda images: images[-1],
        more={"images": len(d.grids)},
    )
