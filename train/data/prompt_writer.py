"""Items of the taxonomy -> prompts with ten rubrics, by a language model over HTTP, held to `prompt_rules`.

One call an item. A draft that breaks a rule goes back with what it breaks, `rounds` times in all; an item whose last draft still
breaks one is left out, with the reason, never kept quietly. What the writer is told is a file in assets/, by version.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.chat_client import BadAnswer, Chat, ChatClient, ChatError, Reply

from .prompt_rules import ABOUT, Draft, Thing, broken_rules
from .prompts import Prompt, subsets_of
from .taxonomy import DIMENSIONS, Item, dimensions_of

VERSION = "v1"
WRITER = Path(__file__).parent / "assets" / f"rl_prompt_writer.{VERSION}.md"
MODEL = "gpt-4.1"
TOKENS = (1300, 700)  # read and written for one prompt, about: for estimates alone


@dataclass(frozen=True)
class Written:
    """What became of an item: the prompt, or why there is none. drafts: calls it took; broken: the rules that drafts broke."""

    item: Item
    prompt: Prompt | None
    reason: str = ""
    drafts: int = 1
    broken: tuple[str, ...] = ()


def chat_of(item: Item, dimensions: tuple[str, ...], complaints: list[str], draft: int) -> Chat:
    """The call for one draft; from the second on it says what the one before broke."""
    said = f"Category: {item.category}\nSub-category: {item.sub_category}\nSubject: {item.name}\nTest: {', '.join(dimensions)}"
    if complaints:
        said += "\n\nYour answer before broke these rules; write a new one that keeps them all:\n"
        said += "\n".join(f"- {text}" for text in complaints)
    return Chat(
        user=said,
        system=WRITER.read_text(encoding="utf-8"),
        schema=_schema(),
        temperature=0.7,
        max_tokens=2048,
        seed=int(item.id[-6:], 16),
        sample=draft,
    )


def read_draft(reply: Reply) -> Draft | str:
    """An answer, or why it is none that asking again would change: a refusal. Errors: BadAnswer for any other form."""
    if reply.refusal or reply.finish == "content_filter":
        return f"refused: {reply.refusal or reply.finish}"
    try:
        values = json.loads(reply.text)
        things = tuple(Thing(str(o["label"]), _whole(o["count"]), str(o["colour"])) for o in values["objects"])
        evidence = tuple((str(e["dimension"]), str(e["quote"])) for e in values["evidence"])
        rubrics = tuple((str(r["about"]), " ".join(str(r["text"]).split())) for r in values["rubrics"])
        return Draft(str(values["prompt"]).strip(), things, evidence, rubrics)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        cut = ", cut off at its token limit" if reply.finish == "length" else ""
        raise BadAnswer(
            f"expected prompt, objects, evidence and rubrics{cut} ({error!r}): {reply.text[:120]!r}"
        ) from None


class PromptWriter:
    """`client` has the model, the cache, the transcript and the counters; threads may share it."""

    def __init__(self, client: ChatClient, seed: int, general: str, rounds: int = 3):
        """general: the rubric that a judge adds to the ten. rounds: drafts of one item at most."""
        self.client, self.seed, self.general, self.rounds = client, seed, general, rounds

    def __call__(self, item: Item) -> Written:
        """Errors: ChatError where a budget is spent or a transcript lacks a call."""
        dimensions = dimensions_of(item, self.seed)
        complaints, every = list[str](), list[str]()
        for draft in range(self.rounds):
            try:
                made = self.client.ask(chat_of(item, dimensions, complaints, draft), read_draft)
            except ChatError as error:
                if error.kind in ("budget", "replay"):
                    raise
                return Written(item, None, f"{error.kind}: {error}", draft + 1, tuple(every))
            if isinstance(made, str):
                return Written(item, None, made, draft + 1, tuple(every))
            complaints = broken_rules(made, item, dimensions, self.general)
            every += complaints
            if not complaints:
                return Written(item, _prompt(item, dimensions, made), "", draft + 1, tuple(every))
        return Written(item, None, "breaks: " + "; ".join(complaints), self.rounds, tuple(every))


def _prompt(item: Item, dimensions: tuple[str, ...], draft: Draft) -> Prompt:
    rubrics = tuple(text for _, text in draft.rubrics)
    return Prompt(
        item.id, item.category, item.sub_category, item.name, dimensions, draft.prompt, rubrics, subsets_of(item.id)
    )


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"count: expected a whole number, got {value!r}")
    return value


def _schema() -> dict[str, Any]:
    def record(**parts: Any) -> dict[str, Any]:
        return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}

    def rows(**parts: Any) -> dict[str, Any]:
        return {"type": "array", "items": record(**parts)}

    text = {"type": "string"}
    return record(
        prompt=text,
        objects=rows(label=text, count={"type": "integer"}, colour=text),
        evidence=rows(dimension={"type": "string", "enum": list(DIMENSIONS)}, quote=text),
        rubrics=rows(about={"type": "string", "enum": list(ABOUT)}, text=text),
    )
