"""Stage "rl_prompts": the prompt set of the rl stage as JSON lines; by a language model, or of the small world without a server.

    python -m train rl_prompts --world mini --out runs/prompts.jsonl
    python -m train rl_prompts --world mini --count 64 --classes core --out few.jsonl
    python -m train rl_prompts --taxonomy --dry-run --out runs/rl_8k/prompts.jsonl         # what would be asked, and the cost
    python -m train rl_prompts --taxonomy --url https://api.openai.com/v1 --out runs/rl_8k/prompts.jsonl
    python -m train rl_prompts --taxonomy mine.txt --url http://127.0.0.1:8000/v1 --writer qwen3-32b --out runs/mine.jsonl
    python -m train rl_prompts --taxonomy --replay runs/rl_8k/prompts_calls/transcript.jsonl --out again.jsonl

--world mini: scenes of the small world that training may show (never Mini-Bench's held-out facts), from seeds no other stage draws;
each caption with ten rubrics that the local judge reads (train/rewards/small_world_rubrics.py).

--taxonomy: 8,406 items in ten categories (train/data/assets/taxonomy.v1.txt, or a FILE like it, with its shares and its seed), each
with one to four of attribute, spatial relationship, count, interaction and colour to be tested, by seed. The writer makes a prompt
and ten rubrics of each by the rules of train/data/assets/rl_prompt_writer.v1.md; what breaks one that can be counted goes back
with the reason. Beside OUT stand OUT's _calls/ (cache and transcript: the same command goes on where it was, and replays without
a server), its .left_out.jsonl, .manifest.json and .html with the histograms. Items and answers given, the file follows from the seed.

Every line: id, category, sub_category, item, dimensions (what is tested), prompt, rubrics [10], subsets. The global rubric is not
among the ten: judges ask it of every prompt.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lens.chat_client import PRICES, ChatClient, ChatError
from lens.formats.files import write_json

from .data.calls import in_order
from .data.prompt_writer import MODEL, TOKENS, VERSION, PromptWriter, Written
from .data.prompts import SUBSETS, Prompt, subsets_of, write_prompts
from .data.small_world.kinds import CORE, KINDS
from .data.small_world.scene import Scene
from .data.small_world.world import World
from .data.taxonomy import TAXONOMY, Item, chosen, dimensions_of, read_taxonomy
from .loop.checkpoints import write_text
from .loop.clock import positive
from .report import bars, page, table
from .rewards.rubric_judge import global_rubric
from .rewards.small_world_rubrics import rubrics_of, sentence

FIRST_SEED = 3_000_000_000  # of training prompts
VALIDATION_SEED = 3_500_000_000  # of prompts that choose a checkpoint: never trained on, never reported
WORLD_COUNT = 600
EVERY = 10.0  # seconds between lines of progress
TASKS = {
    "single_object": 0.1,
    "colors": 0.12,
    "two_object": 0.18,
    "position": 0.15,
    "counting": 0.2,
    "color_attr": 0.25,
}
CATEGORY = {
    "single_object": "objects",
    "two_object": "objects",
    "row": "objects",
    "colors": "attributes",
    "color_attr": "attributes",
    "counting": "numbers",
    "position": "relations",
    "text": "text",
}


def scenes(
    count: int,
    classes: Sequence[str],
    tasks: dict[str, float],
    first: int,
    side: tuple[int, int] = (64, 64),
    split: str = "train",
) -> list[Scene]:
    """The first `count` scenes from a seed on whose captions are GenEval's and that can be asked ten rubrics; no caption twice."""
    world, found = World(split, tasks, classes, "geneval"), {}
    for seed in range(first, first + 64 * count):
        scene = world.scene(seed, *side)
        if scene.style == "geneval" and scene.things and scene.caption not in found:
            found[scene.caption] = scene
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"rl_prompts: {len(found)} different prompts among {64 * count} scenes, expected {count}")


def prompt_of(scene: Scene) -> Prompt:
    rubrics, name = rubrics_of(scene), f"mini-{scene.seed}"
    return Prompt(
        id=name,
        category=CATEGORY[scene.task],
        sub_category=scene.task,
        item=", ".join(dict.fromkeys(thing.kind for thing in scene.things)),
        dimensions=tuple(dict.fromkeys(rubric.check for rubric in rubrics)),
        prompt=scene.caption,
        rubrics=tuple(map(sentence, rubrics)),
        subsets=subsets_of(name),
    )


# ------------------------------------------------------------------------------------------------ of the taxonomy


def histograms(pairs: Sequence[tuple[str, str, tuple[str, ...]]]) -> dict[str, dict[str, float]]:
    """(category, sub-category, dimensions) -> counts of each of them, of the number of dimensions, and of sub-categories."""
    numbers: collections.Counter[str] = collections.Counter(f"{len(own)} tested" for _, _, own in pairs)
    return {
        "Categories": dict(collections.Counter(category for category, _, _ in pairs)),
        "Dimensions": dict(collections.Counter(name for _, _, own in pairs for name in own).most_common()),
        "Dimensions of one prompt": dict(sorted(numbers.items())),
        "Sub-categories": dict(collections.Counter(f"{category}: {sub}" for category, sub, _ in pairs)),
    }


def write_page(
    path: Path, title: str, counts: dict[str, dict[str, float]], settings: dict[str, Any], some: str
) -> None:
    sections = [(name, bars(name, own)) for name, own in counts.items()]
    sections += [("Examples", some), ("Settings", table(settings))]
    write_text(path, page(title, [(heading, content) for heading, content in sections if content]))


def examples(prompts: Sequence[Prompt]) -> str:
    """The first prompt of each category, whole."""
    first = {prompt.category: prompt for prompt in reversed(prompts)}
    return "".join(
        table({"item": p.item, "tested": p.dimensions, "prompt": p.prompt, "rubrics": p.rubrics})
        for p in first.values()
    )


def beside(out: Path, ending: str) -> Path:
    return out.with_name(f"{out.stem}{ending}")


def of_taxonomy(options: argparse.Namespace) -> int:
    """Plan, ask, write. Errors: ValueError; ChatError by `misfortune`'s words where a budget is spent."""
    taxonomy = read_taxonomy(options.taxonomy)
    seed = taxonomy.seed if options.seed is None else options.seed
    items = chosen(taxonomy, options.count)
    settings = {
        "taxonomy": options.taxonomy.name,
        "taxonomy_sha256": taxonomy.fingerprint,
        "items": len(items),
        "seed": seed,
        "writer": options.writer,
        "writer_prompt": VERSION,
        "rounds": options.rounds,
        "shares": dict(taxonomy.shares),
    }
    planned = histograms([(item.category, item.sub_category, dimensions_of(item, seed)) for item in items])
    if options.dry_run:
        for name, count in planned["Categories"].items():
            print(f"{name:<24} {count:>5.0f}  {count / len(items):.1%}")
        print(
            f"{len(items)} items, {len(planned['Sub-categories'])} sub-categories; {estimate(options.writer, len(items))}"
        )
        write_page(beside(options.out, ".html"), "Prompts for RL: the plan", planned, settings, "")
        print(beside(options.out, ".html"))
        return 0
    if options.url is None and options.replay is None:
        raise ValueError("rl_prompts: --taxonomy needs --url of a server, --replay of a transcript, or --dry-run")
    calls = beside(options.out, "_calls")
    client = ChatClient(
        options.url,
        options.writer,
        concurrency=options.concurrency,
        cache=None if options.replay else calls / "cache",
        transcript=None if options.replay else calls / "transcript.jsonl",
        replay=options.replay,
        max_calls=options.max_calls,
        max_cost=options.max_cost,
    )
    with client:
        made = list(written(PromptWriter(client, seed, global_rubric(), options.rounds), items, options.concurrency))
    prompts = [one.prompt for one in made if one.prompt is not None]
    left = [one for one in made if one.prompt is None]
    # what was made, and what not
    rows = [{**asdict(one.item), "id": one.item.id, "reason": one.reason, "drafts": one.drafts} for one in left]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(beside(options.out, ".left_out.jsonl"), text)
    if not prompts:
        raise ValueError(f"rl_prompts: none of {len(items)} items became a prompt: {left[0].reason[:300]}")
    write_prompts(options.out, prompts)
    broken = collections.Counter(kind_of(text) for one in made for text in one.broken)
    settings |= {
        "prompts": len(prompts),
        "left_out": len(left),
        "drafts": sum(one.drafts for one in made),
        "rules_broken": dict(broken.most_common(12)),
    }
    write_json(beside(options.out, ".manifest.json"), settings)
    counts = histograms([(p.category, p.sub_category, p.dimensions) for p in prompts])
    spent = asdict(client.counters)
    write_page(beside(options.out, ".html"), "Prompts for RL", counts, {**settings, "calls": spent}, examples(prompts))
    print(f"{options.out}: {len(prompts)} prompts ({sizes(prompts)}), {len(left)} left out; {spending(client)}")
    return 0


def written(writer: PromptWriter, items: Sequence[Item], workers: int) -> list[Written]:
    """All items in their order, with a line of progress now and then. Errors: ChatError where a budget is spent."""
    made, said, begin = list[Written](), time.monotonic(), time.monotonic()
    for _, one in in_order(writer, items, workers):
        made.append(one)
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            left = (said - begin) / len(made) * (len(items) - len(made))
            print(f"{len(made)} of {len(items)} items, {spending(writer.client)}, {left:.0f} s left", flush=True)
    return made


def kind_of(complaint: str) -> str:
    """A broken rule without the words of the prompt."""
    return complaint.partition(", expected ")[2] or complaint.partition(":")[0][:60]


def spending(client: ChatClient) -> str:
    spent = client.counters
    cost = "cost unknown" if spent.cost is None else f"{spent.cost:.2f} USD"
    return f"{spent.calls} calls, {spent.cached} from before, {spent.failures} failed, {cost}"


def estimate(model: str, prompts: int) -> str:
    """Of one draft each."""
    read, wrote = (prompts * tokens / 1e6 for tokens in TOKENS)
    if model not in PRICES:
        return f"about {read:.1f} + {wrote:.1f} million tokens read and written"
    cost = read * PRICES[model][0] + wrote * PRICES[model][1]
    return f"about {read:.1f} + {wrote:.1f} million tokens read and written, {cost:.0f} USD by {model}"


def sizes(prompts: Sequence[Prompt]) -> str:
    return ", ".join(f"{name} {sum(name in p.subsets for p in prompts)}" for name in SUBSETS)


# ------------------------------------------------------------------------------------------------ the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--world", choices=("mini",), help="whose prompts: the small world's")
    source.add_argument(
        "--taxonomy",
        type=Path,
        nargs="?",
        const=TAXONOMY,
        metavar="FILE",
        help="items of a taxonomy (default: Lens-RL-8K's)",
    )
    parser.add_argument(
        "--count", type=positive, help=f"prompts (default: {WORLD_COUNT} of the world, the taxonomy's own total)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/prompts.jsonl"), help="file (default: runs/prompts.jsonl)"
    )
    world = parser.add_argument_group("with --world")
    world.add_argument("--classes", choices=("core", "all"), default="core", help="classes asked for (default: core)")
    world.add_argument(
        "--with-text", action="store_true", help="also prompts with a sign (read by OCR where installed)"
    )
    written = parser.add_argument_group("with --taxonomy")
    written.add_argument("--url", help="an OpenAI-compatible server, up to and with /v1; its key from the environment")
    written.add_argument("--writer", default=MODEL, metavar="MODEL", help=f"the model that writes (default: {MODEL})")
    written.add_argument("--replay", type=Path, metavar="TRANSCRIPT", help="answers out of a transcript, no server")
    written.add_argument("--rounds", type=positive, default=3, help="drafts of one item at most (default: 3)")
    written.add_argument("--seed", type=int, help="of the dimensions that are tested (default: the taxonomy's)")
    written.add_argument("--concurrency", type=positive, default=8, help="calls at a time (default: 8)")
    written.add_argument("--max-calls", type=positive, help="stop after so many calls")
    written.add_argument("--max-cost", type=float, metavar="USD", help="stop after so much, where the prices are known")
    written.add_argument("--dry-run", action="store_true", help="print and draw what would be asked, ask nothing")


def run(options: argparse.Namespace) -> int:
    if options.taxonomy is not None:
        try:
            return of_taxonomy(options)
        except ChatError as error:  # a budget, or another transcript; what was answered is kept
            print(f"error: {error}; the same command goes on from here", file=sys.stderr)
            return 1
    if given := [
        name for name in ("url", "replay", "seed", "max_calls", "max_cost") if getattr(options, name) is not None
    ]:
        raise ValueError(f"rl_prompts: --{given[0].replace('_', '-')} is for --taxonomy, not for --world")
    tasks = {**TASKS, "text": 0.1} if options.with_text else TASKS
    classes = CORE if options.classes == "core" else tuple(KINDS)
    prompts = [prompt_of(scene) for scene in scenes(options.count or WORLD_COUNT, classes, tasks, FIRST_SEED)]
    write_prompts(options.out, prompts)
    print(f"{options.out}: {len(prompts)} prompts ({sizes(prompts)})")
    return 0
