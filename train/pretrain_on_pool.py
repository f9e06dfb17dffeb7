"""Stage "pretrain" for a recipe with a POOL: the MMDiT alone, on scenes encoded once (train/data/pool.py, train/networks/padded.py).

    python -m train pretrain --config mini/pretrain_128 --init lens/mini/base --out runs/base_128 --stop-after 2h
    python -m train pretrain --config mini/pretrain_128 --out runs/base_128 --stop-after 2h          # again to resume
    python -m train pretrain --config mini/pretrain_128 --out runs/base_128 --export lens/mini/base

Starts from a checkpoint folder, whose text encoder, VAE and tokenizer stay as they are; a recipe whose MODEL is wider or deeper
than the folder's grows the weights (train/networks/warm_start.py). OUT holds pretrain.pt (the state) and
log.jsonl; `loss_at/T` of the validation: loss on fixed unseen scenes and noise at time T with the averaged weights.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lens.config import LensConfig
from lens.formats.files import read_json, write_json
from lens.formats.released import load_transformer, read_index, released_index, save_transformer
from lens.model import LensTransformer2DModel

from . import configs
from .data.pool import Encoded, Pool, PoolPart, Size, grid_of
from .data.small_world.world import World
from .loop.checkpoints import StateFile, load_state, write_text
from .loop.clock import Clock
from .loop.ema import Ema
from .loop.keys import keyed
from .loop.log import read_log
from .loop.method import About, Losses, Method, Network, Plan, adamw
from .loop.trainer import Trainer
from .networks import text_path
from .networks.codec import Latents
from .networks.padded import Padded
from .networks.warm_start import widened
from .objectives import flow_matching

STAGE = "pretrain"
VALIDATION_SEED = 1_000_000_000


def is_pool_recipe(config: ModuleType) -> bool:
    return hasattr(config, "POOL")


class PoolReader:
    """Captions -> features of a text encoder that stays as it is. recipe: of the encoder stage."""

    def __init__(self, encoder: nn.Module, recipe: ModuleType):
        self.tokenizer = text_path.tokenizer_of(recipe.TOKENIZER)
        self.encoder, self.layers = encoder.requires_grad_(False).eval(), recipe.LAYERS

    @classmethod
    def of_folder(cls, folder: Path, recipe: ModuleType) -> PoolReader:
        """The encoder of a checkpoint folder."""
        encoder = text_path.build(recipe)
        encoder.load_state_dict(text_path.weights_of_folder(recipe, folder))
        return cls(encoder, recipe)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """float32 [T, F E] of each caption and the suffix."""
        tokens = [self.tokenizer.encode(caption)[0] for caption in captions]
        found = text_path.encode_batch(self.encoder, tokens, self.tokenizer.prefix, self.layers, 0.5)
        return [f.flatten(1) for f in found]


def _config_of(config: ModuleType, transformer: LensTransformer2DModel) -> LensConfig:
    return replace(
        transformer.config, **{k: v for k, v in config.MODEL.items() if k in ("num_layers", "num_attention_heads")}
    )


@torch.no_grad()
def validate(config: ModuleType, padded: Padded, held: Sequence[tuple[Size, PoolPart]]) -> dict[str, float]:
    """Loss at each of TIMES on fixed scenes and noise, `loss_at/T`, and their mean `validation`; where there are more
    sizes, by size, and `validation` is the mean of theirs."""
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
    if len(sizes) > 1:
        out["validation"] = sum(out[f"validation_{height}x{width}"] for height, width in sizes) / len(sizes)
    return out


def held_out(config: ModuleType, made: Encoded) -> list[tuple[Size, PoolPart]]:
    """Batches of validation scenes, what fills no batch included."""
    parts = made.parts(range(VALIDATION_SEED, VALIDATION_SEED + config.VALIDATION * len(config.SIZES)))
    return [(key[0], part.take(rows)) for key, part in parts.items() for rows in torch.arange(len(part)).split(32)]


def trained_of(model: LensTransformer2DModel) -> dict[str, nn.Parameter]:
    """What trains: all but the end of the last block's text stream, which nothing reads."""
    last = model.layers()[-1].text
    for parameter in (last.norm2, *last.out.parameters(), *last.w13.parameters(), *last.w2.parameters()):
        parameter.requires_grad_(False)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class OnPool(Method):
    """The MMDiT on batches of a pool: (size, part). folder: the checkpoint whose weights and networks it starts from."""

    def __init__(
        self,
        config: ModuleType,
        model: LensTransformer2DModel,
        folder: Path,
        pool: Pool,
        held: Sequence[tuple[Size, PoolPart]],
        lr: float,
        gemm: torch.dtype,
    ):
        self.config, self.folder, self.pool, self.held = config, folder, pool, held
        self.padded, self.uncompiled = Padded(model, config.COMPILED, gemm), Padded(model, False)
        optimizer = adamw(trained_of(model), lr, config.BETAS, config.WEIGHT_DECAY)
        self.networks = {"model": Network(model, optimizer, Ema(model, config.EMA))}
        self.place = {"turn": 0, "position": 0}

    def batches(self) -> Iterator[tuple[Size, PoolPart]]:
        """From the place on, without end unless the pool was stopped; where it stands is told before each."""
        turn, position = self.place["turn"], self.place["position"]
        while self.pool.turn_to(turn):
            for index, batch in enumerate(self.pool.batches(turn)):
                if index >= position:
                    self.place = {"turn": turn, "position": index + 1}
                    yield batch
            turn, position = turn + 1, 0

    def about(self, batch: tuple[Size, PoolPart]) -> About:
        _, part = batch
        count, tokens = part.latents.shape[:2]
        return About(count, image_tokens=count * tokens, text_tokens=int(part.lengths.sum()), seen=self.place)

    def losses(self, batch: tuple[Size, PoolPart], step: int) -> dict[str, Losses]:
        """Times, noise and caption dropout are keyed by (seed, step)."""
        (size, part), config = batch, self.config
        generator, count = keyed(config.SEED, "step", step), len(part)
        t = flow_matching.sample_times(count, flow_matching.mu_of(config.MU, part.latents.shape[1]), generator)
        noise = torch.randn(part.latents.shape, generator=generator)
        kept = torch.rand(count, generator=generator) >= config.TEXT_DROPOUT
        x, target = flow_matching.noised(part.latents, noise, t)
        v = self.padded(x, t, part.features, part.lengths * kept, grid_of(size))
        return {"model": Losses(flow_matching.loss(v, target), times=t)}

    def state(self) -> dict[str, Any]:
        return {"init": str(self.folder)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        place = state.get("data", state)  # beside the rest in states of before
        self.place = {name: place[name] for name in self.place}

    def validate(self, step: int) -> dict[str, float]:
        return validate(self.config, self.uncompiled, self.held)


def train(config: ModuleType, options: argparse.Namespace) -> None:
    """Train until the steps or the clock are over."""
    clock, states = Clock(options.stop_after), StateFile(options.out / f"{STAGE}.pt")
    before = states.latest()
    folder = Path(load_state(before, STAGE)["init"]) if before else options.init
    if folder is None or not (folder / "transformer").is_dir():
        raise ValueError(
            f"pretrain --init: {folder}, expected a checkpoint folder in the released layout to start from"
        )
    model = load_transformer(folder / "transformer", torch.float32, "cpu")
    if _config_of(config, model) != model.config:
        model = widened(model, _config_of(config, model), keyed(config.SEED, "widened"))
    model.requires_grad_(True).train()
    model.batch_invariant = False
    latents = Latents(folder / "vae")
    world = World("train", config.TASKS, config.CLASSES, config.CAPTIONS, config.PHOTOGRAPHS)
    latents.straighten(world, 64, config.STRAIGHTEN)  # a convolution has no size: small scenes find it
    made = Encoded(
        config, world, latents.encode, PoolReader.of_folder(folder, configs.beside(options.config, "encoder"))
    )
    pool = Pool(config, lambda seeds: made.parts(seeds, lambda: clock.asked))
    gemm = getattr(torch, config.GEMM)
    method = OnPool(config, model, folder, pool, held_out(config, made), config.LR * options.lr_scale, gemm)
    plan = Plan(
        STAGE,
        options.steps or config.STEPS,
        config.WARMUP,
        options.decay if options.decay is not None else config.DECAY,
        clip=config.CLIP,
        log_every=config.LOG_EVERY,
        validate_every=config.VALIDATE_EVERY,
        validate_first=True,
        save_every=config.SAVE_EVERY,
    )
    settings = {"STEPS": plan.steps, "DECAY": plan.decay, "GEMM": config.GEMM}
    trainer = Trainer(plan, method, states, options.out, settings=settings)
    if before:
        trainer.resume(before)
    trainer.run(method.batches(), clock, lambda _step: method.place)


def export(config: ModuleType, options: argparse.Namespace) -> None:
    """The averaged transformer, in bfloat16, beside encoder, VAE and tokenizer of the folder that training started from; the
    recipe as run and the log, under the recipe's own name, join those of the stages before. With a share to blend the weights
    are (1 - share) start + share trained."""
    state, folder = load_state(options.out / f"{STAGE}.pt", STAGE), options.export
    source, name = Path(state["init"]), Path(options.config).stem
    start = load_transformer(source / "transformer", torch.float32, "cpu")
    model = LensTransformer2DModel(_config_of(config, start))
    model.load_state_dict(state["ema"]["average"])
    if options.blend is not None:
        if model.config != start.config:
            raise SystemExit(f"--blend: {source} has other sizes than what was trained from it")
        for trained, before in zip(model.parameters(), start.parameters(), strict=True):
            trained.data.lerp_(before.data, 1 - options.blend)
        state["settings"] = state["settings"] | {"BLEND": options.blend}
    if folder.resolve() != source.resolve():
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer"))
    save_transformer(model, folder / "transformer", torch.bfloat16)
    about, rows = read_index(source)["lens"], read_log(options.out / "log.jsonl")
    loss = next(row["validation"] for row in reversed(rows) if "validation" in row)
    about |= {
        "base_resolution": config.SIDE,
        "max_resolution": max(max(size) for size in config.SIZES),
        "caption_styles": list(config.CAPTIONS),
        "trained_steps": about["trained_steps"] + state["step"],
        "validation": {"mean_over_times" if options.blend is None else "mean_over_times_before_blending": loss},
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
