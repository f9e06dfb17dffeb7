"""Randomness without a global state: every draw has a generator of its own, made from what it is for."""

from __future__ import annotations

import hashlib

import torch


def keyed(
    seed: int, purpose: str, step: int = 0, sample: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator, on the CPU unless told otherwise, that depends on (seed, purpose, step, sample) alone."""
    digest = hashlib.sha256(f"{seed} {purpose} {step} {sample}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
