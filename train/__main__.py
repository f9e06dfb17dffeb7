"""`python -m train STAGE ...`: one entry per stage."""

from __future__ import annotations

import argparse
import importlib
import sys

STAGES = {  # module, what it does
    "world": ("train.data.sheet", "draw a labelled contact sheet of the small world"),
    "vae": ("train.vae", "latents <-> pixels"),
    "encoder": ("train.encoder", "the small GPT-OSS text encoder"),
    "shards": ("train.shards", "pictures and captions -> training shards of one bucket each"),
    "pretrain": ("train.pretrain", "flow-matching training of the MMDiT"),
    "mixed_resolution": ("train.mixed_resolution", "the same at nine aspect ratios and several base resolutions"),
    "eye": ("train.eye", "the judge of classes, boxes and colours"),
    "evaluate": ("train.evaluate.benchmarks", "scores on unseen prompts, and their ceilings"),
    "gallery": ("train.evaluate.gallery", "one page of prompts, pictures and scores"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train", description="Where weights come from, in stage order.")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    arguments = sys.argv[1:] if argv is None else argv
    asked = next((a for a in arguments if a in STAGES), None)
    for name, (module, text) in STAGES.items():
        if asked in (None, name):
            entry = stages.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
            if asked == name:
                loaded = importlib.import_module(module)
                entry.description = loaded.__doc__
                loaded.add_arguments(entry)
                entry.set_defaults(run=loaded.run)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
