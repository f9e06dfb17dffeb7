"""When a sample's bits do not depend on its batch where nobody asked, which GEMM serves then, and what the doctor says."""

from __future__ import annotations

import json
import types

import pytest
import torch

from lens import LensConfig, LensTransformer2DModel
from lens.engine import batch_invariance
from lens.engine.batch_invariance import CASES, LIMIT, default
from lens.ops import backend
from lens.ops.attention import choice as attention_choice
from lens.ops.linear import choice as linear_choice

HOPPER, AMPERE = (9, 0), (8, 0)
SMALL = LensConfig(num_layers=1, num_attention_heads=3, enc_hidden_dim=64, selected_layer_index=(0,))
BFLOAT16 = torch.bfloat16


def entries(*prices: float, arch: str = "9.0", status: str = "measured") -> list[dict]:
    return [{"arch": arch, "case": c, "price": p, "status": status, "source": "x"} for c, p in zip(CASES, prices)]


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of ``gpu.arch`` and a build with every kernel; ``gpu.prices`` is the table."""
    said = types.SimpleNamespace(arch=HOPPER, prices=entries(0.01, 0.005, 0.019))
    monkeypatch.setattr(batch_invariance, "table", lambda: said.prices)
    for module in (batch_invariance, attention_choice, linear_choice):
        monkeypatch.setattr(module, "capability", lambda index: said.arch)
    monkeypatch.setattr(backend, "unavailable", lambda device: "")
    monkeypatch.setattr(backend, "without", lambda kernel: "")
    monkeypatch.setattr(LensTransformer2DModel, "device", torch.device("cuda", 0))
    for choose in (attention_choice.choose, linear_choice.choose):
        choose.cache_clear()
    yield said
    for choose in (attention_choice.choose, linear_choice.choose):
        choose.cache_clear()


@pytest.fixture
def model():
    return LensTransformer2DModel(SMALL).eval().bfloat16()


def test_on_a_cpu_outside_training():
    model = LensTransformer2DModel(SMALL).eval()
    assert model.invariant
    assert default(model)
    model.train()
    assert not model.invariant
    model.eval()
    model.batch_invariant = False
    assert not model.invariant


def test_what_was_measured_decides_the_default_of_a_gpu(gpu, model):
    assert batch_invariance.price(HOPPER) == 0.019
    assert default(model)
    gpu.prices = entries(0.01, 0.005, LIMIT)
    assert not default(model)
    assert default(model, torch.device("cpu")), "where it will run counts"


@pytest.mark.parametrize(
    "prices",
    [
        [],
        entries(0.01, 0.005, LIMIT),
        entries(0.01, 0.005),  # one case was not measured
        entries(0.01, 0.005, 0.01, status="predicted"),
        [*entries(0.01, 0.005), *entries(0.0, 0.0, 0.0, status="predicted")],
        entries(0.01, 0.005, 0.01, arch="10.0"),
    ],
    ids=["nothing", "at the limit", "incomplete", "predicted", "completed by predictions", "another architecture"],
)
def test_until_every_case_was_measured_below_the_limit_it_is_off(gpu, model, prices):
    gpu.prices = prices
    assert not default(model)


def test_where_ours_cannot_multiply_it_is_off_whatever_it_costs(gpu, model):
    linear = model.layers()[0].text.w2
    hook = linear.register_forward_hook(lambda *_: None)
    assert not default(model)
    assert batch_invariance.why_library_gemm_of_model(model) == "qkv: fused a layer is no plain torch.nn.Linear"
    hook.remove()
    assert default(model)
    with linear_choice.use("library"):
        assert not default(model)
    with backend.use("reference"):
        assert not default(model)
    gpu.arch, gpu.prices = AMPERE, entries(0.0, 0.0, 0.0, arch="8.0")
    assert batch_invariance.price(AMPERE) == 0.0
    assert not default(model)
    assert not default(LensTransformer2DModel(SMALL).eval())  # float32


def test_an_attention_that_is_forced_and_looks_at_other_samples_is_not_refused_by_a_default(gpu, model):
    assert default(model)
    with attention_choice.use("torch-cudnn-varlen"):
        assert not default(model)
        yes, words = batch_invariance.report(torch.device("cuda", 0))
        assert not yes
        assert "batch_invariant=True raises (lens.joint_attention: torch-cudnn-varlen was asked for but cannot" in words
    with attention_choice.use("torch-varlen"):
        assert default(model)


def test_attention_is_asked_the_same_whatever_the_longest_sample():
    """An order is of long or of short calls, and a neighbour may make a call long."""
    asked = {
        attention_choice.attention_call(torch.device("cpu"), BFLOAT16, 64, longest, batch_invariant=True)
        for longest in (1, attention_choice.LONG - 1, attention_choice.LONG, 4511)
    }
    assert [call.use for call in asked] == ["long"]


def test_who_multiplies_is_said(gpu):
    cuda = torch.device("cuda", 0)
    assert batch_invariance.why_library_gemm(LensConfig(), cuda, BFLOAT16) == ""
    assert (
        batch_invariance.why_library_gemm(LensConfig(), cuda, torch.float32)
        == "qkv: fused computes in bfloat16, not in float32"
    )
    assert batch_invariance.why_library_gemm(LensConfig.tiny(), cuda, BFLOAT16).startswith(
        "w13: fused needs output columns"
    )
    with backend.use("reference"):
        assert batch_invariance.why_library_gemm(LensConfig(), cuda, BFLOAT16) == "the reference ops were asked for"
    gpu.arch = AMPERE
    with linear_choice.use("fused"), pytest.raises(RuntimeError, match="fused was asked for but cannot run"):
        batch_invariance.why_library_gemm(LensConfig(), cuda, BFLOAT16)


def test_the_doctors_words(gpu):
    cuda = torch.device("cuda", 0)
    assert batch_invariance.report(cuda) == (True, "yes, bit for bit, by our GEMMs: 1.9 % of a step, measured")
    gpu.prices = entries(0.01, 0.04, 0.01)
    yes, words = batch_invariance.report(cuda)
    assert (yes, words.endswith("captured (4.0 % of a step, measured)")) == (False, True)
    gpu.prices = entries(0.01, 0.01, 0.013, status="predicted")
    assert batch_invariance.report(cuda)[1].endswith("captured (1.3 % of a step, predicted)")
    gpu.prices = []
    assert batch_invariance.report(cuda)[1].endswith("captured (not measured)")
    gpu.arch = AMPERE
    yes, words = batch_invariance.report(cuda)
    assert not yes
    assert "sample by sample, not captured (qkv: fused needs compute capability 9.0, this is 8.0)" in words
    with linear_choice.use("fused"):
        assert "fused was asked for but cannot run" in batch_invariance.report(cuda)[1]


def test_the_table_is_whole_and_a_bad_one_is_refused(tmp_path, monkeypatch):
    assert {e["case"] for e in batch_invariance.table() if e["arch"] == "9.0"} == set(CASES)
    for change in ({"source": ""}, {"status": "hoped"}, {"case": "step/x"}, {"price": float("nan")}):
        bad = tmp_path / "invariance_table.json"
        bad.write_text(json.dumps({"entries": [{**entries(0.01)[0], **change}]}))
        monkeypatch.setattr(batch_invariance, "TABLE", bad)
        batch_invariance.table.cache_clear()
        try:
            with pytest.raises(ValueError, match="price with its source expected"):
                batch_invariance.table()
        finally:
            batch_invariance.table.cache_clear()
