"""The seam of training: a method of two networks that learn in turn, as distillation's do, through the loop that knows none."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.train import processes
from tests.train.clocks import StopAfter
from tests.train.small_training import same, weights
from train.loop.checkpoints import Checkpoints, StateFile, save_state
from train.loop.ema import Ema
from train.loop.keys import keyed
from train.loop.log import read_log
from train.loop.method import About, Losses, Method, Network, Plan, adamw
from train.loop.trainer import ALONE, Trainer

SLOTS, TARGET = 2, torch.tensor([1.0, -0.5])


class Rivals(Method):
    """A generator towards points around TARGET by the word of a critic, which learns in two steps of three."""

    def __init__(self, group=ALONE):
        def network(name, outputs, lr, average):
            with torch.random.fork_rng():
                torch.manual_seed(keyed(0, name).initial_seed())
                module = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, outputs))
            wrapped = DistributedDataParallel(module) if group.world > 1 else module
            ema = Ema(module, 0.9) if average else None
            return Network(wrapped, adamw(dict(module.named_parameters()), lr, decay=0.01), ema)

        self.networks = {"generator": network("generator", 2, 1e-2, True), "critic": network("critic", 1, 2e-2, False)}
        self.taken, self.spoiled = 0, None

    def turn(self, step):
        return ("generator",) if step % 3 == 2 else ("critic",)

    def about(self, batch):
        return About(len(batch[1]), place=batch[0], seen={"place": list(batch[0])})

    def losses(self, batch, step):
        _, noise, real = batch
        generator, critic = (self.networks[name].module for name in ("generator", "critic"))
        if step % 3 == 2:
            loss = {"generator": F.softplus(-critic(generator(noise)))[:, 0]}
        else:
            made = generator(noise).detach()
            judged = critic(torch.cat([real, made]))
            truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(made), 1)])
            loss = {"critic": F.binary_cross_entropy_with_logits(judged, truth, reduction="none")[:, 0]}
        return {name: Losses(own * (float("nan") if step == self.spoiled else 1.0)) for name, own in loss.items()}

    def after(self, step):
        self.taken += step + 1

    def state(self):
        return {"taken": self.taken}

    def load_state(self, state):
        self.taken = state["taken"]


def batches(step, rank=0, world=1):
    while True:
        for slot in range(rank, SLOTS, world):
            draws = torch.randn(2, 4, 2, generator=keyed(1, "rivals", step, slot))
            yield (step, slot), draws[0], TARGET + 0.1 * draws[1]
        step += 1


def trainer_in(out, group=ALONE, states=None, **plan):
    out.mkdir(parents=True, exist_ok=True)
    whole = Plan("rivals", **{"steps": 7, "slots": SLOTS, "clip": 0.1, "log_every": 1, **plan})
    return Trainer(whole, Rivals(group), states or StateFile(out / "rivals.pt"), out, group)


def of(values, name):
    return {key: value for key, value in values.items() if f".{name}." in key}


def test_who_has_the_turn_learns_and_nobody_else(tmp_path):
    trainer, data = trainer_in(tmp_path), batches(0)
    for step in range(6):
        before = weights(trainer)
        found = trainer.train_step(data)
        learner, other = ("generator", "critic") if step % 3 == 2 else ("critic", "generator")
        now = weights(trainer)
        assert same(of(before, other), of(now, other)) == []
        assert len(same(of(before, learner), of(now, learner))) > 8  # weights, moments, averages
        beside = "" if learner == "generator" else "/critic"
        assert {f"loss{beside}", f"grad_norm{beside}", f"clipped{beside}"} <= found.keys()
        assert len([key for key in found if key.startswith("loss")]) == 1
    assert trainer.networks["generator"].ema.updates == 2
    assert trainer.method.taken == 1 + 2 + 3 + 4 + 5 + 6


def test_a_step_that_is_not_finite_leaves_both_as_they_are(tmp_path):
    trainer, data = trainer_in(tmp_path), batches(0)
    trainer.train_step(data)
    before, trainer.method.spoiled = weights(trainer), 1
    assert trainer.train_step(data)["broken"]
    assert same(before, weights(trainer)) == []
    assert (trainer.step, trainer.skipped, trainer.method.taken) == (2, 1, 1)
    (row,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert row["slots"] == [{"slot": 0, "place": [1, 0]}, {"slot": 1, "place": [1, 1]}]
    assert row["loss/critic"] == "nan"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_both_resume_to_the_last_bit_anywhere_in_a_turn(tmp_path, kind):
    def run(name, *stops):
        for stop in stops:
            out = tmp_path / name
            trainer = trainer_in(out, states=Checkpoints(out / "checkpoints", ALONE) if kind == "folder" else None)
            if (latest := trainer.states.latest()) is not None:
                trainer.resume(latest)
            done = trainer.run(batches(trainer.step), StopAfter(stop))
        assert done
        return trainer

    whole, parts = run("whole", 99), run("parts", 1, 3, 99)
    assert whole.step == parts.step == 7
    assert same(weights(whole), weights(parts)) == []
    assert whole.method.taken == parts.method.taken == 28
    rows = [
        [{k: v for k, v in row.items() if "loss" in k} for row in read_log(tmp_path / n / "log.jsonl")]
        for n in ("whole", "parts")
    ]
    assert rows[0] == rows[1]
    assert [sorted(row) for row in rows[0][:3]] == [["loss/critic"], ["loss/critic"], ["loss"]]


def six_steps(group, out):
    trainer = trainer_in(out, group, states=Checkpoints(out / "checkpoints", group))
    data = batches(0, group.rank, group.world)
    for _ in range(6):
        trainer.train_step(data)
    return weights(trainer)


def test_two_processes_take_the_steps_of_one(tmp_path):
    alone = six_steps(ALONE, tmp_path / "alone")
    one, two = processes.run(2, six_steps, tmp_path / "both", shard=1)
    assert same(one, two) == []
    assert one.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(one[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_state_of_the_format_before_is_taken_up(tmp_path):
    """Moments numbered as torch does, in the order of the groups; what had no gradient yet had none."""
    module = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1)})
    named = dict(module.named_parameters())
    old = adamw(named, 1e-2, decay=0.01)
    old.state.clear()
    module["a"](torch.ones(1, 2)).sum().backward()
    old.step()
    ema = Ema(module, 0.9)
    ema.update(module)
    kept = {"updates": ema.updates, "decay": 0.9, "average": ema.average}
    state = {"stage": "x", "step": 5, "model": module.state_dict(), "optimizer": old.state_dict(), "ema": kept}
    save_state(tmp_path / "x.pt", state)

    class One(Method):
        def __init__(self):
            fresh = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1)})
            self.networks = {
                "x": Network(fresh, adamw(dict(fresh.named_parameters()), 1e-2, decay=0.01), Ema(fresh, 0.9))
            }

    trainer = Trainer(Plan("x", 9), One(), StateFile(tmp_path / "x.pt"), tmp_path)
    trainer.resume(tmp_path / "x.pt")
    network = trainer.networks["x"]
    assert (trainer.step, network.ema.updates) == (5, 1)
    for name, p in network.parameters.items():
        assert torch.equal(p, named[name])
        assert torch.equal(network.ema.average[name], ema.average[name])
        held = old.state.get(named[name])
        for key, value in network.optimizer.state[p].items():
            assert torch.equal(value, held[key]) if held else not value.any(), (name, key)
    assert trainer.networks["x"].optimizer.state[network.parameters["a.weight"]]["step"] == 1
