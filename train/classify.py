"""Stage "classify": one scenario and one of ten categories an image, without training, by CLIP and words.

    python -m train classify --images photos/ --model clip-vit-large-patch14/ --out runs/classes.jsonl
    python -m train classify --records curated/ --model clip-vit-large-patch14/ --out runs/classes.jsonl    # stored embeddings

Phrases for each class stand in train/data/assets/class_phrases.v1.json; an image whose most likely class is below --least is
"unknown", which stays so. Stored embeddings must be of the same model. The stage `caption` answers the same two questions by the
captions' model: its captions.jsonl can be used in the place of this one's lines, which have key, file, scenario, scenario_p,
category, category_p, by.
"""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .caption import pixels_of, places
from .data.images import Unusable
from .data.tables import read_rows
from .data.zero_shot import LEAST, Clip, Embedder, classified, directions, phrases, unit
from .loop.checkpoints import write_text
from .loop.clock import positive
from .report import bars, page, table

SIDE = 512  # pixels of an image's longer side before the model's own resize


def of_images(
    folder: Path, embedder: Embedder, batch: int, left: list[dict[str, str]]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """(files, unit [B, E]) in order; what is broken goes to `left`. One batch of images is in memory."""
    files, images = list[str](), list[np.ndarray]()
    for place in places(folder, None):
        try:
            images.append(pixels_of(place.read(), SIDE))
        except Unusable as error:
            left.append({"key": place.key, "reason": f"broken: {error}"})
            continue
        files.append(place.key)
        if len(files) == batch:
            yield files, embedder.images(images)
            files, images = [], []
    if files:
        yield files, embedder.images(images)


def of_records(path: Path, by: str, batch: int, left: list[dict[str, str]]) -> Iterator[tuple[list[str], np.ndarray]]:
    """The same from records with key, embedding (float16 bytes or a list) and embedding_by. Errors: ValueError for another model."""
    keys, rows = list[str](), list[np.ndarray]()
    for row in read_rows(path, ("key", "embedding", "embedding_by")):
        key, stored = str(row.get("key")), row.get("embedding")
        if stored is None:
            left.append({"key": key, "reason": "no embedding"})
            continue
        if (made := str(row.get("embedding_by")).partition("@")[0]) != by:
            raise ValueError(f"{path}: the embedding of {key} is by {made!r}, expected {by!r}, the folder of --model")
        keys.append(key)
        rows.append(np.frombuffer(stored, "<f2") if isinstance(stored, bytes) else np.asarray(stored))
        if len(keys) == batch:
            yield keys, unit(np.stack(rows).astype(np.float32))
            keys, rows = [], []
    if keys:
        yield keys, unit(np.stack(rows).astype(np.float32))


def classes(
    parts: Iterator[tuple[list[str], np.ndarray]], embedder: Embedder, least: float
) -> Iterator[dict[str, Any]]:
    """A line an image."""
    asked = {name: (list(own), directions(own, embedder)) for name, own in phrases().items()}
    for keys, embeddings in parts:
        found = {name: classified(embeddings, labels, rows, least) for name, (labels, rows) in asked.items()}
        for place, key in enumerate(keys):
            line: dict[str, Any] = {"key": key, "file": key}
            for name, answers in found.items():
                label, chance = answers[place]
                line |= {name: label, f"{name}_p": round(chance, 4)}
            yield {**line, "by": embedder.by}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="FOLDER", help="images, in subfolders too")
    source.add_argument(
        "--records", type=Path, metavar="PATH", help="Parquet or JSON lines with key, embedding, embedding_by"
    )
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="CLIP in the Transformers layout")
    parser.add_argument(
        "--least", type=float, default=LEAST, help=f"below this probability: unknown (default: {LEAST})"
    )
    parser.add_argument("--batch", type=positive, default=32, help="images at a time (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/classes.jsonl"), help="file (default: runs/classes.jsonl)"
    )


def run(options: argparse.Namespace) -> int:
    if not 0 <= options.least <= 1:
        raise ValueError(f"--least: expected a probability, got {options.least}")
    return classify(options, Clip(options.model, options.device))


def classify(options: argparse.Namespace, embedder: Embedder) -> int:
    left: list[dict[str, str]] = []
    if options.images is not None:
        parts = of_images(options.images, embedder, options.batch, left)
    else:
        parts = of_records(options.records, embedder.by, options.batch, left)
    lines = list(classes(parts, embedder, options.least))
    if not lines:
        raise ValueError(f"classify: nothing to classify in {options.images or options.records}; left out: {len(left)}")
    write_text(options.out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    counts = {name: collections.Counter(line[name] for line in lines) for name in phrases()}
    sections = [(name.capitalize(), bars(name, dict(own.most_common()))) for name, own in counts.items()]
    settings = {"model": embedder.by, "least": options.least, "left_out": left[:20], "left_out_in_all": len(left)}
    write_text(options.out.with_suffix(".html"), page("Classes", [*sections, ("Settings", table(settings))]))
    said = "; ".join(f"{name}: {', '.join(f'{c} {n}' for n, c in own.most_common())}" for name, own in counts.items())
    print(f"{options.out}: {len(lines)} images, {len(left)} left out; {said}")
    return 0
