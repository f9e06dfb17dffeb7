"""The launcher of CUDA calls: its order of captures, replays and events on a device of the test's own, and on a real one."""

from contextlib import contextmanager

import pytest
import torch

from bench.case import DTYPES, Subject
from bench.measure import measure
from bench.suites import cases
from bench.suites.ops import prepare
from bench.timing import CudaClock, CudaLauncher, clock_of, take_turns


class FakeCuda:
    """Streams that do nothing, graphs that repeat what was called while they recorded, events that read a clock."""

    def __init__(self, monkeypatch):
        self.now, self.recording, self.log = 0.0, None, []
        fake = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = fake.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        class Stream:
            def wait_stream(self, other):
                pass

        class CUDAGraph:
            def replay(self):
                fake.log.append("replay")
                for work in self.works:
                    work()

        @contextmanager
        def graph(made):
            assert fake.recording is None
            fake.recording = []
            yield
            made.works, fake.recording = fake.recording, None

        @contextmanager
        def stream(_):
            yield

        for name, value in dict(Event=Event, Stream=Stream, CUDAGraph=CUDAGraph, graph=graph, stream=stream).items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call(self, seconds):
        """A kernel: it works when launched, or when the graph that recorded it is replayed."""

        def launch(x, out):
            def work():
                self.now += seconds
                out.copy_(x + 1)
                self.log.append(float(x[0]))

            self.recording.append(work) if self.recording is not None else work()
            return out

        return launch

    def clock(self):
        clock = object.__new__(CudaClock)
        clock.l2, clock.flush = 1 << 20, lambda: self.log.append("flush")
        return clock


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def inputs(count):
    return [(torch.full((2,), float(k)), torch.zeros(2)) for k in range(count)]


@pytest.mark.parametrize("mode", ["graph", "stream"])
def test_short_calls_take_turns_over_the_inputs_and_the_cache_is_flushed(cuda, mode):
    launcher = CudaLauncher(Subject(cuda.call(1e-4), mode=mode), inputs(3), cuda.clock())
    assert launcher.outputs().tolist() == [1.0, 1.0]
    launcher.ready()
    assert launcher.calls == 6  # half a millisecond, in whole turns
    cuda.log.clear()
    assert launcher.round() == pytest.approx(1e-4)
    assert [x for x in cuda.log if x != "replay"] == ["flush", *[0.0, 1.0, 2.0] * 2]
    assert ("replay" in cuda.log) == (mode == "graph")


@pytest.mark.parametrize("mode", ["graph", "stream"])
def test_a_long_call_is_a_round_by_itself(cuda, mode):
    launcher = CudaLauncher(Subject(cuda.call(0.06), mode=mode), inputs(2), cuda.clock())
    launcher.outputs()
    launcher.ready()
    assert launcher.calls == 1
    times = take_turns({"a": launcher}, 0.0, 3)
    assert times["a"] == [pytest.approx([0.06] * 3)] * 2


def test_the_result_compared_is_the_replayed_graphs_and_not_the_warm_ups(cuda):
    data = inputs(1)
    launcher = CudaLauncher(Subject(cuda.call(1e-4)), data, cuda.clock())
    launcher._capture(1)
    data[0][1].zero_()
    assert launcher._first.tolist() == [0.0, 0.0], "a capture runs nothing"
    assert launcher.outputs().tolist() == [1.0, 1.0]


@pytest.mark.gpu
@pytest.mark.parametrize("stem", ["rms_norm_modulate", "swiglu"])
def test_a_graph_and_a_stream_agree_and_a_planted_slowdown_shows(stem):
    device = torch.device("cuda")
    work = prepare(stem, "1024cfg", DTYPES["bf16"], False, device)
    call = work.subjects["ours"].call
    slow = Subject(lambda named: (call(named), call(named))[0])
    launchers = {
        name: clock_of(device).launcher(subject, work.inputs)
        for name, subject in (("graph", Subject(call)), ("stream", Subject(call, mode="stream")), ("slow", slow))
    }
    first = launchers["stream"].outputs()
    assert torch.equal(launchers["graph"].outputs(), first)
    for launcher in launchers.values():
        launcher.outputs()
        launcher.ready()
    best = {n: min(map(min, rounds)) for n, rounds in take_turns(launchers, 0.1, 5).items()}
    assert 1.7 < best["slow"] / best["graph"] < 2.3
    assert best["graph"] <= 1.05 * best["stream"]


@pytest.mark.gpu
def test_every_subject_of_a_small_step_runs_on_a_gpu():
    (case,) = cases(("step",), ["step/64/cfg/text5/*"], tiny=True)
    wanted = ("ours", "ours_op_by_op", "reference_eager")
    rows = measure(case, torch.device("cuda"), 0.05, {"copy": 1e12, "matmul": 1e14}, wanted)
    assert {n: r["error"] < r["bound"] for n, r in rows.items()} == dict.fromkeys(wanted, True)
    assert rows["ours"]["peak_bytes"] > 0
    assert rows["ours"]["host"] > 0
