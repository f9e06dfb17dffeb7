"""Faults planted in the attention kernel: each must be noticed under some order of threads, copies and products."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from lens.ops import backend
from tests.emulation import emulator
from tests.emulation import test_joint_attention_kernels as kernels

NUMBERS = "^numbers: "  # noticed by the comparison with the spec
KERNEL, SOFTMAX = "attention/joint_attention.cuh", "attention/softmax.cuh"


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    notice: str  # what the emulator says, or NUMBERS
    mode: str = "running"


FAULTS = {
    "scores read before their product is over": Fault(KERNEL, "wgmma_wait<1>(s);", "wgmma_wait<2>(s);", "leaves under way"),
    "values' products not waited for": Fault(
        KERNEL, "      wgmma_wait<0>(o, s);\n", "      wgmma_wait<1>(o, s);\n", "leaves under way"
    ),
    "keys' place free before they arrived": Fault(
        KERNEL, "      barrier_wait(&shared.k_empty[k.stage], k.parity ^ 1);\n", "", "."
    ),
    "the wrong parity for values": Fault(
        KERNEL, "barrier_wait(&shared.v_empty[v.stage], v.parity ^ 1);",
        "barrier_wait(&shared.v_empty[v.stage], v.parity);", "deadlock",
    ),
    "no turns": Fault(KERNEL, "      named_barrier_arrive(other, kBoth);\n      summed", "      summed", "deadlock"),
    "nobody begins": Fault(
        KERNEL, "if (consumer == 1) named_barrier_arrive(other, kBoth);", "", "deadlock"
    ),
    "one key too many": Fault(SOFTMAX, "(i & 1) >= valid)", "(i & 1) > valid)", NUMBERS),
    "no rescaling": Fault(SOFTMAX, "rows.sum[i] *= rescale[i / 2];", "rows.sum[i] *= 1.0f;", NUMBERS),
    "foreign values stay": Fault(KERNEL, "i < kBlockKeys * 8; i += kWarp", "i < 0; i += kWarp", NUMBERS),
    "a sum without one of its lanes": Fault(
        SOFTMAX, "  sum += __shfl_xor_sync(kFullWarp, sum, 2);\n", "", NUMBERS
    ),
    "image rows where text rows belong": Fault(
        KERNEL, "tile.text_row + query - tile.images", "tile.text_row + query",
        f"in no buffer|past the end|{NUMBERS}",  # by where the buffers happen to lie
    ),
    "a fixed range that overflows": Fault(SOFTMAX, "kFixedRange = 60", "kFixedRange = 200", NUMBERS, "fixed"),
}  # fmt: skip


def run(hopper: emulator.Emulator, mode: str) -> None:
    """Full and partial blocks, more blocks than stages, several tiles per block of threads, foreign NaN behind."""
    images, texts = [641, 3], [4, 0]
    qkv = kernels.draw(images, texts, 1)
    if mode == "fixed":  # scores of 91, which no fixed shift serves
        qkv[0][:], qkv[1][:] = 3.375, 3.375
        qkv[1][300:] = -3.375
        got = kernels.attend(qkv, images, texts, 92.0)
        assert got[0].isfinite().all()
        assert kernels.error(got[2], kernels.expected(qkv, images, texts)[2]) < 1e-4
        return
    hopper.multiprocessors = 2
    kernels.against_spec(hopper, images, texts, 1, mode, hopper.seed, qkv=qkv)
    for x in qkv:
        x[645:] = float("nan")
    image, text, _ = kernels.attend(qkv, images, texts)
    exact = kernels.expected(qkv, images, texts)
    assert kernels.error(image[:641], exact[0][:641]) < 4e-3
    assert kernels.error(text, exact[1]) < 4e-3


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(name, tmp_path, monkeypatch):
    fault = FAULTS[name]
    mutant = emulator.mutant(tmp_path, "joint_attention", fault.file, fault.old, fault.new)
    monkeypatch.setattr(backend, "launch", mutant.launch)
    noticed = []
    for mutant.seed in (0, 1, 2):
        try:
            run(mutant, fault.mode)
        except emulator.EmulationError as error:
            noticed.append(str(error))
        except AssertionError as error:
            noticed.append(f"numbers: {error}")
        if noticed:
            break
    assert any(re.search(fault.notice, what) for what in noticed), noticed


@pytest.mark.parametrize("mode", ["running", "fixed"])
def test_inputs_pass_without_a_fault(monkeypatch, mode):
    hopper = emulator.Emulator(emulator.build(emulator.SOURCE, "joint_attention"))
    monkeypatch.setattr(backend, "launch", hopper.launch)
    for hopper.seed in (0, 1, 2):
        run(hopper, mode)
