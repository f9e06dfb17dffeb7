"""Stage "rl_prompts": the prompt set of the rl stage as JSON lines, written without a server.

    python -m train rl_prompts --world mini --out runs/prompts.jsonl
    python -m train rl_prompts --world mini --count 64 --classes core --out few.jsonl

Scenes of the small world that training may show (never Mini-Bench's held-out facts), from seeds no other stage draws; each caption
with ten rubrics that the local judge reads (train/rewards/small_world_rubrics.py). Every line: id, category, sub_category (the
world's task), item (classes), dimensions (what is tested), prompt, rubrics, subsets.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .data.prompts import SUBSETS, Prompt, subsets_of, write_prompts
from .data.small_world.kinds import CORE, KINDS
from .data.small_world.scene import Scene
from .data.small_world.world import World
from .loop.clock import positive
from .rewards.small_world_rubrics import rubrics_of, sentence

FIRST_SEED = 3_000_000_000  # of training prompts
VALIDATION_SEED = 3_500_000_000  # of prompts that choose a checkpoint: never trained on, never reported
TASKS = {
    "single_object": 0.1,
    "colors": 0.12,
    "two_object": 0.18,
    "position": 0.15,
    "counting": 0.2,
    "color_attr": 0.25,
}
CATEGORY = {
    "single_object": "objects",
    "two_object": "objects",
    "row": "objects",
    "colors": "attributes",
    "color_attr": "attributes",
    "counting": "numbers",
    "position": "relations",
    "text": "text",
}


def scenes(
    count: int,
    classes: Sequence[str],
    tasks: dict[str, float],
    first: int,
    side: tuple[int, int] = (64, 64),
    split: str = "train",
) -> list[Scene]:
    """The first `count` scenes from a seed on whose captions are GenEval's and that can be asked ten rubrics; no caption twice."""
    world, found = World(split, tasks, classes, "geneval"), {}
    for seed in range(first, first + 64 * count):
        scene = world.scene(seed, *side)
        if scene.style == "geneval" and scene.things and scene.caption not in found:
            found[scene.caption] = scene
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"rl_prompts: {len(found)} different prompts among {64 * count} scenes, expected {count}")


def prompt_of(scene: Scene) -> Prompt:
    rubrics, name = rubrics_of(scene), f"mini-{scene.seed}"
    return Prompt(
        id=name,
        category=CATEGORY[scene.task],
        sub_category=scene.task,
        item=", ".join(dict.fromkeys(thing.kind for thing in scene.things)),
        dimensions=tuple(dict.fromkeys(rubric.check for rubric in rubrics)),
        prompt=scene.caption,
        rubrics=tuple(map(sentence, rubrics)),
        subsets=subsets_of(name),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", choices=("mini",), required=True, help="whose prompts: the small world's")
    parser.add_argument("--count", type=positive, default=600, help="prompts (default: 600)")
    parser.add_argument("--classes", choices=("core", "all"), default="core", help="classes asked for (default: core)")
    parser.add_argument(
        "--with-text", action="store_true", help="also prompts with a sign (read by OCR where installed)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/prompts.jsonl"), help="file (default: runs/prompts.jsonl)"
    )


def run(options: argparse.Namespace) -> int:
    tasks = {**TASKS, "text": 0.1} if options.with_text else TASKS
    classes = CORE if options.classes == "core" else tuple(KINDS)
    prompts = [prompt_of(scene) for scene in scenes(options.count, classes, tasks, FIRST_SEED)]
    write_prompts(options.out, prompts)
    sizes = ", ".join(f"{name} {sum(name in p.subsets for p in prompts)}" for name in SUBSETS)
    print(f"{options.out}: {len(prompts)} prompts ({sizes})")
    return 0
