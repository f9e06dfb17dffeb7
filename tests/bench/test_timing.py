"""Turns, passes and bands by a clock of the test's own; refusals; the clock that feeds pytest-benchmark."""

import time

import pytest
import torch

from bench import plugin
from bench.case import Case, ConstantData, LeftOut, Subject, Work, distance, refuse_constant
from bench.measure import measure
from bench.timing import CpuClock, band, best, calls_per_round, take_turns

CPU = torch.device("cpu")
CEILINGS = {"copy": 1e10, "matmul": 1e11}


class Ticks:
    """A clock that only a subject moves, and what was called in which order."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def subject(self, name, seconds, result=None, **options):
        def call(x):
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds
            return x + 1 if result is None else result(x)

        return Subject(call, **options)

    def clock(self):
        return CpuClock(lambda: self.now)


def case_of(subjects, inputs=None, bound=1e-6, oracle=lambda x: x + 1, **more):
    inputs = inputs or [(torch.arange(4.0),), (torch.arange(4.0) * 2,)]
    return Case("t/x", tuple(subjects), lambda _: Work(inputs, subjects, oracle, bound, 1e6, 4e3, **more), rounds=3)


def test_subjects_take_turns_in_two_passes_after_the_comparison():
    ticks = Ticks()
    case = case_of({"ours": ticks.subject("a", 0.5), "other": ticks.subject("b", 0.75)})
    rows = measure(case, CPU, 0.0, CEILINGS, clock=ticks.clock())
    assert ticks.calls == ["a", "b"] * (1 + 1 + 3 * 2)
    assert rows["ours"]["passes"] == [[0.5] * 3] * 2
    assert rows["other"]["best"] == 0.75
    assert rows["ours"]["band"] == 0.0
    assert rows["ours"]["error"] == 0.0
    assert rows["ours"]["roof"]["of_copy"] == pytest.approx(4e3 / 0.5 / 1e10)


def test_inputs_take_turns_too():
    seen = []
    subject = Subject(lambda x: seen.append(float(x[1])) or x + 1)
    measure(case_of({"ours": subject}), CPU, 0.0, CEILINGS)
    assert set(seen) == {1.0, 2.0}


@pytest.mark.parametrize("slowdown", [1.03, 1.10])
def test_a_planted_regression_shows_in_the_best_round(slowdown):
    def run(factor):
        noise = iter([1.4, 1.0, 1.2, 1.1] * 9)
        ticks = Ticks()
        subject = ticks.subject("a", lambda: 0.01 * factor * next(noise))
        return measure(case_of({"ours": subject}), CPU, 0.0, CEILINGS, clock=ticks.clock())["ours"]

    before, after = run(1.0), run(slowdown)
    assert after["best"] / before["best"] == pytest.approx(slowdown)


def test_the_band_is_the_difference_of_two_timings():
    assert band([[3.0, 2.0], [2.2, 9.0]]) == pytest.approx(0.1)
    assert best([[3.0, 2.0], [2.2, 9.0]]) == 2.0


@pytest.mark.parametrize(
    ("seconds", "inputs", "calls"), [(2e-6, 4, 64), (50e-6, 4, 8), (1e-3, 4, 4), (2e-6, 3, 63), (4e-3, 70, 70)]
)
def test_short_calls_share_a_round_in_whole_turns_of_the_inputs(seconds, inputs, calls):
    assert calls_per_round(seconds, inputs) == calls


def test_time_up_ends_the_turns():
    ticks = Ticks()
    launcher = CpuClock().launcher(ticks.subject("a", 0.0), [(torch.arange(2.0),)])
    start = time.perf_counter()
    times = take_turns({"a": launcher}, 0.05, 1)
    assert time.perf_counter() - start < 5
    assert all(1 <= len(rounds) <= 200 for rounds in times["a"])


@pytest.mark.parametrize("value", [torch.zeros(4, 4), torch.full((3,), 7.0), torch.tensor([1.0, float("nan")])])
def test_constant_and_broken_data_is_refused_before_anything_runs(value):
    ticks = Ticks()
    with pytest.raises(ConstantData):
        measure(case_of({"ours": ticks.subject("a", 1)}, inputs=[(value,)]), CPU, 0.0, CEILINGS, clock=ticks.clock())
    with pytest.raises(ConstantData):
        measure(case_of({"ours": ticks.subject("a", 1)}, data=[value]), CPU, 0.0, CEILINGS, clock=ticks.clock())
    assert ticks.calls == []


def test_what_may_be_equal_is_not_refused():
    refuse_constant(
        [torch.zeros(3, dtype=torch.int32), torch.tensor(5.0), torch.zeros(0), {"a": torch.arange(3.0)}], "x"
    )


@pytest.mark.parametrize("wrong", [lambda x: x + 1.01, lambda x: (x + 1) * float("nan"), lambda x: x[:2] + 1])
@pytest.mark.parametrize(("who", "right"), [("ours", "other"), ("other", "ours")])
def test_a_wrong_result_is_not_timed_and_the_others_are(wrong, who, right):
    ticks = Ticks()
    subjects = {name: ticks.subject(name, 1, wrong if name == who else None) for name in ("ours", "other")}
    rows = measure(case_of(subjects), CPU, 0.0, CEILINGS, clock=ticks.clock())
    assert rows[who]["failed"].startswith("Disagreement: ")
    assert ticks.calls.count(who) == 1
    assert rows[right]["best"] == 1


def test_a_subject_may_take_its_own_time_and_tell_more():
    ticks, taken = Ticks(), iter([3.0, 2.0, 4.0] * 3)
    own = ticks.subject("a", 1, timed=lambda x: next(taken), extra_fields=lambda: {"parts": 2})
    rows = measure(case_of({"ours": own}, more={"images": 8}), CPU, 0.0, CEILINGS, clock=ticks.clock())["ours"]
    assert (rows["best"], rows["passes"][0]) == (2.0, [3.0, 2.0, 4.0])
    assert (rows["images"], rows["parts"]) == (8, 2)
    assert ticks.calls == ["a"], "called once, to be compared"


@pytest.mark.parametrize("kind", [RuntimeError, NameError])
def test_a_comparator_that_cannot_run_is_left_out_with_its_reason_and_ours_has_failed(kind):
    def fails(x):
        raise kind("no kernel for this\nmore")

    rows = measure(case_of({"ours": Subject(lambda x: x + 1), "other": Subject(fails)}), CPU, 0.0, CEILINGS)
    assert rows["other"] == {"left_out": f"{kind.__name__}: no kernel for this"}
    rows = measure(case_of({"ours": Subject(fails), "other": Subject(lambda x: x + 1)}), CPU, 0.0, CEILINGS)
    assert rows["ours"] == {"failed": f"{kind.__name__}: no kernel for this"}
    assert rows["other"]["best"] > 0


@pytest.mark.parametrize(("who", "told"), [("ours", "failed"), ("other", "left_out")])
def test_what_breaks_between_comparison_and_timing_is_one_subjects_failure(who, told):
    def breaks():
        raise MemoryError("no room for so many calls")

    subjects = {n: Subject(lambda x: x + 1, restore=breaks if n == who else None) for n in ("ours", "other")}
    rows = measure(case_of(subjects), CPU, 0.0, CEILINGS)
    assert rows.pop(who) == {told: "MemoryError: no room for so many calls"}
    assert next(iter(rows.values()))["best"] > 0


def test_a_case_this_machine_cannot_run_is_left_out():
    def prepare(_):
        raise LeftOut("needs a moon")

    assert measure(Case("t/x", ("ours",), prepare), CPU, 0.0, CEILINGS) == {"ours": {"left_out": "needs a moon"}}


def test_distance_is_the_worst_relative_one():
    a = torch.tensor([3.0, 4.0])
    assert distance([a, 2 * a], [a, a]) == pytest.approx(1.0)
    assert distance(torch.zeros(2), torch.zeros(2)) == 0
    assert distance(torch.full((2,), float("inf")), a) == float("inf")


def test_the_replay_clock_gives_pytest_benchmark_each_round_exactly():
    rounds, seen = [1e-5 / 3, 0.1 / 7, 2e-6], []
    plugin.load(rounds)
    for _ in rounds:
        plugin.rewind()
        start = plugin.device_clock()
        plugin.replay()
        seen.append(plugin.device_clock() - start)
    assert seen == rounds
