"""Stand-ins for the judges of published benchmarks: what they see is written in the image's first pixel, or said outright."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from train.evaluate.published.judging import Card
from train.evaluate.published.models import Found

CARD = Card("stand-in", "1", "float32", "cpu")


@dataclass
class Sees:
    """`found(image)` -> detections; card may differ."""

    found: Callable[[np.ndarray], list[Found]]
    card: Card = CARD
    calls: int = 0

    def detect(self, image: np.ndarray) -> list[Found]:
        self.calls += 1
        return self.found(image)


@dataclass
class Paints:
    """Every crop is of the colour that is nearest to its mean, by the strongest channel."""

    card: Card = CARD
    asked: list[tuple[str, int]] = field(default_factory=list)

    def colours(self, crops: Sequence, kind: str) -> list[str]:
        self.asked.append((kind, len(crops)))
        return [("red", "green", "blue")[int(np.asarray(crop).reshape(-1, 3).mean(0).argmax())] for crop in crops]


def options(**given: object) -> argparse.Namespace:
    """What the command line would give, with defaults."""
    values: dict = dict(
        model=None, images=None, out=None, name=None, steps=None, guidance=None, size=None, device="cpu", limit=None, language=["en"],
        dry_run=False, gpu="h100", gpu_price=None, judge_prices=None, reasoner="none", reasoner_model=None, reasoner_prompt=None,
    )  # fmt: skip
    return argparse.Namespace(**{**values, **given})
