"""A vision-language model as judge: one call per image with its prompt and rubrics, over any OpenAI-compatible server.

Three kinds of score per rubric: "binary", fulfilled or not, whose mean is the paper's reward; "graded", 0 to 10 divided by
10; "probability", p(true) / (p(true) + p(false)) of the answer's own tokens, smoother, where the server tells them. The
score of an image is the mean over its rubrics. A judgement that failed is masked, never 0; more failures than
`max_failed` stop the step, as a `JudgeStopped` that says why.

What the judge is told are files in assets/, by kind and version; the text is part of the cache's key.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lens.chat_client import BadAnswer, Chat, ChatClient, Reply

from .judge import Scores

ASSETS = Path(__file__).parent / "assets"
VERSION = "v1"
MODEL = "gpt-4.1-mini"
KINDS = ("binary", "graded", "probability")
GRADES = 10  # the best grade
_ALTERNATIVES = 20  # tokens reported beside each of the answer, the most that servers give

# one number and the reason of each rubric
Verdict = tuple[float, str]


class JudgeStopped(RuntimeError):
    """Too many judgements of one batch failed; the message has the number and the commonest reasons."""


def global_rubric() -> str:
    """The paper's, which every prompt has beside its own ten."""
    return (ASSETS / f"global_rubric.{VERSION}.txt").read_text(encoding="utf-8").strip()


def instructions(kind: str) -> str:
    """The system prompt of a kind of score. ValueError for an unknown one."""
    if kind not in KINDS:
        raise ValueError(f"RubricJudge: kind must be one of {KINDS}, got {kind!r}")
    return (ASSETS / f"rubric_judge_{kind}.{VERSION}.md").read_text(encoding="utf-8")


class RubricJudge:
    """A `Judge` over HTTP. The client has the model (`MODEL` by default), the cache, the transcript and the counters."""

    def __init__(self, client: ChatClient, kind: str = "binary", max_failed: float = 0.05):
        """max_failed: share of a batch's judgements that may fail; 1 leaves the rule to who asks."""
        if not 0 <= max_failed <= 1:
            raise ValueError(f"RubricJudge: max_failed must be in [0, 1], got {max_failed}")
        self.client, self.kind, self.max_failed, self.system = client, kind, max_failed, instructions(kind)

    @classmethod
    def at(
        cls, url: str, model: str = MODEL, kind: str = "binary", max_failed: float = 0.05, **client: Any
    ) -> RubricJudge:
        """By address; ``client``: further arguments of `ChatClient`."""
        return cls(ChatClient(url, model, **client), kind, max_failed)

    def score(self, prompts: Sequence[str], rubrics: Sequence[Sequence[str]], images: Sequence[np.ndarray]) -> Scores:
        """See `Judge`. ValueError for lists of unequal length or an image without rubrics; JudgeStopped; ChatError where a
        budget is spent or a transcript lacks a call."""
        n = len(images)
        if not len(prompts) == len(rubrics) == n:
            raise ValueError(f"RubricJudge: {len(prompts)} prompts, {len(rubrics)} lists of rubrics, {n} images")
        if empty := [i for i, own in enumerate(rubrics) if not own]:
            raise ValueError(f"RubricJudge: image {empty[0]} has no rubric")
        chats = [self.chat(*row) for row in zip(prompts, rubrics, images)]
        answers = self.client.ask_all(chats, [partial(self.verdicts, count=len(own)) for own in rubrics])
        per_rubric = np.full((n, max(map(len, rubrics), default=0)), np.nan, np.float32)
        valid, reasons, failures = np.zeros(n, bool), list[list[str]](), list[str]()
        for i, answer in enumerate(answers):
            if answer.error is not None and answer.error.kind in ("budget", "replay"):  # no judgement was tried
                raise answer.error
            if answer.value is None:
                failures.append(str(answer.error))
                reasons.append([f"not judged: {answer.error}"])
                continue
            per_rubric[i, : len(answer.value)] = [value for value, _ in answer.value]
            reasons.append([reason for _, reason in answer.value])
            valid[i] = True
        if len(failures) > self.max_failed * n:
            common = "; ".join(f"{count} x {text[:200]}" for text, count in Counter(failures).most_common(3))
            raise JudgeStopped(
                f"judge {self.client.model}: {len(failures)} of {n} judgements failed, more than {self.max_failed:.0%}: {common}"
            )
        score = np.full(n, np.nan, np.float32)
        score[valid] = [np.nanmean(row) for row in per_rubric[valid]]
        return Scores(score, valid, per_rubric, reasons)

    def chat(self, prompt: str, rubrics: Sequence[str], image: np.ndarray) -> Chat:
        """The call about one image."""
        numbered = "\n".join(f"{number}. {' '.join(rubric.split())}" for number, rubric in enumerate(rubrics, 1))
        return Chat(
            user=f"Prompt:\n{prompt}\n\nRubrics:\n{numbered}",
            system=self.system,
            images=(image,),
            schema=_schema(self.kind),
            max_tokens=64 + (8 if self.kind == "probability" else 96) * len(rubrics),
            top_logprobs=_ALTERNATIVES if self.kind == "probability" else 0,
        )

    def verdicts(self, reply: Reply, count: int) -> list[Verdict]:
        """Of `count` rubrics the value in [0, 1] and the reason. Errors: BadAnswer for any other form."""
        if reply.refusal or reply.finish == "content_filter":
            raise BadAnswer(f"the judge refused: {reply.refusal or reply.finish}")
        try:
            entries = json.loads(reply.text, object_pairs_hook=_once)["verdicts"]
        except BadAnswer:
            raise
        except (ValueError, KeyError, TypeError, RecursionError):
            cut = ", cut off at its token limit" if reply.finish == "length" else ""
            raise BadAnswer(f'expected a JSON object with "verdicts"{cut}, got {reply.text[:200]!r}') from None
        if not isinstance(entries, list) or len(entries) != count:
            got = len(entries) if isinstance(entries, list) else type(entries).__name__
            raise BadAnswer(f"expected {count} verdicts, got {got}")
        if self.kind == "probability":
            if not all(isinstance(value, bool) for value in entries):
                raise BadAnswer(f"expected true or false for each rubric, got {entries}")
            return list(zip(_probabilities(reply, count), [str(value).lower() for value in entries]))
        return [self._verdict(entry, number) for number, entry in enumerate(entries, 1)]

    def _verdict(self, entry: Any, number: int) -> Verdict:
        own = entry if isinstance(entry, dict) else {}
        if type(own.get("rubric")) is not int or own["rubric"] != number or not isinstance(own.get("reason"), str):
            raise BadAnswer(f"expected rubric {number} with its reason, got {entry}")
        value = own.get("verdict")
        if self.kind == "binary" and isinstance(value, bool):
            return float(value), own["reason"]
        if self.kind == "graded" and isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= GRADES:
            return value / GRADES, own["reason"]
        form = "true or false" if self.kind == "binary" else f"a whole number from 0 to {GRADES}"
        raise BadAnswer(f"rubric {number}: expected {form}, got {value!r}")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of a verdict that is given twice neither counts. Errors: BadAnswer."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadAnswer(f"expected every key of an object once, got {twice!r} again")
    return values


def _schema(kind: str) -> dict[str, Any]:
    verdict: dict[str, Any] = {"type": "integer" if kind == "graded" else "boolean"}
    if kind != "probability":
        parts = {"rubric": {"type": "integer"}, "reason": {"type": "string"}, "verdict": verdict}
        verdict = {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}
    verdicts = {"verdicts": {"type": "array", "items": verdict}}
    return {"type": "object", "properties": verdicts, "required": ["verdicts"], "additionalProperties": False}


def _probabilities(reply: Reply, count: int) -> list[float]:
    """p(true) / (p(true) + p(false)) where each true or false of the answer begins. Errors: BadAnswer."""
    starts, text = [], ""
    for token, _ in reply.logprobs:
        starts.append(len(text))
        text += token
    found = []
    for match in re.finditer("true|false", text):
        index = max(i for i, start in enumerate(starts) if start <= match.start())
        before = text[starts[index] : match.start()]  # what the token holds before the word: a blank, a bracket
        weight = {"true": 0.0, "false": 0.0}
        for token, logprob in reply.logprobs[index][1].items():
            for word in weight:
                rest = token.removeprefix(before)
                if rest and (rest.startswith(word) or word.startswith(rest)):
                    weight[word] += math.exp(logprob)
        if not sum(weight.values()):
            raise BadAnswer(f"no probability of true or false beside {match.group()!r}")
        found.append(weight["true"] / sum(weight.values()))
    if len(found) != count:
        raise BadAnswer(f"expected the tokens of {count} verdicts with their probabilities, got {len(found)}")
    return found
