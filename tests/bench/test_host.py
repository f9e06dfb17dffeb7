"""Time of the host up to the last launch, the first picture of a process, goals: by a clock of the test's own."""

import contextlib
import subprocess
import sys
import threading
import time

import pytest
import torch

from bench.result import table
from bench.suites import cases
from bench.work import first_image
from bench.work.drawing import DrawingSetup
from bench.work.host import FirstImage, HostClock, Watched, goal
from bench.work.scale import RELEASED, TINY
from lens import sampler
from tests.bench.results import result, row

CPU = torch.device("cpu")


class Pipe:
    """Stages that take time of a clock, and waits between them."""

    def __init__(self, *plan):
        self.now, self.plan, self.options = 0.0, plan, []

    @contextlib.contextmanager
    def stage(self, name, **options):
        self.options.append(options)
        yield

    def __call__(self):
        for name, seconds in self.plan:
            with self.stage(name, needed=True) if name else contextlib.nullcontext():
                self.now += seconds


@pytest.mark.parametrize(
    ("after", "seconds"),
    [
        ([], 1 + 2 + 4 + 8),  # what stands before and between counts, for it delays a launch
        ([(None, 16)], 1 + 2 + 4 + 8),  # a wait for the latents does not
        ([(None, 16), ("decode", 32), (None, 64)], 1 + 2 + 4 + 8 + 32),  # nor one for the pixels
    ],
)
def test_host_time_ends_at_the_last_launch_and_leaves_waits_out(after, seconds):
    pipe = Pipe((None, 1), ("encode", 2), (None, 4), ("denoise", 8), *after)
    clock = HostClock(pipe, lambda: pipe.now)
    for _ in range(2):
        assert clock.seconds(pipe) == seconds
        assert sum(clock.parts.values()) == seconds
        assert (clock.parts["encode"], clock.parts["denoise"], clock.parts["outside stages"]) == (2, 8, 5)
    assert pipe.options[0] == {"needed": True}, "what the stage is told reaches it"


def test_the_stages_of_the_fastest_call_are_told():
    pipe = Pipe(("denoise", 8))
    watched = Watched(HostClock(pipe, lambda: pipe.now), lambda plan: setattr(pipe, "plan", plan) or pipe())
    for seconds in (5, 3, 7):
        assert watched.timed((("encode", 1), ("denoise", seconds))) == seconds + 1
    assert watched.subject().extra_fields()["stages"] == {"encode": 1, "denoise": 3, "outside stages": 0}


def spin(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_work_of_other_threads_is_told_beside_the_callers():
    def call():
        thread = threading.Thread(target=spin, args=(0.05,))
        thread.start()
        thread.join()

    watched = Watched(HostClock(Pipe()), call)
    assert watched.timed() < 0.04
    assert 0.04 < watched.fields["other_threads"] < 1


def test_noise_drawn_by_the_caller_is_in_the_hosts_time_and_given_noise_is_not(monkeypatch):
    def slow(*arguments, make=sampler._draw):
        spin(0.05)
        return make(*arguments)

    (case,) = cases(("e2e",), ["e2e/turbo/64/b1/fp32/host"], tiny=True)
    work = case.prepare(CPU)
    monkeypatch.setattr(sampler, "_draw", slow)
    drawn, given = (min(work.subjects[s].timed(*work.inputs[0]) for _ in range(3)) for s in case.subjects)
    assert drawn - given > 0.04


def test_a_first_image_comes_from_a_process_of_its_own_and_is_timed_once_for_each_time(monkeypatch):
    calls = []

    def started(command, **options):
        calls.append(command)
        first_image.main(command[command.index("--variant") :])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", started)
    first = FirstImage(DrawingSetup(TINY, CPU, "turbo", [(4, 4)], 5), pixels=False)
    (way,) = first.call()
    assert way.shape == (16, TINY.config.in_channels)
    assert first.timed() > 0
    assert len(calls) == 1, "the call that was compared is the first that was timed"
    first.timed()
    assert len(calls) == 2
    assert calls[0][:3] == [sys.executable, "-m", "bench.work.first_image"]
    assert {"denoise", "encode"} <= set(first.subject().extra_fields()["stages"])


def test_a_first_image_that_fails_says_why(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "CUDA out of memory")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        FirstImage(DrawingSetup(TINY, CPU, "turbo", [(4, 4)], 5), pixels=False).call()


def test_a_goal_is_met_or_missed_where_there_is_one():
    assert goal(DrawingSetup(RELEASED, torch.device("cuda"), "turbo", [(64, 64)], 200), 2e-3) == {"goal": 2e-3}
    assert goal(DrawingSetup(RELEASED, CPU, "turbo", [(64, 64)], 200), 2e-3) == {}
    made = result(row("a", 1.9e-3), row("b", 2.1e-3), row("c", 2.1e-3))
    for r in list(made.rows.values())[:2]:
        r.more["goal"] = 2e-3
    text = table(made)
    assert text.count("goal 2 ms: met") == text.count("goal 2 ms: MISSED") == 1
    made.rows["c", "ours"].more["images"] = 21
    assert "2.1 ms (1e+04 images/s)" in table(made)
