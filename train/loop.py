"""What every stage's loop shares: keyed randomness, schedules, averaged weights, a clock that stops in time."""

from __future__ import annotations

import errno
import hashlib
import re
import signal
import time

import torch
from torch.distributed.tensor import DTensor

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Halted(RuntimeError):
    """What ends a training and is neither a mistake nor a bug: lost shards, a full disk, a killed process. One line says it."""


def keyed(
    seed: int, purpose: str, step: int = 0, sample: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator, on the CPU unless told otherwise, that depends on (seed, purpose, step, sample) alone."""
    digest = hashlib.sha256(f"{seed} {purpose} {step} {sample}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def device_of(name: str) -> torch.device:
    """ "cpu" or "cuda" -> the device; float32 products there are float32 ones (TF32 off). Errors: ValueError."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device: {name!r}, expected 'cpu' or 'cuda'")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: 'cuda' was asked for, but torch finds no usable GPU; expected 'cpu' here")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def duration(text: str) -> float:
    """ "90s", "9m", "1.5h" or plain seconds -> seconds. Errors: ValueError naming the text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise ValueError(f"duration: {text!r}, expected for example 90s, 9m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def positive(text: str) -> int:
    """A whole number of 1 or more. Errors: ValueError naming the text."""
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def rate(step: int, base: float, warmup: int, steps: int, decay: int) -> float:
    """Learning rate of a step: linear warm-up, constant, then linear to zero over the last `decay` of `steps`."""
    up = min(1.0, (step + 1) / max(1, warmup))
    down = min(1.0, max(0.0, (steps - step) / max(1, decay)))
    return base * min(up, down)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a parameter, gradient or average that lies on this process; a view. All of it where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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


class Clock:
    """Says when to stop: after `limit` seconds, or at the first SIGTERM or SIGINT. The loop then saves and exits 0."""

    def __init__(self, limit: float | None):
        self.start, self.limit, self.asked = time.monotonic(), limit, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        # whoever started this process may have kept them from it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))

    def _ask(self, *_: object) -> None:
        self.asked = True

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def over(self) -> bool:
        return self.asked or (self.limit is not None and self.elapsed >= self.limit)
