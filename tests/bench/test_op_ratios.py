"""The CPU kernels' promise, as ratios inside one run: faster than the eager specification, within 1.3x of Inductor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.ops import GOAL

ROOT = Path(__file__).parents[2]
FUSED = (
    "rms_norm_modulate",
    "qk_norm_rope",
    "gated_residual",
    "gated_residual_norm_modulate",
    "swiglu",
    "guidance_step",
)


def ratios(names: list[str]) -> dict[str, tuple[float, float]]:
    """Best times taken in turns, one thread, float32, forward; in a process of its own, for it tunes the allocator."""
    picks = [argument for name in names for argument in ("--op", name)]
    command = [sys.executable, "-m", "bench.ops", *picks, "--dtype", "fp32", "--pass", "forward"]
    done = subprocess.run(
        [*command, "--threads", "1", "--seconds", "1.5"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    return {row["op"]: (row["of_eager"], row["of_inductor"]) for row in rows}


@pytest.mark.timing
def test_float32_kernels_beat_eager_and_reach_inductor():
    """A shared machine may disturb one run, hardly three in a row: the best ratio of each op counts."""
    late, seen = list(FUSED), {}
    for _ in range(3):
        seen |= ratios(late)
        late = [name for name in late if seen[name][0] >= 1 or seen[name][1] > GOAL]
        if not late:
            return
    pytest.fail(f"time over eager, over Inductor: { ({name: seen[name] for name in late}) }")
