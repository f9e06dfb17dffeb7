"""Bucketed or exact text lengths for a captured step: which is predicted faster.

A step captured for a bin of texts serves every text of the bin, but its attention must read lengths from the device. One
captured for exact lengths may take an attention library that reads lengths on the host, which can be faster, and is captured anew
for other lengths. It pays where K steps save more than a capture costs. The rates are those of
``ops/attention/attention_table.json``; the answer depends on shapes and K alone, so equal calls run the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lens.cost import step_attention_flops, step_gemm_flops

from ..config import LensConfig
from ..ops.attention import choice as attention_choice
from ..ops.attention.choice import Need
from ..packing import TEXT_BIN

CAPTURE_SECONDS = 0.2  # of the host, besides one step that runs as it is; predicted
OTHER_FLOPS = 530e12  # per second of GEMMs and the row ops between them, on Hopper; predicted


@dataclass(frozen=True)
class Forecast:
    """One shape of step on one architecture."""

    binned: str  # the attention library of a step whose lengths the device knows
    exact: str  # and of one whose lengths the host knows
    saving: float  # seconds of every step that exact lengths save; not above 0 where a rate is unknown
    capture: float  # seconds of capturing

    def lengths(self, steps: int) -> str:
        """ "exact" or "binned" for a run of ``steps``."""
        return "exact" if steps * self.saving > self.capture else "binned"

    def describe(self, steps: int) -> str:
        milliseconds = f"{1e3 * self.saving:.1f} ms a step"
        if self.saving <= 0:
            return f"text in bins of {TEXT_BIN} rows, {self.binned}: no library that reads lengths on the host is known to be faster"
        bill = f"{steps} steps save {milliseconds}, a capture costs {1e3 * self.capture:.0f} ms (predicted)"
        if self.lengths(steps) == "exact":
            return f"exact text lengths, {self.exact} instead of {self.binned}: {bill}"
        return f"text in bins of {TEXT_BIN} rows, {self.binned} instead of {self.exact}: {bill}"


def forecast(config: LensConfig, lengths: Sequence[int], binned: Need, exact: Need) -> Forecast:
    """For samples of ``lengths`` joint rows. RuntimeError where no library can serve one of the needs."""
    device, host = (attention_choice.choose(need).name for need in (binned, exact))
    rates = attention_choice.entry(device, binned), attention_choice.entry(host, exact)
    flops, other = step_attention_flops(config, lengths), step_gemm_flops(config, sum(lengths)) / OTHER_FLOPS
    if rates[0] is None or rates[1] is None:
        return Forecast(device, host, saving=0.0, capture=CAPTURE_SECONDS + other)
    slow, fast = (flops / (1e12 * float(rate["tflops"])) for rate in rates if rate is not None)
    return Forecast(device, host, saving=slow - fast, capture=CAPTURE_SECONDS + other + fast)
