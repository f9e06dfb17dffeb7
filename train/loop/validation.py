"""The loss on pictures that the training never sees, with their captions and without: whether it learns, and from what.

    python -m train shards --images photos/ --split held_out --held-out 0.01 --out shards/held
    torchrun ... -m train pretrain ... --data shards/train --validate shards/held

Every VALIDATE_EVERY steps the averaged weights are asked for the same VALIDATION * SLOTS micro-batches, with the same noise
and times, whatever the number of processes. `with_text`, `without_text`: mean over pictures; `text_explains`: the share of the
latter that the captions take away; `with_text_512` and so on: of a base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..data import encoders
from ..data.buckets import Bucket, BucketLaw, BucketSampler
from ..data.loader import Encode, Loader
from ..data.shards import Shards, ShardSet
from .ranks import Ranks

Objective = Callable[
    [nn.Module, Any], tuple[torch.Tensor, torch.Tensor]
]  # (model, batch) -> loss and time of every picture


class HeldOut:
    """Called by every rank with the wrapped model. loader: no caption dropped."""

    def __init__(self, recipe: ModuleType, group: Ranks, losses: Objective, loader: Loader, encode: Encode):
        self.recipe, self.group, self.losses, self.loader, self.encode = recipe, group, losses, loader, encode
        self.bases = sorted({bucket.base for bucket in loader.sampler.buckets})

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        group = self.group
        sums = torch.zeros(len(self.bases), 3, dtype=torch.float64, device=group.device)  # pictures, with text, without
        batches = self.loader.batches(0, group.rank, group.world)
        slots, batch = self.recipe.SLOTS, self.encode(next(batches))
        for place in range(self.recipe.VALIDATION * -(-slots // group.world)):
            # ranks without a slot in a last round ask the model as often as the others
            idle = place % -(-slots // group.world) * group.world + group.rank >= slots
            batch = batch if idle or place == 0 else self.encode(next(batches))
            bare = dataclasses.replace(batch, lengths=[0] * len(batch.lengths), features=batch.encoded[1][:0])
            row = sums[self.bases.index(batch.bucket.base)]
            row[0] += 0 if idle else len(batch.lengths)
            for column, given in ((1, batch), (2, bare)):
                row[column] += self.losses(model, given)[0].double().sum() * (not idle)
        sums = group.sum(sums)
        found = {}
        for name, (count, text, none) in zip(
            ["", *(f"_{b}" for b in self.bases)], [sums.sum(0).tolist(), *sums.tolist()]
        ):
            if count:
                found[f"with_text{name}"], found[f"without_text{name}"] = text / count, none / count
                found[f"text_explains{name}"] = 1 - text / none
        return found


def validation_loader(
    recipe: ModuleType, folder: Path, seen: Shards, tokenizer: encoders.Tokenizer | None, encode: Encode
) -> tuple[Loader, Encode]:
    """What `--validate` reads. Errors: ValueError where it is what the training sees, or needs networks that are not there."""
    shards = ShardSet(folder)
    if shards.fingerprint == seen.fingerprint:
        raise ValueError(
            f"--validate: {folder} holds the pictures of --data; expected others, as shards --split held_out"
        )
    if encode.text is None and {"latents", "text"} - set(shards.precomputed):
        raise ValueError(f"--validate: {folder} holds no latents and text; expected --model, or --vae and --encoder")
    known = {Bucket(base, aspect) for base in recipe.BASES for aspect in recipe.ASPECTS}
    sizes = {b: n for b, n in shards.sizes.items() if b in known}
    law = BucketLaw(recipe.BATCH, recipe.BASE_WEIGHTS, recipe.ASPECT_WEIGHTS)
    sampler = BucketSampler(sizes, law, recipe.SEED, recipe.SLOTS)
    return Loader(shards, sampler, tokenizer, 0.0), Encode(encode.codec, encode.text, encode.device, shards)
