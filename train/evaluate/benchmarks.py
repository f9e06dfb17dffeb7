"""Stage "evaluate": what a trained model can do, one benchmark each.

python -m train evaluate mini-bench --model mini

python -m train evaluate mini-bench --help
"""

from __future__ import annotations

import argparse

from . import class_sheet, mini_bench, rl_gain, shape_calibration

BENCHMARKS = {
    "mini-bench": (mini_bench, "the small world's eight tasks by four judges, with intervals and ceilings"),
    "rl-gain": (rl_gain, "two scores of mini-bench: what RL gained over its base, against what was asked"),
    "shape": (shape_calibration, "what the shape judge accepts and refuses, and its calibration"),
    "classes": (class_sheet, "every class in one picture: true, reconstructed and drawn"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK", help="which benchmark")
    for name, (module, text) in BENCHMARKS.items():
        entry = choice.add_parser(
            name, help=text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(entry)
        entry.set_defaults(run_benchmark=module.run)


def run(options: argparse.Namespace) -> int:
    return options.run_benchmark(options)
