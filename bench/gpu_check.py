"""`make gpu-check OUT=dir`: everything that only a GPU can say, in one command and under nine minutes.

    python -m bench.gpu_check --out DIR [--seconds 525] [--plan]
    python -m bench.gpu_check --rest --out DIR [--have FOLDER]

Builds from sources alone (no network; torch >= 2.11, nvcc, cmake, ninja and pybind11 present), checks single tiles
first, then all GPU tests, then the small ones under compute-sanitizer, then measures in order of value. Every
stage is a process with its own share of the time; `DIR/summary.json` is written anew after each, and a suite's file
after each subject, so a run that is cut off counts as far as it came. At most eight files. Nothing but a failed build
ends it: a test that fails, hangs or crashes costs itself alone (bench/journal.py), and where the time of a stage ends
it is asked to report before it is killed.

--rest (`make gpu-check-rest`) builds, checks the tiles and measures every case of every suite that the results in FOLDER
(default: DIR) lack, into files of its own: "step-rest1.json". Where the time does not reach, the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .journal import VARIABLE, Journal

ROOT = Path(__file__).parents[1]
LIMIT = 525.0  # seconds in all
SUITES = 200.0  # seconds of it that tests leave to the suites, however long the build took
TAIL = 4000  # characters of a stage's output in the summary
LOG = 1 << 20  # bytes of it in the log: all files together stay small
GRACE = 10.0  # seconds between the request to report and the end
REASONS = re.compile(r"^(?:REASON|LOST) .*", re.MULTILINE)
MOST_REASONS = 60  # of a stage in the summary
PYTHON = sys.executable
MARK = re.compile(r"pytest\.mark\.gpu\b")
WATCHED = ("-p", "bench.watched")  # with a journal: reasons at once, hangs and crashes one by one
KERNELS, ROWS = "tests/gpu/", "tests/gpu/test_ops_gpu.py"  # tests of kernels; those of the ops every picture needs
# the kernels of this package: a broken library beside them is a failed test, not the end of the run
SMALL = "(odd or narrow or ragged or tile) and not attention_library"
NEEDS = {
    "diffusers": "what of e2e needs pixels",
    "flash_attn": "a comparator of attention",
    "typer": "the command lens",
}


@dataclass
class Stage:
    """One process. least: do not start it with less time left than this; most: stop it after so long; leaves: of the
    time left, seconds that are for later stages; ends: it takes ``--budget`` and ends by itself that much before."""

    name: str
    command: list[str]
    least: float
    most: float
    needed: bool = False  # the rest is pointless where it fails
    env: dict[str, str] = field(default_factory=dict)
    leaves: float = 0.0
    ends: float | None = None
    journal: bool = False  # start it again after a hang or a crash: it takes what the journal does not name


def gpu_tests(root: Path = ROOT) -> list[str]:
    """Test files with a gpu mark: only these are imported, for others may need what this machine lacks."""
    return sorted(str(p.relative_to(root)) for p in (root / "tests").rglob("test_*.py") if MARK.search(p.read_text()))


def pytest_command(*more: str) -> list[str]:
    """A file that cannot be imported, for want of a package say, fails alone."""
    words = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--maxfail=20", "--continue-on-collection-errors"]
    return [PYTHON, "-m", "pytest", *words, *more]


@dataclass(frozen=True)
class SuiteShare:
    """What of a suite the first command measures. most, leaves: as of its Stage; seconds: for each subject of a case."""

    suite: str
    most: float
    leaves: float
    seconds: float
    cases: tuple[str, ...]
    rest: float  # the same as `most` in the second command


PARTS = (  # in order of value
    SuiteShare(
        "e2e",
        130,
        110,
        0.2,
        (
            *(f"e2e/*/1024/b1/bf16/{stage}" for stage in ("total", "denoise", "host*", "first_latents")),
            *(f"e2e/turbo/1024/b1/bf16/{stage}" for stage in ("text", "decode")),
            "e2e/turbo/1024/b4/bf16/stream",
        ),
        200,
    ),
    SuiteShare(
        "step", 85, 70, 0.4, ("step/1024/cfg/text415/*", "step/1024/single/text200/*", "step/1024/b[48]/*"), 150
    ),
    SuiteShare("attention", 50, 40, 0.15, ("*",), 60),
    SuiteShare("gemm", 45, 0, 0.15, ("gemm/*_*/*", "gemm/*/8192+text415/*", "gemm/table/table20/*"), 60),
    SuiteShare("ops", 50, 0, 0.1, ("ops/*/bf16/*",), 60),
    SuiteShare("train", 60, 0, 0.2, ("train/512/*",), 120),
)


def suite(out: Path, part: SuiteShare, cases: list[str], most: float, leaves: float, number: str = "") -> Stage:
    """One `bench run` into DIR/<suite><number>.json, which measures no new case in the last of its time."""
    chosen = [word for case in cases for word in ("--case", case)]
    file = str(out / f"{part.suite}{number}.json")
    run = [PYTHON, "-m", "bench", "run", part.suite, "--device", "cuda", "--out", file, "--seconds", str(part.seconds)]
    return Stage(f"bench {part.suite}", [*run, *chosen], 20, most, leaves=leaves, ends=15.0, journal=True)


def pytest_stage(name: str, files: list[str], chosen: str, least: float, most: float, leaves: float) -> Stage:
    """GPU tests on all cores, which the references of some of them need."""
    command = pytest_command(*WATCHED, *files, *(["-k", chosen] if chosen else []))
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    return Stage(name, command, least, most, env=threads, leaves=leaves, journal=True)


def sanitizer_stages(sanitizer: str | None, leaves: float) -> list[Stage]:
    """The narrow tests of every kernel, some thirty, under both tools. torch's caching allocator is off: memcheck sees
    what lies beside an array only where an allocation ends there."""
    kernels = [test for test in gpu_tests() if test.startswith(KERNELS)]
    stages = []
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        words = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
        run = [*words, *pytest_command(*kernels, "-k", "narrow")]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_LAUNCH_BLOCKING": "1"}
        stages.append(Stage(f"compute-sanitizer {tool}", run, 60, 150, env=env, leaves=leaves))
    return stages


def first_stages(architecture: str) -> list[Stage]:
    """The build, without which nothing can run, and the first tests: rounding or a broken kernel is reported and the check goes on."""
    archs = {"LENS_CUDA": "ON", "LENS_CUDA_ARCHS": architecture}
    build = [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"]
    return [
        Stage("build", build, 30, 240, needed=True, env=archs),
        pytest_stage("tiles", [ROWS], SMALL, 10, 60, 0),
    ]


def plan(out: Path, sanitizer: str | None, tests: list[str], architecture: str) -> list[Stage]:
    """Every stage of the first command in order. Kernels that fail or hang end nothing: the libraries are measured, and
    the bench gives a wrong subject no time."""
    hard = [test for test in tests if test.startswith(KERNELS) and test != ROWS]
    return [
        *first_stages(architecture),
        pytest_stage("tiles of GEMMs and attention", hard, SMALL, 10, 60, SUITES),
        pytest_stage("gpu tests", tests, "", 20, 120, SUITES),
        *sanitizer_stages(sanitizer, SUITES),
        *(suite(out, part, list(part.cases), part.most, part.leaves) for part in PARTS),
    ]


def rest(
    out: Path, missing: dict[str, list[str]], number: int, architecture: str, sanitizer: str | None = None
) -> list[Stage]:
    """Every stage of the second command: a suite for each in `missing` cases, the same order; before them the tools for
    which the first had no time, where a `sanitizer` is given."""
    measured = [
        suite(out, part, missing[part.suite], part.rest, 0, f"-rest{number}") for part in PARTS if missing[part.suite]
    ]
    return [*first_stages(architecture), *sanitizer_stages(sanitizer, SUITES), *measured]


def sanitized(folders: list[Path]) -> bool:
    """Whether a summary in the folders has an outcome of every tool."""
    known = set()
    for path in (path for folder in folders for path in folder.glob("summary*.json")):
        with contextlib.suppress(OSError, ValueError):
            known |= {
                s["stage"]
                for s in json.loads(path.read_text()).get("stages", [])
                if s["outcome"] in ("passed", "failed")
            }
    return {f"compute-sanitizer {tool}" for tool in ("memcheck", "racecheck")} <= known


def missing_cases(folders: list[Path]) -> dict[str, list[str]]:
    """Ids by suite of which no result in the folders says anything but that its time was spent."""
    from .plugin import SPENT
    from .result import NoResult, load
    from .suites import SUITES as NAMES
    from .suites import cases

    known: set[str] = set()
    for path in (path for folder in folders for path in sorted(folder.glob("*.json"))):
        with contextlib.suppress(NoResult):  # a summary, or a file that was cut off
            result = load(path)
            known |= {case for case, _ in result.rows} | set(result.bench["failed"])
            known |= {c for c, why in result.bench["left_out"].items() if SPENT not in why.values()}
    return {name: [case.id for case in cases((name,)) if case.id not in known] for name in NAMES}


def run_stage(stage: Stage, left: float, log: Any) -> dict[str, Any]:
    """Run one stage; its outcome: "passed", "failed", "stopped" at its time, or "skipped" for want of it."""
    left -= stage.leaves
    if left < stage.least:
        return {"stage": stage.name, "outcome": "skipped", "reason": f"{left:.0f} s left, needs {stage.least:.0f}"}
    start, limit = time.monotonic(), min(stage.most, left)
    log.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n")
    log.flush()
    begin, codes, lost = log.tell(), [], dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        while True:
            end = start + limit
            code = _run_once(stage, end - time.monotonic(), log, path if stage.journal else None)
            codes.append(code)
            before, lost = lost, Journal(path).lost
            if code in (None, 0) or len(lost) == len(before) or end - time.monotonic() < stage.least:
                break
    code = next((c for c in codes if c != 0), 0)  # of the first process that went wrong
    outcome = "stopped" if codes[-1] is None else "passed" if code == 0 else "failed"
    log.flush()
    with open(log.name, "r+b") as again:
        again.seek(begin)
        output = again.read()
        if len(output) > LOG:
            again.seek(begin)
            again.truncate()
            again.write(b"(its end)\n" + output[-LOG:])
    text = output.decode(errors="replace")
    reasons = list(dict.fromkeys(REASONS.findall(text)))
    known = " ".join(reasons)
    reasons += [f"LOST {name}: {why}" for name, why in lost.items() if f"LOST {name}:" not in known]
    return {
        "stage": stage.name,
        "outcome": outcome,
        "code": code,
        "seconds": round(time.monotonic() - start, 1),
        "reasons": reasons[:MOST_REASONS],
        "tail": text[-TAIL:],
    }


def _run_once(stage: Stage, limit: float, log: Any, path: Path | None) -> int | None:
    """The exit status; None where the time ended it: asked by SIGINT, which lets pytest report, then killed."""
    ending = [] if stage.ends is None else ["--budget", f"{max(0.0, limit - stage.ends):.0f}"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.env, **({VARIABLE: str(path)} if path else {})}
    process = subprocess.Popen(
        [*stage.command, *ending], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    grace = min(GRACE, limit / 4)
    for signum, seconds in ((signal.SIGINT, limit - grace), (signal.SIGKILL, grace)):
        try:
            code = process.wait(timeout=seconds)
            return code if signum == signal.SIGINT else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signum)  # the stage's own session: compilers and workers with it
    process.wait()
    return None


def write_summary(out: Path, summary: dict[str, Any], name: str) -> None:
    """Written beside, flushed, renamed; needs nothing but the standard library, for the build may fail."""
    part = out / f"{name}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, out / name)


def missing() -> dict[str, str]:
    """Packages that are absent, and what is left out for want of them."""
    import importlib.util

    return {name: f"left out: {what}" for name, what in NEEDS.items() if importlib.util.find_spec(name) is None}


def check(out: Path, stages: list[Stage], limit: float, about: dict[str, Any], number: str = "") -> int:
    """Run the stages within the limit; 0 where none failed."""
    out.mkdir(parents=True, exist_ok=True)
    end, done = time.monotonic() + limit, []
    with open(out / f"log{number}.txt", "a+", encoding="utf-8") as log:
        for stage in stages:
            found = run_stage(stage, end - time.monotonic(), log)
            done.append(found)
            write_summary(out, {**about, "stages": done, "complete": len(done) == len(stages)}, f"summary{number}.json")
            print(f"{found['outcome']:8} {stage.name}  {found.get('seconds', found.get('reason'))}", flush=True)
            if stage.needed and found["outcome"] != "passed":
                print(found.get("tail", ""), file=sys.stderr)
                break
    bad = [s["stage"] for s in done if s["outcome"] == "failed"] or [s.name for s in stages[len(done) :] if s.needed]
    print(f"gpu-check: {'FAILED: ' + ', '.join(bad) if bad else 'passed'}; results in {out}")
    return int(bool(bad) or any(s["outcome"] != "passed" for s, stage in zip(done, stages) if stage.needed))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-check"), help="folder of the results (default: gpu-check)"
    )
    parser.add_argument("--seconds", type=float, default=LIMIT, help="time for all of it (default: %(default)s)")
    parser.add_argument("--rest", action="store_true", help="measure the cases that the results so far lack")
    parser.add_argument("--have", type=Path, help="with --rest: folder of the results so far (default: --out)")
    parser.add_argument("--plan", action="store_true", help="print the stages and run nothing")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    architecture, about = "90a", {"python": sys.version.split()[0], "missing": missing()}
    if not options.plan:
        try:
            import torch
        except ImportError:
            print(
                "gpu-check: this Python has no torch; run `make build` first, or name one: make gpu-check GPU_PYTHON=..."
            )
            return 2
        if not torch.cuda.is_available():
            print("gpu-check: SKIPPED, nothing was checked: torch sees no CUDA device on this machine")
            return 0
        major, minor = torch.cuda.get_device_capability()
        architecture = f"{major}{minor}" + ("a" if major >= 9 else "")
        about |= {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "architecture": architecture}
    number = ""
    if options.rest:
        folders = [out, (options.have or out).resolve()]
        times = 1 + len({path for folder in folders for path in folder.glob("summary-rest*.json")})
        number, missing_now = f"-rest{times}", missing_cases(folders)
        sanitizer = None if sanitized(folders) else shutil.which("compute-sanitizer")
        stages = rest(out, missing_now, times, architecture, sanitizer)
        if not any(missing_now.values()):
            print("gpu-check: every case of every suite has a result")
            return 0
    else:
        stages = plan(out, shutil.which("compute-sanitizer"), gpu_tests(), architecture)
    if options.plan:
        print("\n".join(f"{s.most:5.0f} s  {s.name}: {' '.join(s.command)}" for s in stages))
        return 0
    return check(out, stages, options.seconds, about, number)


if __name__ == "__main__":
    sys.exit(main())
