"""How good the judge is: true renders must be judged right, and wrong prompts wrong.

A question is a scene, its picture and what is asked of it. Each scene gives one true question, which asks for every class,
every colour and the scene's relation, and up to four false ones that differ from it in one thing:

    class      one object is asked as another class that is nowhere in the picture
    colour     one coloured object is asked in another colour
    count      one more or one fewer of the same is asked
    relation   the two objects of a relation have changed places
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..data.small_world.kinds import KINDS, PALETTE
from ..data.small_world.scene import Scene
from ..data.small_world.world import World
from . import geneval, ocr
from .detector import SIGN, Detector, overlap
from .geneval import Asked, Detection, Want
from .judges import Judges

ORACLE_SEED = 2_100_000_000
BUCKETS = ((64, 64), (128, 128), (64, 128))
FALSE = ("class", "colour", "count", "relation")


def strictly_asked(scene: Scene) -> Asked:
    """Everything the scene shows: classes, palette colours, count, relation. Same things are asked once with their count."""
    plain = geneval.asked(scene)
    if scene.task == "counting":
        want = plain.include[0]
        colours = {t.colour for t in scene.things}
        colour = colours.pop() if len(colours) == 1 else None
        return Asked((replace(want, colour=colour if colour in PALETTE else None),), plain.exclude)
    paint: dict[str, str | None] = {t.kind: t.colour for t in scene.things}
    if scene.sign is not None:
        plain = Asked((*plain.include, Want(SIGN)))
        paint[SIGN] = None
    wants = [replace(w, colour=paint[w.kind] if paint[w.kind] in PALETTE else None) for w in plain.include]
    return Asked(tuple(wants), plain.exclude)


def falsely_asked(scene: Scene, how: str) -> Asked | None:
    """The true question with one thing changed, None where the scene has nothing to change. Keyed by the scene's seed."""
    rng, true = random.Random(f"{how} {scene.seed} {scene.task}"), strictly_asked(scene)
    wants, exclude = list(true.include), true.exclude
    if how == "class":
        there = {t.kind for t in scene.things}
        if not there:
            return None
        pick = rng.randrange(len(there))  # the sign, if any, comes last
        other = rng.choice([k for k in KINDS if k not in there])
        exclude = tuple((other if k == wants[pick].kind else k, n) for k, n in exclude)
        colour = wants[pick].colour if KINDS[other].paint is not None else None
        wants[pick] = replace(wants[pick], kind=other, colour=colour)
    elif how == "colour":
        painted = [i for i, w in enumerate(wants) if w.colour is not None]
        if not painted:
            return None
        pick = rng.choice(painted)
        wants[pick] = replace(wants[pick], colour=rng.choice([c for c in PALETTE if c != wants[pick].colour]))
    elif how == "count":
        if scene.task != "counting":
            return None
        count = wants[0].count + (rng.choice((-1, 1)) if wants[0].count > 1 else 1)
        wants, exclude = [replace(wants[0], count=count)], ((wants[0].kind, count + 1),)
    elif how == "relation":
        if not any(w.relation for w in wants):
            return None
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        wants = [
            w if w.relation is None else replace(w, relation=(opposite[w.relation[0]], w.relation[1])) for w in wants
        ]
    else:
        raise ValueError(f"falsely_asked: {how!r}, expected one of {FALSE}")
    return Asked(tuple(wants), exclude)


@dataclass
class Questions:
    """Scenes of one bucket and their pictures."""

    scenes: list[Scene]
    pictures: list[np.ndarray]

    @classmethod
    def draw(
        cls, count: int, seed: int, height: int = 64, width: int = 64, classes: Sequence[str] | None = None
    ) -> Questions:
        """Half of each split, every task; seeds from `seed` on."""
        worlds = [World(split, classes=classes, captions="geneval") for split in ("train", "held_out")]
        scenes = [worlds[i % 2].scene(seed + i, height, width) for i in range(count)]
        return cls(scenes, [worlds[0].render(scene) for scene in scenes])


def measure(detector: Detector, questions: Questions) -> dict:
    """Shares judged as they should be, overall and per class, and which classes are taken for which."""
    seen = detector.look(questions.pictures)
    right: Counter[str] = Counter()
    of: Counter[str] = Counter()
    per_class: dict[str, Counter] = {}
    confused: Counter = Counter()
    for scene, detections in zip(questions.scenes, seen):
        verdict = geneval.judge(strictly_asked(scene), detections)
        of["true"] += 1
        right["true"] += verdict.right
        for how in FALSE:
            asked = falsely_asked(scene, how)
            if asked is not None:
                of[how] += 1
                right[how] += not geneval.judge(asked, detections).right
        for thing in scene.things:
            row = per_class.setdefault(thing.kind, Counter())
            at = seen_at(thing.box, detections)
            row["asked"] += 1
            row["class"] += at is not None and at.kind == thing.kind
            row["colour"] += at is not None and (thing.colour not in PALETTE or at.colour == thing.colour)
            if at is None or at.kind != thing.kind:
                confused[thing.kind, at.kind if at else "nothing"] += 1
    shares = {name: right[name] / of[name] for name in ("true", *FALSE) if of[name]}
    things = sum(row["asked"] for row in per_class.values())
    for part in ("class", "colour"):
        shares[f"thing_{part}"] = sum(row[part] for row in per_class.values()) / things
    return {"shares": shares, "of": dict(of), "per_class": per_class, "confused": confused}


def seen_at(box: Sequence[float], detections: Sequence[Detection]) -> Detection | None:
    """The most confident detection above FOUND that overlaps a true box by more than half."""
    there = [d for d in detections if d.score > geneval.FOUND and overlap(box, d.box) > 0.5]
    return max(there, key=lambda d: d.score) if there else None


def position_agreement(count: int) -> tuple[int, int]:
    """The relation rule on true boxes of position scenes: (agreeing, of)."""
    world, agree = World("train", tasks={"position": 1.0}, captions="geneval"), 0
    for i in range(count):
        scene = world.scene(ORACLE_SEED + i)
        boxes = [Detection(t.kind, 1.0, t.box, t.colour) for t in scene.things]
        agree += geneval.judge(geneval.asked(scene), boxes).right
    return agree, count


def signs(detector: Detector, count: int, sides: Sequence[int] = (64, 96, 128)) -> dict[str, dict[str, float]]:
    """Shares of signs in true renders whose words are read exactly (but for blanks and case), per side of the picture."""
    judges, world, out = Judges(detector, (), ocr.Reader()), World("train", {"text": 1.0}, captions="geneval"), {}
    for side in sides:
        scenes = [world.scene(ORACLE_SEED + i, side, side) for i in range(count)]
        pictures = [world.render(scene) for scene in scenes]
        texts = [judges.read(p, d) for p, d in zip(pictures, detector.look(pictures))]
        written = [scene.sign.text for scene in scenes if scene.sign is not None]
        right = [ocr.same_text(sign, text) for sign, text in zip(written, texts, strict=True)]
        misread = [f"{sign} as {text or 'nothing'}" for sign, text, r in zip(written, texts, right) if not r]
        print(
            f"signs at {side} pixels: {sum(right)}/{count} read; misread: {', '.join(misread[:8]) or 'none'}",
            flush=True,
        )
        out[str(side)] = {"signs": count, "exact": round(sum(right) / count, 4)}
    return out


def report(detector: Detector, count: int, buckets: Sequence[tuple[int, int]] = BUCKETS) -> dict:
    """Measure and print every bucket; what goes into the file beside the judge."""
    out: dict = {}
    for height, width in buckets:
        questions = Questions.draw(count, ORACLE_SEED, height, width)
        start = time.perf_counter()
        found = measure(detector, questions)
        spent = time.perf_counter() - start
        print(
            f"{height}x{width}, {count} scenes, {count / spent:.0f} per second: "
            + ", ".join(f"{k} {v:.4f}" for k, v in found["shares"].items())
        )
        weak = sorted(((r["class"] / r["asked"], k) for k, r in found["per_class"].items()))[:8]
        print("  weakest classes: " + ", ".join(f"{kind} {share:.2f}" for share, kind in weak if share < 1))
        print(
            "  taken for: " + ", ".join(f"{a} -> {b} ({n})" for (a, b), n in found["confused"].most_common(12)),
            flush=True,
        )
        out[f"{height}x{width}"] = {
            "scenes": count,
            "shares": {k: round(v, 4) for k, v in found["shares"].items()},
            "weakest": {kind: round(share, 3) for share, kind in weak if share < 1},
            "confused": [f"{a} -> {b} ({n})" for (a, b), n in found["confused"].most_common(12)],
        }
    if ocr.available():
        out["signs"] = signs(detector, max(1, count // 8))
    else:
        print(f"signs: {ocr.REMEDY}")
    agree, of = position_agreement(count)
    print(f"relation rule on true boxes: {agree}/{of}", flush=True)
    out["relation_rule"] = {"agree": agree, "of": of}
    return out
