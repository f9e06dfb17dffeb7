"""Stage "world": look at the small world.

python -m train world --sheet world.png --count 60 --split train
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lens.checkpoint import write_atomic

from .world import World


def contact_sheet(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    path: Path,
    columns: int = 10,
    cell: int = 160,
    boxes: Sequence[Sequence[tuple[str, tuple[int, int, int, int]]]] | None = None,
) -> None:
    """Pictures uint8 [H, W, 3] enlarged to `cell` pixels with their captions below; `boxes` are (label, box) to outline."""
    text = 36
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (cell + 4), rows * (cell + text + 4)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        x, y = i % columns * (cell + 4), i // columns * (cell + text + 4)
        scale = cell / max(picture.shape[:2])
        size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
        canvas.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (x, y))
        for label, box in boxes[i] if boxes else ():
            outline = [x + box[0] * scale, y + box[1] * scale, x + box[2] * scale - 1, y + box[3] * scale - 1]
            pen.rectangle(outline, outline="red")
            pen.text((outline[0] + 2, outline[1]), label, fill="red")
        for line, words in enumerate(textwrap.wrap(caption, cell // 6)[:3]):
            pen.text((x, y + cell + 1 + 11 * line), words, fill="black")
    write_atomic(path, lambda temporary: canvas.save(temporary, "PNG"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sheet", type=Path, default=Path("runs/world.png"), help="picture to write (default: runs/world.png)"
    )
    parser.add_argument("--count", type=int, default=60, help="scenes (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--split", choices=("train", "held_out"), default="train", help="which scenes (default: train)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(64, 64), metavar=("HEIGHT", "WIDTH"), help="bucket (default: 64 64)"
    )
    parser.add_argument("--boxes", action="store_true", help="outline every object with its class and colour")


def run(options: argparse.Namespace) -> int:
    world = World(options.split)
    start = time.perf_counter()
    scenes, pixels = world.batch(list(range(options.seed, options.seed + options.count)), *options.size)
    spent = time.perf_counter() - start
    boxes = (
        [[(f"{t.colour or ''} {t.kind}", t.box) for t in scene.things] for scene in scenes] if options.boxes else None
    )
    contact_sheet(list(pixels), [scene.caption for scene in scenes], options.sheet, boxes=boxes)
    print(f"{options.sheet}: {options.count} scenes, {options.count / spent:.0f} per second with cold caches")
    return 0
