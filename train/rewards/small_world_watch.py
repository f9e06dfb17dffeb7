"""What watches a training on the small world: how varied its pictures are, and judges that are never in the reward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.small_world.scene import Scene
from ..evaluate import geneval, shape, template
from ..evaluate.detector import Detector
from . import diversity
from .small_world import SmallWorldJudge
from .small_world_rubrics import parse


class SmallWorldWatch:
    """scenes: of the held-out prompts, whose captions they are. judge: where it is the local one, which has seen them already."""

    def __init__(
        self, detector: Detector, classes: Sequence[str], scenes: Sequence[Scene], judge: SmallWorldJudge | None = None
    ):
        self.judge = judge
        self.detector, self.classes, self.scenes = detector, tuple(classes), scenes
        self.shapes = shape.ShapeJudge(classes)

    def kind(self, rubric: str) -> str:
        """The check of a sentence of this world, "other" for any other sentence."""
        try:
            return parse(rubric).check
        except ValueError:
            return "other"

    def look(self, picture: np.ndarray) -> diversity.Look:
        return diversity.look_at(self.detector, picture) if self.judge is None else self.judge.look(picture)

    def independent(self, pictures: Sequence[np.ndarray], places: Sequence[int]) -> list[dict[str, float]]:
        """Per picture: `template`, 1 where the template judge, which no reward reads, finds all that is asked for and nothing
        else; `geneval`, 1 where GenEval's hard rule holds; `distance` to the nearest true render."""
        out = []
        for picture, place in zip(pictures, places):
            scene = self.scenes[place]
            (seen,) = self.detector.look([picture])
            asked = geneval.asked(scene)
            verdict = shape.judge(asked, self.shapes.look(picture, seen, sign=scene.sign is not None))
            row = {"geneval": float(geneval.judge(asked, seen).right)}
            row["template"] = float(template.judge(picture, scene, self.classes).whole)
            row["distance"] = 1.0 if verdict.distance is None else verdict.distance
            out.append(row)
        return out
