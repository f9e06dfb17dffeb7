"""Arbitrary sizes: one checkpoint scored by Mini-Bench over a grid of aspect ratios, and one sheet of all of them.

    python -m train evaluate sizes --model mini                              # 1:2 to 2:1 around 64x64 and 128x128
    python -m train evaluate sizes --model mini --bases 128 --ratios 1:2 6:7 5:4 2:1 --per-task 20
    python -m train evaluate sizes --model DIR --sheet-only --bases 1024 1440 --prompts "a red fox in the snow"

The paper's claim is 1:2 to 2:1 and up to 1440x1440, also at ratios never trained on, 5:4 and 6:7; sizes that none of the nine
trained ratios has are marked "unseen". A size is the pipeline's own for a base and a ratio; of a small base several ratios can be
the same size, which is then scored once.
Prompts and judges are Mini-Bench's. Printed is the share of images right over all tasks with Wilson's interval, by the
detector (score) and by the shape judge (shape). A released checkpoint has no small world: `--sheet-only` draws it, and
`evaluate geneval --size HxW` scores it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lens.resolution import bucket_size

from ..data.contact_sheet import contact_sheet
from ..data.small_world.kinds import CORE, KINDS
from ..data.small_world.world import TASKS
from ..loop.checkpoints import write_text
from . import mini_bench, ocr
from .detector import Detector
from .judges import Judges, wilson
from .sources import Size, Source, from_pipeline

RATIOS = ("1:2", "9:16", "2:3", "3:4", "6:7", "1:1", "5:4", "4:3", "3:2", "16:9", "2:1")
TRAINED = ((1, 2), (9, 16), (2, 3), (3, 4), (1, 1))  # width and height, and the other way round
LEAST = 48  # pixels of a side that the small world can be drawn in


def trained_sizes(bases: Sequence[int]) -> set[Size]:
    """Those of the nine ratios that the paper's buckets have."""
    return {bucket_size(base, f"{w}:{h}") for base in bases for pair in TRAINED for w, h in (pair, pair[::-1])}


def grid_of(ratios: Sequence[str], bases: Sequence[int]) -> dict[Size, str]:
    """Size -> what it is called: base and the ratios that it stands for, "unseen" where it is none of the trained sizes: of a
    small base 5:4 is rounded to the size of 4:3, whether or not that is asked for as well."""
    names: dict[Size, list[tuple[int, str]]] = {}
    for base in bases:
        for ratio in ratios:
            names.setdefault(bucket_size(base, ratio), []).append((base, ratio))
    out, trained = {}, trained_sizes(bases)
    for size, own in names.items():
        ratio = " ".join(dict.fromkeys(r for _, r in own))
        out[size] = f"{size[0]}x{size[1]} ({ratio}{'' if size in trained else ', unseen'})"
    return out


def pooled(rows: dict[str, dict], column: str) -> tuple[float, float, float, int] | None:
    """(share, low, high, images) of all tasks that have the column."""
    known = [row for row in rows.values() if row.get(column) is not None]
    of = sum(row["pictures"] for row in known)
    if not of:
        return None
    right = round(sum(row[column] * row["pictures"] for row in known))
    return right / of, *wilson(right, of), of


def sheet(source: Source, sizes: dict[Size, str], prompts: Sequence[str], guidance: float, path: Path) -> None:
    """A row a size, a column a prompt, always with seeds 0, 1, ..."""
    pictures: list[np.ndarray] = []
    captions: list[str] = []
    for size, name in sizes.items():
        pictures += source.draw(list(prompts), list(range(len(prompts))), guidance, size)
        captions += [f"{name} {prompt}" for prompt in prompts]
    contact_sheet(pictures, captions, path, columns=len(prompts))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="what the pipeline loads: mini, or a folder in the released layout"
    )
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS), metavar="W:H", help=f"default: {' '.join(RATIOS)}")
    parser.add_argument(
        "--bases", nargs="+", type=int, help="sides of the squares of equal area (default: the model's)"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all eight")
    parser.add_argument("--per-task", type=int, default=10, help="images per task and size (default: 10)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale (default: 3)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--sheet-only", action="store_true", help="draw, score nothing")
    parser.add_argument("--prompts", nargs="+", help="of the sheet (default: the first of each task)")
    parser.add_argument("--out", type=Path, default=Path("runs/sizes"), help="folder (default: runs/sizes)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    source = from_pipeline(options.model, options.steps)
    sizes = grid_of(options.ratios, options.bases or [source.side])
    options.out.mkdir(parents=True, exist_ok=True)
    every: dict[str, dict] = {}
    if not options.sheet_only:
        if small := [name for (h, w), name in sizes.items() if min(h, w) < LEAST]:
            raise ValueError(f"sizes: {', '.join(small)}: the small world needs sides of at least {LEAST} pixels")
        classes = source.classes or CORE
        judges = Judges(Detector.load(), classes, ocr.Reader() if ocr.available() else None, audit=False)
        out = options.out
        options.captions, options.ceilings, guidance = "geneval", "none", options.guidance
        for size, name in sizes.items():
            print(f"\n{name}")
            options.out, options.guidance = out / f"{size[0]}x{size[1]}", [guidance]
            options.out.mkdir(parents=True, exist_ok=True)
            rows = mini_bench.scored(source, judges, size, classes, options)["guidance"][f"{guidance:g}"]
            every[name] = {column: pooled(rows, column) for column in ("score", "shape")} | {"tasks": rows}
        options.out, options.guidance = out, guidance
        print(f"\n{'size':40s} score                 shape                 images")
        for name, found in every.items():
            told = [
                "-" if (f := found[c]) is None else f"{f[0]:.3f} [{f[1]:.3f}, {f[2]:.3f}]" for c in ("score", "shape")
            ]
            print(f"{name:40s} {told[0]:21s} {told[1]:21s} {(found['score'] or (0, 0, 0, 0))[3]:5d}")
        settings = {"model": source.name, "steps": options.steps, "guidance": guidance, "per_task": options.per_task}
        write_text(out / "scores.json", json.dumps({"settings": settings, "sizes": every}, indent=1) + "\n")
    prompts = options.prompts or [
        mini_bench.scenes_of(task, 1, source.classes or tuple(KINDS), side=source.side)[0].caption
        for task in options.tasks
    ]
    sheet(source, sizes, prompts, options.guidance, options.out / "sheet.png")
    print(options.out / "sheet.png")
    return 0
