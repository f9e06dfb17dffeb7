"""Which prompts of a set have something to teach: those whose pictures, drawn by the model as it is, are scored most unlike.

    python -m train rl --config mini --prompts all.jsonl --out runs/rl --hardest 150 --set GROUP=4
    python -m train rl --config mini --prompts runs/rl/hardest.jsonl --out runs/rl

A reward teaches by what differs within a group. Of a model that rarely errs most groups differ by chance alone, and a step's
few errors are drowned. GROUP pictures of every prompt are drawn at every base and judged, as a step of the training does
it; a prompt's deviation is the mean over bases of the scores' standard deviation. OUT/difficulty.jsonl tells it of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .data.prompts import Prompt
from .loop.clock import Clock, Interrupted
from .loop.log import Progress
from .rl_method import Judged, Nft, indices_of


@dataclass(frozen=True)
class Difficulty:
    """mean, deviation: of the scores of a prompt's pictures; NaN where fewer than two of a base could be judged."""

    prompt: Prompt
    mean: float
    deviation: float

    def row(self) -> dict[str, object]:
        """As a line of difficulty.jsonl: null for NaN."""
        known = np.isfinite(self.deviation)
        mean, deviation = (round(value, 5) if known else None for value in (self.mean, self.deviation))
        return {"id": self.prompt.id, "prompt": self.prompt.prompt, "mean": mean, "deviation": deviation}


def measured(method: Nft, clock: Clock) -> list[Difficulty]:
    """Of every prompt, in their order. Errors: Interrupted where the clock ends it."""
    recipe, prompts, group = method.recipe, method.prompts, method.group
    bases, found = len(recipe.BASES), []
    starts = range(0, len(prompts), recipe.GROUPS)
    with Progress("difficulty", 0, len(prompts), enabled=group.main) as progress:
        for chunk, start in enumerate(starts):
            own = prompts[start : start + recipe.GROUPS]
            asked = [own[i % len(own)] for i in range(recipe.GROUPS)]  # a step's shape, whatever is left
            scores = [_scores(method, chunk * bases + turn, asked) for turn in range(bases)]
            for place, prompt in enumerate(own):
                rows = [score[place] for score in scores]
                known = all(np.isfinite(row).sum() > 1 for row in rows)
                mean = float(np.nanmean(rows)) if known else float("nan")
                deviation = float(np.mean([np.nanstd(row) for row in rows])) if known else float("nan")
                found.append(Difficulty(prompt, mean, deviation))
            progress.show(len(found), None)
            if clock.over:
                raise Interrupted(f"--hardest: {len(found)} of {len(prompts)} prompts are measured, nothing is written")
    return found


def _scores(method: Nft, iteration: int, asked: Sequence[Prompt]) -> np.ndarray:
    """Of an iteration's pictures, NaN where a judgement failed: float64 [GROUPS, GROUP]."""
    recipe, group = method.recipe, method.group
    own: list[Judged] = []
    for slot in range(group.rank, recipe.SLOTS, group.world):
        assert len(indices_of(recipe, slot)) > 0, "rl.check divides pictures by SLOTS"
        own.append(method.judged(method.drawn(iteration, slot, asked)))
    scores = np.full(recipe.GROUPS * recipe.GROUP, np.nan)
    for judged in (one for part in group.gather(own) for one in part):
        scores[judged.indices] = np.where(judged.scores.valid, judged.scores.score, np.nan)
    return scores.reshape(recipe.GROUPS, recipe.GROUP)


def hardest(found: Sequence[Difficulty], count: int) -> list[Prompt]:
    """The `count` of the largest deviation, in the set's order; none that could not be judged. Errors: ValueError for too few."""
    known = [i for i, one in enumerate(found) if np.isfinite(one.deviation)]
    if len(known) < count:
        raise ValueError(f"--hardest {count}: {len(known)} prompts could be judged")
    kept = sorted(sorted(known, key=lambda i: -found[i].deviation)[:count])
    return [found[i].prompt for i in kept]
