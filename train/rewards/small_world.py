"""The small world's local judge: rubrics answered by the detector, the shape judge, arithmetic on pixels and a reader of signs.

Every answer is soft, in [0, 1]; the score is their mean over the prompt's rubrics. No server, no language model.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.small_world.backdrops import MIN_CONTRAST, contrast
from ..data.small_world.sprites import lab
from ..evaluate import geneval, ocr
from ..evaluate.detector import SIGN, Detector, overlap
from ..evaluate.geneval import Detection
from ..evaluate.shape import Calibration, ShapeJudge, ShapesSeen
from . import diversity
from .judge import Scores
from .small_world_rubrics import Rubric, parse

SAME = 0.45  # intersection over union from which two boxes are one object
TORN = 0.5  # the distance to the nearest true render from which an object counts as wholly torn
LARGE = 0.24  # of the frame's shorter side: an object this long is seen at a glance

LOOKS = 256  # pictures whose look is kept from their judgement

FILLED = 0.2  # a silhouette covers at least this share of its box: a crescent moon's


@dataclass(frozen=True)
class Evidence:
    """What is seen in a picture: detections, most confident first, and true renders fitted to them."""

    picture: np.ndarray
    detections: Sequence[Detection]
    seen: ShapesSeen
    read: Callable[[Sequence[Detection]], str] | None

    def best(self, kind: str, count: int = 1) -> list[Detection | None]:
        """The `count` most confident boxes of a class, None for each that is missing."""
        own = [d for d in self.detections if d.kind == kind]
        return [*own[:count], *[None] * (count - len(own))]

    def fits(self, kind: str, number: int) -> list[float]:
        """Distances of the nearest `number` fitted objects of a class, infinite for each that is missing."""
        own = sorted(o.distance for o in self.seen.objects if o.kind == kind)[:number]
        return own + [np.inf] * (number - len(own))

    def softs(self, kind: str, number: int) -> list[float]:
        own = sorted((o.soft for o in self.seen.objects if o.kind == kind), reverse=True)[:number]
        return own + [0.0] * (number - len(own))


def _mean_of(boxes: Sequence[Detection | None], value: Callable[[Detection], float]) -> float:
    """Mean of a value weighted by how surely each object is there; a missing one counts 0."""
    return float(np.mean([0.0 if d is None else d.score * value(d) for d in boxes]))


def _inside(box: geneval.Box, height: int, width: int) -> float:
    x0, y0, x1, y1 = box
    area = max(x1 - x0, 1e-6) * max(y1 - y0, 1e-6)
    return max(0.0, min(x1, width) - max(x0, 0)) * max(0.0, min(y1, height) - max(y0, 0)) / area


def _contrast(picture: np.ndarray, box: geneval.Box) -> float:
    """How far the FILLED most distant pixels in a box are from the colour around it, against what the world asks for."""
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = box
    rim = 0.15 * max(x1 - x0, y1 - y0)

    def mask(left: float, top: float, right: float, bottom: float) -> np.ndarray:
        found = np.zeros((height, width), bool)
        found[max(0, round(top)) : max(0, round(bottom)), max(0, round(left)) : max(0, round(right))] = True
        return found

    inner = mask(x0 + rim, y0 + rim, x1 - rim, y1 - rim)
    outer = mask(x0 - rim, y0 - rim, x1 + rim, y1 + rim) & ~mask(x0, y0, x1, y1)
    if not inner.any() or not outer.any():
        return 0.0
    behind = lab(np.median(picture[outer].astype(np.float64), 0))
    apart = contrast(lab(picture[inner].astype(np.float64)), behind)
    return min(1.0, float(np.quantile(apart, 1 - FILLED)) / MIN_CONTRAST)


def _related(evidence: Evidence, one: str, two: str, relation: str) -> float:
    (a,), (b,) = evidence.best(one), evidence.best(two)
    if a is None or b is None:
        return 0.0
    return min(a.score, b.score) if relation in geneval.relations(a.box, b.box) else 0.0


def _alone(evidence: Evidence, kinds: Sequence[str]) -> float:
    """1 less the surest object of another class, by the detector or by the shape judge; boxes that lie on an asked one are it."""
    asked = [d for d in evidence.detections if d.kind in kinds and d.score > geneval.FOUND]
    others = [
        d.score
        for d in evidence.detections
        if d.kind not in kinds and not any(overlap(d.box, a.box) > SAME for a in asked)
    ]
    fitted = [o.soft for o in evidence.seen.objects if o.kind not in kinds]
    return 1 - max([0.0, *others, *fitted])


def _class_margin(evidence: Evidence, box: Detection) -> float:
    rivals = [d.score for d in evidence.detections if d.kind != box.kind and overlap(d.box, box.box) > SAME]
    return box.score / (box.score + max([0.0, *rivals]))


def answer(rubric: Rubric, evidence: Evidence, counts: dict[str, int]) -> float:
    """[0, 1]; NaN where no reader is installed for a sign. counts: how many of each class the prompt's rubrics ask for."""
    height, width = evidence.picture.shape[:2]
    if rubric.check == "text":
        if evidence.read is None:
            return float("nan")
        read = evidence.read(evidence.detections)
        return difflib.SequenceMatcher(None, ocr.squeezed(rubric.value), ocr.squeezed(read), autojunk=False).ratio()
    if rubric.check == "alone":
        return _alone(evidence, rubric.kinds)
    known = evidence.seen.backdrop is not None
    if rubric.check == "backdrop":
        return float(known)
    if rubric.check == "global":
        shapes = [soft for kind, count in counts.items() if kind != SIGN for soft in evidence.softs(kind, count)]
        shapes += [o.soft for o in evidence.seen.objects if o.kind not in counts]
        return (0.5 + 0.5 * known) * float(np.mean(shapes)) if shapes else 0.0
    if rubric.check == "relation":
        one, two = rubric.kinds
        return _related(evidence, one, two, rubric.value)
    (kind,) = rubric.kinds
    count = counts.get(kind, 1)
    boxes = evidence.best(kind, count)
    if rubric.check == "shown":
        return _mean_of(boxes[:1], lambda d: 1.0)
    if rubric.check == "count":
        more = evidence.best(kind, rubric.count + 1)[-1]
        return _mean_of(evidence.best(kind, rubric.count), lambda d: 1.0) * (1 - (more.score if more else 0.0))
    if rubric.check == "colour":
        return _mean_of(boxes, lambda d: d.colours.get(rubric.value, 0.0))
    if rubric.check == "shape":
        return float(np.mean(evidence.softs(kind, count)))
    if rubric.check == "whole":
        return float(np.mean([1 - min(1.0, d / TORN) for d in evidence.fits(kind, count)]))
    if rubric.check == "class":
        return _mean_of(boxes, lambda d: _class_margin(evidence, d))
    if rubric.check == "inside":
        return _mean_of(boxes, lambda d: _inside(d.box, height, width))
    if rubric.check == "size":
        longer = LARGE * min(height, width)
        return _mean_of(boxes, lambda d: min(1.0, max(d.box[2] - d.box[0], d.box[3] - d.box[1]) / longer))
    assert rubric.check == "contrast", rubric
    return _mean_of(boxes, lambda d: _contrast(evidence.picture, d.box))


def _digest(picture: np.ndarray) -> bytes:
    return hashlib.blake2b(picture.tobytes(), digest_size=16).digest()


class SmallWorldJudge:
    """`Judge` by local networks and arithmetic. classes: what may be seen; reader: None leaves signs unread and says so.

    Every image is judged by itself: neighbours change no bit, so that slots may be cut in any way. True renders are fitted of
    the classes that are asked for and of those that the detector sees, which takes a third of the time of fitting all.
    """

    def __init__(self, detector: Detector, classes: Sequence[str], reader: ocr.Reader | None = None):
        if missing := set(classes) - set(detector.kinds):
            raise ValueError(f"SmallWorldJudge: the detector does not know {sorted(missing)}")
        self.detector, self.classes, self.reader = detector, tuple(classes), reader
        self.calibration = Calibration.load()
        self._looks: OrderedDict[bytes, diversity.Look] = OrderedDict()  # of the pictures judged last

    def evidence(self, picture: np.ndarray, asked: Collection[str] = ()) -> Evidence:
        """What is seen in uint8 [H, W, 3]; asked: classes, a sign among them where one is asked for."""
        (detections,) = self.detector.look([picture])
        named = {d.kind for d in detections if d.score > geneval.FOUND} | set(asked)
        fitted = [kind for kind in self.classes if kind in named] or self.classes
        seen = ShapeJudge(fitted, self.calibration).look(picture, detections, SIGN in asked)
        self._looks[_digest(picture)] = diversity.look_of(picture, detections, seen.backdrop)
        while len(self._looks) > LOOKS:
            self._looks.popitem(last=False)
        return Evidence(picture, detections, seen, self._reader_of(picture) if self.reader is not None else None)

    def look(self, picture: np.ndarray) -> diversity.Look:
        """What tells a picture apart from others: as it was seen when it was judged, or seen now."""
        known = self._looks.get(_digest(picture))
        return diversity.look_at(self.detector, picture) if known is None else known

    def _reader_of(self, picture: np.ndarray) -> Callable[[Sequence[Detection]], str]:
        reader = self.reader
        assert reader is not None, "asked for with a reader alone"

        def read(detections: Sequence[Detection]) -> str:
            signs = [d for d in detections if d.kind == SIGN and d.score > geneval.FOUND]
            return reader.read(picture, signs[0].box) if signs else ""

        return read

    def score(self, prompts: Sequence[str], rubrics: Sequence[Sequence[str]], images: Sequence[np.ndarray]) -> Scores:
        """Errors: ValueError for a sentence that is no rubric of the world, or for lists of other lengths."""
        if not len(prompts) == len(rubrics) == len(images):
            raise ValueError(
                f"score: {len(prompts)} prompts, {len(rubrics)} rubrics, {len(images)} images, expected as many"
            )
        table = np.full((len(images), max(map(len, rubrics), default=0)), np.nan, np.float32)
        reasons: list[list[str]] = []
        for row, (own, picture) in enumerate(zip(rubrics, images)):
            parsed = [parse(text) for text in own]
            counts = {kind: 1 for rubric in parsed if rubric.check == "shown" for kind in rubric.kinds}
            counts |= {rubric.kinds[0]: rubric.count for rubric in parsed if rubric.check == "count"}
            evidence = self.evidence(picture, counts)
            values = [answer(rubric, evidence, counts) for rubric in parsed]
            table[row, : len(values)] = np.clip(values, 0, 1)
            low = [f"{value:.2f}: {text}" for value, text in zip(values, own) if value < 0.5]
            reasons.append(low + [f"not read: {text}" for value, text in zip(values, own) if np.isnan(value)])
        with np.errstate(invalid="ignore"):
            known = np.isfinite(table).sum(1)
            score = np.nansum(table, 1) / np.where(known > 0, known, np.nan)
        return Scores(score.astype(np.float32), known > 0, table, reasons)
