"""train/runs: every command is one the stages understand, what is done is skipped, what travels comes back whole."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from train import configs
from train.__main__ import STAGES, main
from train.loop.checkpoints import load_state, save_state

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "train" / "runs"


def run(*stages, python=sys.executable, run, script="mini_gpu.sh", **more):
    environment = {**os.environ, "RUN": str(run), "PYTHON": str(python), "WORKERS": "3", **more}
    return subprocess.run(
        ["bash", RUNS / script, *stages], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def recorder(tmp_path):
    """A "python" that writes down the modules it is asked to run, and runs what comes on its standard input."""
    path, calls = tmp_path / "python", tmp_path / "calls"
    calls.touch()
    lines = ("#!/bin/bash", f'[ "$1" = - ] && exec {sys.executable} "$@"', f'{{ printf "%q " "$@"; echo; }} >> {calls}')
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path, lambda: [shlex.split(line) for line in calls.read_text().splitlines()]


def parsed(calls, monkeypatch):
    """Options of each `python -m train` among the calls, torchrun's too, as the stage gets them; its recipe is loaded."""
    asked = [call[call.index("train", call.index("-m")) :][1:] for call in calls]
    seen = []
    for stage in {call[0] for call in asked}:
        module = importlib.import_module(STAGES[stage][0])
        monkeypatch.setattr(module, "run", lambda options: seen.append(options) or 0)
    for call in asked:
        assert main(call) == 0
        if getattr(seen[-1], "config", None) and call[0] != "shards":
            configs.load(seen[-1].config, "pretrain" if call[0] == "evaluate" else call[0])
    return [call[0] for call in asked], seen


def test_turbo_scores_what_it_exports(recorder, tmp_path, monkeypatch):
    """Sweep, ablation, training and export read one recipe; the student is scored at five numbers of steps, and by its bars."""
    python, calls = recorder
    out, fields = tmp_path / "turbo", "COMPUTE=bfloat16 SEED=9"
    asked = ("sweep", "ablate", "distil", "export", "score", "bars")
    done = run(*asked, python=python, run=out, script="mini_turbo.sh", FIELDS=fields, SIZES="64x64 128x128")
    assert done.returncode == 0, done.stderr
    stages, seen = parsed(calls(), monkeypatch)
    assert stages == ["distill"] * 4 + ["evaluate"] * 9
    given = ("GUIDANCE=2.0", "TEACHER_GUIDANCE=2.0", "COMPUTE=bfloat16", "SEED=9", "r=32,alpha=64,targets=all")
    assert {(*one.set, one.lora) for one in seen[:4]} == {given}
    assert [one.sweep for one in seen[:4]] == [True, False, False, False]
    assert [one.ablate for one in seen[:4]] == [False, True, False, False]
    student = str(seen[3].export)
    assert [(one.steps, one.guidance) for one in seen[4:9]] == [(n, [1.0]) for n in (4, 2, 3, 6, 8)]
    assert {one.model for one in (*seen[4:9], *seen[11:])} == {student}
    assert [(one.size, one.guidance) for one in seen[11:]] == [((64, 64), 2.0), ((128, 128), 2.0)]
    assert [one.guidance for one in seen[9:11]] == [[2.0], [2.0]]
    assert {one.teacher for one in seen[11:]} == {str(seen[3].init)} == {one.model for one in seen[9:11]}


def test_mini_goes_from_stage_to_stage(recorder, tmp_path, monkeypatch):
    """What a stage starts from is what the one before it wrote; an exported one is not trained again."""
    python, calls = recorder
    out = tmp_path / "run"
    done = run(python=python, run=out, script="mini.sh")
    assert done.returncode == 0, done.stderr
    stages, seen = parsed(calls(), monkeypatch)
    assert stages == ["vae", "encoder", *["pretrain"] * 6, *["reasoner"] * 2, *["evaluate"] * 2]
    vae, encoder, first, first_export, second, second_export, mixed, mixed_export, reasoner, writes, scores, _ = seen
    assert (first.vae, first.encoder, first.init) == (vae.out, encoder.out / "encoder.pt", None)
    assert (first_export.out, first_export.vae, second.init) == (first.out, vae.out, first_export.export)
    assert (second_export.out, second_export.config, mixed.init) == (second.out, second.config, second_export.export)
    assert mixed.config == mixed_export.config != second.config
    assert (mixed_export.out, Path(scores.model)) == (mixed.out, mixed_export.export)
    assert reasoner.init == writes.export == mixed_export.export
    assert writes.out == reasoner.out
    (out / "64").mkdir(parents=True)
    (out / "64" / "model_index.json").touch()
    assert run(python=python, run=out, script="mini.sh").returncode == 0
    assert len(calls()) == 2 * len(seen) - 2


def test_an_interrupted_stage_is_not_followed_by_the_next(recorder, tmp_path):
    python, calls = recorder
    python.write_text(python.read_text() + "kill -INT $PPID\n")
    assert run(python=python, run=tmp_path / "run", script="mini.sh").returncode == 130
    assert len(calls()) == 1


@pytest.mark.parametrize("nodes", ["1", "16"])
def test_the_released_recipe_goes_from_images_to_weights(recorder, tmp_path, monkeypatch, nodes):
    python, calls = recorder
    more = {"IMAGES": "photos", "CHECKPOINT": "lens-base", "NODES": nodes, "HOST": "node0", "script": "released.sh"}
    done = run("shards", "pretrain", "mixed", "export", python=python, run=tmp_path / "run", **more)
    assert done.returncode == 0, done.stderr
    launched = [call for call in calls() if call[:2] == ["-m", "torch.distributed.run"]]
    options = get_args_parser().parse_args([*launched[0][2:]])
    assert (options.nnodes, options.nproc_per_node, options.standalone) == (
        ("1:1", "8", True) if nodes == "1" else ("16", "8", False)
    )
    stages, (shards, held, first, mixed, export) = parsed(calls(), monkeypatch)
    assert stages == ["shards", "shards", "pretrain", "mixed_resolution", "mixed_resolution"]
    assert (shards.split, held.split, shards.held_out) == ("train", "held_out", held.held_out)
    assert {(o.data, o.validate, str(o.model)) for o in (first, mixed)} == {(shards.out, held.out, "lens-base")}
    last = configs.load(first.config, "pretrain").STEPS
    assert mixed.init == first.out / "checkpoints" / f"step_{last:07}"
    assert export.out == mixed.out
    without = run("pretrain", python=python, run=tmp_path / "run", script="released.sh", CHECKPOINT="")
    assert (without.returncode, "CHECKPOINT: a released folder" in without.stderr) == (1, True)


def test_every_command_is_understood(recorder, tmp_path, monkeypatch):
    python, calls = recorder
    stages = ("vae", "encoder", "pretrain", "export", "mixed", "score")
    for extra in ({}, {"PRETRAIN": "--init runs/gpu/mini --joint-steps 0 --steps 3000"}):
        done = run(*stages, python=python, run=tmp_path / "run", **extra)
        assert done.returncode == 0, done.stderr
    asked, seen = parsed(calls(), monkeypatch)
    assert asked == ["vae", "encoder", "pretrain", "pretrain", "mixed_resolution", "evaluate"] * 2
    fresh, again, mixed = seen[2], seen[8], seen[4]
    assert (str(mixed.init), str(mixed.vae)) == (f"{tmp_path}/run/mini", f"{tmp_path}/run/mini/vae")
    assert (str(fresh.encoder), fresh.init) == (f"{tmp_path}/run/encoder/encoder.pt", None)
    assert (again.encoder, str(again.init), again.joint_steps, again.steps) == (None, "runs/gpu/mini", 0, 3000)
    assert {o.device for o in (*seen[:3],)} == {"cuda"}


def test_the_last_stage_that_was_trained_is_exported(recorder, tmp_path):
    python, calls = recorder
    for state, stage in (("base/pretrain.pt", "pretrain"), ("mixed/mixed_resolution.pt", "mixed_resolution")):
        save_state(tmp_path / state, {"stage": stage})
        done = run("export", python=python, run=tmp_path)
        assert done.returncode == 0, done.stderr
        assert calls()[-1][2] == stage
        assert calls()[-1][-2:] == ["--export", f"{tmp_path}/mini"]


def test_what_is_done_is_skipped(recorder, tmp_path):
    python, calls = recorder
    out = tmp_path / "run"
    save_state(out / "vae" / "joint.pt", {"stage": "vae joint", "mean": torch.zeros(32), "step": 1})
    save_state(out / "encoder" / "encoder.pt", {"stage": "encoder", "step": 10**6})
    done = run("vae", "encoder", python=python, run=out)
    assert (done.returncode, calls()) == (0, []), done.stderr
    save_state(out / "vae" / "joint.pt", {"stage": "vae joint", "mean": None, "step": 1})
    again = run("vae", python=python, run=out)  # statistics are missing: it goes on
    assert again.returncode == 0, again.stderr
    assert [call[:3] for call in calls()] == [["-m", "train", "vae"]]


@pytest.mark.nightly
def test_what_travels_comes_back_whole(tmp_path):
    out, back = tmp_path / "run", tmp_path / "back"
    for name, text in {"transformer/a.safetensors": "aa", "vae/b.safetensors": "b", "model_index.json": "{}"}.items():
        (out / "mini" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "mini" / name).write_text(text)
    (out / "base").mkdir()
    (out / "base" / "log.jsonl").write_text('{"step": 1}\n')
    state = {"stage": "vae joint", "mean": torch.zeros(2), "ema": {"average": {"a": torch.ones(3)}}}
    save_state(out / "vae" / "joint.pt", {**state, "model": torch.zeros(99), "optimizer": {}})
    done = run("pack", run=out)
    assert done.returncode == 0, done.stderr
    assert len(list((out / "home").iterdir())) <= 8

    done = run("unpack", str(out / "home"), run=back)
    assert done.returncode == 0, done.stderr
    for file in ("mini/transformer/a.safetensors", "mini/vae/b.safetensors", "mini/model_index.json", "base/log.jsonl"):
        assert (back / file).read_bytes() == (out / file).read_bytes()
    found = load_state(back / "vae" / "joint.pt", "vae joint")
    assert found.keys() == {"format", "stage", "mean", "ema"}
    assert torch.equal(found["ema"]["average"]["a"], torch.ones(3))

    (out / "mini" / "transformer" / "a.safetensors").write_bytes(bytes(15_000_001))
    done = run("pack", run=out)
    assert done.returncode == 1
    assert "transformer.tar" in done.stderr


def test_mini_rl_trains_exports_its_best_state_and_compares(recorder, tmp_path, monkeypatch):
    python, calls = recorder
    out = tmp_path / "rl"
    done = run(out, "KL_WEIGHT=1.0", python=python, run=tmp_path, script="mini_rl.sh", LIMIT="9m")
    assert done.returncode == 0, done.stderr
    stages, seen = parsed(calls(), monkeypatch)
    assert stages == ["rl_prompts", "rl", "rl", "rl", *["evaluate"] * 6]
    written, sought, trained, exported, base, own, gain, *_ = seen
    assert (sought.prompts, sought.hardest, sought.init) == (written.out, 150, trained.init)
    assert (sought.out / "hardest.jsonl", sought.set) == (trained.prompts, ["KL_WEIGHT=1.0", "GROUP=4"])
    assert (trained.init, trained.set, trained.stop_after, trained.out) == ("mini-base", ["KL_WEIGHT=1.0"], 540, out)
    assert (str(exported.state), exported.export) == ("best", out / "export")
    assert (base.model, own.model, base.guidance) == ("mini-base", f"{out}/export/lora", [1.0, 3.0])
    assert [str(path) for path in (*gain.base, *gain.rl)] == [f"{one.out}/scores.json" for one in (base, own)]


@pytest.mark.parametrize("script", ["mini_gpu.sh", "released.sh"])
def test_an_unknown_stage_is_refused(tmp_path, script):
    done = run("fly", run=tmp_path, script=script)
    assert done.returncode == 2
    assert "no stage fly" in done.stderr
    assert run(run=tmp_path, script=script).returncode == 2
