"""Stage "vae": latents <-> pixels, in the released layout (AutoencoderKLFlux2).

    python -m train vae --config mini --out runs/vae                       # codec, then decoder, then encoder
    python -m train vae --config mini --out runs/vae --part decoder --stop-after 25m     # again to resume
    python -m train vae --config mini --out runs/vae --export lens/mini/vae

The latent space is fixed first and cheaply: an overlapped linear transform (one strided convolution, learned in a
minute or two together with its transposed inverse, under noise, every channel at unit variance) is the *codec*. Then

    decoder:  minimise  |D(z + noise) - x|   over z = codec(x)      what draws every picture
    encoder:  minimise  |E(x) - codec(x)|^2  and a posterior width equal to the codec's noise

are two independent regressions. Nothing downstream waits for them: a generator trained on codec(x) stays valid while the
decoder keeps improving. Latents of a picture: 8 channels per 8x8 pixels; patchified (c p1 p2) to 32 per token and
normalised with BatchNorm statistics measured once over STATISTICS_SCENES scenes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lens import checkpoint
from lens.vae import patchify

from . import configs
from .checkpointing import folder_tensors, load_state, save_state
from .codec import Latents, LinearCodec, psnr, to_model
from .data.world import World
from .logging import JsonLog
from .loop import Clock, Ema, duration, keyed, rate

VALIDATION_SEED = 1_000_000_000  # scenes from here on are never trained on


def train_codec(config: ModuleType, out: Path, log: JsonLog) -> None:
    """Learn the codec and the token statistics; writes out/codec.pt."""
    recipe, world, seed = config.CODEC, World(), config.SEED
    pictures = np.concatenate(
        [world.batch(list(range(i, i + 500)), config.SIDE, config.SIDE)[1] for i in range(0, recipe["scenes"], 500)]
    )
    validation = to_model(world.batch(list(range(VALIDATION_SEED, VALIDATION_SEED + 512)), config.SIDE, config.SIDE)[1])
    with torch.random.fork_rng():
        torch.manual_seed(keyed(seed, "codec init").initial_seed())
        codec = LinearCodec(config.MODEL["latent_channels"], recipe["encode_kernel"], recipe["decode_kernel"])
    codec.start_from_principal_components(to_model(pictures[:4000]))
    optimizer = torch.optim.Adam(codec.parameters(), lr=recipe["lr"])
    for step in range(recipe["steps"]):
        generator = keyed(seed, "codec", step)
        pick = torch.randint(len(pictures), (recipe["batch"],), generator=generator)
        x = to_model(pictures[pick.numpy()])
        z = codec.encode(x)
        loss = (codec.decode(z + recipe["noise"] * torch.randn(z.shape, generator=generator)) - x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate(step, recipe["lr"], 1, recipe["steps"], recipe["steps"])
        optimizer.step()
        if step % 500 == 499:
            codec.eval()
            with torch.no_grad():
                log(part="codec", step=step + 1, psnr=psnr(codec.decode(codec.encode(validation)), validation))
            codec.train()
    codec.eval().requires_grad_(False)
    with torch.no_grad():
        tokens = (
            torch.cat(
                [
                    patchify(codec.encode(to_model(world.batch(list(range(i, i + 500)), config.SIDE, config.SIDE)[1])))
                    for i in range(0, config.STATISTICS_SCENES, 500)
                ]
            )
            .flatten(0, 1)
            .double()
        )
    mean, var = tokens.mean(0).float(), tokens.var(0, unbiased=False).float()
    save_state(
        out / "codec.pt",
        {
            "stage": "vae codec",
            "model": codec.state_dict(),
            "mean": mean,
            "var": var,
            "shape": [config.MODEL["latent_channels"], recipe["encode_kernel"], recipe["decode_kernel"]],
        },
    )


def build(config: ModuleType) -> nn.Module:
    """An AutoencoderKLFlux2 with weights drawn from the recipe's seed."""
    from diffusers import AutoencoderKLFlux2

    with torch.random.fork_rng():
        torch.manual_seed(keyed(config.SEED, "vae init").initial_seed())
        return AutoencoderKLFlux2(**config.MODEL).train()


class Half(nn.Module):
    """The decoder or the encoder of a VAE with its 1x1 convolution, so that each has its own optimiser and state."""

    def __init__(self, vae: nn.Module, part: str):
        super().__init__()
        self.part = part
        self.body = vae.decoder if part == "decoder" else vae.encoder
        self.point = vae.post_quant_conv if part == "decoder" else vae.quant_conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Decoder: [n, 8, h, w] -> [n, 3, 8h, 8w]. Encoder: the reverse, 16 channels of moments."""
        return self.body(self.point(x)) if self.part == "decoder" else self.point(self.body(x))


def decoder_loss(output: torch.Tensor, target: torch.Tensor, detail: float) -> torch.Tensor:
    """4 MSE + 4 MSE of 8x8 means + detail (0.5 L1 + 0.5 L1 of horizontal and vertical differences).

    Squares first (colour is learned fast), absolute differences later (edges): detail rises from 0 to 1.
    """
    error = output - target
    loss = 4 * error.pow(2).mean() + 4 * F.avg_pool2d(error, 8).pow(2).mean()
    if detail > 0:
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        loss = loss + detail * (0.5 * error.abs().mean() + 0.5 * edges)
    return loss


def encoder_loss(moments: torch.Tensor, target: torch.Tensor, noise: float) -> torch.Tensor:
    """Squared error of the posterior mean, and of the log variance against log(noise^2)."""
    mean, log_variance = moments.chunk(2, 1)
    return (mean - target).pow(2).mean() + 0.01 * (log_variance - 2 * math.log(noise)).pow(2).mean()


def train_half(
    config: ModuleType,
    part: str,
    out: Path,
    log: JsonLog,
    clock: Clock,
    init: Path | None,
    steps: int | None,
    lr: float | None = None,
    decay: int | None = None,
) -> bool:
    """Train one half until its steps or the clock are over; True when the steps are done."""
    recipe = dict(config.DECODER if part == "decoder" else config.ENCODER)
    recipe["steps"] = steps or recipe["steps"]
    recipe["lr"] = lr or recipe["lr"]
    recipe["decay"] = decay or recipe["decay"]
    noise = config.CODEC["noise"]
    latents, world = Latents(out), World()
    half = Half(build(config), part)
    optimizer = torch.optim.AdamW(
        half.parameters(), lr=recipe["lr"], betas=(0.9, 0.95), weight_decay=recipe["weight_decay"]
    )
    ema, step, path = Ema(half, recipe["ema"]), 0, out / f"{part}.pt"
    if path.is_file():
        state = load_state(path, f"vae {part}")
        half.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load(state["ema"])
        step = state["step"]
    elif init is not None:
        if init.is_dir():
            whole = build(config)
            whole.load_state_dict(folder_tensors(init / "vae"))
            half.load_state_dict(Half(whole, part).state_dict())
        else:
            half.load_state_dict(load_state(init, f"vae {part}")["ema"]["average"])
        ema = Ema(half, recipe["ema"])
    held = to_model(world.batch(list(range(VALIDATION_SEED, VALIDATION_SEED + 256)), config.SIDE, config.SIDE)[1])
    held_z = latents.codec.encode(held)

    def save() -> None:
        save_state(
            path,
            {
                "stage": f"vae {part}",
                "model": half.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state(),
                "step": step,
            },
        )

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        live = {k: v.clone() for k, v in half.state_dict().items()}
        ema.copy_to(half)
        if part == "decoder":
            rough = held_z + noise * torch.randn(held_z.shape, generator=keyed(config.SEED, "held noise"))
            outputs = [torch.cat([half(c) for c in z.split(32)]) for z in (held_z, rough)]
            result = {"psnr": psnr(outputs[0], held), "psnr_noisy": psnr(outputs[1], held)}
            sheet(out / "decoder.png", held, outputs[0])
        else:
            mean = torch.cat([half(c).chunk(2, 1)[0] for c in held.split(32)])
            result = {"latent_mse": (mean - held_z).pow(2).mean().item()}
        half.load_state_dict(live)
        return result

    loss_sum, since = 0.0, 0
    while step < recipe["steps"] and not clock.over:
        batch = recipe["batch"]
        seeds = list(range(step * batch, (step + 1) * batch))
        x = to_model(world.batch(seeds, config.SIDE, config.SIDE)[1])
        z = latents.codec.encode(x)
        if part == "decoder":
            generator = keyed(config.SEED, "decoder noise", step)
            level = recipe["noise"] * torch.rand(batch, 1, 1, 1, generator=generator)
            detail = min(
                1.0, max(0.0, (step - recipe["detail_from"]) / (recipe["detail_full"] - recipe["detail_from"]))
            )
            loss = decoder_loss(half(z + level * torch.randn(z.shape, generator=generator)), x, detail)
        else:
            loss = encoder_loss(half(x), z, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(half.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(step, recipe["lr"], recipe["warmup"], recipe["steps"], recipe["decay"])
        optimizer.step()
        ema.update(half)
        step, loss_sum, since = step + 1, loss_sum + loss.item(), since + 1
        if step % config.LOG_EVERY == 0:
            extra = evaluate() if step % config.EVALUATE_EVERY == 0 else {}
            log(part=part, step=step, loss=loss_sum / since, seconds=clock.elapsed, **extra)
            loss_sum, since = 0.0, 0
        if step % config.SAVE_EVERY == 0:
            save()
    save()
    return step >= recipe["steps"]


def sheet(path: Path, originals: torch.Tensor, copies: torch.Tensor, columns: int = 12, rows: int = 3) -> None:
    """Originals above their reconstructions, enlarged twice."""
    from PIL import Image

    cells = []
    for row in range(rows):
        for group in (originals, copies):
            picture = group[row * columns : (row + 1) * columns].clamp(-1, 1)
            cells.append(torch.cat(list(picture), 2))
    image = ((torch.cat(cells, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    large = Image.fromarray(image).resize((image.shape[1] * 2, image.shape[0] * 2), Image.Resampling.NEAREST)
    checkpoint.write_atomic(path, lambda temporary: large.save(temporary, "PNG"))


def export(config: ModuleType, out: Path, folder: Path) -> None:
    """Averaged weights of both halves and the token statistics as a released VAE folder in bfloat16."""
    vae, latents = build(config), Latents(out)
    for part in ("decoder", "encoder"):
        half = Half(vae, part)
        half.load_state_dict(load_state(out / f"{part}.pt", f"vae {part}")["ema"]["average"])
    vae.bn.running_mean.copy_(latents.mean)
    vae.bn.running_var.copy_(latents.var)
    checkpoint.save_vae(vae, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="mini", help="recipe in train/configs (default: mini)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/vae"), help="folder of states, logs, sheets (default: runs/vae)"
    )
    parser.add_argument(
        "--part", choices=("codec", "decoder", "encoder"), help="train this part only (default: all, in this order)"
    )
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 9m")
    parser.add_argument("--steps", type=int, help="total steps of the part instead of the recipe's")
    parser.add_argument("--decay", type=int, help="length of the final linear decay in steps instead of the recipe's")
    parser.add_argument("--lr", type=float, help="learning rate instead of the recipe's")
    parser.add_argument(
        "--init", type=Path, metavar="PATH", help="start a part from the weights of a state file or a checkpoint folder"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="train nothing; write the VAE in the released layout"
    )


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    config = configs.load(options.config, "vae")
    if options.export:
        export(config, options.out, options.export)
        return 0
    log, clock = JsonLog(options.out / "log.jsonl"), Clock(options.stop_after)
    if not (options.out / "codec.pt").is_file():
        train_codec(config, options.out, log)
    for part in ("decoder", "encoder"):
        if options.part in (None, part):
            train_half(config, part, options.out, log, clock, options.init, options.steps, options.lr, options.decay)
    return 0
