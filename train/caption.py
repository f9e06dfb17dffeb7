"""Stage "caption": dense and brief captions of images, their visible text, a scenario and a category, by any vision server.

    python -m train caption --images photos/ --url http://127.0.0.1:8000/v1 --model qwen2.5-vl --out runs/captions
    python -m train caption --tars raw/ --detail dense --url https://api.openai.com/v1 --max-cost 20 --out runs/captions
    python -m train caption --images photos/ --only kept.jsonl ...       # the keys or files of a list: JSON lines or Parquet
    python -m train caption --curated curated/ --url ... --out runs/captions                # what the stage curate keeps
    python -m train shards --curated curated/ --captions runs/captions/captions.jsonl --out shards/train

OUT/captions.jsonl has a line an image: key (path below the folder, TAR/MEMBER, or a record's), file (what `shards` calls it), its SHA-256,
caption (dense, else brief), dense, brief, text (of the image, in its own language), scenario, category, words, model, version. What
has none stands in OUT/left_out.jsonl with the reason: refused, failed, broken. OUT/index.html has word statistics (the paper's dense
captions have 109 on average), scenarios, categories, refusals, calls and cost.

Every answer is kept in OUT/cache.jsonl by the image's bytes, the version of the prompt and the model, as soon as it comes: the
same command goes on where it was, and images that are there twice are asked once. A refusal is an answer and is kept; a failure is
asked again. The key is read from the environment (OPENAI_API_KEY for api.openai.com, LENS_CHAT_KEY for others).
"""

from __future__ import annotations

import argparse
import base64
import collections
import functools
import hashlib
import html
import io
import json
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lens.chat_client import ChatClient, ChatError
from lens.formats.files import write_json

from .data.calls import in_order
from .data.captions import (
    DETAILS,
    MODEL,
    PAPER_WORDS,
    VERSION,
    Caption,
    chat_of,
    histogram,
    read_caption,
    statistics,
    word_count,
)
from .data.curation.kept import kept_records
from .data.images import SUFFIXES, Unusable, decoded
from .data.tables import read_rows
from .loop.checkpoints import write_text
from .loop.clock import positive
from .report import bars, page, table

EVERY = 10.0  # seconds between lines of progress
IN_A_ROW = 24  # failures after which the server is taken for lost
EXAMPLES = 8  # on the page
THUMBNAIL = 160


@dataclass(frozen=True)
class Place:
    """One image: `key` for people and lists, `file` as `shards` calls it; its bytes are the file's [offset, offset + size)."""

    key: str
    file: str
    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(-1 if self.size is None else self.size)


@dataclass(frozen=True)
class Found:
    """What became of an image: its caption, or the reason why there is none. known: from the cache."""

    place: Place
    digest: str
    caption: Caption | None
    reason: str = ""
    known: bool = False


def places(images: Path | None, tars: Path | None) -> Iterator[Place]:
    """The images of a folder, or of the tars below it, in order of their names. Errors: ValueError for no folder or no tar."""
    folder = images or tars
    if folder is None or not folder.is_dir():
        raise ValueError(f"{'--images' if images else '--tars'}: {folder} is no folder")
    if images:
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
            file = path.relative_to(folder).as_posix()
            yield Place(file, file, path)
        return
    for path in sorted(folder.rglob("*.tar")):
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isfile() and Path(member.name).suffix.lower() in SUFFIXES:
                        key = f"{path.relative_to(folder).as_posix()}/{member.name}"
                        yield Place(key, member.name, path, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ValueError(f"{path}: not a tar that can be read: {error}") from None


def places_kept(curated: Path) -> Iterator[Place]:
    """The images that a curation keeps, in its order, called by their records' keys. Errors: those of `Curation`."""
    for record, root in kept_records(curated):
        yield Place(record.key, record.key, root / str(record.path), record.offset or 0, record.byte_count)


def pixels_of(data: bytes, side: int) -> np.ndarray:
    """The whole image, upright, its longer side at most `side`: uint8 [H, W, 3]. Errors: Unusable."""
    from PIL import Image

    image = decoded(data)
    scale = side / max(image.size)
    if scale < 1:
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.array(image)


class Cache:
    """Answers by (SHA-256 of the image's bytes, question, model) in one file of JSON lines, each written as it comes."""

    def __init__(self, path: Path):
        """Errors: ValueError naming the line that is none of a cache; a last one that was cut off is written over."""
        self.path, self.lock, self.known = path, threading.Lock(), dict[tuple[str, str, str], Caption]()
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = path.read_bytes() if path.is_file() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                said = row["caption"]
                caption = Caption(**{**said, "text": tuple((a, b) for a, b in said["text"])})
                self.known[row["image"], row["question"], row["model"]] = caption
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not of a cache of captions: {error!r}") from None
        if len(whole) < len(raw):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self.file = path.open("ab")

    def add(self, image: str, question: str, model: str, caption: Caption) -> None:
        row = {"image": image, "question": question, "model": model, "caption": asdict(caption)}
        with self.lock:
            self.known[image, question, model] = caption
            self.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self.file.flush()

    def close(self) -> None:
        self.file.close()


class Captioner:
    """`client` has the model and the counters; threads share it."""

    def __init__(self, client: ChatClient, cache: Cache, detail: str, side: int):
        self.client, self.cache, self.detail, self.side = client, cache, detail, side
        self.question = f"{VERSION} {detail} {side}"
        self.turns = [threading.Lock() for _ in range(1 << 12)]  # so that the twin of an image under way waits for it

    def __call__(self, place: Place) -> Found:
        """Errors: ChatError where a budget is spent or a transcript lacks a call; OSError."""
        data = place.read()
        digest = hashlib.sha256(data).hexdigest()
        with self.turns[int(digest[:3], 16)]:
            return self.answered(place, data, digest)

    def answered(self, place: Place, data: bytes, digest: str) -> Found:
        """From the cache, else from the server."""
        known = self.cache.known.get((digest, self.question, self.client.model))
        if known is not None:
            return self.found(place, digest, known, True)
        try:
            chat = chat_of(pixels_of(data, self.side), self.detail)
            caption = self.client.ask(chat, functools.partial(read_caption, detail=self.detail))
        except Unusable as error:
            return Found(place, digest, None, f"broken: {error}")
        except ChatError as error:
            if error.kind in ("budget", "replay"):
                raise
            return Found(place, digest, None, f"failed: {error.kind}: {error}")
        self.cache.add(digest, self.question, self.client.model, caption)
        return self.found(place, digest, caption, False)

    def found(self, place: Place, digest: str, caption: Caption, known: bool) -> Found:
        refused = f"refused: {caption.refused}" if caption.refused else ""
        return Found(place, digest, None if refused else caption, refused, known)


def captioned(captioner: Captioner, jobs: Sequence[Place], workers: int) -> list[Found]:
    """All images in their order. Errors: ChatError, also where so many calls in a row fail that the server is taken for lost."""
    made, failed, begin, said = list[Found](), 0, time.monotonic(), time.monotonic()
    for _, one in in_order(captioner, jobs, workers):
        made.append(one)
        failed = failed + 1 if one.reason.startswith("failed") else 0
        if failed >= IN_A_ROW:
            raise ChatError("connection", f"the last {failed} images all failed, the last by {one.reason[8:]}")
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            left = (said - begin) / len(made) * (len(jobs) - len(made))
            print(f"{len(made)} of {len(jobs)} images, {spending(captioner.client)}, {left:.0f} s left", flush=True)
    return made


def row_of(one: Found, model: str) -> dict[str, Any]:
    caption = one.caption
    assert caption is not None
    words = caption.dense or caption.brief
    return {
        "key": one.place.key,
        "file": one.place.file,
        "sha256": one.digest,
        "caption": words,
        "dense": caption.dense,
        "brief": caption.brief,
        "text": [{"language": language, "text": text} for language, text in caption.text],
        "scenario": caption.scenario,
        "category": caption.category,
        "words": word_count(words),
        "model": model,
        "version": VERSION,
    }


def spending(client: ChatClient) -> str:
    spent = client.counters
    cost = "cost unknown" if spent.cost is None else f"{spent.cost:.2f} USD"
    return f"{spent.calls} calls, {spent.retries} of them again, {cost}"


def write_page(path: Path, rows: Sequence[dict[str, Any]], made: Sequence[Found], settings: dict[str, Any]) -> None:
    sections = []
    for name in DETAILS["both"]:
        counts = [word_count(row[name]) for row in rows if row[name]]
        mark = f"{PAPER_WORDS // 10 * 10} to {PAPER_WORDS // 10 * 10 + 9}" if name == "dense" else ""
        if counts:
            title = (
                f"Words of {name} captions (red: the paper's mean of {PAPER_WORDS})"
                if mark
                else f"Words of {name} captions"
            )
            numbers = {key: round(value, 1) for key, value in statistics(counts).items()}
            sections.append(
                (title, bars(title, histogram(counts, shown=(PAPER_WORDS,) if mark else ()), mark) + table(numbers))
            )
    for name in ("scenario", "category"):
        counted = collections.Counter(row[name] for row in rows)
        sections.append((name.capitalize(), bars(name, dict(counted.most_common()))))
    languages = collections.Counter(text["language"] for row in rows for text in row["text"])
    if languages:
        sections.append(("Languages of visible text", bars("texts", dict(languages.most_common(20)))))
    reasons = collections.Counter(one.reason.partition(":")[0] for one in made if one.reason)
    if reasons:
        sections.append(("Left out", bars("images", dict(reasons))))
    by_key = {one.place.key: one.place for one in made}
    shown = "".join(example(row, by_key[row["key"]]) for row in rows[:: max(1, len(rows) // EXAMPLES)][:EXAMPLES])
    sections += [("Examples", shown), ("Settings", table(settings))]
    write_text(path, page("Captions", [(heading, content) for heading, content in sections if content]))


def example(row: dict[str, Any], place: Place) -> str:
    """A small copy of the image inside the page, and what was said of it; all of it escaped."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels_of(place.read(), THUMBNAIL)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    said = {name: row[name] for name in ("dense", "brief", "text", "scenario", "category") if row[name]}
    return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(row["key"])}"></figure>{table(said)}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="FOLDER", help="images, in subfolders too")
    source.add_argument("--tars", type=Path, metavar="FOLDER", help="WebDataset tars, in subfolders too")
    source.add_argument("--curated", type=Path, metavar="FOLDER", help="a curation: what its latest manifest keeps")
    parser.add_argument("--only", type=Path, metavar="LIST", help="only these: JSON lines or Parquet with key or file")
    parser.add_argument("--url", help="an OpenAI-compatible server with a vision model, up to and with /v1")
    parser.add_argument("--replay", type=Path, metavar="TRANSCRIPT", help="answers out of a transcript, no server")
    parser.add_argument("--model", default=MODEL, help=f"which of the server's models (default: {MODEL})")
    parser.add_argument("--detail", choices=tuple(DETAILS), default="both", help="which captions (default: both)")
    parser.add_argument("--side", type=positive, default=1024, help="pixels of the longer side, sent (default: 1024)")
    parser.add_argument("--concurrency", type=positive, default=8, help="calls at a time (default: 8)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of one attempt (default: 120)")
    parser.add_argument("--transcript", type=Path, help="also write every call there, for --replay")
    parser.add_argument("--max-calls", type=positive, help="stop after so many calls")
    parser.add_argument("--max-cost", type=float, metavar="USD", help="stop after so much, where the prices are known")
    parser.add_argument("--out", type=Path, default=Path("runs/captions"), help="folder (default: runs/captions)")


def run(options: argparse.Namespace) -> int:
    if options.url is None and options.replay is None:
        raise ValueError("caption: expected --url of a server, or --replay of a transcript")
    jobs = list(places_kept(options.curated) if options.curated else places(options.images, options.tars))
    if options.only is not None:
        wanted = {str(row.get("key") or row.get("file")) for row in read_rows(options.only, ("key", "file"))}
        jobs = [job for job in jobs if job.key in wanted or job.file in wanted]
    if not jobs:
        folder = options.images or options.tars or options.curated
        raise ValueError(f"caption: no image in {folder}{' of --only' if options.only else ''}")
    client = ChatClient(
        options.url,
        options.model,
        concurrency=options.concurrency,
        timeout=options.timeout,
        transcript=options.transcript,
        replay=options.replay,
        max_calls=options.max_calls,
        max_cost=options.max_cost,
    )
    cache = Cache(options.out / "cache.jsonl")
    try:
        with client:
            made = captioned(Captioner(client, cache, options.detail, options.side), jobs, options.concurrency)
    except ChatError as error:  # a budget, another transcript, a server that is lost; what was answered is kept
        print(f"error: {error}; what was answered is kept, the same command goes on from here", file=sys.stderr)
        return 1
    finally:
        cache.close()
    rows = [row_of(one, options.model) for one in made if one.caption is not None]
    left = [{"key": one.place.key, "file": one.place.file, "reason": one.reason} for one in made if one.reason]
    for name, lines in (("captions.jsonl", rows), ("left_out.jsonl", left)):
        write_text(options.out / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    reasons = collections.Counter(one.reason.partition(":")[0] for one in made if one.reason)
    settings = {
        "model": options.model,
        "version": VERSION,
        "detail": options.detail,
        "side": options.side,
        "images": len(made),
        "captions": len(rows),
        "left_out": dict(reasons),
        "from_cache": sum(one.known for one in made),
        "calls": asdict(client.counters),
        "words": {n: statistics([word_count(row[n]) for row in rows if row[n]]) for n in DETAILS[options.detail]},
    }
    write_json(options.out / "manifest.json", settings)
    write_page(options.out / "index.html", rows, made, settings)
    lost = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
    print(f"{options.out}: {len(rows)} captions; left out: {lost}; {spending(client)}")
    return 1 if reasons["failed"] else 0
