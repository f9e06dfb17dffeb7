"""The README's speed tables and its chart, from results committed under bench/results/<device>/ and nothing else.

The headline of a GPU is e2e/<lens | turbo>/1024/b1: its total where decoding was measured, else its stages. Where no result
of a GPU is committed, one line says so, with the paper's times and the floors, and no chart is drawn. Of a CPU: the row
ops beside their specification, eager and compiled by Inductor, ratios within one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

from lens.config import LensConfig
from lens.cost import step_flops
from lens.formats.files import write_atomic

from .case import OURS
from .machine import ROOT
from .result import Result, conditions, load_folder, time_text
from .roofline import H100_BF16, PAPER_SECONDS, SAME_CHIP
from .work.throughput import CALLS

RESULTS = ROOT / "bench" / "results"
README, CHART = ROOT / "README.md", ROOT / "docs" / "images" / "speed.svg"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
STAGES = ("text", "denoise", "decode")
NAMES = {"lens": "Lens, 20 guided steps", "turbo": "Lens-Turbo, 4 steps"}
CPU_SHAPE = "pair"  # of bench/suites/ops.py
FLOOR_TEXT = 300  # text tokens of the floor
OVERLAP = 0.02  # share of a time from which an overlap of stages is reported; less is two measurements' difference
BATCHES = {
    "1024/b1": 1,
    "1024/b4": 4,
    "1024/b8": 8,
    "mixed/queue": 0,
}  # images of a call; the row of a queue has its own number
COLOURS = {"text": "#4f81bd", "denoise": "#2f5d8a", "decode": "#8fb4d9", "paper": "#c0c0c0"}


@dataclass(frozen=True)
class Times:
    """Seconds of a picture by stage, each measured alone, and in all: as measured, else the sum of the stages."""

    stages: dict[str, float]
    total: float | None = None

    @property
    def alone(self) -> float:
        return sum(self.stages.values())

    @property
    def seconds(self) -> float:
        return self.alone if self.total is None else self.total

    @property
    def overlap(self) -> float:
        """What the stages would take longer one after another; 0 where they do not."""
        return max(0.0, self.alone - self.seconds)

    @property
    def drawn(self) -> dict[str, float]:
        """Parts that add up to `seconds`: stages that overlap are shrunk, time between them is "rest"."""
        if self.seconds <= self.alone:
            return {stage: s * self.seconds / self.alone for stage, s in self.stages.items()}
        return {**self.stages, "rest": self.seconds - self.alone}

    def __str__(self) -> str:
        hidden = (
            f" (stages alone {time_text(self.alone)}: they overlap)" if self.overlap > OVERLAP * self.seconds else ""
        )
        return f"{time_text(self.seconds)}{hidden}"


@dataclass(frozen=True)
class Bar:
    """One drawn time: who, and how long."""

    who: str
    times: Times


def floor_seconds(variant: str) -> float:
    """FLOPs of the denoiser's calls with every exact saving, at an H100's dense bfloat16 peak."""
    steps, guided = (20, True) if variant == "lens" else (4, False)
    images, texts = ([4096] * 2, [FLOOR_TEXT, 0]) if guided else ([4096], [FLOOR_TEXT])
    return steps * sum(step_flops(LensConfig(), images, texts).values()) / H100_BF16


def measured(results: list[Result], variant: str, subject: str) -> Times | None:
    """Best seconds of the headline case; the newest result that has a stage counts. None with neither denoise nor
    total."""
    found: dict[str, float] = {}
    for result in results:
        for stage in (*STAGES, "total"):
            for name in ("lens", variant) if stage in ("text", "decode") else (variant,):  # its own counts last
                row = result.rows.get(
                    (f"e2e/{name}/1024/b1/bf16/{stage}", subject if stage in ("denoise", "total") else OURS)
                )
                if row is not None:
                    found[stage] = row.best
    if not {"denoise", "total"} & set(found):
        return None
    total = found.pop("total", None)
    return Times(found, total)


def bars(results: dict[str, list[Result]], variant: str) -> list[Bar]:
    """The paper's bar, then ours and the comparators' of every GPU with results."""
    drawn = [Bar("paper, H100", Times({"total": PAPER_SECONDS[variant]}))]
    for device, of_device in results.items():
        for subject, label in (
            (OURS, "Lens"),
            ("exact_compiled", "torch.compile, exact savings"),
            ("reference_eager", "reference, eager"),
        ):
            if times := measured(of_device, variant, subject):
                drawn.append(Bar(f"{label}, {device}", times))
    return drawn


def gpu_results(folder: Path = RESULTS) -> dict[str, list[Result]]:
    """Committed results of GPUs by device name, oldest first; a CPU's have no headline."""
    found: dict[str, list[Result]] = {}
    for place in sorted(p for p in folder.glob("*") if p.is_dir()):
        for result in load_folder(place):
            if "multiprocessors" in result.identity:
                found.setdefault(str(result.identity["device"]), []).append(result)
    return found


def cpu_results(folder: Path = RESULTS) -> list[Result]:
    """Committed results of CPUs that hold row ops at CPU_SHAPE."""
    found = [r for place in sorted(p for p in folder.glob("*") if p.is_dir()) for r in load_folder(place)]
    return [r for r in found if "multiprocessors" not in r.identity and any(_is_row_op(*key) for key in r.rows)]


def _is_row_op(case: str, subject: str) -> bool:
    return case.startswith("ops/") and f"/{CPU_SHAPE}/" in case and case.endswith("/forward") and subject == OURS


def cpu_table(results: list[Result]) -> list[str]:
    """Markdown: for every row op in float32 and bfloat16 its time, and how many times that eager and Inductor take."""
    lines = []
    for result in results:
        stems = dict.fromkeys(case.split("/")[1] for case, subject in result.rows if _is_row_op(case, subject))
        lines += [
            "| forward, two samples of 2,048 image tokens, width 1536 | float32 | eager | Inductor | bfloat16 | eager | Inductor |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for stem in stems:
            cells = []
            for dtype in ("fp32", "bf16"):
                case = f"ops/{stem}/{CPU_SHAPE}/{dtype}/forward"
                ours = result.rows.get((case, OURS))
                cells.append(time_text(ours.best) if ours else "")
                for other in ("spec_eager", "spec_compiled"):
                    row = result.rows.get((case, other))
                    cells.append(f"{row.best / ours.best:.2g}x" if ours and row else "")
            lines.append(f"| {stem} | {' | '.join(cells)} |")
        bands = sorted(row.band for key, row in result.rows.items() if _is_row_op(*key))
        lines += [
            "",
            f"Best of rounds that eager, Inductor and ours took in turns within one run, eager and Inductor as "
            f"multiples of our time. Our two passes differ by {bands[len(bands) // 2]:.0%} in the middle and {bands[-1]:.0%} at worst. "
            f"{conditions(result)}.",
            "",
        ]
    return lines


def speed_table(results: dict[str, list[Result]], cpus: list[Result] | None = None) -> str:
    """Markdown between the README's markers."""
    rows = cpu_table(cpus or [])
    if not results:
        paper = " and ".join(f"{PAPER_SECONDS[v]} s ({name})" for v, name in NAMES.items())
        floors = " and ".join(time_text(floor_seconds(v)) for v in NAMES)
        pending = "No GPU result is committed yet. To beat, 1024x1024, prompt to pixels, on one H100: the paper's "
        return "\n".join([*rows, f"{pending}{paper}; the floors are {floors}."])
    lines = [
        "| 1024x1024, batch 1, prompt to pixels | paper, one H100 | floor at 989 TFLOP/s | here |",
        "|---|---|---|---|",
    ]
    for variant, name in NAMES.items():
        texts = []
        for device, of_device in results.items():
            if times := measured(of_device, variant, OURS):
                missing = [s for s in STAGES if s not in times.stages] if times.total is None else []
                partly = f", without {' and '.join(missing)}" if missing else ""
                texts.append(f"{times} on one {device}{partly}")
        here = "; ".join(texts) or "not measured"
        lines.append(f"| {name} | {PAPER_SECONDS[variant]} s | {time_text(floor_seconds(variant))} | {here} |")
    lines += ["", *throughput(results), f"{SAME_CHIP} ![The paper's times, ours and the floors](docs/images/speed.svg)"]
    return "\n".join([*rows, *lines])


def throughput(results: dict[str, list[Result]]) -> list[str]:
    """Markdown: Lens-Turbo's pictures per second by batch, and of a queue of mixed sizes; nothing where nothing was
    measured. The newest result of each counts."""
    stream, ways = "e2e/turbo/{}/bf16/stream", []
    ways.append(("streamed, decode beside denoising", stream, OURS))
    ways.append(("the same calls one after another", stream, CALLS))
    ways.append(("one call, prompt to pixels", "e2e/turbo/{}/bf16/total", OURS))
    ways.append(("one call, the denoiser alone", "e2e/turbo/{}/bf16/denoise", OURS))
    lines = []
    for device, of_device in results.items():
        for what, case, subject in ways:
            rates = []
            for label, batch in BATCHES.items():
                rows = [r.rows[key] for r in of_device if (key := (case.format(label), subject)) in r.rows]
                rates.append(f"{rows[-1].more.get('images', batch) / rows[-1].best:.3g}" if rows else "")
            if any(rates):
                lines.append(f"| {device}, {what} | {' | '.join(rates)} |")
    if not lines:
        return []
    head = "| images per second, Lens-Turbo, 1024x1024 | batch 1 | batch 4 | batch 8 | queue of mixed sizes |"
    return [head, "|---|---|---|---|---|", *lines, ""]


def chart(results: dict[str, list[Result]]) -> str:
    """SVG: for each variant a bar per system, stacked by stage, and the floor as a line."""
    width, left, bar, gap, top = 860, 250, 18, 8, 46
    body, y = [], top
    for variant, name in NAMES.items():
        drawn, floor = bars(results, variant), floor_seconds(variant)
        scale = (width - left - 120) / max(b.times.seconds for b in drawn)
        body.append(f'<text x="12" y="{y}" font-weight="bold">{escape(name)}</text>')
        y += 12
        first = y
        for b in drawn:
            body.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(b.who)}</text>')
            x = float(left)
            for stage, seconds in b.times.drawn.items():
                colour = COLOURS["paper"] if b.who.startswith("paper") else COLOURS.get(stage, "#d9d9d9")
                body.append(f'<rect x="{x:.1f}" y="{y}" width="{seconds * scale:.1f}" height="{bar}" fill="{colour}"/>')
                x += seconds * scale
            body.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{escape(str(b.times))}</text>')
            y += bar + gap
        x = left + floor * scale
        body.append(f'<line x1="{x:.1f}" y1="{first - 4}" x2="{x:.1f}" y2="{y}" stroke="#a33" stroke-dasharray="4 3"/>')
        body.append(f'<text x="{x + 4:.1f}" y="{y + 10}" fill="#a33">floor {time_text(floor)}</text>')
        y += 48
    legend = [f'<rect x="{left + 110 * i}" y="{y - 18}" width="12" height="12" fill="{COLOURS[s]}"/>'
              f'<text x="{left + 110 * i + 18}" y="{y - 8}">{s}</text>' for i, s in enumerate(STAGES)]  # fmt: skip
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 28}" font-family="sans-serif" font-size="13">'
    title = '<text x="12" y="22">Seconds for one 1024x1024 picture, prompt to pixels</text>'
    note = f'<text x="12" y="{y + 18}" fill="#555">{escape(SAME_CHIP)} Floor: {FLOOR_TEXT} text tokens, the denoiser alone.</text>'
    back = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, back, title, *body, *legend, note, "</svg>\n"])


def replaced(text: str, table: str) -> str:
    """README text with the table between the markers; ValueError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must hold {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def put(text: str, path: Path) -> None:
    """For `write_atomic`."""
    path.write_text(text, encoding="utf-8")


def write(check: bool = False, results: Path = RESULTS, readme: Path = README, drawing: Path = CHART) -> list[Path]:
    """Write README tables and, of GPU results, the chart; the changed files. check: change nothing, ValueError where one
    is stale."""
    found = gpu_results(results)
    wanted = {readme: replaced(readme.read_text(encoding="utf-8"), speed_table(found, cpu_results(results)))}
    if found:
        wanted[drawing] = chart(found)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check and stale:
        raise ValueError(f"stale: {', '.join(p.name for p in stale)}; run python -m bench report")
    for path in [] if check else stale:
        write_atomic(path, partial(put, wanted[path]))
    return stale
