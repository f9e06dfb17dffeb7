"""The loop over system prompts: write, draw, judge, summarise what failed, rewrite; an archive that is resumed, held-out prompts.

Everything that it calls is given: the reasoner that writes prompts by a system prompt, the generator, the judge, and the writer of
system prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from lens.chat_client import BadAnswer, Chat, ChatError, Reply
from lens.formats.files import read_json, write_json
from lens.reasoner import Reasoner, Refused

from ..data.tables import json_lines
from ..loop.checkpoints import write_text
from ..loop.keys import keyed
from ..rewards.judge import Judge

T = TypeVar("T")

WRITER = Path(__file__).parents[1] / "rewards" / "assets" / "prompt_writer.v1.md"
FULFILLED = 0.5  # of a judge that says yes or no
RESAMPLES = 2000  # of the paired bootstrap
GENERATOR_REFUSED = "refused by the generator"
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


class Writer(Protocol):
    """What writes system prompts: a `ChatClient`, or a script in its place."""

    def ask(self, chat: Chat, parse: Callable[[Reply], T]) -> T: ...


@dataclass(frozen=True)
class Outcome:
    """What became of one prompt under a system prompt. score: None where the judgement failed; prompt: what was drawn, None where the
    reasoner refused; failed: rubrics with reasons, or who refused."""

    score: float | None
    prompt: str | None
    failed: tuple[str, ...] = ()


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

    @property
    def described(self) -> str:
        said = "accepted" if self.accepted else "rejected"
        figures = "as before" if self.rise is None else f"{self.rise:+.3f} +- {self.error:.3f}"
        return f"dev {mean(self.dev):.3f} ({figures}), {said}: {self.diagnosis}"


def failures_of(items: Sequence[Item], found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The SHOWN worst as the writer is told them: what a reasoner refused first, then the generator, then by score."""
    ill = [(item, outcome) for item, outcome in zip(items, found, strict=True) if outcome.failed]

    def order(pair: tuple[Item, Outcome]) -> tuple[int, float]:
        _, outcome = pair
        refused = outcome.failed == (GENERATOR_REFUSED,)
        return (0 if outcome.prompt is None else 1 if refused else 2, outcome.score or 0.0)

    worst = sorted(ill, key=order)[:SHOWN]
    return [{"wish": item.prompt, "prompt": o.prompt, "failed": list(o.failed)} for item, o in worst]


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
        writer: Writer,
        out: Path,
        held: float = 0.3,
        seed: int = 0,
        fulfilled: float = FULFILLED,
        made_by: Mapping[str, Any] | None = None,
    ):
        """reasoner: a file with a system prompt -> what writes prompts by it. fulfilled: a rubric's value from which it is not shown to
        the writer as failed. made_by: judge, generator and whatever else scores depend on, by name, as JSON values. ValueError where
        ``out`` holds another search."""
        self.dev, self.kept = split(items, held)
        self.reasoner, self.generate, self.judge, self.writer = reasoner, generate, judge, writer
        self.out, self.seed, self.fulfilled, self.archive = out, seed, fulfilled, list[Candidate]()
        self.made_by = json.loads(json.dumps({"fulfilled": fulfilled, **(made_by or {})}))
        told = json.dumps([start, seed, held, [asdict(item) for item in items], self.made_by], sort_keys=True)
        self.name = hashlib.sha256(told.encode()).hexdigest()
        self.start, self.file = start, out / "search.json"
        if self.file.is_file():
            state = read_json(self.file)
            if state["search"] != self.name:
                if "made_by" not in state:
                    raise ValueError(f"{self.file}: does not say judge, generator and models; give another --out")
                names = {**state["made_by"], **self.made_by}
                differ = [name for name in names if state["made_by"].get(name) != self.made_by.get(name)]
                other = ", ".join(differ) or "prompts, seed, share held out or first system prompt"
                raise ValueError(f"{self.file}: of other {other}; give another --out")
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
                self.keep(first)
                tell(f"start: dev {mean(first.dev):.3f}")
            while len(self.archive) <= iterations:
                self.keep(self.rewritten())
                tell(f"{len(self.archive) - 1}: {self.archive[-1].described}")
            self.judge_held()
        except ChatError as error:
            if error.kind != "budget" or not self.archive:
                raise
            tell(f"stopped: {error}")
        return self.chosen()

    def judge_held(self) -> None:
        """Score every accepted candidate on the held-out prompts."""
        for candidate in self.archive:
            if candidate.accepted and not candidate.held:
                candidate.held, _ = self.scores(candidate.text, self.kept)
                self.save()

    def chosen(self) -> Candidate:
        """The final candidate, written to best.md: the best on the held-out prompts, or the last accepted where not all were judged."""
        accepted = [candidate for candidate in self.archive if candidate.accepted]
        judged = [candidate for candidate in accepted if candidate.held]
        # on equal terms the earlier one, which is nearer to where a person began
        final = max(judged, key=lambda c: mean(c.held)) if len(judged) == len(accepted) else accepted[-1]
        write_text(self.out / "best.md", final.text.strip() + "\n")
        return final

    def rewritten(self) -> Candidate:
        """The next candidate, scored."""
        parent = self.archive[self.best]
        values = self.proposed(parent.text, mean(parent.dev), parent.failures, len(self.archive))
        made = Candidate(values["prompt"], self.best, values["diagnosis"])
        if known := next((c for c in self.archive if c.text.strip() == made.text.strip()), None):
            made.dev, made.failures = known.dev, known.failures  # rise stays None: nothing new was tried
            return made
        made.dev, made.failures = self.scores(made.text, self.dev)
        made.rise, made.error = rise(made.dev, parent.dev, self.seed)
        made.accepted = made.rise > made.error
        return made

    def proposed(self, text: str, score: float, failures: Sequence[dict[str, Any]], number: int) -> dict[str, str]:
        """Diagnosis and rewritten system prompt, by the writer; number tells repeated questions apart."""
        told = {"system_prompt": text, "mean_score": round(score, 3), "failures": failures}
        chat = Chat(
            json.dumps(told, ensure_ascii=False, indent=1), WRITER.read_text(encoding="utf-8"), schema=_FORM,
            temperature=1.0, max_tokens=4096, sample=number,
        )  # fmt: skip
        return self.writer.ask(chat, written)

    def scores(self, text: str, items: Sequence[Item]) -> tuple[list[float | None], list[dict[str, Any]]]:
        """Score of each item under a system prompt, and the worst failures."""
        found = self.outcomes(text, items)
        return [outcome.score for outcome in found], failures_of(items, found)

    def outcomes(self, text: str, items: Sequence[Item]) -> list[Outcome]:
        """Of each item under a system prompt. What reasoner or generator refuses scores 0."""
        drawn = self.pictures(text, items)
        found = [Outcome(0.0, prompt, (why,)) for prompt, _, why in drawn]
        shown = [(k, image) for k, (_, image, _) in enumerate(drawn) if image is not None]
        asked = [items[k] for k, _ in shown]
        judged = self.judge.score([i.prompt for i in asked], [i.rubrics for i in asked], [image for _, image in shown])
        for row, (k, _) in enumerate(shown):
            if not judged.valid[row]:
                found[k] = Outcome(None, drawn[k][0])
                continue
            ill = [
                f"{rubric}: {reason}"
                for rubric, value, reason in zip(items[k].rubrics, judged.per_rubric[row], judged.reasons[row])
                if value < self.fulfilled
            ]
            found[k] = Outcome(float(judged.score[row]), drawn[k][0], tuple(ill))
        return found

    def pictures(self, text: str, items: Sequence[Item]) -> list[tuple[str | None, np.ndarray | None, str]]:
        """Of each item under a system prompt: the prompt, None where the reasoner refused; the image, None where the generator did;
        and who refused why."""
        path = self.out / "prompts" / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.md"
        write_text(path, text.strip() + "\n")
        found: list[tuple[str | None, np.ndarray | None, str]] = []
        for answer in self.reasoner(path)([item.prompt for item in items]):
            why = f"refused: {answer.category}: {answer.reason}" if isinstance(answer, Refused) else ""
            found.append((None if isinstance(answer, Refused) else answer.prompt, None, why))
        asked = [(k, prompt) for k, (prompt, _, _) in enumerate(found) if prompt is not None]
        # of an item the same seed under every system prompt
        seeds = [keyed(self.seed, f"picture {items[k].id}").initial_seed() % 2**31 for k, _ in asked]
        made = self.generate([prompt for _, prompt in asked], seeds) if asked else []
        for (k, prompt), image in zip(asked, made, strict=True):
            found[k] = (prompt, image, "" if image is not None else GENERATOR_REFUSED)
        return found

    def keep(self, candidate: Candidate) -> None:
        self.archive.append(candidate)
        self.save()

    def save(self) -> None:
        archive = [asdict(candidate) for candidate in self.archive]
        write_json(self.file, {"search": self.name, "made_by": self.made_by, "archive": archive})


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
