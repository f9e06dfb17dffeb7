"""`python -m bench` as it is called: lists, runs through pytest-benchmark, profiles, refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import machine, profiling
from bench.case import Case, Subject, Work
from bench.result import load
from bench.timing import CpuClock

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run in a process of its own: one case cannot agree with its oracle, another cannot even be prepared."""
    out = tmp_path_factory.mktemp("run") / "made" / "a.json"
    program = (
        "import sys; from bench import __main__ as b; from bench.suites import ops; from bench.case import *\n"
        "make = ops.prepare\n"
        "def off(stem, *rest):\n"
        "    if stem == 'guidance_step': raise NameError('broken')\n"
        "    work = make(stem, *rest)\n"
        "    if stem == 'gated_residual': work.subjects['ours'] = Subject(lambda named: named['x'])\n"
        "    return work\n"
        "ops.prepare = off; sys.exit(b.main(sys.argv[1:]))"
    )
    words = ["run", "ops", "--tiny", "--seconds", "0.01", "--subject", "ours", "--subject", "spec_eager"]
    words += ["--case", "ops/swiglu/small/*/forward", "--case", "ops/gated_residual/small/fp32/forward"]
    words += ["--case", "ops/guidance_step/small/fp32/forward"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-c", program, *words, "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True), out


def test_a_run_stores_what_it_measured_in_pytest_benchmarks_form(run):
    _, out = run
    result = load(out)
    assert set(result.rows) == {
        (f"tiny/ops/swiglu/small/{d}/forward", s) for d in ("bf16", "fp32") for s in ("ours", "spec_eager")
    } | {("tiny/ops/gated_residual/small/fp32/forward", "spec_eager")}
    entry = json.loads(out.read_text())["benchmarks"][0]
    assert entry["stats"]["rounds"] == len(entry["stats"]["data"]) == sum(entry["extra_info"]["passes"])
    assert entry["stats"]["min"] == pytest.approx(entry["extra_info"]["best"], abs=0)
    assert entry["group"] == entry["extra_info"]["case"]
    assert result.bench["ceilings"]["copy"] > 0
    assert result.identity == machine.card(torch.device("cpu"))["identity"] | {"threads": result.identity["threads"]}
    assert "load_1min" in result.bench["before"]
    assert "load_1min" in result.bench["after"]


def test_a_wrong_result_fails_the_run_and_is_in_its_table(run):
    done, out = run
    assert done.returncode == 1
    case = "tiny/ops/gated_residual/small/fp32/forward"
    assert "away from the oracle" in load(out).bench["failed"][case]["ours"]
    assert f"| {case} | ours | FAILED: Disagreement" in done.stdout
    assert (case, "spec_eager") in load(out).rows, "the others are timed all the same"
    broken = dict.fromkeys(("ours", "spec_eager"), "NameError: broken")
    assert load(out).bench["failed"]["tiny/ops/guidance_step/small/fp32/forward"] == broken
    assert load(out).bench["asked"]["subjects"] == ["ours", "spec_eager"]
    assert case in load(out).bench["asked"]["cases"]
    assert "two runs may differ by more" in done.stdout


def test_lists_are_of_this_machine_or_of_a_gpu(capsys):
    assert bench.main(["list", "--gpu", "--case", "step/*"]) == 0
    assert "step/1024/cfg/text415/bf16" in capsys.readouterr().out.splitlines()
    assert bench.main(["list", "--tiny", "--subjects", "--case", "step/64/cfg/text5/fp32"]) == 0
    assert capsys.readouterr().out.split()[1:4] == ["ours", "ours_batch_invariant", "ours_op_by_op"]


def test_mistakes_exit_with_2(capsys, tmp_path):
    assert bench.main(["run", "ops", "--tiny", "--case", "nothing/*"]) == 2
    assert bench.main(["run", "ops", "--tiny", "--case", "ops/swiglu/*", "--trace", str(tmp_path / "t.json")]) == 2
    assert "one case, not 4" in capsys.readouterr().err
    one = ["run", "ops", "--tiny", "--case", "ops/swiglu/small/fp32/forward"]
    assert bench.main([*one, "--device", "cpu", "--profile"]) == 2
    assert bench.main([*one, "--trace", str(tmp_path / "t.json"), "--subject", "theirs"]) == 2
    assert "no subject 'theirs' here" in capsys.readouterr().err
    assert bench.main([*one, "--subject", "theirs"]) == 2, "measuring nothing is no success"
    assert "no subject 'theirs' here; these cases have ours, spec_compiled, spec_eager" in capsys.readouterr().err
    assert bench.main(["list", "--gpu", "--case", "nothing/*"]) == 2
    assert bench.main([*one, "--trace", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err
    for words in ([], [*one, "--threads", "0"], [*one, "--seconds", "-1"], [*one, "--seconds", "nan"]):
        with pytest.raises(SystemExit) as leaving:
            bench.main(words)
        assert leaving.value.code == 2


def test_a_trace_holds_one_call_under_its_name(tmp_path, capsys):
    file = tmp_path / "trace.json"
    one = ["run", "ops", "--tiny", "--case", "ops/swiglu/small/fp32/forward", "--subject", "spec_eager"]
    assert bench.main([*one, "--trace", str(file)]) == 0
    assert "aten::silu" in capsys.readouterr().out
    names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count("aten::silu") == 1
    assert "tiny/ops/swiglu/small/fp32/forward [spec_eager]" in names


def test_a_profile_holds_exactly_one_launch_between_its_marks():
    from contextlib import contextmanager

    order = []

    @contextmanager
    def marks(name):
        order.append(f"start {name}")
        yield
        order.append("stop")

    subject = Subject(lambda x: order.append("launch"))
    launcher = CpuClock().launcher(subject, [(1,), (2,)])
    profiling.one_launch(launcher, "x", marks)
    assert order == ["start x", "launch", "stop"]


def test_a_profile_of_ours_that_cannot_run_says_why_and_what_must_be_put_back_is():
    def fails(x):
        raise RuntimeError("no kernel for this")

    back = []
    subjects = {"ours": Subject(fails), "other": Subject(lambda x: x + 1, restore=lambda: back.append(1))}
    work = Work([(torch.randn(3),)], subjects, lambda x: x + 1, 1e-3, 1.0, 1.0)
    case = Case("t/x", tuple(subjects), lambda device: work)
    with pytest.raises(ValueError, match="t/x: ours has failed: RuntimeError: no kernel for this"):
        profiling.prepared(case, "ours", torch.device("cpu"))
    assert profiling.prepared(case, "other", torch.device("cpu")).outputs() is not None
    assert back == [1]


def test_the_throttle_reasons_are_named():
    names = {"None": 0, "GpuIdle": 1, "SwPowerCap": 4, "HwSlowdown": 8, "All": 13}
    assert machine.throttle_reasons(0, names) == []
    assert machine.throttle_reasons(1 | 4 | 8, names) == ["HwSlowdown", "SwPowerCap"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("AMD EPYC", "epyc"),
        ("Intel(R) Xeon(R) Processor", "xeon"),
        ("", "unknown"),
    ],
)
def test_results_lie_in_a_folder_of_their_device(name, folder):
    assert machine.folder_name({"device": name}) == folder
