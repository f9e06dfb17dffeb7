"""What is watched while a student is distilled: numbers of its latents and pictures, and rules that end the training.

Never the distance to the teacher, seed by seed: it rises while quality rises. Numbers of pictures are held against true pictures
through the same decoder, those of diversity against the guided teacher:

    deviation        each channel's standard deviation of the latents over that of real ones, the mean over channels
    mean             the largest difference of a channel's mean from that of real latents
    cast             distance of the mean (a*, b*) in CIELAB from that of true pictures; 0: no cast
    saturation       mean HSV saturation over that of true pictures
    high_frequency   mean |Laplacian| of the grey picture over that of true pictures
    diversity        mean distance of the latents of one caption, over the teacher's
    backdrops        effective number of backdrops, exp of the entropy of the border's colours, over the teacher's
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..data.small_world.scene import Scene

BINS = 4  # of a border's colour, each channel: 64 kinds of backdrop
Score = Callable[..., float]


def latent_statistics(latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(mean, deviation) of every channel over all pictures and tokens, of [n, I, C] each: float64 [C]."""
    rows = torch.cat([x.double().flatten(0, 1) for x in latents])
    return rows.mean(0), rows.std(0)


def cast(pictures: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean a* and b* (CIE 1976, D65) of uint8 sRGB pictures [H, W, 3]."""
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    white, sums = matrix.sum(1), []
    for picture in pictures:
        s = picture.reshape(-1, 3) / 255.0
        linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
        xyz = linear @ matrix.T / white
        f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
        sums.append([500 * (f[:, 0] - f[:, 1]).mean(), 200 * (f[:, 1] - f[:, 2]).mean()])
    a, b = np.mean(sums, 0)
    return float(a), float(b)


def saturation(pictures: Sequence[np.ndarray]) -> float:
    """Mean of (max - min) / max of the three channels, 0 where all are zero."""
    values = []
    for picture in pictures:
        high, low = picture.max(-1).astype(float), picture.min(-1).astype(float)
        values.append(np.divide(high - low, high, out=np.zeros_like(high), where=high > 0).mean())
    return float(np.mean(values))


def high_frequency(pictures: Sequence[np.ndarray]) -> float:
    """Mean |4 g - its four neighbours| of the grey picture g (mean of the channels), in 0 .. 255, without the frame."""
    values = []
    for picture in pictures:
        g = picture.astype(float).mean(-1)
        inside = 4 * g[1:-1, 1:-1] - g[:-2, 1:-1] - g[2:, 1:-1] - g[1:-1, :-2] - g[1:-1, 2:]
        values.append(np.abs(inside).mean())
    return float(np.mean(values))


def diversity(groups: Sequence[Tensor]) -> float:
    """Mean root mean square distance of two pictures of one caption, of latents [n, I, C] of each caption, n >= 2."""
    found = []
    for group in groups:
        rows = group.double().flatten(1)
        n = len(rows)
        found.append(float(torch.cdist(rows, rows).sum()) / (n * (n - 1)) / math.sqrt(rows.shape[1]))
    return float(np.mean(found))


def effective_backdrops(pictures: Sequence[np.ndarray]) -> float:
    """exp of the entropy of the median border colours, cut into BINS^3 kinds: 1 where all have one, n where all differ."""
    kinds: dict[tuple[int, ...], int] = {}
    for picture in pictures:
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        kind = tuple(int(v) * BINS // 256 for v in np.median(border, 0))
        kinds[kind] = kinds.get(kind, 0) + 1
    shares = np.array(list(kinds.values())) / len(pictures)
    return float(np.exp(-(shares * np.log(shares)).sum()))


NUMBERS = (  # that a check has, of pictures and of the training; rules and bars name some of them
    "deviation", "mean", "cast", "a", "b", "saturation", "high_frequency", "backdrops", "diversity", "score", "unguided",
    "ca_over_dm", "fake_rise", "heads_accuracy", "near_eps", "drift",
)  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """What a network drew of the held-out captions: latents by batch, and their pictures; groups of one caption alike."""

    latents: Sequence[Tensor]
    pictures: Sequence[np.ndarray]
    groups: Sequence[Tensor]
    group_pictures: Sequence[np.ndarray]


def figures(drawn: Drawn, true: Drawn, teacher: Drawn) -> dict[str, float]:
    """The numbers above; true: real pictures through the decoder, without groups."""
    (mean, deviation), (own_mean, own_deviation) = (latent_statistics(d.latents) for d in (true, drawn))
    found = {"deviation": float((own_deviation / deviation).mean()), "mean": float((own_mean - mean).abs().max())}
    if drawn.pictures:
        (a, b), (true_a, true_b) = cast(drawn.pictures), cast(true.pictures)
        found |= {"cast": math.hypot(a - true_a, b - true_b), "a": a, "b": b}
        found["saturation"] = saturation(drawn.pictures) / saturation(true.pictures)
        found["high_frequency"] = high_frequency(drawn.pictures) / high_frequency(true.pictures)
        found["backdrops"] = effective_backdrops(drawn.group_pictures) / effective_backdrops(teacher.group_pictures)
    found["diversity"] = diversity(drawn.groups) / diversity(teacher.groups)
    return found


MARGIN = 0.1  # by which a number may pass what the teacher or the untrained student shows


def widened(
    ranges: Mapping[str, tuple[float, float]], references: Sequence[Mapping[str, float]]
) -> dict[str, tuple[float, float]]:
    """The ranges, each wide enough for what the references show, and MARGIN beyond it.

    A student starts as the teacher in few steps and is drawn to the guided teacher: where these two are outside of a range, being
    there is no sign of decay.
    """
    found = {}
    for name, (low, high) in ranges.items():
        shown = [own[name] for own in references if name in own]
        found[name] = (min([low, *(v * (1 - MARGIN) for v in shown)]), max([high, *(v * (1 + MARGIN) for v in shown)]))
    return found


def beyond(values: Mapping[str, float], bars: Mapping[str, tuple[float, float]]) -> float:
    """How far the numbers are outside of their ranges, each as a share of the bound that it passed; 0 where none is."""
    passed = 0.0
    for name, (low, high) in bars.items():
        if name in values:
            bound = low if values[name] < low else high
            passed += abs(values[name] - bound) / max(abs(bound), 1e-9) if not low <= values[name] <= high else 0.0
    return passed


@dataclass
class Rules:
    """name -> (low, high): a number outside of its range at `patience` checks in a row ends the training."""

    ranges: Mapping[str, tuple[float, float]]
    patience: int
    broken: dict[str, int] = field(default_factory=dict)  # name -> checks in a row

    def check(self, values: Mapping[str, float]) -> list[str]:
        """Count a check; what ends the training, in words. A number that is not finite is outside of every range."""
        ended = []
        for name, (low, high) in self.ranges.items():
            if name not in values:
                continue
            outside = not low <= values[name] <= high
            self.broken[name] = self.broken.get(name, 0) + 1 if outside else 0
            if self.broken[name] >= self.patience:
                ended.append(
                    f"{name} is {values[name]:.3g}, outside of {low:g} .. {high:g} at {self.broken[name]} checks in a row"
                )
        return ended


def score_of(text: str) -> Score | None:
    """ "module:function" -> the function; "" -> None. Errors: ValueError where there is none of that name."""
    if not text:
        return None
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"SCORE: {text!r}, expected module:function ({error})") from None


def detector_score(pictures: Sequence[np.ndarray], captions: Sequence[str], scenes: Sequence[Scene]) -> float:
    """Share of the small world's pictures that the detector calls right by GenEval's rule, plus a tenth of its mean
    confidence in what was asked for, which tells apart students that are right equally often."""
    from .detector import Detector
    from .geneval import asked, judge

    detector, right, sure = Detector.load(), [], []
    sizes = [p.shape for p in pictures]
    for size in dict.fromkeys(sizes):
        own = [i for i, s in enumerate(sizes) if s == size]
        for i, seen in zip(own, detector.look([pictures[i] for i in own])):
            wants = asked(scenes[i])
            right.append(judge(wants, seen).right)
            best = {d.kind: d.score for d in sorted(seen, key=lambda d: d.score)}
            sure += [best.get(want.kind, 0.0) for want in wants.include]
    return float(np.mean(right)) + 0.1 * float(np.mean(sure))
