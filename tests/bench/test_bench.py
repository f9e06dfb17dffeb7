"""The bench's own arithmetic and refusals, and one real run."""

import copy
import json

import pytest
import torch

from bench import __main__ as bench
from bench.cases import CASES, SHAPES
from bench.compare import Incomparable, compare, markdown
from bench.measure import measure, timed
from lens.ops import backend


def row(case, ms, p20=None, p80=None):
    return {"case": case, "ms": ms, "p20": p20 or ms * 0.99, "p80": p80 or ms * 1.01}


def a_result(*rows):
    card = {"device": "d", "threads": 1, "isa": "avx2", "torch": "2.13"}
    return {"card": card, "lens": "0", "commit": "c", "copy_gb_per_s": 9.0, "rows": list(rows)}


@pytest.mark.parametrize(
    ("before", "after", "slower"),
    [
        (row("x", 1.0), row("x", 1.2), True),
        (row("x", 1.0), row("x", 1.04), False),  # within the tolerance
        (row("x", 1.0, p80=1.3), row("x", 1.2, p20=1.1), False),  # within the spread
        (row("x", 1.2), row("x", 1.0), False),
    ],
)
def test_slower_is_beyond_tolerance_and_beyond_the_spread(before, after, slower):
    (verdict,) = compare(a_result(before), a_result(after), 0.05)
    assert verdict["slower"] is slower
    assert verdict["ratio"] == after["ms"] / before["ms"]


@pytest.mark.parametrize("key", ["device", "threads", "isa", "torch"])
def test_results_of_different_machines_are_refused(key):
    here, there = a_result(row("x", 1.0)), a_result(row("x", 9.0))
    there["card"] = {**there["card"], key: "other"}
    with pytest.raises(Incomparable, match=f"{key} differs"):
        compare(here, there, 0.05)


def test_results_without_a_common_case_are_refused():
    with pytest.raises(Incomparable, match="no case"):
        compare(a_result(row("x", 1.0)), a_result(row("y", 1.0)), 0.05)


def test_every_op_has_a_case_and_ids_follow_one_form():
    assert {c.split("/")[0] for c in CASES} == {*backend.OPS, "pictures"}
    assert all(c.split("/")[1] in SHAPES and c.split("/")[2] in ("float32", "bfloat16") for c in CASES)


@pytest.mark.parametrize("case", [c for c in CASES if "/mini/" in c and not c.startswith("pictures")])
def test_a_case_times_the_op_against_its_own_specification(case):
    work = CASES[case]()
    ours, spec = work.run(), work.baseline()
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, spec)), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02)
    assert work.bytes > sum(r.nbytes for r in (ours if isinstance(ours, tuple) else (ours,)))


def test_functions_are_timed_in_turn_after_one_call_each():
    calls = []
    results = timed([lambda: calls.append("a"), lambda: calls.append("b")], seconds=0, at_least=3)
    assert calls == ["a", "b"] * 4
    assert all(r["p20"] <= r["ms"] <= r["p80"] for r in results)


def test_run_report_and_compare(tmp_path, capsys):
    out = tmp_path / "made" / "result.json"
    assert bench.main(["run", "swiglu/mini/*", "--seconds", "0.01", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert [r["case"] for r in result["rows"]] == ["swiglu/mini/float32", "swiglu/mini/bfloat16"]
    assert all(r["speedup"] == round(r["eager_ms"] / r["ms"], 3) > 0 for r in result["rows"])
    assert "2/2 swiglu/mini/bfloat16" in printed.err
    assert bench.main(["report", str(out)]) == 0
    assert markdown(result) in capsys.readouterr().out
    slow = copy.deepcopy(result)
    for r in slow["rows"]:
        r.update(ms=r["ms"] * 9, p20=r["p80"] * 9)
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    assert bench.main(["compare", str(out), str(out)]) == 0
    assert bench.main(["compare", str(out), str(tmp_path / "slow.json")]) == 1
    assert "SLOWER" in capsys.readouterr().out


def test_the_memory_roof_is_told_where_no_cache_can_hold_the_case():
    assert "roof" not in measure("swiglu/mini/float32", seconds=0, roof=1.0)
    large = measure("gated_residual/1024px/float32", seconds=0, roof=1.0)
    assert large["roof"] == pytest.approx(CASES["gated_residual/1024px/float32"]().bytes / large["ms"] / 1e6, rel=0.01)


def test_mistakes_exit_with_2(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{}")
    assert bench.main(["run", "nothing/*"]) == 2
    for arguments in (["report", str(tmp_path / "broken.json")], ["report", str(tmp_path / "missing.json")], []):
        with pytest.raises(SystemExit) as leaving:
            bench.main(arguments)
        assert leaving.value.code == 2
    assert "not a result of" in capsys.readouterr().err
