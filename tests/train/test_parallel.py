"""Several processes take the step that one takes, and their states are each other's."""

import argparse

import numpy as np
import pytest
import torch

import lens.formats.lora
from tests.train import processes, small_training
from tests.train.small_training import distance, same
from train import pretrain_on_shards as flow
from train.loop import ranks
from train.loop.ranks import Ranks
from train.objectives.flow_matching import REDUCTIONS

ALONE = Ranks(torch.device("cpu"))
LAYOUTS = [  # processes, ranks that share one copy of the state
    pytest.param(2, 1, id="ddp-2x4"),
    pytest.param(2, 2, id="fsdp-2x4"),
    pytest.param(3, 3, id="fsdp-uneven"),  # slots 0 to 7: 3, 3 and 2
    pytest.param(8, 1, id="ddp-8x1", marks=pytest.mark.nightly),
    pytest.param(8, 8, id="fsdp-8x1", marks=pytest.mark.nightly),
    pytest.param(4, 2, id="hsdp-4x2", marks=pytest.mark.nightly),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return small_training.three_gradients(ALONE, tmp_path_factory.mktemp("alone"), REDUCTIONS)


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """Of one process: eight micro-batches a step, clipped, AdamW, averages."""
    return small_training.steps_and_save(ALONE, tmp_path_factory.mktemp("steps"), 4)


@pytest.mark.parametrize(("world", "shard"), LAYOUTS)
def test_eight_slots_give_one_gradient_whoever_computes_them(world, shard, alone, tmp_path):
    """Three reductions over buckets of unequal size: 8 accumulated = 2 x 4 = 8 x 1. The norm over shards is the whole's."""
    found = processes.run(world, small_training.gradients_and_norms, tmp_path, list(REDUCTIONS), shard=shard)
    for rank, norms in found:
        assert norms == pytest.approx((norms[1], norms[1]), rel=1e-6)
        for (gradient, loss, norm), (want, value, length) in zip(rank, alone, strict=True):
            assert distance(gradient, want) < 1e-6
            assert loss == pytest.approx(value, rel=1e-6)
            assert norm == pytest.approx(length, rel=1e-6)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Two ranks that share one copy of the state: four steps, saved."""
    out = tmp_path_factory.mktemp("sharded")
    return out, processes.run(2, small_training.steps_and_save, out, 4)


def test_a_sharded_training_is_the_whole_one(sharded, four_steps):
    """FSDP2 on two ranks: weights, averages, moments after four steps with clip."""
    (found, losses), (other, _) = sharded[1]
    assert same(found, other) == []
    assert losses == pytest.approx(four_steps[1], rel=1e-6)
    moved = {n: v for n, v in found.items() if np.abs(v).max() > 0}
    assert len(moved) > 0.9 * len(found)
    for name in moved:
        # Adam's quotient is noise where the gradient is: weights are compared by their own size
        assert np.abs(found[name] - four_steps[0][name]).max() <= 1e-6 * max(1, np.abs(four_steps[0][name]).max()), name


def test_states_pass_between_two_processes_one_and_two_again(sharded, tmp_path):
    """The tensors to the last bit; the steps after them up to the order of sums."""
    out, ((want, _), _) = sharded
    before, after, losses = small_training.resume_and_go_on(ALONE, out, 2, tmp_path)
    assert same(want, before) == []
    ((again, sharded_losses), _) = processes.run(2, small_training.resume_both, tmp_path, out)
    assert same(after, again) == []
    assert sharded_losses == pytest.approx(losses, rel=1e-5)


def test_where_the_data_of_one_process_ends_all_save_the_whole_steps(sharded, tmp_path):
    (first, found), (second, other) = processes.run(2, small_training.data_ends_for_one, tmp_path, shard=2)
    end = "; step 2 is saved, the same command goes on from there"
    assert second == f"a.tar: No such file or directory, asked for member b{end}"
    assert first == f"the data of another process ended{end}"
    assert same(found, other) == []
    before, after, _ = small_training.resume_and_go_on(ALONE, tmp_path, 2)
    assert same(found, before) == []
    for name, value in sharded[1][0][0].items():  # of four steps that nothing ended
        assert np.abs(after[name] - value).max() <= 1e-6 * max(1, np.abs(value).max()), name


@pytest.mark.nightly
def test_a_state_of_two_processes_is_loaded_by_four(sharded):
    out, ((want, _), _) = sharded
    for shard in (4, 2):
        for before, _, _ in processes.run(4, small_training.resume_and_go_on, out, 1, shard=shard):
            assert same(want, before) == []


def test_bfloat16_sharded_is_bfloat16_whole(tmp_path):
    """Weights gathered in bfloat16, gradients summed in float32 into float32 masters: one rounding, whoever does it."""
    rounded = {"COMPUTE": "bfloat16"}
    gradient, want, losses = small_training.gradient_and_steps(ALONE, tmp_path / "alone", rounded)
    exact, whole, whole_losses = small_training.gradient_and_steps(ALONE, tmp_path / "exact", {})
    own = {name: distance({name: gradient[name]}, {name: exact[name]}) for name in exact}
    assert np.median(list(own.values())) > 1e-3  # bfloat16 indeed
    moved = {name: np.linalg.norm(want[name] - whole[name]) for name in want if name.startswith(("model.", "ema."))}
    for got, after, got_losses in processes.run(
        2, small_training.gradient_and_steps, tmp_path / "both", rounded, shard=2
    ):
        assert {value.dtype for value in after.values()} == {np.dtype(np.float32)}
        assert got.keys() == gradient.keys()
        for name in got:  # before the time's embedding, too, where all blocks' gradients meet
            assert distance({name: got[name]}, {name: gradient[name]}) <= 1e-6, name
        assert got_losses[0] == pytest.approx(losses[0], rel=1e-6)
        assert np.abs(np.subtract(got_losses, losses)).max() <= np.abs(np.subtract(losses, whole_losses)).max()
        # a later sum that differs in its last digit may round a weight the other way
        assert sum(np.linalg.norm(after[n] - want[n]) for n in moved) <= 0.5 * sum(moved.values())


ADAPTERS = {"LORA": "r=3,alpha=6,targets=all"}  # a rank that does not divide among the shards
UNREAD = ("transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.txt_mlp")  # the end of the last block's text


@pytest.fixture(scope="module")
def adapters_alone(tmp_path_factory):
    """A checkpoint to start from; the state of one process after four steps, what is in it, and after another step."""
    init = small_training.checkpoint_in(tmp_path_factory.mktemp("checkpoint"))
    out = tmp_path_factory.mktemp("adapters")
    held = small_training.steps_and_save(ALONE, out, 4, init, ADAPTERS)
    return init, out, held, small_training.resume_and_go_on(ALONE, out, 1, None, init, ADAPTERS)


def exported(out, to):
    """The pairs of the peft folder that one process writes of a state."""
    flow.export(argparse.Namespace(out=out, resume=None, export=to), small_training.recipe(**ADAPTERS))
    return lens.formats.lora.read(to / "lora").pairs


@pytest.mark.parametrize(("world", "shard"), LAYOUTS)
def test_adapters_train_alike_however_they_are_laid(world, shard, adapters_alone, tmp_path):
    """Four steps of each; a state of one process goes on elsewhere, and theirs on one; peft's names from both."""
    init, alone, (want, losses), further = adapters_alone
    out = tmp_path / "out"
    found = processes.run(world, small_training.adapters_both_ways, out, init, ADAPTERS, alone, shard=shard)
    for (own, their_losses), (before, after, after_losses) in found:
        assert their_losses == pytest.approx(losses, rel=1e-6)
        assert own.keys() == want.keys()
        for name in own:
            near = 1e-6 * max(1, np.abs(want[name]).max()) if ".down." in name or ".up." in name else 0
            assert np.abs(own[name] - want[name]).max() <= near, name  # what is frozen has not moved by a bit
        assert same(before, want) == []
        assert after_losses == pytest.approx(further[2], rel=1e-5)
        moved = [name for name in after if name.startswith("model.") and not np.array_equal(after[name], want[name])]
        assert len(moved) == len([name for name in want if name.startswith("ema.")])
    before, _, _ = small_training.resume_and_go_on(ALONE, out, 1, None, init, ADAPTERS)
    assert same(before, found[0][0][0]) == []
    ours, theirs = exported(alone, tmp_path / "a"), exported(out, tmp_path / "b")
    assert len(ours) == len(theirs) == 2 * 10
    for module, pair in ours.items():
        assert torch.allclose(pair.up, theirs[module].up, rtol=0, atol=1e-6)
        assert torch.allclose(pair.down, theirs[module].down, rtol=0, atol=1e-6)
        assert bool(pair.up.any()) is not module.startswith(UNREAD), module


@pytest.mark.parametrize("shard", [1, 2])
def test_adapters_beside_weights_in_bfloat16_train_alike(shard, adapters_alone, tmp_path):
    """What is frozen is bfloat16 in units whose adapters are float32 masters; neither its bits nor their type change."""
    rounded, (init, *_) = {**ADAPTERS, "COMPUTE": "bfloat16"}, adapters_alone
    want, losses = small_training.steps_and_save(ALONE, tmp_path / "alone", 4, init, rounded)
    for got, own in processes.run(2, small_training.steps_and_save, tmp_path / "two", 4, init, rounded, shard=shard):
        assert own == pytest.approx(losses, rel=1e-6)
        for name, value in got.items():
            adapter = ".down." in name or ".up." in name
            assert value.dtype == (np.float32 if adapter else np.uint16), name
            assert np.abs(value - want[name]).max() <= (1e-6 if adapter else 0), name


def test_shards_that_do_not_divide_the_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="--shard: 3 does not divide the 4 processes"), ranks.join("cpu", 3):
        pass
