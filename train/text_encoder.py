"""Stage "encoder": the small GPT-OSS language model whose residual stream Mini reads.

    python -m train encoder --config mini --out runs/encoder --stop-after 9m       # again to resume
    python -m train encoder --config mini --init lens/mini/base                    # start from the shipped weights
    python -m train encoder --config mini --out runs/encoder --export lens/mini/base/text_encoder
    python -m train encoder --accept --state runs/encoder/encoder.pt --require 0.99 # what linear readers find; exit 1 below

Loss = next-token cross-entropy on chat-rendered captions (geneval, brief, dense, translated) and on chats "brief -> dense",
where only the assistant's turn counts + cross-entropy of linear readers on the captured features (objectives/language.py).
Plain next-token training drives late layers towards what comes next; the readers keep what was said readable.
`text_path.encode_batch` is also the differentiable text path of joint training.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lens.formats.text_encoder import save_text_encoder

from . import configs
from .data.small_world import captions, questions
from .data.small_world.world import World
from .loop.checkpoints import StateFile, load_state
from .loop.clock import Clock, duration
from .loop.ema import Ema
from .loop.keys import keyed
from .loop.method import About, Losses, Method, Network, Plan, adamw
from .loop.ranks import Ranks, device_of
from .loop.trainer import Trainer
from .loop.workers import start_worker, undisturbed
from .networks.text_path import build, encode_packed, load_trained, tokenizer_of, weights_of_folder
from .objectives import language

VALIDATION_SEED = 1_000_000_000


@functools.lru_cache(maxsize=4)
def _world(captions: tuple[tuple[str, float], ...]) -> World:
    return World(captions=dict(captions))


@dataclass(frozen=True)
class Maker:
    """Step -> batch of `captions` captions and `pairs` chats, from seeds of its own. Plain values: it travels to workers."""

    tokenizer: str
    shares: tuple[tuple[str, float], ...]
    captions: int
    pairs: int

    @classmethod
    def of(cls, config: ModuleType) -> Maker:
        recipe = config.TRAIN
        return cls(config.TOKENIZER, tuple(config.CAPTIONS.items()), recipe["batch"] - recipe["pairs"], recipe["pairs"])

    def __call__(self, step: int) -> language.TextBatch:
        first = step * (self.captions + self.pairs)
        return self.batch(range(first, first + self.captions + self.pairs))

    def batch(self, seeds: Sequence[int]) -> language.TextBatch:
        """The last `pairs` of the seeds give chats, the others captions."""
        world, tokenizer = _world(self.shares), tokenizer_of(self.tokenizer)
        ids, begins, asked, at = [], [], [], 0
        for place, seed in enumerate(seeds):
            scene = world.scene(seed)
            tokens, offsets = tokenizer.encode(scene.caption)
            begin = 0
            if place < len(seeds) - self.pairs:
                asked += questions.asks(scene, offsets, len(tokens) - 1, first=at)
            else:
                wish, dense = scene, captions.caption(scene, random.Random(f"dense {seed}"), "dense", "en")
                tokens, answer = tokenizer.encode_answer(wish.caption, dense)
                begin = answer - 1
            ids.append(tokens)
            begins.append(begin)
            at += len(tokens)
        return language.TextBatch(ids, begins, asked)


def batches(make: Maker, step: int, workers: int) -> Generator[language.TextBatch, None, None]:
    """`make(step)`, `make(step + 1)`, ... without end; with workers, processes of their own stay a few steps ahead."""
    if not workers:
        while True:
            yield make(step)
            step += 1
    # fresh processes, not forks: a forked child must not touch a CUDA context
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        with undisturbed():
            waiting: list[Future[language.TextBatch]] = [pool.submit(make, step + i) for i in range(2 * workers)]
        try:
            while True:
                done = waiting.pop(0)
                with undisturbed():  # a pool may start its last worker here
                    waiting.append(pool.submit(make, step + 2 * workers))
                step += 1
                yield done.result()
        finally:
            for future in waiting:
                future.cancel()


def losses(
    model: nn.Module, readers: language.Readers, prefix: Sequence[int], layers: Sequence[int], batch: language.TextBatch
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Next-token loss, readers' loss, readers' accuracies. The last of `layers` is the model's last (for the head)."""
    packed, _ = encode_packed(model, batch.ids, prefix, layers)
    probe, accuracy = readers(packed, batch.asked)
    return language.next_token(model, packed[:, -1], batch), probe, accuracy


class TrainEncoder(Method):
    """The language model and the readers of its features, in one network: they learn and are averaged alike."""

    def __init__(self, config: ModuleType, recipe: Mapping[str, Any], device: str):
        if config.LAYERS[-1] != config.MODEL["num_hidden_layers"] - 1:
            raise ValueError(f"encoder: LAYERS {config.LAYERS} must end with the last layer, which the head reads")
        self.config, self.recipe, self.device = config, recipe, device
        self.make, self.prefix = Maker.of(config), tokenizer_of(config.TOKENIZER).prefix
        with torch.random.fork_rng():
            torch.manual_seed(keyed(config.SEED, "probe init").initial_seed())
            readers = language.Readers(len(config.LAYERS) * config.MODEL["hidden_size"])
        self.model, self.readers = build(config), readers
        self.both = nn.ModuleDict({"model": self.model, "readers": readers})

    def begin(self, init: Path | None = None) -> None:
        """Give the networks the weights that they start from: those of a state, or the model's of a checkpoint folder."""
        if init is not None and init.is_dir():  # the readers are not shipped: they start afresh
            self.both["model"].load_state_dict(weights_of_folder(self.config, init))
        elif init is not None:
            self.both.load_state_dict(load_state(init, "encoder")["ema"]["average"])
        self.both.to(self.device)
        named, recipe = dict(self.both.named_parameters()), self.recipe
        optimizer = adamw(named, recipe["lr"], decay=recipe["weight_decay"], vectors_decay=True)
        self.networks = {"encoder": Network(self.both, optimizer, Ema(self.both, recipe["ema"]))}

    def about(self, batch: language.TextBatch) -> About:
        return About(len(batch.ids), text_tokens=sum(map(len, batch.ids)))

    def losses(self, batch: language.TextBatch, step: int) -> dict[str, Losses]:
        words, probe, _ = self._losses(batch)
        return {"encoder": Losses(words[None], beside=self.recipe["probe"] * probe, terms={"probe": probe})}

    def _losses(self, batch: language.TextBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return losses(self.model, self.readers, self.prefix, self.config.LAYERS, batch)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        words, probe, right = self._losses(self.held)
        found = {"held_loss": words, "held_probe": probe}
        found |= {f"held_{name.replace(' ', '_')}": value for name, value in right.items()}
        return {name: value.item() for name, value in found.items()}

    @functools.cached_property
    def held(self) -> language.TextBatch:
        return self.make.batch(range(VALIDATION_SEED, VALIDATION_SEED + self.config.VALIDATION))


def train(
    config: ModuleType,
    out: Path,
    clock: Clock,
    init: Path | None,
    steps: int | None,
    device: str = "cpu",
    workers: int = 0,
) -> None:
    """Train until the steps or the clock are over."""
    recipe = {**config.TRAIN, "steps": steps or config.TRAIN["steps"]}
    states, method = StateFile(out / "encoder.pt"), TrainEncoder(config, recipe, device)
    before = states.latest()
    method.begin(init if before is None else None)
    plan = Plan(
        "encoder",
        recipe["steps"],
        recipe["warmup"],
        recipe["decay"],
        log_every=config.LOG_EVERY,
        validate_every=config.LOG_EVERY,
        save_every=config.SAVE_EVERY,
    )
    trainer = Trainer(plan, method, states, out, Ranks(torch.device(device)))
    if before is not None:
        trainer.resume(before)
    with closing(batches(method.make, trainer.step, workers)) as ahead:
        trainer.run(ahead, clock)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="mini", help="recipe in train/configs, or a file .py (default: mini)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/encoder"), help="folder of state and log (default: runs/encoder)"
    )
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 9m")
    parser.add_argument("--steps", type=int, help="total steps instead of the recipe's; the decay moves with it")
    parser.add_argument(
        "--init", type=Path, metavar="PATH", help="start from the weights of a state file, or of a checkpoint folder"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--workers", type=int, default=0, help="processes that write captions ahead (default: 0)")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="train nothing; write the encoder in the released layout"
    )
    parser.add_argument("--accept", action="store_true", help="train nothing; report what fresh linear readers find")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, metavar="FOLDER", help="--accept: a checkpoint folder")
    source.add_argument(
        "--state", type=Path, metavar="FILE", help="--accept: a state file of this stage or of pretrain"
    )
    parser.add_argument("--scenes", type=int, default=4_000, help="--accept: training captions (default: 4000)")
    parser.add_argument("--held", type=int, default=2_000, help="--accept: captions of held-out scenes (default: 2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="--accept: write the figures there too")
    parser.add_argument("--require", type=float, metavar="SHARE", help="--accept: exit 1 where a figure is below")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    if device_of(options.device).type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: weights and sums stay float32
    config = configs.load(options.config, "encoder")
    if options.export:
        save_text_encoder(load_trained(config, options.out / "encoder.pt"), options.export)
    elif options.accept:
        from .evaluate import linear_probe

        return linear_probe.run(config, options)
    else:
        clock = Clock(options.stop_after)
        train(config, options.out, clock, options.init, options.steps, options.device, options.workers)
    return 0
