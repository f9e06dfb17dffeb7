"""Many requests: a queue becomes packed batches, and one batch is decoded while the next is denoised."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lens import resolution, vae
from lens.engine.overlap import Lane, lane_for, overlapped
from lens.packing import Grid, TokenQueue
from lens.request import Request
from lens.text_encoder import DEFAULT_CHAT_DATE, PREFIX_TOKENS

if TYPE_CHECKING:
    from lens.pipeline import LensPipeline


def stream(
    pipe: LensPipeline,
    requests: Sequence[Request],
    max_tokens: int,
    max_pictures: int,
    output_type: str,
    max_sequence_length: int = 512,
    truncation: str = "reference",
    chat_date: str | None = DEFAULT_CHAT_DATE,
    lane: Lane | None = None,
) -> Iterator[tuple[int, Any, int | None]]:
    """See ``LensPipeline.stream``. lane: where batches are decoded; None: a second stream on CUDA, else here."""
    finishers = {"pil": vae.to_pil, "np": vae.to_numpy, "latent": lambda rows: rows}
    if output_type not in finishers:
        raise ValueError(f"output_type must be one of {tuple(finishers)}, got {output_type!r}")
    defaults, encoding = pipe.defaults, (max_sequence_length, truncation, chat_date)
    side = defaults.base_resolution
    sizes = [r.size or (side, side) for r in requests]
    grids: list[Grid] = resolution.request_grids(
        len(requests), None, None, None, None, sizes, side, defaults.max_resolution
    )
    queue: TokenQueue[int] = TokenQueue(max_tokens, max_pictures, same_size=pipe.device.type == "cuda")
    for k, (r, (h, w)) in enumerate(zip(requests, grids)):
        steps = defaults.num_inference_steps if r.num_inference_steps is None else r.num_inference_steps
        guidance = float(defaults.guidance_scale if r.guidance_scale is None else r.guidance_scale)
        halves = 1 if guidance == 1.0 else 2
        texts = [r.prompt, *([r.negative_prompt] if halves == 2 and r.negative_prompt.strip() else [])]
        read = sum(max(0, pipe.tokenize(text, *encoding)[0].shape[1] - PREFIX_TOKENS) for text in texts)
        queue.add(k, (h, w), halves * h * w + read, (steps, guidance))
    seeds = [secrets.randbelow(2**31) if r.seed is None else r.seed for r in requests]

    def denoise(batch: list[int]) -> list[Tensor]:
        items = [requests[k] for k in batch]
        output: Any = pipe(
            [r.prompt for r in items],
            [r.negative_prompt for r in items],
            sizes=[sizes[k] for k in batch],
            seed=[seeds[k] for k in batch],
            num_inference_steps=items[0].num_inference_steps,
            guidance_scale=items[0].guidance_scale,
            output_type="latent",
            max_sequence_length=max_sequence_length,
            truncation=truncation,
            chat_date=chat_date,
        )
        return list(output.images)

    def decode(batch: list[int], latents: list[Tensor]) -> list[Tensor]:
        if output_type == "latent":
            return latents
        with pipe.stage("decode"):
            return [pipe.codec.decode(rows, grids[k]) for rows, k in zip(latents, batch)]

    for batch, made in overlapped(queue.batches(), denoise, decode, list, lane or lane_for(pipe.device)):
        for k, picture in zip(batch, made, strict=True):
            yield k, finishers[output_type](picture), seeds[k]
