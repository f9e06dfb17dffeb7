"""The parts "decoder" and "encoder" of stage "vae": each half of the autoencoder by itself, onto the codec's latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.small_world.kinds import CORE
from ..data.small_world.world import World
from ..loop.checkpoints import StateFile, folder_tensors, load_state
from ..loop.clock import Clock
from ..loop.ema import Ema
from ..loop.keys import keyed
from ..loop.log import JsonLog
from ..loop.method import About, Losses, Method, Network, Plan, adamw
from ..loop.trainer import Trainer
from ..networks.codec import Half, Latents, autoencoder, held_out_images, psnr, sheet, to_model
from ..objectives.autoencoding import detail_at, reconstruction_loss, regression_loss

SHOWN = 36  # pictures of a sheet


def plan_of(config: ModuleType, stage: str, recipe: Mapping[str, Any]) -> Plan:
    """Of a part of this stage, by its own table of the recipe."""
    return Plan(
        stage,
        recipe["steps"],
        recipe["warmup"],
        recipe["decay"],
        log_every=config.LOG_EVERY,
        validate_every=config.EVALUATE_EVERY,
        save_every=config.SAVE_EVERY,
    )


def build(config: ModuleType) -> Any:
    """An AutoencoderKLFlux2 with weights drawn from the recipe's seed."""
    return autoencoder(config.MODEL, config.SEED)


@torch.no_grad()
def rebase(half: Half, vae: Any, latents: Latents, side: int, scenes: int = 1_024) -> float:
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


class TrainHalf(Method):
    """A half onto the codec's latents: the decoder from noisy ones, the encoder towards them. A batch: pixels in [-1, 1]."""

    def __init__(self, config: ModuleType, part: str, latents: Latents, recipe: dict[str, Any], init: Path | None):
        self.config, self.part, self.latents, self.recipe, self.init = config, part, latents, recipe, init
        self.half = Half(build(config), part)
        self.held = held_out_images(config.SIDE, config.VALIDATION)
        self.held_z = {name: latents.latents(x) for name, x in self.held.items()}

    def begin(self) -> None:
        """Once the half has the weights that it starts from."""
        named, recipe = dict(self.half.named_parameters()), self.recipe
        optimizer = adamw(named, recipe["lr"], decay=recipe["weight_decay"], fused=False)
        self.networks = {self.part: Network(self.half, optimizer, Ema(self.half, recipe["ema"]))}

    def batches(self, step: int) -> Iterator[Tensor]:
        """From a step on. Half of the scenes are of what a CPU's generator draws."""
        worlds, count = (World(), World(classes=CORE)), self.recipe["batch"]
        while True:
            seeds = list(range(step * count, (step + 1) * count))
            side = self.config.SIDE
            parts = [world.batch(seeds[i :: len(worlds)], side, side)[1] for i, world in enumerate(worlds)]
            yield to_model(np.concatenate(parts))
            step += 1

    def about(self, batch: Tensor) -> About:
        return About(len(batch))

    def losses(self, batch: Tensor, step: int) -> dict[str, Losses]:
        z, recipe = self.latents.latents(batch), self.recipe
        if self.part == "encoder":
            return {self.part: Losses(regression_loss(self.half(batch), z, self.config.CODEC["noise"])[None])}
        generator = keyed(self.config.SEED, "decoder noise", step)
        level = recipe["noise"] * torch.rand(len(batch), 1, 1, 1, generator=generator)
        # a trained decoder has its colours: all terms from the start
        detail = 1.0 if self.init is not None else detail_at(step, recipe["detail_from"], recipe["detail_full"])
        copies = self.half(z + level * torch.randn(z.shape, generator=generator))
        return {self.part: Losses(reconstruction_loss(copies, batch, detail)[None])}

    def state(self) -> dict[str, Any]:
        return {"init": None if self.init is None else str(self.init)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.init = state["init"]

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        result = {}
        for name, z in self.held_z.items():
            if self.part == "encoder":
                mean = torch.cat([self.half(c).chunk(2, 1)[0] for c in self.held[name].split(32)])
                result[f"latent_mse{name}"] = (mean - z).pow(2).mean().item()
                continue
            result[f"psnr{name}"] = psnr(torch.cat([self.half(c) for c in z.split(32)]), self.held[name])
        if self.part == "decoder":
            z, generator = self.held_z[""], keyed(self.config.SEED, "held noise")
            rough = z + self.config.CODEC["noise"] * torch.randn(z.shape, generator=generator)
            result["psnr_noisy"] = psnr(torch.cat([self.half(c) for c in rough.split(32)]), self.held[""])
        return result

    @torch.no_grad()
    def draw(self, folder: Path, step: int) -> dict[str, Path]:
        """decoder.png, of all classes, of the core ones, of signs."""
        sheets = {}
        for name, z in self.held_z.items() if self.part == "decoder" else ():
            sheets[f"decoder{name}"] = folder / f"decoder{name}.png"
            sheet(sheets[f"decoder{name}"], self.held[name][:SHOWN], self.half(z[:SHOWN]))
        return sheets


def train_half(
    config: ModuleType,
    part: str,
    out: Path,
    clock: Clock,
    init: Path | None,
    steps: int | None,
    lr: float | None = None,
    decay: int | None = None,
) -> bool:
    """Train one half until its steps or the clock are over; True when the steps are done."""
    recipe = dict(config.DECODER if part == "decoder" else config.ENCODER)
    recipe.update({k: v for k, v in (("steps", steps), ("lr", lr), ("decay", decay)) if v})
    states, method = StateFile(out / f"{part}.pt"), TrainHalf(config, part, Latents(out), recipe, init)
    before = states.latest()
    if before is None and init is not None:
        start_half(config, method.half, method.latents, init, JsonLog(out / "log.jsonl"))
    method.begin()
    trainer = Trainer(plan_of(config, f"vae {part}", recipe), method, states, out)
    if before is not None:
        trainer.resume(before)
    return trainer.run(method.batches(trainer.step), clock)
