"""The losses that Mini's training is followed by: fixed scenes, times and noise."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from ..data.small_world.batches import Step, WorldBatches
from ..loop.keys import keyed
from ..networks.generator import Mini
from ..objectives import flow_matching

VALIDATION_SEED = 1_000_000_000
LOSSES = ("with_text", "without_text", "text_explains")


@torch.no_grad()
def validate(config: ModuleType, model: Mini, stream: WorldBatches, prefix: Sequence[int]) -> dict[str, float]:
    """v-loss on fixed scenes, times and noise, with text and without; the share of the loss that text explains.

    Of squares of the recipe's side; a recipe with BUCKETS has the same of every base, `with_text_96` and so on, and their
    means over the bases as `with_text` ....
    """
    if not stream.mixed:
        return validate_at(config, config.SIDE, model, stream, prefix)
    result: dict[str, float] = {}
    found = {base: validate_at(config, base, model, stream, prefix) for base in config.BUCKETS}
    for base, values in found.items():
        result |= {f"{name}_{base}": value for name, value in values.items()}
    return result | {name: sum(one[name] for one in found.values()) / len(found) for name in LOSSES}


def validate_at(
    config: ModuleType, side: int, model: Mini, stream: WorldBatches, prefix: Sequence[int]
) -> dict[str, float]:
    """`validate` on squares of one side."""
    held = stream.encode(stream.render(range(VALIDATION_SEED, VALIDATION_SEED + config.VALIDATION), (side, side)))
    order = sorted(range(config.VALIDATION), key=lambda i: held.lengths[i])
    generator = keyed(config.SEED, "validation")
    mu = flow_matching.mu_of(config.MU, held.latents.shape[1])
    t = flow_matching.sample_times(config.VALIDATION, mu, generator).to(model.device)
    noise = torch.randn(held.latents.shape, generator=generator).to(model.device)
    sums, past = {"with_text": 0.0, "without_text": 0.0}, model.past(prefix)
    for start in range(0, config.VALIDATION, 64):
        pick = order[start : start + 64]
        batch = held.take(pick)
        x, target = flow_matching.noised(batch.latents, noise[pick], t[pick])
        for name, ids, lengths in (
            ("with_text", batch.ids, batch.lengths),
            ("without_text", batch.ids[:0], [0] * len(pick)),
        ):
            losses, _ = model(Step(x, target, t[pick], ids, lengths, batch.grid), past, False)
            sums[name] += losses.sum().item()
    result = {name: value / config.VALIDATION for name, value in sums.items()}
    return {**result, "text_explains": 1 - result["with_text"] / result["without_text"]}
