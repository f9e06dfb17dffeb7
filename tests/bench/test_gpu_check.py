"""The one command on a GPU: its plan, its time, what it leaves behind when it is cut off."""

import json
import subprocess
import sys

import pytest
import torch

from bench import gpu_check, journal, plugin, tables
from bench.gpu_check import Stage, check, gpu_tests, main, plan
from bench.plugin import SPENT
from bench.suites import cases
from tests.bench.results import result, row
from tests.bench.test_compare import as_file


def python(code):
    return [sys.executable, "-c", code]


def test_the_plan_builds_first_checks_tiles_then_tests_then_measures(tmp_path):
    stages = plan(tmp_path, "compute-sanitizer", gpu_tests(), "90a")
    names = [s.name for s in stages]
    assert names[:4] == ["build", "tiles", "tiles of GEMMs and attention", "gpu tests"]
    assert names[4:6] == ["compute-sanitizer memcheck", "compute-sanitizer racecheck"]
    assert [n.removeprefix("bench ") for n in names[6:]] == ["e2e", "step", "attention", "gemm", "ops", "train"]
    assert [s.name for s in stages if s.needed] == ["build"], "rounding ends nothing"
    assert stages[0].env["LENS_CUDA_ARCHS"] == "90a"
    assert len(plan(tmp_path, None, [], "90a")) == len(stages) - 2


def test_a_broken_attention_library_does_not_end_the_run(tmp_path):
    rows, hard = plan(tmp_path, None, gpu_tests(), "90a")[1:3]
    command = [*rows.command, *(word for word in hard.command if word.startswith(gpu_check.KERNELS)), "--collect-only"]
    done = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True)
    named = [line for line in done.stdout.splitlines() if "::" in line]
    for file in ("test_ops_gpu", "test_joint_attention_gpu", "test_linear_fused_gpu"):
        assert any(file in line for line in named), done.stdout
    assert not any("library" in line for line in named)
    assert 25 <= sum("narrow" in line for line in named) <= 40, "what the stages of compute-sanitizer are sized for"
    assert gpu_check.ROWS in rows.command
    assert gpu_check.ROWS not in hard.command
    assert all(word.startswith(gpu_check.KERNELS) for word in hard.command if word.startswith("tests/"))


def test_a_file_that_lacks_a_package_fails_alone(tmp_path):
    (tmp_path / "test_lacking.py").write_text("import no_such_package\n")
    (tmp_path / "test_fine.py").write_text(f"import pytest\n@pytest.mark.{'gpu'}\ndef test_it():\n    pass\n")
    words = gpu_check.pytest_command("test_lacking.py", "test_fine.py", "-c", str(tmp_path / "pytest.ini"))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 passed, 1 error" in done.stdout


def measured_by(stages):
    """Ids of the cases that stages would measure; every glob must find some."""
    found = []
    for words in (stage.command for stage in stages if stage.name.startswith("bench")):
        for glob in (words[i + 1] for i, word in enumerate(words) if word == "--case"):
            ids = [case.id for case in cases([words[words.index("run") + 1]], [glob])]
            assert ids, glob
            found += ids
    return found


def files_of(stages):
    return {s.command[s.command.index("--out") + 1] for s in stages if "--out" in s.command}


def test_its_cases_exist_and_the_headlines_are_among_them(tmp_path):
    found = measured_by(plan(tmp_path, None, [], "90a"))
    for variant in ("lens", "turbo"):
        for stage in ("total", "denoise", "host"):
            assert f"e2e/{variant}/1024/b1/bf16/{stage}" in found
    assert "step/1024/cfg/text415/bf16" in found
    assert set(tables.CASES) <= set(found)


def test_it_leaves_at_most_eight_files(tmp_path):
    everything = {part.suite: ["x/y"] for part in gpu_check.PARTS}
    for stages in (plan(tmp_path, "x", [], "90a"), gpu_check.rest(tmp_path, everything, 1, "90a")):
        assert len(files_of(stages) | {"summary.json", "log.txt"}) <= 8


def test_every_case_of_every_suite_is_measured_by_the_first_command_or_the_second(tmp_path):
    first = set(measured_by(plan(tmp_path, None, [], "90a")))
    (tmp_path / "summary.json").write_text("{}")
    for part in gpu_check.PARTS:
        of_part = [row(case, 1.0) for case in sorted(first) if case.startswith(part.suite)]
        as_file(tmp_path / f"{part.suite}.json", result(*of_part))
    missing = gpu_check.missing_cases([tmp_path])
    stages = gpu_check.rest(tmp_path, missing, 1, "90a")
    second = set(measured_by(stages))
    assert not first & second
    assert first | second == {case.id for case in cases()}
    assert [s.name for s in stages[:2]] == ["build", "tiles"]
    assert not [s for s in stages if "sanitizer" in s.name]
    assert not files_of(stages) & files_of(plan(tmp_path, None, [], "90a")), "results so far stay as they are"


def test_what_had_no_time_is_missing_and_what_failed_or_cannot_run_is_not(tmp_path):
    ids = [case.id for case in cases(("train", "step"))]
    made = result(row(ids[0], 1.0))
    made.bench["failed"][ids[1]] = {"ours": "Disagreement: off"}
    made.bench["left_out"] = {ids[2]: {"ours": "no diffusers"}, ids[3]: {"ours": SPENT}}
    as_file(tmp_path / "a-rest1.json", made)
    missing = gpu_check.missing_cases([tmp_path])
    assert [*missing["train"], *missing["step"]] == ids[3:]


def test_the_second_command_goes_on_and_ends_when_nothing_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "have").mkdir()
    (tmp_path / "have" / "summary-rest1.json").write_text("{}")
    words = ["--rest", "--plan", "--out", str(tmp_path / "out"), "--have", str(tmp_path / "have")]
    assert main(words) == 0
    assert "step-rest2.json" in capsys.readouterr().out
    as_file(tmp_path / "have" / "all.json", result(*(row(case.id, 1.0) for case in cases())))
    assert main(words) == 0
    assert "every case of every suite has a result" in capsys.readouterr().out


def test_a_talkative_stage_leaves_its_end_in_the_log(tmp_path):
    talk = python(f"print('x' * {3 * gpu_check.LOG}); print('last words')")
    assert check(tmp_path, [Stage("talks", talk, 0, 30), Stage("next", python("print('next')"), 0, 30)], 100, {}) == 0
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 1.1 * gpu_check.LOG
    assert "(its end)" in log
    assert "last words" in log
    assert log.endswith("next\n")
    assert json.loads((tmp_path / "summary.json").read_text())["stages"][0]["tail"].endswith("last words\n")


def test_only_test_files_with_gpu_tests_are_imported():
    files = gpu_tests()
    assert "tests/gpu/test_ops_gpu.py" in files
    assert not [f for f in files if f.startswith(("tests/cli", "tests/packaging", "tests/bench/test_gpu_check"))]


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
    assert gpu_check.missing() == {"diffusers": "left out: what of e2e needs pixels"}


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


def watched(tmp_path, body):
    """A stage of some tests, with the plugin and a journal."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    (tmp_path / "test_some.py").write_text(f"import os, time, pytest\npytestmark = pytest.mark.{'gpu'}\n{body}")
    words = gpu_check.pytest_command(
        *gpu_check.WATCHED, str(tmp_path / "test_some.py"), "-c", str(tmp_path / "pytest.ini")
    )
    return Stage("tests", words, 0, 60, env={"LENS_STILL": "3"}, journal=True)


def outcome_of(tmp_path, stage, limit=60):
    check(tmp_path / "out", [stage], limit, {})
    return json.loads((tmp_path / "out" / "summary.json").read_text())["stages"][0]


def test_a_test_that_hangs_and_one_that_crashes_cost_themselves_alone(tmp_path):
    body = """
def test_first(): assert 1 == 2, "the reason"
def test_hangs(): time.sleep(50)
def test_crashes(): os.abort()
def test_last(): open(%r, "w").close()
"""
    found = outcome_of(tmp_path, watched(tmp_path, body % str(tmp_path / "reached")))
    assert found["outcome"] == "failed"
    assert (tmp_path / "reached").exists()
    assert [(line.split()[0], line.split("::")[1].split(":")[0].split()[0]) for line in found["reasons"]] == [
        ("REASON", "test_first"),
        ("LOST", "test_hangs"),
        ("LOST", "test_crashes"),
    ]
    for line, why in zip(
        found["reasons"], ("the reason", "hung, at one place for 3 s", "the process ended while it ran")
    ):
        assert why in line


def test_a_stage_out_of_time_reports_before_it_is_killed(tmp_path):
    asked = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('the report')"
    found = outcome_of(tmp_path, Stage("slow", python(asked), 0, 6))
    assert (found["outcome"], found["tail"]) == ("stopped", "the report\n")
    deaf = Stage("deaf", python("import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"), 0, 1)
    assert outcome_of(tmp_path, deaf)["outcome"] == "stopped"


def test_the_tools_see_every_allocation_and_have_time_or_come_with_the_rest(tmp_path):
    for stage in gpu_check.sanitizer_stages("compute-sanitizer", 0):
        assert stage.env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert stage.most >= 120
        assert stage.command[-2:] == ["-k", "narrow"]
    first = gpu_check.rest(tmp_path, {part.suite: [] for part in gpu_check.PARTS}, 1, "90a", "compute-sanitizer")
    assert [s.name for s in first[2:]] == ["compute-sanitizer memcheck", "compute-sanitizer racecheck"]
    stages = [{"stage": s.name, "outcome": "passed"} for s in first]
    for known in (stages[:-1], stages):
        (tmp_path / "summary.json").write_text(json.dumps({"stages": known}))
        assert gpu_check.sanitized([tmp_path]) == (known is stages)


def test_a_suite_goes_on_behind_a_lost_subject(tmp_path, monkeypatch):
    """What its file holds of whole cases stays; the lost subject has failed, the others of its case are measured."""
    first, second, *_ = cases(("ops",), ["ops/*"], tiny=True)
    path = tmp_path / "journal"
    kept = result(
        *(row(first.id, 1.0, subject=name) for name in first.subjects), row(second.id, 1.0, subject=second.subjects[1])
    )
    as_file(tmp_path / "ops.json", kept)
    for event in ("began", "hung: at one place for 60 s"):
        journal.Journal(path).write(journal.subject(second.id, second.subjects[0]), event)
    monkeypatch.setattr(journal, "journal", journal.Journal(path))
    asked = []
    monkeypatch.setattr(plugin, "measure", lambda case, *_: asked.append((case.id, _[3])) or {})
    bench = plugin.Bench([first, second], torch.device("cpu"), 1.0, None, tmp_path / "ops.json")
    bench.report["ceilings"] = {}
    assert list(bench.cases) == [second.id]
    assert {b["extra_info"]["case"] for b in bench._earlier} == {first.id}
    assert bench.rows(second.id)[second.subjects[0]] == {"failed": "hung: at one place for 60 s"}
    assert asked == [(second.id, second.subjects[1:])]
