"""Stages A and B on shards, for one process or many: `pretrain` and `mixed_resolution` with a recipe that has SLOTS.

    python -m train pretrain --config released/pretrain_512 --dry-run
    torchrun --nproc-per-node 8 -m train pretrain --config released/pretrain_512 --data SHARDS --model CHECKPOINT --out runs/a
    python -m train mixed_resolution --config mini/on_shards --data shards/world --vae runs/vae --encoder runs/encoder/encoder.pt

The VAE and the text encoder are frozen: those of a checkpoint folder (`--model`) or of Mini's stages (`--vae`, `--encoder`);
neither is needed where the shards hold latents and features. OUT holds checkpoints/, log.jsonl and its copy for TensorBoard, a
sheet of fixed prompts and seeds at every save, skipped.jsonl, damaged.jsonl. `--validate`: the loss on pictures held out. The
same command again resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lens.config import LensConfig
from lens.formats.files import read_json
from lens.formats.released import save_transformer, transformer_config
from lens.ops.attention import choice as attention_choice
from lens.resolution import bucket_size

from . import configs, cost
from .data import encoders
from .data.buckets import Bucket, BucketLaw, BucketSampler
from .data.loader import Encode, Loader, ShardBatch
from .data.shards import Shards, ShardSet, ShardSets, check_once_per_node
from .loop import ranks
from .loop.checkpoints import Checkpoints, read_state
from .loop.clock import Clock, positive
from .loop.ema import Ema
from .loop.lora import NO_BASE, attach_lora, init_lora, lora_of, merge_lora, parse_lora, save_lora
from .loop.method import About, Losses, Method, Network, Plan, adamw
from .loop.ranks import Ranks
from .loop.sheets import Sheets, released_decoder
from .loop.trainer import ALONE, Trainer
from .loop.validation import HeldOut, validation_loader
from .networks.denoiser import Denoiser
from .objectives import flow_matching
from .objectives.velocity import FlowMatching

WEIGHTS = ("raw", "average")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def model_of(recipe: ModuleType) -> LensConfig:
    """The MMDiT of a recipe: the released one, but for MODEL."""
    return LensConfig(**recipe.MODEL)


def check(recipe: ModuleType) -> None:
    """Refuse at the start what would fail later. Errors: ValueError naming the field."""
    known = [field.name for field in dataclasses.fields(LensConfig)]
    if strange := sorted(set(recipe.MODEL) - set(known)):
        raise ValueError(f"MODEL: no field {strange[0]!r}; fields: {', '.join(known)}")
    for name in (
        "SLOTS",
        "STEPS",
        "KEEP_LAST",
        "LOG_EVERY",
        "SAVE_EVERY",
        "SKIP_LIMIT",
        "VALIDATE_EVERY",
        "VALIDATION",
    ):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(recipe, name)}")
    for name in ("LR", "CLIP", "TIME_SIGMA"):
        if not 0 < getattr(recipe, name) < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {getattr(recipe, name)}")
    if not 0 < recipe.DAMAGED_LIMIT <= 1:
        raise ValueError(f"DAMAGED_LIMIT: expected a share in (0, 1], got {recipe.DAMAGED_LIMIT}")
    if recipe.MAX_UPSCALE < 1:
        raise ValueError(f"MAX_UPSCALE: expected 1 or more, got {recipe.MAX_UPSCALE}")
    if not isinstance(recipe.MU, float | int) and (len(recipe.MU) != 2 or recipe.MU[0][0] == recipe.MU[1][0]):
        raise ValueError(f"MU: expected a number or two points of a line, (tokens, mu), got {recipe.MU}")
    bucket_size(int(recipe.SHEET["base"]), "1:1")
    if recipe.SHEET["steps"] < 1:
        raise ValueError(f"SHEET.steps: expected 1 or more, got {recipe.SHEET['steps']}")
    for bucket in buckets_of(recipe):
        bucket_size(bucket.base, bucket.aspect)


def law_of(recipe: ModuleType) -> BucketLaw:
    """What a recipe says about buckets."""
    return BucketLaw(recipe.BATCH, recipe.BASE_WEIGHTS, recipe.ASPECT_WEIGHTS)


def buckets_of(recipe: ModuleType) -> list[Bucket]:
    """Every bucket a recipe may draw."""
    return [Bucket(base, aspect) for base in recipe.BASES for aspect in recipe.ASPECTS]


# ------------------------------------------------------------------------------------------------ building


def build(recipe: ModuleType, group: Ranks, init: Path | None = None) -> nn.Module:
    """The wrapped model, its weights drawn from the recipe's seed, or those of a checkpoint folder in the released layout.

    A recipe's LORA: frozen, as the compute dtype has them, with adapters beside them.
    """
    lora = lora_of(recipe)
    with torch.device("meta"):
        model = Denoiser(model_of(recipe), DTYPES[recipe.COMPUTE], recipe.RECOMPUTE).train()
        if lora:
            attach_lora(model, lora, model.compute)
    # sharded while they weigh nothing: no process ever holds the whole
    wrapped = ranks.wrap(model, group, recipe.RESHARD) if group.shard > 1 else None
    if init is not None:
        ranks.load_released(model, init, group.device)
    else:
        ranks.materialise(model, group.device, recipe.SEED)
    if lora:
        init_lora(model, recipe.SEED)
    return wrapped if wrapped is not None else ranks.wrap(model, group, recipe.RESHARD)


def networks(
    recipe: ModuleType, options: argparse.Namespace, shards: Shards, group: Ranks
) -> tuple[encoders.Tokenizer | None, Any, Any, Callable[[Tensor, tuple[int, int]], np.ndarray] | None]:
    """(tokenizer, codec, text encoder, decoder) as the options name them; Nones where nothing is named.

    Errors: ValueError where the shards hold only pictures and nothing is named.
    """
    if options.model is not None:
        found = encoders.released(options.model, group.device, DTYPES[recipe.COMPUTE])
        return *found, released_decoder(found[1])
    if options.encoder is not None:
        if options.vae is None:
            raise ValueError("--encoder: expected --vae, the folder of the VAE stage, beside it")
        from .networks.generator import Painter

        own = encoders.mini("mini", options.vae, options.encoder, group.device)
        return *own, Painter(options.vae, "mini")
    if missing := {"latents", "text"} - set(shards.precomputed):
        raise ValueError(
            f"{shards.folder} holds no {' and no '.join(sorted(missing))}; expected --model, or --vae and --encoder"
        )
    return None, None, None, None


def share_of_peak(text: str) -> float:
    """A number in (0, 1]."""
    if not 0 < (value := float(text)) <= 1:
        raise ValueError(text)
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a recipe with SLOTS; the others are the stage's own."""
    own = parser.add_argument_group("recipes with SLOTS (released, mini/on_shards), on one process or under torchrun")
    own.add_argument("--data", type=Path, metavar="SHARDS", help="folder written by `python -m train shards`")
    own.add_argument(
        "--model", type=Path, metavar="CHECKPOINT", help="folder whose VAE and text encoder encode the data"
    )
    own.add_argument(
        "--validate",
        type=Path,
        metavar="SHARDS",
        help="shards the training never sees; their loss every VALIDATE_EVERY",
    )
    own.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="replace a field of the recipe; repeatable"
    )
    own.add_argument(
        "--print-config", action="store_true", help="print every field, and why where the paper leaves it open"
    )
    own.add_argument(
        "--dry-run", action="store_true", help="print size, memory, FLOPs and time for this mesh; needs no GPU"
    )
    own.add_argument("--world", type=positive, default=128, help="processes that --dry-run assumes (default: 128)")
    own.add_argument(
        "--gpu", default="a100", choices=sorted(cost.GPUS), help="GPU that --dry-run assumes (default: a100)"
    )
    own.add_argument(
        "--mfu", type=share_of_peak, default=0.4, help="share of its peak that --dry-run assumes (default: 0.4)"
    )
    own.add_argument(
        "--shard", type=positive, help="ranks that hold one copy of the state (default: those of a node, at most SHARD)"
    )
    own.add_argument(
        "--extend-data",
        type=Path,
        action="append",
        default=[],
        metavar="SHARDS",
        help="more shards for a training that is resumed: they come with every bucket's next epoch, and its states record them; repeatable",
    )
    own.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="which of a state given to --init: those that were trained, as the paper continues, or their running average (default: raw)",
    )
    own.add_argument("--resume", type=Path, metavar="STATE", help="a state of OUT/checkpoints other than the latest")


def is_sharded_recipe(recipe: ModuleType, options: argparse.Namespace) -> bool:
    """Whether a recipe trains here. `--print-config` is answered for all. Errors: ValueError for options of the other kind."""
    here = hasattr(recipe, "SLOTS")
    mine = {"--data": options.data, "--model": options.model, "--shard": options.shard, "--resume": options.resume}
    mine |= {"--dry-run": options.dry_run, "--validate": options.validate, "--weights": options.weights}
    mine |= {"--extend-data": options.extend_data or None}
    others = {"--decay": options.decay, "--joint-steps": options.joint_steps, "--compile": options.compile}
    others |= {"--lr-scale": options.lr_scale != 1}
    wrong = [name for name, value in (others if here else mine).items() if value not in (None, False)]
    if wrong:
        how = "recipes without SLOTS; --set replaces a field" if here else "recipes with SLOTS, such as mini/on_shards"
        raise ValueError(f"{', '.join(wrong)}: for {how}; this is {recipe.__name__.removeprefix('train.configs.')}")
    return here or options.print_config


def as_trained(options: argparse.Namespace, recipe: ModuleType) -> ModuleType:
    """The recipe with the MMDiT and the LoRA of the state that is taken up, else of the checkpoint folder to start from and
    of `--lora`; with the state it began from (INIT) and which of its weights (WEIGHTS), where it began from one.

    Errors: ValueError where an option and the state differ.
    """
    changed: Any = configs.override(recipe, [])  # a module: it takes any field
    asked = parse_lora(options.lora) if options.lora else None
    folder = state_of(options)
    if folder is not None:
        held = read_state(folder)["settings"]
        if asked and held.get("LORA") != str(asked):
            raise ValueError(f"--lora {asked}: this training has {held.get('LORA', 'none')}")
        asked = parse_lora(held["LORA"]) if "LORA" in held else None
        if options.weights and options.weights != held.get("WEIGHTS"):
            raise ValueError(f"--weights {options.weights}: this training began from {held.get('WEIGHTS', 'no state')}")
        for name in ("INIT", "WEIGHTS"):
            if name in held:
                setattr(changed, name, held[name])
        changed.MODEL = {name: tuple(v) if isinstance(v, list) else v for name, v in held["MODEL"].items()}
    elif options.init is not None and not options.init.is_dir():
        raise ValueError(f"--init {options.init}: no such folder; expected a checkpoint folder, or a state step_...")
    elif (path := released_config(options.init)) is not None:
        changed.MODEL = vars(transformer_config(read_json(path), str(path)))
    elif asked and not options.dry_run:
        raise ValueError(NO_BASE)
    elif options.init is not None:
        changed.INIT, changed.WEIGHTS = str(options.init), options.weights or "raw"
    if options.weights and not hasattr(changed, "WEIGHTS"):
        raise ValueError(f"--weights {options.weights}: expected --init STATE, a state of a training, beside it")
    if asked:
        changed.LORA = str(asked)
    return changed


def state_of(options: argparse.Namespace) -> Path | None:
    """The state that is taken up, if any: `--resume`, or the latest of OUT."""
    return options.resume or Checkpoints(options.out / "checkpoints", ALONE).latest()


def released_config(init: Path | None) -> Path | None:
    """transformer/config.json of a checkpoint folder; None for a state, or nothing."""
    path = None if init is None else init / "transformer" / "config.json"
    return path if path is not None and path.is_file() else None


def run(options: argparse.Namespace, recipe: ModuleType, stage: str) -> int:
    """`python -m train pretrain|mixed_resolution` for such a recipe. Errors: ValueError, FileNotFoundError."""
    recipe = as_trained(options, recipe)
    if options.print_config:
        print(configs.describe(recipe))
        return 0
    check(recipe)
    if options.dry_run:
        sizes = ShardSet(options.data).sizes if options.data else None
        print(cost.dry_run(recipe, options.world, options.shard, options.gpu, options.mfu, sizes))
        return 0
    torch.set_num_threads(options.threads)
    if options.export:
        export(options, recipe)
        return 0
    if options.data is None:
        raise ValueError(f"{stage}: expected --data SHARDS for {recipe.__name__.removeprefix('train.configs.')}")
    with ranks.join(options.device, options.shard, most=recipe.SHARD) as group:
        return train(options, recipe, stage, group)


def export(options: argparse.Namespace, recipe: ModuleType) -> None:
    """The averages of a state as FOLDER/transformer in the released layout, bfloat16. One process, on the host.

    Of a training with `--lora`: the adapters as peft's FOLDER/lora, and merged.
    """
    with torch.device("meta"):
        model = Denoiser(model_of(recipe))
    model.to_empty(device="cpu")
    if lora := lora_of(recipe):
        attach_lora(model, lora)
    states, folder = Checkpoints(options.out / "checkpoints", ALONE), state_of(options)
    if folder is None:
        raise FileNotFoundError(f"{states.folder}: no state of a training here")
    folder = states.last_whole(options.resume, lambda state: loaded(states, state, averaged_names(model)), loudly)
    if lora:
        save_lora(model, lora, options.export / "lora")
        merge_lora(model)
    save_transformer(model, options.export / "transformer", torch.bfloat16)
    made = f" and {options.export / 'lora'}" if lora else ""
    print(f"{folder.name} is exported: {options.export / 'transformer'}{made}")


def loaded(states: Checkpoints, folder: Path, tensors: dict[str, Tensor]) -> Path:
    """The state's folder, whose tensors are where they were asked for."""
    states.load(folder, tensors)
    return folder


def loudly(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


def bucket_sizes(recipe: ModuleType, shards: Shards) -> dict[Bucket, int]:
    """Samples of every bucket that a recipe draws and the shards hold. Errors: ValueError where there is none."""
    if shards.max_upscale > recipe.MAX_UPSCALE:
        raise ValueError(
            f"{shards.folder} enlarges pictures up to {shards.max_upscale:g}, MAX_UPSCALE is {recipe.MAX_UPSCALE:g}; "
            f"expected shards of --max-upscale {recipe.MAX_UPSCALE:g}, or --set MAX_UPSCALE={shards.max_upscale:g}"
        )
    asked = buckets_of(recipe)
    found = {bucket: n for bucket, n in shards.sizes.items() if bucket in asked}
    if not found:
        held, wanted = (
            ", ".join(b.name for b in buckets[:4]) + (", ..." if len(buckets) > 4 else "")
            for buckets in (list(shards.sizes), asked)
        )
        raise ValueError(f"{shards.folder} holds no bucket of BASES and ASPECTS: {held}; expected {wanted}")
    return found


def data_of(
    options: argparse.Namespace, recipe: ModuleType, state: dict[str, Any] | None
) -> tuple[ShardSets, BucketSampler, list[dict[str, Any]]]:
    """The shards of `--data` with those that a state or `--extend-data` adds, the stream over them, and what a state records
    of the added: step, folder, fingerprint.

    Errors: ValueError where there is no state to add to, or it is of other data.
    """
    held = state["data"] if state else {}
    extended = list(held.get("extended", []))
    known = [entry["fingerprint"] for entry in extended]
    folders = [options.data, *(Path(entry["folder"]) for entry in extended)]

    def stream() -> tuple[ShardSets, BucketSampler]:
        sets = [ShardSets(folders[: count + 1]) for count in range(len(folders))]
        sizes = [bucket_sizes(recipe, own) for own in sets]
        grown = [(entry["step"], more) for entry, more in zip(extended, sizes[1:])]
        return sets[-1], BucketSampler(sizes[0], law_of(recipe), recipe.SEED, recipe.SLOTS, grown)

    shards, sampler = stream()
    for own, mark in zip(shards.sets[1:], known):
        if own.fingerprint != mark:
            raise ValueError(f"{own.folder}: not the shards {mark} that this training was extended by")
    added = [own for own in map(ShardSet, options.extend_data) if own.fingerprint not in known]
    if not added:
        return shards, sampler, extended
    if state is None:
        raise ValueError(
            f"--extend-data {added[0].folder}: expected a training to resume, there is no state in {options.out}"
        )
    if (held["data"], held["fingerprint"]) != (shards.fingerprint, sampler.fingerprint):
        raise ValueError(
            f"--extend-data {added[0].folder}: the state is of shards {held['data']} and stream {held['fingerprint']}, --data is "
            f"{shards.fingerprint} and {sampler.fingerprint}: other data, or another seed, slots, batch sizes or bucket law"
        )
    for own in added:
        extended.append({"step": state["step"], "folder": str(own.folder), "fingerprint": own.fingerprint})
        folders.append(own.folder)
    return *stream(), extended


class OnShards(Method):
    """The MMDiT on micro-batches of shards. model: as `ranks.wrap` gave it. sheet: draws the model's pictures into a file.

    held_out: the model -> its losses on what is never trained on (train/loop/validation.py). flops: of a micro-batch.
    """

    def __init__(
        self,
        recipe: ModuleType,
        model: nn.Module,
        objective: FlowMatching,
        buckets: Sequence[Bucket],
        sheet: Callable[[Path], None] | None = None,
        held_out: Callable[[nn.Module], dict[str, float]] | None = None,
        flops: Callable[[ShardBatch], float] = lambda _batch: 0.0,
    ):
        self.recipe, self.model, self.objective = recipe, model, objective
        self.sheet, self.held_out, self.flops = sheet, held_out, flops
        self.kinds = tuple(bucket.name for bucket in buckets)
        whole = ranks.bare(model)
        trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
        optimizer = adamw(trained, recipe.LR, recipe.BETAS, recipe.WEIGHT_DECAY, recipe.EPS)
        self.networks = {"model": Network(model, optimizer, Ema(whole, recipe.EMA, trained_only=True))}

    def plan(self, stage: str) -> Plan:
        recipe, validated = self.recipe, self.held_out is not None
        return Plan(
            stage,
            recipe.STEPS,
            recipe.WARMUP,
            recipe.DECAY,
            clip=recipe.CLIP,
            slots=recipe.SLOTS,
            skip_limit=recipe.SKIP_LIMIT,
            damaged_limit=recipe.DAMAGED_LIMIT,
            log_every=recipe.LOG_EVERY,
            validate_every=recipe.VALIDATE_EVERY if validated else 0,
            save_every=recipe.SAVE_EVERY,
        )

    def losses(self, batch: ShardBatch, step: int) -> dict[str, Losses]:
        values, times = self.objective(self.model, batch)
        return {"model": Losses(values, times=times)}

    def about(self, batch: ShardBatch) -> About:
        count, tokens = len(batch.lengths), batch.bucket.tokens
        return About(
            samples=count,
            weight=flow_matching.micro_batch_weight(self.recipe.LOSS_REDUCTION, count, tokens),
            kind=batch.bucket.name,
            place=(batch.step, batch.slot),
            image_tokens=count * tokens,
            text_tokens=sum(batch.lengths),
            damaged=[(skip.key, skip.reason) for skip in batch.skipped],
            flops=self.flops(batch),
            seen={"bucket": batch.bucket.name, "keys": list(batch.keys)},
        )

    def validate(self, step: int) -> dict[str, float]:
        return self.held_out(self.model) if self.held_out is not None else {}

    def draw(self, folder: Path, step: int) -> dict[str, Path]:
        if self.sheet is None:
            return {}
        path = folder / f"sheet_{step:07d}.png"
        self.sheet(path)
        return {"sheet": path}


def averaged_names(model: nn.Module) -> dict[str, Tensor]:
    """Where a state's averages go: its name for them -> the parameter. What was not trained has no average but itself."""
    return {f"{'ema' if p.requires_grad else 'model'}.{n}": p.detach() for n, p in model.named_parameters()}


def names_in_a_state(model: nn.Module, which: str) -> dict[str, Tensor]:
    """A state's name -> the parameter that begins as it. which: "raw", the weights that were trained, or "average"."""
    if which == "average":
        return averaged_names(model)
    return {f"model.{n}": p.detach() for n, p in model.named_parameters()}


def train(options: argparse.Namespace, recipe: ModuleType, stage: str, group: Ranks) -> int:
    clock, out = Clock(options.stop_after), options.out
    # data, and the frozen networks that encode it
    folder = state_of(options)
    before = read_state(folder) if folder else None
    added = [Path(entry["folder"]) for entry in before["data"].get("extended", [])] if before else []
    given = [options.data, *options.extend_data, *([options.validate] if options.validate else [])]
    check_once_per_node([*given, *added], group)
    shards, sampler, extended = data_of(options, recipe, before)
    tokenizer, codec, text, decode = networks(recipe, options, shards, group)
    loader = Loader(shards, sampler, tokenizer, recipe.TEXT_DROPOUT, options.workers, pin=group.device.type == "cuda")
    encode = Encode(codec, text, group.device, shards)
    # the MMDiT: of the state, of a checkpoint folder, or fresh; and where its states go
    released = None if folder else released_config(options.init)
    model, shape = build(recipe, group, released.parent if released else None), model_of(recipe)
    states = Checkpoints(out / "checkpoints", group, recipe.KEEP_LAST, recipe.KEEP_EVERY)
    if folder is None and options.init is not None and released is None:
        states.load(options.init, names_in_a_state(ranks.bare(model), recipe.WEIGHTS))
    lora = lora_of(recipe)
    sheet = None
    if decode is not None:
        assert tokenizer is not None, "it comes with a decoder"
        sheet = Sheets(recipe, group, model, shape, text, [tokenizer(p) for p in recipe.PROMPTS], decode)
    if group.main:
        out.mkdir(parents=True, exist_ok=True)
    group.barrier()
    # what it learns from, and what it is measured by
    objective, held_out = FlowMatching(recipe, shape), None
    if options.validate is not None:
        held_out = HeldOut(
            recipe, group, objective, *validation_loader(recipe, options.validate, shards, tokenizer, encode)
        )
    method = OnShards(
        recipe,
        model,
        objective,
        sampler.buckets,
        sheet,
        held_out,
        lambda batch: cost.training_flops(shape, batch.bucket.tokens, batch.lengths, lora),
    )
    peak, fields = cost.peak_of(group.device), configs.fields(recipe)
    trainer = Trainer(method.plan(stage), method, states, out, group, fields, peak)
    start: Any = 0
    if folder is not None:
        folder, state = states.last_whole(
            options.resume, lambda whole: (whole, trainer.resume(whole)), loudly if group.main else lambda _line: None
        )
        start = state["data"]
        if start.get("extended", []) != extended[: len(start.get("extended", []))] or state["step"] < max(
            (entry["step"] for entry in extended), default=0
        ):
            raise ValueError(f"{folder}: a state of other data than the newest; --resume {folder} goes on from it")
        if len(extended) > len(start.get("extended", [])):
            start = loader.state(trainer.step)
        if group.main:
            for line in changed(recipe, state["settings"]):
                print(line, flush=True)
    if group.main:
        whence = f"step {trainer.step} of {folder}" if trainer.step else str(options.init or "fresh weights")
        if not trainer.step and hasattr(recipe, "WEIGHTS"):
            whence += f" ({recipe.WEIGHTS})"
        count = sum(p.numel() for p in method.networks["model"].parameters.values())
        print(
            f"{stage}: {count:,} parameters from {whence}; {sum(sampler.sizes):,} samples in {len(sampler.buckets)} "
            f"buckets; {group.world} processes on {group.device.type}; into {out}",
            flush=True,
        )
    context = contextlib.nullcontext() if recipe.ATTENTION == "auto" else attention_choice.use(recipe.ATTENTION)
    with context:
        batches = encode.ahead(loader.batches(start, group.rank, group.world))
        place = loader.state if not extended else lambda step: {**loader.state(step), "extended": extended}
        trainer.run(batches, clock, place, options.steps)
    if group.main:
        print(f"step {trainer.step} is saved: {states.latest()}", flush=True)
    return 0


def changed(recipe: ModuleType, before: dict[str, Any]) -> list[str]:
    """What a resumed training does otherwise than the state says."""
    now = json.loads(json.dumps(configs.fields(recipe)))
    return [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if now[name] != before.get(name)]
