"""Stage "distill": a student of four steps without guidance, from a guided teacher of many: Turbo. docs/distillation.md has why.

    python -m train distill --config mini --init mini-rl --out runs/turbo --stop-after 5m
    python -m train distill --config mini --init mini-rl --out runs/turbo --stop-after 5m           # again to resume
    python -m train distill --config mini --init mini-rl --out runs/turbo --sweep                   # fake rate x CA weight
    python -m train distill --config mini --init mini-rl --out runs/turbo --ablate                  # the recipe's parts
    python -m train distill --config mini --init mini-rl --out runs/turbo --export runs/mini-turbo
    python -m train distill --config mini --init mini-rl --out runs/style --lora r=16               # adapters alone
    python -m train distill --config released --dry-run
    torchrun --nproc-per-node 8 -m train distill --config released --init CHECKPOINT --data SHARDS --device cuda

Student and fake score start from the weights of --init, which frozen are the teacher and keep text encoder and VAE; an
adapter's folder is made whole in OUT/teacher. GUIDED_STEPS of the student alone come first. Then an optimiser step is one turn:
FAKE_UPDATES of fake score and heads, then one of the student, after which the fake score is pulled towards it; a state may be
saved after any, and resumes bit for bit on a CPU. OUT holds checkpoints/, best/ (the averaged student of the highest held-out
score, less what it is outside of BARS), log.jsonl and sheets. Numbers that leave their range end the training (RULES). Adapters
that are resumed go on beside the weights of --init, which may have been trained further.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lens
from lens import sampler
from lens.formats.files import read_json, write_json
from lens.formats.hub import EMBEDDED, resolve
from lens.formats.lora import CONFIG
from lens.formats.released import (
    load_scheduler,
    read_defaults,
    read_index,
    released_index,
    released_scheduler,
    save_transformer,
    transformer_config,
)
from lens.sampler import Scheduler

from . import configs, cost
from . import pretrain_on_shards as flow
from .data import encoders
from .data.buckets import BucketSampler
from .data.contact_sheet import contact_sheet
from .data.loader import Encode, Loader, ShardBatch
from .data.scene_pool import HELD_OUT, ScenePool
from .data.shards import ShardSet, check_once_per_node
from .data.small_world.scene import Scene
from .data.small_world.world import World
from .evaluate import distillation as watch
from .loop import ranks
from .loop.adapter_model import MADE_OF, NOT_ITS_OWN, base_of, is_adapter, joined, made_whole
from .loop.checkpoints import Checkpoints, read_state, step_of, write_text
from .loop.clock import Clock, duration, positive
from .loop.ema import Ema
from .loop.keys import keyed
from .loop.lean_adamw import LeanAdamW
from .loop.log import read_log
from .loop.lora import Lora, attach_lora, lora_of, merge_lora, parse_lora, round_lora, save_lora, write_lora
from .loop.method import About, Losses, Method, Network, Plan
from .loop.ranks import Ranks, local_shard
from .loop.sheets import released_decoder
from .loop.trainer import ALONE, Trainer
from .loop.validation import validation_loader
from .networks.denoiser import Denoiser
from .networks.discriminator import Heads
from .objectives import dmd
from .objectives.distillation import Distillation, Given

STAGE = "distill"
LEAST_RESPONSE = 0.02  # of |v_c - v_u| / |v_c|: below, guidance has nothing to distil
RESPONSE_TIMES = (0.3, 0.6, 0.9)
MOST_RUNS = 12  # of a sweep
SWEEP: dict[str, tuple[float, ...]] = {"FAKE_LR": (0.5, 1.0, 2.0, 4.0), "CA_WEIGHT": (0.5, 1.0, 2.0)}  # factors
SWEEP_STEPS = 50  # student steps of a run
ABLATION: dict[str, tuple[str, ...]] = {  # arm -> fields
    "CA + DM": ("LAMBDA_G=0.0", "IDA=0.0"),
    "+ IDA": ("LAMBDA_G=0.0",),
    "+ heads": ("R1_GAMMA=0.0",),
    "+ approximate R1": (),
}
SEEDS = 3  # of every arm
SHOWN = ("worth", "score", "ca_over_dm", "deviation", "saturation", "high_frequency", "cast", "diversity", "backdrops")

FIXED = (
    "STUDENT_STEPS",
    "STUDENT_SAMPLER",
    "GRID",
    "GUIDED_STEPS",
    "FAKE_WARMUP",
    "FAKE_UPDATES",
    "LORA",
)  # of a training

Decode = Callable[[Tensor, tuple[int, int]], np.ndarray]


def check(recipe: ModuleType) -> None:
    """Refuse at the start what would fail later. Errors: ValueError naming the field."""
    for name in (
        "SLOTS",
        "STEPS",
        "STUDENT_STEPS",
        "GUIDED_SUBSTEPS",
        "FAKE_UPDATES",
        "TEACHER_STEPS",
        "WATCH_EVERY",
        "WATCHED",
        "PATIENCE",
        "LOG_EVERY",
        "SAVE_EVERY",
    ):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(recipe, name)}")
    for name in ("LR", "GUIDED_LR", "FAKE_LR", "HEADS_LR", "CLIP", "HEADS_CLIP", "LAMBDA_D", "NORMALISER_FLOOR"):
        if not 0 < getattr(recipe, name) < float("inf"):
            raise ValueError(f"{name}: expected a positive number, got {getattr(recipe, name)}")
    for name in ("DM_WEIGHT", "CA_WEIGHT", "LAMBDA_G", "R1_GAMMA", "R1_ALPHA", "GUIDED_STEPS", "FAKE_WARMUP"):
        if not 0 <= getattr(recipe, name) < float("inf"):
            raise ValueError(f"{name}: expected 0 or more, got {getattr(recipe, name)}")
    for name, last in (("EMA", "below 1"), ("IDA", "at most 1")):
        if not 0 <= getattr(recipe, name) < (1 if name == "EMA" else 1 + 1e-9):
            raise ValueError(f"{name}: expected 0 or more and {last}, got {getattr(recipe, name)}")
    for field in ("RULES", "BARS"):
        for name, bounds in getattr(recipe, field).items():
            if name not in watch.NUMBERS:
                raise ValueError(f"{field}: {name!r}, expected some of {', '.join(watch.NUMBERS)}")
            if not all(map(math.isfinite, bounds)) or not bounds[0] <= bounds[1]:
                raise ValueError(f"{field}: {name!r}: expected a finite (low, high), got {bounds}")
    cycle = recipe.FAKE_UPDATES + 1
    for name, unit in (
        ("GUIDED_STEPS", cycle * recipe.WATCH_EVERY),
        ("FAKE_WARMUP", cycle),
    ):  # a check at the end of the first
        if getattr(recipe, name) % unit:
            raise ValueError(f"{name}: expected a multiple of {unit}, got {getattr(recipe, name)}")
    if recipe.GUIDED_SUBSTEPS > 1 and recipe.STUDENT_SAMPLER != "euler":
        raise ValueError(
            f"GUIDED_SUBSTEPS: expected 1 with STUDENT_SAMPLER {recipe.STUDENT_SAMPLER!r}, whose steps end in noise of their own, "
            f"got {recipe.GUIDED_SUBSTEPS}"
        )
    if recipe.GROUP < 2 or recipe.GROUPS < 1:
        raise ValueError(
            f"GROUP, GROUPS: expected at least 2 pictures of 1 caption, got {recipe.GROUP}, {recipe.GROUPS}"
        )
    layers = flow.model_of(recipe).num_layers
    if (
        list(recipe.TAPS) != sorted(set(recipe.TAPS))
        or not recipe.TAPS
        or not 1 <= min(recipe.TAPS) <= max(recipe.TAPS) <= layers
    ):
        raise ValueError(f"TAPS: expected rising numbers of blocks in 1 .. {layers}, got {recipe.TAPS}")


def turns_of(recipe: ModuleType, student_steps: int) -> int:
    """Optimiser steps up to so many of the student."""
    return recipe.GUIDED_STEPS + recipe.FAKE_WARMUP + student_steps * (recipe.FAKE_UPDATES + 1)


# ------------------------------------------------------------------------------------------------ networks


def teacher_of(recipe: ModuleType, group: Ranks, folder: Path) -> nn.Module:
    """The frozen teacher in the compute dtype, sharded as the student is, without an adapter."""
    with torch.device("meta"):
        model = Denoiser(flow.model_of(recipe), flow.DTYPES[recipe.COMPUTE], recipe.RECOMPUTE).train()
        model.to(model.compute).requires_grad_(False)
    wrapped = ranks.wrap(model, group, recipe.RESHARD) if group.shard > 1 else model
    ranks.load_released(model, folder / "transformer", group.device)
    return wrapped


def networks_of(recipe: ModuleType, group: Ranks, folder: Path) -> dict[str, Network]:
    """Student, fake score and, with LAMBDA_G, heads; float32 masters, a second moment each, an average of the student."""
    found = {}
    for name, lr in (("student", recipe.LR), ("fake", recipe.FAKE_LR)):
        model = flow.build(recipe, group, folder / "transformer")
        average = Ema(ranks.bare(model), recipe.EMA, trained_only=True) if name == "student" else None
        found[name] = Network(model, _optimizer(recipe, ranks.bare(model), lr), average)
    if recipe.LAMBDA_G:
        heads: nn.Module = Heads(len(recipe.TAPS), flow.model_of(recipe).inner_dim, recipe.HEAD_WIDTH, recipe.SEED)
        heads.to(group.device)
        optimizer = _optimizer(recipe, heads, recipe.HEADS_LR)
        found["heads"] = Network(DistributedDataParallel(heads) if group.world > 1 else heads, optimizer)
    return found


def _optimizer(recipe: ModuleType, module: nn.Module, lr: float) -> LeanAdamW:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return LeanAdamW(trained, lr, recipe.BETA2, recipe.WEIGHT_DECAY, recipe.EPS)


# ------------------------------------------------------------------------------------------------ what is held out


@torch.no_grad()
def response(objective: Distillation, teacher: nn.Module, batch: ShardBatch) -> float:
    """|v_c - v_u| / |v_c| of the teacher on noised real pictures: what there is to distil of its guidance."""
    apart = whole = 0.0
    real, given = objective.given(batch)
    for time in RESPONSE_TIMES:
        t = torch.full((len(real),), time, device=real.device)
        noise = torch.randn(real.shape, generator=keyed(objective.recipe.SEED, "watch", 0)).to(real.device)
        x = (1 - time) * real + time * noise
        c, u = given.velocity(teacher, x, t), given.without_text().velocity(teacher, x, t)
        apart, whole = apart + float((c - u).square().sum()), whole + float(c.square().sum())
    return (apart / whole) ** 0.5


class HeldOut:
    """Held-out pictures and captions, what the guided teacher draws of them, and what the student does.

    Every rank draws all of it: sharded networks ask for the same calls of all.
    """

    def __init__(
        self,
        objective: Distillation,
        teacher: nn.Module,
        batches: Sequence[ShardBatch],
        decode: Decode | None,
        scenes: Sequence[Scene] = (),
    ):
        self.objective, self.teacher, self.decode, self.batches, self.scenes = (
            objective,
            teacher,
            decode,
            batches,
            scenes,
        )
        self.captions = [caption for batch in batches for caption in batch.captions]
        self.score = watch.score_of(objective.recipe.SCORE)
        self._references: dict[str, watch.Drawn] = {}

    def draw(self, network: nn.Module, steps: int, guidance: float) -> watch.Drawn:
        """By the sampler's steps, of fixed noise; every caption once, and the first GROUPS of them GROUP times."""
        recipe = self.objective.recipe
        latents, pictures = [], []
        for index, batch in enumerate(self.batches):
            real, given = self.objective.given(batch)
            x = self._walk(network, given, self._noise(real, index), batch.bucket.tokens, steps, guidance)
            latents.append(x)
            pictures += self._decoded(x, given.grid)
        groups, group_pictures = [], []
        batch = self.batches[0]
        real, given = self.objective.given(batch)
        parts = given.features.split(list(given.lengths))
        for index, (features, length) in enumerate(list(zip(parts, given.lengths))[: recipe.GROUPS]):
            own = Given(features.repeat(recipe.GROUP, 1, 1), [length] * recipe.GROUP, given.grid, given.axes)
            noise = self._noise(real[:1].expand(recipe.GROUP, -1, -1), 1_000 + index)
            x = self._walk(network, own, noise, batch.bucket.tokens, steps, guidance)
            groups.append(x)
            group_pictures += self._decoded(x, given.grid)
        return watch.Drawn(latents, pictures, groups, group_pictures)

    def _noise(self, like: Tensor, index: int) -> Tensor:
        generator = keyed(self.objective.recipe.SEED, "watch", index)
        return torch.randn(like.shape, generator=generator).to(like.device)

    def _walk(self, network: nn.Module, given: Given, x: Tensor, tokens: int, steps: int, guidance: float) -> Tensor:
        none, objective = given.without_text(), self.objective
        sigmas = objective.scheduler.sigmas(tokens, steps)
        if guidance == 1:
            renoise = objective.recipe.STUDENT_SAMPLER == "renoise"
            noises = [self._noise(x, 2_000 + j) for j in range(steps)] if renoise else []
            return objective.simulate(network, given, x, sigmas, steps, noises)

        def velocities(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return given.velocity(network, x, objective.told(t)), none.velocity(network, x, objective.told(t))

        return sampler.walk(velocities, x, sigmas, guidance)

    def _decoded(self, latents: Tensor, grid: tuple[int, int]) -> list[np.ndarray]:
        return list(self.decode(latents, grid)) if self.decode is not None else []

    def references(self) -> dict[str, watch.Drawn]:
        """What the student is held against, drawn once: `truth`, through the decoder and without groups; `teacher`, guided and in
        its many steps; `teacher_few`, guided and in the student's; `start`, the student before it has learned."""
        if not self._references:
            recipe = self.objective.recipe
            latents = [self.objective.given(batch)[0] for batch in self.batches]
            pictures = [p for x, b in zip(latents, self.batches) for p in self._decoded(x, b.bucket.grid)]
            few, guidance = recipe.STUDENT_STEPS, recipe.TEACHER_GUIDANCE
            self._references = {
                "truth": watch.Drawn(latents, pictures, [], []),
                "teacher": self.draw(self.teacher, recipe.TEACHER_STEPS, guidance),
                "teacher_few": self.draw(self.teacher, few, guidance),
                "start": self.draw(self.teacher, few, 1.0),
            }
        return self._references

    def _figures(self, drawn: watch.Drawn) -> dict[str, float]:
        held = self.references()
        found = watch.figures(drawn, held["truth"], held["teacher"])
        return found | self._scored(drawn)

    def _scored(self, drawn: watch.Drawn) -> dict[str, float]:
        if self.score is None or not drawn.pictures:
            return {}
        own = (drawn.pictures, self.captions, self.scenes) if self.scenes else (drawn.pictures, self.captions)
        return {"score": float(self.score(*own))}

    @torch.no_grad()
    def reference_figures(self) -> dict[str, dict[str, float]]:
        """The numbers of the references; of the truth the score alone."""
        held = self.references()
        found = {name: self._figures(drawn) for name, drawn in held.items() if name != "truth"}
        return {"truth": self._scored(held["truth"]), **found}

    @torch.no_grad()
    def figures(self, student: nn.Module) -> tuple[dict[str, float], watch.Drawn]:
        """The numbers of train/evaluate/distillation.py and `score`, and what they are of."""
        drawn = self.draw(student, self.objective.recipe.STUDENT_STEPS, 1.0)
        return self._figures(drawn), drawn


# ------------------------------------------------------------------------------------------------ method


def added(sums: dict[str, list[float]], name: str, total: float, count: float) -> None:
    """A sum and a count more."""
    before = sums.get(name, [0.0, 0.0])
    sums[name] = [before[0] + total, before[1] + count]


class Distil(Method):
    """Student, fake score and heads in turns. best: where the averaged student of the highest score goes."""

    def __init__(
        self,
        recipe: ModuleType,
        group: Ranks,
        networks: dict[str, Network],
        teacher: nn.Module,
        objective: Distillation,
        kinds: Sequence[str],
        held_out: HeldOut | None = None,
        best: Checkpoints | None = None,
    ):
        self.recipe, self.group, self.networks, self.teacher = recipe, group, networks, teacher
        self.objective, self.held_out, self.states, self.kinds = objective, held_out, best, tuple(kinds)
        self.modules = {name: network.module for name, network in networks.items()}
        self.rules = watch.Rules(recipe.RULES, recipe.PATIENCE)  # widened when the references are drawn
        self.bars = recipe.BARS  # widened, too
        self.settings: Mapping[str, Any] = configs.fields(recipe)  # that the best student is saved with
        self.ended: list[str] = []  # the rules that say stop
        self.sums: dict[str, list[float]] = {}  # of this rank's terms since the last check: sum, count
        self.terms: dict[str, list[float]] = {}  # of the step at hand, which may be skipped: sum, count
        self.terms_of = -1  # that step
        self.counted: tuple[int, int] | None = None  # the micro-batch whose terms came last
        self.lowest_fake, self.best = float("inf"), {"worth": float("-inf"), "step": -1.0}
        self.drawn: watch.Drawn | None = None
        self.references: dict[str, dict[str, float]] = {}  # the numbers of what the student is held against

    # -------------------------------------------------------------------------------------------- the turns

    def student_step(self, step: int) -> int:
        """Student steps taken before an optimiser step, those of GUIDED_STEPS left out."""
        return max(0, step - turns_of(self.recipe, 0)) // (self.recipe.FAKE_UPDATES + 1)

    def guided(self, step: int) -> bool:
        """Whether the student learns guidance at this step, before all turns."""
        return step < self.recipe.GUIDED_STEPS

    def students_turn(self, step: int) -> bool:
        after, cycle = step - turns_of(self.recipe, 0), self.recipe.FAKE_UPDATES + 1
        return after >= 0 and after % cycle == self.recipe.FAKE_UPDATES

    def turn(self, step: int) -> tuple[str, ...]:
        if self.guided(step) or self.students_turn(step):
            return ("student",)
        return tuple(name for name in self.networks if name != "student")

    def rate(self, name: str, step: int) -> float:
        """GUIDED_LR falls to zero over its steps."""
        left = 1 - step / max(1, self.recipe.GUIDED_STEPS)
        return self.recipe.GUIDED_LR / self.recipe.LR * left if self.guided(step) else 1.0

    def losses(self, batch: ShardBatch, step: int) -> dict[str, Losses]:
        if self.guided(step):
            compute = self.objective.guided
        else:
            compute = self.objective.student if self.students_turn(step) else self.objective.fake_and_heads
        found = compute(self.modules, self.teacher, batch)
        if (batch.step, batch.slot) == self.counted:  # a rank without a slot of its own left repeats its last one
            return found
        self.counted = batch.step, batch.slot
        if step != self.terms_of:
            self.terms, self.terms_of = {}, step
        for own in found.values():
            for name, value in own.terms.items():
                added(self.terms, name, value.item(), 1)
        return found

    def after(self, step: int) -> None:
        """The terms of a step that was taken count; IDA, behind a student step."""
        for name, (total, count) in self.terms.items():
            added(self.sums, name, total, count)
        self.terms = {}
        if self.recipe.IDA and self.students_turn(step):
            fake, student = ([local_shard(p.detach()) for p in own] for own in self._pairs())
            dmd.align_(fake, student, self.recipe.IDA)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """What trains of the fake score and of the student, in one order."""
        fake, student = (self.networks[name].parameters for name in ("fake", "student"))
        return list(fake.values()), [student[name] for name in fake]

    def about(self, batch: ShardBatch) -> About:
        count, tokens = len(batch.lengths), batch.bucket.tokens
        return About(
            samples=count,
            kind=batch.bucket.name,
            place=(batch.step, batch.slot),
            image_tokens=count * tokens,
            text_tokens=sum(batch.lengths),
            damaged=[(skip.key, skip.reason) for skip in batch.skipped],
            seen={"bucket": batch.bucket.name, "keys": list(batch.keys)},
        )

    def plan(self, student_steps: int) -> Plan:
        """For a training of so many student steps."""
        recipe, cycle = self.recipe, self.recipe.FAKE_UPDATES + 1
        return Plan(
            STAGE,
            turns_of(recipe, student_steps),
            clip=recipe.CLIP,
            clip_of={"heads": recipe.HEADS_CLIP},
            slots=recipe.SLOTS,
            skip_limit=recipe.SKIP_LIMIT,
            log_every=recipe.LOG_EVERY * cycle,
            validate_every=recipe.WATCH_EVERY * cycle if self.held_out is not None else 0,
            validate_first=self.held_out is not None,
            save_every=recipe.SAVE_EVERY * cycle,
        )

    # -------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        kept = {"sums": self.summed(), "broken": self.rules.broken}
        # JSON has no infinity: None where there is none yet
        best = self.best if self.best["step"] >= 0 else None
        lowest = self.lowest_fake if self.lowest_fake < float("inf") else None
        return {"watch": {**kept, "best": best, "lowest_fake": lowest, "ended": self.ended}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        held = state["watch"]
        self.sums = {name: list(pair) for name, pair in held["sums"].items()} if self.group.main else {}  # of all ranks
        self.rules.broken = dict(held["broken"])
        self.ended = list(held.get("ended", ()))  # states of before have none
        if held["lowest_fake"] is not None:
            self.lowest_fake = held["lowest_fake"]
        if held["best"] is not None and held["best"]["step"] >= self.recipe.GUIDED_STEPS:  # states of before had others
            self.best = dict(held["best"])

    # -------------------------------------------------------------------------------------------- the watch

    def summed(self) -> dict[str, list[float]]:
        """`sums` of all ranks together, each of which has seen slots of its own. Every rank calls it."""
        found: dict[str, list[float]] = {}
        for own in self.group.gather(self.sums):
            for name, (total, count) in own.items():
                added(found, name, total, count)
        return found

    def _since(self) -> dict[str, float]:
        """Means of the terms since the last check, and what is made of them; they begin anew."""
        means = {name: total / count for name, (total, count) in self.summed().items()}
        self.sums = {}
        found = {name: means[name] for name in ("heads_accuracy",) if name in means}
        if "from_guided" in means:
            found["unguided"] = means["from_guided"] / max(means["guided_from_c"], 1e-12)
        if "applied_dm" in means:
            found["ca_over_dm"] = means["applied_ca"] / max(means["applied_dm"], 1e-12)
        if "fake" in means:
            self.lowest_fake = min(self.lowest_fake, means["fake"])
            found["fake_rise"] = means["fake"] / self.lowest_fake
        return found

    @torch.no_grad()
    def drift(self) -> float:
        """|theta - phi| / |theta| over what trains: how far the fake score is from the student."""
        fake, student = self._pairs()
        apart = ranks.norm([s.detach() - f.detach() for f, s in zip(fake, student)], self.group)
        return float(apart / ranks.norm([s.detach() for s in student], self.group))

    def validate(self, step: int) -> dict[str, float]:
        """The check: numbers, rules, and the best student so far. The student has its averaged weights."""
        if self.held_out is None:
            return {}
        if not self.references:
            self.references = self.group.gather(self.held_out.reference_figures())[0]
            self.rules.ranges = watch.widened(
                self.recipe.RULES, [v for n, v in self.references.items() if n != "truth"]
            )
            self.bars = watch.widened(self.recipe.BARS, [self.references["teacher"]])
            if self.states is not None and self.group.main:
                write_json(self.states.folder.parent / "references.json", self.references)
        values, self.drawn = self.held_out.figures(self.modules["student"])
        optimizer = self.networks["student"].optimizer
        assert isinstance(optimizer, LeanAdamW), "networks_of gave it"
        values |= {**self._since(), "near_eps": optimizer.near_eps(), "student_step": float(self.student_step(step))}
        values["drift"] = self.drift()
        values = self.group.gather(values)[0]  # all decide by what the main rank saw
        if self.student_step(step):  # before, nothing of it is the training's
            self.ended = self.rules.check(values)
        if "score" in values:
            values["worth"] = values["score"] - watch.beyond(values, self.bars)
        # a rate that falls to zero over GUIDED_STEPS has its result at their end: before, scores differ by their noise
        if step >= self.recipe.GUIDED_STEPS and values.get("worth", float("-inf")) > self.best["worth"]:
            self.best = {"worth": values["worth"], "step": float(step)}
            if self.states is not None:
                student = ranks.bare(self.modules["student"])
                tensors = {f"model.{name}": p.detach() for name, p in student.named_parameters()}
                self.states.save(step, tensors, {"stage": STAGE, "settings": self.settings, "worth": values["worth"]})
                self.states.wait()
        return values

    def draw(self, folder: Path, step: int) -> dict[str, Path]:
        """Held-out captions as the last check drew them: guided teacher, it in as few steps, student, truth, side by side."""
        if self.drawn is None or not self.drawn.pictures or self.held_out is None or not self.group.main:
            return {}
        path, recipe, held = folder / f"sheet_{step:06d}.png", self.recipe, self.held_out.references()
        columns = {
            f"teacher {recipe.TEACHER_STEPS}": held["teacher"],
            f"teacher {recipe.STUDENT_STEPS}": held["teacher_few"],
            f"student {recipe.STUDENT_STEPS}": self.drawn,
            "truth": held["truth"],
        }
        shapes = [p.shape for p in self.drawn.pictures]
        pictures, captions = [], []
        for i in [i for i, shape in enumerate(shapes) if shape == shapes[0]]:
            pictures += [drawn.pictures[i] for drawn in columns.values()]
            captions += [*list(columns)[:-1], f"truth: {self.held_out.captions[i]}"]
        contact_sheet(pictures, captions, path, columns=8)
        return {"sheet": path}


class RuledClock(Clock):
    """Over, too, when a rule of the method says so; the clock may be that of several runs."""

    def __init__(self, clock: Clock, method: Distil):
        self.start, self.limit, self.clock, self.method = clock.start, clock.limit, clock, method

    @property
    def over(self) -> bool:
        return bool(self.method.ended) or self.clock.over


# ------------------------------------------------------------------------------------------------ the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="mini", help="recipe in train/configs, mini or released, or a file .py (default: mini)"
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="CHECKPOINT",
        help="the teacher: a folder in the released layout, an adapter's folder, or an embedded model's name",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/turbo"), help="states, log, sheets (default: runs/turbo)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="SHARDS", help="pictures and captions, for a recipe without scenes"
    )
    parser.add_argument("--validate", type=Path, metavar="SHARDS", help="shards the training never sees, for the watch")
    parser.add_argument(
        "--lora", metavar="r=R[,alpha=A]", help="train adapters alone; alpha=2r, targets=attention or all"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="replace a field; repeatable")
    parser.add_argument("--steps", type=positive, help="student steps instead of the recipe's")
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 9m")
    parser.add_argument("--resume", type=Path, metavar="STATE", help="a state of OUT/checkpoints other than the latest")
    parser.add_argument("--sweep", action="store_true", help="short runs over the fake score's rate and the CA weight")
    parser.add_argument(
        "--ablate", action="store_true", help="short runs without parts of the recipe, three seeds each"
    )
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="train nothing; write the best student as a checkpoint"
    )
    parser.add_argument("--print-config", action="store_true", help="print every field, and why where it is open")
    parser.add_argument("--dry-run", action="store_true", help="print the memory of all networks; needs no GPU")
    parser.add_argument("--world", type=positive, default=8, help="processes that --dry-run assumes (default: 8)")
    parser.add_argument("--gpu", default="a100", choices=sorted(cost.GPUS), help="GPU of --dry-run (default: a100)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--shard", type=positive, help="ranks that hold one copy of the state (default: at most SHARD)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read shards ahead of time (default: 0)")


def as_given(options: argparse.Namespace) -> ModuleType:
    """The recipe with the MMDiT of the checkpoint and the LoRA asked for. Errors: ValueError."""
    recipe: Any = configs.override(configs.load(options.config, STAGE), options.set)
    options.adapter = None  # the one that the teacher is, if it is one
    if options.init is not None:
        options.init = resolve(options.init)
        path = options.init / "transformer" / "config.json"
        if is_adapter(options.init):
            options.adapter, options.init = options.init, options.out / "teacher"
            path = base_of(options.adapter) / "transformer" / "config.json"
        if not path.is_file():
            raise ValueError(f"distill --init {options.init}: expected a checkpoint folder in the released layout")
        recipe.MODEL = vars(transformer_config(read_json(path), str(path)))
    if options.lora:
        recipe.LORA = str(parse_lora(options.lora))
    check(recipe)
    return recipe


def run(options: argparse.Namespace) -> int:
    recipe = as_given(options)
    if options.print_config:
        print(configs.describe(recipe))
        return 0
    if options.dry_run:
        print(cost.distillation_dry_run(recipe, options.world, options.shard, options.gpu))
        return 0
    if options.init is None:
        raise ValueError("distill: expected --init CHECKPOINT, the teacher's folder in the released layout")
    torch.set_num_threads(options.threads)
    if options.export:
        make_whole(options)
        export(options, recipe)
        return 0
    with ranks.join(options.device, options.shard, most=recipe.SHARD) as group:
        if group.main:
            make_whole(options)
        group.barrier()
        if options.sweep:
            sweep(options, recipe, group)
        elif options.ablate:
            ablate(options, recipe, group)
        else:
            train(options, recipe, group, options.out, options.steps or recipe.STEPS, Clock(options.stop_after))
    return 0


def make_whole(options: argparse.Namespace) -> None:
    """OUT/teacher, where the teacher is an adapter: its sum with the base."""
    if options.adapter is not None:
        made_whole(options.adapter, options.init)


def stream_of(
    options: argparse.Namespace, recipe: ModuleType, group: Ranks
) -> tuple[Any, Callable[[Any], Iterator[ShardBatch]], list[ShardBatch], list[Scene], Decode | None, list[str]]:
    """(place in the stream, batches from a place on, held-out batches, their scenes, decoder, names of the buckets).

    Errors: ValueError where the recipe has no scenes and there is no --data.
    """
    dtype = flow.DTYPES[recipe.COMPUTE]
    tokenizer, codec, text = encoders.released(options.init, group.device, dtype)
    if hasattr(recipe, "SCENES"):
        if options.data is not None or group.world > 1:
            raise ValueError("distill: a recipe with SCENES reads no --data and runs on one process")
        from .networks.generator import Painter

        world = World("train", recipe.TASKS, recipe.CLASSES, recipe.CAPTIONS, recipe.PHOTOGRAPHS)
        fast = encoders.MiniLatents(options.init / "vae")
        fast.latents.straighten(world, 64, recipe.STRAIGHTEN)  # a convolution has no size: small scenes find it
        pool = ScenePool(recipe, world, tokenizer, fast, text)
        held, scenes = pool.held_out(HELD_OUT, recipe.WATCHED)
        names = [bucket.name for bucket in pool.buckets]
        return (
            (lambda step: {"step": step}),
            lambda at: pool.batches(at["step"]),
            held,
            scenes,
            Painter(options.init / "vae"),
            names,
        )
    if options.data is None:
        raise ValueError(f"distill: expected --data SHARDS for {recipe.__name__.removeprefix('train.configs.')}")
    check_once_per_node([options.data, *([options.validate] if options.validate else [])], group)
    shards = ShardSet(options.data)
    members = BucketSampler(flow.bucket_sizes(recipe, shards), flow.law_of(recipe), recipe.SEED, recipe.SLOTS)
    loader = Loader(shards, members, tokenizer, 0.0, options.workers, pin=group.device.type == "cuda")
    encode = Encode(codec, text, group.device, shards)

    def batches(at: Any) -> Iterator[ShardBatch]:
        return encode.ahead(loader.batches(at if "data" in at else at["step"], group.rank, group.world))

    held = []
    if options.validate is not None:
        unseen, encoder = validation_loader(recipe, options.validate, shards, tokenizer, encode)
        found = unseen.batches(0)
        while sum(len(batch.lengths) for batch in held) < recipe.WATCHED:
            held.append(encoder(next(found)))
    return loader.state, batches, held, [], released_decoder(codec), [bucket.name for bucket in members.buckets]


@dataclass(frozen=True)
class Setting:
    """What the runs of a seed share: the stream of pictures and captions, the frozen teacher, what is held out."""

    place: Any  # step -> place in the stream
    batches: Callable[[Any], Iterator[ShardBatch]]
    kinds: Sequence[str]
    teacher: nn.Module
    held_out: HeldOut | None


def objective_of(options: argparse.Namespace, recipe: ModuleType) -> Distillation:
    """The losses of a recipe, by the checkpoint's schedule. Errors: ValueError for one that is distilled itself."""
    index = read_defaults(options.init, None, options.init.resolve().name)
    if index.distilled:
        raise ValueError(f"distill --init {options.init}: is distilled itself; expected the guided teacher")
    scheduler = student_scheduler(recipe, options.init)
    return Distillation(recipe, flow.model_of(recipe), scheduler, index.time_dtype, flow.DTYPES[recipe.COMPUTE])


def setting_of(options: argparse.Namespace, recipe: ModuleType, group: Ranks) -> Setting:
    """Errors: ValueError for a teacher whose guidance changes nothing, see the command's help for others."""
    objective = objective_of(options, recipe)
    data, batches, held, scenes, decode, kinds = stream_of(options, recipe, group)
    teacher = teacher_of(recipe, group, options.init)
    held_out = HeldOut(objective, teacher, held, decode, scenes) if held else None
    if held:
        felt = response(objective, teacher, held[0])
    else:
        with closing(batches({"step": 0})) as first:  # type: ignore[type-var]
            felt = response(objective, teacher, next(first))
    if felt < LEAST_RESPONSE:
        raise ValueError(
            f"distill --init {options.init}: |v_c - v_u| / |v_c| is {felt:.2g}, expected at least {LEAST_RESPONSE}: this "
            "teacher does not respond to guidance, and there is nothing to distil of it"
        )
    return Setting(data, batches, kinds, teacher, held_out)


def train(
    options: argparse.Namespace,
    recipe: ModuleType,
    group: Ranks,
    out: Path,
    steps: int,
    clock: Clock,
    setting: Setting | None = None,
    start: Path | None = None,
    turns: int | None = None,
) -> tuple[Distil, bool]:
    """Distil until so many student steps, the clock or a rule: the method as it ended, and whether by steps or a rule. A training
    that a rule ended stays ended, unless a state is named by --resume. setting: of runs before, with this seed. start: a state,
    of whatever fields, to go on from where OUT has none. turns: end after so many optimiser steps. Errors: ValueError, see the
    command's help."""
    objective = objective_of(options, recipe)
    setting = setting or setting_of(options, recipe, group)
    held_out = setting.held_out
    states = Checkpoints(out / "checkpoints", group, recipe.KEEP_LAST, recipe.KEEP_EVERY)
    best = Checkpoints(out / "best", group, 1)
    networks = networks_of(recipe, group, options.init)
    method = Distil(recipe, group, networks, setting.teacher, objective, setting.kinds, held_out, best)
    settings = configs.fields(recipe) | {"INIT": base_name(options.adapter or options.init)}
    method.settings = settings
    trainer = Trainer(method.plan(steps), method, states, out, group, settings)
    at: dict[str, Any] = {"step": 0}
    if (folder := options.resume or states.latest() or start) is not None:
        told = refuse_another(settings, read_state(folder)["settings"])
        if group.main and told and folder != start:
            print(*(f"distill: {line}" for line in told), sep="\n", flush=True)
        with frozen_kept(method.networks.values()):
            at = trainer.resume(folder)["data"]
        if options.resume:
            method.ended = []
    if group.main:
        out.mkdir(parents=True, exist_ok=True)
        if held_out is None:
            print("distill: without --validate nothing is watched, and the last student is taken", flush=True)
    group.barrier()
    if not method.ended:
        trainer.run(setting.batches(at), RuledClock(clock, method), setting.place, turns)
    if group.main:
        for line in method.ended:
            print(f"distill: ended at student step {method.student_step(trainer.step)}: {line}", flush=True)
        if method.best["step"] >= 0:
            print(
                f"best: worth {method.best['worth']:.4f} at optimiser step {method.best['step']:.0f}, in {best.folder}",
                flush=True,
            )
    return method, bool(method.ended) or trainer.step >= (turns or trainer.plan.steps)


def refuse_another(settings: Mapping[str, Any], held: Mapping[str, Any]) -> list[str]:
    """What a training does otherwise than its state says, a line each. Errors: ValueError where it would be another training:
    of FIXED, and of all weights, which hold none of the teacher's, INIT."""
    now = json.loads(json.dumps(settings))
    shared = [name for name in now if name in held] + ["LORA"]  # states of before lack some
    differ = {name: (held.get(name), now.get(name)) for name in shared if held.get(name) != now.get(name)}
    for name in FIXED if "LORA" in held else (*FIXED, "INIT"):
        if name in differ:
            before, asked = ("none" if value is None else value for value in differ[name])
            raise ValueError(f"{name} {asked}: this training has {before}")
    return [f"{name} was {before!r}, is {asked!r}" for name, (before, asked) in differ.items()]


@contextmanager
def frozen_kept(networks: Iterable[Network]) -> Iterator[None]:
    """Whatever is loaded inside, what does not learn is afterwards as it was before."""
    kept = []
    for network in networks:
        learning = set(network.parameters.values())
        kept += [(p, p.detach().clone()) for p in ranks.bare(network.module).parameters() if p not in learning]
    yield
    with torch.no_grad():
        for p, value in kept:
            p.copy_(value)


def student_scheduler(recipe: ModuleType, folder: Path) -> Scheduler:
    """The checkpoint's, which adds noise between steps where the student was trained so."""
    found = load_scheduler(folder / "scheduler")
    return Scheduler(found.use_dynamic_shifting, found.shift, recipe.STUDENT_SAMPLER == "renoise")


# ------------------------------------------------------------------------------------------------ sweep and export


def guided_once(
    options: argparse.Namespace, recipe: ModuleType, group: Ranks, setting: Setting, clock: Clock
) -> Path | None:
    """The state behind GUIDED_STEPS, in which none of the fields act that the short runs of a seed differ by: trained once, into
    OUT/guided_SEED. None where the clock ended it."""
    out = options.out / f"guided_{recipe.SEED}"
    states = Checkpoints(out / "checkpoints", group)
    if (found := states.latest()) is None or step_of(found) < recipe.GUIDED_STEPS:
        if not train(options, recipe, group, out, 0, clock, setting, turns=recipe.GUIDED_STEPS)[1]:
            return None
        found = states.latest()
    return found


def short_run(
    options: argparse.Namespace,
    recipe: ModuleType,
    changes: Sequence[str],
    group: Ranks,
    out: Path,
    setting: Setting,
    clock: Clock,
) -> tuple[Distil, dict[str, Any]] | None:
    """SWEEP_STEPS of the student with these fields, from the guided steps of the seed: the method as it ended, and the last
    check's numbers. None where the clock ended it, which is the table's."""
    own = configs.override(recipe, list(changes))
    if hasattr(recipe, "LORA"):
        vars(own)["LORA"] = recipe.LORA
    start = guided_once(options, recipe, group, setting, clock) if recipe.GUIDED_STEPS else None
    if recipe.GUIDED_STEPS and start is None:
        return None
    method, whole = train(options, own, group, out, options.steps or SWEEP_STEPS, clock, setting, start)
    if not whole:
        return None
    rows = read_log(out / "log.jsonl")
    return method, next((row for row in reversed(rows) if "deviation" in row and "drift" in row), {})


def cut(options: argparse.Namespace, lines: Sequence[str], group: Ranks) -> None:
    """What there is of a table that the clock ended."""
    if group.main:
        print("\n".join([*lines, f"distill: not all of the runs in {options.out}; the same command goes on"]))


def sweep(options: argparse.Namespace, recipe: ModuleType, group: Ranks) -> None:
    """Short runs at every pair of factors on FAKE_LR and CA_WEIGHT, into OUT/sweep.md when all of them are done; resumes within a
    run."""
    pairs = [(a, b) for a in SWEEP["FAKE_LR"] for b in SWEEP["CA_WEIGHT"]][:MOST_RUNS]
    lines = ["| fake rate | CA weight | best worth | at | " + " | ".join(SHOWN) + " | ended by |"]
    lines.append("|" + "---|" * (5 + len(SHOWN)))
    clock, setting = Clock(options.stop_after), setting_of(options, recipe, group)
    for rate, weight in pairs:
        values = f"{recipe.FAKE_LR * rate:g}", f"{recipe.CA_WEIGHT * weight:g}"
        out = options.out / "sweep" / f"fake_{values[0]}_ca_{values[1]}"
        changes = [f"FAKE_LR={values[0]}", f"CA_WEIGHT={values[1]}"]
        found = short_run(options, recipe, changes, group, out, setting, clock)
        if found is None:
            return cut(options, lines, group)
        method, last = found
        best = [f"{method.best['worth']:.4f}", str(method.student_step(int(method.best["step"])))]
        ended = ", ".join(line.split(" is ")[0] for line in method.ended) or "-"
        shown = [f"{last[n]:.3g}" if n in last else "-" for n in SHOWN]
        lines.append("| " + " | ".join([*values, *best, *shown, ended]) + " |")
    if group.main:
        write_text(options.out / "sweep.md", "\n".join(lines) + "\n")
        print("\n".join(lines))


def ablate(options: argparse.Namespace, recipe: ModuleType, group: Ranks) -> None:
    """Short runs of every arm of ABLATION at SEEDS seeds, into OUT/ablation.md when all of them are done: the mean of the last
    check's numbers, and the lowest and highest seed; resumes within a run."""
    lines = ["| arm | seeds | " + " | ".join(SHOWN) + " |", "|" + "---|" * (2 + len(SHOWN))]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ABLATION}
    clock = Clock(options.stop_after)
    for seed in range(recipe.SEED, recipe.SEED + SEEDS):
        seeded = configs.override(recipe, [f"SEED={seed}"])
        if hasattr(recipe, "LORA"):
            vars(seeded)["LORA"] = recipe.LORA
        setting = setting_of(options, seeded, group)
        for arm, changes in ABLATION.items():
            out = options.out / "ablation" / f"{arm.strip('+ ').replace(' ', '_').replace('+', 'and')}_{seed}"
            ended = short_run(options, seeded, changes, group, out, setting, clock)
            table = [row_of(name, rows) for name, rows in found.items() if rows]
            if ended is None:
                return cut(options, [*lines, *table], group)
            found[arm].append(ended[1])
    if group.main:
        table = [row_of(name, rows) for name, rows in found.items()]
        write_text(options.out / "ablation.md", "\n".join([*lines, *table]) + "\n")
        print("\n".join([*lines, *table]))


def row_of(arm: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A line of the table: of each of SHOWN the mean, and the range where there are several seeds."""
    cells = []
    for name in SHOWN:
        values = [row[name] for row in rows if name in row]
        spread = f" ({min(values):.3g} .. {max(values):.3g})" if len(values) > 1 else ""
        cells.append(f"{sum(values) / len(values):.3g}{spread}" if values else "-")
    return "| " + " | ".join([arm, str(len(rows)), *cells]) + " |"


def as_trained(options: argparse.Namespace, recipe: ModuleType, settings: Mapping[str, Any]) -> ModuleType:
    """The recipe with what a state says of itself. Errors: ValueError where an option says otherwise."""
    trained: Any = configs.override(recipe, [])
    given = {text.partition("=")[0].strip() for text in getattr(options, "set", ())}
    given |= {"LORA"} if getattr(options, "lora", None) else set()
    asked = json.loads(json.dumps(configs.fields(recipe)))
    init = base_name(options.adapter or options.init)
    if (before := settings.get("INIT", init)) != init and "LORA" not in settings:
        raise ValueError(f"--init {init}: this training has {before}")
    for name in [*asked, "LORA"] if settings else ():
        value = settings.get(name)
        if name in given and asked.get(name) != value:
            raise ValueError(f"{name} {asked.get(name)}: this training has {'none' if value is None else value}")
        if name in FIXED and value is not None:
            setattr(trained, name, value)
    return trained


def export(options: argparse.Namespace, recipe: ModuleType) -> None:
    """The best student, or without a score or within GUIDED_STEPS the last average, as a checkpoint folder beside the teacher's
    other parts.

    Its metadata says the student's sampler, steps and grid, which the pipeline obeys. With --lora: FOLDER/lora, too, a model of
    its own that names its base, made of the adapter rounded to bfloat16 as the whole checkpoint is.
    """
    best, states = (Checkpoints(options.out / part, ALONE) for part in ("best", "checkpoints"))
    found, last = best.latest(), states.latest()
    about_last = read_state(last) if last is not None else None
    if found is not None and about_last is not None:
        chosen = about_last["watch"]["best"]
        if chosen is None or chosen["step"] != step_of(found):
            found = None  # of a branch that was left, or of the guided steps
    if (where := found or last) is None:
        raise FileNotFoundError(f"{states.folder}: no state of a training here")
    settings = read_state(where)["settings"] or (about_last or {}).get("settings", {})  # best ones of before have none
    recipe = as_trained(options, recipe, settings)
    with torch.device("meta"):
        model = Denoiser(flow.model_of(recipe))
    model.to_empty(device="cpu")
    if lora := lora_of(recipe):
        attach_lora(model, lora)
    if found is not None:
        best.load(found, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    else:
        names = {
            f"{'ema' if p.requires_grad else 'model'}.student.{n}": p.detach() for n, p in model.named_parameters()
        }
        states.load(where, names)
        if step_of(where) < recipe.GUIDED_STEPS:
            print(
                f"distill --export: {where} is at a step of {recipe.GUIDED_STEPS} guided ones whose rate has not fallen yet: train on"
            )
    folder: Path = options.export
    if lora:
        round_lora(model, torch.bfloat16)
        save_lora(model, lora, folder / "lora", torch.bfloat16, base_name(options.init))
        if options.adapter is not None:  # the base has neither: both as one
            both = joined(options.adapter, folder / "lora")
            rank = len(next(iter(both.values()))[0])
            targets = "all" if any("_mlp." in module for module in both) else "attention"
            base = read_json(options.adapter / CONFIG)["base_model_name_or_path"]
            write_lora(both, Lora(rank, rank, targets), folder / "lora", torch.bfloat16, base)
        merge_lora(model)
    if folder.resolve() != options.init.resolve():
        shutil.copytree(options.init, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_ITS_OWN, MADE_OF))
    save_transformer(model, folder / "transformer", torch.bfloat16)
    write_json(
        folder / "scheduler" / "scheduler_config.json", released_scheduler(student_scheduler(recipe, options.init))
    )
    about = dict(read_index(options.init).get("lens", {}))
    about.pop("validation", None)  # the teacher's
    about |= {"variant": "turbo", "num_inference_steps": recipe.STUDENT_STEPS, "guidance_scale": 1.0}
    name = str(about.get("name", "Lens"))
    about["name"] = f"{name.removesuffix('-RL')}-Turbo"
    about["distilled"] = {"sampler": recipe.STUDENT_SAMPLER, "steps": recipe.STUDENT_STEPS, "grid": recipe.GRID}
    made = settings or configs.fields(recipe)
    made = made | {"INIT": base_name(options.adapter or options.init), "STEP": step_of(where)}
    earlier = read_json(options.init / "recipe.json") if (options.init / "recipe.json").is_file() else {}
    for place in (folder, folder / "lora") if lora else (folder,):
        write_json(place / "model_index.json", released_index(about))
        write_json(place / "recipe.json", earlier | {STAGE: made})
        if (options.out / "log.jsonl").is_file():
            write_text(place / f"{STAGE}.jsonl", (options.out / "log.jsonl").read_text(encoding="utf-8"))
    print(f"{where} is exported: {folder}")


def base_name(folder: Path) -> str:
    """What a model is called that another was made of: a shipped one by its name, any other by its folder."""
    inside = Path(lens.__file__).parent / "mini"
    names = {inside / part: name for name, part in EMBEDDED.items() if name != "mini"}
    return names.get(folder.resolve(), str(folder))
