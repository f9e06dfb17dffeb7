"""Products in clusters of two blocks that share their weight tile: the bits of single blocks, the choice, faults."""

from __future__ import annotations

import re

import pytest
import torch

from lens.ops.linear import choice as linear_choice
from lens.ops.linear import fused as linear_fused
from tests.emulation import emulator
from tests.emulation import test_linear_fused_kernels as kernels
from tests.ops.harness import same_bits

CASES = {
    "an odd number of row tiles, more steps than stages": ("linear", lambda: kernels.linear(300, 64 * 8, 192)),
    "fewer steps than stages": ("linear", lambda: kernels.linear(129, 64, 64)),
    "a second block without rows in both streams": (
        "linear_gated_residual", lambda: kernels.gated([60, 0, 5, 7], [3, 2, 0, 30], 128, 256),
    ),
    "bands of both streams, in place": (
        "linear_gated_residual", lambda: kernels.gated([400], [140], 64, 384, in_place=True),
    ),
    "heads": ("linear_qkv_norm_rope", lambda: kernels.qkv([165, 0, 70], [3, 40, 0], 64, 2)),
    "one half of each part": ("linear_swiglu", lambda: kernels.swiglu(200, 31, 64, 160)),
    "text alone": ("linear_swiglu", lambda: kernels.swiglu(0, 131, 64, 96)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_clusters_change_no_bits(emulated, monkeypatch, case):
    """One cluster that takes every tile, two, more than there are tiles."""
    kernel, made = CASES[case][0], CASES[case][1]()
    alone = kernels.run(emulated, kernel, {**made, "cluster": 1})
    assert emulated.library.lens_emulation_cluster() == 1
    for count in (2, 4, 100):
        monkeypatch.setattr(emulated, "multiprocessors", count)
        kernels.against_spec(emulated, kernel, {**made, "cluster": 2}, (0, 21, 20) if count == 4 else (3,))
        assert emulated.library.lens_emulation_cluster() == 2
        together = kernels.run(emulated, kernel, {**made, "cluster": 2})
        for name, x in alone.items():
            assert same_bits(x, together[name]), name


@pytest.mark.parametrize(
    ("rows", "multiprocessors", "chosen"),
    [(200, 4, 2), (100, 4, 1), (100, 100, 2), (200, 3, 1), (200, 1, 1)],
    ids=["two row tiles", "one row tile", "blocks to spare", "an odd multiprocessor", "no room for a cluster"],
)
def test_choice(emulated, monkeypatch, rows, multiprocessors, chosen):
    """By whole waves first, then by copies: 128 x 128 tiles ask for 256 rows of L2 alone, for 192 in a cluster."""
    monkeypatch.setattr(emulated, "multiprocessors", multiprocessors)
    kernels.against_spec(emulated, "linear", kernels.linear(rows, 64, 512), (21,))
    assert emulated.library.lens_emulation_cluster() == chosen


@pytest.mark.parametrize(("cluster", "multiprocessors"), [(2, 1), (3, 4), (-1, 4)])
def test_refusals(emulated, monkeypatch, cluster, multiprocessors):
    """What was asked for by name is not replaced."""
    monkeypatch.setattr(emulated, "multiprocessors", multiprocessors)
    with pytest.raises(emulator.EmulationError, match="error 801"):
        kernels.run(emulated, "linear", {**kernels.linear(200, 64, 64), "cluster": cluster})


@torch.no_grad()
def test_forced_from_python(emulated, monkeypatch):
    monkeypatch.setattr(linear_choice, "why_unsupported", lambda call: "")
    monkeypatch.setattr(emulated, "multiprocessors", 4)
    rows, layer = torch.randn(200, 64).bfloat16(), torch.nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)
    results = []
    for blocks in (1, 2):
        with linear_choice.use("fused"), linear_choice.in_clusters(blocks):
            results += linear_fused.linear_swiglu([rows], [layer])
        assert emulated.library.lens_emulation_cluster() == blocks
    assert same_bits(*results)


_RING = "gemm/gemm.cuh"
FAULTS = {
    "stages free when the own consumers are done": (
        "4 * Ring::kConsumers * cluster", "4 * Ring::kConsumers", "has all its . arrivals|^numbers"
    ),
    "both releases at home": ("releases ? rank ^ lane : rank", "rank", "^numbers|deadlock|has all its"),
    "a release too few": ("releases = lane < cluster", "releases = lane < 1", "deadlock.*lacks 8 arrivals"),
    "a block that leaves before the other's last arrivals": ("cluster > 1 && s", "cluster > 2 && s", "has returned"),
    "a half for the own block alone": ("full + at.stage, 3, k", "full + at.stage, 1 << rank, k", "deadlock.*bytes"),
    "the same half from both": ("rank * half_columns", "0 * half_columns", "^numbers"),
    "both halves in one place": ("rank * kHalfBytes", "0 * kHalfBytes", "^numbers"),
    "both blocks at the first one's rows": ("k, (tile.row * cluster + rank) * M", "k, tile.row * cluster * M", "^numbers"),
    "rows of the first block twice": (
        "(tile.row * cluster + rank) * M + part", "tile.row * cluster * M + part", "^numbers"
    ),
    "blocks that take turns": ("int(blockIdx.x) / cluster", "int(blockIdx.x)", "^numbers|deadlock"),
    "barriers of a block that may not have begun": (
        "    cluster_arrive();\n    cluster_wait();\n", "", "without a cluster barrier"
    ),
    "a launch without its cluster": (
        "ClusterLaunch launch(clusters * cluster, cluster,", "ClusterLaunch launch(clusters * cluster, 1,", "of a cluster of 1"
    ),
    "clusters asked for before their shared memory is allowed": (
        "  if (allow_shared<kernel>(Ring::kSharedBytes)) return 0;\n", "", "error 801"
    ),
    "half a box of columns": ("std::max(Epilogue::kParts, cluster)", "Epilogue::kParts", "leaves the block|deadlock|^numbers"),
}  # fmt: skip


def _noticed(machine: emulator.Emulator) -> list[str]:
    """Two row tiles and one, three of columns, one cluster that goes round the ring."""
    machine.multiprocessors = 2
    made, noticed = {**kernels.linear(300, 64 * 5, 192), "cluster": 2}, []
    for seed in (0, 1, 2, 4):
        try:
            kernels.against_spec(machine, "linear", made, (seed,))
        except emulator.EmulationError as error:
            noticed.append(str(error))
        except AssertionError as error:
            noticed.append(f"numbers: {error}")
    return noticed


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(name, tmp_path):
    old, new, notice = FAULTS[name]
    noticed = _noticed(emulator.mutant(tmp_path, "linear", _RING, old, new))
    assert any(re.search(notice, what) for what in noticed), noticed


def test_input_passes_without_a_fault(emulated):
    assert _noticed(emulated) == []
