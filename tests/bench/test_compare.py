"""What counts as slower: planted regressions, bands, unlike cards."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import __main__ as bench
from bench import abba as abba_module
from bench.abba import abba
from bench.compare import compare, interval, lost, mann_whitney, runs_needed, summary
from bench.machine import Incomparable
from bench.result import NoResult, load, load_runs, parse, table, unsteadiness
from tests.bench.results import IDENTITY, result, row

ROOT = Path(__file__).parents[2]
CPU = {"device": "AMD EPYC", "multiprocessors": None}


@pytest.mark.parametrize(
    ("growth", "band", "word"),
    [
        (1.03, 0.002, "SLOWER"),  # a planted 3 % is caught where the machine is steady
        (1.03, 0.019, "SLOWER"),
        (1.03, 0.04, "inconclusive"),  # and hidden where it is not
        (1.10, 0.04, "SLOWER"),
        (1.10, 0.12, "inconclusive"),
        (1.019, 0.0, "alike"),  # within 2 %
        (1.0, 0.01, "alike"),
        (1.0, 0.03, "inconclusive"),
        (0.97, 0.01, "FASTER"),
        (0.97, 0.04, "inconclusive"),
    ],
)
def test_a_change_needs_the_estimate_beyond_two_percent_and_the_interval_beyond_one(growth, band, word):
    """One run a side on a GPU, whose two passes stand in for runs."""
    (verdict,) = compare([result(row("x", 0.06, band))], [result(row("x", 0.06 * growth, band))])
    assert verdict.word == word
    assert verdict.ratio == pytest.approx(growth)


def test_the_interval_is_exact():
    """P(U <= k) counted over all orders of 3 and 4 times; the interval of 2 and 2 is the whole range, and of too few none."""
    orders = list(itertools.combinations(range(7), 3))
    counted = [sum(sum(x > y for x in xs for y in set(range(7)) - set(xs)) <= k for xs in orders) for k in range(13)]
    assert mann_whitney(3, 4) == pytest.approx([count / len(orders) for count in counted])
    assert interval([1.0, 1.1], [2.0, 2.2], 0.34) == (pytest.approx(2.0), pytest.approx(2 / 1.1), pytest.approx(2.2))
    assert interval([1.0, 1.1], [2.0, 2.2], 0.05)[1:] == (0.0, math.inf)
    assert [runs_needed(cases) for cases in (1, 16, 100)] == [4, 6, 8]
    assert interval([1.0] * 4, [1.0] * 4, 0.05) == (1.0, 1.0, 1.0)


def runs(generator, seconds, spread, count=6, cases=16):
    """Runs of one build on a noisy CPU: every run of a case is off by a factor of its own."""
    noise = np.exp(spread * generator.standard_normal((count, cases)))
    return [result(*(row(f"c{i}", seconds * f) for i, f in enumerate(factors)), **CPU) for factors in noise]


def test_the_same_build_twice_is_not_called_slower_or_faster():
    """Sixteen cases whose runs differ by 20 %: at most one comparison in twenty may say anything at all."""
    generator, said = np.random.default_rng(0), 0
    for _ in range(100):
        verdicts = compare(runs(generator, 1.0, 0.2), runs(generator, 1.0, 0.2))
        said += any(v.word in ("SLOWER", "FASTER") for v in verdicts)
    assert said <= 5
    assert "inconclusive; changes within 2% pass. Their runs spread by up to" in summary(verdicts, 6)


def test_a_planted_change_is_seen_through_the_spread():
    generator = np.random.default_rng(1)
    for growth, word in ((1.1, "SLOWER"), (1 / 1.1, "FASTER"), (1.0, "alike")):
        spread = 0.02 if growth != 1 else 0.002
        verdicts = compare(runs(generator, 1.0, spread), runs(generator, growth, spread))
        assert [v.word for v in verdicts] == [word] * 16


def test_one_run_a_side_of_a_cpu_tells_nothing():
    generator = np.random.default_rng(2)
    before, after = runs(generator, 1.0, 0.001, 1, 3), runs(generator, 2.0, 0.001, 1, 3)
    verdicts = compare(before, after)
    assert {v.word for v in verdicts} == {"inconclusive"}
    assert "too few runs" in str(verdicts[0])
    assert "1 run(s) a side: 3 case(s) need 5 in turns" in summary(verdicts, 1)


def test_the_two_checkouts_take_turns(tmp_path, capsys):
    """A B B A: a machine that drifts evenly treats both alike. The results are what `compare` reads."""
    other, order = tmp_path / "other", []
    (other / "bench").mkdir(parents=True)
    (other / "bench" / "__main__.py").touch()

    def run(checkout, words, out):
        order.append(checkout)
        out.parent.mkdir(parents=True, exist_ok=True)
        as_file(out, result(row("x", 1.0 + 0.01 * len(order)), **CPU))
        return 0

    found = abba(other, ["ops"], tmp_path / "out", 2, run)
    here = abba_module.ROOT
    assert order == [other, here, here, other] * 2
    sides = [load_runs(tmp_path / "out" / side) for side in ("before", "after")]
    assert [len(side) for side in sides] == [len(paths) for paths in found.values()] == [4, 4]
    (verdict,) = compare(*sides)
    assert verdict.ratio == pytest.approx(1, abs=5e-3), "A-A-B-B would see a growth of 4 %"
    with pytest.raises(ValueError, match="holds results of an earlier call"):
        abba(other, ["ops"], tmp_path / "out", 1, run)
    with pytest.raises(ValueError, match=r"ended with 2 and no result: .*1\.log"):
        abba(other, ["ops"], tmp_path / "new", 1, lambda *_: 2)
    assert bench.main(["abba", str(tmp_path), "ops", "--out", str(tmp_path / "third")]) == 2
    assert "no checkout of Lens here" in capsys.readouterr().err


@pytest.mark.parametrize("safe", ["", "1"])
def test_a_run_is_of_its_checkouts_own_code(tmp_path, monkeypatch, safe):
    """Also where this one is named on the path, or the working folder is not taken from: both sides would be one build."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONSAFEPATH", safe)
    code = "import pathlib, sys\nprint('a table')\npathlib.Path(sys.argv[-1]).write_text(__file__)\nsys.exit(len(sys.argv))"
    for name in ("one", "two"):
        (tmp_path / name / "bench").mkdir(parents=True)
        (tmp_path / name / "bench" / "__init__.py").touch()
        (tmp_path / name / "bench" / "__main__.py").write_text(code)
        out = tmp_path / "out" / f"{name}.json"
        assert abba_module.execute(tmp_path / name, ["ops", "--tiny"], out) == 6
        assert out.read_text() == str(tmp_path / name / "bench" / "__main__.py")
        assert out.with_suffix(".log").read_text() == "a table\n"


def test_an_interrupted_comparison_says_how_what_is_there_is_judged(tmp_path, monkeypatch, capsys):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").touch()

    def run(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(abba_module.abba, "__defaults__", (run,))
    out = tmp_path / "out"
    assert bench.main(["abba", str(tmp_path), "ops", "--out", str(out)]) == 130
    assert f"python -m bench compare {out / 'before'} {out / 'after'}" in capsys.readouterr().err


@pytest.mark.parametrize("key", IDENTITY)
def test_results_of_unlike_machines_are_refused(key):
    with pytest.raises(Incomparable, match=f"{key}: .* and 'other'"):
        compare([result(row("x", 1.0))], [result(row("x", 1.0), **{key: "other"})])


def test_a_card_with_one_more_entry_is_unlike():
    with pytest.raises(Incomparable, match="mig: None and 'on'"):
        compare([result(row("x", 1.0))], [result(row("x", 1.0), mig="on")])


def test_results_without_a_common_case_are_refused():
    with pytest.raises(Incomparable, match="no case"):
        compare([result(row("x", 1.0))], [result(row("y", 1.0))])


def test_comparators_are_judged_only_when_named():
    before = result(row("x", 1.0), row("x", 1.0, subject="reference_eager"), row("x", 1.0, subject="ours_graph"))
    after = result(row("x", 1.0), row("x", 2.0, subject="reference_eager"), row("x", 1.0, subject="ours_graph"))
    assert {v.subject for v in compare([before], [after])} == {"ours", "ours_graph"}
    assert compare([before], [after], ("reference_eager",))[0].word == "SLOWER"


def vanished(before, after, subjects=None, **bench):
    """What was lost, as (case, subject, reason, judged)."""
    after = dataclasses.replace(after, bench={**after.bench, **bench})
    return [dataclasses.astuple(one) for one in lost([before], [after], subjects)]


def test_whatever_stopped_running_is_lost_not_passed():
    comparator = row("y", 1.0, subject="reference_eager")
    before, after = result(row("x", 1.0), row("y", 1.0), comparator), result(row("y", 1.0))
    every = {"cases": ["x", "y"], "subjects": None}
    gone = ("y", "reference_eager", "not reached, or no longer there", False)
    assert vanished(before, after) == [gone], "x was not asked for"
    assert vanished(before, after, asked=every)[1:] == [gone]
    assert vanished(before, after, asked={**every, "subjects": ["ours"]})[1:] == []
    assert vanished(before, after, asked=every, failed={"x": {"ours": "RuntimeError: no"}})[0] == (
        ("x", "ours", "RuntimeError: no", True)
    )
    left = vanished(before, after, ("reference_eager",), left_out={"y": {"reference_eager": "no diffusers"}})
    assert left == [("y", "reference_eager", "no diffusers", True)]


def test_a_vanished_subject_is_named_and_fails_the_comparison_where_it_is_judged(tmp_path, capsys):
    other = row("x", 1.0, subject="library")
    before = as_file(tmp_path / "a.json", result(row("x", 1.0), other, row("x", 1.0, subject="ours_graph")))
    fewer = as_file(tmp_path / "b.json", result(row("x", 1.0), row("x", 1.0, subject="ours_graph")))
    assert bench.main(["compare", str(before), str(fewer)]) == 0
    assert "lost          x [library]  it ran before: not reached" in capsys.readouterr().out
    assert bench.main(["compare", str(before), str(fewer), "--subject", "library", "--subject", "ours"]) == 1
    least = as_file(tmp_path / "c.json", result(row("x", 1.0), other))
    assert bench.main(["compare", str(before), str(least)]) == 1
    assert "LOST          x [ours_graph]" in capsys.readouterr().out
    made = result(other)
    made.bench["failed"]["x"] = dict.fromkeys(("ours", "ours_graph"), "RuntimeError: no")
    assert bench.main(["compare", str(before), str(as_file(tmp_path / "d.json", made))]) == 1
    assert "no subject is left to compare" in capsys.readouterr().out


def as_file(path, made):
    """A result as pytest-benchmark writes it."""
    entries = [
        {
            "stats": {"min": r.best, "median": r.median},
            "extra_info": {"case": c, "subject": s, "band": r.band, **r.more},
        }
        for (c, s), r in made.rows.items()
    ]
    info = {"identity": made.identity, "build": made.build}
    path.write_text(json.dumps({"benchmarks": entries, "machine_info": info, "bench": made.bench}))
    return path


def test_exit_codes(tmp_path, capsys):
    before = as_file(tmp_path / "a.json", result(row("x", 0.060)))
    slow = as_file(tmp_path / "b.json", result(row("x", 0.0618)))
    other = as_file(tmp_path / "c.json", result(row("x", 0.060), driver="581"))
    (tmp_path / "d.json").write_text("{}")
    command = ["compare", str(before)]
    assert bench.main([*command, str(before)]) == 0
    assert bench.main([*command, str(slow)]) == 1
    assert "SLOWER        x [ours]  60 -> 61.8 ms  x1.030 (x1.030 .. 1.030)" in capsys.readouterr().out
    unsure = as_file(tmp_path / "e.json", result(row("x", 0.06, 0.2)))
    assert bench.main(["compare", str(unsure), str(slow)]) == 3, "nothing could be told"
    assert "1 inconclusive" in capsys.readouterr().out
    assert bench.main([*command, str(other)]) == 2
    assert "driver" in capsys.readouterr().err
    assert bench.main([*command, str(tmp_path / "d.json")]) == 2
    assert bench.main([*command, str(tmp_path / "missing.json")]) == 2
    assert "not a result of" in capsys.readouterr().err


def test_a_file_survives_reading_and_its_table_tells_everything(tmp_path):
    made = result(row("x", 0.06, 0.01))
    made.bench["left_out"]["x"] = {"fa3": "not installed"}
    made.bench["failed"]["y"] = {"ours": "Disagreement: off"}
    again = load(as_file(tmp_path / "a.json", made))
    assert again.rows.keys() == made.rows.keys()
    text = table(again)
    for word in (
        "60 ms",
        "1.0%",
        "50%",
        "left out: not installed",
        "FAILED: Disagreement",
        "1.4x its memory bandwidth",
    ):
        assert word in text
    with pytest.raises(NoResult):
        parse(tmp_path, {"benchmarks": [{}]})


@pytest.mark.parametrize(
    ("seconds", "band"), [(float("nan"), 0.0), (0.0, 0.0), (-1.0, 0.0), (1.0, float("nan")), (1.0, -1.0)]
)
def test_a_time_that_is_none_cannot_pass_as_no_slower(tmp_path, seconds, band):
    good, bad = (
        as_file(tmp_path / "a.json", result(row("x", 1.0))),
        as_file(tmp_path / "b.json", result(row("x", seconds, band))),
    )
    for pair in ((good, bad), (bad, good)):
        assert bench.main(["compare", *map(str, pair)]) == 2
    with pytest.raises(NoResult, match="no measurement"):
        load(bad)


def test_a_result_that_does_not_say_what_was_asked_is_none(tmp_path):
    made = result(row("x", 1.0))
    del made.bench["asked"]
    with pytest.raises(NoResult, match="asked"):
        load(as_file(tmp_path / "a.json", made))


@pytest.mark.parametrize(("factor", "suite", "code"), [(1.0, "gone", 1), (1.0, "gemm", 3)])
def test_the_gate_names_what_is_not_measured_or_has_nothing_to_compare_with(tmp_path, factor, suite, code):
    as_file(tmp_path / "gemm.json", result(row("gemm/x", factor), device="NVIDIA None"))
    command = ["bash", str(ROOT / "bench" / "gate.sh"), str(tmp_path), suite]
    done = subprocess.run(command, env={**os.environ, "PY": sys.executable}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("not measured" if code == 1 else "nothing to compare with") in done.stdout


def test_the_workflow_runs_on_ones_own_gpu_without_secrets_and_not_for_pull_requests():
    text = (ROOT / ".github" / "workflows" / "bench.yml").read_text()
    assert "runs-on: [self-hosted, gpu]" in text
    assert not [word for word in ("{{ secrets", "pull_request", "pip install") if word in text]
    assert "pytest and pytest-benchmark" in text, "what the Python there needs is said"
    targets = (ROOT / "Makefile").read_text()
    assert "make gpu-check" in text
    assert "gpu-check:" in targets


def test_a_disturbed_run_says_so():
    calm = result(row("x", 1.0, 0.01), row("y", 1.0, 0.03))
    assert unsteadiness(calm)[0].startswith("Two passes of this run differ by 3.0% in the middle, 3.0% at worst")
    assert len(unsteadiness(calm)) == 1
    rows = {key: dataclasses.replace(r, median=2.06 * r.best) for key, r in calm.rows.items()}
    assert (
        "2 of 2 medians lie more than 25% above the best round, up to x2.06"
        in unsteadiness(dataclasses.replace(calm, rows=rows))[1]
    )


def test_a_share_above_a_ceiling_is_explained():
    made = result(row("x", 1.0))
    assert "Above 100 %" not in table(made)
    made.rows["x", "ours"].more["roof"]["of_copy"] = 2.1
    assert "210%" in table(made)
    assert "Above 100 %: the ceilings are a copy" in table(made)


def test_a_hosted_workflow_runs_the_whole_check_for_pull_requests_without_secrets():
    text = (ROOT / ".github" / "workflows" / "check.yml").read_text()
    assert "\n  pull_request:\n" in text
    assert "run: .ci/run\n" in text
    assert not [word for word in ("{{ secrets", "self-hosted", "pull_request_target") if word in text]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
