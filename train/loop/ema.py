"""Running averages of weights."""

from __future__ import annotations

import torch

from .ranks import local


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
            pairs = [(local(self.average[n]), local(values[n].detach())) for n in names]
            pairs = [pair for pair in pairs if pair[0].numel()]
            self._pairs = (module, [a for a, _ in pairs], [v for _, v in pairs])
        torch._foreach_lerp_(self._pairs[1], self._pairs[2], 1 - d)

    def state(self) -> dict:
        return {"decay": self.decay, "updates": self.updates, "average": self.average}

    def load(self, state: dict) -> None:
        if state["average"].keys() != self.average.keys():
            raise ValueError("Ema.load: parameter names differ from this module's")
        self.updates = state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.average[name])


class Averaged:
    """`with Averaged(ema, model):` runs a block on the averaged weights."""

    def __init__(self, ema: Ema, model: torch.nn.Module):
        self.ema, self.model = ema, model

    def __enter__(self) -> None:
        self.live = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.ema.copy_to(self.model)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, p in self.model.named_parameters():
            p.copy_(self.live[name])
