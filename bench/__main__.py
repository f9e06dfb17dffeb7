"""`python -m bench list | run | compare | report`. Exit codes: 0 done, 1 slower than allowed, 2 a mistake in the command."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from pathlib import Path
from typing import Any

from lens.checkpoint import write_json

from .compare import Incomparable, compare, markdown


def _load(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        markdown(result)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(_mistake(f"{path}: not a result of `python -m bench run`: {error!r}")) from None
    return result


def _mistake(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 2


def _list(_: argparse.Namespace) -> int:
    from .cases import CASES

    print("\n".join(CASES))
    return 0


def _run(options: argparse.Namespace) -> int:
    from .cases import CASES
    from .measure import copy_bandwidth, measure, result

    chosen = [case for case in CASES if fnmatch.fnmatch(case, options.cases)]
    if not chosen:
        return _mistake(f"no case matches {options.cases!r}; see python -m bench list")
    roof = copy_bandwidth()
    rows = []
    for number, case in enumerate(chosen, 1):
        print(f"{number}/{len(chosen)} {case}", file=sys.stderr)
        rows.append(measure(case, options.seconds, roof))
    made = result(rows, roof)
    if options.out is not None:
        write_json(options.out, made)
    print(markdown(made))
    print(json.dumps(made))  # the last line is the machine's
    return 0


def _compare(options: argparse.Namespace) -> int:
    try:
        verdicts = compare(_load(options.before), _load(options.after), options.tolerance)
    except Incomparable as error:
        return _mistake(f"cannot compare: {error}")
    for v in verdicts:
        mark = "SLOWER" if v["slower"] else "ok"
        print(f"{mark:6}  {v['case']}  {v['before']:.4g} -> {v['after']:.4g} ms  x{v['ratio']:.3f}")
    return int(any(v["slower"] for v in verdicts))


def _report(options: argparse.Namespace) -> int:
    print("\n\n".join(markdown(_load(path)) for path in options.results))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="How fast Lens is on this machine's CPU.")
    commands = parser.add_subparsers(required=True, metavar="list | run | compare | report")
    commands.add_parser("list", help="ids of all cases").set_defaults(do=_list)
    run = commands.add_parser("run", help="measure, print a table and one JSON line")
    run.add_argument(
        "cases", nargs="?", default="*", help='ids to run, with wildcards, such as "swiglu/*" (default: all)'
    )
    run.add_argument("--seconds", type=float, default=1.0, help="time to spend on each case (default: 1)")
    run.add_argument("--out", type=Path, help="also write the result to this file")
    run.set_defaults(do=_run)
    two = commands.add_parser("compare", help="exit 1 where the second result is slower than the first")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    two.add_argument("--tolerance", type=float, default=0.05, help="growth of the median allowed (default: 0.05)")
    two.set_defaults(do=_compare)
    report = commands.add_parser("report", help="results as Markdown tables")
    report.add_argument("results", type=Path, nargs="+")
    report.set_defaults(do=_report)
    options = parser.parse_args(arguments)
    return options.do(options)


if __name__ == "__main__":
    sys.exit(main())
