"""Several processes distil as one does: three networks and a teacher, DDP, FSDP2, both; adapters; the watch."""

import numpy as np
import pytest

from tests.train import processes, small_distill
from tests.train.small_training import checkpoint_in, same
from train.loop.trainer import ALONE

# large enough that an update is the gradient's size, not its sign: a sum in another order must not turn a weight around
CHANGES = {"SLOTS": 4, "EPS": 1e-2, "TEACHER_GUIDANCE": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("teacher")
    checkpoint_in(root)
    return root


def near(found, want):
    """Names of what differs by more than sums in another order do."""
    assert found.keys() == want.keys()
    return [
        n for n in want if np.abs(found[n] - want[n]).max(initial=0) > 2e-6 * max(1, np.abs(want[n]).max(initial=0))
    ]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("world", "shard", "lora"),
    [
        pytest.param(2, 1, None, id="ddp"),
        pytest.param(2, 2, None, id="fsdp"),
        pytest.param(4, 2, None, id="hsdp"),
        pytest.param(2, 2, "r=2,alpha=4,targets=all", id="fsdp-lora"),
    ],
)
def test_processes_take_a_cycle_as_one_does(folder, tmp_path, world, shard, lora):
    """Four updates of fake score and heads, one of the student through the sharded teacher, IDA, the watch; states pass over."""
    changes = {**CHANGES, "LORA": lora} if lora else CHANGES
    want, losses, figures = small_distill.a_cycle(ALONE, folder, tmp_path / "alone", changes)
    found = processes.run(world, small_distill.a_cycle, folder, tmp_path / "many", changes, shard=shard)
    for got, own_losses, own_figures in found:
        assert near(got, want) == []
        assert own_losses == pytest.approx(losses, rel=1e-5)
        assert own_figures == found[0][2]  # all decide by one rank's numbers
    assert found[0][2].keys() == figures.keys()
    whole = {n: v for n, v in figures.items() if n not in ("backdrops", "high_frequency")}  # these count rounded pixels
    assert {n: found[0][2][n] for n in whole} == pytest.approx(whole, rel=1e-3, abs=1e-4)
    assert same(small_distill.resumed(ALONE, folder, tmp_path / "many", changes), found[0][0]) == []
