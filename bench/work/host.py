"""What a picture costs the CPU, and what the first one costs: e2e/<variant>/<side>/b1/<dtype>/<host | first>....

host            CPU time of the calling thread from the call to the last launch of the denoiser, features given: plan,
                schedule, steps. Noise from seeds is drawn on a thread beside it, which the row counts as "other_threads".
                `ours_given_noise`: the same with latents that lie on the device.
host_total      the same from prompt to pixels: with the launches of the text encoder and of the decoder
first           seconds of the first call after loading, in a process of its own: libraries loaded, steps captured,
                nothing compiled; prompt to pixels
first_latents   the same for the denoiser, features given

Tokenising and image files are outside. A wait for results is no launch: what lies between the last step and the decoder,
where the latents are looked at, is not counted, nor is what follows the last stage.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..case import OURS, Subject, Work
from ..machine import ROOT
from .drawing import BOUND, DrawingSetup, way

GIVEN = "ours_given_noise"
SUBJECTS = (OURS, GIVEN)
HOST_GOAL, FIRST_GOAL = 2e-3, 10.0  # seconds
LONGEST = 300.0  # seconds of a process that loads and draws


class HostClock:
    """Seconds of a pipeline's calls up to the last launch, and of each stage; waits between stages are left out."""

    def __init__(self, pipe: Any, now: Callable[[], float] = time.thread_time):
        self.now = now
        self.parts: dict[str, float] = {}
        self._left = self._waited = 0.0
        self._stage = pipe.stage
        pipe.stage = self._watched

    @contextlib.contextmanager
    def _watched(self, name: str, **options: Any) -> Iterator[None]:
        entered = self.now()
        if name == "decode":
            self._waited += entered - self._left
        with self._stage(name, **options):
            yield
        self._left = self.now()
        self.parts[name] = self._left - entered

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call."""
        self.parts, self._waited = {}, 0.0
        self._left = began = self.now()
        call()
        total = self._left - began - self._waited
        self.parts["outside stages"] = total - sum(self.parts.values())
        return total


class Watched:
    """A subject that is timed by a HostClock, and tells the stages of its fastest call and what other threads took."""

    def __init__(self, clock: HostClock, call: Callable[..., Any]):
        self.clock, self.call = clock, call
        self.best, self.fields = float("inf"), dict[str, Any]()

    def timed(self, *arguments: Any) -> float:
        before = time.process_time() - time.thread_time()
        seconds = self.clock.seconds(lambda: self.call(*arguments))
        others = time.process_time() - time.thread_time() - before
        if seconds < self.best:
            self.best, self.fields = seconds, {"stages": dict(self.clock.parts), "other_threads": others}
        return seconds

    def subject(self) -> Subject:
        return Subject(self.call, mode="stream", timed=self.timed, extra_fields=lambda: self.fields)


def goal(d: DrawingSetup, seconds: float) -> dict[str, float]:
    """What a row is held to: the released model on a GPU alone, for on a CPU the launches are the work itself."""
    return {"goal": seconds} if d.device.type == "cuda" and not d.scale.tiny else {}


def denoise(d: DrawingSetup) -> Work:
    """The denoiser's share; compared as `e2e/.../denoise` is."""
    pipe: Any = d.pipeline(d.prepared(2), None)
    clock = HostClock(pipe)
    common = {"sizes": d.sizes, "output_type": "latent"}

    def drawn(noise: list[Tensor], turn: int) -> list[Tensor]:
        return list(pipe([f"{turn} {k}" for k in range(len(noise))], seed=d.seed(turn), **common).images)

    def given(noise: list[Tensor], turn: int) -> list[Tensor]:
        return list(pipe([f"{turn} {k}" for k in range(len(noise))], latents=noise, **common).images)

    def oracle(noise: list[Tensor], turn: int) -> Tensor:
        return way(d.reference())(noise, d.features(turn))[0]

    return Work(
        inputs=[(d.noise(turn), turn) for turn in range(2)],
        subjects={OURS: Watched(clock, way(drawn)).subject(), GIVEN: Watched(clock, way(given)).subject()},
        oracle=oracle,
        bound=BOUND[d.scale.dtype],
        flops=0.0,
        bytes=0.0,
        select=lambda latents: latents[0],
        more=goal(d, HOST_GOAL),
    )


def total(d: DrawingSetup) -> Work:
    """Prompt to pixels."""
    codec = d.codec  # first: where diffusers is missing, no encoder is made for nothing
    pipe: Any = d.pipeline(d.encoder, codec)

    def draw(noise: list[Tensor], turn: int, prompts: list[str]) -> list[Tensor]:
        made = pipe(prompts, seed=d.seed(turn), sizes=d.sizes, output_type="np")
        return [torch.from_numpy(image) for image in made.images]

    return Work(
        inputs=[(d.noise(turn), turn, d.prompts(turn)) for turn in range(2)],
        subjects={OURS: Watched(HostClock(pipe), draw).subject()},
        oracle=lambda noise, turn, prompts: d.pixels(d.reference())(noise, prompts)[0],
        bound=BOUND[d.scale.dtype],
        flops=0.0,
        bytes=0.0,
        select=lambda images: images[0],
        more=goal(d, HOST_GOAL),
    )


class FirstImage:
    """A call in a process that has just loaded the model. The one made to be compared is the first one timed."""

    def __init__(self, d: DrawingSetup, pixels: bool):
        self.d, self.pixels = d, pixels
        self.made: list[float] = []
        self.stages: dict[str, float] = {}

    def call(self, *_: object) -> list[Tensor]:
        d = self.d
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "first.pt")
            words = ["--variant", d.variant, "--device", d.device.type, *["--tiny"] * d.scale.tiny]
            command = [sys.executable, "-m", "bench.work.first_image", *words, *["--pixels"] * self.pixels]
            threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
            done = subprocess.run(
                [*command, "--out", str(file)], cwd=ROOT, env={**os.environ, **threads},
                capture_output=True, text=True, timeout=LONGEST,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"bench.work.first_image failed: {done.stderr.strip()[-300:]}")
            made = torch.load(file, weights_only=True)
        self.made.append(made["seconds"])
        self.stages = made["stages"]
        return list(made["results"])

    def timed(self, *_: object) -> float:
        if not self.made:
            self.call()
        return self.made.pop()

    def subject(self) -> Subject:
        return Subject(self.call, mode="stream", timed=self.timed, extra_fields=lambda: {"stages": self.stages})


def _first(d: DrawingSetup, pixels: bool) -> Work:
    def oracle(noise: list[Tensor]) -> Tensor:
        """By the reference's loop here; this process then gives its weights back, for the other needs their room."""
        result = d.pixels(d.reference())(noise, d.prompts(0)) if pixels else way(d.reference())(noise, d.features(0))
        for part in ("encoder", "codec", "transformer"):
            vars(d).pop(part, None)
        if d.device.type == "cuda":
            torch.cuda.empty_cache()
        return result[0].cpu()

    if pixels:
        assert d.codec  # LeftOut where diffusers is missing
    return Work(
        inputs=[(d.noise(0),)],
        subjects={OURS: FirstImage(d, pixels).subject()},
        oracle=oracle,
        bound=BOUND[d.scale.dtype],
        flops=0.0,
        bytes=0.0,
        select=lambda results: results[0],
        more=goal(d, FIRST_GOAL),
    )


def first(d: DrawingSetup) -> Work:
    """Prompt to pixels."""
    return _first(d, True)


def first_latents(d: DrawingSetup) -> Work:
    """Features to latents; its figure is the way from the noise."""
    return _first(d, False)
