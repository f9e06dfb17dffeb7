"""Stage "watermark": the judge of cleaning step 5 (train/data/curation/watermark.py), trained on stamped pictures with exact labels.

    python -m train watermark --config mini --out runs/watermark --stop-after 20m     # again to resume, bit-equal on a CPU
    python -m train watermark --out runs/watermark --export train/data/assets/watermark.v1.safetensors
    python -m train watermark --measure --sheet errors.png          # the shipped judge on what it was never shown

Pictures, stamps and decoys are those of train/data/stamps.py: a pair is one picture as it is and once more with a stamp, both worn as
files are. --measure draws others: fonts, photographs and scenes that are held out, and two styles of stamps that no training draws.
--export shifts the logits, by pictures that are neither trained on nor measured on, until .5 is the lowest threshold of the recipe's
precision, and writes what --measure finds beside the weights.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import configs
from .data import stamps
from .data.curation.watermark import ASSET, SIDE, STRIDE, MarkNet, Marks, Shape, loss, pixels, write
from .data.stamps import COVERED, STYLES, UNSEEN, Pen, Pictures, pen_of
from .loop.checkpoints import StateFile
from .loop.clock import Clock, duration, positive
from .loop.keys import keyed
from .loop.method import About, Losses, Method, Network, Plan, adamw
from .loop.ranks import Ranks
from .loop.trainer import Trainer

FONTS = Path("/usr/share/fonts")
LOWER = (0.2, 0.1, 0.05)  # thresholds for who would rather lose good pictures


@dataclass(frozen=True)
class Example:
    """seen: uint8 [SIDE, SIDE, 3]; covered: float [SIDE / STRIDE, SIDE / STRIDE], 0 or 1; style: of its stamp, None: it has none."""

    seen: np.ndarray
    covered: np.ndarray
    style: str | None
    decoyed: bool = False


def example(picture: np.ndarray, covered: np.ndarray | None, style: str | None, rng: np.random.Generator) -> Example:
    """A picture as the judge sees it, worn."""
    from PIL import Image

    cells = SIDE // STRIDE
    if covered is None:
        share = np.zeros((cells, cells), np.float32)
    else:
        share = F.adaptive_avg_pool2d(torch.from_numpy(covered).float()[None, None], cells)[0, 0].numpy()
    worn = Image.fromarray(stamps.worn(picture, rng))
    seen = np.asarray(worn.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0))
    return Example(seen, (share > COVERED).astype(np.float32), style)


def pair(ground: np.ndarray, rng: np.random.Generator, pen: Pen, styles: Sequence[str], decoys: float) -> list[Example]:
    """A picture as it is, and with a stamp; `decoys`: how often both get what is no watermark first."""
    has = rng.random() < decoys
    picture = stamps.decoyed(ground, rng, pen) if has else ground
    marked, covered, style = stamps.stamped(picture, rng, pen, styles)
    made = [example(picture, None, None, rng), example(marked, covered, style, rng)]
    return [Example(one.seen, one.covered, one.style, has) for one in made]


class TrainMarks(Method):
    """A batch: (step, examples)."""

    def __init__(self, config: ModuleType, fonts: Sequence[Path], device: str = "cpu"):
        self.config, self.device, self.fonts = config, torch.device(device), fonts
        with torch.random.fork_rng():
            torch.manual_seed(keyed(config.SEED, "watermark init").initial_seed())
            self.net = MarkNet(Shape(config.WIDTHS))
        self.net.to(self.device).train()
        optimizer = adamw(dict(self.net.named_parameters()), config.LR, config.BETAS, config.WEIGHT_DECAY)
        self.networks = {"watermark": Network(self.net, optimizer)}

    def plan(self, steps: int | None = None) -> Plan:
        config, total = self.config, steps or self.config.STEPS
        every = {
            "log_every": config.LOG_EVERY,
            "validate_every": config.EVALUATE_EVERY,
            "save_every": config.SAVE_EVERY,
        }
        return Plan("watermark", total, config.WARMUP, min(total, config.DECAY), clip=config.CLIP, **every)

    @functools.cached_property
    def pictures(self) -> Pictures:
        return Pictures(self.config.SEED, pen_of(self.fonts, held_out=False))

    @functools.cache  # noqa: B019 (one method object a process)
    def ground(self, number: int) -> np.ndarray:
        return self.pictures.ground(number)

    def batches(self, step: int) -> Iterator[tuple[int, list[Example]]]:
        styles = [style for style in STYLES if style not in UNSEEN]
        while True:
            made: list[Example] = []
            for slot in range(self.config.PAIRS):
                rng = stamps.generator(self.config.SEED, "pair", step * self.config.PAIRS + slot)
                ground = self.ground(int(rng.integers(self.config.GROUNDS)))
                made += pair(ground, rng, self.pictures.pen, styles, self.config.DECOYS)
            yield step, made
            step += 1

    def about(self, batch: tuple[int, list[Example]]) -> About:
        return About(len(batch[1]))

    def losses(self, batch: tuple[int, list[Example]], step: int) -> dict[str, Losses]:
        x, stamped, covered = (part.to(self.device) for part in tensors(batch[1]))
        with torch.autocast(self.device.type, torch.bfloat16) if self.config.AUTOCAST else nullcontext():
            outputs = self.net(x)
        terms = loss((outputs[0].float(), outputs[1]), stamped, covered)
        return {"watermark": Losses(terms.pop("loss"), terms=terms)}

    def validate(self, step: int) -> dict[str, float]:
        found = measured(Marks(self.net, "training"), self.held)
        self.net.requires_grad_(True).train()
        return {"recall": found["recall"], "false_positives": found["false_positives"]}

    @functools.cached_property
    def held(self) -> list[Example]:
        return held_out(self.fonts, self.config.SEED, 0, self.config.VALIDATION)


def tensors(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """What the net sees, which pictures are stamped, which cells."""
    stamped = torch.tensor([float(one.style is not None) for one in examples])
    covered = torch.from_numpy(np.stack([one.covered for one in examples]))
    return pixels(torch.from_numpy(np.stack([one.seen for one in examples]))), stamped, covered


# ------------------------------------------------------------------------------------------------ what was never shown


def held_out(fonts: Sequence[Path], seed: int, first: int, pairs: int) -> list[Example]:
    """Pairs of fonts, photographs, scenes and words that no training has, all styles in turn."""
    pictures, made = Pictures(seed, pen_of(fonts, held_out=True), held_out=True), list[Example]()
    for number in range(first, first + pairs):
        rng = stamps.generator(seed, "held out", number)
        made += pair(pictures.ground(number), rng, pictures.pen, [STYLES[number % len(STYLES)]], 0.5)
    return made


def scored(judge: Marks, examples: Sequence[Example]) -> np.ndarray:
    return judge.logits(np.stack([one.seen for one in examples]))[0].numpy()


def measured(judge: Marks, examples: Sequence[Example]) -> dict[str, Any]:
    """Recall, precision (half of the pictures are stamped) and false positives at .5; of every style, and with decoys; then recall
    and false positives at LOWER."""
    logits = scored(judge, examples)
    found = logits > 0

    def share(wanted: Sequence[bool]) -> float:
        own = found[np.array(wanted)]
        return round(float(own.mean()), 4) if len(own) else float("nan")

    hits = int(sum(f for f, one in zip(found, examples) if one.style))
    return {
        "pictures": len(examples),
        "recall": share([one.style is not None for one in examples]),
        "precision": round(hits / max(1, int(found.sum())), 4),
        "false_positives": share([one.style is None for one in examples]),
        "false_positives_with_decoys": share([one.style is None and one.decoyed for one in examples]),
        "recall_of": {style: share([one.style == style for one in examples]) for style in STYLES},
        "at": {str(p): _at(logits, examples, p) for p in LOWER},
    }


def _at(logits: np.ndarray, examples: Sequence[Example], probability: float) -> dict[str, float]:
    found, truth = (
        logits > np.log(probability / (1 - probability)),
        np.array([one.style is not None for one in examples]),
    )
    return {"recall": round(float(found[truth].mean()), 4), "false_positives": round(float(found[~truth].mean()), 4)}


def calibrated(config: ModuleType, fonts: Sequence[Path], judge: Marks) -> float:
    """The lowest threshold of a logit with the recipe's precision, on training grounds with stamps that were not trained on."""
    method = TrainMarks(config, fonts)
    styles, made = [style for style in STYLES if style not in UNSEEN], list[Example]()
    for number in range(config.CALIBRATION):
        rng = stamps.generator(config.SEED, "calibration", number)
        made += pair(method.pictures.ground(config.GROUNDS + number), rng, method.pictures.pen, styles, config.DECOYS)
    logits, truth = scored(judge, made), np.array([one.style is not None for one in made])
    order = np.argsort(-logits, kind="stable")
    precision = np.cumsum(truth[order]) / np.arange(1, len(order) + 1)
    good = np.flatnonzero(precision >= config.LEAST_PRECISION)
    if not len(good):
        raise ValueError(f"no threshold has a precision of {config.LEAST_PRECISION}; expected a longer training")
    last = int(good[-1])
    after = logits[order[last + 1]] if last + 1 < len(order) else logits[order[last]] - 1
    return float((logits[order[last]] + after) / 2)


def error_sheet(path: Path, judge: Marks, examples: Sequence[Example]) -> None:
    """The worst mistakes of both kinds: stamps it does not see in the upper half, what it takes for one in the lower."""
    from PIL import Image

    logits, rows = scored(judge, examples), []
    for stamped, sign in ((True, 1), (False, -1)):
        own = sorted((sign * float(v), i) for i, v in enumerate(logits) if (examples[i].style is not None) is stamped)
        tiles = [examples[i].seen for _, i in own[:24]]
        tiles += [np.zeros((SIDE, SIDE, 3), np.uint8)] * (24 - len(tiles))
        rows += [np.concatenate(tiles[i : i + 8], 1) for i in range(0, 24, 8)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


# ------------------------------------------------------------------------------------------------ the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="mini", help="recipe in train/configs, or a file .py (default: mini)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/watermark"), help="folder of state and log (default: runs/watermark)"
    )
    parser.add_argument(
        "--fonts", type=Path, nargs="+", default=[FONTS], metavar="DIR", help=f"folders of fonts (default: {FONTS})"
    )
    parser.add_argument("--stop-after", type=duration, metavar="TIME", help="save and exit 0 after this long, e.g. 9m")
    parser.add_argument("--steps", type=positive, help="total steps instead of the recipe's")
    parser.add_argument("--device", default="cpu", help="where the net is trained (default: cpu)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--measure", action="store_true", help="train nothing; measure the shipped judge")
    what.add_argument(
        "--export", type=Path, metavar="FILE", help="train nothing; calibrate, measure and write the judge"
    )
    parser.add_argument("--pairs", type=positive, default=1400, help="of --measure and --export (default: 1400)")
    parser.add_argument("--asset", type=Path, default=ASSET, help="what --measure measures (default: the shipped one)")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="of --measure and --export: the worst mistakes")


def train(config: ModuleType, options: argparse.Namespace) -> None:
    clock, states = Clock(options.stop_after), StateFile(options.out / "watermark.pt")
    method = TrainMarks(config, options.fonts, options.device)
    trainer = Trainer(method.plan(options.steps), method, states, options.out, Ranks(method.device))
    if (before := states.latest()) is not None:
        trainer.resume(before)
    trainer.run(method.batches(trainer.step), clock)


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    config = configs.load(options.config, "watermark")
    if not (options.measure or options.export):
        train(config, options)
        return 0
    about: dict[str, Any] = {}
    if options.export:
        method, states = TrainMarks(config, options.fonts), StateFile(options.out / "watermark.pt")
        trainer = Trainer(method.plan(options.steps), method, states, options.out)
        trainer.resume(states.path)
        shift = calibrated(config, options.fonts, Marks(method.net, "exported"))
        with torch.no_grad():
            method.net.whole.bias.sub_(shift)
        parameters = sum(p.numel() for p in method.net.parameters())
        about = {"step": trainer.step, "recipe": options.config, "parameters": parameters, "shift": round(shift, 4)}
        write(options.export, method.net, about)
    path = options.export or options.asset
    judge = Marks.load(path)  # what is measured is what ships
    examples = held_out(options.fonts, config.SEED, 1_000_000, options.pairs)
    found = measured(judge, examples)
    for name, value in found.items():
        print(f"{name}: {value}")
    if options.export:
        write(path, judge.net, {**about, "by": judge.by, "held_out": found})
    if options.sheet is not None:
        error_sheet(options.sheet, judge, examples)
        print(options.sheet)
    return 0
