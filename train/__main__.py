"""`python -m train STAGE ...`: one entry per stage."""

from __future__ import annotations

import argparse
import importlib
import linecache
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from lens.cli.unread import unread_output_ends

STAGES = {  # module, what it does
    "world": ("train.world", "draw a labelled contact sheet of the small world"),
    "vae": ("train.vae", "latents <-> pixels"),
    "encoder": ("train.text_encoder", "the small GPT-OSS text encoder"),
    "reasoner": ("train.reasoner", "the layers by which it writes a dense caption for a wish"),
    "curate": ("train.curate", "raw images -> records with every score, by the paper's nine cleaning steps"),
    "curate_report": ("train.curate_report", "the page of a curation: counts, scores, examples"),
    "curate_calibrate": ("train.curate_calibrate", "percentiles and sheets around each threshold of a curation"),
    "curate_check": ("train.curate_check", "generated images with known defects through curate: recall and precision"),
    "watermark": ("train.watermark", "the judge of watermarks, from stamped pictures"),
    "caption": ("train.caption", "captions, visible text, scenario and category of images, by a vision server"),
    "synthesize_text": ("train.synthesize_text", "rendered text on backgrounds, with strings and boxes"),
    "classify": ("train.classify", "a scenario and a category of images, by CLIP and words"),
    "select": ("train.select", "the best images under quotas, nested subsets"),
    "shards": ("train.shards", "pictures and captions -> training shards of one bucket each"),
    "pretrain": ("train.pretrain", "flow-matching training of the MMDiT"),
    "mixed_resolution": ("train.mixed_resolution", "the same at nine aspect ratios and several base resolutions"),
    "rl_prompts": ("train.rl_prompts", "prompts with rubrics for the rl stage, as JSON lines"),
    "rl": ("train.rl", "post-training on rewards: DiffusionNFT with rubric judges"),
    "rl_frontier": ("train.report", "reward against diversity over several rl runs, as a page"),
    "distill": ("train.distill", "a student of four steps without guidance"),
    "detector": ("train.detector", "the judge of classes, boxes and colours"),
    "prompt_search": (
        "train.prompt_search",
        "a better system prompt for the reasoner, by writing, drawing and judging",
    ),
    "ablate": ("train.ablate", "arms that differ in captions, latents, encoder or rl data, with intervals"),
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


def mistake(error: Exception) -> str | None:
    """What to tell a person whose command cannot be carried out; None where the error is a bug, or the training's own.

    A mistake is refused by a `raise` of this project, or is a path that is missing or forbidden. The same exception out of
    a library, or of an expression of ours, was not foreseen.
    """
    if isinstance(error, OSError) and error.filename:
        paths = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError)
        return f"{error.filename}: {error.strerror}" if isinstance(error, paths) else None
    if not isinstance(error, ValueError | FileNotFoundError | ImportError):
        return None
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return None
    file = trace.tb_frame.f_code.co_filename
    ours = Path(__file__).resolve().parents[1] in Path(file).resolve().parents and "site-packages" not in file
    return str(error) if ours and linecache.getline(file, trace.tb_lineno).strip().startswith("raise ") else None


def misfortune(error: Exception) -> str | None:
    """What to tell where the machine or the numbers failed a command that was right; None for any other error."""
    from .loop.clock import FULL, Interrupted  # only now: torch takes its time

    if isinstance(error, BrokenProcessPool):
        return "a worker process died (killed, or out of memory?); what was saved before is kept"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error.filename or 'disk'}: {error.strerror}; what was saved before is kept"
    return str(error) if isinstance(error, Interrupted | FloatingPointError) else None


def command() -> int:
    """`main`, whose user's mistakes are one line and exit code 2; a lost shard, a full disk or a divergence one line and 1."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        code, text = (2, mistake(error)) if (ill := misfortune(error)) is None else (1, ill)
        if text is None:
            raise
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(unread_output_ends(command))
