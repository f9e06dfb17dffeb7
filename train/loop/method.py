"""What a training stage is to the loop: the networks that learn, who learns when, and from which losses.

A stage writes a `Method`; `train.loop.trainer.Trainer` does the rest, which is the same for all of them: steps, clipping,
averages, states, resuming, the log, sheets, what to do where a number is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .ema import Ema
from .ranks import bare, local_shard


def learning_rate(step: int, base: float, warmup: int, steps: int, decay: int, cosine: bool = False) -> float:
    """Of a step: linear warm-up, constant, then linear, or as half a cosine, to zero over the last `decay` of `steps`."""
    up = min(1.0, (step + 1) / max(1, warmup))
    down = min(1.0, max(0.0, (steps - step) / max(1, decay)))
    return base * min(up, (1 - math.cos(math.pi * down)) / 2 if cosine else down)


def adamw(
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    decay: float = 0.0,
    eps: float = 1e-8,
    vectors_decay: bool = False,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """AdamW, decaying matrices alone unless told otherwise. Its state is there from the start, so that a saved one has where
    to go."""
    if vectors_decay:
        groups = [{"params": list(parameters.values()), "weight_decay": decay}]
    else:
        groups = [
            {"params": [p for p in parameters.values() if (p.dim() > 1) is matrix], "weight_decay": own}
            for matrix, own in ((True, decay), (False, 0.0))
        ]
    groups = [g for g in groups if g["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
    for p in parameters.values():
        moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=local_shard(p.detach()).device),
            **moments,
        }
    return optimizer


class Network:
    """A module that learns, as it is called (as `ranks.wrap` gave it), its optimiser, and its running average or None.

    The learning rate of a group of the optimiser is its base rate here times the plan's schedule. What of the module asks for no
    gradient when the training begins never learns. Without an optimiser the network is frozen, and part of the states all
    the same; one that should not be, a teacher read from its own folder, is no affair of the loop.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer | None, ema: Ema | None = None):
        self.module, self.optimizer, self.ema = module, optimizer, ema
        self.groups = optimizer.param_groups if optimizer is not None else []
        trained = {p for group in self.groups for p in group["params"]}
        self.parameters = {n: p for n, p in bare(module).named_parameters() if p in trained}
        self.base_rates = [group["lr"] for group in self.groups]

    def step(self) -> None:
        """One step of the optimiser, and of the average."""
        if self.optimizer is None:
            raise ValueError("a frozen network was given a turn")
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(bare(self.module))

    def tensors(self) -> dict[str, Tensor]:
        """Everything of it that a state holds: weights and buffers, averages, moments (in the optimiser's order)."""
        whole = bare(self.module)
        kept = whole.state_dict().keys()
        found = {f"model.{name}": p.detach() for name, p in whole.named_parameters()}
        found |= {f"model.{name}": value for name, value in whole.named_buffers() if name in kept}
        if self.ema is not None:
            found |= {f"ema.{name}": value for name, value in self.ema.average.items()}
        names = {p: name for name, p in self.parameters.items()}
        held = self.optimizer.state if self.optimizer is not None else {}
        for p in (p for group in self.groups for p in group["params"]):
            found |= {f"optimizer.{key}.{names[p]}": value for key, value in held[p].items()}
        return found


@dataclass(frozen=True)
class Losses:
    """What a network shall make small on a micro-batch: the mean of `values`, plus `beside`.

    values: [B], one of every sample, or [1] where a batch has but one; it is the log's `loss`.
    beside: a number of the whole batch that is added and not logged, unless it is among the terms.
    times: [B] in [0, 1], where a sample has a time: the log then has the loss by tenths of it.
    terms: numbers of the batch for the log.
    """

    values: Tensor
    beside: Tensor | None = None
    times: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class About:
    """What a method knows of a micro-batch without computing anything.

    weight: of its mean loss in the step's: sum_s w_s mean_s / sum_s w_s. kind: one of the method's `kinds`, by which the log
    sorts losses. place: the (step, slot) it was made for, which is checked. seen: what it is made of, as JSON, written down
    where the step is not finite.
    """

    samples: int
    weight: float = 1.0
    kind: str | None = None
    place: tuple[int, int] | None = None
    image_tokens: int = 0
    text_tokens: int = 0
    damaged: Sequence[tuple[str, str]] = ()  # members that were asked for and could not be used: key, reason
    flops: float = 0.0
    seen: Mapping[str, Any] = field(default_factory=dict)


class Method:
    """Base of all methods. `networks` in their order: the log calls the first one's loss `loss`, another's `loss/NAME`.

    Networks that learn in the same step go backward together, from the sum of all losses: what must not teach another
    network is detached by the method. A network without losses of its own learns from the first one's, and is clipped
    together with it; one with losses of its own is clipped by itself.
    """

    networks: dict[str, Network]
    kinds: tuple[str, ...] = ()

    def turn(self, step: int) -> tuple[str, ...]:
        """Who learns at this step. The others ask for no gradient in it, and nothing of them changes."""
        return tuple(name for name, network in self.networks.items() if network.optimizer is not None)

    def rate(self, name: str, step: int) -> float:
        """Factor of a network's learning rate at this step, beside the plan's schedule."""
        return 1.0

    def losses(self, batch: Any, step: int) -> dict[str, Losses]:
        """name -> losses, of some or all of those whose turn it is. Every method has its own."""
        raise TypeError(f"{type(self).__name__} does not say its losses")

    def after(self, step: int) -> None:
        """What a step that was taken brings beside: averages of another kind, say."""

    def about(self, batch: Any) -> About:
        """What is known of a micro-batch before it is computed. Every method has its own."""
        raise TypeError(f"{type(self).__name__} does not say what it knows of a batch")

    def state(self) -> dict[str, Any]:
        """What a resume needs and no tensor of a network holds: plain values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up `state()` out of a whole state, whose `step` is there, too; the networks are loaded by then."""

    def validate(self, step: int) -> dict[str, float]:
        """Figures of what is never trained on. The networks have their averaged weights meanwhile."""
        return {}

    def draw(self, folder: Path, step: int) -> dict[str, Path]:
        """Draw sheets into files: name -> file. The networks have their averaged weights meanwhile."""
        return {}


@dataclass(frozen=True)
class Plan:
    """The numbers of a training that its loop reads.

    slots: micro-batches of a step, whoever computes them. clip: of the gradient's norm; None: no clip. clip_of: another clip
    of networks with losses of their own, by name. skip_limit: steps in a row that are not finite, before the training gives
    up. damaged_limit: the share of the members asked for that may be of no use. every 0: never; validation and saves also
    come at the end.
    """

    stage: str
    steps: int
    warmup: int = 1
    decay: int = 0
    cosine: bool = False  # the decay is half a cosine, not a line
    clip: float | None = 1.0
    clip_of: Mapping[str, float] = field(default_factory=dict)
    slots: int = 1
    skip_limit: int = 10
    damaged_limit: float = 1.0
    log_every: int = 100
    validate_every: int = 0
    validate_first: bool = False  # also before the first step: what it starts from
    save_every: int = 0
