"""Stage "evaluate": what a trained model can do, one benchmark each.

python -m train evaluate mini-bench --model mini
python -m train evaluate geneval --model DIR --device cuda

python -m train evaluate mini-bench --help
"""

from __future__ import annotations

import argparse

from lens.chat_client import ChatError

from ..loop.clock import Interrupted
from . import class_sheet, mini_bench, rl_gain, shape_calibration, sizes, student
from .published import cvtg, frontier, geneval, longtext, oneig, reasoners

BENCHMARKS = {
    "mini-bench": (mini_bench, "the small world's eight tasks by four judges, with intervals and ceilings"),
    "geneval": (geneval, "553 prompts of six tasks in five languages, by Mask2Former and CLIP"),
    "oneig": (oneig, "five dimensions, English and Chinese, of your own copy of the prompts"),
    "longtext": (longtext, "long texts written in the image, English and Chinese"),
    "cvtg": (cvtg, "words in two to five places of an image"),
    "reasoners": (reasoners, "the paper's table 6, and our runs below it"),
    "frontier": (frontier, "the paper's figure 2: score against seconds an image"),
    "sizes": (sizes, "a checkpoint over a grid of sizes, 1:2 to 2:1, with unseen ratios"),
    "rl-gain": (rl_gain, "two scores of mini-bench: what RL gained over its base, against what was asked"),
    "shape": (shape_calibration, "what the shape judge accepts and refuses, and its calibration"),
    "classes": (class_sheet, "every class in one picture: true, reconstructed and drawn"),
    "student": (student, "a student of few steps against its guided teacher and true pictures"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK", help="which benchmark")
    for name, (module, text) in BENCHMARKS.items():
        entry = choice.add_parser(
            name,
            aliases=[name.replace("-", "_")] if "-" in name else [],
            help=text,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(entry)
        entry.set_defaults(run_benchmark=module.run)


def run(options: argparse.Namespace) -> int:
    """Errors: Interrupted where a server cannot be reached, or --max-calls is spent; what it answered is kept."""
    try:
        return options.run_benchmark(options)
    except ChatError as error:
        raise Interrupted(f"evaluate {options.benchmark}: {error}") from error
