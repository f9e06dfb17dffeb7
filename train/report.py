"""The page of a training run: settings, curves out of its log, sheets before and after. One HTML file beside what it shows.

And the frontier of several runs, one arm each: reward against diversity at every validation, on prompts held out.

    python -m train rl_frontier runs/rl runs/rl_kl1 runs/rl_nodiversity --out runs/frontier.html
    python -m train rl_frontier runs/rl* --reward held_template --diversity held_sharpness --out runs/frontier.svg
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


def bars(name: str, counts: Mapping[str, float], mark: str = "") -> str:
    """A histogram: one bar a label, in the order given, with its number and its share, as an inline SVG. mark: a label set off."""
    total, most = sum(counts.values()) or 1, max(counts.values(), default=0) or 1
    left, step, drawn = 8 + 7 * max(map(len, counts), default=0), 20, []
    for place, (label, count) in enumerate(counts.items()):
        y, length = EDGE + step * place, count / most * WIDTH
        fill = "#b3412e" if label == mark else "#1f5fa8"
        own = f' fill="{fill}"' if label == mark else ""  # seen where its bar has no length, too
        drawn.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end"{own}>{html.escape(label)}</text>')
        drawn.append(f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{step - 5}" fill="{fill}"/>')
        drawn.append(f'<text x="{left + length + 6:.1f}" y="{y + 13}">{count:,g} ({count / total:.1%})</text>')
    size = (
        f'width="{left + WIDTH + 110}" height="{2 * EDGE + step * len(counts)}" font-size="12" font-family="sans-serif"'
    )
    title = html.escape(name)
    return (
        f'<figure><svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">{"".join(drawn)}</svg>'
        f"<figcaption>{title}</figcaption></figure>"
    )


def bands_svg(title: str, arms: Mapping[str, Sequence[tuple[float, float, float, float]]]) -> tuple[str, str]:
    """A line an arm with a band around it, as an SVG that can stand alone, and its title with the ranges of both axes.

    Points: (x, middle, low, high).
    """
    every = [point for points in arms.values() for point in points]
    xs, lows, highs = ([p[k] for p in every] for k in (0, 2, 3))
    span_x, bottom, span_y = max(xs) - min(xs) or 1, min(lows), max(highs) - min(lows) or 1
    wide, high = 2 * WIDTH, 2 * HEIGHT

    def place(x: float, y: float) -> str:
        across = EDGE + (x - min(xs)) / span_x * (wide - 2 * EDGE)
        return f"{across:.1f},{high - EDGE - (y - bottom) / span_y * (high - 2 * EDGE):.1f}"

    drawn = ""
    for number, (name, points) in enumerate(arms.items()):
        colour = COLOURS[number % len(COLOURS)]
        around = [place(x, up) for x, _, _, up in points] + [place(x, low) for x, _, low, _ in reversed(points)]
        drawn += f'<polygon points="{" ".join(around)}" fill="{colour}" fill-opacity="0.15"/>'
        line = " ".join(place(x, middle) for x, middle, _, _ in points)
        drawn += f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        drawn += "".join(
            f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>'
            for x, _, y in (place(*p[:2]).partition(",") for p in points)
        )
        drawn += (
            f'<text x="{wide + 6}" y="{16 + 16 * number}" fill="{colour}" font-size="12">{html.escape(name)}</text>'
        )
    told = f"{title}: x {min(xs):g} to {max(xs):g}, y {bottom:.3g} to {max(highs):.3g}"
    for x, y, words in (
        (EDGE, high - 2, f"{min(xs):g}"),
        (wide - 2 * EDGE, high - 2, f"{max(xs):g}"),
        (2, high - EDGE - 4, f"{bottom:.2f}"),
    ):
        drawn += f'<text x="{x}" y="{y}" fill="#666" font-size="10">{words}</text>'
    drawn += f'<text x="2" y="{EDGE}" fill="#666" font-size="10">{max(highs):.2f}</text>'
    size = f'width="{wide + 160}" height="{high}" viewBox="0 0 {wide + 160} {high}"'
    drawn = f'<rect width="{wide + 160}" height="{high}" fill="#fff"/>{drawn}'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" role="img" '
        f'aria-label="{html.escape(told)}">{drawn}</svg>'
    ), told


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
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(json.dumps(v, default=str, ensure_ascii=False))}</td></tr>"
        for k, v in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def grid(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with a head; every cell is text."""

    def line(cells: Sequence[object], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def histogram(name: str, counts: Sequence[int], low: float, high: float, marks: Sequence[float] = ()) -> str:
    """Bars of equal width over [low, high], with a line at every mark inside it, as an inline SVG."""
    bar, most = (WIDTH - 2 * EDGE) / len(counts), max(*counts, 1)
    bars = []
    for i, count in enumerate(counts):
        height = (HEIGHT - 2 * EDGE) * count / most
        place = f'x="{EDGE + i * bar:.1f}" y="{HEIGHT - EDGE - height:.1f}" width="{max(bar - 0.5, 0.5):.1f}"'
        bars.append(f'<rect {place} height="{height:.1f}" fill="#1f5fa8"/>')
    for mark in (m for m in marks if low <= m <= high):
        x = EDGE + (mark - low) / (high - low or 1) * (WIDTH - 2 * EDGE)
        bars.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT}" stroke="#b3412e" stroke-width="1.5"/>')
    label = html.escape(f"{name}: {low:.4g} to {high:.4g}, {sum(counts)} values")
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}">{"".join(bars)}</svg>'
        f"<figcaption>{label}</figcaption></figure>"
    )


def figure(source: str, caption: str) -> str:
    """An image with words below; source: an address or data:."""
    text = html.escape(caption)
    return f'<figure><img src="{html.escape(source)}" alt="{text}"><figcaption>{text}</figcaption></figure>'


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
    sections += [("Pass rates by kind of rubric", curves(rows, sorted(n for n in names if n.startswith("passed_of_"))))]
    sections += [("Optimiser", curves(rows, ["grad_norm", "lr", "step_s"])), ("Settings", table(settings))]
    path = folder / "index.html"
    write_text(path, page(title, [(heading, content) for heading, content in sections if content]))
    return path


# ------------------------------------------------------------------------------------------------ the frontier of several runs

SIDE, MARGIN = 520, 48  # of the plot in pixels
COLOURS = ("#1f5fa8", "#b3412e", "#2e7d4f", "#8a5ea8", "#b07d1a", "#3a8f9e", "#7a4a2b", "#5b6470")


@dataclass(frozen=True)
class Point:
    """One validation of an arm. best: no other point has at least as much of both and more of one."""

    arm: str
    step: int
    diversity: float
    reward: float
    best: bool = False


def points_of(folder: Path, reward: str, diversity: str) -> list[Point]:
    """The validations of a run that have both numbers. Errors: FileNotFoundError, ValueError naming the numbers there are."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no log of a training here")
    rows = read_log(path)
    found = {
        row["step"]: Point(folder.name, row["step"], row[diversity], row[reward])
        for row in rows
        if all(isinstance(row.get(name), int | float) and row[name] == row[name] for name in (reward, diversity))
    }
    if not found:
        known = sorted({name for row in rows for name in row if name.startswith("held_")})
        raise ValueError(
            f"{path}: no row with {reward} and {diversity}; held-out numbers there: {', '.join(known) or 'none'}"
        )
    return [found[step] for step in sorted(found)]


def frontier(arms: Sequence[Sequence[Point]]) -> list[list[Point]]:
    """The same points, those that none dominates marked as best."""
    every = [point for arm in arms for point in arm]

    def best(one: Point) -> bool:
        return not any(
            other.diversity >= one.diversity
            and other.reward >= one.reward
            and (other.diversity, other.reward) != (one.diversity, one.reward)
            for other in every
        )

    return [[Point(p.arm, p.step, p.diversity, p.reward, best(p)) for p in arm] for arm in arms]


def plot(arms: Sequence[Sequence[Point]], reward: str, diversity: str) -> str:
    """Reward (up) against diversity (right): a line an arm through its validations, filled dots on the frontier."""
    every = [point for arm in arms for point in arm]
    low = min(p.diversity for p in every), min(p.reward for p in every)
    high = max(p.diversity for p in every), max(p.reward for p in every)

    def place(value: float, axis: int) -> float:
        share = (value - low[axis]) / (high[axis] - low[axis] or 1)
        return MARGIN + (share if axis == 0 else 1 - share) * (SIDE - 2 * MARGIN)

    drawn = []
    for number, arm in enumerate(arms):
        colour = COLOURS[number % len(COLOURS)]
        at = [(place(p.diversity, 0), place(p.reward, 1)) for p in arm]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        for p, (x, y) in zip(arm, at):
            fill, label = colour if p.best else "#f6f6f4", f"{p.arm}, step {p.step}: {p.diversity:.4g}, {p.reward:.4g}"
            drawn.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}"><title>{html.escape(label)}</title></circle>'
            )
        drawn.append(f'<text x="{SIDE}" y="{MARGIN + 18 * number}" fill="{colour}">{html.escape(arm[0].arm)}</text>')
    bottom = SIDE - MARGIN / 3
    for text, x, y, anchor in (
        (f"{low[0]:.4g}", MARGIN, bottom, "middle"),
        (f"{high[0]:.4g}", SIDE - MARGIN, bottom, "middle"),
        (diversity, SIDE / 2, bottom, "middle"),
        (f"{low[1]:.4g}", MARGIN - 8, SIDE - MARGIN, "end"),
        (f"{high[1]:.4g}", MARGIN - 8, MARGIN, "end"),
        (reward, MARGIN, MARGIN / 2, "start"),
    ):
        drawn.append(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(text)}</text>')
    size = f'width="{SIDE + 220}" height="{max(SIDE, MARGIN + 18 * len(arms))}" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{"".join(drawn)}</svg>'


def frontier_page(folders: Sequence[Path], reward: str, diversity: str, path: Path) -> list[Point]:
    """Write the plot and its numbers, or of a path that ends with .svg the plot alone; returns the frontier, least diverse
    first. Errors: see `points_of`."""
    arms = frontier([points_of(folder, reward, diversity) for folder in folders])
    best = sorted((p for arm in arms for p in arm if p.best), key=lambda p: (p.diversity, p.arm, p.step))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        write_text(path, plot(arms, reward, diversity) + "\n")
        return best
    numbers = {f"{p.arm}, step {p.step}": {diversity: p.diversity, reward: p.reward} for p in best}
    sections = [("All arms, frontier filled", plot(arms, reward, diversity)), ("On the frontier", table(numbers))]
    write_text(path, page("Reward against diversity", sections))
    return best


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT", help="folders of rl runs, one an arm")
    parser.add_argument("--reward", default="held_score", help="number of the log, upwards (default: held_score)")
    parser.add_argument(
        "--diversity", default="held_effective_backdrops", help="to the right (default: held_effective_backdrops)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/frontier.html"),
        help="the page, or an .svg (default: runs/frontier.html)",
    )


def run(options: argparse.Namespace) -> int:
    best = frontier_page(options.folders, options.reward, options.diversity, options.out)
    for p in best:
        print(f"{p.arm}, step {p.step}: {options.diversity} {p.diversity:.4g}, {options.reward} {p.reward:.4g}")
    print(options.out)
    return 0
