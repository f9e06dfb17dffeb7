"""The parts "codec" and "probe" of stage "vae": a latent space learned in a minute, and what a latent space says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from ..data.small_world.labels import labelled
from ..loop.checkpoints import StateFile, save_state
from ..loop.clock import Clock, Interrupted
from ..loop.keys import keyed
from ..loop.log import JsonLog
from ..loop.method import About, Losses, Method, Network, Plan, adamw
from ..loop.trainer import Trainer
from ..networks.codec import (
    VALIDATION_SEED,
    Latents,
    LinearCodec,
    head_of,
    held_out_images,
    psnr,
    statistics,
    to_model,
)
from ..objectives.autoencoding import TokenHead, head_accuracy, head_loss

Picked = tuple[torch.Generator, Tensor]  # the generator of a step, and the rows that it picked first


def picks(seed: int, purpose: str, among: int, batch: int, step: int) -> Iterator[Picked]:
    """From a step on: rows of a table, drawn anew for every step; the generator goes on to that step's noise."""
    while True:
        generator = keyed(seed, purpose, step)
        yield generator, torch.randint(among, (batch,), generator=generator)
        step += 1


class TrainCodec(Method):
    """Loss: mean |decode(z + noise) - x|^2 + head * (cross-entropy of class and colour of every token, read from z + noise by
    a small network that is then discarded): the linear transform keeps what tells classes and colours apart. With head 0
    there is no such network."""

    def __init__(self, config: ModuleType):
        self.config, self.recipe = config, config.CODEC
        self.pictures, self.labels = labelled(range(self.recipe["scenes"]), config.SIDE)
        read, seen = min(512, 4 * config.VALIDATION), min(256, 2 * config.VALIDATION)  # a small recipe renders few
        pictured, self.held_labels = labelled(range(VALIDATION_SEED, VALIDATION_SEED + read), config.SIDE)
        self.held, self.pictured = held_out_images(config.SIDE, seen), to_model(pictured)
        with torch.random.fork_rng():
            torch.manual_seed(keyed(config.SEED, "codec init").initial_seed())
            kernels = self.recipe["encode_kernel"], self.recipe["decode_kernel"]
            self.codec = LinearCodec(config.MODEL["latent_channels"], *kernels)
        self.codec.start_from_principal_components(to_model(self.pictures[:4000]))
        self.head = head_of(config, "codec") if self.recipe["head"] > 0 else None
        learned = nn.ModuleList([self.codec, *([self.head] if self.head else [])])
        self.networks = {
            "codec": Network(learned, adamw(dict(learned.named_parameters()), self.recipe["lr"], ADAM, fused=False))
        }

    def about(self, batch: Picked) -> About:
        return About(len(batch[1]), seen={"scenes": batch[1].tolist()})

    def losses(self, batch: Picked, step: int) -> dict[str, Losses]:
        generator, pick = batch
        x = to_model(self.pictures[pick.numpy()])
        z = self.codec.encode(x)
        rough = z + self.recipe["noise"] * torch.randn(z.shape, generator=generator)
        loss = (self.codec.decode(rough) - x).pow(2).mean()
        if self.head:
            loss = loss + self.recipe["head"] * head_loss(self.head(rough), self.labels[pick])
        return {"codec": Losses(loss[None])}

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        codec = self.codec.eval()
        found = {f"psnr{name}": psnr(codec.decode(codec.encode(x)), x) for name, x in self.held.items()}
        if self.head:
            right = head_accuracy(self.head.eval()(codec.encode(self.pictured)), self.held_labels)
            found.update(zip(("class", "colour"), right))
            self.head.train()
        codec.train()
        return found


ADAM = (0.9, 0.999)


def train_codec(config: ModuleType, out: Path, clock: Clock) -> bool:
    """Learn the codec and the token statistics; writes out/codec.pt. Stopped by the clock it leaves codec_part.pt, from
    which the next call goes on, and returns False."""
    recipe, method, states = config.CODEC, TrainCodec(config), StateFile(out / "codec_part.pt")
    plan = Plan(
        "vae codec part",
        recipe["steps"],
        decay=recipe["steps"],
        clip=None,
        log_every=config.LOG_EVERY,
        validate_every=config.EVALUATE_EVERY,
        save_every=config.SAVE_EVERY,
    )
    trainer = Trainer(plan, method, states, out)
    if (before := states.latest()) is not None:
        trainer.resume(before)
    batches = picks(config.SEED, "codec", len(method.pictures), recipe["batch"], trainer.step)
    if not trainer.run(batches, clock):
        return False
    codec = method.codec.eval().requires_grad_(False)
    mean, var = statistics(lambda pixels: codec.encode(to_model(pixels)), config, method.pictures)
    shape = [config.MODEL["latent_channels"], recipe["encode_kernel"], recipe["decode_kernel"]]
    state = {"stage": "vae codec", "model": codec.state_dict(), "mean": mean, "var": var, "shape": shape}
    save_state(out / "codec.pt", state)
    states.path.unlink()
    return True


class Probe(Method):
    """A fresh head on frozen latents z [n, c, h, w], under unit noise of some level."""

    def __init__(self, config: ModuleType, z: Tensor, labels: Tensor, noise: float):
        self.z, self.labels, self.noise = z, labels, noise
        self.std = z.std((0, 2, 3), keepdim=True)
        self.head: TokenHead = head_of(config, "probe")
        self.networks = {
            "head": Network(self.head, adamw(dict(self.head.named_parameters()), config.PROBE["lr"], ADAM, fused=False))
        }

    def about(self, batch: Picked) -> About:
        return About(len(batch[1]), seen={"scenes": batch[1].tolist()})

    def losses(self, batch: Picked, step: int) -> dict[str, Losses]:
        generator, pick = batch
        noise = torch.randn((len(pick), *self.z.shape[1:]), generator=generator)
        logits = self.head(self.z[pick] + self.noise * self.std * noise)
        return {"head": Losses(head_loss(logits, self.labels[pick])[None])}


def probe(config: ModuleType, latents: Latents, out: Path, clock: Clock) -> dict[str, float]:
    """How much a frozen latent space says about its tokens: a fresh head trained on it, accuracy on held-out object tokens.

    Twice: reading clean latents, and latents under unit noise of PROBE's level, as a generator meets them. Errors: Interrupted
    where the clock ends it before that.
    """
    recipe, result = config.PROBE, {}
    pictures, labels = labelled(range(recipe["scenes"]), config.SIDE)
    held, held_labels = labelled(range(VALIDATION_SEED, VALIDATION_SEED + recipe["held"]), config.SIDE)

    def encoded(pixels: np.ndarray) -> Tensor:
        parts = (to_model(pixels[i : i + 250]).to(latents.device) for i in range(0, len(pixels), 250))
        return torch.cat([latents.latents(x).cpu() for x in parts])

    z, held_z = encoded(pictures), encoded(held)
    for name, noise in (("", 0.0), ("_noisy", recipe["noise"])):
        method = Probe(config, z, labels, noise)
        plan = Plan("vae probe", recipe["steps"], decay=recipe["steps"], clip=None, log_every=config.LOG_EVERY)
        batches = picks(config.SEED, "probe", len(z), recipe["batch"], 0)
        if not Trainer(plan, method, None, out).run(batches, clock):
            raise Interrupted("vae probe: it was stopped before its figures, of which nothing is kept")
        rough = held_z + noise * method.std * torch.randn(held_z.shape, generator=keyed(config.SEED, "probe held"))
        with torch.no_grad():
            right = head_accuracy(method.head.eval()(rough), held_labels)
        result.update({f"class{name}": right[0], f"colour{name}": right[1]})
    JsonLog(out / "log.jsonl")(part="probe", **result)
    return result
