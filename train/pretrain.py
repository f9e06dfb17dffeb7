"""Stage "pretrain": flow-matching training of the MMDiT on the small world.

    python -m train pretrain --vae runs/vae --encoder runs/encoder/encoder.pt --out runs/base --stop-after 9m
    python -m train pretrain --vae runs/vae --out runs/base --stop-after 9m     # again to resume, bit-equal on a CPU
    python -m train pretrain --vae runs/vae --out runs/base --init lens/mini/base     # start from shipped weights
    python -m train pretrain --vae runs/vae --out runs/base --export lens/mini/base
    python -m train pretrain --init lens/mini/base --vae lens/mini/base/vae --lora r=16 --out runs/style    # adapters alone
    python -m train pretrain --config mini_gpu --device cuda --workers 14 ...         # see train/runs/mini_gpu.sh
    torchrun --nproc-per-node 8 -m train pretrain --config released/pretrain_512 ...  # see docs/training.md

Loss: mean |v(x_t, t, text) - (eps - x0)|^2 over tokens and channels; x_t = (1 - t) x0 + t eps, t logit-normal around MU.
Dropped captions have no text tokens at all. The text encoder is trained along for the first JOINT_STEPS steps (small frozen
next-token features obey prompts worse) with LM_WEIGHT of its own next-token loss, which keeps it a language model; then it
is frozen at its running average.

Scenes of the recipe's world are drawn on the fly, by `--workers` processes ahead of time where asked for: their number
changes no bit. A window of scenes is sorted by caption length, so that a batch's text lengths are equal or nearly so
(train/data/small_world/batches.py). On a GPU the MMDiT runs in bfloat16 on float32 weights. `--init FOLDER` carries a generator over to
this latent space and this tokenizer; `--encoder` beside it takes another encoder than the folder's.

OUT holds pretrain.pt (the state), log.jsonl and its copy for TensorBoard, and a sheet of fixed prompts and seeds at every
save. `with_text`, `without_text`: loss on fixed unseen scenes, times and noise with the averaged weights; `text_explains` is
the share of the latter that the caption takes away.

A recipe with SLOTS trains the MMDiT alone, on shards and on any number of processes (train/pretrain_on_shards.py). Mini's has
two networks: its encoder trains along, at another learning rate and with a second loss.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lens.formats.released import load_transformer

from . import configs, pretrain_on_pool
from . import pretrain_on_shards as flow
from .data.small_world.batches import WorldBatch, WorldBatches, WorldSource, bucket_at, draw
from .evaluate.flow_loss import validate
from .loop.checkpoints import StateFile, load_state
from .loop.clock import Clock, duration, positive, share
from .loop.ema import Ema
from .loop.log import JsonLog
from .loop.lora import NO_BASE, Lora, attach_lora, init_lora, lora_of_training
from .loop.method import About, Losses, Method, Network, Plan, adamw
from .loop.ranks import Ranks, device_of
from .loop.trainer import Trainer
from .networks import text_path
from .networks.codec import Latents
from .networks.generator import Mini, Painter, Past, draw_sheet, fused_rows, shaped
from .networks.text_path import CaptionTokenizer
from .networks.warm_start import rebase_latents


def start_from(model: Mini, source: Path, encoder_config: ModuleType) -> None:
    """Weights alone: the averages of a state file, or both networks of a checkpoint folder in the released layout.

    Errors: ValueError where the folder's MMDiT has another shape than the recipe's.
    """
    if source.is_dir():
        transformer = load_transformer(source / "transformer", torch.float32, "cpu")
        ours, theirs = vars(model.shape), vars(transformer.config)
        if other := [f"{name} {theirs[name]}, expected {ours[name]}" for name in ours if ours[name] != theirs[name]]:
            raise ValueError(f"pretrain --init {source}: its MMDiT has {'; '.join(other)}")
        model.transformer.load_state_dict(transformer.state_dict())
        model.encoder.load_state_dict(text_path.weights_of_folder(encoder_config, source))
    else:
        model.load_state_dict(load_state(source, "pretrain")["ema"]["average"])


class TrainMini(Method):
    """MMDiT and text encoder together. A batch: (scenes of one size, the base they belong to).

    options: what the command says; it may replace steps and learning rates of the recipe. prefix: the chat's constant beginning.
    """

    def __init__(
        self,
        config: ModuleType,
        options: argparse.Namespace,
        model: Mini,
        stream: WorldBatches,
        tokenizer: CaptionTokenizer,
        lora: Lora | None,
    ):
        self.config, self.options, self.model, self.stream = config, options, model, stream
        self.tokenizer, self.lora = tokenizer, lora
        self.past: Past | None = None
        self.compute = model if model.device.type == "cpu" else model.rounded
        self.kinds = tuple(str(base) for base in config.BUCKETS) if stream.mixed else ()
        joint = options.joint_steps if options.joint_steps is not None else config.JOINT_STEPS
        self.joint = 0 if lora else joint  # beside adapters the encoder stays the checkpoint's
        self.learning_rates = {name: getattr(config, name) * options.lr_scale for name in ("LR", "ENCODER_LR")}
        self.averages = {name: Ema(getattr(model, name), config.EMA) for name in ("transformer", "encoder")}
        self.networks = {name: self._network(name, lr) for name, lr in zip(self.averages, self.learning_rates.values())}
        self.place = {"window": 0, "position": 0}

    def _network(self, name: str, lr: float) -> Network:
        module = getattr(self.model, name)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        optimizer = adamw(trained, lr, self.config.BETAS, self.config.WEIGHT_DECAY) if trained else None
        return Network(module, optimizer, self.averages[name])

    def plan(self, stage: str) -> Plan:
        config, options = self.config, self.options
        return Plan(
            stage,
            options.steps or config.STEPS,
            config.WARMUP,
            options.decay or config.DECAY,
            clip=config.CLIP,
            log_every=config.LOG_EVERY,
            validate_every=config.VALIDATE_EVERY,
            validate_first=self.stream.mixed,  # what it starts from
            save_every=config.SAVE_EVERY,
        )

    def settings(self, plan: Plan) -> dict[str, Any]:
        """What options change, and what an export asks for."""
        found = {"STEPS": plan.steps, "DECAY": plan.decay, "JOINT_STEPS": self.joint, "MODEL": self.config.MODEL}
        return found | self.learning_rates | ({"LORA": str(self.lora)} if self.lora else {})

    def batches(self) -> Iterator[tuple[WorldBatch, str | None]]:
        """From the place on; where it stands is told before each."""
        for window, position, batch in self.stream.batches(**self.place):
            index = window * self.config.WINDOW + position - 1
            self.place = {"window": window, "position": position}
            yield batch, str(bucket_at(self.config, index).base) if self.stream.mixed else None

    def turn(self, step: int) -> tuple[str, ...]:
        return ("transformer", "encoder") if step < self.joint else ("transformer",)

    def about(self, batch: tuple[WorldBatch, str | None]) -> About:
        scenes, base = batch
        count, tokens = scenes.latents.shape[:2]
        seen = {"window": self.place["window"], "batch": self.place["position"] - 1}
        return About(count, kind=base, image_tokens=count * tokens, text_tokens=sum(scenes.lengths), seen=seen)

    def losses(self, batch: tuple[WorldBatch, str | None], step: int) -> dict[str, Losses]:
        config, joint = self.config, step < self.joint
        if self.past is None or joint:  # the prefix changes as long as the encoder trains
            self.past = self.model.past(self.tokenizer.prefix)
        drawn = draw(config, batch[0], step)
        language = joint and config.LM_WEIGHT > 0
        flow, words = self.compute(drawn, self.past, language)
        beside = {"beside": config.LM_WEIGHT * words, "terms": {"next_token": words}} if language else {}
        return {"transformer": Losses(flow, times=drawn.t, **beside)}

    @torch.no_grad()
    def after(self, step: int) -> None:
        """From its last step on the encoder stands still at its average, which the text features are then those of."""
        if step + 1 == self.joint:
            self.averages["encoder"].copy_to(self.model.encoder)
            self.past = None

    def load_state(self, state: Mapping[str, Any]) -> None:
        place = state.get("data", state)  # beside the rest in states of before
        self.place = {name: place[name] for name in self.place}
        self.after(state["step"] - 1)

    def validate(self, step: int) -> dict[str, float]:
        return validate(self.config, self.model, self.stream, self.tokenizer.prefix)

    def draw(self, folder: Path, step: int) -> dict[str, Path]:
        """A sheet, or one of every base: what the training draws with."""
        painter, sheets = Painter(self.options.vae, self.options.config), {}
        for side in self.config.BUCKETS if self.stream.mixed else (self.config.SIDE,):
            name = f"sheet_{side}" if self.stream.mixed else "sheet"
            sheets[name] = folder / f"{name}_{step:06d}.png"
            draw_sheet(self.config, self.model, self.tokenizer, painter, sheets[name], side)
        return sheets


def train(config: ModuleType, options: argparse.Namespace, stage: str = "pretrain") -> None:
    """Mini's training until its steps or the clock are over."""
    log, clock, states = (
        JsonLog(options.out / "log.jsonl"),
        Clock(options.stop_after),
        StateFile(options.out / f"{stage}.pt"),
    )
    # the networks' shapes, of the recipe, a state or a folder
    device, before = device_of(options.device), states.latest()
    encoder_config = configs.beside(options.config, "encoder")
    tokenizer = text_path.tokenizer_of(encoder_config.TOKENIZER)
    state = load_state(before, stage) if before else None
    config, lora = shaped(config, state, options.init), lora_of_training(state, options.lora)
    if lora and state is None and options.init is None:
        raise ValueError(NO_BASE)
    model = Mini(config, encoder_config, text_path.build(encoder_config)).train()
    model.encoder.lm_head.requires_grad_(config.LM_WEIGHT > 0)
    # the latent space that pictures are encoded into
    latents = Latents(options.vae, device)
    if latents.vae is not None and device.type == "cpu":  # a released folder's encoder is slow there
        share = latents.straighten(configs.world(options.config), config.SIDE)
        log(step=0, latents_by_one_convolution=share)
    # the weights that a training begins with
    if state is None and options.init:
        start_from(model, options.init, encoder_config)
        if options.init.is_dir() and (options.init / "vae").resolve() != options.vae.resolve():
            world = configs.world(options.config)
            share = rebase_latents(model.transformer, options.init, Latents(options.vae), world, config.SIDE)
            log(step=0, latents_carried_over=share)
    if state is None and (options.encoder or not options.init):
        trained = text_path.load_trained(encoder_config, options.encoder or Path("runs/encoder/encoder.pt"))
        model.encoder.load_state_dict(trained.state_dict())
    if lora:
        model.requires_grad_(False)
        model.transformer.requires_grad_(True)  # where adapters train: around its layers
        attach_lora(model.transformer, lora)
        init_lora(model.transformer, config.SEED)
    model.to(device)
    # data and loop
    stream = WorldBatches(
        config,
        WorldSource(options.config),
        latents.encode,
        options.workers,
        device,
        getattr(config, "FIRST_SEED", 0),
        stop=lambda: clock.asked,
    )
    with contextlib.closing(stream):
        method = TrainMini(config, options, model, stream, tokenizer, lora)
        plan = method.plan(stage)
        trainer = Trainer(plan, method, states, options.out, Ranks(device), method.settings(plan))
        if before:
            trainer.resume(before)
        trainer.run(method.batches(), clock, lambda _step: method.place)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="mini", help="recipe in train/configs, or a file .py (default: mini)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/base"), help="folder of state, log, sheets (default: runs/base)"
    )
    parser.add_argument(
        "--vae", type=Path, default=Path("runs/vae"), help="folder of the VAE stage (default: runs/vae)"
    )
    parser.add_argument(
        "--encoder",
        type=Path,
        metavar="STATE",
        help="state file of the encoder stage (default: runs/encoder/encoder.pt; with --init, the encoder found there)",
    )
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 9m")
    parser.add_argument("--steps", type=positive, help="total steps instead of the recipe's")
    parser.add_argument("--decay", type=int, help="length of the final linear decay in steps instead of the recipe's")
    parser.add_argument(
        "--joint-steps", type=int, help="steps during which the encoder trains along, instead of the recipe's"
    )
    parser.add_argument("--lr-scale", type=float, default=1.0, help="factor on every learning rate (default: 1)")
    parser.add_argument(
        "--init",
        type=Path,
        metavar="PATH",
        help="start from the weights of a state file, or of a checkpoint folder (carried over to these latents)",
    )
    parser.add_argument(
        "--lora",
        metavar="r=R[,alpha=A]",
        help="train adapters alone, beside the frozen weights of --init; alpha=2r, targets=attention or all",
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu (float32) or cuda (bfloat16 on float32 weights) (default: cpu)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="let torch compile the row ops that have no compiled kernel for the device (some minutes at first)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that render scenes ahead of time (default: 0, none)"
    )
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="train nothing; write the model in the released layout"
    )
    parser.add_argument(
        "--blend",
        type=share,
        metavar="SHARE",
        help="with --export, of a pool's training: this share of what was trained, the rest of what it started from",
    )
    flow.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    config = configs.override(configs.load(options.config, "pretrain"), options.set)
    if options.blend is not None and not (options.export and pretrain_on_pool.is_pool_recipe(config)):
        raise SystemExit(
            "--blend: expected with --export, and a recipe of a pool of scenes (mini/pretrain_128, mini/pretrain_sizes)"
        )
    if flow.is_sharded_recipe(config, options):
        return flow.run(options, config, "pretrain")
    if pretrain_on_pool.is_pool_recipe(config):
        return pretrain_on_pool.run(options, config)
    torch.set_num_threads(options.threads)
    if options.export:
        from .export import export

        export(config, options)
    else:
        with fused_rows() if options.compile else contextlib.nullcontext():
            train(config, options)
    return 0
