"""Stage "prompt_search": a better system prompt for the reasoner, without training: write, draw, judge, summarise, rewrite.

    python -m train prompt_search --prompts prompts.jsonl --generator lens:mini --url http://127.0.0.1:8000/v1 \
        --reasoner-model qwen3-32b --judge-model qwen2.5-vl --out runs/search       # again to resume
    python -m train prompt_search ... --max-calls 5000 --max-cost 10 --prices 0.4,1.6    # USD per million tokens
    python -m train prompt_search ... --generator openai:http://127.0.0.1:9000/v1 --generator-model NAME   # another generator
    python -m train prompt_search ... --max-cost 10 --prices 0.4,1.6 --price-image 0.04  # and a bound of what it costs, too
    python -m train prompt_search ... --optimizer gepa                                   # a Pareto front (extra gepa)
    python -m train prompt_search --small-world 120 --generator lens:mini-turbo          # no server: scripts write

Prompts are JSON lines {"id", "prompt", "rubrics": [...]}; a part of them, by a hash of the id, is held out. Each iteration shows
the writer what failed under the best system prompt so far and asks for another. On the development prompts, with the same
seeds, it is accepted where its mean score rises by more than the paired bootstrap error of that rise. All are archived in
search.json; the final one is the accepted one with the best mean on the held-out prompts, the first included, and is written to
best.md, which `lens generate --reasoner-prompt` takes. sheet.png has held-out prompts under the first system prompt, and below
each row under the final one. Every call is in calls.jsonl and cached, so that a run that is interrupted anywhere goes on where
it was; a budget that is spent ends the search with what was found.

--small-world COUNT needs no server: wishes and judge are the small world's, and what stands for the reasoner and for the writer are
scripts that know a few rules (train/search/small_world.py), not language models.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lens.chat_client import PRICES, ChatClient, ChatError
from lens.reasoner import PROMPTS, SYSTEMS, Reasoner, ServerReasoner
from lens.reasoner import VERSION as POLICY

from .data.contact_sheet import contact_sheet
from .evaluate.published.command import prices_of
from .evaluate.published.judging import Z
from .image_client import ImageClient
from .rewards.judge import Judge
from .rewards.rubric_judge import MODEL, VERSION, JudgeStopped, RubricJudge
from .search import by_gepa, small_world
from .search.loop import FULFILLED, Candidate, Generate, Item, Search, Writer, mean, read_items, rise

SHEET, COLUMNS = 16, 8  # held-out prompts on the sheet, and in a row of it


def generator(source: str, per_batch: int = 16) -> tuple[Generate, str]:
    """ "lens:SOURCE", a folder, a hub id or an embedded model's name, and the fingerprint of its weights. ValueError for anything
    else."""
    kind, _, name = source.partition(":")
    if kind != "lens" or not name:
        raise ValueError(f"--generator {source!r}: expected lens:SOURCE, such as lens:mini, or openai:URL")
    from lens import LensPipeline

    pipe = LensPipeline.from_pretrained(name)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        made: list[np.ndarray] = []
        for k in range(0, len(prompts), per_batch):
            images = pipe(prompts[k : k + per_batch], seed=list(seeds[k : k + per_batch]), output_type="np").images  # type: ignore[union-attr]
            made += [(image * 255).round().astype(np.uint8) for image in images]
        return made

    return draw, pipe.fingerprint or ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", type=Path, metavar="FILE", help="JSON lines: id, prompt, rubrics")
    what.add_argument(
        "--small-world",
        type=int,
        metavar="COUNT",
        help="that many wishes of the small world, judged and written here: no server",
    )
    parser.add_argument("--url", help="OpenAI-compatible server of reasoner, writer and judge, up to /v1")
    parser.add_argument("--judge-url", metavar="URL", help="another server for the judge")
    parser.add_argument("--reasoner-model", metavar="NAME", help="model whose system prompt is searched")
    parser.add_argument("--writer-model", metavar="NAME", help="model that rewrites it (default: the reasoner's)")
    parser.add_argument("--judge-model", default=MODEL, metavar="NAME", help=f"vision model (default: {MODEL})")
    parser.add_argument(
        "--generator",
        default="lens:mini",
        metavar="WHO",
        help="who draws: lens:SOURCE, or openai:URL of a server with OpenAI's images API (default: lens:mini)",
    )
    parser.add_argument("--generator-model", metavar="NAME", help="openai:URL: which of its models")
    parser.add_argument(
        "--optimizer", choices=("own", "gepa"), default="own", help="our loop, or the package gepa's (default: own)"
    )
    parser.add_argument(
        "--start", help=f"{', '.join(SYSTEMS)}, or a file (default: general; with --small-world the wish as it stands)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="folder (default: runs/search)")
    parser.add_argument("--iterations", type=int, default=8, help="rewrites in all (default: 8)")
    parser.add_argument("--held", type=float, default=0.3, help="share of the prompts held out (default: 0.3)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and bootstrap (default: 0)")
    parser.add_argument("--concurrency", type=int, default=8, help="calls at once to each model (default: 8)")
    parser.add_argument("--max-calls", type=int, help="calls to each model in this run (default: no bound)")
    parser.add_argument("--max-cost", type=float, help="USD for each model in this run; needs the prices of all")
    parser.add_argument(
        "--prices",
        type=prices_of,
        metavar="READ,WRITTEN",
        help="USD per million tokens of reasoner, writer and judge; of the dearest where they differ "
        f"(default: those of {', '.join(PRICES)})",
    )
    parser.add_argument("--price-image", type=float, metavar="USD", help="openai:URL: what an image costs")


@dataclass(frozen=True)
class Parts:
    """What a search is made of besides the generator; clients are closed in the end."""

    items: Sequence[Item]
    reasoner: Callable[[Path], Reasoner]
    judge: Judge
    writer: Writer
    clients: Sequence[ChatClient] = ()
    fulfilled: float = FULFILLED
    made_by: Mapping[str, str] = field(default_factory=dict)


def parts_of(options: argparse.Namespace) -> Parts:
    """Errors: ValueError naming the option that is missing."""
    if options.small_world is not None:
        items, judge = small_world.wishes(options.small_world), small_world.local_judge()
        scripts = {"reasoner": "script", "writer": "script", "judge": "small world"}
        writer = small_world.ScriptedRewriter()
        return Parts(items, small_world.LiteralWriter, judge, writer, (), small_world.FULFILLED, scripts)
    if not options.url or not options.reasoner_model:
        raise ValueError("--prompts needs --url and --reasoner-model; --small-world needs no server")
    names = (options.reasoner_model, options.writer_model or options.reasoner_model, options.judge_model)
    if options.max_cost is not None and options.prices is None and (unknown := [n for n in names if n not in PRICES]):
        raise ValueError(
            f"--max-cost: the price of {unknown[0]} is not known: expected --prices READ,WRITTEN beside it"
        )
    common: dict[str, Any] = {
        "cache": options.out / "cache",
        "transcript": options.out / "calls.jsonl",
        "concurrency": options.concurrency,
        "max_calls": options.max_calls,
        "max_cost": options.max_cost,
        "prices": options.prices,
    }
    urls = (options.url, options.url, options.judge_url or options.url)
    reasoner, asked, judges = clients = tuple(ChatClient(url, name, **common) for url, name in zip(urls, names))
    make, rubrics = functools.partial(ServerReasoner, reasoner), RubricJudge(judges)
    made_by = {
        "reasoner": f"{reasoner.model}, policy.{POLICY}",
        "writer": asked.model,
        "judge": f"{judges.model}, {rubrics.kind}.{VERSION}",
    }
    return Parts(read_items(options.prompts), make, rubrics, asked, clients, made_by=made_by)


def start_of(options: argparse.Namespace) -> str:
    """The first system prompt."""
    if options.start is None and options.small_world is not None:
        return small_world.START
    name = options.start or "general"
    return (PROMPTS / f"{name}.v1.md" if name in SYSTEMS else Path(name)).read_text(encoding="utf-8")


def write_sheet(search: Search, final: Candidate) -> Path:
    """The first SHEET held-out prompts under the first system prompt, and below each row under the final one."""
    rows, items = [], search.kept[:SHEET]
    for candidate in (search.archive[0], final):
        scores = candidate.held or [None] * len(search.kept)
        drawn = search.pictures(candidate.text, items)
        rows.append(
            [
                (image, f"{'-' if score is None else f'{score:.2f}'} {prompt}")
                for (prompt, image, _), score in zip(drawn, scores)
            ]
        )
    shown = [pair for k in range(0, len(items), COLUMNS) for row in rows for pair in row[k : k + COLUMNS]]
    blank = np.zeros(next((i.shape for i, _ in shown if i is not None), (64, 64, 3)), np.uint8)
    path = search.out / "sheet.png"
    contact_sheet([blank if i is None else i for i, _ in shown], [c for _, c in shown], path, columns=COLUMNS)
    return path


def run(options: argparse.Namespace) -> int:
    clients = list[ChatClient]()
    generate: Generate | None = None
    drawn_by = ""
    kind, _, address = options.generator.partition(":")
    if kind == "openai":
        if not options.generator_model:
            raise ValueError(f"--generator {options.generator}: expected --generator-model NAME beside it")
        if options.max_cost is not None and options.price_image is None:
            raise ValueError(
                f"--max-cost: what an image of {options.generator} costs is not known: expected --price-image USD"
            )
        painter = ImageClient(
            address, options.generator_model, options.out / "images", options.concurrency,
            options.max_calls, options.max_cost, options.price_image,
        )  # fmt: skip
        clients, generate, drawn_by = [painter], painter.draw, f"openai:{options.generator_model}"
    parts = parts_of(options)
    clients += parts.clients
    if generate is None:
        generate, weights = generator(options.generator)
        drawn_by = f"{options.generator} {weights[:16]}"
    made_by = {**parts.made_by, "generator": drawn_by, "optimizer": options.optimizer}
    search = Search(
        parts.items, start_of(options), parts.reasoner, generate, parts.judge, parts.writer,
        options.out, options.held, options.seed, parts.fulfilled, made_by,
    )  # fmt: skip

    def tell(line: str) -> None:
        print(line, flush=True)

    try:
        gepa = options.optimizer == "gepa"
        final = by_gepa.optimise(search, options.iterations, tell) if gepa else search.run(options.iterations, tell)
        sheet = write_sheet(search, final) if final.held else None
    except (ChatError, JudgeStopped) as error:
        print(f"error: {error}; what was found before is kept in {options.out}", file=sys.stderr)
        return 1
    finally:
        for client in clients:
            print(f"{client.model}: {client.counters}")
            client.close()
    print(
        f"best: dev {mean(final.dev):.3f}, {on_held_out(search.archive[0], final, options.seed)}; {options.out / 'best.md'}"
    )
    if sheet:
        print(sheet)
    return 0


def on_held_out(first: Candidate, final: Candidate, seed: int) -> str:
    """The final mean on the held-out prompts, and its rise over the first system prompt with a 95 % interval."""
    if not final.held:
        return "held out not judged"
    value, error = rise(final.held, first.held, seed)
    low, high = value - Z * error, value + Z * error
    return f"{mean(final.held):.3f} held out, {value:+.3f} [{low:+.3f}, {high:+.3f}] over the first"
