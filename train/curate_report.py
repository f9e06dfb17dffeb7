"""The page of a curation: what each step left out, in the paper's order, how the scores are spread, examples.

python -m train curate_report curated/                       # curated/report.html, by the manifest's thresholds
python -m train curate_report curated/ --set clarity_min=8 --out other.html      # what other thresholds would do
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .data.curation.manifest import Curation, above
from .data.curation.records import STEPS, Count, Record, Thresholds, View
from .data.images import Unusable, decoded
from .loop.checkpoints import write_text
from .report import figure, grid, histogram, page, table

SCORES = ("area", *STEPS[2:8])  # that have a number
BARS, THUMBNAIL = 40, 160
LOGARITHMIC = ("area", "clarity")  # spread over magnitudes


def counts_in_words(counts: Sequence[Count]) -> str:
    """One line a step: how many came, how many it left out, how many it could not judge."""
    lines = []
    for c in counts:
        unknown = f", not judged: {c.not_judged}" if c.not_judged else ""
        lines.append(f"{c.step:<10} {c.came:>9} came {c.dropped:>9} dropped{unknown}")
    return "\n".join(lines)


def marks_of(step: str, thresholds: Thresholds, duplicate_above: float | None) -> list[float]:
    """Where a step cuts."""
    if step == "duplicate":
        return [] if duplicate_above is None else [duplicate_above]
    names = [name for name in (f"{step}_min", f"{step}_max") if hasattr(thresholds, name)]
    return [float(getattr(thresholds, name)) for name in names]


def rule(step: str, thresholds: Thresholds, duplicate_above: float | None) -> str:
    """What a step asks for, in words."""
    marks = [f"{m:g}" for m in marks_of(step, thresholds, duplicate_above)]
    if step == "broken":
        return "decodes to its last row, within the limits, one frame"
    if step == "duplicate":
        return f"no kept image at a cosine above {marks[0]}" if marks else "no embedding"
    if step == "luminance":
        return f"{marks[0]} to {marks[1]}"
    return f"at most {marks[0]}" if step in ("nsfw", "watermark") else f"at least {marks[0]}"


def spread(name: str, values: np.ndarray, marks: Sequence[float]) -> str:
    """The histogram of the finite values, over magnitudes where those matter."""
    values, label = values[np.isfinite(values)], name
    if name in LOGARITHMIC:
        values, marks, label = (
            np.log10(values[values > 0]),
            [float(np.log10(m)) for m in marks if m > 0],
            f"log10 {name}",
        )
    if not len(values):
        return ""
    counts, edges = np.histogram(values, BARS)
    return histogram(label, counts.tolist(), float(edges[0]), float(edges[-1]), marks)


def chosen(places: np.ndarray, keys: Sequence[str], count: int) -> np.ndarray:
    """So many of them, by the hash of their keys: the same whatever else there is."""
    ranked = sorted(places.tolist(), key=lambda i: hashlib.sha256(f"example {keys[i]}".encode()).digest())
    return np.array(sorted(ranked[:count]), np.int64)


def thumbnail(curation: Curation, record: Record) -> np.ndarray | None:
    """uint8 [H, W, 3] of at most THUMBNAIL pixels a side; None for an image that is broken or gone."""
    if record.failure is not None:
        return None
    try:
        image = decoded(curation.image(record))
    except (OSError, Unusable):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.array(image)


def as_address(pixels: np.ndarray) -> str:
    """A JPEG as data: inside the page."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def examples(curation: Curation, found: View, count: int) -> str:
    """Some images of every step that left any out, and some that are kept, with what was measured."""
    out = []
    for place, step in [*enumerate(STEPS), (-1, "kept")]:
        places = chosen(np.flatnonzero(found.reason == place), curation.columns["key"], count)
        if not len(places):
            continue
        shown, unseen = [], []
        for record in curation.records(places):
            value = record.failure if step == "broken" else _value(record, step)
            words = f"{record.key}{f': {value}' if value else ''}"
            pixels = thumbnail(curation, record)
            if pixels is None:
                unseen.append([words])
            else:
                shown.append(figure(as_address(pixels), words))
        out.append(
            f"<h3>{step}: {int((found.reason == place).sum())}</h3>{''.join(shown)}{grid([], unseen) if unseen else ''}"
        )
    return "".join(out)


def _value(record: Record, step: str) -> str:
    if step in ("kept", "area"):
        return f"{record.width} x {record.height}"
    value = getattr(record, step, None)
    return "" if value is None else f"{value:.4g}"


def write_report(
    curation: Curation, thresholds: Thresholds | None = None, out: Path | None = None, count: int = 8
) -> Path:
    """OUT/report.html. Errors: those of `Curation` and `view`."""
    asked, manifest = thresholds or curation.thresholds, curation.manifest
    found, limit = curation.view(asked), above(asked, curation.manifest["pairs"])
    steps = []
    for place, (step, c) in enumerate(zip(STEPS, found.counts)):
        steps.append(
            [place + 1, step, rule(step, asked, limit), c.came, c.not_judged or "", c.dropped, c.came - c.dropped]
        )
    head = ["", "step", "keeps", "came", "not judged", "dropped", "left"]
    scores = "".join(spread(name, curation.columns[name], marks_of(name, asked, limit)) for name in SCORES)
    if curation.pairs is not None:
        scores += spread("cosine of pairs", curation.pairs.cosine, marks_of("duplicate", asked, limit))
    words = np.array([len(r.caption.split()) for r in curation.records(np.flatnonzero(found.kept)) if r.caption], float)
    captions = spread("words of a caption", words, []) if len(words) else ""
    about = {name: manifest["plan"][name] for name in ("from", "source", "licence", "limits", "models")}
    about |= {"records": manifest["records"], "kept": int(found.kept.sum()), "thresholds": asdict(asked)}
    told: dict[str, int] = manifest["failures"]
    most_first = sorted(told.items(), key=lambda entry: (-entry[1], entry[0]))
    failures = grid(["broken", "images"], most_first)
    sections = [
        ("Steps, in the paper's order", grid(head, steps)),
        ("Scores", scores),
        ("Captions of what is kept", captions),
    ]
    sections += [
        ("Why broken", failures if manifest["failures"] else ""),
        ("Examples", examples(curation, found, count)),
    ]
    sections += [("Source, models, thresholds", table(about))]
    path = out or curation.out / "report.html"
    title = f"Curation: {int(found.kept.sum())} of {manifest['records']} images kept"
    write_text(path, page(title, [(heading, content) for heading, content in sections if content]))
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder that curate wrote")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="thresholds", help="other thresholds"
    )
    parser.add_argument("--examples", type=int, default=8, help="images of every step (default: 8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: OUT/report.html)")


def run(options: argparse.Namespace) -> int:
    curation = Curation(options.folder)
    asked = Thresholds.of(options.thresholds) if options.thresholds else None
    print(counts_in_words(curation.view(asked).counts))
    print(write_report(curation, asked, options.out, options.examples))
    return 0
