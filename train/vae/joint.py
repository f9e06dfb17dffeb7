"""The part "joint" of stage "vae": encoder, decoder and token head trained together. Entry and usage: train/vae/__init__.py.


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
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.small_world.labels import labelled
from ..loop.checkpoints import StateFile, load_state
from ..loop.clock import Clock
from ..loop.ema import Ema
from ..loop.keys import keyed
from ..loop.method import About, Losses, Method, Network, adamw
from ..loop.ranks import Ranks, device_of
from ..loop.trainer import Trainer
from ..loop.workers import start_worker, undisturbed
from ..networks.codec import VALIDATION_SEED, autoencoder, psnr, sheet, statistics, to_model
from ..networks.joint import Joint, draw_noises, objective, start_joint
from ..objectives.autoencoding import detail_at, head_accuracy
from .halves import SHOWN, plan_of


class Scenes:
    """Pixels and labels of a step's batch: drawn now, or picked from a pool rendered once."""

    CHUNK = 500

    def __init__(self, config: ModuleType, device: torch.device):
        self.config, self.device, self.pool = config, device, config.JOINT["pool"]
        self.pixels: Tensor | None = None
        if self.pool:
            chunks = [range(i, min(i + self.CHUNK, self.pool)) for i in range(0, self.pool, self.CHUNK)]
            # fresh processes, not forks: a forked child must not touch a CUDA context
            spawn = ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=start_worker)
            with undisturbed(), spawn as workers:  # a signal meanwhile waits for the pool
                parts = list(workers.map(labelled, chunks, [config.SIDE] * len(chunks)))
            self.pixels = torch.from_numpy(np.concatenate([p for p, _ in parts])).to(device)
            self.labels = torch.cat([labels.to(torch.uint8) for _, labels in parts]).to(device)

    def batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """From a step on."""
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """float32 [n, 3, H, W] and int64 [n, h, w, 2] on the device."""
        size = self.config.JOINT["batch"]
        if self.pixels is not None:
            pick = torch.randint(self.pool, (size,), generator=keyed(self.config.SEED, "joint pick", step))
            pick = pick.to(self.device)
            return to_model(self.pixels[pick]), self.labels[pick].long()
        pixels, labels = labelled(range(step * size, (step + 1) * size), self.config.SIDE)
        return to_model(pixels).to(self.device), labels.to(self.device)


class TrainJoint(Method):
    """A batch: pictures [n, 3, H, W] and labels [n, h, w, 2] on the device."""

    def __init__(self, config: ModuleType, recipe: Mapping[str, Any], init: Path | None, device: torch.device):
        self.config, self.recipe, self.init, self.device = config, recipe, init, device
        self.mean: Tensor | None = None
        self.var: Tensor | None = None
        self.model = Joint(config, recipe["head"])
        pixels, labels = labelled(range(VALIDATION_SEED, VALIDATION_SEED + config.VALIDATION), config.SIDE)
        self.held, self.held_labels = to_model(pixels).to(device), labels.to(device)

    def begin(self) -> None:
        """Once the networks have the weights that they start from."""
        # torch's annotations of Module.to lack the memory format beside a device
        model: Joint = self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        recipe = self.recipe
        optimizer = adamw(
            dict(model.named_parameters()), recipe["lr"], decay=recipe["weight_decay"], fused=self.device.type == "cuda"
        )
        self.ema = Ema(model, recipe["ema"])
        self.networks = {"joint": Network(model, optimizer, self.ema)}

    def low(self) -> contextlib.AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    def about(self, batch: tuple[Tensor, Tensor]) -> About:
        return About(len(batch[0]))

    def losses(self, batch: tuple[Tensor, Tensor], step: int) -> dict[str, Losses]:
        recipe = self.recipe
        mixing, added, level = draw_noises(self.config, step, len(batch[0]), recipe["noise"])
        noises = mixing.to(self.device), added.to(self.device), level.to(self.device)
        # trained weights have their colours: all terms from the start
        detail = 1.0 if self.init is not None else detail_at(step, recipe["detail_from"], recipe["detail_full"])
        with self.low():
            terms = objective(self.model, *batch, noises, detail, recipe["kl"], recipe["head"])
        loss = terms.pop("loss")
        return {"joint": Losses(loss[None], terms=terms)}

    def state(self) -> dict[str, Any]:
        init = None if self.init is None else str(self.init)
        shape, head = dict(self.config.MODEL), self.recipe["head"]
        return {"shape": shape, "head": head, "init": init, "mean": self.mean, "var": self.var}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.init, self.mean, self.var = state["init"], state["mean"], state["var"]

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Held-out scenes: PSNR of mode -> pixels; the head's accuracy on object tokens."""
        self.model.eval()
        with self.low():
            z = torch.cat([self.model.moments(x)[0] for x in self.held.split(32)])
            result = {"psnr": psnr(torch.cat([self.model.pixels(c) for c in z.split(32)]), self.held)}
            if self.model.head is not None:
                result.update(zip(("class", "colour"), head_accuracy(self.model.head(z), self.held_labels)))
        self.model.train()
        return result

    @torch.no_grad()
    def draw(self, folder: Path, step: int) -> dict[str, Path]:
        self.model.eval()
        with self.low():
            shown = self.held[:SHOWN]
            sheet(folder / "joint.png", shown, self.model.pixels(self.model.moments(shown)[0]))
        self.model.train()
        return {"joint": folder / "joint.png"}

    @torch.no_grad()
    def measure(self, rendered: Tensor | None) -> None:
        """The token statistics, with the averaged encoder."""
        averaged = autoencoder(self.config.MODEL, self.config.SEED).eval().to(self.device)
        for name, parameter in averaged.named_parameters():
            parameter.copy_(self.ema.average[f"vae.{name}"])

        def encode(pixels: np.ndarray | Tensor) -> Tensor:
            return averaged.encode(to_model(pixels).to(self.device)).latent_dist.mode()

        self.mean, self.var = statistics(encode, self.config, rendered)


def train_joint(config: ModuleType, options: argparse.Namespace, clock: Clock) -> bool:
    """Train until the steps or the clock are over; True when joint.pt is a finished latent space."""
    recipe = dict(config.JOINT)
    recipe.update({k: v for k in ("steps", "lr", "decay", "head") if (v := getattr(options, k)) is not None})
    states, device = StateFile(options.out / "joint.pt"), device_of(options.device)
    if (options.out / "codec.pt").is_file():
        raise ValueError(
            f"vae joint: {options.out} holds codec.pt, expected a folder of its own (one latent space each)"
        )
    before = states.latest()
    if before is not None:
        state = load_state(before, "vae joint")
        if state["mean"] is not None:
            return True
        if state["head"] != recipe["head"]:
            raise ValueError(
                f"vae joint: {before} was trained with head {state['head']}, now asked for {recipe['head']}"
            )
    method = TrainJoint(config, recipe, options.init, device)
    if before is None and options.init is not None:
        start_joint(method.model, options.init)
    method.begin()
    if options.compile:
        method.model.vae.encoder.compile()
        method.model.vae.decoder.compile()
    trainer = Trainer(plan_of(config, "vae joint", recipe), method, states, options.out, Ranks(device))
    if before is not None:
        trainer.resume(before)
    scenes = Scenes(config, device)
    if not trainer.run(scenes.batches(trainer.step), clock):
        return False
    method.measure(scenes.pixels)
    trainer.save(last=True, anew=True)
    return True
