"""Descriptors, swizzled tiles and fragments against CuTe's own: a second reading of what wgmma does.

cute_numbers.txt is what cute_numbers.cpp prints; where nvidia-cutlass and a toolkit are installed it is printed anew.
Kernel and emulator share one reading of the PTX description, so an error in it would pass every other test here.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import itertools
import os
import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest
import torch

from tests.emulation import emulator

HERE = pathlib.Path(__file__).parent
NUMBERS = HERE / "cute_numbers.txt"
NUMBER_OF_STEPS = 8


def recorded(name: str) -> str:
    (line,) = (line for line in NUMBERS.read_text().splitlines() if line.startswith(name + " "))
    return line.removeprefix(name + " ")


def layout(name: str) -> tuple[Any, Any]:
    """Shape and stride, as nested tuples; of a swizzled one those behind the swizzle."""
    shape, stride = recorded(name).rpartition(" o ")[2].replace("_", "").split(":")
    return ast.literal_eval(shape), ast.literal_eval(stride)


def places(shape: Any, stride: Any) -> list[int]:
    """The offset of every coordinate of a mode, the first of nested ones fastest."""
    if isinstance(shape, int):
        return [i * stride for i in range(shape)]
    modes = [places(s, d) for s, d in zip(shape, stride, strict=True)]
    return [sum(reversed(at)) for at in itertools.product(*reversed(modes))]


def offsets(name: str) -> torch.Tensor:
    """[rows of mode 0, rows of mode 1] of a layout of two modes."""
    shape, stride = layout(name)
    first, second = (torch.tensor(places(s, d)) for s, d in zip(shape, stride, strict=True))
    return first[:, None] + second


def image(values: torch.Tensor, name: str) -> torch.Tensor:
    """bfloat16 values of a tile as CuTe has them in shared memory; Sw<3,4,3> of the byte address."""
    assert recorded(f"{name} layout").startswith("Sw<3,4,3> o smem_ptr[16b]")
    at = 2 * offsets(f"{name} layout")
    swizzled = (at ^ ((at & 0x380) >> 3)) // 2
    out = torch.empty(values.numel(), dtype=torch.bfloat16)
    out[swizzled.flatten()] = values.flatten().bfloat16()
    return out


@pytest.fixture(scope="module")
def probe():
    return emulator.Emulator(emulator.build(emulator.SOURCE, probe=HERE / "wgmma_probe.cu"))


def run(machine: emulator.Emulator, n: int, in_registers: bool, a: torch.Tensor, b: torch.Tensor, values: torch.Tensor):
    """(accumulators [128, n / 2], descriptors [2, steps])"""
    y, descriptors = torch.empty(128, n // 2), torch.zeros(2, NUMBER_OF_STEPS, dtype=torch.int64)
    lib = machine.library
    lib.lens_emulation_wgmma_probe.argtypes = [ctypes.c_int] * 2 + [ctypes.c_void_p] * 6
    lib.lens_emulation_seed(0)
    lib.lens_emulation_device(3, 9)
    tensors = (a, b, values, y, descriptors)
    error = lib.lens_emulation_wgmma_probe(n, in_registers, *(t.data_ptr() for t in tensors), emulator.STREAM)
    assert not error, lib.lens_emulation_message().decode()
    return y, [[d & (1 << 64) - 1 for d in row] for row in descriptors.tolist()]


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(1)).float()  # sums are exact


def product_of(y: torch.Tensor, n: int) -> torch.Tensor:
    """[64, n] of every thread's accumulators, by CuTe's map to m + 64 n."""
    out = torch.full((64 * n,), torch.nan)
    out[offsets(f"accumulators {n}").flatten()] = y.flatten()
    return out.view(n, 64).T


@pytest.mark.parametrize("n", [64, 128, 192, 224, 256])
def test_products_of_two_tiles(probe, n):
    a, b = draw(64, 64), draw(n, 64)
    padded = torch.cat([b, torch.zeros(-n % 64, 64)])  # atoms of eight rows follow each other, whatever their number
    b_image = torch.cat([image(part, "K 64") for part in padded.split(64)])
    y, descriptors = run(
        probe, n, False, image(a, "K 64"), b_image, torch.zeros(128, NUMBER_OF_STEPS, 4, dtype=torch.int32)
    )
    assert torch.equal(product_of(y, n), a @ b.T)
    expected = [int(word, 16) for word in recorded("K 128 descriptors").split()]
    assert recorded("K 128 descriptors") == recorded("K 64 descriptors")
    assert descriptors[0][:4] == descriptors[1][:4] == expected


def test_a_first_factor_in_registers_and_a_tile_as_it_lies(probe):
    """P V of attention: V [128 keys, 64 channels], P in registers."""
    p, v = draw(64, 128), draw(128, 64)
    at = offsets("A in registers")  # [128 threads, 8 values] -> m + 64 k of a step
    steps = [part.T.flatten()[at].bfloat16() for part in p.split(16, dim=1)]
    values = torch.stack(steps, 1).contiguous().view(torch.int32)
    assert values.shape == (128, NUMBER_OF_STEPS, 4)
    y, descriptors = run(probe, 64, True, torch.zeros(64 * 64, dtype=torch.bfloat16), image(v.T, "MN 64"), values)
    assert torch.equal(product_of(y, 64), p @ v)
    assert descriptors[1] == [int(word, 16) for word in recorded("MN 64 descriptors").split()]


def test_the_recorded_numbers_are_cutes(tmp_path):
    spec = importlib.util.find_spec("cutlass_library")
    folders = [pathlib.Path(f) / "source" / "include" for f in (spec.submodule_search_locations or [])] if spec else []
    nvcc = shutil.which("nvcc") or ""
    homes = [
        os.environ.get("CUDA_HOME", ""),
        "/usr/local/cuda",
        *(str(p) for p in pathlib.Path(nvcc).resolve().parents[1:2]),
    ]
    toolkits = [
        pathlib.Path(home) for home in homes if home and (pathlib.Path(home) / "include" / "cuda_bf16.h").exists()
    ]
    if not folders or not toolkits:
        pytest.skip("needs nvidia-cutlass and a CUDA toolkit")
    includes = [folders[0], toolkits[0] / "include", toolkits[0] / "include" / "cccl"]
    library = next(folder for folder in ("lib64", "lib") if (toolkits[0] / folder / "libcudart_static.a").exists())
    subprocess.run(
        ["g++", "-std=c++17", "-w", *(f"-I{folder}" for folder in includes), HERE / "cute_numbers.cpp", "-o", tmp_path / "a",
         f"-L{toolkits[0] / library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"], check=True,
    )  # fmt: skip
    told = subprocess.run([tmp_path / "a"], capture_output=True, text=True, check=True).stdout
    # CuTe says of every pointer on the host that it has no address there: descriptors are of address 0
    assert re.sub(r"ERROR: cast_smem_ptr_to_uint[^\n]*\n", "", told) == NUMBERS.read_text()
