"""Stage "distill" through the one loop: who learns when, the student's steps, masters, resume, rules, export."""

import argparse
import json
import math

import numpy as np
import pytest
import torch

from lens import LensPipeline
from lens.config import LensConfig
from lens.formats.released import load_scheduler, load_transformer, read_defaults
from lens.sampler import Scheduler, walk
from tests.small_pipeline import FOLDER
from tests.train.clocks import FOREVER, StopAfter
from tests.train.small_distill import batches, method_on, recipe
from tests.train.small_training import BUCKETS, SHAPE, checkpoint_in, micro, same, weights
from train import configs, cost, distill
from train.__main__ import main
from train.evaluate import distillation as watch
from train.loop import ranks
from train.loop.adapter_model import made_whole
from train.loop.checkpoints import Checkpoints
from train.loop.clock import Clock
from train.loop.keys import keyed
from train.loop.lean_adamw import LeanAdamW
from train.loop.lora import attach_lora, lora_layers, lora_of, parse_lora, save_lora
from train.loop.trainer import ALONE, Trainer
from train.networks.denoiser import Denoiser
from train.networks.discriminator import Heads
from train.objectives.distillation import Distillation

RELEASED, MINI = configs.load("released", "distill"), configs.load("mini", "distill")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose MMDiT has two blocks, none of whose weights is zero."""
    root = tmp_path_factory.mktemp("teacher")
    checkpoint_in(root)
    return root


def trainer_in(out, folder, watched=False, steps=9, **changes):
    own, states = recipe(**changes), Checkpoints(out / "checkpoints", ALONE)
    out.mkdir(parents=True, exist_ok=True)
    method = method_on(folder, own, watched, best=Checkpoints(out / "best", ALONE, 1) if watched else None)
    return Trainer(method.plan(steps), method, states, out, ALONE, configs.fields(own))


def moved(before, after):
    """Networks of which a weight changed, and which moments did."""
    changed = same(before, after)  # the names of what differs
    return {name.split(".")[1] for name in changed if name.startswith("model.")}, {
        name.split(".")[2] for name in changed if name.startswith("optimizer.")
    }


def test_four_updates_of_fake_and_heads_then_one_of_the_student_then_ida(tmp_path, folder):
    """Counts 4 : 4 : 1; IDA moves the fake score alone, by its factor, and no moment; the teacher never learns."""
    trainer, data = trainer_in(tmp_path, folder), batches(0)
    teacher = {n: p.clone() for n, p in trainer.method.teacher.named_parameters()}
    for step in range(5):
        before = weights(trainer)
        found = trainer.train_step(data)
        now = weights(trainer)
        models, moments = moved(before, now)
        if step < 4:
            assert models == moments == {"fake", "heads"}
            assert {"loss/fake", "loss/heads", "grad_norm/heads"} <= found.keys()
            continue
        assert moments == {"student"}
        assert models == {"student", "fake"}
        assert {"loss"} == {name for name in found if name.startswith("loss")}
        for name in (n for n in now if n.startswith("model.fake.blocks.0.image")):
            own = now[name.replace("fake", "student")]
            np.testing.assert_allclose(now[name], before[name] + 0.03 * (own - before[name]), rtol=1e-4, atol=1e-7)
    counts = {name: float(next(iter(n.optimizer.state.values()))["step"]) for name, n in trainer.networks.items()}
    assert counts == {"student": 1, "fake": 4, "heads": 4}
    assert all(p.grad is None and torch.equal(p, teacher[n]) for n, p in trainer.method.teacher.named_parameters())
    assert all(p.grad is None for n in ("fake", "heads") for p in trainer.networks[n].parameters.values())


def test_a_slot_that_is_repeated_is_counted_once(folder):
    """A rank without a slot of its own left computes its last one again, at weight 0."""
    method = method_on(folder, recipe())
    counts = []
    for slot in (0, 0, 1, 1):
        method.losses(micro(0, slot), 0)
        counts.append(method.terms["fake"][1])
    assert counts == [1, 1, 2, 2]


def test_a_step_that_is_skipped_does_not_count(folder):
    """Neither its numbers nor a state that holds them are finite; JSON has no NaN, and no resume would read it."""
    method, nan = method_on(folder, recipe()), micro(1, 0)
    nan.latents.fill_(float("nan"))
    method.losses(micro(0, 0), 0)
    method.after(0)
    before = method.state()
    method.losses(nan, 1)  # the trainer finds that it is not finite, and takes no step
    assert method.state() == before
    method.losses(micro(2, 0), 2)
    method.after(2)
    assert method.sums["fake"][1] == 2
    assert all(math.isfinite(total) for total, _ in method.sums.values())


def test_a_warm_up_teaches_the_fake_score_alone():
    method = distill.Distil.__new__(distill.Distil)
    method.recipe, method.networks = recipe(FAKE_WARMUP=10), dict.fromkeys(("student", "fake", "heads"))
    turns = ["student" in method.turn(step) for step in range(20)]
    assert turns == [*[False] * 14, True, *[False] * 4, True]
    assert [method.student_step(step) for step in (9, 14, 15, 20)] == [0, 0, 1, 2]


def test_the_student_learns_guidance_before_all_turns():
    method = distill.Distil.__new__(distill.Distil)
    method.recipe = recipe(GUIDED_STEPS=5, FAKE_WARMUP=5, GUIDED_LR=1e-3, LR=1e-4)
    method.networks = dict.fromkeys(("student", "fake", "heads"))
    turns = ["student" in method.turn(step) for step in range(20)]
    assert turns == [*[True] * 5, *[False] * 9, True, *[False] * 4, True]
    assert [method.student_step(step) for step in (5, 14, 15, 20)] == [0, 0, 1, 2]
    assert distill.turns_of(method.recipe, 2) == 20
    assert [method.rate("student", step) for step in (0, 4, 5)] == [pytest.approx(10), pytest.approx(2), 1]


@pytest.mark.parametrize(("kind", "substeps"), [("euler", 1), ("renoise", 1), ("euler", 3)])
def test_the_velocity_to_learn_is_that_of_the_samplers_guided_steps(folder, kind, substeps):
    """At the start the student is the teacher, so that its state after k steps is the sampler's; the loss is then what guidance
    and shorter steps change, and nothing is left of it where the student leads in one step where the guided ones do."""
    own = recipe(STUDENT_SAMPLER=kind, TEACHER_GUIDANCE=3.0, GUIDED_SUBSTEPS=substeps)
    method = method_on(folder, own)
    objective, teacher = method.objective, method.teacher
    for step in range(4):  # several places k
        batch = micro(step, 1)
        real, given = objective.given(batch)
        k, sigmas = objective.place(step), objective.sigmas(batch.bucket.tokens, step)
        noises = [objective.normal(f"renoise {j}", batch, real) for j in range(k)] if kind == "renoise" else []
        x = objective.simulate(teacher, given, objective.normal("start", batch, real), sigmas, k, noises)
        t = sigmas[k].expand(len(x))

        def velocities(x, t, given=given):
            return given.velocity(teacher, x, t), given.without_text().velocity(teacher, x, t)

        with torch.no_grad():
            nodes = [sigmas[k] + (sigmas[k + 1] - sigmas[k]) * j / substeps for j in range(substeps + 1)]
            after = walk(velocities, x, torch.stack(nodes), 3.0)  # Euler steps
            target = (after - x) / (sigmas[k + 1] - sigmas[k])
            wanted = (given.velocity(teacher, x, t) - target).square().mean((1, 2))
        found = objective.guided(method.modules, teacher, batch)["student"]
        torch.testing.assert_close(found.values, wanted, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(found.terms["from_guided"], found.terms["guided_from_c"], rtol=1e-5, atol=0)
        assert wanted.min() > 1e-6
        assert torch.autograd.grad(found.values.sum(), next(p for p in method.modules["student"].parameters()))
    assert len({objective.place(step) for step in range(4)}) > 1


def test_guidance_is_learned_and_then_resumed_bit_for_bit(tmp_path, folder, monkeypatch):
    checks = []  # scores fall from check to check: the first one that may be chosen is

    def falling(pictures, captions):
        checks.append(pictures)
        return -float(len(checks))

    monkeypatch.setattr(watch, "score_of", lambda text: falling)
    changes = {"GUIDED_STEPS": 20, "GUIDED_LR": 6e-3}

    def run(out, *stops):
        for stop in stops:
            trainer = trainer_in(out, folder, watched=True, steps=1, RULES={}, **changes)
            if (latest := trainer.states.latest()) is not None:
                trainer.resume(latest)
            trainer.run(batches(trainer.step), StopAfter(stop))
        return trainer

    whole, parts = run(tmp_path / "whole", 99), run(tmp_path / "parts", 7, 99)
    assert whole.step == parts.step == 25
    assert whole.method.best["step"] == parts.method.best["step"] == 20  # the end of GUIDED_STEPS
    assert same(weights(whole), weights(parts)) == []
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    found = [row["unguided"] for row in rows if "unguided" in row]
    assert found[-1] < 0.5 * found[0]
    rates = {row["step"]: row["lr"] for row in rows if "lr" in row}
    assert (rates[10], rates[20], rates[25]) == tuple(pytest.approx(r) for r in (6e-3 * 11 / 20, 6e-3 / 20, 1e-3))


def test_the_masters_move_at_the_released_rate(tmp_path, folder):
    """5e-7 on bfloat16 weights would change nothing: their neighbours are a thousand times as far."""
    trainer, data = trainer_in(tmp_path, folder, LR=5e-7, FAKE_LR=5e-7, IDA=0.0), batches(0)
    before = weights(trainer)
    for _ in range(5):
        trainer.train_step(data)
    now = weights(trainer)
    for network in ("student", "fake"):
        names = [n for n in now if n.startswith(f"model.{network}.blocks.0.image") and before[n].ndim > 1]
        bits = np.concatenate([(now[n] != before[n]).flatten() for n in names])
        assert bits.mean() > 0.9
        rounded = [torch.from_numpy(w[n]).bfloat16() for n in names for w in (before, now)]
        assert np.mean([(a != b).float().mean() for a, b in zip(rounded[::2], rounded[1::2])]) < 0.01


def run_to(out, folder, *stops, **changes):
    done = False
    for stop in stops:
        trainer = trainer_in(out, folder, watched=True, steps=2, RULES={}, **changes)
        if (latest := trainer.states.latest()) is not None:
            trainer.resume(latest)
        done = trainer.run(batches(trainer.step), StopAfter(stop))
    assert done
    return trainer


def test_a_resume_goes_on_bit_for_bit_anywhere_in_a_turn(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(watch, "score_of", lambda text: lambda pictures, captions: float(np.mean(pictures)))
    whole, parts = run_to(tmp_path / "whole", folder, 99), run_to(tmp_path / "parts", folder, 3, 4, 99)
    assert whole.step == parts.step == 10
    assert same(weights(whole), weights(parts)) == []
    assert whole.method.state() == parts.method.state()
    rows = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines() if "drift" in line]
        for name in ("whole", "parts")
    ]
    assert [{k: v for k, v in row.items() if k != "time"} for row in rows[0]] == [
        {k: v for k, v in row.items() if k != "time"} for row in rows[1]
    ]
    assert [row["student_step"] for row in rows[0]] == [0, 1, 2]
    assert {"ca_over_dm", "deviation", "cast", "saturation", "high_frequency", "fake_rise"} <= rows[0][-1].keys()
    assert {"heads_accuracy", "near_eps", "diversity", "backdrops", "score"} <= rows[0][-1].keys()
    best = whole.method.best
    assert best["worth"] == pytest.approx(max(row["worth"] for row in rows[0]), rel=1e-5)
    assert all(row["worth"] == row["score"] for row in rows[0])  # the released recipe has no bars
    assert Checkpoints(tmp_path / "whole" / "best", ALONE).latest().name == f"step_{int(best['step']):07d}"


# ---------------------------------------------------------------- the student's steps


@pytest.mark.parametrize("kind", ["euler", "renoise"])
def test_the_simulation_is_the_samplers_walk_to_the_last_bit(folder, kind):
    own = recipe(STUDENT_SAMPLER=kind)
    method = method_on(folder, own)
    objective, student, batch = method.objective, method.modules["student"], micro(0, 1)
    real, given = objective.given(batch)
    x, sigmas = objective.normal("start", batch, real), objective.sigmas(batch.bucket.tokens, 0)
    noises = [objective.normal(f"renoise {j}", batch, real) for j in range(4)] if kind == "renoise" else []
    got = objective.simulate(student, given, x, sigmas, 4, noises)
    with torch.no_grad():
        if kind == "euler":
            want = walk(lambda x, t: (given.velocity(student, x, t), None), x, sigmas)
        else:
            want = x
            for j, noise in enumerate(noises):
                clean = want - sigmas[j] * given.velocity(student, want, sigmas[j].expand(len(x)))
                want = (1 - sigmas[j + 1]) * clean + sigmas[j + 1] * noise
        before = objective.simulate(student, given, x, sigmas, 3, noises)
        last = objective.picture(student, given, before, sigmas[3])
    assert torch.equal(got, want)
    torch.testing.assert_close(last, want, rtol=1e-5, atol=1e-5)  # the last step is a jump to zero


def test_the_students_place_and_times_follow_from_seed_and_step_alone():
    own = recipe()
    objective = Distillation(own, LensConfig(**SHAPE), Scheduler(), "float32", torch.float32)
    places = [objective.place(step) for step in range(200)]
    assert set(places) == {0, 1, 2, 3}
    assert places == [
        Distillation(own, LensConfig(**SHAPE), Scheduler(), "float32", torch.float32).place(s) for s in range(200)
    ]
    for tokens in (16, 1024, 4096):
        assert torch.equal(objective.sigmas(tokens, 7), Scheduler().sigmas(tokens, 4))
    torch.testing.assert_close(
        objective.sigmas(4096, 0)[:4], torch.tensor([1.0, 0.967, 0.908, 0.767]), atol=1e-3, rtol=0
    )
    own.GRID = "random"
    free = torch.stack([objective.sigmas(1024, step) for step in range(300)])
    assert (free.diff(dim=1) < 0).all()
    assert (free[:, 0] == 1).all()
    assert (free[:, -1] == 0).all()
    assert free[:, 3].std() > 0.1
    with pytest.raises(ValueError, match="GRID: 'loose', expected one of fixed, random"):
        Distillation(recipe(GRID="loose"), LensConfig(**SHAPE), Scheduler(), "float32", torch.float32)


def test_taps_are_the_streams_between_the_blocks():
    model = Denoiser(LensConfig(**{**SHAPE, "num_layers": 3}))
    model.init_weights(keyed(0, "taps"), 0.2)
    batch, seen = micro(0, 1), []
    objective = Distillation(recipe(), LensConfig(**SHAPE), Scheduler(), "float32", torch.float32)
    real, given = objective.given(batch)
    t = torch.full((len(real),), 0.5)
    from train.objectives.velocity import packing_for

    packing = packing_for(real, given.lengths, given.grid, given.axes)
    with torch.no_grad():
        model(real.flatten(0, 1), given.features, t, packing, None, seen)
        one, last = given.streams(model, real, t, (1, 3))
    torch.testing.assert_close(one, seen[0][0])
    assert last.shape == one.shape
    logits = Heads(2, one.shape[1], 8, 0)([one, last], given.grid)
    assert logits.shape == (len(real), 2)


# ---------------------------------------------------------------- the optimiser


def test_the_lean_optimiser_has_torchs_bits():
    generator = keyed(0, "lean")
    ours, theirs = (
        [torch.nn.Parameter(torch.randn(s, generator=keyed(1, str(s)))) for s in ((5, 7), (7,))] for _ in range(2)
    )
    groups = [{"params": [p], "weight_decay": 0.01} for p in theirs]
    torchs = torch.optim.AdamW(groups, 3e-3, (0.0, 0.9), eps=1e-8, foreach=False)
    lean = LeanAdamW({str(i): p for i, p in enumerate(ours)}, 3e-3, 0.9, 0.01, 1e-8)
    for step in range(40):
        scale = 10.0 ** (-step % 9 - 4)
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator) * scale
            b.grad = a.grad.clone()
        for group in (*lean.param_groups, *torchs.param_groups):
            group["lr"] = 3e-3 * (1 + step % 3)
        lean.step()
        torchs.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs)), step
    assert {key for held in lean.state.values() for key in held} == {"step", "exp_avg_sq"}
    assert 0 <= lean.near_eps() < 1


# ---------------------------------------------------------------- the watch


def test_figures_of_pictures_that_are_known():
    grey, red = np.full((8, 8, 3), 119, np.uint8), np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    assert np.abs(watch.cast([grey])).max() < 0.01
    np.testing.assert_allclose(watch.cast([red]), (80.09, 67.20), atol=0.02)  # CIELAB of sRGB red
    assert (watch.saturation([grey]), watch.saturation([red])) == (0.0, 1.0)
    board = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
    assert watch.high_frequency([grey]) == 0
    assert watch.high_frequency([board]) == 4 * 255
    assert watch.effective_backdrops([grey, red]) == pytest.approx(2)
    assert watch.effective_backdrops([red, red, red]) == pytest.approx(1)
    pair = torch.stack([torch.zeros(4, 3), torch.full((4, 3), 2.0)])
    assert watch.diversity([pair]) == pytest.approx(2)


def test_a_rule_ends_the_training_when_its_number_stays_outside(tmp_path, folder):
    rules = watch.Rules({"cast": (0.0, 1.0), "score": (0.5, 1.0)}, 2)
    assert rules.check({"cast": 2.0}) == []
    assert rules.check({"cast": 0.5}) == []  # in between it was inside
    assert rules.check({"cast": float("nan")}) == []
    assert rules.check({"cast": 3.0}) == ["cast is 3, outside of 0 .. 1 at 2 checks in a row"]
    trainer = trainer_in(tmp_path, folder, watched=True, RULES={"drift": (0.0, 1e-9)}, PATIENCE=2)
    clock = distill.RuledClock(Clock(None), trainer.method)
    assert trainer.run(batches(0), clock) is False
    assert trainer.step == 11  # the second check is at 10; the step after it is the last
    assert "drift is" in trainer.method.ended[0]
    again = trainer_in(tmp_path, folder, watched=True, RULES={"drift": (0.0, 1e-9)}, PATIENCE=2)
    again.resume(again.states.latest())
    assert again.method.ended == trainer.method.ended
    assert trainer.states.latest().name == "step_0000011"


def test_a_rule_leaves_room_for_what_teacher_and_untrained_student_show():
    """Where the range of the recipe excludes them, being there ends no training; being beyond them does."""
    ranges = {"cast": (0.0, 4.0), "high_frequency": (0.6, 1.3), "drift": (0.0, 0.5)}
    shown = [{"cast": 1.0, "high_frequency": 1.0}, {"cast": 10.0, "high_frequency": 0.4}]
    wide = watch.widened(ranges, shown)
    assert wide == {"cast": (0.0, 11.0), "high_frequency": (pytest.approx(0.36), 1.3), "drift": (0.0, 0.5)}
    assert watch.Rules(wide, 1).check({"cast": 10.5, "high_frequency": 0.37, "drift": 0.1}) == []
    assert len(watch.Rules(wide, 1).check({"cast": 11.5, "high_frequency": 0.35, "drift": 0.6})) == 3


def test_what_is_outside_of_the_bars_is_worth_less():
    bars = {"deviation": (0.95, 1.05), "cast": (0.0, 1.0), "diversity": (0.9, 2.0)}
    assert watch.beyond({"deviation": 1.0, "cast": 0.2, "other": 9.0}, bars) == 0
    assert watch.beyond({"deviation": 0.76, "cast": 1.5, "diversity": 1.0}, bars) == pytest.approx(0.2 + 0.5)


def test_the_student_is_held_against_teacher_and_truth(tmp_path, folder, monkeypatch):
    """The untrained student is the teacher in its steps; the sheet shows teacher, teacher in few steps, student and truth."""
    sheets = []
    monkeypatch.setattr(distill, "contact_sheet", lambda *given, **options: sheets.append(given))
    trainer = trainer_in(tmp_path, folder, watched=True, RULES={"cast": (0.0, 1e-3), "drift": (0.0, 1.0)})
    method = trainer.method
    found = method.validate(0)
    own = json.loads((tmp_path / "references.json").read_text())
    assert list(own) == ["truth", "teacher", "teacher_few", "start"]
    assert found["cast"] == pytest.approx(own["start"]["cast"])
    assert own["teacher"]["diversity"] == own["teacher"]["backdrops"] == 1
    casts = [own[name]["cast"] for name in ("teacher", "teacher_few", "start")]
    assert method.rules.ranges == {"cast": (0.0, pytest.approx(1.1 * max(casts))), "drift": (0.0, 1.0)}
    assert max(casts) > 1e-3
    method.draw(tmp_path, 0)
    ((pictures, captions, path),) = sheets
    assert path == tmp_path / "sheet_000000.png"
    assert [caption.split(":")[0] for caption in captions[:4]] == ["teacher 2", "teacher 4", "student 4", "truth"]
    held = method.held_out.references()
    assert all(
        map(
            np.array_equal,
            pictures[:4],
            [
                held["teacher"].pictures[0],
                held["teacher_few"].pictures[0],
                method.drawn.pictures[0],
                held["truth"].pictures[0],
            ],
        )
    )
    assert not np.array_equal(pictures[0], pictures[1])


def test_a_score_is_named_by_module_and_function():
    assert watch.score_of("train.evaluate.distillation:cast") is watch.cast
    assert watch.score_of("") is None
    with pytest.raises(ValueError, match=r"SCORE: 'train\.nowhere:f', expected module:function"):
        watch.score_of("train.nowhere:f")


def test_a_teacher_that_does_not_hear_its_text_has_nothing_to_distil(folder):
    method = method_on(folder, recipe())
    assert distill.response(method.objective, method.teacher, micro(99, 0)) > distill.LEAST_RESPONSE
    with torch.no_grad():
        for block in method.teacher.layers():
            block.text.qkv.weight.zero_()
            block.text.qkv.bias.fill_(-1e4)  # keys that no query looks at, values of all tokens alike
            block.image.out.weight.zero_()
    assert distill.response(method.objective, method.teacher, micro(99, 0)) < distill.LEAST_RESPONSE


# ---------------------------------------------------------------- recipes, LoRA, dry run


def test_the_released_recipe_is_the_papers():
    r = RELEASED
    assert (r.LR, r.FAKE_LR, r.HEADS_LR, r.BETA2) == (5e-7, 5e-7, 1e-4, 0.9)
    assert (r.GUIDANCE, r.LAMBDA_D, r.LAMBDA_G, r.R1_GAMMA, r.R1_ALPHA, r.IDA) == (5.0, 0.1, 0.001, 1.0, 0.1, 0.03)
    assert (r.FAKE_UPDATES, r.FAKE_WARMUP, r.SLOTS, set(r.BATCH.values()), r.STEPS) == (4, 0, 8, {4}, 1_000)
    assert distill.turns_of(r, 1_000) == 5_000
    stated = {
        "MODEL",
        "BATCH",
        "SLOTS",
        "STUDENT_STEPS",
        "GUIDANCE",
        "LAMBDA_D",
        "LAMBDA_G",
        "R1_GAMMA",
        "R1_ALPHA",
        "IDA",
    }
    stated |= {"FAKE_UPDATES", "STEPS", "LR", "FAKE_LR", "HEADS_LR", "BETA2", "COMPUTE"}
    assert set(configs.fields(r)) - stated == set(r.OPEN)
    for own in (RELEASED, MINI):
        distill.check(own)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"TAPS": (2, 1)}, "TAPS: expected rising numbers of blocks in 1 .. 2"),
        ({"TAPS": (3,)}, "TAPS: expected rising numbers of blocks in 1 .. 2"),
        ({"FAKE_WARMUP": 7}, "FAKE_WARMUP: expected a multiple of 5, got 7"),
        ({"GUIDED_STEPS": 7}, "GUIDED_STEPS: expected a multiple of 5, got 7"),
        ({"GUIDED_STEPS": 35, "WATCH_EVERY": 2}, "GUIDED_STEPS: expected a multiple of 10, got 35"),
        ({"GUIDED_SUBSTEPS": 0}, "GUIDED_SUBSTEPS: expected 1 or more, got 0"),
        (
            {"GUIDED_SUBSTEPS": 2, "STUDENT_SAMPLER": "renoise"},
            "GUIDED_SUBSTEPS: expected 1 with STUDENT_SAMPLER 'renoise'",
        ),
        ({"FAKE_LR": 0.0}, "FAKE_LR: expected a positive number, got 0.0"),
        ({"PATIENCE": 0}, "PATIENCE: expected 1 or more, got 0"),
        ({"R1_GAMMA": -1.0}, "R1_GAMMA: expected 0 or more, got -1.0"),
        ({"EMA": 1.0}, "EMA: expected 0 or more and below 1, got 1.0"),
        ({"IDA": 2.0}, "IDA: expected 0 or more and at most 1, got 2.0"),
        ({"RULES": {"drifts": (0.0, 1.0)}}, "RULES: 'drifts', expected some of deviation, "),
        ({"BARS": {"cast": (0.0, math.inf)}}, "BARS: 'cast': expected a finite"),
        ({"RULES": {"cast": (2.0, 1.0)}}, "RULES: 'cast': expected a finite"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        distill.check(recipe(**change))


def test_the_dry_run_counts_all_networks(capsys):
    assert main(["distill", "--config", "released", "--dry-run", "--gpu", "h200", "--world", "8"]) == 0
    told = capsys.readouterr().out
    for words in ("student: float32 masters", "fake score: second moment", "teacher, frozen", "heads, their", "sum"):
        assert words in told
    assert (
        "       29 A100 hours by peak: 0.01% of Lens's 192,000, 0.003% of Z-Image's" in told
    )  # as docs/reproduce.md has it
    more = ["--set", "GUIDED_STEPS=1000"]  # 6.5 forward passes each, beside 41 of a student step
    assert main(["distill", "--config", "released", "--dry-run", "--gpu", "h200", "--world", "8", *more]) == 0
    assert "       33 A100 hours by peak" in capsys.readouterr().out
    whole = cost.distillation_memory(RELEASED, LensConfig(), 1, 1000)
    assert whole["student: float32 masters"] == pytest.approx(16.4e9, rel=0.01)
    assert whole["teacher, frozen"] == pytest.approx(8.2e9, rel=0.01)


def test_adapters_alone_learn_and_are_exported(tmp_path, folder):
    """Student and fake score are adapters beside the frozen teacher's weights; IDA draws the matrices together."""
    trainer, data = trainer_in(tmp_path, folder, LORA="r=2,alpha=4,targets=attention"), batches(0)
    before = weights(trainer)
    for _ in range(5):
        trainer.train_step(data)
    now = weights(trainer)
    changed = [n for n in same(before, now) if n.startswith("model.student")]
    assert changed
    assert all(".down." in n or ".up." in n for n in changed)
    assert len(list(lora_layers(ranks.bare(trainer.networks["student"].module)))) == 8


def test_an_export_says_how_its_student_draws(tmp_path):
    """The best student beside the teacher's other parts; its metadata and scheduler agree."""
    model = load_transformer(FOLDER / "transformer", torch.float32, "cpu")
    with torch.no_grad():
        model.image_out.bias.add_(1.0)
    best = Checkpoints(tmp_path / "best", ALONE, 1)
    best.save(10, {f"model.{n}": p.detach() for n, p in model.named_parameters()}, {"stage": "distill", "settings": {}})
    best.wait()
    options = argparse.Namespace(out=tmp_path, init=FOLDER, adapter=None, export=tmp_path / "turbo")
    own = recipe(STUDENT_SAMPLER="renoise")
    own.MODEL = vars(model.config)
    distill.export(options, own)
    assert json.loads((tmp_path / "turbo" / "model_index.json").read_text())["lens"]["name"].endswith("-Turbo")
    defaults = read_defaults(tmp_path / "turbo", None, "turbo")
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.distilled.sampler) == (4, 1.0, "renoise")
    assert load_scheduler(tmp_path / "turbo" / "scheduler").stochastic_sampling
    written = load_transformer(tmp_path / "turbo" / "transformer", torch.float32, "cpu")
    assert torch.equal(written.image_out.bias, model.image_out.bias.bfloat16().float())


def test_exported_adapters_are_a_model_beside_their_base(tmp_path):
    """FOLDER/lora says how the student draws and names its base; with it, it is the whole checkpoint to bfloat16's rounding."""
    model = Denoiser(load_transformer(FOLDER / "transformer", torch.float32, "cpu").config)
    own = recipe(LORA="r=2,alpha=4,targets=all")
    own.MODEL = vars(model.config)
    attach_lora(model, lora_of(own))
    layers, plain = (
        len(list(lora_layers(model))),
        load_transformer(FOLDER / "transformer", torch.float32, "cpu").state_dict(),
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            source = plain.get(name.replace(".base.", "."))
            p.copy_(torch.randn(p.shape, generator=keyed(3, name)) * 0.05 if source is None else source)
    best = Checkpoints(tmp_path / "best", ALONE, 1)
    best.save(10, {f"model.{n}": p.detach() for n, p in model.named_parameters()}, {"stage": "distill", "settings": {}})
    best.wait()
    distill.export(argparse.Namespace(out=tmp_path, init=FOLDER, adapter=None, export=tmp_path / "turbo"), own)
    adapted, whole = (LensPipeline.from_pretrained(tmp_path / name) for name in ("turbo/lora", "turbo"))
    assert adapted.defaults == whole.defaults
    assert (adapted.defaults.num_inference_steps, adapted.defaults.distilled.steps) == (4, 4)
    ours, theirs = adapted.transformer.state_dict(), whole.transformer.state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2**-8, atol=1e-6)
    assert sum(not torch.equal(ours[name], plain[name]) for name in ours) == layers


def test_a_student_of_an_adapter_is_one_adapter_of_the_base(tmp_path, capsys):
    """The teacher is base and first adapter; what is exported is both as one, which draws as the whole checkpoint does."""
    base = load_transformer(FOLDER / "transformer", torch.float32, "cpu")
    first, second = parse_lora("r=3,alpha=6,targets=attention"), parse_lora("r=2,alpha=4,targets=all")

    def drawn(model, lora, seed):
        attach_lora(model, lora)
        with torch.no_grad():
            for _, layer in lora_layers(model):
                for i, p in enumerate((*layer.down, *layer.up)):
                    p.copy_((torch.randn(p.shape, generator=keyed(seed, str(i))) * 0.05).bfloat16())
        return model

    save_lora(drawn(Denoiser(base.config), first, 1), first, tmp_path / "rl", torch.bfloat16, str(FOLDER))
    options = argparse.ArgumentParser()
    distill.add_arguments(options)
    given = ["--init", str(tmp_path / "rl"), "--out", str(tmp_path), "--lora", str(second), "--set", "TAPS=(1,2)"]
    given += ["--set", "GUIDED_STEPS=0"]
    options = options.parse_args([*given, "--export", str(tmp_path / "turbo")])
    own = distill.as_given(options)
    assert (options.adapter, options.init) == (tmp_path / "rl", tmp_path / "teacher")
    distill.make_whole(options)
    teacher = load_transformer(options.init / "transformer", torch.float32, "cpu")
    adapted = LensPipeline.from_pretrained(tmp_path / "rl", dtype=torch.float32).transformer.state_dict()
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(adapted[name], value, rtol=1e-6, atol=1e-7)

    distill.make_whole(options)  # as a resume does: the same adapter's is kept
    save_lora(drawn(Denoiser(base.config), first, 5), first, tmp_path / "other", torch.bfloat16, str(FOLDER))
    with pytest.raises(ValueError, match=r"teacher: made of another adapter than .*other"):
        made_whole(tmp_path / "other", options.init)

    student = Denoiser(teacher.config)
    student.load_state_dict(teacher.state_dict())
    drawn(student, second, 2)
    best = Checkpoints(tmp_path / "best", ALONE, 1)
    tensors = {f"model.{n}": p.detach() for n, p in student.named_parameters()}
    best.save(10, tensors, {"stage": "distill", "settings": {}})
    best.wait()
    distill.export(options, own)
    config = json.loads((tmp_path / "turbo" / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (5, 5, str(FOLDER))
    made = json.loads((tmp_path / "turbo" / "lora" / "recipe.json").read_text())["distill"]
    assert (made["INIT"], made["STEP"]) == (str(tmp_path / "rl"), 10)
    assert "img_mlp.w2" in config["target_modules"]
    joined, whole = (LensPipeline.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("turbo/lora", "turbo"))
    assert joined.defaults.distilled == whole.defaults.distilled
    apart = 0
    for name, value in whole.transformer.state_dict().items():
        torch.testing.assert_close(joined.transformer.state_dict()[name], value, rtol=2**-7, atol=1e-4)
        apart += not torch.equal(value, adapted[name])
    assert apart >= len(list(lora_layers(student)))


def test_resumed_adapters_go_on_beside_the_weights_of_init(tmp_path, folder):
    trainer, data = trainer_in(tmp_path, folder, LORA="r=2,alpha=4,targets=attention"), batches(0)
    trainer.train_step(data)
    trainer.save(last=True)
    trained = weights(trainer)
    other = trainer_in(tmp_path, folder, LORA="r=2,alpha=4,targets=attention")
    with torch.no_grad():
        for network in ("student", "fake"):
            other.networks[network].module.image_out.bias.add_(1.0)
    base = weights(other)
    with distill.frozen_kept(other.networks.values()):
        other.resume(other.states.latest())
    now = weights(other)
    assert all(np.array_equal(now[name], base[name] if ".image_out." in name else trained[name]) for name in now)


def test_an_ablation_is_a_row_of_means_and_ranges_for_every_arm(tmp_path, monkeypatch, capsys):
    asked = []

    def short_run(options, own, changes, group, out, setting, clock):
        asked.append((own.SEED, *changes))
        return None if len(asked) == cut else (None, {"score": float(own.SEED), "cast": 1.0})

    monkeypatch.setattr(distill, "setting_of", lambda *given: None)
    monkeypatch.setattr(distill, "short_run", short_run)
    cut = 6
    distill.ablate(argparse.Namespace(out=tmp_path, stop_after=None), recipe(), ALONE)
    assert len(asked) == 6
    assert not (tmp_path / "ablation.md").exists()  # what is there is whole
    assert "goes on" in capsys.readouterr().out
    cut = None
    asked.clear()
    distill.ablate(argparse.Namespace(out=tmp_path, stop_after=None), recipe(), ALONE)
    assert asked[:4] == [(0, "LAMBDA_G=0.0", "IDA=0.0"), (0, "LAMBDA_G=0.0"), (0, "R1_GAMMA=0.0"), (0,)]
    assert {seed for seed, *_ in asked} == {0, 1, 2}
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| CA + DM", "| + IDA", "| + heads", "| + approximate R1"]
    assert lines[2].split(" | ")[1:4] == ["3", "-", "1 (0 .. 2)"]


def test_short_runs_of_a_seed_share_their_guided_steps(tmp_path, folder, monkeypatch):
    """Each ends as it does alone, to the bit, and the guided steps are taken once; one that the clock ends goes on."""
    own, began, kinds = recipe(GUIDED_STEPS=3, FAKE_WARMUP=0), [], [bucket.name for bucket in BUCKETS]
    objective = Distillation(own, LensConfig(**SHAPE), Scheduler(), "float32", torch.float32)
    monkeypatch.setattr(distill, "objective_of", lambda options, recipe: objective)

    def stream(at):
        began.append(at["step"])
        return batches(at["step"])

    setting = distill.Setting(lambda step: {"step": step}, stream, kinds, distill.teacher_of(own, ALONE, folder), None)
    options = argparse.Namespace(init=folder, adapter=None, out=tmp_path, steps=1, resume=None)
    arms = {"no heads": ["FAKE_LR=0.002", "LAMBDA_G=0.0"], "all": ["CA_WEIGHT=0.7"]}

    def short(name, clock):
        return distill.short_run(options, own, arms[name], ALONE, tmp_path / name, setting, clock)

    assert short("all", StopAfter(2)) is None
    assert list(tmp_path.iterdir()) == [tmp_path / "guided_0"]
    ended = {name: short(name, FOREVER)[0].modules for name in arms}
    assert began == [0, 2, 3, 3]
    for name, changes in arms.items():
        alone = configs.override(own, changes)
        whole, done = distill.train(options, alone, ALONE, tmp_path / "alone" / name, 1, FOREVER, setting)
        assert done
        assert list(whole.modules) == list(ended[name])
        for network, module in whole.modules.items():
            there = dict(ended[name][network].named_parameters())
            assert all(torch.equal(there[n], p) for n, p in module.named_parameters()), (name, network)
