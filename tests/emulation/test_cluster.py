"""Blocks of a cluster under emulation: a small kernel that shares tiles between two, and faults planted in it."""

from __future__ import annotations

import ctypes
import pathlib
import re

import pytest
import torch

from tests.emulation import emulator

PROBE = pathlib.Path(__file__).with_name("cluster_probe.cu")
SEEDS = (0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def probe():
    return emulator.Emulator(emulator.build(emulator.SOURCE, probe=PROBE))


def _run(machine: emulator.Emulator, steps: int, clusters: int = 2, cluster: int = 2, blocks: int = 0) -> None:
    """One launch; AssertionError: y is not what it should be. EmulationError: the launch failed."""
    blocks = blocks or 2 * clusters
    clusters = (blocks + 1) // 2
    draw = torch.Generator().manual_seed(steps)
    a = torch.randn(clusters, steps, 16, 64, generator=draw).bfloat16()
    x = torch.randn(clusters, 2, steps, 8, 64, generator=draw).bfloat16()
    y = torch.empty(clusters, 2, steps, 24, 64, dtype=torch.bfloat16)
    lib = machine.library
    lib.lens_emulation_cluster_probe.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    places = []
    for name, tensor in (("a", a), ("x", x), ("y", y)):
        places.append(lib.lens_emulation_allocate(name.encode(), tensor.nbytes, 0))
        if name != "y":
            ctypes.memmove(places[-1], tensor.data_ptr(), tensor.nbytes)
    lib.lens_emulation_seed(machine.seed)
    lib.lens_emulation_device(4, 9)
    error = lib.lens_emulation_cluster_probe(*places, blocks, cluster, steps, emulator.STREAM)
    ctypes.memmove(y.data_ptr(), places[2], y.nbytes)
    touched = [lib.lens_emulation_free(place) for place in places]
    if error:
        raise emulator.EmulationError(f"error {error}: {lib.lens_emulation_message().decode()}")
    assert touched == [0, 0, 0]
    assert torch.equal(y, torch.cat([a[:, None].expand(-1, 2, -1, -1, -1), x], dim=3)), "numbers"


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 11])
def test_blocks_share_a_tile(probe, steps):
    """Fewer steps than stages, as many, more."""
    for probe.seed in SEEDS:
        _run(probe, steps)


@pytest.mark.parametrize(("blocks", "cluster"), [(3, 2), (4, 3), (4, 0), (16, 16)])
def test_clusters_a_device_would_refuse(probe, blocks, cluster):
    with pytest.raises(emulator.EmulationError, match=r"error 912: .* in clusters of"):
        _run(probe, 1, cluster=cluster, blocks=blocks)


def test_a_launch_without_its_cluster(probe):
    """The kernel means a second block; alone it has none."""
    with pytest.raises(emulator.EmulationError, match=r"in block 1 of a cluster of 1|blocks 0x3 of a cluster of 1"):
        _run(probe, 4, cluster=1)


FAULTS = {
    "a stage written before the other block released it": ("kReleases = 2;", "kReleases = 1;", "^numbers"),
    "releases that stay at home": ("rank ^ (lane & 1)", "rank", "has all its 2 arrivals|deadlock.*lacks|^numbers"),
    "one release too few": ("lane < kReleases", "lane < 1", "deadlock.*lacks 1 arrivals"),
    "a release of no block": ("rank ^ (lane & 1)", "rank + (lane & 1)", "in block 2 of a cluster of 2"),
    "a block that leaves while its stages are released": (
        "i < steps + kStages; ++i", "i < steps; ++i", "arrives at a barrier of block ., which has returned"
    ),
    "a block that leaves while the other sends": (
        "  if (threadIdx.x < 32) {", "  if (rank == 1) return;\n  if (threadIdx.x < 32) {",
        "under way when the block ends",
    ),
    "a block that never comes": (
        "  if (threadIdx.x < 32) {", "  if (rank == 1) return;\n  if (threadIdx.x < 32) {",
        "a copy to block 1, which has returned",
    ),
    "half a tile for one block alone": ("full + s, 3, 0, half", "full + s, 1 << rank, 0, half", "deadlock.*1024 bytes"),
    "half a tile for the other block alone": (
        "full + s, 3, 0, half", "full + s, 1 << (rank ^ 1), 0, half", "deadlock.*1024 bytes|^numbers"
    ),
    "a mask beyond the cluster": ("full + s, 3, 0, half", "full + s, 7, 0, half", "blocks 0x7 of a cluster of 2"),
    "a mask of nobody": ("full + s, 3, 0, half", "full + s, 0, 0, half", "blocks 0 of a cluster of 2"),
    "bytes of one half alone": ("(full + s, kStageBytes)", "(full + s, kStageBytes - kHalfBytes)", "deadlock|^numbers"),
    "bytes of three halves": ("(full + s, kStageBytes)", "(full + s, kStageBytes + kHalfBytes)", "deadlock|^numbers"),
    "both halves in one place": ("to + rank * kHalfBytes", "to", "^numbers"),
    "the same half twice": ("+ i) * 2 + rank", "+ i) * 2", "^numbers"),
    "no barrier before the other block is used": ("  cluster_arrive();\n  cluster_wait();\n", "", "without a cluster barrier"),
    "nobody waits at the cluster's barrier": ("  cluster_wait();\n", "", "without a cluster barrier"),
    "no fence after barriers are made": ("    fence_barrier_init();\n", "", "without fence_barrier_init"),
    "two arrivals without a wait": ("  cluster_wait();\n", "  cluster_arrive();\n", "arrives twice at the cluster"),
    "a wait without arrival": ("  cluster_arrive();\n", "", "never arrived"),
    "a barrier that half a warp reaches": (
        "  cluster_arrive();\n", "  if (lane < 16) cluster_arrive();\n", "deadlock|waits at line"
    ),
    "static shared memory, which the emulator has once": (
        "    fence_barrier_init();\n",
        "    __shared__ int made;\n    made = steps;\n    if (made != steps) return;\n    fence_barrier_init();\n",
        "static __shared__ array",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(name, tmp_path):
    old, new, notice = FAULTS[name]
    text = PROBE.read_text()
    assert text.count(old) == 1, f"the probe must hold {old!r} once"
    planted = tmp_path / PROBE.name
    planted.write_text(text.replace(old, new))
    mutant = emulator.Emulator(emulator.build(emulator.SOURCE, probe=planted))
    noticed = []
    for mutant.seed in SEEDS:
        for steps in (1, 7):
            try:
                _run(mutant, steps)
            except (emulator.EmulationError, AssertionError) as error:
                noticed.append(str(error))
    assert any(re.search(notice, what) for what in noticed), noticed
