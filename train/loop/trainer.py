"""The training loop for one process or many: slots -> gradients -> one optimiser step, watched, saved, resumed.

What is trained, and on which losses, a `Method` says; every stage runs here. An optimiser step is `Plan.slots` micro-batches
of the global stream, whoever computes them: rank r of W takes the slots r, r + W, ... one after another. Every draw is keyed by
(seed, purpose, step, sample), so one process with 8 slots, two with 4 and eight with one take the same step up to the order
of sums. Where W does not divide the slots, ranks without one in the last round repeat a batch whose gradient counts nothing, so
that collectives match: 96 processes take 128 slots in the time of 192.

The loss of a step is sum_s w_s mean_b l_b / sum_s w_s over its slots s and their samples b; w_s is the method's
(`About.weight`). The sums go backward; their denominator, known when all slots are through, is applied to the gradient
together with the clip. A step whose loss or gradient is not finite changes nothing but the place in the data: it is counted,
what it was made of goes to OUT/skipped.jsonl, and `Plan.skip_limit` of them in a row end the training. Where the data of any
process ends (a shard is gone, a worker was killed), all save what the whole steps made and end. Members of no use that others
stand in for are counted, named in OUT/damaged.jsonl, and end the training where they are more than `Plan.damaged_limit`.
"""

from __future__ import annotations

import functools
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ranks
from .checkpoints import Checkpoints, StateFile
from .clock import Clock, Interrupted
from .log import JsonLog, Progress
from .log_window import LogWindow, StepSums
from .method import Method, Plan, learning_rate
from .ranks import Ranks

# of a row of the log, on the terminal
SHOWN: tuple[str, ...] = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "samples_per_s",
    "mfu",
    "data_wait",
    "memory_gb",
    "skipped_steps",
    "skipped_members",
)
SHOWN += ("eta_s",)
FEWEST = 10  # members of no use, before their share says anything

ALONE = Ranks(torch.device("cpu"))
Place = Callable[[int], dict[str, Any]]


def at_step(step: int) -> dict[str, Any]:
    """The place in a stream that is a function of the step alone."""
    return {"step": step}


class Trainer:
    """method: what learns. states: where it is kept; a `Checkpoints` for any number of processes, a `StateFile` for one.

    settings: what a state says about its training. peak: FLOP/s of the device, for the share of it that is used.
    """

    def __init__(
        self,
        plan: Plan,
        method: Method,
        states: Checkpoints | StateFile | None,
        out: Path,
        group: Ranks = ALONE,
        settings: Mapping[str, Any] | None = None,
        peak: float | None = None,
    ):
        if plan.slots < group.world:
            raise ValueError(f"SLOTS: {plan.slots} micro-batches are fewer than the {group.world} processes")
        self.plan, self.method, self.states, self.out, self.group = plan, method, states, out, group
        self.settings, self.peak = dict(settings or {}), peak
        self.networks = method.networks
        self.main = next(iter(self.networks))
        if states is not None:
            states.take_over()
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.samples = 0.0  # since it began or was resumed
        self.damaged = 0  # since then, too: members that were asked for and could not be used
        self.named: set[str] = set()  # those of them that were written down
        self.learners: tuple[str, ...] | None = None  # of the last step
        self.saved: int | None = None
        self.batch: Any = None  # the last one
        self.lost: Interrupted | None = None  # what ended the data of this process

    # -------------------------------------------------------------------------------------------- one step

    def train_step(self, batches: Iterator[Any], stop: bool = False) -> dict[str, Any]:
        """One optimiser step from this rank's next slots / W batches; returns what happened on all ranks.

        A rank whose data ends inside it repeats its last batch so that collectives still match; "lost" then reports it to all, and
        nothing is changed. Errors: Interrupted where there is no last one.
        """
        plan, group, method = self.plan, self.group, self.method
        learners, own = self._turn(), -(-plan.slots // group.world)
        sums, seen, waited, began = StepSums(method.kinds, group.device), [], 0.0, time.perf_counter()
        damaged: list[tuple[str, str]] = []
        for network in self.networks.values():
            for p in network.parameters.values():
                p.grad = None
        # forward and backward: a slot of this rank after the other
        for index in range(own):
            slot, asked = index * group.world + group.rank, time.perf_counter()
            idle = slot >= plan.slots
            batch = self.batch if idle else self._next(batches)
            waited += time.perf_counter() - asked
            if self.lost is not None and group.world == 1:
                return {"lost": 1.0}
            about = method.about(batch)
            if self.lost is None and not idle and about.place not in (None, (self.step, slot)):
                raise RuntimeError(
                    f"the data is at step, slot {about.place}, the training at {self.step, slot}: another stream than before"
                )
            with self._accumulating(learners, last=index + 1 == own):
                losses = method.losses(batch, self.step)
                parts = [part.values.mean() for part in losses.values()]
                parts += [part.beside for part in losses.values() if part.beside is not None]
                # gradients are averaged over ranks: the world makes a sum of it, whose denominator comes with the clip
                (sum(parts[1:], parts[0]) * (0.0 if idle else about.weight * group.world)).backward()
            if idle:
                continue
            sums.add(losses, about)
            seen.append({"slot": slot, **about.seen})
            damaged += about.damaged
        # sums over all ranks: the one exchange by which all decide alike
        with_losses = tuple(losses)
        gradients = {name: self._gradients(name, learners, with_losses) for name in with_losses}
        norms = {name: ranks.norm(own, group) for name, own in gradients.items()}
        numbers = torch.stack([*norms.values(), *(sums.of[f"loss {name}"][0] for name in with_losses)])
        broken = ~torch.isfinite(numbers).all()
        sums.head |= {
            "stop": float(stop),
            "broken": broken.item(),
            "failed": float(self.states is not None and self.states.failed),
            "lost": float(self.lost is not None),
        }
        found: dict[str, Any] = sums.over_all(group)
        if found["failed"] and self.states is not None:
            self.states.wait()
            raise Interrupted("a state could not be saved on another process")
        if found["lost"]:
            return found
        if found["skipped_members"]:
            self._name_damaged(damaged, int(found["skipped_members"]))
        # the step, or none of it
        for name in with_losses:
            beside = self._beside(name)
            found[f"loss{beside}"] = sums.of[f"loss {name}"][0].item() / found["weight"]
            found[f"grad_norm{beside}"] = norms[name].item() / found["weight"]
        if found["broken"]:
            self._skip(found, seen)
        else:
            self._apply(gradients, learners, found)
        self.step += 1
        return {**found, "seconds": time.perf_counter() - began, "waited": waited, "sums": sums}

    def _beside(self, name: str) -> str:
        """What stands behind a network's numbers in the log."""
        return "" if name == self.main else f"/{name}"

    def _turn(self) -> tuple[str, ...]:
        """Who learns now; the others ask for no gradient."""
        learners = self.method.turn(self.step)
        if learners != self.learners:
            for name, network in self.networks.items():
                for p in network.parameters.values():
                    p.requires_grad_(name in learners)
            self.learners = learners
        return learners

    def _next(self, batches: Iterator[Any]) -> Any:
        """This rank's next batch; the last one again where there are no more."""
        if self.lost is None:
            try:
                self.batch = next(batches)
            except StopIteration:  # a stream that was asked to end
                self.lost = Interrupted("the data ended")
            except Interrupted as error:
                self.lost = error
                if self.batch is None:
                    raise
        if self.batch is None and self.group.world > 1:
            raise Interrupted(f"{self.lost} before the first batch")
        return self.batch

    @contextmanager
    def _accumulating(self, learners: tuple[str, ...], last: bool) -> Iterator[None]:
        """Gradients inside are summed over ranks at the `last` slot, and of those who learn alone."""
        with ExitStack() as stack:
            for name, network in self.networks.items():
                stack.enter_context(ranks.accumulating(network.module, last and name in learners))
            yield

    def _gradients(self, name: str, learners: tuple[str, ...], with_losses: tuple[str, ...]) -> list[Tensor]:
        """Of the networks that are clipped together with this one; see `Method`."""
        together = [name]
        if name == with_losses[0]:
            together += [other for other in learners if other not in with_losses]
        found = (p.grad for other in together for p in self.networks[other].parameters.values())
        return [gradient for gradient in found if gradient is not None]

    @torch.no_grad()
    def _apply(self, gradients: dict[str, list[Tensor]], learners: tuple[str, ...], found: dict[str, Any]) -> None:
        """Clip, step, average; found: the numbers of the step, to which rates and clips are added."""
        plan = self.plan
        for name, own in gradients.items():
            beside, factor = self._beside(name), 1 / found["weight"]
            norm, clip = found[f"grad_norm{beside}"], plan.clip_of.get(name, plan.clip)
            clip = float("inf") if clip is None else clip
            found[f"clipped{beside}"] = float(norm > clip)
            factor *= min(1.0, clip / (norm + 1e-6))
            if own and factor != 1:
                ranks.scale_(own, torch.tensor(factor, dtype=torch.float32, device=self.group.device))
        for name in learners:
            network, factor = self.networks[name], self.method.rate(name, self.step)
            for group, base in zip(network.groups, network.base_rates):
                group["lr"] = factor * learning_rate(self.step, base, plan.warmup, plan.steps, plan.decay, plan.cosine)
            network.step()
        found["lr"] = self.networks[learners[0]].groups[0]["lr"]
        self.skipped_in_a_row = 0
        self.method.after(self.step)

    def _skip(self, found: dict[str, Any], seen: list[dict[str, Any]]) -> None:
        """Nothing is changed; what the step was made of is written down. Errors: FloatingPointError at the limit."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        values = {name: str(value) for name, value in found.items() if name.split("/")[0] in ("loss", "grad_norm")}
        slots = sorted((slot for own in self.group.gather(seen) for slot in own), key=lambda slot: slot["slot"])
        if self.group.main:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "skipped.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": self.plan.stage, "step": self.step, **values, "slots": slots}) + "\n")
        if self.skipped_in_a_row >= self.plan.skip_limit:
            words = ", ".join(f"{name.replace('grad_norm', 'gradient norm')} {value}" for name, value in values.items())
            raise FloatingPointError(
                f"{self.plan.stage}: {words} at step {self.step}, not finite for {self.skipped_in_a_row} steps in a row; "
                f"see {self.out / 'skipped.jsonl'}"
            )

    def _name_damaged(self, damaged: list[tuple[str, str]], count: int) -> None:
        """Count members that could not be used, of all ranks, and write down each the first time."""
        self.damaged += count
        found = [pair for own in self.group.gather(damaged) for pair in own]
        if self.group.main:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "damaged.jsonl").open("a", encoding="utf-8") as file:
                for key, reason in found:
                    if key not in self.named:
                        self.named.add(key)
                        line = {"step": self.step, "key": key, "reason": reason}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _too_damaged(self) -> str | None:
        """A sentence where more of the members that were asked for are of no use than the plan allows."""
        asked, limit = self.samples + self.damaged, self.plan.damaged_limit
        if self.damaged < FEWEST or self.damaged <= limit * asked:
            return None
        return (
            f"{self.plan.stage}: {self.damaged:,} of {asked:,.0f} members could not be used, {self.damaged / asked:.1%}, where "
            f"{limit:.1%} are allowed; {self.out / 'damaged.jsonl'} says which and why"
        )

    # -------------------------------------------------------------------------------------------- state

    def tensors(self) -> dict[str, Tensor]:
        """Everything a state holds that is a tensor: model.NETWORK.NAME, ema.NETWORK.NAME, optimizer.KEY.NETWORK.NAME.

        Where there is but one network, its name is left out.
        """
        found = {}
        for name, network in self.networks.items():
            for key, value in network.tensors().items():
                kind, _, own = key.partition(".")
                if kind == "optimizer":
                    moment, _, own = own.partition(".")
                    kind = f"{kind}.{moment}"
                found[f"{kind}.{own}" if len(self.networks) == 1 else f"{kind}.{name}.{own}"] = value
        return found

    def save(self, data: Place = at_step, last: bool = False, anew: bool = False) -> None:
        """Begin to save; `data(step)` is the place in the stream. The last one is waited for. anew: though it was saved."""
        if self.states is None:
            return
        if self.saved != self.step or anew:
            updates = {name: network.ema.updates for name, network in self.networks.items() if network.ema is not None}
            about = {"stage": self.plan.stage, "ema_updates": updates, "skipped": self.skipped}
            about |= {"data": data(self.step), "settings": self.settings, "revision": revision()}
            self.states.save(self.step, self.tensors(), about | self.method.state())
            self.saved = self.step
        if last:
            self.states.wait()

    def resume(self, where: Path) -> dict[str, Any]:
        """Take up a state, of any number of processes; returns what is no tensor. Errors: ValueError, FileNotFoundError."""
        assert self.states is not None, "a training without states cannot resume"
        state = self.states.load(where, self.tensors(), self.plan.stage)
        self.step, self.skipped = state["step"], state.get("skipped", 0)
        updates = state["ema_updates"]  # a number in states of before there could be several networks
        for name, network in self.networks.items():
            if network.ema is not None:
                network.ema.updates = updates[name] if isinstance(updates, dict) else updates
        self.saved = self.step if self.states.go_on_from(where) else None
        self.method.load_state(state)
        return state

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the networks have their averaged weights."""
        with ExitStack() as stack:
            for network in self.networks.values():
                if network.ema is not None:
                    stack.enter_context(network.ema.in_place_of(ranks.bare(network.module)))
            yield

    # -------------------------------------------------------------------------------------------- the loop

    def run(self, batches: Iterator[Any], clock: Clock, data: Place = at_step, steps: int | None = None) -> bool:
        """Train to the plan's last step, or until the clock, on any rank, says stop; save; leave the rest to a resume.

        data: step -> the place in the stream that a resume goes on from. steps: end there, though the plan has more. Returns
        whether all steps are done.
        """
        plan, last = self.plan, steps or self.plan.steps
        window = LogWindow(self.method.kinds, self.peak, self.group)
        log = JsonLog(self.out / "log.jsonl") if self.group.main else None
        stopped = False
        if plan.validate_first and self.step == 0:
            self._validate(log)
        with Progress(plan.stage, self.step, last, enabled=self.group.main) as progress:
            while self.step < last and not stopped:
                found = self.train_step(batches, clock.over)
                if found["lost"]:
                    self.save(data, last=True)
                    if clock.over and self.group.world == 1:
                        return False  # it was asked to end, and so did the data
                    why = self.lost or "the data of another process ended"
                    raise Interrupted(f"{why}; step {self.step} is saved, the same command goes on from there")
                stopped, self.samples = bool(found["stop"]), self.samples + found["samples"]
                window.add(found, found["sums"])
                if (damage := self._too_damaged()) is not None:
                    self.save(data, last=True)
                    raise Interrupted(f"{damage}; step {self.step} is saved")
                if self.step % plan.log_every == 0 or stopped or self.step == last:
                    row = window.row(self.main, self.skipped)
                    if log is not None:
                        row |= {"samples": self.samples, "seconds": clock.elapsed}
                        row["eta_s"] = (last - self.step) * row["step_s"]
                        log.record({**self._head(), **row}, ("part", *SHOWN))
                        progress.show(self.step, row.get("loss"))
                    window = LogWindow(self.method.kinds, self.peak, self.group)
                if plan.validate_every and (self.step % plan.validate_every == 0 or self.step == last):
                    self._validate(log)
                if (plan.save_every and self.step % plan.save_every == 0) or stopped or self.step == last:
                    self.save(data)
                    self._draw(log)
            self.save(data, last=True)
        return self.step >= last

    def _head(self) -> dict[str, Any]:
        """How a row of the log begins: the part, where a stage has several that share a log, and the step."""
        parts = self.plan.stage.split()[1:2]
        return {**({"part": parts[0]} if parts else {}), "step": self.step}

    def _validate(self, log: JsonLog | None) -> None:
        with self.averaged():
            values = self.method.validate(self.step)
        if log is not None and values:
            log.record(
                {**self._head(), **values}, ("part", "step", *(name for name in values if not name[-1].isdigit()))
            )

    def _draw(self, log: JsonLog | None) -> None:
        with self.averaged():
            sheets = self.method.draw(self.out, self.step)
        if log is not None:
            for name, path in sheets.items():
                log.image(name, path, self.step)


@functools.cache
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
