"""Tokenizers and templates that would fail, hang or fill the memory later are refused when they are loaded."""

from __future__ import annotations

import json
import shutil

import pytest

from lens.formats import chat_template
from lens.formats.chat_template import render
from lens.formats.files import CheckpointError
from lens.formats.tokenizer import read_tokenizer
from lens.text_encoder import ChatTokenizer
from tests.small_pipeline import FOLDER, fresh


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FOLDER / "tokenizer", tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def change(folder, **values):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def word_level(kind, **more):
    vocab = [["a", 0.0]] if kind == "Unigram" else {"a": 0}
    return {"type": kind, "vocab": vocab, **more}


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10}
FAULTS = {
    "no unknown word": ({"model": word_level("WordLevel", unk_token="?")}, "cannot encode"),
    "no unknown piece": (
        {"model": word_level("WordPiece", unk_token="?", continuing_subword_prefix="", max_input_chars_per_word=9)}, "cannot encode",
    ),
    "empty pattern": ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": ""}}, "Replace of an empty pattern"),
    "no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "not a tokenizers file|cannot encode"),
    "charsmap": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}}, "normalizer: Precompiled"),
    "growth": ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 9}}, "may grow 16-fold, got 1e"),
    "long token": (
        {"added_tokens": [{"id": 6, "content": "x" * 10**6, "special": True}]}, "an added token must be a string of at most 1000",
    ),
    "digits": ({"version": 10**400}, "an integer of 401 digits"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "message"), FAULTS.values(), ids=FAULTS)
def test_a_tokenizer_that_could_not_encode_is_refused_at_load(folder, values, message):
    change(folder, **values)
    with pytest.raises(CheckpointError, match=message) as error:
        read_tokenizer(folder)
    assert str(error.value).startswith(str(folder / "tokenizer.json"))


def test_ids_beyond_the_vocabulary_are_found_at_load(folder, tmp_path):
    ids = json.loads((folder / "tokenizer.json").read_text())
    largest = max(*ids["model"]["vocab"].values(), *(t["id"] for t in ids["added_tokens"]))
    assert read_tokenizer(folder, largest + 1)
    with pytest.raises(
        CheckpointError, match=rf"below the text encoder's vocab_size = {largest}, got {largest}: the tokenizer of"
    ):
        read_tokenizer(folder, largest)
    ids["added_tokens"].append(ids["added_tokens"][0] | {"id": 5000, "content": "<|far|>"})
    (folder / "tokenizer.json").write_text(json.dumps(ids))
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: ids must lie below the text encoder's vocab_size = 300, got"
    ):
        fresh(tokenizer=folder)


def test_dropout_of_a_training_draws_nothing_here(folder):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    change(folder, model=model | {"dropout": 0.5})
    text = "a red apple on a wooden table beside two green books"
    plain = ChatTokenizer(FOLDER / "tokenizer").encode(text, 512, "reference", None)
    found = ChatTokenizer(folder)
    assert all(found.encode(text, 512, "reference", None) == plain for _ in range(5))


@pytest.mark.parametrize("text", ['{"pad_token": "\\ud800"}', '{"pad_token": {"content": "\\uDFFF"}}'])
def test_special_tokens_are_text(folder, text):
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not valid JSON: 'utf-8' codec can't encode"):
        read_tokenizer(folder)


# ------------------------------------------------------------------------------------------------ templates

VALUES = {"messages": [{"role": "user", "content": "x" * 100}], "many": list(range(100))}
DOUBLING = "{%- set ns = namespace(s='ab') -%}{%- for i in range(60) -%}{%- set ns.s = ns.s "
BOMBS = {
    "length": "x" * (chat_template.MOST_CHARACTERS + 1),
    "nested loops": "{% for i in range(10000) %}{% for j in range(10000) %}{% for k in range(10000) %}{% endfor %}{% endfor %}{% endfor %}",
    "a long range": "{{ range(10**9)|list }}",
    "a repeated text": "{{ 'a' * 10**9 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "large numbers": "{%- set ns = namespace(n=10) -%}{%- for i in range(5000) -%}{%- set ns.n = ns.n * ns.n -%}{%- endfor -%}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "a method's format": "{{ '{:1000000000d}'.format(1) }}",
    "padding": "{{ 'a'.ljust(10**9) }}",
    "indent": "{{ 'a'|indent(10**9) }}",
    "indent of JSON": "{{ [1]|tojson(indent=10**9) }}",
    "indent of JSON by a number": "{{ [1]|tojson(indent=1000000000) }}",
    "lipsum": "{{ lipsum(n=10**7) }}",
    "a macro twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "doubled by +": DOUBLING + "+ ns.s -%}{%- endfor -%}",
    "doubled by ~": DOUBLING + "~ ns.s -%}{%- endfor -%}",
    "doubled by replace": DOUBLING + ".replace('a', 'aaab') -%}{%- endfor -%}",
    "doubled by the filter": DOUBLING + "|replace('a', 'aaab') -%}{%- endfor -%}",
    "doubled by join": DOUBLING + ".join(['', ns.s, '']) -%}{%- endfor -%}",
    "doubled by a block": "{%- set ns = namespace(s='ab') -%}{%- for i in range(60) -%}{%- set b -%}{{ ns.s }}{{ ns.s }}{%- endset -%}"
    "{%- set ns.s = b -%}{%- endfor -%}",
    "doubled lists": "{%- set ns = namespace(s=[1]) -%}{%- for i in range(60) -%}{%- set ns.s = [ns.s, ns.s] -%}{%- endfor -%}{{ ns.s }}",
    "much plain text": "{% for i in range(10000) %}" + "x" * 1000 + "{% endfor %}",
    "a recursive loop": "{% for i in many recursive %}{{ loop(many) }}{% endfor %}",
    "another file": "{% include 'a' %}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_a_template_is_bounded(source):
    with pytest.raises(CheckpointError, match=r"a\.jinja: (a template of|cannot be rendered)"):
        render(source, "a.jinja", VALUES, {})


def test_what_templates_use_is_there():
    """Macros, namespaces, slices, filters and methods that GPT-OSS's own template has, some in branches never taken."""
    source = """
{%- macro typed(spec, required, nullable=false) -%}
  {%- if spec.type is string -%}{{- spec.type + "[]" }}{%- elif spec.of -%}{{- spec.of|join(" | ") }}{{ spec|tojson }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(name=none, found=false) -%}
{%- set rest = messages[1:] if messages[0].role == "system" else messages -%}
{%- for m in rest -%}
  {%- if "content" in m and m.content.startswith("x") and not loop.last -%}{%- set ns.found = true -%}{%- continue -%}{%- endif -%}
  {{- m.role ~ loop.index ~ (m.content|trim|length) -}}{{- typed({"type": "a"}, []) -}}
{%- endfor -%}
{{- ns.found }}{{ ("a, b".split(", ")|first).upper() }}{{ (1, 2)[1] + 3 }}{{ missing is not defined }}{{ now("%Y") }}"""
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "x"},
        {"role": "user", "content": " y "},
    ]
    assert render(source, "a", {"messages": messages}, {"now": lambda form: form}) == "user21a[]TrueA5True%Y"


@pytest.mark.parametrize("data", [b"\xff\xfe{{ messages }}", b"{{ 1"])
def test_a_template_that_is_no_text_or_no_template_is_refused_at_load(folder, data):
    (folder / "chat_template.jinja").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: (not UTF-8 text|cannot be rendered)"):
        ChatTokenizer(folder)
