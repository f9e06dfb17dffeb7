"""What the shape judge accepts and refuses, and where its threshold comes from.

    python -m train evaluate shape --model mini                  # true renders, reconstructions, damaged, drawn: a table
    python -m train evaluate shape --model mini --calibrate      # the threshold anew -> train/evaluate/assets/shape.json
    python -m train evaluate shape --model mini --sheet near.png # objects from the surest to the worst, with what they are held against

The threshold is a logistic regression of (distance, outline) on objects that were made and on objects that were drawn. Made, at
64, 96 and 128 pixels: true renders, their reconstructions through the model's VAE, and reconstructions slightly moved, against
renders that were damaged so that a person sees it at a glance (`damage.py`). Drawn: 108 single objects of two Lens-Mini at 128
pixels (assets/judged_by_eye.webp), of each of which one viewer of the project said, in one pass, whether it is known at a
glance and whole: no panel, and no second opinion. The four sides weigh the same. What the model at hand draws takes no part: it
is only counted, beside the rest.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from lens.formats.files import write_atomic

from ..data.small_world.backdrops import backdrop
from ..data.small_world.kinds import CORE
from ..data.small_world.scene import Scene
from ..data.small_world.world import World
from ..loop.checkpoints import write_text
from . import geneval
from .damage import DAMAGES, damaged
from .detector import Detector
from .mini_bench import GENEVAL, scenes_of, size_of
from .shape import CALIBRATION, Calibration, ShapeJudge, judge
from .sources import Size, Source, from_pipeline

EYE = CALIBRATION.with_name("judged_by_eye.webp")
FIRST_SEED = 2_300_000_000  # of the calibration's scenes, none of which Mini-Bench asks for
TASKS = (*GENEVAL, "row")
TRUE = ("render", "vae", "slight")
SLIGHT = (("torn", 0.3), ("lattice", 0.25))  # reconstructions moved so little that a person lets them pass, in turn
SIZES = ((64, 64), (96, 96), (128, 128))
BATCH = 20  # pictures drawn at once
EDGE = 0.02  # objects whose soft score lies within this of 0 or 1 are not around the threshold
UNFITTED = Calibration(1.0, 1.0, 1.0)  # while there is none
QUANTILES = (0.05, 0.5, 0.95)
CLIPPED = 1.5  # distances beyond are all alike
RIDGE = 1e-4  # keeps the regression finite where the two sides do not overlap


def logistic(features: np.ndarray, right: np.ndarray, group: np.ndarray | None = None) -> Calibration:
    """Distances and outlines [n, 2] and whether each object is a true shape [n] -> the threshold.

    Each side of each group [n] of objects (None: all are one) weighs the same.
    """
    x = np.concatenate([np.ones((len(features), 1)), -np.minimum(features, CLIPPED)], 1)
    sides = 2 * (np.zeros(len(right), int) if group is None else group) + right
    weight = 1 / (np.bincount(sides)[sides] * len(np.unique(sides)))
    ridge, w = RIDGE * np.diag([0.0, 1, 1]), np.zeros(3)
    for _ in range(50):  # Newton
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (weight * (p - right)) + ridge @ w
        w -= np.linalg.solve((x * (weight * p * (1 - p))[:, None]).T @ x + ridge, gradient)
    return Calibration(*(round(float(v), 3) for v in w))


def judged_by_eye(detector: Detector) -> tuple[np.ndarray, np.ndarray]:
    """(distance, outline) of the objects in judged_by_eye.webp [n, 2], and whether the viewer found each a true shape [n]."""
    recorded = json.loads(EYE.with_suffix(".json").read_text(encoding="utf-8"))
    page, side, across = np.asarray(Image.open(EYE).convert("RGB")), recorded["side"], recorded["across"]
    corners = [(i // across * side, i % across * side) for i in range(len(recorded["classes"]))]
    pictures = [np.ascontiguousarray(page[y : y + side, x : x + side]) for y, x in corners]
    shapes, features = ShapeJudge(CORE, calibration=UNFITTED), []
    for kind, picture, seen in zip(recorded["classes"], pictures, detector.look(pictures)):
        named = [o for o in shapes.look(picture, seen).objects if o.kind == kind]
        features.append(min(((o.distance, o.outline) for o in named), default=(CLIPPED, CLIPPED)))
    return np.array(features), np.isin(np.arange(len(pictures)), recorded["true"])


class Examined:
    """Pictures of one origin and size, as the judge sees them."""

    def __init__(self, scenes: Sequence[Scene], pictures: Sequence[np.ndarray], detector: Detector, shapes: ShapeJudge):
        self.scenes, self.pictures = scenes, pictures
        self.seen = [shapes.look(p, d) for p, d in zip(pictures, detector.look(pictures))]

    def features(self) -> np.ndarray:
        """(distance, outline) of every object, [n, 2]."""
        return np.array([(o.distance, o.outline) for seen in self.seen for o in seen.objects])

    def measured(self, calibration: Calibration) -> dict:
        """Share of objects that are true shapes, of pictures that are right (mean of GenEval's six tasks), and quantiles."""
        features = self.features()
        right: dict[str, list[bool]] = {task: [] for task in GENEVAL}
        for scene, seen in zip(self.scenes, self.seen):
            if scene.task in right:
                right[scene.task].append(judge(geneval.asked(scene), seen.judged_by(calibration)).right)
        return {
            "objects": len(features),
            "accepted": round(float(np.mean([calibration.soft(*f) >= 0.5 for f in features])), 4),
            "six": round(float(np.mean([np.mean(marks) for marks in right.values()])), 4),
            "distance": np.quantile(features[:, 0], QUANTILES).round(4).tolist(),
            "outline": np.quantile(features[:, 1], QUANTILES).round(4).tolist(),
        }


def examine(
    source: Source, size: Size, per_task: int, guidance: float, detector: Detector, shapes: ShapeJudge
) -> dict[str, Examined]:
    """True renders, reconstructions, each kind of damage and what is drawn, of the same scenes."""
    scenes = [s for task in TASKS for s in scenes_of(task, per_task, shapes.classes, side=size, first=FIRST_SEED)]
    renders = [World().render(scene) for scene in scenes]
    pictures = {"render": renders, "vae": source.reconstruct(renders)}

    def hurt(scene: Scene, picture: np.ndarray, how: str, amount: float) -> np.ndarray:
        canvas = backdrop(scene.background, scene.variant, *size)
        return damaged(picture, canvas, [t.box for t in scene.things], how, amount, scene.seed)

    pictures["slight"] = [hurt(s, p, *SLIGHT[i % len(SLIGHT)]) for i, (s, p) in enumerate(zip(scenes, pictures["vae"]))]
    for how in DAMAGES:
        pictures[how] = [hurt(s, p, how, 1.0) for s, p in zip(scenes, renders)]
    prompts, drawn = [scene.caption for scene in scenes], []
    for i in range(0, len(prompts), BATCH):
        part = prompts[i : i + BATCH]
        drawn += source.draw(part, list(range(i, i + len(part))), guidance, size)
    return {name: Examined(scenes, made, detector, shapes) for name, made in {**pictures, "drawn": drawn}.items()}


def sheet(found: dict[str, Examined], calibration: Calibration, path: Path, count: int = 64, cell: int = 110) -> None:
    """The objects around the threshold, surest first: as they are, and the true render that they are held against."""
    near = []
    for origin, one in found.items():
        for picture, seen in zip(one.pictures, one.seen):
            redrawn = np.clip(seen.redrawn + 0.5, 0, 255).astype(np.uint8)
            near += [(calibration.soft(o.distance, o.outline), origin, o, picture, redrawn) for o in seen.objects]
    near = sorted((n for n in near if EDGE < n[0] < 1 - EDGE), key=lambda n: -n[0])
    near = [near[i] for i in np.unique(np.linspace(0, len(near) - 1, min(count, len(near))).round().astype(int))]
    columns, wide = 8, 2 * cell + 6
    canvas = Image.new("RGB", (columns * wide, math.ceil(len(near) / columns) * (cell + 14)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (soft, origin, thing, *both) in enumerate(near):
        x, y = i % columns * wide, i // columns * (cell + 14)
        half = 0.62 * max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1])
        cx, cy = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
        around = (round(cx - half), round(cy - half), round(cx + half), round(cy + half))
        for k, pixels in enumerate(both):
            part = Image.fromarray(pixels).crop(around).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(part, (x + k * cell, y))
        pen.text(
            (x, y + cell + 1),
            f"{soft:.2f} {origin} {thing.kind} {thing.distance:.2f} {thing.outline:.2f}",
            fill="black",
        )
    write_atomic(path, lambda temporary: canvas.save(temporary, "PNG"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="mini", help="whose VAE and pictures (default: mini)")
    parser.add_argument(
        "--sizes", nargs="+", type=size_of, metavar="HxW", default=SIZES, help="default: 64, 96, 128 square"
    )
    parser.add_argument("--per-task", type=int, default=6, help="pictures per task, size and origin (default: 6)")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the drawn pictures (default: 3)")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument("--calibrate", action="store_true", help=f"fit the threshold and write {CALIBRATION.name}")
    parser.add_argument("--sheet", type=Path, help="picture of the objects around the threshold to write")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    source, detector = from_pipeline(options.model, options.steps), Detector.load()
    shapes = ShapeJudge(source.classes or CORE, calibration=UNFITTED if options.calibrate else None)
    found = {}
    for size in options.sizes:
        for origin, one in examine(source, size, options.per_task, options.guidance, detector, shapes).items():
            found[f"{origin} {size[0]}x{size[1]}"] = one
    calibration = shapes.calibration
    if options.calibrate:
        sides = [
            [one.features() for name, one in found.items() if name.split()[0] in w] for w in (TRUE, tuple(DAMAGES))
        ]
        right = np.repeat([True, False], [sum(map(len, side)) for side in sides])
        eye, known = judged_by_eye(detector)
        features = np.concatenate([*sides[0], *sides[1], eye])
        calibration = logistic(features, np.concatenate([right, known]), np.repeat([0, 1], [len(right), len(known)]))
        accepted = np.array([calibration.soft(*f) >= 0.5 for f in eye])
        alike = {"true": known.mean(), "accepted": accepted.mean(), "alike": (accepted == known).mean()}
        by_eye = {name: round(float(value), 4) for name, value in alike.items()} | {"objects": len(eye)}
        print(f"judged by eye: {by_eye}")
    measured = {name: one.measured(calibration) for name, one in found.items()}
    print(
        f"soft = sigmoid({calibration.bias} - {calibration.distance_weight} distance - {calibration.outline_weight} outline)"
    )
    print(f"{'':18s} objects  true shapes  right, mean of six  distance and outline at {QUANTILES}")
    for name, row in measured.items():
        print(
            f"{name:18s} {row['objects']:7d}  {row['accepted']:11.3f}  {row['six']:18.3f}  {row['distance']} {row['outline']}"
        )
    if options.sheet:
        sheet(found, calibration, options.sheet)
    if options.calibrate:
        how = {
            "command": "python -m train evaluate shape --calibrate",
            "model": options.model,
            "per_task": options.per_task,
            "first_prompt_seed": FIRST_SEED,
            "guidance": options.guidance,
            "quantiles": QUANTILES,
        }
        write_text(
            CALIBRATION,
            json.dumps({**vars(calibration), "how": how, "judged_by_eye": by_eye, "measured": measured}, indent=1)
            + "\n",
        )
    return 0
