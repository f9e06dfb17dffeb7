"""The one command on a GPU: its plan, its time, what it leaves behind when it is cut off."""

import json
import subprocess
import sys

import pytest

from bench import gpu_check
from bench.gpu_check import Stage, check, gpu_tests, main, plan
from bench.suites import cases


def python(code):
    return [sys.executable, "-c", code]


def test_the_plan_builds_first_checks_tiles_then_tests_then_measures(tmp_path):
    stages = plan(tmp_path, "compute-sanitizer", gpu_tests(), "90a")
    names = [s.name for s in stages]
    assert names[:5] == ["build", "tiles", "gpu tests", "compute-sanitizer memcheck", "compute-sanitizer racecheck"]
    assert [n.removeprefix("bench ") for n in names[5:]] == ["step", "e2e", "ops", "attention", "gemm", "train"]
    assert [s.needed for s in stages[:3]] == [True, True, False]
    assert stages[0].env["LENS_CUDA_ARCHS"] == "90a"
    assert len(plan(tmp_path, None, [], "90a")) == len(stages) - 2


def test_a_broken_attention_library_does_not_end_the_run(tmp_path):
    tiles = plan(tmp_path, None, gpu_tests(), "90a")[1]
    done = subprocess.run([*tiles.command, "--collect-only"], cwd=gpu_check.ROOT, capture_output=True, text=True)
    named = [line for line in done.stdout.splitlines() if "::" in line]
    assert any("test_ops_gpu" in line for line in named), done.stdout
    assert not any("library" in line for line in named)


def test_its_cases_exist(tmp_path):
    for stage in plan(tmp_path, None, [], "90a"):
        if stage.name.startswith("bench"):
            words = stage.command
            globs = [words[i + 1] for i, word in enumerate(words) if word == "--case"]
            for glob in globs or ["*"]:
                assert cases([words[words.index("run") + 1]], [glob]), glob


def test_it_leaves_at_most_eight_files(tmp_path):
    outs = {s.command[s.command.index("--out") + 1] for s in plan(tmp_path, "x", [], "90a") if "--out" in s.command}
    assert len(outs | {"summary.json", "log.txt"}) <= 8


def test_only_test_files_with_gpu_tests_are_imported():
    files = gpu_tests()
    assert "tests/gpu/test_ops_gpu.py" in files
    assert not [f for f in files if f.startswith(("tests/cli", "tests/packaging"))]


def test_outcomes_are_written_as_they_come(tmp_path, capsys):
    stages = [
        Stage("good", python("print('fine')"), 0, 30, needed=True),
        Stage("bad", python("print('why'); raise SystemExit(3)"), 0, 30),
        Stage("slow", python("import time; time.sleep(60)"), 0, 0.5),
        Stage("late", python("pass"), 10**6, 30),
    ]
    assert check(tmp_path, stages, 100, {"device": "x"}) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [s["outcome"] for s in summary["stages"]] == ["passed", "failed", "stopped", "skipped"]
    assert summary["stages"][1]["code"] == 3
    assert "why" in summary["stages"][1]["tail"]
    assert summary["complete"]
    assert "FAILED: bad" in capsys.readouterr().out
    assert "fine" in (tmp_path / "log.txt").read_text()
    assert not list(tmp_path.glob("*.part"))


def test_nothing_runs_after_a_failed_build(tmp_path):
    stages = [Stage("build", python("raise SystemExit(1)"), 0, 30, needed=True), Stage("tests", python("pass"), 0, 30)]
    assert check(tmp_path, stages, 100, {}) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [s["stage"] for s in summary["stages"]] == ["build"]
    assert not summary["complete"]


def test_a_stopped_stage_that_was_not_needed_is_no_failure(tmp_path):
    stages = [Stage("slow", python("import time; time.sleep(60)"), 0, 0.3), Stage("late", python("pass"), 10**6, 1)]
    assert check(tmp_path, stages, 100, {}) == 0


def test_without_a_gpu_it_says_that_nothing_was_checked(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--out", str(tmp_path / "out")]) == 0
    assert "SKIPPED, nothing was checked" in capsys.readouterr().out
    assert main(["--plan"]) == 0
    assert "compute-sanitizer" in capsys.readouterr().out or gpu_check.shutil.which("compute-sanitizer") is None


def test_what_is_missing_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else object())
    assert gpu_check.missing() == {"diffusers": "left out: decode and total of e2e"}


@pytest.mark.parametrize("limit", [540])
def test_it_fits_a_call_of_nine_minutes(limit):
    assert limit > gpu_check.LIMIT


def test_tests_leave_the_suites_their_time_after_the_slowest_build(tmp_path):
    """What the stages may take at most, one after another, from the first to the last that is no suite."""
    left = gpu_check.LIMIT
    stages = plan(tmp_path, "compute-sanitizer", gpu_tests(), "90a")
    for stage in (s for s in stages if not s.name.startswith("bench")):
        if left - stage.leaves >= stage.least:
            left -= min(stage.most, left - stage.leaves)
    assert left >= gpu_check.SUITES


def test_a_stage_is_stopped_before_the_time_it_leaves_and_told_its_own(tmp_path):
    told = python("import sys, time; print(sys.argv[1:]); time.sleep(60 * (len(sys.argv) < 3))")
    stages = [
        Stage("tests", told, 0, 30, leaves=4.2),
        Stage("no room", told, 3, 30, leaves=4.2),
        Stage("suite", told, 0, 30, ends=1.0),
    ]
    assert check(tmp_path, stages, 5.0, {}) == 0
    done = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert [s["outcome"] for s in done] == ["stopped", "skipped", "passed"]
    assert done[0]["seconds"] < 3
    assert done[2]["tail"].strip().endswith("['--budget', '3']")
