"""What the shape judge accepts and refuses, and where its threshold comes from.

    python -m train evaluate shape --model mini                  # true renders, reconstructions, damaged, drawn: a table
    python -m train evaluate shape --model mini --calibrate      # the threshold anew -> train/evaluate/assets/shape.json
    python -m train evaluate shape --model mini --sheet near.png # objects from the surest to the worst, with what they are held against

The threshold is a logistic regression of (distance, outline) on objects: those of true renders and of their reconstructions
through the model's VAE, at 64, 96 and 128 pixels, against those that were damaged on purpose (`damage.py`). Both sides
weigh the same. What the model draws takes no part: it is only counted, beside the rest.
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

from lens.checkpoint import write_atomic

from ..checkpointing import write_text
from ..data.backdrops import backdrop
from ..data.kinds import CORE
from ..data.world import Scene, World
from . import geneval
from .damage import DAMAGES, damaged
from .eye import Eye
from .mini_bench import GENEVAL, scenes_of, size_of
from .shape import CALIBRATION, Calibration, Found, Seen, ShapeJudge, judge
from .sources import Size, from_pipeline

FIRST_SEED = 2_300_000_000  # of the calibration's scenes, none of which Mini-Bench asks for
TASKS = (*GENEVAL, "row")
QUANTILES = (0.05, 0.5, 0.95)
CLIPPED = 1.5  # distances beyond are all alike
RIDGE = 1e-3  # keeps the regression finite where the two sides do not overlap


def logistic(features: np.ndarray, right: np.ndarray) -> Calibration:
    """Distances and outlines [n, 2] and whether each object is a true shape [n] -> the threshold, both sides weighing the same."""
    x = np.concatenate([np.ones((len(features), 1)), -np.minimum(features, CLIPPED)], 1)
    weight = np.where(right, 0.5 / right.sum(), 0.5 / (~right).sum())
    ridge, w = RIDGE * np.diag([0.0, 1, 1]), np.zeros(3)
    for _ in range(50):  # Newton
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (weight * (p - right)) + ridge @ w
        w -= np.linalg.solve((x * (weight * p * (1 - p))[:, None]).T @ x + ridge, gradient)
    return Calibration(*(round(float(v), 3) for v in w))


class Examined:
    """Pictures of one origin ("render", "vae", a damage, "drawn") as the judge sees them."""

    def __init__(self, scenes: Sequence[Scene], pictures: Sequence[np.ndarray], eye: Eye, shapes: ShapeJudge):
        self.scenes, self.pictures = scenes, pictures
        self.seen = [shapes.look(p, d) for p, d in zip(pictures, eye.look(pictures))]

    def objects(self) -> list[Found]:
        return [one for seen in self.seen for one in seen.objects]

    def measured(self, calibration: Calibration) -> dict:
        """Shares accepted of objects and of pictures (the mean of GenEval's six tasks), and quantiles."""
        objects = self.objects()
        soft = [calibration.soft(o.distance, o.outline) for o in objects]
        right: dict[str, list[bool]] = {}
        for scene, seen in zip(self.scenes, self.seen):
            right.setdefault(scene.task, []).append(judge(geneval.asked(scene), seen.judged_by(calibration)).right)
        return {
            "objects": len(objects),
            "accepted": round(float(np.mean([s >= 0.5 for s in soft])), 4),
            "six": round(float(np.mean([np.mean(right[task]) for task in GENEVAL])), 4),
            **{
                name: [round(float(v), 4) for v in np.quantile([getattr(o, name) for o in objects], QUANTILES)]
                for name in ("distance", "outline")
            },
        }


def examined(options: argparse.Namespace, size: Size, model: object, eye: Eye, shapes: ShapeJudge) -> dict[str, Examined]:
    """Everything of one size. Errors: those of drawing."""
    source = from_pipeline(options.model, options.steps)
    scenes = [s for t in TASKS for s in scenes_of(t, options.per_task, source.classes or CORE, side=size, first=FIRST_SEED)]
    renders = [World().render(scene) for scene in scenes]
    pictures = {"render": renders, "vae": source.reconstruct(renders)}
    for how in DAMAGES:
        pictures[how] = [
            damaged(p, backdrop(s.background, s.variant, *size), [t.box for t in s.things], how, 1.0, s.seed)
            for s, p in zip(scenes, renders)
        ]
    prompts = [scene.caption for scene in scenes]
    pictures["drawn"] = []
    for i in range(0, len(prompts), 20):
        pictures["drawn"] += source.draw(prompts[i : i + 20], range(i, i + 20), options.guidance, size)
    return {name: Examined(scenes, made, eye, shapes) for name, made in pictures.items()}
