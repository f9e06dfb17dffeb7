"""Stage "ablate": the paper's ablations, arms that differ in one thing, in the small world; at full size as dry runs.

    python -m train ablate captions --config mini --stop-after 10m        # again to resume
    python -m train ablate captions --seeds 3 --steps 6000 --out runs/ablate_captions
    python -m train ablate vae --vaes head=runs/vae_head plain=runs/vae_plain
    python -m train ablate encoder --encoders shipped=lens/mini/base random=none
    python -m train ablate rl_data --prompts prompts.jsonl --rl "--stop-after 30m"

captions   brief, detailed, or half of each (figure 4): same images, same steps, the same frozen encoder. Detailed must beat brief.
vae        arms by latent space (figures 5, 7): --vaes NAME=FOLDER, stage folders of `vae` or released ones of the same shape
encoder    arms by text encoder (figure 8): --encoders NAME=STATE, a folder, or "none" for random weights; the transformer sees
           English alone, prompts of five languages are scored
rl_data    the whole set, its nested half and quarter, and all of it without text prompts (table 1): runs `train rl` for each

Scored is attribute accuracy (train/ablations/attributes.py) on scenes that hold facts never trained on, by the averaged weights,
every ROUND steps. Arms take turns, so that they can be compared wherever the clock ends the run. OUT gets results.json, a
folder an arm and seed, and index.html with curves: the band is the range over seeds. The verdict is at the last step that all
arms share, paired over seeds and images, with a bootstrap interval over scenes: at these seeds, not over seeds.
"""

from __future__ import annotations

import argparse
import html
import json
import shlex
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from . import configs, report
from .ablations.arms import Arm, ArmTraining, Asked, Results, asked_of, common_step, difference, run_rounds
from .data.small_world.translations import LANGUAGES
from .evaluate.published.judging import mean
from .loop.checkpoints import write_text
from .loop.clock import Clock, duration, positive

ROOT = Path(__file__).parents[1]
BASE = ROOT / "lens" / "mini" / "base"  # whose encoder and latent space the arms share
WHAT = ("captions", "vae", "encoder", "rl_data")
NOTE = "95 % intervals are over scenes at these seeds, not over seeds: how trainings with other seeds differ is not in them"


def named(pairs: Sequence[str], option: str) -> dict[str, str]:
    """["a=x", "b=y"] -> {"a": "x", ...}. Errors: ValueError."""
    found = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(found) < len(pairs) or len(found) < 2:
        raise ValueError(
            f"{option}: expected at least two NAME=PATH with different names, got {' '.join(pairs) or 'none'}"
        )
    return found


def arms_of(options: argparse.Namespace, config: ModuleType, world: ModuleType) -> list[Arm]:
    """Errors: ValueError for arms that cannot be told apart, FileNotFoundError for folders there are not."""
    if options.what == "captions":
        return [Arm(name, shares, BASE / "vae", BASE) for name, shares in config.ARMS.items()]
    if options.what == "vae":
        own = dict(world.CAPTIONS)
        arms = [Arm(name, own, Path(path), BASE) for name, path in named(options.vaes, "--vaes").items()]
    else:
        english = {"brief": 0.5, "dense": 0.5}
        paths = named(options.encoders, "--encoders")
        arms = [Arm(name, english, BASE / "vae", None if p == "none" else Path(p)) for name, p in paths.items()]
    for arm in arms:
        for path in (arm.vae, arm.encoder):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"ablate {options.what}: {arm.name}: no such file or folder: {path}")
    return arms


def asked(options: argparse.Namespace, config: ModuleType) -> list[Asked]:
    """The prompts of all arms: by style, or of the encoder arms by language."""
    count = options.per_task or config.PER_TASK
    if options.what != "encoder":
        return [asked_of(style, count, config) for style in config.STYLES]
    import random

    from .data.small_world.captions import can_say, caption

    plain = asked_of("geneval", count, config)
    scenes = [s for s in plain.scenes if can_say(s, "translated")]
    out = [Asked("en", scenes)]
    for language in LANGUAGES:
        texts = [caption(s, random.Random(f"{language} {s.seed}"), "translated", language) for s in scenes]
        out.append(Asked(language, [replace(s, caption=text) for s, text in zip(scenes, texts)]))
    return out


def curves(
    results: Results, arms: Sequence[str], seeds: Sequence[int], prompts: Sequence[str]
) -> list[tuple[str, str]]:
    """(SVG, title) of the mean over all sets of prompts, and of each: over seeds the mean, and the range as a band."""

    def point(arm: str, step: int, names: Sequence[str]) -> tuple[float, float, float, float] | None:
        found = [r for r in results.rows if r["arm"] == arm and r["step"] == step and r["seed"] in seeds]
        values = [mean([r["scores"][n]["all"] for n in names]) or 0.0 for r in found]
        return (float(step), sum(values) / len(values), min(values), max(values)) if values else None

    steps = sorted({r["step"] for r in results.rows})
    drawn = []
    for title, names in {"all prompts": list(prompts), **{f"{name} prompts": [name] for name in prompts}}.items():
        lines = {arm: [p for step in steps if (p := point(arm, step, names)) is not None] for arm in arms}
        if all(lines.values()):
            drawn.append(report.bands_svg(f"attribute accuracy, {title}, against steps", lines))
    return drawn


def table_at(results: Results, arms: Sequence[str], seeds: Sequence[int], step: int) -> str:
    """Means over seeds at a step: a row an arm and set of prompts, as HTML."""
    rows = [r for r in results.rows if r["step"] == step and r["seed"] in seeds]
    names = [n for n in next(iter(rows[0]["scores"].values())) if n != "each"]
    body = ""
    for arm in arms:
        for prompts in rows[0]["scores"]:
            own = [r["scores"][prompts] for r in rows if r["arm"] == arm]
            cells = [mean([s[n] for s in own if n in s]) for n in names]
            told = "".join(f"<td>{'' if v is None else f'{v:.3f}'}</td>" for v in cells)
            body += f"<tr><th>{html.escape(arm)}</th><td>{html.escape(prompts)}</td>{told}</tr>"
    head = "".join(f"<th>{n}</th>" for n in names)
    return f"<table><tr><th>arm</th><th>prompts</th>{head}</tr>{body}</table>"


def verdict(
    results: Results, arms: Sequence[str], seeds: Sequence[int], step: int, prompts: Mapping[str, Sequence[Hashable]]
) -> list[str]:
    """Each pair of arms in words, and what the intervals are of. prompts: as in `difference`."""
    lines = []
    for k, one in enumerate(arms):
        for two in arms[:k]:
            middle, low, high = difference(results, one, two, seeds, step, prompts)
            told = "better" if low > 0 else "worse" if high < 0 else "not told apart"
            lines.append(
                f"{one} against {two} at step {step}, {len(seeds)} seeds: {middle:+.3f} [{low:+.3f}, {high:+.3f}], {told}"
            )
    return [*lines, NOTE]


def small_world(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    config = configs.override(configs.load(options.config, "ablate"), options.set)
    world = configs.load(options.config, "world")
    arms, prompts = arms_of(options, config, world), asked(options, config)
    seeds, last = list(range(options.seeds)), options.steps or config.STEPS
    config = configs.override(config, [f"STEPS={last}"])  # the schedule's end: behind it the rate is 0
    steps = sorted({*range(config.ROUND, last + 1, config.ROUND), last})
    out = options.out or Path("runs") / f"ablate_{options.what}"
    settings = {
        "what": options.what,
        "arms": {
            arm.name: [dict(arm.captions), str(arm.vae.name), str(arm.encoder and arm.encoder.name)] for arm in arms
        },
        "weights": {arm.name: arm.weights for arm in arms},
        "recipe": {name: value for name, value in configs.fields(config).items() if name not in ("PROMPTS", "STEPS")},
        "prompts": {p.name: [scene.caption for scene in p.scenes] for p in prompts},
    }
    results, clock = Results(out / "results.json", settings), Clock(options.stop_after)

    def make(arm: Arm, seed: int) -> ArmTraining:
        return ArmTraining(options.config, config, arm, seed, out / f"{arm.name}_s{seed}", clock)

    done = run_rounds(make, arms, seeds, steps, prompts, results, clock)
    shown = {p.name: p.pictures for p in prompts}
    told = summary(results, [arm.name for arm in arms], seeds, shown, out)
    for line in told:
        print(line)
    if not done:
        print(f"not all of {last} steps are done: the same command goes on from here")
    return 0


def summary(
    results: Results, arms: Sequence[str], seeds: Sequence[int], prompts: Mapping[str, Sequence[Hashable]], out: Path
) -> list[str]:
    """Write index.html, verdict.json (with every score but those of single images) and curves.svg, of all prompts; returns the
    verdict in words. prompts: as in `difference`."""
    step = common_step(results, arms, seeds)
    if not step:
        return ["no step yet at which all arms were scored"]
    told = verdict(results, arms, seeds, step, prompts)
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in told)
    sheets = ""
    for arm in arms:
        title = html.escape(f"{arm}, seed {seeds[0]}, step {step}")
        picture = f"{arm}_s{seeds[0]}/{next(iter(prompts))}_{step:06d}.png"
        sheets += f'<figure><img src="{picture}" alt="{title}"><figcaption>{title}</figcaption></figure>'
    drawn = curves(results, arms, seeds, list(prompts))
    figures = "".join(f"<figure>{svg}<figcaption>{html.escape(title)}</figcaption></figure>" for svg, title in drawn)
    sections = [("Verdict", f"<ul>{lines}</ul>"), ("Curves", figures)]
    sections += [(f"At step {step}", table_at(results, arms, seeds, step)), ("Images", sheets)]
    settings = {k: v for k, v in results.settings.items() if k != "prompts"}
    write_text(out / "index.html", report.page("Ablation", [*sections, ("Settings", report.table(settings))]))
    for svg, _ in drawn[:1]:
        write_text(out / "curves.svg", svg + "\n")
    rows = [
        {**row, "scores": {p: {k: v for k, v in own.items() if k != "each"} for p, own in row["scores"].items()}}
        for row in results.rows
    ]
    found = {"step": step, "seeds": list(seeds), "lines": told, "rows": rows}
    write_text(out / "verdict.json", json.dumps(found, indent=1) + "\n")
    return [*told, str(out / "index.html")]


# ------------------------------------------------------------------------------------------------ data of the rl stage


def rl_arms(category: str) -> dict[str, list[str]]:
    """Name of table 1's arm -> options of `rl` for it. category: of the prompts that ask for text."""
    return {
        "1/4": ["--subset", "quarter"],
        "1/2": ["--subset", "half"],
        "full": [],
        "full without text": ["--without", category],
    }


def rl_data(options: argparse.Namespace) -> int:
    """`train rl` for every arm, with the options of --rl; 0, or the worst of their codes."""
    from . import rl
    from .data.prompts import read_prompts

    kept = len(read_prompts(options.prompts, without=[options.text_category]))
    if kept == len(read_prompts(options.prompts)):
        raise ValueError(
            f"{options.prompts}: no prompt of category {options.text_category!r}: the arm without text would be the whole set"
        )
    out, code = options.out or Path("runs/ablate_rl_data"), 0
    for name, more in rl_arms(options.text_category).items():
        folder = out / name.replace("/", "_").replace(" ", "_")
        parser = argparse.ArgumentParser(prog="python -m train rl")
        rl.add_arguments(parser)
        words = ["--prompts", str(options.prompts), "--out", str(folder), *more, *shlex.split(options.rl)]
        print(f"{name}: rl {' '.join(words)}", flush=True)
        code = max(code, rl.run(parser.parse_args(words)))
    return code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT, help="which ablation")
    parser.add_argument(
        "--config", default="mini", help="recipe in train/configs that has an ablate.py (default: mini)"
    )
    parser.add_argument("--out", type=Path, help="folder (default: runs/ablate_WHAT)")
    parser.add_argument("--steps", type=positive, help="steps of every arm (default: the recipe's)")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings of every arm (default: 2)")
    parser.add_argument("--per-task", type=positive, help="prompts of each task (default: the recipe's)")
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 10m")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="replace a field; repeatable")
    parser.add_argument("--vaes", nargs="+", default=[], metavar="NAME=FOLDER", help="arms of `vae`")
    parser.add_argument(
        "--encoders",
        nargs="+",
        default=[f"shipped={BASE}", "random=none"],
        metavar="NAME=PATH",
        help="arms of `encoder` (default: the shipped one and random weights)",
    )
    parser.add_argument("--prompts", type=Path, help="prompts of `rl_data`, as `rl_prompts` writes them")
    parser.add_argument(
        "--text-category",
        default="text",
        metavar="NAME",
        help="of those prompts of `rl_data` that ask for text (default: text)",
    )
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--rl", default="", metavar="OPTIONS", help="options of `rl` for every arm, as one text")


def run(options: argparse.Namespace) -> int:
    if options.what != "rl_data":
        return small_world(options)
    if options.prompts is None:
        raise ValueError("ablate rl_data: give --prompts, a file as `python -m train rl_prompts` writes it")
    return rl_data(options)
