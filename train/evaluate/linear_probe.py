"""What linear readers find in a frozen text encoder: the acceptance measure of the stage "encoder".

    python -m train encoder --accept --model lens/mini/base
    python -m train encoder --accept --state runs/encoder/encoder.pt --scenes 8000 --require 0.99

Fresh multinomial logistic regressions are fitted to the features of training captions (all styles) with L-BFGS and asked
about captions of held-out scenes, whose combinations of class and colour, or of classes, training never shows. Where they
read is where training asks (data/small_world/questions.py): class and colour at the noun, count and relation at the last token.
Deterministic: the same weights give the same figures on one machine.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lens.formats.files import read_json
from lens.formats.released import transformer_config
from lens.formats.text_encoder import load_text_encoder

from ..data.small_world import captions, questions
from ..data.small_world.scene import Scene
from ..data.small_world.translations import LANGUAGES
from ..data.small_world.world import World
from ..loop.checkpoints import load_state, write_text
from ..networks.text_path import CaptionTokenizer, build, encode_packed, load_trained, tokenizer_of
from ..objectives import language

REQUIRED = ("class", "colour", "count", "relation")
STYLES = ("geneval", "brief", "dense", "translated")
FIRST_SEED = 3_000_000_000  # apart from what any stage trains on
CHUNK = 64  # captions encoded at once
DECAYS = (1e-4, 1e-3, 1e-2)

Known = dict[str, tuple[Tensor, Tensor]]  # attribute -> readable features [N, F * E], values [N]


def scenes_of(split: str, count: int) -> list[Scene]:
    """The first `count` scenes, in turn in each style that can say them (translated: in turn in each language)."""
    world, out = World(split, captions="brief"), []
    for i in range(count):
        scene, style = world.scene(FIRST_SEED + i), STYLES[i % len(STYLES)]
        if style != "brief" and captions.can_say(scene, style):
            tongue = LANGUAGES[i // len(STYLES) % len(LANGUAGES)] if style == "translated" else "en"
            text = captions.caption(scene, random.Random(f"probe {split} {i}"), style, tongue)
            scene = replace(scene, style=style, language=tongue, caption=text)
        out.append(scene)
    return out


@torch.no_grad()
def known(model: nn.Module, tokenizer: CaptionTokenizer, layers: Sequence[int], scenes: Sequence[Scene]) -> Known:
    """Features and values of every question the captions allow."""
    rows: dict[str, list[Tensor]] = {name: [] for name in questions.SIZES}
    values: dict[str, list[int]] = {name: [] for name in questions.SIZES}
    for start in range(0, len(scenes), CHUNK):
        ids, asked, at = [], [], 0
        for scene in scenes[start : start + CHUNK]:
            tokens, offsets = tokenizer.encode(scene.caption)
            asked += questions.asks(scene, offsets, len(tokens) - 1, at)
            ids.append(tokens)
            at += len(tokens)
        packed, _ = encode_packed(model, ids, tokenizer.prefix, layers)
        for name, pairs in questions.grouped(asked).items():
            picked = packed.index_select(0, torch.tensor([token for token, _ in pairs], device=packed.device))
            rows[name].append(language.readable(picked).float().cpu())
            values[name] += [value for _, value in pairs]
    return {name: (torch.cat(rows[name]), torch.tensor(values[name])) for name in rows if rows[name]}


def fit(x: Tensor, y: Tensor, classes: int, decay: float, steps: int = 60) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression of values y [N] on x [N, D] plus decay |W|^2 -> a function x -> value."""
    mean, deviation = x.mean(0), x.std(0) + 1e-4
    x = (x - mean) / deviation
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda other: F.linear((other - mean) / deviation, weight.detach(), bias.detach()).argmax(-1)


def reader(x: Tensor, y: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """`fit` with the decay that reads the last fifth best when fitted to the rest; all of it is training data."""
    cut = len(y) - len(y) // 5
    right = {d: (fit(x[:cut], y[:cut], classes, d)(x[cut:]) == y[cut:]).sum().item() for d in DECAYS}
    return fit(x, y, classes, max(DECAYS, key=right.__getitem__))


def report(
    model: nn.Module, tokenizer: CaptionTokenizer, layers: Sequence[int], scenes: int, held: int
) -> dict[str, dict[str, float]]:
    """attribute -> {"held_out": share right, "n": questions, and the share per style and language}."""
    seen = known(model, tokenizer, layers, scenes_of("train", scenes))
    readers = {name: reader(x, y, questions.SIZES[name]) for name, (x, y) in seen.items()}
    unseen = scenes_of("held_out", held)
    groups: dict[str, list[Scene]] = {"held_out": unseen}
    for scene in unseen:
        group = scene.language if scene.style == "translated" else scene.style
        groups.setdefault(group, []).append(scene)
    out: dict[str, dict[str, float]] = {name: {} for name in readers}
    for group, members in groups.items():
        for name, (x, y) in known(model, tokenizer, layers, members).items():
            if name in readers:
                out[name][group] = (readers[name](x) == y).float().mean().item()
                if group == "held_out":
                    out[name]["n"] = len(y)
    return out


def load(config: ModuleType, options: argparse.Namespace) -> tuple[nn.Module, CaptionTokenizer, Sequence[int]]:
    """Model, tokenizer and layers of a checkpoint folder, or of a state file of the encoder or the pretrain stage."""
    if options.model:
        config_file = options.model / "transformer" / "config.json"
        layers = transformer_config(read_json(config_file), str(config_file)).selected_layer_index
        model = load_text_encoder(options.model / "text_encoder", torch.float32, "cpu")
        return model.eval(), CaptionTokenizer(options.model / "tokenizer"), layers
    path: Path = options.state or options.out / "encoder.pt"
    tokenizer = tokenizer_of(config.TOKENIZER)
    if torch.load(path, map_location="cpu", weights_only=True).get("stage") == "pretrain":
        average, model = load_state(path, "pretrain")["ema"]["average"], build(config)
        model.load_state_dict({k.removeprefix("encoder."): v for k, v in average.items() if k.startswith("encoder.")})
    else:
        model = load_trained(config, path)
    return model.eval(), tokenizer, config.LAYERS


def run(config: ModuleType, options: argparse.Namespace) -> int:
    model, tokenizer, layers = load(config, options)
    figures = report(model.to(options.device), tokenizer, layers, options.scenes, options.held)
    columns = [c for c in ("held_out", *STYLES[:3], *LANGUAGES) if any(c in row for row in figures.values())]
    print(f"{'attribute':<12}{'n':>6}" + "".join(f"{c:>10}" for c in columns))
    for name, row in figures.items():
        cells = "".join(f"{100 * row[c]:>9.2f}%" if c in row else f"{'-':>10}" for c in columns)
        print(f"{name:<12}{row['n']:>6.0f}{cells}")
    if options.json:
        write_text(options.json, json.dumps(figures, indent=2) + "\n")
    missed = [name for name in REQUIRED if options.require and figures[name]["held_out"] < options.require]
    if missed:
        print(f"below {options.require}: {', '.join(missed)}")
    return 1 if missed else 0
