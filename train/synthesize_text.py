"""Stage "synthesize_text": rendered text on backgrounds, with what it says and where, for the source "text_synthetic".

    python -m train synthesize_text --count 10000 --workers 8 --out runs/text
    python -m train synthesize_text --count 2000 --scripts Latin Arabic Han --fonts fonts/ /usr/share/fonts --out runs/text
    python -m train synthesize_text --count 500 --backgrounds photos/ --size 768 1024 --ocr 200 --out runs/text
    python -m train shards --tars runs/text --bases 512 --out shards/text

Font, colour, size, blur, rotation, layout and background follow from --seed and the image's number alone. OUT has WebDataset tars of
NUMBER.png and NUMBER.json: text, its lines and words with their corners in pixels, script, language, font, the rest of what was
drawn, and a caption that quotes it, which `shards` reads. A script for which no font has all letters, or which needs shaping that
this Pillow cannot do, is refused by name; --scripts available draws those there are. The fonts' licences are yours to look at:
plan.json names each file.

--ocr N reads the first N images of the scripts that RapidOCR reads (extra eval): the share of words that come back, by script,
blur and rotation, stands in manifest.json and index.html, with a sheet. Interrupted, the same command goes on at the first tar that
is not there; --workers changes no byte.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import io
import json
import statistics
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lens.formats.files import read_json, write_atomic, write_json

from .data.contact_sheet import contact_sheet
from .data.lettering import WORDS, NoFont, Style, agreement, drawn, font_files, fonts_of, style, words
from .evaluate.ocr import REMEDY, Reader, available
from .loop.checkpoints import write_text
from .loop.clock import Interrupted, positive
from .loop.workers import start_worker, undisturbed
from .report import bars, page, table

FONTS = Path("/usr/share/fonts")
READ = ("Latin", "Han")  # scripts that RapidOCR's own model reads
SHEET = 40  # images on the sheet
EVERY = 10.0  # seconds between lines of progress


def tar_of(out: Path, part: int) -> Path:
    return out / f"{part:06d}.tar"


def numbers_of(part: int, size: int, count: int) -> range:
    """The images of a tar of up to `size`, of `count` in all."""
    return range(part * size, min(count, (part + 1) * size))


def write_part(out: Path, made: Style, part: int, size: int, count: int) -> int:
    """One tar, whole or not at all; how many images it has."""
    numbers = numbers_of(part, size, count)

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in numbers:
                one, png = drawn(made, number), io.BytesIO()
                Image.fromarray(one.image).save(png, "PNG")
                said = json.dumps(one.record, ensure_ascii=False).encode()
                for name, data in ((f"{number:08d}.png", png.getvalue()), (f"{number:08d}.json", said)):
                    info = tarfile.TarInfo(name)  # its time is 0, so that the same images are the same bytes
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    write_atomic(tar_of(out, part), write)
    return len(numbers)


def read_images(out: Path, size: int, count: int) -> Iterator[tuple[dict[str, Any], bytes]]:
    """(record, PNG) of the first `count` images, in tars of up to `size`."""
    for part in range(-(-count // size)):
        with tarfile.open(tar_of(out, part), "r:") as tar:
            png = b""
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None, "write_part writes plain files"
                if member.name.endswith(".png"):
                    png = file.read()
                    continue
                record = json.loads(file.read())
                if record["number"] < count:
                    yield record, png


def completed(out: Path, made: Style, parts: Sequence[int], size: int, count: int, workers: int) -> Iterator[int]:
    """How many were made, tar by tar. Errors: Interrupted where a worker died."""
    work = functools.partial(write_part, out, made, size=size, count=count)
    if not workers:
        yield from map(work, parts)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        with undisturbed():
            waiting = [pool.submit(work, part) for part in parts]
        try:
            for one in waiting:
                yield one.result()
        except BrokenProcessPool as error:
            pool.shutdown(cancel_futures=True)
            raise Interrupted("a worker died; what is finished is kept, the same command goes on from there") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def plan_of(made: Style, size: int, count: int) -> dict[str, Any]:
    """What the images depend on; where the files lie is no part of it."""

    def names(paths: Sequence[Path]) -> list[str]:
        return [f"{path.name} {path.stat().st_size}" for path in paths]

    return {
        "images": count,
        "part": size,
        "seed": made.seed,
        "size": [made.height, made.width],
        "fonts": {script: names(files) for script, files in made.fonts.items()},
        "backgrounds": hashlib.sha256("\n".join(names(made.photographs)).encode()).hexdigest(),
        "words": hashlib.sha256(WORDS.read_bytes()).hexdigest(),
    }


def read_back(out: Path, size: int, count: int) -> dict[str, Any]:
    """RapidOCR's agreement over images of the scripts that it reads: mean share of words, in all and by what may make it hard."""
    reader, rows = Reader(), list[tuple[dict[str, Any], float]]()
    for record, png in read_images(out, size, count):
        if record["script"] in READ:
            with Image.open(io.BytesIO(png)) as image:
                rows.append((record, agreement(record["text"], reader.read(np.asarray(image)))))
    groups: dict[str, list[float]] = collections.defaultdict(list)
    for record, share in rows:
        groups["all"].append(share)
        groups[f"script {record['script']}"].append(share)
        groups["turned" if record["rotation"] else "upright"].append(share)
        groups["blurred" if record["blur"] else "sharp"].append(share)
        groups[f"on {record['background']}"].append(share)
    means = {
        name: {"images": len(own), "words_read": round(statistics.fmean(own), 4)}
        for name, own in sorted(groups.items())
    }
    return {"scripts": list(READ), **means}


def write_page(out: Path, size: int, count: int, settings: dict[str, Any]) -> None:
    records, pictures = list[dict[str, Any]](), list[np.ndarray]()
    for record, png in read_images(out, size, count):
        records.append(record)
        if len(pictures) < SHEET:
            with Image.open(io.BytesIO(png)) as image:
                pictures.append(np.asarray(image.resize((image.width * 320 // image.height, 320))))
    names = [f"{record['number']} {record['script']}" for record in records[:SHEET]]
    contact_sheet(pictures, names, out / "sheet.png", columns=5, cell=320)
    said = table({str(record["number"]): record["caption"] for record in records[:SHEET]})
    sections = [("The first images", f'<img src="sheet.png" alt="the first images">{said}')]
    for name in ("script", "language", "layout", "background", "font"):
        counted = collections.Counter(str(record[name]) for record in records)
        sections.append((name.capitalize(), bars(name, dict(counted.most_common()))))
    sections.append(("Settings and what OCR reads", table(settings)))
    write_text(out / "index.html", page("Rendered text", sections))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=positive, default=1000, help="images (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument(
        "--scripts",
        nargs="+",
        default=["available"],
        metavar="SCRIPT",
        help=f"of {', '.join(words())}, or: available (default)",
    )
    parser.add_argument(
        "--fonts", nargs="+", type=Path, default=[FONTS], metavar="FOLDER", help=f"where fonts are (default: {FONTS})"
    )
    parser.add_argument(
        "--backgrounds", type=Path, metavar="FOLDER", help="images (default: the small world's photographs)"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=positive,
        default=[512, 512],
        metavar=("HEIGHT", "WIDTH"),
        help="pixels (default: 512 512)",
    )
    parser.add_argument("--part", type=positive, default=256, help="images of a tar (default: 256)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: 0, this one)")
    parser.add_argument("--ocr", type=int, default=0, metavar="N", help="read the first N images back (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/text"), help="folder (default: runs/text)")


def run(options: argparse.Namespace) -> int:
    if options.ocr and not available():
        raise ValueError(f"--ocr: {REMEDY}")
    scripts = options.scripts
    if scripts == ["available"]:
        scripts, files = [], font_files(options.fonts)
        for script in words():
            try:
                fonts_of(script, files)
                scripts.append(script)
            except NoFont as error:
                print(error)
        if not scripts:
            raise ValueError(f"synthesize_text: no script can be drawn with the {len(files)} fonts of --fonts")
    made = style(scripts, options.fonts, options.backgrounds, (options.size[0], options.size[1]), options.seed)
    plan, file = plan_of(made, options.part, options.count), options.out / "plan.json"
    if file.is_file() and read_json(file) != plan:
        raise ValueError(
            f"{file}: of another count, part, seed, size, fonts, words or backgrounds; expected a fresh --out"
        )
    write_json(file, plan)
    parts = [part for part in range(-(-options.count // options.part)) if not tar_of(options.out, part).is_file()]
    missing = sum(len(numbers_of(part, options.part, options.count)) for part in parts)
    print(f"{options.count} images in {', '.join(scripts)}, {missing} to draw", flush=True)
    begin, said, done = time.monotonic(), time.monotonic(), 0
    for images in completed(options.out, made, parts, options.part, options.count, options.workers):
        done += images
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            print(f"{done} of {missing}, {(said - begin) / done * (missing - done):.0f} s left", flush=True)
    settings = {**plan, "source": "text_synthetic", "scripts": scripts}
    settings["ocr"] = (
        read_back(options.out, options.part, min(options.ocr, options.count))
        if options.ocr
        else REMEDY.partition(":")[0]
    )
    write_json(options.out / "manifest.json", settings)
    write_page(options.out, options.part, options.count, settings)
    if options.ocr:
        every = settings["ocr"].get("all", {"images": 0, "words_read": 0.0})
        print(f"OCR read {every['words_read']:.1%} of the words of {every['images']} images in {' and '.join(READ)}")
    print(options.out)
    return 0
