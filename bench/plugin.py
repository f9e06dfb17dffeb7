"""pytest-benchmark collects, stores and compares; the times are ours.

A case is measured once, all its subjects in turns (`bench.measure`). The rounds then go through pytest-benchmark's own
fixture: its timer is a clock that stands still except in `replay`, where it advances by one measured round. So its
statistics, its JSON, `--benchmark-compare` and its histograms see device times, and nothing private of it is used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lens.formats.files import write_json

from . import journal, machine
from .case import Case
from .measure import forget_compiled, measure, release
from .roofline import ceilings
from .timing import Clock, CpuClock, clock_of

SPENT = "the time budget was spent"  # why a case was left out that the next run should take
_now = 0.0
_rounds: Iterator[float] = iter(())


def device_clock() -> float:
    """pytest-benchmark's timer."""
    return _now


def load(rounds: list[float]) -> None:
    """Set the clock to zero and put the rounds in."""
    global _now, _rounds
    _now, _rounds = 0.0, iter(rounds)


def replay() -> None:
    """What pytest-benchmark times: one measured round. The clock goes back to zero first, to keep every digit."""
    global _now
    _now = next(_rounds)


def rewind() -> None:
    """pytest-benchmark's setup of a round."""
    global _now
    _now = 0.0


class Bench:
    """The plugin of one run: which cases, on which device, for how long, into which file."""

    def __init__(
        self,
        cases: list[Case],
        device: torch.device,
        seconds: float,
        subjects: tuple[str, ...] | None = None,
        out: Path | None = None,
        budget: float | None = None,
        clock: Clock | None = None,
    ):
        self.cases = {case.id: case for case in cases}
        self.device, self.seconds, self.subjects = device, seconds, subjects
        self.clock = clock or clock_of(device)
        self.out, self.until = out, None if budget is None else time.monotonic() + budget
        asked = {"cases": list(self.cases), "subjects": None if subjects is None else list(subjects)}
        self.report: dict[str, Any] = {"asked": asked, "left_out": {}, "failed": {}}
        self.json: dict[str, Any] = {}
        self._earlier: list[dict[str, Any]] = []
        self._go_on()
        self._rows: tuple[str, dict[str, Any]] = ("", {})
        self._stats: list[Any] = []

    def _go_on(self) -> None:
        """After a process that was lost: keep what its file holds of whole cases, and measure the others."""
        if journal.journal is None or not journal.journal.lost or self.out is None or not self.out.exists():
            return
        before = json.loads(self.out.read_text(encoding="utf-8"))
        excused = {outcome: before["bench"][outcome] for outcome in ("left_out", "failed")}
        found = {(b["extra_info"]["case"], b["extra_info"]["subject"]) for b in before["benchmarks"]}
        found |= {(case, name) for of in excused.values() for case, names in of.items() for name in names}
        whole = {id for id, case in self.cases.items() if all((id, name) in found for name in self._asked(case))}
        self._earlier = [b for b in before["benchmarks"] if b["extra_info"]["case"] in whole]
        for outcome, of in excused.items():
            self.report[outcome] |= {case: names for case, names in of.items() if case in whole}
        self.cases = {id: case for id, case in self.cases.items() if id not in whole}

    def _lost(self, id: str, name: str) -> str:
        """How an earlier process ended in this subject, or ""."""
        lost = journal.journal.lost if journal.journal is not None else {}
        return lost.get(journal.subject(id, name), lost.get(id, ""))

    def start(self) -> None:
        """The card, the state before, and the ceilings."""
        self.card = machine.card(self.device)
        if isinstance(self.clock, CpuClock) and self.clock.now is time.thread_time:
            self.card["identity"]["clock"] = "one thread's CPU time"  # not to be compared with times on the wall
        self.report["before"] = machine.state(self.device)
        self.report["ceilings"] = ceilings(self.device, self.clock)

    def rows(self, id: str) -> dict[str, Any]:
        """A case's rows, measured when its first subject asks."""
        case = self.cases[id]
        if self._rows[0] != id:
            release(self.device)
            forget_compiled()
            if self.until is not None and time.monotonic() > self.until:
                rows = {name: {"left_out": SPENT} for name in self._asked(case)}
            else:
                rows = self._measured(case)
            for outcome in ("failed", "left_out"):
                if reasons := {name: row[outcome] for name, row in rows.items() if outcome in row}:
                    self.report[outcome][id] = reasons
            self._rows = (id, rows)
        return self._rows[1]

    def _measured(self, case: Case) -> dict[str, Any]:
        lost = {name: {"failed": why} for name in self._asked(case) if (why := self._lost(case.id, name))}
        wanted = tuple(name for name in self._asked(case) if name not in lost)
        try:
            ceilings = self.report["ceilings"]
            found = measure(case, self.device, self.seconds, ceilings, wanted, self.clock) if wanted else {}
            return {**found, **lost}
        except Exception as error:  # of whatever kind: the other cases are measured, and the result says so
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:400]
            return {name: {"failed": reason} for name in self._asked(case)}

    def _asked(self, case: Case) -> list[str]:
        return [name for name in case.subjects if self.subjects is None or name in self.subjects]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        mark = pytest.mark.benchmark
        pairs = [
            pytest.param(case.id, subject, id=f"{case.id}-{subject}", marks=mark(timer=device_clock, group=case.id))
            for case in self.cases.values()
            for subject in self._asked(case)
        ]
        metafunc.parametrize(("case", "subject"), pairs)

    @pytest.fixture
    def bench(self) -> Bench:
        """This run."""
        return self

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_machine_info(self, config: pytest.Config) -> dict[str, Any]:
        return self.card

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_commit_info(self, config: pytest.Config) -> dict[str, Any]:
        return {"id": self.card["build"]["commit"]}

    def pytest_benchmark_compare_machine_info(
        self, config: pytest.Config, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
    ) -> None:
        """`--benchmark-compare` with an unlike machine ends the run; pytest-benchmark alone would warn."""
        try:
            machine.refuse_unlike(compared_benchmark["machine_info"]["identity"], machine_info["identity"])
        except machine.Incomparable as error:
            raise pytest.UsageError(str(error)) from None

    def pytest_benchmark_update_json(
        self, config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
    ) -> None:
        output_json["bench"] = {**self.report, "after": machine.state(self.device)}

    def keep(self, config: pytest.Config, stats: Any) -> None:
        """Write the file anew with one subject more, so that a cut-off run keeps what it measured."""
        if stats is not None:
            self._stats.append(stats)
        made = config.hook.pytest_benchmark_generate_json(
            config=config,
            benchmarks=self._stats,
            include_data=True,
            machine_info=self.card,
            commit_info={"id": self.card["build"]["commit"]},
        )
        config.hook.pytest_benchmark_update_json(config=config, benchmarks=self._stats, output_json=made)
        made["benchmarks"] = [*self._earlier, *made["benchmarks"]]
        self.json = made
        if self.out is not None:
            write_json(self.out, made)


def collect(bench: Bench, options: list[str] | None = None) -> int:
    """Run pytest over the cases; its exit status. options: more for pytest, as `--benchmark-compare`."""
    journal.watch(journal.COMPILING)
    bench.start()
    target = Path(__file__).with_name("collected.py")
    arguments = [
        str(target),
        "-qq",
        "--disable-warnings",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--rootdir={machine.ROOT}",
    ]
    arguments += ["--benchmark-columns=min,median,rounds", "--benchmark-sort=name", "--benchmark-group-by=group"]
    arguments += options or ["--benchmark-quiet"]  # its own tables where its options were asked for: ours comes after
    return int(pytest.main(arguments, plugins=[bench]))
