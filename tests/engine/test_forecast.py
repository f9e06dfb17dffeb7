"""Bins or exact lengths: the arithmetic of the table, by hand, and the steps an engine captures by it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lens import LensConfig
from lens.cost import step_attention_flops, step_gemm_flops
from lens.engine import forecast as forecasts
from lens.engine.forecast import forecast
from lens.engine.graphs import GraphCache
from lens.engine.run import Engine
from lens.ops.attention import choice as attention_choice
from lens.ops.attention.choice import Need
from tests.engine.test_engine import PROMPTS, SMALL, close, own
from tests.recorded_graph import OFFSETS_ALONE, RecordingDriver
from tests.small_pipeline import shared

HOPPER = Need("cuda", (9, 0), torch.bfloat16, 64, False, False, 4096)
GUIDED_1024, GUIDED_1440, TURBO = [4096, 4511], [8100, 8515], [4296]


@pytest.fixture
def rates(monkeypatch):
    """Two libraries, one of them told lengths by the host, with these TFLOP/s."""

    def libraries(binned: float | None, exact: float | None, **changes) -> None:
        device = dataclasses.replace(OFFSETS_ALONE, device="cuda", dtypes=(torch.bfloat16,), name="device", **changes)
        host = dataclasses.replace(device, name="host", device_lengths=False)
        table = {"device": binned, "host": exact}
        lines = {
            n: None if r is None else {"tflops": r, "status": "predicted", "source": "test"} for n, r in table.items()
        }
        monkeypatch.setattr(attention_choice, "CANDIDATES", [device, host])
        monkeypatch.setattr(attention_choice, "entry", lambda name, need: lines[name])
        attention_choice.choose.cache_clear()

    yield libraries
    attention_choice.choose.cache_clear()


def of(lengths):
    return forecast(LensConfig(), lengths, dataclasses.replace(HOPPER, device_lengths=True), HOPPER)


def test_flops_by_hand():
    config = LensConfig()
    assert step_attention_flops(config, GUIDED_1024) == 4 * 48 * 1536 * (4096**2 + 4511**2)
    weights = 4 * 1536 * 1536 + 3 * 1536 * config.mlp_hidden_dim  # qkv and out; w1, w2, w3, of one stream
    assert step_gemm_flops(config, 8607) == pytest.approx(2 * 48 * weights * 8607, rel=0.01)


def test_saving_and_bill(rates):
    rates(320.0, 408.0)
    found = of(GUIDED_1024)
    assert (found.binned, found.exact) == ("device", "host")
    assert 1e3 * found.saving == pytest.approx(10.95 / 320 * 1e3 - 10.95 / 408 * 1e3, rel=1e-3)
    assert found.capture == pytest.approx(0.2 + 8607 * 2.7445e9 / 530e12 + 10.95 / 408, rel=1e-2)


@pytest.mark.parametrize(
    ("lengths", "steps", "answer"),
    [
        (GUIDED_1024, 20, "binned"),  # 148 ms against 271
        (GUIDED_1024, 36, "binned"),
        (GUIDED_1024, 37, "exact"),
        (GUIDED_1024, 50, "exact"),  # 369 ms
        (GUIDED_1440, 14, "binned"),  # 384 ms against 386
        (GUIDED_1440, 15, "exact"),
        (TURBO, 4, "binned"),  # 15 ms against 236
    ],
)
def test_exact_lengths_where_they_save_more_than_a_capture_costs(rates, lengths, steps, answer):
    rates(320.0, 408.0)
    found = of(lengths)
    assert found.lengths(steps) == answer
    assert ("exact text lengths, host instead of device" in found.describe(steps)) == (answer == "exact")
    assert f"{steps} steps save" in found.describe(steps)


@pytest.mark.parametrize(("binned", "exact"), [(408.0, 408.0), (476.0, 408.0), (None, 408.0), (None, None)])
def test_bins_where_nothing_is_faster_or_nothing_is_known(rates, binned, exact):
    rates(binned, exact)
    found = of(GUIDED_1440)
    assert found.saving <= 0
    assert found.lengths(1000) == "binned"
    assert "no library that reads lengths on the host is known to be faster" in found.describe(1000)


@pytest.mark.parametrize("rate", [3200.0, 320.0])
def test_an_engine_captures_by_the_forecast(rates, monkeypatch, rate):
    """Pictures are small, so that a capture costs nothing but its one step of attention."""
    rates(320.0, rate)
    for k, candidate in enumerate(attention_choice.CANDIDATES):
        attention_choice.CANDIDATES[k] = dataclasses.replace(candidate, device="cpu", dtypes=(torch.float32,))
    monkeypatch.setattr(forecasts, "CAPTURE_SECONDS", 0.0)
    monkeypatch.setattr(forecasts, "OTHER_FLOPS", float("inf"))
    pipe = own()
    pipe.driver = RecordingDriver()
    monkeypatch.setattr(pipe, "engine", Engine(GraphCache(pipe.driver, 1 << 40)))
    monkeypatch.setattr(pipe.transformer, "batch_invariant", False)
    for prompt in PROMPTS:
        assert close((pipe(prompt, seed=3, **SMALL).images, shared()(prompt, seed=3, **SMALL).images))
    assert len(pipe.driver.graphs) == (2 if rate == 3200.0 else 1)  # each combination of lengths, or one for the bin
