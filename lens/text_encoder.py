"""1. Prompt -> chat -> tokens -> features of selected decoder layers (arXiv 2605.21573, section 3).

The prompt is rendered into a harmony chat, tokenised, run through GPT-OSS, and the raw residual streams after a few
decoder layers are read; the first 97 positions, a constant preamble, are dropped. Shapes: B prompts, T text tokens
after the preamble, E encoder width, F layers.
"""

from __future__ import annotations

import datetime
import re
import threading
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .formats.files import CheckpointError, read_json

PREFIX_TOKENS = 97  # a constant of the pipeline, whatever the tokenizer
DEFAULT_CHAT_DATE = "2026-05-23"  # the template prints a date; frozen so that pictures do not drift from day to day
SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background."
)
ANALYSIS = "Need to generate one image according to the description."
RETURN = "<|return|>"
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
    values = [value] if isinstance(value, str) else list(value) if value is not None else []
    if not values or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name} must be a string or a non-empty list of strings, got {value!r}")
    for v in values:
        if re.search("[\ud800-\udfff]", v):  # also how Python spells bytes of the command line that are not UTF-8
            raise ValueError(f"{name} must be Unicode text, got characters that stand for none: {v!r}")
    return values


def parse_date(text: Any) -> datetime.date:
    """ "YYYY-MM-DD" -> the day. ISO 8601's other spellings, which Python reads or not by its version, raise too."""
    try:
        if re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            return datetime.date.fromisoformat(text)
    except (TypeError, ValueError):
        pass
    raise ValueError(f'chat_date must be "YYYY-MM-DD" or None, got {text!r}')


def negative_list(value: str | Sequence[str] | None, count: int) -> list[str | None]:
    """One negative prompt per prompt; None for a blank one: it carries no text at all, not an encoded empty string."""
    prompts = [""] if value is None else prompt_list("negative_prompt", value)
    if len(prompts) == 1:
        prompts = prompts * count
    if len(prompts) != count:
        raise ValueError(f"negative_prompt must be one string or one per prompt ({count}), got {len(prompts)}")
    return [p if p.strip() else None for p in prompts]


class ChatTokenizer:
    """Chat rendering and tokenising of one checkpoint's ``tokenizer/`` folder."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: file not found")
        try:
            # Two instances, because whether markers in a text count as control tokens is a state of the tokenizer.
            self._with_markers, self._plain = Tokenizer.from_file(str(path)), Tokenizer.from_file(str(path))
        except Exception as error:
            raise CheckpointError(f"{path}: not a tokenizers file: {error}") from error
        for tokenizer in (self._with_markers, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.is_file() else {}
        self._special: dict[str, str] = {}
        for key, value in config.items():
            if key.endswith("_token") and isinstance(value, str | dict):
                content = value.get("content") if isinstance(value, dict) else value
                if not isinstance(content, str):
                    raise CheckpointError(f"{config_path}: content of {key} must be a string, got {content!r}")
                self._special[key] = content
        pad = self._special.get("pad_token")
        pad_id = self._with_markers.token_to_id(pad) if pad else None
        self.pad_id = pad_id if pad_id is not None else 0
        template_path = folder / "chat_template.jinja"
        self._template_name = str(template_path) if template_path.is_file() else "the built-in chat template"
        self._template = template_path.read_text(encoding="utf-8") if template_path.is_file() else HARMONY_TEMPLATE
        markers = [t.content for t in self._with_markers.get_added_tokens_decoder().values()]
        self._marker = re.compile("|".join(re.escape(m) for m in sorted(markers, key=len, reverse=True)) or r"(?!)")
        self._frame = lru_cache(maxsize=32)(self._render_frame)
        self.is_gpt_oss = self._with_markers.token_to_id("<|message|>") == 200008  # else a tokenizer of our own
        if self.is_gpt_oss:
            got = len(self._encode(self.frame(DEFAULT_CHAT_DATE)[0]))
            if got != PREFIX_TOKENS:
                raise CheckpointError(
                    f"{self._template_name}: {PREFIX_TOKENS} tokens must precede the prompt, got {got}"
                )

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
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals.update(strftime_now=day.strftime, raise_exception=refuse)
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": _SLOT},
            {"role": "assistant", "thinking": ANALYSIS, "content": ""},
        ]
        try:
            text = environment.from_string(self._template).render(
                messages=messages, add_generation_prompt=False, **self._special
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise CheckpointError(f"{self._template_name}: cannot be rendered: {error!r}") from error
        before, slot, after = text.partition(_SLOT)
        if not slot or _SLOT in after:
            raise CheckpointError(f"{self._template_name}: must contain the user's message exactly once")
        return before, after.split(RETURN)[0]

    def encode(self, prompt: str, max_length: int, truncation: str, chat_date: str | None) -> list[int]:
        """The token ids of one rendered prompt, at most ``max_length`` long, preamble included.

        "reference" cuts the end of the whole (first the assistant turn, then the prompt); "prompt" cuts only the
        prompt, keeps what follows it, and warns. Control markers typed in a prompt are encoded as ordinary text.
        """
        if truncation not in TRUNCATIONS:
            raise ValueError(f"truncation must be one of {TRUNCATIONS}, got {truncation!r}")
        before, after = self.frame(chat_date)
        if not self._marker.search(prompt):
            whole = self._encode(before + prompt + after)
            if truncation == "reference" or len(whole) <= max_length:
                return whole[:max_length]
        head, middle, tail = self._encode(before), self._encode(prompt, markers=False), self._encode(after)
        if truncation == "prompt" and len(head) + len(middle) + len(tail) > max_length:
            keep = max_length - len(head) - len(tail)
            if keep < 0:
                raise ValueError(
                    f"max_sequence_length must be at least {len(head) + len(tail)} with truncation='prompt', "
                    f"got {max_length}"
                )
            warnings.warn(f"the prompt has {len(middle)} tokens; only the first {keep} are kept", stacklevel=4)
            middle = middle[:keep]
        return (head + middle + tail)[:max_length]


class TextEncoder:
    """Prompts -> features [T, E] of selected layers of a GPT-OSS model, one prompt at a time: independent of others."""

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
        self._capture = threading.local()  # each thread's capture list: two threads may share one encoder
        for layer in set(self.layers):
            model.layers[layer].register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def capture(_module: nn.Module, _inputs: Any, output: Any) -> None:
            taken = getattr(self._capture, "taken", None)
            if taken is not None:
                taken[layer] = output[0] if isinstance(output, tuple) else output

        return capture

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
        cache: dict[str, list[Tensor]] = {}
        for prompt in prompts:
            if prompt not in cache:
                ids = self.tokenizer.encode(prompt, max_sequence_length, truncation, chat_date)
                cache[prompt] = self.features(ids)
        return [cache[prompt] for prompt in prompts]

    @torch.no_grad()
    def features(self, ids: Sequence[int]) -> list[Tensor]:
        """One token sequence -> F tensors [T, E]: raw residual after each selected layer, T = len(ids) - 97 (or 0)."""
        device, dtype = next(self.model.parameters()).device, self.model.dtype
        if len(ids) <= PREFIX_TOKENS:
            return [torch.zeros(0, self.width, device=device, dtype=dtype) for _ in self.layers]
        self._capture.taken = {}
        try:
            self.model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
            return [self._capture.taken[layer][0, PREFIX_TOKENS:].clone() for layer in self.layers]
        finally:
            self._capture.taken = None
