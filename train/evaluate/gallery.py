"""Stage "gallery": one HTML file of prompts, pictures and scores of a Mini, failures included.

    python -m train gallery                                   # the shipped weights -> gallery/index.html
    python -m train gallery --model runs/export --out runs/gallery --per-task 24

Drawn are the first scenes of each task of the benchmark with its first seeds, one scene per class, and some prompts at
other strengths of guidance, in other languages, at length, and with signs. Nothing is chosen by how it came out. The scores
are those that lie beside the weights (scores.json of `python -m train evaluate mini-bench`); so are the training logs.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from lens import __version__, image_file
from lens.formats.hub import EMBEDDED, resolve
from lens.formats.released import read_index
from lens.formats.safetensors import Shard
from lens.text_encoder import DEFAULT_CHAT_DATE

from .. import configs
from ..data.small_world import captions
from ..data.small_world.scene import Scene
from ..data.small_world.translations import LANGUAGES
from ..loop.checkpoints import write_text
from ..loop.log import read_log
from . import geneval, ocr
from .class_sheet import cells, first_scene, labels, sheet
from .detector import Detector
from .gallery_page import Card, Class, Page, StageLog, Task, facts, lines, render
from .judges import Judges
from .mini_bench import JUDGED, scenes_of
from .scores import Scores, read_scores
from .sources import from_pipeline

if TYPE_CHECKING:
    from lens import LensPipeline
    from lens.pipeline import LensPipelineOutput

BATCH = 8  # pictures drawn at once
ASKS = {
    "single_object": "one object",
    "two_object": "two objects",
    "counting": "so many of a kind",
    "colors": "one object in a colour that training never gave it",
    "position": "two objects and where they stand",
    "color_attr": "two objects, each in a colour of its own",
    "text": "a sign, alone or beside an object, with words that training never wrote",
    "row": "three different objects side by side",
}
SPOKEN = {"en": "English", "zh": "Chinese", "fr": "French", "ja": "Japanese", "es": "Spanish"}
STRENGTHS = (1.0, 3.0, 5.0)
SIDES = (64, 96, 128)  # of the pictures shown beside one another; the sheet of classes is of the last
SIGN_LENGTHS, SIGNS = range(1, 9), 120  # letters and blanks of a sign; scenes searched for them
STAGES = ("vae", "encoder", "pretrain")
Drawn = Mapping["Wish", tuple[np.ndarray, bytes]]  # pixels uint8 [H, W, 3] and the PNG file


@dataclass(frozen=True)
class Wish:
    """A picture to draw: the scene its prompt tells of, and how to draw it."""

    scene: Scene
    prompt: str
    seed: int
    guidance: float
    language: str = "en"
    label: str = ""

    @property
    def size(self) -> tuple[int, int]:
        return self.scene.height, self.scene.width


# ------------------------------------------------------------------------------------------------ what is shown


def contents(settings: Mapping[str, Any], per_task: int, guidance: float) -> dict[str, Any]:
    """Every picture of the page by section: lists of Wish, for "tasks" and "classes" by name, for "guidance" by prompt.

    `settings` are the benchmark's (classes, captions, side): the tasks' pictures are its own first ones.
    """
    classes, style, side = settings["classes"], settings["captions"], settings["side"]
    tasks = {task: scenes_of(task, per_task, classes, style, side) for task in ASKS}
    firsts = [scenes[0] for task, scenes in tasks.items() if task != "text"]
    single = {kind: first_scene(kind, (side, side)) for kind in classes}
    spoken = next(s for s in tasks["color_attr"] if captions.can_say(s, "translated"))
    tongues = [("en", "brief"), *((language, "translated") for language in LANGUAGES)]
    signs = scenes_of("text", max(SIGNS, per_task), classes, style, side)
    lengths = [len(s.sign.text) if s.sign is not None else 0 for s in signs]
    by_length = [lengths.index(n) if n in lengths else None for n in SIGN_LENGTHS]
    plain = {s.task: worded(s, "brief") for s in firsts}
    return {
        "tasks": {t: [Wish(s, s.caption, i, guidance) for i, s in enumerate(of)] for t, of in tasks.items()},
        "classes": {kind: [Wish(scene, scene.caption, 0, guidance)] for kind, scene in single.items()},
        "guidance": {
            plain[s.task]: [Wish(s, plain[s.task], 0, g, label=f"guidance {g:g}") for g in STRENGTHS] for s in firsts
        },
        "sizes": {
            scenes[0].caption: [
                Wish(replace(scenes[0], height=n, width=n), scenes[0].caption, 0, guidance, label=f"{n} by {n} pixels")
                for n in SIDES
            ]
            for scenes in tasks.values()
        },
        "languages": [
            Wish(spoken, worded(spoken, style, language), 0, guidance, language, SPOKEN[language])
            for language, style in tongues
        ],
        "dense": [
            Wish(s, worded(s, "dense"), 0, guidance, label=s.task) for s in firsts if captions.can_say(s, "dense")
        ],
        "signs": [Wish(signs[i], signs[i].caption, i, guidance) for i in by_length if i is not None],
    }


def worded(scene: Scene, style: str, language: str = "en") -> str:
    return captions.caption(scene, random.Random(f"gallery {style} {language} {scene.seed}"), style, language)


def flat(part: Any) -> list[Wish]:
    """Every wish of a nested part of the contents, in order."""
    if isinstance(part, Wish):
        return [part]
    return [wish for inner in (part.values() if isinstance(part, dict) else part) for wish in flat(inner)]


# ------------------------------------------------------------------------------------------------ drawing


def draw_wishes(
    pipe: LensPipeline, wishes: Sequence[Wish], model: str, steps: int
) -> dict[Wish, tuple[np.ndarray, bytes]]:
    """Pixels and PNG file of every wish, each picture drawn once; its recipe is in the file. Progress goes to stderr."""
    out: dict[Wish, tuple[np.ndarray, bytes]] = {}
    last = time.monotonic()
    for guidance, size in sorted({(w.guidance, w.size) for w in wishes}):
        own = [w for w in wishes if (w.guidance, w.size) == (guidance, size)]
        asked = list(dict.fromkeys((w.prompt, w.seed) for w in own))
        made: dict[tuple[str, int], tuple[np.ndarray, bytes]] = {}
        for i in range(0, len(asked), BATCH):
            prompts, seeds = zip(*asked[i : i + BATCH])
            answer = pipe(
                list(prompts),
                seed=list(seeds),
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=size[0],
                width=size[1],
            )
            images = cast("LensPipelineOutput", answer).images  # a tuple only where asked for
            for prompt, seed, image in zip(prompts, seeds, images):
                recipe = image_file.Recipe(
                    prompt=prompt, negative="", seed=seed, steps=steps, guidance=guidance,
                    size=(image.height, image.width), variant=pipe.defaults.variant, chat_date=DEFAULT_CHAT_DATE,
                    truncation="reference", model=model, dtype=str(pipe.dtype).removeprefix("torch."),
                    version=__version__, fingerprint=pipe.fingerprint or "",
                )  # fmt: skip
                made[prompt, seed] = np.asarray(image), png(image, recipe)
            if time.monotonic() - last > 5 or i + BATCH >= len(asked):
                last = time.monotonic()
                print(
                    f"guidance {guidance:g}, {size[0]}x{size[1]}: {min(i + BATCH, len(asked))} of {len(asked)} pictures",
                    file=sys.stderr,
                    flush=True,
                )
        out |= {w: made[w.prompt, w.seed] for w in own}
    return out


def picture_file(image: Any) -> Card:
    """The sheet of classes as the page shows it: no prompt, no verdict of its own."""
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    alt = "Every class: true render, reconstructed through the VAE, drawn"
    return Card(alt, 0, out.getvalue(), (image.height, image.width), None)


def png(image: Any, recipe: image_file.Recipe) -> bytes:
    """A PNG file that carries its recipe, as `lens generate` writes them."""
    out = io.BytesIO()
    image.save(out, format="PNG", pnginfo=image_file.text_chunks(recipe), optimize=True)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------ how it was made


def stages(root: Path, config: str) -> list[StageLog]:
    """Of every training stage its recipe and, where a log lies beside the weights, steps, samples, time and losses."""
    out = []
    for name in STAGES:
        found = configs.load(config, name) if name == STAGES[-1] else configs.beside(config, name)
        recipe, module = Path(str(found.__file__)), found.__name__
        shown = f"{module.replace('.', '/')}.py" if module.startswith("train.configs.") else recipe.name
        text = shown, recipe.read_text(encoding="utf-8")
        rows = [row for log in sorted(root.rglob(f"{name}*.jsonl")) for row in read_log(log)]
        parts = dict.fromkeys(row.get("part", "") for row in rows if "step" in row)
        for number, part in enumerate(parts or [""]):
            own = [row for row in rows if row.get("part", "") == part and "step" in row]
            title = f"{name}, {part}" if part else name
            out.append(StageLog(title, facts(own), lines(own), text if number == 0 else None))
    return out


# ------------------------------------------------------------------------------------------------ the page


def verdicts(judges: Judges, wishes: Sequence[Wish], made: Drawn) -> dict[Wish, tuple[bool | None, str]]:
    """Right or not, and why not, as the benchmark's `said` has it; None for a sign that nothing here can read."""
    out: dict[Wish, tuple[bool | None, str]] = {}
    unique = sorted(dict.fromkeys(wishes), key=lambda w: w.size)  # the detector looks at pictures of one size
    looks = [judges.detector.look([made[w][0] for w in of]) for _, of in itertools.groupby(unique, lambda w: w.size)]
    for wish, seen in zip(unique, itertools.chain(*looks)):
        verdict, sign = geneval.judge(geneval.asked(wish.scene, said=True), seen), wish.scene.sign
        right: bool | None = verdict.right
        reasons = list(verdict.reasons)
        if sign is not None and judges.reader is None:
            right, reasons = (None if right else False), [*reasons, f"sign not read ({ocr.REMEDY})"]
        elif sign is not None:
            read = judges.read(made[wish][0], seen)
            if not ocr.same_text(sign.text, read):
                right, reasons = (
                    False,
                    [*reasons, f"“{sign.text}” asked, " + (f"“{read}” read" if read else "nothing read")],
                )
        out[wish] = right, "; ".join(reasons)
    return out


def assemble(wanted: dict[str, Any], made: Drawn, words: Mapping[Wish, Any], scores: Scores, **about: Any) -> Page:
    """The page's records; classes from the worst score up, those without one last."""

    def card(wish: Wish) -> Card:
        pixels, file = made[wish]
        (height, width, _), (right, reason) = pixels.shape, words[wish]
        return Card(wish.prompt, wish.seed, file, (height, width), right, reason, wish.language, wish.label)

    def strips(name: str) -> list[tuple[str, Sequence[Card]]]:
        return [(prompt, [card(w) for w in wishes]) for prompt, wishes in wanted[name].items()]

    classes = [Class(kind, card(wishes[0]), scores.classes.get(kind)) for kind, wishes in wanted["classes"].items()]
    return Page(
        classes=sorted(classes, key=lambda c: (c.share.value if c.share else 2.0, c.name)),
        tasks=[
            Task(task, ASKS[task], [card(w) for w in wishes], scores.tasks[task], "said")
            for task, wishes in wanted["tasks"].items()
        ],
        columns=scores.columns,
        means=means_of(scores),
        numbers=[(number, shares["score"], shares["shape"]) for number, shares in scores.numbers.items()],
        guidance=strips("guidance"),
        sizes=strips("sizes"),
        languages=[card(w) for w in wanted["languages"]],
        dense=[card(w) for w in wanted["dense"]],
        signs=[card(w) for w in wanted["signs"]],
        **about,
    )


def means_of(scores: Scores) -> list[tuple[str, list[str]]]:
    """Rows of the table of means over GenEval's six tasks: what was judged, and the numbers in the order of JUDGED."""
    names = {name: heading for name, heading in scores.columns if name in scores.means}
    return [(names[name], [f"{row[key]:.3f}" for key in JUDGED]) for name, row in scores.means.items()]


def notes(scores: Scores) -> list[str]:
    """How the numbers came about, in words."""
    its = scores.settings
    return [
        f"{its['per_task']} pictures per task and strength of guidance, {its['steps']} steps, first seeds, unseen scenes. Right "
        "is what GenEval's rule calls right, on the boxes and colours that Lens-Eye finds, a small detector trained on the same "
        "drawn world; a sign must also be read exactly. GenEval looks at colours only where the task is about them; “with every "
        "colour” does wherever the prompt says one, and so do the marks of the pictures above. More objects than asked for are wrong "
        "where the task is counting. Intervals are Wilson's, 95 %.",
        "The template judge learns nothing: it compares pixels with the artwork of every class in every colour, at the usual "
        "places, and wants nothing else in the picture. Of a sign it asks no words. Where the two differ widely, doubt the first.",
        "The shape judge learns nothing either: it redraws the picture from true renders. It asks of every object that it is a "
        "true shape of its class, outline included, and that nothing else stands there. The distance is 0 for a picture equal to a "
        "true render and 1 for an object that is missing. Every other column believes the detector.",
        "The last two columns are ceilings: the same judge on true pictures, encoded and decoded again, and as they are.",
    ]


def commands(model: str, config: str) -> list[str]:
    """From nothing to this page."""
    return [
        f"python -m train vae --config {config} --out runs/vae",
        f"python -m train encoder --config {config} --out runs/encoder",
        f"python -m train pretrain --config {config} --vae runs/vae --encoder runs/encoder/encoder.pt --out runs/base",
        f"python -m train pretrain --config {config} --vae runs/vae --out runs/base --export runs/export",
        f"python -m train evaluate mini-bench --model {model}",
        "make gallery" if model == "mini" else f"python -m train gallery --model {model}",
    ]


def card_of_model(root: Path, pipe: LensPipeline) -> dict[str, Any]:
    """Name and size of a checkpoint, from its files."""
    shards = [Shard(path) for path in sorted(root.rglob("*.safetensors"))]
    count = sum(math.prod(shape) for shard in shards for _, shape, *_ in shard.entries.values())
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return {
        "name": read_index(root).get("lens", {}).get("name", root.resolve().name),
        "parameters": f"{count / 1e6:.1f} million",
        "megabytes": f"{size / 2**20:.1f}",
        "fingerprint": pipe.fingerprint,
        "version": __version__,
    }


# ------------------------------------------------------------------------------------------------ the stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="mini",
        help="what the pipeline loads: mini, or a folder in the released layout (default: mini)",
    )
    parser.add_argument(
        "--config", default="mini", help="recipe whose files and commands the page shows (default: mini)"
    )
    parser.add_argument("--out", type=Path, default=Path("gallery"), help="folder of index.html (default: gallery)")
    parser.add_argument("--per-task", type=int, default=12, help="pictures per task (default: 12)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


def run(options: argparse.Namespace) -> int:
    from lens import LensPipeline

    torch.set_num_threads(options.threads)
    root = resolve(options.model)
    pipe = LensPipeline.from_pretrained(options.model)
    guidance = pipe.defaults.guidance_scale
    scores = read_scores(root / "scores.json", list(ASKS), guidance)
    reader = ocr.Reader() if ocr.available() else None
    judges = Judges(Detector.load(), scores.settings["classes"], reader, audit=False)
    source = from_pipeline(options.model, scores.settings["steps"])
    # draw
    wanted, start = contents(scores.settings, options.per_task, guidance), time.perf_counter()
    wishes = flat(wanted)
    name = options.model if options.model in EMBEDDED else root.resolve().name
    made = draw_wishes(pipe, wishes, name, scores.settings["steps"])
    classes = cells(source, scores.settings["classes"], (SIDES[-1],) * 2, guidance)
    spent = time.perf_counter() - start
    # judge, and write
    about = card_of_model(root, pipe) | {
        "classes": len(scores.settings["classes"]),
        "side": (scores.settings["side"],) * 2,
        "steps": scores.settings["steps"],
        "guidance": scores.shown,
        "pictures": len({(w.prompt, w.seed, w.guidance, w.size) for w in wishes}) + len(classes),
        "seconds": f"{spent:.0f}",
        "threads": options.threads,
    }
    page = assemble(
        wanted,
        made,
        verdicts(judges, wishes, made),
        scores,
        class_sheet=picture_file(sheet(classes, labels(classes, judges.detector, judges.shapes))),
        model=about,
        stages=stages(root, options.config),
        notes=notes(scores),
        commands=commands(options.model, options.config),
    )
    path = options.out / "index.html"
    write_text(path, render(page))
    print(f"{path}: {about['pictures']} pictures, {path.stat().st_size / 2**20:.1f} MB; open it in a browser")
    return 0
