"""RL on a toy: one velocity in rollout and training, adapters by argument, ranks and resumes alike, failures masked, rules that stop."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lens
from lens.config import LensConfig
from lens.engine.job import Job, Text
from lens.engine.run import Engine
from lens.engine.schedule_table import table
from lens.formats.files import write_json
from lens.formats.released import released_index, save_transformer
from tests.train import processes
from tests.train.small_rl import (
    ALONE,
    PROMPTS,
    SHAPE,
    Bright,
    encode,
    method_of,
    recipe,
    trained,
    trainer_of,
    weights_after,
)
from train import configs, rl
from train.__main__ import main
from train.loop.checkpoints import Checkpoints
from train.loop.clock import Interrupted
from train.loop.keys import keyed
from train.loop.lora import NO_LORA, lora_layers
from train.networks.denoiser import Denoiser
from train.rl_method import OLD, Micro, Sample, grid_of, indices_of, prompts_of
from train.rollout import Texts

GRIDS = [(4, 4), (6, 3), (4, 4)]


def samples_of(method, count=3):
    found = []
    for i in range(count):
        grid = GRIDS[i]
        latents = torch.randn(grid[0] * grid[1], 8, generator=keyed(i, "latents"))
        found.append(Sample(i, PROMPTS[i], grid, latents, encode(PROMPTS[i].prompt), 0.2 + 0.3 * i))
    return found


@pytest.mark.parametrize("summed", [False, True])
def test_a_rollouts_velocity_is_the_training_forwards_to_the_bit(summed):
    """The engine's, over mixed sizes, against a packed forward with a gradient, other neighbours and other times beside."""
    method = method_of(recipe(SUMMED=summed))
    rollouts, samples = method.rollouts, samples_of(method)
    sigmas = rollouts.sigmas((4, 4))
    model = rollouts.model
    texts = [model.project_text(list(s.features.unbind(1)), [len(s.features)]) for s in samples]
    with torch.no_grad():
        job = Job(
            grids=[s.grid for s in samples],
            text=Text(texts, [torch.arange(len(t)) for t in texts]),
            negative=None,
            guidance=1.0,
            sigma=sigmas.expand(3, -1),
            first=torch.zeros(3, dtype=torch.int64),
            table=table(model, rollouts.time(sigmas[:-1])),
            x=torch.cat([s.latents for s in samples]),
            solver="dpm2m",
            adapter=OLD,
        )
        run = Engine().start(model, job)
    seen = []
    for _ in range(2):
        before = run.x.clone()
        run.step()
        seen.append((before, run.velocities[0].clone()))
    order = [2, 0, 1]  # two times of every picture in one forward, in another order
    rows = [before.split(job.lengths)[i] for i in order for before, _ in seen]
    expected = [velocity.split(job.lengths)[i] for i in order for _, velocity in seen]
    features, grids = [samples[i].features for i in order for _ in seen], [samples[i].grid for i in order for _ in seen]
    for adapter in (OLD, None):  # equal adapters
        found = rollouts.velocity(method.model, torch.cat(rows), sigmas[:2].repeat(3), features, grids, adapter)
        assert torch.equal(found.detach(), torch.cat(expected))
    assert found.requires_grad


@pytest.mark.parametrize("summed", [False, True])
def test_adapters_are_an_argument_under_every_recompute_mode(summed):
    """Gradients of a loss of three policies agree; old gets none; without adapters the model is the checkpoint."""
    gradients = {}
    for mode in ("none", "block", "selective"):
        method = method_of(recipe(RECOMPUTE=mode, KL_WEIGHT=0.5, ETA=0.5, SUMMED=summed), old_moved=True)
        method.losses(Micro(0, 0, samples_of(method), {}), 0)["model"].values.mean().backward()
        whole = method.rollouts.model
        gradients[mode] = {
            n: p.grad.clone() for n, p in whole.named_parameters() if p.requires_grad and p.grad is not None
        }
        assert all(p.grad is None for n, p in whole.named_parameters() if ".kept." in n or ".base." in n)
    for mode in ("block", "selective"):
        assert gradients[mode].keys() == gradients["none"].keys()
        for name, value in gradients["none"].items():
            torch.testing.assert_close(gradients[mode][name], value, rtol=1e-5, atol=1e-9, msg=name)
    s = samples_of(method)[:1]
    args = s[0].latents, torch.tensor([0.4]), [s[0].features], [s[0].grid]
    with torch.no_grad():
        plain = method.rollouts.velocity(whole, *args, NO_LORA)
        old, own = (method.rollouts.velocity(whole, *args, adapter) for adapter in (OLD, None))
        for _, layer in lora_layers(whole):
            for up in layer.up:
                up.zero_()
        assert torch.equal(plain, method.rollouts.velocity(whole, *args, None))
    assert not torch.equal(old, own)


def test_the_first_step_starts_at_old_and_old_follows(tmp_path):
    trainer = trainer_of(tmp_path, recipe(ETA=0.25))
    method = trainer.method
    batches = method.batches()
    first = next(batches)
    losses = method.losses(first, 0)["model"]
    assert losses.terms["old_distance"] == 0
    assert losses.terms["kl"] > 0
    assert {name for name, p in method.rollouts.model.named_parameters() if p.requires_grad}.isdisjoint(
        name for name, _ in method.rollouts.model.named_parameters() if ".kept." in name
    )
    layer = next(iter(lora_layers(method.rollouts.model)))[1]
    before = layer.sides(OLD)[1][0].clone()
    found = trainer.train_step(trainer.method.batches())
    assert np.isfinite(found["loss"])
    moved = layer.up[0].detach() - before
    assert moved.abs().max() > 0
    torch.testing.assert_close(layer.sides(OLD)[1][0], before + 0.75 * moved)


def test_where_old_follows_at_once_its_velocity_is_thetas(tmp_path):
    """It is not computed again then: the loss is, to the bit, that of computing it."""
    trainer = trainer_of(tmp_path, recipe(ETA=0.0))
    batches = trainer.method.batches()
    trainer.train_step(batches)
    second, values = next(batches), []
    for eta in (0.0, 1e-9):
        trainer.method.recipe.ETA = eta
        values.append(trainer.method.losses(second, 1)["model"].values)
    assert torch.equal(*values)


def test_old_stays_behind_where_the_last_step_of_an_iteration_is_skipped(tmp_path):
    """Then its velocity is its own, behind a resume, too."""
    settings = recipe(INNER_STEPS=2, ETA=0.0, GROUPS=1, SLOTS=2, SAMPLING_STEPS=3)
    trainer = trainer_of(tmp_path, settings)
    method, batches, losses = trainer.method, trainer.method.batches(), trainer.method.losses

    def second_broken(batch, step):
        found = losses(batch, step)
        factor = float("nan") if step == 1 else 1.0
        return {"model": replace(found["model"], values=found["model"].values * factor)}

    method.losses = second_broken
    for _ in range(2):
        trainer.train_step(batches)
    assert trainer.skipped == 1
    assert not method.follows
    third = next(batches)
    assert losses(third, 2)["model"].terms["old_distance"] > 0
    trainer.save(last=True)
    resumed = trainer_of(tmp_path, settings)
    resumed.resume(resumed.states.latest())
    assert torch.equal(resumed.method.losses(third, 2)["model"].values, losses(third, 2)["model"].values)
    batches = resumed.method.batches()
    for _ in range(2):
        resumed.train_step(batches)
    assert resumed.method.follows
    resumed.method.follows = False
    resumed.method.load_state({"step": 2, "start": {}, "recent": []})  # of an older state
    assert resumed.method.follows


def test_a_group_is_spread_and_an_epoch_is_whole():
    settings = recipe(GROUPS=5, GROUP=4)
    slots = [indices_of(settings, slot) for slot in range(4)]
    assert sorted(j for own in slots for j in own) == list(range(20))
    assert all({j // 4 for j in own} == set(range(5)) for own in slots)
    assert {p.id for p in prompts_of(settings, 0, PROMPTS)} == {p.id for p in PROMPTS}
    nine = recipe(BASES=(1024,), ASPECTS=configs.load("released", "rl").ASPECTS, SLOTS=9)
    assert len({grid_of(nine, 3, slot, 0) for slot in range(9)}) == 9
    mixed = recipe(BASES=(64, 128), ASPECTS=("1:1",))
    assert [grid_of(mixed, iteration, 1, group) for iteration in (0, 1) for group in (0, 1)] == [
        (4, 4),
        (8, 8),
        (8, 8),
        (4, 4),
    ]


def test_a_resume_at_any_step_has_the_same_bits(tmp_path):
    """Behind an iteration, and inside one."""
    settings = recipe(INNER_STEPS=2, ETA="nft", GROUPS=1, SLOTS=2, SAMPLING_STEPS=3)
    whole = trainer_of(tmp_path / "whole", settings)
    batches = whole.method.batches()
    for _ in range(4):
        whole.train_step(batches)
    for at in (2, 3):
        folder = tmp_path / f"cut{at}"
        first = trainer_of(folder, settings)
        batches = first.method.batches()
        for _ in range(at):
            first.train_step(batches)
        first.save(last=True)
        second = trainer_of(folder, settings)
        second.resume(second.states.latest())
        batches = second.method.batches()
        for _ in range(4 - at):
            second.train_step(batches)
        for name, value in trained(whole).items():
            assert np.array_equal(trained(second)[name], value), (at, name)


def test_judging_beside_the_next_rollout_changes_no_bit(tmp_path):
    found = [
        weights_after(ALONE, tmp_path / str(overlap), 2, {"ROLLOUT_OVERLAP": overlap}) for overlap in (False, True)
    ]
    for name, value in found[0][0].items():
        assert np.array_equal(found[1][0][name], value), name


def test_two_processes_with_two_slots_are_one_with_four(tmp_path):
    alone, losses = weights_after(ALONE, tmp_path / "alone", 2, {})
    both = processes.run(2, weights_after, tmp_path, 2, {}, shard=1)
    for found, other in both:
        assert other == pytest.approx(losses, rel=1e-6)
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-6, err_msg=name)


def test_failed_judgements_teach_nothing_and_too_many_stop():
    method = method_of(recipe(GROUPS=4, MOST_FAILURES=0.2), judge=Bright(failing=7))
    slots, numbers = method.iteration(0)
    assert numbers["invalid_share"] == pytest.approx(2 / 16)
    invalid = [s for samples in slots.values() for s in samples if not s.valid]
    assert len(invalid) == 2
    assert {s.r for s in invalid} == {0.5}
    micro = next(Micro(0, slot, samples, {}) for slot, samples in slots.items() if any(not s.valid for s in samples))
    assert method.about(micro).weight == 3
    assert len(method.losses(micro, 0)["model"].values) == 3 * 2
    with pytest.raises(Interrupted, match=r"12% of 16 judgements failed, more than MOST_FAILURES = 5%: 2 x no answer"):
        method_of(recipe(GROUPS=4), judge=Bright(failing=7)).iteration(0)


def test_shuffled_rewards_stay_in_their_groups_and_tell_nothing_of_a_picture():
    own, control = (method_of(recipe(GROUPS=3, SHUFFLE=shuffle)).iteration(1)[0] for shuffle in (False, True))
    r, mixed = ({s.index: s.r for samples in slots.values() for s in samples} for slots in (own, control))
    assert r != mixed
    for group in range(3):
        members = range(group * 4, group * 4 + 4)
        assert sorted(mixed[j] for j in members) == pytest.approx(sorted(r[j] for j in members), abs=1e-6)


def test_a_stop_rule_names_what_fell():
    method = method_of(recipe(STOP={"sharpness": 0.5}, WINDOW=2))
    method.iteration(0)
    method.start = {"sharpness": 1e9}
    with pytest.raises(Interrupted, match=r"rl: sharpness .* over the last 2 iterations is below 0.5 x 1e\+09"):
        method.iteration(1)


def test_an_iteration_that_a_rule_ended_counts_once():
    method = method_of(recipe(STOP={"sharpness": 0.5}, WINDOW=2))
    method.iteration(0)
    method.start, before = {"sharpness": 1e9}, list(method.recent)
    for _ in range(2):
        with pytest.raises(Interrupted, match="over the last 2 iterations"):
            method.iteration(1)
        assert method.state()["recent"] == before


def options_of(*words):
    parser = argparse.ArgumentParser()
    rl.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def saved(out, init, **changes):
    """A state, before the first step, of a training on half of the prompts."""
    settings = recipe(**changes)
    trainer = trainer_of(out, settings)
    trainer.settings = configs.fields(settings) | {"INIT": str(init), "SUBSET": "half", "JUDGE": "small-world"}
    trainer.save(last=True)
    return trainer


@pytest.mark.parametrize(
    ("words", "changes", "told"),
    [
        ((), {"LORA": "r=4,alpha=4,targets=all"}, "LORA r=4,alpha=4,targets=all: this training has r=2"),
        ((), {"GROUPS": 4}, "GROUPS 4: this training has 2"),
        ((), {"GROUP": 8}, "GROUP 8: this training has 4"),
        ((), {"SLOTS": 2}, "SLOTS 2: this training has 4"),
        ((), {"BASES": (64, 128)}, r"BASES \[64, 128\]: this training has \[64\]"),
        (("--subset", "full"), {}, "--subset full: this training has half"),
        (("--init", "mini-base"), {}, "--init mini-base: this training has .*base"),
    ],
)
def test_another_training_is_no_resume(tmp_path, words, changes, told):
    saved(tmp_path, tmp_path / "base")
    with pytest.raises(ValueError, match=told):
        rl.train(options_of("--out", tmp_path, "--subset", "half", *words), recipe(**changes), ALONE)


def test_a_resume_tells_what_else_differs(tmp_path):
    held = json.loads(json.dumps(configs.fields(recipe()))) | {"INIT": "runs/base", "SUBSET": "full"}
    assert rl.refuse_another("full", recipe(), held) == []
    assert rl.refuse_another("full", recipe(LR=0.5, KL_WEIGHT=0.2), held) == [
        "KL_WEIGHT was 0.1, is 0.2",
        "LR was 0.01, is 0.5",
    ]
    del held["LR"], held["GROUPS"]  # older states do not say all
    assert rl.refuse_another("full", recipe(LR=0.5, GROUPS=8), held) == []
    assert rl.init_of(None, {}) == "mini-base"
    assert rl.init_of("other", {}) == "other"
    shipped = Path(lens.__file__).parent / "mini" / "base"
    assert rl.init_of(str(shipped), {"INIT": "mini-base"}) == "mini-base"  # a name and the folder it stands for
    assert rl.init_of("mini-base", {"INIT": str(shipped)}) == str(shipped)
    assert rl.init_of(None, held) == rl.init_of("runs/base", held) == rl.init_of("./runs/base/", held) == "runs/base"


def test_an_export_is_of_the_states_base_and_lora_and_has_nothing_of_the_bases_figures(tmp_path):
    base, out, target = tmp_path / "base", tmp_path / "out", tmp_path / "export"
    save_transformer(Denoiser(LensConfig(**SHAPE), torch.float32, "none"), base / "transformer", torch.float32)
    write_json(base / "model_index.json", released_index({"name": "Small", "validation": {"mean_over_times": 0.5}}))
    for name in ("scores.json", "pretrain.jsonl", "vae.txt"):
        (base / name).write_text("{}")
    saved(out, base)
    own = recipe(LORA="r=8,alpha=64,targets=attention")
    rl.export(options_of("--out", out, "--export", target), own)
    about = json.loads((target / "lora" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (2, 4, str(base))
    assert not {"scores.json", "pretrain.jsonl"} & {path.name for path in target.iterdir()}
    assert (target / "vae.txt").is_file()
    index = json.loads((target / "model_index.json").read_text())["lens"]
    assert index["name"] == "Small-RL"
    assert "validation" not in index
    for words, told in (
        (("--set", f"LORA={own.LORA}"), "--set LORA=r=8,alpha=64,targets=attention: this training has r=2,alpha=4"),
        (("--init", "mini-base"), "--init mini-base: this training has .*base"),
    ):
        with pytest.raises(ValueError, match=told):
            rl.export(options_of("--out", out, "--export", target, *words), own)


def test_a_state_without_a_score_is_never_the_best(tmp_path):
    states = Checkpoints(tmp_path / "checkpoints", ALONE)
    for step in (0, 5, 10, 15):
        (states.folder / f"step_{step:07d}").mkdir(parents=True)
    rows = [(15, float("nan")), (10, 0.6), (5, float("inf")), (0, 0.5)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": s, "held_score": v}) + "\n" for s, v in rows))
    assert rl.best_of(tmp_path, states).name == "step_0000010"
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 15, "held_score": float("nan")}) + "\n")
    assert rl.best_of(tmp_path, states) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["SLOTS=7"], "SLOTS: 7, expected a divisor of GROUPS x GROUP = 96"),
        (["TIMES=9"], "TIMES: 9 nodes of 8 SAMPLING_STEPS"),
        (["KL_WEIGHT=-1.0"], "KL_WEIGHT: expected 0 or more"),
        (["GROUP=1"], "GROUP: expected 2 or more"),
        (["GROUPS=9", "GROUP=16"], r"GROUPS: 9, expected as many groups of each of BASES \(64, 128\)"),
        (["COMPUTE=bfloat16"], "SUMMED: adapters are summed into float32 weights"),
    ],
)
def test_recipes_that_cannot_run_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        rl.check(configs.override(configs.load("mini", "rl"), changes))


def test_distilled_checkpoints_need_an_anchor(tmp_path):
    for part in ("transformer", "text_encoder", "vae", "tokenizer", "scheduler"):
        (tmp_path / part).mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "LensPipeline", "lens": {"variant": "turbo"}}')
    settings = recipe(KL_WEIGHT=0.0, STOP={"sharpness": 0.7})
    with pytest.raises(ValueError, match="--allow-distilled trains it all the same"):
        rl.refuse_distilled(tmp_path, settings, False)
    with pytest.raises(ValueError, match="KL_WEIGHT > 0"):
        rl.refuse_distilled(tmp_path, settings, True)
    rl.refuse_distilled(tmp_path, recipe(STOP={"sharpness": 0.7}), True)


def test_the_released_recipe_is_the_papers(capsys):
    settings = configs.load("released", "rl")
    rl.check(settings)
    assert (settings.GROUPS, settings.GROUP, settings.STEPS, settings.LORA[:13]) == (48, 24, 180, "r=64,alpha=12")
    assert (settings.LR, settings.BETAS, settings.EPS, settings.WEIGHT_DECAY) == (3e-4, (0.9, 0.999), 1e-8, 1e-4)
    assert (settings.KL_WEIGHT, settings.NFT_BETA, settings.ETA, settings.ADAPTIVE) == (1e-4, 1.0, "nft", True)
    assert set(settings.OPEN) <= set(configs.fields(settings))
    assert main(["rl", "--config", "released", "--dry-run", "--world", "64"]) == 0
    out = capsys.readouterr().out
    assert "1,152 an iteration, 207,360 in all" in out
    assert "judge calls             207,360" in out
    assert "      524 A100 hours by peak: 0.27% of Lens's 192,000" in out  # as docs/reproduce.md has it
    assert "does not fit" not in out


def test_prompts_features_are_kept_up_to_so_many_bytes_and_never_fewer_than_a_call_asks_for():
    encoded = []

    def encode(prompt):
        encoded.append(prompt)
        return torch.full((len(prompt), 1, 2), float(ord(prompt[0])))  # 8 bytes a letter

    texts = Texts(encode, most=40)
    assert [int(one[0, 0, 0]) for one in texts(["aa", "bb", "aa"])] == [97, 98, 97]
    texts(["cc"])  # 48 bytes: the one asked for longest ago goes
    assert encoded == ["aa", "bb", "cc"]
    texts(["aa"])
    assert encoded == ["aa", "bb", "cc"]
    texts(["bb"])
    assert encoded == ["aa", "bb", "cc", "bb"]
    whole = texts(["dddd", "eeee", "aa"])
    assert [len(one) for one in whole] == [4, 4, 2]
    assert list(texts.kept) == ["dddd", "eeee", "aa"]
    assert texts.bytes == sum(one.nbytes for one in texts.kept.values())
