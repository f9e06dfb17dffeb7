"""Stage "detector": the judge of classes, boxes and colours (train/evaluate/detector.py), trained on scenes with exact boxes.

    python -m train detector --config mini --out runs/detector --stop-after 9m       # again to resume, bit-equal on a CPU
    python -m train detector --config mini --out runs/detector --vae runs/vae        # reconstructions join the copies
    python -m train detector --out runs/detector --oracle                            # how often the trained judge is right
    python -m train detector --out runs/detector --export train/evaluate/assets/detector.safetensors

Scenes of both splits and of every class and task are drawn on the fly (a generator's held-out pairs are no secret to its
judge; the benchmark's seeds are), together with copies as a generator might draw them: bent, blurred, shrunk and enlarged,
reconstructed from disturbed latents, noisy, of another tone. The loss is stated in train/evaluate/detector.py. What is
exported are averaged weights and the normalisation statistics that belong to them.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, nullcontext
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from . import configs
from .data.small_world.kinds import KINDS, PALETTE
from .data.small_world.scene import Scene
from .data.small_world.world import World
from .evaluate import oracle
from .evaluate.copies import copies
from .evaluate.detector import ASSET, SIGN, STRIDE, Detector, Shape, Targets, loss
from .loop.checkpoints import StateFile, load_state, write_text
from .loop.clock import Clock, duration
from .loop.ema import Ema
from .loop.keys import keyed
from .loop.method import About, Losses, Method, Network, Plan, adamw
from .loop.ranks import Ranks
from .loop.trainer import Trainer
from .loop.workers import start_worker, undisturbed
from .networks.codec import LinearCodec, to_model

VALIDATION_SEED = 1_000_000_000
CALIBRATION = 20  # batches whose statistics go with the averaged weights


def build(config: ModuleType) -> Detector:
    with torch.random.fork_rng():
        # the key keeps the stage's first name: another would draw other weights
        torch.manual_seed(keyed(config.SEED, "eye init").initial_seed())
        return Detector([*KINDS, SIGN], list(PALETTE), Shape(**config.SHAPE))


def targets_of(scenes: list[Scene], detector: Detector) -> Targets:
    """Exact centres, sizes, classes and colours of every object, and of signs as a class of their own."""
    kinds = {k: i for i, k in enumerate(detector.kinds)}
    colours: dict[str | None, int] = {c: i for i, c in enumerate(detector.colours)}
    rows = []
    for i, scene in enumerate(scenes):
        parts = [(t.kind, t.colour, t.box) for t in scene.things]
        if scene.sign is not None:
            parts.append((SIGN, scene.sign.paper, scene.sign.box))
        for kind, colour, (x0, y0, x1, y1) in parts:
            rows.append((i, kinds[kind], colours.get(colour, -1), (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
    table = torch.tensor(rows, dtype=torch.float32)
    whole = table[:, :3].long()
    return Targets(whole[:, 0], whole[:, 1], whole[:, 2], table[:, 3:5] / STRIDE, table[:, 5:7] / STRIDE)


def size_of(config: ModuleType, step: int) -> tuple[int, int, int]:
    """(height, width, pictures) of a step."""
    choices = max((start, rows) for start, rows in config.BATCHES if start <= step)[1]
    draw = torch.rand((), generator=keyed(config.SEED, "bucket", step)).item() * sum(row[3] for row in choices)
    row = choices[-1]
    for row in choices:
        draw -= row[3]
        if draw < 0:
            break
    return row[:3]


def scenes_of(config: ModuleType, step: int) -> tuple[list[Scene], np.ndarray]:
    """Scenes and pixels of a step: half of either split."""
    height, width, count = size_of(config, step)
    most = max(row[2] for _, rows in config.BATCHES for row in rows)
    scenes: list[Scene] = []
    worlds = [_world("train"), _world("held_out")]
    for i in range(count):
        scenes.append(worlds[i % 2].scene(step * most + i, height, width))
    return scenes, np.stack([worlds[0].render(scene) for scene in scenes])


_WORLDS: dict[str, World] = {}


def _world(split: str) -> World:
    if split not in _WORLDS:
        _WORLDS[split] = World(split, captions="geneval")
    return _WORLDS[split]


def codec_of(folder: Path) -> LinearCodec:
    """The linear codec of a VAE stage's folder: its reconstructions blur and ring as a small VAE's do."""
    state = load_state(folder / "codec.pt", "vae codec")
    codec = LinearCodec(*state["shape"])
    codec.load_state_dict(state["model"])
    return codec.eval().requires_grad_(False)


Drawn = tuple[int, list[Scene], np.ndarray]  # a step and what it sees


def scenes_ahead(config: ModuleType, step: int, workers: int) -> Generator[Drawn, None, None]:
    """Step after step; with workers, drawn ahead by other processes. The same pictures either way."""
    if not workers:
        while True:
            yield step, *scenes_of(config, step)
            step += 1
    settings = {k: v for k, v in vars(config).items() if k in ("SEED", "BATCHES")}
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        waiting: dict[int, Future] = {}
        try:
            while True:
                for near in range(step, step + 3 * workers):
                    if near not in waiting:
                        with undisturbed():  # a pool may start its last worker here
                            waiting[near] = pool.submit(_scenes_by_settings, settings, near)
                yield step, *waiting.pop(step).result()
                step += 1
        finally:
            for future in waiting.values():
                future.cancel()


def _scenes_by_settings(settings: dict, step: int) -> tuple[list[Scene], np.ndarray]:
    config = ModuleType("settings")
    config.__dict__.update(settings)
    return scenes_of(config, step)


class TrainDetector(Method):
    """A batch: (step, scenes, pixels). The statistics of its norms belong to the batches; those that go with the averaged weights
    are measured when these are asked for."""

    def __init__(self, config: ModuleType, vae: Path | None, device: str, init: Path | None = None):
        self.config, self.device = config, torch.device(device)
        self.codec = codec_of(vae) if vae is not None else None
        self.detector = build(config)
        if init is not None and init.suffix == ".pt":
            state = load_state(init, "detector")
            self.detector.load_state_dict({**state["model"], **state["ema"]["average"]})
        elif init is not None:
            self.detector.load_state_dict(Detector.load(init).state_dict())
        self.detector.to(self.device).train()
        self.ema = Ema(self.detector, config.EMA)
        optimizer = adamw(dict(self.detector.named_parameters()), config.LR, config.BETAS, config.WEIGHT_DECAY)
        self.networks = {"detector": Network(self.detector, optimizer, self.ema)}

    def plan(self, steps: int | None, decay: int | None) -> Plan:
        config = self.config
        return Plan(
            "detector",
            steps or config.STEPS,
            config.WARMUP,
            decay or config.DECAY,
            clip=config.CLIP,
            log_every=config.LOG_EVERY,
            validate_every=config.EVALUATE_EVERY,
            save_every=config.SAVE_EVERY,
        )

    def inputs(self, scenes: list[Scene], pixels: np.ndarray, step: int) -> tuple[Tensor, Targets]:
        x, targets = copies(to_model(pixels), self.config, step, self.codec), targets_of(scenes, self.detector)
        return x.to(self.device), Targets(**{k: v.to(self.device) for k, v in vars(targets).items()})

    def about(self, batch: Drawn) -> About:
        return About(len(batch[1]))

    def losses(self, batch: Drawn, step: int) -> dict[str, Losses]:
        _, scenes, pixels = batch
        x, targets = self.inputs(scenes, pixels, step)
        with torch.autocast(self.device.type, torch.bfloat16) if self.config.AUTOCAST else nullcontext():
            outputs = self.detector(x)
        terms = loss(outputs, targets)
        return {"detector": Losses(terms.pop("loss")[None], terms=terms)}

    @torch.no_grad()
    def averaged(self, step: int) -> Detector:
        """A copy with averaged weights whose normalisation statistics were measured on CALIBRATION batches from a step on."""
        detector = build(self.config)
        self.ema.copy_to(detector)
        norms = [m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
        detector.to(self.device).train()
        for at in range(step, step + CALIBRATION):
            detector(self.inputs(*scenes_of(self.config, at), at)[0])
        for norm in norms:
            norm.momentum = 0.1
        return detector.to("cpu").eval().requires_grad_(False)

    def validate(self, step: int) -> dict[str, float]:
        shares = oracle.measure(self.averaged(step), self.held)["shares"]
        return {f"right_{name}": share for name, share in shares.items()}

    @functools.cached_property
    def held(self) -> oracle.Questions:
        return oracle.Questions.draw(self.config.VALIDATION, VALIDATION_SEED)


def state_file(out: Path) -> StateFile:
    """OUT/detector.pt; the eye.pt of a training that began when the stage was called so goes on under its name."""
    old, new = out / "eye.pt", out / "detector.pt"
    return StateFile(old if old.is_file() and not new.is_file() else new)


def train(config: ModuleType, options: argparse.Namespace) -> None:
    clock, states = Clock(options.stop_after), state_file(options.out)
    method = TrainDetector(config, options.vae, options.device, options.init)
    trainer = Trainer(method.plan(options.steps, options.decay), method, states, options.out, Ranks(method.device))
    if (before := states.latest()) is not None:
        trainer.resume(before)
    with closing(scenes_ahead(config, trainer.step, options.workers)) as ahead:
        trainer.run(ahead, clock)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="mini", help="recipe in train/configs, or a file .py (default: mini)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/detector"), help="folder of state and log (default: runs/detector)"
    )
    parser.add_argument(
        "--vae", type=Path, help="folder of the VAE stage whose codec reconstructs copies (default: no such copies)"
    )
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 9m")
    parser.add_argument("--steps", type=int, help="total steps instead of the recipe's")
    parser.add_argument("--decay", type=int, help="length of the final linear decay in steps instead of the recipe's")
    parser.add_argument("--init", type=Path, metavar="PATH", help="start from the weights of a state or of an asset")
    parser.add_argument("--device", default="cpu", help="where the net is trained (default: cpu)")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes ahead (default: 0, none)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--oracle", action="store_true", help="train nothing; measure the judge on true renders")
    what.add_argument(
        "--export", type=Path, metavar="FILE", help="train nothing; write the judge and its oracle scores"
    )
    parser.add_argument(
        "--scenes", type=int, default=1000, help="scenes per bucket of --oracle and --export (default: 1000)"
    )
    parser.add_argument(
        "--asset",
        type=Path,
        nargs="?",
        const=ASSET,
        help="judge measured by --oracle (default: that of --out; alone: the shipped one)",
    )


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    config = configs.load(options.config, "detector")
    if not (options.oracle or options.export):
        train(config, options)
        return 0
    if options.asset is not None:
        detector, step = Detector.load(options.asset), None
    else:
        method, states = TrainDetector(config, options.vae, "cpu"), state_file(options.out)
        trainer = Trainer(method.plan(None, None), method, states, options.out)
        trainer.resume(states.path)
        detector, step = method.averaged(trainer.step), trainer.step
    if options.export:
        detector.save(options.export, {})
        detector = Detector.load(options.export)  # what is measured is what ships
    scores = oracle.report(detector, options.scenes)
    about = {
        "step": step,
        "recipe": options.config,
        "parameters": sum(p.numel() for p in detector.parameters()),
        "oracle": scores,
    }
    if options.export:
        detector.save(options.export, about)
    else:
        write_text(options.out / "oracle.json", json.dumps(about, indent=2) + "\n")
    return 0
