"""The endless, deterministic stream of training batches: scenes -> pixels and token ids -> latents, sorted by length.

Window w holds the scenes of seeds w * WINDOW ...; sorted by caption length and cut into batches, whose order is shuffled.
So the texts of a batch are equally long or nearly so: little padding where text is padded, few groups where it is not.
A batch depends on the recipe, the window and its place in it alone.

A recipe with BUCKETS has batches of many sizes, one size to a batch: the bucket of batch n is drawn with a key of its own
(`bucket_at`), whatever was drawn before. Its window is a run of WINDOW batches; the scenes of a bucket's batches in it are
sorted by caption length together.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from lens.resolution import TOKEN_PIXELS, bucket_size

from ... import configs
from ...loop.keys import keyed
from ...loop.workers import start_worker, undisturbed
from ...objectives import flow_matching
from .world import World


@dataclass
class WorldBatch:
    """Latents [B, I, C] of a grid (rows, columns) of tokens; ids int64 [B, T] after the chat prefix, zeros after each
    sample's `lengths`."""

    latents: Tensor
    ids: Tensor
    lengths: list[int]
    grid: tuple[int, int]

    def take(self, rows: Sequence[int]) -> WorldBatch:
        """The samples of these rows; ids no longer than the longest of them."""
        lengths = [self.lengths[i] for i in rows]
        index = torch.tensor(rows).to(self.ids.device)
        return WorldBatch(self.latents[index], self.ids[index, : max(lengths)], lengths, self.grid)


@dataclass
class Rendered:
    """What is made of a run of seeds: pixels uint8 [n, H, W, 3], all token ids in one row, their number per sample."""

    pixels: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class WorldSource:
    """Scenes and captions of a recipe as arrays. A word long, so that every worker builds the rest for itself."""

    recipe: str

    def render(self, seeds: Sequence[int], height: int, width: int) -> Rendered:
        world, encode = _built(self.recipe)
        scenes, pixels = world.batch(list(seeds), height, width)
        tokens = [encode(scene.caption) for scene in scenes]
        flat = np.fromiter((i for ids in tokens for i in ids), np.int32)
        return Rendered(pixels, flat, np.array([len(ids) for ids in tokens], np.int64))


@dataclass(frozen=True)
class WorldBucket:
    """A size (height, width) in pixels and the samples of its batches."""

    base: int
    ratio: str  # "W:H"
    size: tuple[int, int]
    batch: int


@functools.lru_cache(maxsize=4)
def _law(bases: tuple, ratios: tuple) -> tuple[list[WorldBucket], Tensor]:
    """Every bucket, and the sums of the shares up to and with it, which end at 1."""
    found, shares = [], []
    for base, share, batch in bases:
        for ratio, part in ratios:
            found.append(WorldBucket(base, ratio, bucket_size(base, ratio), batch))
            shares.append(share * part)
    total = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    if abs(total[-1].item() - 1) > 1e-9 or min(shares) < 0:
        raise ValueError(f"BUCKETS, RATIOS: the shares sum to {total[-1].item():.6g}, expected 1, and none below 0")
    return found, total


def law(config: ModuleType) -> tuple[list[WorldBucket], Tensor]:
    """The buckets of a recipe and the sums of their shares. Errors: ValueError where the shares are none of a whole."""
    return _law(tuple((base, *rest) for base, rest in config.BUCKETS.items()), tuple(config.RATIOS.items()))


def bucket_at(config: ModuleType, index: int) -> WorldBucket:
    """The bucket of batch `index`: an independent draw from the law, keyed by (seed, index) alone."""
    buckets, sums = law(config)
    u = torch.rand(1, generator=keyed(config.SEED, "bucket", index), dtype=torch.float64)
    return buckets[min(int(torch.searchsorted(sums, u, right=True)), len(buckets) - 1)]


@functools.lru_cache(maxsize=4)
def _built(recipe: str) -> tuple[World, Callable[[str], list[int]]]:
    from ...networks.text_path import tokenizer_of

    tokenizer = tokenizer_of(configs.beside(recipe, "encoder").TOKENIZER)
    return configs.world(recipe), lambda caption: tokenizer.encode(caption)[0]


def padded(flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Ids of n samples in one row -> int64 [n, T], zeros on the right."""
    out = np.zeros((len(lengths), int(lengths.max())), np.int64)
    out[np.arange(out.shape[1])[None] < lengths[:, None]] = flat
    return out


class Workers:
    """Renders chunks of seeds in other processes, or here and now with 0 of them; the arrays are the same."""

    def __init__(self, source: WorldSource, count: int):
        if count < 0:
            raise ValueError(f"Workers: count must not be negative, got {count}")
        self.source, self.pool = source, None
        if count:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads and the device of the training
            self.pool = ProcessPoolExecutor(count, spawn, start_worker)

    def submit(self, chunks: Sequence[Sequence[int]], size: tuple[int, int]) -> list[Callable[[], Rendered]]:
        """One function per chunk that waits for its result: scenes of `size` (height, width)."""
        if self.pool is None:
            return [functools.partial(self.source.render, chunk, *size) for chunk in chunks]
        with undisturbed():
            return [self.pool.submit(self.source.render, chunk, *size).result for chunk in chunks]

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)


class Stopped(Exception):
    """A window was left unfinished because the training was asked to stop."""


class WorldBatches:
    """Batches from any place on. `encode_pixels`: uint8 [n, H, W, 3] -> normalised tokens [n, I, C], both on `device`.

    Windows are rendered AHEAD of the one in use by `workers` processes; their number changes no bit of any batch.
    """

    CHUNK = 256  # scenes rendered by a worker, and encoded into latents, at once
    AHEAD = 2

    def __init__(
        self,
        config: ModuleType,
        source: WorldSource,
        encode_pixels: Callable[[Tensor], Tensor],
        workers: int = 0,
        device: torch.device | str = "cpu",
        first_seed: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.config, self.encode_pixels, self.device, self.first = config, encode_pixels, device, first_seed
        self.workers, self.stop = Workers(source, workers), stop
        self.coming: dict[int, list[tuple[WorldBucket, list[int], list[Callable[[], Rendered]]]]] = {}
        self.mixed = hasattr(config, "BUCKETS")

    def batch_size(self, window: int) -> int:
        return max((start, size) for start, size in self.config.BATCHES if start <= window)[1]

    def render(self, seeds: Sequence[int], size: tuple[int, int]) -> list[Callable[[], Rendered]]:
        return self.workers.submit([seeds[i : i + self.CHUNK] for i in range(0, len(seeds), self.CHUNK)], size)

    def encode(self, parts: Sequence[Callable[[], Rendered]], stop: Callable[[], bool] = lambda: False) -> WorldBatch:
        """The samples of these chunks as one batch. Errors: Stopped, where `stop` says so in between."""
        found, latents = [], []
        for wait in parts:
            part = wait()
            if stop():
                raise Stopped
            pixels = torch.from_numpy(part.pixels).to(self.device)  # as bytes: a quarter of what floats would be
            latents.append(self.encode_pixels(pixels))
            found.append((part.ids, part.lengths))
            grid = part.pixels.shape[1] // TOKEN_PIXELS, part.pixels.shape[2] // TOKEN_PIXELS
        lengths = np.concatenate([own for _, own in found])
        ids = torch.from_numpy(padded(np.concatenate([own for own, _ in found]), lengths))
        return WorldBatch(torch.cat(latents), ids.to(self.device), lengths.tolist(), grid)

    def plan(self, window: int) -> list[tuple[WorldBucket, list[int], list[int]]]:
        """What a window holds: (bucket, places of its batches among the window's, seeds of their scenes) per size."""
        count, config = self.config.WINDOW, self.config
        if not self.mixed:
            side, size = config.SIDE, self.batch_size(window)
            start = self.first + window * count
            square = WorldBucket(side, "1:1", (side, side), size)
            return [(square, list(range(-(-count // size))), list(range(start, start + count)))]
        stride = max(bucket.batch for bucket in law(config)[0])
        found: dict[WorldBucket, tuple[list[int], list[int]]] = {}
        for place in range(count):
            index = window * count + place
            bucket = bucket_at(config, index)
            places, seeds = found.setdefault(bucket, ([], []))
            places.append(place)
            seeds += range(self.first + index * stride, self.first + index * stride + bucket.batch)
        return [(bucket, *rest) for bucket, rest in found.items()]

    def window(self, index: int) -> list[WorldBatch]:
        for near in range(index, index + 1 + (self.AHEAD if self.workers.pool else 0)):
            if near not in self.coming:
                self.coming[near] = [
                    (bucket, places, self.render(seeds, bucket.size)) for bucket, places, seeds in self.plan(near)
                ]
        batches: dict[int, WorldBatch] = {}
        for bucket, places, parts in self.coming.pop(index):
            whole = self.encode(parts, self.stop)
            order = sorted(range(len(whole.lengths)), key=lambda i: (whole.lengths[i], i))
            cuts = [order[i : i + bucket.batch] for i in range(0, len(order), bucket.batch)]
            purpose = f"window order {bucket.base} {bucket.ratio}" if self.mixed else "window order"
            mixed = torch.randperm(len(cuts), generator=keyed(self.config.SEED, purpose, index)).tolist()
            batches |= {place: whole.take(cuts[c]) for place, c in zip(places, mixed)}
        return [batches[place] for place in range(len(batches))]

    def batches(self, window: int, position: int) -> Iterator[tuple[int, int, WorldBatch]]:
        """(window, position of the next batch, batch) from a position on, until `stop` ends it inside a window."""
        while True:
            try:
                batches = self.window(window)
            except Stopped:
                return
            while position < len(batches):
                position += 1
                yield window, position, batches[position - 1]
            window, position = window + 1, 0

    def close(self) -> None:
        """End the workers."""
        self.coming.clear()
        self.workers.close()


@dataclass
class Step:
    """What one step trains on: x_t and target [B, I, C], t [B]; ids int64 [n, T] of the n samples that kept their caption,
    which come first; lengths of all B, 0 where the caption was dropped."""

    x: Tensor
    target: Tensor
    t: Tensor
    ids: Tensor
    lengths: list[int]
    grid: tuple[int, int]


def draw(config: ModuleType, batch: WorldBatch, step: int) -> Step:
    """Times, noise and caption dropout of a step. On a GPU the noise alone is drawn there, from a key of its own."""
    generator, count, device = keyed(config.SEED, "step", step), len(batch.lengths), batch.latents.device
    mu = flow_matching.mu_of(config.MU, batch.latents.shape[1])
    t = flow_matching.sample_times(count, mu, generator).to(device)
    source = generator if device.type == "cpu" else keyed(config.SEED, "noise", step, device=device)
    noise = torch.randn(batch.latents.shape, generator=source, device=device)
    dropped = torch.rand(count, generator=generator) < config.TEXT_DROPOUT
    order = torch.argsort(dropped.int(), stable=True)
    kept = order.tolist()[: count - int(dropped.sum())]
    lengths = [batch.lengths[i] for i in kept]
    order = order.to(device)
    x, target = flow_matching.noised(batch.latents[order], noise, t)
    ids = batch.ids[order[: len(kept)], : max(lengths, default=0)]
    return Step(x, target, t, ids, lengths + [0] * (count - len(kept)), batch.grid)
