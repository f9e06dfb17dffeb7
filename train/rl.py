"""Stage "rl": post-training on rewards, DiffusionNFT with LoRA (train/rl_method.py), reproducible on a CPU.

    python -m train rl --config mini --out runs/rl --stop-after 5m          # no GPU, no server
    python -m train rl --config mini --out runs/rl --stop-after 5m          # again to resume, bit-equal on a CPU
    python -m train rl --config mini --out runs/rl --export runs/rl/export  # the averages: adapters alone, and merged
    python -m train rl --config mini --judge http://127.0.0.1:8000/v1 --out runs/rl_judge   # rubrics by a server
    python -m train rl --config mini --set KL_WEIGHT=1.0 --subset half --out runs/rl_kl1
    python -m train rl --config released --dry-run                          # rollouts, judge calls, memory
    torchrun --nproc-per-node 8 -m train rl --config released --init CHECKPOINT --prompts PROMPTS.jsonl ...

Starts from a checkpoint folder (`--init`, default: mini-base), whose text encoder, VAE and scheduler stay as they are. OUT holds
checkpoints/, log.jsonl, prompts.jsonl where none were given, a sheet of the same prompts and seeds before, during and after,
and index.html, which shows all of it. What to watch is in docs/rl.md; the loss is not among it: its value at theta = old
does not depend on the rewards.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lens.chat_client import ChatError
from lens.config import LensConfig
from lens.formats.files import read_json, write_json
from lens.formats.hub import EMBEDDED, resolve
from lens.formats.parts import ADAPTER
from lens.formats.released import (
    load_scheduler,
    read_defaults,
    read_index,
    released_index,
    save_transformer,
    transformer_config,
)

from . import configs, cost
from .data import encoders
from .data.prompts import write_prompts
from .loop import ranks
from .loop.adapter_model import NOT_ITS_OWN
from .loop.checkpoints import Checkpoints, read_state, step_of, write_text
from .loop.clock import Clock, Interrupted, duration, positive
from .loop.log import read_log
from .loop.lora import attach_lora, init_lora, keep_lora, lora_of, merge_lora, round_lora, save_lora
from .loop.ranks import Ranks
from .loop.sheets import released_decoder
from .loop.trainer import ALONE, Trainer
from .networks.denoiser import Denoiser
from .pretrain_on_shards import changed
from .report import run_page
from .rl_hardest import hardest, measured
from .rl_judging import LOCAL, judging, spent
from .rl_method import OLD, Nft, grids_of
from .rollout import MOST_FEATURES, Rollouts, Texts

BASE = "mini-base"  # of a training that is given none
FIXED = ("LORA", "GROUPS", "GROUP", "BASES", "SLOTS")  # of a training, from its first step to its last
BEST = "best"  # for --state
VARIED = 0.9  # share of the base's effective backdrops that the best state keeps
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def check(recipe: ModuleType) -> None:
    """Refuse at the start what would fail later. Errors: ValueError naming the field."""
    for name in ("GROUPS", "GROUP", "SLOTS", "SAMPLING_STEPS", "TIMES", "INNER_STEPS", "STEPS", "WINDOW", "VALIDATION"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(recipe, name)}")
    if recipe.GROUPS * recipe.GROUP % recipe.SLOTS:
        raise ValueError(
            f"SLOTS: {recipe.SLOTS}, expected a divisor of GROUPS x GROUP = {recipe.GROUPS * recipe.GROUP}"
        )
    if recipe.GROUP < 2:
        raise ValueError("GROUP: expected 2 or more pictures of a prompt: a reward is compared with those of its group")
    if recipe.TIMES > recipe.SAMPLING_STEPS:
        raise ValueError(f"TIMES: {recipe.TIMES} nodes of {recipe.SAMPLING_STEPS} SAMPLING_STEPS")
    for name in ("NFT_BETA", "Z_SCALE", "LR", "CLIP"):
        if not 0 < getattr(recipe, name) < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {getattr(recipe, name)}")
    for name in ("KL_WEIGHT", "DIVERSITY_WEIGHT", "NEUTRAL_SHRINK"):
        if not 0 <= getattr(recipe, name) < float("inf"):
            raise ValueError(f"{name}: expected 0 or more, got {getattr(recipe, name)}")
    if set(recipe.NEUTRAL) - {"backdrop", "place"}:
        raise ValueError(f"NEUTRAL: expected some of backdrop, place, got {recipe.NEUTRAL}")
    if recipe.SUMMED and recipe.COMPUTE != "float32":
        raise ValueError(
            f"SUMMED: adapters are summed into float32 weights, expected COMPUTE = 'float32', got {recipe.COMPUTE!r}"
        )
    if lora_of(recipe) is None:
        raise ValueError("LORA: expected for example r=32,alpha=64,targets=all")
    if recipe.GROUPS % len(recipe.BASES):
        raise ValueError(f"GROUPS: {recipe.GROUPS}, expected as many groups of each of BASES {recipe.BASES}")
    for base in recipe.BASES:
        grids_of(base, recipe.ASPECTS)


def start_of(init: str) -> Path:
    """The folder of a whole model. Errors: ValueError for an adapter's, whose merged weights would be the start."""
    folder = resolve(init)
    if (folder / ADAPTER).is_file() and not (folder / "transformer").is_dir():
        raise ValueError(
            f"--init {init}: an adapter's folder; expected a whole model, such as the one beside it of --export"
        )
    return folder


def refuse_distilled(folder: Path, recipe: ModuleType, allowed: bool) -> None:
    """Few-step checkpoints blur under this loss. Errors: ValueError."""
    if read_defaults(folder, None, folder.name).variant != "turbo":
        return
    if not allowed:
        raise ValueError(
            f"--init {folder}: a distilled checkpoint, which this loss blurs; --allow-distilled trains it all the same"
        )
    if recipe.KL_WEIGHT <= 0 or "sharpness" not in recipe.STOP:
        raise ValueError("--allow-distilled: expected KL_WEIGHT > 0 and a rule for sharpness in STOP")


# ------------------------------------------------------------------------------------------------ what a state says


def settings_of(state: Path | None) -> dict[str, Any]:
    """What a state says of its training: nothing where there is none, or one of another stage, which loading refuses."""
    about = {} if state is None else read_state(state)
    return dict(about.get("settings", {})) if about.get("stage") == "rl" else {}


def init_of(given: str | None, held: Mapping[str, Any]) -> str:
    """The checkpoint that a training begins, or began, from. Errors: ValueError where another one is given."""
    init: str = held.get("INIT", given or BASE)
    here = [Path(resolve(name) if name in EMBEDDED else name).resolve() for name in (given or init, init)]
    if here[0] != here[1]:
        raise ValueError(f"--init {given}: this training has {init}")
    return init


def refuse_another(subset: str, recipe: ModuleType, held: Mapping[str, Any]) -> list[str]:
    """What a resumed training does otherwise than its state says, a line each; older states do not say all. Errors: ValueError
    where it would be another training: of FIXED, or on other prompts."""
    now = json.loads(json.dumps(configs.fields(recipe)))
    for name in FIXED:
        if (before := held.get(name, now[name])) != now[name]:
            raise ValueError(f"{name} {now[name]}: this training has {before}")
    if (before := held.get("SUBSET", subset)) != subset:
        raise ValueError(f"--subset {subset}: this training has {before}")
    return changed(recipe, {**now, **held})


def as_trained(changes: Sequence[str], recipe: ModuleType, held: Mapping[str, Any]) -> ModuleType:
    """The recipe with the LORA of a state. changes: of --set. Errors: ValueError where they say another one."""
    own: Any = configs.override(recipe, [])
    own.LORA = held.get("LORA", recipe.LORA)
    if own.LORA != recipe.LORA and any(change.partition("=")[0].strip() == "LORA" for change in changes):
        raise ValueError(f"--set LORA={recipe.LORA}: this training has {own.LORA}")
    return own


# ------------------------------------------------------------------------------------------------ building


def build(recipe: ModuleType, folder: Path, group: Ranks) -> tuple[Denoiser, nn.Module]:
    """The checkpoint's MMDiT, frozen, with adapters and their kept copy "old"; as it is and as it is called."""
    lora = lora_of(recipe)
    assert lora is not None, "checked at the start"
    path = folder / "transformer" / "config.json"
    with torch.device("meta"):
        model = Denoiser(transformer_config(read_json(path), str(path)), DTYPES[recipe.COMPUTE], recipe.RECOMPUTE)
        attach_lora(model, lora, model.compute, recipe.SUMMED)
    ranks.load_released(model, folder / "transformer", group.device)
    init_lora(model, recipe.SEED)
    keep_lora(model, OLD)
    # no layer of it behaves otherwise in training: in this mode a sample's bits can be its own on a CPU
    model.eval()
    model.batch_invariant = group.device.type == "cpu" and recipe.INVARIANT
    return model, ranks.wrap(model, group)


def rollouts_of(recipe: ModuleType, folder: Path, model: Denoiser) -> Rollouts:
    scheduler, defaults = load_scheduler(folder / "scheduler"), read_defaults(folder, None, folder.name)
    return Rollouts(model, scheduler, recipe.SAMPLING_STEPS, recipe.SOLVER, defaults.time_dtype)


def frozen_networks(
    recipe: ModuleType, folder: Path, device: torch.device
) -> tuple[Texts, Callable[[Tensor, tuple[int, int]], np.ndarray]]:
    """Prompts -> features, kept; latents [I, C] of one picture -> uint8 [H, W, 3]."""
    tokenizer, codec, text = encoders.released(folder, device, DTYPES[recipe.COMPUTE])
    decode = released_decoder(codec)
    return Texts(lambda prompt: text.encode([tokenizer(prompt)])), lambda x, grid: decode(x[None], grid)[0]


# ------------------------------------------------------------------------------------------------ the stage


def train(options: argparse.Namespace, recipe: ModuleType, group: Ranks) -> int:
    clock, out = Clock(options.stop_after), options.out
    states = Checkpoints(out / "checkpoints", group, recipe.KEEP_LAST, recipe.KEEP_EVERY)
    before = states.latest()
    held = settings_of(before)
    init, told = init_of(options.init, held), refuse_another(options.subset, recipe, held)
    folder = start_of(init)
    refuse_distilled(folder, recipe, options.allow_distilled)
    if group.main:
        out.mkdir(parents=True, exist_ok=True)
        for line in told:
            print(line, flush=True)
    group.barrier()
    seen = judging(recipe, options.judge, out, group, options.prompts, options.subset, options.without)
    model, wrapped = build(recipe, folder, group)
    texts, decode = frozen_networks(recipe, folder, group.device)
    rollouts = rollouts_of(recipe, folder, model)
    rest = seen.judge, seen.prompts, seen.global_rubric, seen.held, seen.watch
    method = Nft(recipe, wrapped, group, rollouts, texts, decode, *rest)
    settings = configs.fields(recipe) | {"INIT": init, "SUBSET": options.subset, "JUDGE": options.judge}
    settings["PROMPTS_USED"] = len(seen.prompts)
    if options.hardest is not None:
        found = measured(method, clock)
        if group.main:
            write_text(out / "difficulty.jsonl", "".join(json.dumps(one.row()) + "\n" for one in found))
            write_prompts(out / "hardest.jsonl", hardest(found, options.hardest))
            print(f"{options.hardest} of {len(found)} prompts are in {out / 'hardest.jsonl'}")
        return 0
    trainer = Trainer(method.plan(), method, states, out, group, settings, cost.peak_of(group.device))
    if before is not None:
        trainer.resume(before)
    else:
        method.draw(out, 0)
    try:
        trainer.run(method.batches(), clock, steps=options.steps)
    except ChatError as error:  # a transcript that lacks a call; what else fails is masked
        raise Interrupted(f"--judge: {error}") from error
    finally:
        if seen.client is not None:
            seen.client.close()
            print(spent(seen.client))
        if group.main:
            run_page(out, "Reinforcement learning", settings)
    return 0


def export(options: argparse.Namespace, recipe: ModuleType) -> None:
    """The averages of a state: a whole checkpoint with merged weights, and FOLDER/lora, the adapter as peft saves it, with
    what made it and with the base's name: a model of its own to the pipeline. Both are made of the adapter rounded to bfloat16.

    Base and LORA are the state's. Errors: ValueError where an option says otherwise.
    """
    target, states = options.export, Checkpoints(options.out / "checkpoints", ALONE)
    before = best_of(options.out, states) if options.state == Path(BEST) else options.state or states.latest()
    if before is None:
        raise FileNotFoundError(f"{states.folder}: no state of a training here")
    held = settings_of(before)
    init, recipe = init_of(options.init, held), as_trained(options.set, recipe, held)
    folder, lora = start_of(init), lora_of(recipe)
    assert lora is not None, "checked at the start"
    model, _ = build(recipe, folder, ALONE)
    averaged = {f"ema.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = states.load(before, averaged, "rl")
    if target.resolve() == folder.resolve():
        raise ValueError(f"--export {target}: the checkpoint the run starts from; expected another folder")
    shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_ITS_OWN))
    round_lora(model, torch.bfloat16)
    save_lora(model, lora, target / "lora", torch.bfloat16, base=init)
    merge_lora(model)
    save_transformer(model, target / "transformer", torch.bfloat16)
    about = dict(read_index(folder).get("lens", {}))
    about.pop("validation", None)  # the base's
    about |= {"name": f"{about.get('name', 'Lens')}-RL", "rl_steps": state["step"]}
    made = {"rl": state["settings"] | {"REVISION": state["revision"], "STEP": state["step"]}}
    earlier = read_json(folder / "recipe.json") if (folder / "recipe.json").is_file() else {}
    log = options.out / "log.jsonl"
    for place in (target, target / "lora"):
        write_json(place / "model_index.json", released_index(about))
        write_json(place / "recipe.json", earlier | made)
        if log.is_file():
            write_text(place / "rl.jsonl", log.read_text(encoding="utf-8"))
    print(f"{before.name} is exported: {target / 'transformer'} and {target / 'lora'}")


def best_of(out: Path, states: Checkpoints) -> Path | None:
    """Of the states kept, the one of the highest held-out score among those that keep VARIED of the first validation's effective
    backdrops, where those are known; None where no state has a score."""
    rows = {row["step"]: row for row in read_log(out / "log.jsonl") if "held_score" in row}
    name = "held_effective_backdrops"
    least = VARIED * rows.get(0, {}).get(name, 0.0)
    good = [state for state in states.states() if rows.get(step_of(state), {}).get(name, least) >= least]
    # a mean over no valid judgement is NaN, which is neither above nor below any other
    good = [state for state in good if np.isfinite(rows.get(step_of(state), {}).get("held_score", np.nan))]
    return max(good, key=lambda state: rows[step_of(state)]["held_score"], default=None)


def dry_run(recipe: ModuleType, shape: LensConfig, world: int, gpu: str) -> str:
    """What a run does, in counts, and a GPU's memory. Errors: ValueError where the processes do not divide the slots."""
    if recipe.SLOTS % world:
        raise ValueError(f"--world: {world} processes for SLOTS = {recipe.SLOTS}; expected a divisor")
    pictures, iterations = recipe.GROUPS * recipe.GROUP, -(-recipe.STEPS // recipe.INNER_STEPS)
    tokens = max(h * w for base in recipe.BASES for h, w in grids_of(base, recipe.ASPECTS))
    texts, per_slot = [recipe.TEXT_TOKENS], pictures // recipe.SLOTS
    forward = cost.forward_flops(shape, tokens, texts)
    training = cost.training_flops(shape, tokens, texts, lora_of(recipe)) + 2 * forward
    rollout = recipe.SAMPLING_STEPS * forward
    own: Any = configs.override(recipe, [])
    own.RESHARD = False
    lines = [
        f"{recipe.__name__.removeprefix('train.configs.')} on {world} x {gpu}",
        f"iterations           {iterations:10,} of {recipe.INNER_STEPS} optimiser steps",
        f"pictures             {pictures:10,} an iteration, {pictures * iterations:,} in all",
        f"judge calls          {pictures * iterations:10,} of 11 rubrics each",
        f"pictures of a slot   {per_slot:10,}, {recipe.SLOTS // world} slots on each process",
        f"trained samples      {pictures * recipe.TIMES:10,} an optimiser step, {per_slot * recipe.TIMES} in one packed forward",
        f"FLOPs of a picture   {rollout / 1e12:10.2f} e12 to draw, {recipe.TIMES * training / 1e12:.2f} e12 to train in a step",
        *cost.hours_of(pictures * (iterations * rollout + recipe.STEPS * recipe.TIMES * training), gpu),
        "",
        f"memory of a GPU, {cost.GPUS[gpu][1] / 1e9:.0f} GB",
    ]
    parts = cost.memory(own, shape, 1, world, per_slot * recipe.TIMES * (tokens + recipe.TEXT_TOKENS))
    parts["old adapters"] = parts["float32 adapters"]
    features = shape.enc_hidden_dim * len(shape.selected_layer_index) * 2  # bytes of a token in bfloat16
    parts["features of prompts, at most"] = max(MOST_FEATURES, per_slot * recipe.TEXT_TOKENS * features)
    lines += [f"  {name:32} {value / 1e9:7.1f} GB" for name, value in parts.items()]
    need = sum(parts.values())
    lines.append(f"  {'sum':32} {need / 1e9:7.1f} GB{'' if need < 0.95 * cost.GPUS[gpu][1] else '   does not fit'}")
    lines.append("  besides: text encoder and VAE")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="mini", help="recipe in train/configs, or a file .py (default: mini)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/rl"), help="folder of all that is written (default: runs/rl)"
    )
    parser.add_argument(
        "--init",
        metavar="CHECKPOINT",
        help=f"{BASE}, or a released-layout folder (default: {BASE}; of a training in OUT what it began from)",
    )
    parser.add_argument("--allow-distilled", action="store_true", help="train a few-step checkpoint all the same")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSON lines (default: the small world's, written to OUT)"
    )
    parser.add_argument("--subset", default="full", help="full, half or quarter of the prompts, nested (default: full)")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out a category or sub-category; repeatable",
    )
    parser.add_argument(
        "--hardest",
        type=positive,
        metavar="N",
        help="train nothing; draw GROUP pictures of every prompt and write the N whose scores differ most to OUT/hardest.jsonl",
    )
    parser.add_argument(
        "--judge",
        default=LOCAL,
        metavar="WHO",
        help=f"{LOCAL}, the address of an OpenAI-compatible server (http://HOST:PORT/v1; its key in LENS_CHAT_KEY, or "
        f"OPENAI_API_KEY for OpenAI's own), or a transcript to replay (default: {LOCAL})",
    )
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 5m")
    parser.add_argument(
        "--steps", type=positive, help="end after this optimiser step, the schedule staying the recipe's"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="replace a field; repeatable")
    parser.add_argument(
        "--print-config", action="store_true", help="print every field, and why where the paper is open"
    )
    parser.add_argument("--dry-run", action="store_true", help="print rollouts, judge calls and memory; needs no GPU")
    parser.add_argument("--world", type=positive, default=1, help="processes that --dry-run assumes (default: 1)")
    parser.add_argument("--gpu", default="h100", choices=sorted(cost.GPUS), help="GPU of --dry-run (default: h100)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="train nothing; write the averages as a checkpoint"
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="STATE",
        help=f"the state to export, or {BEST}: by held-out score (default: the latest)",
    )


def run(options: argparse.Namespace) -> int:
    recipe = configs.override(configs.load(options.config, "rl"), options.set)
    if options.print_config:
        print(configs.describe(recipe))
        return 0
    check(recipe)
    if options.dry_run:
        shape = LensConfig() if configs.family(options.config) == "released" else LensConfig.mini()
        print(dry_run(recipe, shape, options.world, options.gpu))
        return 0
    torch.set_num_threads(options.threads)
    if options.export:
        export(options, recipe)
        return 0
    with ranks.join(options.device, shard=1) as group:
        return train(options, recipe, group)
