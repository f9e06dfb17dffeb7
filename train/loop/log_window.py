"""A row of the log: the steps since the row before, added up over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .method import About, Losses
from .ranks import Ranks

BINS = 10  # of the time t in [0, 1]
HEAD = (
    "weight",
    "samples",
    "image_tokens",
    "text_tokens",
    "skipped_members",
    "flops",
    "broken",
    "stop",
    "failed",
    "lost",
)


class StepSums:
    """What the micro-batches of a step add up to, on this rank and then over all: float64 vectors by name.

    The names are the same on every rank, since every rank asks the same method about the same step.
    """

    def __init__(self, kinds: Sequence[str], device: torch.device):
        self.kinds, self.device, self.of = kinds, device, {"kinds": torch.zeros(2 * len(kinds), dtype=torch.float64)}
        self.of["kinds"] = self.of["kinds"].to(device)
        self.head = dict.fromkeys(HEAD, 0.0)

    def _row(self, name: str, length: int) -> Tensor:
        if name not in self.of:
            self.of[name] = torch.zeros(length, dtype=torch.float64, device=self.device)
        return self.of[name]

    def add(self, losses: dict[str, Losses], about: About) -> None:
        """A micro-batch: its losses by network, by tenth of their time and by kind, its terms, its counts."""
        for name in ("weight", "samples", "image_tokens", "text_tokens", "flops"):
            self.head[name] += getattr(about, name)
        self.head["skipped_members"] += len(about.damaged)
        for place, (name, own) in enumerate(losses.items()):
            values = own.values.detach().double()
            row = self._row(f"loss {name}", 1 + 2 * BINS)
            row[0] += values.mean() * about.weight
            if own.times is not None:
                bins = (own.times.double() * BINS).long().clamp(0, BINS - 1)
                row[1 : 1 + BINS].index_add_(0, bins, values)
                row[1 + BINS :].index_add_(0, bins, torch.ones_like(values))
            if place == 0 and about.kind is not None:
                kind = self.kinds.index(about.kind)
                self.of["kinds"][kind] += values.sum()
                self.of["kinds"][kind + len(self.kinds)] += len(values)
            for term, value in own.terms.items():
                self._row(f"term {term}", 2).add_(
                    torch.stack([value.detach().double() * about.weight, value.new_tensor(about.weight).double()])
                )

    def over_all(self, group: Ranks) -> dict[str, float]:
        """Sum over the ranks; returns the head."""
        head = torch.tensor([self.head[name] for name in HEAD], dtype=torch.float64).to(self.device)
        names = list(self.of)
        flat = group.sum(torch.cat([head, *(self.of[name] for name in names)]))
        head, *rows = flat.split([len(HEAD), *(len(self.of[name]) for name in names)])
        self.of = dict(zip(names, rows))
        return dict(zip(HEAD, head.tolist()))


class LogWindow:
    """Steps since the last row of the log, added up. What was not finite counts as taken time and nothing else."""

    def __init__(self, kinds: Sequence[str], peak: float | None, group: Ranks):
        self.kinds, self.peak, self.group = kinds, peak, group
        self.steps: list[dict[str, Any]] = []
        self.sums: dict[str, Tensor] = {}

    def add(self, found: dict[str, Any], sums: StepSums) -> None:
        self.steps.append(found)
        if not found["broken"]:
            for name, row in sums.of.items():
                self.sums[name] = self.sums[name] + row if name in self.sums else row

    def row(self, main: str, skipped_steps: int) -> dict[str, float]:
        """The numbers of the log. Every rank calls it: the longest wait and the most memory of all ranks are told.

        main: the network whose numbers have no name beside them.
        """
        # over all ranks: the longest wait, the most memory
        good = [s for s in self.steps if not s["broken"]]
        total = {name: sum(s[name] for s in self.steps) for name in (*HEAD, "seconds", "waited")}
        memory = torch.cuda.max_memory_allocated(self.group.device) if self.group.device.type == "cuda" else 0
        mine = torch.tensor([total["waited"], total["seconds"], memory], dtype=torch.float64, device=self.group.device)
        waited, seconds, memory = self.group.highest(mine).tolist()
        durations = sorted(s["seconds"] for s in self.steps)
        # means over the steps that changed something
        row: dict[str, float] = {}
        for name in dict.fromkeys(
            key for s in good for key in s if key.split("/")[0] in ("loss", "grad_norm", "clipped")
        ):
            values = [s[name] for s in good if name in s]
            row[name] = sum(values) / len(values)
            if name.startswith("grad_norm"):
                row[name.replace("grad_norm", "grad_norm_max")] = max(values)
        if good:
            row["lr"] = good[-1]["lr"]
        # speed
        row |= {
            "step_s": seconds / len(self.steps),
            "step_s_p50": durations[len(durations) // 2],
            "step_s_p95": durations[int(len(durations) * 0.95)],
            "samples_per_s": total["samples"] / seconds,
            "data_wait": waited / seconds,
            "skipped_steps": skipped_steps,
            "skipped_members": total["skipped_members"],
        }
        if tokens := total["image_tokens"] + total["text_tokens"]:
            row["tokens_per_s"] = tokens / seconds
        if memory:
            row["memory_gb"] = memory / 1e9
        if self.peak and total["flops"]:
            row["mfu"] = total["flops"] / (seconds * self.peak * self.group.world)
        # terms, losses by tenths of t, losses by kind
        for name, values in ((name, row.tolist()) for name, row in self.sums.items()):
            kind, _, own = name.partition(" ")
            if kind == "term":
                row[own] = values[0] / values[1]
            elif kind == "loss":
                beside = "" if own == main else f"/{own}"
                for index in range(BINS):
                    if count := values[1 + BINS + index]:
                        row[f"loss_at_t{beside}/{index / BINS:.1f}"] = values[1 + index] / count
            else:
                for index, label in enumerate(self.kinds):
                    if count := values[index + len(self.kinds)]:
                        row[f"loss_of/{label}"], row[f"samples_of/{label}"] = values[index] / count, count
        return row
