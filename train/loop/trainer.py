"""The training loop for one process or many: slots -> gradients -> one optimiser step, watched, saved, resumed.

An optimiser step is SLOTS micro-batches of the global stream, whoever computes them: rank r of W takes the slots r, r + W, ...
one after another. Every draw is keyed by (seed, purpose, step, sample), so one process with 8 slots, two with 4 and eight with
one take the same step up to the order of sums.

The loss of a step is sum_s w_s mean_b l_b / sum_s w_s over its slots s and their pictures b, w_s = 1, B or B n as
`flow_matching.micro_batch_weight` says. The sums go backward; their denominator, known when all slots are through, is applied
to the gradient together with the clip. A step whose loss or gradient is not finite changes nothing but the place in the data: it is counted, the keys of its
samples go to OUT/skipped.jsonl, and SKIP_LIMIT of them in a row end the training. Where the data of any process ends (a shard is
gone, a worker was killed), all save what the whole steps made and end.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import configs
from ..data.buckets import Bucket
from ..objectives import flow_matching
from . import ranks
from .checkpoints import Checkpoints, read_state
from .clock import Clock, Halted
from .ema import Ema
from .log import JsonLog, Progress
from .method import rate
from .ranks import Ranks, local
from .window import BINS, HEAD, Window

# of a row of the log, on the terminal
SHOWN = ("step", "loss", "grad_norm", "lr", "pictures_per_s", "mfu", "data_wait", "memory_gb", "skipped_steps", "eta_s")


class Batch(Protocol):
    """What a stage is given; see `train.data.loader.Batch`."""

    step: int
    slot: int
    bucket: Bucket
    keys: tuple[str, ...]
    lengths: list[int]  # text tokens
    skipped: tuple[Any, ...]


Losses = Callable[
    [nn.Module, Any], tuple[Tensor, Tensor]
]  # (model, batch) -> loss and time of every picture, float32 [B]


class Trainer:
    """model: as `ranks.wrap` gave it. losses: the objective. sheet: draws the averaged model's pictures into a file.

    held_out: the averaged model -> its losses on what is never trained on (train/loop/validation.py).
    """

    def __init__(
        self,
        recipe: ModuleType,
        group: Ranks,
        model: nn.Module,
        losses: Losses,
        out: Path,
        buckets: tuple[Bucket, ...],
        stage: str = "pretrain",
        sheet: Callable[[Path], None] | None = None,
        flops: Callable[[Batch], float] | None = None,
        peak: float | None = None,
        held_out: Callable[[nn.Module], dict[str, float]] | None = None,
    ):
        if recipe.SLOTS % group.world:
            raise ValueError(f"SLOTS: {recipe.SLOTS} micro-batches do not divide among {group.world} processes")
        self.recipe, self.group, self.model, self.losses, self.out = recipe, group, model, losses, out
        self.buckets, self.stage, self.sheet, self.flops, self.peak = buckets, stage, sheet, flops, peak
        self.held_out = held_out
        self.parameters = {n: p for n, p in ranks.bare(model).named_parameters() if p.requires_grad}
        self.optimizer = optimizer_of(recipe, self.parameters)
        self.ema = Ema(ranks.bare(model), recipe.EMA, trained_only=True)
        self.checkpoints = Checkpoints(out / "checkpoints", group, recipe.KEEP_LAST, recipe.KEEP_EVERY)
        self.checkpoints.take_over()
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.saved: int | None = None
        self.batch: Batch | None = None  # the last one
        self.lost: Halted | None = None  # what ended the data of this process

    # -------------------------------------------------------------------------------------------- one step

    def take(self, batches: Iterator[Batch], stop: bool = False) -> dict[str, float]:
        """One optimiser step from this rank's next SLOTS / W batches; returns what happened on all ranks.

        A rank whose data ends inside it takes its last batch again, since the others are at work; "lost" then tells all, and
        nothing is changed. Errors: Halted where there is no last one.
        """
        recipe, group = self.recipe, self.group
        own = recipe.SLOTS // group.world
        sums = torch.zeros(len(HEAD) + 2 * BINS + 2 * len(self.buckets), dtype=torch.float64, device=group.device)
        head, waited, taken, began = dict.fromkeys(HEAD, 0.0), 0.0, [], time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        for index in range(own):
            asked = time.perf_counter()
            batch = self._next(batches, index * group.world + group.rank)
            waited += time.perf_counter() - asked
            count, tokens = len(batch.lengths), batch.bucket.tokens
            weight = flow_matching.micro_batch_weight(recipe.LOSS_REDUCTION, count, tokens)
            with ranks.accumulating(self.model, index + 1 == own):
                losses, times = self.losses(self.model, batch)
                # gradients are averaged over ranks: the world makes a sum of it, whose denominator comes with the clip
                flow_matching.reduced(losses, recipe.LOSS_REDUCTION, tokens, 1 / group.world).backward()
            losses = losses.detach().double()
            head["weight"] += weight
            head["pictures"] += count
            head["image_tokens"] += count * tokens
            head["text_tokens"] += sum(batch.lengths)
            head["skipped_members"] += len(batch.skipped)
            head["flops"] += self.flops(batch) if self.flops else 0.0
            sums[1] += losses.mean() * weight
            self._sort(sums[len(HEAD) :], losses, times, batch.bucket)
            taken.append({"slot": batch.slot, "bucket": batch.bucket.name, "keys": list(batch.keys)})
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = ranks.norm(gradients, group)
        sums[: len(HEAD)] += torch.tensor([head[name] for name in HEAD], dtype=torch.float64).to(group.device)
        sums[HEAD.index("broken")] += ~torch.isfinite(norm + sums[1])
        sums[HEAD.index("stop")] += float(stop)
        sums[HEAD.index("failed")] += float(self.checkpoints.failed)
        sums[HEAD.index("lost")] += float(self.lost is not None)
        sums = group.sum(sums)
        found = dict(zip(HEAD, sums[: len(HEAD)].tolist()))
        if found["failed"]:
            self.checkpoints.wait()
            raise Halted("a state could not be saved on another process")
        if found["lost"]:
            return found
        found["loss"] = found["weighted"] / found["weight"]
        found["grad_norm"] = norm.item() / found["weight"]
        if found["broken"]:
            self._skip(found, taken)
        else:
            self._apply(gradients, found)
        self.step += 1
        return {**found, "seconds": time.perf_counter() - began, "waited": waited, "sums": sums}

    def _next(self, batches: Iterator[Batch], slot: int) -> Batch:
        """This rank's next batch; the last one again where there are no more."""
        if self.lost is None:
            try:
                batch = next(batches)
            except Halted as error:
                if self.batch is None:
                    raise
                self.lost = error
                return self.batch
            place = batch.step, batch.slot
            if place != (self.step, slot):
                raise RuntimeError(f"the data is at step, slot {place}, the training at {self.step, slot}")
            self.batch = batch
        return self.batch

    def _sort(self, sums: Tensor, losses: Tensor, times: Tensor, bucket: Bucket) -> None:
        """Add losses to their tenth of t and to their bucket; a broken one counts nowhere."""
        good = torch.isfinite(losses)
        losses = losses.where(good, 0.0)
        bins = (times.double() * BINS).long().clamp(0, BINS - 1)
        sums[:BINS].index_add_(0, bins, losses)
        sums[BINS : 2 * BINS].index_add_(0, bins, good.double())
        place = 2 * BINS + self.buckets.index(bucket)
        sums[place] += losses.sum()
        sums[place + len(self.buckets)] += good.sum()

    @torch.no_grad()
    def _apply(self, gradients: list[Tensor], found: dict[str, float]) -> None:
        recipe, scale = self.recipe, 1 / found["weight"]
        found["clipped"] = float(found["grad_norm"] > recipe.CLIP)
        factor = scale * min(1.0, recipe.CLIP / (found["grad_norm"] + 1e-6))
        ranks.scale_(gradients, torch.tensor(factor, dtype=torch.float32, device=self.group.device))
        found["lr"] = rate(self.step, recipe.LR, recipe.WARMUP, recipe.STEPS, recipe.DECAY)
        for options in self.optimizer.param_groups:
            options["lr"] = found["lr"]
        self.optimizer.step()
        self.ema.update(ranks.bare(self.model))
        self.skipped_in_a_row = 0

    def _skip(self, found: dict[str, float], taken: list[dict[str, Any]]) -> None:
        """Nothing is changed; what the step was made of is written down. Errors: FloatingPointError at the limit."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        found["clipped"], found["lr"] = 0.0, 0.0
        slots = sorted((slot for own in self.group.gather(taken) for slot in own), key=lambda slot: slot["slot"])
        if self.group.main:
            row = {"step": self.step, "loss": str(found["loss"]), "grad_norm": str(found["grad_norm"]), "slots": slots}
            with (self.out / "skipped.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.skipped_in_a_row >= self.recipe.SKIP_LIMIT:
            raise FloatingPointError(
                f"{self.stage}: loss {found['loss']}, gradient norm {found['grad_norm']} at step {self.step}, "
                f"not finite for {self.skipped_in_a_row} steps in a row; see {self.out / 'skipped.jsonl'}"
            )

    # -------------------------------------------------------------------------------------------- state

    def tensors(self) -> dict[str, Tensor]:
        """Everything a state holds that is a tensor, by name: weights, averages, moments."""
        whole = ranks.bare(self.model)
        found = {f"model.{name}": p.detach() for name, p in whole.named_parameters()}
        found |= {f"ema.{name}": value for name, value in self.ema.average.items()}
        for name, p in self.parameters.items():
            found |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        return found

    def save(self, data: Callable[[int], dict[str, Any]], last: bool = False) -> None:
        """Begin to save; `data(step)` is the place in the stream. The last one is waited for."""
        if self.saved != self.step:
            about = {"stage": self.stage, "ema_updates": self.ema.updates, "skipped": self.skipped}
            settings = {name: plain(value) for name, value in configs.fields(self.recipe).items()}
            about |= {"data": data(self.step), "settings": settings, "revision": revision()}
            self.checkpoints.save(self.step, self.tensors(), about)
            self.saved = self.step
        if last:
            self.checkpoints.wait()

    def resume(self, folder: Path) -> dict[str, Any]:
        """Take up a state, of any number of processes; returns what is no tensor. Errors: ValueError, FileNotFoundError."""
        stage = read_state(folder).get("stage")
        if stage != self.stage:
            raise ValueError(f"{folder}: a state of stage {stage!r}, expected {self.stage!r}; --init takes its weights")
        state = self.checkpoints.load(folder, self.tensors())
        self.checkpoints.go_on_from(folder)
        self.step, self.skipped, self.ema.updates = state["step"], state["skipped"], state["ema_updates"]
        self.saved = self.step if folder.parent == self.checkpoints.folder else None
        return state

    def start_from(self, folder: Path) -> None:
        """The averaged weights of a state of any stage; optimiser, averages and step are those of a fresh training."""
        self.checkpoints.load(folder, averaged_names(ranks.bare(self.model)))
        self.ema = Ema(ranks.bare(self.model), self.recipe.EMA, trained_only=True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has its averaged weights."""
        live = {name: local(p.detach()).clone() for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                local(p).copy_(local(self.ema.average[name]))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    local(p).copy_(live[name])

    # -------------------------------------------------------------------------------------------- the loop

    def run(
        self, batches: Iterator[Batch], data: Callable[[int], dict[str, Any]], clock: Clock, steps: int | None = None
    ) -> None:
        """Train to the recipe's last step, or until the clock, on any rank, says stop; save; leave the rest to a resume."""
        recipe, last = self.recipe, steps or self.recipe.STEPS
        window = Window(self.buckets, self.peak, self.group)
        log = JsonLog(self.out / "log.jsonl") if self.group.main else None
        stopped = False
        with Progress(self.stage, self.step, last, enabled=self.group.main) as progress:
            while self.step < last and not stopped:
                found = self.take(batches, clock.over)
                if found["lost"]:
                    self.save(data, last=True)
                    why = self.lost or "the data of another process ended"
                    raise Halted(f"{why}; step {self.step} is saved, the same command goes on from there")
                stopped = bool(found["stop"])
                window.add(found)
                if self.step % recipe.LOG_EVERY == 0 or stopped or self.step == last:
                    row = window.row(self)
                    if log is not None:
                        log.record({"step": self.step, **row, "eta_s": (last - self.step) * row["step_s"]}, SHOWN)
                        progress.show(self.step, row.get("loss"))
                    window = Window(self.buckets, self.peak, self.group)
                if self.held_out and (self.step % recipe.VALIDATE_EVERY == 0 or self.step == last):
                    with self.averaged():
                        values = self.held_out(self.model)
                    if log is not None:
                        log.record(
                            {"step": self.step, **values}, ("step", "with_text", "without_text", "text_explains")
                        )
                if self.step % recipe.SAVE_EVERY == 0 or stopped or self.step == last:
                    self.save(data)
                    if self.sheet is not None:
                        self._draw(log)
            self.save(data, last=True)

    def _draw(self, log: JsonLog | None) -> None:
        path = self.out / f"sheet_{self.step:07d}.png"
        with self.averaged():
            self.sheet(path)
        if log is not None:
            log.picture("sheet", path, self.step)


def optimizer_of(recipe: ModuleType, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, decaying matrices alone. Its state is there from the start, so that a saved one has where to go."""
    groups = [
        {"params": [p for p in parameters.values() if (p.dim() > 1) is matrix], "weight_decay": decay}
        for matrix, decay in ((True, recipe.WEIGHT_DECAY), (False, 0.0))
    ]
    groups = [g for g in groups if g["params"]]
    optimizer = torch.optim.AdamW(groups, lr=recipe.LR, betas=recipe.BETAS, eps=recipe.EPS, fused=True)
    for p in parameters.values():
        moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=local(p.detach()).device), **moments}
    return optimizer


def averaged_names(model: nn.Module) -> dict[str, Tensor]:
    """Where a state's averages go: its name for them -> the parameter. What was not trained has no average but itself."""
    return {f"{'ema' if p.requires_grad else 'model'}.{n}": p.detach() for n, p in model.named_parameters()}


def revision() -> str:
    """The commit that trains, with a + where files differ from it; "" outside of a checkout."""
    root = Path(__file__).parents[2]
    try:
        answer = [
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer[0] + ("+" if answer[1] else "")


def plain(value: Any) -> Any:
    """A field as JSON gives it back."""
    return json.loads(json.dumps(value))
