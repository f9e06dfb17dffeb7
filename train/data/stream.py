"""The endless, deterministic stream of training batches: scenes -> pixels and token ids -> latents, sorted by length.

Window w holds the scenes of seeds w * WINDOW ...; sorted by caption length and cut into batches, whose order is shuffled.
So the texts of a batch are equally long or nearly so: little padding where text is padded, few groups where it is not.
A batch depends on the recipe, the window and its place in it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..loop import keyed
from ..objectives import flow_matching
from .world import World


def world_of(name: str, split: str = "train") -> World:
    """The world a recipe trains on."""
    return World(split)


@dataclass
class Batch:
    """Latents [B, I, C]; ids int64 [B, T] after the chat prefix, zeros after each sample's `lengths`."""

    latents: Tensor
    ids: Tensor
    lengths: list[int]

    def take(self, rows: Sequence[int]) -> Batch:
        """The samples of these rows; ids no longer than the longest of them."""
        lengths, index = [self.lengths[i] for i in rows], torch.as_tensor(rows)
        return Batch(self.latents[index], self.ids[index, : max(lengths)], lengths)


@dataclass
class Rendered:
    """What a worker makes of a run of seeds: pixels uint8 [n, H, W, 3], all token ids in one row, their number per sample."""

    pixels: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray


def render(world: World, encode: Callable[[str], list[int]], seeds: Sequence[int], side: int) -> Rendered:
    scenes, pixels = world.batch(list(seeds), side, side)
    tokens = [encode(scene.caption) for scene in scenes]
    flat = np.fromiter((i for ids in tokens for i in ids), np.int32)
    return Rendered(pixels, flat, np.array([len(ids) for ids in tokens], np.int64))


def padded(flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Ids of n samples in one row -> int64 [n, T], zeros on the right."""
    out = np.zeros((len(lengths), int(lengths.max())), np.int64)
    out[np.arange(out.shape[1])[None] < lengths[:, None]] = flat
    return out


class Stream:
    """Batches from any place on. `encode_pixels`: uint8 [n, H, W, 3] -> normalised tokens [n, I, C]; `encode_text`: ids."""

    CHUNK = 256  # scenes encoded into latents at once

    def __init__(
        self,
        config: ModuleType,
        world: World,
        encode_pixels: Callable[[np.ndarray], Tensor],
        encode_text: Callable[[str], list[int]],
        first_seed: int = 0,
    ):
        self.config, self.world, self.first = config, world, first_seed
        self.encode_pixels, self.encode_text = encode_pixels, encode_text

    def batch_size(self, window: int) -> int:
        return max((start, size) for start, size in self.config.BATCHES if start <= window)[1]

    def encode(self, seeds: Sequence[int]) -> Batch:
        parts = [
            render(self.world, self.encode_text, seeds[i : i + self.CHUNK], self.config.SIDE)
            for i in range(0, len(seeds), self.CHUNK)
        ]
        lengths = np.concatenate([part.lengths for part in parts])
        ids = padded(np.concatenate([part.ids for part in parts]), lengths)
        latents = torch.cat([self.encode_pixels(part.pixels) for part in parts])
        return Batch(latents, torch.from_numpy(ids), lengths.tolist())

    def window(self, index: int) -> list[Batch]:
        count, size = self.config.WINDOW, self.batch_size(index)
        whole = self.encode(range(self.first + index * count, self.first + (index + 1) * count))
        order = sorted(range(count), key=lambda i: (whole.lengths[i], i))
        cuts = [order[i : i + size] for i in range(0, count, size)]
        mixed = torch.randperm(len(cuts), generator=keyed(self.config.SEED, "window order", index)).tolist()
        return [whole.take(cuts[c]) for c in mixed]

    def batches(self, window: int, position: int) -> Iterator[tuple[int, int, Batch]]:
        """(window, position of the next batch, batch) from a position on, without end."""
        while True:
            batches = self.window(window)
            while position < len(batches):
                position += 1
                yield window, position, batches[position - 1]
            window, position = window + 1, 0


@dataclass
class Step:
    """What one step trains on: x_t and target [B, I, C], t [B]; ids int64 [n, T] of the n samples that kept their caption,
    which come first; lengths of all B, 0 where the caption was dropped."""

    x: Tensor
    target: Tensor
    t: Tensor
    ids: Tensor
    lengths: list[int]


def draw(config: ModuleType, batch: Batch, step: int) -> Step:
    """Times, noise and caption dropout of a step."""
    generator, count = keyed(config.SEED, "step", step), len(batch.lengths)
    t = flow_matching.sample_times(count, config.MU, generator)
    noise = torch.randn(batch.latents.shape, generator=generator)
    dropped = torch.rand(count, generator=generator) < config.TEXT_DROPOUT
    order = torch.argsort(dropped.int(), stable=True)
    x, target = flow_matching.noised(batch.latents[order], noise, t)
    kept = order[: count - int(dropped.sum())]
    lengths = [batch.lengths[i] for i in kept.tolist()]
    ids = batch.ids[kept, : max(lengths, default=0)]
    return Step(x, target, t, ids, lengths + [0] * (count - len(kept)))
