"""A student of few steps held against its guided teacher and against true pictures: what its distillation promises.

    python -m train evaluate student --model mini-turbo --teacher mini-rl --guidance 2 --size 128x128 --count 2000

Unseen scenes of all tasks, the first of a row of seeds, captions as they are drawn for training; picture i has seed i. Of each scene: the
true render through the model's own VAE (`truth`), the teacher in --teacher-steps with guidance, the teacher in as many steps
as the student has, and the student without guidance. Columns, held against the truth unless told otherwise:

    deviation  each latent channel's standard deviation over that of real latents: the mean, lowest and highest channel
    cast, saturation, high_frequency   as in train/evaluate/distillation.py
    auc        how well a two-sample judge tells the pictures from the truth (train/evaluate/two_sample.py); 1/2: not at all
    diversity  mean distance of the latents of one caption, over the guided teacher's
    backdrops  effective number of backdrops of the scenes whose caption names none, over the teacher's; `share`: the largest
               ratio of a backdrop's share to that in the truth of these scenes

OUT holds student.json and sheet.png: teacher, teacher in few steps, student, truth, side by side.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..data.contact_sheet import contact_sheet
from ..data.small_world.kinds import CORE
from ..data.small_world.scene import Scene
from ..data.small_world.world import TASKS, World
from ..loop.checkpoints import write_text
from . import distillation as watch
from . import two_sample
from .mini_bench import size_of
from .surroundings import surroundings

FIRST_SEED, FIRST_GROUP = 2_500_000_000, 2_600_000_000
CAPTIONS = {"geneval": 0.4, "brief": 0.4, "dense": 0.2}
BATCH, SHEET = 16, 24  # pictures drawn at once; scenes of the sheet
RARE = 0.02  # a backdrop that fewer of the true pictures have is compared as if so many had it

Pictures = list[np.ndarray]  # uint8 [H, W, 3]


@dataclass
class Kind:
    """What draws, in how many steps, with what guidance."""

    pipe: Any
    steps: int
    guidance: float

    def draw(
        self, captions: Sequence[str], seeds: Sequence[int], size: tuple[int, int]
    ) -> tuple[list[Tensor], Pictures]:
        """(latents [n, I, C] of every call, pictures)."""
        from lens.vae import to_uint8

        latents, pictures = [], []
        for i in range(0, len(captions), BATCH):
            out = self.pipe(
                list(captions[i : i + BATCH]),
                seed=list(seeds[i : i + BATCH]),
                height=size[0],
                width=size[1],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                output_type="latent",
            )
            rows = cast("Tensor", out.images)
            latents.append(rows.float())
            pictures += [to_uint8(self.pipe.codec.decode(row, (size[0] // 16, size[1] // 16))) for row in rows]
        return latents, pictures


def scenes_from(world: World, first: int, count: int, size: tuple[int, int]) -> list[Scene]:
    return [world.scene(first + i, *size) for i in range(count)]


def truth(pipe: Any, scenes: Sequence[Scene]) -> tuple[list[Tensor], Pictures]:
    """(latents, pictures) of the true renders through the VAE."""
    from lens.vae import to_uint8

    latents, pictures = [], []
    for scene in scenes:
        picture = World().render(scene)
        rows = pipe.codec.encode(torch.from_numpy(picture).float().div_(127.5).sub_(1))
        latents.append(rows.float()[None])
        pictures.append(to_uint8(pipe.codec.decode(rows, (picture.shape[0] // 16, picture.shape[1] // 16))))
    return latents, pictures


def backdrops(pictures: Sequence[np.ndarray]) -> list[str]:
    """The world's backdrop behind each picture by its frame alone, which no object touches; "none" where none fits."""
    found = []
    for picture in pictures:
        height, width = picture.shape[:2]
        found.append(surroundings(picture.astype(np.float32), [(1.0, 1.0, width - 1.0, height - 1.0)])[0] or "none")
    return found


def effective(names: Sequence[str]) -> float:
    """exp of the entropy of how often each is there."""
    shares = np.array(list(Counter(names).values())) / len(names)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def largest_share(names: Sequence[str], among: Sequence[str]) -> float:
    """The largest ratio of a backdrop's share to its share `among` others, which counts as RARE where it is smaller."""
    own, other = Counter(names), Counter(among)
    return max(count / len(names) / max(RARE, other[name] / len(among)) for name, count in own.items())


def per_channel(drawn: Sequence[Tensor], real: Sequence[Tensor]) -> tuple[float, float, float]:
    """(mean, lowest, highest) of each channel's deviation over that of real latents."""
    ratio = watch.latent_statistics(drawn)[1] / watch.latent_statistics(real)[1]
    return float(ratio.mean()), float(ratio.min()), float(ratio.max())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the student: what the pipeline loads, with its metadata")
    parser.add_argument("--teacher", required=True, help="the guided teacher")
    parser.add_argument("--size", type=size_of, default=(128, 128), metavar="HxW", help="default: 128x128")
    parser.add_argument("--count", type=int, default=2_000, help="pictures of each kind (default: 2000)")
    parser.add_argument("--groups", type=int, default=24, help="captions that diversity is measured by (default: 24)")
    parser.add_argument("--group", type=int, default=12, help="pictures of each (default: 12)")
    parser.add_argument("--teacher-steps", type=int, default=20, help="default: 20")
    parser.add_argument("--guidance", type=float, default=3.0, help="the teacher's (default: 3)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--out", type=Path, default=Path("runs/student"), help="default: runs/student")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


def run(options: argparse.Namespace) -> int:
    from lens import LensPipeline

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    student, teacher = (LensPipeline.from_pretrained(name, dtype=dtype) for name in (options.model, options.teacher))
    told = student.defaults.distilled
    if told is None:
        raise ValueError(
            f"--model {options.model}: no student, expected a checkpoint whose metadata says how it was distilled"
        )
    kinds = {
        "teacher": Kind(teacher, options.teacher_steps, options.guidance),
        "teacher_few": Kind(teacher, told.steps, options.guidance),
        "student": Kind(student, told.steps, 1.0),
    }
    world = World("held_out", TASKS, CORE, CAPTIONS)
    open_world = World("held_out", {"two_object": 0.5, "color_attr": 0.5}, CORE, "geneval")
    scenes = scenes_from(world, FIRST_SEED, options.count, options.size)
    groups = scenes_from(open_world, FIRST_GROUP, options.groups, options.size)
    real, true = truth(student, scenes)
    if not (unnamed := [i for i, scene in enumerate(scenes) if scene.style == "geneval"]):
        raise ValueError(f"--count {options.count}: all captions name a backdrop, expected more scenes")
    group_truth = truth(student, scenes_from(open_world, FIRST_GROUP, options.groups * options.group, options.size))[1]
    filters = two_sample.Patches(group_truth)
    features = {"truth": filters(true)}
    rows: dict[str, dict[str, float]] = {}
    drawn: dict[str, Pictures] = {}
    spread: dict[str, float] = {}
    named = {"truth": backdrops([true[i] for i in unnamed])}
    for name, kind in kinds.items():
        began = time.process_time()
        total = options.count + options.groups * options.group
        print(f"{name}: {total:,} pictures in {kind.steps} steps each ...", file=sys.stderr, flush=True)
        latents, pictures = kind.draw([scene.caption for scene in scenes], list(range(len(scenes))), options.size)
        mean, low, high = per_channel(latents, real)
        (a, b), (true_a, true_b) = watch.cast(pictures), watch.cast(true)
        rows[name] = {"deviation": mean, "lowest_channel": low, "highest_channel": high}
        rows[name] |= {"cast": math.hypot(a - true_a, b - true_b), "a": a - true_a, "b": b - true_b}
        rows[name]["saturation"] = watch.saturation(pictures) / watch.saturation(true)
        rows[name]["high_frequency"] = watch.high_frequency(pictures) / watch.high_frequency(true)
        features[name], drawn[name] = filters(pictures), pictures[:SHEET]
        named[name] = backdrops([pictures[i] for i in unnamed])
        own: list[Tensor] = []
        for index, scene in enumerate(groups):
            seeds = [10_000 + index * options.group + i for i in range(options.group)]
            own.append(torch.cat(kind.draw([scene.caption] * options.group, seeds, options.size)[0]))
        spread[name] = watch.diversity(own)
        rows[name] |= {
            "diversity": spread[name] / spread["teacher"],
            "backdrops": effective(named[name]) / effective(named["teacher"]),
            "share": largest_share(named[name], named["truth"]),
            "cpu_s": time.process_time() - began,
        }
    judged = two_sample.compared(features["truth"], features["teacher"], features["student"])
    few = two_sample.scores(features["truth"], features["teacher_few"])
    rows["teacher"]["auc"], rows["student"]["auc"] = judged.teacher, judged.student
    rows["teacher_few"]["auc"] = two_sample.auc(*few)
    names = list(rows["student"])
    print(f"{'':14s}" + "".join(f"{name:>15s}" for name in names))
    for kind_name, row in rows.items():
        print(f"{kind_name:14s}" + "".join(f"{row[name]:15.3f}" for name in names))
    verdict = "passes" if judged.passes else "fails"
    print(
        f"two-sample judge, {options.count} a side: {judged.teacher:.3f} of the teacher, {judged.student:.3f} of the student, "
        f"difference {judged.student - judged.teacher:+.3f} [{judged.low:+.3f}, {judged.high:+.3f}]: {verdict}"
    )
    columns = {
        f"teacher {options.teacher_steps}": drawn["teacher"],
        f"teacher {told.steps}": drawn["teacher_few"],
        f"student {told.steps}": drawn["student"],
        "truth": true[:SHEET],
    }
    pictures = [kind_pictures[i] for i in range(min(SHEET, len(true))) for kind_pictures in columns.values()]
    captions = [
        text for scene in scenes[: len(pictures) // 4] for text in (*list(columns)[:-1], f"truth: {scene.caption}")
    ]
    contact_sheet(pictures, captions, options.out / "sheet.png", columns=8)
    settings = {
        "model": options.model,
        "teacher": options.teacher,
        "size": list(options.size),
        "count": options.count,
        "groups": [options.groups, options.group],
        "teacher_steps": options.teacher_steps,
        "guidance": options.guidance,
        "steps": told.steps,
        "difference": [judged.student - judged.teacher, judged.low, judged.high],
        "passes": judged.passes,
        "effective_backdrops": {name: effective(values) for name, values in named.items()},
        "backdrops": {name: dict(Counter(values).most_common()) for name, values in named.items()},
    }
    write_text(options.out / "student.json", json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    return 0
