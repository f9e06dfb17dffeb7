"""Stage "world": look at the small world.

python -m train world --sheet world.png --count 60 --split train
python -m train world --sheet world.png --captions dense --classes core --size 128 128 --photographs 0.4
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from .data.contact_sheet import contact_sheet
from .data.small_world.captions import STYLES
from .data.small_world.kinds import CORE
from .data.small_world.world import TASKS, World


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
    parser.add_argument("--classes", choices=("core", "all"), default="all", help="classes drawn from (default: all)")
    parser.add_argument(
        "--captions", choices=("mixed", *STYLES), default="mixed", help="caption style (default: the mix)"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="these tasks only, in equal shares")
    parser.add_argument(
        "--photographs", type=float, default=0.0, help="share of scenes before a photograph, up to 0.4 (default: 0)"
    )
    parser.add_argument("--boxes", action="store_true", help="outline every object with its class and colour")


def run(options: argparse.Namespace) -> int:
    tasks = dict.fromkeys(options.tasks, 1.0) if options.tasks else None
    world = World(
        options.split, tasks, CORE if options.classes == "core" else None, options.captions, options.photographs
    )
    start = time.perf_counter()
    scenes, pixels = world.batch(list(range(options.seed, options.seed + options.count)), *options.size)
    spent = time.perf_counter() - start
    boxes = None
    if options.boxes:
        boxes = [
            [(f"{t.colour or ''} {t.kind}", t.box) for t in s.things] + ([(s.sign.text, s.sign.box)] if s.sign else [])
            for s in scenes
        ]
    captions = [f"[{s.style}{'' if s.language == 'en' else ' ' + s.language}] {s.caption}" for s in scenes]
    contact_sheet(list(pixels), captions, options.sheet, boxes=boxes)
    print(f"{options.sheet}: {options.count} scenes, {options.count / spent:.0f} per second with cold caches")
    return 0
