"""Stage "encoder": the small GPT-OSS language model whose residual stream Mini reads.

    python -m train encoder --config mini --out runs/encoder --stop-after 9m       # again to resume
    python -m train encoder --config mini --out runs/encoder --export lens/mini/base/text_encoder

Loss = next-token cross entropy on chat-rendered captions + cross entropy of linear probes on the captured features
(each layer divided by its RMS, concatenated, exactly what the MMDiT reads): class and colour at each object's noun, and
everything (class and colour of each object, count, layout, background) at the last token. Plain next-token training drives
late layers towards what comes next; the probes keep what was said readable. `encode_batch` is also the differentiable text
path of joint training.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lens import checkpoint

from . import configs
from .checkpointing import folder_tensors, load_state, save_state
from .data.grammar import BACKGROUNDS
from .data.sprites import KINDS, PALETTE
from .data.world import Scene, World
from .logging import JsonLog
from .loop import Clock, Ema, duration, keyed, rate
from .text_path import CaptionTokenizer, encode_batch

ROOT = Path(__file__).resolve().parents[1]
VALIDATION_SEED = 1_000_000_000
KIND_INDEX = {name: i for i, name in enumerate(KINDS)}
COLOUR_INDEX = {name: i for i, name in enumerate([*PALETTE, None])}
LAYOUTS = ("one", "left", "above", "same 2", "same 3", "same 4", "row")


def build(config: ModuleType) -> nn.Module:
    """A fresh GptOssForCausalLM of the recipe; weights depend on the recipe's seed alone."""
    from transformers import GptOssConfig, GptOssForCausalLM

    rows = len(json.loads((ROOT / config.TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"]) + 10
    parsed = GptOssConfig(vocab_size=rows, pad_token_id=None, bos_token_id=None, eos_token_id=None, **config.MODEL)
    parsed._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(keyed(config.SEED, "encoder init").initial_seed())
        model = GptOssForCausalLM(parsed).float()
        nn.init.normal_(model.model.embed_tokens.weight, std=config.EMBEDDING_STD)
    return model.train()


class Probes(nn.Module):
    """Linear readers of the captured features; discarded after training."""

    def __init__(self, width: int):
        super().__init__()
        self.noun = nn.Linear(width, len(KINDS) + len(COLOUR_INDEX))
        self.scene = nn.Linear(width, len(LAYOUTS) + len(BACKGROUNDS) + 3 * (len(KINDS) + len(COLOUR_INDEX)))

    def forward(
        self, features: Tensor, nouns: Tensor, noun_labels: Tensor, ends: Tensor, end_labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """features [R, F, E]; rows `nouns` with labels [M, 2]; rows `ends` with labels [B, 8], -100 where unsaid -> loss, accuracy."""
        x = F.rms_norm(features, (features.shape[-1],), eps=1e-5).flatten(1)
        sizes = [len(KINDS), len(COLOUR_INDEX)]
        losses, right = [], []
        parts = list(zip(self.noun(x[nouns]).split(sizes, -1), noun_labels.unbind(-1)))
        parts += list(
            zip(self.scene(x[ends]).split([len(LAYOUTS), len(BACKGROUNDS), *sizes * 3], -1), end_labels.unbind(-1))
        )
        for logits, labels in parts:
            said = labels >= 0
            if said.any():
                losses.append(F.cross_entropy(logits[said], labels[said]))
                right.append((logits[said].argmax(-1) == labels[said]).float().mean())
        return torch.stack(losses).sum(), torch.stack(right).mean()


def labels(scene: Scene, offsets: list[tuple[int, int]]) -> tuple[list[tuple[int, int, int]], list[int]]:
    """(token, class, colour) of each noun the caption says once per thing; the eight labels of the whole scene."""
    text = scene.caption.lower()
    distinct = list(dict.fromkeys((t.kind, t.colour) for t in scene.things))
    nouns = []
    for kind, colour in distinct:
        word = KINDS[kind].plural if len(distinct) < len(scene.things) else KINDS[kind].noun
        end = text.index(word) + len(word)
        token = max(i for i, (start, _) in enumerate(offsets) if start < end)
        nouns.append((token, KIND_INDEX[kind], COLOUR_INDEX[colour]))
    layout = scene.relation or (
        "one" if len(scene.things) == 1 else "row" if len(distinct) > 1 else f"same {len(scene.things)}"
    )
    background = next((i for i, group in enumerate(BACKGROUNDS.values()) if any(_said(p, text) for p in group)), -100)
    whole = [LAYOUTS.index(layout), background]
    for slot in range(3):
        whole += list(nouns[slot][1:]) if slot < len(nouns) else [-100, -100]
    return nouns, whole


def _said(phrase: str, text: str) -> bool:
    return any(
        p in text.rstrip(".") and text.rstrip(".").endswith(p)
        for p in (phrase, phrase.replace("it all", "it"), phrase.replace("it all", "them"))
    )


@functools.lru_cache(maxsize=4)
def tokenizer_of(folder: str) -> CaptionTokenizer:
    return CaptionTokenizer(ROOT / folder)


def batch_of(
    world: World, tokenizer: CaptionTokenizer, seeds: Sequence[int]
) -> tuple[list[list[int]], list[Scene], list[list[tuple[int, int]]]]:
    scenes = [world.scene(seed) for seed in seeds]
    encoded = [tokenizer.encode(scene.caption) for scene in scenes]
    return [ids for ids, _ in encoded], scenes, [offsets for _, offsets in encoded]


def losses(
    model: nn.Module,
    probes: Probes,
    tokenizer: CaptionTokenizer,
    ids: list[list[int]],
    scenes: list[Scene],
    offsets: list[list[tuple[int, int]]],
    layers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(next-token loss, probe loss, probe accuracy) of a batch."""
    features = encode_batch(model, ids, tokenizer.prefix, layers)
    starts, nouns, noun_labels, end_labels = [0], [], [], []
    for sample, scene, places in zip(ids, scenes, offsets):
        own, whole = labels(scene, places)
        nouns += [starts[-1] + token for token, *_ in own]
        noun_labels += [pair[1:] for pair in own]
        end_labels.append(whole)
        starts.append(starts[-1] + len(sample))
    packed = torch.cat(features)
    probe, accuracy = probes(
        packed, torch.tensor(nouns), torch.tensor(noun_labels), torch.tensor(starts[1:]) - 1, torch.tensor(end_labels)
    )
    flat = torch.tensor([i for sample in ids for i in sample])
    follow = torch.ones(len(flat), dtype=torch.bool)
    follow[torch.tensor(starts[1:]) - 1] = False
    logits = model.lm_head(model.model.norm(packed[:, -1][follow]))
    target = flat[1:][follow[:-1]]
    return F.cross_entropy(logits, target), probe, accuracy


def train(config: ModuleType, out: Path, log: JsonLog, clock: Clock, init: Path | None, steps: int | None) -> None:
    recipe = {**config.TRAIN, "steps": steps or config.TRAIN["steps"]}
    tokenizer, world = tokenizer_of(config.TOKENIZER), World()
    model = build(config)
    both = nn.ModuleDict({"model": model, "probes": Probes(len(config.LAYERS) * config.MODEL["hidden_size"])})
    with torch.random.fork_rng():
        torch.manual_seed(keyed(config.SEED, "probe init").initial_seed())
        both["probes"] = Probes(len(config.LAYERS) * config.MODEL["hidden_size"])
    optimizer = torch.optim.AdamW(
        both.parameters(), lr=recipe["lr"], betas=(0.9, 0.95), weight_decay=recipe["weight_decay"]
    )
    ema, step, path = Ema(both, recipe["ema"]), 0, out / "encoder.pt"
    if path.is_file():
        state = load_state(path, "encoder")
        both.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load(state["ema"])
        step = state["step"]
    elif init is not None:
        if init.is_dir():  # the probes are not shipped: they start afresh
            model.load_state_dict(folder_tensors(init / "text_encoder"))
        else:
            both.load_state_dict(load_state(init, "encoder")["ema"]["average"])
        ema = Ema(both, recipe["ema"])

    def save() -> None:
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

    held = batch_of(world, tokenizer, range(VALIDATION_SEED, VALIDATION_SEED + 256))
    while step < recipe["steps"] and not clock.over:
        seeds = range(step * recipe["batch"], (step + 1) * recipe["batch"])
        lm, probe, _ = losses(model, both["probes"], tokenizer, *batch_of(world, tokenizer, seeds), config.LAYERS)
        optimizer.zero_grad(set_to_none=True)
        (lm + recipe["probe"] * probe).backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate(step, recipe["lr"], recipe["warmup"], recipe["steps"], recipe["decay"])
        optimizer.step()
        ema.update(both)
        step += 1
        if step % config.LOG_EVERY == 0:
            with torch.no_grad():
                held_lm, held_probe, held_accuracy = losses(model, both["probes"], tokenizer, *held, config.LAYERS)
            log(
                step=step,
                loss=lm.item(),
                probe=probe.item(),
                held_loss=held_lm.item(),
                held_probe=held_probe.item(),
                held_accuracy=held_accuracy.item(),
                seconds=clock.elapsed,
            )
        if step % config.SAVE_EVERY == 0:
            save()
    save()


def load_trained(config: ModuleType, path: Path) -> nn.Module:
    """The averaged model of a state file (an encoder's or a joint run's)."""
    average = load_state(path, "encoder")["ema"]["average"]
    model = build(config)
    model.load_state_dict({k.removeprefix("model."): v for k, v in average.items() if k.startswith("model.")})
    return model


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
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="train nothing; write the encoder in the released layout"
    )


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    config = configs.load(options.config, "encoder")
    if options.export:
        checkpoint.save_text_encoder(load_trained(config, options.out / "encoder.pt"), options.export)
        return 0
    train(
        config, options.out, JsonLog(options.out / "log.jsonl"), Clock(options.stop_after), options.init, options.steps
    )
    return 0
