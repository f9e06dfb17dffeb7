"""AdamW with beta1 = 0 without the first moment, which is the gradient then: a third of the optimiser's and weights' memory less."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .ranks import local_shard


class LeanAdamW(torch.optim.Optimizer):
    """v <- b v + (1 - b) g^2;  p <- (1 - lr wd) p - lr g / (sqrt(v / (1 - b^n)) + eps), n the steps so far.

    The bits of torch.optim.AdamW(betas=(0, b), foreach=False) on a CPU (test). Its state, `exp_avg_sq` and `step`, is there
    from the start, so that a saved one has where to go. Sharded parameters are stepped shard by shard.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], lr: float, beta2: float, decay: float = 0.0, eps: float = 1e-8
    ):
        if not 0 <= beta2 < 1:
            raise ValueError(f"LeanAdamW: beta2 must be in [0, 1), got {beta2}")
        groups = [{"params": [p for p in parameters.values() if (p.dim() > 1) is matrix]} for matrix in (True, False)]
        super().__init__(
            [g for g in groups if g["params"]], {"lr": lr, "beta2": beta2, "weight_decay": decay, "eps": eps}
        )
        for p in parameters.values():
            step = torch.zeros((), dtype=torch.float32, device=local_shard(p.detach()).device)
            self.state[p] = {"step": step, "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient. Errors: ValueError for a closure."""
        if closure is not None:
            raise ValueError("LeanAdamW: a step takes no closure")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(local_shard(p.detach()), local_shard(p.grad), self.state[p], group)

    def _step(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        state["step"] += 1
        second, beta2 = local_shard(state["exp_avg_sq"]), group["beta2"]
        p.mul_(1 - group["lr"] * group["weight_decay"])
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction = (1 - beta2 ** state["step"].item()) ** 0.5
        p.addcdiv_(gradient, (second.sqrt() / correction).add_(group["eps"]), value=-group["lr"])

    def near_eps(self) -> float:
        """The share of numbers whose sqrt(v) is below ten eps: there a step is no longer the gradient's sign and size alone."""
        small = total = 0
        for group in self.param_groups:
            for p in group["params"]:
                second = local_shard(self.state[p]["exp_avg_sq"])
                small += int((second.sqrt() < 10 * group["eps"]).sum())
                total += second.numel()
        return small / max(1, total)
