"""Readers and answerers of images: what an OpenAI-compatible server has, and RapidOCR in a reader's place.

The questions are the benchmarks' own words. An answer counts as it stands, whatever else it may mean: only "Yes" is yes. Where
the server tells probabilities, the soft score beside it is p(Yes) / (p(Yes) + p(No)) of the first token.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from lens.chat_client import Answer, BadAnswer, Chat, ChatClient, ChatError, Reply

from .judging import Card

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
READ = (
    "Recognize the text in the image, only reply with the text content, but avoid repeating previously mentioned content. "
    "If no text is recognized, please reply with 'No text recognized'."
)
ASK = "{}. Please answer 'Yes' or 'No' only."
ANSWER_TOKENS = 128  # written at most, of a question
QUESTION_TOKENS = (1_400, 4)  # of a call with a 1024-pixel image, read and written, assumed by the estimate
_ALTERNATIVES = 20


class Reader(Protocol):
    card: Card

    def read(self, images: Sequence[np.ndarray], limit: int) -> list[str | Exception]:
        """The text of each image, at most `limit` tokens of it; what went wrong in place of a text."""
        ...


@dataclass(frozen=True)
class Said:
    """yes: the answer is exactly "Yes"; soft: probability of it among Yes and No, None where the server did not tell."""

    yes: bool
    soft: float | None


class Answerer(Protocol):
    card: Card

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Said | Exception]: ...


def as_jpeg(image: np.ndarray) -> np.ndarray:
    """Through JPEG at Pillow's own quality: OneIG's code hands its judges the grid's cells in this form."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return np.asarray(Image.open(buffer).convert("RGB"))


def judgement(reply: Reply) -> Reply:
    """A reply that says something. Errors: BadAnswer for an empty one, which is how servers give what a filter held back or a
    budget of thinking used up: no judgement, where an image without text would be read as "No text recognized"."""
    if not reply.text.strip() or reply.finish == "content_filter":
        raise BadAnswer(f"an empty answer or one held back (finish reason {reply.finish!r}), expected words")
    return reply


def said(reply: Reply) -> Said:
    """What an answer counts as."""
    return Said(reply.text == "Yes", _probability(reply))


def _probability(reply: Reply) -> float | None:
    if not reply.logprobs:
        return None
    weight = {"Yes": 0.0, "No": 0.0}
    for token, logprob in reply.logprobs[0][1].items():
        if token.strip() in weight:
            weight[token.strip()] += math.exp(logprob)
    return weight["Yes"] / sum(weight.values()) if sum(weight.values()) else None


class ChatJudge:
    """`Reader` and `Answerer` over HTTP. Failures are in their own places; a spent budget ends the run."""

    def __init__(self, client: ChatClient, soft: bool = False):
        self.client, self.soft = client, soft
        differs = "" if client.model == MODEL else f"the published judge is {MODEL}"
        self.card = Card(client.model, "as its server says", "as its server says", "server", differs)

    def _all(self, chats: Sequence[Chat]) -> list[Answer[Reply]]:
        answers = self.client.ask_all(chats, judgement)
        for answer in answers:
            if answer.error is not None and answer.error.kind in ("budget", "replay"):
                raise answer.error
        return answers

    def read(self, images: Sequence[np.ndarray], limit: int) -> list[str | Exception]:
        answers = self._all([Chat(READ, images=(image,), max_tokens=limit) for image in images])
        return [a.reply.text if a.reply is not None else a.error or ChatError("answer", "none") for a in answers]

    def answer(self, image: np.ndarray, questions: Sequence[str]) -> list[Said | Exception]:
        top = _ALTERNATIVES if self.soft else 0
        chats = [Chat(ASK.format(q), images=(image,), max_tokens=ANSWER_TOKENS, top_logprobs=top) for q in questions]
        return [
            said(a.reply) if a.reply is not None else a.error or ChatError("answer", "none") for a in self._all(chats)
        ]


class RapidReader:
    """`Reader` by RapidOCR (extra `eval`): not what any benchmark was published with, and its card says so."""

    def __init__(self) -> None:
        from ..ocr import Reader as Engine

        self.engine = Engine()
        self.card = Card("RapidOCR variant", "1.4.4", "float32", "cpu", "RapidOCR in place of the published reader")

    def read(self, images: Sequence[np.ndarray], limit: int) -> list[str | Exception]:
        found: list[str | Exception] = []
        for image in images:
            try:
                found.append(self.engine.read(image))
            except Exception as error:  # a missing judgement, whatever it is
                found.append(error)
        return found
