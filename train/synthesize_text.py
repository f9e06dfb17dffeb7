"""Stage "synthesize_text": rendered text on backgrounds, with what it says and where, for the source "text_synthetic".

    python -m train synthesize_text --count 10000 --workers 8 --out runs/text
    python -m train synthesize_text --count 2000 --scripts Latin Arabic Han --fonts fonts/ /usr/share/fonts --out runs/text
    python -m train synthesize_text --count 500 --backgrounds photos/ --size 768 1024 --ocr 200 --out runs/text
    python -m train shards --images runs/text --bases 512 --out shards/text

Font, colour, size, blur, rotation, layout and background follow from --seed and the image's number alone. Beside
NUMBER.png stands NUMBER.json: text, its lines and words with their corners in pixels, script, language, font, the rest of what was
drawn, and a caption that quotes it, which `shards` reads. A script for which no font has all letters, or which needs shaping that
this Pillow cannot do, is refused by name; --scripts available draws those there are. The fonts' licences are yours to look at:
plan.json names each file.

--ocr N reads the first N images of the scripts that RapidOCR reads (extra eval): the share of words that come back, by script,
blur and rotation, stands in manifest.json and index.html, with a sheet. Interrupted, the same command goes on; --workers changes nothing.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import json
import statistics
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
PART = 64  # images that a worker makes at once


def place(out: Path, number: int) -> Path:
    """Of the PNG; the JSON file has the other ending."""
    return out / f"{number // 1000:05d}" / f"{number:08d}.png"


def write_image(out: Path, made: Style, number: int) -> None:
    """The JSON file comes last, and says that the image is there."""
    one, path = drawn(made, number), place(out, number)
    image = Image.fromarray(one.image)
    write_atomic(path, lambda temporary: image.save(temporary, "PNG"))
    write_text(path.with_suffix(".json"), json.dumps(one.record, ensure_ascii=False))


def write_part(out: Path, made: Style, numbers: Sequence[int]) -> int:
    for number in numbers:
        write_image(out, made, number)
    return len(numbers)


def completed(out: Path, made: Style, numbers: Sequence[int], workers: int) -> Iterator[int]:
    """How many were made, part by part. Errors: Interrupted where a worker died."""
    parts = [numbers[start : start + PART] for start in range(0, len(numbers), PART)]
    work = functools.partial(write_part, out, made)
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


def plan_of(made: Style) -> dict[str, Any]:
    """What the images depend on; where the files lie is no part of it."""

    def names(paths: Sequence[Path]) -> list[str]:
        return [f"{path.name} {path.stat().st_size}" for path in paths]

    return {
        "seed": made.seed,
        "size": [made.height, made.width],
        "fonts": {script: names(files) for script, files in made.fonts.items()},
        "backgrounds": hashlib.sha256("\n".join(names(made.photographs)).encode()).hexdigest(),
        "words": hashlib.sha256(WORDS.read_bytes()).hexdigest(),
    }


def read_back(out: Path, numbers: Sequence[int]) -> dict[str, Any]:
    """RapidOCR's agreement over images of the scripts that it reads: mean share of words, in all and by what may make it hard."""
    reader, rows = Reader(), list[tuple[dict[str, Any], float]]()
    for number in numbers:
        record = json.loads(place(out, number).with_suffix(".json").read_text(encoding="utf-8"))
        if record["script"] not in READ:
            continue
        with Image.open(place(out, number)) as image:
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


def write_page(out: Path, numbers: Sequence[int], settings: dict[str, Any]) -> None:
    records = [json.loads(place(out, n).with_suffix(".json").read_text(encoding="utf-8")) for n in numbers]
    pictures = []
    for number in numbers[:SHEET]:
        with Image.open(place(out, number)) as image:
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
    plan, file = plan_of(made), options.out / "plan.json"
    if file.is_file() and read_json(file) != plan:
        raise ValueError(f"{file}: of another seed, size, fonts, words or backgrounds; expected a fresh --out")
    write_json(file, plan)
    numbers = range(options.count)
    missing = [n for n in numbers if not place(options.out, n).with_suffix(".json").is_file()]
    print(f"{options.count} images in {', '.join(scripts)}, {len(missing)} to draw", flush=True)
    begin, said, done = time.monotonic(), time.monotonic(), 0
    for part in completed(options.out, made, missing, options.workers):
        done += part
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            print(f"{done} of {len(missing)}, {(said - begin) / done * (len(missing) - done):.0f} s left", flush=True)
    settings = {**plan, "images": options.count, "source": "text_synthetic", "scripts": scripts}
    settings["ocr"] = read_back(options.out, numbers[: options.ocr]) if options.ocr else REMEDY.partition(":")[0]
    write_json(options.out / "manifest.json", settings)
    write_page(options.out, numbers, settings)
    if options.ocr:
        every = settings["ocr"].get("all", {"images": 0, "words_read": 0.0})
        print(f"OCR read {every['words_read']:.1%} of the words of {every['images']} images in {' and '.join(READ)}")
    print(options.out)
    return 0
