"""Prompt -> chat -> ids -> features, on the golden checkpoint's small tokenizer; ids of the real one: test_o200k.py."""

from __future__ import annotations

import datetime
import shutil
import warnings

import pytest
import torch

from lens import text_encoder
from lens.formats.files import CheckpointError
from lens.text_encoder import ANALYSIS, HARMONY_TEMPLATE, SYSTEM, ChatTokenizer
from tests.small_pipeline import FOLDER, counted, fresh, shared

TOKENIZER = FOLDER / "tokenizer"
MARKERS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|endoftext|>"]


def folder(tmp_path, template: str | None = None):
    """The tokenizer with another template, or without one."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, tmp_path / name)
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(TOKENIZER)


def encode(chat, prompt, length=512, truncation="reference", date="2026-05-23"):
    return chat.encode(prompt, length, truncation, date)


def test_three_turns_and_the_cut(chat):
    before, after = chat.frame("2026-05-23")
    assert before == f"<|start|>system<|message|>{SYSTEM}<|end|><|start|>user<|message|>"
    assert after == (
        f"<|end|><|start|>assistant<|channel|>analysis<|message|>{ANALYSIS}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>"
    )


@pytest.mark.parametrize("prompt", ["a red apple", "", " ", "{{ 7 * 7 }} {% if %}", "红苹果 🍎\n\t\u0000é"])
def test_decodes_to_the_rendered_text(chat, prompt):
    from tokenizers import Tokenizer

    before, after = chat.frame("2026-05-23")
    text = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).decode(
        encode(chat, prompt), skip_special_tokens=False
    )
    assert text == before + prompt + after


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("truncation", ["reference", "prompt"])
def test_control_markers_in_a_prompt_are_ordinary_text(chat, marker, truncation):
    """As many control tokens as without them, and the prompt's own bytes in between."""
    plain = encode(chat, "a cat")
    ids = encode(chat, f"a {marker}cat", truncation=truncation)
    assert [i for i in ids if i < 6] == [i for i in plain if i < 6]
    from tokenizers import Tokenizer

    before, after = chat.frame("2026-05-23")
    text = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json")).decode(ids, skip_special_tokens=False)
    assert text == f"{before}a {marker}cat{after}"


def test_reference_truncation_cuts_the_end_of_the_whole(chat):
    whole = encode(chat, "a red apple")
    for length in (1, 97, 98, len(whole) - 1, len(whole), len(whole) + 1):
        assert encode(chat, "a red apple", length) == whole[:length]
    marked = encode(chat, "a <|end|>")
    assert encode(chat, "a <|end|>", 150) == marked[:150]


def test_prompt_truncation_cuts_only_the_prompt(chat):
    prompt = "Q" * 26  # one token a letter here
    whole = encode(chat, prompt)
    before, after = (len(chat._encode(part)) for part in chat.frame("2026-05-23"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert encode(chat, prompt, len(whole), "prompt") == whole
    with pytest.warns(UserWarning, match="the prompt has 26 tokens; only the first 16 are kept"):
        cut = encode(chat, prompt, len(whole) - 10, "prompt")
    assert cut == encode(chat, prompt[:16])
    with pytest.warns(UserWarning, match="only the first 0 are kept"):
        assert encode(chat, prompt, before + after, "prompt") == encode(chat, "")
    with pytest.raises(
        ValueError, match=f"max_sequence_length must be at least {before + after} .* got {before + after - 1}"
    ):
        encode(chat, prompt, before + after - 1, "prompt")
    with pytest.raises(ValueError, match="truncation must be one of"):
        encode(chat, prompt, 512, "suffix")


@pytest.mark.parametrize(("length", "tokens"), [(1, 0), (96, 0), (97, 0), (98, 1), (100, 3)])
def test_up_to_97_tokens_give_no_text(length, tokens):
    pipe = shared()
    ids, mask = pipe.tokenize("a red apple", max_sequence_length=length)
    assert ids.shape == mask.shape == (1, length)
    features, mask = pipe.encode_text(["a red apple", "cats"], max_sequence_length=length)
    assert [f.shape for f in features] == [(2, tokens, 64)] * 4
    assert mask.shape == (2, tokens)
    whole = pipe.encode_text("a red apple")[0]
    for short, long in zip(features, whole, strict=True):  # the encoder is causal
        torch.testing.assert_close(short[0], long[0, :tokens], rtol=1e-4, atol=1e-4)
    with counted(pipe.transformer, "denoise") as calls:
        image = pipe("a red apple", max_sequence_length=length, guidance_scale=1.0, seed=1, height=32, width=32,
                     num_inference_steps=1, output_type="latent").images  # fmt: skip
    assert calls[0][0][3].text_lengths == [tokens]
    blank = pipe(prompt_embeds=[torch.zeros(1, 0, 64)] * 4, guidance_scale=1.0, seed=1, height=32, width=32,
                 num_inference_steps=1, output_type="latent").images  # fmt: skip
    assert torch.equal(image, blank) == (tokens == 0)


def test_tokenize_pads_on_the_right():
    ids, mask = shared().tokenize(["a red apple", "cat"])
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [len(encode(ChatTokenizer(TOKENIZER), p)) for p in ("a red apple", "cat")]
    assert mask[1].tolist() == sorted(mask[1].tolist(), reverse=True)
    assert set(ids[~mask].tolist()) == {5}  # <|endoftext|>


def test_chat_date(tmp_path, monkeypatch):
    chat = ChatTokenizer(folder(tmp_path))
    assert "Current date: 2026-05-23\n" in chat.frame("2026-05-23")[0]

    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls(2031, 2, 3)

    monkeypatch.setattr(text_encoder.datetime, "date", Day)
    assert "Current date: 2031-02-03\n" in chat.frame(None)[0]
    monkeypatch.setattr(Day, "today", classmethod(lambda cls: cls(2031, 2, 4)))
    assert "Current date: 2031-02-04\n" in chat.frame(None)[0]  # not the day of the first call
    for date in ("2026-5-23", "today", "2026-02-30", "", "20260523", "2026-W21-6", 5, datetime.datetime(2026, 5, 23)):
        with pytest.raises(ValueError, match=r'chat_date must be "YYYY-MM-DD" or None, got'):
            chat.frame(date)


def test_built_in_template_where_there_is_none(tmp_path):
    chat = ChatTokenizer(folder(tmp_path))
    before, after = chat.frame("2026-05-23")
    assert before == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2026-05-23\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
        f"<|start|>developer<|message|># Instructions\n\n{SYSTEM}\n\n<|end|><|start|>user<|message|>"
    )
    assert after == ChatTokenizer(TOKENIZER).frame("2026-05-23")[1]
    own = tmp_path / "own"
    own.mkdir()
    assert ChatTokenizer(folder(own, HARMONY_TEMPLATE)).frame("2026-05-23") == (before, after)


BAD_TEMPLATES = {
    "no prompt": ("{{ messages[0].content }}", "must contain the user's message exactly once"),
    "prompt twice": ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "exactly once"),
    "changed prompt": ("{{ messages[1].content | upper }}", "exactly once"),
    "syntax": ("{% for %}", "cannot be rendered"),
    "own refusal": ("{{ raise_exception('no system turn') }}", "cannot be rendered.*no system turn"),
    "division": ("{{ 1 / 0 }}", "cannot be rendered"),
    "escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered.*unsafe"),
    "import": ("{% import 'os' as os %}{{ messages[1].content }}", "cannot be rendered"),
    "mutation": ("{% set _ = messages.append(1) %}{{ messages[1].content }}", "cannot be rendered.*unsafe|not safe"),
    "bomb": ("{% for i in range(999999999) %}{{ i }}{% endfor %}", "cannot be rendered"),
}


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES.keys())
def test_templates_that_cannot_be_used(tmp_path, template, message):
    with pytest.raises(CheckpointError, match=message) as error:
        ChatTokenizer(folder(tmp_path, template))
    assert "chat_template.jinja" in str(error.value)


def test_template_may_break_loops_and_read_special_tokens(tmp_path):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}"
        "{% endfor %}{{ eos_token }}after"
    )
    before, after = ChatTokenizer(folder(tmp_path, template)).frame("2026-05-23")
    assert before == "<|start|>" + SYSTEM
    assert after == ""  # cut at the return marker


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"model": {}}'])
def test_broken_tokenizer_is_named(tmp_path, content):
    folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: (file not found|not a tokenizers file|not valid JSON|expected a)"
    ):
        ChatTokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"content": 5}', '{"content": null}'])
def test_broken_special_token_is_named(tmp_path, content):
    folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(f'{{"pad_token": {content}}}')
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: content of pad_token must be a string, got"):
        ChatTokenizer(tmp_path)


@pytest.mark.parametrize("arguments", [{"prompt": "caf\udce9"}, {"prompt": "cafe", "negative_prompt": ["\ud800 fog"]}])
def test_text_that_is_not_unicode_is_refused(arguments):
    with pytest.raises(ValueError, match=r"prompt must be Unicode text, got .* '.*\\ud"):
        shared()(**arguments, height=32, width=32, num_inference_steps=1)


def test_features_are_raw_residuals_of_the_selected_layers():
    """transformers' own hidden states, before the final norm; with its encoder the same, read by hooks."""
    pipe, theirs = shared(), fresh(encoder="transformers")
    ids = pipe.tokenize("a red apple")[0]
    states = theirs.text_encoder.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    features, hooked = pipe.encode_text("a red apple")[0], theirs.encode_text("a red apple")[0]
    for layer, f in enumerate(features[:-1]):  # the last recorded state has the final norm applied
        assert torch.equal(hooked[layer], states[layer + 1][:, 97:])
        expected = states[layer + 1][:, 97:]
        assert (f - expected).norm() <= 1e-5 * expected.norm()
    assert ["by transformers" in repr(p) for p in (pipe, theirs)] == [False, True]
    with pytest.raises(ValueError, match="encoder must be one of lens, transformers, got 'vllm'"):
        fresh(encoder="vllm")
