"""Many requests: a queue becomes packed batches, and one batch is decoded while the next is denoised."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lens import vae
from lens.arguments import shortened
from lens.engine.overlap import Lane, lane_for, overlapped
from lens.packing import TokenQueue
from lens.request import Request, joined
from lens.text_encoder import PREFIX_TOKENS

if TYPE_CHECKING:
    from lens.pipeline import LensPipeline

# fields that only a call of its own can have
ONE_CALL = ("generator", "latents", "prompt_embeds", "prompt_mask", "negative_prompt_embeds", "negative_prompt_mask")
ENCODING = ("max_sequence_length", "truncation", "chat_date")


def stream(
    pipe: LensPipeline,
    requests: Sequence[Request],
    max_tokens: int,
    max_images: int,
    output_type: str,
    lane: Lane | None = None,
    **encoding: Any,
) -> Iterator[tuple[int, Any, int | None]]:
    """See ``LensPipeline.stream``. lane: where batches are decoded; None: a second stream on CUDA, else here."""
    finishers = {"pil": vae.to_pil, "np": vae.to_numpy, "latent": lambda rows: rows}
    if output_type not in finishers:
        raise ValueError(f"output_type must be one of {tuple(finishers)}, got {shortened(output_type)}")
    if unknown := [name for name in encoding if name not in ENCODING]:
        raise TypeError(
            f"LensPipeline.stream has no argument {unknown[0]!r}; of the text it takes {', '.join(ENCODING)}"
        )
    for k, request in enumerate(requests):
        if not isinstance(request, Request):
            raise TypeError(f"request {k} of a queue must be a lens.request.Request, got {shortened(request)}")
    asked = [_line(pipe, k, replace(r, output_type="latent", **encoding)) for k, r in enumerate(requests)]
    seeds: list[Any] = [secrets.randbelow(2**31) if r.seed is None else r.seed for r in requests]
    queue: TokenQueue[int] = TokenQueue(max_tokens, max_images, same_size=pipe.device.type == "cuda")
    for k, r in enumerate(asked):
        ((h, w),) = r.grids
        texts = [text for negative in (False, True) for text in r.texts(negative) if text is not None]
        read = sum(max(0, pipe.tokenize(text, *r.encoding)[0].shape[1] - PREFIX_TOKENS) for text in texts)
        queue.add(k, (h, w), (2 if r.guided else 1) * h * w + read, r.kind)

    def denoise(batch: list[int]) -> list[Tensor]:
        return list(pipe.draw(joined([asked[k] for k in batch], [seeds[k] for k in batch])).images)

    def decode(batch: list[int], latents: list[Tensor]) -> list[Tensor]:
        if output_type == "latent":
            return latents
        with pipe.stage("decode"):
            return [pipe.codec.decode(rows, asked[k].grids[0]) for rows, k in zip(latents, batch)]

    for batch, made in overlapped(queue.batches(), denoise, decode, list, lane or lane_for(pipe.device)):
        for k, image in zip(batch, made, strict=True):
            yield k, finishers[output_type](image), seeds[k]


def _line(pipe: LensPipeline, k: int, request: Request) -> Request:
    """Request k of a queue, resolved: one picture of one prompt."""
    given = {name: getattr(request, name) for name in ONE_CALL if getattr(request, name) is not None}
    if given or not isinstance(request.prompt, str) or request.num_images_per_prompt != 1:
        what = f"it gives {', '.join(given)}" if given else f"got {shortened(request.prompt)}"
        raise ValueError(f"request {k} of a queue must be one picture of one prompt, from a seed: {what}")
    return request.resolved(pipe.defaults)
