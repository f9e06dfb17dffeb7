"""The judges of Mini-Bench together: what one task's pictures score, with intervals and counts per class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.small_world.kinds import PALETTE
from ..data.small_world.scene import Scene
from . import geneval, ocr, shape, template
from .detector import SIGN, Detector
from .geneval import Detection

WIDER, LOWER = 0.06, 0.08  # a sign's box is read this much wider (it may cut a letter) and lower (its rim is no letter)


def wilson(right: int, of: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, p = 1.96, right / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return max(0.0, (middle - half) / (1 + z * z / of)), min(1.0, (middle + half) / (1 + z * z / of))


class Judges:
    """The detector, template, shape and reader together; `reader` None where the extra is missing."""

    def __init__(self, detector: Detector, classes: Sequence[str], reader: ocr.Reader | None, audit: bool = True):
        if missing := set(classes) - set(detector.kinds):
            raise ValueError(
                f"Judges: Lens-Eye does not know {sorted(missing)}; train it anew (python -m train detector)"
            )
        self.detector, self.classes, self.reader, self.audit = detector, tuple(classes), reader, audit
        self.shapes = shape.ShapeJudge(classes)

    def read(self, picture: np.ndarray, seen: Sequence[Detection]) -> str:
        """The words on the sign that the detector sees most surely, or anywhere where it sees none."""
        assert self.reader is not None, "without a reader nothing is read"
        signs = [d for d in seen if d.kind == SIGN and d.score > geneval.FOUND]
        if not signs:
            return self.reader.read(picture)
        x0, y0, x1, y1 = max(signs, key=lambda d: d.score).box
        dx, dy = WIDER * (x1 - x0), LOWER * (y1 - y0)
        return self.reader.read(picture, (x0 - dx, y0 + dy, x1 + dx, y1 - dy))

    def score(self, task: str, scenes: Sequence[Scene], pictures: Sequence[np.ndarray]) -> dict:
        """One row of the benchmark: shares, intervals, counts per class, `marks`, per picture whether it is right, and `marks_of`,
        the same by judge."""
        # the detector under GenEval's rule, and the shape judge
        seen = self.detector.look(pictures)
        verdicts = [geneval.judge(geneval.asked(s), d) for s, d in zip(scenes, seen)]
        said = [geneval.judge(geneval.asked(s, said=True), d) for s, d in zip(scenes, seen)]
        shapes = [
            shape.judge(geneval.asked(s), self.shapes.look(p, d, sign=s.sign is not None))
            for s, p, d in zip(scenes, pictures, seen)
        ]
        right, all_said = [v.right for v in verdicts], [v.right for v in said]
        row: dict[str, Any] = {}
        shapely = [v.right for v in shapes]
        # signs count only where their words are read as well
        if task == "text":
            row["objects"] = _share(right)
            if self.reader is None:
                right = shapely = []
            else:
                signs = [s.sign.text if s.sign is not None else "" for s in scenes]
                pairs = [(text, self.read(p, d)) for text, p, d in zip(signs, pictures, seen)]
                exact = [ocr.same_text(*pair) for pair in pairs]
                row |= {"exact": _share(exact), "oneig": ocr.text_score(pairs)}
                right = [a and b for a, b in zip(right, exact)]
                all_said = [a and b for a, b in zip(all_said, exact)]
                shapely = [a and b for a, b in zip(shapely, exact)]
        if right:
            low, high = wilson(sum(right), len(right))
            row |= {"score": _share(right), "low": low, "high": high, "said": _share(all_said)}
        else:
            row["not_measured"] = ocr.REMEDY
        # the audit by templates, and votes on colours
        audited = [
            template.judge(p, s, self.classes).whole for p, s in zip(pictures, scenes) if s.things and self.audit
        ]
        votes = [vote for s, p, d in zip(scenes, pictures, seen) for vote in _votes(s, p, d)]
        row |= {
            "audit": _share(audited),
            "shape": _share(shapely),
            "soft": _mean([v.soft for v in shapes]),
            "distance": _mean([v.distance for v in shapes if v.distance is not None]),
            "class": _share([found for v in said for found in v.found]),
            "colour": _share([c for v in said for c in v.coloured if c is not None]),
            "vote": _share(votes),
            "pictures": len(scenes),
            "per_class": _per_class(scenes, said),
            "marks": right or [v.right for v in verdicts],
            "marks_of": {"score": right, "audit": audited, "shape": shapely},
        }
        if task == "counting":
            row["numbers"] = _by_number(scenes, right, shapely)
        return row


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _by_number(scenes: Sequence[Scene], right: Sequence[bool], shapely: Sequence[bool]) -> dict[str, dict[str, int]]:
    """Number asked for -> pictures, and how many of them the detector's and the shape judge's rule call right."""
    out: dict[str, dict[str, int]] = {}
    for number in sorted({len(scene.things) for scene in scenes}):
        own = [i for i, scene in enumerate(scenes) if len(scene.things) == number]
        out[str(number)] = {
            "pictures": len(own),
            "score": sum(right[i] for i in own),
            "shape": sum(shapely[i] for i in own),
        }
    return out


def _votes(scene: Scene, picture: np.ndarray, seen: Sequence[Detection]) -> list[bool]:
    """For every coloured object asked for and found: does arithmetic on its pixels give the asked colour?"""
    out = []
    for want in geneval.asked(scene).include if scene.task in geneval.COLOUR_TASKS else ():
        boxes = [d for d in seen if d.kind == want.kind and d.score > geneval.FOUND]
        if boxes and want.colour in PALETTE:
            best = max(boxes, key=lambda d: d.score)
            out.append(geneval.voted_colour(picture, best.box, PALETTE) == want.colour)
    return out


def _per_class(scenes: Sequence[Scene], verdicts: Sequence[geneval.GenevalVerdict]) -> dict[str, dict[str, int]]:
    """Class -> how often it was asked for, found (in full number), and of the colour that was said, where one was."""
    table: dict[str, dict[str, int]] = {}
    for scene, verdict in zip(scenes, verdicts):
        wants = geneval.asked(scene, said=True).include
        for want, found, coloured in zip(wants, verdict.found, verdict.coloured):
            entry = table.setdefault(want.kind, {"asked": 0, "found": 0, "colours": 0, "coloured": 0})
            entry["asked"] += 1
            entry["found"] += found
            entry["colours"] += coloured is not None
            entry["coloured"] += bool(coloured)
    return table


def merged(tables: Sequence[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = {}
    for table in tables:
        for kind, entry in table.items():
            sums = out.setdefault(kind, dict.fromkeys(entry, 0))
            for name, value in entry.items():
                sums[name] += value
    return {kind: out[kind] for kind in sorted(out, key=lambda k: (out[k]["found"] / out[k]["asked"], k))}
