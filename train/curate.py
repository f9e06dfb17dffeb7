"""Stage "curate": raw images -> records with every score, and a manifest that says which of nine steps leaves each out.

    python -m train curate photos/ curated/ --inline --licence CC0-1.0        # a folder, in this process
    python -m train curate tars/ curated/ --source synthetic                  # WebDataset tars, by Ray on all cores
    python -m train curate urls.parquet curated/ --ray-address auto --judges 8 --device cuda
    python -m train curate photos/ curated/ --inline --set clarity_min=8      # other thresholds: nothing is computed anew
    python -m train curate_report curated/                                    # the page again; curate writes it, too
    python -m train curate_calibrate curated/                                 # percentiles and sheets around each threshold
    python -m train shards --curated curated/ --out shards/

SOURCE is a folder of images, a folder of tars or one tar, or a list (.parquet, .jsonl) of rows with `path` or `url` and
perhaps `caption`. The steps are the paper's: broken files, area, NSFW, aesthetic score, watermark, clarity, entropy,
luminance, near-duplicates. A classifier that is not installed judges nothing and drops nothing, which the counts say; --require
makes that an error. Nothing is downloaded but the URLs of a list.

Interrupted, killed or out of disk, the same command goes on at the first chunk that is not finished. The same source
gives the same records and the same manifest, whatever runs them and however often it was interrupted.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from .curate_report import counts_in_words, write_report
from .data.curation.classifiers import DEFAULTS, WORDS, Models, loaded, why_not_judged
from .data.curation.engine import RayOptions, Settings, plan
from .data.curation.engine import run as run_chunks
from .data.curation.manifest import Curation, write_manifest
from .data.curation.readers import root_of
from .data.curation.records import MODELS, SOURCES, STEP_OF_MODEL, Thresholds, arrow
from .data.curation.steps import Limits
from .loop.clock import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source_path", type=Path, metavar="SOURCE", help="folder of images or tars, a tar, .parquet, .jsonl"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--source", choices=SOURCES, default="real", help="which of the paper's sources it is (default: real)"
    )
    parser.add_argument("--licence", default="unknown", help="of all images; stands in every record (default: unknown)")
    parser.add_argument("--inline", action="store_true", help="in this process, without Ray")
    parser.add_argument(
        "--ray-address", metavar="HOST:PORT", help="of a running cluster, or auto (default: one is started)"
    )
    parser.add_argument("--cpus", type=positive, help="of the cluster that is started (default: all)")
    parser.add_argument(
        "--judges", type=int, default=0, help="Ray actors that hold the models (default: 0, every worker does)"
    )
    parser.add_argument(
        "--part", type=positive, default=1000, help="images of a Parquet file of records (default: 1000)"
    )
    parser.add_argument("--chunk", type=positive, default=64, help="images that one process does at once (default: 64)")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-bytes", type=positive, default=64 << 20, help="of an encoded image (default: 64 MiB)")
    limits.add_argument("--max-pixels", type=positive, default=1 << 26, help="of a decoded image (default: 2^26)")
    limits.add_argument("--max-seconds", type=float, default=30.0, help="of a URL, redirects included (default: 30)")
    limits.add_argument("--allow-private", action="store_true", help="URLs may lead to private and local addresses")
    models = parser.add_argument_group(
        "classifiers: a checkpoint folder, FILE.onnx with FILE.json, " + ", ".join(WORDS)
    )
    for use in MODELS:
        models.add_argument(f"--{use}", default=DEFAULTS[use], metavar="MODEL", help=f"(default: {DEFAULTS[use]})")
    models.add_argument(
        "--nsfw-classes", default=Models.nsfw_classes, metavar="REGEX", help="labels that count as nsfw"
    )
    models.add_argument(
        "--watermark-classes",
        default=Models.watermark_classes,
        metavar="REGEX",
        help="labels that count as watermarked",
    )
    models.add_argument("--device", default="cpu", help="of classifiers: cpu or cuda (default: cpu)")
    models.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: float32)"
    )
    models.add_argument(
        "--require", default="", metavar="nsfw,aesthetic", help="classifiers without which nothing runs"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="thresholds",
        help="a threshold: area_min, nsfw_max, aesthetic_min, watermark_max, clarity_min, entropy_min, luminance_min, "
        "luminance_max, duplicate_above (repeatable)",
    )  # fmt: skip


def settings_of(options: argparse.Namespace) -> Settings:
    limits = Limits(options.max_bytes, options.max_pixels, options.max_seconds, options.allow_private)
    words = {use: getattr(options, use) for use in MODELS}
    words = {use: word if word in WORDS else str(Path(word).resolve()) for use, word in words.items()}
    classes = {"nsfw_classes": options.nsfw_classes, "watermark_classes": options.watermark_classes}
    models = Models(**words, **classes, device=options.device, dtype=options.dtype)
    source, out = options.source_path.resolve(), options.out.resolve()
    return Settings(source, out, options.source, options.licence, limits, models, options.part, options.chunk)


def required(options: argparse.Namespace, settings: Settings) -> None:
    """Errors: ValueError naming a classifier that --require names and that is not here, and why."""
    for use in filter(None, options.require.split(",")):
        if use not in MODELS:
            raise ValueError(f"--require {use}: expected some of {', '.join(MODELS)}")
        if use not in loaded(settings.models):
            raise ValueError(f"--require {use}: {why_not_judged(settings.models, use)}")


def run(options: argparse.Namespace) -> int:
    arrow()
    torch.set_num_threads(1)
    thresholds, settings = Thresholds.of(options.thresholds), settings_of(options)
    required(options, settings)
    counts = plan(settings)
    judges = loaded(settings.models)
    for use in MODELS:
        if use not in judges:
            print(f"{STEP_OF_MODEL[use]}: not judged: {why_not_judged(settings.models, use)}")
    begin, total, done = time.monotonic(), sum(counts), 0

    def say(what: str, records: int) -> None:
        nonlocal done
        done += records
        seconds = time.monotonic() - begin
        print(f"{what}: {done} images, {done / max(seconds, 1e-9):.0f} images/s", flush=True)

    print(f"{total} images in {len(counts)} parts", flush=True)
    ray = None if options.inline else RayOptions(options.ray_address, options.cpus, options.judges)
    run_chunks(settings, counts, ray, say)
    embedding = judges.get("embedding")
    embedded = None if embedding is None else embedding.duplicate_above
    path, found, new = write_manifest(settings.out, root_of(settings.source), thresholds, embedded)
    print(counts_in_words(found))
    curation = Curation(settings.out)
    page = write_report(curation)
    print(f"{curation.manifest['kept']} of {total} kept; {path}{'' if new else ' (as before)'}; {page}")
    return 0
