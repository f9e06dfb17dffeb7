"""The same seeds give the recorded losses, stage by stage; tests/train/golden_losses.py says of what and records them."""

import json

import pytest

from . import golden_losses

STORED = json.loads(golden_losses.GOLDEN.read_text())


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    return golden_losses.all_losses(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("stage", STORED)
def test_the_losses_of_a_stage_are_those_recorded(losses, stage):
    assert losses.keys() == STORED.keys()
    # Sums may be ordered otherwise by another processor, and by a library of another version. The same tree on AVX2 and on
    # AVX-512, where steps of Adam multiply it: at most 9e-4 in the three stages of convolutions, 4e-5 in the pool, whose
    # features are bfloat16, below 1e-6 in all others.
    limit = {"vae decoder": 2e-3, "vae encoder": 2e-3, "detector": 2e-3, "pool": 2e-4}.get(stage, 1e-5)
    assert losses[stage] == pytest.approx(STORED[stage], rel=limit)
