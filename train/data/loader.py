"""Shards -> micro-batches of the global stream, ready for `lens.packing`; the same bytes whatever the number of workers.

    shards = ShardSet(Path("shards/train"))
    sampler = BucketSampler(shards.sizes, BucketLaw(), seed=3, slots=128)        # slots: micro-batches of an optimiser step
    loader = Loader(shards, sampler, tokenizer, text_dropout=0.1, workers=4)
    encode = Encode(codec, text, device)                                         # what the shards already hold is not computed
    for batch in encode.ahead(loader.batches(state, rank, world)):               # state: a step, or what `loader.state` gave
        batch.latents, batch.features, batch.lengths, batch.bucket.grid
    saved = loader.state(step)                                                   # `step` optimiser steps were consumed

A worker reads, checks, decodes, applies the EXIF orientation, crops to the bucket's aspect and resizes (bicubic, antialiased, never
up). It keeps nothing between batches. A member that cannot be read is skipped, and the sample drawn in its place depends on
(seed, bucket, ordinal) alone; `Batch.skipped` names it. Dropped captions have no text at all, drawn by (seed, place in the stream).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .buckets import Bucket, BucketSampler
from .encoders import LatentCodec, TextEncoder, Tokenizer


@dataclass(frozen=True)
class Skip:
    """A member that was asked for and could not be read, and why."""

    key: str
    reason: str


@dataclass
class Batch:
    """One micro-batch: B samples of one bucket, I image tokens each, RT text tokens in all, text packed sample after sample.

    `pixels` or `latents` (or both) and `ids` or `features` (or both) are there: `Encode` computes what is missing.
    """

    number: int  # of the global stream: step * slots + slot; with a purpose it keys every draw (noise, times)
    step: int
    slot: int
    bucket: Bucket
    keys: tuple[str, ...]  # B
    captions: tuple[str, ...]  # B, "" where dropped
    lengths: list[int]  # B, text tokens of each sample, 0 where its caption was dropped
    pixels: Tensor | None  # uint8 [B, H, W, 3]
    latents: Tensor | None  # float32 [B, I, C], normalised tokens
    ids: Tensor | None  # int64 [RT], after the chat prefix
    features: Tensor | None  # [RT, F, E]
    skipped: tuple[Skip, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The tensors on a device."""
        raise NotImplementedError

    def pin_memory(self) -> Batch:
        """The tensors in page-locked memory."""
        raise NotImplementedError


class Loader:
    """Micro-batches of a shard set in the sampler's order."""

    def __init__(
        self,
        shards: Any,
        sampler: BucketSampler,
        tokenizer: Tokenizer | None = None,
        text_dropout: float = 0.1,
        workers: int = 0,
        pin: bool = False,
    ):
        raise NotImplementedError

    def batches(self, start: int | Mapping[str, Any] = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """A rank's micro-batches from the first slot of a step (or of a saved state) on, without end."""
        raise NotImplementedError

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps: {step, counts, fingerprint}; the same for every rank, valid on any world size."""
        raise NotImplementedError


class Encode:
    """Fills in latents and features on the training's device; on CUDA on a stream of its own."""

    def __init__(self, codec: LatentCodec | None, text: TextEncoder | None, device: torch.device | str):
        raise NotImplementedError

    def __call__(self, batch: Batch) -> Batch:
        raise NotImplementedError

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches encoded, on CUDA one ahead of the one in use."""
        raise NotImplementedError
