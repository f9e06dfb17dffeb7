"""Micro-batches of the small world without end: a fixed set of scenes of each size, encoded when first met and kept.

What a micro-batch is made of depends on (seed, step, slot) alone, so a resume needs no place in the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..loop.keys import keyed
from .buckets import Bucket, BucketLaw
from .encoders import LatentCodec, TextEncoder, Tokenizer
from .loader import ShardBatch
from .small_world.scene import Scene
from .small_world.world import World

CHUNK = 4  # scenes that are rendered and encoded together: 64 made the first micro-batch wait for half the pool
HELD_OUT = 1_000_000_000  # scenes from this seed on are never trained on


class ScenePool:
    """recipe: SEED, FIRST_SEED, SCENES, BASES, ASPECTS, BATCH, SLOTS and the law of its buckets."""

    def __init__(self, recipe: ModuleType, world: World, tokenizer: Tokenizer, codec: LatentCodec, text: TextEncoder):
        self.recipe, self.world, self.tokenizer, self.codec, self.text = recipe, world, tokenizer, codec, text
        self.buckets = [Bucket(base, aspect) for base in recipe.BASES for aspect in recipe.ASPECTS]
        law = BucketLaw(recipe.BATCH, recipe.BASE_WEIGHTS, recipe.ASPECT_WEIGHTS)
        self.law = law.weights(dict.fromkeys(self.buckets, recipe.SCENES))
        self.kept: dict[tuple[Bucket, int], tuple[Tensor, list[Tensor], list[str]]] = {}

    def made(
        self, bucket: Bucket, seeds: Sequence[int]
    ) -> tuple[Tensor, list[Tensor], list[str], list[Scene], np.ndarray]:
        """Scenes -> latents [n, I, C], features [T, F, E] of each caption, captions, scenes, pixels uint8 [n, H, W, 3]."""
        scenes, pixels = self.world.batch(list(seeds), *bucket.size)
        ids = [self.tokenizer(scene.caption) for scene in scenes]
        features = self.text.encode(ids).split([len(own) for own in ids])
        latents = self.codec.encode(torch.from_numpy(pixels)).float()
        return latents, list(features), [scene.caption for scene in scenes], scenes, pixels

    def batch(self, step: int, slot: int) -> ShardBatch:
        """The micro-batch of a slot."""
        recipe, generator = self.recipe, keyed(self.recipe.SEED, "scenes", step, slot)
        shares = torch.tensor([float(self.law[bucket]) for bucket in self.buckets])
        bucket = self.buckets[int(torch.multinomial(shares, 1, generator=generator))]
        chosen = torch.randperm(recipe.SCENES, generator=generator)[: recipe.BATCH[bucket.base]].tolist()
        latents, features, captions = [], [], []
        for index in chosen:
            held = self._chunk(bucket, index // CHUNK)
            place = index % CHUNK
            latents.append(held[0][place])
            features.append(held[1][place])
            captions.append(held[2][place])
        return ShardBatch(
            number=step * recipe.SLOTS + slot,
            step=step,
            slot=slot,
            bucket=bucket,
            keys=tuple(str(recipe.FIRST_SEED + index) for index in chosen),
            captions=tuple(captions),
            lengths=[len(f) for f in features],
            latents=torch.stack(latents),
            features=torch.cat(features),
        )

    def held_out(self, first: int, count: int) -> tuple[list[ShardBatch], list[Scene]]:
        """Scenes from a seed on, a micro-batch after another, the buckets in turn, until there are `count`; in that order."""
        batches: list[ShardBatch] = []
        scenes: list[Scene] = []
        while len(scenes) < count:
            bucket = self.buckets[len(batches) % len(self.buckets)]
            size = min(self.recipe.BATCH[bucket.base], count - len(scenes))
            latents, features, captions, own, _ = self.made(
                bucket, range(first + len(scenes), first + len(scenes) + size)
            )
            place = len(batches)
            batches.append(
                ShardBatch(
                    number=place,
                    step=place,
                    slot=0,
                    bucket=bucket,
                    keys=tuple(str(first + len(scenes) + i) for i in range(size)),
                    captions=tuple(captions),
                    lengths=[len(f) for f in features],
                    latents=latents,
                    features=torch.cat(features),
                )
            )
            scenes += own
        return batches, scenes

    def _chunk(self, bucket: Bucket, index: int) -> tuple[Tensor, list[Tensor], list[str]]:
        if (bucket, index) not in self.kept:
            first, last = index * CHUNK, min((index + 1) * CHUNK, self.recipe.SCENES)
            base = self.recipe.FIRST_SEED
            self.kept[bucket, index] = self.made(bucket, range(base + first, base + last))[:3]
        return self.kept[bucket, index]

    def batches(self, step: int) -> Iterator[ShardBatch]:
        """From a step on, every slot of it."""
        while True:
            for slot in range(self.recipe.SLOTS):
                yield self.batch(step, slot)
            step += 1
