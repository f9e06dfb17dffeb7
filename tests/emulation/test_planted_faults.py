"""Faults planted in the kernels' text: each must be noticed, or the tests of this folder prove nothing.

A fault shows as wrong numbers (the comparison with the spec fails) or as an error of the emulator, whose message is
named here. Every fault is first compiled and run without its mutation by test_kernels.py, on the same inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from lens.ops import backend
from tests.emulation import emulator, test_linear_fused_kernels, test_moe_mxfp4_kernels
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


_RING, _EPILOGUE = "gemm/gemm.cuh", "gemm/epilogue.cuh"
_QKV, _GATED = "gemm/linear_qkv_norm_rope.cuh", "gemm/linear_gated_residual.cuh"
_SWIGLU, _LINEAR = "gemm/linear_swiglu.cuh", "gemm/linear.cuh"
PRODUCT_FAULTS = {
    "the copies wait for the wrong parity": Fault(
        "linear", _RING, "        barrier_wait(empty + at.stage, at.parity ^ 1)", "        barrier_wait(empty + at.stage, at.parity)",
        "deadlock",
    ),
    "the copies do not wait": Fault(
        "linear", _RING, "        barrier_wait(empty + at.stage, at.parity ^ 1);\n", "", "numbers|has all its 1 arrivals"
    ),
    "a byte count that misses a row": Fault(
        "linear", _RING, "full + at.stage, Ring::kStageBytes", "full + at.stage, Ring::kStageBytes - 128", "deadlock"
    ),
    "the products do not wait for the copies": Fault(
        "linear", _RING, "      barrier_wait(full + at.stage, at.parity);\n", "", "numbers|deadlock|has all its"
    ),
    "the products wait for the wrong parity": Fault(
        "linear", _RING, "barrier_wait(full + at.stage, at.parity)", "barrier_wait(full + at.stage, at.parity ^ 1)",
        "numbers|deadlock|has all its",
    ),
    "a stage given back while a product may read it": Fault(
        "linear", _RING, "      wgmma_wait<1>();\n", "", NUMBERS
    ),
    "the stage in use given back": Fault(
        "linear", _RING, "if (held >= 0 && releases) cluster_barrier_arrive(release + uint32_t(held) * 8);\n      held = at.stage;",
        "held = at.stage;\n      if (k && lane == 0) barrier_arrive(empty + held);", "numbers|deadlock|has all its",
    ),
    "accumulators read before the last wait": Fault(
        "linear", _RING, "wgmma_wait<0>(d);", "wgmma_wait<1>(d);", "leaves under way"
    ),
    "no wait for the last group": Fault("linear", _RING, "    wgmma_wait<0>(d);\n", "", "numbers|waited for"),
    "no fence before the first product": Fault("linear", _RING, "      wgmma_fence();\n", "", "without wgmma_fence"),
    "no fence after barriers are made": Fault(
        "linear", _RING, "    fence_barrier_init();\n", "", "without fence_barrier_init"
    ),
    "barriers used before they are made": Fault(
        "linear", _RING, "  __syncthreads();\n", "", "never initialised|without fence_barrier_init"
    ),
    "a stage freed by too few warps": Fault(
        "linear", _RING, "barrier_init(empty + s, 4 * Ring::kConsumers * cluster)", "barrier_init(empty + s, 2)", "numbers|has all its 2"
    ),
    "more registers than there are": Fault(
        "linear", _RING, "kConsumers == 2 ? 232", "kConsumers == 2 ? 240", "registers"
    ),
    "more registers than the launch has": Fault(  # 65,536, of which 384 threads get 168 each
        "linear", _RING, "kConsumers == 2 ? 40", "kConsumers == 2 ? 48", "65536 registers, the launch has 64512"
    ),
    "a thread without a context": Fault(
        "linear", "tensor_map.cuh", " || cudaSetDevice(device) != cudaSuccess", "", "error 1:"
    ),
    "barriers behind the end of shared memory": Fault(
        "linear", _RING, "kBarriers + 2 * kStages * 8", "kBarriers + kStages * 8", "leaves the block's"
    ),
    "a step along K of the other layout": Fault("linear", _RING, "x + step * kStepK", "x + step * kStepMN", NUMBERS),
    "both warpgroups multiply the upper rows": Fault(
        "linear", _RING, "matrix_k(from + part * 64 * kTileK * 2)", "matrix_k(from)", NUMBERS
    ),
    "a descriptor with half an atom": Fault(
        "linear", "shared_matrix.cuh", "return matrix_bits(tile, 16, kAtomBytes);",
        "return matrix_bits(tile, 16, kAtomBytes / 2);", "no atom's",
    ),
    "copies without swizzle": Fault(
        "linear", "tensor_map.cuh", "swizzle = CU_TENSOR_MAP_SWIZZLE_128B", "swizzle = CU_TENSOR_MAP_SWIZZLE_NONE",
        NUMBERS,
    ),
    "a map with a row too many": Fault(
        "linear", _RING, "{p.K, stream.rows}, {p.K}", "{p.K, stream.rows + 1}, {p.K}", "past the end of 'x'"
    ),
    "rows below the last": Fault("linear", _LINEAR, "if (row < p.R) store", "store", "past the end of 'y'"),
    "columns behind the last": Fault(
        "linear", _LINEAR, "      if (at.column + 32 * g >= p.D) break;  // the whole warp\n", "", "past the end of"
    ),
    "weight rows that stay two by two": Fault(
        "linear", _RING, "{p.K, 8 * p.K, 2 * p.K, 32 * p.K}", "{p.K, 2 * p.K, 8 * p.K, 32 * p.K}", NUMBERS
    ),
    "two weight rows exchanged": Fault("linear", _EPILOGUE, "2 * h + i % 2]", "2 * h + (i + 1) % 2]", NUMBERS),
    "row halves exchanged": Fault("linear", _EPILOGUE, "2 * h + i % 2]", "2 * (1 - h) + i % 2]", NUMBERS),
    "a map with 32 weight rows too many": Fault(
        "linear", _RING, "4, 4, columns / 32}", "4, 4, columns / 32 + 1}", "past the end of 'weight'"
    ),
    "a launch on the default stream": Fault(
        "linear", "gemm/gemm.cuh", "Ring::kSharedBytes,\n                             p.stream", "Ring::kSharedBytes,\n                             nullptr",
        "default stream",
    ),
    "no map for a stream without rows": Fault(
        "linear", _RING, "streams[streams[s].rows ? s : 1 - s]", "streams[s]", "error 1:"
    ),
    "text tiles of the image's stream": Fault(
        "linear_gated_residual", _RING, "{text ? kText : kImage", "{kImage", "numbers|past the end"
    ),
    "x behind the last column": Fault(
        "linear_gated_residual", _GATED, "if (32 * g < left) ahead", "ahead", "past the end of"
    ),
    "the gate of the first sample": Fault(
        "linear_gated_residual", _GATED, "p.B, row)", "p.B, 0)", NUMBERS
    ),
    "the wrong sign of rotation": Fault(
        "linear_qkv_norm_rope", _QKV, "-(odd * sine.e[j])", "odd * sine.e[j]", NUMBERS
    ),
    "half a head in the sum": Fault("linear_qkv_norm_rope", _QKV, "sum_lanes(square, 4)", "sum_lanes(square, 2)", NUMBERS),
    "text heads at the images' place": Fault(
        "linear_qkv_norm_rope", _QKV, "joint_row_of_text(p.image_offsets", "joint_row_of_text(p.text_offsets",
        "numbers|past the end",
    ),
    "x of the other row half": Fault(
        "linear_gated_residual", _GATED, "load_chunk(x + first[h]", "load_chunk(x + first[1 - h]", NUMBERS
    ),
    "angles of the other half of a head": Fault(
        "linear_qkv_norm_rope", _QKV, "load_angles(p.sin, angle, 16 * g)", "load_angles(p.sin, angle, 16 - 16 * g)",
        NUMBERS,
    ),
    "the next part's first head in this one": Fault(
        "linear_qkv_norm_rope", _QKV, "column = 0, ++part;", "column = 0;", NUMBERS
    ),
    "the halves of SwiGLU exchanged": Fault(
        "linear_swiglu", _SWIGLU, "a.e[i] * sigmoid(a.e[i]) * u.e[i]", "u.e[i] * sigmoid(u.e[i]) * a.e[i]", NUMBERS
    ),
    "w1 where w3 belongs": Fault("linear_swiglu", _RING, "part * part_columns", "0 * part_columns", NUMBERS),
}  # fmt: skip
PRODUCT_INPUTS = {
    "linear": lambda: test_linear_fused_kernels.linear(70, 64 * 10, 192),
    "linear_qkv_norm_rope": lambda: test_linear_fused_kernels.qkv([20, 9], [3, 40], 64, 1),
    "linear_swiglu": lambda: test_linear_fused_kernels.swiglu(20, 3, 64, 64),
    "linear_gated_residual": lambda: test_linear_fused_kernels.gated([20, 9], [3, 40], 64, 64),
}


_MOE = "moe_mxfp4.cuh"
MOE_FAULTS = {
    "the products do not wait for the copies": Fault(
        "moe_mxfp4", _MOE, "cp_async_wait<Tile::kStages - 2>()", "cp_async_wait<Tile::kStages - 1>()",
        "before its .* copies",
    ),
    "a stage read before all threads have copied": Fault(
        "moe_mxfp4", _MOE, "    __syncthreads();  // this stage has arrived", "    // this stage has arrived", NUMBERS
    ),
    "a stage overwritten while it is read": Fault(
        "moe_mxfp4", _MOE, "copy(stage ? stage - 1 : Tile::kStages - 1, next", "copy(stage, next", NUMBERS
    ),
    "copies that belong to no group": Fault(
        "moe_mxfp4", _MOE, "kStageGroups);\n    cp_async_commit();\n  }\n", "kStageGroups);\n  }\n",
        "numbers|before its .* copies",
    ),
    "inputs swizzled and read plain": Fault(
        "moe_mxfp4", _MOE, "Tile::input_at(8 * j + quad, 4 * g + place)", "(8 * j + quad) * Tile::kInputBytes + (4 * g + place) * 16",
        NUMBERS,
    ),
    "the nibbles of a byte exchanged": Fault("moe_mxfp4", _MOE, "0x5140)", "0x4051)", NUMBERS),
    "no sign": Fault("moe_mxfp4", _MOE, "spread << 1 & 0x80808080", "spread & 0u", NUMBERS),
    "the sign as a part of the size": Fault("moe_mxfp4", _MOE, "four & 0x7777", "four", NUMBERS),
    "the scale of the column beside": Fault("moe_mxfp4", _MOE, "scale[i][h / 2]", "scale[i][h % 2]", NUMBERS),
    "the group before's scale": Fault(
        "moe_mxfp4", _MOE, "scales[n * groups + group]", "scales[n * groups + group / 2]", NUMBERS
    ),
    "gate and up exchanged": Fault(
        "moe_mxfp4", _MOE, "gate * sigmoid(float(p.alpha) * gate) * (up + 1.0f)", "up * sigmoid(float(p.alpha) * up) * (gate + 1.0f)",
        NUMBERS,
    ),
    "no limit": Fault("moe_mxfp4", _MOE, "gate = gate > limit ? limit : gate;", "", NUMBERS),
    "the bias of the first expert": Fault(
        "moe_mxfp4", _MOE, "(Layer::bias(p)) + weight_row", "(Layer::bias(p)) + column", NUMBERS
    ),
    "rows of the next expert": Fault("moe_mxfp4", _MOE, "if (row < rows) {", "if (row < kRows) {", "numbers|past the end"),
    "inputs behind the last": Fault("moe_mxfp4", _MOE, "i < rows ? Layer", "true ? Layer", "past the end of|before 'x'"),
    "columns behind the last": Fault("moe_mxfp4", _MOE, "    if (n >= count) break;\n", "", "numbers|past the end"),
    "weights behind the last column": Fault("moe_mxfp4", _MOE, "n < count && group + g", "group + g", "past the end of"),
    "weights behind the last group": Fault("moe_mxfp4", _MOE, "n < count && group + g < groups", "n < count", "past the end of"),
    "tiles that no block takes": Fault(
        "moe_mxfp4", "moe_mxfp4.cu", "pairs / kRows + (pairs < p.E ? pairs : p.E)", "(pairs + kRows - 1) / kRows", NUMBERS
    ),
    "pairs in another order": Fault(
        "moe_mxfp4", _MOE, "__popc(votes & ((1u << lane) - 1))", "__popc(votes & (1u << lane))", "numbers|beside"
    ),
    "experts counted before they are": Fault(
        "moe_mxfp4", _MOE, "  __syncthreads();\n  if (threadIdx.x == 0) {", "  if (threadIdx.x == 0) {", "numbers|past the end|before"
    ),
    "logits read before they are": Fault(
        "moe_mxfp4", _MOE, "  __syncthreads();\n  if (warp > 0) return;", "  if (warp > 0) return;", NUMBERS
    ),
    "an expert taken twice": Fault("moe_mxfp4", _MOE, "if (taken >> i & 1) continue;", "", NUMBERS),
    "shares of all that come before": Fault("moe_mxfp4", _MOE, "shares[k] /= total", "shares[k] /= total + k", NUMBERS),
    "the part of the first expert": Fault("moe_mxfp4", _MOE, "part + k * p.D + 4", "part + 4", NUMBERS),
}  # fmt: skip


def _held_with_experts() -> None:
    """Tiles of 64 rows and of 8, not all full; more groups than either ring holds, and some left over."""
    for shape in ((40, 19 * 32, 96, 3, 2), (5, 37 * 32, 96, 3, 2)):
        test_moe_mxfp4_kernels.held_to_the_spec(test_moe_mxfp4_kernels.made(shape))


def _assert_noticed(fault: Fault, mutant: emulator.Emulator, check: Callable[[], None]) -> None:
    noticed = []
    for mutant.seed in (0, 1, 2, 4):  # some order of the threads gives a race away
        try:
            check()
        except emulator.EmulationError as error:
            noticed.append(str(error))
        except AssertionError as error:
            noticed.append(f"numbers: {error}")
    assert mutant.calls
    if fault.notice == NUMBERS:
        assert any(what.startswith("numbers: ") for what in noticed), noticed
    else:
        assert any(re.search(fault.notice, what) for what in noticed), noticed


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(name, tmp_path, monkeypatch):
    fault = FAULTS[name]
    mutant = emulator.mutant(tmp_path, fault.op, fault.file, fault.old, fault.new)
    monkeypatch.setattr(backend, "launch", mutant.launch)
    _assert_noticed(fault, mutant, lambda: harness.against_spec(fault.op, INPUTS[fault.op](), torch.bfloat16, None))


@pytest.mark.parametrize("name", PRODUCT_FAULTS)
def test_fault_in_a_product_is_noticed(name, tmp_path):
    fault = PRODUCT_FAULTS[name]
    mutant = emulator.mutant(tmp_path, fault.op, fault.file, fault.old, fault.new)
    mutant.multiprocessors = 1  # one block goes round the ring again and again
    made = PRODUCT_INPUTS[fault.op]()
    _assert_noticed(
        fault, mutant, lambda: test_linear_fused_kernels.against_spec(mutant, fault.op, made, (mutant.seed,))
    )


@pytest.mark.parametrize("name", MOE_FAULTS)
def test_fault_in_the_experts_is_noticed(name, tmp_path, monkeypatch):
    fault = MOE_FAULTS[name]
    mutant = emulator.mutant(tmp_path, fault.op, fault.file, fault.old, fault.new)
    monkeypatch.setattr(backend, "launch", mutant.launch)
    _assert_noticed(fault, mutant, _held_with_experts)


def test_inputs_pass_without_a_fault(emulated):
    """The same inputs and orders of threads, nothing planted."""
    for op, made in INPUTS.items():
        for emulated.seed in (0, 1, 2, 4):
            harness.against_spec(op, made(), torch.bfloat16, None)
    for kernel, made in PRODUCT_INPUTS.items():
        test_linear_fused_kernels.against_spec(emulated, kernel, made(), (0, 1, 2, 4))
    for emulated.seed in (0, 1, 2, 4):
        _held_with_experts()
