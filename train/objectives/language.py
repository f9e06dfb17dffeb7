"""What the text encoder is trained for: the next token, and attributes that a linear reader finds in its features.

Features [R, F, E] are those of all tokens of a batch, one sample after another. Each layer is divided by its RMS and the
layers are concatenated, which is exactly what the MMDiT reads. Every reader is one linear map from there to the values
of one attribute. Questions: data/small_world/questions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..data.small_world.questions import SIZES, Ask, grouped


def readable(features: Tensor) -> Tensor:
    """[R, F, E] -> [R, F * E]: each layer divided by its RMS, as the MMDiT's text norms do."""
    return F.rms_norm(features, (features.shape[-1],), eps=1e-5).flatten(1)


class Readers(nn.Module):
    """One linear map per attribute; discarded after training."""

    def __init__(self, width: int):
        super().__init__()
        self.maps = nn.ModuleDict({name: nn.Linear(width, size) for name, size in SIZES.items()})

    def forward(self, features: Tensor, asked: Sequence[Ask]) -> tuple[Tensor, dict[str, Tensor]]:
        """features [R, F, E], questions whose tokens are rows -> sum over attributes of mean cross-entropy; accuracies."""
        losses, right = [], {}
        for name, pairs in grouped(asked).items():
            rows, values = torch.tensor(pairs, device=features.device).unbind(1)
            logits = self.maps[name](readable(features.index_select(0, rows)))
            losses.append(F.cross_entropy(logits, values))
            right[name] = (logits.detach().argmax(-1) == values).float().mean()
        return torch.stack(losses).sum(), right


@dataclass(frozen=True)
class TextBatch:
    """Captions first, then chats "wish -> answer": ids of each, where its written part begins, and the questions.

    The next token is learned from `begins` on: all of a caption, only the assistant's turn of a chat. Question tokens are
    rows of the packed features of all samples.
    """

    ids: list[list[int]]
    begins: list[int]
    asked: list[Ask]


def next_token(model: Any, last: Tensor, batch: TextBatch) -> Tensor:
    """Mean cross-entropy of each token that follows a written one, from the last layer's rows [R, E] of all samples."""
    rows: list[int] = []
    targets: list[int] = []
    at = 0
    for ids, begin in zip(batch.ids, batch.begins):
        rows += range(at + begin, at + len(ids) - 1)
        targets += ids[begin + 1 :]
        at += len(ids)
    picked = last.index_select(0, torch.tensor(rows, device=last.device))
    return F.cross_entropy(model.lm_head(model.model.norm(picked)).float(), torch.tensor(targets, device=last.device))
