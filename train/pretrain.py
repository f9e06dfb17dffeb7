"""Stage "pretrain": flow-matching training of the MMDiT on the small world.

    python -m train pretrain --vae runs/vae --encoder runs/encoder/encoder.pt --out runs/base --stop-after 9m
    python -m train pretrain --vae runs/vae --out runs/base --stop-after 9m     # again to resume, bit-equal on a CPU
    python -m train pretrain --vae runs/vae --out runs/base --init lens/mini/base     # start from shipped weights
    python -m train pretrain --vae runs/vae --out runs/base --export lens/mini/base
    python -m train pretrain --init lens/mini/base --vae lens/mini/base/vae --lora r=16 --out runs/style    # adapters alone
    python -m train pretrain --config mini_gpu --device cuda --workers 14 ...         # see bench/mini_gpu.sh
    torchrun --nproc-per-node 8 -m train pretrain --config released/pretrain_512 ...  # see docs/training.md

Loss: mean |v(x_t, t, text) - (eps - x0)|^2 over tokens and channels; x_t = (1 - t) x0 + t eps, t logit-normal around MU.
Dropped captions have no text tokens at all. The text encoder is trained along for the first JOINT_STEPS steps (small frozen
next-token features obey prompts worse) with LM_WEIGHT of its own next-token loss, which keeps it a language model; then it
is frozen at its running average.

Scenes of the recipe's world are drawn on the fly, by `--workers` processes ahead of time where asked for: their number
changes no bit. A window of scenes is sorted by caption length, so that a batch's text lengths are equal or nearly so
(train/data/stream.py). On a GPU the MMDiT runs in bfloat16 on float32 weights. `--init FOLDER` carries a generator over to
this latent space and this tokenizer; `--encoder` beside it takes another encoder than the folder's.

OUT holds pretrain.pt (the state), log.jsonl and its copy for TensorBoard, and a sheet of fixed prompts and seeds at every
save. `with_text`, `without_text`: loss on fixed unseen scenes, times and noise with the averaged weights; `text_explains` is
the share of the latter that the caption takes away.

A recipe with SLOTS trains the MMDiT alone, on shards and on any number of processes (train/pretrain_on_shards.py). Mini's has a loop of its
own, below: its encoder trains along, at another rate and with a second loss, and scenes that are drawn on the fly know no end.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from lens import checkpoint

from . import configs
from . import pretrain_on_shards as flow
from .data.stream import Source, Stream, bucket_at, draw
from .evaluate.flow_loss import validate
from .loop import lora as adapters
from .loop.checkpoints import load_state, save_state
from .loop.clock import Clock, duration, positive
from .loop.ema import Averaged, Ema
from .loop.log import JsonLog
from .loop.method import rate
from .loop.ranks import device_of
from .networks import text_path
from .networks.codec import Latents
from .networks.generator import Mini, Painter, draw_sheet, fused_rows, shaped
from .networks.warm_start import rebase_latents


def optimizer_of(config: ModuleType, model: Mini) -> torch.optim.Optimizer:
    """AdamW over what trains; weight decay on matrices only; the encoder at its own rate."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
        groups.setdefault((name.split(".")[0], parameter.dim() > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.WEIGHT_DECAY if matrix else 0.0,
                "base": config.LR if part == "transformer" else config.ENCODER_LR,
                "part": part,
            }
            for (part, matrix), parameters in groups.items()
        ],
        lr=config.LR,
        betas=config.BETAS,
        fused=True,
    )


def start_from(model: Mini, source: Path, encoder_config: ModuleType) -> None:
    """Weights alone: the averages of a state file, or both networks of a checkpoint folder in the released layout.

    Errors: ValueError where the folder's MMDiT has another shape than the recipe's.
    """
    if source.is_dir():
        transformer = checkpoint.load_transformer(source / "transformer", torch.float32, "cpu")
        ours, theirs = vars(model.shape), vars(transformer.config)
        if other := [f"{name} {theirs[name]}, expected {ours[name]}" for name in ours if ours[name] != theirs[name]]:
            raise ValueError(f"pretrain --init {source}: its MMDiT has {'; '.join(other)}")
        model.transformer.load_state_dict(transformer.state_dict())
        model.encoder.load_state_dict(text_path.weights_of_folder(encoder_config, source))
    else:
        model.load_state_dict(load_state(source, "pretrain")["ema"]["average"])


def expect_finite(loss: Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(f"pretrain: the loss is {loss.item()} at step {step}; the state before it is kept")


def train(config: ModuleType, options: argparse.Namespace, stage: str = "pretrain") -> None:
    """The loop. State: both networks, optimiser, averages, step, place in the stream; settings, for the export."""
    log, clock, path = JsonLog(options.out / "log.jsonl"), Clock(options.stop_after), options.out / f"{stage}.pt"
    device = device_of(options.device)
    encoder_config = configs.load(options.config, "encoder")
    tokenizer = text_path.tokenizer_of(encoder_config.TOKENIZER)
    fresh = not path.is_file()
    state = None if fresh else load_state(path, stage)
    config, lora = shaped(config, state, options.init), adapters.of_training(state, options.lora)
    if lora and fresh and options.init is None:
        raise ValueError(adapters.NO_BASE)
    model = Mini(config, encoder_config, text_path.build(encoder_config)).train()
    model.encoder.lm_head.requires_grad_(config.LM_WEIGHT > 0)
    latents = Latents(options.vae, device)
    if latents.vae is not None and device.type == "cpu":  # a released folder's encoder is slow there
        share = latents.straighten(configs.world(options.config), config.SIDE)
        log(step=0, latents_by_one_convolution=share)
    if fresh and options.init:
        start_from(model, options.init, encoder_config)
        if options.init.is_dir() and (options.init / "vae").resolve() != options.vae.resolve():
            world = configs.world(options.config)
            share = rebase_latents(model.transformer, options.init, Latents(options.vae), world, config.SIDE)
            log(step=0, latents_carried_over=share)
    if fresh and (options.encoder or not options.init):
        trained = text_path.load_trained(encoder_config, options.encoder or Path("runs/encoder/encoder.pt"))
        model.encoder.load_state_dict(trained.state_dict())
    if lora:
        model.requires_grad_(False)
        model.transformer.requires_grad_(True)  # where adapters train: around its layers
        adapters.attach(model.transformer, lora)
        adapters.start(model.transformer, config.SEED)
    model.to(device)
    optimizer, step, window, position = optimizer_of(config, model), 0, 0, 0
    if not fresh:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, window, position = state["step"], state["window"], state["position"]
    ema = Ema(model, config.EMA)
    if not fresh:
        ema.load(state["ema"])
    stream = Stream(
        config,
        Source(options.config),
        latents.encode,
        options.workers,
        device,
        getattr(config, "FIRST_SEED", 0),
        stop=lambda: clock.asked,
    )
    compute = model if device.type == "cpu" else model.rounded
    steps, decay = options.steps or config.STEPS, options.decay or config.DECAY
    joint = options.joint_steps if options.joint_steps is not None else config.JOINT_STEPS
    joint = 0 if lora else joint  # the encoder stays the checkpoint's
    rates = {name: getattr(config, name) * options.lr_scale for name in ("LR", "ENCODER_LR")}
    settings = {
        "STEPS": steps,
        "DECAY": decay,
        "JOINT_STEPS": joint,
        "MODEL": config.MODEL,
        **rates,
    }  # what options change
    settings |= {"LORA": str(lora)} if lora else {}

    def save() -> None:
        if since:  # also between logs: broken weights must not replace the state before them
            expect_finite(sums.sum(), step)
        save_state(
            path,
            {
                "stage": stage,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state(),
                "step": step,
                "window": window,
                "position": position,
                "settings": settings,
            },
        )

    def freeze() -> None:
        model.encoder.requires_grad_(False)
        for parameter in model.encoder.parameters():
            parameter.grad = None

    if step > joint:
        freeze()
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums, since, seen, past = torch.zeros(2, dtype=torch.float64, device=device), 0, 0, None
    by_base: dict[int, list[Tensor]] = {}
    if fresh and stream.mixed:  # what it starts from
        log(step=0, **validate(config, model, stream, tokenizer.prefix))
    for next_window, next_position, batch in stream.batches(window, position) if step < steps else ():
        if step >= steps or clock.over:
            break
        if step == joint:  # from here on the text features are those of the averaged encoder
            with torch.no_grad():
                for name, parameter in model.encoder.named_parameters():
                    parameter.copy_(ema.average[f"encoder.{name}"])
            freeze()
        if past is None or step <= joint:  # the prefix changes as long as the encoder trains
            past = model.past(tokenizer.prefix)
        flow, words = compute(draw(config, batch, step), past, step < joint and config.LM_WEIGHT > 0)
        loss = flow.mean()
        if device.type == "cpu":  # a GPU is asked when its numbers are logged: looking at one makes the host wait
            expect_finite(loss + words, step)
        optimizer.zero_grad(set_to_none=True)
        (loss + config.LM_WEIGHT * words).backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], config.CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, group["base"] * options.lr_scale, config.WARMUP, steps, decay)
        optimizer.step()
        ema.update(model)
        step, window, position = step + 1, next_window, next_position
        sums, since, seen = sums + torch.stack([loss, words]).detach().double(), since + 1, seen + len(flow)
        if stream.mixed:
            by_base.setdefault(bucket_at(config, step - 1).base, []).append(loss.detach())
        if step % config.LOG_EVERY == 0:
            expect_finite(sums.sum(), step)
            total, language = (sums / since).tolist()
            extra = {"next_token": language} if language else {}
            extra |= {f"loss_{base}": torch.stack(losses).mean().item() for base, losses in sorted(by_base.items())}
            by_base.clear()
            if step % config.VALIDATE_EVERY == 0:
                with Averaged(ema, model):
                    extra |= validate(config, model, stream, tokenizer.prefix)
            log(step=step, loss=total, rate=seen / clock.elapsed, seconds=clock.elapsed, **extra)
            sums, since = torch.zeros_like(sums), 0
        if step % config.SAVE_EVERY == 0:
            save()
            for side in config.BUCKETS if stream.mixed else (config.SIDE,):
                name = f"sheet_{side}" if stream.mixed else "sheet"
                sheet = options.out / f"{name}_{step:06d}.png"
                with Averaged(ema, model):
                    draw_sheet(config, model, tokenizer, Painter(options.vae, options.config), sheet, side)
                log.picture(name, sheet, step)
    save()
    stream.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="mini", help="recipe in train/configs (default: mini)")
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
    flow.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    config = configs.override(configs.load(options.config, "pretrain"), options.set)
    if flow.serves(config, options):
        return flow.run(options, config, "pretrain")
    torch.set_num_threads(options.threads)
    if options.export:
        from .export import export

        export(config, options)
    else:
        with fused_rows() if options.compile else contextlib.nullcontext():
            train(config, options)
    return 0
