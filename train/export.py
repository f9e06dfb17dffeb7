"""A trained Mini in the released layout, with what made it beside it: the recipe of every stage and the stages' logs."""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lens.formats.files import read_json, write_json
from lens.formats.released import read_index, released_index, released_scheduler, save_transformer
from lens.formats.text_encoder import save_text_encoder
from lens.sampler import Scheduler

from . import configs
from . import vae as vae_stage
from .loop.checkpoints import load_state, write_text
from .loop.log import read_log
from .networks.generator import load_trained
from .networks.text_path import ROOT

STAGES = ("world", "vae", "encoder", "pretrain")


def recipe(name: str, last: str = "pretrain") -> dict[str, dict[str, Any]]:
    """Every number of a recipe up to its `last` stage: stage -> field -> value, tuples as lists."""

    def found(stage: str) -> ModuleType:
        if stage == "world":
            return configs.world_recipe(name)
        return configs.load(name, stage) if stage == last else configs.beside(name, stage)

    return {stage: configs.fields(found(stage)) for stage in dict.fromkeys((*STAGES, last))}


def export(config: ModuleType, options: argparse.Namespace, stage: str = "pretrain") -> None:
    """Write transformer, text encoder, tokenizer, VAE, scheduler and model_index.json, weights in bfloat16; recipe.json;
    and the log of each stage as STAGE.jsonl, where its folder has one (the encoder's: beside `--out` unless `--encoder`).

    A training with `--lora` is exported twice: as peft's folder `lora`, and merged. A later stage than pretrain, whose VAE
    lies in a checkpoint folder, takes from that folder what it did not train: the VAE, the recipes and the logs of the stages
    before it. Errors: those of `load_state` where a stage was not trained.
    """
    folder: Path = options.export
    # of the stages before, where the VAE lies in a checkpoint folder
    before = options.vae.parent if (options.vae / "config.json").is_file() else None
    earlier = read_json(before / "recipe.json") if before else {}
    logs = {path.name: path.read_text(encoding="utf-8") for path in before.glob("*.jsonl")} if before else {}
    done = read_index(before)["lens"]["trained_steps"] if before else 0
    # the networks
    tokenizer = ROOT / configs.beside(options.config, "encoder").TOKENIZER
    for file in sorted(tokenizer.iterdir()):
        write_text(folder / "tokenizer" / file.name, file.read_text(encoding="utf-8"))
    model = load_trained(config, options.config, options.out / f"{stage}.pt", stage, folder / "lora")
    save_transformer(model.transformer, folder / "transformer", torch.bfloat16)
    save_text_encoder(model.encoder, folder / "text_encoder")
    if not before:
        vae_stage.export(configs.beside(options.config, "vae"), options.vae, folder / "vae")
    elif (folder / "vae").resolve() != options.vae.resolve():
        shutil.copytree(options.vae, folder / "vae", dirs_exist_ok=True)
    scheduler = Scheduler(use_dynamic_shifting=False, shift=round(math.exp(config.SHEET["mu"]), 6))
    write_json(folder / "scheduler" / "scheduler_config.json", released_scheduler(scheduler))
    last: dict[str, Any] = next(
        (row for row in reversed(read_log(options.out / "log.jsonl")) if "with_text" in row), {}
    )
    state, world = load_state(options.out / f"{stage}.pt", stage), configs.world(options.config)
    about = {
        "name": "Lens-Mini",
        "variant": "lens",
        "num_inference_steps": config.SHEET["steps"],
        "guidance_scale": config.SHEET["guidance"],
        "base_resolution": config.SIDE,
        "max_resolution": max(getattr(config, "BUCKETS", [config.SIDE])),
        "time_dtype": "float32",
        "classes": list(world.classes),
        "caption_styles": list(world.captions),
        "trained_steps": done + state["step"],
        "validation": {k: last[k] for k in ("with_text", "without_text", "text_explains") if k in last},
    }
    write_json(folder / "model_index.json", released_index(about))
    # recipes and logs
    written = recipe(options.config, stage) | earlier
    written[stage] |= state.get("settings", {})  # as run, where options replaced the recipe's numbers
    write_json(folder / "recipe.json", written)
    for name, text in logs.items():
        write_text(folder / name, text)
    encoder = options.encoder.parent if options.encoder else options.out.parent / "encoder"
    for name, source in (("vae", options.vae), ("encoder", encoder), (stage, options.out)):
        if (source / "log.jsonl").is_file():
            write_text(folder / f"{name}.jsonl", (source / "log.jsonl").read_text(encoding="utf-8"))
