"""The one contract of every judge: a batch of (prompt, rubrics, image) becomes scores, each valid or not, with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Scores:
    """What a judge says of n images with at most r rubrics each.

    score float32 [n] in [0, 1], NaN where invalid; valid bool [n], False where the judgement failed: such an image is left out of
    every mean, never counted as 0; per_rubric float32 [n, r] in [0, 1], NaN where an image has fewer rubrics or was not judged;
    reasons: per image a list of strings, for people. Errors: ValueError naming the field where these do not hold.
    """

    score: np.ndarray
    valid: np.ndarray
    per_rubric: np.ndarray
    reasons: list[list[str]]

    def __post_init__(self) -> None:
        n = len(self.reasons)
        for name, dtype, dims in (("score", np.float32, 1), ("valid", np.bool_, 1), ("per_rubric", np.float32, 2)):
            value = getattr(self, name)
            if value.dtype != dtype or value.ndim != dims or len(value) != n:
                raise ValueError(
                    f"Scores.{name}: {value.dtype} {value.shape}, expected {np.dtype(dtype)} of {dims} axes, the first {n}"
                )
        if not np.array_equal(np.isfinite(self.score), self.valid):
            raise ValueError("Scores.score: expected a finite score exactly where valid is True")
        for name in ("score", "per_rubric"):
            value = getattr(self, name)
            if ((value < 0) | (value > 1)).any():
                raise ValueError(
                    f"Scores.{name}: expected values in [0, 1], got {np.nanmin(value)} .. {np.nanmax(value)}"
                )


class Judge(Protocol):
    """Images uint8 [H, W, 3], of any sizes; row i of the answer is about prompts[i], rubrics[i], images[i]."""

    def score(
        self, prompts: Sequence[str], rubrics: Sequence[Sequence[str]], images: Sequence[np.ndarray]
    ) -> Scores: ...
