"""Stage "reasoner": the layers by which Mini's text encoder writes a dense caption for a wish.

    python -m train reasoner --config mini --init lens/mini/base --out runs/reasoner --stop-after 30m     # again to resume
    python -m train reasoner --config mini --out runs/reasoner --export lens/mini/base
    python -m train reasoner --config mini --accept mini --json scores.json       # how well it writes

Loss = next-token cross-entropy of the answer in chats "wish -> answer" (data/small_world/wishes.py), which begin with the wish: the
97 tokens that precede a prompt are three quarters of what a wish's words would have to be found among. What learns is a copy of
the encoder's decoder layers and its last norm. Token embedding and LM head stay, and so do the encoder's own layers, whose
features the transformer reads: `lens.reasoner` puts the copy in their place only where it writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lens.formats.files import read_json, write_json
from lens.formats.gpt_oss import REASONER
from lens.formats.safetensors import save_tensors
from lens.pipeline import LensPipeline
from lens.reasoner import EmbeddedReasoner
from lens.text_encoder import WISH

from . import configs
from .data.small_world.wishes import Wishes, answer
from .evaluate import reasoning
from .loop.checkpoints import StateFile, load_state, write_text
from .loop.clock import Clock, duration
from .loop.ema import Ema
from .loop.method import About, Losses, Method, Network, Plan, adamw
from .loop.ranks import Ranks, device_of
from .loop.trainer import Trainer
from .networks.text_path import ROOT, build, encode_packed, tokenizer_of, weights_of_folder
from .objectives import language

VALIDATION_SEED = 1_000_000_000
LEARNED = ("model.layers.", "model.norm.")  # of the parameters


class TrainReasoner(Method):
    """The text encoder of a checkpoint folder, whose layers and last norm learn to write."""

    def __init__(self, config: ModuleType, encoder: ModuleType, init: Path, device: str):
        self.config, self.device, self.layer = config, device, encoder.LAYERS[-1]
        self.tokenizer = tokenizer_of(encoder.TOKENIZER)
        self.before = self.tokenizer.chat.ids(WISH)
        words, shares = ROOT / encoder.TOKENIZER, tuple(config.SHARES.items())
        self.wishes, self.unseen = (Wishes(words, split, shares) for split in ("train", "held_out"))
        self.model = build(encoder)
        self.model.load_state_dict(weights_of_folder(encoder, init))
        for name, p in self.model.named_parameters():
            p.requires_grad_(name.startswith(LEARNED))
        self.model.to(device)
        learned, recipe = {name: p for name, p in self.model.named_parameters() if p.requires_grad}, config.TRAIN
        optimizer = adamw(learned, recipe["lr"], decay=recipe["weight_decay"])
        self.networks = {"reasoner": Network(self.model, optimizer, Ema(self.model, recipe["ema"], trained_only=True))}

    def batch(self, wishes: Wishes, seeds: Sequence[int]) -> language.TextBatch:
        """The chats of some seeds; only their answers are learned."""
        ids, begins = [], []
        for wish, scene in map(wishes, seeds):
            tokens, begin = self.tokenizer.encode_answer(wish, answer(scene))
            ids.append(tokens)
            begins.append(begin - 1)
        return language.TextBatch(ids, begins, [])

    def batches(self, step: int) -> Iterator[language.TextBatch]:
        """Of that step and those after it, without end."""
        size = self.config.TRAIN["batch"]
        while True:
            first = self.config.FIRST_SEED + step * size
            yield self.batch(self.wishes, range(first, first + size))
            step += 1

    def about(self, batch: language.TextBatch) -> About:
        return About(len(batch.ids), text_tokens=sum(map(len, batch.ids)))

    def losses(self, batch: language.TextBatch, step: int) -> dict[str, Losses]:
        return {"reasoner": Losses(self._loss(batch)[None])}

    def _loss(self, batch: language.TextBatch) -> Tensor:
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16) if self.config.AUTOCAST else nullcontext():
            packed, _ = encode_packed(self.model, batch.ids, self.before, (self.layer,))
            return language.next_token(self.model, packed[:, -1], batch)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        return {"held_loss": self._loss(self.held).item()}

    @cached_property
    def held(self) -> language.TextBatch:
        return self.batch(self.unseen, range(VALIDATION_SEED, VALIDATION_SEED + self.config.VALIDATION))


def state_file(out: Path) -> StateFile:
    return StateFile(out / "reasoner.pt")


def train(
    config: ModuleType, encoder: ModuleType, out: Path, init: Path, clock: Clock, steps: int | None, device: str = "cpu"
) -> None:
    """Train until the steps or the clock are over."""
    recipe, states = config.TRAIN, state_file(out)
    plan = Plan(
        "reasoner",
        steps or recipe["steps"],
        recipe["warmup"],
        recipe["decay"],
        log_every=config.LOG_EVERY,
        validate_every=config.VALIDATE_EVERY,
        save_every=config.SAVE_EVERY,
    )
    method = TrainReasoner(config, encoder, init, device)
    trainer = Trainer(plan, method, states, out, Ranks(torch.device(device)), settings={"steps": plan.steps})
    if (before := states.latest()) is not None:
        trainer.resume(before)
    trainer.run(method.batches(trainer.step), clock)


def export(config: ModuleType, out: Path, folder: Path) -> None:
    """Write `reasoner/` of a checkpoint folder, the averaged weights in bfloat16; the stage's recipe into its recipe.json, and
    the log beside it."""
    state = load_state(state_file(out).path, "reasoner")
    average = {n.removeprefix("model."): v.bfloat16() for n, v in state["ema"]["average"].items()}
    save_tensors(folder / REASONER, "model", average)
    recipe: dict[str, Any] = read_json(folder / "recipe.json") if (folder / "recipe.json").is_file() else {}
    own = configs.fields(config)
    own["TRAIN"] = {**own["TRAIN"], **state["settings"]}  # as run
    write_json(folder / "recipe.json", recipe | {"reasoner": own})
    write_text(folder / "reasoner.jsonl", (out / "log.jsonl").read_text(encoding="utf-8"))


def accept(encoder: ModuleType, options: argparse.Namespace) -> int:
    """Ask the reasoner of a model, as `lens generate --reason` does, and print what it keeps of wishes."""
    reasoner = EmbeddedReasoner(LensPipeline.from_pretrained(options.accept, device=options.device))
    figures, answers = reasoning.report(reasoner, options.wishes, options.wishes // 12, 40, ROOT / encoder.TOKENIZER)
    print(*reasoning.table(figures), sep="\n")
    if options.json:
        write_json(options.json, {"figures": figures, "answers": answers})
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="mini", help="recipe in train/configs, or a file .py (default: mini)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reasoner"), help="folder of state and log (default: runs/reasoner)"
    )
    parser.add_argument(
        "--init", type=Path, default=Path("lens/mini/base"), metavar="FOLDER",
        help="the checkpoint whose text encoder is to write (default: lens/mini/base)",
    )  # fmt: skip
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 9m")
    parser.add_argument("--steps", type=int, help="total steps instead of the recipe's; the decay moves with it")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="train nothing; write reasoner/ into a checkpoint folder"
    )
    parser.add_argument("--accept", metavar="MODEL", help="train nothing; ask a model's own reasoner what it never saw")
    parser.add_argument("--wishes", type=int, default=240, help="--accept: captions of held-out scenes (default: 240)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="--accept: write figures and answers there too")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    device_of(options.device)
    config, encoder = configs.load(options.config, "reasoner"), configs.beside(options.config, "encoder")
    if options.export:
        export(config, options.out, options.export)
    elif options.accept:
        return accept(encoder, options)
    else:
        clock = Clock(options.stop_after)
        train(config, encoder, options.out, options.init, clock, options.steps, options.device)
    return 0
