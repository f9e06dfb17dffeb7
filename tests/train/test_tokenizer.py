"""Mini's pruned tokenizer is a closed part of GPT-OSS's: same pieces where it matters, bytes at worst."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lens.text_encoder import PREFIX_TOKENS, ChatTokenizer
from train.data import tokenizer as stage
from train.data.world import World

FOLDER = Path(__file__).parents[2] / "lens" / "mini" / "base" / "tokenizer"


@pytest.fixture(scope="module")
def pruned():
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_rows_and_closure():
    document = json.loads((FOLDER / "tokenizer.json").read_text())
    vocabulary, merges = document["model"]["vocab"], document["model"]["merges"]
    specials = {t["content"]: t["id"] for t in document["added_tokens"]}
    assert len(vocabulary) + len(specials) == stage.ROWS
    assert sorted([*vocabulary.values(), *specials.values()]) == list(range(stage.ROWS))
    assert all(letter in vocabulary for letter in stage._byte_letters())
    assert all(a in vocabulary and b in vocabulary and a + b in vocabulary for a, b in merges)
    made = {a + b for a, b in merges}
    assert all(token in made for token in vocabulary if len(token) > 1), "a token no merge can reach"


def test_captions_split_as_in_the_full_tokenizer(pruned):
    world, full = World(), stage.official()
    for seed in range(300):
        caption = world.scene(seed).caption
        assert (
            pruned.encode(caption, add_special_tokens=False).tokens
            == full.encode(caption, add_special_tokens=False).tokens
        )


@pytest.mark.parametrize("date", ["2024-01-01", "2026-05-23", "2031-12-31", "2035-10-10"])
def test_prefix_is_97_tokens_and_suffix_one(date):
    chat = ChatTokenizer(FOLDER)
    before, after = chat.frame(date)
    assert len(chat._encode(before)) == PREFIX_TOKENS
    assert chat._encode(after) == [chat._with_markers.token_to_id("<|end|>")]


@pytest.mark.parametrize("text", ["", " ", "rhinoceros", "你好 ünïcode\tx\n\n", "🦏", "it's 12345", "<|end|>"])
def test_any_text_survives(pruned, text):
    ids = pruned.encode(text, add_special_tokens=False).ids
    assert pruned.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < stage.ROWS for i in ids)


def test_an_altered_vocabulary_is_refused():
    with pytest.raises(ValueError, match="SHA-256"):
        stage.check_official([b"a", b"b"], "some file")


def test_the_shipped_template_is_the_written_one():
    assert (FOLDER / "chat_template.jinja").read_text() == stage.chat_template()
