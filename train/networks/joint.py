"""Encoder, decoder and token head trained together: the part "joint" of stage "vae". Entry and usage: train/vae.py.

    z = posterior sample of E(x);  z' = z + level std(z) noise, level uniform in [0, noise] per picture
    loss = reconstruction_loss(D(z'), x) + kl KL(E(x) || N(0, 1)) + head head_loss(H(z'))

Noise in proportion to each channel's deviation makes the latents robust whatever their scale; the KL keeps the scale near
one. The head H names the class and the colour of the object on every token: a semantic latent space (weight 0: no head,
the ablation). A recipe with a POOL renders that many scenes once, in parallel, and keeps them on the device; without one
every scene is drawn when its step comes. When the steps are done the token statistics are measured with the averaged
encoder; until then joint.pt is no latent space. On a CPU a run stopped anywhere resumes bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from ..data.labels import labelled
from ..loop.checkpoints import folder_tensors, load_state, save_state
from ..loop.clock import Clock
from ..loop.ema import Ema
from ..loop.keys import keyed
from ..loop.log import JsonLog
from ..loop.method import rate
from ..loop.ranks import device_of
from ..loop.workers import start_worker, undisturbed
from ..objectives.autoencoding import detail_at, head_accuracy, head_loss, kl_loss, moments_of, reconstruction_loss
from .codec import VALIDATION_SEED, autoencoder, head_of, psnr, sheet, statistics, to_model


class Joint(nn.Module):
    """The whole autoencoder and, where its weight is above 0, the token head."""

    def __init__(self, config: ModuleType, head: float):
        super().__init__()
        self.vae = autoencoder(config.MODEL, config.SEED)
        self.head = head_of(config, "joint") if head > 0 else None

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[n, 3, H, W] -> float32 mean and log variance [n, c, H/8, W/8]."""
        return moments_of(self.vae.quant_conv(self.vae.encoder(x)).float())

    def pixels(self, z: Tensor) -> Tensor:
        return self.vae.decoder(self.vae.post_quant_conv(z)).float()


def objective(
    model: Joint,
    x: Tensor,
    labels: Tensor,
    noises: tuple[Tensor, Tensor, Tensor],
    detail: float,
    kl: float,
    head: float,
) -> dict[str, Tensor]:
    """Loss terms, unweighted, and their weighted sum "loss". x [n, 3, H, W]; noises: unit normal [n, c, h, w] of the
    posterior, of the added noise, and the latter's level [n, 1, 1, 1]."""
    mean, log_variance = model.moments(x)
    z = mean + (0.5 * log_variance).exp() * noises[0]
    rough = z + noises[2] * z.detach().std((0, 2, 3), keepdim=True) * noises[1]
    out = {
        "picture": reconstruction_loss(model.pixels(rough), x, detail),
        "kl": kl_loss(mean, log_variance, x[0].numel()),
    }
    out["loss"] = out["picture"] + kl * out["kl"]
    if model.head is not None:
        out["head"] = head_loss(model.head(rough), labels)
        out["loss"] = out["loss"] + head * out["head"]
    return out


def draw_noises(config: ModuleType, step: int, batch: int, level: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = keyed(config.SEED, "joint noise", step)
    shape = (batch, config.MODEL["latent_channels"], config.SIDE // 8, config.SIDE // 8)
    posterior, added = (torch.randn(shape, generator=generator) for _ in range(2))
    return posterior, added, level * torch.rand(batch, 1, 1, 1, generator=generator)


class Scenes:
    """Pixels and labels of a step's batch: drawn now, or picked from a pool rendered once."""

    CHUNK = 500

    def __init__(self, config: ModuleType, device: torch.device):
        self.config, self.device, self.pool, self.pixels = config, device, config.JOINT["pool"], None
        if self.pool:
            chunks = [range(i, min(i + self.CHUNK, self.pool)) for i in range(0, self.pool, self.CHUNK)]
            # fresh processes, not forks: a forked child must not touch a CUDA context
            spawn = ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=start_worker)
            with undisturbed(), spawn as workers:  # a signal meanwhile waits for the pool
                parts = list(workers.map(labelled, chunks, [config.SIDE] * len(chunks)))
            self.pixels = torch.from_numpy(np.concatenate([p for p, _ in parts])).to(device)
            self.labels = torch.cat([labels.to(torch.uint8) for _, labels in parts]).to(device)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """float32 [n, 3, H, W] and int64 [n, h, w, 2] on the device."""
        size = self.config.JOINT["batch"]
        if self.pool:
            pick = torch.randint(self.pool, (size,), generator=keyed(self.config.SEED, "joint pick", step))
            pick = pick.to(self.device)
            return to_model(self.pixels[pick]), self.labels[pick].long()
        pixels, labels = labelled(range(step * size, (step + 1) * size), self.config.SIDE)
        return to_model(pixels).to(self.device), labels.to(self.device)


def start_joint(model: Joint, init: Path) -> None:
    """Autoencoder weights of a joint state file, of a stage folder with both halves, or of a checkpoint folder."""
    if init.is_file():
        average = load_state(init, "vae joint")["ema"]["average"]
        tensors = {k.removeprefix("vae."): v for k, v in average.items() if k.startswith("vae.")}
    elif (init / "decoder.pt").is_file():
        tensors, names = {}, {"decoder": "post_quant_conv", "encoder": "quant_conv"}
        for part, point in names.items():
            for name, value in load_state(init / f"{part}.pt", f"vae {part}")["ema"]["average"].items():
                which, rest = name.split(".", 1)
                tensors[f"{part if which == 'body' else point}.{rest}"] = value
    else:
        tensors = {k: v for k, v in folder_tensors(init / "vae").items() if not k.startswith("bn.")}
    missing, unexpected = model.vae.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.startswith("bn.")]  # statistics, measured at the end
    if missing or unexpected:
        raise ValueError(f"vae joint: --init {init} lacks {missing[:3]} and has unknown {unexpected[:3]}")


@torch.no_grad()
def evaluate(model: Joint, ema: Ema, held: Tensor, labels: Tensor, path: Path) -> dict[str, float]:
    """Averaged weights on held-out scenes: PSNR of mode -> pixels, a sheet; the head's accuracy on object tokens."""
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema.copy_to(model)
    model.eval()
    z = torch.cat([model.moments(x)[0] for x in held.split(32)])
    copy = torch.cat([model.pixels(c) for c in z.split(32)])
    result = {"psnr": psnr(copy, held)}
    sheet(path, held, copy)
    if model.head is not None:
        result.update(zip(("class", "colour"), head_accuracy(model.head(z), labels)))
    model.train()
    for name, p in model.named_parameters():
        p.copy_(live[name])
    return result


def train_joint(config: ModuleType, options: argparse.Namespace, log: JsonLog, clock: Clock) -> bool:
    """Train until the steps or the clock are over; True when joint.pt is a finished latent space."""
    recipe = dict(config.JOINT)
    recipe.update({k: v for k in ("steps", "lr", "decay", "head") if (v := getattr(options, k)) is not None})
    path, device = options.out / "joint.pt", device_of(options.device)
    if (options.out / "codec.pt").is_file():
        raise ValueError(
            f"vae joint: {options.out} holds codec.pt, expected a folder of its own (one latent space each)"
        )
    model, step, init, state = Joint(config, recipe["head"]), 0, options.init, None
    if path.is_file():
        state = load_state(path, "vae joint")
        if state["mean"] is not None:
            return True
        if state["head"] != recipe["head"]:
            raise ValueError(f"vae joint: {path} was trained with head {state['head']}, now asked for {recipe['head']}")
        model.load_state_dict(state["model"])
        step, init = state["step"], state["init"]
    elif init is not None:
        start_joint(model, init)
    cuda = device.type == "cuda"
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe["lr"], betas=(0.9, 0.95), weight_decay=recipe["weight_decay"], fused=cuda
    )
    ema = Ema(model, recipe["ema"])
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        ema.load(state["ema"])
    if options.compile:
        model.vae.encoder.compile()
        model.vae.decoder.compile()
    low = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
    scenes = Scenes(config, device)
    pixels, held_labels = labelled(range(VALIDATION_SEED, VALIDATION_SEED + config.VALIDATION), config.SIDE)
    held, held_labels = to_model(pixels).to(device), held_labels.to(device)
    mean = var = None

    def save() -> None:
        save_state(
            path,
            {
                "stage": "vae joint",
                "shape": dict(config.MODEL),
                "head": recipe["head"],
                "init": None if init is None else str(init),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state(),
                "step": step,
                "mean": mean,
                "var": var,
            },
        )

    sums, since = {}, 0
    while step < recipe["steps"] and not clock.over:
        x, labels = scenes.batch(step)
        noises = tuple(n.to(device) for n in draw_noises(config, step, recipe["batch"], recipe["noise"]))
        # trained weights have their colours: all terms from the start
        detail = 1.0 if init is not None else detail_at(step, recipe["detail_from"], recipe["detail_full"])
        with low:
            terms = objective(model, x, labels, noises, detail, recipe["kl"], recipe["head"])
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(step, recipe["lr"], recipe["warmup"], recipe["steps"], recipe["decay"])
        optimizer.step()
        ema.update(model)
        step, since = step + 1, since + 1
        sums = {name: sums.get(name, 0) + value.detach() for name, value in terms.items()}
        if step % config.LOG_EVERY == 0:
            means = {name: (value / since).item() for name, value in sums.items()}
            if not np.isfinite(means["loss"]):
                raise FloatingPointError(f"vae joint: mean loss is {means['loss']} up to step {step}")
            extra = {}
            if step % config.EVALUATE_EVERY == 0:
                with low:
                    extra = evaluate(model, ema, held, held_labels, options.out / "joint.png")
                log.picture("joint", options.out / "joint.png", step)
            log(part="joint", step=step, **means, seconds=clock.elapsed, **extra)
            sums, since = {}, 0
        if step % config.SAVE_EVERY == 0:
            save()
    done = step >= recipe["steps"]
    if done:
        averaged = autoencoder(config.MODEL, config.SEED).eval().to(device)
        with torch.no_grad():
            for name, parameter in averaged.named_parameters():
                parameter.copy_(ema.average[f"vae.{name}"])
        mean, var = statistics(
            lambda p: averaged.encode(to_model(p).to(device)).latent_dist.mode(), config, scenes.pixels
        )
    save()
    return done
