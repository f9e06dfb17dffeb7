"""The calls of cuTensorMapEncodeTiled: every documented rule of it, and the exact arguments of ours."""

from __future__ import annotations

import ctypes

import pytest
import torch

from lens.ops.attention import hopper
from tests.emulation import emulator, test_linear_fused_kernels
from tests.emulation.test_joint_attention_kernels import draw
from tests.ops.harness import offsets_of

FINE = {
    "map": 4096, "type": 9, "rank": 3, "base": 256, "sizes": (64, 300, 7), "pitches": (128, 128 * 300), "box": (64, 128, 1),
    "steps": (1, 1, 1), "interleave": 0, "swizzle": 3, "promotion": 3, "fill": 0,
}  # fmt: skip
WIDE = {"sizes": ctypes.c_uint64, "pitches": ctypes.c_uint64, "box": ctypes.c_uint, "steps": ctypes.c_uint}


@pytest.fixture(scope="module")
def library():
    return emulator.Emulator(emulator.build(emulator.SOURCE)).library


def broken_rule(library: ctypes.CDLL, **changes) -> str:
    rule = library.lens_emulation_map_rule
    rule.restype = ctypes.c_char_p
    rule.argtypes = [
        ctypes.c_uint64, ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, *[ctypes.c_void_p] * 4, *[ctypes.c_int] * 4,
    ]  # fmt: skip
    given = {**FINE, **changes}
    arrays = {name: (kind * 6)(*given[name]) for name, kind in WIDE.items()}
    return rule(*(ctypes.addressof(arrays[n]) if n in arrays else value for n, value in given.items())).decode()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, ""),
        ({"map": 4096 + 32}, "tensorMap"),
        ({"type": 6}, "tensorDataType"),
        ({"rank": 0}, "tensorRank"),
        ({"rank": 6}, "tensorRank"),
        ({"base": 0}, "globalAddress"),
        ({"base": 264}, "globalAddress"),
        ({"sizes": (64, 0, 7)}, "globalDim"),
        ({"sizes": (64, 300, (1 << 32) + 1)}, "globalDim"),
        ({"sizes": (64, 300, 1 << 32)}, ""),
        ({"pitches": (120, 38400)}, "multiples of 16"),
        ({"pitches": (128, 1 << 40)}, "below 2^40"),
        ({"pitches": (48, 38400)}, "at least globalDim"),
        ({"box": (64, 257, 1)}, "boxDim must"),
        ({"box": (64, 0, 1)}, "boxDim must"),
        ({"box": (4, 8, 1), "swizzle": 0}, "multiple of 16 bytes"),
        ({"box": (72, 8, 1)}, "wider than the swizzle"),
        ({"box": (64, 8, 1), "swizzle": 2}, "wider than the swizzle"),
        ({"box": (72, 8, 1), "swizzle": 0}, ""),
        ({"steps": (1, 0, 1)}, "elementStrides"),
        ({"steps": (1, 9, 1)}, "elementStrides"),
        ({"interleave": 1}, "interleave"),
        ({"swizzle": 4}, "swizzle"),
        ({"promotion": 4}, "l2Promotion"),
        ({"fill": 2}, "oobFill"),
    ],
)
def test_documented_rules(library, changes, word):
    found = broken_rule(library, **changes)
    assert word in found if word else found == ""


def line(sizes: str, strides: str, box: str, falling: bool = False) -> str:
    steps = ",".join("1" for _ in sizes.split(","))
    ours = f"type 9 sizes {sizes} strides {strides} box {box} steps {steps} interleave 0 swizzle 3 promotion 3 fill 0"
    return ours + " falling" * falling


def weight(depth: int, columns: int, copied: int) -> str:
    """Columns as e, q, j and 32s (csrc/cuda/gemm/gemm.cuh): its strides fall, as only these maps' do."""
    bytes_ = ",".join(str(2 * depth * n) for n in (1, 8, 2, 32))
    return line(f"{depth},2,4,4,{columns // 32}", bytes_, f"64,2,4,4,{copied // 32}", falling=True)


def rows(depth: int, count: int, box: int) -> str:
    return line(f"{depth},{count}", f"{2 * depth}", f"64,{box}")


@pytest.mark.parametrize(
    ("kernel", "made", "cluster", "expected"),
    [
        (
            "linear",
            test_linear_fused_kernels.linear(5, 128, 64),
            1,
            [rows(128, 5, 128), weight(128, 64, 128)] * 2,
        ),
        (
            "linear_swiglu",
            test_linear_fused_kernels.swiglu(5, 3, 64, 64),
            1,
            [rows(64, 5, 128), weight(64, 128, 128), rows(64, 3, 128), weight(64, 128, 128)],
        ),
        (
            "linear_qkv_norm_rope",
            test_linear_fused_kernels.qkv([5], [3], 128, 2),
            1,
            [rows(128, 5, 128), weight(128, 384, 192), rows(128, 3, 128), weight(128, 384, 192)],
        ),
        (
            "linear_gated_residual",
            test_linear_fused_kernels.gated([5], [3], 128, 192),
            1,
            [rows(128, 5, 128), weight(128, 192, 192), rows(128, 3, 128), weight(128, 192, 192)],
        ),
        (  # each block of a cluster copies half of the weight's tile; a stream without rows has the other's maps
            "linear_gated_residual",
            test_linear_fused_kernels.gated([5], [0], 64, 192),
            2,
            [rows(64, 5, 128), weight(64, 192, 96)] * 2,
        ),
    ],
    ids=["one stream", "two parts of two streams", "queries, keys and values", "gated residual", "cluster"],
)
def test_arguments_of_products(emulated, kernel, made, cluster, expected):
    emulated.library.lens_emulation_maps()
    test_linear_fused_kernels.run(emulated, kernel, {**made, "cluster": cluster})
    assert emulated.library.lens_emulation_maps().decode().splitlines() == expected


def test_arguments_of_attention(emulated):
    """q, k and v of the joint layout: rows of all heads, boxes of one head."""
    emulated.library.lens_emulation_maps()
    with torch.no_grad():
        hopper.forward(*draw([5], [3], 2), offsets_of([5]), offsets_of([3]), 5, True, 0.125, float("inf"), 0, True)
    assert emulated.library.lens_emulation_maps().decode().splitlines() == [line("128,8", "256", "64,128")] * 3
