"""From a source to parts: the plan, one chunk's work, and the two that run chunks: this process, or Ray Data.

    OUT/plan.json                  the source, the settings, the models, how many items each part has
    OUT/items/000000.parquet       the items of a part, as they were listed
    OUT/parts/000000/0003.parquet  records of a finished chunk of a part that is not finished
    OUT/parts/000000.parquet       records of a finished part
    OUT/fetched/000000/0003.tar    the images of a chunk that came from URLs

A chunk is the unit of all work: it is computed by one process, written whole or not at all, under a name that does not depend
on who wrote it. So a killed process loses the chunks in its hands, which are done again, and nothing comes twice; and any
number of processes writes the same files.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lens.formats.files import read_json, write_atomic, write_json

from . import steps
from .classifiers import Models, loaded
from .readers import fingerprint, items_of, kind_of, root_of
from .records import FORMAT, SOURCES, Item, Record, read_rows, write_rows
from .steps import Limits, Work

PLAN = "plan.json"
FETCHERS = 16  # threads of one process that wait for the web
CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Settings:
    """Everything that records depend on beside the images. Plain values: they go to other processes."""

    source: Path
    out: Path
    kind: str = "real"
    licence: str = "unknown"
    limits: Limits = field(default_factory=Limits)
    models: Models = field(default_factory=Models)
    part: int = 1000
    chunk: int = 64

    def __post_init__(self) -> None:
        if self.kind not in SOURCES:
            raise ValueError(f"--source {self.kind}: expected one of {', '.join(SOURCES)}")

    def described(self) -> dict[str, Any]:
        """What must be alike for a run to go on where another stopped; also what the manifest says of the records."""
        return {
            "format": FORMAT,
            "from": str(self.source),
            "source": self.kind,
            "licence": self.licence,
            "limits": dataclasses.asdict(self.limits),
            "models": {use: one.by for use, one in loaded(self.models).items()},
            "part": self.part,
            "chunk": self.chunk,
        }


@dataclass(frozen=True)
class Chunk:
    """Items [first, first + count) of a part."""

    part: int
    number: int
    first: int
    count: int

    def records(self, out: Path) -> Path:
        return out / "parts" / f"{self.part:06d}" / f"{self.number:04d}.parquet"

    def tar(self) -> str:
        """Below OUT."""
        return f"fetched/{self.part:06d}/{self.number:04d}.tar"


def part_file(out: Path, part: int) -> Path:
    return out / "parts" / f"{part:06d}.parquet"


# ------------------------------------------------------------------------------------------------ the plan


def plan(settings: Settings, say: Callable[[str], None] = print) -> list[int]:
    """List the source, once; the number of items of every part.

    Errors: ValueError where OUT holds work of other settings, or the source has changed since it was listed, or it
    holds nothing; OSError.
    """
    out, path = settings.out, settings.out / PLAN
    asked = {**settings.described(), "listing": fingerprint(settings.source)}
    if path.is_file():
        before = read_json(path)
        for name, value in asked.items():
            if before.get(name) != value:
                if name == "listing":
                    raise ValueError(f"{settings.source}: has changed since {path} was written; expected a fresh OUT")
                raise ValueError(
                    f"{path}: {name} is {before.get(name)!r}, now {value!r}; expected the same, or a fresh OUT"
                )
        return list(before["parts"])
    items, counts = items_of(settings.source), list[int]()
    while rows := list(islice(items, settings.part)):
        write_rows(out / "items" / f"{len(counts):06d}.parquet", rows)
        counts.append(len(rows))
        if len(counts) % 100 == 0:
            say(f"{sum(counts)} images listed")
    if not counts:
        raise ValueError(f"{settings.source}: holds no images ({kind_of(settings.source)})")
    write_json(path, {**asked, "parts": counts})
    return counts


def chunks_of(settings: Settings, part: int, count: int) -> list[Chunk]:
    """All chunks of a part."""
    starts = range(0, count, settings.chunk)
    return [Chunk(part, i, first, min(settings.chunk, count - first)) for i, first in enumerate(starts)]


def missing(settings: Settings, part: int, count: int) -> list[Chunk]:
    """The chunks of a part that are still to be done."""
    if part_file(settings.out, part).is_file():
        return []
    return [chunk for chunk in chunks_of(settings, part, count) if not chunk.records(settings.out).is_file()]


def finish(settings: Settings, part: int, count: int) -> bool:
    """Join the chunks of a part into its file; False where some are missing. Doing it again changes nothing."""
    path = part_file(settings.out, part)
    if not path.is_file():
        chunks = chunks_of(settings, part, count)
        if not all(chunk.records(settings.out).is_file() for chunk in chunks):
            return False
        rows = [row for chunk in chunks for row in read_rows(chunk.records(settings.out), Record)]
        if len(rows) != count:
            raise ValueError(f"{path.with_suffix('')}: {len(rows)} records, expected {count}; expected a fresh OUT")
        write_rows(path, rows)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    return True


# ------------------------------------------------------------------------------------------------ a chunk


def examine(settings: Settings, chunk: Chunk) -> list[Work]:
    """Everything that needs no model: read, decode, scores, the models' inputs. Images from URLs are stored."""
    file = settings.out / "items" / f"{chunk.part:06d}.parquet"
    items: list[Item] = read_rows(file, Item, chunk.first, chunk.count)
    fetched = any(item.url is not None for item in items)
    classifiers = loaded(settings.models)

    def look(item: Item) -> Work:
        root = root_of(settings.source)
        work = steps.read(item, root, settings.kind, settings.licence, settings.limits)
        work = steps.prepare(steps.score(steps.decode(work, settings.limits)), classifiers)
        keep = item.url is not None and work.record.failure is None
        return work if keep else dataclasses.replace(work, data=None)

    if fetched:
        with ThreadPoolExecutor(FETCHERS) as pool:
            return _stored(settings, chunk, list(pool.map(look, items)))
    return [look(item) for item in items]


def _stored(settings: Settings, chunk: Chunk, works: list[Work]) -> list[Work]:
    """The fetched images in one tar, and where in it each is."""
    places: dict[int, tuple[str, int, int]] = {}

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, work in enumerate(works):
                if work.data is not None:
                    info = tarfile.TarInfo(f"{i:04d}.{(work.record.format or 'bin').lower()}")
                    info.size = len(work.data)
                    places[i] = info.name, tar.offset + tarfile.BLOCKSIZE, info.size
                    tar.addfile(info, io.BytesIO(work.data))

    write_atomic(settings.out / chunk.tar(), write)
    out = []
    for i, work in enumerate(works):
        if i in places:
            member, offset, size = places[i]
            work = work.with_(root="out", path=chunk.tar(), member=member, offset=offset, size=size)
        out.append(dataclasses.replace(work, data=None))
    return out


def judge(settings: Settings, works: Sequence[Work]) -> list[Record]:
    """The records with the scores of every classifier that is here, and its name beside each."""
    records = [work.record for work in works]
    classifiers = loaded(settings.models)
    outputs: dict[int, Any] = {}  # of a backbone: one pass for all classifiers that share it
    for use, one in classifiers.items():
        rows = [i for i, work in enumerate(works) if use in work.inputs]
        if not rows:
            continue
        if id(one.backbone) not in outputs:
            outputs[id(one.backbone)] = one.backbone(np.stack([works[i].inputs[use] for i in rows]))
        for i, value in zip(rows, one.head(outputs[id(one.backbone)]), strict=True):
            if not np.isfinite(value).all():
                raise FloatingPointError(f"{one.by}: gave {value} for {records[i].key}")
            stored = np.asarray(value, "<f2").tobytes() if use == "embedding" else float(value)
            records[i] = records[i].with_(**{use: stored, f"{use}_by": one.by})
    return records


def store(settings: Settings, chunk: Chunk, records: Sequence[Record]) -> int:
    """Write a chunk's records; how many they are."""
    write_rows(chunk.records(settings.out), records)
    return len(records)


def process(settings: Settings, chunk: Chunk) -> int:
    return store(settings, chunk, judge(settings, examine(settings, chunk)))


# ------------------------------------------------------------------------------------------------ who runs them


def inline(settings: Settings, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, int]]:
    """One after another, in this process."""
    for chunk in chunks:
        yield chunk, process(settings, chunk)


@dataclass(frozen=True)
class RayOptions:
    """address: of a running cluster (None: one is started here, and ended); cpus: of a cluster that is started (None: all)
    judges: actors that hold the models, apart from those that decode; 0: every process has its own. On cuda each has a GPU
    """

    address: str | None = None
    cpus: int | None = None
    judges: int = 0


class Judge:
    """A Ray actor that keeps its models."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        records = [pickle.dumps(judge(self.settings, pickle.loads(works))) for works in batch.pop("works")]
        return {**batch, "records": np.array(records, dtype=object)}


def with_ray(
    settings: Settings, chunks: Sequence[Chunk], options: RayOptions, window: int = 10_000
) -> Iterator[tuple[Chunk, int]]:
    """By Ray Data, as they are finished. All machines must see SOURCE, OUT and this checkout under the same paths.

    Errors: ValueError without Ray; what a chunk raised, as it was raised.
    """
    try:
        import ray
        import ray.data
        from ray.exceptions import RayTaskError
    except ImportError as error:
        raise ValueError(f"curate: Ray cannot be imported ({error}): pip install -e '.[data]', or --inline") from None
    paths = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = not ray.is_initialized()
    if started:
        own = {"num_cpus": options.cpus} if options.address is None else {"address": options.address}
        environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
        ray.init(**own, runtime_env=environment, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def row(chunk: Chunk) -> dict[str, int]:
        return dataclasses.asdict(chunk)

    try:
        for start in range(0, len(chunks), window):
            some = chunks[start : start + window]
            data = ray.data.from_items([row(chunk) for chunk in some], override_num_blocks=len(some))
            if options.judges:
                gpus = int(settings.models.device.startswith("cuda"))
                data = data.map(functools.partial(_examine_row, settings))
                data = data.map_batches(
                    Judge,
                    fn_constructor_args=(settings,),
                    batch_size=1,
                    batch_format="numpy",
                    concurrency=options.judges,
                    num_gpus=gpus,
                )
                data = data.map(functools.partial(_store_row, settings))
            else:
                data = data.map(functools.partial(_process_row, settings))
            for done in data.iter_rows():
                yield _chunk(done), int(done["records"])
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    finally:
        if started:
            ray.shutdown()


def _chunk(row: dict[str, Any]) -> Chunk:
    return Chunk(*(int(row[f.name]) for f in dataclasses.fields(Chunk)))


def _process_row(settings: Settings, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "records": process(settings, _chunk(row))}


def _examine_row(settings: Settings, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "works": pickle.dumps(examine(settings, _chunk(row)))}


def _store_row(settings: Settings, row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "records": store(settings, _chunk(row), pickle.loads(row["records"]))}


def run(settings: Settings, counts: Sequence[int], ray: RayOptions | None, say: Callable[[str, int], None]) -> None:
    """Do what is missing; join every part as its last chunk comes. say: (part and chunk in words, records) as chunks finish."""
    todo = {part: missing(settings, part, count) for part, count in enumerate(counts)}
    for part, count in enumerate(counts):
        if not todo[part]:
            finish(settings, part, count)
    chunks = [chunk for part in todo.values() for chunk in part]
    left = {part: len(own) for part, own in todo.items()}
    if not chunks:
        return
    for chunk, records in inline(settings, chunks) if ray is None else with_ray(settings, chunks, ray):
        say(f"part {chunk.part}, chunk {chunk.number}", records)
        left[chunk.part] -= 1
        if left[chunk.part] == 0:
            finish(settings, chunk.part, counts[chunk.part])
