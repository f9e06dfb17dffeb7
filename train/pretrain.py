"""Stage "pretrain": flow matching at one low resolution (arXiv 2605.21573, Method; stage A).

    python -m train pretrain --config mini --out runs/pretrain --stop-after 30m      # again to resume
    python -m train pretrain --config mini --out runs/pretrain --steps 40000         # longer; the decay moves with it
    python -m train pretrain --config mini --out runs/second --init runs/pretrain    # weights only, fresh optimiser
    python -m train pretrain --config mini --out runs/pretrain --export lens/mini/base

Needs the frozen latent space (``train vae``) and the text encoder (``train encoder``). The encoder is trained together
with the model for its first steps (features of a frozen small language model are obeyed worse), then frozen. Every draw
is keyed by (seed, purpose, step), so a resumed run equals an unbroken one bit for bit on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lens import sampler
from lens.checkpoint import save_transformer, write_json
from lens.model import LensTransformer2DModel
from lens.modulation import modulate
from lens.packing import Packing, plan
from lens.pipeline import Defaults, LensPipeline
from lens.text_encoder import DEFAULT_CHAT_DATE, ChatTokenizer, TextEncoder

from . import configs
from .checkpointing import load_state, save_state
from .data.world import World
from .encoder import encode_batch, export as export_encoder, load as load_encoder
from .logging import JsonLog
from .loop import Clock, Ema, duration, keyed, rate
from .objectives import flow_matching
from .vae import VALIDATION_SEED, Half, Latents, build

Batch = tuple[Tensor, list[list[int]]]  # clean latents [n, I, C], chat-rendered token ids per sample


class Stream:
    """Scenes -> (latents, token ids) of step s, from s alone: resumable anywhere, nothing stored."""

    def __init__(self, config: ModuleType, latents: Latents, tokenizer: ChatTokenizer):
        self.config, self.latents, self.tokenizer, self.world = config, latents, tokenizer, World()
        self._pool: tuple[int, list[Batch]] = (-1, [])

    def scenes(self, seeds: list[int], world: World) -> Batch:
        scenes, pixels = world.batch(seeds, self.config.SIDE, self.config.SIDE)
        ids = [self.tokenizer.encode(s.caption, 512, "reference", DEFAULT_CHAT_DATE) for s in scenes]
        return self.latents.encode(pixels), ids

    def batch(self, step: int) -> Batch:
        """Captions of a batch have nearly one length: a pool is sorted by length, cut, and its batches shuffled."""
        size, pool = self.config.BATCH, step // self.config.POOL
        if self._pool[0] != pool:
            count = size * self.config.POOL
            x, ids = self.scenes(list(range(pool * count, (pool + 1) * count)), self.world)
            order = sorted(range(count), key=lambda i: (len(ids[i]), i))
            cuts = [order[i : i + size] for i in range(0, count, size)]
            shuffle = torch.randperm(len(cuts), generator=keyed(self.config.SEED, "pool", pool)).tolist()
            self._pool = (pool, [(x[cuts[i]], [ids[k] for k in cuts[i]]) for i in shuffle])
        return self._pool[1][step % self.config.POOL]


class Trainer:
    """The model, the encoder and one optimiser over both; ``step`` counts finished steps."""

    def __init__(self, config: ModuleType, encoder: nn.Module, steps: int | None = None):
        self.config, self.encoder = config, encoder
        self.steps = steps or config.STEPS
        self.model = LensTransformer2DModel(config.MODEL).train()
        self.model.init_weights(keyed(config.SEED, "model init"), config.INIT_STD)
        self.ema, self.step = Ema(self.model, config.EMA), 0
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.WEIGHT_DECAY, "base": config.LR},
                {"params": vectors, "weight_decay": 0.0, "base": config.LR},
                {"params": list(encoder.parameters()), "weight_decay": 0.0, "base": config.ENCODER_LR},
            ],
            betas=config.BETAS,
        )
        self._plans: dict[tuple[int, ...], Packing] = {}

    @property
    def joint(self) -> bool:
        """Is the encoder still learning?"""
        return self.step < self.config.ENCODER_STEPS

    def state(self) -> dict[str, Any]:
        return {
            "stage": "pretrain",
            "step": self.step,
            "model": self.model.state_dict(),
            "encoder": self.encoder.state_dict(),
            "ema": self.ema.state(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.encoder.load_state_dict(state["encoder"])
        self.ema.load(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def start_from(self, state: dict[str, Any]) -> None:
        """Weights alone: the averaged model and the encoder of another run."""
        self.encoder.load_state_dict(state["encoder"])
        self.ema.load({**state["ema"], "updates": 0})
        self.ema.copy_to(self.model)

    def averaged(self) -> LensTransformer2DModel:
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model)
        return model.eval()

    def _plan(self, lengths: list[int]) -> Packing:
        key = tuple(lengths)
        if key not in self._plans:
            if len(self._plans) > 256:
                self._plans.clear()
            side = self.config.SIDE // 16
            self._plans[key] = plan([(side, side)] * len(lengths), lengths, self.config.MODEL.axes_dims_rope)
        return self._plans[key]

    def velocity(self, model: LensTransformer2DModel, x_t: Tensor, t: Tensor, ids: list[list[int]]) -> Tensor:
        """x_t [n, I, C], t [n], token ids (empty list = no text) -> v [n, I, C]."""
        kept = [i for i, tokens in enumerate(ids) if tokens]
        width = (len(self.config.MODEL.selected_layer_index), self.config.MODEL.enc_hidden_dim)
        features = [x_t.new_zeros(0, *width) for _ in ids]
        if kept:
            for i, f in zip(kept, encode_batch(self.encoder, [ids[i] for i in kept]), strict=True):
                features[i] = f
        packing = self._plan([len(f) for f in features])
        text = model.project_text(list(torch.cat(features).unbind(1)), packing.text_lengths)
        return model.denoise(x_t.flatten(0, 1), text, modulate(model, t), packing).view(x_t.shape)

    def train_step(self, batch: Batch) -> tuple[float, float]:
        """One optimiser step; returns loss and gradient norm. A step that is not finite is skipped and counted."""
        config = self.config
        x0, ids = batch
        generator = keyed(config.SEED, "step", self.step)
        t = flow_matching.sample_times(len(x0), config.MU, generator, config.STRATIFIED)
        noise = torch.randn(x0.shape, generator=generator)
        dropped = torch.rand(len(x0), generator=generator) < config.TEXT_DROPOUT
        ids = [[] if drop else tokens for drop, tokens in zip(dropped.tolist(), ids)]
        with contextlib.nullcontext() if self.joint else frozen(self.encoder):
            v = self.velocity(self.model, flow_matching.interpolate(x0, noise, t[:, None, None]), t, ids)
        loss = flow_matching.loss(v, x0, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, group["base"], config.WARMUP, self.steps, config.DECAY)
        if self.joint:  # the encoder comes to rest before it is frozen
            left = 1 - self.step / config.ENCODER_STEPS
            self.optimizer.param_groups[2]["lr"] *= min(1.0, 4 * left)
        norm = float(nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], config.CLIP))
        if torch.isfinite(torch.tensor(norm)):
            self.optimizer.step()
            self.ema.update(self.model)
        self.step += 1
        return float(loss), norm

    @torch.no_grad()
    def validate(self, held: Batch) -> dict[str, float]:
        """Averaged weights on held-out scenes at fixed times and noise, with text and without it."""
        model, (x0, ids) = self.averaged(), held
        generator = keyed(self.config.SEED, "validation")
        t = flow_matching.sample_times(len(x0), self.config.MU, generator, True)
        noise = torch.randn(x0.shape, generator=generator)
        x_t = flow_matching.interpolate(x0, noise, t[:, None, None])
        model.train()  # whole-batch products: a measure, not a picture
        losses = [
            float(flow_matching.loss(self.velocity(model, x_t, t, texts), x0, noise)) for texts in (ids, [[]] * len(ids))
        ]
        return {"held": losses[0], "held_no_text": losses[1], "text_share": 1 - losses[0] / losses[1]}


@contextlib.contextmanager
def frozen(module: nn.Module):
    """Features without a graph: parameters neither get gradients nor cost a backward pass."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def pipeline(trainer: Trainer, tokenizer: ChatTokenizer, codec: Any) -> LensPipeline:
    """The averaged model behind the public pipeline, in memory."""
    config = trainer.config
    encoder = TextEncoder(tokenizer, copy.deepcopy(trainer.encoder).eval(), config.MODEL.selected_layer_index)
    scheduler = sampler.Scheduler(use_dynamic_shifting=False, shift=config.SHIFT)
    defaults = Defaults("lens", base_resolution=config.SIDE, max_resolution=config.SIDE, time_dtype="float32", **config.SAMPLER)
    return LensPipeline(trainer.averaged(), encoder, codec, scheduler, defaults)


class TrainingCodec:
    """Decodes with the decoder as it stands in its own run, else with the linear codec."""

    def __init__(self, folder: Path):
        self.latents, self.decoder = Latents(folder), None
        if (folder / "decoder.pt").is_file():
            self.decoder = Half(build(configs.load("mini", "vae")), "decoder")
            self.decoder.load_state_dict(load_state(folder / "decoder.pt", "vae decoder")["ema"]["average"])
            self.decoder.eval()

    @torch.no_grad()
    def decode(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        z = self.latents.denormalise(rows[None], *grid)
        picture = self.decoder(z) if self.decoder is not None else self.latents.codec.decode(z)
        return picture[0].clamp(-1, 1).permute(1, 2, 0)


def sheet(path: Path, pipe: LensPipeline, prompts: tuple[str, ...], columns: int = 4, scale: int = 3) -> None:
    """Fixed prompts and seeds, enlarged."""
    from PIL import Image

    pictures = pipe(list(prompts), seed=0).images
    side = pictures[0].width
    image = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side))
    for i, picture in enumerate(pictures):
        image.paste(picture, ((i % columns) * side, (i // columns) * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(temporary, "PNG")
    temporary.replace(path)


def export(trainer: Trainer, folder: Path) -> None:
    """transformer/, text_encoder/, scheduler/ and model_index.json of the released layout, bf16, averaged weights."""
    config = trainer.config
    save_transformer(trainer.averaged(), folder / "transformer", torch.bfloat16)
    export_encoder(trainer.encoder, folder / "text_encoder")
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": config.SHIFT,
            "stochastic_sampling": False,
            "use_dynamic_shifting": False,
        },
    )
    index: dict[str, Any] = {
        "_class_name": "LensPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "GptOssModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["lens", "LensTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
        "lens": {
            "name": "Lens-Mini",
            "variant": "lens",
            **config.SAMPLER,
            "base_resolution": config.SIDE,
            "max_resolution": config.SIDE,
            "time_dtype": "float32",
            "training": {"stage": "pretrain", "steps": trainer.step, "samples": trainer.step * config.BATCH},
        },
    }
    write_json(folder / "model_index.json", index)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="mini", help="recipe in train/configs (default: mini)")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="states, logs, sheets (default: runs/pretrain)")
    parser.add_argument("--vae", type=Path, default=Path("runs/vae"), help="run of the vae stage (default: runs/vae)")
    parser.add_argument("--encoder", type=Path, default=Path("runs/encoder"), help="run of the encoder stage (default: runs/encoder)")
    parser.add_argument("--tokenizer", type=Path, default=Path("lens/mini/base/tokenizer"), help="tokenizer folder")
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 9m")
    parser.add_argument("--steps", type=int, help="total steps instead of the recipe's; the decay moves with it")
    parser.add_argument("--init", type=Path, metavar="RUN", help="start from the averaged weights of another run")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="train nothing; write the model in the released layout")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    config = configs.load(options.config, "pretrain")
    trainer = Trainer(config, load_encoder(options.encoder), options.steps)
    path = options.out / "state.pt"
    if path.is_file():
        trainer.load(load_state(path, "pretrain"))
    elif options.init is not None:
        trainer.start_from(load_state(options.init / "state.pt", "pretrain"))
    if options.export:
        export(trainer, options.export)
        return 0
    tokenizer = ChatTokenizer(options.tokenizer)
    stream = Stream(config, Latents(options.vae), tokenizer)
    held = stream.scenes(list(range(VALIDATION_SEED, VALIDATION_SEED + 256)), World("held_out"))
    log, clock = JsonLog(options.out / "log.jsonl"), Clock(options.stop_after)
    total, skipped, since = 0.0, 0, 0
    while trainer.step < trainer.steps and not clock.over:
        loss, norm = trainer.train_step(stream.batch(trainer.step))
        if norm == norm and norm != float("inf"):
            total, since = total + loss, since + 1
        else:
            skipped += 1
            if skipped > 20:
                raise FloatingPointError(f"pretrain: {skipped} steps were not finite, the last at step {trainer.step}")
        if trainer.step % config.LOG_EVERY == 0:
            extra = trainer.validate(held) if trainer.step % config.SAVE_EVERY == 0 else {}
            log(step=trainer.step, loss=total / max(1, since), norm=norm, skipped=skipped, seconds=clock.elapsed, **extra)
            total, since = 0.0, 0
        if trainer.step % config.SAVE_EVERY == 0:
            save_state(path, trainer.state())
        if trainer.step % config.SHEET_EVERY == 0:
            sheet(options.out / f"sheet-{trainer.step:06d}.png", pipeline(trainer, tokenizer, TrainingCodec(options.vae)), config.PROMPTS)
    save_state(path, trainer.state())
    return 0
