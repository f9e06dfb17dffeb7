"""Mini-Bench: eight tasks on unseen prompts, by a detector, a template judge, a shape judge and a reader, with their ceilings.

    python -m train evaluate mini-bench --model mini                          # the shipped weights, guidance 1, 3 and 5
    python -m train evaluate mini-bench --model mini --quick --per-task 20    # guidance 3 alone
    python -m train evaluate mini-bench --state runs/base/pretrain.pt --vae runs/vae
    python -m train evaluate mini-bench --model mini --ceilings only          # true renders and reconstructions alone
    python -m train evaluate mini-bench --model mini --quick --sizes 128x128 96x176      # HEIGHTxWIDTH, each by itself
    python -m train evaluate mini-bench --model mini --quick --sizes 128x128 --enlarge 64   # drawn at 64, then enlarged

Prompts are those of scenes never trained on: all tasks but single_object hold a fact that training never showed (a colour x
class or class x class pair, a count, a sign's text). They are the first of a fixed row of seeds, and picture i of a task is drawn
with seed i: first seeds, no choice. GenEval's seven task names, and "row", three different objects side by side. Columns:

    score      GenEval's rule (train/evaluate/geneval.py) on Lens-Eye's boxes and colours; text also read exactly by OCR
    said       the same, and every colour the prompt says is right, also where the task is not about colours
    audit      the template judge (train/evaluate/template.py): right at the usual places, and nothing else there
    shape      the shape judge (train/evaluate/shape.py): the same rule, every object a true shape, and nothing else there
    soft       its mean soft score: of a picture that of its worst object, 0 where the rule does not hold
    dist       its mean distance of the objects asked for to the nearest true render (0: equal); 1 for one that is missing
    render, vae   `score` of true renders, and of their reconstructions through the model's own VAE: the ceilings
    vote       of coloured objects that were found, how many are of that colour by arithmetic on their pixels

scores.json has them with `marks`, a digit a picture, so that two models' pictures of one prompt and seed can be compared.
color_attr has at least BINDING prompts, whatever --per-task; its ceilings are those of the first --per-task. Counting is
also listed apart by the number asked for. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.contact_sheet import contact_sheet
from ..data.small_world.kinds import CORE, KINDS
from ..data.small_world.scene import Scene
from ..data.small_world.world import TASKS, World
from ..loop.checkpoints import write_text
from . import ocr
from .detector import Detector
from .judges import Judges, merged, wilson
from .sources import Images, Size, Source, enlarged, from_pipeline, from_state

__all__ = ["FIRST_SEED", "Judges", "scenes_of", "wilson"]
FIRST_SEED = 2_000_000_000
GENEVAL = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # its overall is their mean
BINDING = 80  # prompts of color_attr at least: at 40 the interval is wider than what is asked of it
JUDGED = ("score", "shape", "soft", "distance")  # of which the mean of GenEval's six is listed
STYLES = ("geneval", "brief", "dense", "translated")


def scenes_of(
    task: str,
    count: int,
    classes: Sequence[str] | None = CORE,
    style: str = "geneval",
    side: int | Size = 64,
    first: int = FIRST_SEED,
) -> list[Scene]:
    """The first unseen scenes of a task whose caption is of that style; always the same ones. side: or (height, width).

    A style that cannot say a task (see captions.can_say) gives way to "brief" for that task.
    """
    height, width = (side, side) if isinstance(side, int) else side
    split = "train" if task == "single_object" else "held_out"
    world = World(split, {task: 1.0}, classes, style)
    scenes: list[Scene] = []
    others: list[Scene] = []
    for i in range(16 * count):
        scene = world.scene(first + i, height, width)
        (scenes if scene.style == style else others).append(scene)
        if len(scenes) == count or (not scenes and len(others) >= 2 * count + 20):
            break
    return (scenes + others)[:count]


def images_per_task(task: str, per_task: int) -> int:
    return max(per_task, BINDING) if task == "color_attr" else per_task


def means(rows: dict[str, dict]) -> dict[str, float]:
    """Of each of JUDGED the mean over GenEval's six tasks; empty where one was not measured."""
    if not all("score" in rows.get(task, {}) for task in GENEVAL):
        return {}
    return {name: float(np.mean([rows[task][name] for task in GENEVAL])) for name in JUDGED}


def by_number(row: dict) -> str:
    """Counting per number asked for, by the detector's rule and the shape judge's."""
    parts = [f"{n}: {e['score']}/{e['pictures']}, shape {e['shape']}" for n, e in row["numbers"].items()]
    return "counting " + "; ".join(parts)


def ceilings(judges: Judges, scenes: dict[str, list[Scene]], source: Source) -> dict[str, dict[str, dict]]:
    """Rows of true renders, and of their reconstructions through the model's VAE, per task."""
    out: dict[str, dict[str, dict]] = {"render": {}, "vae": {}}
    for task, asked in scenes.items():
        pictures = [World().render(scene) for scene in asked]
        for name, drawn in (("render", pictures), ("vae", source.reconstruct(pictures))):
            out[name][task] = judges.score(task, asked, drawn)
    return out


def _number(value: float | None) -> str:
    return "    -" if value is None else f"{value:5.3f}"


def listed(mean: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in mean.items())


def line(task: str, row: dict, above: dict[str, dict[str, dict]]) -> str:
    """One printed row."""
    bound = [above[name][task].get("score") if name in above else None for name in ("render", "vae")]
    shape = f"{_number(row['shape'])}  {_number(row['soft'])}  {_number(row['distance'])}"
    tail = f"{shape}  {_number(bound[0])}  {_number(bound[1])}  {_number(row['vote'])}  {row['pictures']:4d}"
    if "not_measured" in row:
        return f"{task:14s} {row['not_measured']}; objects {_number(row['objects'])}"
    text = f"{row['score']:5.3f} [{row['low']:.3f}, {row['high']:.3f}]  {_number(row['said'])}  {_number(row['audit'])}"
    more = ""
    if "exact" in row:
        more = f"  exact {row['exact']:.3f}, ED {row['oneig']['ED']:.2f}, OneIG {row['oneig']['score']:.3f}"
    return f"{task:14s} {text}  {tail}{more}"


HEADER = f"{'task':14s} {'score':21s}  said   audit  shape  soft   dist   render vae    vote   pictures"


def benchmark(source: Source, judges: Judges, scenes: dict[str, list[Scene]], options: argparse.Namespace) -> dict:
    """Draw, judge, print and write everything; returns what scores.json holds."""
    above: dict = {}
    if options.ceilings != "none":
        start = time.perf_counter()
        above = ceilings(judges, {task: asked[: options.per_task] for task, asked in scenes.items()}, source)
        print(f"ceilings, {time.perf_counter() - start:.0f} s\n{HEADER}")
        for name in ("render", "vae"):
            for task, row in above[name].items():
                print(f"{name:7s}" + line(task, row, {}), flush=True)
            if mean := means(above[name]):
                print(f"{name:7s}mean of GenEval's six: {listed(mean)}", flush=True)
    results = {}
    for guidance in options.guidance if options.ceilings != "only" else ():
        start, rows = time.perf_counter(), {}
        print(f"guidance {guidance:g}\n{HEADER}")
        for task, asked in scenes.items():
            prompts, seeds = [s.caption for s in asked], list(range(len(asked)))
            pictures: Images = []
            for i in range(0, len(asked), 20):
                size = asked[0].height, asked[0].width
                pictures += source.draw(prompts[i : i + 20], seeds[i : i + 20], guidance, size)
            rows[task] = judges.score(task, asked, pictures)
            print(line(task, rows[task], above), flush=True)
            marks = [("+ " if right else "- ") + p for right, p in zip(rows[task]["marks"], prompts)]
            contact_sheet(pictures, marks, options.out / f"{task}_g{guidance:g}.png", columns=10)
        results[f"{guidance:g}"] = rows
        measured = {task: row["score"] for task, row in rows.items() if "score" in row}
        if "counting" in rows:
            print(by_number(rows["counting"]))
        words = f"mean of {len(measured)} tasks {np.mean(list(measured.values())):.3f}"
        if mean := means(rows):
            words += f", of GenEval's six: {listed(mean)}"
        print(f"{words}, {time.perf_counter() - start:.0f} s", flush=True)
    six = {**above, **results}
    return {"ceilings": above, "guidance": results, "means": {name: means(rows) for name, rows in six.items()}}


def size_of(text: str) -> Size:
    """ "96x176" -> (height, width). Errors: ValueError."""
    height, width = (int(number) for number in text.lower().split("x"))
    if height % 16 or width % 16 or min(height, width) < 16:
        raise ValueError(f"{text}: expected HEIGHTxWIDTH in multiples of 16")
    return height, width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="what the pipeline loads: mini, or a folder in the released layout")
    what.add_argument("--state", type=Path, help="a training state of the pretrain stage")
    parser.add_argument("--config", default="mini", help="recipe of --state, or a file .py (default: mini)")
    parser.add_argument(
        "--vae", type=Path, default=Path("runs/vae"), help="VAE stage folder of --state (default: runs/vae)"
    )
    parser.add_argument("--mu", type=float, help="time shift of --state (default: the recipe's)")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all eight")
    parser.add_argument(
        "--per-task",
        type=int,
        default=40,
        help=f"pictures per task and guidance (default: 40; of color_attr at least {BINDING})",
    )
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0, 3.0, 5.0], help="guidance scales (default: 1 3 5)"
    )
    parser.add_argument("--quick", action="store_true", help="guidance 3 alone")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=size_of,
        metavar="HxW",
        help="sizes to draw, each scored by itself (default: the model's)",
    )
    parser.add_argument(
        "--enlarge", type=int, metavar="SIDE", help="draw squares of this side and enlarge them to --sizes"
    )
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument(
        "--classes",
        choices=("core", "all"),
        help="classes asked for (default: those the model says it knows, else core)",
    )
    parser.add_argument("--captions", choices=STYLES, default="geneval", help="form of the prompts (default: geneval)")
    parser.add_argument(
        "--ceilings",
        choices=("with", "only", "none"),
        default="with",
        help="true renders and reconstructions (default: with)",
    )
    parser.add_argument("--no-audit", action="store_true", help="leave the template judge out")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/evaluate"),
        help="folder of scores.json and sheets (default: runs/evaluate)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    if options.quick:
        options.guidance = [3.0]
    source = (
        from_state(options.state, options.config, options.vae, options.steps, options.mu)
        if options.state
        else from_pipeline(options.model, options.steps)
    )
    classes = {"core": CORE, "all": tuple(KINDS), None: source.classes or CORE}[options.classes]
    if not ocr.available():
        print(f"text: {ocr.REMEDY}")
    judges = Judges(Detector.load(), classes, ocr.Reader() if ocr.available() else None, not options.no_audit)
    source = enlarged(source, options.enlarge) if options.enlarge else source
    explained = source.validation.get("text_explains")
    if explained is not None:
        print(f"share of the validation loss that text explains: {explained:.3f}")
    sizes, out, every = options.sizes or [(source.side, source.side)], options.out, {}
    for height, width in sizes:
        name = f"{height}x{width}"
        if options.sizes:
            print(f"\n{name}")
            options.out = out / name
        every[name] = scored(source, judges, (height, width), classes, options)
    settings = {
        "model": source.name,
        "side": source.side,
        "steps": options.steps,
        "per_task": options.per_task,
        "classes": list(classes),
        "captions": options.captions,
        "first_prompt_seed": FIRST_SEED,
        "validation": source.validation,
    }
    found = {"sizes": every} if options.sizes else every[name]
    write_text(out / "scores.json", json.dumps({"settings": settings, **found}, indent=1) + "\n")
    return 0


def scored(source: Source, judges: Judges, size: Size, classes: Sequence[str], options: argparse.Namespace) -> dict:
    """What scores.json holds of one size."""
    counts = {task: images_per_task(task, options.per_task) for task in options.tasks}
    scenes = {task: scenes_of(task, n, classes, options.captions, size) for task, n in counts.items()}
    found = benchmark(source, judges, scenes, options)
    tables = {name: merged([row["per_class"] for row in rows.values()]) for name, rows in found["guidance"].items()}
    for name, table in tables.items():
        weak = [f"{k} {e['found']}/{e['asked']}" for k, e in table.items() if e["found"] < e["asked"]]
        print(f"guidance {name}, classes not always found: " + (", ".join(weak[:20]) or "none"))
    for rows in (*found["ceilings"].values(), *found["guidance"].values()):
        for row in rows.values():
            row["marks"] = {name: "".join("01"[right] for right in own) for name, own in row.pop("marks_of").items()}
            del row["per_class"]
    return {**found, "per_class": tables}
