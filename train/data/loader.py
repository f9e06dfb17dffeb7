"""Shards -> micro-batches of the global stream, ready for `lens.packing`; the same bytes whatever the number of workers.

    shards = ShardSet(Path("shards/train"))
    sampler = BucketSampler(shards.sizes, BucketLaw(), seed=3, slots=128)        # slots: micro-batches of an optimiser step
    loader = Loader(shards, sampler, tokenizer, text_dropout=0.1, workers=4)
    encode = Encode(codec, text, device)                                         # what the shards already hold is not computed
    for batch in encode.ahead(loader.batches(state, rank, world)):               # state: a step, or what `loader.state` gave
        batch.latents, batch.features, batch.lengths, batch.bucket.grid
    saved = loader.state(step)                                                   # `step` optimiser steps were consumed

A worker reads, checks, decodes, applies the EXIF orientation, crops to the bucket's aspect and resizes (bicubic, antialiased, up only
as far as the shards were written for). It keeps nothing between batches. A member that cannot be read is skipped, and the sample drawn
in its place depends on (seed, bucket, ordinal) alone; `ShardBatch.skipped` names it. Dropped captions have no text at all, drawn by
(seed, place in the stream).
A shard that is gone, a bucket without a usable member and a worker that was killed end the stream with one line (`Interrupted`).
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor

from ..loop.clock import Interrupted
from ..loop.workers import undisturbed
from .buckets import Bucket, BucketSampler, MicroBatch, outputs, philox, uniforms
from .encoders import LatentCodec, TextEncoder, Tokenizer
from .images import Unusable, fitted
from .shards import FEATURES, IDS, LATENTS, TEXT, Member, Shards, array_of

TRIES = 100  # members drawn for one place before a bucket is given up
STRIDE = 1 << 12  # draws of a micro-batch; no batch is larger
SOCKET_SECONDS = 5.0  # from a socket that broke until the worker behind it is known to have ended


@dataclass(frozen=True)
class Skip:
    """A member that was asked for and could not be used, and why."""

    key: str
    reason: str


@dataclass
class ShardBatch:
    """One micro-batch: B samples of one bucket, I image tokens each, RT text tokens in all, text packed sample after sample.

    From the loader: `latents` where the shards hold them, else `pixels`; `features` where the shards hold them, `ids` where
    they do or there is a tokenizer. `Encode` computes what is missing.
    """

    number: int  # of the global stream: step * slots + slot; with a purpose it keys every draw (noise, times)
    step: int
    slot: int
    bucket: Bucket
    keys: tuple[str, ...]  # B
    captions: tuple[str, ...]  # B, "" where dropped
    lengths: list[int]  # B, text tokens of each sample, 0 where its caption was dropped
    pixels: Tensor | None = None  # uint8 [B, H, W, 3]
    latents: Tensor | None = None  # float32 [B, I, C], normalised tokens
    ids: Tensor | None = None  # int64 [RT], after the chat prefix
    features: Tensor | None = None  # [RT, F, E]
    skipped: tuple[Skip, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that are there."""
        found = {name: getattr(self, name) for name in ("pixels", "latents", "ids", "features")}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def encoded(self) -> tuple[Tensor, Tensor]:
        """(latents, features). Errors: ValueError where `Encode` has not been here and the shards do not hold both."""
        if self.latents is None or self.features is None:
            raise ValueError(
                f"batch of step {self.step}, slot {self.slot}: expected latents and features; it is not encoded"
            )
        return self.latents, self.features

    def to(self, device: torch.device | str) -> ShardBatch:
        """The tensors on a device."""
        return self._with({name: value.to(device, non_blocking=True) for name, value in self.tensors.items()})

    def pin_memory(self) -> ShardBatch:
        """The tensors in page-locked memory; DataLoader's pinning calls this."""
        return self._with({name: value.pin_memory() for name, value in self.tensors.items()})

    def _with(self, tensors: dict[str, Any]) -> ShardBatch:
        return dataclasses.replace(self, **tensors)


class ShardReader(torch.utils.data.Dataset):
    """MicroBatch -> ShardBatch, from files and keyed draws alone: what a worker runs."""

    def __init__(self, shards: Shards, tokenizer: Tokenizer | None, text_dropout: float, seed: int):
        self.shards, self.tokenizer, self.text_dropout, self.seed = shards, tokenizer, text_dropout, seed

    def __getitem__(self, micro: MicroBatch) -> ShardBatch | Interrupted:
        try:
            return self._batch(micro)
        except Interrupted as error:  # raised by the training: DataLoader would carry a traceback over as its message
            return error

    def _batch(self, micro: MicroBatch) -> ShardBatch:
        count, rows = len(micro.members), []
        skipped: list[Skip] = []
        for place, member in enumerate(micro.members.tolist()):
            rows.append(self._usable(micro.bucket, micro.ordinal + place, member, skipped))
        dropped = uniforms(self.seed, "text dropout", micro.number * STRIDE, count) < self.text_dropout
        out = ShardBatch(
            micro.number,
            micro.step,
            micro.slot,
            micro.bucket,
            keys=tuple(row["key"] for row in rows),
            captions=tuple("" if gone else row["caption"] for row, gone in zip(rows, dropped)),
            lengths=[0 if gone else len(row.get("ids", ())) for row, gone in zip(rows, dropped)],
            skipped=tuple(skipped),
        )
        kept = [row for row, gone in zip(rows, dropped) if not gone]
        for name in ("pixels", "latents"):
            if name in rows[0]:
                setattr(out, name, torch.stack([row[name] for row in rows]))
        for name in ("ids", "features"):
            if name in rows[0]:
                setattr(out, name, torch.cat([row[name] for row in kept] or [rows[0][name][:0]]))
        return out

    def _usable(self, bucket: Bucket, ordinal: int, position: int, skipped: list[Skip]) -> dict[str, Any]:
        """The sample at a position, or the first usable one of those drawn in its place by (seed, bucket, ordinal)."""
        others = None
        for attempt in range(TRIES):
            member = self.shards.member(bucket, position)
            try:
                return self._sample(member, bucket)
            except Unusable as error:
                skipped.append(Skip(member.key, str(error)))
            if others is None:
                others = outputs(philox(self.seed, "replacement", bucket.name, ordinal), 0, TRIES)
            position = int(others[attempt]) % self.shards.sizes[bucket]
        raise Interrupted(
            f"{member.shard}: {TRIES} members of bucket {bucket.name} in a row cannot be used; the last: "
            f"{skipped[-1].key}: {skipped[-1].reason}"
        )

    def _sample(self, member: Member, bucket: Bucket) -> dict[str, Any]:
        """Errors: Unusable."""
        row: dict[str, Any] = {"key": member.key}
        try:
            row["caption"] = member.read(TEXT).decode()
        except UnicodeDecodeError as error:
            raise Unusable(f"its caption is not UTF-8: {error}") from None
        if "latents" in self.shards.precomputed:
            row["latents"] = array_of(member.read(LATENTS)).float()
        else:
            row["pixels"] = torch.from_numpy(fitted(member.read(member.picture), bucket.size, self.shards.max_upscale))
        if "text" in self.shards.precomputed:
            row["ids"], row["features"] = array_of(member.read(IDS)).long(), array_of(member.read(FEATURES))
        elif self.tokenizer is not None:
            row["ids"] = torch.tensor(self.tokenizer(row["caption"]), dtype=torch.int64)
        return row


def _lost(found: Any, error: Exception) -> str | None:
    """What DataLoader says of a worker that ended; also where its tensors, which come through a socket of its own, were still to be
    fetched. None where the error tells something else."""
    if "exited unexpectedly" in str(error):
        return str(error)
    workers = {worker.sentinel: worker.pid for worker in getattr(found, "_workers", ())}
    if not workers or not isinstance(error, ConnectionError | FileNotFoundError | EOFError):
        return None
    pids = [str(workers[one]) for one in wait(list(workers), SOCKET_SECONDS)]
    return f"DataLoader worker (pid(s) {', '.join(pids)}) exited unexpectedly" if pids else None


def ignore_group_sigterm(_worker: int) -> None:
    """SIGTERM ends a worker where the training sends it, at its own end; one to the whole group is the training's alone."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"
    training = parent.pid

    def wait() -> None:
        while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != training:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def identity_collate(batch: Any) -> Any:
    """DataLoader's collate function: a ShardReader's item is a whole batch."""
    return batch


class Loader:
    """Micro-batches of a shard set in the sampler's order.

    tokenizer: caption -> ids, None where captions alone are wanted or the shards hold the text. workers: processes that read
    ahead (0: none, here and now); their number changes no byte. pin: into page-locked memory. Errors: ValueError.
    """

    def __init__(
        self,
        shards: Shards,
        sampler: BucketSampler,
        tokenizer: Tokenizer | None = None,
        text_dropout: float = 0.1,
        workers: int = 0,
        pin: bool = False,
    ):
        if not 0 <= text_dropout <= 1 or workers < 0:
            raise ValueError(f"Loader: text_dropout {text_dropout}, workers {workers}; expected [0, 1] and 0 or more")
        if max(sampler.batch) > STRIDE:
            raise ValueError(f"Loader: a batch of {max(sampler.batch)}, expected at most {STRIDE}")
        for bucket, size in zip(sampler.buckets, sampler.sizes):
            if shards.sizes.get(bucket) != size:
                held = shards.sizes.get(bucket, 0)
                raise ValueError(f"Loader: the sampler counts {size} samples in {bucket.name}, the shards {held}")
        self.shards, self.sampler, self.workers, self.pin = shards, sampler, workers, pin
        self.reader = ShardReader(shards, tokenizer, text_dropout, sampler.seed)

    def batches(self, start: int | Mapping[str, Any] = 0, rank: int = 0, world: int = 1) -> Iterator[ShardBatch]:
        """A rank's micro-batches from the first slot of a step (or of a saved state) on, without end.

        Errors: ValueError where a state belongs to another stream or to other shards, or there are more ranks than slots;
        from the iterator: Interrupted.
        """
        if isinstance(start, Mapping) and start["data"] != self.shards.fingerprint:
            raise ValueError(
                f"Loader: the state was saved over shards {start['data']}, {self.shards.folder} is {self.shards.fingerprint}"
            )
        options: dict[str, Any] = {}
        if self.workers:  # forks of one fresh process, not of the training, whose threads and device they would copy
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            options = {"multiprocessing_context": context, "prefetch_factor": 2, "worker_init_fn": ignore_group_sigterm}
        loading = torch.utils.data.DataLoader(
            self.reader,
            batch_size=None,
            sampler=self.sampler.stream(start, rank, world),
            num_workers=self.workers,
            collate_fn=identity_collate,
            pin_memory=self.pin,
            generator=torch.Generator(),  # DataLoader draws a seed nobody uses; not from the global generator
            **options,
        )
        with undisturbed():  # to stop is the training's alone
            iterator = iter(loading)
        return self._told(iterator, start if isinstance(start, int) else start["step"], rank, world)

    def _told(
        self, found: Iterator[ShardBatch | Interrupted], step: int, rank: int, world: int
    ) -> Iterator[ShardBatch]:
        """The batches found from a step on; what ended them is raised here, with its shard and member."""
        for count in itertools.count():
            try:
                batch = next(found)
            except (RuntimeError, OSError, EOFError) as error:
                if (lost := _lost(found, error)) is None:
                    raise
                rounds, ahead = divmod(count, len(range(rank, self.sampler.slots, world)))
                micro = next(itertools.islice(self.sampler.stream(step + rounds, rank, world), ahead, None))
                first = self.shards.member(micro.bucket, int(micro.members[0]))
                batch = Interrupted(
                    f"{first.shard}: {lost} (killed, or out of memory?) before the batch of {first.key} "
                    f"and {len(micro.members) - 1} more was read"
                )
            if isinstance(batch, Interrupted):
                del found  # which ends the other workers
                raise batch
            yield batch

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps after `step` consumed optimiser steps; the same on every rank, valid on any world size."""
        return {**self.sampler.state(step), "data": self.shards.fingerprint}


class Encode:
    """Fills in latents and features on the training's device. Networks may be None where the shards hold their numbers.

    shards: where given, numbers computed with other networks than these are refused. Errors: ValueError.
    """

    def __init__(
        self,
        codec: LatentCodec | None,
        text: TextEncoder | None,
        device: torch.device | str,
        shards: Shards | None = None,
    ):
        self.codec, self.text, self.device = codec, text, torch.device(device)
        for name, network in (("latents", codec), ("text", text)):
            if network is None or shards is None:
                continue
            held = shards.precomputed
            if held.get(name, network.fingerprint) != network.fingerprint:
                raise ValueError(
                    f"Encode: the {name} of {shards.folder} were computed with {held[name]}, "
                    f"these networks are {network.fingerprint}"
                )

    @torch.no_grad()
    def __call__(self, batch: ShardBatch) -> ShardBatch:
        """Errors: ValueError where something is missing and there is nothing to compute it with."""
        lengths, ids = batch.lengths, batch.ids
        batch = batch.to(self.device)
        if batch.latents is None:
            if self.codec is None or batch.pixels is None:
                raise ValueError("Encode: the batch has no latents; expected pixels and a codec")
            batch.latents = self.codec.encode(batch.pixels).float()
        if batch.features is None:
            if self.text is None or ids is None:
                raise ValueError("Encode: the batch has no text features; expected ids and a text encoder")
            own = [part.tolist() for part in ids.cpu().split(lengths) if len(part)]
            none = torch.zeros(0, *self.text.shape, device=self.device)
            batch.features = self.text.encode(own) if own else none
        return batch

    def ahead(self, batches: Iterable[ShardBatch]) -> Iterator[ShardBatch]:
        """The same batches, encoded; on CUDA on a stream of its own, one ahead of the one in use."""
        if self.device.type != "cuda":
            yield from map(self, batches)
            return
        beside = torch.cuda.Stream(self.device)
        waiting: deque[tuple[ShardBatch, torch.cuda.Event]] = deque()
        beside.wait_stream(torch.cuda.current_stream(self.device))  # the networks may still be on their way there
        for batch in batches:
            with torch.cuda.stream(beside):
                encoded = self(batch)
                done = torch.cuda.Event()
                done.record(beside)
            waiting.append((encoded, done))
            if len(waiting) > 1:
                yield self._joined(*waiting.popleft())
        while waiting:
            yield self._joined(*waiting.popleft())

    def _joined(self, batch: ShardBatch, done: torch.cuda.Event) -> ShardBatch:
        """The batch for the stream that is current: it waits for the encoder's, and its memory is kept until it is done."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        for value in batch.tensors.values():
            value.record_stream(current)
        return batch
