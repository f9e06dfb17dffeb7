"""The loop of stage "pretrain" for a recipe with a POOL: the MMDiT alone, on scenes encoded once (train/pool.py, train/padded.py).

    python -m train pretrain --config mini/pretrain_128 --init lens/mini/base --out runs/base_128 --stop-after 2h
    python -m train pretrain --config mini/pretrain_128 --out runs/base_128 --stop-after 2h          # again to resume
    python -m train pretrain --config mini/pretrain_128 --out runs/base_128 --export lens/mini/base

Starts from a checkpoint folder, whose text encoder, VAE and tokenizer stay as they are; a recipe whose MODEL is wider or deeper
than the folder's grows the weights (train/warm_start.py). OUT holds pretrain.pt (the state) and
log.jsonl; `loss_at/T` of the validation: loss on fixed unseen scenes and noise at time T with the averaged weights.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lens.config import LensConfig
from lens.formats.files import read_json, write_json
from lens.formats.released import load_transformer, read_index, released_index, save_transformer
from lens.model import LensTransformer2DModel

from . import configs
from . import encoder as text_stage
from .checkpointing import load_state, save_state, write_text
from .codec import Latents
from .data.world import World
from .logging import JsonLog, read_log
from .loop import Averaged, Clock, Ema, keyed, rate
from .objectives import flow_matching
from .padded import Padded
from .pool import Encoded, Part, Pool, Size, grid_of
from .warm_start import widened

STAGE = "pretrain"
VALIDATION_SEED = 1_000_000_000


def serves(config: ModuleType) -> bool:
    return hasattr(config, "POOL")


class Reader:
    """Captions -> features of the frozen encoder of a checkpoint folder."""

    def __init__(self, folder: Path, recipe: ModuleType):
        self.tokenizer = text_stage.tokenizer_of(recipe.TOKENIZER)
        self.encoder = text_stage.build(recipe).requires_grad_(False).eval()
        self.encoder.load_state_dict(text_stage.weights_of_folder(recipe, folder))
        self.layers = recipe.LAYERS

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """float32 [T, F E] of each caption and the suffix."""
        tokens = [self.tokenizer.encode(caption)[0] for caption in captions]
        found = text_stage.encode_batch(self.encoder, tokens, self.tokenizer.prefix, self.layers, 0.5)
        return [f.flatten(1) for f in found]


def _config_of(config: ModuleType, transformer: LensTransformer2DModel) -> LensConfig:
    return replace(
        transformer.config, **{k: v for k, v in config.MODEL.items() if k in ("num_layers", "num_attention_heads")}
    )


@torch.no_grad()
def validate(config: ModuleType, padded: Padded, held: Sequence[tuple[Size, Part]]) -> dict[str, float]:
    """Loss at each of TIMES on fixed scenes and noise, `loss_at/T`, and their mean `validation`, by size where there are more."""
    out: dict[str, float] = {}
    sizes = list(dict.fromkeys(size for size, _ in held))
    for size in sizes:
        sums, count = torch.zeros(len(config.TIMES), dtype=torch.float64), 0
        for index, (_, part) in enumerate((s, p) for s, p in held if s == size):
            noise = torch.randn(part.latents.shape, generator=keyed(config.SEED, f"validation {size}", index))
            for i, time in enumerate(config.TIMES):
                t = torch.full((len(part),), time)
                x, target = flow_matching.noised(part.latents, noise, t)
                v = padded(x, t, part.features, part.lengths, grid_of(size))
                sums[i] += flow_matching.loss(v, target).double().sum()
            count += len(part)
        means = (sums / count).tolist()
        name = "" if len(sizes) == 1 else f"_{size[0]}x{size[1]}"
        out |= {f"loss_at{name}/{time}": value for time, value in zip(config.TIMES, means)}
        out[f"validation{name}"] = sum(means) / len(means)
    return out


def held_out(config: ModuleType, made: Encoded) -> list[tuple[Size, Part]]:
    """Batches of validation scenes, what fills no batch included."""
    parts = made.parts(range(VALIDATION_SEED, VALIDATION_SEED + config.VALIDATION * len(config.SIZES)))
    return [(key[0], part.take(rows)) for key, part in parts.items() for rows in torch.arange(len(part)).split(32)]


def optimizer_of(config: ModuleType, model: LensTransformer2DModel) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only. The end of the last block's text stream, which nothing reads, is not trained."""
    last = model.layers()[-1].text
    for parameter in (last.norm2, *last.out.parameters(), *last.w13.parameters(), *last.w2.parameters()):
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.WEIGHT_DECAY},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.LR, betas=config.BETAS, fused=True)


def loss_of(config: ModuleType, padded: Padded, size: Size, part: Part, step: int) -> Tensor:
    """Losses [B] of a step: times, noise and caption dropout are keyed by (seed, step)."""
    generator, count = keyed(config.SEED, "step", step), len(part)
    t = flow_matching.sample_times(count, flow_matching.mu_of(config.MU, part.latents.shape[1]), generator)
    noise = torch.randn(part.latents.shape, generator=generator)
    kept = torch.rand(count, generator=generator) >= config.TEXT_DROPOUT
    x, target = flow_matching.noised(part.latents, noise, t)
    return flow_matching.loss(padded(x, t, part.features, part.lengths * kept, grid_of(size)), target)


def _batches(pool: Pool, turn: int, position: int) -> Iterator[tuple[int, int, Size, Part]]:
    """(turn, position of the next batch, size, batch) from a position on, without end unless the pool was stopped."""
    while pool.turn_to(turn):
        for place, (size, part) in enumerate(pool.batches(turn)):
            if place >= position:
                yield turn, place + 1, size, part
        turn, position = turn + 1, 0


def train(config: ModuleType, options: argparse.Namespace) -> None:
    """The loop. State: transformer, optimiser, averages, step, turn of the pool and place in it."""
    path, log, clock = options.out / f"{STAGE}.pt", JsonLog(options.out / "log.jsonl"), Clock(options.stop_after)
    state = load_state(path, STAGE) if path.is_file() else None
    folder = Path(state["init"]) if state else options.init
    if folder is None or not (folder / "transformer").is_dir():
        raise ValueError(
            f"pretrain --init: {folder}, expected a checkpoint folder in the released layout to start from"
        )
    model = load_transformer(folder / "transformer", torch.float32, "cpu")
    if _config_of(config, model) != model.config:
        model = widened(model, _config_of(config, model), keyed(config.SEED, "widened"))
    model.requires_grad_(True).train()
    model.batch_invariant = False
    optimizer, step, turn, position = optimizer_of(config, model), 0, 0, 0
    steps, decay = options.steps or config.STEPS, options.decay if options.decay is not None else config.DECAY
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, turn, position = state["step"], state["turn"], state["position"]
    ema = Ema(model, config.EMA)
    if state:
        ema.load(state["ema"])
    latents = Latents(folder / "vae")
    world = World("train", config.TASKS, config.CLASSES, config.CAPTIONS)
    latents.straighten(world, 64, config.STRAIGHTEN)  # a convolution has no size: small scenes find it
    made = Encoded(config, world, latents.encode, Reader(folder, configs.load("mini", "encoder")))
    pool, padded = Pool(config, lambda seeds: made.parts(seeds, lambda: clock.asked)), Padded(model, config.COMPILED)
    held, plain = held_out(config, made), Padded(model, False)
    if not state:
        log(step=0, **validate(config, plain, held))

    def save() -> None:
        progress = {"step": step, "turn": turn, "position": position, "init": str(folder)}
        tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state()}
        save_state(path, {"stage": STAGE, **tensors, **progress, "settings": {"STEPS": steps, "DECAY": decay}})

    sums, since, seen = 0.0, 0, 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    for next_turn, next_position, size, part in _batches(pool, turn, position) if step < steps else ():
        if step >= steps or clock.over:
            break
        loss = loss_of(config, padded, size, part, step).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"pretrain: the loss is {loss.item()} at step {step}; the state before it is kept")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.CLIP, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, config.LR * options.lr_scale, config.WARMUP, steps, decay)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        step, turn, position = step + 1, next_turn, next_position
        sums, since, seen = sums + loss.item(), since + 1, seen + len(part)
        if step % config.LOG_EVERY == 0:
            extra: dict[str, float] = {}
            if step % config.VALIDATE_EVERY == 0:
                with Averaged(ema, model):
                    extra = validate(config, plain, held)
            log(step=step, loss=sums / since, rate=seen / clock.elapsed, seconds=clock.elapsed, **extra)
            sums, since = 0.0, 0
        if step % config.SAVE_EVERY == 0:
            save()
    save()
    with Averaged(ema, model):
        extra = validate(config, plain, held)
        log(step=step, seconds=clock.elapsed, **extra)


def export(config: ModuleType, options: argparse.Namespace) -> None:
    """The averaged transformer, in bfloat16, beside encoder, VAE and tokenizer of the folder that training started from; the
    recipe as run and the log, under the recipe's own name, join those of the stages before."""
    state, folder = load_state(options.out / f"{STAGE}.pt", STAGE), options.export
    source, name = Path(state["init"]), options.config.rpartition("/")[2]
    start = load_transformer(source / "transformer", torch.float32, "cpu")
    model = LensTransformer2DModel(_config_of(config, start))
    model.load_state_dict(state["ema"]["average"])
    if folder.resolve() != source.resolve():
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
    save_transformer(model, folder / "transformer", torch.bfloat16)
    about, rows = read_index(source)["lens"], read_log(options.out / "log.jsonl")
    about |= {
        "base_resolution": config.SIDE,
        "max_resolution": max(max(size) for size in config.SIZES),
        "caption_styles": list(config.CAPTIONS),
        "trained_steps": about["trained_steps"] + state["step"],
        "validation": {"mean_over_times": next(row["validation"] for row in reversed(rows) if "validation" in row)},
    }
    write_json(folder / "model_index.json", released_index(about))
    recipe = {field: value for field, value in configs.fields(config).items() if field != "SIZES"}
    recipe["SIZES"] = {f"{height}x{width}": share for (height, width), share in config.SIZES.items()}
    earlier = read_json(source / "recipe.json")
    write_json(folder / "recipe.json", earlier | {name: recipe | state["settings"]})
    write_text(folder / f"{name}.jsonl", (options.out / "log.jsonl").read_text(encoding="utf-8"))


def run(options: argparse.Namespace, config: ModuleType) -> int:
    torch.set_num_threads(options.threads)
    if options.export:
        export(config, options)
    else:
        train(config, options)
    return 0
