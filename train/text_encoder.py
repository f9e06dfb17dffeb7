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
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
from torch import Tensor

from lens import checkpoint

from . import configs
from .data import grammar, questions
from .data.world import World
from .loop.checkpoints import load_state, save_state
from .loop.clock import Clock, duration
from .loop.ema import Ema
from .loop.keys import keyed
from .loop.log import JsonLog
from .loop.method import rate
from .loop.ranks import device_of
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

    def __call__(self, step: int) -> language.Batch:
        first = step * (self.captions + self.pairs)
        return self.batch(range(first, first + self.captions + self.pairs))

    def batch(self, seeds: Sequence[int]) -> language.Batch:
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
                wish, dense = scene, grammar.caption(scene, random.Random(f"dense {seed}"), "dense", "en")
                tokens, answer = tokenizer.encode_answer(wish.caption, dense)
                begin = answer - 1
            ids.append(tokens)
            begins.append(begin)
            at += len(tokens)
        return language.Batch(ids, begins, asked)


def batches(make: Maker, step: int, workers: int) -> Iterator[language.Batch]:
    """`make(step)`, `make(step + 1)`, ... without end; with workers, processes of their own stay a few steps ahead."""
    if not workers:
        while True:
            yield make(step)
            step += 1
    # fresh processes, not forks: a forked child must not touch a CUDA context
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        with undisturbed():
            waiting: list[Future[language.Batch]] = [pool.submit(make, step + i) for i in range(2 * workers)]
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
    model: nn.Module, readers: language.Readers, prefix: Sequence[int], layers: Sequence[int], batch: language.Batch
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Next-token loss, readers' loss, readers' accuracies. The last of `layers` is the model's last (for the head)."""
    packed, _ = encode_packed(model, batch.ids, prefix, layers)
    probe, accuracy = readers(packed, batch.asked)
    return language.next_token(model, packed[:, -1], batch), probe, accuracy


def train(
    config: ModuleType,
    out: Path,
    log: JsonLog,
    clock: Clock,
    init: Path | None,
    steps: int | None,
    device: str = "cpu",
    workers: int = 0,
) -> None:
    """The loop. State: model and readers, optimiser, averages, step."""
    recipe = {**config.TRAIN, "steps": steps or config.TRAIN["steps"]}
    if config.LAYERS[-1] != config.MODEL["num_hidden_layers"] - 1:
        raise ValueError(f"encoder: LAYERS {config.LAYERS} must end with the last layer, which the head reads")
    make, prefix = Maker.of(config), tokenizer_of(config.TOKENIZER).prefix
    model = build(config)
    with torch.random.fork_rng():
        torch.manual_seed(keyed(config.SEED, "probe init").initial_seed())
        readers = language.Readers(len(config.LAYERS) * config.MODEL["hidden_size"])
    both = nn.ModuleDict({"model": model, "readers": readers})
    state, step, path = None, 0, out / "encoder.pt"
    if path.is_file():
        state = load_state(path, "encoder")
        both.load_state_dict(state["model"])
        step = state["step"]
    elif init is not None and init.is_dir():  # the readers are not shipped: they start afresh
        model.load_state_dict(weights_of_folder(config, init))
    elif init is not None:
        both.load_state_dict(load_state(init, "encoder")["ema"]["average"])
    both.to(device)
    optimizer = torch.optim.AdamW(
        both.parameters(), lr=recipe["lr"], betas=(0.9, 0.95), weight_decay=recipe["weight_decay"], fused=True
    )
    ema = Ema(both, recipe["ema"])
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        ema.load(state["ema"])

    words = probe = torch.zeros(())

    def expect_finite() -> None:
        if not torch.isfinite(words + probe):
            raise FloatingPointError(f"encoder: loss {words.item()}, readers' loss {probe.item()} at step {step}")

    def save() -> None:
        expect_finite()  # broken weights must not replace the state before them
        save_state(
            path,
            {
                "stage": "encoder",
                "model": both.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state(),
                "step": step,
            },
        )

    held = make.batch(range(VALIDATION_SEED, VALIDATION_SEED + config.VALIDATION))
    for batch in batches(make, step, workers):
        if step >= recipe["steps"] or clock.over:
            break
        words, probe, _ = losses(model, readers, prefix, config.LAYERS, batch)
        optimizer.zero_grad(set_to_none=True)
        (words + recipe["probe"] * probe).backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(step, recipe["lr"], recipe["warmup"], recipe["steps"], recipe["decay"])
        optimizer.step()
        ema.update(both)
        step += 1
        if step % config.LOG_EVERY == 0:
            expect_finite()
            with torch.no_grad():
                held_words, held_probe, right = losses(model, readers, prefix, config.LAYERS, held)
            log(
                step=step,
                loss=words.item(),
                probe=probe.item(),
                held_loss=held_words.item(),
                held_probe=held_probe.item(),
                **{f"held_{name.replace(' ', '_')}": value.item() for name, value in right.items()},
                seconds=clock.elapsed,
            )
        if step % config.SAVE_EVERY == 0:
            save()
    save()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="mini", help="recipe in train/configs (default: mini)")
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
        checkpoint.save_text_encoder(load_trained(config, options.out / "encoder.pt"), options.export)
    elif options.accept:
        from .evaluate import linear_probe

        return linear_probe.run(config, options)
    else:
        log, clock = JsonLog(options.out / "log.jsonl"), Clock(options.stop_after)
        train(config, options.out, log, clock, options.init, options.steps, options.device, options.workers)
    return 0
