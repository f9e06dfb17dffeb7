"""`python -m bench list | run | abba | compare | report | full_size | tables`.

Exit codes: 0 done; 1 slower than allowed, a wrong result, or a case that failed; 2 a mistake in the command; 3 nothing
could be told: every comparison is inconclusive; 130 `abba` was interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens.cli.unread import unread_output_ends

from .suites import SUITES, cases

# What imports torch is imported where it is used: --help need not wait for it.
if TYPE_CHECKING:
    import torch


def _mistake(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 2


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _list(options: argparse.Namespace) -> int:
    gpu = options.gpu or _device(None).type == "cuda"
    chosen = cases(SUITES, options.case or ["*"], options.tiny, gpu)
    if not chosen:
        return _mistake(f"no case matches {' '.join(options.case)}; without --case all are listed")
    for case in chosen:
        print(f"{case.id:52} {' '.join(case.subjects)}" if options.subjects else case.id)
    return 0


def _run(options: argparse.Namespace) -> int:
    import torch

    from .case import ConstantData, Disagreement, LeftOut

    device = _device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return _mistake("torch sees no CUDA device")
    suites = SUITES if options.suite == "all" else (options.suite,)
    chosen = cases(suites, options.case or ["*"], options.tiny, device.type == "cuda")
    if not chosen:
        hint = "" if options.tiny or device.type == "cuda" else " (without a GPU most suites run with --tiny only)"
        return _mistake(
            f"no case of {options.suite} matches {' '.join(options.case or ['*'])}{hint}; see python -m bench list"
        )
    offered = {name for case in chosen for name in case.subjects}
    if unknown := set(options.subject or ()) - offered:
        return _mistake(
            f"no subject {', '.join(map(repr, sorted(unknown)))} here; these cases have {', '.join(sorted(offered))}"
        )
    if options.cpu_time and (device.type != "cpu" or options.threads != 1):
        return _mistake("--cpu-time counts one thread of a CPU: it needs --device cpu and --threads 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        if options.profile or options.trace is not None:
            return _profile(options, chosen, device)
    except (OSError, ValueError, LeftOut) as error:  # OSError: a trace that cannot be written
        _mistake(str(error))
        return 1 if isinstance(error, ConstantData | Disagreement) else 2
    if importlib.util.find_spec("pytest_benchmark") is None:
        return _mistake("pytest-benchmark is missing: pip install -e '.[bench]'")
    from .plugin import Bench, collect
    from .result import parse, table, unsteadiness
    from .timing import CpuClock, keep_freed_memory

    if device.type == "cpu" and not keep_freed_memory():
        print("bench: this C library has no mallopt; times hold the cost of new memory pages", file=sys.stderr)
    subjects = tuple(options.subject) if options.subject else None
    clock = CpuClock(time.thread_time) if options.cpu_time else None
    bench = Bench(chosen, device, options.seconds, subjects, options.out, options.budget, clock)
    status = collect(bench, options.pytest)
    if bench.json:
        made = parse(options.out or Path("this run"), bench.json)
        print(table(made))
        if device.type == "cpu":
            print("".join(f"\n{line}" for line in unsteadiness(made)))
    return 1 if status else 0


def _profile(options: argparse.Namespace, chosen: list, device: torch.device) -> int:
    from .case import OURS
    from .profiling import one_launch, prepared, traced

    if len(chosen) != 1:
        return _mistake(f"--profile and --trace take one case, not {len(chosen)}: name it with --case")
    if options.profile and device.type != "cuda":
        return _mistake("--profile marks a launch for CUDA profilers and needs a CUDA device; --trace works anywhere")
    case, subject = chosen[0], options.subject[0] if options.subject else OURS
    launcher = prepared(case, subject, device)
    name = f"{case.id} [{subject}]"
    if options.profile:
        one_launch(launcher, name)
        print(f"one launch of {name} between cudaProfilerStart and cudaProfilerStop")
    else:
        print(traced(launcher, name, options.trace))
        print(f"trace of one call of {name}: {options.trace}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    return _judge(options.before, options.after, tuple(options.subject) if options.subject else None)


def _judge(before: Path, after: Path, subjects: tuple[str, ...] | None) -> int:
    """Print the verdicts on two results, or folders of runs."""
    from .compare import compare, lost, summary
    from .machine import Incomparable
    from .result import NoResult, load_runs

    try:
        sides = load_runs(before), load_runs(after)
        verdicts, gone = compare(*sides, subjects), lost(*sides, subjects)
    except (NoResult, Incomparable) as error:
        return _mistake(f"cannot compare: {error}")
    print("\n".join([*map(str, verdicts), *map(str, gone), summary(verdicts, min(map(len, sides)))]))
    if any(v.word == "SLOWER" for v in verdicts) or any(subject.judged for subject in gone):
        return 1
    return 3 if verdicts and all(v.word == "inconclusive" for v in verdicts) else 0


def _abba(options: argparse.Namespace) -> int:
    from .abba import abba
    from .case import OURS

    words = [options.suite, "--subject", OURS] if not options.subject else [options.suite]
    for name in ("case", "subject"):
        words += [word for value in getattr(options, name) or () for word in (f"--{name}", value)]
    words += [
        word
        for name in ("device", "seconds", "threads")
        if (value := getattr(options, name)) is not None
        for word in (f"--{name}", str(value))
    ]
    words += [word for name, word in (("tiny", "--tiny"), ("cpu_time", "--cpu-time")) if getattr(options, name)]
    sides = options.out / "before", options.out / "after"
    try:
        abba(options.checkout, words, options.out, options.rounds)
    except (OSError, ValueError) as error:
        return _mistake(str(error))
    except KeyboardInterrupt:
        _mistake(f"interrupted; what is there is judged by python -m bench compare {sides[0]} {sides[1]}")
        return 130
    return _judge(*sides, tuple(options.subject) if options.subject else None)


def _report(options: argparse.Namespace) -> int:
    from .report import write
    from .result import NoResult, load, table

    try:
        if options.results:
            print("\n\n".join(table(load(path)) for path in options.results))
            return 0
        changed = write(check=options.check)
        print("\n".join(map(str, changed)) or "README.md and its chart are up to date")
    except NoResult as error:
        return _mistake(str(error))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


def _tables(options: argparse.Namespace) -> int:
    from .result import NoResult
    from .tables import committed_results, tables

    try:
        for path in tables(options.results or committed_results(), options.check):
            print(path)
    except NoResult as error:
        return _mistake(str(error))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A number above zero, for argparse."""

    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    number.__name__ = kind.__name__  # argparse names it where the text is no number
    return number


def _measurement(parser: argparse.ArgumentParser, subjects: str) -> None:
    """What is measured, and for how long."""
    parser.add_argument("suite", nargs="?", default="all", choices=[*SUITES, "all"], help="default: all")
    parser.add_argument("--case", action="append", metavar="GLOB", help='ids to run, as "ops/swiglu/*" (repeatable)')
    parser.add_argument(
        "--subject", action="append", help=f"only this way of doing it (repeatable); default: {subjects}"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where torch sees one")
    parser.add_argument("--tiny", action="store_true", help="small stand-ins through the same code, for a CPU")
    parser.add_argument(
        "--seconds", type=_positive(float), default=1.0, help="time for each subject of a case (default: 1)"
    )
    parser.add_argument("--threads", type=_positive(int), help="CPU threads (default: torch's)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time of the one thread instead of wall time, where others use the cores (with --threads 1)",
    )


def parser(full_size: bool = True) -> argparse.ArgumentParser:
    """The command line; the options of `full_size`, whose module takes its time, where they are asked for."""
    top = argparse.ArgumentParser(prog="python -m bench", description="How fast Lens is on this machine.")
    commands = top.add_subparsers(required=True, metavar="list | run | abba | compare | report | full_size | tables")
    listing = commands.add_parser("list", help="ids of all cases this machine can run")
    listing.add_argument("--case", action="append", metavar="GLOB", help="only ids like this (repeatable)")
    listing.add_argument("--gpu", action="store_true", help="the cases of a GPU, on any machine")
    listing.add_argument("--tiny", action="store_true", help="the small stand-ins that run on a CPU")
    listing.add_argument("--subjects", action="store_true", help="also what each case times")
    listing.set_defaults(do=_list)
    run = commands.add_parser(
        "run", help="compare results, then measure; prints a table, writes pytest-benchmark's JSON"
    )
    _measurement(run, "all")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after this time")
    run.add_argument("--out", type=Path, help="write the result here, anew after every subject")
    run.add_argument("--profile", action="store_true", help="one case: exactly one launch between CUDA profiler marks")
    run.add_argument("--trace", type=Path, metavar="FILE", help="one case: one call under the torch profiler")
    run.add_argument("--pytest", action="append", metavar="OPTION", help="pass on, as --pytest=--benchmark-autosave")
    run.set_defaults(do=_run)
    turns = commands.add_parser("abba", help="this checkout against another, runs in turns A-B-B-A, then compared")
    turns.add_argument("checkout", type=Path, help="the other checkout, with its own built lens._C: A")
    _measurement(turns, "ours")
    turns.add_argument("--rounds", type=_positive(int), default=3, help="of A-B-B-A: two runs a side each (default: 3)")
    turns.add_argument("--out", type=Path, required=True, help="new folder of the results")
    turns.set_defaults(do=_abba)
    two = commands.add_parser(
        "compare", help="exit 1 where the second result is slower than the first, 3 where none can be told"
    )
    two.add_argument("before", type=Path, help="a result, or a folder of runs")
    two.add_argument("after", type=Path, help="likewise")
    two.add_argument("--subject", action="append", help="judge these subjects (default: ours)")
    two.set_defaults(do=_compare)
    report = commands.add_parser("report", help="results as tables; without arguments the README's table and picture")
    report.add_argument("results", type=Path, nargs="*")
    report.add_argument("--check", action="store_true", help="write nothing; exit 1 where README or picture are stale")
    report.set_defaults(do=_report)
    full = commands.add_parser(
        "full_size", help="Lens at its released size with random weights: write it, draw with it"
    )
    if full_size:
        from .full_size import add_arguments

        add_arguments(full)
    tables = commands.add_parser("tables", help="committed results into the orders by which lens.ops chooses kernels")
    tables.add_argument("results", type=Path, nargs="*", help="default: all of bench/results")
    tables.add_argument("--check", action="store_true", help="write nothing; exit 1 where a table is stale")
    tables.set_defaults(do=_tables)
    return top


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = parser("full_size" in words).parse_args(words)
    return int(options.do(options))


if __name__ == "__main__":
    sys.exit(unread_output_ends(main))
