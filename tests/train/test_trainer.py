"""The training loop: its reductions against a loss written anew, steps that are not finite, states, stops."""

import dataclasses
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lens.config import LensConfig
from lens.model import LensTransformer2DModel
from lens.packing import plan
from tests.train import processes, small_training
from tests.train.small_training import batches, distance, micro, same, state_of, the_network, trainer_on, weights
from train.data.loader import Skip
from train.loop.checkpoints import Checkpoints, Damaged
from train.loop.clock import Clock, Interrupted
from train.loop.log import JsonLog
from train.loop.ranks import Ranks, bare
from train.loop.trainer import Trainer
from train.objectives.flow_matching import REDUCTIONS
from train.objectives.velocity import noise, times
from train.pretrain_on_shards import names_in_a_state

ALONE = Ranks(torch.device("cpu"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Gradient, loss and norm of one step by one process, for each reduction."""
    return dict(zip(REDUCTIONS, small_training.three_gradients(ALONE, tmp_path_factory.mktemp("alone"), REDUCTIONS)))


def independent(trainer, reduction):
    """The loss of step 0 written from its definition, through the model of `lens.model`, all slots in one graph."""
    settings, config = trainer.method.recipe, LensConfig(**trainer.method.recipe.MODEL)
    model = LensTransformer2DModel(config).double().train()
    model.load_state_dict(bare(the_network(trainer).module).state_dict())
    total, denominator = 0.0, 0.0
    for slot in range(8):
        batch = micro(0, slot)
        t, eps = times(settings, batch).double(), noise(settings, batch).double()
        x0, count, tokens = batch.latents.double(), len(batch.lengths), batch.bucket.tokens
        x = (1 - t)[:, None, None] * x0 + t[:, None, None] * eps
        packing = plan([batch.bucket.grid] * count, batch.lengths, config.axes_dims_rope)
        packing = dataclasses.replace(packing, cos=packing.cos.double(), sin=packing.sin.double())
        text = model.project_text(list(batch.features.double().unbind(1)), batch.lengths)
        v = model.denoise(x.flatten(0, 1), text, model.modulate(t), packing).view_as(x)
        if reduction == "rank_mean":
            total, denominator = total + F.mse_loss(v, eps - x0), denominator + 1
        elif reduction == "sample_mean":
            total = total + sum(F.mse_loss(v[i], eps[i] - x0[i]) for i in range(count))
            denominator += count
        else:
            total = total + (v - (eps - x0)).pow(2).sum() / config.in_channels
            denominator += count * tokens
    loss = total / denominator
    loss.backward()
    return {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}, loss.item()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_each_reduction_is_its_definition(alone, reduction, tmp_path):
    gradient, loss, norm = alone[reduction]
    want, value = independent(trainer_on(ALONE, tmp_path), reduction)
    want = {n: g for n, g in want.items() if n in gradient}
    assert distance(gradient, want) < 1e-4  # float32 against float64
    assert loss == pytest.approx(value, rel=1e-5)
    assert norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in want.values())), rel=1e-5)


def test_the_reductions_differ(alone):
    gradients = [alone[r][0] for r in REDUCTIONS]
    assert min(distance(gradients[0], gradients[1]), distance(gradients[1], gradients[2])) > 0.01


def test_every_picture_has_noise_and_a_time_of_its_own():
    settings = small_training.recipe()
    seen = [micro(step, slot) for step in range(2) for slot in range(8)]
    drawn = [tuple(n.flatten()[:4].tolist()) for batch in seen for n in noise(settings, batch)]
    clocks = [t for batch in seen for t in times(settings, batch).tolist()]
    assert len(set(drawn)) == len(drawn) == len(clocks) == len(set(clocks))
    assert torch.equal(noise(settings, micro(1, 3)), noise(settings, micro(1, 3)))


def test_times_follow_the_recipe():
    """logit t ~ N(mu(n), sigma^2), by quantiles where they are stratified."""
    settings = small_training.recipe(MU=((16, 0.5), (64, 0.74)), TIME_SIGMA=2.0, TIME_STRATIFIED=True)
    batch = dataclasses.replace(micro(0, 0), lengths=[0] * 512)
    z = (torch.logit(times(settings, batch).double()) - 0.5) / 2.0
    assert sorted((torch.special.ndtr(z) * 512).floor().int().tolist()) == list(range(512))
    settings.TIME_STRATIFIED = False
    free = (torch.logit(times(settings, batch).double()) - 0.5) / 2.0
    assert abs(free.mean().item()) < 0.2
    assert abs(free.std().item() - 1) < 0.15
    wide = dataclasses.replace(batch, bucket=small_training.BUCKETS[2])
    moved = torch.logit(times(settings, wide).double()) - torch.logit(times(settings, batch).double())
    assert torch.allclose(moved, torch.full_like(moved, 0.24 * (36 - 16) / 48), atol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing_and_is_told(tmp_path):
    def spoil(batch):
        if batch.step in (1, 2) and batch.slot == 5:
            batch.latents[0, 0, 0] = float("nan") if batch.step == 1 else 1e38

    trainer, data = trainer_on(ALONE, tmp_path), batches(0, 0, 1, spoil=spoil)
    assert not trainer.train_step(data)["broken"]
    before, updates = weights(trainer), the_network(trainer).ema.updates
    for _ in range(2):
        assert trainer.train_step(data)["broken"]
    assert same(before, weights(trainer)) == []
    assert (trainer.step, trainer.skipped, the_network(trainer).ema.updates) == (3, 2, updates)
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert [slot["slot"] for slot in rows[0]["slots"]] == list(range(8))
    assert rows[0]["slots"][5]["keys"] == list(micro(1, 5).keys)
    assert not trainer.train_step(data)["broken"]
    assert same(before, weights(trainer)) != []
    assert trainer.skipped_in_a_row == 0


def test_too_many_of_them_end_the_training(tmp_path):
    def spoil(batch):
        batch.latents[:] = float("inf")

    trainer, data = trainer_on(ALONE, tmp_path, SKIP_LIMIT=3), batches(0, 0, 1, spoil=spoil)
    for _ in range(2):
        trainer.train_step(data)
    with pytest.raises(FloatingPointError, match="at step 2, not finite for 3 steps in a row"):
        trainer.train_step(data)


def test_where_the_data_ends_whole_steps_are_saved_and_nothing_else(tmp_path):
    told, _ = small_training.data_ends_for_one(ALONE, tmp_path / "ends")
    said = "a.tar: No such file or directory, asked for member b"
    assert told == f"{said}; step 2 is saved, the same command goes on from there"
    assert state_of(tmp_path / "ends")["step"] == 2
    whole, _ = small_training.steps_and_save(ALONE, tmp_path / "whole", 4)
    _, after, _ = small_training.resume_and_go_on(ALONE, tmp_path / "ends", 2)
    assert same(whole, after) == []
    fresh = trainer_on(ALONE, tmp_path / "fresh")
    data = batches(0, 0, 1, spoil=lambda batch: small_training.ending(batch, 0, 0))
    with pytest.raises(Interrupted, match=f"^{said}$"):  # nothing to save yet
        fresh.run(data, Clock(None))
    assert fresh.states.latest() is None


def test_damaged_members_are_named_and_too_many_end_the_training(tmp_path):
    def spoil(batch):
        if batch.slot == 3:
            batch.skipped = (Skip(f"bad-{batch.step % 4}", "its .png is not what was written"),)

    trainer = trainer_on(ALONE, tmp_path, DAMAGED_LIMIT=0.05, LOG_EVERY=1, STEPS=40)
    with pytest.raises(
        Interrupted, match=r"^pretrain: 10 of 171 members could not be used, 5\.8%, where 5\.0% are allowed; "
    ):
        trainer.run(batches(0, 0, 1, spoil=spoil), Clock(None))
    assert state_of(tmp_path)["step"] == trainer.step == 10
    rows = [json.loads(line) for line in (tmp_path / "damaged.jsonl").read_text().splitlines()]
    assert [(row["step"], row["key"]) for row in rows] == [(step, f"bad-{step}") for step in range(4)]  # each once
    assert {row["reason"] for row in rows} == {"its .png is not what was written"}
    allowed = trainer_on(ALONE, tmp_path / "allowed", DAMAGED_LIMIT=0.06, STEPS=12)
    assert allowed.run(batches(0, 0, 1, spoil=spoil), Clock(None))


def test_data_of_another_place_is_refused(tmp_path):
    trainer = trainer_on(ALONE, tmp_path)
    with pytest.raises(RuntimeError, match=r"the data is at step, slot \(1, 0\), the training at \(0, 0\)"):
        trainer.train_step(batches(1, 0, 1))
    with pytest.raises(ValueError, match="8 micro-batches are fewer than the 9 processes"):
        Trainer(trainer.plan, trainer.method, None, tmp_path, Ranks(torch.device("cpu"), 0, 9))


@pytest.fixture(scope="module")
def saved_alone(tmp_path_factory):
    """Four steps at once; and after two of them a state."""
    out = tmp_path_factory.mktemp("resume")
    whole = small_training.steps_and_save(ALONE, out / "whole", 4)
    half = small_training.steps_and_save(ALONE, out / "half", 2)
    return out, whole, half


def test_a_resumed_training_is_the_same_to_the_last_bit(saved_alone):
    """In a process of its own: weights, averages, moments and losses (R0)."""
    out, (want, losses), (saved, _) = saved_alone
    ((before, after, rest),) = processes.run(1, small_training.resume_and_go_on, out / "half", 2)
    assert same(saved, before) == []
    assert same(want, after) == []
    assert rest == losses[2:]


def test_a_state_says_what_made_it(saved_alone):
    state = state_of(saved_alone[0] / "half")
    assert (state["stage"], state["step"], state["world"]) == ("pretrain", 2, 1)
    assert state["ema_updates"] == {"model": 2}
    assert state["settings"]["LR"] == 1e-2
    assert state["data"] == {"step": 2}
    assert set(state["revision"]) <= set("0123456789abcdef+")


def test_a_state_of_another_stage_is_refused(saved_alone, tmp_path):
    trainer = trainer_on(ALONE, tmp_path)
    trainer.plan = dataclasses.replace(trainer.plan, stage="mixed_resolution")
    with pytest.raises(ValueError, match=r"a state of stage 'pretrain', expected 'mixed_resolution'; --init takes"):
        trainer.resume(saved_alone[0] / "half" / "checkpoints" / "step_0000002")


@pytest.mark.parametrize(("which", "kind"), [("raw", "model"), ("average", "ema")])
def test_init_takes_the_weights_that_are_asked_for(which, kind, saved_alone, tmp_path, monkeypatch):
    model = small_training.model_on(ALONE, small_training.recipe())
    state = saved_alone[0] / "half" / "checkpoints" / "step_0000002"
    Checkpoints(tmp_path, ALONE).load(state, names_in_a_state(model, which))
    monkeypatch.setattr(small_training, "model_on", lambda *_: model)
    trainer = trainer_on(ALONE, tmp_path)
    saved, now = saved_alone[2][0], weights(trainer)
    names = [n.removeprefix("ema.") for n in saved if n.startswith("ema.")]
    for name in names:
        assert np.array_equal(now[f"model.{name}"], saved[f"{kind}.{name}"]), name
        assert np.array_equal(now[f"ema.{name}"], saved[f"{kind}.{name}"]), name
    assert any(not np.array_equal(saved[f"model.{name}"], saved[f"ema.{name}"]) for name in names)
    assert (trainer.step, the_network(trainer).ema.updates) == (0, 0)
    assert not any(now[name].any() for name in now if name.startswith("optimizer."))


def test_a_kill_during_a_save_leaves_a_loadable_latest(tmp_path):
    out, mark = tmp_path / "run", tmp_path / "mark"
    (process,), _ = processes.start(1, small_training.hang_in_the_second_save, out, mark)
    wait_for(mark.exists, process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [p.name for p in (out / "checkpoints").glob(".step*")] == [".step_0000002.part"]
    assert state_of(out)["step"] == 1
    trainer = trainer_on(ALONE, out)  # which clears away what was left
    trainer.resume(trainer.states.latest())
    assert trainer.step == 1
    assert list((out / "checkpoints").glob(".step*")) == []


def saved_states(out, *steps, keep_last=2, keep_every=0, then=()):
    """States of these steps, one after another; then from the state of a step on those of other steps. One number is in each."""
    states = Checkpoints(out, ALONE, keep_last, keep_every)
    for first, own in ((None, steps), *then):
        if first is not None:
            states.go_on_from(out / f"step_{first:07d}")
        for step in own:
            states.save(step, {"x": torch.tensor([float(step)])}, {"stage": "s"})
            states.wait()
    return states


def left(states):
    return [int(path.name[5:]) for path in states.states()]


def test_as_many_states_stay_as_asked_for_of_the_branch_that_is_trained(tmp_path):
    assert left(saved_states(tmp_path / "a", 2, 4, 6, 8)) == [8, 6]
    assert left(saved_states(tmp_path / "b", 2, 4, 6, 8, keep_every=4)) == [8, 6, 4]
    states = saved_states(tmp_path / "c", 2, 4, 6, 8, keep_last=3, then=[(4, [5])])
    assert left(states) == [8, 6, 5, 4]  # 4, which 5 came from, not one of the other branch in its place
    assert [path.name for path in states.branch()] == ["step_0000005", "step_0000004"]
    assert left(saved_states(tmp_path / "c", then=[(5, [7])])) == [8, 7, 5]  # 6 is behind
    assert left(saved_states(tmp_path / "c", then=[(7, [8])])) == [8, 7]  # in the place of the other 8


@pytest.mark.parametrize("damage", ["a tensor's file", "state.json", "folder", "latest"])
def test_a_damaged_or_missing_newest_state_falls_back_to_the_last_whole_one(damage, tmp_path):
    states, said, x = saved_states(tmp_path, 2, 4, 6, keep_last=3), [], torch.zeros(1)
    newest = tmp_path / "step_0000006"
    if damage == "folder":
        shutil.rmtree(newest)
    elif damage == "latest":
        (tmp_path / "latest").unlink()
    else:
        file = newest / "state.json" if damage == "state.json" else next(newest.glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    state = states.last_whole(None, lambda folder: states.load(folder, {"x": x}), said.append)
    step = 6 if damage == "latest" else 4
    assert (state["step"], x.item()) == (step, step)
    assert len(said) == (damage != "latest")
    if damage == "folder":
        assert said == [f"{newest}: the newest state is missing"]
    elif said:
        assert str(newest) in said[0]
        assert said[0].endswith("; going back to step_0000004")
        with pytest.raises(Damaged, match="step_0000006"):  # asked for by name, it is not passed over
            states.last_whole(newest, lambda folder: states.load(folder, {"x": x}), said.append)
        # trained on from there, the whole one stays as long as the damaged one
        states.go_on_from(tmp_path / "step_0000004")
        states.keep_last = 2
        states.save(5, {"x": x}, {"stage": "s"})
        states.wait()
        assert left(states) == [6, 5, 4]


def test_no_whole_state_is_an_error_and_no_fresh_start(tmp_path):
    states = saved_states(tmp_path, 2)
    (tmp_path / "step_0000002" / "state.json").unlink()
    with pytest.raises(Damaged, match="step_0000002: no state of a training here, or only the first part of one"):
        states.last_whole(None, lambda folder: states.load(folder, {}), print)
    assert states.latest() == tmp_path / "step_0000002"


def wait_for(true, process, seconds=600):
    end = time.monotonic() + seconds
    while not true():
        assert process.exitcode is None
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("kept", [(), (signal.SIGTERM,)], ids=["", "blocked by whoever started it"])
def test_sigterm_saves_and_ends_well(tmp_path, kept):
    (process,), results = processes.start(1, small_training.train_until_told, tmp_path, kept)
    wait_for(lambda: (tmp_path / "log.jsonl").is_file() and (tmp_path / "log.jsonl").read_bytes(), process)
    os.kill(process.pid, signal.SIGTERM)
    _, step = results.get(timeout=600)
    process.join()
    assert process.exitcode == 0
    assert state_of(tmp_path)["step"] == step > 0


def test_what_a_person_watches(tmp_path, monkeypatch):
    sheets = []
    parts = {"flops": lambda batch: 1e6}
    parts["sheet"] = lambda path: sheets.append((path.name, weights(trainer)["model.image_in.weight"]))
    trainer = trainer_on(ALONE, tmp_path, None, parts, 1e9, LOG_EVERY=3, STEPS=6, SAVE_EVERY=4)
    monkeypatch.setattr(JsonLog, "image", lambda *_: None)
    trainer.run(batches(0, 0, 1), Clock(None))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    row = rows[0]
    taken = [micro(s, slot) for s in range(3) for slot in range(8)]
    pictures = sum(len(batch.lengths) for batch in taken)
    assert sum(v for k, v in row.items() if k.startswith("samples_of/")) == pictures
    by_bucket = sum(row[f"loss_of/{b.name}"] * row[f"samples_of/{b.name}"] for b in small_training.BUCKETS)
    assert 0.5 < by_bucket / pictures / row["loss"] < 2
    assert len([k for k in row if k.startswith("loss_at_t/")]) >= 6
    tokens = sum(len(batch.lengths) * batch.bucket.tokens + sum(batch.lengths) for batch in taken)
    assert row["tokens_per_s"] * row["step_s"] * 3 == pytest.approx(tokens, rel=1e-4)
    assert row["mfu"] * row["step_s"] * 3 * 1e9 == pytest.approx(24e6, rel=1e-4)
    assert 0 <= row["data_wait"] < 1
    assert row["eta_s"] == pytest.approx(3 * row["step_s"], rel=1e-4)
    assert {"loss", "grad_norm", "grad_norm_max", "clipped", "lr", "samples_per_s", "skipped_steps"} <= row.keys()
    assert [name for name, _ in sheets] == ["sheet_0000004.png", "sheet_0000006.png"]
    now = weights(trainer)
    assert np.array_equal(sheets[1][1], now["ema.image_in.weight"])  # drawn by the averages
    assert not np.array_equal(sheets[1][1], now["model.image_in.weight"])  # which then make way
