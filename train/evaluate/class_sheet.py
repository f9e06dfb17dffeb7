"""Every class in one picture: a true render, its reconstruction through the VAE, and what the model draws.

    python -m train evaluate classes --model mini --size 128x128 --out sheet.png

Of each class the first seed's single object and prompt, drawn with seed 0: no choice. Below each row of three stand the class
and the shape judge's distance of the last two to the nearest true render, with a cross where it is no true shape of that class.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from lens.formats.files import write_atomic

from ..data.small_world import captions
from ..data.small_world.kinds import CORE, KINDS
from ..data.small_world.scene import Scene
from ..data.small_world.world import World
from . import geneval
from .detector import Detector
from .mini_bench import size_of
from .shape import ShapeJudge, judge
from .sources import Images, Size, Source, from_pipeline

COLUMNS = ("true", "reconstructed", "drawn")
ACROSS = 4  # classes side by side
GAP, LINE, HEAD = 14, 18, 20  # pixels: between classes, of a label, of the head
BATCH = 12  # pictures drawn at once


def first_scene(kind: str, size: Size) -> Scene:
    """The first scene of one object of the class that can be asked for in GenEval's form."""
    world = World("train", {"single_object": 1.0}, [kind], "geneval")
    scenes = (world.scene(seed, *size) for seed in itertools.count())
    return next(scene for scene in scenes if captions.can_say(scene, "geneval"))


def cells(source: Source, classes: Sequence[str], size: Size, guidance: float) -> list[tuple[Scene, Images]]:
    """Per class its scene and three pictures uint8 [H, W, 3], in the order of COLUMNS."""
    scenes = [first_scene(kind, size) for kind in classes]
    renders = [World().render(scene) for scene in scenes]
    drawn: Images = []
    for i in range(0, len(scenes), BATCH):
        prompts = [scene.caption for scene in scenes[i : i + BATCH]]
        drawn += source.draw(prompts, [0] * len(prompts), guidance, size)
    return [(scene, list(three)) for scene, *three in zip(scenes, renders, source.reconstruct(renders), drawn)]


def labels(made: Sequence[tuple[Scene, Images]], detector: Detector, shapes: ShapeJudge) -> list[str]:
    """ "apple  .03  .12", a cross (x) behind the distance of what is no true shape of the class."""
    found = []
    for scene, pictures in made:
        words = [KINDS[scene.things[0].kind].noun]
        for picture, seen in zip(pictures[1:], detector.look(pictures[1:])):
            verdict = judge(geneval.asked(scene), shapes.look(picture, seen))
            words.append(f"{verdict.distance:.2f}{'' if verdict.right else ' x'}")
        found.append("   ".join(words))
    return found


def sheet(made: Sequence[tuple[Scene, Images]], words: Sequence[str]) -> Image.Image:
    """One picture of all: cells of at least 128 pixels, enlarged by a whole number without smoothing."""
    height, width = made[0][1][0].shape[:2]
    times = -(-128 // max(height, width))
    height, width = height * times, width * times
    block, rows = len(COLUMNS) * (width + 2) + GAP, -(-len(made) // ACROSS)
    canvas = Image.new("RGB", (min(ACROSS, len(made)) * block, HEAD + rows * (height + LINE)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (_, pictures) in enumerate(made):
        x, y = i % ACROSS * block, HEAD + i // ACROSS * (height + LINE)
        for k, (name, picture) in enumerate(zip(COLUMNS, pictures)):
            cell = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(cell, (x + k * (width + 2), y))
            if i < ACROSS:
                pen.text((x + k * (width + 2), 3), name, fill="black", font_size=13)
        pen.text((x, y + height + 1), words[i], fill="black", font_size=13)
    return canvas


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="mini", help="what the pipeline loads (default: mini)")
    parser.add_argument(
        "--size", type=size_of, default=(128, 128), metavar="HxW", help="of the pictures (default: 128x128)"
    )
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale (default: 3)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/classes.png"), help="PNG to write (default: runs/classes.png)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    source = from_pipeline(options.model, options.steps)
    classes = source.classes or CORE
    made = cells(source, classes, options.size, options.guidance)
    image = sheet(made, labels(made, Detector.load(), ShapeJudge(classes)))
    write_atomic(options.out, lambda temporary: image.save(temporary, "PNG", optimize=True))
    print(f"{options.out}: {len(made)} classes, {' | '.join(COLUMNS)}")
    return 0
