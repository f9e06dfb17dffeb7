"""The page of a training run: settings, curves out of its log, sheets before and after. One HTML file beside what it shows."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .loop.checkpoints import write_text
from .loop.log import read_log

WIDTH, HEIGHT, EDGE = 300, 120, 8  # of a curve in pixels
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
figure{display:inline-block;margin:.5rem}figcaption{font-size:13px}svg{background:#f6f6f4;border-radius:4px}
img{max-width:100%;image-rendering:pixelated}td,th{text-align:left;padding:.1rem 1rem .1rem 0;vertical-align:top}
table{font-size:13px}"""


def curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    """One number against the step, as an inline SVG with its first and last value."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    span_x, span_y = max(xs) - min(xs) or 1, max(ys) - min(ys) or 1
    places = [
        (
            EDGE + (x - min(xs)) / span_x * (WIDTH - 2 * EDGE),
            HEIGHT - EDGE - (y - min(ys)) / span_y * (HEIGHT - 2 * EDGE),
        )
        for x, y in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="#1f5fa8"/>' for x, y in places)
    label = html.escape(f"{name}: {ys[0]:.4g} to {ys[-1]:.4g}")
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}">'
        f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>{dots}</svg>'
        f"<figcaption>{label}</figcaption></figure>"
    )


def curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The curves of these numbers, those that the log never has left out."""
    out = []
    for name in names:
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        points = [(x, y) for x, y in points if y == y]
        if points:
            out.append(curve(name, points))
    return "".join(out)


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole page. sections: (heading, HTML)."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n'
    )


def table(values: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(json.dumps(v, default=str))}</td></tr>"
        for k, v in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def sheets(folder: Path) -> str:
    """The first and the last sheet of a run, on the same prompts and seeds."""
    found = sorted(folder.glob("sheet_*.png"))
    shown = dict.fromkeys([*found[:1], *found[-1:]])
    return "".join(
        f'<figure><img src="{html.escape(path.name)}" alt="{path.stem}"><figcaption>step {int(path.stem[6:])}</figcaption></figure>'
        for path in shown
    )


def run_page(folder: Path, title: str, settings: Mapping[str, Any]) -> Path:
    """FOLDER/index.html from log.jsonl and the sheets there. Held-out numbers come first, then rewards, then the rest."""
    rows = read_log(folder / "log.jsonl") if (folder / "log.jsonl").is_file() else []
    names = list(dict.fromkeys(name for row in rows for name in row))
    held = [name for name in names if name.startswith("held_")]
    watched = ["score", "reward", "passed_specific", "passed_global", "group_diversity", "effective_backdrops"]
    watched += ["diversity_reward", "sharpness", "kl", "old_distance", "advantage_bias", "clipped_share"]
    watched += ["zero_variance_groups", "invalid_share"]
    sections = [("Before and after, same prompts and seeds", sheets(folder))]
    sections += [("On prompts held out", curves(rows, held)), ("In training", curves(rows, watched))]
    sections += [("Optimiser", curves(rows, ["grad_norm", "lr", "step_s"])), ("Settings", table(settings))]
    path = folder / "index.html"
    write_text(path, page(title, [(heading, content) for heading, content in sections if content]))
    return path
