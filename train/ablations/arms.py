"""Arms of an ablation in the small world: one MMDiT each, trained by the pretrain stage's own method, and scored at every round.

All arms of a seed see the same scenes in the same windows for the same number of steps, with the same frozen text encoder and
the same latent space, except for the one thing that they differ in. They take turns, a round each, so that a run that ends
early has all of them at the same step.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lens.formats.files import read_json

from .. import configs
from ..data.contact_sheet import contact_sheet
from ..data.small_world.batches import WorldBatches, WorldSource
from ..data.small_world.scene import Scene
from ..evaluate.detector import Detector
from ..evaluate.mini_bench import scenes_of
from ..loop.checkpoints import StateFile, write_text
from ..loop.clock import Clock
from ..loop.keys import keyed
from ..loop.ranks import Ranks
from ..loop.trainer import Trainer
from ..networks import text_path
from ..networks.codec import Latents
from ..networks.generator import Mini, Painter, sample
from ..pretrain import TrainMini
from .attributes import accuracy, marks


@dataclass(frozen=True)
class Arm:
    """captions: style -> share; vae: a stage folder or a released one; encoder: a checkpoint folder, a state file of the encoder
    stage, or None for one with random weights."""

    name: str
    captions: Mapping[str, float]
    vae: Path
    encoder: Path | None


@dataclass(frozen=True)
class Asked:
    """One set of prompts that all arms are scored on: scenes never trained on, each with the caption that is drawn."""

    name: str
    scenes: Sequence[Scene]


def asked_of(style: str, count: int, config: ModuleType, world: ModuleType) -> Asked:
    """`count` scenes of each of the recipe's tasks, their captions of that style."""
    found = [s for task in config.SCORED for s in scenes_of(task, count, world.CLASSES, style, world.SIDE)]
    return Asked(style, found)


@functools.lru_cache(maxsize=4)
def latents_of(vae: Path, recipe: str, side: int) -> Latents:
    """One latent space for all arms that share it; of a released folder by one convolution, for its encoder is slow on a CPU."""
    latents = Latents(vae)
    if latents.vae is not None:
        latents.straighten(configs.world(recipe), side)
    return latents


class _Undrawn(TrainMini):
    """Without a sheet at every save: `scored` draws what is looked at."""

    def draw(self, folder: Path, step: int) -> dict[str, Path]:
        return {}


class ArmTraining:
    """One arm with one seed. Its state and log are in `out`."""

    def __init__(self, recipe: str, config: ModuleType, arm: Arm, seed: int, out: Path, clock: Clock, workers: int = 0):
        self.arm, self.out, self.clock, self.config = (
            arm,
            out,
            clock,
            configs.override(config, [f"SEED={config.SEED + seed}"]),
        )
        encoder_config = configs.load(recipe, "encoder")
        self.tokenizer = text_path.tokenizer_of(encoder_config.TOKENIZER)
        self.model = Mini(self.config, encoder_config, text_path.build(encoder_config)).train()
        if arm.encoder is not None and arm.encoder.is_dir():
            self.model.encoder.load_state_dict(text_path.weights_of_folder(encoder_config, arm.encoder))
        elif arm.encoder is not None:
            trained = text_path.load_trained(encoder_config, arm.encoder)
            self.model.encoder.load_state_dict(trained.state_dict())
        self.model.encoder.requires_grad_(False)
        latents = latents_of(arm.vae, recipe, self.config.SIDE)
        source = WorldSource(recipe, tuple(arm.captions.items()))
        self.stream = WorldBatches(self.config, source, latents.encode, workers, "cpu", stop=lambda: clock.asked)
        options = argparse.Namespace(joint_steps=0, lr_scale=1.0, steps=None, decay=None, vae=arm.vae, config=recipe)
        self.method = _Undrawn(self.config, options, self.model, self.stream, self.tokenizer, None)
        plan, states = self.method.plan("ablate"), StateFile(out / "ablate.pt")
        self.trainer = Trainer(plan, self.method, states, out, Ranks(self.model.device), self.method.settings(plan))
        if before := states.latest():
            self.trainer.resume(before)
        self.painter = Painter(arm.vae, recipe)

    def advance(self, steps: int) -> bool:
        """Train up to that step; whether it was reached."""
        return self.trainer.run(self.method.batches(), self.clock, lambda _: self.method.place, steps)

    def draw(self, scenes: Sequence[Scene]) -> list[np.ndarray]:
        """An image a scene by the averaged weights, image k from seed k."""
        pictures: list[np.ndarray] = []
        with self.trainer.averaged():
            for k in range(0, len(scenes), 16):
                part = scenes[k : k + 16]
                tokens = [self.tokenizer.encode(s.caption)[0] for s in part]
                grid = (part[0].height // 16, part[0].width // 16)
                seeds = range(k, k + len(part))
                latents = sample(self.model, tokens, self.tokenizer.prefix, seeds, **self.config.SHEET, grid=grid)
                pictures += list(self.painter(latents, grid))
        return pictures

    def close(self) -> None:
        self.stream.close()


def scored(arm: ArmTraining, asked: Sequence[Asked], detector: Detector, step: int) -> dict[str, dict[str, Any]]:
    """Prompts' name -> attribute -> share right, and "each": the shares of the single images; sheets are drawn beside."""
    found = {}
    for prompts in asked:
        pictures = arm.draw(prompts.scenes)
        seen = detector.look(pictures)
        every = [marks(s, p, d) for s, p, d in zip(prompts.scenes, pictures, seen)]
        each = [[v for values in one.values() for v in values] for one in every]
        shares = [sum(own) / len(own) for own in each]
        found[prompts.name] = {**accuracy(every), "each": shares}
        captions = [f"{share:.2f} {scene.caption}" for share, scene in zip(shares, prompts.scenes)]
        contact_sheet(pictures, captions, arm.out / f"{prompts.name}_{step:06d}.png", columns=8)
    return found


class Results:
    """What was scored, one line each: arm, seed, step, prompts -> shares. Written after every score, so nothing is scored twice."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Errors: ValueError where the file is of other settings."""
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            before = read_json(path)
            if other := [k for k in self.settings if before["settings"].get(k) != self.settings[k]]:
                raise ValueError(f"{path}: of another ablation ({', '.join(other)} differ); give another --out")
            self.rows = before["rows"]

    def has(self, arm: str, seed: int, step: int) -> bool:
        return any((r["arm"], r["seed"], r["step"]) == (arm, seed, step) for r in self.rows)

    def add(self, arm: str, seed: int, step: int, scores: dict[str, dict[str, Any]]) -> None:
        self.rows.append({"arm": arm, "seed": seed, "step": step, "scores": scores})
        write_text(self.path, json.dumps({"settings": self.settings, "rows": self.rows}) + "\n")


def common_step(results: Results, arms: Sequence[str], seeds: Sequence[int]) -> int:
    """The last step that every arm of every seed was scored at; 0 without one."""
    steps = sorted({r["step"] for r in results.rows}, reverse=True)
    return next((t for t in steps if all(results.has(a, s, t) for a in arms for s in seeds)), 0)


def run_rounds(
    make: Callable[[Arm, int], ArmTraining],
    arms: Sequence[Arm],
    seeds: Sequence[int],
    steps: Sequence[int],
    asked: Sequence[Asked],
    results: Results,
    clock: Clock,
) -> bool:
    """Every arm of every seed to each of `steps` in turn, scored there; whether all of it was done before the clock."""
    detector, trainings = Detector.load(), dict[tuple[str, int], ArmTraining]()
    try:
        for step in steps:
            for seed in seeds:
                for arm in arms:
                    if results.has(arm.name, seed, step):
                        continue
                    if (arm.name, seed) not in trainings:
                        trainings[arm.name, seed] = make(arm, seed)
                    own = trainings[arm.name, seed]
                    if own.trainer.step > step:
                        raise ValueError(f"{own.out}: is at step {own.trainer.step}, scores of step {step} are missing")
                    if clock.over or not own.advance(step):
                        return False
                    scores = scored(own, asked, detector, step)
                    results.add(arm.name, seed, step, scores)
                    told = ", ".join(f"{name} {values['all']:.3f}" for name, values in scores.items())
                    print(f"{arm.name}, seed {seed}, step {step}: attribute accuracy by prompts {told}", flush=True)
        return True
    finally:
        for own in trainings.values():
            own.close()


def difference(
    results: Results, one: str, two: str, seeds: Sequence[int], step: int, prompts: Sequence[str]
) -> tuple[float, float, float]:
    """Accuracy of arm `one` over arm `two` at a step: the mean over seeds and images, paired, with its 95 % bootstrap interval over
    both."""
    table = {(r["arm"], r["seed"]): r["scores"] for r in results.rows if r["step"] == step}
    pairs = [
        np.concatenate([np.array(table[one, s][p]["each"]) - np.array(table[two, s][p]["each"]) for p in prompts])
        for s in seeds
    ]
    rng = np.random.default_rng(keyed(0, "ablation").initial_seed())
    draws = []
    for _ in range(2000):
        chosen = [pairs[k] for k in rng.integers(len(pairs), size=len(pairs))]
        draws.append(np.mean([own[rng.integers(len(own), size=len(own))].mean() for own in chosen]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(np.mean([own.mean() for own in pairs])), float(low), float(high)
