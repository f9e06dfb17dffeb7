"""bench/mini_gpu.sh: its commands are ones the stages understand, what is done is skipped, what travels comes back whole."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.__main__ import STAGES, main
from train.loop.checkpoints import load_state, save_state

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "mini_gpu.sh"


def run(*stages, python=sys.executable, run, **more):
    environment = {**os.environ, "RUN": str(run), "PYTHON": str(python), "WORKERS": "3", **more}
    return subprocess.run(["bash", SCRIPT, *stages], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def recorder(tmp_path):
    """A "python" that writes down the modules it is asked to run, and runs what comes on its standard input."""
    path, calls = tmp_path / "python", tmp_path / "calls"
    calls.touch()
    lines = ("#!/bin/bash", f'[ "$1" = - ] && exec {sys.executable} "$@"', f'{{ printf "%q " "$@"; echo; }} >> {calls}')
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path, lambda: [shlex.split(line) for line in calls.read_text().splitlines()]


def test_every_command_is_understood(recorder, tmp_path, monkeypatch):
    python, calls = recorder
    stages = ("vae", "encoder", "pretrain", "export", "mixed", "score")
    for extra in ({}, {"PRETRAIN": "--init runs/gpu/mini --joint-steps 0 --steps 3000"}):
        done = run(*stages, python=python, run=tmp_path / "run", **extra)
        assert done.returncode == 0, done.stderr
    asked = [call[2:] for call in calls() if call[:2] == ["-m", "train"]]
    assert [call[0] for call in asked] == ["vae", "encoder", "pretrain", "pretrain", "mixed_resolution", "evaluate"] * 2
    seen = []
    for stage in {call[0] for call in asked}:
        module = importlib.import_module(STAGES[stage][0])
        monkeypatch.setattr(module, "run", lambda options: seen.append(options) or 0)
    for call in asked:
        assert main(call) == 0
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


def test_an_unknown_stage_is_refused(tmp_path):
    done = run("fly", run=tmp_path)
    assert done.returncode == 2
    assert "no stage fly" in done.stderr
    assert run(run=tmp_path).returncode == 2
