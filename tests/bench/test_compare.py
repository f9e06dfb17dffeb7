"""What counts as slower: planted regressions, bands, unlike cards."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench.compare import compare, lost, sight
from bench.machine import Incomparable
from bench.result import NoResult, load, parse, table
from tests.bench.results import IDENTITY, result, row

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("growth", "band", "slower"),
    [
        (1.03, 0.002, True),  # a planted 3 % is caught where the machine is steady
        (1.03, 0.019, True),
        (1.03, 0.04, False),  # and hidden where it is not
        (1.10, 0.04, True),
        (1.10, 0.12, False),
        (1.019, 0.0, False),  # within 2 %
        (0.7, 0.0, False),
    ],
)
def test_slower_is_beyond_two_percent_and_beyond_the_band(growth, band, slower):
    (verdict,) = compare(result(row("x", 0.06, band)), result(row("x", 0.06 * growth)))
    assert verdict.slower is slower
    assert verdict.ratio == pytest.approx(growth)
    (other,) = compare(result(row("x", 0.06)), result(row("x", 0.06 * growth, band)))
    assert other.slower is slower, "the band of either result counts"


@pytest.mark.parametrize("key", IDENTITY)
def test_results_of_unlike_machines_are_refused(key):
    with pytest.raises(Incomparable, match=f"{key}: .* and 'other'"):
        compare(result(row("x", 1.0)), result(row("x", 1.0), **{key: "other"}))


def test_a_card_with_one_more_entry_is_unlike():
    with pytest.raises(Incomparable, match="mig: None and 'on'"):
        compare(result(row("x", 1.0)), result(row("x", 1.0), mig="on"))


def test_results_without_a_common_case_are_refused():
    with pytest.raises(Incomparable, match="no case"):
        compare(result(row("x", 1.0)), result(row("y", 1.0)))


def test_comparators_are_judged_only_when_named():
    before = result(row("x", 1.0), row("x", 1.0, subject="reference_eager"), row("x", 1.0, subject="ours_graph"))
    after = result(row("x", 1.0), row("x", 2.0, subject="reference_eager"), row("x", 1.0, subject="ours_graph"))
    assert {v.subject for v in compare(before, after)} == {"ours", "ours_graph"}
    assert compare(before, after, ("reference_eager",))[0].slower


def told(before, after, subjects=None, **bench):
    """What was lost, as (case, subject, reason, judged)."""
    after = dataclasses.replace(after, bench={**after.bench, **bench})
    return [dataclasses.astuple(one) for one in lost(before, after, subjects)]


def test_whatever_stopped_running_is_lost_not_passed():
    comparator = row("y", 1.0, subject="reference_eager")
    before, after = result(row("x", 1.0), row("y", 1.0), comparator), result(row("y", 1.0))
    every = {"cases": ["x", "y"], "subjects": None}
    vanished = ("y", "reference_eager", "not reached, or no longer there", False)
    assert told(before, after) == [vanished], "x was not asked for"
    assert told(before, after, asked=every)[1:] == [vanished]
    assert told(before, after, asked={**every, "subjects": ["ours"]})[1:] == []
    assert told(before, after, asked=every, failed={"x": {"ours": "RuntimeError: no"}})[0] == (
        ("x", "ours", "RuntimeError: no", True)
    )
    left = told(before, after, ("reference_eager",), left_out={"y": {"reference_eager": "no diffusers"}})
    assert left == [("y", "reference_eager", "no diffusers", True)]


def test_a_vanished_subject_is_named_and_fails_the_comparison_where_it_is_judged(tmp_path, capsys):
    other = row("x", 1.0, subject="library")
    before = as_file(tmp_path / "a.json", result(row("x", 1.0), other, row("x", 1.0, subject="ours_graph")))
    fewer = as_file(tmp_path / "b.json", result(row("x", 1.0), row("x", 1.0, subject="ours_graph")))
    assert bench.main(["compare", str(before), str(fewer)]) == 0
    assert "lost    x [library]  it ran before: not reached" in capsys.readouterr().out
    assert bench.main(["compare", str(before), str(fewer), "--subject", "library", "--subject", "ours"]) == 1
    least = as_file(tmp_path / "c.json", result(row("x", 1.0), other))
    assert bench.main(["compare", str(before), str(least)]) == 1
    assert "LOST    x [ours_graph]" in capsys.readouterr().out
    made = result(other)
    made.bench["failed"]["x"] = dict.fromkeys(("ours", "ours_graph"), "RuntimeError: no")
    assert bench.main(["compare", str(before), str(as_file(tmp_path / "d.json", made))]) == 1
    assert "no subject is left to compare" in capsys.readouterr().out


def test_an_unsteady_machine_says_how_little_it_sees():
    steady = compare(result(row("x", 1.0), row("y", 1.0)), result(row("x", 1.0), row("y", 1.0, 0.03)))
    assert "above 3.0% show in half" in sight(steady)
    assert "hide" not in sight(steady)
    shared = compare(result(row("x", 1.0, 0.4)), result(row("x", 1.0)))
    assert "1 of 1 cases hide 10 %" in sight(shared)


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
    assert "SLOWER  x [ours]  60 -> 61.8 ms  x1.030 (up to x1.020 passes)" in capsys.readouterr().out
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


@pytest.mark.parametrize(("factor", "suite", "code"), [(1.0, "gone", 1), (1.0, "gemm", 0)])
def test_the_gate_names_what_is_not_measured_or_has_nothing_to_compare_with(tmp_path, factor, suite, code):
    as_file(tmp_path / "gemm.json", result(row("gemm/x", factor), device="NVIDIA None"))
    command = ["bash", str(ROOT / "bench" / "gate.sh"), str(tmp_path), suite]
    done = subprocess.run(command, env={**os.environ, "PY": sys.executable}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("not measured" if code else "nothing to compare with") in done.stdout


def test_the_workflow_runs_on_ones_own_gpu_without_secrets_and_not_for_pull_requests():
    text = (ROOT / ".github" / "workflows" / "bench.yml").read_text()
    assert "runs-on: [self-hosted, gpu]" in text
    assert not [word for word in ("{{ secrets", "pull_request", "pip install") if word in text]
    targets = (ROOT / "Makefile").read_text()
    assert "make gpu-check" in text
    assert "gpu-check:" in targets
