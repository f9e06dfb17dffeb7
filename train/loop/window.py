"""A row of the log: the steps since the row before, added up over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..data.buckets import Bucket
from .ranks import Ranks

if TYPE_CHECKING:
    from .trainer import Trainer

BINS = 10  # of the time t in [0, 1]
HEAD = (
    "weight",
    "weighted",
    "pictures",
    "image_tokens",
    "text_tokens",
    "skipped_members",
    "flops",
    "broken",
    "stop",
    "failed",
    "lost",
)


class Window:
    """Steps since the last row of the log, added up."""

    def __init__(self, buckets: tuple[Bucket, ...], peak: float | None, group: Ranks):
        self.buckets, self.peak, self.group, self.steps, self.sums = buckets, peak, group, [], 0

    def add(self, found: dict[str, Any]) -> None:
        self.steps.append(found)
        self.sums = self.sums + found["sums"]

    def row(self, trainer: Trainer) -> dict[str, float]:
        """The numbers of the log. Every rank calls it: the longest wait and the most memory of all ranks are told."""
        good = [s for s in self.steps if not s["broken"]]
        total = {name: sum(s[name] for s in self.steps) for name in (*HEAD, "seconds", "waited")}
        memory = torch.cuda.max_memory_allocated(self.group.device) if self.group.device.type == "cuda" else 0
        mine = torch.tensor([total["waited"], total["seconds"], memory], dtype=torch.float64, device=self.group.device)
        waited, seconds, memory = self.group.highest(mine).tolist()
        durations = sorted(s["seconds"] for s in self.steps)
        row = {name: sum(s[name] for s in good) / len(good) for name in ("loss", "grad_norm", "clipped") if good}
        if good:
            row |= {"grad_norm_max": max(s["grad_norm"] for s in good), "lr": good[-1]["lr"]}
        row |= {
            "step_s": seconds / len(self.steps),
            "step_s_p50": durations[len(durations) // 2],
            "step_s_p95": durations[int(len(durations) * 0.95)],
            "pictures_per_s": total["pictures"] / seconds,
            "tokens_per_s": (total["image_tokens"] + total["text_tokens"]) / seconds,
            "data_wait": waited / seconds,
            "skipped_steps": trainer.skipped,
            "skipped_members": total["skipped_members"],
        }
        if memory:
            row["memory_gb"] = memory / 1e9
        if self.peak and total["flops"]:
            row["mfu"] = total["flops"] / (seconds * self.peak * self.group.world)
        sums = self.sums[len(HEAD) :].tolist()
        for index in range(BINS):
            if count := sums[BINS + index]:
                row[f"loss_at_t/{index / BINS:.1f}"] = sums[index] / count
        kinds = len(self.buckets)
        for index, bucket in enumerate(self.buckets):
            if count := sums[2 * BINS + kinds + index]:
                row[f"loss_of/{bucket.name}"] = sums[2 * BINS + index] / count
                row[f"pictures_of/{bucket.name}"] = count
        return row
