"""A pool of scenes whose latents and text features are computed once and used several times.

For a small generator on a CPU, rendering, encoding and above all the text encoder cost a quarter of a step. Scenes are made in
chunks; the pool of turn n holds the chunks n, n + 1, ..., n + KEPT - 1, and a turn trains on a random part of it, so every scene
is met about POOL["reuse"] times, spread over KEPT turns, each time at another time and noise; then it goes for good.

A batch has one grid and one padded text length. Which scenes, batches and order a turn has depends on (seed, turn) alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lens.resolution import TOKEN_PIXELS

from ..loop.keys import keyed
from .small_world.world import World

Size = tuple[int, int]  # (height, width) in pixels
Key = tuple[Size, int]  # the size, and the text length that features are padded to


@dataclass
class PoolPart:
    """Samples of one key: latents float16 [n, I, C], features bfloat16 [n, T, F E] (zeros after the text), lengths [n]."""

    latents: Tensor
    features: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: Tensor) -> PoolPart:
        return PoolPart(self.latents[rows].float(), self.features[rows].float(), self.lengths[rows])


def joined(parts: Sequence[PoolPart]) -> PoolPart:
    return PoolPart(*(torch.cat([getattr(p, name) for p in parts]) for name in ("latents", "features", "lengths")))


class Encoded:
    """Seeds -> parts: scenes of the recipe's SIZES, their latents, their captions' features.

    `encode`: uint8 [n, H, W, 3] -> tokens [n, I, C]; `read`: captions -> features [T, F E] each.
    """

    def __init__(
        self,
        config: ModuleType,
        world: World,
        encode: Callable[[Tensor], Tensor],
        read: Callable[[Sequence[str]], list[Tensor]],
    ):
        self.config, self.world, self.encode, self.read = config, world, encode, read
        self.sizes, self.shares = list(config.SIZES), list(config.SIZES.values())
        if abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"SIZES: the shares sum to {sum(self.shares):g}, expected 1")

    def parts(self, seeds: range, stop: Callable[[], bool] = lambda: False) -> dict[Key, PoolPart]:
        """Scenes of consecutive seeds, by key; each seed's size is drawn from SIZES. Empty where `stop` ended it."""
        generator = keyed(self.config.SEED, "pool sizes", seeds.start)
        drawn = torch.multinomial(torch.tensor(self.shares), len(seeds), True, generator=generator).tolist()
        found: dict[Key, list[PoolPart]] = defaultdict(list)
        for size in self.sizes:
            own = [seed for seed, which in zip(seeds, drawn) if self.sizes[which] == size]
            for start in range(0, len(own), 128):
                if stop():
                    return {}
                self._add(own[start : start + 128], size, found)
        return {key: joined(parts) for key, parts in found.items()}

    def _add(self, seeds: Sequence[int], size: Size, found: dict[Key, list[PoolPart]]) -> None:
        scenes, pixels = self.world.batch(seeds, *size)
        latents = self.encode(torch.from_numpy(pixels)).half()
        texts = self.read([scene.caption for scene in scenes])
        longest, most = max(len(text) for text in texts), max(self.config.TEXT_BINS)
        if longest > most:
            raise ValueError(f"TEXT_BINS: a caption of {longest} tokens is longer than {most}")
        for bin_ in self.config.TEXT_BINS:
            below = max((b for b in self.config.TEXT_BINS if b < bin_), default=0)
            rows = [i for i, text in enumerate(texts) if below < len(text) <= bin_]
            if rows:
                features = torch.zeros(len(rows), bin_, texts[0].shape[1], dtype=torch.bfloat16)
                for row, i in zip(features, rows):
                    row[: len(texts[i])] = texts[i]
                found[size, bin_].append(PoolPart(latents[rows], features, torch.tensor([len(texts[i]) for i in rows])))


class Pool:
    """The chunks in use. `made(seeds)` gives a chunk's parts; FIRST_SEED and POOL of the recipe say which and how many."""

    def __init__(self, config: ModuleType, made: Callable[[range], dict[Key, PoolPart]]):
        self.config, self.made = config, made
        self.chunks: dict[int, dict[Key, PoolPart]] = {}

    def turn_to(self, turn: int) -> bool:
        """Make the chunks of a turn that are missing, forget those before it; False where `made` was stopped."""
        size, kept = self.config.POOL["chunk"], self.config.POOL["kept"]
        for old in [index for index in self.chunks if not turn <= index < turn + kept]:
            del self.chunks[old]
        for index in range(turn, turn + kept):
            if index not in self.chunks:
                first = self.config.FIRST_SEED + index * size
                parts = self.made(range(first, first + size))
                if not parts:
                    return False
                self.chunks[index] = parts
        return True

    def batches(self, turn: int) -> Iterator[tuple[Size, PoolPart]]:
        """The batches of a turn, in its order: a random `reuse` of `kept` of all scenes, cut by key; what fills no batch
        is left to another turn."""
        generator = keyed(self.config.SEED, "pool turn", turn)
        share = self.config.POOL["reuse"] / self.config.POOL["kept"]
        cuts: list[tuple[Key, Tensor]] = []
        for key in sorted({key for parts in self.chunks.values() for key in parts}):
            count = sum(len(parts[key]) for parts in self.chunks.values() if key in parts)
            batch = self.config.BATCH[min(key[0])] if isinstance(self.config.BATCH, dict) else self.config.BATCH
            order = torch.randperm(count, generator=generator)[: int(count * share)]
            cuts += [(key, rows) for rows in order.split(batch) if len(rows) == batch]
        for index in torch.randperm(len(cuts), generator=generator).tolist():
            key, rows = cuts[index]
            yield key[0], self._rows(key, rows)

    def _rows(self, key: Key, rows: Tensor) -> PoolPart:
        """Rows of the chunks' parts one after another."""
        found, start = [], 0
        for index in sorted(self.chunks):
            part = self.chunks[index].get(key)
            if part is not None:
                own = rows[(rows >= start) & (rows < start + len(part))] - start
                found.append(part.take(own))
                start += len(part)
        return joined(found)


def grid_of(size: Size) -> tuple[int, int]:
    return size[0] // TOKEN_PIXELS, size[1] // TOKEN_PIXELS
