"""What RL gained over its base, out of two files of mini-bench: shares of errors, intervals, seeds pooled, what was asked."""

import json

import pytest

from train.__main__ import main
from train.evaluate.mini_bench import GENEVAL
from train.evaluate.rl_gain import interval, share_gone


def rows(right, binding, audit, distance, of=40):
    """Every task with so many right of so many, binding with its own."""
    found = {task: {"score": right / of, "audit": audit / of, "distance": distance, "pictures": of} for task in GENEVAL}
    found["color_attr"] |= {"score": binding / 80, "audit": audit / of, "pictures": 80}
    found["counting"]["numbers"] = {
        "2": {"pictures": 30, "score": max(0, right - 20)},
        "3": {"pictures": 10, "score": right // 5},
    }
    return found


def scores(path, **guidance):
    content = {"settings": {"side": 64}, "guidance": {name[1:]: own for name, own in guidance.items()}}
    path.write_text(json.dumps(content))
    return str(path)


def test_shares_of_errors_intervals_and_goals(tmp_path, capsys):
    base = scores(tmp_path / "base.json", g1=rows(32, 48, 30, 0.20), g3=rows(36, 64, 34, 0.18))
    first = scores(tmp_path / "11.json", g1=rows(36, 68, 33, 0.16), g3=rows(37, 68, 35, 0.15))
    second = scores(tmp_path / "12.json", g1=rows(38, 72, 33, 0.16), g3=rows(36, 64, 34, 0.17))
    out = tmp_path / "gain.json"
    assert (
        main(["evaluate", "rl-gain", "--base", base, "--rl", first, second, "--floor", "0.1", "--out", str(out)]) == 0
    )
    told = json.loads(out.read_text())
    found = {(row["what"], row["guidance"]): row for row in told["gains"]}
    six = found["six", "1"]
    assert six["base"] == pytest.approx((5 * 0.8 + 0.6) / 6)
    assert six["rl"] == pytest.approx((5 * 74 / 80 + 140 / 160) / 6)
    assert six["gained"] == pytest.approx(1 - (1 - six["rl"]) / (1 - six["base"]))
    assert six["low"] < six["gained"] < six["high"]
    assert six["met"]
    assert found["binding", "1"]["gained"] == pytest.approx(1 - 20 / 160 / (32 / 80))
    assert found["binding", "1"]["met"]
    assert found["six", "3"]["met"] is False
    assert found["binding", "3"]["met"] is None
    assert found["audit", "1"]["gained"] > 0.2
    assert found["audit", "1"]["met"]
    assert found["distance", "1"]["gained"] == pytest.approx(0.4)
    assert found["g1 over g3", "1"]["met"]
    assert told["counting"]["64x64 g 1"] == {"base": {"2": "12/30", "3": "6/10"}, "rl": {"2": "34/60", "3": "14/20"}}
    assert "64x64     six         g 1  0.767 -> 0.917  +0.64" in capsys.readouterr().out


def test_intervals_narrow_and_leave_zero():
    few, many = (interval([(of * 8 // 10, of)] * 6, [(of * 9 // 10, of)] * 6) for of in (10, 400))
    assert few[1] - few[0] > 2 * (many[1] - many[0])
    assert few[0] < 0 < many[0] < 0.5 < many[1]
    assert share_gone(1.0, 0.9) != share_gone(1.0, 0.9)  # of no errors


def test_an_independent_judges_gain_needs_an_interval_above_zero(tmp_path):
    few = [scores(tmp_path / f"{n}.json", g1=rows(n, 48, n, 0.2, of=8)) for n in (6, 7)]
    assert main(["evaluate", "rl-gain", "--base", few[0], "--rl", few[1], "--out", str(tmp_path / "gain.json")]) == 0
    (audit,) = (row for row in json.loads((tmp_path / "gain.json").read_text())["gains"] if row["what"] == "audit")
    assert audit["gained"] == pytest.approx(0.5)
    assert audit["low"] < 0
    assert audit["met"] is False


def test_other_files_are_refused(tmp_path):
    base = scores(tmp_path / "base.json", g1=rows(32, 48, 30, 0.20))
    lacking = rows(32, 48, 30, 0.20)
    del lacking["position"]
    with pytest.raises(ValueError, match="a file has no 'score' of position"):
        main(["evaluate", "rl-gain", "--base", base, "--rl", scores(tmp_path / "part.json", g1=lacking)])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: no scores of mini-bench"):
        main(["evaluate", "rl-gain", "--base", base, "--rl", str(tmp_path / "other.json")])


def test_pictures_of_one_prompt_and_seed_stay_together(tmp_path):
    """Where RL mends what the base had wrong and breaks nothing, the interval that pairs pictures is the narrower one."""

    def marked(wrong, of=40):
        found = rows(of - wrong, of - wrong, of - wrong, 0.2, of)
        for task in found:
            marks = "0" * wrong + "1" * (of - wrong)
            found[task] |= {"score": 1 - wrong / of, "audit": 1 - wrong / of, "pictures": of}
            found[task]["marks"] = {"score": marks, "audit": marks}
        return found

    def told(*rl):
        out = tmp_path / "gain.json"
        given = [scores(tmp_path / f"{i}.json", g1=own) for i, own in enumerate(rl)]
        assert main(["evaluate", "rl-gain", "--base", base, "--rl", *given, "--out", str(out)]) == 0
        return {row["what"]: row for row in json.loads(out.read_text())["gains"]}

    base = scores(tmp_path / "base.json", g1=marked(8))
    paired, without = told(marked(4), marked(4)), marked(4)
    for row in without.values():
        del row["marks"]
    apart = told(without, marked(4))
    for what in ("six", "binding", "audit"):
        assert paired[what]["gained"] == apart[what]["gained"] == pytest.approx(0.5)
        widths = [row[what]["high"] - row[what]["low"] for row in (paired, apart)]
        assert widths[0] < widths[1]
        assert paired[what]["low"] > apart[what]["low"]
    assert 0.3 < paired["six"]["low"] < 0.5 < paired["six"]["high"] < 0.7
    assert told(marked(16))["six"]["high"] == pytest.approx(-1, abs=0.5)
    few = told(marked(4, of=30))  # of another number of pictures: not paired
    assert few["six"]["low"] < 0.4


def test_a_goal_that_is_just_reached_is_met(tmp_path):
    """A third of three errors is one, whatever floats make of it."""
    base = scores(tmp_path / "base.json", g1=rows(37, 77, 30, 0.2), g3=rows(37, 77, 30, 0.2))
    own = scores(tmp_path / "rl.json", g1=rows(38, 78, 30, 0.18), g3=rows(37, 77, 30, 0.2))
    out = tmp_path / "gain.json"
    assert main(["evaluate", "rl-gain", "--base", base, "--rl", own, "--floor", "0.1", "--out", str(out)]) == 0
    told = {(row["what"], row["guidance"]): row for row in json.loads(out.read_text())["gains"]}
    assert told["six", "1"]["gained"] == pytest.approx(1 / 3)
    assert told["six", "1"]["met"]
    assert told["distance", "1"]["gained"] == pytest.approx(0.2)
    assert told["distance", "1"]["met"]
