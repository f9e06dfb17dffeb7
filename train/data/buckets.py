"""Which samples are where in the stream: aspect buckets, and a sampler without state.

The global stream is a sequence of micro-batches g = 0, 1, 2, ..., independent of who computes them: an optimiser step takes
`slots` of them, g = step * slots + slot, and rank r of W takes the slots r, r + W, r + 2W, ... Everything about g follows from
(seed, g) by counters:

* bucket(g): output g of a Philox generator, against the cumulated law p(base) p(aspect | base) in 64-bit integers;
* its samples: the ordinals count * batch ... of that bucket, count = the number of g' < g with the same bucket. Ordinal k is
  position k mod n of the bucket's epoch k div n, so every member comes exactly once per epoch, whatever the world size;
* an epoch's order: BLOCK consecutive members (one stretch of one shard) stay together while the blocks are permuted; then the
  positions of a window of WINDOW blocks are permuted among themselves. Reads stay sequential within WINDOW stretches.

Data may grow: from a step on there are more members, appended to those of before. The law is theirs from that step on; a bucket's
new members come with its next epoch, so that every epoch still holds every member of its own once.

A permutation is the stable order of as many outputs of a keyed Philox: the bit generator's stream is fixed by NumPy, that of
`Generator.permutation` is not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from lens.resolution import TOKEN_PIXELS, bucket_size, parse_ratio, ratio_size

ASPECTS = ("1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1")  # W:H
BASES = (512, 768, 1024)
BATCH = {512: 24, 768: 10, 1024: 6}
BLOCK, WINDOW = 64, 16
CHUNK = 1 << 20  # micro-batches counted at once


@dataclass(frozen=True, order=True)
class Bucket:
    """A base resolution and an aspect ratio "W:H"; `size` is (height, width) in pixels."""

    base: int
    aspect: str

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        return bucket_size(self.base, self.aspect)

    @property
    def unrecorded_size(self) -> tuple[int, int]:
        """(height, width) that the name stood for in shards that do not record their sizes."""
        return self.size if self.base == 1024 else ratio_size(self.base, parse_ratio(self.aspect))

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in tokens."""
        return self.size[0] // TOKEN_PIXELS, self.size[1] // TOKEN_PIXELS

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def name(self) -> str:
        """For example 1024_16x9: a folder's name."""
        return f"{self.base}_{self.aspect.replace(':', 'x')}"

    @classmethod
    def of(cls, name: str) -> Bucket:
        """The inverse of `name`. Errors: ValueError."""
        base, _, aspect = name.partition("_")
        bucket = cls(int(base) if base.isdecimal() else 0, aspect.replace("x", ":"))
        bucket_size(bucket.base, bucket.aspect)
        return bucket


def nearest_aspect(height: int, width: int, aspects: Sequence[str] = ASPECTS) -> str:
    """The aspect W:H with the least |log(width / height) - log(W / H)|; of two as near, the squarer, then the taller."""

    def key(aspect: str) -> tuple[float, float, float]:
        w, h = map(int, aspect.split(":"))
        # rounded: two distances equal on paper may differ in their last bit
        return round(abs(math.log(width * h / (height * w))), 12), round(abs(math.log(w / h)), 12), w / h

    return min(aspects, key=key)


def cover_box(height: int, width: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred box of a picture that has the aspect of `size` (height, width)."""
    scale = min(height / size[0], width / size[1])
    h, w = size[0] * scale, size[1] * scale
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def covers(height: int, width: int, size: tuple[int, int], max_upscale: float = 1.0) -> bool:
    """Whether a picture, enlarged at most so much, covers `size` (height, width)."""
    return height * max_upscale >= size[0] and width * max_upscale >= size[1]


def eligible(height: int, width: int, bucket: Bucket, max_upscale: float = 1.0) -> bool:
    """Whether a picture serves a bucket: it covers the bucket's size. Eight of the 27 sizes have fewer than base^2 pixels, so
    that base^2 is no measure of it."""
    return covers(height, width, bucket.size, max_upscale)


def philox(seed: int, purpose: str, *key: int | str) -> np.random.Philox:
    """A counter-based generator of 64-bit integers that depends on its arguments alone."""
    digest = hashlib.sha256(" ".join(map(str, (seed, purpose, *key))).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def outputs(generator: np.random.Philox, first: int, count: int) -> np.ndarray:
    """Outputs first ... first + count of a fresh generator, uint64; the cost does not grow with `first`."""
    skip = first % 4  # one counter gives four
    return generator.advance(first // 4).random_raw(skip + count)[skip:]


def uniforms(seed: int, purpose: str, first: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1) on a grid of 2^-53: outputs first ... of the generator keyed by (seed, purpose)."""
    return (outputs(philox(seed, purpose), first, count) >> np.uint64(11)) * 2.0**-53


def permutation(n: int, seed: int, purpose: str, *key: int | str) -> np.ndarray:
    """int64 [n]."""
    return np.argsort(philox(seed, purpose, *key).random_raw(n), kind="stable")


@dataclass(frozen=True)
class BucketLaw:
    """What a recipe says about buckets. The paper's batch sizes balance tokens per micro-batch (24 x 1024, 10 x 2304,
    6 x 4096); it is silent on p(base), here alike for all bases, and on p(aspect | base), here as in the data."""

    batch: Mapping[int, int] = field(default_factory=lambda: dict(BATCH))  # base -> samples of a micro-batch
    base: Mapping[int, float] | None = None  # base -> weight; None: every base of the data alike
    aspect: Mapping[str, float] | str = "data"  # "data": by number of samples; "uniform"; or aspect -> weight

    def weights(self, sizes: Mapping[Bucket, int]) -> dict[Bucket, Fraction]:
        """p(bucket) of the buckets that can be drawn, exact. Errors: ValueError naming what is missing."""
        present = {b: n for b, n in sizes.items() if n > 0}
        bases = dict.fromkeys(sorted({b.base for b in present}), 1.0) if self.base is None else dict(self.base)
        out: dict[Bucket, Fraction] = {}
        for base, share in bases.items():
            if share == 0:
                continue
            own = {b: self._within(b, n) for b, n in sorted(present.items()) if b.base == base}
            own = {b: w for b, w in own.items() if w > 0}
            if share < 0 or not own:
                raise ValueError(f"BucketLaw: base {base} has weight {share} and {len(own)} buckets with samples")
            if self.batch.get(base, 0) < 1:
                raise ValueError(
                    f"BATCH: base {base} has {self.batch.get(base, 'no number of')} pictures in a micro-batch, expected at least 1"
                )
            out |= {b: Fraction(share) * w / sum(own.values()) for b, w in own.items()}
        if not out:
            raise ValueError(f"BucketLaw: no bucket can be drawn from {len(present)} with samples")
        return {b: w / sum(out.values()) for b, w in out.items()}

    def _within(self, bucket: Bucket, samples: int) -> Fraction:
        if self.aspect == "data":
            return Fraction(samples)
        if self.aspect == "uniform":
            return Fraction(1)
        if isinstance(self.aspect, str):
            raise ValueError(f"BucketLaw: aspect {self.aspect!r}, expected 'data', 'uniform' or weights")
        return Fraction(self.aspect.get(bucket.aspect, 0))


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One entry of the global stream: its place, its bucket, the ordinal of its first sample there, the members."""

    number: int  # g = step * slots + slot
    step: int
    slot: int
    bucket: Bucket
    ordinal: int
    members: np.ndarray  # int64 [batch], positions in the bucket's stored order


class BucketSampler:
    """The global stream over buckets of these sizes, and from the steps of `grown` on of those.

    Errors: ValueError where the law names what the data lacks, where a bucket of `grown` has fewer members than before.
    """

    def __init__(
        self,
        sizes: Mapping[Bucket, int],
        law: BucketLaw,
        seed: int,
        slots: int,
        grown: Sequence[tuple[int, Mapping[Bucket, int]]] = (),
    ):
        if slots < 1:
            raise ValueError(f"BucketSampler: slots must be positive, got {slots}")
        self.seed, self.slots = seed, slots
        laws = [(step, own, law.weights(own)) for step, own in ((0, sizes), *grown)]
        self.buckets = tuple(dict.fromkeys(bucket for *_, weights in laws for bucket in weights))
        self.probability = laws[-1][2]
        self.sizes = tuple(laws[-1][1].get(b, 0) for b in self.buckets)
        self.batch = tuple(law.batch[b.base] for b in self.buckets)
        # (first micro-batch, bounds of the cumulated law, the buckets they are of)
        self._laws: list[tuple[int, np.ndarray, np.ndarray]] = []
        # of every bucket (first ordinal, its epoch, members from there on)
        self._spans: list[list[tuple[int, int, int]]] = [[] for _ in self.buckets]
        for step, own, weights in laws:
            self._grow(step, own)
            total, bounds = Fraction(0), []
            for weight in list(weights.values())[:-1]:
                total += weight
                bounds.append(min(int(total * 2**64), 2**64 - 1))
            places = np.array([self.buckets.index(b) for b in weights])
            self._laws.append((step * slots, np.array(bounds, np.uint64), places))
        self._blocks = functools.lru_cache(maxsize=2 * len(self.buckets))(self._draw_blocks)
        self._window = functools.lru_cache(maxsize=4 * len(self.buckets))(self._draw_window)
        known = [
            [step, [[b.name, own[b], law.batch[b.base], str(p)] for b, p in weights.items()]]
            for step, own, weights in laws
        ]
        text = json.dumps([seed, slots, BLOCK, WINDOW, known[0][1], *known[1:]])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    def _grow(self, step: int, sizes: Mapping[Bucket, int]) -> None:
        """More members of every bucket from its first epoch on that begins at a step or later."""
        used = self.counts(step * self.slots) * np.array(self.batch)
        for bucket, spans, ordinal in zip(self.buckets, self._spans, used.tolist()):
            n = sizes.get(bucket, 0)
            start, epoch, before = spans[-1] if spans else (0, 0, 0)
            if n < before:
                raise ValueError(
                    f"BucketSampler: {bucket.name} has {n} samples from step {step} on and {before} before"
                )
            if n > before:
                epochs = -(-(ordinal - start) // before) if before and ordinal > start else 0
                if not epochs:  # none of the span was given out
                    spans[-1:] = []
                spans.append((start + epochs * before, epoch + epochs, n))

    def _members(self, index: int, epoch: int) -> int:
        """How many members a bucket has in an epoch."""
        return next(n for _, first, n in reversed(self._spans[index]) if first <= epoch)

    def draw(self, first: int, count: int) -> np.ndarray:
        """Index of the bucket of the micro-batches first ... first + count: int64 [count]."""
        numbers, out = outputs(philox(self.seed, "bucket"), first, count), np.empty(count, np.int64)
        for start, bounds, places in self._laws:
            own = numbers[max(0, start - first) :]
            if len(own):
                out[count - len(own) :] = places[np.searchsorted(bounds, own, side="right")]
        return out

    def counts(self, number: int) -> np.ndarray:
        """Micro-batches of each bucket before `number`: int64 [buckets]."""
        total = np.zeros(len(self.buckets), np.int64)
        for start in range(0, number, CHUNK):
            drawn = self.draw(start, min(CHUNK, number - start))
            total += np.bincount(drawn, minlength=len(total))
        return total

    def members(self, index: int, first: int, count: int) -> np.ndarray:
        """Members of bucket `index` at the ordinals first ... first + count: int64 [count], positions in stored order."""
        ordinals = np.arange(first, first + count)
        span = BLOCK * WINDOW
        starts, firsts, sizes = (np.array(row) for row in zip(*self._spans[index]))
        own = np.searchsorted(starts, ordinals, side="right") - 1
        epochs = firsts[own] + (ordinals - starts[own]) // sizes[own]
        places = (ordinals - starts[own]) % sizes[own]
        out = np.empty(count, np.int64)
        for epoch in np.unique(epochs).tolist():
            order, short, missing = self._blocks(index, epoch)
            here = np.flatnonzero(epochs == epoch)
            at = places[here]
            for window in np.unique(at // span).tolist():
                inside = at // span == window
                at[inside] = window * span + self._window(index, epoch, window)[at[inside] - window * span]
            at = at + np.where(at >= short, missing, 0)  # as if the short block were whole
            out[here] = order[at // BLOCK].astype(np.int64) * BLOCK + at % BLOCK
        return out

    def _draw_blocks(self, index: int, epoch: int) -> tuple[np.ndarray, int, int]:
        """The blocks in order; where the short one ends, and what it lacks."""
        n = self._members(index, epoch)
        count = -(-n // BLOCK)
        order = permutation(count, self.seed, "blocks", self.buckets[index].name, epoch)
        missing = count * BLOCK - n
        ends = (int(np.flatnonzero(order == count - 1)[0]) + 1) * BLOCK - missing
        return order.astype(np.int32), ends, missing

    def _draw_window(self, index: int, epoch: int, window: int) -> np.ndarray:
        length = min(BLOCK * WINDOW, self._members(index, epoch) - window * BLOCK * WINDOW)
        return permutation(length, self.seed, "window", self.buckets[index].name, epoch, window)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps. `step` says it all; the counts save the counting, the fingerprint refuses other data."""
        counts = self.counts(step * self.slots).tolist()
        return {"step": step, "counts": counts, "fingerprint": self.fingerprint}

    def stream(
        self, start: int | Mapping[str, Any] = 0, rank: int = 0, world: int = 1, ahead: int = 64
    ) -> Iterator[MicroBatch]:
        """The micro-batches of a rank from a step (or a saved state) on, without end.

        Errors: ValueError where there are more ranks than slots, or the state is that of other data or another recipe.
        """
        if not 0 <= rank < world <= self.slots:
            raise ValueError(f"BucketSampler: {self.slots} slots on rank {rank} of {world}, expected at most as many")
        if isinstance(start, Mapping):
            if start["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"BucketSampler: the state's stream is {start['fingerprint']}, this one {self.fingerprint}: "
                    "another seed, slots, batch sizes, bucket law or data"
                )
            step, counts = start["step"], np.array(start["counts"], np.int64)
            if counts.sum() != step * self.slots:
                raise ValueError(f"BucketSampler: {counts.sum()} micro-batches counted at step {step}")
        else:
            step, counts = start, self.counts(start * self.slots)
        while True:
            drawn = self.draw(step * self.slots, ahead * self.slots)
            for place, index in enumerate(drawn.tolist()):
                slot = place % self.slots
                if slot % world == rank:
                    size, number = self.batch[index], step * self.slots + place
                    first = int(counts[index]) * size
                    members = self.members(index, first, size)
                    yield MicroBatch(number, number // self.slots, slot, self.buckets[index], first, members)
                counts[index] += 1
            step += ahead
