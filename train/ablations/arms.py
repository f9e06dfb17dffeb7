"""Arms of an ablation in the small world: one MMDiT each, trained on a pool as `pretrain` does, and scored at every round.

All arms of a seed see the same images in the same batches, with the same noise and times, for the same number of steps, with the
same frozen text encoder and the same latent space, except for the one thing that they differ in. Scenes are encoded once for all
(`EncodedScenes`); every epoch has an order of its own. Arms take turns, a round each, so that a run that ends early has all of them
at the same step.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lens import sampler
from lens.formats.files import read_json
from lens.model import LensTransformer2DModel

from .. import configs
from ..data.contact_sheet import contact_sheet
from ..data.pool import Pool, PoolPart
from ..data.small_world.scene import Scene
from ..data.small_world.world import World
from ..evaluate.detector import Detector
from ..evaluate.mini_bench import scenes_of
from ..loop.checkpoints import StateFile, write_text
from ..loop.clock import Clock
from ..loop.keys import keyed
from ..loop.method import Plan
from ..loop.trainer import Trainer
from ..networks import text_path
from ..networks.codec import VALIDATION_SEED, Latents
from ..networks.generator import Painter, shape_of
from ..networks.padded import Padded
from ..objectives import flow_matching
from ..pretrain_on_pool import OnPool, PoolReader
from .attributes import accuracy, marks

ENCODED_TOGETHER = 128  # scenes of a call
TEXT_MULTIPLE = 8  # tokens that a padded text is a multiple of
RESAMPLES = 2000  # of the bootstrap
WEIGHTS = (".safetensors", ".pt", ".json")  # endings of the files that decide what a network gives


@dataclass(frozen=True)
class Arm:
    """captions: style -> share; vae: a stage folder or a released one; encoder: a checkpoint folder, a state file of the encoder
    stage, or None for one with random weights."""

    name: str
    captions: Mapping[str, float]
    vae: Path
    encoder: Path | None

    @property
    def weights(self) -> list[str | None]:
        """Fingerprints of latent space and text encoder, None for random weights."""
        if self.encoder is None:
            return [files_fingerprint(self.vae), None]
        parts = [self.encoder / "text_encoder", self.encoder / "tokenizer"]  # of a checkpoint's folder
        return [
            files_fingerprint(self.vae),
            files_fingerprint(self.encoder) if self.encoder.is_file() else files_fingerprint(*parts),
        ]


def files_fingerprint(*paths: Path) -> str:
    """SHA-256 over names and bytes of the files, and of those of WEIGHTS right in the folders, 16 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        own = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in WEIGHTS)
        for file in own:
            data = file.read_bytes()
            digest.update(f"{file.name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Asked:
    """One set of prompts that all arms are scored on: scenes never trained on, each with the caption that is drawn."""

    name: str
    scenes: Sequence[Scene]

    @property
    def pictures(self) -> list[str]:
        """What each scene shows, in which it is the same under every style, language and task."""
        return [f"{scene.seed} {scene.background} {scene.things}" for scene in self.scenes]


def asked_of(style: str, count: int, config: ModuleType) -> Asked:
    """`count` scenes of each of the recipe's tasks, their captions of that style."""
    found = [s for task in config.SCORED for s in scenes_of(task, count, config.CLASSES, style, config.SIDE)]
    return Asked(style, found)


class EncodedScenes:
    """Scenes of consecutive seeds, encoded once: latents, and a caption of every style that is asked for as features."""

    def __init__(
        self,
        config: ModuleType,
        seeds: range,
        encode: Callable[[Tensor], Tensor],
        read: Callable[[Sequence[str]], list[Tensor]],
    ):
        self.config, self.seeds, self.encode, self.read = config, seeds, encode, read
        self.texts: dict[tuple[str, int], Tensor] = {}  # (style, row) -> features [T, F E]
        self.parts: dict[tuple[tuple[str, float], ...], PoolPart] = {}

    def _world(self, style: str) -> World:
        return World("train", self.config.TASKS, self.config.CLASSES, style, self.config.PHOTOGRAPHS)

    @functools.cached_property
    def latents(self) -> Tensor:
        """float16 [n, I, C]."""
        world, side, found = self._world("brief"), self.config.SIDE, []
        for start in range(0, len(self.seeds), ENCODED_TOGETHER):
            _, pixels = world.batch(self.seeds[start : start + ENCODED_TOGETHER], side, side)
            found.append(self.encode(torch.from_numpy(pixels)).half())
        return torch.cat(found)

    def styles(self, captions: Mapping[str, float]) -> list[str]:
        """The style of each scene, drawn by the shares: the same draw for every arm."""
        drawn = torch.rand(len(self.seeds), generator=keyed(self.config.SEED, "caption style", self.seeds.start))
        sums = torch.tensor(list(captions.values())).cumsum(0)
        names = list(captions)
        return [names[min(int(k), len(names) - 1)] for k in torch.searchsorted(sums, drawn * sums[-1], right=True)]

    def part(self, captions: Mapping[str, float]) -> PoolPart:
        """All scenes in order, each with a caption of one style, padded to one length."""
        if (key := tuple(captions.items())) not in self.parts:
            styles, side = self.styles(captions), self.config.SIDE
            for style in dict.fromkeys(styles):
                world = self._world(style)
                rows = [r for r, own in enumerate(styles) if own == style and (style, r) not in self.texts]
                for start in range(0, len(rows), ENCODED_TOGETHER):
                    some = rows[start : start + ENCODED_TOGETHER]
                    read = self.read([world.scene(self.seeds[r], side, side).caption for r in some])
                    self.texts |= {(style, r): text.bfloat16() for r, text in zip(some, read)}
            texts = [self.texts[style, r] for r, style in enumerate(styles)]
            self.parts[key] = PoolPart(self.latents, *padded_texts(texts))
        return self.parts[key]


def padded_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features [T, F E] each -> [n, longest T, F E], zeros after the text, and lengths [n]."""
    longest = -(-max(map(len, texts)) // TEXT_MULTIPLE) * TEXT_MULTIPLE
    features = texts[0].new_zeros(len(texts), longest, texts[0].shape[1])
    for row, text in zip(features, texts):
        row[: len(text)] = text
    return features, torch.tensor([len(text) for text in texts])


@functools.lru_cache(maxsize=4)
def latents_of(vae: Path, recipe: str, side: int) -> Latents:
    """One latent space for all arms that share it; of a released folder by one convolution, for its encoder is slow on a CPU."""
    latents = Latents(vae)
    if latents.vae is not None:
        latents.straighten(configs.world(recipe), side)
    return latents


@functools.lru_cache(maxsize=8)
def reader_of(recipe: str, encoder: Path | None) -> PoolReader:
    """The text encoder of an arm: of a checkpoint folder, a state of the encoder stage, or of random weights."""
    own = configs.beside(recipe, "encoder")
    if encoder is None:
        return PoolReader(text_path.build(own), own)
    return (
        PoolReader.of_folder(encoder, own)
        if encoder.is_dir()
        else PoolReader(text_path.load_trained(own, encoder), own)
    )


@functools.lru_cache(maxsize=8)
def encoded_scenes(recipe: str, config: ModuleType, vae: Path, encoder: Path | None, held_out: bool) -> EncodedScenes:
    """One set for all arms and seeds that share a latent space and an encoder."""
    first, count = (VALIDATION_SEED, config.VALIDATION) if held_out else (config.FIRST_SEED, config.POOL["chunk"])
    encode = latents_of(vae, recipe, config.SIDE).encode
    return EncodedScenes(config, range(first, first + count), encode, reader_of(recipe, encoder))


class TrainArm(OnPool):
    """`OnPool`, whose state tells the arm."""

    arm: Arm

    def state(self) -> dict[str, Any]:
        return {"arm": self.arm.name}


class ArmTraining:
    """One arm with one seed. Its state and log are in `out`."""

    def __init__(self, recipe: str, config: ModuleType, arm: Arm, seed: int, out: Path, clock: Clock):
        self.arm, self.out, self.clock = arm, out, clock
        part, held = (encoded_scenes(recipe, config, arm.vae, arm.encoder, k).part(arm.captions) for k in (False, True))
        self.config = config = configs.override(config, [f"SEED={config.SEED + seed}"])
        self.read = reader_of(recipe, arm.encoder)
        model = LensTransformer2DModel(shape_of(config, configs.beside(recipe, "encoder")))
        model.init_weights(keyed(config.SEED, "transformer init"))
        model.train()
        self.gemm, size = getattr(torch, config.GEMM), (config.SIDE, config.SIDE)
        pool = Pool(config, lambda _: {(size, part.features.shape[1]): part})
        batches = [(size, held.take(rows)) for rows in torch.arange(len(held)).split(config.BATCH)]
        self.method = TrainArm(config, model, arm.vae, pool, batches, config.LR, self.gemm)
        self.method.arm = arm
        plan = Plan(
            "ablate",
            config.STEPS,
            config.WARMUP,
            config.DECAY,
            clip=config.CLIP,
            log_every=config.LOG_EVERY,
            validate_every=config.VALIDATE_EVERY,
            save_every=config.SAVE_EVERY,
        )
        states = StateFile(out / "ablate.pt")
        self.trainer = Trainer(plan, self.method, states, out)
        if before := states.latest():
            self.trainer.resume(before)
        self.model: nn.Module = model
        self.padded = Padded(model, False, self.gemm)
        self.painter = Painter(arm.vae, recipe)

    def advance(self, steps: int) -> bool:
        """Train up to that step; whether it was reached."""
        return self.trainer.run(self.method.batches(), self.clock, lambda _: self.method.place, steps)

    @torch.no_grad()
    def draw(self, scenes: Sequence[Scene]) -> list[np.ndarray]:
        """An image a scene by the averaged weights, image k from seed k."""
        pictures: list[np.ndarray] = []
        with self.trainer.averaged():
            for start in range(0, len(scenes), self.config.BATCH):
                part = scenes[start : start + self.config.BATCH]
                grid = (part[0].height // 16, part[0].width // 16)
                pictures += list(self.painter(self._sampled(part, range(start, start + len(part)), grid), grid))
        return pictures

    def _sampled(self, scenes: Sequence[Scene], seeds: Sequence[int], grid: tuple[int, int]) -> Tensor:
        """Noise of the seeds -> normalised latents [B, I, C], by Euler with guidance."""
        sheet, shape = self.config.SHEET, (grid[0] * grid[1], self.config.MODEL["in_channels"])
        features, lengths = padded_texts(self.read([scene.caption for scene in scenes]))
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        times = torch.linspace(1, 1 / sheet["steps"], sheet["steps"])
        sigmas = torch.cat([flow_matching.shift(times, sheet["mu"]), torch.zeros(1)])

        def velocities(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            nothing = self.padded(x, t, features[:, :0], torch.zeros_like(lengths), grid)
            return self.padded(x, t, features, lengths, grid), nothing

        return sampler.walk(velocities, x, sigmas, sheet["guidance"])


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
            told = {"weights": self.settings.get("weights"), **before["settings"]}  # files of before do not say them
            if other := [k for k in self.settings if told.get(k) != self.settings[k]]:
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


def difference(
    results: Results, one: str, two: str, seeds: Sequence[int], step: int, prompts: Mapping[str, Sequence[Hashable]]
) -> tuple[float, float, float]:
    """Accuracy of arm `one` over arm `two` at a step: the mean over seeds and images, paired, with its 95 % bootstrap interval over
    scenes at these seeds; how trainings with other seeds differ is not in it. prompts: of each set the scene of every image.

    A scene is drawn or left out with all its images, of every seed and set of prompts: they are alike, and would make the interval
    too narrow one by one.
    """
    table = {(r["arm"], r["seed"]): r["scores"] for r in results.rows if r["step"] == step}
    scenes = {scene: k for k, scene in enumerate(dict.fromkeys(s for own in prompts.values() for s in own))}
    sums, counts = np.zeros(len(scenes)), np.zeros(len(scenes))
    for name, own in prompts.items():
        rows = [scenes[scene] for scene in own]
        for seed in seeds:
            np.add.at(sums, rows, np.subtract(table[one, seed][name]["each"], table[two, seed][name]["each"]))
            np.add.at(counts, rows, 1)
    rng = np.random.default_rng(keyed(0, "ablation").initial_seed())
    drawn = rng.integers(len(scenes), size=(RESAMPLES, len(scenes)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)
