"""Faults planted in the kernels' text: each must be noticed, or the tests of this folder prove nothing.

A fault shows as wrong numbers (the comparison with the spec fails) or as an error of the emulator, whose message is
named here. Every fault is first compiled and run without its mutation by test_kernels.py, on the same inputs.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch

from lens.ops import backend
from tests.emulation import emulator
from tests.emulation.test_kernels import aligned
from tests.ops import harness, test_gated_residual, test_qk_norm_rope, test_rms_norm_modulate, test_swiglu
from tests.ops.harness import Inputs

NUMBERS = ""  # noticed by the comparison with the spec


def _norm() -> Inputs:
    return aligned(test_rms_norm_modulate.inputs([3, 34], 512))


def _gated() -> Inputs:
    return aligned(test_gated_residual.inputs([3, 34, 0, 2], 512))


def _heads() -> Inputs:
    return test_qk_norm_rope.inputs([9, 34], [35, 0], 3, 64)


class Fault(NamedTuple):
    op: str
    file: str
    old: str
    new: str
    notice: str  # what the emulator says, or NUMBERS


FAULTS = {
    "a removed barrier: sums of a row's warps": Fault(
        "rms_norm_modulate", "norm_backward.cuh", "    __syncthreads();\n    square = dot", "    square = dot", NUMBERS
    ),
    "a removed barrier: the exchange is reused": Fault(
        "rms_norm_modulate", "column_sums.cuh", "    __syncthreads();  // the next plane", "    // the next", NUMBERS
    ),
    "a removed barrier: q's and k's weight gradients": Fault(
        "qk_norm_rope", "qk_norm_rope_backward.cuh", "    __syncthreads();\n    A* out", "    A* out", NUMBERS
    ),
    "one buffer where two generations are needed": Fault(
        "rms_norm_modulate", "norm_backward.cuh", "generation ^= 1)", "generation ^= 0)", NUMBERS
    ),
    "a barrier some threads never reach": Fault(
        "rms_norm_modulate", "norm_backward.cuh", "    fetch(row + groups);", "    if (row >= rows) break;",
        "barrier|deadlock",
    ),
    "a missing shuffle": Fault("rms_norm_modulate", "row.cuh", "step > 0; step /= 2", "step > 1; step /= 2", NUMBERS),
    "a shuffle whose mask leaves lanes out": Fault(
        "rms_norm_modulate", "row.cuh", "__shfl_xor_sync(kFullWarp, value", "__shfl_xor_sync(0xffffu, value",
        "leaves it out",
    ),
    "lanes that leave before a shuffle": Fault(
        "qk_norm_rope", "qk_norm_rope.cuh", "    const int head = base + first_head;",
        "    const int head = base + first_head;\n    if (head >= N) return;", "is gone|deadlock",
    ),
    "a wrong stride": Fault(
        "rms_norm_modulate", "rms_norm_modulate.cuh", "b * p.scale_stride,", "b * p.D,", NUMBERS
    ),
    "a wrong offset search": Fault(
        "gated_residual", "row.cuh", "int64_t first = 1; first < B", "int64_t first = 0; first < B", "past the end"
    ),
    "an offset search that starts a sample one row late": Fault(
        "gated_residual", "row.cuh", "starts(b) <= position", "starts(b) < position", NUMBERS
    ),
    "no guard behind the last row": Fault(
        "gated_residual", "gated_residual.cuh",
        "  if (row >= p.R) return;\n  const int first", "  const int first", "past the end of",
    ),
    "rows that no block takes": Fault(
        "swiglu", "swiglu.cu", "unsigned(ceil_div(rows, kRowsPerBlock))", "unsigned(rows / kRowsPerBlock)", NUMBERS
    ),
    "vector accesses to misaligned rows": Fault(
        "swiglu", "launch.cuh", "  return fit;", "  return true;", "misaligned"
    ),
    "text rows at the images' place": Fault(
        "qk_norm_rope", "qk_norm_rope.cuh", ": joint_row_of_text(p.image_offsets", ": joint_row_of_text(p.text_offsets",
        NUMBERS,
    ),
    "the wrong direction of rotation": Fault(
        "qk_norm_rope", "qk_norm_rope_backward.cuh", "angles[k], A(-1)", "angles[k], A(1)", NUMBERS
    ),
}  # fmt: skip
INPUTS = {
    "rms_norm_modulate": _norm,
    "gated_residual": _gated,
    "qk_norm_rope": _heads,
    "swiglu": lambda: test_swiglu.inputs(9, 341),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(name, tmp_path, monkeypatch):
    fault = FAULTS[name]
    mutant = emulator.mutant(tmp_path, fault.op, fault.file, fault.old, fault.new)
    monkeypatch.setattr(backend, "launch", mutant.launch)
    noticed = []
    for seed in (0, 1, 2, 4):  # some order of the threads gives a race away
        mutant.seed = seed
        try:
            harness.against_spec(fault.op, INPUTS[fault.op](), torch.bfloat16, None)
        except emulator.EmulationError as error:
            noticed.append(str(error))
        except AssertionError as error:
            noticed.append(f"numbers: {error}")
    assert mutant.calls
    if fault.notice == NUMBERS:
        assert any(what.startswith("numbers: ") for what in noticed), noticed
    else:
        assert any(re.search(fault.notice, what) for what in noticed), noticed


def test_inputs_pass_without_a_fault(emulated):
    """The same inputs and orders of threads, nothing planted."""
    for op, made in INPUTS.items():
        for emulated.seed in (0, 1, 2, 4):
            harness.against_spec(op, made(), torch.bfloat16, None)
