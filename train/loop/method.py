"""What a training stage is to the loop."""

from __future__ import annotations


def rate(step: int, base: float, warmup: int, steps: int, decay: int) -> float:
    """Learning rate of a step: linear warm-up, constant, then linear to zero over the last `decay` of `steps`."""
    up = min(1.0, (step + 1) / max(1, warmup))
    down = min(1.0, max(0.0, (steps - step) / max(1, decay)))
    return base * min(up, down)
