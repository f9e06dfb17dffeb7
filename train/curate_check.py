"""Does the data engine find what was planted? Generated images with known defects through curate, and what came of each.

    python -m train curate_check /tmp/check --images 2000                     # writes /tmp/check/images, curates, scores
    python -m train curate_check /tmp/check --images 50000 --ray --cpus 16    # the same by Ray

For every step: planted, found, found by mistake, recall and precision; then images a second of one core (CPU time of all
processes here) and the peak of this process's memory after each tenth of the images, which must stay flat. The images are drawn
from their seeds alone, so the same command gives the same images. Recall or precision below --at-least ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

from lens.formats.files import write_json

from .data.curation.classifiers import DEFAULTS, Models, loaded
from .data.curation.engine import RayOptions, Settings, plan
from .data.curation.engine import run as run_chunks
from .data.curation.manifest import Curation, write_manifest
from .data.curation.records import STEPS, Thresholds
from .evaluate.planted_defects import planted, settled
from .loop.clock import positive


def generate(folder: Path, images: int) -> dict[str, str | None]:
    """At least so many planted images below a folder, those that are there left alone; file -> step or None."""
    expected: dict[str, str | None] = {}
    seed = 0
    while len(expected) < images:
        made = planted(seed)
        for one in made:
            path = folder / one.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                path.write_bytes(one.data)
            expected[one.name] = one.step
        seed += 1
    return expected


def compared(found: dict[str, str | None], expected: dict[str, str | None]) -> dict[str, dict[str, float]]:
    """Per step: planted, found (of those), mistaken (found where another step or none was planted), recall, precision."""
    out = {}
    for step in STEPS:
        truth, said = ({k for k, v in those.items() if v == step} for those in (expected, found))
        hit = len(truth & said)
        if truth or said:
            recall, precision = hit / len(truth) if truth else 1.0, hit / len(said) if said else 1.0
            numbers = {"planted": len(truth), "found": hit, "mistaken": len(said) - hit}
            out[step] = {**numbers, "recall": recall, "precision": precision}
    return out


def cpu_seconds() -> float:
    """Of this process and of the ended ones that it started."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(t.ru_utime + t.ru_stime for t in times)


def megabytes() -> float:
    """The peak of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder for images/ and curated/")
    parser.add_argument("--images", type=positive, default=2000, help="at least so many (default: 2000)")
    parser.add_argument("--ray", action="store_true", help="by Ray Data instead of in this process")
    parser.add_argument("--cpus", type=positive, help="--ray: processes (default: all cores)")
    parser.add_argument("--nsfw", default=DEFAULTS["nsfw"], metavar="MODEL", help="as of curate")
    parser.add_argument("--embedding", default=DEFAULTS["embedding"], metavar="MODEL", help="as of curate")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="thresholds", help="as of curate"
    )
    parser.add_argument(
        "--at-least", type=float, default=0.0, metavar="SHARE", help="of recall and precision (default: 0)"
    )


def run(options: argparse.Namespace) -> int:
    begin = time.monotonic()
    expected = generate(options.folder / "images", options.images)
    print(f"{len(expected)} images generated in {time.monotonic() - begin:.0f} s", flush=True)
    models = Models(nsfw=options.nsfw, embedding=options.embedding)
    settings = Settings(
        options.folder / "images", options.folder / "curated", kind="synthetic", licence="none", models=models
    )
    judges, counts = loaded(models), plan(settings)
    cpu, begin, done, memory = cpu_seconds(), time.monotonic(), 0, list[float]()

    def say(_: str, records: int) -> None:
        nonlocal done
        done += records
        if done * 10 >= len(expected) * (len(memory) + 1):
            memory.append(round(megabytes()))
            print(f"{done} images, peak {memory[-1]:.0f} MB", flush=True)

    run_chunks(settings, counts, RayOptions(cpus=options.cpus) if options.ray else None, say)
    cpu, wall = cpu_seconds() - cpu, time.monotonic() - begin
    embedding = judges.get("embedding")
    embedded = None if embedding is None else embedding.duplicate_above
    write_manifest(settings.out, settings.source, Thresholds.of(options.thresholds), embedded)
    curation = Curation(settings.out)
    found = settled(dict(zip(curation.columns["key"], curation.view().words(), strict=True)), expected)
    result = compared(found, expected)
    print(f"{'step':<10} planted   found mistaken  recall precision")
    for step, n in result.items():
        print(
            f"{step:<10} {n['planted']:>7} {n['found']:>7} {n['mistaken']:>8} {n['recall']:>7.2%} {n['precision']:>9.2%}"
        )
    speed = {"images": done, "cpu_seconds": cpu, "wall_seconds": wall, "per_core": done / cpu if done else 0.0}
    if done:
        print(f"{done} images: {speed['per_core']:.1f} images/s of one core's time, {done / wall:.1f} images/s in all")
    write_json(
        options.folder / "check.json", {"steps": result, "speed": speed, "memory_mb": memory, "models": list(judges)}
    )
    print(json.dumps({"memory_mb": memory}))
    return int(any(min(n["recall"], n["precision"]) < options.at_least for n in result.values()))
