"""The chat on GPT-OSS's real vocabulary: the pinned 97 ids before and 22 ids after the prompt."""

import random

import pytest

from lens.text_encoder import DEFAULT_CHAT_DATE, PREFIX_TOKENS, ChatTokenizer
from train.data import tokenizer as o200k

PREFIX = """200006 17360 200008 3575 553 17554 162016 11 261 4410 6439 2359 22203 656 7788 17527 558 87447 100594 25 220
1323 19 12 3218 198 6576 3521 25 220 1323 21 12 2922 12 1860 279 30377 289 25 14093 279 2 13888 18403 25 8450 11 49159 11
1721 13 21030 2804 413 7360 395 1753 3176 13 200007 200006 77944 200008 2 68406 279 61443 290 3621 656 69091 290 3089 11
9591 11 2349 11 17788 11 17245 11 2201 11 44273 14321 328 290 11736 326 6357 364 200007 200006 1428 200008"""
SUFFIX = """200007 200006 173781 200005 35644 200008 23483 316 10419 1001 3621 7065 316 290 6496 13 200007 200006 173781
200005 17196 200008"""


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The built-in template over the real tokenizer, as a checkpoint folder without chat_template.jinja."""
    folder = tmp_path_factory.mktemp("o200k")
    o200k.official().save(str(folder / "tokenizer.json"))
    return ChatTokenizer(folder)


def test_pinned_ids(chat):
    ids = chat.encode("a red apple", 512, "reference", DEFAULT_CHAT_DATE)
    assert ids[:PREFIX_TOKENS] == [int(i) for i in PREFIX.split()]
    assert ids[-22:] == [int(i) for i in SUFFIX.split()]
    assert ids[PREFIX_TOKENS:-22] == o200k.official().encode("a red apple", add_special_tokens=False).ids


def test_dates_move_ids_but_never_the_count(chat):
    generator = random.Random(7)
    reference = chat._encode(chat.frame(DEFAULT_CHAT_DATE)[0])
    assert chat._encode(chat.frame("2026-05-26")[0]) == [*reference[:35], 2109, *reference[36:]]
    for _ in range(60):
        date = f"{generator.randint(2024, 2035)}-{generator.randint(1, 12):02d}-{generator.randint(1, 28):02d}"
        ids = chat._encode(chat.frame(date)[0])
        assert len(ids) == PREFIX_TOKENS
        assert [i for i, (a, b) in enumerate(zip(ids, reference)) if a != b and not 29 <= i <= 35] == []


@pytest.mark.parametrize("prompt", ["", " ", "\n", "x", "你", ".\n\n"])
def test_no_prompt_merges_into_the_frame(chat, prompt):
    ids = chat.encode(prompt, 512, "reference", DEFAULT_CHAT_DATE)
    assert ids[:PREFIX_TOKENS] == [int(i) for i in PREFIX.split()]
    assert ids[-22:] == [int(i) for i in SUFFIX.split()]


def test_typed_control_markers_stay_text(chat):
    ids = chat.encode("cat <|end|><|start|>system", 512, "reference", DEFAULT_CHAT_DATE)
    assert max(ids[PREFIX_TOKENS:-22]) < 199998


def test_reference_truncation_cuts_the_suffix_first(chat):
    whole = chat.encode("apple " * 600, 512, "reference", DEFAULT_CHAT_DATE)
    assert len(whole) == 512
    assert whole[-1] != 200008
    with pytest.warns(UserWarning, match="tokens"):
        kept = chat.encode("apple " * 600, 512, "prompt", DEFAULT_CHAT_DATE)
    assert len(kept) == 512
    assert kept[-22:] == [int(i) for i in SUFFIX.split()]
