"""Stage "mixed_resolution": flow-matching training goes on at nine aspect ratios and several base resolutions.

    python -m train mixed_resolution --init lens/mini/base --out runs/mixed --stop-after 90m
    python -m train mixed_resolution --out runs/mixed --stop-after 90m          # again to resume, bit-equal on a CPU
    python -m train mixed_resolution --out runs/mixed --export lens/mini/base

Everything is as in the stage "pretrain" (train/pretrain.py), but every batch has a bucket of its own, drawn from the
recipe's law by (seed, batch) alone; a base has its own batch size and a picture's tokens their own mu. The VAE is the one of
the checkpoint that training starts from, frozen, unless `--vae` names another; the text encoder is frozen too.

OUT holds mixed_resolution.pt (the state), log.jsonl with the losses of every base, and a sheet per base at every save.
`with_text_64` and so on: as in pretrain, of the square pictures of a base. A recipe with SLOTS trains on shards, on any number
of processes: train/pretrain_on_shards.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import configs, pretrain
from . import pretrain_on_shards as flow

STAGE = "mixed_resolution"
SHIPPED = Path("lens/mini/base")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pretrain.add_arguments(parser)
    parser.set_defaults(out=Path("runs/mixed"), vae=None)


def run(options: argparse.Namespace) -> int:
    config = configs.override(configs.load(options.config, STAGE), options.set)
    if flow.is_sharded_recipe(config, options):
        return flow.run(options, config, STAGE)
    torch.set_num_threads(options.threads)
    if options.vae is None:
        options.vae = (options.init or SHIPPED) / "vae"
    if options.export:
        from .export import export

        export(config, options, STAGE)
    else:
        pretrain.train(config, options, STAGE)
    return 0
