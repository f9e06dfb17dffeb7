"""GenEval: 553 prompts of six tasks, four images each, judged by a detector and CLIP. Score: the mean of six shares of images.

    python -m train evaluate geneval --model mini --dry-run
    python -m train evaluate geneval --model DIR --device cuda                       # again to resume
    python -m train evaluate geneval --images DIR                                    # 00000/samples/0000.png ...
    python -m train evaluate geneval --model DIR --language en zh fr ja es
    python -m train evaluate geneval --model DIR --reasoner http://127.0.0.1:8000/v1 --reasoner-model qwen3-32b

Source: djghosh13/geneval, commit af4902f. A box counts above a confidence of 0.3, for counting above 0.9, compared in float32; the
16 best boxes of a class are kept, none is removed for overlapping; of equally confident ones the later box goes first. Of each
object asked for the `count` most confident boxes are taken: too few are wrong, each must have the colour that CLIP sees in its
box (grey outside of its mask), and each must lie as asked from each box of the object before. Counting means exactly n.

Besides the published total, "any of 4" is the share of prompts with at least one right image, and "presence, soft" the mean over
prompts of what the detector's confidences say of the objects asked for, whatever the thresholds (`presence`). Intervals are over prompts.
Before anything is judged the detector must see what is in three shipped photographs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...loop.checkpoints import write_text
from .. import geneval as rule
from ..geneval import Asked, Detection, Want
from . import command
from .drawing import Ask, Calls, read_image
from .geneval_languages import LANGUAGES, prompt
from .geneval_prompts import TASKS, Entry, entries
from .judging import Column, Figure, Progress, averaged, bootstrapped, commonest, mean, share
from .models import CLIP, DETECTOR, Clip, ColourClassifier, Found, Mask2Former, ObjectDetector, crop_of

COUNTING = 0.9  # confidence from above which a box counts where objects are counted
IMAGES, SEED = 4, 42  # of a prompt, and the seed of its first; the others follow
SHOWN = Path(__file__).parents[1] / "assets" / "judge_test"  # cat.webp shows a cat


def above(tag: str) -> float:
    """The threshold of a task as the float32 that scores are compared with."""
    return float(np.float32(COUNTING if tag == "counting" else rule.FOUND))


def asked(entry: Entry) -> Asked:
    """A line of the prompts' file in the rule's own terms."""
    wants = [
        Want(w["class"], w["count"], w.get("color"), tuple(w["position"]) if "position" in w else None)
        for w in entry["include"]
    ]
    return Asked(tuple(wants), tuple((e["class"], e["count"]) for e in entry.get("exclude", ())))


def best_first(found: Sequence[Found], kind: str, threshold: float) -> list[int]:
    """Indices of the boxes of a class that count, as the rule orders them: by score, of equal ones the later first."""
    own = [k for k, f in enumerate(found) if f.kind == kind and np.float32(f.score) > threshold]
    return sorted(own, key=lambda k: (-np.float32(found[k].score), -k))[: rule.BEST]


def judged(entry: Entry, image: np.ndarray, found: Sequence[Found], painter: ColourClassifier) -> rule.GenevalVerdict:
    """One image against its entry. CLIP is asked only about the boxes whose colour matters."""
    threshold, colours = above(entry["tag"]), dict[int, str]()
    for want in entry["include"]:
        taken = best_first(found, want["class"], threshold)[: want["count"]]
        if "color" in want and len(taken) == want["count"]:
            said = painter.colours([crop_of(image, found[k]) for k in taken], want["class"])
            colours |= dict(zip(taken, said, strict=True))
    seen = [Detection(f.kind, float(np.float32(f.score)), f.box, colours.get(k)) for k, f in enumerate(found)]
    return rule.judge(asked(entry), seen, threshold)


def presence(entry: Entry, found: Sequence[Found]) -> float:
    """The soft form of "enough of each, and not too many": of each object asked for the confidence of its class's count-th surest
    box (0 where there are fewer), times 1 - that of the first box too many; the mean over objects. Colour and place are not in it.
    """

    def surest(kind: str, number: int) -> float:
        own = sorted((f.score for f in found if f.kind == kind), reverse=True)
        return own[number - 1] if len(own) >= number else 0.0

    total = 0.0
    for want in entry["include"]:
        too_many = [surest(e["class"], e["count"]) for e in entry.get("exclude", ()) if e["class"] == want["class"]]
        total += surest(want["class"], want["count"]) * (1 - max(too_many, default=0.0))
    return total / len(entry["include"])


def expect_sight(detector: ObjectDetector) -> None:
    """Errors: ValueError where the detector does not see what the shipped photographs show, or sees something in plain grey."""
    for path in sorted(SHOWN.glob("*.webp")):
        image = read_image(path)
        assert image is not None, path
        seen = sorted(detector.detect(image), key=lambda f: -f.score)
        if path.stem not in {f.kind for f in seen if f.score > rule.FOUND}:
            told = ", ".join(f"{f.kind} {f.score:.2f}" for f in seen[:3]) or "nothing"
            raise ValueError(
                f"{detector.card}: sees {told} in {path.name}, which shows a {path.stem}: not fit to judge"
            )
    blank = [f for f in detector.detect(np.full((256, 256, 3), 127, np.uint8)) if f.score > COUNTING]
    if blank:
        raise ValueError(
            f"{detector.card}: sees a {blank[0].kind} ({blank[0].score:.2f}) in plain grey: not fit to judge"
        )


def summarised(column: Column, verdicts: dict[str, list[list[float]]]) -> None:
    """Figures from right (1) and wrong (0) of each image: task -> prompts -> images."""
    for task in TASKS:
        if task in verdicts:
            column.figures[task] = share(verdicts[task])
    if set(verdicts) == set(TASKS):
        column.figures["total"] = averaged([column.figures[task] for task in TASKS])
    groups = [group for own in verdicts.values() for group in own if group]
    column.figures["all images"] = share(groups)
    column.figures["any of 4"] = share([[max(group)] for group in groups])
    if "total" not in column.figures:
        column.figures["total"] = Figure(None, note="not all six tasks")


class Geneval:
    name = "geneval"

    def __init__(self, detector: ObjectDetector | None = None, painter: ColourClassifier | None = None):
        """In place of those that the options name (tests)."""
        self.detector, self.painter = detector, painter

    def asks(self, options: argparse.Namespace, language: str) -> list[Ask]:
        seeds = tuple(range(SEED, SEED + IMAGES))
        out = []
        for k, entry in enumerate(entries()):
            files = tuple(f"{k:05d}/samples/{n:04d}.png" for n in range(IMAGES))
            out.append(Ask(f"{k:05d}", entry["tag"], entry["prompt"], prompt(entry, language), files, seeds))
        return out

    def prepare(self, options: argparse.Namespace) -> None:
        if self.detector is None:
            self.detector = Mask2Former(options.detector, options.device)
            expect_sight(self.detector)
        self.painter = self.painter or Clip(options.clip, options.device)

    def arrange(self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path) -> None:
        for ask in asks:
            write_text(folder / ask.id / "metadata.jsonl", json.dumps(entries()[int(ask.id)]) + "\n")

    def calls(self, options: argparse.Namespace, asks: Sequence[Ask], language: str) -> list[Calls]:
        coloured = sum(
            len(ask.files) * (ask.task == "colors") + 2 * len(ask.files) * (ask.task == "color_attr") for ask in asks
        )
        return [Calls("detector", sum(len(ask.files) for ask in asks)), Calls("CLIP, at most", coloured)]

    def score(self, options: argparse.Namespace, asks: Sequence[Ask], folder: Path, name: str, language: str) -> Column:
        self.prepare(options)
        assert self.detector is not None, "prepared"
        assert self.painter is not None, "prepared"
        column = Column(name, [self.detector.card, self.painter.card], language=language)
        verdicts: dict[str, list[list[float]]] = {}
        soft: list[float] = []  # of each prompt
        files = files_of(folder, asks)
        count, progress = column.count("images", sum(map(len, files.values()))), Progress("geneval", len(asks))
        for ask in asks:
            if not count.goes_on():
                break
            entry, right, sure, images = entries()[int(ask.id)], list[float](), list[float](), list[dict[str, Any]]()
            expect_entry(folder / ask.id / "metadata.jsonl", entry)
            for file in files[ask.id]:
                count.judged += 1
                row: dict[str, Any] = {"file": file}
                try:
                    image = read_image(folder / file)
                    if image is None:
                        raise ValueError("no such image")
                    found = self.detector.detect(image)
                    verdict = judged(entry, image, found, self.painter)
                    right.append(float(verdict.right))
                    sure.append(presence(entry, found))
                    row |= {"right": verdict.right, "reasons": list(verdict.reasons), "presence": sure[-1]}
                except Exception as error:  # whatever a judge dies of, the judgement is missing, not wrong
                    count.missing += 1
                    row |= {"right": None, "reasons": [f"not judged: {error}"]}
                images.append(row)
            progress()
            verdicts.setdefault(ask.task, []).append(right)
            soft += [sum(sure) / len(sure)] if sure else []
            known = sum(right) / len(right) if right else None
            column.rows.append(
                {
                    "id": ask.id,
                    "task": ask.task,
                    "prompt": ask.prompt,
                    "drawn": ask.drawn,
                    "score": known,
                    "images": images,
                }
            )
        summarised(column, verdicts)
        column.figures["presence, soft"] = bootstrapped(soft, mean)
        return column

    def shown(self, options: argparse.Namespace, ask: Ask, folder: Path) -> np.ndarray | None:
        return command.first_image(ask, folder)


def files_of(folder: Path, asks: Sequence[Ask]) -> dict[str, list[str]]:
    """Id -> the images of a prompt: all that are there, in whatever number; those that should be, where there are fewer, and
    of a prompt without any as many as most of the others have."""
    found = {}
    for ask in asks:
        there = sorted(p.name for p in (folder / ask.id / "samples").glob("*.png") if p.stem.isdigit())
        found[ask.id] = [f"{ask.id}/samples/{name}" for name in there]
    most = commonest(map(len, found.values()), IMAGES)
    for ask in asks:
        if not found[ask.id]:
            found[ask.id] = [f"{ask.id}/samples/{n:04d}.png" for n in range(max(most, len(ask.files)))]
        elif len(found[ask.id]) < len(ask.files):
            found[ask.id] = list(dict.fromkeys([*found[ask.id], *ask.files]))
    return found


def expect_entry(path: Path, entry: Entry) -> None:
    """Errors: ValueError where a folder says that it is of another prompt."""
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != entry:
        raise ValueError(f"{path}: of another prompt than {entry['prompt']!r}: not GenEval's own order?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_arguments(parser, LANGUAGES)
    parser.add_argument(
        "--detector", default=DETECTOR, metavar="SOURCE", help=f"hub id or folder (default: {DETECTOR})"
    )
    parser.add_argument("--clip", default=CLIP, metavar="SOURCE", help=f"hub id or folder (default: {CLIP})")


def run(options: argparse.Namespace) -> int:
    return command.run(Geneval(), options)
