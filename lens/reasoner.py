"""0. Wish -> prompt: a language model writes out what a short wish leaves open. Off unless asked for.

A `Reasoner` turns wishes into `Refined` prompts or typed refusals, `Refused`. `ServerReasoner` asks any OpenAI-compatible
server, `EmbeddedReasoner` the pipeline's own text encoder. What they are told are files in reasoner_prompts/, by name and
version, each followed by the policy: what is refused, and that a refusal is a field of the answer. So prose that sounds like
a refusal never is one. An answer that is empty, broken or in another language gives way to the user's words, and says so.
Without a reasoner nothing is filtered.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .chat_client import BadAnswer, Chat, ChatClient, Reply
from .text_encoder import ANSWER, DEFAULT_CHAT_DATE, RETURN, WISH, parse_date

if TYPE_CHECKING:
    from .pipeline import LensPipeline

PROMPTS = Path(__file__).parent / "reasoner_prompts"
SYSTEMS = ("general", "geneval", "oneig", "text")
VERSION = "v1"
CATEGORIES = (
    "minors", "sexual", "violence", "hate", "self_harm", "extremism", "crime", "deception", "harassment", "other",
)  # fmt: skip
FLAGS = ("empty", "broken", "language", "unsure")  # why a prompt is the user's own words
MAX_CHARACTERS = 6000  # of a prompt; the text encoder reads about 400 tokens
SURE = 0.5  # of every token that Lens-Mini's reasoner writes: more probable than all others together, or it has not understood
_REPEATS = 3  # times that a sentence may stand in a prompt: small models fall into loops
_FALLBACKS = ("answer", "malformed", "too large")  # errors of a call that did bring an answer, though none to use

_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "prompt": {"type": ["string", "null"]},
        "refuse": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "category": {"type": "string", "enum": list(CATEGORIES)},
                        "reason": {"type": "string"},
                    },
                    "required": ["category", "reason"],
                    "additionalProperties": False,
                },
                {"type": "null"},
            ]
        },
    },
    "required": ["prompt", "refuse"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Refined:
    """What to draw for a wish. flag: "" where ``prompt`` is the reasoner's, else why it is the user's own words: "empty",
    "broken", "language" or "unsure", with ``note`` for people. source: model, system prompt and policy, with their versions."""

    wish: str
    prompt: str
    source: str
    flag: str = ""
    note: str = ""

    @property
    def described(self) -> str:
        """``source``, and that it was not followed where it was not: what a picture's recipe says."""
        return f"{self.source}: {self.flag}, the words as given" if self.flag else self.source


@dataclass(frozen=True)
class Refused:
    """A typed refusal; category is one of CATEGORIES."""

    category: str
    reason: str


class PromptsRefused(ValueError):
    """Raised by a pipeline called with a reasoner that refuses; `answers` are those of all its prompts, in order."""

    def __init__(self, answers: Sequence[Refined | Refused]):
        self.answers = list(answers)
        said = [f"prompt {k}: {a.category}: {a.reason}" for k, a in enumerate(answers) if isinstance(a, Refused)]
        super().__init__(f"refused by the reasoner: {'; '.join(said)}")


class Reasoner(Protocol):
    """Wishes -> an answer for each, in order."""

    def __call__(self, wishes: Sequence[str]) -> list[Refined | Refused]: ...


@dataclass(frozen=True)
class SystemPrompt:
    """name: for recipes, with versions; text: what the model is told, the policy included."""

    name: str
    text: str


def system_prompt(name: str | Path = "general") -> SystemPrompt:
    """One of SYSTEMS, or a text file of one's own; the policy follows in either case. ValueError for what is neither."""
    policy = (PROMPTS / f"policy.{VERSION}.md").read_text(encoding="utf-8")
    if name in SYSTEMS:
        path, shown = PROMPTS / f"{name}.{VERSION}.md", f"{name}.{VERSION}"
    else:
        path, shown = Path(name), Path(name).name
        if not path.is_file():
            raise ValueError(f"reasoner prompt {str(name)!r}: expected one of {', '.join(SYSTEMS)}, or a text file")
    return SystemPrompt(f"{shown}, policy.{VERSION}", f"{path.read_text(encoding='utf-8').strip()}\n\n{policy}")


# ------------------------------------------------------------------------------------------------ answers


def final_text(raw: str) -> str:
    """What a model says in the end: the last final channel of a harmony answer, or what follows a think block; "" where
    it ends before that."""
    if "<|channel|>" in raw:
        found = re.findall(
            r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>(.*?)(?=<\|(?:end|return|start|call)\|>|$)",
            raw, re.DOTALL,
        )  # fmt: skip
        return found[-1].strip() if found else ""
    ended = list(re.finditer(r"</(?:think|thinking|reasoning)>", raw))
    if ended:  # some templates open the block themselves
        return raw[ended[-1].end() :].strip()
    return "" if re.match(r"\s*<(?:think|thinking|reasoning)>", raw) else raw.strip()


def decided(wish: str, raw: str, source: str) -> Refined | Refused:
    """An answer as the model wrote it -> what it means. Errors: BadAnswer ("empty: ..." or "broken: ...")."""
    text = final_text(raw)
    if not text:
        raise BadAnswer("empty: no final answer")
    if fenced := re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?```", text, re.DOTALL):
        text = fenced[1]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise BadAnswer(f"broken: expected one JSON object, got {text[:80]!r}")
    refusal, prompt = values.get("refuse"), values.get("prompt")
    told = refusal if isinstance(refusal, dict) else {}
    category, reason = (" ".join(str(told.get(name) or "").split()) for name in ("category", "reason"))
    if isinstance(prompt, str) and prompt.strip():
        # beside a prompt, servers without strict schemas write null in words
        said = category or reason if told else str(refusal)
        if said.strip().lower() in ("", "null", "none", "false", "no", "n/a"):
            refusal = None
    if refusal:
        return Refused(category if category in CATEGORIES else "other", reason or "no reason given")
    if not isinstance(prompt, str | None):
        raise BadAnswer(f"broken: prompt must be text, got {type(prompt).__name__}")
    return accepted(wish, prompt or "", source)


def accepted(wish: str, prompt: str, source: str) -> Refined:
    """A prompt that can be drawn. Errors: BadAnswer ("empty: ...", "broken: ..." or "language: ...")."""
    prompt = " ".join(prompt.split())
    if not prompt:
        raise BadAnswer("empty: no prompt")
    if len(prompt) > MAX_CHARACTERS:
        raise BadAnswer(f"broken: {len(prompt)} characters, at most {MAX_CHARACTERS}")
    if marker := re.search(r"<\|\w*\|>|[\ud800-\udfff\x00-\x1f\ufffd]", prompt):
        raise BadAnswer(f"broken: {marker[0]!r} in the prompt")
    sentences = Counter(s.strip().lower() for s in re.split(r"[.!?;。！？；]", prompt) if s.strip())
    if sentences and max(sentences.values()) > _REPEATS:
        raise BadAnswer(f"broken: {sentences.most_common(1)[0][0]!r} again and again")
    asked, got = language(wish), language(prompt)
    if asked and got and asked != got:
        raise BadAnswer(f"language: the wish is in {asked!r}, the prompt in {got!r}")
    return Refined(wish, prompt, source)


def fallen_back(wish: str, why: str, source: str) -> Refined:
    """The user's words, for a reason such as "empty: no prompt"."""
    flag, _, note = why.partition(": ")
    return Refined(wish, wish, source, flag if flag in FLAGS else "broken", note or why)


# of Latin script the words that one language has and the others have not
_WORDS = {
    "en": "the and with is are of on in at from that two three its to an behind above below left right",
    "fr": "le les des et avec est sont sur dans du une deux trois au aux qui derrière devant",
    "es": "el los las y con está están sobre del una unos dos tres al en que detrás encima debajo",
    "de": "der die das und mit ist sind auf einem einer ein eine zwei drei im am den dem hinter vor",
    "it": "il gli della e con è sono sul nella uno due tre del dietro davanti",
    "pt": "o os as e com está são sobre do da um uma dois três no na atrás",
}
_SCRIPTS = (
    ("ja", "[\u3040-\u30ff]"), ("ko", "[\uac00-\ud7af\u1100-\u11ff]"), ("zh", "[\u4e00-\u9fff]"), ("ru", "[\u0400-\u04ff]"),
    ("ar", "[\u0600-\u06ff]"), ("hi", "[\u0900-\u097f]"), ("el", "[\u0370-\u03ff]"), ("he", "[\u0590-\u05ff]"), ("th", "[\u0e00-\u0e7f]"),
)  # fmt: skip


def language(text: str) -> str:
    """The language of a text by its script and, of Latin script, by its small words; "" where these do not decide.

    Texts in quotation marks, which a picture shows, do not count."""
    text = re.sub(r'"[^"]*"|“[^”]*”|„[^“”]*[“”]|«[^»]*»|「[^」]*」|『[^』]*』', " ", text)
    letters = [c for c in text if c.isalpha()]
    counts = {name: len(re.findall(script, text)) for name, script in _SCRIPTS}
    if counts["ja"] and counts["zh"]:  # Japanese is written in both
        counts["ja"] += counts.pop("zh")
    best = max(counts, key=lambda name: counts[name])
    if counts[best] * 2 > len(letters):
        return best
    if sum(counts.values()) * 4 > len(letters):
        return ""
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    scores = sorted(((sum(words[w] for w in own.split()), name) for name, own in _WORDS.items()), reverse=True)
    return scores[0][1] if scores[0][0] >= 2 and scores[0][0] >= 2 * scores[1][0] else ""


# ------------------------------------------------------------------------------------------------ a server


class ServerReasoner:
    """Any OpenAI-compatible server; the client has the model, cache, transcript and budgets."""

    def __init__(
        self,
        client: ChatClient,
        system: str | Path = "general",
        temperature: float | None = 0.0,
        max_tokens: int | None = 4096,  # thinking included
    ):
        self.client, self.system = client, system_prompt(system)
        self.temperature, self.max_tokens = temperature, max_tokens
        self.source = f"{client.model}, {self.system.name}"

    def __call__(self, wishes: Sequence[str]) -> list[Refined | Refused]:
        """Errors: ChatError where the server cannot be reached or does not serve; an answer that is no use falls back."""
        chats = [
            Chat(w, self.system.text, schema=_SCHEMA, temperature=self.temperature, max_tokens=self.max_tokens)
            for w in wishes
        ]

        def parser(wish: str) -> Any:
            return lambda reply: self._decided(wish, reply)

        made: list[Refined | Refused] = []
        for wish, answer in zip(wishes, self.client.ask_all(chats, [parser(wish) for wish in wishes])):
            if answer.error is not None and answer.error.kind not in _FALLBACKS:
                raise answer.error
            made.append(fallen_back(wish, str(answer.error), self.source) if answer.value is None else answer.value)
        return made

    def _decided(self, wish: str, reply: Reply) -> Refined | Refused:
        if reply.refusal or reply.finish == "content_filter":  # fields of the protocol, not prose
            return Refused("other", " ".join((reply.refusal or "filtered by the server").split()))
        if reply.finish == "length":
            raise BadAnswer("broken: cut off at its token limit")
        return decided(wish, reply.text, self.source)


# ------------------------------------------------------------------------------------------------ the encoder itself


class EmbeddedReasoner:
    """The pipeline's own text encoder, writing through the LM head that drawing does without.

    GPT-OSS follows the system prompt and policy. Lens-Mini's writes by layers of its own (``reasoner/``), trained on chats
    "wish -> dense caption" while the encoder's stayed: it reads no system prompt, writes plain text and cannot refuse. So small
    a model mixes up what it has not understood, but is unsure then: where a token's probability is below SURE, the user's words
    stay ("unsure").
    """

    def __init__(self, pipe: LensPipeline, system: str | Path = "general", max_tokens: int | None = None):
        """max_tokens: of an answer; default 160 for Mini, 2048 for GPT-OSS, thinking included. CheckpointError where the
        folder has no LM head, or some of the encoder's layers are not loaded."""
        from .formats.gpt_oss import load_lm_head, load_writer
        from .formats.text_encoder import with_lm_head
        from .gpt_oss import GptOss

        self.pipe, self.chat = pipe, pipe.text_encoder.tokenizer
        self.instructed = self.chat.is_gpt_oss
        self.max_tokens = max_tokens or (2048 if self.instructed else 160)
        self.system = system_prompt(system)
        files = pipe.text_encoder_files
        writer = load_writer(files, pipe.dtype, pipe.device)
        self.begins_with_wish = writer is not None
        model = writer or pipe.text_encoder.model
        self.head: Any = None  # where our own model writes: the LM head, mapped on a CPU
        if isinstance(model, GptOss):
            self.head = load_lm_head(files, model, pipe.device)
        self.model: Any = model if self.head is not None else with_lm_head(model, files)
        self.source = f"embedded, {self.system.name}" if self.instructed else "embedded"
        self._one = threading.Lock()  # generation keeps state in the model's own call

    def __call__(self, wishes: Sequence[str]) -> list[Refined | Refused]:
        with self._one, self.pipe.stage("encode"):
            return [self._answer(wish) for wish in wishes]

    def _answer(self, wish: str) -> Refined | Refused:
        try:
            ids, written, ended = self._written(wish)
            if not ended:
                raise BadAnswer(f"broken: no end within {self.max_tokens} tokens")
            text = self.chat.text(written)
            if self.instructed:
                return decided(wish, text, self.source)
            answer = accepted(wish, text, self.source)
            if self.begins_with_wish:
                shares = self.model.probabilities(self.head, ids + written, len(ids))
                least = int(shares.argmin())
                if shares[least] < SURE:
                    said = self.chat.text(written[least : least + 1]).strip()
                    raise BadAnswer(f"unsure: {shares[least]:.0%} for {said!r} in {text!r}")
            return answer
        except BadAnswer as error:
            return fallen_back(wish, str(error), self.source)

    def prompt_ids(self, wish: str) -> list[int]:
        """What the model reads before it writes. The wish is ordinary text in it, whatever markers it holds."""
        if not self.instructed:
            before, after = self.chat.frame(DEFAULT_CHAT_DATE)
            before = WISH if self.begins_with_wish else before
            return self.chat.ids(before) + self.chat.ids(wish, markers=False) + self.chat.ids(after + ANSWER)
        day = parse_date(DEFAULT_CHAT_DATE).isoformat()
        before = (
            "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
            f"Current date: {day}\n\nReasoning: low\n\n# Valid channels: analysis, commentary, final. Channel must be included "
            f"for every message.<|end|><|start|>developer<|message|># Instructions\n\n{self.system.text}\n\n<|end|>"
            "<|start|>user<|message|>"
        )
        return self.chat.ids(before) + self.chat.ids(wish, markers=False) + self.chat.ids("<|end|><|start|>assistant")

    def write(self, wish: str) -> tuple[str, bool]:
        """The most probable token after another: (the text with its markers, whether it came to its end)."""
        _, written, ended = self._written(wish)
        return self.chat.text(written), ended

    def _written(self, wish: str) -> tuple[list[int], list[int], bool]:
        """What was read, what was written without its end, and whether it came to it."""
        ids, end = self.prompt_ids(wish), self.chat.ids(RETURN)
        if self.head is not None:
            written = self.model.write(self.head, ids, self.max_tokens, stop=end)
        else:
            written = self._written_by_transformers(ids, end)
        ended = written[-1:] == end
        return ids, written[:-1] if ended else written, ended

    def _written_by_transformers(self, ids: list[int], end: list[int]) -> list[int]:
        import torch

        given = torch.tensor([ids], device=next(self.model.parameters()).device)
        with torch.no_grad():
            made = self.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=self.max_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=self.chat.pad_id,
            )
        written: list[int] = made[0, len(ids) :].tolist()
        return written
