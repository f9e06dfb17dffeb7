"""A classifier two-sample judge: how well can pictures of two kinds be told apart (Lopez-Paz and Oquab, arXiv 1610.06545)?

    features   responses of FILTERS random patches of other true pictures, whitened (Coates and Ng, 2011), at the picture's scale, a
               half and a quarter of it: means over the picture of relu(z - 1), relu(-z - 1) and z^2
    judge      ridge regression of kind on standardised features, its strength chosen within the training folds
    AUC        of the scores of pictures that the judge was not fitted to, FOLDS folds: 1/2 where they cannot be told apart

Two models are compared by their AUC against the same true pictures; the interval of the difference is a bootstrap over
pictures, picture i of either model and of the truth staying together. Patches, folds and bootstrap follow from seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..loop.keys import keyed

FILTERS, PATCH, SCALES = 128, 6, (1, 2, 4)
PATCHES = 20_000  # that the whitening is estimated from, of each scale
FOLDS, RESAMPLED = 5, 500
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)  # times the number of pictures
MOST = 0.02  # by which a student's AUC may be above its teacher's


def _scaled(pictures: Sequence[np.ndarray], scale: int) -> Tensor:
    """uint8 [H, W, 3] of one size -> float32 [n, 3, H / scale, W / scale] in [-1, 1]."""
    x = torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.avg_pool2d(x, scale) if scale > 1 else x


class Patches:
    """Filters found in true pictures, none of those that are compared, in which a filter would find itself again; called
    with pictures of their size, features float32 [n, 3 FILTERS len(SCALES)]."""

    def __init__(self, true: Sequence[np.ndarray], seed: int = 0):
        self.banks: list[tuple[Tensor, Tensor]] = []  # of each scale: filters [FILTERS, 3, PATCH, PATCH], offsets
        for scale in SCALES:
            generator, x = keyed(seed, "patches", scale), _scaled(true[:1_000], scale)
            rows, columns = x.shape[2] - PATCH + 1, x.shape[3] - PATCH + 1
            if min(rows, columns) < 1:
                raise ValueError(f"Patches: {x.shape[2]}x{x.shape[3]} at 1/{scale}, expected at least {PATCH} a side")
            which, top, left = (
                torch.randint(most, (PATCHES,), generator=generator).tolist() for most in (len(x), rows, columns)
            )
            found = torch.stack(
                [x[i, :, r : r + PATCH, c : c + PATCH].flatten() for i, r, c in zip(which, top, left)]
            ).double()
            mean = found.mean(0)
            values, vectors = torch.linalg.eigh((found - mean).T @ (found - mean) / len(found))
            white = vectors @ torch.diag((values + 1e-3 * values.mean()).rsqrt()) @ vectors.T
            chosen = (found[:FILTERS] - mean) @ white
            chosen = chosen / chosen.norm(dim=1, keepdim=True).clamp_min(1e-9)
            filters = chosen @ white
            bank = filters.view(FILTERS, 3, PATCH, PATCH).float(), (-filters @ mean).float()
            self.banks.append(bank)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        parts = []
        for start in range(0, len(pictures), 32):
            own = []
            for scale, (filters, offset) in zip(SCALES, self.banks):
                z = F.conv2d(_scaled(pictures[start : start + 32], scale), filters, offset, stride=max(1, 4 // scale))
                own += [(z - 1).relu().mean((2, 3)), (-z - 1).relu().mean((2, 3)), z.square().mean((2, 3))]
            parts.append(torch.cat(own, 1))
        return torch.cat(parts)


def auc(true: Tensor, drawn: Tensor) -> float:
    """The chance that a drawn picture's score is above a true one's, half a tie each."""
    values, ranks = torch.cat([true, drawn]).double().unique(return_inverse=True)
    counts = torch.bincount(ranks, minlength=len(values)).double()
    middle = counts.cumsum(0) - (counts - 1) / 2  # of the ranks, from 1, that a value has
    above = middle[ranks[len(true) :]].sum() - len(drawn) * (len(drawn) + 1) / 2
    return float(above / (len(true) * len(drawn)))


def _fitted(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """(X'X + ridge n)^-1 X'y, by whichever of X'X and XX' is smaller."""
    few = len(x) < x.shape[1]
    gram = x @ x.T if few else x.T @ x
    gram.diagonal().add_(ridge * len(x))
    y = y - y.mean()
    return x.T @ torch.linalg.solve(gram, y) if few else torch.linalg.solve(gram, x.T @ y)


def scores(true: Tensor, drawn: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features [n, D] of both kinds -> the score of every picture by the judge of the other folds, higher: drawn.

    Picture i of both kinds is in one fold. Errors: ValueError where the kinds differ in number, or are fewer than two a fold.
    """
    count = len(true)
    if len(drawn) != count or count < 2 * FOLDS:
        raise ValueError(
            f"two_sample.scores: {count} true and {len(drawn)} drawn, expected as many, {2 * FOLDS} or more"
        )
    x = torch.stack([true, drawn]).double()
    fold = torch.randperm(count, generator=keyed(seed, "folds")) % FOLDS
    kind = torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None]
    found = torch.zeros(2, count, dtype=torch.float64)
    for index in range(FOLDS):
        inner, held = (fold != index) & (fold != (index + 1) % FOLDS), fold == (index + 1) % FOLDS
        best, most = RIDGES[0], -1.0
        for ridge in RIDGES:
            part = x[:, inner].flatten(0, 1)
            mean, deviation = part.mean(0), part.std(0) + 1e-6
            weight = _fitted((part - mean) / deviation, kind.expand(2, int(inner.sum())).flatten(), ridge)
            seen = ((x[:, held] - mean) / deviation) @ weight
            if (value := auc(seen[0], seen[1])) > most:
                best, most = ridge, value
        rest, own = fold != index, fold == index
        part = x[:, rest].flatten(0, 1)
        mean, deviation = part.mean(0), part.std(0) + 1e-6
        weight = _fitted((part - mean) / deviation, kind.expand(2, int(rest.sum())).flatten(), best)
        found[:, own] = ((x[:, own] - mean) / deviation) @ weight
    return found[0], found[1]


@dataclass(frozen=True)
class Compared:
    """AUC of teacher and of student against the truth; the difference's 95 % interval."""

    teacher: float
    student: float
    low: float
    high: float

    @property
    def passes(self) -> bool:
        """False where the student is told better than the teacher: by more than MOST, and surely."""
        return not (self.student - self.teacher > MOST and self.low > 0)


def compared(true: Tensor, teacher: Tensor, student: Tensor, seed: int = 0) -> Compared:
    """Features [n, D] of the same scenes: true, by the teacher, by the student."""
    told = [scores(true, drawn, seed) for drawn in (teacher, student)]
    values = [auc(*pair) for pair in told]
    generator, differences = keyed(seed, "bootstrap"), []
    for _ in range(RESAMPLED):
        rows = torch.randint(len(true), (len(true),), generator=generator)
        one, other = (auc(a[rows], b[rows]) for a, b in told)
        differences.append(other - one)
    low, high = np.quantile(differences, (0.025, 0.975))
    return Compared(values[0], values[1], float(low), float(high))
