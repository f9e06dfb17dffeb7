"""Stage "prompt_search": a better system prompt for the reasoner, without training: write, draw, judge, summarise, rewrite.

    python -m train prompt_search --prompts prompts.jsonl --generator lens:mini --url http://127.0.0.1:8000/v1 \
        --reasoner-model qwen3-32b --judge-model qwen2.5-vl --out runs/search       # again to resume
    python -m train prompt_search ... --max-calls 5000 --max-cost 10
    python -m train prompt_search ... --generator openai:http://127.0.0.1:9000/v1 --generator-model NAME   # another generator

Prompts are JSON lines {"id", "prompt", "rubrics": [...]}; a part of them, by a hash of the id, is held out. Each iteration shows
the writer what failed under the best system prompt so far and asks for another. On the development prompts, with the same
seeds, it is accepted where its mean score rises by more than the paired bootstrap error of that rise. All are archived in
search.json; the final one is the accepted one with the best mean on the held-out prompts, the first included, and is written to
best.md, which `lens generate --reasoner-prompt` takes. Every call is in calls.jsonl and cached, so that a run that is
interrupted anywhere goes on where it was; a budget that is spent ends the search with what was found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lens.chat_client import BadAnswer, Chat, ChatClient, ChatError, Reply
from lens.formats.files import read_json, write_json
from lens.reasoner import PROMPTS, SYSTEMS, Reasoner, Refused, ServerReasoner

from .data.tables import json_lines
from .image_client import ImageClient
from .loop.checkpoints import write_text
from .loop.keys import keyed
from .rewards.judge import Judge
from .rewards.rubric_judge import MODEL, JudgeStopped, RubricJudge

WRITER = Path(__file__).parent / "rewards" / "assets" / "prompt_writer.v1.md"
RESAMPLES = 2000  # of the paired bootstrap
SHOWN = 12  # failures that the writer sees
MAX_CHARACTERS = 8000  # of a system prompt
_FORM = {
    "type": "object",
    "properties": {"diagnosis": {"type": "string"}, "prompt": {"type": "string"}},
    "required": ["diagnosis", "prompt"],
    "additionalProperties": False,
}

# prompts, seeds -> images uint8 [H, W, 3]; None where the generator refuses the prompt
Generate = Callable[[Sequence[str], Sequence[int]], Sequence[np.ndarray | None]]


@dataclass(frozen=True)
class Item:
    """One prompt to be drawn, and what its image is asked."""

    id: str
    prompt: str
    rubrics: tuple[str, ...]


@dataclass
class Candidate:
    """A system prompt of the archive. dev, held: score per prompt, None where the judgement failed; held: [] where the
    prompt was not accepted. rise, error: of the mean over its parent, and its bootstrap error."""

    text: str
    parent: int | None
    diagnosis: str = ""
    accepted: bool = False
    rise: float | None = None
    error: float | None = None
    dev: list[float | None] = field(default_factory=list)
    held: list[float | None] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)  # the worst, as the writer is shown them


def read_items(path: Path) -> list[Item]:
    """Errors: ValueError naming file and line."""
    items = []
    for number, values in json_lines(path):
        try:
            items.append(Item(str(values["id"]), values["prompt"], tuple(values["rubrics"])))
            if not isinstance(values["prompt"], str) or not items[-1].rubrics:
                raise ValueError("a prompt and at least one rubric are needed")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from None
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"{path}: ids must differ")
    return items


def split(items: Sequence[Item], held: float) -> tuple[list[Item], list[Item]]:
    """(development, held out), by a hash of the id: the same ones whatever else the file holds. ValueError where either
    would be empty."""
    out = [int(hashlib.sha256(item.id.encode()).hexdigest()[:8], 16) / 2**32 < held for item in items]
    dev, kept = ([item for item, o in zip(items, out) if o is side] for side in (False, True))
    if not dev or not kept:
        raise ValueError(
            f"prompt_search: {len(dev)} prompts to develop with and {len(kept)} held out: give more prompts"
        )
    return dev, kept


def rise(new: Sequence[float | None], old: Sequence[float | None], seed: int) -> tuple[float, float]:
    """Mean of the paired differences over the prompts judged in both, and its bootstrap error; (0, inf) without any."""
    pairs = [n - o for n, o in zip(new, old, strict=True) if n is not None and o is not None]
    if not pairs:
        return 0.0, float("inf")
    generator = np.random.default_rng(keyed(seed, "bootstrap").initial_seed())
    differences = np.array(pairs)
    means = differences[generator.integers(len(pairs), size=(RESAMPLES, len(pairs)))].mean(1)
    return float(differences.mean()), float(means.std())


def mean(scores: Sequence[float | None]) -> float:
    known = [s for s in scores if s is not None]
    return float(np.mean(known)) if known else 0.0


class Search:
    """The loop; everything it calls is given. State: `archive`, saved whole after each iteration."""

    def __init__(
        self,
        items: Sequence[Item],
        start: str,
        reasoner: Callable[[Path], Reasoner],
        generate: Generate,
        judge: Judge,
        writer: ChatClient,
        out: Path,
        held: float = 0.3,
        seed: int = 0,
    ):
        """reasoner: a file with a system prompt -> what writes prompts by it. ValueError where ``out`` holds another search."""
        self.dev, self.kept = split(items, held)
        self.reasoner, self.generate, self.judge, self.writer = reasoner, generate, judge, writer
        self.out, self.seed, self.archive = out, seed, list[Candidate]()
        told = json.dumps([start, seed, held, [asdict(item) for item in items]], sort_keys=True)
        self.name = hashlib.sha256(told.encode()).hexdigest()
        self.start, self.file = start, out / "search.json"
        if self.file.is_file():
            state = read_json(self.file)
            if state["search"] != self.name:
                raise ValueError(f"{self.file}: of other prompts, seed, share held out or first system prompt")
            self.archive = [Candidate(**values) for values in state["archive"]]

    @property
    def best(self) -> int:
        """The last that was accepted: each was better than the one before."""
        return max(k for k, candidate in enumerate(self.archive) if candidate.accepted)

    def run(self, iterations: int, tell: Callable[[str], None] = print) -> Candidate:
        """Up to that many rewrites in all; returns the final one. A spent budget ends it early."""
        try:
            if not self.archive:
                first = Candidate(self.start, None, accepted=True)
                first.dev, first.failures = self.scores(first.text, self.dev)
                self._keep(first)
                tell(f"start: dev {mean(first.dev):.3f}")
            while len(self.archive) <= iterations:
                candidate = self.rewritten()
                self._keep(candidate)
                said = "accepted" if candidate.accepted else "rejected"
                figures = "as before" if candidate.rise is None else f"{candidate.rise:+.3f} +- {candidate.error:.3f}"
                tell(
                    f"{len(self.archive) - 1}: dev {mean(candidate.dev):.3f} ({figures}), {said}: {candidate.diagnosis}"
                )
            for candidate in self.archive:
                if candidate.accepted and not candidate.held:
                    candidate.held, _ = self.scores(candidate.text, self.kept)
                    self._save()
        except ChatError as error:
            if error.kind != "budget" or not self.archive:
                raise
            tell(f"stopped: {error}")
        accepted = [candidate for candidate in self.archive if candidate.accepted]
        judged = [candidate for candidate in accepted if candidate.held]
        # on equal terms the earlier one, which is nearer to where a person began
        final = max(judged, key=lambda c: mean(c.held)) if len(judged) == len(accepted) else accepted[-1]
        write_text(self.out / "best.md", final.text.strip() + "\n")
        return final

    def rewritten(self) -> Candidate:
        """The next candidate, scored."""
        number, parent = len(self.archive), self.archive[self.best]
        told = {"system_prompt": parent.text, "mean_score": round(mean(parent.dev), 3), "failures": parent.failures}
        chat = Chat(
            json.dumps(told, ensure_ascii=False, indent=1), WRITER.read_text(encoding="utf-8"), schema=_FORM,
            temperature=1.0, max_tokens=4096, sample=number,
        )  # fmt: skip
        values = self.writer.ask(chat, written)
        made = Candidate(values["prompt"], self.best, values["diagnosis"])
        if known := next((c for c in self.archive if c.text.strip() == made.text.strip()), None):
            made.dev, made.failures = known.dev, known.failures  # rise stays None: nothing new was tried
            return made
        made.dev, made.failures = self.scores(made.text, self.dev)
        made.rise, made.error = rise(made.dev, parent.dev, self.seed)
        made.accepted = made.rise > made.error
        return made

    def scores(self, text: str, items: Sequence[Item]) -> tuple[list[float | None], list[dict[str, Any]]]:
        """Score of each item under a system prompt, and the worst failures. What reasoner or generator refuses scores 0."""
        path = self.out / "prompts" / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.md"
        write_text(path, text.strip() + "\n")
        answers = self.reasoner(path)([item.prompt for item in items])
        found: list[float | None] = [0.0 for _ in items]
        failures = [
            {"wish": item.prompt, "prompt": None, "failed": [f"refused: {answer.category}: {answer.reason}"]}
            for item, answer in zip(items, answers)
            if isinstance(answer, Refused)
        ]
        drawn = [(k, answer.prompt) for k, answer in enumerate(answers) if not isinstance(answer, Refused)]
        # of an item the same seed under every system prompt
        seeds = [keyed(self.seed, f"picture {items[k].id}").initial_seed() % 2**31 for k, _ in drawn]
        made = self.generate([prompt for _, prompt in drawn], seeds) if drawn else []
        failures += [
            {"wish": items[k].prompt, "prompt": prompt, "failed": ["refused by the generator"]}
            for (k, prompt), image in zip(drawn, made, strict=True)
            if image is None
        ]
        drawn = [pair for pair, image in zip(drawn, made) if image is not None]
        images = [image for image in made if image is not None]
        asked = [items[k] for k, _ in drawn]
        judged = self.judge.score([i.prompt for i in asked], [i.rubrics for i in asked], images)
        rows: list[tuple[float, dict[str, Any]]] = []
        for row, (k, prompt) in enumerate(drawn):
            found[k] = float(judged.score[row]) if judged.valid[row] else None
            ill = [
                f"{rubric}: {reason}"
                for rubric, value, reason in zip(items[k].rubrics, judged.per_rubric[row], judged.reasons[row])
                if value < 1
            ]
            if judged.valid[row] and ill:
                rows.append((float(judged.score[row]), {"wish": items[k].prompt, "prompt": prompt, "failed": ill}))
        rows.sort(key=lambda pair: pair[0])
        return found, [*failures, *(failure for _, failure in rows)][:SHOWN]

    def _keep(self, candidate: Candidate) -> None:
        self.archive.append(candidate)
        self._save()

    def _save(self) -> None:
        write_json(self.file, {"search": self.name, "archive": [asdict(candidate) for candidate in self.archive]})


def written(reply: Reply) -> dict[str, str]:
    """The writer's answer. Errors: BadAnswer."""
    try:
        values = json.loads(reply.text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(values.get(name), str) for name in ("diagnosis", "prompt")):
        raise BadAnswer(f"expected a JSON object with diagnosis and prompt, got {reply.text[:200]!r}")
    if not 0 < len(values["prompt"].strip()) <= MAX_CHARACTERS:
        raise BadAnswer(f"a system prompt must have 1 to {MAX_CHARACTERS} characters, got {len(values['prompt'])}")
    return values


def generator(source: str, per_batch: int = 16) -> Generate:
    """ "lens:SOURCE", a folder, a hub id or an embedded model's name. ValueError for anything else."""
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

    return draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSON lines: id, prompt, rubrics")
    parser.add_argument(
        "--url", required=True, help="OpenAI-compatible server of reasoner, writer and judge, up to /v1"
    )
    parser.add_argument("--judge-url", metavar="URL", help="another server for the judge")
    parser.add_argument("--reasoner-model", required=True, metavar="NAME", help="model whose system prompt is searched")
    parser.add_argument("--writer-model", metavar="NAME", help="model that rewrites it (default: the reasoner's)")
    parser.add_argument("--judge-model", default=MODEL, metavar="NAME", help=f"vision model (default: {MODEL})")
    parser.add_argument(
        "--generator",
        default="lens:mini",
        metavar="WHO",
        help="who draws: lens:SOURCE, or openai:URL of a server with OpenAI's images API (default: lens:mini)",
    )
    parser.add_argument("--generator-model", metavar="NAME", help="openai:URL: which of its models")
    parser.add_argument("--start", default="general", help=f"{', '.join(SYSTEMS)}, or a file (default: general)")
    parser.add_argument("--out", type=Path, default=Path("runs/search"), help="folder (default: runs/search)")
    parser.add_argument("--iterations", type=int, default=8, help="rewrites in all (default: 8)")
    parser.add_argument("--held", type=float, default=0.3, help="share of the prompts held out (default: 0.3)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and bootstrap (default: 0)")
    parser.add_argument("--concurrency", type=int, default=8, help="calls at once to each model (default: 8)")
    parser.add_argument("--max-calls", type=int, help="calls to each model in this run (default: no bound)")
    parser.add_argument("--max-cost", type=float, help="USD for each model in this run; needs a model of known price")


def run(options: argparse.Namespace) -> int:
    named = PROMPTS / f"{options.start}.v1.md"
    start = (named if options.start in SYSTEMS else Path(options.start)).read_text(encoding="utf-8")
    common = {
        "cache": options.out / "cache",
        "transcript": options.out / "calls.jsonl",
        "concurrency": options.concurrency,
        "max_calls": options.max_calls,
        "max_cost": options.max_cost,
    }
    clients, generate = list[ChatClient](), None
    kind, _, address = options.generator.partition(":")
    if kind == "openai":
        if not options.generator_model:
            raise ValueError(f"--generator {options.generator}: expected --generator-model NAME beside it")
        more = {"concurrency": options.concurrency, "max_calls": options.max_calls}
        painter = ImageClient(address, options.generator_model, options.out / "images", **more)
        clients, generate = [painter], painter.draw
    reasoner = ChatClient(options.url, options.reasoner_model, **common)
    writer = ChatClient(options.url, options.writer_model or options.reasoner_model, **common)
    judge = ChatClient(options.judge_url or options.url, options.judge_model, **common)
    clients += [reasoner, writer, judge]
    search = Search(
        read_items(options.prompts),
        start,
        lambda path: ServerReasoner(reasoner, path),
        generate or generator(options.generator),
        RubricJudge(judge),
        writer,
        options.out,
        options.held,
        options.seed,
    )
    try:
        final = search.run(options.iterations, lambda line: print(line, flush=True))
    except (ChatError, JudgeStopped) as error:
        print(f"error: {error}; what was found before is kept in {options.out}", file=sys.stderr)
        return 1
    finally:
        for client in clients:
            print(f"{client.model}: {client.counters}")
            client.close()
    held = f"{mean(final.held):.3f} held out" if final.held else "held out not judged"
    print(f"best: dev {mean(final.dev):.3f}, {held}; {options.out / 'best.md'}")
    return 0
