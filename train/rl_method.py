"""DiffusionNFT as a `Method` of the one loop: rollouts of the old policy, a judge, and the loss of every slot.

An iteration draws GROUPS prompts x GROUP pictures with the old adapter, judges them, turns rewards into r, and takes INNER_STEPS
optimiser steps on them; then old <- eta old + (1 - eta) theta. Three adapter sets: the one that trains (default), "old", a kept
copy that draws and that v_old comes from, and the running average, which is validated, drawn and shipped; the reference is
the model with no adapter in force.

Picture j of an iteration belongs to group j // GROUP and to slot j % SLOTS, so that a group is spread over all slots and ranks;
what happens in a slot is keyed by (seed, purpose, iteration, j). Rewards are gathered and transformed on every rank alike. An
iteration is a function of the old adapters and its number: a resume inside one draws it again, to the same bits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lens.packing import Grid
from lens.resolution import TOKEN_PIXELS, bucket_size

from .data.contact_sheet import contact_sheet
from .data.prompts import Prompt
from .loop.clock import Interrupted
from .loop.ema import Ema
from .loop.keys import keyed
from .loop.lora import NO_LORA, lora_layers
from .loop.method import About, Losses, Method, Network, Plan, adamw
from .loop.ranks import Ranks, bare
from .objectives import nft
from .rewards import diversity
from .rewards.judge import Judge, Scores
from .rollout import Rollouts, Texts

OLD = "old"  # the adapter that draws
Decode = Callable[[Tensor, Grid], np.ndarray]  # latents [I, C] of one picture -> uint8 [H, W, 3]


class Watch(Protocol):
    """What the small world knows of pictures beside their score. None of it but `look` is ever in the reward."""

    def kind(self, rubric: str) -> str:
        """What a rubric asks about, for pass rates."""

    def look(self, picture: np.ndarray) -> diversity.Look:
        """What tells a picture apart from the others of its group."""

    def independent(self, pictures: Sequence[np.ndarray], places: Sequence[int]) -> list[dict[str, float]]:
        """Numbers of pictures of the held-out prompts at these places, by judges that are not in the reward."""


@dataclass(frozen=True)
class Held:
    """Prompts that choose a checkpoint: neither trained on nor reported."""

    prompts: Sequence[str]
    rubrics: Sequence[Sequence[str]]
    bases: Sequence[int]  # of each, at which it is drawn as a square


@dataclass
class Sample:
    """A picture of an iteration. index: j; latents float32 [I, C]."""

    index: int
    prompt: Prompt
    grid: Grid
    latents: Tensor
    features: Tensor
    r: float = 0.5
    valid: bool = True


@dataclass
class Micro:
    """A slot's samples in one optimiser step, and the numbers of the whole iteration."""

    step: int
    slot: int
    samples: list[Sample]
    numbers: dict[str, float]


@dataclass
class Judged:
    """A slot's judgement, without its pictures: small enough to be sent to every rank. kinds: of each picture's specific rubrics."""

    indices: list[int]
    scores: Scores
    looks: list[diversity.Look]
    sharpness: list[float]
    kinds: list[list[str]]


def indices_of(recipe: ModuleType, slot: int) -> list[int]:
    """The pictures of a slot."""
    return list(range(slot, recipe.GROUPS * recipe.GROUP, recipe.SLOTS))


def grids_of(base: int, aspects: Sequence[str]) -> list[Grid]:
    """Sizes in tokens (height, width) of the aspect ratios of a base."""
    sizes = [bucket_size(base, aspect) for aspect in aspects]
    return [(height // TOKEN_PIXELS, width // TOKEN_PIXELS) for height, width in sizes]


def grid_of(recipe: ModuleType, iteration: int, slot: int, group: int) -> Grid:
    """A picture's size. Its aspect ratio is its slot's, each as often as the others over an iteration's slots, in a random order;
    its base is its group's, whose rewards compare then; bases take turns."""
    grids = grids_of(recipe.BASES[(iteration + group) % len(recipe.BASES)], recipe.ASPECTS)
    order = torch.randperm(len(grids), generator=keyed(recipe.SEED, "aspects", iteration)).tolist()
    return grids[order[slot % len(order)]]


def prompts_of(recipe: ModuleType, iteration: int, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The GROUPS prompts of an iteration: epochs of the set, each in an order of its own."""
    found = []
    for position in range(iteration * recipe.GROUPS, (iteration + 1) * recipe.GROUPS):
        epoch, place = divmod(position, len(prompts))
        found.append(prompts[int(_order(recipe.SEED, epoch, len(prompts))[place])])
    return found


def _order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=keyed(seed, "prompts", epoch))


class Nft(Method):
    """model: as `ranks.wrap` gave it, with "old" kept. watch: None where nothing but the judge can see pictures."""

    def __init__(
        self,
        recipe: ModuleType,
        model: nn.Module,
        group: Ranks,
        rollouts: Rollouts,
        texts: Texts,
        decode: Decode,
        judge: Judge,
        prompts: Sequence[Prompt],
        global_rubric: str,
        held: Held | None = None,
        watch: Watch | None = None,
    ):
        if recipe.DIVERSITY_WEIGHT and watch is None:
            raise ValueError("DIVERSITY_WEIGHT: expected 0 where no local network tells backdrops apart")
        if recipe.NEUTRAL and watch is None:
            raise ValueError("NEUTRAL: expected () where no local network tells backdrops apart")
        self.recipe, self.model, self.group, self.rollouts, self.texts = recipe, model, group, rollouts, texts
        self.decode, self.judge, self.prompts, self.global_rubric = decode, judge, list(prompts), global_rubric
        self.held, self.watch = held, watch
        whole = bare(model)
        trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
        optimizer = adamw(trained, recipe.LR, recipe.BETAS, recipe.WEIGHT_DECAY, recipe.EPS)
        average = Ema(whole, recipe.EMA, trained_only=True)
        average.updates = 1  # the first decay is 2 / 11, as in the official code
        self.networks = {"model": Network(model, optimizer, average)}
        self.start: dict[str, float] = {}  # of the first iterations, which the stop rules compare with
        self.recent: deque[dict[str, float]] = deque(maxlen=recipe.WINDOW)
        self.follows = True  # whether old is theta, to the bit; a step that is skipped copies nothing
        self.step = 0

    def plan(self) -> Plan:
        recipe = self.recipe
        return Plan(
            "rl",
            recipe.STEPS,
            recipe.WARMUP,
            recipe.DECAY,
            cosine=recipe.COSINE,
            clip=recipe.CLIP,
            slots=recipe.SLOTS,
            skip_limit=recipe.SKIP_LIMIT,
            log_every=recipe.LOG_EVERY,
            validate_every=recipe.VALIDATE_EVERY,
            validate_first=True,
            save_every=recipe.SAVE_EVERY,
        )

    # -------------------------------------------------------------------------------------------- an iteration

    def batches(self) -> Iterator[Micro]:
        """This rank's slots of step after step, from where the training stands. No rollout begins before the update it follows."""
        while True:
            iteration = self.step // self.recipe.INNER_STEPS
            slots, numbers = self.iteration(iteration)
            for step in range(self.step, (iteration + 1) * self.recipe.INNER_STEPS):
                for slot, samples in slots.items():
                    yield Micro(step, slot, samples, numbers)
            self.step = (iteration + 1) * self.recipe.INNER_STEPS

    def iteration(self, iteration: int) -> tuple[dict[int, list[Sample]], dict[str, float]]:
        """Draw, judge and gather: this rank's slots, and the numbers of all. Errors: Interrupted by a stop rule, or where too many
        judgements failed."""
        recipe, group = self.recipe, self.group
        asked = prompts_of(recipe, iteration, self.prompts)
        slots: dict[int, list[Sample]] = {}
        waiting: list[Future[Judged]] = []
        with ThreadPoolExecutor(1) as pool:
            for slot in range(group.rank, recipe.SLOTS, group.world):
                slots[slot] = self.drawn(iteration, slot, asked)
                waiting.append(self._submitted(pool, slots[slot]))
            judged = [one.result() for one in waiting]
        every = [one for own in group.gather(judged) for one in own]
        rewards, numbers = self.rewards(sorted(every, key=lambda one: one.indices[0]), iteration)
        for samples in slots.values():
            for sample in samples:
                sample.r, sample.valid = float(rewards.r[sample.index]), bool(rewards.valid[sample.index])
        if not self.start:
            self.start = {name: numbers[name] for name in recipe.STOP if name in numbers}
        newest = {name: numbers[name] for name in self.start}
        self.stop_rules([*self.recent, newest][-recipe.WINDOW :])
        self.recent.append(newest)  # behind the rules: one that ends the run leaves an iteration to be drawn again
        return slots, numbers

    def _submitted(self, pool: Executor, samples: list[Sample]) -> Future[Judged]:
        """A slot's judgement, by the other thread while the next slot is drawn, or at once."""
        if self.recipe.ROLLOUT_OVERLAP:
            return pool.submit(self.judged, samples)
        done: Future[Judged] = Future()
        done.set_result(self.judged(samples))
        return done

    def drawn(self, iteration: int, slot: int, asked: Sequence[Prompt]) -> list[Sample]:
        """A slot's pictures by the old policy."""
        recipe, channels = self.recipe, self.rollouts.model.config.in_channels
        indices = indices_of(recipe, slot)
        prompts = [asked[j // recipe.GROUP] for j in indices]
        grids = [grid_of(recipe, iteration, slot, j // recipe.GROUP) for j in indices]
        noise = [
            torch.randn(h * w, channels, generator=keyed(recipe.SEED, "rollout", iteration, j))
            for j, (h, w) in zip(indices, grids)
        ]
        features = self.texts([prompt.prompt for prompt in prompts])
        latents = self.rollouts(features, grids, noise, OLD)
        return [Sample(*one) for one in zip(indices, prompts, grids, latents, features)]

    @torch.no_grad()
    def judged(self, samples: Sequence[Sample]) -> Judged:
        pictures = [self.decode(sample.latents, sample.grid) for sample in samples]
        prompts = [sample.prompt for sample in samples]
        scores = self.judge.score(
            [p.prompt for p in prompts], [(*p.rubrics, self.global_rubric) for p in prompts], pictures
        )
        look = self.watch.look if self.watch is not None else bare_look
        sharpness = [diversity.sharpness(picture) for picture in pictures]
        looks, kinds = [look(p) for p in pictures], [self.rubric_kinds(p) for p in prompts]
        return Judged([sample.index for sample in samples], scores, looks, sharpness, kinds)

    def rubric_kinds(self, prompt: Prompt) -> list[str]:
        """Of its specific rubrics: what the watch calls them, or else the prompt's category."""
        if self.watch is None:
            return [prompt.category] * len(prompt.rubrics)
        return [self.watch.kind(rubric) for rubric in prompt.rubrics]

    def rewards(self, judged: Sequence[Judged], iteration: int) -> tuple[nft.Optimality, dict[str, float]]:
        """r of every picture of an iteration, and its numbers, from the judgements of all slots."""
        recipe, count = self.recipe, self.recipe.GROUPS * self.recipe.GROUP
        groups = [j // recipe.GROUP for j in range(count)]
        score, valid = np.full(count, np.nan), np.zeros(count, bool)
        looks: list[Any] = [None] * count
        reasons: list[str] = []
        for one in judged:
            score[one.indices], valid[one.indices] = one.scores.score, one.scores.valid
            for j, look, why, good in zip(one.indices, one.looks, one.scores.reasons, one.scores.valid):
                looks[j] = look
                reasons += [] if good else why[:1]
        if (failed := float(1 - valid.mean())) > recipe.MOST_FAILURES:
            raise Interrupted(
                f"rl: {failed:.0%} of {count} judgements failed, more than MOST_FAILURES = {recipe.MOST_FAILURES:.0%}: "
                f"{common(reasons)}"
            )
        different = diversity.rewards(looks, groups) if self.watch is not None else np.zeros(count)
        factors = [[getattr(look, name) for look in looks] for name in recipe.NEUTRAL]
        fair = diversity.neutral(score, valid, groups, factors, recipe.NEUTRAL_SHRINK)
        total, known = torch.from_numpy(fair + recipe.DIVERSITY_WEIGHT * different), torch.from_numpy(valid)
        if recipe.SHUFFLE:
            order = shuffled(recipe, iteration)
            total, known = total[order], known[order]
        found = nft.optimality(
            total,
            torch.tensor(groups),
            known,
            recipe.Z_SCALE,
            recipe.RECENTRE,
            recipe.MASK_DEGENERATE,
        )
        numbers = dict(found.numbers) | {
            "score": float(np.nanmean(score)),
            "score_sd": float(np.nanstd(score)),
            "group_diversity": diversity.spread(looks, groups),
            "sharpness": float(np.mean([value for one in judged for value in one.sharpness])),
        }
        if self.watch is not None:
            numbers["diversity_reward"] = float(different.mean())
            numbers["taken_off_sd"] = float(np.nanstd(score - fair))
            numbers["effective_backdrops"] = diversity.effective_number([look.backdrop for look in looks])
        return found, numbers | passed(judged)

    def stop_rules(self, recent: Sequence[Mapping[str, float]]) -> None:
        """Errors: Interrupted where the mean of the last WINDOW iterations is below its share of the first ones'."""
        if len(recent) < self.recipe.WINDOW:
            return
        for name, share in self.recipe.STOP.items():
            if name in self.start:
                now = float(np.mean([numbers[name] for numbers in recent]))
                if now < share * self.start[name]:
                    raise Interrupted(
                        f"rl: {name} {now:.3g} over the last {self.recipe.WINDOW} iterations is below {share:g} x "
                        f"{self.start[name]:.3g}, what it began with (STOP)"
                    )

    # -------------------------------------------------------------------------------------------- the loss

    def nodes(self, sample: Sample, step: int) -> Tensor:
        """The TIMES nodes of its own schedule at which a picture is trained in this step; other ones in every inner step."""
        recipe = self.recipe
        iteration, inner = divmod(step, recipe.INNER_STEPS)
        nodes = self.rollouts.sigmas(sample.grid)[:-1]
        order = torch.randperm(len(nodes), generator=keyed(recipe.SEED, "nodes", iteration, sample.index))
        return nodes[order[torch.arange(inner * recipe.TIMES, (inner + 1) * recipe.TIMES) % len(nodes)]]

    def noise(self, sample: Sample, step: int, place: int) -> Tensor:
        index = sample.index * self.recipe.TIMES + place
        return torch.randn(sample.latents.shape, generator=keyed(self.recipe.SEED, "nft noise", step, index))

    def about(self, batch: Micro) -> About:
        samples = batch.samples
        tokens = sum(len(s.latents) for s in samples) * self.recipe.TIMES
        return About(
            samples=len(samples),
            weight=float(sum(s.valid for s in samples)),
            place=(batch.step, batch.slot),
            image_tokens=tokens,
            text_tokens=sum(len(s.features) for s in samples) * self.recipe.TIMES,
            seen={"prompts": [s.prompt.id for s in samples], "pictures": [s.index for s in samples]},
        )

    def losses(self, batch: Micro, step: int) -> dict[str, Losses]:
        """All times of all pictures of a slot in one packed forward: (z_scale / beta) NFT + kl_weight |v_theta - v_ref|^2."""
        recipe, device = self.recipe, self.group.device
        samples = [s for s in batch.samples if s.valid] or batch.samples
        rows = [(s, t, k) for s in samples for k, t in enumerate(self.nodes(s, step))]
        sigma = torch.stack([t for _, t, _ in rows])
        lengths = [len(s.latents) for s, _, _ in rows]
        clean = torch.cat([s.latents for s, _, _ in rows])
        noise = torch.cat([self.noise(s, step, k) for s, _, k in rows]).to(device)
        time = sigma.repeat_interleave(torch.tensor(lengths))[:, None].to(device)
        x, target = (1 - time) * clean + time * noise, noise - clean
        features, grids = [s.features for s, _, _ in rows], [s.grid for s, _, _ in rows]

        def velocity(model: nn.Module, adapter: str | None) -> Tensor:
            return self.rollouts.velocity(model, x, sigma, features, grids, adapter)

        # finished before v_theta begins, and each under the adapter that its call names
        follows = self.follows and recipe.ETA == 0 and step % recipe.INNER_STEPS == 0  # old is theta, to the bit
        with torch.no_grad():
            v_old = None if follows else velocity(bare(self.model), OLD)
            v_ref = velocity(bare(self.model), NO_LORA)
        v_theta = velocity(self.model, None)
        v_old = v_theta.detach() if v_old is None else v_old
        r = torch.tensor([s.r for s, _, _ in rows], device=device)
        values = nft.losses(v_theta, v_old, target, r, sigma.to(device), lengths, recipe.NFT_BETA, recipe.ADAPTIVE)
        drift = nft.squared_distance(v_theta, v_ref, lengths)
        values = recipe.Z_SCALE / recipe.NFT_BETA * values + recipe.KL_WEIGHT * drift
        terms = {name: torch.tensor(value, device=device) for name, value in batch.numbers.items()}
        terms |= {"kl": drift.detach().mean()}
        terms |= {"old_distance": nft.squared_distance(v_theta.detach(), v_old, lengths).mean()}
        return {"model": Losses(values, times=sigma.to(device), terms=terms)}

    @torch.no_grad()
    def after(self, step: int) -> None:
        """old <- eta old + (1 - eta) theta behind the last step of an iteration."""
        self.follows = False
        if (step + 1) % self.recipe.INNER_STEPS:
            return
        eta = nft.old_decay(self.recipe.ETA, step + 1)
        for _, layer in lora_layers(bare(self.model)):
            for old, own in zip(layer.sides(OLD), (layer.down, layer.up)):
                for target, source in zip(old, own):
                    target.lerp_(source, 1 - eta)
        self.follows = eta == 0

    # -------------------------------------------------------------------------------------------- state and watching

    def state(self) -> dict[str, Any]:
        return {"start": self.start, "recent": list(self.recent), "follows": self.follows}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.step, self.start = state["step"], dict(state["start"])
        self.follows = state.get("follows", True)  # older states do not say
        self.recent = deque(state["recent"], maxlen=self.recipe.WINDOW)
        if self.step % self.recipe.INNER_STEPS and self.recent:
            self.recent.pop()  # the iteration under way is drawn, and counted, again

    @torch.no_grad()
    def pictures(
        self, prompts: Sequence[str], places: Sequence[int], grid: Grid, steps: int, guidance: float
    ) -> list[np.ndarray]:
        """Of the adapter that trains, as it is (averaged where the loop put the average), seed = place."""
        size = grid[0] * grid[1], self.rollouts.model.config.in_channels
        found = []
        for start in range(0, len(places), 16):
            part = places[start : start + 16]
            noise = [torch.randn(size, generator=torch.Generator().manual_seed(place)) for place in part]
            features = self.texts([prompts[place] for place in part])
            latents = self.rollouts(features, [grid] * len(part), noise, None, steps, guidance)
            found += [self.decode(x, grid) for x in latents]
        return found

    def validate(self, step: int) -> dict[str, float]:
        """Score and independent judges on held-out prompts, drawn as in rollouts; every rank draws its share."""
        if self.held is None:
            return {}
        held, group = self.held, self.group
        places = list(range(group.rank, len(held.prompts), group.world))
        drawn: dict[int, np.ndarray] = {}
        for base in sorted(set(held.bases)):
            own, side = [place for place in places if held.bases[place] == base], base // TOKEN_PIXELS
            found = self.pictures(held.prompts, own, (side, side), self.recipe.SAMPLING_STEPS, 1.0)
            drawn |= dict(zip(own, found))
        pictures = [drawn[place] for place in places]
        scores = self.judge.score([held.prompts[i] for i in places], [held.rubrics[i] for i in places], pictures)
        failures = [own[0] if own else "" for own, good in zip(scores.reasons, scores.valid) if not good]
        failures = [reason for own in group.gather(failures) for reason in own]
        if step == 0 and len(failures) > self.recipe.MOST_FAILURES * len(held.prompts):
            raise Interrupted(
                f"rl: {len(failures)} of the first {len(held.prompts)} judgements, of held-out prompts, failed: {common(failures)}"
            )
        look = self.watch.look if self.watch is not None else bare_look
        rows: list[dict[str, Any]] = [
            {"score": float(score), "sharpness": diversity.sharpness(p), "look": look(p), "base": held.bases[place]}
            for score, p, place in zip(scores.score, pictures, places)
        ]
        if self.watch is not None:
            for row, more in zip(rows, self.watch.independent(pictures, places)):
                row |= more
        every = [row for own in group.gather(rows) for row in own]
        names = [name for name in every[0] if name not in ("look", "base")]
        numbers = {f"held_{name}": known_mean([row[name] for row in every]) for name in names}
        numbers["held_invalid_share"] = len(failures) / len(held.prompts)
        if self.watch is not None:
            numbers["held_effective_backdrops"] = diversity.effective_number([row["look"].backdrop for row in every])
        for base in sorted(set(held.bases)) if len(set(held.bases)) > 1 else ():
            own_rows = [row for row in every if row["base"] == base]
            numbers |= {f"held_{name}_{base}": known_mean([row[name] for row in own_rows]) for name in names}
        return numbers

    def draw(self, folder: Path, step: int) -> dict[str, Path]:
        """The fixed prompts with seeds 0, 1, ...: the same noise before, during and after."""
        recipe, group = self.recipe, self.group
        height, width = bucket_size(int(recipe.SHEET["base"]), "1:1")
        places = list(range(group.rank, len(recipe.PROMPTS), group.world))
        grid = height // TOKEN_PIXELS, width // TOKEN_PIXELS
        own = self.pictures(recipe.PROMPTS, places, grid, int(recipe.SHEET["steps"]), float(recipe.SHEET["guidance"]))
        pictures = dict(pair for part in group.gather(list(zip(places, own))) for pair in part)
        path = folder / f"sheet_{step:06d}.png"
        if group.main:
            contact_sheet([pictures[i] for i in sorted(pictures)], list(recipe.PROMPTS), path, columns=8)
        return {"sheet": path}


def shuffled(recipe: ModuleType, iteration: int) -> Tensor:
    """Places of the rewards that the pictures of an iteration get instead of their own: another order within every group."""
    found = [
        group * recipe.GROUP + torch.randperm(recipe.GROUP, generator=keyed(recipe.SEED, "shuffle", iteration, group))
        for group in range(recipe.GROUPS)
    ]
    return torch.cat(found)


def known_mean(values: Sequence[float]) -> float:
    """Mean of those that are no NaN; NaN where none is."""
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else float("nan")


def passed(judged: Sequence[Judged]) -> dict[str, float]:
    """Pass rates, a rubric above 1/2 counting as passed: of all specific ones, of the global one, and of each kind there is."""
    by_kind: dict[str, list[bool]] = {}
    for one in judged:
        for kinds, values in zip(one.kinds, one.scores.per_rubric):
            for names, value in zip([*[("specific", f"of_{kind}") for kind in kinds], ("global",)], values):
                for name in names if np.isfinite(value) else ():
                    by_kind.setdefault(name, []).append(value > 0.5)
    return {f"passed_{name}": float(np.mean(own)) for name, own in by_kind.items()}


def common(reasons: Sequence[str]) -> str:
    """The commonest, with how often it came."""
    if not any(reasons):
        return "no reason given"
    ((reason, count),) = Counter(filter(None, reasons)).most_common(1)
    return reason if count == 1 else f"{count} x {reason}"


def bare_look(picture: np.ndarray) -> diversity.Look:
    """What can be said of a picture without a local network: its thumbnail."""
    return diversity.Look(None, None, diversity.thumbnail(picture))
