"""Stage "vae": latents <-> pixels, in the released layout (AutoencoderKLFlux2).

    python -m train vae --config mini --out runs/vae                       # codec, then decoder, then encoder
    python -m train vae --config mini --out runs/vae --part decoder --stop-after 25m     # again to resume
    python -m train vae --config mini_gpu --out runs/gpu/vae --part joint --device cuda   # everything together
    python -m train vae --config mini --out runs/vae --part probe          # what the latents say about their tokens
    python -m train vae --config mini --out runs/vae --export lens/mini/base/vae

Two ways to a latent space. On a CPU it is fixed first and cheaply: an overlapped linear transform (one strided
convolution, learned in a minute or two together with its transposed inverse, under noise, every channel at unit
variance) is the *codec*. Then

    decoder:  minimise  |D(z + noise) - x|   over z = codec(x)      what draws every picture
    encoder:  minimise  |E(x) - codec(x)|^2  and a posterior width equal to the codec's noise

are two independent regressions. Nothing downstream waits for them: a generator trained on codec(x) stays valid while the
decoder keeps improving. Where there is a GPU, encoder and decoder are trained together (train/networks/joint.py) and the encoder's
posterior mode is the latent space. Latents of a picture: c channels per 8x8 pixels; patchified (c p1 p2) to 4c per token
and normalised with BatchNorm statistics measured once over STATISTICS_SCENES scenes. A folder holds one of the two.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn as nn

from lens import checkpoint

from . import configs
from .data.kinds import CORE
from .data.world import World
from .loop.checkpoints import folder_tensors, load_state, save_state
from .loop.clock import Clock, duration
from .loop.ema import Ema
from .loop.keys import keyed
from .loop.log import JsonLog
from .loop.method import rate
from .loop.ranks import device_of
from .networks.codec import Half, Latents, autoencoder, held_out_pictures, probe, psnr, sheet, to_model, train_codec
from .networks.joint import train_joint
from .objectives.autoencoding import detail_at, reconstruction_loss, regression_loss


def build(config: ModuleType) -> nn.Module:
    """An AutoencoderKLFlux2 with weights drawn from the recipe's seed."""
    return autoencoder(config.MODEL, config.SEED)


@torch.no_grad()
def rebase(half: Half, vae: nn.Module, latents: Latents, side: int, scenes: int = 1_024) -> float:
    """Fold the affine map between the latents of `vae` and those of `latents` into the 1x1 convolution of a half of `vae`.

    Least squares over every latent pixel of `scenes` training scenes: for the decoder z_vae ~ A z + b goes before, for the
    encoder z ~ A z_vae + b after (its means; its log variances stay). Returns the share of variance the map explains.
    """
    pixels = World().batch(list(range(scenes)), side, side)[1]
    x = [to_model(pixels[i : i + 64]) for i in range(0, scenes, 64)]
    old = torch.cat([vae.encode(part).latent_dist.mode() for part in x]).transpose(0, 1).flatten(1).T.double()
    new = torch.cat([latents.latents(part) for part in x]).transpose(0, 1).flatten(1).T.double()
    given, wanted = (new, old) if half.part == "decoder" else (old, new)
    design = torch.cat([given, torch.ones(len(given), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, wanted).solution
    rest = (wanted - design @ solution).pow(2).sum() / (wanted - wanted.mean(0)).pow(2).sum()
    a, b, channels = solution[:-1].T, solution[-1], wanted.shape[1]
    weight, bias = half.point.weight[:, :, 0, 0].double(), half.point.bias.double()
    if half.part == "decoder":
        weight, bias = weight @ a, bias + weight @ b
    else:
        weight = torch.cat([a @ weight[:channels], weight[channels:]])
        bias = torch.cat([a @ bias[:channels] + b, bias[channels:]])
    half.point.weight.copy_(weight[:, :, None, None])
    half.point.bias.copy_(bias)
    return 1 - rest.item()


def start_half(config: ModuleType, half: Half, latents: Latents, init: Path, log: JsonLog) -> None:
    """Weights of a state file, or of a checkpoint folder, then carried over to the basis of `latents`."""
    if not init.is_dir():
        half.load_state_dict(load_state(init, f"vae {half.part}")["ema"]["average"])
        return
    whole = build(config).eval()
    whole.load_state_dict(folder_tensors(init / "vae"))
    half.load_state_dict(Half(whole, half.part).state_dict())
    share = rebase(half, whole, latents, config.SIDE)
    log(part=half.part, start=str(init), basis_explained=share)


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
    recipe.update({k: v for k, v in (("steps", steps), ("lr", lr), ("decay", decay)) if v})
    noise = config.CODEC["noise"]
    latents, worlds = Latents(out), (World(), World(classes=CORE))  # half of the scenes of what a CPU's generator draws
    half = Half(build(config), part)
    optimizer = torch.optim.AdamW(
        half.parameters(), lr=recipe["lr"], betas=(0.9, 0.95), weight_decay=recipe["weight_decay"]
    )
    step, path, state = 0, out / f"{part}.pt", None
    if path.is_file():
        state = load_state(path, f"vae {part}")
        half.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, init = state["step"], state["init"]
    elif init is not None:
        start_half(config, half, latents, init, log)
    ema = Ema(half, recipe["ema"])
    if state is not None:
        ema.load(state["ema"])
    held = held_out_pictures(config.SIDE, config.VALIDATION)
    held_z = {name: latents.latents(x) for name, x in held.items()}

    def save() -> None:
        save_state(
            path,
            {
                "stage": f"vae {part}",
                "init": None if init is None else str(init),
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
        result = {}
        for name, z in held_z.items():
            if part == "decoder":
                copy = torch.cat([half(c) for c in z.split(32)])
                result[f"psnr{name}"] = psnr(copy, held[name])
                if not name:
                    rough = z + noise * torch.randn(z.shape, generator=keyed(config.SEED, "held noise"))
                    result["psnr_noisy"] = psnr(torch.cat([half(c) for c in rough.split(32)]), held[name])
                sheet(out / f"decoder{name}.png", held[name], copy)
                log.picture(f"decoder{name}", out / f"decoder{name}.png", step)
            else:
                mean = torch.cat([half(c).chunk(2, 1)[0] for c in held[name].split(32)])
                result[f"latent_mse{name}"] = (mean - z).pow(2).mean().item()
        half.load_state_dict(live)
        return result

    loss_sum, since = 0.0, 0
    while step < recipe["steps"] and not clock.over:
        batch = recipe["batch"]
        seeds = list(range(step * batch, (step + 1) * batch))
        parts = [world.batch(seeds[i :: len(worlds)], config.SIDE, config.SIDE)[1] for i, world in enumerate(worlds)]
        x = to_model(np.concatenate(parts))
        z = latents.latents(x)
        if part == "decoder":
            generator = keyed(config.SEED, "decoder noise", step)
            level = recipe["noise"] * torch.rand(batch, 1, 1, 1, generator=generator)
            # a trained decoder has its colours: all terms from the start
            detail = 1.0 if init is not None else detail_at(step, recipe["detail_from"], recipe["detail_full"])
            loss = reconstruction_loss(half(z + level * torch.randn(z.shape, generator=generator)), x, detail)
        else:
            loss = regression_loss(half(x), z, noise)
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


def export(config: ModuleType, out: Path, folder: Path) -> None:
    """Averaged weights and the token statistics as a released VAE folder in bfloat16; both halves, or the joint training's."""
    latents = Latents(out)
    vae = latents.vae
    if vae is None:
        vae = build(config)
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
        "--part",
        choices=("codec", "decoder", "encoder", "joint", "probe"),
        help="train this part only (default: codec, decoder, encoder); probe: measure what frozen latents say",
    )
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 9m")
    parser.add_argument("--steps", type=int, help="total steps of the part instead of the recipe's")
    parser.add_argument("--decay", type=int, help="length of the final linear decay in steps instead of the recipe's")
    parser.add_argument("--lr", type=float, help="learning rate instead of the recipe's")
    parser.add_argument(
        "--init",
        type=Path,
        metavar="PATH",
        help="start a part from the weights of a state file or a checkpoint folder; joint: also from a folder of halves",
    )
    parser.add_argument("--head", type=float, help="joint: weight of the class and colour head instead of the recipe's")
    parser.add_argument("--device", default="cpu", help="joint, probe: cpu or cuda (bfloat16 there; default: cpu)")
    parser.add_argument("--compile", action="store_true", help="joint: compile encoder and decoder")
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
    if options.part == "joint":
        train_joint(config, options, log, clock)
        return 0
    if options.part == "probe":
        probe(config, Latents(options.out, device_of(options.device)), log)
        return 0
    if not (options.out / "codec.pt").is_file() and not train_codec(config, options.out, log, clock):
        return 0
    for part in ("decoder", "encoder"):
        if options.part in (None, part):
            train_half(config, part, options.out, log, clock, options.init, options.steps, options.lr, options.decay)
    return 0
