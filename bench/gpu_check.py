"""`make gpu-check OUT=dir`: everything that only a GPU can say, in one command and under nine minutes.

    python -m bench.gpu_check --out DIR [--seconds 525] [--plan]

Builds from sources alone (no network; torch >= 2.11, nvcc, cmake, ninja and pybind11 present), checks single tiles
first, then all GPU tests, then the small ones under compute-sanitizer, then runs the suites in order of value. Every
stage is a process with its own share of the time; `DIR/summary.json` is written anew after each, and a suite's file
after each subject, so a run that is cut off counts as far as it came. At most eight files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 525.0  # seconds in all
SUITES = 200.0  # seconds of it that tests leave to the suites, however long the build took
TAIL = 4000  # characters kept of a stage's output
PYTHON = sys.executable
MARK = re.compile(r"pytest\.mark\.gpu\b")
NEEDS = {"diffusers": "decode and total of e2e", "flash_attn": "a comparator of attention", "typer": "the command lens"}


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


def gpu_tests(root: Path = ROOT) -> list[str]:
    """Test files with a gpu mark: only these are imported, for others may need what this machine lacks."""
    return sorted(str(p.relative_to(root)) for p in (root / "tests").rglob("test_*.py") if MARK.search(p.read_text()))


def pytest_command(*more: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--maxfail=20", *more]


def suite(out: Path, name: str, most: float, seconds: float, *globs: str, least: float = 20.0) -> Stage:
    """One `bench run` into DIR/<name>.json, which measures no new case in the last of its time."""
    cases = [word for glob in globs for word in ("--case", glob)]
    run = [PYTHON, "-m", "bench", "run", name, "--device", "cuda", "--out", str(out / f"{name}.json")]
    return Stage(f"bench {name}", [*run, *cases, "--seconds", str(seconds)], least, most, ends=15.0)


def plan(out: Path, sanitizer: str | None, tests: list[str], architecture: str) -> list[Stage]:
    """Every stage in order."""
    archs = {"LENS_CUDA": "ON", "LENS_CUDA_ARCHS": architecture}
    build = [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"]
    # the kernels of this package: a broken library beside them is a failed test, not the end of the run
    small = "(odd or narrow or ragged or tile) and not attention_library"
    stages = [
        Stage("build", build, 30, 240, needed=True, env=archs),
        Stage("tiles", pytest_command(*tests, "-k", small), 10, 60, needed=True),
        Stage("gpu tests", pytest_command(*tests), 20, 120, leaves=SUITES),
    ]
    if sanitizer:
        for tool in ("memcheck", "racecheck"):
            checked = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest_command(*tests, "-k", "narrow")]
            stages.append(Stage(f"compute-sanitizer {tool}", checked, 20, 40, leaves=SUITES))
    return [
        *stages,
        suite(
            out, "step", 110, 0.5, "step/1024/cfg/text415/*", "step/1024/single/text200/*", "step/1440/cfg/text200/*"
        ),
        suite(
            out, "e2e", 150, 0.2, "e2e/*/1024/b1/*", "e2e/turbo/1024/b[48]/*/total", "e2e/turbo/1024/b[48]/*/denoise"
        ),
        suite(out, "ops", 60, 0.1, "ops/*/bf16/*"),
        suite(out, "attention", 50, 0.15),
        suite(out, "gemm", 40, 0.15),
        suite(out, "train", 60, 0.2),
    ]


def run_stage(stage: Stage, left: float, log: Any) -> dict[str, Any]:
    """Run one stage; its outcome: "passed", "failed", "stopped" at its time, or "skipped" for want of it."""
    left -= stage.leaves
    if left < stage.least:
        return {"stage": stage.name, "outcome": "skipped", "reason": f"{left:.0f} s left, needs {stage.least:.0f}"}
    start, limit = time.monotonic(), min(stage.most, left)
    ending = [] if stage.ends is None else ["--budget", f"{max(0.0, limit - stage.ends):.0f}"]
    command = [*stage.command, *ending]
    log.write(f"\n===== {stage.name}: {' '.join(command)}\n")
    log.flush()
    begin = log.tell()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.env},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code: int | None = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the stage's own session: compilers and workers with it
        process.wait()
        code = None
    outcome = "stopped" if code is None else "passed" if code == 0 else "failed"
    log.flush()
    with open(log.name, encoding="utf-8", errors="replace") as again:
        again.seek(begin)
        tail = again.read()[-TAIL:]
    return {
        "stage": stage.name,
        "outcome": outcome,
        "code": code,
        "seconds": round(time.monotonic() - start, 1),
        "tail": tail,
    }


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Written beside, flushed, renamed; needs nothing but the standard library, for the build may fail."""
    part = out / "summary.json.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, out / "summary.json")


def missing() -> dict[str, str]:
    """Packages that are absent, and what is left out for want of them."""
    import importlib.util

    return {name: f"left out: {what}" for name, what in NEEDS.items() if importlib.util.find_spec(name) is None}


def check(out: Path, stages: list[Stage], limit: float, about: dict[str, Any]) -> int:
    """Run the stages within the limit; 0 where none failed."""
    out.mkdir(parents=True, exist_ok=True)
    end, done = time.monotonic() + limit, []
    with open(out / "log.txt", "a+", encoding="utf-8") as log:
        for stage in stages:
            found = run_stage(stage, end - time.monotonic(), log)
            done.append(found)
            write_summary(out, {**about, "stages": done, "complete": len(done) == len(stages)})
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
    stages = plan(out, shutil.which("compute-sanitizer"), gpu_tests(), architecture)
    if options.plan:
        print("\n".join(f"{s.most:5.0f} s  {s.name}: {' '.join(s.command)}" for s in stages))
        return 0
    return check(out, stages, options.seconds, about)


if __name__ == "__main__":
    sys.exit(main())
