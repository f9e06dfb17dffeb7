"""1. Prompt -> chat -> tokens -> features of selected decoder layers (arXiv 2605.21573, section 3).

The prompt is rendered into a harmony chat, tokenised, run through GPT-OSS, and the raw residual streams after a few
decoder layers are read; the first 97 positions, a constant preamble, are dropped. Shapes: B prompts, T text tokens
after the preamble, E encoder width, F layers.
"""

from __future__ import annotations

import datetime
import re
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import notices
from .arguments import count, shortened
from .config import DEFAULT_CHAT_DATE
from .formats.chat_template import render
from .formats.files import CheckpointError
from .formats.tokenizer import read_tokenizer
from .gpt_oss import GptOss

PREFIX_TOKENS = 97  # a constant of the pipeline, whatever the tokenizer
SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background."
)
ANALYSIS = "Need to generate one image according to the description."
RETURN = "<|return|>"
WISH = "<|start|>user<|message|>"  # all that stands before it where a model has layers of its own to write with
ANSWER = "<|start|>assistant<|channel|>final<|message|>"  # after the user's turn: where a reasoner writes
TRUNCATIONS = ("reference", "prompt")
_SLOT = "\ue000lens-prompt\ue001"  # private-use characters: stands for the prompt while the chat is rendered

# Used where a checkpoint has no chat_template.jinja: the harmony chat of GPT-OSS for just the three turns Lens sends.
HARMONY_TEMPLATE = """\
{{- "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\n" -}}
{{- "Knowledge cutoff: 2024-06\\nCurrent date: " + strftime_now("%Y-%m-%d") + "\\n\\nReasoning: medium\\n\\n" -}}
{{- "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>" -}}
{%- for message in messages -%}
  {%- if message.role == "system" -%}
    {{- "<|start|>developer<|message|># Instructions\\n\\n" + message.content + "\\n\\n<|end|>" -}}
  {%- elif message.role == "user" -%}
    {{- "<|start|>user<|message|>" + message.content + "<|end|>" -}}
  {%- else -%}
    {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" -}}
    {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" -}}
  {%- endif -%}
{%- endfor -%}
"""


def prompt_list(name: str, value: str | Sequence[str] | None) -> list[str]:
    """A call's argument ``name`` as a non-empty list of strings, or ValueError."""
    values = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    if not values or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name} must be a string or a non-empty list of strings, got {shortened(value)}")
    for v in values:
        if re.search("[\ud800-\udfff]", v):  # also how Python spells bytes of the command line that are not UTF-8
            raise ValueError(f"{name} must be Unicode text, got characters that stand for none: {shortened(v)}")
    return values


def parse_date(text: Any) -> datetime.date:
    """ "YYYY-MM-DD" -> the day. ISO 8601's other spellings, which Python reads or not by its version, raise too."""
    try:
        if re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            return datetime.date.fromisoformat(text)
    except (TypeError, ValueError):
        pass
    raise ValueError(f'chat_date must be "YYYY-MM-DD" or None, got {shortened(text)}')


def negative_list(value: str | Sequence[str] | None, count: int) -> list[str | None]:
    """One negative prompt per prompt; None for a blank one: it carries no text at all, not an encoded empty string."""
    prompts = [""] if value is None else prompt_list("negative_prompt", value)
    if len(prompts) == 1:
        prompts = prompts * count
    if len(prompts) != count:
        raise ValueError(f"negative_prompt must be one string or one per prompt ({count}), got {len(prompts)}")
    return [p if p.strip() else None for p in prompts]


class ChatTokenizer:
    """Chat rendering and tokenising with one checkpoint's tokenizer."""

    def __init__(self, source: Path, vocab_size: int | None = None):
        """source, vocab_size: see `formats.tokenizer.read_tokenizer`."""
        files = read_tokenizer(source, vocab_size)
        self._with_markers, self._plain, self._special = files.with_markers, files.plain, files.special
        pad = self._special.get("pad_token")
        pad_id = self._with_markers.token_to_id(pad) if pad else None
        self.pad_id = pad_id if pad_id is not None else 0
        self._template, self._template_name = files.template or (HARMONY_TEMPLATE, "the built-in chat template")
        markers = [t.content for t in self._with_markers.get_added_tokens_decoder().values()]
        self._marker = re.compile("|".join(re.escape(m) for m in sorted(markers, key=len, reverse=True)) or r"(?!)")
        self._make_cache()
        self.frame(DEFAULT_CHAT_DATE)  # a template that cannot be used is found here, not at the first prompt
        self.is_gpt_oss = self._with_markers.token_to_id("<|message|>") == 200008  # else a tokenizer of our own
        if self.is_gpt_oss:
            got = len(self._encode(self.frame(DEFAULT_CHAT_DATE)[0]))
            if got != PREFIX_TOKENS:
                raise CheckpointError(
                    f"{self._template_name}: {PREFIX_TOKENS} tokens must precede the prompt, got {got}"
                )

    def _make_cache(self) -> None:
        self._frame = lru_cache(maxsize=32)(self._render_frame)

    def __getstate__(self) -> dict[str, Any]:
        """Copied and pickled without what it has rendered."""
        return {name: value for name, value in self.__dict__.items() if name != "_frame"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plain.encode_special_tokens = True  # a state that tokenizers do not write down
        self._make_cache()

    def _encode(self, text: str, markers: bool = True) -> list[int]:
        tokenizer = self._with_markers if markers else self._plain
        return tokenizer.encode(text, add_special_tokens=False).ids

    def ids(self, text: str, markers: bool = True) -> list[int]:
        """The tokens of a text; markers: whether control markers in it count as such."""
        return self._encode(text, markers)

    def text(self, ids: Sequence[int]) -> str:
        """The inverse, control markers included."""
        return str(self._with_markers.decode(list(ids), skip_special_tokens=False))

    def frame(self, chat_date: str | None) -> tuple[str, str]:
        """The rendered chat before and after the prompt, cut at the return marker; ``None`` means today's date."""
        return self._frame(datetime.date.today() if chat_date is None else parse_date(chat_date))

    def _render_frame(self, day: datetime.date) -> tuple[str, str]:
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": _SLOT},
            {"role": "assistant", "thinking": ANALYSIS, "content": ""},
        ]
        values = {"messages": messages, "add_generation_prompt": False, **self._special}
        text = render(self._template, self._template_name, values, {"strftime_now": day.strftime})
        before, slot, after = text.partition(_SLOT)
        if not slot or _SLOT in after:
            raise CheckpointError(f"{self._template_name}: must contain the user's message exactly once")
        return before, after.split(RETURN)[0]

    def encode(self, prompt: str, max_length: int, truncation: str, chat_date: str | None) -> list[int]:
        """The token ids of one rendered prompt, at most ``max_length`` long, preamble included.

        "reference" cuts the end of the whole (first the assistant turn, then the prompt); "prompt" cuts only the
        prompt and keeps what follows it. Both warn where they cut into the prompt. Control markers typed in a prompt are
        encoded as ordinary text.
        """
        if truncation not in TRUNCATIONS:
            raise ValueError(f"truncation must be one of {TRUNCATIONS}, got {shortened(truncation)}")
        max_length = count("max_sequence_length", max_length)
        before, after = self.frame(chat_date)
        if not self._marker.search(prompt):
            whole = self._encode(before + prompt + after)
            if len(whole) <= max_length:
                return whole
            if truncation == "reference":
                start, end = len(self._encode(before)), len(self._encode(after))
                _notice_cut(len(whole) - start - end, max_length - start)
                return whole[:max_length]
        head, middle, tail = self._encode(before), self._encode(prompt, markers=False), self._encode(after)
        if truncation == "reference":
            _notice_cut(len(middle), max_length - len(head))
        elif len(head) + len(middle) + len(tail) > max_length:
            keep = max_length - len(head) - len(tail)
            if keep < 0:
                raise ValueError(
                    f"max_sequence_length must be at least {len(head) + len(tail)} with truncation='prompt', "
                    f"got {max_length}"
                )
            _notice_cut(len(middle), keep)
            middle = middle[:keep]
        return (head + middle + tail)[:max_length]


def _notice_cut(tokens: int, kept: int) -> None:
    if kept < tokens:
        notices.warn(f"the prompt has {tokens} tokens; only the first {max(0, kept)} are kept")


class _Capture(threading.local):
    """What each thread's forward pass gave, by layer: two threads may share one encoder. A copy begins with nothing."""

    taken: dict[int, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Capture, ()


class _Hook:
    """A forward hook that keeps a layer's output; an object, so that copies of the model point to their own capture."""

    def __init__(self, capture: _Capture, layer: int):
        self.capture = capture
        self.layer = layer

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.capture.taken is not None:
            self.capture.taken[self.layer] = output[0] if isinstance(output, tuple) else output


_ROWS = 4096  # tokens of prompts that are read together


class TextEncoder:
    """Prompts -> features [T, E] of selected layers of a GPT-OSS model; on a CPU each is independent of the others.

    model: our `GptOss`, which reads prompts packed and their constant beginning once; or transformers', one at a time.
    """

    def __init__(self, tokenizer: ChatTokenizer, model: Any, layers: Sequence[int]):
        self.tokenizer = tokenizer
        self.model = model
        self.layers = tuple(layers)
        depth, width = model.config.num_hidden_layers, model.config.hidden_size
        if max(self.layers) >= depth or min(self.layers) < 0:
            raise CheckpointError(
                f"selected_layer_index must name layers 0..{depth - 1} of the text encoder, got {list(self.layers)}"
            )
        self.width = width
        self._capture = _Capture()
        for layer in () if isinstance(model, GptOss) else set(self.layers):
            model.layers[layer].register_forward_hook(_Hook(self._capture, layer))

    @property
    def kind(self) -> str:
        """What runs it, in words."""
        if not isinstance(self.model, GptOss):
            return "by transformers"
        return "with experts in MXFP4" if self.model.config.packed else "with expanded experts"

    def tokenize(
        self,
        prompts: Sequence[str],
        max_sequence_length: int = 512,
        truncation: str = "reference",
        chat_date: str | None = DEFAULT_CHAT_DATE,
    ) -> tuple[Tensor, Tensor]:
        """Whole sequences: ids int64 [B, S] right padded, mask bool [B, S]."""
        ids = [self.tokenizer.encode(p, max_sequence_length, truncation, chat_date) for p in prompts]
        length = max(map(len, ids), default=0)
        padded = torch.full((len(ids), length), self.tokenizer.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(ids), length), dtype=torch.bool)
        for row, sequence in enumerate(ids):
            padded[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = True
        return padded, mask

    def encode(
        self, prompts: Sequence[str], max_sequence_length: int, truncation: str, chat_date: str | None
    ) -> list[list[Tensor]]:
        """Per prompt its features, F tensors [T, E]; equal prompts are encoded once and share one list."""
        ids = {p: self.tokenizer.encode(p, max_sequence_length, truncation, chat_date) for p in prompts}
        found = dict(zip(ids, self.read(list(ids.values())))) if ids else {}
        return [found[prompt] for prompt in prompts]

    def features(self, ids: Sequence[int]) -> list[Tensor]:
        """One token sequence -> F tensors [T, E]: raw residual after each selected layer, T = len(ids) - 97 (or 0)."""
        return self.read([ids])[0]

    @torch.no_grad()
    def read(self, sequences: Sequence[Sequence[int]]) -> list[list[Tensor]]:
        """`features` of several sequences; our own model reads up to 4096 tokens at a time."""
        device, dtype = next(self.model.parameters()).device, self.model.dtype
        nothing = [torch.zeros(0, self.width, device=device, dtype=dtype) for _ in self.layers]
        found = [nothing] * len(sequences)
        read = [n for n, ids in enumerate(sequences) if len(ids) > PREFIX_TOKENS]
        if not isinstance(self.model, GptOss):
            for n in read:
                found[n] = self._hooked(sequences[n], device)
            return found
        while read:
            rows, count = 0, 0
            while count < len(read) and (count == 0 or rows + len(sequences[read[count]]) <= _ROWS):
                rows += len(sequences[read[count]])
                count += 1
            now, read = read[:count], read[count:]
            made = self.model.features([sequences[n] for n in now], self.layers, PREFIX_TOKENS)
            for n, features in zip(now, made):
                found[n] = features
        return found

    def _hooked(self, ids: Sequence[int], device: torch.device) -> list[Tensor]:
        """The features by transformers' model."""
        self._capture.taken = {}
        try:
            self.model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
            return [self._capture.taken[layer][0, PREFIX_TOKENS:].clone() for layer in self.layers]
        finally:
            self._capture.taken = None
