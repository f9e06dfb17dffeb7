"""The GPU tests' own limits on kernels whose root, exponential and division err as far as the toolkit documents.

A limit that such errors pass by luck alone would end the first run on a device for nothing (csrc/emulation/inexact.h).
"""

from __future__ import annotations

import shutil

import pytest
import torch

from lens.ops import backend
from tests.emulation import emulator, test_linear_fused_kernels
from tests.gpu import test_joint_attention_gpu, test_linear_fused_gpu, test_ops_gpu
from tests.ops import harness, test_qk_norm_rope, test_swiglu
from tests.ops.harness import Inputs

SEEDS = range(1, 21)
ROWS = {
    **{op: make([5], 7) for op, make in test_ops_gpu.ROW_OPS.items()},
    "swiglu": test_swiglu.inputs(45, 34),
    "qk_norm_rope": test_qk_norm_rope.inputs(*test_qk_norm_rope.CASES["narrow head"]),
}


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch):
    for module in (test_ops_gpu, test_linear_fused_gpu, test_joint_attention_gpu):
        monkeypatch.setattr(module, "DEVICE", "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", ROWS)
def test_row_ops(emulated, op, dtype):
    for emulated.errors in SEEDS if dtype == torch.float32 else SEEDS[:5]:
        test_ops_gpu.against_spec(op, ROWS[op], dtype)


@pytest.mark.parametrize(
    ("kernel", "made"),
    [
        ("linear_qkv_norm_rope", test_linear_fused_kernels.qkv([5], [3], 64, 1)),
        ("linear_swiglu", test_linear_fused_kernels.swiglu(5, 3, 64, 64)),
    ],
    ids=["qkv", "swiglu"],
)
def test_products(emulated, kernel, made):
    emulated.errors = 1
    test_linear_fused_gpu.against_spec(kernel, {**made, "cluster": 1})


@pytest.mark.parametrize("mode", test_joint_attention_gpu.MODES)
def test_attention(emulated, mode):
    emulated.errors = 1
    test_joint_attention_gpu.test_against_float64("narrow 65", True, mode)


@pytest.mark.parametrize("op", [pytest.param(op, marks=() if op == "swiglu" else pytest.mark.nightly) for op in ROWS])
def test_row_ops_would_stand_contraction_too(monkeypatch, op):
    """No limit rests on -fmad=false: only equal bits wherever a row lies do."""
    whole = emulator.Emulator(emulator.build(emulator.SOURCE, op, contract=emulator.CONTRACTED))
    monkeypatch.setattr(backend, "launch", whole.launch)
    for whole.errors in (0, 1, 2):
        test_ops_gpu.against_spec(op, ROWS[op], torch.float32)
    assert whole.calls


@pytest.mark.nightly
def test_attention_without_contraction(monkeypatch):
    """The other end of what its compiler may do; `test_attention` has all of it contracted."""
    plain = emulator.Emulator(emulator.build(emulator.SOURCE, contract=emulator.PLAIN))
    monkeypatch.setattr(backend, "launch", plain.launch)
    plain.errors = 1
    for mode in test_joint_attention_gpu.MODES:
        test_joint_attention_gpu.test_against_float64("narrow 65", True, mode)
    assert plain.calls


def test_errors_are_drawn_by_the_argument_within_the_bound_and_a_limit_of_luck_is_found(tmp_path, monkeypatch):
    """With the approximate root: twice the spec's own error, as drawn on this CPU, fails more often than not."""
    tree = tmp_path / "csrc"
    shutil.copytree(emulator.SOURCE, tree)
    row = tree / "cuda" / "row.cuh"
    text = row.read_text()
    assert text.count("__frsqrt_rn(x)") == 1
    row.write_text(text.replace("__frsqrt_rn(x)", "rsqrtf(x)"))
    approximate = emulator.Emulator(emulator.build(tree, "qk_norm_rope"))
    monkeypatch.setattr(backend, "launch", approximate.launch)
    made = harness.cast(ROWS["qk_norm_rope"], torch.float32)

    def outputs(errors: int, inputs: Inputs) -> torch.Tensor:
        approximate.errors = errors
        with harness.compiled():
            return harness.results(test_ops_gpu.ops.qk_norm_rope, inputs)

    exact, drawn = outputs(0, made), outputs(1, made)
    assert all(harness.same_bits(value, drawn[part]) for part, value in outputs(1, made).items())
    relative = (drawn["output 0"] / exact["output 0"] - 1).abs().max().item()
    assert 2**-24 < relative < 2 * 2**-23 + 2**-22  # two units of the root, two roundings
    failed = 0
    for errors in SEEDS:
        got = outputs(errors, made)
        harness.within_limits("qk_norm_rope", made, torch.float32, got, conditioned=True)
        try:
            harness.within_limits("qk_norm_rope", made, torch.float32, got)
        except AssertionError:
            failed += 1
    assert failed > len(SEEDS) / 2
