"""Running averages of weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .ranks import local_shard


class Ema:
    """Running average of parameters: `average <- d average + (1 - d) value`, d = min(decay, (1 + n) / (10 + n)).

    Of sharded parameters each process averages its own shards. trained_only: parameters without a gradient have no average.
    """

    def __init__(self, module: torch.nn.Module, decay: float, trained_only: bool = False):
        self.decay, self.updates = decay, 0
        chosen = (pair for pair in module.named_parameters() if pair[1].requires_grad or not trained_only)
        self.average = {name: p.detach().clone() for name, p in chosen}
        self._pairs: tuple[torch.nn.Module, list[torch.Tensor], list[torch.Tensor]] | None = None

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        # kept, because walking a module's names costs a tenth of a small step
        if self._pairs is None or self._pairs[0] is not module:
            values = dict(module.named_parameters())
            names = list(self.average)
            pairs = [(local_shard(self.average[n]), local_shard(values[n].detach())) for n in names]
            pairs = [pair for pair in pairs if pair[0].numel()]
            self._pairs = (module, [a for a, _ in pairs], [v for _, v in pairs])
        torch._foreach_lerp_(self._pairs[1], self._pairs[2], 1 - d)

    @contextmanager
    def in_place_of(self, module: torch.nn.Module) -> Iterator[None]:
        """Inside, the parameters of the module have their averages; those without one stay."""
        pairs = [
            (local_shard(p.detach()), local_shard(self.average[n]))
            for n, p in module.named_parameters()
            if n in self.average
        ]
        live = [p.clone() for p, _ in pairs]
        for p, average in pairs:
            p.copy_(average)
        try:
            yield
        finally:
            for (p, _), value in zip(pairs, live):
                p.copy_(value)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.average[name])
