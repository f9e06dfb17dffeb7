"""Stage "evaluate": scores of a Mini on unseen prompts, with their intervals and ceilings.

    python -m train evaluate --model mini --per-task 40 --guidance 3          # the shipped weights, through the pipeline
    python -m train evaluate --state runs/base/pretrain.pt --vae runs/vae     # a training state's averaged weights
    python -m train evaluate --ceilings --vae runs/vae                        # the judge on true renders and reconstructions

Prompts are those of scenes never trained on; all tasks but "single" hold a colour x class or class x class pair that
training never showed. Picture i of a task has seed i: first seeds, no choice. "whole" asks for every object of the right
class and colour at its place and nothing else; "class" and "colour" count objects. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..checkpointing import write_text
from ..data.sheet import contact_sheet
from ..data.world import TASKS, Scene, World
from .judge import Verdict, judge

FIRST_SEED = 2_000_000_000
Painter = Callable[[Sequence[str], Sequence[int]], list[np.ndarray]]


def scenes_of(task: str, count: int) -> list[Scene]:
    """Unseen scenes of a task, always the same ones."""
    world = World("train" if task == "single" else "held_out", tasks={task: 1.0})
    return [world.scene(FIRST_SEED + i) for i in range(count)]


def wilson(right: int, of: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, p = 1.96, right / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)


def score(scenes: Sequence[Scene], pictures: Sequence[np.ndarray]) -> tuple[dict[str, float], list[Verdict]]:
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes)]
    whole = sum(v.whole for v in verdicts)
    classes = [right for v in verdicts for right in v.classes]
    colours = [right for v in verdicts for right, found in zip(v.colours, v.classes) if found]
    low, high = wilson(whole, len(verdicts))
    return {
        "whole": whole / len(verdicts),
        "low": low,
        "high": high,
        "class": float(np.mean(classes)),
        "colour": float(np.mean(colours)) if colours else float("nan"),
        "fit": float(np.mean([seen.explained for v in verdicts for seen in v.things])),
        "clean": float(np.mean([v.clean for v in verdicts])),
        "pictures": len(verdicts),
    }, verdicts


def from_state(options: argparse.Namespace) -> Painter:
    from .. import configs, encoder, generator, pretrain

    config = configs.load(options.config, "pretrain")
    model = pretrain.load_trained(config, options.config, options.state).eval()
    model.transformer.batch_invariant = False
    painter = generator.Painter(options.vae)
    tokenizer = encoder.tokenizer_of(configs.load(options.config, "encoder").TOKENIZER)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        tokens = [tokenizer.encode(p)[0] for p in prompts]
        latents = generator.sample(model, tokens, tokenizer.prefix, seeds, options.steps, options.guidance, options.mu)
        return list(painter(latents, model.grid))

    return draw


def from_pipeline(options: argparse.Namespace) -> Painter:
    from lens import LensPipeline

    pipe = LensPipeline.from_pretrained(options.model)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        out = pipe(list(prompts), seed=list(seeds), num_inference_steps=options.steps, guidance_scale=options.guidance)
        return [np.asarray(image) for image in out.images]

    return draw


def ceilings(options: argparse.Namespace, tasks: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of true renders and of their reconstructions through the VAE."""
    from .. import generator

    painter, out = generator.Painter(options.vae), {"render": {}, "reconstruction": {}}
    for task in tasks:
        scenes = scenes_of(task, options.per_task)
        pictures = np.stack([World().render(scene) for scene in scenes])
        tokens = painter.latents.encode(pictures)
        copies = np.concatenate([painter(tokens[i : i + 16], (4, 4)) for i in range(0, len(tokens), 16)])
        out["render"][task], _ = score(scenes, list(pictures))
        out["reconstruction"][task], _ = score(scenes, list(copies))
        report(task + " render", out["render"][task])
        report(task + " reconstruction", out["reconstruction"][task])
    return out


def report(name: str, row: dict[str, float]) -> None:
    print(
        f"{name:26s} whole {row['whole']:.3f} [{row['low']:.3f}, {row['high']:.3f}]  class {row['class']:.3f}  "
        f"colour {row['colour']:.3f}  fit {row['fit']:.3f}  nothing else {row['clean']:.3f}  ({row['pictures']:.0f} pictures)",
        flush=True,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="what the pipeline loads: mini, or a folder in the released layout")
    what.add_argument("--state", type=Path, help="a training state of the pretrain stage")
    what.add_argument(
        "--ceilings", action="store_true", help="judge true renders and reconstructions instead of a model"
    )
    parser.add_argument("--config", default="mini", help="recipe of --state (default: mini)")
    parser.add_argument("--vae", type=Path, default=Path("runs/vae"), help="VAE stage folder of --state and --ceilings")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all seven")
    parser.add_argument("--per-task", type=int, default=40, help="pictures per task (default: 40)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale (default: 3)")
    parser.add_argument("--mu", type=float, default=0.5, help="time shift of --state (default: 0.5)")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluate"), help="folder of scores and sheets")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    if options.ceilings:
        write_text(options.out / "ceilings.json", json.dumps(ceilings(options, options.tasks), indent=2) + "\n")
        return 0
    draw = from_state(options) if options.state else from_pipeline(options)
    rows: dict[str, dict[str, float]] = {}
    for task in options.tasks:
        scenes, start = scenes_of(task, options.per_task), time.perf_counter()
        prompts, seeds = [s.caption for s in scenes], list(range(len(scenes)))
        pictures = [p for i in range(0, len(scenes), 20) for p in draw(prompts[i : i + 20], seeds[i : i + 20])]
        spent = time.perf_counter() - start
        rows[task], verdicts = score(scenes, pictures)
        rows[task]["seconds_per_picture"] = spent / len(scenes)
        report(task, rows[task])
        marks = [("+ " if v.whole else "- ") + p for v, p in zip(verdicts, prompts)]
        contact_sheet(pictures, marks, options.out / f"{task}.png", columns=10)
    rows["mean"] = {"whole": float(np.mean([row["whole"] for row in rows.values()]))}
    settings = {
        "model": str(options.model or options.state),
        "steps": options.steps,
        "guidance": options.guidance,
        "per_task": options.per_task,
    }
    write_text(options.out / "scores.json", json.dumps({"settings": settings, "tasks": rows}, indent=2) + "\n")
    print(f"mean of tasks: {rows['mean']['whole']:.3f}")
    return 0
