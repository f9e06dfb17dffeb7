"""Does the data engine find what was planted? Generated images with known defects through curate, and what came of each.

    python -m train curate_check /tmp/check --images 2000                     # writes /tmp/check/images, curates, scores
    python -m train curate_check /tmp/check --images 50000 --side 192 --colours --ray --cpus 2 --kill --again

For every step: planted, found, found by mistake, recall and precision; then images a second of one core (CPU time of this
process and of Ray's workers, their start and imports included) and the memory of this process and of its largest worker
after each tenth of the images, which must stay flat. The images are drawn from their seeds alone, so the same command
gives the same images.

--colours plants defects of all nine steps: those of models by tints, for models that look at colours; without it those of
watermarks are stamps (train/data/stamps.py), and none are planted for nsfw and aesthetic scores. --kill ends a worker of
Ray by SIGKILL behind the first third of the images. --again curates them once more, in this process, interrupted behind
the first third and continued: every file must come out the same to the byte. Recall or precision below --at-least, or a file
that differs, ends with exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from lens.formats.files import write_json

from .data.curation.classifiers import DEFAULTS, Models, loaded
from .data.curation.engine import RayOptions, Settings, plan
from .data.curation.engine import run as run_chunks
from .data.curation.manifest import Curation, write_manifest
from .data.curation.records import STEPS, Thresholds
from .data.shards import digest_of
from .data.stamps import stamped
from .evaluate.planted_defects import AREA, JUDGED, SIDE, Change, encoded, planted, settled
from .evaluate.planted_defects import plan as names_of
from .evaluate.small_onnx import COLOUR_THRESHOLDS, colour_judges
from .loop.clock import positive


def watermarked(image: Image.Image) -> bytes:
    """Under a stamp of any style, drawn from the image itself."""
    pixels = np.asarray(image)
    return encoded(Image.fromarray(stamped(pixels, np.random.default_rng(int(pixels.sum())))[0]))


def generate(
    folder: Path, images: int, judged: Mapping[str, Change] | None = None, side: int = SIDE
) -> dict[str, str | None]:
    """At least so many planted images below a folder, what is there not drawn again; file -> step or None."""
    expected: dict[str, str | None] = {}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg")}
    seed = 0
    while len(expected) < images:
        steps = {name: step for name, _, step in names_of(seed, judged)}
        if not steps.keys() <= there:
            for one in planted(seed, judged, side):
                (folder / one.name).parent.mkdir(parents=True, exist_ok=True)
                (folder / one.name).write_bytes(one.data)
        expected |= steps
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


# ------------------------------------------------------------------------------------------------ processes


def cpu_seconds() -> float:
    """Of this process."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


def megabytes(pid: int | None = None) -> float:
    """What a process (None: this one) holds now; where there is no /proc its peak. 0 for one that has ended."""
    own = Path("/proc") / str(pid or "self") / "statm"
    try:
        return int(own.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0 if pid else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds_of(pid: int) -> float:
    """The CPU time of a process so far; 0 for one that has ended, and where there is no /proc."""
    try:
        times = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return 0.0
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def workers() -> list[int]:
    """Ray's workers below this process, by the names that Ray gives them; none where there is no /proc."""
    parents, names = dict[int, int](), dict[int, str]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
        except OSError:
            continue
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sorted(pid for pid in ours if names.get(pid, "").startswith("ray::"))


def busiest(pids: list[int]) -> int:
    """Of those the one that holds the most memory: it has models. Errors: ValueError where there is none."""
    if not pids:
        raise ValueError("--kill: no worker of Ray below this process; expected --ray, on a machine with /proc")
    return max(pids, key=megabytes)


# ------------------------------------------------------------------------------------------------ runs


@dataclasses.dataclass
class Watch:
    """What a run says of its chunks: memory after each tenth of `total` images; `at_a_third` is called once, behind a third.

    workers: CPU seconds of Ray's workers by process, as last seen: of one that was killed up to the tenth before.
    """

    total: int
    at_a_third: Callable[[], None] | None = None
    done: int = 0
    memory: list[dict[str, int]] = dataclasses.field(default_factory=list)
    workers: dict[int, float] = dataclasses.field(default_factory=dict)

    def __call__(self, _: str, records: int) -> None:
        self.done += records
        if self.done * 10 >= self.total * (len(self.memory) + 1):
            there = workers()
            self.workers |= {pid: seconds_of(pid) for pid in there}
            largest = max(map(megabytes, there), default=0.0)
            self.memory.append(
                {"images": self.done, "this_process_mb": round(megabytes()), "worker_mb": round(largest)}
            )
            print(json.dumps(self.memory[-1]), flush=True)
        if self.at_a_third is not None and self.done * 3 >= self.total:
            act, self.at_a_third = self.at_a_third, None
            act()


def curated(settings: Settings, thresholds: Thresholds, ray: RayOptions | None, watch: Watch) -> None:
    """All of curate but its page."""
    run_chunks(settings, plan(settings), ray, watch)
    embedding = loaded(settings.models).get("embedding")
    embedded = None if embedding is None else embedding.duplicate_above
    write_manifest(settings.out, settings.source, thresholds, embedded)


def kill_a_worker() -> None:
    pid = busiest(workers())
    os.kill(pid, signal.SIGKILL)
    print(f"killed worker {pid}", flush=True)


def interrupt() -> None:
    raise KeyboardInterrupt


def differing(one: Path, other: Path) -> list[str]:
    """Files that are in one folder alone, or not the same bytes in both."""
    digests = [
        {p.relative_to(folder).as_posix(): digest_of(p) for p in folder.rglob("*") if p.is_file()}
        for folder in (one, other)
    ]
    names = sorted({*digests[0], *digests[1]})
    return [name for name in names if digests[0].get(name) != digests[1].get(name)]


# ------------------------------------------------------------------------------------------------ the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder for images/ and curated/")
    parser.add_argument("--images", type=positive, default=2000, help="at least so many (default: 2000)")
    parser.add_argument(
        "--side", type=positive, default=SIDE, help=f"shorter side; area_min goes with it (default: {SIDE})"
    )
    parser.add_argument("--ray", action="store_true", help="by Ray Data instead of in this process")
    parser.add_argument("--cpus", type=positive, help="--ray: processes (default: all cores)")
    parser.add_argument("--kill", action="store_true", help="--ray: end a worker by SIGKILL behind the first third")
    parser.add_argument("--again", action="store_true", help="once more, inline and interrupted, and compare all files")
    parser.add_argument("--colours", action="store_true", help="models that look at colours, and defects for them")
    for use in ("nsfw", "watermark", "embedding"):
        parser.add_argument(f"--{use}", default=DEFAULTS[use], metavar="MODEL", help="as of curate")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="thresholds", help="as of curate"
    )
    parser.add_argument(
        "--at-least", type=float, default=0.0, metavar="SHARE", help="of recall and precision (default: 0)"
    )


def models_of(options: argparse.Namespace) -> tuple[Models, Thresholds]:
    """Whoever judges, and the thresholds that go with it and with the images' side."""
    words = [f"area_min={round((AREA * options.side) ** 2)}"]
    if not options.colours:
        models = Models(nsfw=options.nsfw, watermark=options.watermark, embedding=options.embedding)
        return models, Thresholds.of([*words, *options.thresholds])
    folder = options.folder.resolve() / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return Models(**colour_judges(folder)), Thresholds.of([*words, *COLOUR_THRESHOLDS, *options.thresholds])


def run(options: argparse.Namespace) -> int:
    if options.kill and not options.ray:
        raise ValueError("--kill: ends a worker of Ray; expected --ray")
    begin, source = time.monotonic(), options.folder / "images"
    models, thresholds = models_of(options)
    judges = loaded(models)
    own = {"watermark": watermarked} if "watermark" in judges else {}
    expected = generate(source, options.images, JUDGED if options.colours else own, options.side)
    print(f"{len(expected)} images generated in {time.monotonic() - begin:.0f} s", flush=True)
    settings = Settings(source, options.folder / "curated", kind="synthetic", licence="none", models=models)
    watch = Watch(len(expected), kill_a_worker if options.kill else None)
    cpu, begin = cpu_seconds(), time.monotonic()
    curated(settings, thresholds, RayOptions(cpus=options.cpus) if options.ray else None, watch)
    cpu, wall = cpu_seconds() - cpu + sum(watch.workers.values()), time.monotonic() - begin
    curation = Curation(settings.out)
    found = settled(dict(zip(curation.columns["key"], curation.view().words(), strict=True)), expected)
    result = compared(found, expected)
    print(f"{'step':<10} planted   found mistaken  recall precision")
    for step, n in result.items():
        print(
            f"{step:<10} {n['planted']:>7} {n['found']:>7} {n['mistaken']:>8} {n['recall']:>7.2%} {n['precision']:>9.2%}"
        )
    done = watch.done
    speed = {"images": done, "cpu_seconds": cpu, "wall_seconds": wall, "per_core": done / cpu if done else 0.0}
    if done:
        print(f"{done} images: {speed['per_core']:.1f} images/s of one core's time, {done / wall:.1f} images/s in all")
    told = {"steps": result, "speed": speed, "memory": watch.memory, "models": list(judges)}
    low = any(min(n["recall"], n["precision"]) < options.at_least for n in result.values())
    different = again(options.folder, settings, thresholds, told) if options.again else []
    write_json(options.folder / "check.json", told)
    return int(low or bool(different))


def again(folder: Path, settings: Settings, thresholds: Thresholds, told: dict[str, object]) -> list[str]:
    """The same images once more, inline and interrupted; the files that differ. told: gets the memory, and what differs."""
    other = dataclasses.replace(settings, out=folder / "again")
    watch, cpu = Watch(sum(plan(other)), interrupt), cpu_seconds()
    try:
        curated(other, thresholds, None, watch)
    except KeyboardInterrupt:
        print(f"interrupted behind {watch.done} images", flush=True)
    curated(other, thresholds, None, watch)
    cpu = cpu_seconds() - cpu
    if watch.done:
        print(f"inline: {watch.done / cpu:.1f} images/s of one core's time", flush=True)
    different = differing(settings.out, other.out)
    told |= {"memory_again": watch.memory, "cpu_seconds_again": cpu, "different": different}
    files = sum(p.is_file() for p in settings.out.rglob("*"))
    print(f"{files} files, {len(different)} that differ from those of the second run{''.join(different[:1])}")
    return different
