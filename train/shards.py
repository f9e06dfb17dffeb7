"""Stage "shards": pictures and captions -> WebDataset shards of one aspect bucket each.

    python -m train shards --images photos/ --out shards/train --held-out 0.01               # photos/a.jpg with a.txt or a.json
    python -m train shards --images photos/ --split held_out --held-out 0.01 --out shards/held
    python -m train shards --images photos/ --captions captions.jsonl --bases 512 --aspects 1:1 --out shards/512
    python -m train shards --tars laion/ --out shards/train --workers 8                      # WebDataset tars as they are
    python -m train shards --curated curated/ --out shards/train             # what the stage curate keeps
    python -m train shards --world mini --bases 64 96 128 --per-bucket 2000 --out shards/world
    python -m train shards ... --precompute latents,text --model checkpoint/ --device cuda
    python -m train shards --verify shards/train                                             # hashes; exit 1 where one differs

A picture goes to the bucket of the nearest aspect (in log ratio) at every base whose size it covers (`--assign largest`: only at the
largest), enlarged by `--max-upscale` at most: not at all, unless told otherwise.
Files are kept as they are encoded; orientation, crop and resize happen at load. Captions come from NAME.txt, from "caption" in NAME.json,
or from `--captions`: JSON lines {"file": ..., "caption": ...}; those of a curation are its records', or told by their keys. What cannot
be used (broken, too small, without a caption) is left out, counted in manifest.json and named in left_out.jsonl. `--held-out SHARE` keeps
that share of the keys, chosen by their hash alone, out of the split "train"; the world's held-out compositions are its split "held_out".

Interrupted or out of disk, the same command goes on at the first unfinished shard. The same sources give the same tars,
whatever `--workers`.

`--precompute` stores the latents (posterior mode, patchified, normalised) and the text features beside each picture, from a checkpoint
folder (`--model`) or from Mini's stages (`--vae`, `--encoder`), or for an ablation from another network in its own folder, each alone or
beside `--model`: `--vae kl:FOLDER` (FLUX.1, SD3), `--vae vtp:FOLDER`, `--encoder chat:FOLDER` (Qwen3). Text features are large: at the
released size 46 KB a token in float32, so 5 MB for a caption of 110.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .ablations.adapters import ChatModelText, ScaledLatents
from .ablations.vtp import VtpLatents
from .data import encoders
from .data.buckets import ASPECTS, BASES, Bucket
from .data.curation.kept import kept_of
from .data.images import fitted
from .data.shards import FEATURES, IDS, LATENTS, MANIFEST, Sample, ShardSet, read_index, write_manifest, write_shard
from .data.sources import Drawing, Source, assign, captions_of, fraction, images_of, tars_of
from .loop.checkpoints import write_text
from .loop.clock import FULL, Interrupted, positive
from .loop.ranks import device_of
from .loop.workers import start_worker, undisturbed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Precompute:
    """What is computed beside each picture, and with which networks. Plain values: every process loads them for itself."""

    what: tuple[str, ...] = ()
    model: Path | None = None
    vae: Path | None = None
    encoder: Path | None = None
    recipe: str = "mini"
    device: str = "cpu"
    dtype: str = "float32"
    max_upscale: float = 1.0

    def networks(self) -> tuple[encoders.Tokenizer, encoders.LatentCodec | None, encoders.TextEncoder | None]:
        return _networks(self)

    def fingerprints(self) -> dict[str, str]:
        _, codec, text = self.networks() if self.what else (None, None, None)
        found = {"latents": codec and codec.fingerprint, "text": text and text.fingerprint}
        return {name: value for name, value in found.items() if value}

    def __call__(self, sample: Sample, bucket: Bucket) -> Sample:
        if not self.what:
            return sample
        tokenizer, codec, text = self.networks()
        if codec is not None:
            pixels = torch.from_numpy(fitted(sample.picture, bucket.size, self.max_upscale))[None].to(self.device)
            sample.arrays[LATENTS] = codec.encode(pixels)[0].to(DTYPES[self.dtype])
        if text is not None:
            ids = tokenizer(sample.caption)
            sample.arrays[IDS] = torch.tensor(ids, dtype=torch.int32)
            sample.arrays[FEATURES] = text.encode([ids]).to(DTYPES[self.dtype])
        return sample


def _foreign(asked: Path | None, kinds: Sequence[str], flag: str) -> tuple[str, Path] | None:
    """KIND:FOLDER -> both; None for a path of our own. Errors: ValueError for another kind before a colon, or no folder there."""
    kind, colon, rest = str(asked or "").partition(":")
    if not colon or Path(str(asked)).exists():
        return None
    if kind not in kinds:
        raise ValueError(f"{flag} {asked}: expected a path, or one of {', '.join(kinds)} before a colon and a folder")
    if not Path(rest).is_dir():
        raise ValueError(f"{flag} {asked}: no folder {rest}")
    return kind, Path(rest)


@functools.lru_cache(maxsize=1)
def _networks(asked: Precompute) -> tuple[Any, Any, Any]:
    device = device_of(asked.device)
    tokenizer: Any = None
    codec: encoders.LatentCodec | None = None
    text: encoders.TextEncoder | None = None
    latents, texts = ("latents" in asked.what), ("text" in asked.what)
    vae = _foreign(asked.vae, ("kl", "vtp"), "--vae")
    encoder = _foreign(asked.encoder, ("chat",), "--encoder")
    if latents and vae is not None:
        codec = (ScaledLatents if vae[0] == "kl" else VtpLatents).of_folder(vae[1], device=device)
    if texts and encoder is not None:
        tokenizer, text = ChatModelText.of_folder(encoder[1], device, DTYPES[asked.dtype])
    if (latents and codec is None) or (texts and text is None):
        own: tuple[encoders.Tokenizer, encoders.LatentCodec, encoders.TextEncoder]
        if asked.model is not None:
            own = encoders.released(asked.model, device, DTYPES[asked.dtype])
        elif asked.vae is None or asked.encoder is None or vae or encoder:
            raise ValueError("--precompute: expected --model, or --vae and --encoder")
        else:
            own = encoders.mini(asked.recipe, asked.vae, asked.encoder, device)
        codec = codec or own[1]
        tokenizer, text = (own[0], own[2]) if text is None else (tokenizer, text)
    return tokenizer, codec if latents else None, text if texts else None


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be: its bucket, its file, what goes into it."""

    bucket: Bucket
    path: Path
    sources: tuple[Source, ...]
    extra: Precompute

    @property
    def digest(self) -> str:
        """Of everything the bytes depend on; paths and devices are no part of it."""
        content = [[type(s).__name__, *(v for k, v in asdict(s).items() if k != "folder")] for s in self.sources]
        settings: list[Any] = [self.bucket.name, sorted(self.extra.fingerprints().items()), self.extra.dtype]
        if self.bucket.size != self.bucket.unrecorded_size:  # where the name alone does not say it
            settings.append(list(self.bucket.size))
        return hashlib.sha256(json.dumps([settings, content]).encode()).hexdigest()[:16]

    def build(self) -> int:
        """Write the shard; the number of its samples."""
        makers = [(s.file, lambda s=s: self.extra(s.sample(), self.bucket)) for s in self.sources]
        return len(write_shard(self.path, self.bucket, makers, self.digest)["keys"])

    def done(self) -> bool:
        """Whether it is there. Errors: ValueError where what is there was made of something else."""
        index = self.path.with_suffix(".json")
        if not (index.is_file() and self.path.is_file()):
            return False
        if read_index(index)["plan"] != self.digest:
            raise ValueError(
                f"{self.path}: was made from other sources or settings; expected a fresh --out, or that folder removed"
            )
        return True


def sources_of(options: argparse.Namespace, out: list[tuple[str, str]]) -> dict[Bucket, list[Source]]:
    """What goes where, in stored order: pictures by the hash of their keys, so that a shard is a sample of the folder."""
    buckets: dict[Bucket, list[Source]] = {Bucket(b, a): [] for b in options.bases for a in options.aspects}
    if options.world:
        for place, (bucket, own) in enumerate(buckets.items()):
            first = options.first_seed + place * options.per_bucket
            seeds = range(first, first + options.per_bucket)
            own += [Drawing(options.world, options.split, seed, *bucket.size) for seed in seeds]
        return buckets
    offered: dict[str, tuple[Path | None, Callable[..., Iterator[tuple[Any, int, int]]]]] = {
        "--images": (options.images, images_of),
        "--tars": (options.tars, tars_of),
        "--curated": (options.curated, kept_of),
    }
    option, folder, found_in = next((name, given, how) for name, (given, how) in offered.items() if given)
    if not folder.is_dir():
        raise ValueError(f"{option}: {folder} is no folder")
    captions = captions_of(options.captions) if options.captions else None
    for picture, height, width in found_in(folder, captions, out, options.workers):
        if (fraction(picture.key) < options.held_out) != (options.split == "held_out"):
            continue
        found = assign(height, width, options.bases, options.aspects, options.assign == "largest", options.max_upscale)
        if not found:
            out.append((picture.file, "too small"))
        for bucket in found:
            buckets[bucket].append(picture)
    for own in buckets.values():
        own.sort(key=lambda p: (hashlib.sha256(p.key.encode()).digest(), p.key))
    return buckets


def plans_of(options: argparse.Namespace, buckets: dict[Bucket, list[Source]], extra: Precompute) -> list[ShardPlan]:
    return [
        ShardPlan(
            bucket, options.out / bucket.name / f"{number:06d}.tar", tuple(own[start : start + options.samples]), extra
        )
        for bucket, own in buckets.items()
        for number, start in enumerate(range(0, len(own), options.samples))
    ]


def completed(plans: Sequence[ShardPlan], workers: int) -> Iterator[tuple[ShardPlan, int]]:
    """Shards as they are finished; processes, where asked for, write several at once."""
    if not workers:
        yield from ((plan, plan.build()) for plan in plans)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        with undisturbed():
            waiting: list[tuple[ShardPlan, Callable[[], int]]] = [(p, pool.submit(p.build).result) for p in plans]
        try:
            for plan, wait in waiting:
                yield plan, wait()
        except BrokenProcessPool as error:
            pool.shutdown(cancel_futures=True)
            raise Interrupted(
                f"{plan.path}: a worker died; what is finished is kept, the same command goes on from there"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def kind(reason: str) -> str:
    """The sort of a reason, which names no file."""
    return (
        "no caption" if reason.startswith("no caption") else reason if reason in ("too small", "twice") else "unusable"
    )


def in_words(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()) if count) or "nothing"


def forgotten(folder: Path, plans: Sequence[ShardPlan]) -> str:
    """The buckets, and how many shards of each, that a folder's manifest names and the plans do not. Errors: ValueError."""
    before = ShardSet(folder).manifest["buckets"] if (folder / MANIFEST).is_file() else {}
    kept = {plan.path for plan in plans}
    gone = {bucket: sum(folder / bucket / shard["name"] not in kept for shard in own) for bucket, own in before.items()}
    return ", ".join(f"{bucket} ({count})" for bucket, count in gone.items() if count)


def command_of(options: argparse.Namespace) -> str:
    """The command that makes these shards, without where to and by how many processes."""
    parser, words = argparse.ArgumentParser(), ["python", "-m", "train", "shards"]
    add_arguments(parser)
    for name, value in vars(options).items():
        if name not in ("stage", "run", "out", "workers", "verify") and value != parser.get_default(name):
            flat = ",".join(value) if name == "precompute" else value
            words += [f"--{name.replace('_', '-')}", *map(str, flat if isinstance(flat, list) else [flat])]
    return shlex.join(words)


def build(options: argparse.Namespace) -> None:
    """Plan, write what is missing, then the manifest. Errors: ValueError where nothing usable was found; OSError."""
    extra = Precompute(
        tuple(options.precompute),
        options.model,
        options.vae,
        options.encoder,
        options.config,
        options.device,
        options.dtype,
        options.max_upscale,
    )
    out: list[tuple[str, str]] = []
    plans = plans_of(options, sources_of(options, out), extra)
    if not plans:
        reasons = in_words(collections.Counter(kind(reason) for _, reason in out))
        raise ValueError(
            f"shards: {options.images or options.tars or options.curated} holds no usable picture with a caption "
            f"for --split {options.split}; left out: {reasons}"
        )
    # what is missing
    gone = forgotten(options.out, plans)
    missing = [plan for plan in plans if not plan.done()]
    small = sum(reason == "too small" for _, reason in out)
    if small:
        how = f"enlarged by {options.max_upscale:g} at most" if options.max_upscale > 1 else "without enlarging"
        print(f"{small} pictures serve no bucket: they are too small for every size, {how}", flush=True)
    print(f"{sum(len(p.sources) for p in plans)} samples in {len(plans)} shards, {len(missing)} to write", flush=True)
    begin, written = time.monotonic(), 0
    for count, (plan, samples) in enumerate(completed(missing, options.workers), 1):
        left = (time.monotonic() - begin) / count * (len(missing) - count)
        name, written = plan.path.relative_to(options.out), written + samples
        print(f"{name}  {samples} samples  {count} of {len(missing)}, {left:.0f} s left", flush=True)
    # the manifest, and what was left out
    counted = collections.Counter(kind(reason) for _, reason in out)
    settings = {
        "split": options.split,
        "held_out": options.held_out,
        "precomputed": extra.fingerprints(),
        "dtype": options.dtype if extra.what else None,
        "max_upscale": options.max_upscale,
        "command": command_of(options),
    }
    manifest = write_manifest(options.out, [(p.bucket, p.path) for p in plans], counted, settings)
    torn = [pair for p in plans for pair in read_index(p.path.with_suffix(".json"))["skipped"]]
    lines = [json.dumps({"source": s, "reason": r}, ensure_ascii=False) for s, r in [*out, *torn]]
    write_text(options.out / "left_out.jsonl", "".join(line + "\n" for line in lines))
    if gone:
        print(
            f"in the manifest before and no longer, files kept: {gone}; expected --bases and --aspects of all of them"
        )
    print(f"{written} samples written, {manifest['samples']} in all; left out: {in_words(manifest['left_out'])}")


def share(text: str) -> float:
    """A number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError(text)
    return value


def upscale(text: str) -> float:
    """A number from 1 to 4."""
    value = float(text)
    if not 1 <= value <= 4:
        raise ValueError(text)
    return value


def parts(text: str) -> list[str]:
    """Comma-separated names of what can be precomputed."""
    names = text.split(",")
    if not set(names) <= {"latents", "text"}:
        raise ValueError(text)
    return sorted(set(names))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="FOLDER", help="pictures, in subfolders too")
    source.add_argument(
        "--tars", type=Path, metavar="FOLDER", help="WebDataset tars, in subfolders too; also shards of other sizes"
    )
    source.add_argument(
        "--curated", type=Path, metavar="FOLDER", help="what the stage curate keeps, with the captions it found"
    )
    source.add_argument("--world", metavar="RECIPE", help="scenes of a recipe's small world, e.g. mini")
    source.add_argument(
        "--verify", type=Path, metavar="FOLDER", help="write nothing; compare finished shards with their hashes"
    )
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help='JSON lines {"file": ..., "caption": ...}, or .parquet'
    )
    parser.add_argument("--out", type=Path, default=Path("shards"), help="folder to write (default: shards)")
    parser.add_argument(
        "--bases", type=int, nargs="+", default=list(BASES), help="base resolutions (default: 512 768 1024)"
    )
    parser.add_argument(
        "--aspects",
        nargs="+",
        choices=ASPECTS,
        metavar="W:H",
        default=list(ASPECTS),
        help="aspect ratios W:H (default: all nine)",
    )
    parser.add_argument(
        "--assign", choices=("all", "largest"), default="all", help="bases a picture goes to (default: all it serves)"
    )
    parser.add_argument(
        "--max-upscale",
        type=upscale,
        default=1.0,
        metavar="FACTOR",
        help="how much a picture may be enlarged to serve a bucket (default: 1, not at all; 1.34: 384^2 serves base 512)",
    )
    parser.add_argument("--split", choices=("train", "held_out"), default="train", help="(default: train)")
    parser.add_argument(
        "--held-out", type=share, default=0.0, metavar="SHARE", help="of the keys of a folder (default: 0)"
    )
    parser.add_argument("--samples", type=positive, default=1_000, help="samples of a shard (default: 1000)")
    parser.add_argument(
        "--per-bucket", type=positive, default=1_000, help="--world: scenes of a bucket (default: 1000)"
    )
    parser.add_argument("--first-seed", type=int, default=0, help="--world: seed of the first scene (default: 0)")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that write shards, threads that list sources (default: 0, none)",
    )
    parser.add_argument(
        "--precompute", type=parts, default=[], metavar="latents,text", help="what to store beside pictures"
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="--precompute: a checkpoint folder")
    parser.add_argument(
        "--vae", type=Path, default=Path("runs/vae"), metavar="[kl:|vtp:]FOLDER",
        help='--precompute: folder of the stage "vae", or of another autoencoder (kl: FLUX.1 or SD3)',
    )  # fmt: skip
    parser.add_argument(
        "--encoder", type=Path, default=Path("runs/encoder/encoder.pt"), metavar="STATE|chat:FOLDER",
        help='--precompute: state of the stage "encoder", or a chat model in transformers\' layout (Qwen3)',
    )  # fmt: skip
    parser.add_argument(
        "--config", default="mini", help="--precompute: recipe of --vae and --encoder, or a file .py (default: mini)"
    )
    parser.add_argument("--device", default="cpu", help="--precompute: cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of what is stored (default: float32)"
    )


def run(options: argparse.Namespace) -> int:
    if options.verify:
        found = ShardSet(options.verify).faults()
        print("\n".join(found) or f"{options.verify}: every file is what was written")
        return int(bool(found))
    torch.set_num_threads(1)
    try:
        build(options)
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"shards: {error.strerror}: {error.filename}", file=sys.stderr)
        print("What is finished is kept; the same command goes on from there.", file=sys.stderr)
        return 1
    return 0
