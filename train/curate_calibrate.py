"""Where to cut: percentiles of every score, and the images on both sides of each threshold.

    python -m train curate_calibrate curated/                    # curated/calibrate/: index.html and a sheet a score
    python -m train curate_calibrate curated/ --set clarity_min=8 --images 24

The paper publishes two of its nine thresholds. A sheet shows the images that a score ranks just below the threshold, the nearest
first, then those just above it; of near-duplicates the pairs, side by side. Look at them, then curate again with --set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from .curate_report import SCORES, marks_of, thumbnail
from .data.contact_sheet import contact_sheet
from .data.curation.manifest import Curation, above
from .data.curation.records import Thresholds
from .loop.checkpoints import write_text
from .report import figure, grid, page

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
CELL = 160


def around(values: np.ndarray, mark: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the `count` values nearest to a mark on each side: below it, from it on; the nearest first."""
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    cut = int(np.searchsorted(values[order], mark, side="left"))
    return order[max(0, cut - count) : cut][::-1], order[cut : cut + count]


def sheet(curation: Curation, places: list[int], words: list[str], path: Path, columns: int) -> int:
    """A contact sheet of those images that can be shown; how many they are."""
    own = np.unique(np.array(places, np.int64))
    pixels = {int(place): thumbnail(curation, record) for place, record in zip(own, curation.records(own))}
    shown = [(pixels[place], text) for place, text in zip(places, words) if pixels[place] is not None]
    if shown:
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet([p for p, _ in shown if p is not None], [text for _, text in shown], path, columns, CELL)
    return len(shown)


def calibrate(curation: Curation, thresholds: Thresholds, count: int) -> Path:
    """OUT/calibrate/index.html and its sheets. Errors: OSError."""
    folder, keys = curation.out / "calibrate", curation.columns["key"]
    limit = above(thresholds, curation.manifest["pairs"])
    rows, figures = [], []
    for name in SCORES:
        values = curation.columns[name]
        known = values[np.isfinite(values)]
        if not len(known):
            rows.append([name, 0, *[""] * len(PERCENTILES)])
            continue
        rows.append([name, len(known), *(f"{v:.4g}" for v in np.percentile(known, PERCENTILES))])
        for mark in marks_of(name, thresholds, limit):
            below, beyond = around(values, mark, count)
            places = [*below.tolist(), *beyond.tolist()]
            words = [f"{values[i]:.4g} {keys[i]}" for i in places]
            path = folder / f"{name}_{mark:g}.png"
            if sheet(curation, places, words, path, count):
                share = f"{(known < mark).mean():.1%} of {len(known)} below"
                figures.append(
                    figure(path.name, f"{name} around {mark:g}: {len(below)} below, then from it on; {share}")
                )
    pairs = curation.pairs
    if pairs is not None and limit is not None and len(pairs.a):
        below, beyond = around(pairs.cosine, limit, count)
        order = [*below.tolist(), *beyond.tolist()]
        places = [int(side[i]) for i in order for side in (pairs.a, pairs.b)]
        words = [f"{pairs.cosine[i]:.4f} {keys[place]}" for i in order for place in (pairs.a[i], pairs.b[i])]
        path = folder / f"duplicate_{limit:g}.png"
        if sheet(curation, places, words, path, 8):
            share = f"{int((pairs.cosine > limit).sum())} of {len(pairs.a)} above"
            figures.append(
                figure(path.name, f"pairs around a cosine of {limit:g}: {len(below)} below, then above it; {share}")
            )
    sections = [
        ("Percentiles", grid(["score", "images", *map(str, PERCENTILES)], rows)),
        ("Around the thresholds", "".join(figures)),
    ]
    write_text(folder / "index.html", page("Calibration", sections))
    return folder / "index.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder that curate wrote")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="thresholds", help="other thresholds"
    )
    parser.add_argument("--images", type=int, default=12, help="on each side of a threshold (default: 12)")


def run(options: argparse.Namespace) -> int:
    curation = Curation(options.folder)
    thresholds = Thresholds.of(options.thresholds) if options.thresholds else curation.thresholds
    (options.folder / "calibrate").mkdir(exist_ok=True)
    print(calibrate(curation, thresholds, options.images))
    return 0
